"""Where a token lives: its address in a tensor, its page in a paged cache. Addresses are 64-bit before the first product."""

from typing import Any, NamedTuple

import triton
import triton.language as tl


@triton.jit
def locate_keys(pages, batch, positions, valid):
    """(page, slot, valid) of keys by position in their sequence; page ids that name no page are not valid."""
    if pages.shift is not None:
        index = positions >> pages.shift
    else:
        index = positions // pages.page_size
    inside = valid & (index < pages.max_pages)
    page = tl.load(pages.block_table + tl.cast(batch, tl.int64) * pages.stride_b + index, mask=inside, other=-1)
    return page, positions - index * pages.page_size, inside & (page >= 0) & (page < pages.num_pages)


@triton.jit
def sequence_base(t, batch, head, start):
    """Pointer to token 0 of one sequence and head."""
    return (
        t.ptr
        + tl.cast(batch, tl.int64) * t.stride_b
        + tl.cast(head, tl.int64) * t.stride_h
        + tl.cast(start, tl.int64) * t.stride_s
    )


class Statistic(NamedTuple):
    """One number of every query row, in contiguous lines: (batch, nheads, seqlen_q), or packed (nheads, total_q)."""

    ptr: Any
    lines: Any  # from one batch entry to the next
    length: Any


@triton.jit
def row_statistic(ptr, sequences, nheads, total_q):
    """The statistic at ptr. Strides as arguments would be compiled anew for multiples of 16. None stays None."""
    statistic = ptr
    if ptr is not None:
        lines = nheads
        if sequences.cu_seqlens_q is not None:
            lines = 0
        statistic = Statistic(ptr, lines, total_q)
    return statistic


@triton.jit
def row_base(t, batch, head, start):
    """Pointer to the per-row statistic of token 0 of one sequence and head."""
    return t.ptr + tl.cast(batch * t.lines + head, tl.int64) * t.length + start
