"""Loads and stores of (rows, head dim) tiles; everything outside a sequence or the head dim reads as zero and is not written.

All address arithmetic is 64-bit before the first multiplication.
"""

import triton
import triton.language as tl

from flash_attn.kernels.algebra.locate import locate_keys, sequence_base


@triton.jit
def tile_mask(rows, dims, seqlen, HEAD_DIM: tl.constexpr, HEAD_DIM_PAD: tl.constexpr):
    """(BLOCK, HEAD_DIM_PAD) mask of what lies inside the sequence and the head dim."""
    mask = (rows < seqlen)[:, None]
    if HEAD_DIM != HEAD_DIM_PAD:
        mask = mask & (dims < HEAD_DIM)[None, :]
    return mask


@triton.jit
def load_rows(t, base, first, seqlen, BLOCK: tl.constexpr, HEAD_DIM: tl.constexpr, HEAD_DIM_PAD: tl.constexpr):
    """The (BLOCK, HEAD_DIM_PAD) tile of rows first .. first + BLOCK."""
    index = tl.arange(0, BLOCK)
    dims = tl.arange(0, HEAD_DIM_PAD)
    offsets = index.to(tl.int64)[:, None] * t.stride_s + dims[None, :]
    mask = tile_mask(first + index, dims, seqlen, HEAD_DIM, HEAD_DIM_PAD)
    return tl.load(base + tl.cast(first, tl.int64) * t.stride_s + offsets, mask=mask, other=0.0)


@triton.jit
def store_rows(t, base, value, first, seqlen, BLOCK: tl.constexpr, HEAD_DIM: tl.constexpr, HEAD_DIM_PAD: tl.constexpr):
    """Store a (BLOCK, HEAD_DIM_PAD) tile in the tensor's dtype."""
    index = tl.arange(0, BLOCK)
    dims = tl.arange(0, HEAD_DIM_PAD)
    offsets = index.to(tl.int64)[:, None] * t.stride_s + dims[None, :]
    mask = tile_mask(first + index, dims, seqlen, HEAD_DIM, HEAD_DIM_PAD)
    tl.store(base + tl.cast(first, tl.int64) * t.stride_s + offsets, value.to(t.ptr.dtype.element_ty), mask=mask)


@triton.jit
def load_paged_rows(t, pages, batch, head, start, cols, seqlen, HEAD_DIM: tl.constexpr, HEAD_DIM_PAD: tl.constexpr):
    """The tile of keys `cols`, gathered from their pages; key 0 of the sequence is token `start` of its first page."""
    page, slot, valid = locate_keys(pages, batch, start + cols, cols < seqlen)
    return load_located_rows(t, head, page, slot, valid, HEAD_DIM, HEAD_DIM_PAD)


@triton.jit
def load_located_rows(t, head, page, slot, valid, HEAD_DIM: tl.constexpr, HEAD_DIM_PAD: tl.constexpr):
    """The tile of keys wherever they lie."""
    dims = tl.arange(0, HEAD_DIM_PAD)
    offsets = tl.cast(page, tl.int64) * t.stride_b + tl.cast(slot, tl.int64) * t.stride_s
    mask = valid[:, None]
    if HEAD_DIM != HEAD_DIM_PAD:
        mask = mask & (dims < HEAD_DIM)[None, :]
    return tl.load(
        t.ptr + tl.cast(head, tl.int64) * t.stride_h + offsets[:, None] + dims[None, :], mask=mask, other=0.0
    )


@triton.jit
def load_page_rows(
    t, pages, batch, head, first, end,
    PAGES: tl.constexpr, BLOCK: tl.constexpr, HEAD_DIM: tl.constexpr, HEAD_DIM_PAD: tl.constexpr,
):  # fmt: skip
    """The tile of tokens first .. min(first + BLOCK, end) of a sequence: all lie in one page, or in PAGES whole ones.

    A page's number is then loaded once and spread over its rows, where `load_paged_rows` loads it with each: 2 to 10 % of a
    decode over pages of 16 tokens (H200, 2026-12-01).
    """
    if PAGES == 1:
        page, slot, valid = locate_keys(pages, batch, first, first < end)
        base = sequence_base(t, page, head, slot)
        tile = load_rows(t, base, 0, tl.where(valid, end - first, 0), BLOCK, HEAD_DIM, HEAD_DIM_PAD)
    else:
        SIZE: tl.constexpr = BLOCK // PAGES
        index = tl.arange(0, BLOCK)
        starts = first + tl.arange(0, PAGES) * SIZE
        page, _slots, valid = locate_keys(pages, batch, starts, starts < end)
        page = tl.where(valid, page, -1)[:, None].broadcast_to(PAGES, SIZE).reshape(BLOCK)
        valid = (page >= 0) & (first + index < end)
        tile = load_located_rows(t, head, page, index % SIZE, valid, HEAD_DIM, HEAD_DIM_PAD)
    return tile
