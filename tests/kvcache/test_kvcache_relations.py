"""Calls over a cache that must agree with each other: pages with rows, splits with none, batches with their parts."""

import pytest
import torch

import flash_attn_2_cuda
from flash_attn import flash_attn_func, flash_attn_with_kvcache, reference
from flash_attn.errors import InvalidArgument
from flash_attn.kvcache.kv_attention import batch_invariant
from tests.support import calls
from tests.support.cases import BF16, FP16
from tests.support.kvcache import CacheCase, bits, changed, make_cache_inputs


@pytest.fixture
def device(request):
    with calls.running_on(request.param) as device:
        yield device


everywhere = pytest.mark.parametrize("device", calls.places("cpu", "gpu", "interpreter"), indirect=True)
on_kernels = pytest.mark.parametrize("device", calls.places("gpu", "interpreter"), indirect=True)
SMALL = CacheCase("relation", FP16, 32, 4, 2, 1, (17, 40), 1, "halves", 32, causal=True, spare=6)
LARGE = CacheCase("relation", FP16, 128, 32, 8, 1, (700, 40, 3000, 1), 1, "halves", 128, causal=True, spare=1000)


def case_for(device, **fields):
    return changed(LARGE if device.type == "cuda" else SMALL, **fields)


def tokens(case, inputs):
    """The keys and values of every sequence, in order, wherever they lie."""
    found = []
    for cache in inputs.caches:
        for b, n in enumerate(case.seqlens):
            keys = slice(case.first_keys[b], n + case.seqlen_new)
            found.append(cache[inputs.pages[b][keys].to(cache.device), inputs.slots[b][keys].to(cache.device)])
    return found


@everywhere
@pytest.mark.parametrize(
    "fields", [dict(page=1), dict(page=16), dict(page=7), dict(batch_idx=True), dict(permuted=True)], ids=str
)
def test_where_tokens_lie_changes_nothing(fields, device, seed):
    """Pages, rows and strides: the same tokens, the same tiles, the same bits."""
    case = case_for(device)
    if device.type == "cuda":
        case = changed(case, spare=2375)  # room for 5376 tokens, whole pages of each size, as far as the tables reach
    other = changed(case, **fields)
    inputs, elsewhere = make_cache_inputs(case, device, seed), make_cache_inputs(other, device, seed)
    for b, n in enumerate(case.seqlens):
        for cache, target in zip(inputs.caches, elsewhere.caches, strict=True):
            places = elsewhere.pages[b][:n].to(device), elsewhere.slots[b][:n].to(device)
            target[places] = cache[inputs.pages[b][:n].to(device), inputs.slots[b][:n].to(device)]
    moved = {name: elsewhere.arguments[name] for name in ("k_cache", "v_cache", "block_table", "cache_batch_idx")}
    splits = 3  # a page's length changes the room, and with it the number that is chosen
    results = flash_attn_with_kvcache(**inputs.arguments | dict(num_splits=splits))
    calls.assert_equal(flash_attn_with_kvcache(**inputs.arguments | moved | dict(num_splits=splits)), results)
    calls.assert_equal(tokens(other, elsewhere), tokens(case, inputs))


@on_kernels
@pytest.mark.parametrize("num_splits", [2, 3, 7, 128])
def test_splits_give_one_pass(num_splits, device, seed):
    case = case_for(device)
    inputs = make_cache_inputs(case, device, seed)
    one = flash_attn_with_kvcache(**inputs.arguments | dict(num_splits=1))
    calls.assert_near(flash_attn_with_kvcache(**inputs.arguments | dict(num_splits=num_splits)), one)


@everywhere
@pytest.mark.parametrize("seqlen_q", [1, 40])
def test_batch_invariance(seqlen_q, device, seed):
    """A sequence alone, in a batch, in another order, and in a larger cache: the same bits."""
    case = case_for(device, seqlen_new=0, rotary="", seqlen_q=seqlen_q)
    inputs = make_cache_inputs(case, device, seed)
    arguments = inputs.arguments
    with batch_invariant(256 if device.type == "cuda" else 16):
        out, lse = flash_attn_with_kvcache(**arguments)
        order = list(reversed(range(case.batch_size)))
        per_batch = ("q", "k_cache", "v_cache", "cache_seqlens")
        turned = flash_attn_with_kvcache(
            **arguments | {name: arguments[name][order].contiguous() for name in per_batch}
        )
        calls.assert_equal([x[order] for x in turned], [out, lse])
        for b in range(case.batch_size):
            part = {name: arguments[name][b : b + 1] for name in per_batch}
            calls.assert_equal(flash_attn_with_kvcache(**arguments | part), [out[b : b + 1], lse[b : b + 1]])
        longer = {name: torch.cat([arguments[name]] * 3, 1) for name in ("k_cache", "v_cache")}
        calls.assert_equal(flash_attn_with_kvcache(**arguments | longer), [out, lse])
        calls.assert_equal(flash_attn_with_kvcache(**arguments | dict(num_splits=5)), [out, lse])


