"""Tensor maps: what the hardware's tile copies know of an operand, as Triton's launchers take them.

The first launch of a kernel needs Triton's own descriptor, whose construction checks everything and costs about 7 us. A
compiled kernel's launcher reads five attributes of it, which `TensorMap` has; the checks hold for the plan that owns it.
"""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

RAGGED_ORIGIN = 1 << 30  # of rows; kernels.hopper.pipeline counts from it
RAGGED_BOUND = 0x7FFF0000
WRAP = 1 << 34  # elements by which the two helper dimensions of a ragged map cancel


class TensorMap:
    """An operand at a known address."""

    __slots__ = ("address", "shape", "strides")

    padding = "zero"
    round_f32_to_tf32 = False

    def __init__(self, address: int, shape: Sequence[int], strides: Sequence[int]) -> None:
        self.address = address
        self.shape = shape
        self.strides = strides

    @property
    def base(self) -> "TensorMap":
        return self

    def data_ptr(self) -> int:
        return self.address


def extent(x: Tensor) -> tuple[list[int], list[int]]:
    """(shape, strides) of the map of an operand: four dimensions as they are, or five that end at any row.

    A packed (total, heads, dim) operand gets a ragged map. Its first three dimensions address the same rows twice: the
    coordinates (RAGGED_ORIGIN, end, RAGGED_ORIGIN - length + row) reach row `row` of the sequence that ends before token `end`,
    and rows past its end are out of bounds, because the third dimension ends at RAGGED_ORIGIN.
    """
    if x.dim() == 4:
        return list(x.shape), [_stride(x, dim) for dim in range(4)]
    tokens, heads, headdim = x.shape
    stride = _stride(x, 0)
    shape = [RAGGED_BOUND, RAGGED_BOUND, RAGGED_ORIGIN, heads, headdim]
    return shape, [WRAP - stride, stride, stride, _stride(x, 1), 1]


def _stride(x: Tensor, dim: int) -> int:
    """The stride of a dimension; that of a single element says nothing and may be anything, so the row's length serves."""
    if dim == x.dim() - 1:
        return 1
    return x.stride(dim) if x.shape[dim] > 1 else x.shape[-1]


def fits(x: Tensor) -> bool:
    """Whether the hardware can copy tiles of an operand: 16-byte aligned, contiguous rows, no repeated elements."""
    if x.numel() == 0 or x.data_ptr() % 16 or x.shape[-1] * x.element_size() % 16:
        return False
    return all(
        size == 1 or (stride > 0 and stride * x.element_size() % 16 == 0)
        for size, stride in zip(x.shape[:-1], x.stride()[:-1], strict=True)
    )


def gluon_descriptor(x: Tensor, block: Sequence[int], shape: list[int], strides: list[int]) -> Any:
    """Gluon's own descriptor of 128-byte swizzled tiles, for the launch that compiles."""
    from triton.experimental.gluon.language import NVMMASharedLayout
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    layout = NVMMASharedLayout(128, 8 * x.element_size(), rank=len(shape))
    return TensorDescriptor(x, shape, strides, list(block), layout)
