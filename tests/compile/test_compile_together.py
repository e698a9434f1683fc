"""The kernels of a first call are compiled side by side, each once, and what is launched afterwards finds them."""

import contextlib
import threading

import pytest
import torch

triton = pytest.importorskip("triton")

from triton import knobs  # noqa: E402
from triton.runtime import driver  # noqa: E402

from flash_attn.backends import hopper, launcher  # noqa: E402
from flash_attn.backends.base import Gradients  # noqa: E402
from tests.compile import variants  # noqa: E402
from tests.support.stub_driver import ARCHITECTURES, StubDriver  # noqa: E402

pytestmark = [
    pytest.mark.compile,
    pytest.mark.skipif(triton.knobs.runtime.interpret, reason="needs TRITON_INTERPRET unset"),
]
ARCHITECTURE = ARCHITECTURES["sm_90"]


@pytest.fixture
def compilations(tmp_path, monkeypatch):
    """(kernel, thread) of every compilation for a GPU that is not there."""
    found, loaded = [], []

    def record(src, **_facts):
        found.append((src.fn.__name__, threading.get_ident()))

    monkeypatch.setattr(launcher, "device_of", lambda tensors: torch.device("cuda", 0))
    monkeypatch.setattr(launcher.hardware, "is_capturing", lambda device: False)
    monkeypatch.setattr(launcher.hardware, "device_guard", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(launcher, "_load", lambda device, kernel: loaded.append(kernel))
    monkeypatch.setattr(hopper.devices, "of", lambda device: ARCHITECTURE.hardware)
    monkeypatch.setattr(hopper, "tile_counter", lambda device: torch.empty(2, dtype=torch.int32, device="meta"))
    monkeypatch.setattr(launcher.Launcher, "__call__", lambda self, *tensors: self.start_compiling(tensors))
    previous, active = driver._active, StubDriver(ARCHITECTURE.target)
    driver.set_active(active)
    try:
        with knobs.cache.scope(), knobs.compilation.scope():
            knobs.cache.dir, knobs.compilation.listener = str(tmp_path), record
            yield found, loaded
    finally:
        driver._active = previous


@pytest.mark.parametrize("headdim, wanted", [(64, 3), (256, 3)])
def test_the_kernels_of_a_backward(headdim, wanted, compilations):
    """Rows, products, dq; at head dim 256 dq, dk, dv. A second plan finds all of them."""
    found, loaded = compilations
    problem, operands = variants.operands_of(
        variants.Variant("backward", "sm_90", headdim, "bfloat16", True, "plain", True)
    )
    q, k, v, *_ = operands
    softmax_lse = torch.empty((q.shape[0], q.shape[2], q.shape[1]), device="meta")
    gradients = Gradients(*map(torch.empty_like, (q, k, v)))
    for _plan in range(2):
        hopper.backward(problem, operands, q, q, softmax_lse, gradients)
    assert len(found) == wanted and len(loaded) == 2 * wanted
    assert threading.get_ident() not in {thread for _kernel, thread in found}
