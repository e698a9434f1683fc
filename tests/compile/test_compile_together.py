"""Kernels of one call compile at the same time, and nothing else changes."""

import threading
from concurrent.futures import ThreadPoolExecutor
from unittest import mock

import pytest
import torch
import triton
import triton.language as tl
from triton.runtime import _async_compile

from flash_attn.backends import launcher
from flash_attn.backends.launcher import Launcher, compile_together
from tests.support.stub_driver import compiling_for


@triton.jit
def store_kernel(x, VALUE: tl.constexpr):
    tl.store(x, VALUE)


@triton.jit
def refusing_kernel(x, VALUE: tl.constexpr):
    tl.static_assert(VALUE > 2, "too small")
    tl.store(x, VALUE)


def launchers(kernel, *values):
    return [Launcher(kernel, 1, lambda p: (p[0],), (None,), {"VALUE": value}, {"num_warps": 1}) for value in values]


@pytest.fixture
def launches(tmp_path):
    with compiling_for("sm_90", str(tmp_path)) as launches:
        yield launches


@pytest.fixture(autouse=True)
def nothing_compiled(monkeypatch):
    monkeypatch.setattr(launcher, "_compiled", set())


def launch_all(bound):
    for launch in bound:
        launch(torch.empty(4, device="meta"))


def test_kernels_compile_side_by_side_and_once(launches):
    bound, compile_one, together = launchers(store_kernel, 1, 2, 3), triton.compiler.compile, threading.Barrier(3)

    def compile_beside_others(*arguments, **words):
        together.wait(timeout=60)
        return compile_one(*arguments, **words)

    with mock.patch.object(triton.compiler, "compile", compile_beside_others):
        compile_together("a kind", lambda: launch_all(bound))
        assert launches == []
        together.abort()  # nobody may compile any more
        launch_all(bound)
    assert len({id(each.compiled) for each in launches}) == len(launches) == 3


def test_a_kind_is_compiled_once(launches):
    seen = []
    for kind in ("a kind", "a kind", "another kind"):
        compile_together(kind, lambda kind=kind: seen.append(kind))
    assert seen == ["a kind", "another kind"]


def test_what_does_not_compile_says_so_when_it_is_launched(launches):
    bound = launchers(refusing_kernel, 3, 1)
    compile_together("a kind", lambda: launch_all(bound))
    bound[0](torch.empty(4, device="meta"))
    with pytest.raises(triton.compiler.errors.CompileTimeAssertionFailure, match="too small"):
        bound[1](torch.empty(4, device="meta"))
    # the failure has left nothing behind
    compile_together("another kind", lambda: launch_all(launchers(store_kernel, 4)))


def test_an_interruption_leaves_nothing_behind(launches):
    bound = launchers(store_kernel, 6)
    with (
        mock.patch.object(_async_compile, "as_completed", side_effect=KeyboardInterrupt),
        pytest.raises(KeyboardInterrupt),
    ):
        compile_together("a kind", lambda: launch_all(bound))
    assert _async_compile.active_mode.get() is None
    launch_all(bound)
    assert len(launches) == 1


def test_other_failures_are_left_to_the_launch(launches):
    """Such as one of Python's parser."""
    bound = launchers(store_kernel, 8)

    def fail():
        launch_all(bound)
        raise SystemError("AST constructor recursion depth mismatch")

    compile_together("a kind", fail)
    assert launches == []
    launch_all(bound)
    assert len(launches) == 1


def test_inside_the_callers_own_threads(launches):
    bound = launchers(store_kernel, 5)
    with ThreadPoolExecutor() as executor, triton.AsyncCompileMode(executor):
        compile_together("a kind", lambda: launch_all(bound))
    assert launches == []
    launch_all(bound)
    assert len(launches) == 1
