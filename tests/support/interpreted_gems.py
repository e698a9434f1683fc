"""FlagGems' own attention operators in Triton's interpreter: the real sources, without their device detection and tuning.

FlagGems cannot be imported without an accelerator. Of the installed package only ops/attention.py, ops/flash_api.py and
ops/flash_kernel.py are loaded; what they take from the rest is replaced by the few lines below.
"""

import contextlib
import functools
import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
import triton
import triton.language as tl
from triton.runtime import interpreter


def sources() -> Path:
    """The folder of the installed package, which is not imported."""
    spec = importlib.util.find_spec("flag_gems")
    if spec is None or spec.origin is None:
        pytest.skip("flag_gems is not installed")
    return Path(spec.origin).parent


@functools.cache
def load(block_n: int = 32, dq_rows: int = 128) -> SimpleNamespace:
    """The package as the adapter sees it; its dense programs take 128 rows by `block_n` keys, tuned to 32 or 128.

    A program of its gradient takes 128 keys for dk and dv and `dq_rows` rows for dq, tuned to 64 or 128.
    """
    config = triton.Config({"BLOCK_M": 128, "BLOCK_N": block_n}, num_warps=4 if block_n == 32 else 8)
    gradient = triton.Config({"BLOCK_M1": 32, "BLOCK_N1": 128, "BLOCK_M2": dq_rows, "BLOCK_N2": 32})
    replaced = _replacements({"attention": config, "attention_bwd": gradient})
    patches = (mock.patch.object(triton, name, value) for name, value in _DECORATORS.items())
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.dict(sys.modules, replaced))
        for patch in patches:
            stack.enter_context(patch)
        attention = importlib.import_module("flag_gems.ops.attention")
        launchers = importlib.import_module("flag_gems.ops.flash_api")
        kernels = importlib.import_module("flag_gems.ops.flash_kernel")
        for name in [name for name in sys.modules if name.startswith("flag_gems")]:
            del sys.modules[name]
    kernels.max, kernels.min = _maximum, _minimum
    launchers.CHECK_DEVICE = lambda x: None
    operators = ("flash_attention_forward", "flash_attn_varlen_func", "scaled_dot_product_attention_backward")
    package = SimpleNamespace(device="cpu", config=SimpleNamespace(use_c_extension=False))
    for name in operators:
        setattr(package, name, _interpreted(getattr(attention, name)))
    return package


def _replacements(configs: dict[str, triton.Config]) -> dict[str, ModuleType]:
    device = SimpleNamespace(
        device=lambda _device: contextlib.nullcontext(),
        get_device_properties=lambda _device: SimpleNamespace(multi_processor_count=132),
    )
    runtime = _module(
        "flag_gems.runtime",
        torch_device_fn=device,
        get_tuned_config=lambda name: [configs[name]],
        get_heuristic_config=_packed_tiles,
    )
    package = _module("flag_gems", device="cpu", vendor_name="nvidia", runtime=runtime)
    package.__path__ = [str(sources())]
    operators = _module("flag_gems.ops")
    operators.__path__ = [str(sources() / "ops")]
    undecorated = lambda *_args, **_words: lambda kernel: kernel  # noqa: E731
    shim = SimpleNamespace(tanh=_tanh)
    modules = (
        package,
        runtime,
        operators,
        _module("flag_gems.config", use_c_extension=False),
        _module("flag_gems.utils", libentry=undecorated, libtuner=_autotune, tl_extra_shim=shim),
        _module("flag_gems.utils.random_utils", philox_backend_seed_offset=lambda _increment: (1, 2)),
    )
    return {module.__name__: module for module in modules}


def _module(name: str, **contents: Any) -> ModuleType:
    module = ModuleType(name)
    module.__dict__.update(contents)
    return module


def _packed_tiles(name: str) -> dict[str, Callable[[Any], int]]:
    """The tiles of "mha_block_<rows>", from FlagGems' runtime/backend/_nvidia/heuristics_config_utils.py."""
    rows = int(name.rpartition("_")[2])
    sizes = {"BLOCK_M": rows, "BLOCK_N": 32 if rows == 128 else 64, "num_warps": 4, "num_stages": 1}
    return {key: lambda _args, value=value: value for key, value in sizes.items()}  # type: ignore[misc]


@triton.jit
def _tanh(x):
    return 2 * tl.sigmoid(2 * x) - 1


class _Launchable:
    """kernel[grid](...) with more keyword arguments, which a function makes of those given."""

    def __init__(self, kernel: Any, more: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
        self.kernel, self.more, self.arg_names = kernel, more, kernel.arg_names

    def __getitem__(self, grid: Any) -> Callable[..., Any]:
        def launch(*args: Any, **words: Any) -> Any:
            given = dict(zip(self.arg_names, args, strict=False)) | words
            return self.kernel[grid](*args, **words, **self.more(given))

        return launch


def _autotune(configs: list[triton.Config], **_words: Any) -> Callable[[Any], _Launchable]:
    options = configs[0].kwargs | {"num_warps": configs[0].num_warps, "num_stages": 1}
    return lambda kernel: _Launchable(kernel, lambda _given: options)


def _heuristics(values: dict[str, Callable[[Any], Any]]) -> Callable[[Any], _Launchable]:
    return lambda kernel: _Launchable(kernel, lambda given: {name: value(given) for name, value in values.items()})


_DECORATORS = {"autotune": _autotune, "heuristics": _heuristics}


def _maximum(a: Any, b: Any) -> Any:
    """Python's max of two tensors compares them as one number each in the interpreter."""
    return _elementwise(tl.maximum, max, a, b)


def _minimum(a: Any, b: Any) -> Any:
    return _elementwise(tl.minimum, min, a, b)


def _elementwise(of_tensors: Any, of_numbers: Any, a: Any, b: Any) -> Any:
    if not isinstance(a, tl.tensor) and not isinstance(b, tl.tensor):
        return of_numbers(a, b)
    return of_tensors(a, b) if isinstance(a, tl.tensor) else of_tensors(b, a)


def _interpreted(operator: Any) -> Any:
    """The operator with bool arguments of its kernels passed as integers, which the interpreter needs.

    What it allocates starts as NaN: otherwise an element that it never writes may hold an earlier call's right result.
    """

    @functools.wraps(operator)
    def call(*args: Any, **words: Any) -> Any:
        with _bools_as_integers(), _memory_of_nan():
            return operator(*args, **words)

    return call


@contextlib.contextmanager
def _bools_as_integers() -> Iterator[None]:
    convert = interpreter._implicit_cvt
    with mock.patch.object(interpreter, "_implicit_cvt", lambda x: convert(int(x) if isinstance(x, bool) else x)):
        yield


@contextlib.contextmanager
def _memory_of_nan() -> Iterator[None]:
    """torch.empty fills with NaN, as it does where deterministic algorithms are asked for."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)
