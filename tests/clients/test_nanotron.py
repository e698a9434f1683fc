"""nanotron: attention with its rotary embedding, decoding, norms."""

from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from flash_attn.layers.rotary import RotaryEmbedding
from tests.clients.loading import load, parts_of
from tests.support.calls import assert_near

pytest.importorskip("transformers", minversion="5", reason="needs transformers 5 or newer")
from tests.clients.plain_attention import (
    BATCH,
    HEADDIM,
    HEADS,
    HEADS_K,
    LENGTH,
    WIDTH,
    compare,
    plain,
    plain_varlen,
    rotate,
)


@pytest.fixture(scope="module")
def nanotron(tmp_path_factory):
    """Its modules; a group of one process, over which its linear layers are parallel."""
    bare = "nanotron", "nanotron.parallel.pipeline_parallel"  # which import each other in a circle
    with parts_of("nanotron", bare, absent=("nanotron.logging", "nanotron.config")):
        llama, norms = load("nanotron.models.llama"), load("nanotron.nn.layer_norm")
        store = load("nanotron.generation.generate_store")
    dist.init_process_group("gloo", init_method=f"file://{tmp_path_factory.mktemp('group')}/r", rank=0, world_size=1)
    yield SimpleNamespace(llama=llama, norms=norms, store=store)
    dist.destroy_process_group()


def nanotron_attention(nanotron, heads_k, seed):
    torch.manual_seed(seed)
    config = SimpleNamespace(
        hidden_size=WIDTH, num_attention_heads=HEADS, num_key_value_heads=heads_k, max_position_embeddings=32
    )
    layer = nanotron.llama.CausalSelfAttention(config, None, dist.group.WORLD, 0)
    assert isinstance(layer.flash_rotary_embedding, RotaryEmbedding)
    for weight in layer.parameters():
        torch.nn.init.normal_(weight, std=WIDTH**-0.5)
    return layer


@pytest.mark.parametrize("heads_k", [HEADS, HEADS_K])
def test_attention_of_nanotron(nanotron, heads_k, seed):
    """Rotates q and packed k and v, then attends to packed sequences of equal length."""
    layer = nanotron_attention(nanotron, heads_k, seed)
    mask = torch.ones(BATCH, LENGTH, dtype=torch.bool)

    def call(layer, x):
        return layer(x.transpose(0, 1), mask)["hidden_states"].transpose(0, 1)

    def rotate_all(_module, q, kv):
        position = torch.arange(LENGTH).expand(BATCH, -1)
        k, v = kv.unbind(2)
        return rotate(q, position, interleaved=True), torch.stack([rotate(k, position, interleaved=True), v], dim=2)

    def with_plain(patch):
        patch.setattr(nanotron.llama, "flash_attn_varlen_func", plain_varlen)
        patch.setattr(RotaryEmbedding, "forward", rotate_all)

    compare(call, layer, with_plain, seed)


def test_decoding_of_nanotron(nanotron, seed):
    """The new key and value are appended to the caches; its own table of angles is only ever made on a GPU."""
    layer, room, before = nanotron_attention(nanotron, HEADS_K, seed).eval(), 32, torch.tensor([7, 3])
    angles = torch.arange(float(room))[:, None] * 10000.0 ** (-torch.arange(HEADDIM // 2) / (HEADDIM // 2))
    layer.rotary_embedding.freqs_cis = torch.stack([angles.cos(), angles.sin()], dim=-1)
    layer.rotary_embedding._initialized_buffer = True
    caches = [torch.randn(BATCH, room, HEADS_K, HEADDIM) for _ in range(2)]
    expected = [cache.double() for cache in caches]
    x = torch.randn(BATCH, 1, WIDTH)
    store = nanotron.store.Store()
    with torch.no_grad(), nanotron.store.attach_store(layer, store):
        store[id(layer)] = dict(key=caches[0], value=caches[1], position_offsets=(before - 1).int())
        found = layer(x.transpose(0, 1), torch.ones(BATCH, 1, dtype=torch.int32))["hidden_states"].transpose(0, 1)
        qkv = F.linear(x.double(), layer.qkv_proj.weight.double()).unflatten(-1, (-1, HEADDIM))
        q, k, v = qkv.split([HEADS, HEADS_K, HEADS_K], dim=2)
        q, k = (rotate(part, before[:, None], interleaved=True) for part in (q, k))
        rows = []
        for b, length in enumerate(before.tolist()):
            expected[0][b, length], expected[1][b, length] = k[b, 0], v[b, 0]
            rows.append(plain(q[b : b + 1], *(cache[b : b + 1, : length + 1] for cache in expected)))
        truth = F.linear(torch.cat(rows).flatten(2), layer.o_proj.weight.double())
    assert_near((found, *caches), (truth, *expected), roundoffs=32)


@pytest.mark.parametrize("name", ["TritonRMSNorm", "TritonLayerNorm"])
def test_norms_of_nanotron(nanotron, name, seed):
    torch.manual_seed(seed)
    norm = getattr(nanotron.norms, name)(WIDTH)
    for weight in norm.parameters():
        torch.nn.init.normal_(weight)
    x, residual, dout = (torch.randn(BATCH, LENGTH, WIDTH) for _ in range(3))
    leaves = [x.requires_grad_(), residual.requires_grad_(), *norm.parameters()]
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    summed = exact[0] + exact[1]
    if name == "TritonRMSNorm":
        truth = exact[2] * summed * (summed.square().mean(-1, keepdim=True) + norm.eps).rsqrt()
    else:
        truth = F.layer_norm(summed, (WIDTH,), *exact[2:], eps=norm.eps)
    out, total = norm(x, residual=residual, prenorm=True)
    gradients = torch.autograd.grad((out, total), leaves, (dout, dout))
    expected = torch.autograd.grad((truth, summed), exact, (dout.double(),) * 2)
    assert_near((out, total, *gradients), (truth, summed, *expected), roundoffs=32)
