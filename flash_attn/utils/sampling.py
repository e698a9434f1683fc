"""The choice of tokens from logits: one by one, or by checking what a cheaper model has drawn.

A token's distribution is softmax(logits / temperature) over the top_k largest logits, cut to the fewest tokens whose
probabilities reach top_p.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from flash_attn.errors import InvalidArgument


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
    logits.masked_fill_(removed.scatter(-1, order, removed), -torch.inf)


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
    probabilities, tokens = _candidates(logits, top_k, top_p, temperature)
    drawn = torch.multinomial(probabilities, num_samples=1)
    return (drawn if tokens is None else tokens.gather(1, drawn)).squeeze(1)


def sample_speculative(
    logits: Tensor,
    logits_draft: Tensor,
    tokens_draft: Tensor,
    top_k: int = 1,
    top_p: float = 0.0,
    temperature: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Tokens distributed as if drawn one by one from `logits`, by checking tokens that were drawn from `logits_draft`.

    With p and q the two distributions at a position, a drafted token x is kept with probability min(1, p(x) / q(x)); the
    first one that is not is drawn anew from max(0, p - q), and one token more is drawn where all are kept. With top_k = 1
    a drafted token is kept where it is the largest logit.

    Args:
        logits: (batch, seqlen + 1, vocab_size), those behind the last token before the drafted ones first.
        logits_draft: (batch, seqlen, vocab_size), those from which `sample` drew with the same options.
        tokens_draft: (batch, seqlen), int64 or int32.
        top_k, top_p, temperature: as in `sample`.

    Returns:
        tokens: (batch, seqlen + 1), like tokens_draft; what lies behind the first num_generated_tokens has no meaning.
        num_generated_tokens: (batch,), int64, 1 to seqlen + 1.

    Raises:
        InvalidArgument: shapes or dtypes disagree, or top_p exceeds 1.

    Source: flash_attn 2.8.3, flash_attn/utils/generation.py; Leviathan et al. 2023 (arXiv 2211.17192), algorithm 1.
    """
    _check_draft(logits, logits_draft, tokens_draft)
    seqlen = tokens_draft.shape[1]
    drafted = tokens_draft.long()
    if top_k == 1:
        target = logits.argmax(dim=-1)
        kept = drafted == target[:, :-1]
        num_kept = _leading(kept)
        last = target.gather(1, num_kept[:, None])
    else:
        p = token_probabilities(logits, top_k, top_p, temperature)
        q = token_probabilities(logits_draft, top_k, top_p, temperature)
        p_drafted, q_drafted = (x[:, :seqlen].gather(2, drafted[..., None]).squeeze(2) for x in (p, q))
        # strictly less: a token of probability 0 must not be kept where the random number is 0
        num_kept = _leading(torch.rand_like(p_drafted) * q_drafted < p_drafted)
        row = num_kept[:, None, None].expand(-1, 1, p.shape[-1])
        p_last, q_last = (x.gather(1, row).squeeze(1) for x in (p, F.pad(q, (0, 0, 0, 1))))
        rest = (p_last - q_last).clamp(min=0.0)
        # p and q may differ by roundings alone, and then leave nothing
        rest = torch.where(rest.sum(dim=-1, keepdim=True) > 0.0, rest, p_last)
        last = torch.multinomial(rest, num_samples=1)
    tokens = F.pad(tokens_draft, (0, 1)).scatter(1, num_kept[:, None], last.to(tokens_draft.dtype))
    return tokens, num_kept + 1


def token_probabilities(logits: Tensor, top_k: int, top_p: float, temperature: float) -> Tensor:
    """The distribution from which `sample` draws, (..., vocab_size), in fp32 at least."""
    probabilities, tokens = _candidates(logits, top_k, top_p, temperature)
    if tokens is None:
        return probabilities
    return probabilities.new_zeros(logits.shape).scatter(-1, tokens, probabilities)


def _candidates(logits: Tensor, top_k: int, top_p: float, temperature: float) -> tuple[Tensor, Tensor | None]:
    """(probabilities, the tokens that have them or None for all tokens in order), both (..., candidates)."""
    if top_p > 1.0:
        raise InvalidArgument(f"top_p must be in (0, 1], got {top_p}")
    tokens = None
    if top_k > 0:
        logits, tokens = torch.topk(logits, min(top_k, logits.shape[-1]), dim=-1)
    scaled = logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature
    modify_logits_for_top_p_filtering(scaled, top_p)
    return torch.softmax(scaled, dim=-1), tokens


def _leading(kept: Tensor) -> Tensor:
    """How many of each row are True before the first False."""
    return kept.long().cumprod(dim=1).sum(dim=1)


def _check_draft(logits: Tensor, logits_draft: Tensor, tokens_draft: Tensor) -> None:
    batch_size, length, vocab_size = logits.shape
    for name, x, shape in (
        ("logits_draft", logits_draft, (batch_size, length - 1, vocab_size)),
        ("tokens_draft", tokens_draft, (batch_size, length - 1)),
    ):
        if x.shape != shape:
            raise InvalidArgument(
                f"{name} must have shape {shape} for logits {tuple(logits.shape)}, got {tuple(x.shape)}"
            )
    if tokens_draft.dtype not in (torch.int64, torch.int32):
        raise InvalidArgument(f"tokens_draft must have dtype int64 or int32, got {tokens_draft.dtype}")
