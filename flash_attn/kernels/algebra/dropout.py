"""Which attention weights are dropped: a pure function of (seed, offset, batch * head, row, key).

Philox 4x32-10 turns seed, offset and batch * head into four key words per head. A keyed multiplicative hash of the counters
(row patch, key patch) then gives 64 bits for a patch of four weights, 16 bits each: rows r and r + 8, keys c and c + 8. Those
four sit in one thread of a tensor-core accumulator, of S as of its transpose, so the compiler computes each hash once; the
bits themselves depend on no tile size and no backend. Philox per weight, or per patch, would cost more than the attention.
"""

import triton
import triton.language as tl

ROW_STEP = tl.constexpr(0x9E3779B1)
COL_STEP = tl.constexpr(0x85EBCA77)
MIX = tl.constexpr(0x7FEB352D)
FINISH_LOW = tl.constexpr(0x846CA68B)
FINISH_HIGH = tl.constexpr(0xD35A2D97)


@triton.jit
def load_key(dropout, batch_head):
    """Three 32-bit words for one (batch, head); zeros without dropout."""
    row_key, col_key, mix_key = 0, 0, 0
    if dropout.rng_state is not None:
        seed = tl.load(dropout.rng_state)
        offset = tl.load(dropout.rng_state + 1)
        low = (offset & 0xFFFFFFFF).to(tl.uint32)
        high = ((offset >> 32) & 0xFFFFFFFF).to(tl.uint32)
        head_word = tl.cast(batch_head, tl.uint32)
        row_key, col_key, mix_key, _unused = tl.philox(seed, low, high, head_word, head_word * 0)
    return row_key, col_key, mix_key


@triton.jit
def patch_index(positions):
    """Number of the patch of each position: positions p and p + 8 of every 16 share one."""
    return (((positions >> 4) << 3) | (positions & 7)).to(tl.uint32)


@triton.jit
def patch_hash(rows, cols, key):
    """(high, low) hashed 32-bit words of each patch; rows and cols broadcast to the tile."""
    row_key, col_key, mix_key = key
    x = (patch_index(rows) * ROW_STEP + row_key) ^ (patch_index(cols) * COL_STEP + col_key)
    x = x * MIX
    x = x ^ (x >> 15) ^ mix_key
    return x * FINISH_HIGH, x * FINISH_LOW


@triton.jit
def keep_mask(dropout, key, rows, cols):
    """Whether each weight is kept; rows and cols broadcast to the tile, `key` is from load_key."""
    high, low = patch_hash(rows, cols, key)
    word = tl.where((rows & 8) != 0, high, low)
    bits = tl.where((cols & 8) != 0, word, word << 16)
    last_kept = (tl.cast(dropout.keep_below, tl.uint32) << 16) - 1
    return bits <= last_kept


@triton.jit
def drop(weights, keep):
    """Dropped weights as 0; kept ones still lack the factor `kept_scale`, which finished sums get once. Its own VJP."""
    return tl.where(keep, weights, 0.0)


@triton.jit
def kept_scale(dropout):
    """1 / (1 - p), which keeps the expectation of a sum of weights; 1 without dropout."""
    scale = 1.0
    if dropout.rng_state is not None:
        scale = dropout.rescale
    return scale
