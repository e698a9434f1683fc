"""Decoding token after token with a cache of keys and values: upstream's import path and meaning.

A model is called as `model(input_ids, position_ids=, inference_params=, num_last_tokens=1)` and returns an object whose
`logits` are (batch, 1, vocab_size).
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from flash_attn.errors import InvalidArgument, UnsupportedProblem


@dataclass
class InferenceParams:
    """Where a generation stands, handed to every layer.

    key_value_memory_dict: layer index -> (max_batch_size, max_seqlen, 2, nheads, headdim).
    lengths_per_sample: (batch,), int32; takes the place of seqlen_offset where the sequences differ in length.
    """

    max_seqlen: int
    max_batch_size: int
    seqlen_offset: int = 0
    batch_size_offset: int = 0
    key_value_memory_dict: dict = field(default_factory=dict)
    lengths_per_sample: Tensor | None = None

    def reset(self, max_seqlen: int, max_batch_size: int) -> None:
        """Begin a new generation in the same memory."""
        self.max_seqlen = max_seqlen
        self.max_batch_size = max_batch_size
        self.seqlen_offset = 0
        if self.lengths_per_sample is not None:
            self.lengths_per_sample.zero_()


@dataclass
class DecoderOutput:
    """sequences: (batch, length), the prompt first; scores: one (batch, vocab_size) per new token, None if not kept."""

    sequences: Tensor
    scores: tuple[Tensor, ...] | None = None


def modify_logits_for_top_k_filtering(logits: Tensor, top_k: int) -> None:
    """Set all but the top_k logits of a row to -inf, in place."""
    smallest_kept = torch.topk(logits, top_k)[0][..., -1, None]
    logits.masked_fill_(logits < smallest_kept, -torch.inf)


def modify_logits_for_top_p_filtering(logits: Tensor, top_p: float) -> None:
    """Keep the fewest logits of a row whose probabilities reach top_p, set the others to -inf, in place.

    Nothing happens for top_p <= 0 or >= 1.
    """
    if top_p <= 0.0 or top_p >= 1.0:
        return
    ascending, order = torch.sort(logits, descending=False)
    removed = ascending.softmax(dim=-1).cumsum(dim=-1) <= 1.0 - top_p
    logits.masked_fill_(removed.scatter(1, order, removed), -torch.inf)


def sample(logits: Tensor, top_k: int = 1, top_p: float = 0.0, temperature: float = 1.0) -> Tensor:
    """One token per row: the largest for top_k = 1, else drawn from the top_k (0: from all), then from the top_p.

    Args:
        logits: (batch, vocab_size).

    Returns:
        (batch,), int64.

    Raises:
        InvalidArgument: top_p exceeds 1.
    """
    if top_k == 1:
        return logits.argmax(dim=-1)
    if top_p > 1.0:
        raise InvalidArgument(f"top_p must be in (0, 1], got {top_p}")
    if top_k > 0:
        kept, tokens = torch.topk(logits, min(top_k, logits.shape[-1]), dim=-1)
        return tokens.gather(1, _draw(kept, top_p, temperature)).squeeze(1)
    return _draw(logits, top_p, temperature).squeeze(1)


@torch.inference_mode()
def decode(
    input_ids: Tensor,
    model: Any,
    max_length: int,
    top_k: int = 1,
    top_p: float = 0.0,
    temperature: float = 1.0,
    eos_token_id: int | None = None,
    teacher_outputs: Tensor | None = None,
    vocab_size: int | None = None,
    tensor_parallel: int = 1,
    cg: bool = False,
    enable_timing: bool = False,
    output_scores: bool = True,
    streamer: Any = None,
) -> DecoderOutput:
    """Continue a batch of prompts of one length.

    Args:
        input_ids: (batch, seqlen).
        max_length: of the prompt and the new tokens together.
        top_k, top_p, temperature: as in `sample`.
        eos_token_id: stop where all sequences have drawn it at the same step.
        teacher_outputs: (batch, length); its tokens are taken instead of drawn ones as far as it reaches.
        vocab_size: ignore the logits past it.
        tensor_parallel: ranks of the model; only graph capture and timing would need to know.
        streamer: its put(tokens) is called with the prompt and every new token, on the CPU, and its end() at last.

    Raises:
        UnsupportedProblem: cg (replay of CUDA graphs) or enable_timing (prints a time) is asked for.

    Source: flash_attn 2.8.3, flash_attn/utils/generation.py.
    """
    if cg or enable_timing:
        raise UnsupportedProblem(
            f"decode runs without CUDA graphs and prints nothing, got cg {cg} and enable_timing {enable_timing}"
        )
    params = InferenceParams(max_seqlen=max_length, max_batch_size=input_ids.shape[0])
    sequences, scores = [input_ids], []
    if streamer is not None:
        streamer.put(input_ids.cpu())
    while not _finished(sequences[-1], params, max_length, eos_token_id):
        logits = _next_logits(model, sequences[-1], params)[..., :vocab_size]
        params.seqlen_offset += sequences[-1].shape[1]
        if output_scores:
            scores.append(logits)
        if teacher_outputs is not None and params.seqlen_offset < teacher_outputs.shape[1]:
            tokens = teacher_outputs[:, params.seqlen_offset]
        else:
            tokens = sample(logits, top_k=top_k, top_p=top_p, temperature=temperature)
        sequences.append(tokens.unsqueeze(1))
        if streamer is not None:
            streamer.put(tokens.cpu())
    if streamer is not None:
        streamer.end()
    return DecoderOutput(torch.cat(sequences, dim=1), tuple(scores) if output_scores else None)


class GenerationMixin:
    """`generate` for a model."""

    def allocate_inference_cache(
        self, batch_size: int, max_seqlen: int, dtype: torch.dtype | None = None, **kwargs: Any
    ) -> Any:
        """The caches of all layers; a model defines it."""
        raise NotImplementedError(f"{type(self).__name__} does not define allocate_inference_cache")

    def generate(
        self,
        input_ids: Tensor,
        max_length: int,
        top_k: int = 1,
        top_p: float = 0.0,
        temperature: float = 1.0,
        return_dict_in_generate: bool = False,
        output_scores: bool = False,
        **kwargs: Any,
    ) -> Any:
        """The sequences of `decode`, with return_dict_in_generate its whole result."""
        output = decode(
            input_ids,
            self,
            max_length,
            top_k=top_k,
            top_p=top_p,
            temperature=temperature,
            output_scores=output_scores,
            **kwargs,
        )
        return output if return_dict_in_generate else output.sequences


def _draw(logits: Tensor, top_p: float, temperature: float) -> Tensor:
    logits = logits / temperature
    modify_logits_for_top_p_filtering(logits, top_p)
    return torch.multinomial(torch.softmax(logits, dim=-1), num_samples=1)


def _next_logits(model: Any, input_ids: Tensor, params: InferenceParams) -> Tensor:
    position_ids = None
    if params.seqlen_offset > 0:
        shape = (input_ids.shape[0], 1)
        position_ids = torch.full(shape, params.seqlen_offset, dtype=torch.long, device=input_ids.device)
    output = model(input_ids, position_ids=position_ids, inference_params=params, num_last_tokens=1)
    return output.logits.squeeze(dim=1)


def _finished(tokens: Tensor, params: InferenceParams, max_length: int, eos_token_id: int | None) -> bool:
    if params.seqlen_offset == 0:
        return False
    if eos_token_id is not None and bool((tokens == eos_token_id).all()):
        return True
    return params.seqlen_offset >= max_length - 1
