"""Append kernel: new keys and values into the cache, keys and queries turned by their rotary angle, in one launch.

One program per (batch entry, block of (token, head) rows): first the blocks of new keys and values, then those of queries.
Token j lands behind the cache_seqlens tokens of its sequence; what has no place in the cache is not written.
"""

import triton
import triton.language as tl

from flash_attn.kernels.algebra.arguments import Pages
from flash_attn.kernels.algebra.locate import locate_keys, sequence_base
from flash_attn.kernels.algebra.rotary import rotate
from flash_attn.kernels.algebra.span import clamp
from flash_attn.kernels.portable.chain import join_chain


@triton.jit
def copy_rows(source, target, valid, HEAD_DIM: tl.constexpr, HEAD_DIM_PAD: tl.constexpr, FIRST: tl.constexpr):
    """Features FIRST to HEAD_DIM of each row; source and target point to the rows."""
    dims = tl.arange(0, HEAD_DIM_PAD)
    mask = valid[:, None] & ((dims >= FIRST) & (dims < HEAD_DIM))[None, :]
    tl.store(target[:, None] + dims, tl.load(source[:, None] + dims, mask=mask), mask=mask)


@triton.jit
def rotate_rows(
    source, target, valid, positions, rotary,
    PAIRS: tl.constexpr, PAIRS_PAD: tl.constexpr, INTERLEAVED: tl.constexpr,
):  # fmt: skip
    """The first 2 * PAIRS features of each row turned by its position's angles; without angles it keeps its direction."""
    pairs = tl.arange(0, PAIRS_PAD)
    mask = valid[:, None] & (pairs < PAIRS)[None, :]
    known = mask & (positions < rotary.num_positions)[:, None]
    angles = positions.to(tl.int64)[:, None] * rotary.stride + pairs
    cos = tl.load(rotary.cos + angles, mask=known, other=1.0).to(tl.float32)
    sin = tl.load(rotary.sin + angles, mask=known, other=0.0).to(tl.float32)
    if INTERLEAVED:
        first, second = 2 * pairs, 2 * pairs + 1
    else:
        first, second = pairs, pairs + PAIRS
    x = tl.load(source[:, None] + first, mask=mask, other=0.0).to(tl.float32)
    y = tl.load(source[:, None] + second, mask=mask, other=0.0).to(tl.float32)
    x, y = rotate(x, y, cos, sin)
    dtype = target.dtype.element_ty
    tl.store(target[:, None] + first, x.to(dtype), mask=mask)
    tl.store(target[:, None] + second, y.to(dtype), mask=mask)


APPEND_LENGTHS = [
    "seqlen_q", "seqlen_new", "capacity", "nheads", "nheads_k",
    "table_stride", "max_pages", "page_size", "page_shift", "num_pages",
]  # fmt: skip


@triton.jit(do_not_specialize=APPEND_LENGTHS)
def kv_append_kernel(
    q, k_new, v_new, q_rotated, k_cache, v_cache, cache_seqlens, block_table, rotary,
    seqlen_q, seqlen_new, capacity, nheads, nheads_k, table_stride, max_pages, page_size, num_pages, page_shift,
    HEAD_DIM: tl.constexpr, HEAD_DIM_PAD: tl.constexpr, PAIRS: tl.constexpr, PAIRS_PAD: tl.constexpr,
    INTERLEAVED: tl.constexpr, ADVANCE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """ADVANCE: query i has the angle of position cache_seqlens + i, otherwise every query that of cache_seqlens."""
    join_chain()
    new_blocks = tl.cdiv(seqlen_new * nheads_k, BLOCK)
    blocks = new_blocks
    if rotary.cos is not None:
        blocks += tl.cdiv(seqlen_q * nheads, BLOCK)
    batch = tl.program_id(0) // blocks
    block = tl.program_id(0) % blocks
    seqlen = clamp(tl.load(cache_seqlens + batch), 0, capacity)
    if block < new_blocks:
        index = block * BLOCK + tl.arange(0, BLOCK)
        tokens, heads = index // nheads_k, index % nheads_k
        positions = seqlen + tokens
        valid = (tokens < seqlen_new) & (positions < capacity)
        slots, places = positions * 0 + batch, positions
        if block_table is not None:
            pages = Pages(block_table, table_stride, max_pages, page_size, num_pages, page_shift)
            slots, places, valid = locate_keys(pages, batch, positions, valid)
        source, target = sequence_base(k_new, batch, heads, tokens), sequence_base(k_cache, slots, heads, places)
        if rotary.cos is not None:
            rotate_rows(source, target, valid, positions, rotary, PAIRS, PAIRS_PAD, INTERLEAVED)
        if 2 * PAIRS < HEAD_DIM:
            copy_rows(source, target, valid, HEAD_DIM, HEAD_DIM_PAD, 2 * PAIRS)
        source, target = sequence_base(v_new, batch, heads, tokens), sequence_base(v_cache, slots, heads, places)
        copy_rows(source, target, valid, HEAD_DIM, HEAD_DIM_PAD, 0)
    elif rotary.cos is not None:
        index = (block - new_blocks) * BLOCK + tl.arange(0, BLOCK)
        rows, heads = index // nheads, index % nheads
        valid = rows < seqlen_q
        positions = seqlen + rows if ADVANCE else seqlen + rows * 0
        source, target = sequence_base(q, batch, heads, rows), sequence_base(q_rotated, batch, heads, rows)
        rotate_rows(source, target, valid, positions, rotary, PAIRS, PAIRS_PAD, INTERLEAVED)
        if 2 * PAIRS < HEAD_DIM:
            copy_rows(source, target, valid, HEAD_DIM, HEAD_DIM_PAD, 2 * PAIRS)
