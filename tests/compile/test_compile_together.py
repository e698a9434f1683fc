"""The kernels of one call compile side by side, each once, into what they are alone."""

import threading
import warnings
from unittest import mock

import pytest
import torch

triton = pytest.importorskip("triton")

from flash_attn import hardware as devices  # noqa: E402
from flash_attn.backends import hopper  # noqa: E402
from flash_attn.backends.base import Gradients  # noqa: E402
from tests.compile import variants  # noqa: E402
from tests.compile.variants import Variant  # noqa: E402
from tests.support.stub_driver import ARCHITECTURES, compiling_for  # noqa: E402

pytestmark = [
    pytest.mark.compile,
    pytest.mark.skipif(triton.knobs.runtime.interpret, reason="needs TRITON_INTERPRET unset"),
]

HARDWARE = ARCHITECTURES["sm_90"].hardware
VARIANT = Variant("backward", "sm_90", 64)


def backward_of_portable():
    variants.launch(VARIANT, HARDWARE)


def backward_of_hopper():
    problem, operands = variants.operands_of(VARIANT)
    q, k, v, *_ = operands
    softmax_lse = torch.empty(q.shape[0], q.shape[2], q.shape[1], device="meta")
    counter = torch.empty(2, dtype=torch.int32, device="meta")
    gradients = Gradients(*map(torch.empty_like, (q, k, v)))
    with (
        mock.patch.object(devices, "of", lambda _device: HARDWARE),
        mock.patch.object(hopper, "tile_counter", lambda _device: counter),
    ):
        hopper.backward(problem, operands, q, q, softmax_lse, gradients)


def compiled(call, cache_dir, side_by_side):
    """(the PTX of each launch, the thread of each compilation)."""
    threads = []
    with compiling_for("sm_90", cache_dir, side_by_side) as launches:
        triton.knobs.compilation.listener = lambda **_facts: threads.append(threading.current_thread())
        call()
    return {launch.kernel: launch.compiled.asm["ptx"] for launch in launches}, threads


@pytest.mark.parametrize("call", [backward_of_portable, backward_of_hopper])
def test_kernels_of_a_backward_compile_side_by_side(call, tmp_path):
    alone, threads = compiled(call, str(tmp_path / "alone"), side_by_side=False)
    assert set(threads) == {threading.main_thread()}
    filters = list(warnings.filters)
    together, threads = compiled(call, str(tmp_path / "together"), side_by_side=True)
    assert len(together) == len(threads) == len(set(threads)) > 1
    assert threading.main_thread() not in threads
    assert together == alone
    assert warnings.filters == filters


def test_inside_the_callers_own_asynchronous_mode(tmp_path):
    """It does not nest, and stays the caller's."""
    from concurrent.futures import ThreadPoolExecutor

    with compiling_for("sm_90", str(tmp_path), side_by_side=True) as launches, ThreadPoolExecutor(1) as pool:
        with triton.AsyncCompileMode(pool) as mode:
            backward_of_portable()
        assert not mode.raw_futures
    assert [launch.kernel for launch in launches] == ["attn_bwd_dq_kernel", "attn_bwd_dkdv_kernel"]
