"""The specification against hand-computed cases, against PyTorch's own attention, and at its edges."""

import math

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from flash_attn.reference import attention, attention_varlen, scores, visible
from tests.support.cases import Case
from tests.support.probes import check_needle, check_one_hot_values, check_zero_query

INF = math.inf


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize(
    ("seqlens", "window", "rows"),
    [
        ((2, 3), (None, None), ["111", "111"]),
        ((3, 5), (None, 0), ["11100", "11110", "11111"]),
        ((5, 3), (None, 0), ["000", "000", "100", "110", "111"]),
        ((3, 3), (0, 0), ["100", "010", "001"]),
        ((3, 4), (1, 0), ["1100", "0110", "0011"]),
        ((3, 4), (None, 1), ["1110", "1111", "1111"]),
        ((4, 3), (0, None), ["111", "111", "011", "001"]),
        ((4, 2), (1, 1), ["00", "10", "11", "11"]),
        ((1, 4), (2, 0), ["0111"]),
        ((2, 0), (None, 0), ["", ""]),
        ((0, 2), (1, 1), []),
    ],
)
def test_visible_keys_are_the_drawn_ones(seqlens, window, rows):
    assert ["".join(str(int(x)) for x in row) for row in visible(*seqlens, window)] == rows


def test_two_keys_by_hand():
    # scores 0 and 1/2 * 2 ln 3 = ln 3: weights 1/4 and 3/4, lse ln 4
    q = torch.tensor([[[[2.0]]]])
    k = torch.tensor([[[[0.0]], [[math.log(3)]]]], dtype=torch.float64)
    v = torch.tensor([[[[4.0]], [[8.0]]]])
    out, lse = attention(q, k, v, softmax_scale=0.5)
    torch.testing.assert_close(out, torch.tensor([[[[7.0]]]], dtype=torch.float64))
    torch.testing.assert_close(lse, torch.tensor([[[math.log(4)]]], dtype=torch.float64))


def test_default_scale_is_headdim_to_the_minus_half():
    q, k, v = normal(1, 2, 1, 16), normal(1, 3, 1, 16, seed=1), normal(1, 3, 1, 16, seed=2)
    assert torch.equal(attention(q, k, v)[0], attention(q, k, v, softmax_scale=0.25)[0])


def test_score_order_is_scale_softcap_alibi():
    q = torch.tensor([[[[3.0]], [[3.0]]]], dtype=torch.float64)  # two rows
    k = torch.tensor([[[[5.0]], [[-1.0]], [[2.0]]]], dtype=torch.float64)  # three keys
    found = scores(q, k, softmax_scale=0.1, softcap=2.0, alibi_slopes=torch.tensor([0.5]))
    capped = [2 * math.tanh(s / 2) for s in (1.5, -0.3, 0.6)]
    distance = [[1, 0, 1], [2, 1, 0]]
    expected = [[[[s - 0.5 * d for s, d in zip(capped, row, strict=True)] for row in distance]]]
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64))


def test_alibi_slopes_per_batch():
    q, k, v = normal(2, 3, 4, 8), normal(2, 5, 2, 8, seed=1), normal(2, 5, 2, 8, seed=2)
    slopes = normal(2, 4, seed=3).abs()
    both = attention(q, k, v, alibi_slopes=slopes)
    for b in range(2):
        one = attention(*(x[b : b + 1] for x in (q, k, v)), alibi_slopes=slopes[b])
        for x, y in zip(both, one, strict=True):
            torch.testing.assert_close(x[b], y[0])


def test_query_heads_share_key_heads_in_order():
    q, k, v = normal(1, 3, 4, 8), normal(1, 5, 2, 8, seed=1), normal(1, 5, 2, 8, seed=2)
    grouped, _ = attention(q, k, v)
    for h, h_k in enumerate((0, 0, 1, 1)):
        single, _ = attention(q[:, :, h, None], k[:, :, h_k, None], v[:, :, h_k, None])
        torch.testing.assert_close(grouped[:, :, h, None], single)


@pytest.mark.parametrize("nheads_k", [6, 3, 1])
@pytest.mark.parametrize(("seqlen_q", "seqlen_k"), [(7, 7), (5, 11), (1, 13), (11, 5)])
@pytest.mark.parametrize("window", [(None, None), (3, 2), (None, 0)])
def test_equals_scaled_dot_product_attention(seqlen_q, seqlen_k, nheads_k, window):
    q = normal(2, seqlen_q, 6, 16)
    k, v = normal(2, seqlen_k, nheads_k, 16, seed=1), normal(2, seqlen_k, nheads_k, 16, seed=2)
    mask = visible(seqlen_q, seqlen_k, window)
    out, lse = attention(q, k, v, window=window)
    theirs = scaled_dot_product_attention(
        *(x.transpose(1, 2) for x in (q, k, v)), attn_mask=mask, enable_gqa=True
    ).transpose(1, 2)
    seen = mask.any(-1)
    torch.testing.assert_close(out[:, seen], theirs[:, seen])
    assert (out[:, ~seen] == 0).all() and (lse[:, :, ~seen] == -INF).all()
    s = scores(q, k, softmax_scale=0.25).masked_fill(~mask, -INF)
    torch.testing.assert_close(lse, s.logsumexp(-1))


