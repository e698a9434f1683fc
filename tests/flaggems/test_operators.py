"""FlagGems' own operators behind the backend: interpreted on the CPU, compiled on a GPU, against the specification."""

import pytest
import torch

from flash_attn import dispatch, flash_attn_flaggems_backend, reference
from tests.flaggems.test_adapter import ACCEPTED, paged, run_paged
from tests.support import calls
from tests.support.cases import BF16, FP16, Case
from tests.support.gems_standin import StandIn, parameters
from tests.support.inputs import make_inputs
from tests.support.tolerance import expected


@pytest.mark.interpreter
@pytest.mark.parametrize("name", ["flash_attention_forward", "flash_attn_varlen_func"])
def test_the_stand_in_has_flaggems_signatures(interpreted, name):
    assert parameters(getattr(StandIn(), name)) == parameters(getattr(interpreted, name))


INTERPRETED = [
    Case("dense", FP16, 32, 2, 1, (33, 33), (47, 47)),
    Case("dense-causal-empty-rows", FP16, 40, 2, 2, (64,), (30,), causal=True, strides="transposed"),
    Case("dense-partial-block", FP16, 32, 2, 1, (130,), (150,), causal=True),
    Case("dense-band", FP16, 64, 2, 2, (128,), (130,), window=(20, 10), softcap=3.0),
    Case("dense-left", FP16, 32, 2, 2, (100,), (60,), window=(7, -1), strides="packed"),
    Case("dense-right", FP16, 32, 2, 2, (40,), (70,), window=(-1, 5), softcap=3.0),
    Case("dense-alibi", FP16, 32, 4, 2, (33,), (47,), alibi="h"),
    Case("dense-causal-alibi", FP16, 32, 4, 2, (33, 33), (47, 47), causal=True, alibi="bh"),
    Case("dense-decode", FP16, 64, 6, 2, (1, 1), (65, 65), causal=True),
    Case("varlen", FP16, 32, 2, 1, (17, 0, 1, 30), (17, 4, 33, 0), "varlen", causal=True),
    Case(
        "varlen-odd-headdim",
        FP16,
        24,
        2,
        2,
        (33, 5),
        (21, 40),
        "varlen",
        window=(12, -1),
        softcap=2.0,
        strides="packed",
    ),
    Case("varlen-alibi", FP16, 40, 2, 1, (33, 70), (70, 5), "varlen", causal=True, alibi="bh", strides="transposed"),
    Case("varlen-one-query", FP16, 32, 6, 2, (1, 0, 1), (40, 5, 70), "varlen", causal=True),
    Case("varlen-one-query-window", FP16, 32, 6, 2, (1, 0, 1), (40, 5, 70), "varlen", window=(9, 0)),
]


@pytest.mark.interpreter
@pytest.mark.parametrize("case", INTERPRETED, ids=str)
def test_interpreted_forward(interpreted, case, seed):
    inputs = make_inputs(case, "cpu", seed)
    results, _ = calls.forward(case, inputs, seed)
    expected(case, inputs).check(**results)


@pytest.mark.interpreter
@pytest.mark.parametrize("interpreted", [128], indirect=True)
@pytest.mark.parametrize("case", [INTERPRETED[0], INTERPRETED[1], INTERPRETED[3]], ids=str)
def test_interpreted_forward_with_wider_blocks(interpreted, case, seed):
    inputs = make_inputs(case, "cpu", seed)
    results, _ = calls.forward(case, inputs, seed)
    expected(case, inputs).check(**results)


@pytest.mark.interpreter
@pytest.mark.parametrize("seqlens_q", [(1, 1, 1), (3, 0, 5)])
def test_interpreted_pages(interpreted, seqlens_q, seed):
    check_pages(seed, "cpu", seqlens_q, {})


def check_pages(seed, device, seqlens_q, words, **sizes):
    *operands, k, v = (x.to(device) for x in paged(seed, seqlens_q=seqlens_q, **sizes))
    used = operands[5]
    out, lse = run_paged(*operands, causal=True, **words)
    cu_seqlens_k = torch.cat([used.new_zeros(1), used.cumsum(0).int()])
    wanted = reference.attention_varlen(operands[0], k, v, operands[3], cu_seqlens_k, window=(None, 0))
    torch.testing.assert_close(out.double(), wanted[0].double(), rtol=2e-3, atol=2e-3)
    torch.testing.assert_close(lse.double(), wanted[1], rtol=1e-4, atol=1e-4)


LARGER = [
    Case(f"{mask}-d{headdim}-{lengths[0]}x{lengths[1]}", BF16, headdim, 8, 2, *((n, n) for n in lengths), **words)
    for headdim in (64, 128, 256)
    for mask, words in (("full", {}), ("causal", dict(causal=True)), ("band", dict(window=(100, 30))))
    for lengths in ((512, 512), (384, 1000), (1000, 300))
]
LARGER += [
    Case(f"packed-d{headdim}-{mask}", BF16, headdim, 8, 2, (700, 1, 0, 300), (700, 90, 5, 129), "varlen", **words)
    for headdim in (64, 128)
    for mask, words in (("full", {}), ("causal", dict(causal=True)), ("left", dict(window=(64, -1))))
]


@pytest.mark.gpu
@pytest.mark.parametrize("case", ACCEPTED + LARGER, ids=str)
def test_forward_and_gradients(installed, case, seed):
    """FlagGems' forward, and gradients from its out and softmax_lse by the backend that the table routes to."""
    inputs = make_inputs(case, "cuda", seed)
    results, _ = calls.forward_and_backward(case, inputs, seed)
    expected(case, inputs).check(**results)
    forwards = list(dispatch._plans.values())
    assert {plan.backend.name for plan in forwards} == {"flaggems"}
    backwards = {plan.backend.name for forward in forwards for plan in forward.backward_plans.values()}
    assert backwards and backwards <= {"portable", "hopper"}


@pytest.mark.gpu
@pytest.mark.parametrize("seqlens_q", [(1, 1, 1), (1, 0, 1), (3, 0, 5)], ids=str)
@pytest.mark.parametrize("headdim", [64, 128])
@pytest.mark.parametrize("page", [16, 256])
def test_pages(installed, seqlens_q, headdim, page, seed):
    check_pages(seed, "cuda", seqlens_q, {}, headdim=headdim, page=page, nheads=8)


@pytest.mark.gpu
@pytest.mark.parametrize("scale", [-0.3, 0.0])
def test_scales_that_are_not_positive(installed, scale, seed):
    q, k, v = (calls.randn(2, 90, 4, 64, dtype=FP16, device="cuda", seed=seed + i) for i in range(3))
    out, lse, *_ = flash_attn_flaggems_backend._flaggems_flash_attn_forward(q, k, v, softmax_scale=scale, causal=True)
    wanted = reference.attention(q, k, v, softmax_scale=scale, window=(None, 0))
    torch.testing.assert_close(out.double(), wanted[0], rtol=2e-3, atol=2e-3)
    torch.testing.assert_close(lse.double(), wanted[1], rtol=1e-4, atol=1e-4)
