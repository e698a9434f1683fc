"""A mask is an interval: row i sees keys [lo_i, hi_i), key j is seen by rows [lo_j, hi_j).

Causal masks, sliding windows and sequence ends are all of this form, so two functions give every mask and every loop bound.
With n = seqlen_k - seqlen_q, row i sees keys i + n - left .. i + n + right (bottom-right aligned).
"""

import triton
import triton.language as tl

from flash_attn.kernels.algebra.score import select_in_ptx, speaks_ptx


@triton.jit
def key_interval(rows, span, window):
    """Keys that each query row may see, as [lo, hi)."""
    diagonal = rows + (span.seqlen_k - span.seqlen_q)
    lo = rows * 0
    hi = rows * 0 + span.seqlen_k
    if window.left is not None:
        lo = tl.maximum(lo, diagonal - window.left)
    if window.right is not None:
        hi = tl.minimum(hi, diagonal + window.right + 1)
    return lo, hi


@triton.jit
def query_interval(cols, span, window):
    """Query rows that may see each key, as [lo, hi): the transpose of key_interval."""
    diagonal = cols - (span.seqlen_k - span.seqlen_q)
    lo = cols * 0
    hi = cols * 0 + span.seqlen_q
    if window.right is not None:
        lo = tl.maximum(lo, diagonal - window.right)
    if window.left is not None:
        hi = tl.minimum(hi, diagonal + window.left + 1)
    return lo, hi


@triton.jit
def visible(rows, cols, span, window):
    """Whether each row may see each key; rows and cols broadcast against each other."""
    lo, hi = key_interval(rows, span, window)
    inside = cols < hi
    if window.left is not None:
        inside = inside & (cols >= lo)
    return inside


@triton.jit
def hide(tile, cols, lo, hi, window):
    """Scores of keys outside [lo, hi) as -inf; all broadcast to the tile."""
    tile = hide_behind(tile, cols, hi)
    if window.left is not None:
        tile = hide_before(tile, cols, lo)
    return tile


@triton.jit
def hide_behind(tile, cols, hi):
    """Scores of keys hi and above as -inf."""
    if speaks_ptx():
        tile = select_in_ptx(tile, cols, hi, "lt.s32", "0fFF800000")
    else:
        tile = tl.where(cols < hi, tile, float("-inf"))
    return tile


@triton.jit
def hide_before(tile, cols, lo):
    """Scores of keys below lo as -inf."""
    if speaks_ptx():
        tile = select_in_ptx(tile, cols, lo, "ge.s32", "0fFF800000")
    else:
        tile = tl.where(cols >= lo, tile, float("-inf"))
    return tile


@triton.jit
def key_blocks(first_row, last_row, span, window, BLOCK: tl.constexpr):
    """Key blocks that rows first_row .. last_row see: [begin, full_begin, full_end, end)."""
    first_lo, first_hi = key_interval(first_row, span, window)
    last_lo, last_hi = key_interval(last_row, span, window)
    return block_bounds(first_lo, last_lo, first_hi, last_hi, BLOCK)


@triton.jit
def block_bounds(first_lo, last_lo, first_hi, last_hi, BLOCK: tl.constexpr):
    """Blocks [begin, full_begin, full_end, end) of a loop: the middle ones lie inside every interval and need no mask."""
    begin = tl.maximum(first_lo, 0) // BLOCK
    end = tl.maximum(tl.cdiv(last_hi, BLOCK), begin)
    full_begin = tl.minimum(tl.maximum(tl.cdiv(tl.maximum(last_lo, 0), BLOCK), begin), end)
    full_end = tl.minimum(tl.maximum(tl.maximum(first_hi, 0) // BLOCK, full_begin), end)
    return begin, full_begin, full_end, end
