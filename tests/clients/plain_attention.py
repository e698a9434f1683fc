"""Plain attention in the place of another package's, and layers compared between the two, in fp32 and float64.

What is not attention stays theirs in both.
"""

import pytest
import torch

from flash_attn import reference
from tests.clients import tiny_models as tiny
from tests.support import rotations

BATCH, LENGTH, WIDTH, HEADS, HEADS_K = 2, 21, 64, 4, 2
HEADDIM = WIDTH // HEADS
PACKED = (5, 1, 15)


def plain(q, k, v, causal=False, window_size=(-1, -1), **_):
    """What layers ask of flash_attn_func."""
    left, right = (None if side < 0 else side for side in window_size)
    rounding = dict(compute_dtype=q.dtype, round_to=q.dtype)
    return reference.attention(q, k, v, window=(left, 0 if causal else right), **rounding)[0]


def plain_varlen(q, k, v, cu_seqlens_q, cu_seqlens_k, *_, **words):
    """What layers ask of flash_attn_varlen_func."""
    ends = (cu_seqlens_q, cu_seqlens_k, cu_seqlens_k)
    parts = (x.tensor_split(end[1:-1].long().cpu()) for x, end in zip((q, k, v), ends, strict=True))
    return torch.cat([plain(*(x[None] for x in part), **words)[0] for part in zip(*parts, strict=True)])


def rotate(x, position, interleaved=False):
    """By the angles that all of them use, of base 10000."""
    half = x.shape[-1] // 2
    angles = torch.arange(int(position.max()) + 1.0)[:, None] * 10000.0 ** (-torch.arange(half) / half)
    return rotations.rotated(x, angles.cos(), angles.sin(), position, interleaved).to(x.dtype)


def run(call, layer, x, dtype, seed):
    """Output and gradients of a random linear loss."""
    layer, x = layer.to(dtype), x.detach().to(dtype).requires_grad_()
    layer.zero_grad()
    out = call(layer, x)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(seed))
    (out * weights.to(out)).sum().backward()
    gradients = {name: w.grad.double() for name, w in layer.named_parameters()} | {"x": x.grad.double()}
    return tiny.Pass(out.detach().double().flatten(0, -2), gradients, {})


def compare(call, layer, with_plain, seed):
    """with_plain: a context in which the layer attends by `plain`."""
    x = torch.randn(BATCH, LENGTH, WIDTH)
    actual = run(call, layer, x, torch.float32, seed)
    with pytest.MonkeyPatch.context() as patch:
        with_plain(patch)
        matched, truth = (run(call, layer, x, dtype, seed) for dtype in (torch.float32, torch.float64))
    tiny.check(actual, matched, truth, torch.float32)
