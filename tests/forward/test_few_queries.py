"""Few queries of many keys, dense, packed and paged: what a decoding step of a padded or a continuous batch calls.

The portable backend shares the keys out over programs, as it does those of a cache.
"""

import math
from itertools import accumulate, pairwise

import pytest
import torch

import flash_attn_2_cuda
from flash_attn import flash_attn_varlen_func, launch
from flash_attn.backends import portable_cache
from flash_attn.hardware import Hardware
from flash_attn.launch import decode
from flash_attn.launch.decode import MANY_KEYS, few_queries
from flash_attn.problem import AttentionProblem
from tests.support import calls
from tests.support.cases import FEW_QUERIES_CASES, FP16, SMALL_FEW_QUERIES_CASES, with_sinks
from tests.support.inputs import make_inputs
from tests.support.tolerance import expected

H200, SMALL_GPU = Hardware("cuda", "sm_90", 132, 227 * 1024), Hardware("cuda", "sm_86", 20, 99 * 1024)
GPU_CASES = FEW_QUERIES_CASES + with_sinks(FEW_QUERIES_CASES[::4])


@pytest.fixture
def device(request):
    with calls.running_on(request.param) as device:
        yield device


@pytest.fixture
def shared_out(monkeypatch):
    """The calls that went to the decode kernel, which 32 keys suffice for here: the interpreter is slow."""
    seen = []
    monkeypatch.setattr(decode, "MANY_KEYS", 32)
    monkeypatch.setattr(decode, "KEYS_PER_QUERY", 8)
    monkeypatch.setattr(decode, "prefers_decode", lambda *_sizes: True)
    attend = portable_cache.attend_few_queries
    monkeypatch.setattr(portable_cache, "attend_few_queries", lambda *call: seen.append(call) or attend(*call))
    return seen


everywhere = pytest.mark.parametrize("device", calls.places("gpu", "interpreter"), indirect=True)
every_case = pytest.mark.parametrize(
    "case, device",
    calls.placed({"gpu": GPU_CASES, "interpreter": SMALL_FEW_QUERIES_CASES}),
    indirect=["device"],
)


@every_case
def test_forward_matches_the_truth(case, device, seed, shared_out):
    inputs = make_inputs(case, device, seed)
    results, _ = calls.forward(case, inputs, seed)
    expected(case, inputs).check(**results)
    assert len(shared_out) == 1


@pytest.mark.parametrize(
    "case, device",
    calls.placed({"gpu": GPU_CASES[::5], "interpreter": SMALL_FEW_QUERIES_CASES[-2:]}),
    indirect=["device"],
)
def test_gradients_follow_from_its_softmax_lse(case, device, seed, shared_out):
    inputs = make_inputs(case, device, seed)
    results, _ = calls.forward_and_backward(case, inputs, seed)
    expected(case, inputs).check(**results)
    assert len(shared_out) == 1


def packed(device, seed, seqlens_q, seqlens_k, headdim=32, tail=0):
    """(q, k, v, cu_seqlens_q, cu_seqlens_k) of 4 and 2 heads in fp16, with `tail` queries of no sequence behind the others."""
    ends_q, ends_k = ([0, *accumulate(lengths)] for lengths in (seqlens_q, seqlens_k))
    shapes = (ends_q[-1] + tail, 4, headdim), (ends_k[-1], 2, headdim), (ends_k[-1], 2, headdim)
    tensors = [calls.randn(*shape, dtype=FP16, device=device, seed=seed + i) for i, shape in enumerate(shapes)]
    return *tensors, calls.int32(ends_q, device), calls.int32(ends_k, device)


