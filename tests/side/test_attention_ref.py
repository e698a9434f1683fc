"""utils.testing's attention against the specification, sequence by sequence, and its masks against their definitions."""

import itertools

import pytest
import torch

from flash_attn import reference
from flash_attn.utils.testing import attention_ref, construct_chunk_mask, construct_local_mask

B, SQ, SK, H, HK, D = 3, 6, 9, 4, 2, 8
LENGTHS_Q, LENGTHS_K = torch.tensor([6, 3, 0]), torch.tensor([4, 9, 5])
QUERY_MASK, KEY_MASK = torch.arange(SQ) < LENGTHS_Q[:, None], torch.arange(SK) < LENGTHS_K[:, None]


def inputs(dtype=torch.float64, headdim_v=D):
    shapes = ((B, SQ, H, D), (B, SK, HK, D), (B, SK, HK, headdim_v))
    return [torch.randn(shape, dtype=torch.float64).to(dtype).requires_grad_() for shape in shapes]


def same(actual, truth):
    torch.testing.assert_close(actual, truth, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("window", [(None, None), (None, 0), (2, 0), (1, 2), (3, None)])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("extras", [False, True])
def test_values_and_gradients_are_those_of_each_sequence(seed, window, masked, extras):
    torch.manual_seed(seed)
    q, k, v = inputs()
    sink = torch.randn(H, dtype=torch.float64, requires_grad=True) if extras else None
    keep = torch.rand(B, H, SQ, SK) < 0.7 if extras else None
    softcap, p = (1.5, 0.3) if extras else (0.0, 0.0)
    masks = dict(query_padding_mask=QUERY_MASK, key_padding_mask=KEY_MASK) if masked else {}
    arguments = dict(window_size=window, softcap=softcap, learnable_sink=sink, dropout_mask=keep, dropout_p=p)
    out, attention = attention_ref(q, k, v, **masks, **arguments)
    truth = torch.zeros_like(out)
    for b in range(B):
        n, m = (int(LENGTHS_Q[b]), int(LENGTHS_K[b])) if masked else (SQ, SK)
        options = dict(window=window, softcap=softcap, sinks=sink, dropout_p=p)
        one = reference.attention(
            q[b : b + 1, :n],
            k[b : b + 1, :m],
            v[b : b + 1, :m],
            keep=None if keep is None else keep[b, :, :n, :m],
            **options,
        )[0]
        truth = truth.index_put((torch.tensor(b), torch.arange(n)), one[0])
        assert not attention[b, :, n:].any() and not attention[b, :, :, m:].any()
    same(out, truth)
    leaves = [q, k, v] if sink is None else [q, k, v, sink]
    dout = torch.randn_like(out)
    for got, right in zip(
        torch.autograd.grad(out, leaves, dout), torch.autograd.grad(truth, leaves, dout), strict=True
    ):
        same(got, right)


@pytest.mark.parametrize("chunk, sink_tokens, padded", list(itertools.product([0, 3], [0, 2], [False, True])))
def test_hidden_keys_by_definition(seed, chunk, sink_tokens, padded):
    torch.manual_seed(seed)
    leftpad = torch.tensor([0, 2, 1]) if padded else None
    masks = dict(query_padding_mask=QUERY_MASK, key_padding_mask=KEY_MASK, key_leftpad=leftpad) if padded else {}
    left, right = 2, 1
    got = construct_local_mask(SQ, SK, (left, right), sink_tokens, **masks).expand(B, 1, SQ, SK)
    in_chunk = construct_chunk_mask(SQ, SK, 3, **masks).expand(B, 1, SQ, SK)
    for b, i, j in itertools.product(range(B), range(SQ), range(SK)):
        n, m = (int(LENGTHS_Q[b]), int(LENGTHS_K[b])) if padded else (SQ, SK)
        first = int(leftpad[b]) if padded else 0
        diagonal, key = i + m - n, j - first
        near = diagonal - left <= key <= diagonal + right or (key < sink_tokens and key <= diagonal + right)
        assert got[b, 0, i, j] == (key < 0 or not near)
        assert in_chunk[b, 0, i, j] == (key < 0 or key // 3 != diagonal // 3)
    q, k, v = inputs()
    arguments = dict(window_size=(left, right), sink_token_length=sink_tokens, attention_chunk=chunk, **masks)
    _, attention = attention_ref(q, k, v, **arguments)
    hidden = got | in_chunk if chunk else got
    if padded:
        hidden = hidden | ~KEY_MASK[:, None, None] | ~QUERY_MASK[:, None, :, None]
    assert torch.equal(attention == 0.0, hidden.expand(attention.shape))
    same(attention.sum(-1), (~hidden.all(-1)).double().expand(B, H, SQ))


def test_masks_are_two_dimensional_without_lengths():
    assert construct_local_mask(2, 3, (None, 0)).tolist() == [[False, False, True], [False, False, False]]
    assert not construct_local_mask(2, 3).any() and construct_local_mask(2, 3).shape == (2, 3)
    assert construct_chunk_mask(2, 3, 2).tolist() == [[False, False, True], [True, True, False]]
    assert construct_chunk_mask(3, 1, 2).tolist() == [[True], [True], [False]]


def test_causal_keeps_the_left_bound(seed):
    torch.manual_seed(seed)
    q, k, v = inputs()
    same(
        attention_ref(q, k, v, causal=True, window_size=(2, 5))[0],
        attention_ref(q, k, v, window_size=(2, 0))[0],
    )


@pytest.mark.parametrize("reorder_ops", [False, True])
def test_bias_descales_and_qv(seed, reorder_ops):
    torch.manual_seed(seed)
    q, k, v = inputs(headdim_v=5)
    qv, bias = torch.randn(B, SQ, H, 5, dtype=torch.float64), torch.randn(H, SQ, SK, dtype=torch.float64)
    descales = torch.rand(3, B, HK, dtype=torch.float64) + 0.5
    names = dict(zip(("q_descale", "k_descale", "v_descale"), descales, strict=True))
    out, attention = attention_ref(q, k, v, attn_bias=bias, qv=qv, reorder_ops=reorder_ops, **names)
    fq, fk, fv = (each[:, None, :, None] for each in descales)
    wide_q = torch.cat([q, qv], -1) * fq.repeat_interleave(H // HK, 2)
    wide_k = torch.cat([k * fk, v * fv], -1).repeat_interleave(H // HK, 2)
    truth = (torch.einsum("bihd,bjhd->bhij", wide_q, wide_k) / (D + 5) ** 0.5 + bias).softmax(-1)
    same(attention, truth)
    same(out, torch.einsum("bhij,bjhd->bihd", truth, (v * fv).repeat_interleave(H // HK, 2)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_precision_is_what_was_asked_for(seed, dtype):
    """Rounding as late as possible comes closest, and each earlier rounding shows."""
    torch.manual_seed(seed)
    q, k, v = inputs(dtype)
    truth = attention_ref(q.double(), k.double(), v.double(), causal=True)[0]

    def error(**options):
        out, attention = attention_ref(q, k, v, causal=True, **options)
        assert out.dtype == attention.dtype == dtype
        return (out.double() - truth).abs().max().item()

    eps, largest = torch.finfo(dtype).eps, truth.abs().max().item()
    assert error() <= 0.51 * eps * largest
    for options in (dict(upcast=False), dict(upcast=False, reorder_ops=True), dict(intermediate_dtype=dtype)):
        assert 0.0 < error(**options) <= 16 * eps * v.abs().max().item()
    plain = attention_ref(q, k, v, causal=True, upcast=False)[0]
    assert not torch.equal(plain, attention_ref(q, k, v, causal=True, upcast=False, reorder_ops=True)[0])


def test_rows_without_keys_are_zero_and_pass_no_gradient(seed):
    """Batch 0 lacks key 4, which is all that the window shows to row 2; batch 1 has too few keys, batch 2 none."""
    torch.manual_seed(seed)
    q, k, v = inputs()
    bias = torch.randn(SQ, SK, dtype=torch.float64, requires_grad=True)
    seen = torch.arange(SK) < torch.tensor([[SK], [4], [0]])
    seen[0, 4] = False
    out, attention = attention_ref(q, k, v, key_padding_mask=seen, window_size=(0, 0), attn_bias=bias)
    empty = torch.zeros(B, H, SQ, dtype=torch.bool)
    empty[0, :, 2], empty[1, :, :2], empty[2] = True, True, True
    assert torch.equal(~attention.any(-1), empty) and not out.transpose(1, 2)[empty].any()
    gradients = torch.autograd.grad(out.square().sum(), [q, k, v, bias])
    assert all(each.isfinite().all() for each in gradients)
    assert not gradients[0].transpose(1, 2)[empty].any() and gradients[2].any()
