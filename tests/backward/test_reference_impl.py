"""The written-out gradients against autograd of the reference, PyTorch's attention, and finite differences."""

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from flash_attn import reference
from flash_attn.backward.reference_impl import pytorch_flash_attention_backward as backward

LENGTHS = [(9, 9), (5, 12), (12, 5), (1, 7), (7, 1)]


def normal(*shape, seed, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def operands(seqlen_q, seqlen_k, nheads=4, nheads_k=2, headdim=8, batch_size=2, seed=0, dtype=torch.float64):
    shapes = [(seqlen_q, nheads), (seqlen_k, nheads_k), (seqlen_k, nheads_k), (seqlen_q, nheads)]
    return [normal(batch_size, *shape, headdim, seed=seed + i, dtype=dtype) for i, shape in enumerate(shapes)]


def interval(causal, window_size):
    left, right = (side if side >= 0 else None for side in window_size)
    return left, 0 if causal else right


def assert_equals_autograd(q, k, v, dout, *, causal=False, window_size=(-1, -1), **options):
    q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
    out, lse = reference.attention(q, k, v, window=interval(causal, window_size), **options)
    by_autograd = torch.autograd.grad(out, (q, k, v), dout)
    with torch.no_grad():
        by_formula = backward(dout, q, k, v, out, lse, causal=causal, window_size=window_size, **options)
    for found, expected in zip(by_formula, by_autograd, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(("seqlen_q", "seqlen_k"), LENGTHS)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("window_size", [(-1, -1), (3, -1), (-1, 2), (2, 1), (0, 0)])
def test_mask_and_lengths(seqlen_q, seqlen_k, causal, window_size):
    assert_equals_autograd(*operands(seqlen_q, seqlen_k), causal=causal, window_size=window_size)


@pytest.mark.parametrize("nheads_k", [6, 3, 2, 1])
def test_gradients_of_shared_heads_are_summed(nheads_k):
    assert_equals_autograd(*operands(5, 7, nheads=6, nheads_k=nheads_k), causal=True)


@pytest.mark.parametrize(("seqlen_q", "seqlen_k"), LENGTHS)
@pytest.mark.parametrize("softmax_scale", [None, 0.3])
def test_softcap(seqlen_q, seqlen_k, softmax_scale):
    assert_equals_autograd(*operands(seqlen_q, seqlen_k), softcap=0.7, softmax_scale=softmax_scale, causal=True)


@pytest.mark.parametrize(("seqlen_q", "seqlen_k"), LENGTHS)
@pytest.mark.parametrize("shape", [(4,), (2, 4)])
def test_alibi(seqlen_q, seqlen_k, shape):
    slopes = normal(*shape, seed=7, dtype=torch.float32).abs()
    assert_equals_autograd(*operands(seqlen_q, seqlen_k), alibi_slopes=slopes, softcap=2.0)


@pytest.mark.parametrize(("seqlen_q", "seqlen_k"), LENGTHS)
def test_dropout(seqlen_q, seqlen_k):
    keep = normal(2, 4, seqlen_q, seqlen_k, seed=8) > -0.5
    assert_equals_autograd(*operands(seqlen_q, seqlen_k), keep=keep, dropout_p=0.3)


def test_everything_at_once():
    assert_equals_autograd(
        *operands(11, 8, nheads=6, nheads_k=2),
        causal=True,
        window_size=(4, -1),
        softmax_scale=0.5,
        softcap=1.5,
        alibi_slopes=normal(2, 6, seed=7).abs(),
        keep=normal(2, 6, 11, 8, seed=8) > -1,
        dropout_p=0.15,
    )


@pytest.mark.parametrize(
    ("batch_size", "seqlen_q", "seqlen_k"), [(0, 3, 3), (2, 0, 3), (2, 3, 0), (2, 0, 0), (2, 6, 2)], ids=str
)
def test_empty_rows_and_empty_tensors(batch_size, seqlen_q, seqlen_k):
    q, k, v, dout = operands(seqlen_q, seqlen_k, batch_size=batch_size)
    assert_equals_autograd(q, k, v, dout, causal=True)
    out, lse = reference.attention(q, k, v, window=(None, 0))
    dq, _, _ = backward(dout, q, k, v, out, lse.nan_to_num(neginf=torch.inf), causal=True)  # upstream's empty rows
    assert (dq[:, : max(0, seqlen_q - seqlen_k)] == 0).all() and dq.isfinite().all()


@pytest.mark.parametrize("nheads_k", [4, 1])
@pytest.mark.parametrize(("seqlen_q", "seqlen_k"), [(16, 16), (5, 16)])
@pytest.mark.parametrize("causal", [False, True])
def test_equals_scaled_dot_product_attention(seqlen_q, seqlen_k, nheads_k, causal):
    q, k, v, dout = operands(seqlen_q, seqlen_k, nheads_k=nheads_k, headdim=32)
    swapped = [x.transpose(1, 2).detach().requires_grad_() for x in (q, k, v)]
    mask = reference.visible(seqlen_q, seqlen_k, (None, 0 if causal else None))
    s = (swapped[0] @ swapped[1].repeat_interleave(4 // nheads_k, 1).mT * 32**-0.5).masked_fill(~mask, -torch.inf)
    theirs = scaled_dot_product_attention(*swapped, attn_mask=mask, enable_gqa=True)
    expected = torch.autograd.grad(theirs, swapped, dout.transpose(1, 2))
    found = backward(dout, q, k, v, theirs.detach().transpose(1, 2), s.detach().logsumexp(-1), causal=causal)
    for x, y in zip(found, expected, strict=True):
        torch.testing.assert_close(x, y.transpose(1, 2))


@pytest.mark.parametrize("causal", [False, True])
def test_finite_differences(causal):
    shape = (2, 64, 4, 32)
    q, k, v, dout = (normal(*shape, seed=i) for i in range(4))
    window = (None, 0 if causal else None)
    out, lse = reference.attention(q, k, v, window=window)
    gradients = backward(dout, q, k, v, out, lse, causal=causal)

    def loss(which, moved):
        qkv = [q, k, v]
        qkv[which] = moved
        return (reference.attention(*qkv, window=window)[0] * dout).sum()

    step = 1e-5
    for which, (x, gradient) in enumerate(zip((q, k, v), gradients, strict=True)):
        for index in torch.randint(x.numel(), (20,), generator=torch.Generator().manual_seed(which)).tolist():
            nudge = torch.zeros(x.numel(), dtype=torch.float64)
            nudge[index] = step
            difference = loss(which, x + nudge.view(shape)) - loss(which, x - nudge.view(shape))
            torch.testing.assert_close(gradient.flatten()[index], difference / (2 * step), rtol=1e-3, atol=1e-3)


def test_results_have_the_dtypes_of_their_operands():
    q, k, v, dout = operands(5, 7, dtype=torch.bfloat16)
    out, lse = reference.attention(q, k, v, compute_dtype=torch.float32, round_to=torch.bfloat16)
    assert [x.dtype for x in backward(dout, q, k, v, out, lse)] == [torch.bfloat16] * 3


def test_rounding_stays_within_the_dtype():
    q, k, v, dout = operands(40, 40, headdim=64, dtype=torch.float16)
    out, lse = reference.attention(q, k, v, compute_dtype=torch.float32, round_to=torch.float16)
    rounded = backward(dout, q, k, v, out, lse, compute_dtype=torch.float32, round_to=torch.float16)
    exact = backward(dout, q, k, v, out, lse)
    for x, y in zip(rounded, exact, strict=True):
        assert not torch.equal(x, y)
        torch.testing.assert_close(x, y, rtol=1e-2, atol=2e-3)
