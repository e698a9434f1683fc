"""megatron-core: its gate, rotary embedding, flash decoding, batches over pages."""

from functools import partial
from types import SimpleNamespace

import pytest
import torch

import flash_attn
from tests.clients.loading import load, parts_of
from tests.support import rotations
from tests.support.calls import assert_near, int32

pytest.importorskip("transformers", minversion="5", reason="needs transformers 5 or newer")
from tests.clients.plain_attention import BATCH, HEADDIM, HEADS, HEADS_K, LENGTH, plain


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
