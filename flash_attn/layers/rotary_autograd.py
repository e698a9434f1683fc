"""Autograd classes of the rotary embedding: one tensor, packed q, k, v and packed k, v.

The gradient of a rotation is the rotation backwards, so x is not kept, and a second derivative comes of itself. An incoming
gradient is never written into, for autograd may have handed it to others too. Under a transform of torch.func the forwards
run as plain functions, and `Rotation` is what is transformed.
"""

import contextlib
import functools
from typing import Any

import torch
from torch import Tensor

from flash_attn import backends
from flash_attn.backward import transforms
from flash_attn.backward.call import TANGENTS, run
from flash_attn.errors import InvalidArgument, UnsupportedProblem
from flash_attn.ops.triton import rotary

HEADS = 2  # the dimension of heads, and of "q, k, v" before them


def rotate_heads(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    seqlen_offsets: int | Tensor = 0,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
    interleaved: bool = False,
    inplace: bool = False,
    conjugate: bool = False,
    nheads_rotated: int | None = None,
) -> Tensor:
    """`ops.triton.rotary.rotate_heads`, also to be transformed, in which case `layers.rotary` asks for nothing in place."""
    if inplace or not torch._C._are_functorch_transforms_active() or torch.compiler.is_compiling():
        options = (interleaved, inplace, conjugate, nheads_rotated)
        return rotary.rotate_heads(x, cos, sin, seqlen_offsets, cu_seqlens, max_seqlen, *options)
    turn = (cos, sin, seqlen_offsets, cu_seqlens, max_seqlen, interleaved, conjugate, nheads_rotated)
    return Rotation.apply(x, *turn)[0]


class Rotation(torch.autograd.Function):
    """(rotated x,), as torch.func sees it."""

    @staticmethod
    def forward(x: Tensor, *turn: Any) -> Any:
        arguments: list[Any] = [*turn[:-2], False, *turn[-2:]]  # not in place
        return (rotary.rotate_heads(x, *arguments),)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        _, cos, sin, seqlen_offsets, cu_seqlens, max_seqlen, interleaved, conjugate, nheads_rotated = inputs
        _save(ctx, seqlen_offsets, (max_seqlen, interleaved, not conjugate, nheads_rotated), cos, sin, cu_seqlens)

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> Any:
        (cos, sin, cu_seqlens), seqlen_offsets = _saved(ctx)
        with _scope(ctx):
            (dx,) = Rotation.apply(dout, cos, sin, seqlen_offsets, cu_seqlens, *ctx.options)
        return dx, *(None,) * 8

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        raise UnsupportedProblem(TANGENTS)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], x: Tensor, *turn: Any) -> Any:
        nheads_rotated = turn[-1]
        if nheads_rotated is not None or any(dim is not None for dim in in_dims[1:]):
            return transforms.one_by_one(Rotation, info.batch_size, in_dims, (x, *turn))
        folded = transforms.beside_heads((x,), in_dims[:1], info.batch_size, (transforms.BEFORE_LAST,))
        out = Rotation.apply(*folded, *turn)
        return transforms.apart_from_heads(out, info.batch_size, (transforms.BEFORE_LAST,))


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
        with _writing(x, inplace):
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
        with _writing(qkv, inplace):
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
        with _writing(kv, inplace):
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


def _writing(x: Tensor, inplace: bool) -> Any:
    """Around a write into x: where x is a view, its version stays.

    All views of one tensor share it, such as q, k and v after one projection. Once it has moved autograd refuses those that
    split or unbind returned, and those rotated before, though none of them was written into.
    """
    if not inplace or torch.compiler.is_compiling() or not x.requires_grad or not x._is_view():
        return contextlib.nullcontext()
    return torch.autograd._unsafe_preserve_version_counter(x)


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
