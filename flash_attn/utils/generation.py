"""Decoding token after token with a cache of keys and values: upstream's import path and meaning.

A model is called as `model(input_ids, position_ids=, inference_params=, num_last_tokens=)` and returns an object whose
`logits` are (batch, num_last_tokens, vocab_size).
"""

from typing import Any

import torch
from torch import Tensor

from flash_attn.utils.decoder import Decoder, DecoderOutput, logged_time
from flash_attn.utils.decoding_graphs import DecodingCGCache, capture_graph, update_graph_cache
from flash_attn.utils.inference_params import InferenceParams, allocate_inference_cache
from flash_attn.utils.sampling import (
    modify_logits_for_top_k_filtering,
    modify_logits_for_top_p_filtering,
    sample,
    sample_speculative,
)
from flash_attn.utils.speculative import decode_speculative

__all__ = [
    "DecoderOutput",
    "DecodingCGCache",
    "GenerationMixin",
    "InferenceParams",
    "allocate_inference_cache",
    "capture_graph",
    "decode",
    "decode_speculative",
    "modify_logits_for_top_k_filtering",
    "modify_logits_for_top_p_filtering",
    "sample",
    "sample_speculative",
    "update_graph_cache",
]


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
        tensor_parallel: ranks of the model, which timing waits for and a model without `allocate_inference_cache` needs.
        cg: replay a CUDA graph for every token behind the prompt. It stays with the model for later calls of the same
            batch size, whose length and batch size are no larger than before. The model needs use_flash_attn.
        enable_timing: log how long it takes, to the logger "flash_attn" at level INFO.
        streamer: its put(tokens) is called with the prompt and every new token, on the CPU, and its end() at last.

    Raises:
        UnsupportedProblem: cg with a model on a CPU.

    Source: flash_attn 2.8.3, flash_attn/utils/generation.py.
    """
    decoder = Decoder.start(model, input_ids, max_length, vocab_size, tensor_parallel, cg)
    params = decoder.params
    sequences, scores = [input_ids], []
    if streamer is not None:
        streamer.put(input_ids.cpu())
    with logged_time(enable_timing, input_ids.device, tensor_parallel):
        while not _finished(sequences[-1], params, max_length, eos_token_id):
            logits = decoder.logits(sequences[-1]).squeeze(dim=1)
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


def _finished(tokens: Tensor, params: InferenceParams, max_length: int, eos_token_id: int | None) -> bool:
    if params.seqlen_offset == 0:
        return False
    if eos_token_id is not None and bool((tokens == eos_token_id).all()):
        return True
    return params.seqlen_offset >= max_length - 1
