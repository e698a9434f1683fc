"""What the backends written in PyTorch share: where each sequence lies, resolved on the host, and room for results.

Contents of cu_seqlens, seqused_k, leftpad_k and block_table are clamped as kernels/algebra/span.py and locate.py do: a
wrong number gives a wrong answer but never an access out of bounds. Views of packed tensors get a batch dimension of 1.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from flash_attn.backends.base import ForwardResult, Gradients, Operands
from flash_attn.merge import merge_attention_states

SCORES_ROUNDING = 128  # upstream rounds the sequence sizes of S_dmask up to this


class Span(NamedTuple):
    """Sequences of equal lengths that lie side by side: a whole dense batch, or one sequence."""

    first: int  # number of the first sequence
    num_sequences: int
    slot: int  # its place along the batch dimension of dense tensors, 0 in packed ones
    start_q: int
    seqlen_q: int
    start_k: int
    seqlen_k: int


def batch_size(operands: Operands) -> int:
    """Number of sequences."""
    return operands.q.shape[0] if operands.cu_seqlens_q is None else operands.cu_seqlens_q.shape[0] - 1


def spans(operands: Operands) -> Iterator[Span]:
    """Every span of a call; one transfer to the host for each array of lengths."""
    total_q, total_k = operands.max_seqlen_q, _addressable_keys(operands)
    if not _has_lengths(operands):
        yield Span(0, batch_size(operands), 0, 0, total_q, 0, total_k)
        return
    arrays = _length_arrays(operands)
    ends_q, ends_k, used_k, leftpad_k = (None if array is None else array.tolist() for array in arrays)
    paged = operands.block_table is not None
    packed = operands.q.dim() == 3
    for batch in range(batch_size(operands)):
        start_q, seqlen_q, start_k, seqlen_k = 0, total_q, 0, total_k
        if ends_q is not None:
            start_q, seqlen_q = _packed(ends_q, batch, operands.q.shape[0])
        if ends_k is not None and paged:
            seqlen_k = ends_k[batch + 1] - ends_k[batch]
        elif ends_k is not None:
            start_k, seqlen_k = _packed(ends_k, batch, total_k)
        if used_k is not None:
            used = used_k[batch]
            if operands.appended > 0:
                used = _clamp(used, 0, total_k) + operands.appended
            seqlen_k = used if paged else min(used, seqlen_k)
        if leftpad_k is not None:
            leftpad = _clamp(leftpad_k[batch], 0, total_k - start_k)
            start_k += leftpad
            seqlen_k -= leftpad
        seqlen_k = _clamp(seqlen_k, 0, total_k - start_k)
        yield Span(batch, 1, 0 if packed else batch, start_q, seqlen_q, start_k, seqlen_k)


def queries(x: Tensor, span: Span) -> Tensor:
    """The (num_sequences, seqlen_q, heads, dim) view of q, out or one of their gradients."""
    return _tokens(x, span, span.start_q, span.seqlen_q)


def keys(x: Tensor, span: Span, block_table: Tensor | None = None) -> Tensor:
    """The (num_sequences, seqlen_k, heads, dim) view of k, v or one of their gradients; a copy from pages."""
    if block_table is None:
        return _tokens(x, span, span.start_k, span.seqlen_k)
    return _paged_tokens(x, span, block_table)[None]


def statistic(x: Tensor, span: Span) -> Tensor:
    """The (num_sequences, heads, seqlen_q) view of softmax_lse."""
    if x.dim() == 2:
        return x.narrow(1, span.start_q, span.seqlen_q)[None]
    return x.narrow(0, span.slot, span.num_sequences).narrow(2, span.start_q, span.seqlen_q)


def slopes(operands: Operands, span: Span) -> Tensor | None:
    """ALiBi slopes (num_sequences, nheads) of a span, or None."""
    if operands.alibi_slopes is None:
        return None
    nheads = operands.q.shape[-2]
    return operands.alibi_slopes.expand(batch_size(operands), nheads).narrow(0, span.first, span.num_sequences)


def batch_heads(operands: Operands, span: Span) -> Tensor:
    """batch * nheads + head of every head of a span, (count * nheads,)."""
    nheads = operands.q.shape[-2]
    return torch.arange(span.first * nheads, (span.first + span.num_sequences) * nheads, device=operands.q.device)


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """What sums over keys and queries are held in: float32, and float64 for float64."""
    return torch.promote_types(dtype, torch.float32)


def covered(operands: Operands) -> bool:
    """Whether one span writes every token's results, so that none needs a value beforehand."""
    return not _has_lengths(operands) and operands.q.numel() > 0 and operands.k.numel() > 0


