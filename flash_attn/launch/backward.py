"""Launch configurations of the backward kernels: one for dq and one for dk and dv, or a kernel for all three."""

import functools
from typing import NamedTuple

from flash_attn.hardware import Hardware
from flash_attn.launch import pinned_config
from flash_attn.launch.forward import head_dim_pad, work
from flash_attn.problem import AttentionProblem


class BackwardConfig(NamedTuple):
    """Tile and launch shape of one program of the dq, the dkdv or the joint kernel."""

    block_m: int  # query rows: of a program (dq), of a loop step (dkdv)
    block_n: int  # keys: of a loop step (dq), of a program (dkdv)
    num_warps: int
    num_stages: int  # tiles in flight
    tma: bool = False  # load the looped tiles through tensor descriptors where strides allow


DkdvConfig = BackwardConfig | tuple[BackwardConfig, BackwardConfig]
HopperTable = dict[int, tuple[tuple[BackwardConfig, DkdvConfig], ...]]


def one_launch_config(problem: AttentionProblem, hardware: Hardware) -> BackwardConfig | None:
    """The configuration of the kernel that computes dq, dk and dv in one launch; None where each has its own.

    It is pinned as `one_launch`; False there, and a pin of `dq` or `dkdv`, ask for the others.
    """
    pin = pinned_config("one_launch")
    if pin is not None:
        return pin or None
    if pinned_config("dq") or pinned_config("dkdv") or not one_launch(problem):
        return None
    return joint_config(problem, hardware)


def one_launch(problem: AttentionProblem) -> bool:
    """Whether the host's time decides, and few blocks of keys compute the statistics of a row again."""
    return work(problem) < ONE_LAUNCH_WORK and problem.seqlen_q <= ONE_LAUNCH_QUERIES


# Multiplications of one product. The host is 12 us faster with one launch, 5 % of a forward and backward; the GPU at 2^24 of
# them, too, 13 to 9.5 us, at 2^29 it is slower, 39 to 44 us. H200, 2026-12-01
ONE_LAUNCH_WORK = 1 << 29
ONE_LAUNCH_QUERIES = 1024  # whose out each block of keys reads, too


@functools.lru_cache(maxsize=4096)
def joint_config(problem: AttentionProblem, hardware: Hardware) -> BackwardConfig | None:
    """What `one_launch_config` takes where it is not pinned; None where the kernel would spill much."""
    pad = head_dim_pad(problem.headdim)
    if hardware.kind == "cpu":
        return INTERPRETER[0]
    if problem.dtype == "float32":
        return JOINT_FP32.get(pad)
    if hardware.kind == "hip":
        return (JOINT_RDNA if hardware.arch.startswith("gfx1") else JOINT_CDNA).get(pad)
    return (JOINT_HOPPER if hardware.arch == "sm_90" else JOINT_NVIDIA).get(pad)


def dq_config(problem: AttentionProblem, hardware: Hardware, tma: bool) -> BackwardConfig:
    """The configuration of the dq kernel; `tma` says whether tensor descriptors can read its keys and values."""
    return pinned_config("dq") or _choose(problem, hardware, tma)[0]


def dkdv_config(problem: AttentionProblem, hardware: Hardware, tma: bool) -> DkdvConfig:
    """The configuration of the dkdv kernel; two where dk and dv have launches of their own.

    At head dim 256 the two accumulators do not fit side by side: computing S twice costs less than spilling them.
    """
    return pinned_config("dkdv") or _choose(problem, hardware, tma)[1]


@functools.lru_cache(maxsize=4096)
def _choose(problem: AttentionProblem, hardware: Hardware, tma: bool) -> tuple[BackwardConfig, DkdvConfig]:
    pad = head_dim_pad(problem.headdim)
    if hardware.kind == "cpu":
        return INTERPRETER
    if problem.dtype == "float32":
        return FP32[pad]
    if hardware.kind == "hip":
        return (RDNA if hardware.arch.startswith("gfx1") else CDNA)[pad]
    if hardware.arch == "sm_90":
        return _hopper_table(problem, tma)[pad][problem.causal]
    return NVIDIA[pad]


def _hopper_table(problem: AttentionProblem, tma: bool) -> HopperTable:
    if not tma:
        return HOPPER
    if problem.dropout:
        return HOPPER_TMA_DROPOUT
    return HOPPER_TMA_SOFTCAP if problem.softcap else HOPPER_TMA


INTERPRETER = (BackwardConfig(16, 16, 4, 1), BackwardConfig(16, 16, 4, 1))

