"""How many bytes per thread a kernel may spill, and why where that is more than a few registers.

Measured with Triton 3.6.0 and its ptxas. Of later releases up to 3.9 only 3.7 keeps within those of the Hopper kernels, and
none within the others: beyond that the compile checks are about everything else.
"""

from typing import NamedTuple

import triton

BUDGETED = triton.__version__.startswith("3.6.")
HOPPER_BUDGETED = triton.__version__.startswith(("3.6.", "3.7."))

KERNELS = {
    "attn_fwd_kernel": "forward",
    "attn_bwd_dq_kernel": "dq",
    "attn_bwd_dkdv_kernel": "dkdv",
    "attn_bwd_kernel": "joint",
}


class Budget(NamedTuple):
    """What a launch may cost beside its registers."""

    spill_bytes: int
    reason: str
    serialised: bool = False  # whether ptxas may run the wgmma of a loop one by one (C7510, C7511)


DEFAULT = Budget(16, "four registers spilled around a loop cost nothing that can be measured")

_FASTEST = "measured on the H200: faster than the tiles that do not spill"
_EVERYTHING = "all features at once; a tile for them alone would make the plain kernel slower"
_MASKED = "a tile of a padded head dim carries the masks of its loads"
_EIGHT_WARPS = "eight warps do not spill, but ptxas runs their products one by one"
_SCALARS = "scalars, which go to lanes of vector registers: both passes' addresses; none to memory"
_RDNA = "256 vector registers hold neither accumulators nor operands of such a head dim; the smallest tile spills least"

# (kernel, architecture, padded head dim, kind), where None stands for any; the first match counts.
# A kind is a feature of variants.FEATURES, "odd" for a head dim below its padded one, or a dtype other than bfloat16.
BUDGETS: dict[tuple[str | None, str | None, int | None, str | None], Budget] = {
    ("dkdv", "sm_90", None, "everything"): Budget(112, _EVERYTHING, serialised=True),
    ("dkdv", "sm_90", 64, "odd"): Budget(288, _MASKED),
    ("dkdv", "sm_90", 64, None): Budget(48, _FASTEST),
    ("dkdv", "sm_90", 128, None): Budget(96, _FASTEST),
    ("dkdv", "sm_90", 256, None): Budget(80, _FASTEST),
    ("joint", "sm_90", None, "everything"): Budget(144, _EVERYTHING),
    ("joint", "sm_90", 64, "odd"): Budget(80, _MASKED),
    ("joint", "sm_90", 128, None): Budget(48, _EIGHT_WARPS),
    ("joint", "gfx942", None, "everything"): Budget(384, _SCALARS),
    ("forward", "sm_80", 128, "everything"): Budget(48, _EVERYTHING),
    ("forward", "gfx942", 128, "scores"): Budget(96, _EVERYTHING),
    (None, "gfx942", 128, "everything"): Budget(144, _EVERYTHING),
    ("dq", "gfx1100", 128, None): Budget(48, _RDNA),
    ("dq", "gfx1100", 256, None): Budget(896, _RDNA),
    ("dkdv", "gfx1100", 128, None): Budget(512, _RDNA),
    ("dkdv", "gfx1100", 256, None): Budget(1664, _RDNA),
}


def budget(kernel: str, arch: str, pad: int, kind: str) -> Budget:
    """The budget of a launch."""
    facts = (KERNELS[kernel], arch, pad, kind)
    for pattern, found in BUDGETS.items():
        if all(wanted is None or wanted == fact for wanted, fact in zip(pattern, facts, strict=True)):
            return found
    return DEFAULT


# (kernel, architecture, head dim, dtype) of calls over a cache, where None stands for any; the first match counts.
_GATHER = (
    "two warps gather keys from pages, addresses spilled; measured on the H200: 3 to 20 % faster than four; pages of 16 tokens "
    "within 2 % of a dense cache"
)
CACHE_BUDGETS: dict[tuple[str | None, str | None, int | None, str | None], Budget] = {
    ("attn_decode_split_kernel", "sm_90", 128, None): Budget(80, _GATHER),
    ("attn_decode_split_kernel", "sm_90", 256, None): Budget(136, _GATHER),
}


def cache_budget(kernel: str, arch: str, headdim: int, dtype: str) -> Budget:
    """The budget of a launch over a cache."""
    facts = (kernel, arch, headdim, dtype)
    for pattern, found in CACHE_BUDGETS.items():
        if all(wanted is None or wanted == fact for wanted, fact in zip(pattern, facts, strict=True)):
            return found
    return DEFAULT


# (padded head dim, feature of test_compile_hopper.FEATURES) of the Hopper forward; the first match counts.
HOPPER_BUDGETS: dict[tuple[int | None, str | None], Budget] = {
    (64, "softcap"): Budget(160, "four consumers, at the start of a tile; measured on the H200: faster than two"),
    (64, None): Budget(96, "three or four consumers, around the loops; measured on the H200: faster than two"),
    (128, "everything"): Budget(304, _EVERYTHING + "; masking one side of a window makes windows up to 3 % faster"),
    (None, "everything"): Budget(128, _EVERYTHING),
    (None, "cache_small_pages"): Budget(
        72, "a page ahead in the loading warp; measured on the H200: faster than none ahead"
    ),
    (None, None): Budget(32, "scalars of the loading warp, which has 24 registers, and of a tile's beginning"),
}


def hopper_budget(pad: int, feature: str) -> Budget:
    """The budget of a launch of the Hopper forward."""
    facts = (pad, feature)
    return next(
        found
        for pattern, found in HOPPER_BUDGETS.items()
        if all(wanted is None or wanted == fact for wanted, fact in zip(pattern, facts, strict=True))
    )