def allocate_result(operands: Operands, return_scores: bool) -> ForwardResult:
    """Room for a forward; rows outside every span hold out 0 and softmax_lse -inf, or the sink, S_dmask (if asked for) is 0."""
    q = operands.q
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    shape = (*q.shape[:-3], q.shape[-2], q.shape[-3])
    softmax_lse = torch.empty(shape, dtype=accumulator(q.dtype), device=q.device)
    if not covered(operands):
        out.zero_()
        if operands.sinks is None:
            softmax_lse.fill_(-torch.inf)
        else:
            softmax_lse.copy_(operands.sinks[:, None])
    if not return_scores:
        return ForwardResult(out, softmax_lse)
    lengths = (operands.max_seqlen_q, operands.max_seqlen_k)
    rounded = (-(-length // SCORES_ROUNDING) * SCORES_ROUNDING for length in lengths)
    return ForwardResult(out, softmax_lse, q.new_zeros(batch_size(operands), q.shape[-2], *rounded))


def with_sinks(out: Tensor, softmax_lse: Tensor, sinks: Tensor | None) -> tuple[Tensor, Tensor]:
    """The results of a span with the sinks: merged with a part whose out is 0 and whose softmax_lse is the sink."""
    if sinks is None:
        return out, softmax_lse
    nothing = out.new_zeros(()).expand_as(out)
    return merge_attention_states(
        out, softmax_lse, nothing, sinks.to(softmax_lse.dtype)[:, None].expand_as(softmax_lse)
    )


def blank_gradients(operands: Operands, gradients: Gradients) -> None:
    """Gradient 0 for the tokens outside every span."""
    if not covered(operands):
        for gradient in gradients:
            gradient.zero_()


def softmax_delta(dout: Tensor, out: Tensor, dlse: Tensor | None, softmax_lse: Tensor) -> Tensor:
    """delta = rowsum(dout * out) - dlse, shaped like softmax_lse; rows that see no key have no dlse."""
    work = accumulator(out.dtype)
    delta = (dout.to(work) * out.to(work)).sum(-1).transpose(-1, -2).contiguous()
    return delta if dlse is None else delta.sub_(dlse.masked_fill(softmax_lse.isinf(), 0.0))


def _length_arrays(operands: Operands) -> tuple[Tensor | None, ...]:
    return operands.cu_seqlens_q, operands.cu_seqlens_k, operands.seqused_k, operands.leftpad_k


def _has_lengths(operands: Operands) -> bool:
    """Whether sequences differ, in length or in where their pages lie."""
    return operands.block_table is not None or any(array is not None for array in _length_arrays(operands))


def _tokens(x: Tensor, span: Span, start: int, length: int) -> Tensor:
    if x.dim() == 3:
        return x.narrow(0, start, length)[None]
    return x.narrow(0, span.slot, span.num_sequences).narrow(1, start, length)


def _paged_tokens(pages: Tensor, span: Span, block_table: Tensor) -> Tensor:
    """(seqlen_k, heads, dim); a page id that names no page reads as zeros."""
    num_pages, page_size = pages.shape[:2]
    positions = torch.arange(span.start_k, span.start_k + span.seqlen_k, device=pages.device)
    page = block_table[span.first].index_select(0, positions // page_size).long()
    valid = (page >= 0) & (page < num_pages)
    tokens = pages.new_zeros(span.seqlen_k, *pages.shape[2:])
    tokens[valid] = pages[page[valid], positions[valid] % page_size]
    return tokens


def _addressable_keys(operands: Operands) -> int:
    """Keys of a dense sequence, of the whole packed batch, or that a row of the block table can name."""
    if operands.block_table is not None:
        return operands.block_table.shape[1] * operands.k.shape[1]
    return operands.k.shape[0] if operands.k.dim() == 3 else operands.k.shape[1]


def _packed(ends: list[int], batch: int, total: int) -> tuple[int, int]:
    """(start, length) of one sequence in a packed batch of `total` tokens."""
    start = _clamp(ends[batch], 0, total)
    return start, _clamp(ends[batch + 1], start, total) - start


def _clamp(value: int, low: int, high: int) -> int:
    """value limited to [low, high]; low wins where they cross."""
    return max(min(value, high), low)
