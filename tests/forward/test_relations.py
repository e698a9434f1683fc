"""Results that must agree with each other: packed and dense, paged and contiguous, masks written in two ways."""

import math

import pytest
import torch

from flash_attn import flash_attn_func, flash_attn_varlen_func, reference
from tests.support import calls
from tests.support.cases import BF16, FP32

H, HK, D = 4, 2, 64
LENGTHS_Q, LENGTHS_K = [33, 0, 97, 5, 128], [64, 17, 0, 129, 97]


@pytest.fixture
def device(request):
    with calls.running_on(request.param) as device:
        yield device


everywhere = pytest.mark.parametrize("device", calls.places("cpu", "gpu"), indirect=True)


def operands(device, seed, *, batch=None, seqlen_q=97, seqlen_k=129, heads=(H, HK), dtype=BF16):
    """q, k, v leaves: dense with a batch, else packed."""
    lead = () if batch is None else (batch,)
    shapes = [(*lead, seqlen_q, heads[0], D)] + [(*lead, seqlen_k, heads[1], D)] * 2
    return [calls.randn(*s, dtype=dtype, device=device, seed=seed + i).requires_grad_() for i, s in enumerate(shapes)]


def results(attend, leaves, seed):
    """out, lse, dq, dk, dv of attend(q, k, v, return_attn_probs=True)."""
    out, lse, _ = attend(*leaves, return_attn_probs=True)
    dout = calls.randn(*out.shape, dtype=out.dtype, device=out.device, seed=seed + 50)
    return out.detach(), lse, *torch.autograd.grad(out, leaves, dout)


def ends(lengths, device):
    return calls.int32([0, *torch.tensor(lengths).cumsum(0).tolist()], device)


@everywhere
@pytest.mark.parametrize("options", [{}, dict(causal=True), dict(window_size=(40, 7))], ids=str)
def test_a_packed_batch_is_its_sequences_one_by_one(options, device, seed):
    q, k, v = operands(device, seed, seqlen_q=sum(LENGTHS_Q), seqlen_k=sum(LENGTHS_K))
    lengths = (ends(LENGTHS_Q, device), ends(LENGTHS_K, device), max(LENGTHS_Q), max(LENGTHS_K))
    packed = results(lambda *x, **kw: flash_attn_varlen_func(*x, *lengths, **options, **kw), (q, k, v), seed)
    dout = calls.randn(*q.shape, dtype=BF16, device=device, seed=seed + 50)
    parts = []
    for each in zip(
        q.detach().split(LENGTHS_Q),
        k.detach().split(LENGTHS_K),
        v.detach().split(LENGTHS_K),
        dout.split(LENGTHS_Q),
        strict=True,
    ):
        leaves = [x[None].requires_grad_() for x in each[:3]]
        out, lse, _ = flash_attn_func(*leaves, **options, return_attn_probs=True)
        parts.append([out.detach(), lse.transpose(1, 2), *torch.autograd.grad(out, leaves, each[3][None])])
    joined = [torch.cat([part[i][0] for part in parts]) for i in range(5)]
    joined[1] = joined[1].T
    calls.assert_near(packed, joined)


@everywhere
def test_longer_maximum_lengths_change_nothing(device, seed):
    leaves = operands(device, seed, seqlen_q=sum(LENGTHS_Q), seqlen_k=sum(LENGTHS_K))
    cu = (ends(LENGTHS_Q, device), ends(LENGTHS_K, device))
    tight, loose = (
        results(lambda *x, n=n, **kw: flash_attn_varlen_func(*x, *cu, n, n, causal=True, **kw), leaves, seed)
        for n in (129, 1000)
    )
    calls.assert_equal(tight, loose)


@everywhere
@pytest.mark.parametrize("dtype", [BF16, FP32], ids=str)
def test_permuting_the_batch_permutes_the_results(dtype, device, seed):
    leaves = operands(device, seed, batch=5, dtype=dtype)
    order = torch.tensor([3, 0, 4, 1, 2], device=device)
    moved = [x.detach()[order].requires_grad_() for x in leaves]
    dout = calls.randn(5, 97, H, D, dtype=dtype, device=device, seed=seed + 9)
    out, wanted = (flash_attn_func(*x, causal=True) for x in (moved, leaves))
    calls.assert_equal(out, wanted[order])
    gradients = torch.autograd.grad(out, moved, dout[order])
    calls.assert_equal(gradients, [g[order] for g in torch.autograd.grad(wanted, leaves, dout)])


