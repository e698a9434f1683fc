"""Launch configurations of the Hopper kernels."""

import functools
from typing import NamedTuple

from flash_attn.launch import forward, pinned_config
from flash_attn.problem import AttentionProblem

CONSUMER_ROWS = 64  # query rows of one consumer, a warpgroup


class HopperForwardConfig(NamedTuple):
    """Tile and pipeline of one persistent forward program."""

    consumers: int  # warpgroups of 64 query rows each
    block_n: int  # keys of a loop step
    num_stages: int  # key tiles in flight, and value tiles
    overlap: bool  # run the end of a tile beside the start of the next; needs a second Q and a buffer for out
    ping_pong: bool  # consumers take turns on the tensor cores
    registers: int  # of a consumer's thread
    heads_together: int  # heads whose tiles are drawn in turn


def head_dim_pad(headdim: int) -> int:
    """The power of two that a tile's head dimension is padded to in shared memory; a swizzled row has at least 64."""
    return max(64, forward.head_dim_pad(headdim))


def hopper_forward_config(problem: AttentionProblem) -> HopperForwardConfig:
    """The configuration for one problem."""
    return pinned_config("hopper_forward") or _choose(problem)


@functools.lru_cache(maxsize=4096)
def _choose(problem: AttentionProblem) -> HopperForwardConfig:
    pad = head_dim_pad(problem.headdim)
    if pad == 64 and (problem.window[0] is not None or (problem.causal and problem.seqlen_q <= SHORT)):
        return TWO_CONSUMERS
    return FORWARD[pad][problem.causal]


# (not causal, causal); H200, bf16, 16k tokens, hidden 2048, 2026-11-22
FORWARD = {
    64: (
        HopperForwardConfig(3, 128, 2, True, True, 160, 1),
        HopperForwardConfig(3, 128, 2, True, True, 160, 8),
    ),
    128: (
        HopperForwardConfig(2, 128, 2, True, True, 240, 1),
        HopperForwardConfig(2, 128, 2, True, True, 240, 8),
    ),
    256: (
        HopperForwardConfig(2, 64, 2, False, False, 240, 1),
        HopperForwardConfig(2, 64, 2, False, False, 240, 8),
    ),
}
# where tiles of 192 rows waste more on the diagonal than they gain, and where masks of two sides do not fit the 160 registers
# of three consumers' threads
SHORT = 2048  # tokens
TWO_CONSUMERS = HopperForwardConfig(2, 128, 2, True, False, 240, 8)
