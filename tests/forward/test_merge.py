"""merge_attention_states: parts over disjoint keys against one attention over all of them, forward and backward."""

import math

import pytest
import torch

import flash_attn
from flash_attn import flash_attn_func, flash_attn_varlen_func, merge_attention_states, reference
from flash_attn.errors import InvalidArgument
from tests.support import calls
from tests.support.cases import BF16, FP16, FP32
from tests.support.tolerance import LSE_TOLERANCE

FP64 = torch.float64


@pytest.fixture
def device(request):
    with calls.running_on(request.param) as device:
        yield device


everywhere = pytest.mark.parametrize("device", calls.places("cpu", "gpu"), indirect=True)


def randn(*shape, device, seed, dtype=FP32):
    return calls.randn(*shape, dtype=dtype, device=device, seed=seed)


def states(rows, device, seed, dtype=FP64, packed=False):
    """Four leaves (out_a, lse_a, out_b, lse_b) of 2 heads; the lse of some rows is -inf in a, b or both."""
    tokens, statistics = ((rows,), (2, rows)) if packed else ((1, rows), (1, 2, rows))
    out_a, out_b = (randn(*tokens, 2, 8, device=device, seed=seed + i, dtype=dtype) for i in range(2))
    wide = torch.promote_types(dtype, FP32)
    lse_a, lse_b = (3.0 * randn(*statistics, device=device, seed=seed + 2 + i, dtype=wide) for i in range(2))
    lse_a[..., 0], lse_b[..., 1] = -math.inf, -math.inf
    lse_a[..., 2], lse_b[..., 2] = -math.inf, -math.inf
    out_a.mul_((lse_a > -math.inf).mT[..., None])
    out_b.mul_((lse_b > -math.inf).mT[..., None])
    return [x.requires_grad_() for x in (out_a, lse_a, out_b, lse_b)]


def by_softmax(out_a, lse_a, out_b, lse_b):
    """The definition, in float64: a softmax over the two parts; rows without a key apart."""
    lse = torch.stack([lse_a, lse_b]).double()
    empty = (lse == -math.inf).all(0)
    weights = torch.softmax(lse.masked_fill(empty, 0.0), 0).masked_fill(empty, 0.0).mT[..., None]
    return (weights * torch.stack([out_a, out_b]).double()).sum(0), torch.logsumexp(lse, 0)


@everywhere
@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
@pytest.mark.parametrize("dtype", [FP64, FP32, BF16, FP16], ids=str)
def test_a_merge_is_a_softmax_of_the_parts(dtype, packed, device, seed):
    parts = [x.detach() for x in states(7, device, seed, dtype, packed)]
    out, lse = merge_attention_states(*parts)
    assert (out.shape, out.dtype) == (parts[0].shape, dtype) and (lse.shape, lse.dtype) == (
        parts[1].shape,
        parts[1].dtype,
    )
    wanted_out, wanted_lse = by_softmax(*parts)
    scale = wanted_out.abs().max().item()
    assert (out.double() - wanted_out).abs().max() <= (torch.finfo(dtype).eps + 8 * torch.finfo(lse.dtype).eps) * scale
    calls.assert_near(lse, wanted_lse)
    assert (lse[..., 2] == -math.inf).all() and (out.transpose(-2, -3)[..., 2, :] == 0.0).all()


@everywhere
def test_the_order_of_the_parts_changes_no_bit(device, seed):
    out_a, lse_a, out_b, lse_b = states(9, device, seed, BF16)
    calls.assert_equal(
        merge_attention_states(out_a, lse_a, out_b, lse_b), merge_attention_states(out_b, lse_b, out_a, lse_a)
    )


@everywhere
def test_a_part_without_keys_leaves_the_other_as_it_is(device, seed):
    out, lse, *_ = states(9, device, seed, BF16)
    empty = torch.zeros_like(out), torch.full_like(lse, -math.inf)
    calls.assert_equal(merge_attention_states(out, lse, *empty), (out, lse))