def test_batch_invariance_needs_keys():
    with pytest.raises(InvalidArgument, match="got 0"), batch_invariant(0):
        pass


@everywhere
@pytest.mark.parametrize("seqlen_q", [1, 5])
def test_a_full_cache_is_plain_attention(seqlen_q, device, seed):
    case = case_for(device, seqlen_q=seqlen_q, seqlens=(47, 47), seqlens_as="none", seqlen_new=0, rotary="")
    arguments = make_cache_inputs(case, device, seed).arguments
    plain = flash_attn_func(
        arguments["q"], arguments["k_cache"], arguments["v_cache"], causal=True, return_attn_probs=True
    )
    calls.assert_near(flash_attn_with_kvcache(**arguments), plain[:2])


@everywhere
def test_an_int_is_a_length_for_every_sequence(device, seed):
    case = case_for(device, seqlens=(21, 21), page=16)
    results = []
    for seqlens_as in ("int", "tensor"):
        inputs = make_cache_inputs(changed(case, seqlens_as=seqlens_as), device, seed)
        results.append([*flash_attn_with_kvcache(**inputs.arguments), *map(bits, inputs.caches)])
    calls.assert_equal(*results)


@everywhere
def test_a_chunk_is_its_tokens_one_by_one(device, seed):
    """Causal, rotated: five tokens appended at once, and one after the other."""
    case = case_for(device, seqlens=(17, 30), seqlen_q=5, seqlen_new=5)
    chunk, steps = (make_cache_inputs(case, device, seed).arguments for _ in range(2))
    out, lse = flash_attn_with_kvcache(**chunk)
    for i in range(5):
        one = {name: steps[name][:, i : i + 1] for name in ("q", "k", "v")}
        step = flash_attn_with_kvcache(**steps | one | dict(cache_seqlens=steps["cache_seqlens"] + i))
        calls.assert_near(step, [out[:, i : i + 1], lse[:, :, i : i + 1]], roundoffs=8.0)
    for name in ("k_cache", "v_cache"):
        calls.assert_equal(bits(steps[name]), bits(chunk[name]))


@everywhere
def test_the_shim_of_upstreams_extension(device, seed):
    case = case_for(device, window=(9, -1), softcap=2.0, alibi="h")
    inputs, again = (make_cache_inputs(case, device, seed).arguments for _ in range(2))
    wanted = flash_attn_with_kvcache(**inputs)
    names = "q k_cache v_cache k v cache_seqlens rotary_cos rotary_sin cache_batch_idx cache_leftpad block_table alibi_slopes"
    out = torch.empty_like(again["q"])
    numbers = (out, case.headdim**-0.5, True, 9, -1, 2.0, False, 0)
    results = flash_attn_2_cuda.fwd_kvcache(*(again[name] for name in names.split()), *numbers)
    assert results[0] is out
    calls.assert_equal(results, wanted)
    calls.assert_equal(bits(again["k_cache"]), bits(inputs["k_cache"]))


@everywhere
def test_views_of_one_buffer(device, seed):
    """Keys and values interleaved in one tensor, a cache in (seqlen, batch) order, q as a slice: as Megatron and unsloth do."""
    case = case_for(device, page=0)
    plain = make_cache_inputs(case, device, seed)
    strided = make_cache_inputs(case, device, seed).arguments
    k_cache, v_cache = strided["k_cache"], strided["v_cache"]
    both = torch.stack((k_cache, v_cache), 3).permute(1, 3, 0, 2, 4).contiguous().permute(2, 0, 1, 3, 4)
    q = torch.cat((strided["q"], strided["q"]), 2)[:, :, : case.nheads]
    k = strided["k"].transpose(1, 3).contiguous().transpose(1, 3)
    views = dict(q=q, k=k, k_cache=both[:, :, 0], v_cache=both[:, :, 1])
    calls.assert_equal(flash_attn_with_kvcache(**strided | views), flash_attn_with_kvcache(**plain.arguments))
    for view, cache in zip((both[:, :, 0], both[:, :, 1]), plain.caches, strict=True):
        calls.assert_equal(bits(view), bits(cache))


