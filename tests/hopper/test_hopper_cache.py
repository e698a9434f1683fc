"""The Hopper forward over caches and pages, asked for by name: on a Hopper GPU, and partition by partition on the CPU."""

import itertools

import pytest
import torch
from torch import Tensor

from flash_attn import flash_attn_varlen_func, flash_attn_with_kvcache, launch, reference
from flash_attn.backends import cache_append, portable, portable_cache
from flash_attn.backends.base import ForwardResult
from flash_attn.errors import UnsupportedProblem
from flash_attn.kvcache.kv_attention import batch_invariant
from flash_attn.launch.hopper import FORWARD, FOUR_CONSUMERS, FOUR_SKIPPING, TWO_PARTS, TWO_SKIPPING, TWO_SKIPPING_Q
from tests.support import calls
from tests.support.cases import BF16, FP16
from tests.support.hopper_forms import MASKS, every_other
from tests.support.kvcache import CacheCase, changed, make_cache_inputs, run_and_check
from tests.support.tolerance import assert_close


@pytest.fixture
def device(request, seed, monkeypatch):
    """The decode kernel, which few queries would take, is out of the way; on the CPU PyTorch appends."""
    monkeypatch.setattr(portable_cache, "plan_decode", lambda *call: None)
    if request.param == "interpreted hopper":
        append = cache_append.append_tokens
        monkeypatch.setattr(portable_cache, "append_tokens", lambda operands, new, memo: append(operands, new))
    with calls.running_on(request.param, seed) as device:
        yield device


everywhere = pytest.mark.parametrize("device", calls.places("interpreted hopper", "hopper"), indirect=True)


def spread(names: str, product: list[tuple]) -> pytest.MarkDecorator:
    """A quarter of a product on a GPU, where each compiles a kernel, and a fifth on the CPU, where each takes half a second."""
    gpu, cpu = calls.places("hopper", "interpreted hopper")
    placed = [(gpu, values) for values in product[::4]] + [(cpu, values) for values in product[1::5]]
    return pytest.mark.parametrize(
        f"{names}, device",
        [
            pytest.param(*values, place.values[0], marks=place.marks, id="-".join(map(str, (*values, place.values[0]))))
            for place, values in placed
        ],
        indirect=["device"],
    )


ROWS = {
    "64": (64, FORWARD[64]),
    "64, four in turn": (64, FOUR_CONSUMERS),
    "64, four that skip": (64, FOUR_SKIPPING),
    "64, two that skip": (64, TWO_SKIPPING_Q),
    "96": (96, FORWARD[128]),
    "128": (128, FORWARD[128]),
    "128, two that skip": (128, TWO_SKIPPING),
    "192": (192, TWO_PARTS),
    "256": (256, FORWARD[256]),
}
PLACES = {
    "rows": {},
    "rows, left padding": dict(leftpad=(7, 130, 0)),
    "rows by index": dict(batch_idx=True),
    "rows by index, left padding": dict(batch_idx=True, leftpad=(64, 1, 0)),
    "pages of 16": dict(page=16),
    "pages of 32": dict(page=32),
    "pages of 48": dict(page=48),
    "pages of 192": dict(page=192),
    "pages of 256": dict(page=256),
}


def case_of(headdim: int, **fields) -> CacheCase:
    """New tokens behind caches of several lengths, one of them empty."""
    return changed(CacheCase("prefill", BF16, headdim, 4, 2, 70, (300, 191, 0), 70), **fields)


def check(out: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor, **words) -> None:
    """Results of standard normal values, or zeros, against the truth."""
    wanted, wanted_lse = reference.attention(q, k, v, **words)
    matched, _ = reference.attention(q, k, v, compute_dtype=torch.float32, round_to=q.dtype, **words)
    assert_close(out, wanted, matched, "out", terms=1.0)
    assert_close(lse, wanted_lse, None, "lse")


@spread("row, place, mask", every_other(ROWS, PLACES, MASKS))
def test_new_tokens(row, place, mask, device, seed):
    headdim, config = ROWS[row]
    with launch.pinned(hopper_forward=config):
        run_and_check(case_of(headdim, **PLACES[place], **MASKS[mask]), device, seed)


OTHERS = {
    "nothing new": dict(seqlen_new=0, seqlens=(300, 191, 64)),
    "fewer new than queries": dict(seqlen_new=3, causal=True),
    "full caches": dict(seqlen_new=0, seqlens=(256, 256), seqlens_as="none", page=0, spare=0),
    "equal lengths": dict(seqlens=(77, 77), seqlens_as="int"),
    "angles": dict(rotary="halves", rotary_dim=32, causal=True),
    "interleaved angles": dict(rotary="interleaved", rotary_dim=64),
    "softcap": dict(softcap=3.0, causal=True),
    "alibi": dict(alibi="bh", causal=True),
    "sink": dict(sink=BF16, window=(100, 0)),
    "no keys": dict(seqlen_new=0, seqlens=(0, 0), causal=True),
    "more queries than keys": dict(seqlen_q=200, seqlen_new=2, seqlens=(5, 60), causal=True),
    "one query": dict(seqlen_q=1, seqlen_new=1),
    "tiles of two consumers": dict(seqlen_q=257, seqlen_new=257, seqlens=(3,), causal=True),
}


@spread("page, other, headdim", list(itertools.product([0, 16, 64, 256], OTHERS, [64, 128])))
def test_other_calls(headdim, other, page, device, seed):
    """Configurations as they are chosen."""
    run_and_check(case_of(headdim, **{"dtype": FP16, "page": page} | OTHERS[other]), device, seed)


