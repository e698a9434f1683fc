"""The checks of a call over a cache, and its `AttentionProblem`: what `problem.describe` is to the other functions.

A batch index of the cache is a block table of one page as long as the cache; past this module the two are one.
"""

from typing import NamedTuple

from torch import Tensor

from flash_attn.errors import InvalidArgument
from flash_attn.problem import (
    DTYPES,
    INT32_MAX,
    AttentionProblem,
    bucket,
    canonical_window,
    check_block_table,
    check_device,
    check_head_terms,
    check_index,
    check_numbers,
    check_operands,
)
from flash_attn.tiling import copied_in_tiles, evenly_spaced

MAX_SPLITS = 128
ROTARY_MULTIPLE = 16


class CacheTensors(NamedTuple):
    """The tensors of a call besides q and the caches."""

    k: Tensor | None = None  # (batch, seqlen_new, nheads_k, headdim)
    v: Tensor | None = None
    rotary_cos: Tensor | None = None  # (positions, rotary_dim / 2)
    rotary_sin: Tensor | None = None
    cache_seqlens: Tensor | None = None  # (batch,), int32
    cache_batch_idx: Tensor | None = None
    cache_leftpad: Tensor | None = None
    block_table: Tensor | None = None  # (batch, max_pages), int32
    alibi_slopes: Tensor | None = None
    sinks: Tensor | None = None  # (nheads,)


def describe_cache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    tensors: CacheTensors,
    softmax_scale: float,
    causal: bool,
    window_size_left: int,
    window_size_right: int,
    softcap: float,
    num_splits: int,
    *,
    given_seqlens: bool = False,
) -> tuple[AttentionProblem, int, int]:
    """Checks a call; returns its problem, seqlen_q, and the tokens that the cache of a sequence can hold.

    `given_seqlens` says that the caller knows the lengths, although `tensors` does not hold them.

    Raises:
        InvalidArgument: shapes, dtypes, devices or ranges disagree; the message names both values.

    Source: the checks of upstream's mha_fwd_kvcache in flash_api.cpp, whose words the messages start with.
    """
    _check_caches(q, k_cache, v_cache)
    batch_size, seqlen_q, nheads, headdim = q.shape
    capacity = _check_places(q, k_cache, tensors)
    if capacity > INT32_MAX:
        raise InvalidArgument(f"the KV cache must hold at most {INT32_MAX} tokens a sequence, got room for {capacity}")
    _check_new_tokens(q, k_cache, tensors, capacity, given_seqlens)
    _check_rotary(q, tensors, capacity)
    check_numbers(0.0, softmax_scale, softcap, window_size_left, window_size_right)
    if not 0 <= num_splits <= MAX_SPLITS:
        raise InvalidArgument(
            f"num_splits > {MAX_SPLITS} not supported, nor below 0 (0 chooses a number), got {num_splits}"
        )
    check_head_terms(tensors.alibi_slopes, tensors.sinks, batch_size, nheads, q.device)
    left, right = canonical_window(causal, window_size_left, window_size_right, seqlen_q, capacity)
    problem = AttentionProblem(
        layout="cache" if tensors.block_table is None else "paged_cache",
        dtype=DTYPES[q.dtype],
        batch_size=bucket(batch_size),
        seqlen_q=bucket(seqlen_q),
        seqlen_k=bucket(capacity),
        nheads=nheads,
        nheads_k=k_cache.shape[2],
        headdim=headdim,
        window=(left, None if seqlen_q == 1 else right),  # nothing lies right of a single row
        softcap=softcap > 0.0,
        alibi=tensors.alibi_slopes is not None,
        seqused_k=tensors.cache_seqlens is not None or given_seqlens,
        leftpad_k=tensors.cache_leftpad is not None,
        aligned=all(copied_in_tiles(x) and evenly_spaced(x) for x in (q, k_cache, v_cache)),
        sinks=tensors.sinks is not None,
        page_size=0 if tensors.block_table is None else k_cache.shape[1],
    )
    return problem, seqlen_q, capacity


def check_room(cache_seqlens: int | Tensor, seqlen_new: int, capacity: int) -> None:
    """Checks lengths that the host knows: an int, or a tensor on the CPU.

    Raises:
        InvalidArgument: a sequence with its new tokens is longer than its cache.
    """
    if isinstance(cache_seqlens, Tensor):
        longest = int(cache_seqlens.max()) if cache_seqlens.numel() > 0 else 0
    else:
        longest = cache_seqlens
    if max(longest, 0) + seqlen_new > capacity:
        raise InvalidArgument(
            f"cache_seqlens and the new tokens must fit into the KV cache, which holds {capacity} tokens a sequence: "
            f"got {longest} and {seqlen_new} new ones"
        )


def rotary_advances(causal: bool, window_size_left: int, window_size_right: int, capacity: int) -> bool:
    """Whether query i has the angle of its own position: under a causal or local mask; otherwise all have the first's."""
    return causal or 0 <= window_size_left < capacity or 0 <= window_size_right < capacity


def _check_caches(q: Tensor, k_cache: Tensor, v_cache: Tensor) -> None:
    for name, cache in (("k_cache", k_cache), ("v_cache", v_cache)):
        if cache.dim() == 4 and cache.shape[-1] > 1 and cache.stride(-1) != 1:
            raise InvalidArgument(f"{name} must have contiguous last dimension, got strides {cache.stride()}")
    check_operands(q, k_cache, v_cache, 4, "forward")


