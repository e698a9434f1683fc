"""Attention with a bias against the formula in float64, and its causal corner."""

import pytest
import torch

from flash_attn.flash_attn_triton import flash_attn_func, flash_attn_kvpacked_func, flash_attn_qkvpacked_func

BATCH, NHEADS, HEADDIM = 2, 3, 16


def truth(q, k, v, bias, causal, scale):
    q, k, v = (x.double() for x in (q, k, v))
    scores = torch.einsum("bthd,bshd->bhts", q, k) * (HEADDIM**-0.5 if scale is None else scale)
    if bias is not None:
        scores = scores + bias.double()
    if causal:
        hidden = torch.arange(k.shape[1]) > torch.arange(q.shape[1])[:, None]
        scores = scores.masked_fill(hidden, -torch.inf)
    return torch.einsum("bhts,bshd->bthd", scores.softmax(-1), v)


@pytest.mark.parametrize("bias_shape", [None, (1, NHEADS, 1), (BATCH, 1, 7), (BATCH, NHEADS, 7)])
@pytest.mark.parametrize("seqlen_k", [7, 5, 12])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("scale", [None, 0.3])
def test_outputs_and_gradients(seed, bias_shape, seqlen_k, causal, scale):
    torch.manual_seed(seed)
    q = torch.randn(BATCH, 7, NHEADS, HEADDIM, requires_grad=True)
    k, v = (torch.randn(BATCH, seqlen_k, NHEADS, HEADDIM, requires_grad=True) for _ in range(2))
    bias = None if bias_shape is None else torch.randn(*bias_shape, seqlen_k, requires_grad=True)
    out, expected = flash_attn_func(q, k, v, bias, causal, scale), truth(q, k, v, bias, causal, scale)
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)
    inputs = [x for x in (q, k, v, bias) if x is not None]
    dout = torch.randn_like(out)
    pairs = zip(
        torch.autograd.grad(out, inputs, dout), torch.autograd.grad(expected, inputs, dout.double()), strict=True
    )
    for gradient, wanted in pairs:
        torch.testing.assert_close(gradient, wanted, rtol=1e-4, atol=1e-5)


def test_a_wide_bias_keeps_its_digits(seed):
    torch.manual_seed(seed)
    q, k, v = torch.randn(3, BATCH, 6, NHEADS, HEADDIM).bfloat16()
    bias = 1000 + torch.randn(1, 1, 6, 6)  # in bf16 the differences of 1000 and 1001 are gone
    out = flash_attn_func(q, k, v, bias)
    assert out.dtype == torch.bfloat16
    expected = truth(q, k, v, bias, False, None)
    eps = torch.finfo(torch.bfloat16).eps
    torch.testing.assert_close(out.double(), expected, rtol=eps, atol=eps * expected.abs().max().item() / 8)


def test_packed_forms(seed):
    torch.manual_seed(seed)
    qkv, bias = torch.randn(BATCH, 6, 3, NHEADS, HEADDIM), torch.randn(1, NHEADS, 6, 6)
    expected = flash_attn_func(*qkv.unbind(2), bias, True, 0.5)
    assert torch.equal(flash_attn_qkvpacked_func(qkv, bias, True, 0.5), expected)
    assert torch.equal(flash_attn_kvpacked_func(qkv[:, :, 0], qkv[:, :, 1:], bias, True, 0.5), expected)


def test_bad_input_is_named():
    q, k = torch.zeros(2, 3, 4, 8), torch.zeros(2, 5, 4, 8)
    for arguments, words in (
        ((q, k[:, :, :2], k[:, :, :2]), r"\(2, 3, 4, 8\) and \(2, 5, 2, 8\)"),
        ((q, k, k[:, :4]), r"\(2, 5, 4, 8\), got \(2, 4, 4, 8\)"),
        ((q, k, k.half()), "float16"),
        ((q, k[:, :0], k[:, :0]), "seqlen_k"),
        ((q, k, k, torch.zeros(2, 4, 2, 5)), r"\(2, 4, 3, 5\), got \(2, 4, 2, 5\)"),
        ((q, k, k, torch.zeros(3, 5)), r"got \(3, 5\)"),
        ((q, k, k, torch.zeros(2, 4, 3, 5).half()), "float16"),
    ):
        with pytest.raises(ValueError, match=words):
            flash_attn_func(*arguments)
    with pytest.raises(ValueError, match="qkv must have shape"):
        flash_attn_qkvpacked_func(q)
    with pytest.raises(ValueError, match="kv must have shape"):
        flash_attn_kvpacked_func(q, k)
