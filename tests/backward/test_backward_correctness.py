"""Gradients through the public functions: every case against the truth, finite differences, PyTorch's own attention."""

import math

import pytest
import torch

from flash_attn import backends, flash_attn_func, flash_attn_varlen_func, launch
from tests.support import calls
from tests.support.cases import BF16, CASES, FP16, FP32, SMALL_CASES
from tests.support.inputs import make_inputs
from tests.support.tolerance import expected

FP64 = torch.float64
SHAPES = [(1, 32, 4, 64), (2, 128, 8, 64), (4, 512, 12, 80)]  # (batch, seqlen, nheads, headdim)


@pytest.fixture
def device(request):
    with calls.running_on(request.param) as device:
        yield device


everywhere = pytest.mark.parametrize("device", calls.places("cpu", "gpu"), indirect=True)


def leaves(shape, dtype, device, seed, count=3):
    return [calls.randn(*shape, dtype=dtype, device=device, seed=seed + i).requires_grad_() for i in range(count)]


@pytest.mark.parametrize(
    "case, device",
    calls.placed({"cpu": CASES, "gpu": CASES[1::3], "interpreter": SMALL_CASES}),
    indirect=["device"],
)
def test_gradients_match_the_truth(case, device, seed):
    inputs = make_inputs(case, device, seed)
    results, keep = calls.forward_and_backward(case, inputs, seed)
    expected(case, inputs, keep).check(**results)


@pytest.mark.parametrize(
    "case, device",
    calls.placed({"gpu": CASES[::3], "interpreter": SMALL_CASES[::3]}),
    indirect=["device"],
)
def test_gradients_of_separate_launches_match_the_truth(case, device, seed):
    """What larger problems take. The interpreter's tiles are those of one launch, and so are the bits."""
    inputs = make_inputs(case, device, seed)
    with launch.pinned(one_launch=False):
        results, keep = calls.forward_and_backward(case, inputs, seed)
    expected(case, inputs, keep).check(**results)
    if device.type == "cpu":
        at_once, _ = calls.forward_and_backward(case, inputs, seed)
        calls.assert_equal(tuple(results.values()), tuple(at_once.values()))


