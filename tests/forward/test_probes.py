"""Inputs whose attention is known exactly, through the public function: visible keys, weights, needles."""

import math

import pytest
import torch

from flash_attn import flash_attn_func
from tests.support import calls, probes
from tests.support.cases import BF16, FP16, FP32, Case

MASKS = {
    "full": {},
    "causal": dict(causal=True),
    "left": dict(window=(37, -1)),
    "band": dict(window=(16, 32)),
    "diagonal": dict(window=(0, 0)),
}
HEADS = {"bf16-d64": (BF16, 64, 4, 2), "fp16-d128": (FP16, 128, 2, 2), "bf16-d256": (BF16, 256, 2, 1)}
LENGTHS = {"square": (129, 129), "short-q": (65, 193), "short-k": (150, 63)}


def large_cases():
    """Every mask at head dim 64, the two commonest at the others, full precision once."""
    for name, (dtype, *heads) in HEADS.items():
        for mask, options in MASKS.items():
            if name == "bf16-d64" or mask in ("causal", "band"):
                for length, (seqlen_q, seqlen_k) in LENGTHS.items():
                    yield Case(f"{name}-{mask}-{length}", dtype, *heads, (seqlen_q,) * 2, (seqlen_k,) * 2, **options)
    yield Case("fp32-d40-causal", FP32, 40, 3, 1, (97,), (97,), causal=True)


LARGE = list(large_cases())
SMALL = [
    Case("small-full", FP16, 32, 1, 1, (33,), (33,)),
    Case("small-causal", FP16, 32, 2, 1, (33,), (48,), causal=True),
    Case("small-band", FP32, 16, 1, 1, (48,), (20,), window=(9, 6)),
]
RUNS = calls.placed({"cpu": LARGE, "gpu": LARGE, "interpreter": SMALL})


@pytest.fixture
def device(request):
    with calls.running_on(request.param) as device:
        yield device


on_every_case = pytest.mark.parametrize("case, device", RUNS, indirect=["device"])


def attend(q, k, v, **options):
    return flash_attn_func(q, k, v, **options, return_attn_probs=True)[:2]


@on_every_case
def test_equal_weights(case, device, seed):
    probes.check_zero_query(attend, case, device, seed)


@on_every_case
def test_weights_themselves(case, device, seed):
    probes.check_one_hot_values(attend, case, device, seed)


@on_every_case
def test_needle(case, device, seed):
    positions = None if case in LARGE else (0, 16, case.seqlens_k[0] - 1)
    probes.check_needle(attend, case, device, seed, positions)


def exact_on(*names):
    return pytest.mark.parametrize("device", calls.places(*names), indirect=True)


@exact_on("cpu", "gpu")
@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
def test_huge_scores_neither_overflow_nor_lose_the_winner(dtype, device, seed):
    """Scores of thousands: one weight is 1, the others 0, and the gradients stay finite.

    The fused multiply-add that subtracts the row's maximum rounds by 2^-24 of it; then weight and output are rounded.
    """
    q, k, v = (calls.randn(1, 129, 2, 64, dtype=dtype, device=device, seed=seed + i) for i in range(3))
    q, k = 40 * q, 40 * k
    leaves = [x.requires_grad_() for x in (q, k, v)]
    out, lse = attend(*leaves, causal=True)
    assert out.isfinite().all() and lse.isfinite().all()
    scores = torch.einsum("bihd,bjhd->bhij", q.double(), k.double()) / 8
    scores = scores.masked_fill(torch.ones(129, 129, dtype=torch.bool, device=device).triu(1), -math.inf)
    best, winner = scores.max(-1)
    torch.testing.assert_close(lse.double(), best, rtol=1e-5, atol=1.0)
    clear = scores.topk(2, -1).values[..., 0] - scores.topk(2, -1).values[..., 1] > 30
    picked = torch.gather(v.transpose(1, 2), 2, winner[..., None].expand(-1, -1, -1, 64)).transpose(1, 2)
    roundoff = best.abs().max().item() * 2**-24 + torch.finfo(dtype).eps
    assert clear.any() and roundoff < 0.01
    torch.testing.assert_close(out[clear.transpose(1, 2)], picked[clear.transpose(1, 2)], rtol=roundoff, atol=0.0)
    assert all(g.isfinite().all() for g in torch.autograd.grad(out, leaves, torch.ones_like(out)))


@exact_on("cpu", "gpu")
def test_equal_weights_of_a_long_row(device):
    """4096 keys: a sum of ones is exact in fp32, a lost block of keys shows."""
    q = torch.zeros(1, 64, 1, 64, dtype=BF16, device=device)
    k = torch.zeros(1, 4096, 1, 64, dtype=BF16, device=device)
    v = torch.ones_like(k)
    out, lse = attend(q, k, v, causal=True)
    visible = torch.arange(4096 - 63, 4097, device=device).double()
    torch.testing.assert_close(lse[0, 0].double(), visible.log(), rtol=0, atol=2e-5)
    assert (out == 1.0).all()
