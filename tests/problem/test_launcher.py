"""The launcher's two ways: through Triton's dispatch the first time, straight to the compiled kernel afterwards."""

from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch

from flash_attn import hardware
from flash_attn.backends import launcher


class Pair(NamedTuple):
    ptr: object
    size: int


class Recorder:
    """A kernel and its compiled form that note how they were called."""

    def __init__(self):
        self.dispatched, self.direct = [], []

    def __getitem__(self, grid):
        def dispatch(*arguments, **options):
            self.dispatched.append((grid, arguments, options))
            return SimpleNamespace(run=self.run, function="function", packed_metadata="metadata")

        return dispatch

    def run(self, *arguments):
        self.direct.append(arguments)


@pytest.fixture
def recorder(monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setattr(hardware, "raw_stream_getter", lambda device: lambda: "stream")
    return Recorder()


def make(recorder, num_programs=3):
    def build(addresses):
        return (addresses[0], 7), addresses[1], 5

    return launcher.Launcher(recorder, num_programs, build, (Pair, None), {"BLOCK": 64}, {"num_warps": 4})


def aligned(offset=0):
    """A tensor whose address is `offset` bytes past a multiple of 16."""
    buffer = torch.zeros(64, dtype=torch.uint8)
    start = -buffer.data_ptr() % 16 + offset
    return buffer[start : start + 16]


def test_first_launch_is_dispatched_and_later_ones_are_direct(recorder):
    launch, x, y = make(recorder), aligned(), aligned()
    launch(x, None)
    (grid, arguments, options), *more = recorder.dispatched
    assert grid == (3,) and isinstance(arguments[0], Pair) and arguments[0].ptr is x and arguments[1:] == (None, 5)
    assert options == {"BLOCK": 64, "num_warps": 4, "enable_fp_fusion": True} and not more and not recorder.direct
    launch(y, x)
    addresses = y.data_ptr(), x.data_ptr()
    wanted = (3, 1, 1, "stream", "function", "metadata", None, None, None, (addresses[0], 7), addresses[1], 5, 64)
    assert recorder.direct == [wanted] and len(recorder.dispatched) == 1


def test_numbers_follow_what_is_bound(recorder):
    launch, x = make(recorder), aligned()
    launch(x, None, numbers=(8, 9))
    launch(x, None, numbers=(10, 11))
    assert recorder.dispatched[0][1][1:] == (None, 5, 8, 9)
    assert recorder.direct[0][-6:] == ((x.data_ptr(), 7), None, 5, 10, 11, 64)


def test_misaligned_pointers_are_always_dispatched(recorder):
    launch = make(recorder)
    launch(aligned(4), None)
    launch(aligned(), None)
    launch(aligned(), None)
    launch(aligned(8), None)
    assert len(recorder.dispatched) == 3 and len(recorder.direct) == 1


def test_a_profiler_sees_every_launch(recorder, monkeypatch):
    hook = SimpleNamespace(calls=[])
    monkeypatch.setattr(
        launcher, "_runtime_knobs", lambda: SimpleNamespace(launch_enter_hook=hook, launch_exit_hook=hook)
    )
    launch = make(recorder)
    launch(aligned(), None)
    hook.calls.append(print)
    launch(aligned(), None)
    assert len(recorder.dispatched) == 2 and not recorder.direct


def test_nothing_to_do_launches_nothing(recorder):
    make(recorder, num_programs=0)(aligned(), None)
    assert not recorder.dispatched and not recorder.direct
