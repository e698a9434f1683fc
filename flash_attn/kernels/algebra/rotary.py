"""Rotary position embedding of one pair of coordinates: the product (first + i second) * (cos + i sin)."""

import triton
import triton.language as tl  # noqa: F401 - the interpreter looks for it


@triton.jit
def rotate(first, second, cos, sin):
    """Each pair turned by its angle."""
    return first * cos - second * sin, first * sin + second * cos
