"""Which attention weights are dropped: a pure function of (seed, offset, batch * head, row, key).

Philox 4x32-10 turns seed, offset and batch * head into four key words per head. A keyed multiplicative hash of the counters
(row patch, key patch) then gives 64 bits for a patch of four weights, 16 bits each: rows r and r + 8, keys c and c + 8. Those
four sit in one thread of a tensor-core accumulator, of S as of its transpose, so the compiler computes each hash once; the
bits themselves depend on no tile size and no backend. Philox per weight, or per patch, would cost more than the attention.
"""

import triton
import triton.language as tl

from flash_attn.kernels.algebra.score import select_in_ptx, speaks_ptx

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
        low = tl.cast(offset & 0xFFFFFFFF, tl.uint32)
        high = tl.cast((offset >> 32) & 0xFFFFFFFF, tl.uint32)
        head_word = tl.cast(batch_head, tl.uint32)
        row_key, col_key, mix_key, _unused = tl.philox(seed, low, high, head_word, head_word * 0)
    return row_key, col_key, mix_key


@triton.jit
def patch_words(first, lanes, step, key):
    """Hash input of the patch of each position first + lanes; first is a multiple of 16.

    Positions p and p + 8 of every 16 share a patch. Split off the scalar, their words are visibly equal to the compiler.
    """
    patch = ((lanes >> 4) << 3) | (lanes & 7)
    return patch.to(tl.uint32) * step + (tl.cast(first >> 1, tl.uint32) * step + key)


@triton.jit
def row_words(dropout, key, first, lanes):
    """Hash input of the query positions first + lanes; 0 without dropout."""
    words = 0
    if dropout.rng_state is not None:
        words = patch_words(first, lanes, ROW_STEP, key[0])
    return words


@triton.jit
def col_words(dropout, key, first, lanes):
    """Hash input of the key positions first + lanes; 0 without dropout."""
    words = 0
    if dropout.rng_state is not None:
        words = patch_words(first, lanes, COL_STEP, key[1])
    return words


@triton.jit
def random_bits(dropout, key, rows, cols, row_word, col_word):
    """16 random bits of each weight, in the upper half of a word; rows and cols broadcast to the tile. 0 without dropout."""
    bits = 0
    if dropout.rng_state is not None:
        x = (row_word ^ col_word) * MIX
        x = x ^ (x >> 15) ^ key[2]
        word = tl.where((rows & 8) != 0, x * FINISH_HIGH, x * FINISH_LOW)
        bits = tl.where((cols & 8) != 0, word, word << 16)
    return bits


@triton.jit
def tile_bits(dropout, key, first_row, row_lanes, first_col, col_lanes):
    """`random_bits` of the tile at (first_row, first_col), multiples of 16; the lanes broadcast to it. 0 without dropout."""
    row_word = row_words(dropout, key, first_row, row_lanes)
    col_word = col_words(dropout, key, first_col, col_lanes)
    return random_bits(dropout, key, row_lanes, col_lanes, row_word, col_word)


@triton.jit
def last_kept(dropout):
    """The largest word of `random_bits` whose weight is kept."""
    return (tl.cast(dropout.keep_below, tl.uint32) << 16) - 1


@triton.jit
def keep_mask(dropout, bits):
    """Whether each weight is kept."""
    return bits <= last_kept(dropout)


@triton.jit
def drop(dropout, bits, weights):
    """Dropped weights as 0; kept ones still lack the factor `kept_scale`, which finished sums get once. Its own VJP.

    In PTX one comparison and one selection: left to itself the compiler packs the comparisons of a tile into words first,
    twice the instructions (H200, 2026-11-22).
    """
    if speaks_ptx():
        kept = select_in_ptx(weights, bits, last_kept(dropout), "ls.u32", "0f00000000")
    else:
        kept = tl.where(keep_mask(dropout, bits), weights, 0.0)
    return kept


@triton.jit
def mark_dropped(dropout, bits, weights):
    """Weights, negative where dropped: so a tile remembers its mask in no register of its own, for `drop_backward`."""
    if speaks_ptx():
        marked = tl.inline_asm_elementwise(
            "{ .reg .pred keep; .reg .f32 minus; setp.ls.u32 keep, $2, $3; neg.f32 minus, $1; selp.f32 $0, $1, minus, keep; }",
            "=f,f,r,r", [weights, bits, last_kept(dropout)], dtype=tl.float32, is_pure=True, pack=1,
        )  # fmt: skip
    else:
        marked = tl.where(keep_mask(dropout, bits), weights, -weights)
    return marked


@triton.jit
def drop_marked(marked):
    """`drop` of what `mark_dropped` marked; NaN stays NaN."""
    if speaks_ptx():
        kept = tl.inline_asm_elementwise(
            "max.NaN.f32 $0, $1, 0f00000000;", "=f,f", [marked], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        kept = tl.where(marked < 0.0, 0.0, marked)
    return kept


@triton.jit
def drop_backward(dropout, marked, dweights):
    """d(loss)/d(weight) from d(loss)/d(weight that multiplied v): the VJP of `drop` and `kept_scale`."""
    if speaks_ptx():
        kept = tl.inline_asm_elementwise(
            "slct.f32.f32 $0, $1, 0f00000000, $2;", "=f,f,f", [dweights, marked], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        kept = tl.where(marked >= 0.0, dweights, 0.0)
    return kept * kept_scale(dropout)


@triton.jit
def kept_scale(dropout):
    """1 / (1 - p), which keeps the expectation of a sum of weights; 1 without dropout."""
    scale = 1.0
    if dropout.rng_state is not None:
        scale = dropout.rescale
    return scale
