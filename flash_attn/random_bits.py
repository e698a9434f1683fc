"""Which attention weights are dropped, in plain PyTorch: bit for bit the decision of kernels/algebra/dropout.py.

Imports torch only. Words of 32 bits live in int64 tensors, products are taken in 16-bit halves: nothing overflows.

    (row key, col key, mix key, _) = philox 4x32-10 (counter: offset low, offset high, batch * head, 0; key: seed)
    x                              = mixed (row patch * ROW_STEP + row key) ^ (col patch * COL_STEP + col key)
    high, low                      = x * FINISH_HIGH, x * FINISH_LOW
    kept                           = 16 bits of high or low < round((1 - p) 65536)

A patch is four weights, rows r and r + 8 by keys c and c + 8: high is for the second row, upper halves for the second
key.
"""

import torch
from torch import Tensor

LEVELS = 65536  # 16 random bits decide about a weight
MASK = 0xFFFFFFFF
MULTIPLIERS_4X32 = (0xD2511F53, 0xCD9E8D57)
WEYL = (0x9E3779B9, 0xBB67AE85)
ROW_STEP, COL_STEP = 0x9E3779B1, 0x85EBCA77
MIX = 0x7FEB352D
FINISH_LOW, FINISH_HIGH = 0x846CA68B, 0xD35A2D97


def keep_below(dropout_p: float) -> int:
    """The threshold on a weight's 16 random bits, below which it is kept."""
    return max(1, round((1.0 - dropout_p) * LEVELS))


def keep_mask(rng_state: Tensor, dropout_p: float, batch_heads: Tensor, rows: Tensor, cols: Tensor) -> Tensor:
    """Whether each weight is kept. Every weight's bits depend on its own position only, so any tiling gives the same.

    Args:
        rng_state: (2,), int64: seed, offset.
        batch_heads: (N,), integer: batch * nheads + head; in a packed batch, batch numbers the sequences.
        rows: (R,), integer: query positions inside the sequence.
        cols: (C,), integer: key positions inside the sequence.

    Returns:
        bool (N, R, C), on the device of rng_state.
    """
    words = [word[:, None, None] for word in head_words(rng_state, batch_heads)]
    row_patches, row_index = _patches(rows)
    col_patches, col_index = _patches(cols)
    high, low = patch_hash(row_patches[:, None], col_patches, *words)
    below = keep_below(dropout_p)
    lanes = torch.stack([bits < below for bits in (low & 0xFFFF, low >> 16, high & 0xFFFF, high >> 16)], dim=-1)
    # (N, row patch, col patch, row in patch * col in patch) -> (N, row patch * 2, col patch * 2)
    lanes = lanes.unflatten(-1, (2, 2)).transpose(2, 3).flatten(3, 4).flatten(1, 2)
    return lanes.index_select(1, row_index).index_select(2, col_index)


def head_words(rng_state: Tensor, batch_heads: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Row key, column key and mix key of each (batch, head)."""
    seed, offset = rng_state.unbind()
    counter = (offset & MASK, (offset >> 32) & MASK, batch_heads.to(seed) & MASK, torch.zeros_like(seed))
    return philox_4x32(counter, (seed & MASK, (seed >> 32) & MASK))[:3]


def philox_4x32(
    counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[Tensor, Tensor], rounds: int = 10
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox 4x32 of broadcastable 32-bit words.

    Source: Salmon et al., Parallel random numbers: as easy as 1, 2, 3, 2011; the order of words is Triton's.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(rounds):
        high_0, low_0 = multiply(c0, MULTIPLIERS_4X32[0])
        high_2, low_2 = multiply(c2, MULTIPLIERS_4X32[1])
        c0, c1, c2, c3 = high_2 ^ c1 ^ k0, low_2, high_0 ^ c3 ^ k1, low_0
        k0, k1 = (k0 + WEYL[0]) & MASK, (k1 + WEYL[1]) & MASK
    return c0, c1, c2, c3


def patch_hash(rows: Tensor, cols: Tensor, row_key: Tensor, col_key: Tensor, mix_key: Tensor) -> tuple[Tensor, Tensor]:
    """(high, low) hashed 32-bit words of broadcastable patch numbers."""
    x = ((multiply(rows, ROW_STEP)[1] + row_key) & MASK) ^ ((multiply(cols, COL_STEP)[1] + col_key) & MASK)
    x = multiply(x, MIX)[1]
    x = x ^ (x >> 15) ^ mix_key
    return multiply(x, FINISH_HIGH)[1], multiply(x, FINISH_LOW)[1]


def multiply(word: Tensor, constant: int) -> tuple[Tensor, Tensor]:
    """(high, low) 32 bits of a product of two 32-bit words."""
    lower = word * (constant & 0xFFFF)
    upper = word * (constant >> 16) + (lower >> 16)
    return upper >> 16, ((upper & 0xFFFF) << 16) | (lower & 0xFFFF)


def _patches(positions: Tensor) -> tuple[Tensor, Tensor]:
    """The distinct patches of some positions, and where each position lies among their two members each."""
    patch, index = torch.unique(((positions >> 4) << 3) | (positions & 7), return_inverse=True)
    return patch.long(), index * 2 + ((positions >> 3) & 1)
