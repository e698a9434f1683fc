"""Rotary position embedding: each pair of features is a plane, turned by an angle that grows with the position."""

import triton


@triton.jit
def rotate(first, second, cos, sin):
    """Each pair turned by its angle."""
    return first * cos - second * sin, first * sin + second * cos