@everywhere
def test_far_apart_parts(device):
    """Neither overflows nor loses the heavier one."""
    out_a, out_b = torch.ones(1, 1, 1, 4, device=device), torch.full((1, 1, 1, 4), 2.0, device=device)
    for heavy in (1e4, 3e38):
        lse_a, lse_b = torch.full((1, 1, 1), heavy, device=device), torch.full((1, 1, 1), -heavy, device=device)
        out, lse = merge_attention_states(out_a, lse_a, out_b, lse_b)
        calls.assert_equal((out, lse), (out_a, lse_a))


@everywhere
@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
def test_every_entry_of_the_jacobian(packed, device, seed):
    """Without the rows that are -inf, which finite differences cannot move."""
    parts = [x.detach() for x in states(7, device, seed, packed=packed)]
    leaves = [
        x[..., 3:].contiguous() if number % 2 else x.narrow(-3, 3, 4).contiguous() for number, x in enumerate(parts)
    ]
    assert torch.autograd.gradcheck(merge_attention_states, [x.requires_grad_() for x in leaves], rtol=1e-6, atol=1e-8)


@everywhere
@pytest.mark.parametrize("dtype", [FP64, BF16], ids=str)
def test_gradients_where_parts_are_empty(dtype, device, seed):
    """Finite everywhere, right beside the empty parts, and zero in them."""
    parts = states(7, device, seed, dtype)
    out, lse = merge_attention_states(*parts)
    dout, dlse = randn(*out.shape, device=device, seed=seed, dtype=dtype), randn(*lse.shape, device=device, seed=seed)
    found = torch.autograd.grad((out, lse), parts, (dout, dlse.to(lse.dtype)))
    assert all(x.isfinite().all() for x in found)
    dout_a, dlse_a, dout_b, dlse_b = (x.transpose(1, 2) if x.dim() == 4 else x for x in found)
    for gradient, rows in ((dout_a, (0, 2)), (dlse_a, (0, 2)), (dout_b, (1, 2)), (dlse_b, (1, 2))):
        assert (gradient[:, :, list(rows)] == 0.0).all()
    # alone in its row a part has weight 1: what comes through out, dout . out, is added to dlse and taken away again
    terms = dlse.abs() + (dout * out).abs().sum(-1).mT
    error = (dlse_a - dlse.to(dlse_a.dtype))[:, :, 1].abs()
    assert (error <= 4 * torch.finfo(dlse_a.dtype).eps * terms[:, :, 1]).all()
    calls.assert_near(dout_b[:, :, 0], dout.transpose(1, 2)[:, :, 0])


@everywhere
@pytest.mark.parametrize("cut", [0, 1, 40, 97])
def test_attention_in_two_parts(cut, device, seed):
    """Keys split anywhere, also with nothing on one side: results and gradients of attention over all of them."""
    leaves = [
        randn(2, n, h, 32, device=device, seed=seed + n + h).requires_grad_() for n, h in ((33, 4), (97, 2), (97, 2))
    ]
    q, k, v = leaves

    def part(keys):
        return flash_attn_func(q, k[:, keys], v[:, keys], return_attn_probs=True)[:2]

    merged = merge_attention_states(*part(slice(0, cut)), *part(slice(cut, None)))
    whole = flash_attn_func(q, k, v, return_attn_probs=True)[:2]
    gradients = [randn(*x.shape, device=device, seed=seed + i) for i, x in enumerate(whole)]
    calls.assert_near([x.detach() for x in merged], [x.detach() for x in whole], roundoffs=64)
    found, wanted = (torch.autograd.grad(results, leaves, gradients) for results in (merged, whole))
    calls.assert_near(found, wanted, roundoffs=64)


