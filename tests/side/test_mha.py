"""MHA against attention written out from its own weights, and decoding against the whole sequence at once."""

import itertools

import pytest
import torch

from flash_attn.layers.rotary import apply_rotary_emb_torch
from flash_attn.modules.mha import (
    MHA,
    CrossAttention,
    FlashCrossAttention,
    FlashSelfAttention,
    SelfAttention,
    _update_kv_cache,
    get_alibi_slopes,
)
from flash_attn.utils.generation import InferenceParams

BATCH, SEQLEN, NHEADS, HEADDIM = 2, 9, 4, 16
EMBED = NHEADS * HEADDIM


def attention(q, k, v, causal=False, window=(-1, -1), slopes=None, keep=None):
    """Written out: (batch, seqlen, nheads, headdim) each."""
    k, v = (x.repeat_interleave(q.shape[2] // x.shape[2], dim=2) for x in (k, v))
    scores = torch.einsum("bthd,bshd->bhts", q, k) * q.shape[-1] ** -0.5
    distance = torch.arange(q.shape[1])[:, None] + k.shape[1] - q.shape[1] - torch.arange(k.shape[1])
    if slopes is not None:
        scores = scores - slopes[:, None, None] * distance.abs()
    visible = torch.ones_like(distance, dtype=torch.bool)
    if causal:
        visible &= distance >= 0
    if window[0] >= 0:
        visible &= distance <= window[0]
    if window[1] >= 0:
        visible &= distance >= -window[1]
    scores = scores.masked_fill(~visible, -torch.inf)
    if keep is not None:
        scores = scores.masked_fill(~keep[:, None, None], -torch.inf)
    return torch.einsum("bhts,bshd->bthd", scores.softmax(-1), v)


def test_alibi_slopes():
    assert get_alibi_slopes(8) == [2.0**-h for h in range(1, 9)]
    assert get_alibi_slopes(1) == [2.0**-8]
    twelve = get_alibi_slopes(12)
    assert twelve[:8] == get_alibi_slopes(8) and twelve[8:] == get_alibi_slopes(16)[0:8:2]


@pytest.mark.parametrize("causal, packed", list(itertools.product([False, True], repeat=2)))
def test_plain_and_flash_modules_agree_with_the_formula(seed, causal, packed):
    torch.manual_seed(seed)
    qkv = torch.randn(BATCH, SEQLEN, 3, NHEADS, HEADDIM)
    truth = attention(*qkv.unbind(2), causal=causal)
    if packed:
        for module in (SelfAttention(causal), FlashSelfAttention(causal)):
            torch.testing.assert_close(module(qkv), truth, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(module(qkv, causal=not causal), attention(*qkv.unbind(2), causal=not causal))
        return
    q, kv = qkv[:, :5, 0], qkv[:, :, 1:, :2]
    truth = attention(q, *kv.unbind(2), causal=causal)
    for module in (CrossAttention(causal), FlashCrossAttention(causal)):
        torch.testing.assert_close(module(q, kv), truth, rtol=1e-5, atol=1e-5)


def test_flash_modules_take_their_arguments_in_upstreams_order(seed):
    torch.manual_seed(seed)
    qkv, slopes = torch.randn(BATCH, SEQLEN, 3, NHEADS, HEADDIM), torch.tensor(get_alibi_slopes(NHEADS))
    truth = attention(*qkv.unbind(2), causal=True, window=(2, 0), slopes=slopes)
    out = FlashSelfAttention(True, None, 0.0, (2, 0), slopes, True)(qkv)
    torch.testing.assert_close(out, truth, rtol=1e-5, atol=1e-5)
    out = FlashCrossAttention(True, None, 0.0, slopes, (2, 0), True)(qkv[:, :, 0], qkv[:, :, 1:])
    torch.testing.assert_close(out, truth, rtol=1e-5, atol=1e-5)


def test_padded_keys_are_hidden(seed):
    torch.manual_seed(seed)
    qkv = torch.randn(BATCH, SEQLEN, 3, NHEADS, HEADDIM)
    keep = torch.arange(SEQLEN) < torch.tensor([[4], [SEQLEN]])
    truth = attention(*qkv.unbind(2), keep=keep)
    torch.testing.assert_close(SelfAttention()(qkv, key_padding_mask=keep), truth, rtol=1e-5, atol=1e-5)
    crossed = CrossAttention()(qkv[:, :, 0], qkv[:, :, 1:], key_padding_mask=keep)
    torch.testing.assert_close(crossed, truth, rtol=1e-5, atol=1e-5)
    causal = CrossAttention(causal=True)(qkv[:, :3, 0], qkv[:, :, 1:], key_padding_mask=keep)
    first = attention(qkv[:1, :3, 0], qkv[:1, :4, 1], qkv[:1, :4, 2], causal=True)
    torch.testing.assert_close(causal[:1], first, rtol=1e-5, atol=1e-5)


def projected(mha, x):
    q, k, v = mha.Wqkv(x).split((EMBED, mha.num_heads_kv * HEADDIM, mha.num_heads_kv * HEADDIM), dim=-1)
    return [each.unflatten(-1, (-1, HEADDIM)) for each in (q, k, v)]


@pytest.mark.parametrize("flash", [False, True])
@pytest.mark.parametrize("num_heads_kv", [None, 2, 1])
@pytest.mark.parametrize("causal", [False, True])
def test_mha_is_attention_of_its_projections(seed, flash, num_heads_kv, causal):
    torch.manual_seed(seed)
    mha = MHA(EMBED, NHEADS, num_heads_kv, causal=causal, use_flash_attn=flash)
    x = torch.randn(BATCH, SEQLEN, EMBED, requires_grad=True)
    truth = mha.out_proj(attention(*projected(mha, x), causal=causal).flatten(-2))
    out = mha(x)
    torch.testing.assert_close(out, truth, rtol=1e-5, atol=1e-5)
    weights = [x, *mha.parameters()]
    dout = torch.randn_like(out)
    pairs = zip(torch.autograd.grad(out, weights, dout), torch.autograd.grad(truth, weights, dout), strict=True)
    for gradient, expected in pairs:
        torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("flash, num_heads_kv", list(itertools.product([False, True], [None, 2])))
def test_rotary_embedding_in_training(seed, flash, num_heads_kv):
    torch.manual_seed(seed)
    mha = MHA(EMBED, NHEADS, num_heads_kv, causal=True, rotary_emb_dim=8, use_flash_attn=flash)
    x = torch.randn(BATCH, SEQLEN, EMBED, requires_grad=True)
    out = mha(x)
    angle = torch.outer(torch.arange(SEQLEN), mha.rotary_emb.inv_freq)
    q, k, v = projected(mha, x)
    q, k = (apply_rotary_emb_torch(each, angle.cos(), angle.sin()) for each in (q, k))
    truth = mha.out_proj(attention(q, k, v, causal=True).flatten(-2))
    torch.testing.assert_close(out, truth, rtol=1e-5, atol=1e-5)
    inputs, dout = [x, *mha.parameters()], torch.randn_like(out)
    pairs = zip(torch.autograd.grad(out, inputs, dout), torch.autograd.grad(truth, inputs, dout), strict=True)
    for gradient, expected in pairs:
        torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("num_heads_kv", [None, 2])
def test_alibi_window_and_packed_sequences(seed, num_heads_kv):
    torch.manual_seed(seed)
    mha = MHA(EMBED, NHEADS, num_heads_kv, causal=True, use_alibi=True, window_size=(3, 0), use_flash_attn=True)
    x = torch.randn(BATCH, SEQLEN, EMBED)
    slopes = torch.tensor(get_alibi_slopes(NHEADS))
    truth = mha.out_proj(attention(*projected(mha, x), causal=True, window=(3, 0), slopes=slopes).flatten(-2))
    torch.testing.assert_close(mha(x), truth, rtol=1e-5, atol=1e-5)
    cu_seqlens = torch.tensor([0, SEQLEN, 2 * SEQLEN], dtype=torch.int32)
    packed = mha(x.flatten(0, 1), cu_seqlens=cu_seqlens, max_seqlen=SEQLEN)
    torch.testing.assert_close(packed, truth.flatten(0, 1), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("flash, return_residual", list(itertools.product([False, True], repeat=2)))
def test_cross_attention(seed, flash, return_residual):
    torch.manual_seed(seed)
    mha = MHA(EMBED, NHEADS, 2, cross_attn=True, use_flash_attn=flash, return_residual=return_residual)
    x, x_kv = torch.randn(BATCH, 5, EMBED), torch.randn(BATCH, SEQLEN, EMBED)

    def truth(x, x_kv):
        q = mha.Wq(x).unflatten(-1, (-1, HEADDIM))
        kv = mha.Wkv(x_kv)
        k, v = (kv[0] if return_residual else kv).unflatten(-1, (2, -1, HEADDIM)).unbind(2)
        return mha.out_proj(attention(q, k, v).flatten(-2))

    for arguments, expected in (
        (dict(x=x, x_kv=x_kv), truth(x, x_kv)),
        (dict(x=x), truth(x, x)),
        (dict(x=x_kv, mixer_subset=slice(0, 1)), truth(x_kv[:, :1], x_kv)),
    ):
        out = mha(**arguments)
        if return_residual:
            out, residual = out
            assert residual is arguments["x"]
        torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("num_heads_kv", [None, 2])
def test_dwconv_looks_back_two_tokens(seed, num_heads_kv):
    torch.manual_seed(seed)
    mha = MHA(EMBED, NHEADS, num_heads_kv, causal=True, dwconv=True, use_flash_attn=True)
    x = torch.randn(1, SEQLEN, EMBED, requires_grad=True)
    (dx,) = torch.autograd.grad(mha(x)[0, 4].sum(), x)
    assert dx[0, 5:].count_nonzero() == 0 and dx[0, 4].count_nonzero() > 0
    qkv = mha.Wqkv(x)
    if num_heads_kv is None:
        convolutions = [(mha.dwconv_qkv, qkv)]
    else:
        convolutions = [(mha.dwconv_q, qkv[..., :EMBED]), (mha.dwconv_kv, qkv[..., EMBED:])]
    parts = []
    for convolution, y in convolutions:
        weight, padded = convolution.weight[:, 0], torch.nn.functional.pad(y, (0, 0, 2, 0))
        parts.append(sum(padded[:, i : i + SEQLEN] * weight[:, i] for i in range(3)) + convolution.bias)
    q, k, v = torch.cat(parts, -1).split((EMBED, mha.num_heads_kv * HEADDIM, mha.num_heads_kv * HEADDIM), -1)
    q, k, v = (each.unflatten(-1, (-1, HEADDIM)) for each in (q, k, v))
    torch.testing.assert_close(mha(x), mha.out_proj(attention(q, k, v, causal=True).flatten(-2)), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("flash", [False, True])
@pytest.mark.parametrize("num_heads_kv", [None, 2])
@pytest.mark.parametrize(
    "rotary_dim, interleaved, scale_base", [(0, False, None), (16, True, None), (8, False, None), (16, False, 512)]
)
def test_decoding_is_the_whole_sequence(seed, flash, num_heads_kv, rotary_dim, interleaved, scale_base):
    torch.manual_seed(seed)
    options = dict(use_alibi=True, window_size=(4, 0)) if flash else {}
    mha = MHA(
        *(EMBED, NHEADS, num_heads_kv),
        causal=True,
        layer_idx=3,
        rotary_emb_dim=rotary_dim,
        rotary_emb_interleaved=interleaved,
        rotary_emb_scale_base=scale_base,
        use_flash_attn=flash,
        **options,
    ).eval()
    x = torch.randn(BATCH, SEQLEN, EMBED)
    with torch.no_grad():
        truth = mha(x)
        params = InferenceParams(max_seqlen=SEQLEN + 2, max_batch_size=BATCH)
        parts = []
        for begin, end in ((0, 4), (4, 5), (5, 6), (6, SEQLEN)):
            parts.append(mha(x[:, begin:end], inference_params=params))
            params.seqlen_offset = end
    torch.testing.assert_close(torch.cat(parts, 1), truth, rtol=1e-5, atol=1e-5)
    assert list(params.key_value_memory_dict) == [3]


def test_decoding_sequences_of_different_lengths(seed):
    torch.manual_seed(seed)
    mha = MHA(EMBED, NHEADS, causal=True, layer_idx=0, rotary_emb_dim=16, use_flash_attn=True).eval()
    x = torch.randn(BATCH, SEQLEN, EMBED)
    lengths = torch.tensor([3, 6], dtype=torch.int32)
    params = InferenceParams(SEQLEN, BATCH)
    with torch.no_grad():
        mha(x[:, :6], inference_params=params)
        params.seqlen_offset, params.lengths_per_sample = 6, lengths
        step = mha(x[:, 6:7], inference_params=params)
        for row, length in enumerate(lengths.tolist()):
            whole = mha(torch.cat([x[row : row + 1, :length], x[row : row + 1, 6:7]], dim=1))
            torch.testing.assert_close(step[row], whole[0, -1:], rtol=1e-5, atol=1e-5)


def test_allocated_cache_is_used(seed):
    torch.manual_seed(seed)
    mha = MHA(EMBED, NHEADS, 2, causal=True, layer_idx=0, use_flash_attn=True).eval()
    cache = mha.allocate_inference_cache(BATCH + 1, SEQLEN, dtype=torch.float32)
    assert cache.shape == (BATCH + 1, SEQLEN, 2, 2, HEADDIM)
    params = InferenceParams(SEQLEN, BATCH + 1, batch_size_offset=1, key_value_memory_dict={0: cache})
    x = torch.randn(BATCH, SEQLEN, EMBED)
    with torch.no_grad():
        truth = mha(x)
        first = mha(x[:, :-1], inference_params=params)
        params.seqlen_offset = SEQLEN - 1
        last = mha(x[:, -1:], inference_params=params)
    torch.testing.assert_close(torch.cat([first, last], 1), truth, rtol=1e-5, atol=1e-5)
    k, v = projected(mha, x)[1:]
    torch.testing.assert_close(cache[1:, :, 0], k)
    torch.testing.assert_close(cache[1:, :, 1], v)


def test_cache_that_is_too_small_is_named():
    params = InferenceParams(4, 1)
    _update_kv_cache(torch.zeros(1, 4, 2, 1, 8), params, 0)
    params.seqlen_offset = 4
    with pytest.raises(ValueError, match="1 sequences of 4 tokens, needed are 1 of 5"):
        _update_kv_cache(torch.zeros(1, 1, 2, 1, 8), params, 0)


def test_checkpointing_changes_no_gradient(seed):
    torch.manual_seed(seed)
    plain = MHA(EMBED, NHEADS, use_flash_attn=True)
    again = MHA(EMBED, NHEADS, use_flash_attn=True, checkpointing=True)
    again.load_state_dict(plain.state_dict())
    x = torch.randn(BATCH, SEQLEN, EMBED, requires_grad=True)
    assert torch.equal(*(torch.autograd.grad(mha(x).square().sum(), x)[0] for mha in (plain, again)))


def test_attention_dropout_only_while_training(seed):
    torch.manual_seed(seed)
    for flash in (False, True):
        mha = MHA(EMBED, NHEADS, dropout=0.5, use_flash_attn=flash)
        x = torch.randn(BATCH, SEQLEN, EMBED)
        assert not torch.equal(mha(x), mha(x))
        mha.eval()
        assert torch.equal(mha(x), mha(x))


@pytest.mark.parametrize(
    "options, arguments, words",
    [
        (dict(num_heads=5), {}, "64 must be divisible by num_heads 5"),
        (dict(num_heads_kv=3), {}, "num_heads 4 must be divisible by num_heads_kv 3"),
        (dict(use_alibi=True), {}, "use_flash_attn=True"),
        (dict(window_size=(2, 0)), {}, "use_flash_attn=True"),
        (dict(cross_attn=True, rotary_emb_dim=8), {}, "rotary_emb_dim 8"),
        ({}, dict(cu_seqlens=torch.tensor([0, 9]), max_seqlen=9), "use_flash_attn=True"),
        (dict(use_flash_attn=True), dict(cu_seqlens=torch.tensor([0, 9])), "max_seqlen, got None"),
        (dict(use_flash_attn=True), dict(key_padding_mask=torch.ones(2, 9)), "use_flash_attn=False"),
        (dict(), dict(x_kv=torch.ones(2, 9, 64)), "cross_attn=True"),
        (dict(), dict(inference_params=InferenceParams(9, 2)), "layer_idx"),
        (dict(dwconv=True, layer_idx=0), dict(inference_params=InferenceParams(9, 2)), "dwconv"),
        (
            dict(use_flash_attn=True, layer_idx=0),
            dict(inference_params=InferenceParams(9, 2, seqlen_offset=3)),
            "layer 0 has no cache, but seqlen_offset is 3",
        ),
    ],
)
def test_contradictions_are_named(options, arguments, words):
    with pytest.raises(ValueError, match=words):
        MHA(**(dict(embed_dim=EMBED, num_heads=NHEADS) | options))(torch.zeros(2, 9, EMBED), **arguments)


def test_lengths_per_sample_need_flash():
    mha = MHA(EMBED, NHEADS, layer_idx=0)
    params = InferenceParams(9, 2, seqlen_offset=1, lengths_per_sample=torch.ones(2, dtype=torch.int32))
    with pytest.raises(NotImplementedError, match="lengths_per_sample"):
        mha(torch.zeros(2, 1, EMBED), inference_params=params)
