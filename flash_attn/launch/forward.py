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


def pipeline_stages(num_stages: int, paged: bool) -> int:
    """Triton's num_stages: of a load that needs another one first, the page's number, each has half of the stages."""
    return 2 * num_stages - 1 if paged else num_stages


def forward_config(problem: AttentionProblem, hardware: Hardware, tma: bool) -> ForwardConfig:
    """The configuration for one problem; `tma` says whether tensor descriptors can read its keys and values."""
    return pinned_config("forward") or _choose(problem, hardware, tma)


@functools.lru_cache(maxsize=4096)
def _choose(problem: AttentionProblem, hardware: Hardware, tma: bool) -> ForwardConfig:
    pad = head_dim_pad(problem.headdim)
    if hardware.kind == "cpu":
        return INTERPRETER
    if problem.dtype == "float32":
        return FP32[pad]
    if hardware.kind == "hip":
        return (RDNA if hardware.arch.startswith("gfx1") else CDNA)[pad]
    if hardware.arch == "sm_90":
        table = HOPPER
        if tma:
            table = HOPPER_TMA_BUSY if problem.softcap or problem.dropout else HOPPER_TMA
        return table[pad][problem.causal]
    return NVIDIA[pad]


def worth_descriptors(problem: AttentionProblem, hardware: Hardware) -> bool:
    """Whether tensor descriptors can pay: Hopper or newer, and long enough that their 10 us of host time disappear."""
    if hardware.kind != "cuda" or int(hardware.arch.removeprefix("sm_")) < 90 or problem.layout != "dense":
        return False
    return work(problem) >= DESCRIPTOR_WORK


def work(problem: AttentionProblem) -> int:
    """Multiplications of one product: batch * heads * queries * keys * head dim."""
    return problem.batch_size * problem.nheads * problem.seqlen_q * problem.seqlen_k * problem.headdim


DESCRIPTOR_WORK = 1 << 33  # 34 GFLOP forward, about 80 us on an H200

INTERPRETER = ForwardConfig(16, 16, 4, 1)

# (not causal, causal); H200, bf16, 16k tokens, hidden 2048, 2026-11-22, benchmarks/tune.py
HOPPER_TMA = {
    16: (ForwardConfig(128, 64, 4, 3), ForwardConfig(128, 64, 4, 3)),
    32: (ForwardConfig(128, 64, 4, 3), ForwardConfig(128, 64, 4, 3)),
    64: (ForwardConfig(64, 128, 4, 2, tma=True), ForwardConfig(64, 128, 4, 2, tma=True)),
    128: (ForwardConfig(128, 64, 4, 2, tma=True), ForwardConfig(64, 64, 4, 3, tma=True)),
    256: (ForwardConfig(128, 64, 8, 2), ForwardConfig(128, 64, 8, 2)),
}
# with softcap or dropout, whose extra work between the products wants more programs side by side
HOPPER_TMA_BUSY = HOPPER_TMA | {128: (ForwardConfig(64, 64, 4, 3, tma=True),) * 2}
HOPPER = {
    16: (ForwardConfig(128, 64, 4, 3), ForwardConfig(128, 64, 4, 3)),
    32: (ForwardConfig(128, 64, 4, 3), ForwardConfig(128, 64, 4, 3)),
    64: (ForwardConfig(128, 64, 8, 3), ForwardConfig(64, 64, 4, 3)),
    128: (ForwardConfig(64, 64, 4, 3), ForwardConfig(64, 64, 4, 3)),
    256: (ForwardConfig(128, 64, 8, 2), ForwardConfig(128, 64, 8, 2)),
}

# unmeasured hardware: chosen to compile with few spills into the smallest shared memory of the family
NVIDIA = {
    16: ForwardConfig(128, 64, 4, 2),
    32: ForwardConfig(128, 64, 4, 2),
    64: ForwardConfig(128, 64, 8, 2),
    128: ForwardConfig(128, 32, 4, 2),
    256: ForwardConfig(64, 32, 8, 2),
}
CDNA = {
    16: ForwardConfig(128, 64, 4, 1),
    32: ForwardConfig(128, 64, 4, 1),
    64: ForwardConfig(128, 64, 4, 1),
    128: ForwardConfig(128, 64, 4, 1),
    256: ForwardConfig(64, 32, 4, 1),
}
RDNA = {
    16: ForwardConfig(128, 64, 4, 1),
    32: ForwardConfig(128, 64, 4, 1),
    64: ForwardConfig(64, 32, 4, 1),
    128: ForwardConfig(64, 32, 8, 1),
    256: ForwardConfig(32, 16, 8, 1),
}
FP32 = {
    16: ForwardConfig(64, 64, 4, 2),
    32: ForwardConfig(64, 64, 4, 2),
    64: ForwardConfig(64, 32, 4, 2),
    128: ForwardConfig(32, 32, 4, 2),
    256: ForwardConfig(32, 16, 4, 1),
}
