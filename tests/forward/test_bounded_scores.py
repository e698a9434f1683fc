"""Softcaps that let the forward do without a running maximum, at scores that reach them; and caps and dtypes that do not."""

from dataclasses import replace

import pytest
import torch

from flash_attn.backends.base import Operands
from flash_attn.backends.fixed_arguments import LARGEST_BOUND, fixed_arguments
from tests.support import calls
from tests.support.cases import BF16, FP16, FP32, Case
from tests.support.inputs import make_inputs
from tests.support.tolerance import expected

INTERPRETED = (FP32, FP16)  # interpreted products of bf16 are wrong


@pytest.fixture
def device(request):
    with calls.running_on(request.param) as device:
        yield device


@pytest.mark.parametrize("device", calls.places("cpu", "gpu", "hopper", "interpreter"), indirect=True)
@pytest.mark.parametrize("dtype", [BF16, FP32, FP16], ids=str)
@pytest.mark.parametrize("softcap", [1.0, LARGEST_BOUND, 2.0 * LARGEST_BOUND])
def test_saturated_scores(softcap, dtype, device, request, seed):
    """Weights of exp(-softcap), 1 and exp(softcap): every score is at the cap, at its negative, or 0, where tanh is exact.
    Rows that see negative ones alone; rows that see no key."""
    place = request.node.callspec.params["device"]
    if (place == "hopper" and dtype == FP32) or (place == "interpreter" and dtype not in INTERPRETED):
        pytest.skip(f"{place} has no {dtype}")
    length = 60 if place == "interpreter" else 700
    case = Case("saturated", dtype, 64, 4, 2, (length, length), (length - 15,) * 2, causal=True, softcap=softcap)
    inputs = make_inputs(case, device, seed)
    signs = inputs.k[..., :1].round().clamp(-1, 1)  # of a whole key
    signs[:, :5] = -1
    inputs = replace(inputs, q=torch.full_like(inputs.q, 30.0 * softcap), k=signs.expand_as(inputs.k).contiguous())
    results, _ = calls.forward(case, inputs, seed)
    expected(case, inputs).check(**results)


def score_of(dtype=BF16, window=(None, None), softcap=0.0, alibi=False):
    """(one_sided, bounded) of a call."""
    q = torch.empty(1, 8, 2, 64, dtype=dtype, device="meta")
    slopes = torch.empty(2, device="meta") if alibi else None
    operands = Operands(q, q, q, 0.1, 8, 8, window=window, softcap=softcap, alibi_slopes=slopes)
    *_common, one_sided, bounded = fixed_arguments(operands).forward_score
    return one_sided is not None, bounded is not None


@pytest.mark.parametrize("dtype", [BF16, FP32, FP16], ids=str)
def test_which_scores_are_bounded(dtype):
    """exp(50) is beyond fp16; ALiBi has no bound; without a softcap nothing has."""
    assert score_of(dtype, softcap=LARGEST_BOUND) == (False, dtype != FP16)
    for words in ({}, {"softcap": LARGEST_BOUND + 1.0}, {"softcap": 3.0, "alibi": True}):
        assert score_of(dtype, **words) == (False, False)


@pytest.mark.parametrize("window", [(None, 0), (5, 0), (None, 1), (5, None), (None, None)])
def test_whose_distances_are_never_negative(window):
    assert score_of(window=window, alibi=True) == (window[1] == 0, False)
    assert score_of(window=window) == (False, False)
