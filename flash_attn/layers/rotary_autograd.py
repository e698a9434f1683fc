"""Autograd classes of the rotary embedding: one tensor, packed q, k, v and packed k, v.

The gradient of a rotation is the rotation backwards, so x is not kept, and a second derivative comes of itself. An incoming
gradient is never written into, for autograd may have handed it to others too.
"""

import contextlib
import functools
from typing import Any

import torch
from torch import Tensor

from flash_attn import backends
from flash_attn.backward.call import run
from flash_attn.errors import InvalidArgument
from flash_attn.ops.triton.rotary import rotate_heads

HEADS = 2  # the dimension of heads, and of "q, k, v" before them


class ApplyRotaryEmb(torch.autograd.Function):
    """One tensor, all heads."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        interleaved: bool = False,
        inplace: bool = False,
        seqlen_offsets: int | Tensor = 0,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
        conjugate: bool = False,
        is_grad_enabled: bool = True,
    ) -> Tensor:
        out = rotate_heads(x, cos, sin, seqlen_offsets, cu_seqlens, max_seqlen, interleaved, inplace, conjugate)
        if is_grad_enabled:
            _save(ctx, seqlen_offsets, (interleaved, max_seqlen, not conjugate), cos, sin, cu_seqlens)
        return out

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> Any:
        (cos, sin, cu_seqlens), seqlen_offsets = _saved(ctx)
        interleaved, max_seqlen, conjugate = ctx.options
        with _scope(ctx):
            lengths = (seqlen_offsets, cu_seqlens, max_seqlen)
            dx = run(ApplyRotaryEmb, dout, cos, sin, interleaved, False, *lengths, conjugate)
        return dx, *(None,) * 9


class ApplyRotaryEmbQKV_(torch.autograd.Function):
    """q and k of a packed q, k, v."""

    @staticmethod
    def forward(
        ctx: Any,
        qkv: Tensor,
        cos: Tensor,
        sin: Tensor,
        cos_k: Tensor | None = None,
        sin_k: Tensor | None = None,
        interleaved: bool = False,
        seqlen_offsets: int | Tensor = 0,
        num_heads_q: int | None = None,
        inplace: bool = True,
        conjugate: bool = False,
        is_grad_enabled: bool = True,
    ) -> Tensor:
        tables = (cos, sin, cos_k, sin_k)
        out = _rotate_qkv(qkv, *tables, interleaved, seqlen_offsets, num_heads_q, inplace, conjugate)
        if is_grad_enabled:
            _save(ctx, seqlen_offsets, (interleaved, num_heads_q, not conjugate), *tables)
        return out

    @staticmethod
    def backward(ctx: Any, dqkv: Tensor) -> Any:
        tables, seqlen_offsets = _saved(ctx)
        interleaved, num_heads_q, conjugate = ctx.options
        with _scope(ctx):
            options = (interleaved, seqlen_offsets, num_heads_q, False, conjugate)
            dqkv = run(ApplyRotaryEmbQKV_, dqkv, *tables, *options)
        return dqkv, *(None,) * 10


class ApplyRotaryEmbKV_(torch.autograd.Function):
    """k of a packed k, v."""

    @staticmethod
    def forward(
        ctx: Any,
        kv: Tensor,
        cos: Tensor,
        sin: Tensor,
        interleaved: bool = False,
        seqlen_offsets: int | Tensor = 0,
        inplace: bool = True,
        conjugate: bool = False,
        is_grad_enabled: bool = True,
    ) -> Tensor:
        if kv.dim() != 5 or kv.shape[HEADS] != 2:
            raise InvalidArgument(f"kv must have shape (batch, seqlen, 2, nheads, headdim), got {tuple(kv.shape)}")
        heads = kv[:, :, 0] if inplace else kv.flatten(HEADS, HEADS + 1)
        options = (seqlen_offsets, None, None, interleaved, inplace, conjugate)
        out = rotate_heads(heads, cos, sin, *options, nheads_rotated=kv.shape[HEADS + 1])
        out = kv if inplace else out.view(kv.shape)
        if is_grad_enabled:
            _save(ctx, seqlen_offsets, (interleaved, not conjugate), cos, sin)
        return out

    @staticmethod
    def backward(ctx: Any, dkv: Tensor) -> Any:
        (cos, sin), seqlen_offsets = _saved(ctx)
        interleaved, conjugate = ctx.options
        with _scope(ctx):
            dkv = run(ApplyRotaryEmbKV_, dkv, cos, sin, interleaved, seqlen_offsets, False, conjugate)
        return dkv, *(None,) * 7


def _rotate_qkv(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    cos_k: Tensor | None,
    sin_k: Tensor | None,
    interleaved: bool,
    seqlen_offsets: int | Tensor,
    num_heads_q: int | None,
    inplace: bool,
    conjugate: bool,
) -> Tensor:
    """One launch where q and k share their tables and lie as one run of heads, else two."""
    nheads_q, nheads_k = _head_counts(qkv, num_heads_q)
    rotate = functools.partial(
        rotate_heads, seqlen_offsets=seqlen_offsets, interleaved=interleaved, inplace=inplace, conjugate=conjugate
    )
    one_run = qkv.dim() == 4 or qkv.stride(HEADS) == qkv.shape[HEADS + 1] * qkv.stride(HEADS + 1)
    shared = cos_k is None and sin_k is None
    cos_k, sin_k = cos if cos_k is None else cos_k, sin if sin_k is None else sin_k
    if shared and (one_run or not inplace):
        heads = qkv.flatten(HEADS, HEADS + 1) if qkv.dim() == 5 else qkv
        out = rotate(heads, cos, sin, nheads_rotated=nheads_q + nheads_k)
        return qkv if inplace else out.view(qkv.shape)
    parts = qkv.unbind(HEADS) if qkv.dim() == 5 else qkv.split([nheads_q, nheads_k, nheads_k], HEADS)
    if inplace and torch.compiler.is_compiling():
        # inductor loses one of two writes into slices of one tensor (torch 2.11 and 2.13)
        rotate = functools.partial(rotate, inplace=False)
    q, k = rotate(parts[0], cos, sin), rotate(parts[1], cos_k, sin_k)
    if not inplace:
        return torch.cat((q, k, parts[2]), HEADS).view(qkv.shape)
    if torch.compiler.is_compiling():
        parts[0].copy_(q)
        parts[1].copy_(k)
    return qkv


def _head_counts(qkv: Tensor, num_heads_q: int | None) -> tuple[int, int]:
    """(heads of q, heads of k)."""
    shape = tuple(qkv.shape)
    if qkv.dim() == 5:
        if shape[HEADS] != 3:
            raise InvalidArgument(f"qkv must have shape (batch, seqlen, 3, nheads, headdim), got {shape}")
        return shape[HEADS + 1], shape[HEADS + 1]
    if qkv.dim() != 4:
        raise InvalidArgument(f"qkv must have 4 or 5 dimensions, got shape {shape}")
    if num_heads_q is None:
        raise InvalidArgument(f"num_heads_q must be given for qkv of 4 dimensions, got None for shape {shape}")
    nheads_k = (shape[HEADS] - num_heads_q) // 2
    if nheads_k < 0 or num_heads_q < 0 or shape[HEADS] != num_heads_q + 2 * nheads_k:
        wanted = f"num_heads_q + 2 * num_heads_k heads with num_heads_q {num_heads_q}"
        raise InvalidArgument(f"qkv must have {wanted}, got {shape[HEADS]}")
    return num_heads_q, nheads_k


def _save(ctx: Any, seqlen_offsets: int | Tensor, options: tuple[Any, ...], *tables: Tensor | None) -> None:
    """Keep what the rotation backwards needs; x is not among it."""
    known = not isinstance(seqlen_offsets, Tensor)
    ctx.save_for_backward(*tables, None if known else seqlen_offsets)
    ctx.seqlen_offset = seqlen_offsets if known else None
    ctx.options = options
    ctx.backend = None if torch.compiler.is_compiling() else backends.requested_backend()


def _saved(ctx: Any) -> tuple[tuple[Any, ...], int | Tensor]:
    *tables, seqlen_offsets = ctx.saved_tensors
    return tuple(tables), seqlen_offsets if ctx.seqlen_offset is None else ctx.seqlen_offset


def _scope(ctx: Any) -> Any:
    """The forward's choice of backend, which autograd's threads do not see."""
    return contextlib.nullcontext() if ctx.backend is None else backends.use(ctx.backend)
