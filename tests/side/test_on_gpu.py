"""The same modules on a GPU, in bf16, against float64."""

import pytest
import torch
import torch.nn.functional as F

from flash_attn.flash_attn_triton import flash_attn_func
from flash_attn.modules.mha import MHA
from flash_attn.ops.triton.cross_entropy import cross_entropy_loss
from flash_attn.ops.triton.layer_norm import rms_norm_fn
from flash_attn.utils.generation import InferenceParams

pytestmark = pytest.mark.gpu
EPS = torch.finfo(torch.bfloat16).eps


def close(actual, truth, roundings=2):
    """Within a few roundings of the largest value."""
    tolerance = roundings * EPS
    torch.testing.assert_close(actual.double(), truth, rtol=tolerance, atol=tolerance * truth.abs().max().item())


def test_cross_entropy(seed, device):
    torch.manual_seed(seed)
    logits = torch.randn(64, 50257, device=device).bfloat16().requires_grad_()
    labels = torch.randint(50257, (64,), device=device)
    wide = logits.detach().double().requires_grad_()
    truth = F.cross_entropy(wide, labels, label_smoothing=0.1, reduction="none")
    losses, _ = cross_entropy_loss(logits, labels, label_smoothing=0.1)
    torch.testing.assert_close(losses.double(), truth, rtol=1e-5, atol=1e-5)
    close(torch.autograd.grad(losses.sum(), logits)[0], torch.autograd.grad(truth.sum(), wide)[0])


def test_rms_norm_with_residual(seed, device):
    torch.manual_seed(seed)
    x = torch.randn(8, 100, 1024, device=device).bfloat16()
    residual, weight = torch.randn(8, 100, 1024, device=device), torch.randn(1024, device=device)
    out, z = rms_norm_fn(x, weight, None, residual, prenorm=True, eps=1e-5)
    truth = x.double() + residual.double()
    torch.testing.assert_close(z.double(), truth, rtol=1e-6, atol=1e-6)
    close(out, F.rms_norm(truth, (1024,), weight.double(), 1e-5), roundings=1)


@pytest.mark.parametrize("nheads_k", [8, 2])
def test_mha_trains_and_decodes(seed, device, nheads_k):
    torch.manual_seed(seed)
    options = dict(num_heads_kv=nheads_k, causal=True, layer_idx=0, rotary_emb_dim=32, device=device)
    flash = MHA(256, 8, use_flash_attn=True, **options).bfloat16()
    plain = MHA(256, 8, **options).double()
    plain.load_state_dict(flash.state_dict())
    x = torch.randn(2, 130, 256, device=device).bfloat16().requires_grad_()
    wide = x.detach().double().requires_grad_()
    out, truth = flash(x), plain(wide)
    dout = torch.randn_like(out)
    close(out, truth, roundings=8)
    close(torch.autograd.grad(out, x, dout)[0], torch.autograd.grad(truth, wide, dout.double())[0], roundings=8)
    params = InferenceParams(130, 2)
    with torch.no_grad():
        first = flash(x[:, :129], inference_params=params)
        params.seqlen_offset = 129
        last = flash(x[:, 129:], inference_params=params)
    close(torch.cat([first, last], 1), truth.detach(), roundings=8)


def test_attention_with_a_bias(seed, device):
    torch.manual_seed(seed)
    q, k, v = torch.randn(3, 2, 130, 4, 64, device=device).bfloat16()
    bias = torch.randn(1, 4, 130, 130, device=device)
    scores = torch.einsum("bthd,bshd->bhts", q.double(), k.double()) / 8 + bias.double()
    hidden = torch.ones(130, 130, dtype=torch.bool, device=device).triu(1)
    truth = torch.einsum("bhts,bshd->bthd", scores.masked_fill(hidden, -torch.inf).softmax(-1), v.double())
    close(flash_attn_func(q, k, v, bias, causal=True), truth)
