"""The custom operator `flash_attn::_flash_attn_with_kvcache`, which writes into the caches that it is given."""

from typing import Any

import torch
from torch import Tensor

from flash_attn.dispatch import attend_cache
from flash_attn.problem import check_same_device
from flash_attn.problem_kvcache import CacheTensors


@torch.library.custom_op("flash_attn::_flash_attn_with_kvcache", mutates_args=("k_cache", "v_cache"))
def _flash_attn_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    rotary_cos: Tensor | None,
    rotary_sin: Tensor | None,
    cache_seqlens: Tensor | None,
    cache_batch_idx: Tensor | None,
    cache_leftpad: Tensor | None,
    block_table: Tensor | None,
    softmax_scale: float,
    causal: bool,
    window_size_left: int,
    window_size_right: int,
    softcap: float,
    rotary_interleaved: bool,
    alibi_slopes: Tensor | None,
    num_splits: int,
    s_aux: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    tensors = CacheTensors(
        k,
        v,
        rotary_cos,
        rotary_sin,
        cache_seqlens,
        cache_batch_idx,
        cache_leftpad,
        block_table,
        alibi_slopes,
        s_aux,
    )
    return attend_cache(
        q,
        k_cache,
        v_cache,
        tensors,
        softmax_scale,
        causal,
        window_size_left,
        window_size_right,
        softcap,
        rotary_interleaved,
        num_splits,
    )


@_flash_attn_with_kvcache.register_fake
def _flash_attn_with_kvcache_fake(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    rotary_cos: Tensor | None,
    rotary_sin: Tensor | None,
    cache_seqlens: Tensor | None,
    cache_batch_idx: Tensor | None,
    cache_leftpad: Tensor | None,
    block_table: Tensor | None,
    softmax_scale: float,
    causal: bool,
    window_size_left: int,
    window_size_right: int,
    softcap: float,
    rotary_interleaved: bool,
    alibi_slopes: Tensor | None,
    num_splits: int,
    s_aux: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    check_same_device(q, k_cache, v_cache)
    batch_size, seqlen_q, nheads, _ = q.shape
    return torch.empty_like(q), q.new_empty(
        (batch_size, nheads, seqlen_q), dtype=torch.promote_types(q.dtype, torch.float32)
    )


_ops: Any = torch.ops.flash_attn
_wrapped_flash_attn_with_kvcache = _ops._flash_attn_with_kvcache
