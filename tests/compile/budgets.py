"""How many bytes per thread a kernel may spill, and why where that is more than nothing."""

from typing import NamedTuple

KERNELS = {"attn_fwd_kernel": "forward", "attn_bwd_dq_kernel": "dq", "attn_bwd_dkdv_kernel": "dkdv"}


class Budget(NamedTuple):
    spill_bytes: int
    reason: str


DEFAULT = Budget(0, "registers hold every accumulator; spilling in a loop costs more than a smaller tile")

# (kernel, architecture, padded head dim, feature or dtype); None stands for any. The first match counts.
BUDGETS: dict[tuple[str | None, str | None, int | None, str | None], Budget] = {}


def budget(kernel: str, arch: str, pad: int, feature: str) -> Budget:
    """The budget of a launch."""
    facts = (KERNELS[kernel], arch, pad, feature)
    for pattern, found in BUDGETS.items():
        if all(wanted is None or wanted == fact for wanted, fact in zip(pattern, facts, strict=True)):
            return found
    return DEFAULT