def test_dropout_scales_what_it_keeps_and_leaves_the_lse():
    q, k, v = normal(1, 3, 2, 8), normal(1, 4, 2, 8, seed=1), normal(1, 4, 2, 8, seed=2)
    keep = normal(1, 2, 3, 4, seed=3) > 0
    keep[0, 0, 1] = False
    out, lse = attention(q, k, v, keep=keep, dropout_p=0.2)
    plain, plain_lse = attention(q, k, v)
    p = torch.softmax(scores(q, k, softmax_scale=8**-0.5), dim=-1) * keep / 0.8
    torch.testing.assert_close(out, (p @ v.transpose(1, 2)).transpose(1, 2))
    assert torch.equal(lse, plain_lse)
    assert (out[0, 1, 0] == 0).all() and not torch.equal(out, plain)


@pytest.mark.parametrize(
    ("batch_size", "seqlen_q", "seqlen_k"), [(1, 3, 0), (1, 0, 3), (1, 0, 0), (0, 3, 3), (2, 5, 2)], ids=str
)
def test_empty_rows_give_zero_and_no_nan_gradient(batch_size, seqlen_q, seqlen_k):
    shapes = (batch_size, seqlen_q, 4, 8), (batch_size, seqlen_k, 2, 8), (batch_size, seqlen_k, 2, 8)
    q, k, v = (normal(*shape, seed=i).requires_grad_() for i, shape in enumerate(shapes))
    out, lse = attention(q, k, v, window=(None, 0), softcap=2.0, alibi_slopes=torch.ones(4))
    empty = max(0, seqlen_q - seqlen_k)
    assert out.shape == q.shape and lse.shape == (batch_size, 4, seqlen_q)
    assert (out[:, :empty] == 0).all() and (lse[:, :, :empty] == -INF).all() and lse[:, :, empty:].isfinite().all()
    (out.sum() + lse[:, :, empty:].sum()).backward()
    assert all(x.grad.isfinite().all() for x in (q, k, v))
    assert (q.grad[:, :empty] == 0).all()


def test_gradients_of_out_and_lse_by_finite_differences():
    q, k, v = (normal(1, n, h, 3, seed=n).requires_grad_() for n, h in ((4, 2), (3, 1), (3, 1)))
    keep = normal(1, 2, 4, 3, seed=9) > -1

    def run(q, k, v):
        out, lse = attention(
            q, k, v, window=(2, 0), softcap=1.5, alibi_slopes=torch.tensor([0.1, 0.4]), keep=keep, dropout_p=0.1
        )
        return out, lse[:, :, 1:]  # row 0 sees no key

    assert torch.autograd.gradcheck(run, (q, k, v))


def test_rounding_is_the_kernels():
    q, k, v = (normal(1, 40, 2, 64, seed=i).to(torch.bfloat16) for i in range(3))
    out, lse = attention(q, k, v, compute_dtype=torch.float32, round_to=torch.bfloat16)
    assert out.dtype == torch.bfloat16 and lse.dtype == torch.float32
    s = scores(q.float(), k.float(), softmax_scale=0.125)
    p = torch.exp(s - s.amax(-1, keepdim=True))
    by_hand = (p.bfloat16().float() @ v.float().transpose(1, 2)) / p.sum(-1, keepdim=True)
    torch.testing.assert_close(out, by_hand.transpose(1, 2).bfloat16(), rtol=2**-8, atol=0)
    assert attention(q, k, v)[0].dtype == torch.float64


def packed(lengths, heads, seed):
    return normal(sum(lengths), heads, 8, seed=seed), torch.tensor([0, *lengths]).cumsum(0).int()


def test_varlen_is_dense_per_sequence():
    lengths_q, lengths_k = (3, 0, 5, 4), (4, 2, 0, 6)
    q, cu_q = packed(lengths_q, 4, 0)
    k, cu_k = packed(lengths_k, 2, 1)
    v, _ = packed(lengths_k, 2, 2)
    q = torch.cat([q, torch.full((2, 4, 8), math.nan, dtype=q.dtype)])  # rows outside every sequence
    keep = [normal(1, 4, *pair) > 0 for pair in zip(lengths_q, lengths_k, strict=True)]
    slopes = normal(4, 4, seed=3).abs()
    out, lse = attention_varlen(
        q, k, v, cu_q, cu_k, window=(None, 0), alibi_slopes=slopes, keep=keep, dropout_p=0.5, softcap=2.0
    )
    for b, (i, j) in enumerate(zip(cu_q.tolist(), cu_k.tolist(), strict=True)):
        if b == len(keep):
            break
        rows, keys = slice(i, i + lengths_q[b]), slice(j, j + lengths_k[b])
        dense, dense_lse = attention(
            q[None, rows],
            k[None, keys],
            v[None, keys],
            window=(None, 0),
            alibi_slopes=slopes[b],
            keep=keep[b],
            dropout_p=0.5,
            softcap=2.0,
        )
        torch.testing.assert_close(out[rows], dense[0])
        torch.testing.assert_close(lse[:, rows], dense_lse[0])
    assert (out[12:] == 0).all() and (lse[:, 12:] == -INF).all()


