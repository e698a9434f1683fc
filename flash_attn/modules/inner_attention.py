"""Attention without projections, as modules: through this package's kernels (Flash*), or step by step in PyTorch."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from flash_attn.errors import InvalidArgument
from flash_attn.flash_attn_interface import (
    flash_attn_kvpacked_func,
    flash_attn_qkvpacked_func,
    flash_attn_varlen_kvpacked_func,
    flash_attn_varlen_qkvpacked_func,
)

HIDDEN = -10000.0  # added to, or put in place of, the score of a hidden key


def get_alibi_slopes(nheads: int) -> list[float]:
    """Slope of every head: 2^(-8 (h + 1) / n), n = nheads if that is a power of two.

    Otherwise n is the power of two below it, and the heads past n take every other slope of 2 n.

    Source: Press et al., ALiBi, 2021; flash_attn 2.8.3, flash_attn/modules/mha.py.
    """
    power = 2 ** math.floor(math.log2(nheads))
    slopes = [2.0 ** (-8.0 * (head + 1) / power) for head in range(power)]
    between = [2.0 ** (-4.0 * (head + 1) / power) for head in range(0, 2 * power, 2)]
    return slopes + between[: nheads - power]


class _FlashAttention(nn.Module):
    """What both flash modules keep."""

    alibi_slopes: Tensor | None

    def __init__(
        self,
        causal: bool = False,
        softmax_scale: float | None = None,
        attention_dropout: float = 0.0,
        window_size: Sequence[int] = (-1, -1),
        alibi_slopes: Tensor | None = None,
        deterministic: bool = False,
    ) -> None:
        super().__init__()
        self.causal = causal
        self.softmax_scale = softmax_scale
        self.drop = nn.Dropout(attention_dropout)
        self.register_buffer("alibi_slopes", alibi_slopes, persistent=False)
        self.window_size = window_size
        self.deterministic = deterministic

    def _options(self, causal: bool | None) -> dict[str, Any]:
        return dict(
            dropout_p=self.drop.p if self.training else 0.0,
            softmax_scale=self.softmax_scale,
            causal=self.causal if causal is None else causal,
            window_size=self.window_size,
            # a module cast to half precision has cast its buffers too
            alibi_slopes=None if self.alibi_slopes is None else self.alibi_slopes.float(),
            deterministic=self.deterministic,
        )


class FlashSelfAttention(_FlashAttention):
    """`flash_attn_qkvpacked_func` and its varlen sibling, with dropout while training.

    Source: flash_attn 2.8.3, flash_attn/modules/mha.py; any device and dtype that the functions take.
    """

    def forward(
        self, qkv: Tensor, causal: bool | None = None, cu_seqlens: Tensor | None = None, max_seqlen: int | None = None
    ) -> Tensor:
        """Attention of every token to the tokens of its sequence.

        Args:
            qkv: (batch, seqlen, 3, nheads, headdim), or (total, 3, nheads, headdim) with cu_seqlens.
            causal: overrides the module's.
            cu_seqlens: (batch + 1,), int32; needs max_seqlen.
        """
        if cu_seqlens is None:
            return flash_attn_qkvpacked_func(qkv, **self._options(causal))
        if max_seqlen is None:
            raise InvalidArgument("cu_seqlens needs max_seqlen, got None")
        return flash_attn_varlen_qkvpacked_func(qkv, cu_seqlens, max_seqlen, **self._options(causal))


class FlashCrossAttention(_FlashAttention):
    """`flash_attn_kvpacked_func` and its varlen sibling, with dropout while training.

    Source: flash_attn 2.8.3, flash_attn/modules/mha.py, also for the order of the arguments, which is not that of
    FlashSelfAttention; any device and dtype that the functions take.
    """

    def __init__(
        self,
        causal: bool = False,
        softmax_scale: float | None = None,
        attention_dropout: float = 0.0,
        alibi_slopes: Tensor | None = None,
        window_size: Sequence[int] = (-1, -1),
        deterministic: bool = False,
    ) -> None:
        super().__init__(causal, softmax_scale, attention_dropout, window_size, alibi_slopes, deterministic)

    def forward(
        self,
        q: Tensor,
        kv: Tensor,
        causal: bool | None = None,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
        cu_seqlens_k: Tensor | None = None,
        max_seqlen_k: int | None = None,
    ) -> Tensor:
        """Attention of q to kv.

        Args:
            q: (batch, seqlen_q, nheads, headdim), or (total_q, nheads, headdim) with cu_seqlens.
            kv: (batch, seqlen_k, 2, nheads_k, headdim), or (total_k, 2, nheads_k, headdim).
            causal: overrides the module's.
            cu_seqlens, cu_seqlens_k: (batch + 1,), int32; need each other and both maximum lengths.
        """
        if cu_seqlens is None:
            return flash_attn_kvpacked_func(q, kv, **self._options(causal))
        if max_seqlen is None or cu_seqlens_k is None or max_seqlen_k is None:
            raise InvalidArgument(
                "cu_seqlens needs max_seqlen, cu_seqlens_k and max_seqlen_k, got "
                f"{max_seqlen}, {None if cu_seqlens_k is None else tuple(cu_seqlens_k.shape)} and {max_seqlen_k}"
            )
        return flash_attn_varlen_kvpacked_func(
            q, kv, cu_seqlens, cu_seqlens_k, max_seqlen, max_seqlen_k, **self._options(causal)
        )


class CrossAttention(nn.Module):
    """Attention in PyTorch, every score in memory; a causal mask is aligned to the bottom right corner.

    Source: flash_attn 2.8.3, flash_attn/modules/mha.py.
    """

    def __init__(
        self, causal: bool = False, softmax_scale: float | None = None, attention_dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.causal = causal
        self.softmax_scale = softmax_scale
        self.drop = nn.Dropout(attention_dropout)

    def forward(
        self, q: Tensor, kv: Tensor, causal: bool | None = None, key_padding_mask: Tensor | None = None
    ) -> Tensor:
        """Attention of q to kv.

        Args:
            q: (batch, seqlen_q, nheads, headdim).
            kv: (batch, seqlen_k, 2, nheads_k, headdim), nheads divisible by nheads_k.
            causal: overrides the module's.
            key_padding_mask: (batch, seqlen_k), bool, True = keep; a causal mask ends at its number of kept keys.
        """
        k, v = (x.repeat_interleave(q.shape[2] // kv.shape[3], dim=2) for x in kv.unbind(dim=2))
        scores = self._scores(q, k, key_padding_mask)
        if self.causal if causal is None else causal:
            row = torch.arange(q.shape[1], device=q.device)[:, None]
            column = torch.arange(k.shape[1], device=q.device)
            seqlen_k = k.shape[1] if key_padding_mask is None else key_padding_mask.sum(-1)[:, None, None, None]
            scores = scores.masked_fill(column > row + seqlen_k - q.shape[1], HIDDEN)
        return self._weighted(scores, v)

    def _scores(self, q: Tensor, k: Tensor, key_padding_mask: Tensor | None) -> Tensor:
        scale = self.softmax_scale or q.shape[-1] ** -0.5
        scores = torch.einsum("bthd,bshd->bhts", q, k * scale)
        if key_padding_mask is None:
            return scores
        return scores + torch.where(key_padding_mask, 0.0, HIDDEN).to(scores.dtype)[:, None, None]

    def _weighted(self, scores: Tensor, v: Tensor) -> Tensor:
        weights = self.drop(torch.softmax(scores, dim=-1, dtype=v.dtype))
        return torch.einsum("bhts,bshd->bthd", weights, v)


class SelfAttention(CrossAttention):
    """`CrossAttention` of a sequence to itself.

    Source: flash_attn 2.8.3, flash_attn/modules/mha.py.
    """

    def forward(  # type: ignore[override]
        self, qkv: Tensor, causal: bool | None = None, key_padding_mask: Tensor | None = None
    ) -> Tensor:
        """Attention of every token to its sequence; a causal mask is the lower triangle whatever the padding.

        Args:
            qkv: (batch, seqlen, 3, nheads, headdim).
            causal: overrides the module's.
            key_padding_mask: (batch, seqlen), bool, True = keep.
        """
        q, k, v = qkv.unbind(dim=2)
        scores = self._scores(q, k, key_padding_mask)
        if self.causal if causal is None else causal:
            later = torch.ones(q.shape[1], q.shape[1], dtype=torch.bool, device=q.device).triu(1)
            scores = scores + torch.where(later, HIDDEN, 0.0).to(scores.dtype)
        return self._weighted(scores, v)