# (not causal, causal), each (dq, dkdv); H200, bf16, 16k tokens, hidden 2048, 2026-11-22, benchmarks/tune.py
_small = (BackwardConfig(128, 64, 4, 2), BackwardConfig(64, 128, 4, 2))
HOPPER_TMA: HopperTable = {
    16: (_small, _small),
    32: (_small, _small),
    64: (
        (BackwardConfig(128, 64, 4, 3, tma=True), BackwardConfig(32, 128, 4, 3, tma=True)),
        (BackwardConfig(64, 64, 4, 2, tma=True), BackwardConfig(32, 128, 4, 2, tma=True)),
    ),
    128: (
        (BackwardConfig(128, 64, 8, 3, tma=True), BackwardConfig(64, 64, 4, 2, tma=True)),
        (BackwardConfig(128, 64, 8, 3, tma=True), BackwardConfig(64, 64, 4, 2, tma=True)),
    ),
    256: (
        (
            BackwardConfig(64, 32, 4, 3, tma=True),
            (BackwardConfig(32, 128, 8, 2), BackwardConfig(64, 128, 8, 2, tma=True)),
        ),
        (
            BackwardConfig(64, 32, 4, 3, tma=True),
            (BackwardConfig(32, 128, 8, 2, tma=True), BackwardConfig(64, 128, 8, 2, tma=True)),
        ),
    ),
}
HOPPER_TMA_SOFTCAP: HopperTable = HOPPER_TMA | {
    64: (
        (BackwardConfig(64, 64, 4, 3, tma=True), BackwardConfig(32, 128, 4, 3, tma=True)),
        (BackwardConfig(64, 64, 4, 2, tma=True), BackwardConfig(32, 64, 4, 2, tma=True)),
    ),
}
HOPPER_TMA_DROPOUT: HopperTable = HOPPER_TMA | {
    64: ((BackwardConfig(64, 64, 4, 2, tma=True), BackwardConfig(64, 64, 4, 1)),) * 2,
    128: (
        (BackwardConfig(64, 64, 4, 2, tma=True), BackwardConfig(32, 64, 4, 3, tma=True)),
        (BackwardConfig(64, 64, 4, 2, tma=True), BackwardConfig(32, 64, 4, 2, tma=True)),
    ),
}
HOPPER: HopperTable = {
    16: (_small, _small),
    32: (_small, _small),
    64: (
        (BackwardConfig(128, 64, 4, 3), BackwardConfig(32, 128, 4, 3)),
        (BackwardConfig(64, 64, 4, 3), BackwardConfig(64, 64, 4, 1)),
    ),
    128: (
        (BackwardConfig(128, 64, 8, 3), BackwardConfig(32, 64, 4, 3)),
        (BackwardConfig(128, 64, 8, 3), BackwardConfig(32, 64, 4, 2)),
    ),
    256: (
        (BackwardConfig(64, 32, 4, 3), (BackwardConfig(32, 128, 8, 2), BackwardConfig(32, 128, 8, 3))),
        (BackwardConfig(64, 32, 4, 3), (BackwardConfig(32, 128, 8, 2), BackwardConfig(64, 128, 8, 2))),
    ),
}

# unmeasured hardware, each (dq, dkdv): chosen to compile with few spills into the smallest shared memory of the family
NVIDIA: dict[int, tuple[BackwardConfig, DkdvConfig]] = {
    16: (BackwardConfig(64, 64, 4, 2), BackwardConfig(64, 64, 4, 2)),
    32: (BackwardConfig(64, 64, 4, 2), BackwardConfig(64, 64, 4, 2)),
    64: (BackwardConfig(64, 32, 4, 2), BackwardConfig(32, 64, 4, 2)),
    128: (BackwardConfig(64, 32, 4, 2), BackwardConfig(64, 64, 8, 2)),
    256: (BackwardConfig(32, 32, 4, 1), (BackwardConfig(32, 32, 4, 1), BackwardConfig(32, 32, 4, 1))),
}
CDNA: dict[int, tuple[BackwardConfig, DkdvConfig]] = {
    16: (BackwardConfig(64, 64, 4, 1), BackwardConfig(64, 64, 4, 1)),
    32: (BackwardConfig(64, 64, 4, 1), BackwardConfig(64, 64, 4, 1)),
    64: (BackwardConfig(64, 64, 4, 1), BackwardConfig(64, 64, 4, 1)),
    128: (BackwardConfig(64, 32, 4, 1), BackwardConfig(32, 64, 4, 1)),
    256: (BackwardConfig(32, 32, 4, 1), (BackwardConfig(32, 32, 4, 1), BackwardConfig(32, 32, 4, 1))),
}
RDNA: dict[int, tuple[BackwardConfig, DkdvConfig]] = {
    16: (BackwardConfig(64, 64, 4, 1), BackwardConfig(64, 64, 4, 1)),
    32: (BackwardConfig(64, 64, 4, 1), BackwardConfig(32, 64, 4, 1)),
    64: (BackwardConfig(32, 32, 4, 1), BackwardConfig(16, 32, 4, 1)),
    128: (BackwardConfig(32, 16, 8, 1), BackwardConfig(16, 32, 8, 1)),
    256: (BackwardConfig(16, 16, 8, 1), (BackwardConfig(16, 16, 8, 1), BackwardConfig(16, 16, 8, 1))),
}
FP32: dict[int, tuple[BackwardConfig, DkdvConfig]] = {
    16: (BackwardConfig(64, 32, 4, 2), BackwardConfig(32, 64, 4, 2)),
    32: (BackwardConfig(64, 32, 4, 2), BackwardConfig(32, 64, 4, 2)),
    64: (BackwardConfig(32, 32, 4, 2), BackwardConfig(32, 32, 4, 2)),
    128: (BackwardConfig(16, 32, 4, 2), BackwardConfig(16, 32, 4, 2)),
    256: (BackwardConfig(16, 16, 4, 2), BackwardConfig(16, 16, 4, 1)),
}

# dq, dk and dv in one launch: chosen to compile with few spills, of padded head dims and with all features, too; against other
# tiles they are unmeasured
JOINT_NVIDIA = {
    16: BackwardConfig(32, 64, 4, 2),
    32: BackwardConfig(32, 64, 4, 2),
    64: BackwardConfig(32, 64, 4, 2),
    128: BackwardConfig(64, 64, 8, 2),
}
JOINT_HOPPER = JOINT_NVIDIA | {128: BackwardConfig(32, 64, 4, 2)}  # ptxas serialises the products of eight warps
JOINT_CDNA = dict.fromkeys((16, 32, 64, 128), BackwardConfig(32, 64, 4, 1))
JOINT_RDNA = dict.fromkeys((16, 32, 64), BackwardConfig(16, 32, 8, 1))
JOINT_FP32 = dict.fromkeys((16, 32, 64), BackwardConfig(32, 32, 4, 2))
