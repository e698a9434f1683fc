"""What an eager call does on the host once its plan is known: how many operators it runs, and that nothing is checked twice.

The GPU is pretended: its kernels note their launches and compute nothing.
"""

import contextlib
from collections import Counter
from types import SimpleNamespace

import pytest
import torch

from flash_attn import dispatch, flash_attn_func, flash_attn_qkvpacked_func, flash_attn_varlen_func, hardware, launch
from flash_attn import flash_attn_with_kvcache as with_kvcache
from flash_attn.backends.launcher import Launcher, started_early
from flash_attn.hardware import Hardware

B, S, H, D = 2, 32, 4, 64
KERNELS = {
    "forward": ["attn_fwd_kernel"],
    "backward": ["attn_bwd_kernel", "attn_bwd_dq_kernel", "attn_bwd_dkdv_kernel"],
    "decode": ["attn_decode_split_kernel", "attn_decode_merge_kernel"],
    "append": ["kv_append_kernel"],
}


class Recorder:
    """A kernel that notes its direct launches."""

    def __init__(self, name, launched):
        self.compiled = SimpleNamespace(
            run=lambda *_arguments: launched.append(name), function="function", packed_metadata="metadata"
        )

    def __getitem__(self, _grid):
        return lambda *_arguments, **_options: self.compiled


@pytest.fixture
def launched(monkeypatch):
    """The names of the kernels that calls launch directly, on a GPU that is not there."""
    pytest.importorskip("triton")
    import importlib

    from flash_attn.backends import portable

    gpu = Hardware("cuda", "sm_90", 132, 232448)
    names = []
    for module, kernels in KERNELS.items():
        for kernel in kernels:
            owner = importlib.import_module(f"flash_attn.kernels.portable.{module}")
            monkeypatch.setattr(owner, kernel, Recorder(kernel, names))
    monkeypatch.setattr(hardware, "of", lambda _device: gpu)
    monkeypatch.setattr(portable, "hardware_of", lambda _device: gpu)
    monkeypatch.setattr(hardware, "raw_stream_getter", lambda _device: lambda: "stream")
    monkeypatch.setattr(dispatch, "_plans", {})
    return names


def operators(call, launched, monkeypatch):
    """(operators that a call runs once its plan is known, the kernels that it launches)."""
    call()
    for check in ("describe", "describe_cache", "check_gradients", "choose_backend", "choose_backward_backend"):
        monkeypatch.delattr(dispatch, check)
    launched.clear()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        call()
    outermost = [event.name for event in profile.events() if not _inside_an_operator(event)]
    names = [name for name in outermost if "::" in name and not name.startswith("autograd::")]
    return Counter(name for name in names if name != "aten::fill_"), launched  # fill_ is that of the fixture `poison`


def _inside_an_operator(event):
    parent = event.cpu_parent
    return parent is not None and (parent.name.startswith("aten::") or _inside_an_operator(parent))


def randn(*shape, requires_grad=False):
    return torch.randn(*shape, dtype=torch.float16, requires_grad=requires_grad)


@pytest.mark.parametrize("requires_grad", [False, True])
def test_a_forward_allocates_its_results(requires_grad, launched, monkeypatch):
    q, k, v = (randn(B, S, H, D, requires_grad=requires_grad) for _ in range(3))
    run, kernels = operators(lambda: flash_attn_func(q, k, v, causal=True), launched, monkeypatch)
    assert run == {"aten::empty_like": 2}  # out, softmax_lse
    assert kernels == KERNELS["forward"]


def test_a_packed_batch_costs_no_more(launched, monkeypatch):
    q, k, v = (randn(B * S, H, D) for _ in range(3))
    ends = torch.tensor([0, S, 2 * S], dtype=torch.int32)
    run, kernels = operators(lambda: flash_attn_varlen_func(q, k, v, ends, ends, S, S), launched, monkeypatch)
    assert run == {"aten::empty_like": 2}
    assert kernels == KERNELS["forward"]


