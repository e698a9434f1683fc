"""Calls over a cache that contradict themselves: each raises, quotes both values, and leaves the caches untouched."""

import re

import pytest
import torch

from flash_attn import flash_attn_with_kvcache
from flash_attn.errors import InvalidArgument
from tests.support.kvcache import bits

B, SQ, H, HK, D, ROOM, NEW = 2, 3, 4, 2, 32, 24, 2
PAGE, NUM_PAGES, MAX_PAGES = 8, 7, 3


def zeros(*shape, dtype=torch.float16):
    return torch.zeros(shape, dtype=dtype)


def ints(*values, dtype=torch.int32):
    return torch.tensor(values, dtype=dtype)


def plain(**changes):
    """A right call without new tokens, changed."""
    return (
        dict(
            q=zeros(B, SQ, H, D), k_cache=zeros(B, ROOM, HK, D), v_cache=zeros(B, ROOM, HK, D), cache_seqlens=ints(5, 9)
        )
        | changes
    )


def appending(**changes):
    return plain(k=zeros(B, NEW, HK, D), v=zeros(B, NEW, HK, D)) | changes


def turning(**changes):
    return appending(rotary_cos=zeros(ROOM, 8), rotary_sin=zeros(ROOM, 8)) | changes


def paging(**changes):
    pages = dict(k_cache=zeros(NUM_PAGES, PAGE, HK, D), v_cache=zeros(NUM_PAGES, PAGE, HK, D))
    return appending(**pages, block_table=ints(*range(6)).view(B, MAX_PAGES)) | changes


