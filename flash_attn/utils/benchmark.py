"""Timing of a function and its gradient with torch.utils.benchmark: upstream's import path and meaning.

Every `benchmark_*` of time returns (timer, measurement); with verbose, the default, it prints the measurement.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.benchmark import Measurement, Timer

from flash_attn.errors import InvalidArgument

Timed = tuple[Timer, Measurement]


def benchmark_forward(
    fn: Callable[..., Any],
    *inputs: Any,
    repeats: int = 10,
    desc: str = "",
    verbose: bool = True,
    amp: bool = False,
    amp_dtype: torch.dtype = torch.float16,
    **kwinputs: Any,
) -> Timed:
    """Time fn(*inputs, **kwinputs), with amp under autocast to amp_dtype."""

    def forward() -> None:
        _call(fn, inputs, kwinputs, amp, amp_dtype)

    return _measure(forward, repeats, f"{desc} - Forward pass", verbose)


def benchmark_backward(
    fn: Callable[..., Any],
    *inputs: Any,
    grad: Tensor | None = None,
    repeats: int = 10,
    desc: str = "",
    verbose: bool = True,
    amp: bool = False,
    amp_dtype: torch.dtype = torch.float16,
    **kwinputs: Any,
) -> Timed:
    """Time the gradient of fn's (first) result alone, from grad, default random."""
    y = _call(fn, inputs, kwinputs, amp, amp_dtype)
    grad = _grad(y, grad)

    def backward() -> None:
        _forget_gradients(inputs)
        y.backward(grad, retain_graph=True)

    return _measure(backward, repeats, f"{desc} - Backward pass", verbose)


def benchmark_combined(
    fn: Callable[..., Any],
    *inputs: Any,
    grad: Tensor | None = None,
    repeats: int = 10,
    desc: str = "",
    verbose: bool = True,
    amp: bool = False,
    amp_dtype: torch.dtype = torch.float16,
    **kwinputs: Any,
) -> Timed:
    """Time fn and the gradient of its (first) result together."""
    grad = _grad(_call(fn, inputs, kwinputs, amp, amp_dtype), grad)

    def combined() -> None:
        _forget_gradients(inputs)
        _call(fn, inputs, kwinputs, amp, amp_dtype).backward(grad)

    return _measure(combined, repeats, f"{desc} - Forward + Backward pass", verbose)


def benchmark_fwd_bwd(
    fn: Callable[..., Any], *inputs: Any, grad: Tensor | None = None, **options: Any
) -> tuple[Timed, Timed]:
    """`benchmark_forward` and `benchmark_backward`."""
    return benchmark_forward(fn, *inputs, **options), benchmark_backward(fn, *inputs, grad=grad, **options)


def benchmark_all(
    fn: Callable[..., Any], *inputs: Any, grad: Tensor | None = None, **options: Any
) -> tuple[Timed, Timed, Timed]:
    """`benchmark_fwd_bwd` and `benchmark_combined`."""
    return (
        *benchmark_fwd_bwd(fn, *inputs, grad=grad, **options),
        benchmark_combined(fn, *inputs, grad=grad, **options),
    )


def pytorch_profiler(
    fn: Callable[..., Any],
    *inputs: Any,
    trace_filename: str | None = None,
    backward: bool = False,
    amp: bool = False,
    amp_dtype: torch.dtype = torch.float16,
    cpu: bool = False,
    verbose: bool = True,
    **kwinputs: Any,
) -> None:
    """Profile fn, with backward also its gradient, after 30 runs; the CPU's events where cpu is set or there is no GPU.

    Args:
        trace_filename: write a Chrome trace there.
        verbose: print the table of events.
    """

    def run() -> None:
        y = _call(fn, inputs, kwinputs, amp, amp_dtype)
        if backward:
            _forget_gradients(inputs)
            y.backward(torch.ones_like(y))

    for _ in range(30):
        run()
    gpu = torch.cuda.is_available()
    kinds = torch.profiler.ProfilerActivity
    activities = [kinds.CPU] * (cpu or not gpu) + [kinds.CUDA] * gpu
    with torch.profiler.profile(activities=activities, record_shapes=True, with_stack=True) as profile:
        run()
    if verbose:
        print(profile.key_averages().table(row_limit=50))
    if trace_filename is not None:
        profile.export_chrome_trace(trace_filename)


def benchmark_memory(
    fn: Callable[..., Any], *inputs: Any, desc: str = "", verbose: bool = True, **kwinputs: Any
) -> float:
    """Most GPU memory allocated while fn runs, in units of 1000 MiB.

    Raises:
        InvalidArgument: there is no GPU.
    """
    if not torch.cuda.is_available():
        raise InvalidArgument("benchmark_memory needs a CUDA device, found none")
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    torch.cuda.synchronize()
    fn(*inputs, **kwinputs)
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() / (2**20 * 1000)
    if verbose:
        print(f"{desc} max memory: {peak}GB")
    torch.cuda.empty_cache()
    return peak


def _call(fn: Callable[..., Any], inputs: Any, kwinputs: Any, amp: bool, amp_dtype: torch.dtype) -> Any:
    """The (first) result."""
    device = next((x.device.type for x in inputs if isinstance(x, Tensor)), "cuda")
    with torch.autocast(device_type=device, dtype=amp_dtype, enabled=amp):
        y = fn(*inputs, **kwinputs)
    return y[0] if isinstance(y, tuple) else y


def _grad(y: Tensor, grad: Tensor | None) -> Tensor:
    if grad is None:
        return torch.randn_like(y)
    if grad.shape != y.shape:
        raise InvalidArgument(f"grad must have the shape of the output, {tuple(y.shape)}, got {tuple(grad.shape)}")
    return grad


def _forget_gradients(inputs: Any) -> None:
    """So that nothing is accumulated."""
    for x in inputs:
        if isinstance(x, Tensor):
            x.grad = None


def _measure(stmt: Callable[[], None], repeats: int, title: str, verbose: bool) -> Timed:
    timer = Timer(stmt="stmt()", globals={"stmt": stmt}, num_threads=torch.get_num_threads())
    measurement = timer.timeit(repeats)
    if verbose:
        print(title)
        print(measurement)
    return timer, measurement