def _check_places(q: Tensor, k_cache: Tensor, tensors: CacheTensors) -> int:
    """Checks what says where a sequence lies; returns the tokens it can have."""
    batch_size, device = q.shape[0], q.device
    for name, array in (
        ("seqlens_k", tensors.cache_seqlens),
        ("cache_batch_idx", tensors.cache_batch_idx),
        ("leftpad_k", tensors.cache_leftpad),
    ):
        if array is not None:
            check_index(name, array, (batch_size,), device)
    if tensors.block_table is not None:
        if tensors.cache_batch_idx is not None:
            raise InvalidArgument(
                f"Paged KVcache does not support cache_batch_idx, got a block_table of shape "
                f"{tuple(tensors.block_table.shape)} and a cache_batch_idx of shape {tuple(tensors.cache_batch_idx.shape)}"
            )
        check_block_table(tensors.block_table, k_cache, batch_size, device)
        return tensors.block_table.shape[1] * k_cache.shape[1]
    if tensors.cache_batch_idx is None and k_cache.shape[0] < batch_size:
        raise InvalidArgument(
            f"k_cache must have shape (batch_size, seqlen_cache, num_heads_k, head_size) with at least q's batch size "
            f"{batch_size} without a cache_batch_idx, got {tuple(k_cache.shape)}"
        )
    return k_cache.shape[1]


def _check_new_tokens(q: Tensor, k_cache: Tensor, tensors: CacheTensors, capacity: int, given_seqlens: bool) -> None:
    k, v = tensors.k, tensors.v
    if k is None:
        if v is not None:
            raise InvalidArgument(f"If value is supplied, key must also be passed in, got v of shape {tuple(v.shape)}")
        return
    if v is None:
        raise InvalidArgument(f"If key is supplied, value must also be passed in, got k of shape {tuple(k.shape)}")
    if tensors.cache_seqlens is None and not given_seqlens:
        raise InvalidArgument(
            f"If key is supplied, seqlens_k must also be passed in, got k of shape {tuple(k.shape)} and cache_seqlens None"
        )
    for name, word, x in (("k", "Key", k), ("v", "Value", v)):
        if x.dtype != q.dtype:
            raise InvalidArgument(f"{word} must have the same dtype as query, got {x.dtype} and {q.dtype}")
        wanted = (q.shape[0], k.shape[1] if k.dim() > 1 else None, k_cache.shape[2], q.shape[3])
        if tuple(x.shape) != wanted:
            raise InvalidArgument(
                f"{name} must have shape (batch_size, seqlen_knew, num_heads_k, head_size) = {wanted}, got {tuple(x.shape)}"
            )
        check_device(name, x, q.device)
    if k.shape[1] > capacity:
        raise InvalidArgument(
            f"If key is supplied, it must have seqlen <= the seqlen of the KV cache, got {k.shape[1]} and {capacity}"
        )


def _check_rotary(q: Tensor, tensors: CacheTensors, capacity: int) -> None:
    cos, sin = tensors.rotary_cos, tensors.rotary_sin
    if cos is None or sin is None:
        if cos is not None or sin is not None:
            given = ("cos", "sin") if sin is None else ("sin", "cos")
            raise InvalidArgument(
                f"If rotary {given[0]} is provided, rotary {given[1]} must also be provided, got None"
            )
        return
    if tensors.k is None:
        raise InvalidArgument(
            f"If rotary cos/sin are provided, new key / value to be appended to KV cache must also be provided, "
            f"got cos of shape {tuple(cos.shape)} and k None"
        )
    if cos.dim() != 2:
        raise InvalidArgument(f"rotary_cos must have shape (seqlen_ro, rotary_dim / 2), got {tuple(cos.shape)}")
    rotary_dim, headdim = 2 * cos.shape[1], q.shape[3]
    if rotary_dim > headdim:
        raise InvalidArgument(f"rotary_dim must be <= headdim, got {rotary_dim} and {headdim}")
    if rotary_dim == 0 or rotary_dim % ROTARY_MULTIPLE != 0:
        raise InvalidArgument(
            f"Only rotary dimensions divisible by {ROTARY_MULTIPLE} are currently supported, got {rotary_dim}"
        )
    if cos.shape[0] < capacity:
        raise InvalidArgument(
            f"cos/sin seqlen must be at least the seqlen of KV cache, got {cos.shape[0]} and {capacity}"
        )
    if sin.shape != cos.shape:
        raise InvalidArgument(f"rotary_sin must have shape {tuple(cos.shape)}, got {tuple(sin.shape)}")
    for name, x in (("rotary_cos", cos), ("rotary_sin", sin)):
        if x.dtype != q.dtype:
            raise InvalidArgument(f"{name} must have the same dtype as query, got {x.dtype} and {q.dtype}")
        if x.stride() != cos.stride() or (x.stride(1) != 1 and x.shape[1] > 1):
            raise InvalidArgument(
                f"{name} must be contiguous like rotary_cos, got strides {x.stride()} and {cos.stride()}"
            )
        check_device(name, x, q.device)
