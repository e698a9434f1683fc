"""Tensor maps: what the hardware's tile copies know of an operand, as Triton's launchers take them.

The first launch of a kernel needs Triton's own descriptor, whose construction checks everything and costs about 7 us. A
compiled kernel's launcher reads five attributes of it, which `TensorMap` has; the checks hold for the plan that owns it.
"""

from collections.abc import Callable, Sequence
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


Describe = Callable[[Any], Any]  # from a tensor, or its address, to what a launch takes for it


def portable(x: Tensor, rows: int, pad: int) -> Describe:
    """Maps of the (1, rows, 1, pad) tiles of operands like x, for Triton kernels; reads past a sequence give zeros."""
    shape, strides = list(x.shape), list(x.stride())

    def describe(operand: Any) -> Any:
        if isinstance(operand, int):
            return TensorMap(operand, shape, strides)
        from triton.tools.tensor_descriptor import TensorDescriptor

        return TensorDescriptor(operand, shape, strides, [1, rows, 1, pad])

    return describe


def hopper(x: Tensor, rows: int, columns: int) -> Describe:
    """Maps of the (rows, columns) tiles of operands like x, for Gluon kernels; 128-byte swizzled in shared memory.

    A packed (total, heads, dim) operand gets a ragged map of five dimensions, of which three address the same rows twice: the
    coordinates (RAGGED_ORIGIN, end, RAGGED_ORIGIN - length + row) reach row `row` of the sequence that ends before token `end`,
    and rows past its end are out of bounds, because the third dimension ends at RAGGED_ORIGIN.
    """
    if x.dim() == 4:
        shape, strides = list(x.shape), [_stride(x, dim) for dim in range(4)]
    else:
        _tokens, heads, headdim = x.shape
        stride = _stride(x, 0)
        shape = [RAGGED_BOUND, RAGGED_BOUND, RAGGED_ORIGIN, heads, headdim]
        strides = [WRAP - stride, stride, stride, _stride(x, 1), 1]
    block = [1] * (len(shape) - 3) + [rows, 1, columns]

    def describe(operand: Any) -> Any:
        if isinstance(operand, int):
            return TensorMap(operand, shape, strides)
        from triton.experimental.gluon.language import NVMMASharedLayout
        from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

        layout = NVMMASharedLayout(128, 8 * operand.element_size(), rank=len(shape))
        return TensorDescriptor(operand, shape, strides, block, layout)

    return describe


def _stride(x: Tensor, dim: int) -> int:
    """The stride of a dimension; that of a single element says nothing and may be anything, so the row's length serves."""
    if dim == x.dim() - 1:
        return 1
    return x.stride(dim) if x.shape[dim] > 1 else x.shape[-1]


def regular(x: Tensor) -> bool:
    """Whether address and strides of an operand are multiples of 16 bytes, and no element repeats."""
    return x.data_ptr() % 16 == 0 and all(s > 0 and s * x.element_size() % 16 == 0 for s in x.stride()[:-1])
