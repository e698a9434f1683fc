"""Which attention weights are dropped: a pure function of (seed, offset, batch * head, row, key).

Philox 4x32-10 turns seed, offset and batch * head into a key per head. Philox 2x32-7 with the counters (row patch, key patch)
then gives 64 bits for a patch of four weights, 16 bits each: rows r and r + 8, keys c and c + 8. Those four sit in one thread
of a tensor-core accumulator, of S as of its transpose, so the compiler finds the shared work; the bits themselves depend on
no tile size and no backend.
"""

import triton
import triton.language as tl

ROUNDS = tl.constexpr(7)
MULTIPLIER = tl.constexpr(0xD256D193)
WEYL = tl.constexpr(0x9E3779B9)


@triton.jit
def load_key(dropout, batch_head):
    """Three 32-bit words for one (batch, head); zeros without dropout."""
    key, row_word, col_word = 0, 0, 0
    if dropout.rng_state is not None:
        seed = tl.load(dropout.rng_state)
        offset = tl.load(dropout.rng_state + 1)
        low = (offset & 0xFFFFFFFF).to(tl.uint32)
        high = ((offset >> 32) & 0xFFFFFFFF).to(tl.uint32)
        head_word = batch_head.to(tl.uint32)
        key, row_word, col_word, unused = tl.philox(seed, low, high, head_word, head_word * 0)
    return key, row_word, col_word


@triton.jit
def patch_index(positions):
    """Number of the patch of each position: positions p and p + 8 of every 16 share one."""
    return (((positions >> 4) << 3) | (positions & 7)).to(tl.uint32)


@triton.jit
def philox_2x32(high, low, key):
    """Philox 2x32-7 of broadcastable uint32 counters; returns two uint32 tiles."""
    for _round in tl.static_range(ROUNDS):
        product_high = tl.umulhi(high, MULTIPLIER)
        product_low = high * MULTIPLIER
        high = product_high ^ key ^ low
        low = product_low
        key = key + WEYL
    return high, low


@triton.jit
def keep_mask(dropout, key, rows, cols):
    """Whether each weight is kept; rows and cols broadcast to the tile, `key` is from load_key."""
    head_key, row_word, col_word = key
    row_counter = patch_index(rows) ^ row_word
    col_counter = patch_index(cols) ^ col_word
    high, low = philox_2x32(row_counter + col_counter * 0, col_counter + row_counter * 0, head_key)
    word = tl.where((rows & 8) != 0, high, low)
    bits = tl.where((cols & 8) != 0, word >> 16, word & 0xFFFF)
    return bits < dropout.keep_below


@triton.jit
def dropout_forward(weights, keep, dropout):
    """Kept weights rescaled to the same expectation, dropped ones 0. Linear, hence its own VJP."""
    return tl.where(keep, weights * dropout.rescale, 0.0)