BAD = {
    "q of three dimensions": (plain(q=zeros(B, H, D)), "must have shape", "(2, 4, 32)"),
    "dtype of q": (plain(q=zeros(B, SQ, H, D, dtype=torch.int32)), "only support fp16 and bf16", "torch.int32"),
    "dtype of the key cache": (
        plain(k_cache=zeros(B, ROOM, HK, D, dtype=torch.bfloat16)),
        "query and key must have the same dtype",
        "torch.float16",
        "torch.bfloat16",
    ),
    "dtype of the value cache": (
        plain(v_cache=zeros(B, ROOM, HK, D, dtype=torch.float32)),
        "query and value must have the same dtype",
        "torch.float16",
        "torch.float32",
    ),
    "head dim": (
        plain(k_cache=zeros(B, ROOM, HK, 16), v_cache=zeros(B, ROOM, HK, 16)),
        "q's head size 32",
        "(2, 24, 2, 16)",
    ),
    "head dim too large": (
        plain(q=zeros(B, SQ, H, 257), k_cache=zeros(B, ROOM, HK, 257), v_cache=zeros(B, ROOM, HK, 257)),
        "at most 256",
        "257",
    ),
    "caches differ": (plain(v_cache=zeros(B, ROOM - 1, HK, D)), "(2, 24, 2, 32)", "(2, 23, 2, 32)"),
    "heads": (plain(q=zeros(B, SQ, 3, D)), "must divide number of heads in query", "2 and 3"),
    "batch of the cache": (
        plain(k_cache=zeros(1, ROOM, HK, D), v_cache=zeros(1, ROOM, HK, D)),
        "batch size 2",
        "(1, 24, 2, 32)",
    ),
    "stride of the key cache": (
        plain(k_cache=zeros(B, ROOM, HK, 2 * D)[..., ::2]),
        "k_cache must have contiguous last dimension",
        "(3072, 128, 64, 2)",
    ),
    "stride of the value cache": (
        plain(v_cache=zeros(B, ROOM, D, HK).transpose(2, 3)),
        "v_cache must have contiguous last dimension",
        "(1536, 64, 1, 2)",
    ),
    "dtype of cache_seqlens": (
        plain(cache_seqlens=ints(5, 9, dtype=torch.int64)),
        "seqlens_k must have dtype int32",
        "torch.int64",
    ),
    "shape of cache_seqlens": (plain(cache_seqlens=ints(5, 9, 1)), "seqlens_k must have shape (2,)", "(3,)"),
    "dtype of cache_batch_idx": (
        plain(cache_batch_idx=ints(0, 1, dtype=torch.int64)),
        "cache_batch_idx must have dtype int32",
        "torch.int64",
    ),
    "shape of cache_batch_idx": (plain(cache_batch_idx=ints(0)), "cache_batch_idx must have shape (2,)", "(1,)"),
    "dtype of cache_leftpad": (
        plain(cache_leftpad=ints(0, 1, dtype=torch.int16)),
        "leftpad_k must have dtype int32",
        "torch.int16",
    ),
    "shape of cache_leftpad": (plain(cache_leftpad=ints(0)), "leftpad_k must have shape (2,)", "(1,)"),
    "k without v": (appending(v=None), "If key is supplied, value must also be passed in", "(2, 2, 2, 32)"),
    "v without k": (appending(k=None), "If value is supplied, key must also be passed in", "(2, 2, 2, 32)"),
    "k without lengths": (appending(cache_seqlens=None), "seqlens_k must also be passed in", "(2, 2, 2, 32)", "None"),
    "dtype of k": (
        appending(k=zeros(B, NEW, HK, D, dtype=torch.float32)),
        "Key must have the same dtype as query",
        "torch.float32 and torch.float16",
    ),
    "dtype of v": (
        appending(v=zeros(B, NEW, HK, D, dtype=torch.bfloat16)),
        "Value must have the same dtype as query",
        "torch.bfloat16 and torch.float16",
    ),
    "shape of k": (appending(k=zeros(B, NEW, H, D)), "k must have shape", "(2, 2, 2, 32)", "(2, 2, 4, 32)"),
    "dimensions of k": (appending(k=zeros(NEW)), "k must have shape", "got (2,)"),
    "shape of v": (appending(v=zeros(B, NEW + 1, HK, D)), "v must have shape", "(2, 2, 2, 32)", "(2, 3, 2, 32)"),
    "more new tokens than the cache holds": (
        appending(k=zeros(B, 25, HK, D), v=zeros(B, 25, HK, D)),
        "must have seqlen <= the seqlen of the KV cache",
        "25 and 24",
    ),
    "no room, int": (appending(cache_seqlens=23), "holds 24 tokens", "23 and 2"),
    "too long, int": (plain(cache_seqlens=25), "holds 24 tokens", "25 and 0"),
    "no room, tensor": (appending(cache_seqlens=ints(3, 23)), "holds 24 tokens", "23 and 2"),
    "no room, pages": (paging(cache_seqlens=ints(3, 23)), "holds 24 tokens", "23 and 2"),
    "rotary without k": (
        turning(k=None, v=None),
        "new key / value to be appended to KV cache must also be provided",
        "(24, 8)",
    ),
    "cos without sin": (turning(rotary_sin=None), "If rotary cos is provided, rotary sin must also be provided"),
    "sin without cos": (turning(rotary_cos=None), "If rotary sin is provided, rotary cos must also be provided"),
    "rotary_dim past the head": (
        turning(rotary_cos=zeros(ROOM, 24), rotary_sin=zeros(ROOM, 24)),
        "rotary_dim must be <= headdim",
        "48 and 32",
    ),
    "rotary_dim no multiple": (turning(rotary_cos=zeros(ROOM, 4), rotary_sin=zeros(ROOM, 4)), "divisible by 16", "8"),
    "rotary_dim 0": (turning(rotary_cos=zeros(ROOM, 0), rotary_sin=zeros(ROOM, 0)), "divisible by 16", "got 0"),
    "too few angles": (
        turning(rotary_cos=zeros(23, 8), rotary_sin=zeros(23, 8)),
        "cos/sin seqlen must be at least the seqlen of KV cache",
        "23 and 24",
    ),
    "shape of cos": (turning(rotary_cos=zeros(1, ROOM, 8)), "rotary_cos must have shape", "(1, 24, 8)"),
    "shape of sin": (turning(rotary_sin=zeros(ROOM, 16)), "rotary_sin must have shape (24, 8)", "(24, 16)"),
    "dtype of cos": (
        turning(rotary_cos=zeros(ROOM, 8, dtype=torch.float32)),
        "rotary_cos must have the same dtype as query",
        "torch.float32 and torch.float16",
    ),
    "dtype of sin": (
        turning(rotary_sin=zeros(ROOM, 8, dtype=torch.float32)),
        "rotary_sin must have the same dtype as query",
        "torch.float32 and torch.float16",
    ),
    "table and batch index": (
        paging(cache_batch_idx=ints(0, 1)),
        "Paged KVcache does not support cache_batch_idx",
        "(2, 3)",
        "(2,)",
    ),
    "dtype of the table": (
        paging(block_table=ints(*range(6), dtype=torch.int64).view(B, 3)),
        "block_table must have dtype torch.int32",
        "torch.int64",
    ),
    "batch of the table": (paging(block_table=ints(*range(9)).view(3, 3)), "batch size 2", "(3, 3)"),
    "dimensions of the table": (paging(block_table=ints(*range(6))), "block_table must have shape", "(6,)"),
    "pages without tokens": (
        paging(k_cache=zeros(NUM_PAGES, 0, HK, D), v_cache=zeros(NUM_PAGES, 0, HK, D)),
        "page_block_size",
        "(7, 0, 2, 32)",
    ),
    "too few angles for the table": (
        paging(rotary_cos=zeros(23, 8), rotary_sin=zeros(23, 8)),
        "at least the seqlen of KV cache",
        "23 and 24",
    ),
    "a table of too many tokens": (
        paging(
            k_cache=zeros(1, 1, HK, D).expand(1, 2**16, HK, D),
            v_cache=zeros(1, 1, HK, D).expand(1, 2**16, HK, D),
            block_table=ints(0).view(1, 1).expand(B, 2**16),
        ),
        "at most 2147483647 tokens",
        "4294967296",
    ),
    "num_splits": (plain(num_splits=129), "num_splits > 128 not supported", "129"),
    "num_splits below 0": (plain(num_splits=-1), "0 chooses a number", "-1"),
    "softcap": (plain(softcap=-1.0), "softcap must be finite and at least 0", "-1.0"),
    "softmax_scale": (plain(softmax_scale=float("nan")), "softmax_scale must be finite", "nan"),
    "window": (plain(window_size=(-2, 0)), "window_size left", "-2"),
    "slopes' dtype": (plain(alibi_slopes=zeros(H)), "ALiBi slopes must have dtype fp32", "torch.float16"),
    "slopes' shape": (plain(alibi_slopes=zeros(HK, dtype=torch.float32)), "(4,) or (2, 4)", "(2,)"),
    "device of the lengths": (plain(cache_seqlens=ints(5, 9).to("meta")), "q's device", "cpu", "meta"),
}


