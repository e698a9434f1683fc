"""Rotary position embedding with gradients, and the module that keeps its tables: upstream's import path and meaning.

cos and sin are constants: they get no gradient.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from flash_attn.backward.call import run
from flash_attn.errors import InvalidArgument
from flash_attn.layers.rotary_autograd import ApplyRotaryEmb, ApplyRotaryEmbKV_, ApplyRotaryEmbQKV_


def rotate_half(x: Tensor, interleaved: bool = False) -> Tensor:
    """(first, second) -> (-second, first) of the pairs of the last dimension."""
    if interleaved:
        return torch.stack((-x[..., 1::2], x[..., ::2]), dim=-1).flatten(-2)
    first, second = x.chunk(2, dim=-1)
    return torch.cat((-second, first), dim=-1)


def apply_rotary_emb_torch(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False) -> Tensor:
    """`apply_rotary_emb` in differentiable PyTorch, in the dtype of its operands.

    Args:
        x: (batch, seqlen, nheads, headdim).
        cos, sin: (seqlen, rotary_dim / 2) or (batch, seqlen, rotary_dim / 2).

    Raises:
        InvalidArgument: rotary_dim exceeds headdim.
    """
    rotary_dim = 2 * cos.shape[-1]
    if rotary_dim > x.shape[-1]:
        raise InvalidArgument(f"rotary_dim must be <= headdim, got {rotary_dim} and {x.shape[-1]}")
    if interleaved:
        cos, sin = (table.repeat_interleave(2, dim=-1).unsqueeze(-2) for table in (cos, sin))
    else:
        cos, sin = (torch.cat((table, table), dim=-1).unsqueeze(-2) for table in (cos, sin))
    rotated, rest = x[..., :rotary_dim], x[..., rotary_dim:]
    return torch.cat((rotated * cos + rotate_half(rotated, interleaved) * sin, rest), dim=-1)


def apply_rotary_emb(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    interleaved: bool = False,
    inplace: bool = False,
    seqlen_offsets: int | Tensor = 0,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
) -> Tensor:
    """Rotate the first rotary_dim dimensions of every head by the angles of the token's position, differentiably.

    In place, the result is x itself with a gradient: use it instead of x. The gradient that arrives is left as it is.

    Args:
        x: (batch, seqlen, nheads, headdim), or (total_seqlen, nheads, headdim) with cu_seqlens; headdim at most 256.
        cos, sin: (seqlen_ro, rotary_dim / 2); they get no gradient.
        interleaved: pairs are (2 i, 2 i + 1), as in GPT-J, instead of (i, i + rotary_dim / 2), as in GPT-NeoX.
        inplace: write into x.
        seqlen_offsets: int, or (batch,) int32 or int64: the position of every sequence's first token.
        cu_seqlens: (batch + 1,) int32 or int64.
        max_seqlen: no sequence of cu_seqlens is longer.

    Returns:
        out: like x.

    Raises:
        InvalidArgument: shapes, dtypes, devices or lengths disagree; the message names both values.

    Source: flash_attn 2.8.3, flash_attn/layers/rotary.py.
    """

    def rotate(inplace: bool) -> Tensor:
        turn = (seqlen_offsets, cu_seqlens, max_seqlen)
        return run(ApplyRotaryEmb, x, cos, sin, interleaved, inplace, *turn, False)

    return _inplace(x, rotate) if inplace else rotate(False)


apply_rotary_emb_func = apply_rotary_emb


def apply_rotary_emb_qkv_(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    cos_k: Tensor | None = None,
    sin_k: Tensor | None = None,
    interleaved: bool = False,
    seqlen_offsets: int | Tensor = 0,
    num_heads_q: int | None = None,
) -> Tensor:
    """`apply_rotary_emb` in place on the q and k of qkv.

    Args:
        qkv: (batch, seqlen, 3, nheads, headdim), or (batch, seqlen, num_heads_q + 2 * num_heads_k, headdim).
        cos, sin: (seqlen_ro, rotary_dim / 2).
        cos_k, sin_k: other tables for k (XPos).
        num_heads_q: needed for the second shape.

    Returns:
        qkv.
    """
    arguments = (qkv, cos, sin, cos_k, sin_k, interleaved, seqlen_offsets, num_heads_q)
    return _inplace(qkv, lambda inplace: run(ApplyRotaryEmbQKV_, *arguments, inplace, False))


def apply_rotary_emb_kv_(
    kv: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False, seqlen_offsets: int | Tensor = 0
) -> Tensor:
    """`apply_rotary_emb` in place on the k of kv (batch, seqlen, 2, nheads, headdim); returns kv."""
    arguments = (kv, cos, sin, interleaved, seqlen_offsets)
    return _inplace(kv, lambda inplace: run(ApplyRotaryEmbKV_, *arguments, inplace, False))


class RotaryEmbedding(torch.nn.Module):
    """Rotary embedding (RoFormer, arXiv 2104.09864) of q and k with tables of cosines that grow as needed.

    The angle of pair i at position m is m * base^(-2 i / dim). With scale_base it is XPos (arXiv 2212.10554): q is also
    multiplied and k divided by scale_i^((m - seqlen // 2) / scale_base), scale_i = (2 i + 0.4 dim) / (1.4 dim), where
    seqlen is the length of the tables; 512 is a good scale_base.

    Args:
        dim: rotary_dim, at most headdim.
        interleaved: pairs are (2 i, 2 i + 1), as in GPT-J, instead of (i, i + dim / 2), as in GPT-NeoX.
        device: of inv_freq, a buffer that state_dict leaves out.

    Source: flash_attn 2.8.3, flash_attn/layers/rotary.py.
    """

    inv_freq: Tensor
    scale: Tensor | None

    def __init__(
        self,
        dim: int,
        base: float = 10000.0,
        interleaved: bool = False,
        scale_base: float | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.dim = dim
        self.base = float(base)
        self.interleaved = interleaved
        self.scale_base = scale_base
        self.register_buffer("inv_freq", self._compute_inv_freq(device), persistent=False)
        self.register_buffer("scale", None if scale_base is None else self._compute_scale(device), persistent=False)
        self._seq_len_cached = 0
        self._cos_cached: Tensor | None = None
        self._sin_cached: Tensor | None = None
        self._cos_k_cached: Tensor | None = None
        self._sin_k_cached: Tensor | None = None

    def _compute_inv_freq(self, device: torch.device | str | None = None) -> Tensor:
        return 1.0 / self.base ** (torch.arange(0, self.dim, 2, device=device, dtype=torch.float32) / self.dim)

    def _compute_scale(self, device: torch.device | str | None = None) -> Tensor:
        return (torch.arange(0, self.dim, 2, device=device, dtype=torch.float32) + 0.4 * self.dim) / (1.4 * self.dim)

    def _update_cos_sin_cache(
        self, seqlen: int, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> None:
        """Make the tables anew if they are shorter than seqlen, of another device or dtype, or unfit for training."""
        known = self._cos_cached
        if (
            known is not None
            and seqlen <= self._seq_len_cached
            and known.device == device
            and known.dtype == dtype
            and (torch.compiler.is_compiling() or not (self.training and known.is_inference()))
        ):
            return
        self._seq_len_cached = seqlen
        # fp32 throughout: positions are large, and a module cast to bf16 has cast its buffers too
        position = torch.arange(seqlen, device=device, dtype=torch.float32)
        inv_freq = self.inv_freq if self.inv_freq.dtype == torch.float32 else self._compute_inv_freq(device)
        angle = torch.outer(position, inv_freq.to(position.device))
        cos, sin = torch.cos(angle), torch.sin(angle)
        if self.scale is None or self.scale_base is None:
            self._cos_cached, self._sin_cached = cos.to(dtype), sin.to(dtype)
            return
        scale = self.scale if self.scale.dtype == torch.float32 else self._compute_scale(device)
        power = (position - seqlen // 2) / self.scale_base
        growth = scale.to(position.device) ** power[:, None]
        self._cos_cached, self._sin_cached = (cos * growth).to(dtype), (sin * growth).to(dtype)
        self._cos_k_cached, self._sin_k_cached = (cos / growth).to(dtype), (sin / growth).to(dtype)

    def forward(
        self,
        qkv: Tensor,
        kv: Tensor | None = None,
        seqlen_offset: int | Tensor = 0,
        max_seqlen: int | None = None,
        num_heads_q: int | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Rotate q and k in place.

        Args:
            qkv: (batch, seqlen, 3, nheads, headdim) or (batch, seqlen, num_heads_q + 2 * num_heads_k, headdim); with kv,
                q alone: (batch, seqlen, nheads, headdim).
            kv: (batch, seqlen, 2, nheads_k, headdim).
            seqlen_offset: int, or (batch,) int32 or int64; positions of the first tokens.
            max_seqlen: how long the tables must be; needed where seqlen_offset is a tensor, and worth giving in decoding,
                which otherwise makes them anew at every token.

        Returns:
            qkv, or (q, kv).
        """
        if max_seqlen is not None:
            self._update_cos_sin_cache(max_seqlen, device=qkv.device, dtype=qkv.dtype)
        elif isinstance(seqlen_offset, int):
            self._update_cos_sin_cache(qkv.shape[1] + seqlen_offset, device=qkv.device, dtype=qkv.dtype)
        cos, sin = self._cos_cached, self._sin_cached
        if cos is None or sin is None:
            given = type(seqlen_offset).__name__
            raise InvalidArgument(f"there are no tables yet: seqlen_offset of type {given} needs max_seqlen, got None")
        cos_k, sin_k = self._cos_k_cached, self._sin_k_cached  # None without scale_base
        if kv is None:
            return apply_rotary_emb_qkv_(
                qkv, cos, sin, cos_k, sin_k, self.interleaved, seqlen_offsets=seqlen_offset, num_heads_q=num_heads_q
            )
        q = apply_rotary_emb(qkv, cos, sin, self.interleaved, inplace=True, seqlen_offsets=seqlen_offset)
        if cos_k is not None and sin_k is not None:
            cos, sin = cos_k, sin_k
        return q, apply_rotary_emb_kv_(kv, cos, sin, self.interleaved, seqlen_offsets=seqlen_offset)


def _inplace(x: Tensor, rotate: Callable[[bool], Tensor]) -> Tensor:
    """rotate(inplace=True); the compiler and torch.func take no Function that writes into its input: x gets a copy back."""
    if torch._C._are_functorch_transforms_active() and not torch.compiler.is_compiling():
        return x.copy_(rotate(False))
    if not (torch.compiler.is_compiling() and torch.is_grad_enabled() and x.requires_grad):
        return rotate(True)
    out = rotate(False)
    with torch.no_grad():
        x.copy_(out)
    return out