@everywhere
@pytest.mark.parametrize("dtype", [FP32, FP16, BF16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gradients_have_the_shapes_of_their_operands(shape, dtype, device, seed):
    q, k, v = leaves(shape, dtype, device, seed)
    out = flash_attn_func(q, k, v, causal=True)
    out.backward(torch.ones_like(out))
    for x in (q, k, v):
        assert x.grad.shape == x.shape and x.grad.dtype == dtype and x.grad.isfinite().all()
        assert x.grad.abs().max() > 0


@everywhere
def test_gradients_of_shared_heads_have_the_shapes_of_the_keys(device, seed):
    q = calls.randn(2, 33, 6, 64, dtype=BF16, device=device, seed=seed).requires_grad_()
    k, v = leaves((2, 47, 2, 64), BF16, device, seed + 1, 2)
    flash_attn_func(q, k, v).float().sum().backward()
    assert q.grad.shape == q.shape and k.grad.shape == k.shape and v.grad.shape == v.shape


@everywhere
@pytest.mark.parametrize("causal", [False, True])
def test_finite_differences(causal, device, seed):
    q, k, v = leaves((2, 64, 4, 32), FP64, device, seed)
    with backends.use(None):
        assert torch.autograd.gradcheck(
            lambda *x: flash_attn_func(*x, causal=causal), (q, k, v), rtol=1e-3, atol=1e-3, fast_mode=True
        )


FEATURES = {
    "window": dict(window_size=(2, 1)),
    "softcap": dict(softcap=1.5),
    "alibi": dict(alibi_slopes=[0.3, 0.7]),
    "dropout": dict(dropout_p=0.4),
    "scale": dict(softmax_scale=-0.6),
    "everything": dict(causal=True, window_size=(3, 0), softcap=2.0, alibi_slopes=[0.1, 0.5], dropout_p=0.3),
}


def options(name, device):
    chosen = dict(FEATURES[name])
    if "alibi_slopes" in chosen:
        chosen["alibi_slopes"] = torch.tensor(chosen["alibi_slopes"], device=device)
    return chosen


@everywhere
@pytest.mark.parametrize("name", FEATURES)
def test_every_entry_of_the_jacobian(name, device, seed):
    q = calls.randn(1, 5, 2, 3, dtype=FP64, device=device, seed=seed).requires_grad_()
    k, v = leaves((1, 6, 1, 3), FP64, device, seed + 1, 2)
    chosen = options(name, device)

    def attend(*x):
        torch.manual_seed(0)
        return flash_attn_func(*x, **chosen)

    with backends.use(None):
        assert torch.autograd.gradcheck(attend, (q, k, v), rtol=1e-5, atol=1e-7)


@everywhere
def test_every_entry_of_the_jacobian_of_a_packed_batch(device, seed):
    q, k, v = leaves((7, 2, 3), FP64, device, seed)
    cu_seqlens_q, cu_seqlens_k = (calls.int32(x, device) for x in ([0, 3, 3, 7], [0, 2, 5, 7]))

    def attend(*x):
        return flash_attn_varlen_func(*x, cu_seqlens_q, cu_seqlens_k, 4, 3, causal=True)

    with backends.use(None):
        assert torch.autograd.gradcheck(attend, (q, k, v), rtol=1e-5, atol=1e-7)


def native_attention(q, k, v, causal):
    """(batch, seqlen, heads, headdim): the sequence and head axes swapped before the products, and back after."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    scores = q @ k.mT / math.sqrt(q.shape[-1])
    if causal:
        hidden = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
        scores = scores.masked_fill(hidden, -math.inf)
    return (scores.softmax(-1) @ v).transpose(1, 2)


@everywhere
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gradients_agree_with_native_attention(shape, causal, device, seed):
    q, k, v = leaves(shape, FP32, device, seed)
    dout = calls.randn(*shape, dtype=FP32, device=device, seed=seed + 3)
    native, ours = native_attention(q, k, v, causal), flash_attn_func(q, k, v, causal=causal)
    torch.testing.assert_close(ours, native, rtol=1e-2, atol=1e-3)
    for got, want in zip(
        torch.autograd.grad(ours, (q, k, v), dout), torch.autograd.grad(native, (q, k, v), dout), strict=True
    ):
        torch.testing.assert_close(got, want, rtol=1e-2, atol=1e-3)


@everywhere
@pytest.mark.parametrize("seqlen_q, seqlen_k", [(97, 97), (64, 129), (129, 64)])
def test_a_causal_row_moves_only_the_keys_it_sees(seqlen_q, seqlen_k, device, seed):
    """dout in one row: dq in that row alone, dk and dv up to its diagonal and exactly 0 after."""
    q = calls.randn(1, seqlen_q, 2, 64, dtype=BF16, device=device, seed=seed).requires_grad_()
    k, v = leaves((1, seqlen_k, 2, 64), BF16, device, seed + 1, 2)
    row = seqlen_q - 7
    last = row + seqlen_k - seqlen_q
    dout = torch.zeros_like(q)
    dout[:, row] = 1.0
    dq, dk, dv = torch.autograd.grad(flash_attn_func(q, k, v, causal=True), (q, k, v), dout)
    assert dq[:, row].count_nonzero() > 0
    assert dq[:, :row].count_nonzero() == dq[:, row + 1 :].count_nonzero() == 0
    for gradient in (dk, dv):
        assert gradient[:, : last + 1].count_nonzero() > 0
        assert gradient[:, last + 1 :].count_nonzero() == 0


@everywhere
def test_rows_without_keys_have_no_gradient(device, seed):
    q = calls.randn(1, 129, 2, 64, dtype=BF16, device=device, seed=seed).requires_grad_()
    k, v = leaves((1, 64, 2, 64), BF16, device, seed + 1, 2)
    out = flash_attn_func(q, k, v, causal=True)
    assert out[:, : 129 - 64].count_nonzero() == 0
    dout = torch.full_like(out, 100.0)
    dq, dk, dv = torch.autograd.grad(out, (q, k, v), dout)
    assert dq[:, : 129 - 64].count_nonzero() == 0
    assert dk.isfinite().all() and dv.isfinite().all()