@everywhere
@pytest.mark.parametrize("headdim, page", [(64, 16), (64, 512), (128, 16), (128, 128), (256, 128)])
def test_pages_change_no_bit(headdim, page, device, seed):
    inputs = make_cache_inputs(case_of(headdim, seqlens=(490, 191, 3), spare=22, seqlen_new=0), device, seed)
    rows = inputs.arguments | dict(causal=True)
    num_pages = len(rows["q"]) * 512 // page
    order = torch.randperm(num_pages, generator=torch.Generator().manual_seed(seed)).to(device)
    pools = [cache.reshape(num_pages, page, *cache.shape[2:])[order] for cache in inputs.caches]
    pages = rows | dict(k_cache=pools[0], v_cache=pools[1], block_table=order.argsort().view(-1, 512 // page).int())
    assert all(map(torch.equal, flash_attn_with_kvcache(**pages), flash_attn_with_kvcache(**rows)))


@everywhere
@pytest.mark.parametrize("headdim", [64, 256])
def test_a_table_that_makes_no_sense(headdim, device, seed):
    """Pages that do not exist have zeros for keys and values; nothing outside the pool is read."""
    case = case_of(headdim, page=128, seqlen_new=0, seqlens=(300, 384, 130))
    inputs = make_cache_inputs(case, device, seed)
    table, (k_cache, _) = inputs.arguments["block_table"], inputs.caches
    for place, page in (((0, 0), -1), ((1, 1), k_cache.shape[0]), ((2, 1), 2**31 - 1)):
        table[place] = page
    zeros = torch.zeros(1, *k_cache.shape[1:], dtype=case.dtype, device=device)
    k, v = (torch.cat((cache, zeros)) for cache in inputs.caches)
    table = table.where((table >= 0) & (table < k_cache.shape[0]), torch.tensor(len(k) - 1, dtype=torch.int32)).long()
    out, lse = flash_attn_with_kvcache(**inputs.arguments)
    for b, length in enumerate(case.seqlens):
        keys, values = (x[table[b]].flatten(0, 1)[None, :length] for x in (k, v))
        part = slice(b, b + 1)
        check(out[part], lse[part], inputs.arguments["q"][part], keys, values)


@everywhere
@pytest.mark.parametrize("lengths", [(10_000, -5, 130), (2**31 - 1, -(2**31), 0)], ids=str)
@pytest.mark.parametrize("page", [0, 128])
def test_lengths_that_make_no_sense(page, lengths, device, seed):
    """No access outside the tensors, and an end."""
    inputs = make_cache_inputs(case_of(64, page=page, causal=True, seqlen_new=0), device, seed)
    inputs.arguments["cache_seqlens"] = calls.int32(lengths, device)
    flash_attn_with_kvcache(**inputs.arguments)


@everywhere
@pytest.mark.parametrize("window", [(-1, -1), (-1, 0), (100, 0)], ids=str)
@pytest.mark.parametrize("headdim, page", [(64, 16), (64, 128), (128, 256), (256, 32)])
def test_packed_queries(headdim, page, window, device, seed):
    """Queries of several lengths over pages, as flash_attn_varlen_func has them."""
    case = CacheCase("packed", BF16, headdim, 4, 2, 130, (300, 191, 0, 64), page=page, window=window)
    inputs = make_cache_inputs(case, device, seed)
    lengths_q, q = (130, 1, 20, 64), inputs.arguments["q"]
    rows = torch.cat([torch.arange(n) + b * case.seqlen_q for b, n in enumerate(lengths_q)]).to(device)
    ends = [calls.int32([0, *itertools.accumulate(lengths)], device) for lengths in (lengths_q, case.seqlens)]
    packed = q.flatten(0, 1)[rows]
    out, lse, _ = flash_attn_varlen_func(
        packed, *inputs.caches, *ends, max(lengths_q), max(case.seqlens), window_size=window,
        block_table=inputs.arguments["block_table"], return_attn_probs=True,
    )  # fmt: skip
    for b, (n, start) in enumerate(zip(lengths_q, ends[0].tolist(), strict=False)):
        page_of, slot = (x[b][: case.seqlens[b]].to(device) for x in (inputs.pages, inputs.slots))
        keys, values = (cache[page_of, slot][None] for cache in inputs.caches)
        part = slice(start, start + n)
        check(out[None, part], lse[None, :, part], packed[None, part], keys, values, window=case.interval)


REFUSED = {
    "pages of few tokens": (dict(page=8), "pages of 8"),
    "left padding of pages": (dict(page=128, leftpad=(7, 3, 0)), "left padding"),
    "permuted": (dict(permuted=True), "evenly spaced"),
    "an odd head dim": (dict(headdim=60), "multiple of 8"),
}


@pytest.mark.parametrize("device", calls.places("interpreted hopper"), indirect=True)
@pytest.mark.parametrize("fields, words", REFUSED.values(), ids=REFUSED)
def test_what_is_refused(fields, words, device, seed):
    case = case_of(**{"headdim": 64} | fields)
    with pytest.raises(UnsupportedProblem, match=words):
        run_and_check(case, device, seed)


@pytest.mark.parametrize("device", calls.places("interpreted hopper"), indirect=True)
def test_batch_invariance_keeps_one_backend(device, seed, monkeypatch):
    """A batch's size decides whether this backend is chosen, so its kernel stays out of what must not depend on that."""
    attended = []
    monkeypatch.setattr(portable, "launch_forward", lambda problem, *call: attended.append(problem) or RESULT)
    inputs = make_cache_inputs(case_of(64, seqlen_new=0), device, seed)
    flash_attn_with_kvcache(**inputs.arguments)
    assert not attended
    with batch_invariant():
        flash_attn_with_kvcache(**inputs.arguments)
    assert len(attended) == 1


RESULT = ForwardResult(torch.empty(0), torch.empty(0))
