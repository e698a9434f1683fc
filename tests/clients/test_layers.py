"""Attention layers of other packages: on this package, and with plain attention in its place, in fp32 and float64.

nanotron, megatron-core, flash-linear-attention and x-transformers. What is not attention stays theirs in all three.
"""

import math
from functools import partial
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

import flash_attn
from flash_attn import reference
from flash_attn.layers.rotary import RotaryEmbedding
from tests.clients.loading import load, parts_of
from tests.support import rotations, tolerance
from tests.support.calls import assert_near, int32
from tests.support.cases import BF16, Case
from tests.support.inputs import make_inputs

pytest.importorskip("transformers", minversion="5", reason="needs transformers 5 or newer")
from tests.clients import tiny_models as tiny

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
    return tiny.Pass(out.detach().double().flatten(0, -2), gradients)


def compare(call, layer, with_plain, seed):
    """with_plain: a context in which the layer attends by `plain`."""
    x = torch.randn(BATCH, LENGTH, WIDTH)
    actual = run(call, layer, x, torch.float32, seed)
    with pytest.MonkeyPatch.context() as patch:
        with_plain(patch)
        matched, truth = (run(call, layer, x, dtype, seed) for dtype in (torch.float32, torch.float64))
    tiny.check(actual, matched, truth, torch.float32)


# nanotron


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


# megatron-core


@pytest.fixture(scope="module")
def megatron():
    with parts_of("megatron"):
        rope, utils = load("megatron.core.models.common.embeddings.rope_utils"), load("megatron.core.utils")
        return SimpleNamespace(rope=rope, utils=utils, attention=load("megatron.core.transformer.attention"))


def test_megatron_accepts_the_version(megatron):
    assert str(megatron.utils.get_fa_version()) == flash_attn.__version__
    assert megatron.utils.is_fa_min_version("2.7.3") and not megatron.utils.is_fa_min_version("2.8.4")
    assert megatron.attention.flash_attn_varlen_func is flash_attn.flash_attn_varlen_func


@pytest.mark.parametrize("interleaved", [False, True])
def test_rotary_embedding_of_megatron(megatron, interleaved, seed):
    """(seqlen, batch, heads, headdim), a permuted view for this package."""
    generator = torch.Generator().manual_seed(seed)
    cos, sin = rotations.tables(LENGTH, 6, torch.float32, torch.device("cpu"), generator)
    t, dout = torch.randn(2, LENGTH, BATCH, HEADS, HEADDIM, generator=generator)
    found = megatron.rope.apply_rotary_pos_emb_with_cos_sin(t.requires_grad_(), cos, sin, interleaved)
    position = torch.arange(LENGTH)[:, None].expand(-1, BATCH)
    truth = partial(rotations.rotated, cos=cos, sin=sin, position=position, interleaved=interleaved)
    rotations.assert_rounded_once(found, truth(t.detach()), rotations.bound(t.detach(), cos, sin))
    (dt,) = torch.autograd.grad(found, t, dout)
    rotations.assert_rounded_once(dt, truth(dout, conjugate=True), rotations.bound(dout, cos, sin))


def test_flash_decode_of_megatron(megatron, seed):
    """Rotation, append and attention in one call, over caches of (seqlen, batch, heads, headdim)."""
    torch.manual_seed(seed)
    room, before = 40, torch.tensor([33, 8])
    q, k, v = (torch.randn(1, BATCH, heads, HEADDIM) for heads in (HEADS, HEADS_K, HEADS_K))
    caches = [torch.randn(room, BATCH, HEADS_K, HEADDIM) for _ in range(2)]
    cos, sin = rotations.tables(
        room, HEADDIM // 2, torch.float32, torch.device("cpu"), torch.Generator().manual_seed(seed)
    )
    expected = [cache.double() for cache in caches]
    q_rotated, k_rotated = (rotations.rotated(x, cos, sin, before[None]) for x in (q, k))
    decode = megatron.attention.Attention.flash_decode
    found = decode(None, before.int(), q, k, v, *caches, rotary_cos=cos, rotary_sin=sin)
    truth = []
    for b, length in enumerate(before.tolist()):
        expected[0][length, b], expected[1][length, b] = k_rotated[0, b], v[0, b].double()
        truth.append(plain(q_rotated[:, b][None], *(cache[None, : length + 1, b] for cache in expected)))
    assert_near((found, *caches), (torch.cat(truth), *expected), roundoffs=16)


@pytest.mark.parametrize("lengths_q", [(1, 1, 1), (5, 1, 9)], ids=["decoding", "mixed"])
def test_paged_attention_of_megatron(megatron, lengths_q, seed):
    """Its dynamic batches: sequences over pages in any order, those that begin among those that go on."""
    torch.manual_seed(seed)
    lengths, page = (30, 17, 9), 16
    table = torch.randperm(8)[:6].view(3, 2).int()
    pages = [torch.randn(8, page, HEADS_K, HEADDIM) for _ in range(2)]
    decoding = max(lengths_q) == 1
    q = torch.randn(sum(lengths_q), 1, HEADS, HEADDIM)
    words = dict(
        max_seqlen_q=max(lengths_q),
        max_seqlen_k=max(lengths),
        cu_seqlens_q=int32([0, *torch.tensor(lengths_q).cumsum(0)], q.device),
        cu_seqlens_k=int32([0, *torch.tensor(lengths).cumsum(0)], q.device),
        seqlens_k=int32(list(lengths), q.device),
        block_table=table,
        is_decode_only=decoding,
    )
    layer = SimpleNamespace(training=False, batch_invariant_mode=False, config=None)
    attend = megatron.attention.Attention.flash_decode_and_prefill
    found = attend(layer, q, *pages, **words)
    truth = []
    for rows, pages_of, length in zip(q.double()[:, 0].split(lengths_q), table.long(), lengths, strict=True):
        keys, values = (x[pages_of].flatten(0, 1)[None, :length].double() for x in pages)
        truth.append(plain(rows[None], keys, values, causal=True)[0])
    assert_near(found, torch.cat(truth)[:, None], roundoffs=16)


# flash-linear-attention


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


# x-transformers


@pytest.mark.gpu
@pytest.mark.parametrize("causal", [False, True])
def test_packed_sequences_of_x_transformers(causal, seed):
    """It asks for a GPU itself."""
    with parts_of("x_transformers", ("x_transformers",)):
        attend = load("x_transformers.attend").Attend(causal=causal, flash=True, flash_pack_seq=True, heads=4)
    case = Case("packed", BF16, 64, 4, 4, PACKED, PACKED, "varlen", causal=causal)
    inputs = make_inputs(case, "cuda", seed)
    q, k, v = (x.detach().transpose(0, 1)[None].requires_grad_() for x in (inputs.q, inputs.k, inputs.v))
    names = "cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k"
    out, _ = attend(q, k, v, flash_pack_seq_kwargs={name: getattr(inputs, name) for name in names})
    gradients = torch.autograd.grad(out, (q, k, v), inputs.dout.transpose(0, 1)[None])
    out, dq, dk, dv = (x[0].detach().transpose(0, 1) for x in (out, *gradients))
    expected = tolerance.expected(case, inputs)
    expected.check(out=out, lse=expected.reference.lse.float(), dq=dq, dk=dk, dv=dv)
