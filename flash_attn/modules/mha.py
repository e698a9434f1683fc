"""Multi-head attention with its projections, whole or split over ranks: upstream's import path and meaning."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from einops import rearrange, repeat
from torch import Tensor, nn

from flash_attn.errors import InvalidArgument
from flash_attn.flash_attn_interface import (
    flash_attn_kvpacked_func,
    flash_attn_qkvpacked_func,
    flash_attn_varlen_kvpacked_func,
    flash_attn_varlen_qkvpacked_func,
    flash_attn_with_kvcache,
)
from flash_attn.layers.rotary import RotaryEmbedding
from flash_attn.modules.cached_attention import CachedAttention, _update_kv_cache
from flash_attn.modules.inner_attention import (
    CrossAttention,
    FlashCrossAttention,
    FlashSelfAttention,
    SelfAttention,
    get_alibi_slopes,
)
from flash_attn.ops.fused_dense import ColumnParallelLinear, FusedDense, RowParallelLinear
from flash_attn.utils.distributed import get_dim_for_local_rank
from flash_attn.utils.generation import InferenceParams

__all__ = [
    "ColumnParallelLinear",
    "CrossAttention",
    "FlashCrossAttention",
    "FlashSelfAttention",
    "FusedDense",
    "LinearResidual",
    "MHA",
    "ParallelMHA",
    "RotaryEmbedding",
    "RowParallelLinear",
    "SelfAttention",
    "_update_kv_cache",
    "flash_attn_kvpacked_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_kvpacked_func",
    "flash_attn_varlen_qkvpacked_func",
    "flash_attn_with_kvcache",
    "get_alibi_slopes",
    "rearrange",
    "repeat",
]


class LinearResidual(nn.Linear):
    """nn.Linear that also returns its input."""

    def forward(self, input: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        return super().forward(input), input


class MHA(CachedAttention):
    """Multi-head self-attention and cross-attention.

    Args:
        num_heads_kv: fewer heads of keys and values (GQA, MQA); default num_heads.
        cross_attn: keys and values come from another sequence.
        softmax_scale: default headdim^-0.5.
        layer_idx: names the layer's cache; generation needs it.
        dwconv: a depthwise causal convolution of width 3 over time after the projection.
        rotary_emb_dim: leading features of a head that are rotated; 0 is none. The other rotary_emb_* are RotaryEmbedding's.
        use_alibi, window_size: need use_flash_attn.
        fused_bias_fc: FusedDense for nn.Linear, which computes the same.
        return_residual: return (out, x).
        checkpointing: the backward computes the attention anew.

    Raises:
        InvalidArgument: sizes or options contradict each other.

    Source: flash_attn 2.8.3, flash_attn/modules/mha.py.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        num_heads_kv: int | None = None,
        cross_attn: bool = False,
        qkv_proj_bias: bool = True,
        out_proj_bias: bool = True,
        dropout: float = 0.0,
        softmax_scale: float | None = None,
        causal: bool = False,
        layer_idx: int | None = None,
        dwconv: bool = False,
        rotary_emb_dim: int = 0,
        rotary_emb_base: float = 10000.0,
        rotary_emb_scale_base: float | None = None,
        rotary_emb_interleaved: bool = False,
        use_alibi: bool = False,
        window_size: Sequence[int] = (-1, -1),
        fused_bias_fc: bool = False,
        use_flash_attn: bool = False,
        return_residual: bool = False,
        checkpointing: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(causal, layer_idx, use_flash_attn, checkpointing)
        self.embed_dim = embed_dim
        self.cross_attn = cross_attn
        self.dwconv = dwconv
        self.return_residual = return_residual
        self.num_heads = num_heads
        self.num_heads_kv = num_heads if num_heads_kv is None else num_heads_kv
        self.head_dim = _head_dim(embed_dim, num_heads, self.num_heads_kv)
        if cross_attn and rotary_emb_dim > 0:
            raise InvalidArgument(f"cross-attention takes no rotary embedding, got rotary_emb_dim {rotary_emb_dim}")
        self._add_rotary(rotary_emb_dim, rotary_emb_base, rotary_emb_scale_base, rotary_emb_interleaved, device)
        self._add_projections(
            qkv_proj_bias, out_proj_bias, FusedDense if fused_bias_fc else nn.Linear, dict(device=device, dtype=dtype)
        )
        slopes = torch.tensor(get_alibi_slopes(num_heads), device=device) if use_alibi else None
        self._add_inner_attention(softmax_scale, dropout, slopes, window_size)

    def _add_projections(self, qkv_bias: bool, out_bias: bool, linear: Any, factory: dict[str, Any]) -> None:
        embed_dim, kv_dim = self.embed_dim, 2 * self.head_dim * self.num_heads_kv
        with_residual = LinearResidual if linear is nn.Linear else partial(FusedDense, return_residual=True)
        first = with_residual if self.return_residual else linear
        if self.cross_attn:
            self.Wq = linear(embed_dim, embed_dim, bias=qkv_bias, **factory)
            self.Wkv = first(embed_dim, kv_dim, bias=qkv_bias, **factory)
        else:
            self.Wqkv = first(embed_dim, embed_dim + kv_dim, bias=qkv_bias, **factory)
        if self.dwconv and self._packed:
            self.dwconv_qkv = _time_convolution(embed_dim + kv_dim, factory)
        elif self.dwconv:
            self.dwconv_q = _time_convolution(embed_dim, factory)
            self.dwconv_kv = _time_convolution(kv_dim, factory)
        self.out_proj = linear(embed_dim, embed_dim, bias=out_bias, **factory)

    @property
    def _packed(self) -> bool:
        return not self.cross_attn and self.num_heads_kv == self.num_heads

    def allocate_inference_cache(
        self, batch_size: int, max_seqlen: int, dtype: torch.dtype | None = None, **kwargs: Any
    ) -> Tensor:
        """(batch_size, max_seqlen, 2, num_heads_kv, headdim), uninitialised, to stand in key_value_memory_dict."""
        _no_options(kwargs)
        return self._cache(batch_size, max_seqlen, self.num_heads_kv, dtype)

    def forward(
        self,
        x: Tensor,
        x_kv: Tensor | None = None,
        key_padding_mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
        mixer_subset: Any = None,
        inference_params: InferenceParams | None = None,
        **kwargs: Any,
    ) -> Any:
        """Attention with projections.

        Args:
            x: (batch, seqlen, embed_dim), or (total, embed_dim) with cu_seqlens.
            x_kv: cross-attention only: where keys and values come from; default x.
            key_padding_mask: (batch, seqlen), bool, True = keep; without use_flash_attn only.
            cu_seqlens: (batch + 1,), int32; with use_flash_attn only, and max_seqlen.
            mixer_subset: cross-attention only: index of the positions of x that become queries.
            inference_params: of a generation.
            kwargs: for the inner attention, such as causal, and in cross-attention cu_seqlens_k and max_seqlen_k.

        Returns:
            like x, with return_residual (it, x).
        """
        self._check(x_kv, key_padding_mask, cu_seqlens, max_seqlen, mixer_subset, inference_params)
        if self.use_flash_attn:
            options = {"cu_seqlens": cu_seqlens, "max_seqlen": max_seqlen, **kwargs}
        else:
            options = {"key_padding_mask": key_padding_mask, **kwargs}
        if self._packed:
            qkv, x = self._projected(self.Wqkv, x)
            qkv = self._convolved(qkv, "dwconv_qkv").unflatten(-1, (3, -1, self.head_dim))
            context = self._attend_self(qkv, inference_params, options)
        elif self.cross_attn:
            q, kv, x = self._projected_apart(x, x_kv, mixer_subset)
            q = self._convolved(q, "dwconv_q").unflatten(-1, (-1, self.head_dim))
            kv = self._convolved(kv, "dwconv_kv").unflatten(-1, (2, -1, self.head_dim))
            context = self._attend_cross(q, kv, inference_params, options)
        else:
            qkv, x = self._projected(self.Wqkv, x)
            if self.dwconv:
                q, kv = qkv[..., : self.embed_dim], qkv[..., self.embed_dim :]
                qkv = torch.cat((self._convolved(q, "dwconv_q"), self._convolved(kv, "dwconv_kv")), dim=-1)
            if cu_seqlens is not None:
                options = {"cu_seqlens_k": cu_seqlens, "max_seqlen_k": max_seqlen, **options}
            qkv = qkv.unflatten(-1, (-1, self.head_dim))
            context = self._attend_grouped(qkv, self.num_heads, inference_params, options)
        out = self.out_proj(context.flatten(-2))
        return (out, x) if self.return_residual else out

    def _projected_apart(self, x: Tensor, x_kv: Tensor | None, mixer_subset: Any) -> tuple[Tensor, Tensor, Tensor]:
        """(q, kv, x) of cross-attention, heads not yet apart."""
        if x_kv is None:
            kv, x = self._projected(self.Wkv, x)
        else:
            kv, _ = self._projected(self.Wkv, x_kv)
        return self.Wq(x if mixer_subset is None else x[:, mixer_subset]), kv, x

    def _projected(self, linear: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        return linear(x) if self.return_residual else (linear(x), x)

    def _convolved(self, x: Tensor, name: str) -> Tensor:
        """x (batch, seqlen, features) convolved over time; position t sees t - 2 to t."""
        if not self.dwconv:
            return x
        return getattr(self, name)(x.transpose(1, 2))[..., :-2].transpose(1, 2).contiguous()

    def _check(
        self,
        x_kv: Tensor | None,
        key_padding_mask: Tensor | None,
        cu_seqlens: Tensor | None,
        max_seqlen: int | None,
        mixer_subset: Any,
        params: InferenceParams | None,
    ) -> None:
        if cu_seqlens is not None:
            _require(max_seqlen is not None, "cu_seqlens needs max_seqlen, got None")
            _require(self.use_flash_attn, "cu_seqlens needs use_flash_attn=True, got False")
            _require(key_padding_mask is None, "cu_seqlens excludes key_padding_mask: got both")
            _require(not self.dwconv, "cu_seqlens excludes dwconv, which would mix sequences")
            _require(self.rotary_emb_dim == 0, f"cu_seqlens needs rotary_emb_dim 0, got {self.rotary_emb_dim}")
        if key_padding_mask is not None:
            _require(not self.use_flash_attn, "key_padding_mask needs use_flash_attn=False, got True; use cu_seqlens")
        if params is not None:
            _require(cu_seqlens is None and key_padding_mask is None, "inference_params excludes masks and cu_seqlens")
            _require(not self.dwconv, "inference_params excludes dwconv")
        if not self.cross_attn:
            _require(x_kv is None and mixer_subset is None, "x_kv and mixer_subset need cross_attn=True, got False")


class ParallelMHA(CachedAttention):
    """Multi-head self-attention whose heads are split over the ranks of a process group.

    The arguments are those of `MHA`; sequence_parallel: the first dimension of x and of the result is split too.

    Source: flash_attn 2.8.3, flash_attn/modules/mha.py.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        process_group: Any,
        num_heads_kv: int | None = None,
        qkv_proj_bias: bool = True,
        out_proj_bias: bool = True,
        dropout: float = 0.0,
        softmax_scale: float | None = None,
        causal: bool = False,
        layer_idx: int | None = None,
        rotary_emb_dim: int = 0,
        rotary_emb_base: float = 10000.0,
        rotary_emb_scale_base: float | None = None,
        rotary_emb_interleaved: bool = False,
        use_alibi: bool = False,
        window_size: Sequence[int] = (-1, -1),
        use_flash_attn: bool = False,
        checkpointing: bool = False,
        sequence_parallel: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(causal, layer_idx, use_flash_attn, checkpointing)
        self.embed_dim = embed_dim
        self.process_group = process_group
        self.world_size = dist.get_world_size(process_group)
        self.local_rank = dist.get_rank(process_group)
        self.num_heads = num_heads
        self.num_heads_kv = num_heads if num_heads_kv is None else num_heads_kv
        self.head_dim = _head_dim(embed_dim, num_heads, self.num_heads_kv)
        # shared out are whole groups: a head of keys and values with all of its query heads
        per_group = num_heads // self.num_heads_kv
        groups = [get_dim_for_local_rank(self.num_heads_kv, self.world_size, r) for r in range(self.world_size)]
        self.num_heads_kv_per_rank = groups[self.local_rank]
        self.num_heads_per_rank = per_group * self.num_heads_kv_per_rank
        self._add_rotary(rotary_emb_dim, rotary_emb_base, rotary_emb_scale_base, rotary_emb_interleaved, device)

        shared: dict[str, Any] = dict(sequence_parallel=sequence_parallel, device=device, dtype=dtype)
        group = self.head_dim * (per_group + 2)
        self.Wqkv = ColumnParallelLinear(
            embed_dim, group * self.num_heads_kv, process_group, bias=qkv_proj_bias, multiple_of=group, **shared
        )
        slopes = None
        if use_alibi:
            begin = per_group * sum(groups[: self.local_rank])
            mine = get_alibi_slopes(num_heads)[begin : begin + self.num_heads_per_rank]
            slopes = torch.tensor(mine, device=device)
        self._add_inner_attention(softmax_scale, dropout, slopes, window_size)
        self.out_proj = RowParallelLinear(
            embed_dim, embed_dim, process_group, bias=out_proj_bias, multiple_of=self.head_dim * per_group, **shared
        )

    def allocate_inference_cache(
        self, batch_size: int, max_seqlen: int, dtype: torch.dtype | None = None, **kwargs: Any
    ) -> Tensor:
        """(batch_size, max_seqlen, 2, num_heads_kv_per_rank, headdim), uninitialised."""
        _no_options(kwargs)
        return self._cache(batch_size, max_seqlen, self.num_heads_kv_per_rank, dtype)

    def forward(
        self,
        x: Tensor,
        seqlen: int | None = None,
        inference_params: InferenceParams | None = None,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """Attention with projections, of this rank's heads, summed over the ranks.

        Args:
            x: (batch, seqlen, embed_dim); with seqlen (batch * seqlen, embed_dim), so that the split of the first dimension
                can be even though the batch is small; with cu_seqlens (total, embed_dim).
            inference_params: of a generation.
            kwargs: for the inner attention.
        """
        qkv = self.Wqkv(x)
        options = kwargs
        if cu_seqlens is not None:
            _require(self.use_flash_attn, "cu_seqlens needs use_flash_attn=True, got False")
            _require(inference_params is None, "inference_params excludes cu_seqlens")
            _require(self.rotary_emb_dim == 0, f"cu_seqlens needs rotary_emb_dim 0, got {self.rotary_emb_dim}")
            options = {"cu_seqlens": cu_seqlens, "max_seqlen": max_seqlen, **kwargs}
        elif seqlen is not None:
            qkv = qkv.unflatten(0, (-1, seqlen))
        if self.num_heads_kv == self.num_heads:
            qkv = qkv.unflatten(-1, (3, -1, self.head_dim))
            context = self._attend_self(qkv, inference_params, options)
        else:
            if cu_seqlens is not None:
                options = {"cu_seqlens_k": cu_seqlens, "max_seqlen_k": max_seqlen, **options}
            qkv = qkv.unflatten(-1, (-1, self.head_dim))
            context = self._attend_grouped(qkv, self.num_heads_per_rank, inference_params, options)
        context = context.flatten(-2)
        return self.out_proj(context.flatten(0, 1) if seqlen is not None and cu_seqlens is None else context)


def _time_convolution(features: int, factory: dict[str, Any]) -> nn.Conv1d:
    return nn.Conv1d(features, features, kernel_size=3, padding=2, groups=features, **factory)


def _head_dim(embed_dim: int, num_heads: int, num_heads_kv: int) -> int:
    _require(embed_dim % num_heads == 0, f"embed_dim {embed_dim} must be divisible by num_heads {num_heads}")
    _require(num_heads % num_heads_kv == 0, f"num_heads {num_heads} must be divisible by num_heads_kv {num_heads_kv}")
    return embed_dim // num_heads


def _no_options(kwargs: dict[str, Any]) -> None:
    _require(not kwargs, f"allocate_inference_cache takes no {sorted(kwargs)}")


def _require(holds: bool, message: str) -> None:
    if not holds:
        raise InvalidArgument(message)