@everywhere
def test_packed_batches_in_two_parts(device, seed):
    """A causal mask over a prefix and a suffix of the keys of every sequence: the suffix is causal, the prefix is full."""
    q = randn(50, 4, 32, device=device, seed=seed, dtype=BF16)
    prefix_k, prefix_v = (randn(70, 2, 32, device=device, seed=seed + i, dtype=BF16) for i in (1, 2))
    own_k, own_v = (randn(50, 2, 32, device=device, seed=seed + i, dtype=BF16) for i in (3, 4))
    cu_q, cu_prefix = calls.int32([0, 20, 20, 50], device), calls.int32([0, 0, 30, 70], device)
    options = dict(return_attn_probs=True)
    own = flash_attn_varlen_func(q, own_k, own_v, cu_q, cu_q, 30, 30, causal=True, **options)[:2]
    prefix = flash_attn_varlen_func(q, prefix_k, prefix_v, cu_q, cu_prefix, 30, 40, **options)[:2]
    out, lse = merge_attention_states(*own, *prefix)
    for begin, end, first, last in ((0, 20, 0, 0), (20, 50, 30, 70)):
        k, v = (torch.cat([x[first:last], y[begin:end]])[None] for x, y in ((prefix_k, own_k), (prefix_v, own_v)))
        truth_out, truth_lse = reference.attention(q[None, begin:end], k, v, window=(None, 0))
        assert (out[begin:end] - truth_out[0]).abs().max() <= 2**-6 * truth_out.abs().max()
        assert ((lse[:, begin:end] - truth_lse[0]).abs() <= LSE_TOLERANCE * (1 + truth_lse[0].abs())).all()


@everywhere
def test_compiles_whole(device, seed, unpoisoned):
    parts, eager = states(7, device, seed, BF16), states(7, device, seed, BF16)
    out, lse = torch.compile(merge_attention_states, fullgraph=True, backend="aot_eager")(*parts)
    wanted_out, wanted_lse = merge_attention_states(*eager)
    calls.assert_equal((out.detach(), lse.detach()), (wanted_out.detach(), wanted_lse.detach()))
    found = torch.autograd.grad((out.float().sum(), lse[..., 3:].sum()), parts)
    calls.assert_equal(found, torch.autograd.grad((wanted_out.float().sum(), wanted_lse[..., 3:].sum()), eager))


@pytest.mark.parametrize(
    "change, words",
    [
        (
            dict(out_b=torch.zeros(1, 5, 2, 4)),
            r"out_a and out_b must have the same shape.*\(1, 6, 2, 4\).*\(1, 5, 2, 4\)",
        ),
        (dict(out_b=torch.zeros(1, 6, 2, 4, dtype=BF16)), "torch.float32 on cpu and .*torch.bfloat16"),
        (dict(lse_b=torch.zeros(1, 2, 5)), r"lse_a and lse_b.*\(1, 2, 6\).*\(1, 2, 5\)"),
        (dict(lse_b=torch.zeros(1, 2, 6, device="meta")), "on cpu and .* on meta"),
        (
            dict(lse_a=torch.zeros(1, 6, 2), lse_b=torch.zeros(1, 6, 2)),
            r"lse_a must have shape \(1, 2, 6\) beside out_a \(1, 6, 2, 4\), got \(1, 6, 2\)",
        ),
        (dict(out_a=torch.zeros(6, 4), out_b=torch.zeros(6, 4)), r"got \(6, 4\)"),
        (dict(lse_a=torch.zeros(1, 2, 6).int(), lse_b=torch.zeros(1, 2, 6).int()), "floating dtype, got torch.int32"),
    ],
)
def test_parts_that_do_not_fit(change, words):
    parts = dict(
        out_a=torch.zeros(1, 6, 2, 4),
        lse_a=torch.zeros(1, 2, 6),
        out_b=torch.zeros(1, 6, 2, 4),
        lse_b=torch.zeros(1, 2, 6),
    )
    with pytest.raises(InvalidArgument, match=words):
        flash_attn.merge_attention_states(**parts | change)
