"""Gradients through the softmax_lse that the public functions return, alone and beside those through out."""

import math

import pytest
import torch

import flash_attn
from flash_attn import backends, dispatch, flash_attn_func, flash_attn_varlen_func
from flash_attn.backward import FlashAttnFunction, FlashAttnVarlenFunction, operators
from flash_attn.errors import InvalidArgument
from tests.support import calls
from tests.support.cases import BF16, CASES, FP16, FP32, SMALL_CASES, Case
from tests.support.inputs import make_inputs
from tests.support.tolerance import expected

FP64 = torch.float64
CU_SEQLENS, MAX_SEQLEN = [0, 33, 33, 97], 64
EMPTY_ROWS = Case("rows without keys", FP16, 64, 4, 2, (70,), (33,), causal=True)


@pytest.fixture
def device(request):
    with calls.running_on(request.param) as device:
        yield device


everywhere = pytest.mark.parametrize("device", calls.places("cpu", "gpu"), indirect=True)
everywhere_and_interpreted = pytest.mark.parametrize("device", calls.places("cpu", "gpu", "interpreter"), indirect=True)


def randn(*shape, device, seed, dtype=FP32):
    return calls.randn(*shape, dtype=dtype, device=device, seed=seed)


def attend(case, inputs, seed):
    """(out, lse, leaves) of the public function."""
    leaves = [x.detach().requires_grad_() for x in (inputs.q, inputs.k, inputs.v)]
    torch.manual_seed(seed)
    out, lse, _ = calls.public(case, inputs, *leaves, return_attn_probs=True)
    return out, lse, leaves


def gradient_of_lse(lse, seed):
    """Random; NaN where a row sees no key, as sent back by a loss that takes a logarithm of zero."""
    dlse = randn(*lse.shape, device=lse.device, seed=seed + 7, dtype=lse.dtype)
    return dlse.masked_fill(lse == -math.inf, math.nan)


@pytest.mark.parametrize(  # a GPU compiles most of what test_backward_correctness does for it: half of that will do
    "case, device", calls.placed({"cpu": CASES, "gpu": CASES[1::4], "interpreter": SMALL_CASES}), indirect=["device"]
)
def test_gradients_match_the_truth(case, device, seed):
    inputs = make_inputs(case, device, seed)
    out, lse, leaves = attend(case, inputs, seed)
    _, keep = calls.lse_and_keep(case, inputs, out.detach(), seed)
    dlse = gradient_of_lse(lse, seed)
    dq, dk, dv = torch.autograd.grad((out, lse), leaves, (inputs.dout, dlse))
    wanted = expected(case, inputs, keep, dlse.nan_to_num())
    wanted.check(out=out.detach(), lse=lse.detach(), dq=dq, dk=dk, dv=dv)


@everywhere_and_interpreted
def test_a_loss_of_the_lse_alone(device, seed):
    """As with a gradient of out that is zero, to the bit."""
    case = Case("lse alone", FP16, 32, 4, 2, (33,), (47,), causal=True)
    inputs = make_inputs(case, device, seed)
    out, lse, leaves = attend(case, inputs, seed)
    dlse = gradient_of_lse(lse, seed)
    alone = torch.autograd.grad(lse, leaves, dlse, retain_graph=True)
    calls.assert_equal(alone, torch.autograd.grad((out, lse), leaves, (torch.zeros_like(out), dlse)))
    assert (alone[2] == 0.0).all(), "the values do not enter the lse"
    assert alone[0].abs().max() > 0 and alone[1].abs().max() > 0


@everywhere_and_interpreted
def test_every_row_counts_its_weights(device, seed):
    """The gradient of the sum of lse by a score is the weight: with q = 0 that is 1 / number of keys."""
    q = torch.zeros(1, 5, 2, 16, device=device, requires_grad=True)
    k, v = (randn(1, 7, 2, 16, device=device, seed=seed + i) for i in range(2))
    _, lse, _ = flash_attn_func(q, k, v, softmax_scale=1.0, return_attn_probs=True)
    (dq,) = torch.autograd.grad(lse.sum(), q)
    torch.testing.assert_close(dq, k.mean(1, keepdim=True).expand_as(dq), rtol=1e-5, atol=1e-5)


