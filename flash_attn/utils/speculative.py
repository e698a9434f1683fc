"""Speculative decoding: a cheap model drafts a few tokens, the model proper checks all of them in one evaluation.

Leviathan et al. 2023 (arXiv 2211.17192): the result is distributed as the model proper's own, whatever the draft is worth.
"""

import logging
from typing import Any

import torch
from torch import Tensor

from flash_attn.errors import InvalidArgument, UnsupportedProblem
from flash_attn.utils.decoder import Decoder, DecoderOutput, logged_time
from flash_attn.utils.sampling import sample, sample_speculative

_log = logging.getLogger("flash_attn")


@torch.inference_mode()
def decode_speculative(
    input_ids: Tensor,
    model: Any,
    model_draft: Any,
    max_length: int,
    speculative_lookahead: int = 3,
    top_k: int = 1,
    top_p: float = 0.0,
    temperature: float = 1.0,
    eos_token_id: int | None = None,
    vocab_size: int | None = None,
    tensor_parallel: int = 1,
    cg: bool = False,
    enable_timing: bool = False,
    debug: bool = False,
) -> DecoderOutput:
    """`decode` in fewer evaluations of the model: model_draft, with the same vocabulary, proposes what comes next.

    Args:
        input_ids: (1, seqlen).
        max_length: of the prompt and the new tokens together.
        speculative_lookahead: tokens drafted at a time.
        top_k, top_p, temperature: as in `sample`, for both models; with top_k = 1 the tokens are those of `decode`.
        eos_token_id: stop behind this token.
        vocab_size: ignore the logits past it.
        tensor_parallel: ranks of the models.
        cg: replay CUDA graphs, as in `decode`.
        enable_timing: log the time, the number of evaluations, and how many drafted tokens were kept.
        debug: log at level DEBUG what is drafted and what is kept.

    Returns:
        sequences (1, length) and scores (1, new tokens, vocab_size), the model's logits for every new token.

    Raises:
        UnsupportedProblem: more than one sequence, of which each would keep another number of tokens; or cg on a CPU.
        InvalidArgument: nothing would be drafted, the vocabularies differ, or with cg both models are one.

    Source: flash_attn 2.8.3, flash_attn/utils/generation.py.
    """
    if input_ids.shape[0] != 1:
        raise UnsupportedProblem(
            f"Speculative decoding implementation only supports batch_size=1, got {input_ids.shape[0]}"
        )
    if speculative_lookahead < 1:
        raise InvalidArgument(f"speculative_lookahead must be at least 1, got {speculative_lookahead}")
    if cg and model is model_draft:
        raise InvalidArgument("with cg=True the model and its draft need caches of their own, got one model as both")
    options = dict(top_k=top_k, top_p=top_p, temperature=temperature)
    start = (input_ids, max_length, vocab_size, tensor_parallel, cg)
    main = Decoder.start(model, *start, decoding_seqlens=range(1, speculative_lookahead + 2))
    # one or two tokens at a time: behind two, the draft has not seen the last that it drafted
    draft = Decoder.start(model_draft, *start, decoding_seqlens=(1, 2))
    sequence, scores, kept, drafted = input_ids, [], 0, 0
    with logged_time(enable_timing, input_ids.device, tensor_parallel):
        while True:
            num_draft = max(0, min(speculative_lookahead, max_length - sequence.shape[1] - 1))
            proposal, proposal_logits = _propose(draft, sequence, num_draft, options)
            tokens, logits = _check_proposal(main, sequence, proposal, proposal_logits, options)
            kept, drafted = kept + tokens.shape[1] - 1, drafted + num_draft
            if debug:
                _log.debug("drafted %s, generated %s", proposal.tolist(), tokens.tolist())
            tokens = _until(tokens, eos_token_id)
            sequence = torch.cat([sequence, tokens], dim=1)
            scores.append(logits[:, : tokens.shape[1]])
            if sequence.shape[1] >= max_length or (eos_token_id is not None and int(tokens[0, -1]) == eos_token_id):
                break
            # neither has evaluated the newest token, and what was rejected is forgotten
            main.params.seqlen_offset = sequence.shape[1] - 1
            draft.params.seqlen_offset = min(draft.params.seqlen_offset, sequence.shape[1] - 1)
    if enable_timing:
        rate = 100 * kept / max(1, drafted)
        _log.info("Number of calls to main model: %d, acceptance rate: %.2f%%", len(scores), rate)
    return DecoderOutput(sequence, torch.cat(scores, dim=1))


def _propose(draft: Decoder, sequence: Tensor, num_draft: int, options: dict[str, Any]) -> tuple[Tensor, list[Tensor]]:
    """(tokens (1, num_draft), the logits (1, 1, vocab_size) of each)."""
    tokens, logits = [sequence[:, draft.params.seqlen_offset :]], []
    for _ in range(num_draft):
        logits.append(draft.logits(tokens[-1]))
        tokens.append(sample(logits[-1][:, -1], **options)[:, None])
    return torch.cat([sequence[:, :0], *tokens[1:]], dim=1), logits


def _check_proposal(
    main: Decoder, sequence: Tensor, proposal: Tensor, proposal_logits: list[Tensor], options: dict[str, Any]
) -> tuple[Tensor, Tensor]:
    """(the tokens that the model generates, its logits for them), of 1 to num_draft + 1 tokens."""
    new = torch.cat([sequence[:, main.params.seqlen_offset :], proposal], dim=1)
    logits = main.logits(new, num_last_tokens=proposal.shape[1] + 1)
    logits_draft = torch.cat(proposal_logits, dim=1) if proposal_logits else logits[:, :0]
    tokens, num_generated = sample_speculative(logits, logits_draft, proposal, **options)
    count = int(num_generated[0])
    return tokens[:, :count], logits[:, :count]


def _until(tokens: Tensor, eos_token_id: int | None) -> Tensor:
    """The tokens (1, n) up to the first eos_token_id."""
    if eos_token_id is None:
        return tokens
    ends = (tokens[0] == eos_token_id).nonzero()
    return tokens if len(ends) == 0 else tokens[:, : int(ends[0]) + 1]
