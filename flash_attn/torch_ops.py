"""The custom operators `flash_attn::_flash_attn_*`: below the autograd functions, above the backends, on any device.

Names, argument order and results are upstream's, which downstream code imports and introspects.
"""

import inspect
from typing import Any

import torch
from torch import Tensor

from flash_attn.dispatch import backward, contiguous_last, empty_gradient, forward
from flash_attn.problem import check_same_device

ROUNDING = 128  # upstream rounds the sequence sizes of S_dmask and softmax_d up to this
# Dropout draws: a compiler that repeats a call (activation checkpoints) must repeat its numbers. Older torch takes no tags.
RANDOM: dict[str, Any] = (
    {"tags": (torch.Tag.nondeterministic_seeded,)}
    if "tags" in inspect.signature(torch.library.custom_op).parameters
    else {}
)


def round_multiple(x: int, m: int) -> int:
    """x rounded up to a multiple of m."""
    return (x + m - 1) // m * m


def maybe_contiguous(x: Tensor | None) -> Tensor | None:
    """x, copied only if its last dimension is not contiguous."""
    return None if x is None else contiguous_last(x)


def observed(x: Tensor) -> bool:
    """Whether operators must be visible: to the compiler, to a dispatch mode, to a tensor subclass, on the device "meta"."""
    return (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack() > 0
        or type(x) not in (Tensor, torch.nn.Parameter)
        or x.is_meta
    )


@torch.library.custom_op("flash_attn::_flash_attn_forward", mutates_args=(), **RANDOM)
def _flash_attn_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float,
    softmax_scale: float,
    causal: bool,
    window_size_left: int,
    window_size_right: int,
    softcap: float,
    alibi_slopes: Tensor | None,
    return_softmax: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    results = forward(
        q,
        k,
        v,
        dropout_p,
        softmax_scale,
        causal,
        window_size_left,
        window_size_right,
        softcap,
        alibi_slopes,
        return_softmax,
    )
    return four_tensors(*results[:4])


@_flash_attn_forward.register_fake
def _flash_attn_forward_fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float,
    softmax_scale: float,
    causal: bool,
    window_size_left: int,
    window_size_right: int,
    softcap: float,
    alibi_slopes: Tensor | None,
    return_softmax: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    check_same_device(q, k, v)
    batch_size, seqlen_q, nheads, _ = q.shape
    scores = (batch_size, nheads, round_multiple(seqlen_q, ROUNDING), round_multiple(k.shape[1], ROUNDING))
    return (
        torch.empty_like(q),
        q.new_empty((batch_size, nheads, seqlen_q), dtype=_lse_dtype(q)),
        q.new_empty(scores if return_softmax and dropout_p > 0.0 else (0,)),
        q.new_empty((2,), dtype=torch.int64),
    )


@torch.library.custom_op("flash_attn::_flash_attn_varlen_forward", mutates_args=(), **RANDOM)
def _flash_attn_varlen_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float,
    softmax_scale: float,
    causal: bool,
    window_size_left: int = -1,
    window_size_right: int = -1,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    return_softmax: bool = False,
    block_table: Tensor | None = None,
    leftpad_k: Tensor | None = None,
    seqused_k: Tensor | None = None,
    zero_tensors: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    results = forward(
        q,
        k,
        v,
        dropout_p,
        softmax_scale,
        causal,
        window_size_left,
        window_size_right,
        softcap,
        alibi_slopes,
        return_softmax,
        cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_k=cu_seqlens_k,
        max_seqlen_q=max_seqlen_q,
        max_seqlen_k=max_seqlen_k,
        block_table=block_table,
        leftpad_k=leftpad_k,
        seqused_k=seqused_k,
        zero_tensors=zero_tensors,
    )
    return four_tensors(*results[:4])


@_flash_attn_varlen_forward.register_fake
def _flash_attn_varlen_forward_fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float,
    softmax_scale: float,
    causal: bool,
    window_size_left: int = -1,
    window_size_right: int = -1,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    return_softmax: bool = False,
    block_table: Tensor | None = None,
    leftpad_k: Tensor | None = None,
    seqused_k: Tensor | None = None,
    zero_tensors: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    check_same_device(q, k, v)
    batch_size = cu_seqlens_q.shape[0] - 1
    total_q, nheads, _ = q.shape
    scores = (batch_size, nheads, round_multiple(max_seqlen_q, ROUNDING), round_multiple(max_seqlen_k, ROUNDING))
    return (
        torch.empty_like(q),
        q.new_empty((nheads, total_q), dtype=_lse_dtype(q)),
        q.new_empty(scores if return_softmax and dropout_p > 0.0 else (0,)),
        q.new_empty((2,), dtype=torch.int64),
    )