@everywhere
def test_an_unused_lse_costs_nothing(device, seed, monkeypatch):
    """No gradient of zeros reaches the backend, whose results are those of a call that returns out alone."""
    inputs = make_inputs(EMPTY_ROWS, device, seed)
    seen = []
    original = dispatch.differentiate
    monkeypatch.setattr(
        dispatch,
        "differentiate",
        lambda plan, saved, dout, dlse, *rest: seen.append(dlse) or original(plan, saved, dout, dlse, *rest),
    )
    out, lse, leaves = attend(EMPTY_ROWS, inputs, seed)
    assert lse.requires_grad
    gradients = torch.autograd.grad(out, leaves, inputs.dout)
    plain = calls.public(EMPTY_ROWS, inputs, *leaves)
    calls.assert_equal(gradients, torch.autograd.grad(plain, leaves, inputs.dout))
    assert seen == [None, None]


@everywhere
def test_a_gradient_of_zeros_changes_no_bit(device, seed):
    inputs = make_inputs(EMPTY_ROWS, device, seed)
    out, lse, leaves = attend(EMPTY_ROWS, inputs, seed)
    wanted = torch.autograd.grad(out, leaves, inputs.dout, retain_graph=True)
    calls.assert_equal(torch.autograd.grad((out, lse), leaves, (inputs.dout, torch.zeros_like(lse))), wanted)


@everywhere
def test_strides_of_the_gradient(device, seed):
    """lse.sum() sends back strides of 0; a transposed view, any others."""
    inputs = make_inputs(EMPTY_ROWS, device, seed)
    _, lse, leaves = attend(EMPTY_ROWS, inputs, seed)
    transposed = randn(1, lse.shape[2], lse.shape[1], device=device, seed=seed).transpose(1, 2)
    for dlse in (torch.ones((), device=device).expand_as(lse), transposed):
        wanted = torch.autograd.grad(lse, leaves, dlse.contiguous(), retain_graph=True)
        calls.assert_equal(torch.autograd.grad(lse, leaves, dlse, retain_graph=True), wanted)


def forms(qkv, packed_batch, cu):
    """Every public form of one attention, as functions without arguments."""
    options = dict(causal=True, return_attn_probs=True)
    if not packed_batch:
        return (
            lambda: flash_attn_func(*qkv.unbind(2), **options),
            lambda: flash_attn.flash_attn_qkvpacked_func(qkv, **options),
            lambda: flash_attn.flash_attn_kvpacked_func(qkv[:, :, 0], qkv[:, :, 1:], **options),
            lambda: FlashAttnFunction.apply(*qkv.unbind(2), True, None, -1, -1, None, True),
        )
    both = (cu, cu, MAX_SEQLEN, MAX_SEQLEN)
    return (
        lambda: flash_attn_varlen_func(*qkv.unbind(1), *both, **options),
        lambda: flash_attn.flash_attn_varlen_qkvpacked_func(qkv, cu, MAX_SEQLEN, **options),
        lambda: flash_attn.flash_attn_varlen_kvpacked_func(qkv[:, 0], qkv[:, 1:], *both, **options),
        lambda: FlashAttnVarlenFunction.apply(*qkv.unbind(1), *both, True, None, -1, -1, None, True),
    )


@everywhere
@pytest.mark.parametrize("packed_batch", [False, True], ids=["dense", "varlen"])
def test_every_form_agrees(packed_batch, device, seed):
    shape = (CU_SEQLENS[-1],) if packed_batch else (2, 65)
    qkv = randn(*shape, 3, 4, 64, device=device, seed=seed, dtype=BF16).requires_grad_()
    results = []
    for form in forms(qkv, packed_batch, calls.int32(CU_SEQLENS, device)):
        out, lse = form()[:2]
        dout, dlse = randn(*out.shape, device=device, seed=seed + 1, dtype=BF16), gradient_of_lse(lse, seed)
        results.append(torch.autograd.grad((out, lse), qkv, (dout, dlse)))
    for result in results[1:]:
        calls.assert_equal(result, results[0])


FEATURES = {
    "causal, rows without keys": dict(causal=True),
    "window, softcap": dict(window_size=(2, 1), softcap=1.5),
    "alibi": dict(alibi_slopes=[0.3, 0.7]),
    "dropout": dict(dropout_p=0.4),
}