@pytest.mark.parametrize("name", BAD)
def test_kvcache_refuses_and_leaves_the_caches_untouched(name):
    arguments, *words = BAD[name]
    caches = arguments["k_cache"], arguments["v_cache"]
    for cache in caches:
        cache.fill_(2)
    before = [bits(cache).clone() for cache in caches]
    for x in (arguments.get("k"), arguments.get("v")):
        if x is not None:
            x.fill_(1)
    with pytest.raises(InvalidArgument, match=re.escape(words[0])) as error:
        flash_attn_with_kvcache(**arguments)
    missing = [word for word in words if word not in str(error.value)]
    assert not missing, f"{error.value} does not say {missing}"
    assert all(torch.equal(bits(cache), old) for cache, old in zip(caches, before, strict=True))


@pytest.mark.parametrize("make", [plain, appending, turning, paging])
def test_the_calls_that_these_are_made_from_are_right(make):
    assert flash_attn_with_kvcache(**make()).shape == (B, SQ, H, D)


def test_a_refusal_is_not_remembered_as_a_plan():
    """The lengths are not part of a plan: the same shapes with other lengths run, or not, each time."""
    for _ in range(2):
        flash_attn_with_kvcache(**appending(cache_seqlens=22))
        with pytest.raises(InvalidArgument):
            flash_attn_with_kvcache(**appending(cache_seqlens=23))
