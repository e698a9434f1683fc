"""flash-linear-attention: attention layers, and its mixture of block attention."""

import math
from types import SimpleNamespace

import pytest
import torch

from tests.clients.loading import load, parts_of
from tests.support.calls import assert_near, int32

pytest.importorskip("transformers", minversion="5", reason="needs transformers 5 or newer")
from tests.clients.plain_attention import (
    HEADDIM,
    HEADS,
    HEADS_K,
    LENGTH,
    PACKED,
    WIDTH,
    compare,
    plain,
    plain_varlen,
    rotate,
)


@pytest.fixture(scope="module")
def fla():
    with parts_of("fla", ("fla", "fla.layers", "fla.ops")):
        layers = {name: load(f"fla.layers.{name}") for name in ("attn", "mla")}
        return SimpleNamespace(**layers, moba=load("fla.ops.moba.parallel"))


class PlainRotary(torch.nn.Module):
    """In the place of fla's, whose kernels need a GPU."""

    def forward(self, q, k, seqlen_offset, max_seqlen, cu_seqlens):
        lengths = [q.shape[1]] if cu_seqlens is None else cu_seqlens.diff().tolist()
        position = torch.cat([torch.arange(length) for length in lengths]).expand(q.shape[0], -1)
        return rotate(q, position), rotate(k, position)


@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("kind", ["plain", "left", "packed"])
@pytest.mark.parametrize("name", ["attn", "mla"])
def test_attention_of_fla(fla, name, kind, window, seed):
    torch.manual_seed(seed)
    if name == "attn":
        layer = fla.attn.Attention(WIDTH, HEADS, HEADS_K, window_size=window, layer_idx=0)
    else:
        sizes = dict(qk_rope_head_dim=8, kv_lora_rank=24, v_head_dim=12, qk_nope_head_dim=16, qk_head_dim=24)
        layer = fla.mla.MultiheadLatentAttention(WIDTH, HEADS, q_lora_rank=None, window_size=window, **sizes)
        layer.kv_proj[1] = torch.nn.RMSNorm(24)  # fla's is a kernel for a GPU
    layer.rotary = PlainRotary()
    words = dict(attention_mask=None)
    if kind == "left":
        words = dict(attention_mask=(torch.arange(LENGTH) >= torch.tensor([[8], [0]])).long())
    if kind == "packed":
        words["cu_seqlens"] = int32([0, *torch.tensor(PACKED).cumsum(0)], torch.device("cpu"))

    def call(layer, x):
        return layer(x[:1] if kind == "packed" else x, **words)[0]

    def with_plain(patch):
        patch.setattr(getattr(fla, name), "flash_attn_func", plain)
        patch.setattr(getattr(fla, name), "flash_attn_varlen_func", plain_varlen)

    compare(call, layer, with_plain, seed)


@pytest.mark.parametrize("topk", [1, 2, 3])
def test_mixture_of_block_attention_of_fla(fla, topk, seed):
    """Two private calls joined by their lse; their backward is given the joint out and lse, and dout as it is."""
    torch.manual_seed(seed)
    lengths, chunk = (37, 16, 59), 16
    q, k, v, dout = torch.randn(4, 1, sum(lengths), HEADS, HEADDIM)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    found = fla.moba.parallel_moba(*leaves, int32([0, *torch.tensor(lengths).cumsum(0)], q.device), 59, chunk, topk)
    exact = [x.detach().double().requires_grad_() for x in leaves]
    truth = torch.cat(
        [mixture_of_blocks(*part, chunk, topk) for part in zip(*(x[0].split(lengths) for x in exact), strict=True)]
    )
    gradients = torch.autograd.grad(found, leaves, dout)
    expected = torch.autograd.grad(truth, exact, dout[0].double())
    assert_near((found, *gradients), (truth[None], *expected), roundoffs=32)


def mixture_of_blocks(q, k, v, chunk, topk):
    """Every query sees the beginning of its own block and the topk - 1 earlier ones whose mean key suits it best."""
    blocks = torch.arange(q.shape[0]) // chunk
    visible = (blocks[:, None] == blocks) | torch.tensor(topk == 1)
    earlier = int(blocks[-1])
    if topk > 1 and earlier > 0:
        means = k[: earlier * chunk].unflatten(0, (earlier, chunk)).mean(1)
        gate = torch.einsum("nhk,thk->htn", means, q).masked_fill(blocks[:, None] <= torch.arange(earlier), -math.inf)
        best = gate.topk(min(topk - 1, earlier), dim=-1).indices
        chosen = torch.zeros_like(gate).scatter(-1, best, 1.0).bool() & gate.isfinite()
        visible = visible | torch.cat([chosen, chosen.new_zeros(*chosen.shape[:2], 1)], dim=-1)[..., blocks]
    causal = torch.ones(q.shape[0], q.shape[0]).tril().bool()
    scores = torch.einsum("ihd,jhd->hij", q, k) * q.shape[-1] ** -0.5
    return torch.einsum("hij,jhd->ihd", scores.masked_fill(~(visible & causal), -math.inf).softmax(-1), v)