@everywhere
@pytest.mark.parametrize("backend", [None, "reference"])
@pytest.mark.parametrize("name", FEATURES)
def test_every_entry_of_the_jacobian(name, backend, device, seed):
    q = randn(1, 5, 2, 3, device=device, seed=seed, dtype=FP64).requires_grad_()
    k, v = (randn(1, 4, 1, 3, device=device, seed=seed + i, dtype=FP64).requires_grad_() for i in (1, 2))
    chosen = dict(FEATURES[name])
    if "alibi_slopes" in chosen:
        chosen["alibi_slopes"] = torch.tensor(chosen["alibi_slopes"], device=device)

    def outputs(*x):
        torch.manual_seed(0)
        out, lse, _ = flash_attn_func(*x, **chosen, return_attn_probs=True)
        return out, lse.nan_to_num(neginf=0.0)

    with backends.use(backend):
        assert torch.autograd.gradcheck(outputs, (q, k, v), rtol=1e-5, atol=1e-7)


def dense_loss(qkv, cu_seqlens):
    out, lse, _ = flash_attn_func(*qkv.unbind(2), causal=True, return_attn_probs=True)
    return out.square().sum() + lse.square().sum()


def varlen_loss(qkv, cu_seqlens):
    lengths = (cu_seqlens, cu_seqlens.clone(), 64, 64)
    out, lse, _ = flash_attn_varlen_func(*qkv.unbind(1), *lengths, causal=True, return_attn_probs=True)
    return out.square().sum() + lse.square().sum()


def loss_of_the_lse(qkv, cu_seqlens):
    _, lse, _ = flash_attn.flash_attn_qkvpacked_func(qkv, causal=True, return_attn_probs=True)
    return lse.square().sum()


def loss_without_the_lse(qkv, cu_seqlens):
    out, _, _ = flash_attn.flash_attn_qkvpacked_func(qkv, causal=True, return_attn_probs=True)
    return out.square().sum()


@everywhere
@pytest.mark.parametrize("loss", [dense_loss, varlen_loss, loss_of_the_lse, loss_without_the_lse])
def test_compiles_whole(loss, device, seed, unpoisoned):
    shape = (96, 3, 4, 64) if loss is varlen_loss else (2, 48, 3, 4, 64)
    leaf, eager_leaf = (randn(*shape, device=device, seed=seed).requires_grad_() for _ in range(2))
    cu_seqlens = calls.int32([0, 40, 96], device)
    with backends.use(None):
        got = torch.compile(loss, fullgraph=True, backend="aot_eager")(leaf, cu_seqlens)
        got.backward()
        loss(eager_leaf, cu_seqlens).backward()
    torch.testing.assert_close(leaf.grad, eager_leaf.grad, rtol=1e-5, atol=1e-5)


OPCHECKS = {
    "dense": Case("opcheck", FP32, 32, 4, 2, (17, 17), (33, 33), causal=True),
    "varlen": Case("opcheck", FP16, 32, 4, 2, (17, 5), (20, 33), "varlen", alibi="h"),
}


def operator_arguments(case, device, seed):
    """(dout, dlse, ...), the operator's arguments; its gradient buffers hold zeros, which the checks compare."""
    inputs = make_inputs(case, device, seed)
    out, lse, _, rng_state = calls.private(case, inputs)
    buffers = [torch.zeros_like(x) for x in (inputs.q, inputs.k, inputs.v)]
    tensors = (inputs.dout, gradient_of_lse(lse, seed), inputs.q, inputs.k, inputs.v, out, lse, None, *buffers)
    lengths = calls.lengths(case, inputs) or (None,) * 4
    return *tensors, *calls.numbers(case, inputs), False, rng_state, *lengths


@everywhere
@pytest.mark.parametrize("name", OPCHECKS)
def test_opcheck(name, device, seed):
    arguments = operator_arguments(OPCHECKS[name], device, seed)
    torch.library.opcheck(torch.ops.flash_attn._attention_backward, arguments)


@everywhere
@pytest.mark.parametrize(
    "change, words",
    [
        (lambda dlse: dlse[:, :, :-1], r"shape and dtype, \(2, 4, 17\) and torch.float32, got \(2, 4, 16\)"),
        (lambda dlse: dlse.double(), r"got \(2, 4, 17\) and torch.float64"),
    ],
)
def test_a_wrong_gradient_is_refused(change, words, device, seed):
    dout, dlse, *rest = operator_arguments(OPCHECKS["dense"], device, seed)
    with pytest.raises(InvalidArgument, match=words):
        operators._wrapped_attention_backward(dout, change(dlse), *rest)
