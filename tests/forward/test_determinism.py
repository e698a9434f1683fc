"""Repeats on a busy GPU give the same bits: out, lse and every gradient, 50 times."""

import pytest
import torch

from flash_attn import launch
from tests.support import calls
from tests.support.cases import BF16, FP16, FP32, Case
from tests.support.inputs import make_inputs

REPEATS = 50
CASES = [
    Case("causal-gqa", BF16, 64, 8, 2, (257,) * 4, (257,) * 4, causal=True),
    Case("mqa-many-rows", BF16, 128, 16, 1, (300, 300), (513, 513)),
    Case("dropout-alibi-window", FP16, 64, 4, 4, (257, 257), (300, 300), window=(100, 20), alibi="bh", dropout_p=0.2),
    Case("varlen", BF16, 64, 6, 2, (1, 257, 0, 130), (64, 257, 5, 130), "varlen", causal=True),
    Case("headdim-256", BF16, 256, 4, 2, (257,), (257,), causal=True),
    Case("fp32", FP32, 64, 4, 2, (257,), (257,), causal=True),
]


@pytest.fixture
def device(request):
    with calls.running_on(request.param) as device:
        yield device


@pytest.mark.gpu
@pytest.mark.parametrize("device", calls.places("gpu"), indirect=True)
@pytest.mark.parametrize("pins", [{}, {"one_launch": False}], ids=["small", "large"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_same_bits_every_time(case, pins, device, seed):
    """In the launches of problems of this size, and in those of larger ones."""
    inputs = make_inputs(case, device, seed)
    with launch.pinned(**pins):
        first, _ = calls.forward_and_backward(case, inputs, seed)
        different = {name: torch.zeros((), dtype=torch.int64, device=device) for name in first}
        for _ in range(REPEATS):
            again, _ = calls.forward_and_backward(case, inputs, seed)
            for name, x in again.items():
                different[name] += (x != first[name]).sum()
    counts = {name: int(count) for name, count in different.items()}
    assert not any(counts.values()), f"elements that differ over {REPEATS} repeats: {counts}"
