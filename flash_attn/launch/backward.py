"""Launch configurations of the two backward kernels."""

import functools
from typing import NamedTuple

from flash_attn.hardware import Hardware
from flash_attn.launch import pinned_config
from flash_attn.launch.forward import head_dim_pad
from flash_attn.problem import AttentionProblem


class BackwardConfig(NamedTuple):
    """Tile and launch shape of one program of the dq or the dkdv kernel."""

    block_m: int  # query rows: of a program (dq), of a loop step (dkdv)
    block_n: int  # keys: of a loop step (dq), of a program (dkdv)
    num_warps: int
    num_stages: int  # tiles in flight
    tma: bool = False  # load the looped tiles through tensor descriptors where strides allow


def dq_config(problem: AttentionProblem, hardware: Hardware) -> BackwardConfig:
    """The configuration of the dq kernel."""
    return pinned_config("dq") or _choose(problem, hardware)[0]


def dkdv_config(
    problem: AttentionProblem, hardware: Hardware
) -> BackwardConfig | tuple[BackwardConfig, BackwardConfig]:
    """The configuration of the dkdv kernel; two where dk and dv have launches of their own.

    At head dim 256 the two accumulators do not fit side by side: computing S twice costs less than spilling them.
    """
    return pinned_config("dkdv") or _choose(problem, hardware)[1]


@functools.lru_cache(maxsize=4096)
def _choose(problem: AttentionProblem, hardware: Hardware) -> tuple[BackwardConfig, BackwardConfig]:
    pad = head_dim_pad(problem.headdim)
    if hardware.kind == "cpu":
        return BackwardConfig(16, 16, 4, 1), BackwardConfig(16, 16, 4, 1)
    if problem.dtype == "float32":
        return FP32[pad]
    if hardware.kind == "cuda" and hardware.arch == "sm_90":
        return HOPPER[pad][problem.causal]
    if hardware.kind == "hip":
        return CDNA[pad]
    return GENERIC[pad]


FP32 = {
    16: (BackwardConfig(64, 32, 4, 2), BackwardConfig(32, 64, 4, 2)),
    32: (BackwardConfig(64, 32, 4, 2), BackwardConfig(32, 64, 4, 2)),
    64: (BackwardConfig(32, 32, 4, 2), BackwardConfig(32, 32, 4, 2)),
    128: (BackwardConfig(32, 32, 8, 1), BackwardConfig(32, 32, 8, 1)),
    256: (BackwardConfig(16, 32, 8, 1), BackwardConfig(16, 32, 8, 1)),
}

_hopper_64 = (BackwardConfig(128, 64, 4, 3), BackwardConfig(64, 128, 8, 2))
_hopper_128 = (BackwardConfig(128, 64, 8, 3, tma=True), BackwardConfig(64, 128, 8, 2, tma=True))
_hopper_256 = (BackwardConfig(64, 64, 4, 2, tma=True), BackwardConfig(32, 64, 4, 2, tma=True))
_hopper_32 = (BackwardConfig(128, 64, 4, 2), BackwardConfig(64, 128, 4, 2))
HOPPER = {
    16: (_hopper_32, _hopper_32),
    32: (_hopper_32, _hopper_32),
    64: (_hopper_64, _hopper_64),
    128: (_hopper_128, _hopper_128),
    256: (_hopper_256, _hopper_256),
}

GENERIC = {
    16: (BackwardConfig(64, 64, 4, 2), BackwardConfig(64, 64, 4, 2)),
    32: (BackwardConfig(64, 64, 4, 2), BackwardConfig(64, 64, 4, 2)),
    64: (BackwardConfig(64, 64, 4, 2), BackwardConfig(64, 64, 4, 2)),
    128: (BackwardConfig(64, 32, 4, 2), BackwardConfig(32, 64, 4, 2)),
    256: (BackwardConfig(32, 32, 4, 1), BackwardConfig(32, 32, 4, 1)),
}

CDNA = {
    16: (BackwardConfig(64, 64, 4, 1), BackwardConfig(64, 64, 4, 1)),
    32: (BackwardConfig(64, 64, 4, 1), BackwardConfig(64, 64, 4, 1)),
    64: (BackwardConfig(64, 64, 4, 1), BackwardConfig(64, 64, 4, 1)),
    128: (BackwardConfig(64, 32, 4, 1), BackwardConfig(32, 64, 4, 1)),
    256: (BackwardConfig(32, 32, 4, 1), BackwardConfig(32, 32, 4, 1)),
}