@pytest.mark.parametrize("pins, allocated", [({}, 4), ({"one_launch": False}, 5)])
def test_a_backward_allocates_gradients_and_row_statistics(pins, allocated, launched, monkeypatch):
    """Small problems take one launch, larger ones two, of which the second reads a statistic more."""
    q, k, v = (randn(B, S, H, D, requires_grad=True) for _ in range(3))
    dout = randn(B, S, H, D)

    def call():
        with launch.pinned(**pins):
            torch.autograd.grad(flash_attn_func(q, k, v, causal=True), (q, k, v), dout)

    run, kernels = operators(call, launched, monkeypatch)
    assert run == {"aten::empty_like": 2 + allocated}  # out, softmax_lse; dq, dk, dv, delta and lse_log2
    assert kernels == KERNELS["forward"] + (KERNELS["backward"][1:] if pins else KERNELS["backward"][:1])


def test_a_packed_gradient_is_one_allocation(launched, monkeypatch):
    qkv, dout = randn(B, S, 3, H, D, requires_grad=True), randn(B, S, H, D)
    run, kernels = operators(
        lambda: torch.autograd.grad(flash_attn_qkvpacked_func(qkv), qkv, dout), launched, monkeypatch
    )
    assert run == {"aten::unbind": 2, "aten::empty_like": 3, "aten::new_empty": 1}
    assert kernels == KERNELS["forward"] + KERNELS["backward"][:1]


@pytest.mark.parametrize("num_splits", [1, 2])
@pytest.mark.parametrize("new", ["", "append", "append and rotate"])
def test_a_cache_call_allocates_results_and_parts(new, num_splits, launched, monkeypatch):
    q, k_cache, v_cache = randn(B, 1, H, D), randn(B, 256, H, D), randn(B, 256, H, D)
    words = dict(cache_seqlens=torch.zeros(B, dtype=torch.int32), num_splits=num_splits, causal=True)
    if new:
        words.update(k=randn(B, 1, H, D), v=randn(B, 1, H, D))
    if "rotate" in new:
        words.update(rotary_cos=randn(256, D // 2), rotary_sin=randn(256, D // 2))
    monkeypatch.setattr(dispatch, "check_room", lambda *_arguments: None)  # lengths that the host knows: not on a GPU
    run, kernels = operators(lambda: with_kvcache(q, k_cache, v_cache, **words), launched, monkeypatch)
    parts, turned = 2 * (num_splits > 1), "rotate" in new
    assert run == {"aten::empty_like": 2 + parts + turned}  # out, softmax_lse; part_out, part_lse; q_rotated
    assert kernels == (KERNELS["append"] if new else []) + KERNELS["decode"][:num_splits]


def test_the_operators_are_for_listeners(launched, monkeypatch):
    """The same call under a dispatch mode shows its operators, which eager calls leave out."""
    from torch.utils._python_dispatch import TorchDispatchMode

    seen = []

    class Listener(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            seen.append(str(function))
            return function(*args, **(kwargs or {}))

    q, k, v = (randn(B, S, H, D, requires_grad=True) for _ in range(3))
    with Listener():
        torch.autograd.grad(flash_attn_func(q, k, v), (q, k, v), randn(B, S, H, D))
    wanted = {"flash_attn._flash_attn_forward.default", "flash_attn._flash_attn_backward.default"}
    assert wanted <= set(seen)


def test_a_launch_makes_its_device_current(launched, monkeypatch):
    """And leaves the caller's as it was."""
    current = 0

    @contextlib.contextmanager
    def guard(device):
        nonlocal current
        before, current = current, device.index or 0
        yield
        current = before

    monkeypatch.setattr(hardware, "is_current", lambda device: device.index == current)
    monkeypatch.setattr(hardware, "device_guard", guard)
    kernel = Recorder("kernel", launched)
    kernel.compiled.run = lambda *_arguments: launched.append(current)
    launcher = Launcher(kernel, 1, tuple, [], {}, {})
    x = randn(4)
    launcher(x)
    launcher.device = torch.device("cuda", 1)
    launcher(x)
    assert launched == [1] and current == 0


def test_an_early_launch_leaves_the_others_alone():
    """One compiled kernel has one launcher of Triton's; another kind is left as it is."""
    run = SimpleNamespace(launch_pdl=False)
    assert started_early(run).launch_pdl and not run.launch_pdl
    assert started_early(print) is print
