"""The gradient functions under FlagGems' name: results, outputs given, bad arguments, the logged routing."""

import inspect
import logging
import math

import pytest
import torch

from flash_attn import backends, backward, dispatch, reference
from flash_attn.errors import InvalidArgument
from flash_attn.hardware import CPU
from flash_attn.problem import describe
from tests.support.cases import BF16, FP32, Case
from tests.support.inputs import make_inputs
from tests.support.tolerance import expected

DENSE = backward.flaggems_flash_attn_backward
VARLEN = backward.flaggems_flash_attn_varlen_backward

CASES = [
    Case("plain", FP32, 32, 4, 4, (33, 33), (33, 33)),
    Case("causal-gqa", BF16, 40, 4, 2, (20, 20), (47, 47), causal=True, strides="packed"),
    Case("window-alibi", FP32, 16, 2, 1, (40,), (40,), window=(9, 6), alibi="h", strides="transposed"),
    Case("float64", torch.float64, 16, 2, 2, (17,), (17,), window=(5, -1), alibi="bh"),
]
VARLEN_CASES = [
    Case("varlen", FP32, 32, 4, 2, (17, 0, 1, 30), (17, 4, 33, 0), "varlen"),
    Case("varlen-causal", BF16, 40, 2, 2, (17, 5, 30), (17, 9, 40), "varlen", causal=True, strides="packed"),
]


def forward(case, inputs):
    packing = {}
    if case.layout == "varlen":
        packing = dict(
            cu_seqlens_q=inputs.cu_seqlens_q,
            cu_seqlens_k=inputs.cu_seqlens_k,
            max_seqlen_q=inputs.max_seqlen_q,
            max_seqlen_k=inputs.max_seqlen_k,
        )
    scale = case.headdim**-0.5
    words = (0.0, scale, case.causal, *case.window, 0.0, inputs.alibi_slopes, False)
    return dispatch.forward(inputs.q, inputs.k, inputs.v, *words, **packing)[:2]


def gradients(case, inputs, out, lse, **outputs):
    tensors = (inputs.dout, inputs.q, inputs.k, inputs.v, out, lse)
    if case.layout == "varlen":
        lengths = (inputs.cu_seqlens_q, inputs.cu_seqlens_k, inputs.max_seqlen_q, inputs.max_seqlen_k)
        return VARLEN(*tensors, *lengths, causal=case.causal, **outputs)
    left, right = case.window
    return DENSE(
        *tensors,
        causal=case.causal,
        window_size_left=left,
        window_size_right=right,
        alibi_slopes=inputs.alibi_slopes,
        deterministic=True,
        **outputs,
    )


@pytest.mark.parametrize("case", CASES + VARLEN_CASES, ids=str)
def test_gradients_match_the_truth(case, seed):
    inputs = make_inputs(case, "cpu", seed)
    out, lse = forward(case, inputs)
    dq, dk, dv = gradients(case, inputs, out, lse)
    assert dq.is_contiguous() and dk.is_contiguous() and dv.is_contiguous()
    expected(case, inputs).check(out=out, lse=lse, dq=dq, dk=dk, dv=dv)


@pytest.mark.parametrize("case", [CASES[0], VARLEN_CASES[1]], ids=str)
def test_given_outputs_are_written_and_returned(case, seed):
    inputs = make_inputs(case, "cpu", seed)
    out, lse = forward(case, inputs)
    given = {f"d{name}": torch.full_like(getattr(inputs, name), math.nan) for name in "qkv"}
    returned = gradients(case, inputs, out, lse, **given)
    for a, b, fresh in zip(returned, given.values(), gradients(case, inputs, out, lse), strict=True):
        assert a is b
        assert torch.equal(a, fresh)


def test_some_outputs_given(seed):
    case = CASES[0]
    inputs = make_inputs(case, "cpu", seed)
    out, lse = forward(case, inputs)
    dk = torch.empty_like(inputs.k)
    returned = gradients(case, inputs, out, lse, dk=dk)
    assert returned[1] is dk
    assert all(x.isfinite().all() for x in returned)