def in_pages(x, cu_seqlens, page_size, seed):
    """(pages, block_table): every sequence in pages of its own, in no order; the table ends in -1."""
    ends = cu_seqlens.tolist()
    counts = [-(-(end - begin) // page_size) for begin, end in pairwise(ends)]
    order = torch.randperm(sum(counts) + 2, generator=torch.Generator().manual_seed(seed)).tolist()
    pages = torch.full((len(order), page_size, *x.shape[1:]), math.nan, dtype=x.dtype, device=x.device)
    table = torch.full((len(counts), max(counts) + 1), -1, dtype=torch.int32)
    for sequence, count in enumerate(counts):
        for index in range(count):
            page = order.pop()
            begin = ends[sequence] + index * page_size
            rows = x[begin : min(begin + page_size, ends[sequence + 1])]
            pages[page, : len(rows)] = rows
            table[sequence, index] = page
    return pages, table.to(x.device)


@everywhere
@pytest.mark.parametrize("page_size", [16, 24, 64])
def test_pages(page_size, device, seed, shared_out):
    """The decoding step of a continuous batch: packed queries, keys in pages, a sequence without a query."""
    q, k, v, cu_q, cu_k = packed(device, seed, (1, 0, 2, 1), (70, 5, 47, 1))
    options = dict(causal=True, window_size=(50, 0), return_attn_probs=True)
    wanted = flash_attn_varlen_func(q, k, v, cu_q, cu_k, 2, 70, **options)[:2]
    pages_k, table = in_pages(k, cu_k, page_size, seed)
    pages_v, _ = in_pages(v, cu_k, page_size, seed)
    found = flash_attn_varlen_func(q, pages_k, pages_v, cu_q, cu_k, 2, 70, block_table=table, **options)[:2]
    assert len(shared_out) == 2
    calls.assert_near(found, wanted)


@everywhere
@pytest.mark.parametrize("page_size", [None, 16])
def test_used_lengths_and_left_padding(page_size, device, seed, shared_out):
    """Only keys from leftpad_k to seqused_k count: the results are those of a batch that has no others."""
    seqlens_k, used, leftpad = (70, 40, 33), (50, 40, 7), (13, 0, 6)
    q, k, v, cu_q, cu_k = packed(device, seed, (1, 2, 1), seqlens_k)
    bounds = list(zip(leftpad, used, strict=True))
    kept = [
        torch.cat([part[low:high] for part, (low, high) in zip(x.split(seqlens_k), bounds, strict=True)])
        for x in (k, v)
    ]
    ends = calls.int32([0, *accumulate(high - low for low, high in bounds)], device)
    wanted = flash_attn_varlen_func(q, *kept, cu_q, ends, 2, 70, causal=True, return_attn_probs=True)[:2]
    table = None
    if page_size is not None:
        k, table = in_pages(k, cu_k, page_size, seed)
        v, _ = in_pages(v, cu_k, page_size, seed)
    arrays = dict(seqused_k=calls.int32(used, device), leftpad_k=calls.int32(leftpad, device), block_table=table)
    words = (2, 70, 0.0, q.shape[-1] ** -0.5, True)
    found = torch.ops.flash_attn._flash_attn_varlen_forward(q, k, v, cu_q, cu_k, *words, **arrays)[:2]
    assert len(shared_out) == 2
    calls.assert_near(found, wanted)


@everywhere
def test_queries_of_no_sequence_are_not_written(device, seed, shared_out):
    """A graph's batch is padded with tokens behind the last sequence, and with sequences that have none."""
    q, k, v, cu_q, cu_k = packed(device, seed, (1, 1, 0, 0), (50, 70, 0, 0), tail=2)
    out = flash_attn_varlen_func(q, k, v, cu_q, cu_k, 1, 70)
    alone = flash_attn_varlen_func(q[:2], k, v, cu_q[:3], cu_k[:3], 1, 70)
    assert len(shared_out) == 2
    calls.assert_equal(out[:2], alone)
    assert out[2:].isnan().all(), "memory that was not written holds NaN here"


@everywhere
@pytest.mark.parametrize(
    "cu_q, cu_k",
    [
        ([0, 2, 1, 3], [0, 100, 20, 120]),
        ([0, 1, 100, 3], [0, 60, 10**9, 120]),
        ([-5, 1, 2, 2**31 - 1], [-(2**31), 60, 80, 120]),
        ([0, 1, 2, 3], [700, 800, 900, 2**31 - 1]),
    ],
    ids=["decreasing", "past the end", "extremes", "all keys past the end"],
)
def test_lengths_stay_inside(cu_q, cu_k, device, seed, shared_out):
    """Operands lie in the middle of larger ones, whose other values are NaN."""
    q, k, v, *_ = packed(device, seed, (1, 1, 1), (40, 40, 40))
    wide = [torch.full((len(x) + 256, *x.shape[1:]), math.nan, dtype=x.dtype, device=device) for x in (q, k, v)]
    for buffer, x in zip(wide, (q, k, v), strict=True):
        buffer[128:-128] = x
    inside = [buffer[128:-128] for buffer in wide]
    lengths = calls.int32(cu_q, device), calls.int32(cu_k, device)
    out, lse, _ = flash_attn_varlen_func(*inside, *lengths, 1, 90, return_attn_probs=True)
    assert len(shared_out) == 1 and out.shape == q.shape and lse.shape == (4, 3)
    seen = max(cu_q[0], 0)
    assert out[seen : seen + 1].isfinite().all(), "keys outside the tensors were read"


@everywhere
def test_zero_tensors(device, seed, shared_out):
    q, k, v, cu_q, cu_k = packed(device, seed, (1, 1), (40, 40), tail=3)
    optional = (None, cu_q, cu_k, None, None, None, None)
    words = (1, 40, 0.0, 0.2, True, False, -1, -1, 0.0, False, None)
    out, lse, *_ = flash_attn_2_cuda.varlen_fwd(q, k, v, *optional, *words)
    assert len(shared_out) == 1
    assert (out[2:] == 0).all() and (lse[:, 2:] == -math.inf).all()
    assert out[:2].isfinite().all() and lse[:, :2].isfinite().all()


@everywhere
def test_batch_invariance_keeps_the_forward_kernel(device, seed, shared_out):
    """Whose sums know no other sequence, however long the longest one is."""
    q, k, v, cu_q, cu_k = packed(device, seed, (1, 1), (20, 60))
    with launch.pinned(keys_per_split=64):
        together = flash_attn_varlen_func(q, k, v, cu_q, cu_k, 1, 60)
        alone = flash_attn_varlen_func(q[:1], k[:20], v[:20], cu_q[:2], cu_k[:2], 1, 20)
    assert not shared_out
    calls.assert_equal(together[:1], alone)


def test_what_counts_as_few():
    problem = AttentionProblem("dense", "bfloat16", 1, 1, MANY_KEYS, 32, 8, 128)
    assert few_queries(problem, H200)
    assert few_queries(problem._replace(seqlen_q=16, seqlen_k=256), H200)
    assert not few_queries(problem._replace(seqlen_q=16, seqlen_k=255), H200), "16 keys a query"
    cache = problem._replace(layout="cache", seqlen_q=32, seqlen_k=1 << 20)
    assert not few_queries(cache, H200), "more rows than a tile"
    assert few_queries(problem._replace(seqlen_q=16, nheads_k=32, seqlen_k=1 << 20), H200)
    assert not few_queries(problem._replace(seqlen_k=MANY_KEYS - 1), H200)
    assert not few_queries(problem._replace(dropout=True), H200), "the decode kernel drops nothing"
    assert not few_queries(problem._replace(seqlen_q=0), H200) and not few_queries(problem._replace(nheads=0), H200)


def test_few_tiles_count_as_few_where_a_merge_pays():
    """Heads and sequences that leave most of a GPU idle when each tile stays with one program."""
    chunk = AttentionProblem("varlen", "bfloat16", 1, 128, 8192, 8, 8, 128, (None, 0))
    assert few_queries(chunk, H200)
    assert not few_queries(chunk._replace(nheads=64, nheads_k=64), H200), "128 tiles of the decode kernel fill no gap"
    assert not few_queries(chunk._replace(batch_size=32, headdim=64), H200), (
        "256 tiles of the forward kernel leave none"
    )
    assert not few_queries(chunk._replace(layout="paged_cache"), H200), "`attend_cache` chooses"
    assert not few_queries(chunk._replace(nheads=16, nheads_k=16), SMALL_GPU), (
        "20 multiprocessors are busy with 16 tiles"
    )
    with launch.pinned(keys_per_split=256):
        assert not few_queries(chunk, H200), "the batch would choose the kernel"
