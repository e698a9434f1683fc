"""Rotary position embedding: a program turns a block of tokens in a few heads, in fp32, and rounds once.

Tokens are counted through the whole batch, padded or packed. A token whose position has no row in cos and sin, or that no
sequence of cu_seqlens contains, is copied as it is; so are the heads and dimensions that do not turn.
"""

import triton
import triton.language as tl

from flash_attn.kernels.algebra.rotary import rotate

LENGTHS = ("seqlen", "tokens", "batch_size", "nheads", "nheads_rotated", "offset", "seqlen_ro")


@triton.jit
def packed_rows(tokens, cu_seqlens, batch_size):
    """(sequence, row in it) of packed tokens by bisection; row -1 where no sequence contains the token.

    Whatever cu_seqlens holds, only its own elements are read.
    """
    low = tokens * 0
    high = low + batch_size
    remaining = batch_size
    while remaining > 0:
        middle = (low + high) // 2
        open_interval = low < high
        end = tl.load(cu_seqlens + middle + 1, mask=open_interval, other=0)
        ended = open_interval & (end <= tokens)
        high = tl.where(open_interval & (end > tokens), middle, high)
        low = tl.where(ended, middle + 1, low)
        remaining = remaining // 2
    found = low < batch_size
    sequence = tl.minimum(low, batch_size - 1)
    row = tokens - tl.load(cu_seqlens + sequence, mask=found, other=0)
    return sequence, tl.where(found, tl.maximum(row, -1), -1)


@triton.jit
def load_pairs(base, dims, mask, HALF: tl.constexpr, HALF_PAD: tl.constexpr, INTERLEAVED: tl.constexpr):
    """(first, second) of every pair, (BLOCK_M, HALF_PAD) in fp32; `dims` are those of `pair_dims`."""
    x = tl.load(base + dims[None, :], mask=mask, other=0.0)
    if INTERLEAVED:
        first, second = tl.split(tl.reshape(x, [x.shape[0], HALF_PAD, 2]))
    else:
        first, second = x, tl.load(base + HALF + dims[None, :], mask=mask, other=0.0)
    return first.to(tl.float32), second.to(tl.float32)


@triton.jit
def store_pairs(base, first, second, dims, mask, HALF: tl.constexpr, INTERLEAVED: tl.constexpr):
    """The inverse of load_pairs, rounded to the dtype of `base`."""
    dtype = base.dtype.element_ty
    if INTERLEAVED:
        tl.store(base + dims[None, :], tl.interleave(first.to(dtype), second.to(dtype)), mask=mask)
    else:
        tl.store(base + dims[None, :], first.to(dtype), mask=mask)
        tl.store(base + HALF + dims[None, :], second.to(dtype), mask=mask)


@triton.jit(do_not_specialize=LENGTHS)
def rotary_kernel(
    x, out, cos, sin, cos_stride, sin_stride, seqlen_offsets, cu_seqlens,
    seqlen, tokens, batch_size, nheads, nheads_rotated, offset, seqlen_ro,
    HALF: tl.constexpr, HALF_PAD: tl.constexpr, TAIL: tl.constexpr, TAIL_PAD: tl.constexpr,
    INTERLEAVED: tl.constexpr, CONJUGATE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """out[..., :2 HALF] is x turned; the next TAIL dimensions are copied. x and out may be the same memory."""
    num_h = tl.cdiv(nheads, BLOCK_H)
    token = tl.program_id(0) // num_h * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = token < tokens
    if cu_seqlens is not None:
        sequence, row = packed_rows(tl.where(inside, token, 0), cu_seqlens, batch_size)
        known = inside & (row >= 0)
        x_rows = x.ptr + token.to(tl.int64) * x.stride_s
        out_rows = out.ptr + token.to(tl.int64) * out.stride_s
    else:
        sequence = token // seqlen
        row = token - sequence * seqlen
        known = inside
        x_rows = x.ptr + sequence.to(tl.int64) * x.stride_b + row.to(tl.int64) * x.stride_s
        out_rows = out.ptr + sequence.to(tl.int64) * out.stride_b + row.to(tl.int64) * out.stride_s
    position = row.to(tl.int64) + offset
    if seqlen_offsets is not None:
        position += tl.load(seqlen_offsets + sequence, mask=known, other=0)
    turned = (known & (position >= 0) & (position < seqlen_ro))[:, None]

    pairs = tl.arange(0, HALF_PAD)
    pair_mask = turned & (pairs < HALF)[None, :] if HALF < HALF_PAD else turned
    cos_tile = tl.load(cos + position[:, None] * cos_stride + pairs[None, :], mask=pair_mask, other=1.0)
    sin_tile = tl.load(sin + position[:, None] * sin_stride + pairs[None, :], mask=pair_mask, other=0.0)
    cos_tile = cos_tile.to(tl.float32)
    sin_tile = -sin_tile.to(tl.float32) if CONJUGATE else sin_tile.to(tl.float32)

    # columns of one load: every dimension of interleaved pairs, the first half of the others
    COLUMNS: tl.constexpr = 2 * HALF if INTERLEAVED else HALF
    COLUMNS_PAD: tl.constexpr = 2 * HALF_PAD if INTERLEAVED else HALF_PAD
    dims = tl.arange(0, COLUMNS_PAD)
    for i in tl.static_range(BLOCK_H):
        head = tl.program_id(0) % num_h * BLOCK_H + i
        live = (inside & (head < nheads))[:, None]
        mask = live & (dims < COLUMNS)[None, :] if COLUMNS < COLUMNS_PAD else live
        x_base = (x_rows + tl.cast(head, tl.int64) * x.stride_h)[:, None]
        out_base = (out_rows + tl.cast(head, tl.int64) * out.stride_h)[:, None]
        first, second = load_pairs(x_base, dims, mask, HALF, HALF_PAD, INTERLEAVED)
        real, imaginary = rotate(first, second, cos_tile, sin_tile)
        # selected rather than multiplied by 1 and 0: an infinite partner must not become NaN
        turns = turned & (head < nheads_rotated)
        first = tl.where(turns, real, first)
        second = tl.where(turns, imaginary, second)
        store_pairs(out_base, first, second, dims, mask, HALF, INTERLEAVED)
        if TAIL > 0:
            tail = 2 * HALF + tl.arange(0, TAIL_PAD)
            tail_mask = live & (tail < 2 * HALF + TAIL)[None, :] if TAIL < TAIL_PAD else live
            tl.store(out_base + tail[None, :], tl.load(x_base + tail[None, :], mask=tail_mask), mask=tail_mask)
