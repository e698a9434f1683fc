"""Launches in close succession: a kernel's programs start while the kernel before ends (programmatic dependent launch)."""

import triton
import triton.language as tl
from triton.language.target_info import current_target
from triton.runtime.jit import constexpr_function

from flash_attn.kernels.algebra.score import speaks_ptx


@constexpr_function
def knows_chains():
    """Whether the hardware that is compiled for can start kernels early."""
    return speaks_ptx() and current_target().arch >= 90


@triton.jit
def join_chain():
    """Let the next kernel's programs start, then wait until the kernel before is done and what it wrote can be read."""
    if knows_chains():
        tl.inline_asm_elementwise(
            "griddepcontrol.launch_dependents; griddepcontrol.wait; // $0",
            "=r,~{memory}", [], dtype=tl.int32, is_pure=False, pack=1,
        )  # fmt: skip