@torch.library.custom_op("flash_attn::_flash_attn_backward", mutates_args=("dq", "dk", "dv"))
def _flash_attn_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    softmax_lse: Tensor,
    dq: Tensor | None,
    dk: Tensor | None,
    dv: Tensor | None,
    dropout_p: float,
    softmax_scale: float,
    causal: bool,
    window_size_left: int,
    window_size_right: int,
    softcap: float,
    alibi_slopes: Tensor | None,
    deterministic: bool,
    rng_state: Tensor | None = None,
) -> Tensor:
    delta = backward(
        dout,
        q,
        k,
        v,
        out,
        softmax_lse,
        _or_empty(dq, q),
        _or_empty(dk, k),
        _or_empty(dv, v),
        dropout_p,
        softmax_scale,
        causal,
        window_size_left,
        window_size_right,
        softcap,
        alibi_slopes,
        deterministic,
        rng_state,
    )
    return torch.nn.functional.pad(delta, (0, round_multiple(q.shape[1], ROUNDING) - q.shape[1]))


@_flash_attn_backward.register_fake
def _flash_attn_backward_fake(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    softmax_lse: Tensor,
    dq: Tensor | None,
    dk: Tensor | None,
    dv: Tensor | None,
    dropout_p: float,
    softmax_scale: float,
    causal: bool,
    window_size_left: int,
    window_size_right: int,
    softcap: float,
    alibi_slopes: Tensor | None,
    deterministic: bool,
    rng_state: Tensor | None = None,
) -> Tensor:
    batch_size, seqlen_q, nheads, _ = q.shape
    return q.new_empty((batch_size, nheads, round_multiple(seqlen_q, ROUNDING)), dtype=_lse_dtype(q))


@torch.library.custom_op("flash_attn::_flash_attn_varlen_backward", mutates_args=("dq", "dk", "dv"))
def _flash_attn_varlen_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    softmax_lse: Tensor,
    dq: Tensor | None,
    dk: Tensor | None,
    dv: Tensor | None,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float,
    softmax_scale: float,
    causal: bool,
    window_size_left: int,
    window_size_right: int,
    softcap: float,
    alibi_slopes: Tensor | None,
    deterministic: bool,
    rng_state: Tensor | None = None,
    zero_tensors: bool = False,
) -> Tensor:
    dq, dk, dv = _or_empty(dq, q), _or_empty(dk, k), _or_empty(dv, v)
    if zero_tensors:
        for gradient in (dq, dk, dv):
            gradient.zero_()
    delta = backward(
        dout,
        q,
        k,
        v,
        out,
        softmax_lse,
        dq,
        dk,
        dv,
        dropout_p,
        softmax_scale,
        causal,
        window_size_left,
        window_size_right,
        softcap,
        alibi_slopes,
        deterministic,
        rng_state,
        cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_k=cu_seqlens_k,
        max_seqlen_q=max_seqlen_q,
        max_seqlen_k=max_seqlen_k,
    )
    return torch.nn.functional.pad(delta, (0, ROUNDING * (cu_seqlens_q.shape[0] - 1)))


@_flash_attn_varlen_backward.register_fake
def _flash_attn_varlen_backward_fake(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    softmax_lse: Tensor,
    dq: Tensor | None,
    dk: Tensor | None,
    dv: Tensor | None,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float,
    softmax_scale: float,
    causal: bool,
    window_size_left: int,
    window_size_right: int,
    softcap: float,
    alibi_slopes: Tensor | None,
    deterministic: bool,
    rng_state: Tensor | None = None,
    zero_tensors: bool = False,
) -> Tensor:
    batch_size = cu_seqlens_q.shape[0] - 1
    total_q, nheads, _ = q.shape
    return q.new_empty((nheads, total_q + ROUNDING * batch_size), dtype=_lse_dtype(q))


def four_tensors(
    out: Tensor, softmax_lse: Tensor, scores: Tensor | None, rng_state: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """An operator returns tensors only: absent scores are empty, an absent rng_state is zero."""
    return (
        out,
        softmax_lse,
        out.new_empty((0,)) if scores is None else scores,
        out.new_zeros((2,), dtype=torch.int64) if rng_state is None else rng_state,
    )


def _lse_dtype(q: Tensor) -> torch.dtype:
    """softmax_lse and delta are fp32, and fp64 for fp64 inputs."""
    return torch.float64 if q.dtype == torch.float64 else torch.float32


def _or_empty(gradient: Tensor | None, like: Tensor) -> Tensor:
    return empty_gradient(like) if gradient is None else gradient


_ops: Any = torch.ops.flash_attn
_wrapped_flash_attn_forward = _ops._flash_attn_forward
_wrapped_flash_attn_backward = _ops._flash_attn_backward
_wrapped_flash_attn_varlen_forward = _ops._flash_attn_varlen_forward
_wrapped_flash_attn_varlen_backward = _ops._flash_attn_varlen_backward
