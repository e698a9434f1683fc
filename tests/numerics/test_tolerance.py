"""The checker is checked: right low-precision runs pass, wrong ones do not."""

import math
from dataclasses import replace

import pytest
import torch

from flash_attn import reference
from flash_attn.backward.reference_impl import pytorch_flash_attention_backward
from tests.support.cases import CASES, SMALL_CASES, Case
from tests.support.inputs import make_inputs, random_keep
from tests.support.tolerance import Expected, Results, assert_close, dense_parts, expected, join

LOG2_E = math.log2(math.e)
DTYPES = [torch.float16, torch.bfloat16, torch.float32]
BASE = Case("base", torch.float16, 64, 4, 2, (150,), (180,), window=(40, 20))
DROPPED = replace(BASE, name="dropped", dropout_p=0.1)


def online_attention(
    case, part, *, scale=1.0, interval=None, lost_key=None, rescale=True, kept_scale=None, interleaved_heads=False
):
    """Forward as a fused kernel rounds it: blocks of 64 keys, base 2, P rounded against the running maximum, float32.

    The keywords are faults: a factor of the scale, another window, a key that is skipped, an accumulator that does not
    follow the maximum, another scale of the kept weights, another key head.
    """
    q, k, v = (x.float() for x in (part.q, part.k, part.v))
    if interleaved_heads:
        k, v = (x.repeat(1, 1, case.nheads // case.nheads_k, 1) for x in (k, v))
    mask = reference.visible(q.shape[1], k.shape[1], interval or case.interval)
    if lost_key is not None:
        mask[:, lost_key] = False
    s = LOG2_E * reference.scores(
        q, k, softmax_scale=scale * case.headdim**-0.5, softcap=case.softcap, alibi_slopes=part.alibi_slopes
    ).masked_fill(~mask, -math.inf)
    keep = torch.ones_like(s, dtype=torch.bool) if part.keep is None else part.keep
    v = reference.repeat_heads(v, case.nheads).transpose(1, 2)
    row_max = s.new_full((*s.shape[:3], 1), -math.inf)
    row_sum = torch.zeros_like(row_max)
    acc = v.new_zeros(*s.shape[:3], case.headdim)
    for block in (slice(begin, begin + 64) for begin in range(0, k.shape[1], 64)):
        new_max = row_max.maximum(s[..., block].amax(-1, keepdim=True))
        p = torch.exp2(s[..., block] - new_max).nan_to_num(0.0)
        follow = torch.exp2(row_max - new_max).nan_to_num(1.0) if rescale else 1.0
        row_sum = row_sum * follow + p.sum(-1, keepdim=True)
        acc = acc * follow + (p * keep[..., block]).to(case.dtype).float() @ v[..., block, :]
        row_max = new_max
    kept_scale = 1 / (1 - case.dropout_p) if kept_scale is None else kept_scale
    out = acc * torch.where(row_sum > 0, kept_scale / row_sum, 0.0)
    lse = (row_max + torch.log2(row_sum)) / LOG2_E
    return out.transpose(1, 2).to(case.dtype), lse.squeeze(-1)


def gradients(case, part, out, lse, *, scale=1.0, **faults):
    """The backward rounded as a kernel rounds it, summed more precisely than the matched run sums it."""
    arguments = {
        "causal": case.causal,
        "window_size": case.window,
        "softcap": case.softcap,
        "alibi_slopes": part.alibi_slopes,
        "keep": part.keep,
        "dropout_p": case.dropout_p,
        "softmax_scale": scale * case.headdim**-0.5,
    }
    return pytorch_flash_attention_backward(
        part.dout, part.q, part.k, part.v, out, lse, **arguments | faults, round_to=case.dtype
    )


def low_precision_run(case, inputs, keep) -> Results:
    results = []
    for part in dense_parts(case, inputs, keep):
        out, lse = online_attention(case, part)
        results.append(Results(out, lse, *gradients(case, part, out, lse)))
    return join(case, results)


@pytest.mark.parametrize("case", CASES + SMALL_CASES, ids=str)
def test_right_run_is_accepted(case, seed):
    inputs, keep = make_inputs(case, "cpu", seed), random_keep(case, "cpu", seed)
    run = low_precision_run(case, inputs, keep)
    expected(case, inputs, keep).check(out=run.out, lse=run.lse, dq=run.dq, dk=run.dk, dv=run.dv)


FORWARD_FAULTS = {
    "scale +0.5 %": (BASE, {"scale": 1.005}),
    "scale -0.5 %": (BASE, {"scale": 0.995}),
    "window left + 1": (BASE, {"interval": (41, 20)}),
    "window left - 1": (BASE, {"interval": (39, 20)}),
    "window right + 1": (BASE, {"interval": (40, 21)}),
    "window right - 1": (BASE, {"interval": (40, 19)}),
    "last key lost": (BASE, {"lost_key": 179}),
    "inner key lost": (BASE, {"lost_key": 64}),
    "no rescale": (BASE, {"rescale": False}),
    "head h uses key head h % nheads_k": (BASE, {"interleaved_heads": True}),
    "dropout not scaled": (DROPPED, {"kept_scale": 1.0}),
    "dropout scaled twice": (DROPPED, {"kept_scale": 0.9**-2}),
    "dropout scaled by 1 % too much": (DROPPED, {"kept_scale": 1.01 / 0.9}),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("fault", FORWARD_FAULTS)
def test_forward_fault_is_rejected(fault, dtype, seed):
    case, arguments = FORWARD_FAULTS[fault]
    case = replace(case, dtype=dtype)
    inputs, keep = make_inputs(case, "cpu", seed), random_keep(case, "cpu", seed)
    (part,) = dense_parts(case, inputs, keep)
    out, lse = online_attention(case, part, **arguments)
    truth = expected(case, inputs, keep)
    rejected(truth, out=out)
    if "dropout" not in fault:  # the lse ignores dropout
        rejected(truth, lse=lse)


ALL = ("dq", "dk", "dv")
BACKWARD_FAULTS = {
    "scale +0.5 %": (BASE, {"scale": 1.005}),
    "scale -0.5 %": (BASE, {"scale": 0.995}),
    "window left + 1": (BASE, {"window_size": (41, 20)}),
    "window left - 1": (BASE, {"window_size": (39, 20)}),
    "window right + 1": (BASE, {"window_size": (40, 21)}),
    "window right - 1": (BASE, {"window_size": (40, 19)}),
    "dropout not scaled": (DROPPED, {"dropout_p": 0.0}),
    "dropout scaled by 1 % too much": (DROPPED, {"dropout_p": 1 - 0.9 / 1.01}),
    "dropout forgotten": (DROPPED, {"keep": None}),
    "softcap forgotten": (replace(BASE, softcap=5.0), {"softcap": 0.0}),
    "alibi forgotten": (replace(BASE, alibi="h"), {"alibi_slopes": None}),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("fault", BACKWARD_FAULTS)
def test_backward_fault_is_rejected(fault, dtype, seed):
    case, arguments = BACKWARD_FAULTS[fault]
    case = replace(case, dtype=dtype)
    inputs, keep = make_inputs(case, "cpu", seed), random_keep(case, "cpu", seed)
    (part,) = dense_parts(case, inputs, keep)
    truth = expected(case, inputs, keep)
    for name, value in zip(ALL, gradients(case, part, *online_attention(case, part), **arguments), strict=True):
        rejected(truth, **{name: value})


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_backward_fault_outside_the_formula_is_rejected(dtype, seed):
    case = replace(BASE, dtype=dtype)
    inputs = make_inputs(case, "cpu", seed)
    (part,) = dense_parts(case, inputs)
    out, lse = online_attention(case, part)
    truth = expected(case, inputs)
    dq, dk, dv = gradients(case, part, out, lse)

    dq_no_delta, dk_no_delta, _ = gradients(case, part, torch.zeros_like(out), lse)
    rejected(truth, dq=dq_no_delta)
    rejected(truth, dk=dk_no_delta)

    one_key_lost = torch.ones(1, case.nheads, 150, 180, dtype=torch.bool)
    one_key_lost[..., 64] = False
    for name, value in zip(ALL, gradients(case, part, out, lse, keep=one_key_lost), strict=True):
        rejected(truth, **{name: value})

    for name, value in zip(ALL, (dq, dk, dv), strict=True):
        rejected(truth, **{name: value.flip(2)})  # wrong head
        rejected(truth, **{name: value.roll(1, dims=1)})  # off by one row
        rejected(
            truth, **{name: torch.where(torch.arange(value.shape[1])[:, None, None] == 77, 0, value)}
        )  # a lost row


def test_nan_wrong_shape_and_wrong_infinity_are_rejected():
    ref = torch.randn(1, 5, 2, 16, dtype=torch.float64)
    bad = ref.clone()
    bad[0, 3, 1, 7] = math.nan
    with pytest.raises(AssertionError, match=r"out: not finite\n  1 of 160 bad, worst at \(0, 3, 1, 7\)"):
        assert_close(bad, ref, ref, "out")
    with pytest.raises(AssertionError, match="shape"):
        assert_close(ref[:, :4], ref, ref, "out")
    lse = torch.tensor([1.0, -math.inf])
    assert_close(lse, lse.double(), None, "lse")
    for wrong in ([1.0, math.inf], [1.0, math.nan], [1.0, -1e30], [-math.inf, -math.inf], [math.nan, -math.inf]):
        with pytest.raises(AssertionError, match="worst at"):
            assert_close(torch.tensor(wrong), lse.double(), None, "lse")


def test_message_names_the_worst_coordinate(seed):
    inputs = make_inputs(BASE, "cpu", seed)
    truth = expected(BASE, inputs)
    out = truth.matched.out.clone()
    out[0, 17, 3, 5] += 0.5
    with pytest.raises(AssertionError, match=r"(?s)out: max error .* \(matched .*worst at \(0, 17, 3, 5\)"):
        truth.check(out=out)


def test_dropout_without_a_mask_is_an_error(seed):
    with pytest.raises(ValueError, match="needs keep"):
        expected(DROPPED, make_inputs(DROPPED, "cpu", seed))


def rejected(truth: Expected, **actual) -> None:
    with pytest.raises(AssertionError, match="worst at"):
        truth.check(**actual)