def test_varlen_is_differentiable():
    q, cu_q = packed((3, 4), 2, 0)
    k, cu_k = packed((5, 2), 2, 1)
    q.requires_grad_()
    k.requires_grad_()
    out, lse = attention_varlen(q, k, k, cu_q, cu_k, window=(None, 0))
    (out.sum() + lse[lse > -INF].sum()).backward()
    assert q.grad.isfinite().all() and k.grad.isfinite().all() and k.grad.abs().sum() > 0


def test_seqused_leftpad_and_pages_select_keys():
    q, cu_q = packed((2, 3), 2, 0)
    k, cu_k = packed((9, 7), 1, 1)
    v, _ = packed((9, 7), 1, 2)
    seqused, leftpad = torch.tensor([8, 5]), torch.tensor([3, 0])
    spans = [(0 + 3, 0 + 8), (9 + 0, 9 + 5)]
    kept_k, kept_v = (torch.cat([x[i:j] for i, j in spans]) for x in (k, v))
    kept_cu = torch.tensor([0, 5, 10])
    expected = attention_varlen(q, kept_k, kept_v, cu_q, kept_cu, window=(2, 0))
    found = attention_varlen(q, k, v, cu_q, cu_k, seqused_k=seqused, leftpad_k=leftpad, window=(2, 0))
    for x, y in zip(found, expected, strict=True):
        torch.testing.assert_close(x, y)

    # pages of 4 tokens in scattered order; page 0 holds NaN and is never needed
    table = torch.tensor([[5, 2, 4], [1, 3, -1]], dtype=torch.int32)
    pages = [torch.full((6, 4, 1, 8), math.nan, dtype=torch.float64) for _ in range(2)]
    for x, paged in zip((k, v), pages, strict=True):
        for b, start in enumerate(cu_k[:2].tolist()):
            for t in range(int(cu_k[b + 1]) - start):
                paged[table[b, t // 4], t % 4] = x[start + t]
    found = attention_varlen(
        q, *pages, cu_q, cu_k, seqused_k=seqused, leftpad_k=leftpad, block_table=table, window=(2, 0)
    )
    for x, y in zip(found, expected, strict=True):
        torch.testing.assert_close(x, y)


PROBED = [
    Case("probe-full", torch.float16, 32, 4, 2, (33, 33), (70, 70)),
    Case("probe-causal", torch.bfloat16, 64, 2, 1, (70,), (97,), causal=True),
    Case("probe-band", torch.float32, 16, 2, 2, (50,), (40,), window=(9, 6)),
    Case("probe-empty-rows", torch.float16, 40, 3, 1, (90,), (31,), causal=True),
    Case("probe-no-keys", torch.float16, 16, 1, 1, (5,), (0,)),
]


def attend(q, k, v, causal=False, window_size=(-1, -1), lost_key=None):
    left, right = (side if side >= 0 else None for side in window_size)
    window = (left, 0 if causal else right)
    if lost_key is not None:
        keys = [j for j in range(k.shape[1]) if j != lost_key]
        k, v = k[:, keys], v[:, keys]
    return attention(q, k, v, window=window, compute_dtype=torch.float32, round_to=q.dtype)


@pytest.mark.parametrize("case", PROBED, ids=str)
def test_probes_accept_the_reference(case, seed):
    check_zero_query(attend, case, "cpu", seed)
    if case.seqlens_k[0]:
        p = check_one_hot_values(attend, case, "cpu", seed)
        assert p.shape == (case.batch_size, case.nheads, case.seqlens_q[0], case.seqlens_k[0])
        check_needle(attend, case, "cpu", seed)


@pytest.mark.parametrize("case", PROBED[:3], ids=str)
@pytest.mark.parametrize("check", [check_zero_query, check_needle])
def test_probes_reject_a_lost_key(case, check):
    def lossy(q, k, v, **mask):
        return attend(q, k, v, lost_key=k.shape[1] - 1, **mask)

    with pytest.raises(AssertionError):
        check(lossy, case, "cpu")


def test_one_hot_probe_rejects_a_wide_window_and_a_lost_rescale():
    def wide(q, k, v, causal, window_size):
        return attend(q, k, v, causal, (window_size[0] + 1, window_size[1]))

    with pytest.raises(AssertionError, match="hidden keys"):
        check_one_hot_values(wide, PROBED[2], "cpu")

    def unnormalised(q, k, v, **mask):
        out, lse = attend(q, k, v, **mask)
        return out * 1.01, lse

    with pytest.raises(AssertionError, match="row sum"):
        check_one_hot_values(unnormalised, PROBED[0], "cpu")