@pytest.mark.gpu
@pytest.mark.parametrize("device", calls.places("gpu"), indirect=True)
@pytest.mark.parametrize("page", [16, 64, 256])
def test_pages_beyond_32_bits(page, device, seed):
    """Pages 2**28 elements apart: the last one lies past 2**31; new tokens land there, too."""
    if torch.cuda.mem_get_info()[0] < 12 * 2**30:
        pytest.skip("needs 12 GB of free GPU memory")
    case = changed(LARGE, page=page, seqlens=(9 * page,), seqlen_q=2, seqlen_new=2, spare=page)
    num_pages, size = 11, page * case.nheads_k * case.headdim
    near, far = (make_cache_inputs(case, device, seed).arguments for _ in range(2))
    buffer = torch.zeros(num_pages * 2**28, dtype=case.dtype, device=device)
    for which, name in enumerate(("k_cache", "v_cache")):
        tokens = near[name][:num_pages].nan_to_num()
        view = buffer.as_strided(tokens.shape, (2**28, size // page, case.headdim, 1), which * size)
        near[name], far[name] = tokens, view.copy_(tokens)
    for arguments in (near, far):
        arguments["block_table"] = torch.arange(num_pages, dtype=torch.int32, device=device).roll(1)[None]
    calls.assert_equal(flash_attn_with_kvcache(**far), flash_attn_with_kvcache(**near))
    for name in ("k_cache", "v_cache"):
        calls.assert_equal(bits(far[name]), bits(near[name]))


@pytest.mark.gpu
@pytest.mark.parametrize("device", calls.places("gpu"), indirect=True)
def test_the_same_bits_every_time(device, seed):
    case = changed(LARGE, dtype=BF16, num_splits=0)
    inputs = make_cache_inputs(case, device, seed)
    first = flash_attn_with_kvcache(**inputs.arguments)
    for _ in range(50):
        calls.assert_equal(flash_attn_with_kvcache(**inputs.arguments), first)


@pytest.mark.gpu
@pytest.mark.parametrize("device", calls.places("gpu"), indirect=True)
@pytest.mark.parametrize("headdim", [64, 128, 256])
@pytest.mark.parametrize("nheads, seqlen_q", [(8, 1), (32, 1), (32, 9)])
def test_pages_change_no_bit_of_many_tiles(nheads, seqlen_q, headdim, device, seed):
    """A batch that fills the GPU, in rows, short pages and long ones; one sequence against the reference."""
    batch_size, room = 70, 768
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=generator, device=device, dtype=FP16)

    q, caches = normal(batch_size, seqlen_q, nheads, headdim), [normal(batch_size, room, 8, headdim) for _ in range(2)]
    seqlens = torch.randint(1, room + 1, (batch_size,), generator=generator, device=device, dtype=torch.int32)
    for cache in caches:  # what lies behind a sequence must not be seen
        cache[torch.arange(room, device=device) >= seqlens[:, None]] = float("nan")
    words = dict(cache_seqlens=seqlens, causal=True, return_softmax_lse=True, num_splits=1)
    rows = flash_attn_with_kvcache(q, *caches, **words)
    for page in (16, 24, 256):
        order = torch.randperm(batch_size * room // page, generator=generator, device=device)
        pages = [torch.empty_like(cache.view(-1, page, 8, headdim)) for cache in caches]
        for shuffled, cache in zip(pages, caches, strict=True):
            shuffled[order] = cache.view_as(shuffled)
        table = order.int().view(batch_size, -1)
        calls.assert_equal(flash_attn_with_kvcache(q, *pages, **words, block_table=table), rows)
    alone = [cache[-1:, : seqlens[-1]].double() for cache in caches]
    wanted, _ = reference.attention(q[-1:].double(), *alone, softmax_scale=headdim**-0.5, window=(None, 0))
    calls.assert_near(rows[0][-1:], wanted.half())
