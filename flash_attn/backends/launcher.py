"""Launches one kernel again and again with the same shapes, strides and options, at little host cost.

The first launch goes through Triton's own dispatch, which specialises and compiles. Later ones call the compiled kernel
directly with raw pointers, the way that dispatch would: everything it derives from the arguments, apart from the pointers'
alignment, is fixed by the plan that owns the launcher.
"""

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from flash_attn import hardware

ALIGNMENT = 16  # bytes; Triton compiles separately for pointers that are multiples of this


class Launcher:
    """A kernel bound to everything but its tensors.

    `build(addresses, tensors)` returns the kernel's positional arguments, where `addresses` holds either the tensors
    themselves or their raw pointers, in the order in which they are passed to `__call__`.
    """

    def __init__(
        self,
        kernel: Any,
        num_programs: int,
        build: Callable[[Sequence[Any], Sequence[Tensor | None]], tuple[Any, ...]],
        constants: dict[str, Any],
        options: dict[str, Any],
    ) -> None:
        self.kernel = kernel
        self.num_programs = num_programs
        self.build = build
        self.constants = constants
        self.constant_values = tuple(constants.values())
        self.options = options
        self.compiled: Any = None

    def __call__(self, *tensors: Tensor | None) -> None:
        """Launch on the current stream of the tensors' device."""
        if self.num_programs == 0:
            return
        compiled = self.compiled
        addresses: list[int | None] = []
        misaligned = 0
        for tensor in tensors:
            if tensor is None:
                addresses.append(None)
            else:
                address = tensor.data_ptr()
                misaligned |= address
                addresses.append(address)
        if compiled is None or misaligned % ALIGNMENT or _observed():
            self._dispatch(tensors, aligned=misaligned % ALIGNMENT == 0)
            return
        compiled.run(
            self.num_programs,
            1,
            1,
            self.stream(),
            compiled.function,
            compiled.packed_metadata,
            None,
            None,
            None,
            *self.build(addresses, tensors),
            *self.constant_values,
        )

    def _dispatch(self, tensors: Sequence[Tensor | None], aligned: bool) -> None:
        """Launch through Triton; keep the compiled kernel for the next call with aligned pointers."""
        arguments = self.build(tensors, tensors)
        compiled = self.kernel[(self.num_programs,)](*arguments, **self.constants, **self.options)
        device = next(tensor.device for tensor in tensors if tensor is not None)
        stream = hardware.raw_stream_getter(device)
        if aligned and stream is not None and hasattr(compiled, "packed_metadata"):
            self.stream = stream
            self.compiled = compiled


def _observed() -> bool:
    """Whether a profiler has hooked Triton's launches."""
    hooks = _runtime_knobs()
    return hooks.launch_enter_hook is not None or hooks.launch_exit_hook is not None


def _runtime_knobs() -> Any:
    import triton

    return triton.knobs.runtime