@everywhere
@pytest.mark.parametrize("heads_k", [1, 2])
def test_shared_key_heads_are_repeated_heads(heads_k, device, seed):
    q, k, v = operands(device, seed, batch=2, heads=(H, heads_k), dtype=FP32)
    repeated = [x.detach().repeat_interleave(H // heads_k, dim=2).requires_grad_() for x in (k, v)]
    shared = results(lambda *x, **kw: flash_attn_func(*x, causal=True, **kw), (q, k, v), seed)
    apart = results(lambda *x, **kw: flash_attn_func(*x, causal=True, **kw), (q, *repeated), seed)
    sums = [x.unflatten(2, (heads_k, -1)).sum(3) for x in apart[3:]]
    calls.assert_near(shared, [*apart[:3], *sums], roundoffs=64)


SAME_MASKS = {
    "a window larger than the sequences": (dict(window_size=(500, 500)), {}),
    "a left side that reaches the first key": (dict(window_size=(128, -1)), {}),
    "causal is a right side of 0": (dict(causal=True), dict(window_size=(-1, 0))),
    "causal overrides the right side": (dict(causal=True, window_size=(20, 50)), dict(window_size=(20, 0))),
    "causal with a wide window": (dict(causal=True, window_size=(500, 3)), dict(causal=True)),
    "a window as a list": (dict(window_size=[20, 3]), dict(window_size=(20, 3))),
    "a window as a tensor": (dict(window_size=torch.tensor([20, 3])), dict(window_size=(20, 3))),
    "no ALiBi is slopes of 0": (dict(alibi_slopes=0.0), {}),
}


@everywhere
@pytest.mark.parametrize("name", SAME_MASKS)
def test_masks_that_are_the_same(name, device, seed):
    leaves = operands(device, seed, batch=2)
    options = [dict(x) for x in SAME_MASKS[name]]
    for each in options:
        if "alibi_slopes" in each:
            each["alibi_slopes"] = torch.full((H,), each["alibi_slopes"], device=device)
    one, other = (results(lambda *x, o=o, **kw: flash_attn_func(*x, **o, **kw), leaves, seed) for o in options)
    if "ALiBi" in name:
        calls.assert_near(one, other)
    else:
        calls.assert_equal(one, other)


@everywhere
def test_a_single_query_sees_everything_when_causal(device, seed):
    leaves = operands(device, seed, batch=2, seqlen_q=1)
    causal, full = (
        results(lambda *x, c=c, **kw: flash_attn_func(*x, causal=c, **kw), leaves, seed) for c in (True, False)
    )
    calls.assert_near(causal, full)


@everywhere
def test_a_large_softcap_changes_little(device, seed):
    leaves = operands(device, seed, batch=2, dtype=FP32)
    capped, plain = (
        results(lambda *x, c=c, **kw: flash_attn_func(*x, softcap=c, **kw), leaves, seed) for c in (1e4, 0.0)
    )
    for a, b in zip(capped, plain, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)


@everywhere
@pytest.mark.parametrize("options", [{}, dict(causal=True, softcap=2.0)], ids=str)
def test_a_negative_scale_is_a_negated_query(options, device, seed):
    q, k, v = operands(device, seed, batch=2, dtype=FP32)
    negative = results(lambda *x, **kw: flash_attn_func(*x, softmax_scale=-0.2, **options, **kw), (q, k, v), seed)
    flipped = (-q.detach()).requires_grad_()
    positive = results(lambda *x, **kw: flash_attn_func(*x, softmax_scale=0.2, **options, **kw), (flipped, k, v), seed)
    calls.assert_near(negative, [*positive[:2], -positive[2], *positive[3:]], roundoffs=64)


@everywhere
@pytest.mark.parametrize("causal", [False, True])
def test_a_scale_of_zero_takes_the_mean(causal, device, seed):
    q, k, v = operands(device, seed, batch=2, heads=(H, H), dtype=FP32)
    out, lse, dq, dk, _ = results(
        lambda *x, **kw: flash_attn_func(*x, softmax_scale=0.0, causal=causal, **kw), (q, k, v), seed
    )
    mask = reference.visible(97, 129, (None, 0 if causal else None), device).double()
    mean = torch.einsum("ij,bjhd->bihd", mask / mask.sum(-1, keepdim=True), v.double())
    torch.testing.assert_close(out.double(), mean, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(lse.double(), mask.sum(-1).log().expand_as(lse), rtol=1e-5, atol=1e-5)
    assert dq.abs().max() <= 1e-20 and dk.abs().max() <= 1e-20


@everywhere
def test_the_default_scale(device, seed):
    leaves = operands(device, seed, batch=2)
    one, other = (
        results(lambda *x, s=s, **kw: flash_attn_func(*x, softmax_scale=s, **kw), leaves, seed) for s in (None, D**-0.5)
    )
    calls.assert_equal(one, other)


def into_pages(x, lengths, page_size, device, seed):
    """(pages, block_table): the sequences of a packed tensor in pages of random order, the rest of the pages NaN."""
    counts = [math.ceil(length / page_size) for length in lengths]
    num_pages = sum(counts) + 3
    order = torch.randperm(num_pages, generator=torch.Generator().manual_seed(seed)).tolist()
    pages = torch.full((num_pages, page_size, *x.shape[1:]), math.nan, dtype=x.dtype, device=device)
    table = torch.full((len(lengths), max(counts) + 1), -1, dtype=torch.int32)
    for batch, sequence in enumerate(x.split(lengths)):
        for number, chunk in enumerate(sequence.split(page_size) if len(sequence) else ()):
            table[batch, number] = page = order.pop()
            pages[page, : len(chunk)] = chunk
    return pages, table.to(device)


@everywhere
@pytest.mark.parametrize("page_size", [1, 16, 256])
@pytest.mark.parametrize("options", [{}, dict(causal=True), dict(window_size=(40, 7), softcap=2.0)], ids=str)
def test_paged_is_contiguous(page_size, options, device, seed):
    q, k, v = (x.detach() for x in operands(device, seed, seqlen_q=sum(LENGTHS_Q), seqlen_k=sum(LENGTHS_K)))
    lengths = (ends(LENGTHS_Q, device), ends(LENGTHS_K, device), max(LENGTHS_Q), max(LENGTHS_K))
    pages_k, table = into_pages(k, LENGTHS_K, page_size, device, seed)
    pages_v, _ = into_pages(v, LENGTHS_K, page_size, device, seed)
    paged = flash_attn_varlen_func(q, pages_k, pages_v, *lengths, **options, block_table=table, return_attn_probs=True)
    plain = flash_attn_varlen_func(q, k, v, *lengths, **options, return_attn_probs=True)
    calls.assert_near(paged[:2], plain[:2])


def test_pages_have_no_gradient():
    q = torch.randn(5, 2, 16, requires_grad=True)
    pages = torch.randn(3, 16, 2, 16)
    cu, table = torch.tensor([0, 5], dtype=torch.int32), torch.tensor([[1]], dtype=torch.int32)
    out = flash_attn_varlen_func(q, pages, pages, cu, cu, 5, 5, block_table=table)
    with pytest.raises(NotImplementedError, match="forward only"):
        out.sum().backward()


def private_varlen(q, k, v, cu_q, cu_k, *, causal=True, zero_tensors=False, **arrays):
    """(out, lse) of the operator, which alone takes seqused_k, leftpad_k and zero_tensors."""
    out, lse, _, _ = torch.ops.flash_attn._flash_attn_varlen_forward(
        q, k, v, cu_q, cu_k, 128, 256, 0.0, D**-0.5, causal, zero_tensors=zero_tensors, **arrays
    )
    return out, lse


@everywhere
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("page_size", [None, 16])
def test_used_lengths_and_left_padding(padded, page_size, device, seed):
    """The keys outside [leftpad_k, seqused_k) are NaN: what remains is a packed batch of shorter sequences."""
    used = [50, 17, 0, 100, 97]
    leftpad = [13, 0, 0, 99, 30] if padded else [0] * 5
    q, k, v = (x.detach() for x in operands(device, seed, seqlen_q=sum(LENGTHS_Q), seqlen_k=sum(LENGTHS_K)))
    kept = [
        torch.cat([part[low:high] for part, low, high in zip(x.split(LENGTHS_K), leftpad, used, strict=True)])
        for x in (k, v)
    ]
    outside = torch.cat(
        [
            (torch.arange(n) < low) | (torch.arange(n) >= high)
            for n, low, high in zip(LENGTHS_K, leftpad, used, strict=True)
        ]
    )
    for x in (k, v):
        x[outside.to(device)] = math.nan
    cu_q, cu_k = ends(LENGTHS_Q, device), ends(LENGTHS_K, device)
    arrays = dict(seqused_k=calls.int32(used, device))
    if padded:
        arrays["leftpad_k"] = calls.int32(leftpad, device)
    if page_size is not None:
        k, table = into_pages(k, LENGTHS_K, page_size, device, seed)
        v, _ = into_pages(v, LENGTHS_K, page_size, device, seed)
        arrays["block_table"] = table
    remaining = [max(0, high - low) for low, high in zip(leftpad, used, strict=True)]
    wanted = private_varlen(q, *kept, cu_q, ends(remaining, device))
    calls.assert_near(private_varlen(q, k, v, cu_q, cu_k, **arrays), wanted)


@everywhere
def test_zero_tensors_clears_rows_outside_every_sequence(device, seed):
    q, k, v = (x.detach() for x in operands(device, seed, seqlen_q=100, seqlen_k=100))
    cu_q, cu_k = calls.int32([10, 40, 70], device), calls.int32([0, 30, 100], device)
    out, lse = private_varlen(q, k, v, cu_q, cu_k, zero_tensors=True)
    plain_out, plain_lse = private_varlen(q, k, v, cu_q, cu_k)
    calls.assert_equal((out[10:70], lse[:, 10:70]), (plain_out[10:70], plain_lse[:, 10:70]))
    for rows in (slice(0, 10), slice(70, None)):
        assert out[rows].count_nonzero() == 0 and (lse[:, rows] == -math.inf).all()