def test_gradients_from_another_forward(seed):
    """out and lse of the specification, whose lse has fp64's precision, serve as well."""
    case = CASES[0]
    inputs = make_inputs(case, "cpu", seed)
    out, lse = reference.attention(inputs.q, inputs.k, inputs.v)
    dq, dk, dv = gradients(case, inputs, out.float(), lse)
    expected(case, inputs).check(out=out, lse=lse, dq=dq, dk=dk, dv=dv)


def test_leaves_that_require_gradients(seed):
    inputs = make_inputs(CASES[0], "cpu", seed)
    out, lse = forward(CASES[0], inputs)
    inputs.q.requires_grad_()
    assert not any(x.requires_grad for x in gradients(CASES[0], inputs, out, lse))


def test_default_scale_and_mask(seed):
    inputs = make_inputs(CASES[0], "cpu", seed)
    out, lse = forward(CASES[0], inputs)
    short = DENSE(inputs.dout, inputs.q, inputs.k, inputs.v, out, lse)
    spelled_out = DENSE(inputs.dout, inputs.q, inputs.k, inputs.v, out, lse, softmax_scale=32**-0.5)
    for a, b in zip(short, spelled_out, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    "change, words",
    [
        (dict(dout=torch.zeros(2, 33, 4, 31)), "dout must have shape"),
        (dict(out=torch.zeros(2, 33, 4, 32, dtype=BF16)), "query and out must have the same dtype"),
        (dict(softmax_lse=torch.zeros(2, 4, 34)), "softmax_lse must have shape"),
        (dict(dq=torch.zeros(2, 33, 2, 32)), "dq must have shape"),
        (dict(dk=torch.zeros(2, 33, 4, 32, dtype=BF16)), "dk must have the same dtype as q"),
        (dict(k=torch.zeros(2, 33, 3, 32), v=torch.zeros(2, 33, 3, 32)), "must divide number of heads"),
        (dict(alibi_slopes=torch.zeros(3)), "alibi_slopes must have shape"),
        (dict(window_size_left=-2), "window_size"),
        (dict(softmax_scale=math.inf), "softmax_scale must be finite"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_bad_arguments_are_named(change, words):
    x = torch.zeros(2, 33, 4, 32)
    arguments = dict(dout=x, q=x, k=x, v=x, out=x, softmax_lse=torch.zeros(2, 4, 33))
    with pytest.raises(InvalidArgument, match=words):
        DENSE(**{**arguments, **change})


def test_signatures_are_those_asked_for():
    dense = "dout q k v out softmax_lse dq dk dv causal softmax_scale window_size_left window_size_right alibi_slopes"
    varlen = (
        "dout q k v out softmax_lse cu_seqlens_q cu_seqlens_k max_seqlen_q max_seqlen_k dq dk dv causal softmax_scale"
    )
    assert list(inspect.signature(DENSE).parameters) == [*dense.split(), "deterministic"]
    assert list(inspect.signature(VARLEN).parameters) == varlen.split()


def test_routing_is_logged_once(caplog):
    backends.choose_backward_backend.cache_clear()
    backends._log_routing_once.cache_clear()
    dispatch._plans.clear()
    with caplog.at_level(logging.INFO, logger="flash_attn"):
        for seqlen in (4, 4, 300):
            x = torch.zeros(1, seqlen, 1, 8)
            DENSE(x, x, x, x, x, torch.zeros(1, 1, seqlen))
    records = [r.getMessage() for r in caplog.records if "flaggems" in r.getMessage()]
    assert records == [
        f"gradients of backend flaggems are computed by {chosen()}: {backends.load('flaggems').forward_only}"
    ]


def chosen():
    return backends.choose_backend(describe_zeros(), CPU, None).name


def describe_zeros():
    x = torch.zeros(1, 4, 1, 8)
    return describe(x, x, x, 0.0, 1.0, False, -1, -1, 0.0)[0]
