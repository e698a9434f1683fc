"""Launch configurations of the forward kernel."""

import functools
from typing import NamedTuple

from flash_attn.hardware import Hardware
from flash_attn.launch import pinned_config
from flash_attn.problem import AttentionProblem


class ForwardConfig(NamedTuple):
    """Tile and launch shape of one forward program."""

    block_m: int  # query rows of a program
    block_n: int  # keys of a loop step
    num_warps: int
    num_stages: int  # key/value tiles in flight
    tma: bool = False  # load keys and values through tensor descriptors where strides allow


def head_dim_pad(headdim: int) -> int:
    """The power of two that a tile's head dimension is padded to; tensor-core products need at least 16."""
    return max(16, 1 << (headdim - 1).bit_length())


def forward_config(problem: AttentionProblem, hardware: Hardware) -> ForwardConfig:
    """The configuration for one problem."""
    return pinned_config("forward") or _choose(problem, hardware)


@functools.lru_cache(maxsize=4096)
def _choose(problem: AttentionProblem, hardware: Hardware) -> ForwardConfig:
    pad = head_dim_pad(problem.headdim)
    if hardware.kind == "cpu":
        return ForwardConfig(16, 16, 4, 1)
    if problem.dtype == "float32":
        return FP32[pad]
    if hardware.kind == "cuda" and hardware.arch == "sm_90":
        return HOPPER[pad][problem.causal]
    if hardware.kind == "hip":
        return CDNA[pad]
    return GENERIC[pad]


FP32 = {
    16: ForwardConfig(64, 64, 4, 2),
    32: ForwardConfig(64, 64, 4, 2),
    64: ForwardConfig(64, 32, 4, 2),
    128: ForwardConfig(32, 32, 4, 2),
    256: ForwardConfig(32, 32, 8, 1),
}

HOPPER = {
    16: (ForwardConfig(128, 64, 4, 3), ForwardConfig(128, 64, 4, 3)),
    32: (ForwardConfig(128, 64, 4, 3), ForwardConfig(128, 64, 4, 3)),
    64: (ForwardConfig(128, 128, 8, 2), ForwardConfig(128, 128, 8, 2)),
    128: (ForwardConfig(128, 128, 8, 2, tma=True), ForwardConfig(128, 128, 8, 2, tma=True)),
    256: (ForwardConfig(128, 64, 8, 2, tma=True), ForwardConfig(128, 64, 8, 2, tma=True)),
}

GENERIC = {
    16: ForwardConfig(128, 64, 4, 2),
    32: ForwardConfig(128, 64, 4, 2),
    64: ForwardConfig(128, 64, 4, 2),
    128: ForwardConfig(128, 32, 4, 2),
    256: ForwardConfig(64, 32, 4, 1),
}

CDNA = {
    16: ForwardConfig(128, 64, 4, 1),
    32: ForwardConfig(128, 64, 4, 1),
    64: ForwardConfig(128, 64, 4, 1),
    128: ForwardConfig(128, 64, 4, 1),
    256: ForwardConfig(64, 32, 4, 1),
}
