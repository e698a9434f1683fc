"""The cache of a layer in a generation, and what every multi-head attention does with it."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from flash_attn.errors import InvalidArgument, UnsupportedProblem
from flash_attn.flash_attn_interface import flash_attn_with_kvcache
from flash_attn.layers.rotary import RotaryEmbedding
from flash_attn.modules.inner_attention import CrossAttention, FlashCrossAttention, FlashSelfAttention, SelfAttention
from flash_attn.utils.inference_params import InferenceParams


def _update_kv_cache(kv: Tensor, inference_params: InferenceParams, layer_idx: int) -> Tensor:
    """Write new keys and values into the layer's cache, made at the first call; all of the sequences so far.

    Args:
        kv: (batch, seqlen, 2, nheads, headdim), lands at seqlen_offset of the rows from batch_size_offset on.

    Returns:
        (batch, seqlen_offset + seqlen, 2, nheads, headdim), a view of the cache.

    Raises:
        InvalidArgument: it does not fit.
    """
    caches = inference_params.key_value_memory_dict
    if layer_idx not in caches:
        shape = (inference_params.max_batch_size, inference_params.max_seqlen, *kv.shape[2:])
        caches[layer_idx] = torch.empty(shape, dtype=kv.dtype, device=kv.device)
    cache = caches[layer_idx]
    row, column = inference_params.batch_size_offset, inference_params.seqlen_offset
    end = (row + kv.shape[0], column + kv.shape[1])
    if end[0] > cache.shape[0] or end[1] > cache.shape[1]:
        raise InvalidArgument(
            f"the cache holds {cache.shape[0]} sequences of {cache.shape[1]} tokens, needed are {end[0]} of {end[1]}"
        )
    cache[row : end[0], column : end[1]] = kv
    return cache[row : end[0], : end[1]]


class CachedAttention(nn.Module):
    """What MHA and ParallelMHA share: rotation, the cache, the choice between plain and flash attention."""

    out_proj: nn.Module
    rotary_emb: RotaryEmbedding

    def __init__(self, causal: bool, layer_idx: int | None, use_flash_attn: bool, checkpointing: bool) -> None:
        super().__init__()
        self.causal = causal
        self.layer_idx = layer_idx
        self.use_flash_attn = use_flash_attn
        self.checkpointing = checkpointing
        self.rotary_emb_dim = 0
        self.head_dim = 0
        self.dwconv = False

    def _add_rotary(self, dim: int, base: float, scale_base: float | None, interleaved: bool, device: Any) -> None:
        self.rotary_emb_dim = dim
        if dim > 0:
            self.rotary_emb = RotaryEmbedding(
                dim, base=base, scale_base=scale_base, interleaved=interleaved, device=device
            )

    def _add_inner_attention(
        self, softmax_scale: float | None, dropout: float, slopes: Tensor | None, window_size: Sequence[int]
    ) -> None:
        windowed = tuple(window_size) != (-1, -1)
        if (slopes is not None or windowed) and not self.use_flash_attn:
            raise InvalidArgument("ALiBi and local attention need use_flash_attn=True, got False")
        options: dict[str, Any] = dict(causal=self.causal, softmax_scale=softmax_scale, attention_dropout=dropout)
        if self.use_flash_attn:
            options |= dict(alibi_slopes=slopes, window_size=tuple(window_size))
            self.inner_attn: nn.Module = FlashSelfAttention(**options)
            self.inner_cross_attn: nn.Module = FlashCrossAttention(**options)
        else:
            self.inner_attn = SelfAttention(**options)
            self.inner_cross_attn = CrossAttention(**options)

    def _cache(self, batch_size: int, max_seqlen: int, nheads: int, dtype: torch.dtype | None) -> Tensor:
        weight: Tensor = self.out_proj.weight  # type: ignore[assignment]
        shape = (batch_size, max_seqlen, 2, nheads, self.head_dim)
        return torch.empty(shape, dtype=dtype or weight.dtype, device=weight.device)

    def _update_kv_cache(self, kv: Tensor, inference_params: InferenceParams) -> Tensor:
        """`_update_kv_cache` of this layer."""
        if self.dwconv:
            raise UnsupportedProblem("generation does not support dwconv: a new token's keys depend on earlier inputs")
        if self.layer_idx is None:
            raise InvalidArgument("generation needs layer_idx in the constructor, got None")
        return _update_kv_cache(kv, inference_params, self.layer_idx)

    def _attend_self(self, qkv: Tensor, params: InferenceParams | None, options: dict[str, Any]) -> Tensor:
        """Attention of (..., 3, nheads, headdim) to itself, or in a generation also to what the cache holds."""
        if params is not None:
            return self._attend_cached(qkv[:, :, 0], qkv[:, :, 1:], params)
        if self.rotary_emb_dim > 0:
            qkv = self.rotary_emb(qkv)
        return self._run(self.inner_attn, qkv, **options)

    def _attend_grouped(
        self, qkv: Tensor, nheads: int, params: InferenceParams | None, options: dict[str, Any]
    ) -> Tensor:
        """`_attend_self` with fewer heads of keys and values: qkv is (..., nheads + 2 * nheads_k, headdim)."""
        if self.rotary_emb_dim > 0 and params is None:
            qkv = self.rotary_emb(qkv, num_heads_q=nheads)
        q, kv = qkv[..., :nheads, :], qkv[..., nheads:, :].unflatten(-2, (2, -1))
        return self._attend_cross(q, kv, params, options)

    def _attend_cross(self, q: Tensor, kv: Tensor, params: InferenceParams | None, options: dict[str, Any]) -> Tensor:
        """Attention of (..., nheads, headdim) to (..., 2, nheads_k, headdim), in a generation also to the cache."""
        if params is not None:
            return self._attend_cached(q, kv, params)
        return self._run(self.inner_cross_attn, q, kv, **options)

    def _run(self, attention: nn.Module, *tensors: Tensor, **options: Any) -> Tensor:
        if self.checkpointing:
            return checkpoint(attention, *tensors, use_reentrant=False, **options)
        return attention(*tensors, **options)

    def _attend_cached(self, q: Tensor, kv: Tensor, params: InferenceParams) -> Tensor:
        """The first tokens attend to one another, later ones through the cache's own function."""
        first = params.seqlen_offset == 0
        if params.lengths_per_sample is not None and not first and not self.use_flash_attn:
            raise UnsupportedProblem("lengths_per_sample needs use_flash_attn=True, got False")
        if torch.is_grad_enabled():
            q, kv = q.clone(), kv.clone()  # autograd lets one view of a tensor be rotated in place, not two
        if not first and self.use_flash_attn:
            return self._attend_later(q, kv, params)
        if self.rotary_emb_dim > 0:
            q, kv = self.rotary_emb(q, kv, seqlen_offset=params.seqlen_offset, max_seqlen=params.max_seqlen)
        return self.inner_cross_attn(q, self._update_kv_cache(kv, params))

    def _attend_later(self, q: Tensor, kv: Tensor, params: InferenceParams) -> Tensor:
        if self.layer_idx not in params.key_value_memory_dict:
            raise InvalidArgument(f"layer {self.layer_idx} has no cache, but seqlen_offset is {params.seqlen_offset}")
        rows = slice(params.batch_size_offset, params.batch_size_offset + q.shape[0])
        cache = params.key_value_memory_dict[self.layer_idx][rows]
        seqlens: Any = params.seqlen_offset
        if params.lengths_per_sample is not None:
            seqlens = params.lengths_per_sample[rows]
        rotation: dict[str, Any] = {}
        if self.rotary_emb_dim > 0:
            embedding = self.rotary_emb
            if self.rotary_emb_dim % 16 == 0 and embedding.scale is None:
                embedding._update_cos_sin_cache(cache.shape[1], device=q.device, dtype=q.dtype)
                rotation = dict(
                    rotary_cos=embedding._cos_cached,
                    rotary_sin=embedding._sin_cached,
                    rotary_interleaved=embedding.interleaved,
                )
            else:
                q, kv = embedding(q, kv, seqlen_offset=seqlens, max_seqlen=params.max_seqlen)
        inner: Any = self.inner_cross_attn
        return flash_attn_with_kvcache(
            q,
            cache[:, :, 0],
            cache[:, :, 1],
            kv[:, :, 0],
            kv[:, :, 1],
            cache_seqlens=seqlens,
            softmax_scale=inner.softmax_scale,
            causal=inner.causal,
            window_size=inner.window_size,
            alibi_slopes=None if inner.alibi_slopes is None else inner.alibi_slopes.float(),
            **rotation,
        )
