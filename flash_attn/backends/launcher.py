"""Launches one kernel again and again with the same shapes, strides and options, at little host cost.

The first launch goes through Triton's own dispatch, which specialises and compiles. Later ones call the compiled kernel
directly with raw pointers, the way that dispatch would: everything it derives from the arguments, apart from the pointers'
alignment, is fixed by the plan that owns the launcher.
"""

import copy
import functools
import operator
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor

from flash_attn import hardware

ALIGNMENT = 16  # bytes; Triton compiles separately for pointers that are multiples of this

# x * scale - max is one instruction, rounded once; from Triton 3.10 on only where it is asked for
FUSED = {"enable_fp_fusion": True}


class Launcher:
    """A kernel bound to everything but its tensors and the numbers that vary from call to call.

    `build(addresses)` returns the kernel's positional arguments as plain tuples and numbers, where `addresses` holds the
    tensors themselves or their raw pointers, in the order in which they are passed to `__call__`. `kinds` names the
    NamedTuple of each leading argument, which Triton's dispatch needs and a compiled kernel does not; None for the others.
    `numbers` follow those arguments; the kernel must not specialise on them. With `early` all launches but the first start
    while the kernel before on their stream ends; the kernel itself has to wait for that, see `kernels.portable.chain`.
    """

    def __init__(
        self,
        kernel: Any,
        num_programs: int,
        build: Callable[[Sequence[Any]], tuple[Any, ...]],
        kinds: Sequence[Any],
        constants: dict[str, Any],
        options: dict[str, Any],
        early: bool = False,
    ) -> None:
        self.kernel = kernel
        self.num_programs = num_programs
        self.build = build
        self.kinds = kinds
        self.constants = constants
        self.constant_values = tuple(constants.values())
        self.options = FUSED | options
        self.early = early
        self.launch_compiled: Callable[..., None] | None = None
        self.device: torch.device | None = None  # where it was launched last, if its kernels have a current device

    def __call__(self, *tensors: Tensor | None, numbers: tuple[int, ...] = ()) -> None:
        """Launch on the current stream of the tensors' device."""
        self.launch(tensors, *pointers(tensors), numbers)

    def launch(
        self, tensors: Sequence[Tensor | None], addresses: Sequence[Any], aligned: bool, numbers: tuple[int, ...] = ()
    ) -> None:
        """As a call, with what `pointers` says of the tensors."""
        if self.num_programs == 0:
            return
        if self.launch_compiled is None or not aligned or _profiled():
            self._dispatch(tensors, numbers, aligned)
            return
        if self.device is not None and not hardware.is_current(self.device):
            with hardware.device_guard(self.device):
                return self.launch(tensors, addresses, aligned, numbers)
        self.launch_compiled(
            self.num_programs,
            1,
            1,
            self.stream(),
            self.function,
            self.metadata,
            None,
            None,
            None,
            *self.build(addresses),
            *numbers,
            *self.constant_values,
        )

    def _dispatch(self, tensors: Sequence[Tensor | None], numbers: tuple[int, ...], aligned: bool) -> None:
        """Launch through Triton; keep the compiled kernel for the next call with aligned pointers."""
        device = next(tensor.device for tensor in tensors if tensor is not None)
        with hardware.device_guard(device):
            arguments = list(self.build(tensors))
            for index, kind in enumerate(self.kinds):
                if kind is not None and arguments[index] is not None:
                    arguments[index] = kind(*arguments[index])
            if _only_compiling.get():
                _compile(self.kernel, (self.num_programs,), *arguments, *numbers, **self.constants, **self.options)
                return
            compiled = self.kernel[(self.num_programs,)](*arguments, *numbers, **self.constants, **self.options)
        stream = hardware.raw_stream_getter(device)
        if aligned and stream is not None:
            self.device = device if device.type == "cuda" else None
            self.stream = stream
            self.function = compiled.function
            self.metadata = compiled.packed_metadata
            self.launch_compiled = started_early(compiled.run) if self.early else compiled.run


def started_early(run: Any) -> Any:
    """Triton's launcher of a compiled kernel, with programmatic dependent launch where it knows that.

    Compiled in as an option of Triton's, early and other launches of a kernel would be two binaries.
    """
    if not hasattr(run, "launch_pdl"):
        return run
    run = copy.copy(run)
    run.launch_pdl = True
    return run


def pointers(tensors: Sequence[Tensor | None]) -> tuple[list[int | None], bool]:
    """The tensors' raw pointers, and whether all are multiples of ALIGNMENT."""
    addresses = [None if tensor is None else tensor.data_ptr() for tensor in tensors]
    return addresses, functools.reduce(operator.or_, filter(None, addresses), 0) % ALIGNMENT == 0


def launch_all(launchers: Sequence[Launcher], *tensors: Tensor | None) -> None:
    """Kernels over the same tensors, one after the other; the pointers are read once."""
    addresses, aligned = pointers(tensors)
    for launcher in launchers:
        launcher.launch(tensors, addresses, aligned)


_only_compiling = ContextVar("_only_compiling", default=False)
_compiled: set[Any] = set()


def compile_together(kind: Hashable, launch: Callable[[], object]) -> None:
    """Compile the kernels of launchers that `launch` calls for the first time, each in a thread; none is launched.

    `kind` stands for the kernels: once they are compiled, a call of other lengths binds them anew and has nothing to compile.
    Head dim 256's backward has three: 3.7 s in place of 6.1 (H200's machine, 2026-12-01). What fails is compiled again when it
    is launched, and then says so.
    """
    if kind in _compiled:
        return
    _compiled.add(kind)
    from triton import AsyncCompileMode
    from triton.runtime import _async_compile

    if _async_compile.active_mode.get() is not None:  # the caller's own, which does the same
        return
    token = _only_compiling.set(True)
    try:
        # before Python 3.12 threads that parse sources at the same time can upset each other: a SystemError, once in a while
        with suppress(Exception), ThreadPoolExecutor() as executor, AsyncCompileMode(executor, ignore_errors=True):
            launch()
    finally:
        _only_compiling.reset(token)
        _async_compile.active_mode.set(None)  # Triton leaves it when it is interrupted


def _compile(kernel: Any, grid: tuple[int], *arguments: Any, **constants: Any) -> None:
    """What a launch would compile; interpreted kernels have nothing of the kind."""
    from triton import JITFunction

    if isinstance(kernel, JITFunction):
        kernel.warmup(*arguments, grid=grid, **constants)


@functools.cache
def _runtime_knobs() -> Any:
    import triton

    return triton.knobs.runtime


def _profiled() -> bool:
    """Whether a profiler has hooked Triton's launches."""
    knobs = _runtime_knobs()
    return bool(knobs.launch_enter_hook.calls or knobs.launch_exit_hook.calls)
