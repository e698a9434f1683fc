"""Time and memory of training steps: smoke limits, nothing of size L x L, no slower than the stored floor."""

import json
import time
from pathlib import Path

import pytest
import torch

from benchmarks.cases import plain
from benchmarks.providers import PROVIDERS
from benchmarks.timing import measure_group
from flash_attn import flash_attn_func
from tests.support import calls
from tests.support.cases import FP32

FLOOR = json.loads((Path(__file__).parent / "performance_floor.json").read_text())
DIRECTIONS = ("forward", "backward")
SEQLEN = 4096
BUDGET_S = 1.0
BATCH, NHEADS, HEADDIM = 4, 8, 64
LIMITS_S = {128: 0.050, 512: 0.050, 1024: 0.200, 2048: None}  # None: measured, not judged
REPEATS = 10

pytestmark = [pytest.mark.gpu, pytest.mark.parametrize("device", calls.places("gpu"), indirect=True)]


@pytest.fixture
def device(request):
    with calls.running_on(request.param) as device:
        yield device


@pytest.fixture(autouse=True)
def unpoisoned(poison, monkeypatch):
    """Filling the package's memory with NaN takes time."""
    monkeypatch.undo()


def operands(seqlen, device):
    shape = (BATCH, seqlen, NHEADS, HEADDIM)
    return [calls.randn(*shape, dtype=FP32, device=device, seed=i).requires_grad_() for i in range(4)]


def training_step(q, k, v, dout):
    return torch.autograd.grad(flash_attn_func(q, k, v), (q, k, v), dout)


def fastest_step(seqlen, device):
    """Seconds of the fastest of a few training steps, compilation left out."""
    tensors = operands(seqlen, device)
    training_step(*tensors)
    seconds = []
    for _ in range(REPEATS):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        training_step(*tensors)
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - begin)
    return min(seconds)


@pytest.mark.parametrize("seqlen", LIMITS_S)
def test_a_training_step_stays_below_its_limit(seqlen, device):
    seconds, limit = fastest_step(seqlen, device), LIMITS_S[seqlen]
    assert limit is None or seconds < limit, f"{1e3 * seconds:.1f} ms at {seqlen} tokens, limit {1e3 * limit:.0f} ms"


def test_peak_memory_is_a_few_times_the_operands(device):
    """The scores alone, 4 x 8 x 1024 x 1024 in fp32, would take all of the limit together with the operands."""
    seqlen = 1024
    limit = 3 * (BATCH * seqlen * NHEADS * HEADDIM * 4 * 6)
    training_step(*operands(seqlen, device))
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    gradients = training_step(*operands(seqlen, device))
    peak = torch.cuda.max_memory_allocated() - before
    assert len(gradients) == 3
    assert peak < limit, f"peak {peak / 2**20:.0f} MiB, limit {limit / 2**20:.0f} MiB"


@pytest.mark.slow
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_no_slower_than_the_floor(direction, device, request):
    """Against PyTorch's FlashAttention-2, interleaved launch by launch; alone on the GPU, so not among xdist workers."""
    if hasattr(request.config, "workerinput"):
        pytest.skip("speed is measured with the GPU to itself: run without -n")
    cases = [plain(headdim, SEQLEN, causal, direction) for headdim in (64, 128) for causal in (False, True)]
    providers = [PROVIDERS["portable"], PROVIDERS["fa2"]]
    slower = []
    for case in cases:
        results = {result.provider: result for result in measure_group([case], providers, device, BUDGET_S)}
        ours, theirs = results["portable"], results["fa2"]
        assert ours.refused is None and theirs.refused is None, (ours.refused, theirs.refused)
        name = f"D{case.headdim}-{'causal' if case.causal else 'full'}"
        speed, floor = theirs.median_ms / ours.median_ms, FLOOR[direction][name]
        if speed < floor:
            slower.append(f"{name}: {speed:.2f}x, floor {floor}x ({ours.median_ms:.3f} and {theirs.median_ms:.3f} ms)")
    assert not slower, "; ".join(slower)
