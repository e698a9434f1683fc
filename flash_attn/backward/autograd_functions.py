"""Autograd classes over the operators of `torch_ops`: upstream's six, and the two that take the window side by side.

Every class packs or unpacks its operands and calls `attend` and `differentiate`.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from flash_attn.backward.call import attend, differentiate, make_words, once_differentiable, outputs, run, save
from flash_attn.dispatch import empty_gradient


class FlashAttnFunc(torch.autograd.Function):
    """Dense attention of separate q, k, v."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        dropout_p: float,
        softmax_scale: float | None,
        causal: bool,
        window_size: Sequence[int],
        softcap: float,
        alibi_slopes: Tensor | None,
        deterministic: bool,
        return_softmax: bool,
        is_grad_enabled: bool = True,
    ) -> Any:
        words = make_words(q.shape[-1], dropout_p, softmax_scale, causal, window_size, softcap, deterministic)
        results = attend(q, k, v, words, alibi_slopes, return_softmax)
        if is_grad_enabled:
            save(ctx, q, k, v, results, words, alibi_slopes)
        return outputs(ctx, results, return_softmax)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None = None, *_: Any) -> Any:
        saved = ctx.saved_tensors
        q, k, v = saved[:3]
        dq, dk, dv = empty_gradient(q), empty_gradient(k), empty_gradient(v)
        differentiate(ctx.words, ctx.plan, saved, dout, dlse, dq, dk, dv)
        return dq, dk, dv, *(None,) * 9


class FlashAttnQKVPackedFunc(torch.autograd.Function):
    """Dense attention of qkv (batch, seqlen, 3, nheads, headdim)."""

    @staticmethod
    def forward(
        ctx: Any,
        qkv: Tensor,
        dropout_p: float,
        softmax_scale: float | None,
        causal: bool,
        window_size: Sequence[int],
        softcap: float,
        alibi_slopes: Tensor | None,
        deterministic: bool,
        return_softmax: bool,
        is_grad_enabled: bool = True,
    ) -> Any:
        q, k, v = qkv.unbind(2)
        words = make_words(q.shape[-1], dropout_p, softmax_scale, causal, window_size, softcap, deterministic)
        results = attend(q, k, v, words, alibi_slopes, return_softmax)
        if is_grad_enabled:
            save(ctx, q, k, v, results, words, alibi_slopes)
        return outputs(ctx, results, return_softmax)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None = None, *_: Any) -> Any:
        saved = ctx.saved_tensors
        q = saved[0]
        dqkv = q.new_empty((q.shape[0], q.shape[1], 3, q.shape[2], q.shape[3]))
        differentiate(ctx.words, ctx.plan, saved, dout, dlse, *dqkv.unbind(2))
        return dqkv, *(None,) * 9


class FlashAttnKVPackedFunc(torch.autograd.Function):
    """Dense attention of q and kv (batch, seqlen_k, 2, nheads_k, headdim)."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        kv: Tensor,
        dropout_p: float,
        softmax_scale: float | None,
        causal: bool,
        window_size: Sequence[int],
        softcap: float,
        alibi_slopes: Tensor | None,
        deterministic: bool,
        return_softmax: bool,
        is_grad_enabled: bool = True,
    ) -> Any:
        k, v = kv.unbind(2)
        words = make_words(q.shape[-1], dropout_p, softmax_scale, causal, window_size, softcap, deterministic)
        results = attend(q, k, v, words, alibi_slopes, return_softmax)
        if is_grad_enabled:
            save(ctx, q, k, v, results, words, alibi_slopes)
        return outputs(ctx, results, return_softmax)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None = None, *_: Any) -> Any:
        saved = ctx.saved_tensors
        q, k = saved[:2]
        dq = empty_gradient(q)
        dkv = k.new_empty((k.shape[0], k.shape[1], 2, k.shape[2], k.shape[3]))
        differentiate(ctx.words, ctx.plan, saved, dout, dlse, dq, *dkv.unbind(2))
        return dq, dkv, *(None,) * 9


class FlashAttnVarlenFunc(torch.autograd.Function):
    """Attention of a packed batch of sequences; keys may lie in pages, which carry no gradient."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cu_seqlens_q: Tensor,
        cu_seqlens_k: Tensor,
        max_seqlen_q: int,
        max_seqlen_k: int,
        dropout_p: float,
        softmax_scale: float | None,
        causal: bool,
        window_size: Sequence[int],
        softcap: float,
        alibi_slopes: Tensor | None,
        deterministic: bool,
        return_softmax: bool,
        block_table: Tensor | None,
        is_grad_enabled: bool = True,
    ) -> Any:
        words = make_words(
            q.shape[-1],
            dropout_p,
            softmax_scale,
            causal,
            window_size,
            softcap,
            deterministic,
            max_seqlen_q,
            max_seqlen_k,
        )
        results = attend(q, k, v, words, alibi_slopes, return_softmax, cu_seqlens_q, cu_seqlens_k, block_table)
        if is_grad_enabled:
            save(ctx, q, k, v, results, words, alibi_slopes, cu_seqlens_q, cu_seqlens_k, block_table)
        return outputs(ctx, results, return_softmax)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None = None, *_: Any) -> Any:
        saved = ctx.saved_tensors
        q, k, v = saved[:3]
        dq, dk, dv = empty_gradient(q), empty_gradient(k), empty_gradient(v)
        differentiate(ctx.words, ctx.plan, saved, dout, dlse, dq, dk, dv)
        return dq, dk, dv, *(None,) * 14


class FlashAttnVarlenQKVPackedFunc(torch.autograd.Function):
    """Attention of a packed batch qkv (total, 3, nheads, headdim)."""

    @staticmethod
    def forward(
        ctx: Any,
        qkv: Tensor,
        cu_seqlens: Tensor,
        max_seqlen: int,
        dropout_p: float,
        softmax_scale: float | None,
        causal: bool,
        window_size: Sequence[int],
        softcap: float,
        alibi_slopes: Tensor | None,
        deterministic: bool,
        return_softmax: bool,
        is_grad_enabled: bool = True,
    ) -> Any:
        q, k, v = qkv.unbind(1)
        words = make_words(
            q.shape[-1], dropout_p, softmax_scale, causal, window_size, softcap, deterministic, max_seqlen, max_seqlen
        )
        results = attend(q, k, v, words, alibi_slopes, return_softmax, cu_seqlens, cu_seqlens)
        if is_grad_enabled:
            save(ctx, q, k, v, results, words, alibi_slopes, cu_seqlens, cu_seqlens)
        return outputs(ctx, results, return_softmax)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None = None, *_: Any) -> Any:
        saved = ctx.saved_tensors
        q = saved[0]
        dqkv = q.new_empty((q.shape[0], 3, q.shape[1], q.shape[2]))
        differentiate(ctx.words, ctx.plan, saved, dout, dlse, *dqkv.unbind(1))
        return dqkv, *(None,) * 11


class FlashAttnVarlenKVPackedFunc(torch.autograd.Function):
    """Attention of a packed batch of q and kv (total_k, 2, nheads_k, headdim)."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        kv: Tensor,
        cu_seqlens_q: Tensor,
        cu_seqlens_k: Tensor,
        max_seqlen_q: int,
        max_seqlen_k: int,
        dropout_p: float,
        softmax_scale: float | None,
        causal: bool,
        window_size: Sequence[int],
        softcap: float,
        alibi_slopes: Tensor | None,
        deterministic: bool,
        return_softmax: bool,
        is_grad_enabled: bool = True,
    ) -> Any:
        k, v = kv.unbind(1)
        words = make_words(
            q.shape[-1],
            dropout_p,
            softmax_scale,
            causal,
            window_size,
            softcap,
            deterministic,
            max_seqlen_q,
            max_seqlen_k,
        )
        results = attend(q, k, v, words, alibi_slopes, return_softmax, cu_seqlens_q, cu_seqlens_k)
        if is_grad_enabled:
            save(ctx, q, k, v, results, words, alibi_slopes, cu_seqlens_q, cu_seqlens_k)
        return outputs(ctx, results, return_softmax)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None = None, *_: Any) -> Any:
        saved = ctx.saved_tensors
        q, k = saved[:2]
        dq = empty_gradient(q)
        dkv = k.new_empty((k.shape[0], 2, k.shape[1], k.shape[2]))
        differentiate(ctx.words, ctx.plan, saved, dout, dlse, dq, *dkv.unbind(1))
        return dq, dkv, *(None,) * 13


class FlashAttnFunction(torch.autograd.Function):
    """Dense attention with the window's sides as separate arguments; returns out, or (out, softmax_lse)."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        causal: bool = False,
        softmax_scale: float | None = None,
        window_size_left: int = -1,
        window_size_right: int = -1,
        alibi_slopes: Tensor | None = None,
        return_softmax_lse: bool = False,
    ) -> Any:
        words = make_words(q.shape[-1], 0.0, softmax_scale, causal, (window_size_left, window_size_right), 0.0, False)
        results = attend(q, k, v, words, alibi_slopes, False)
        save(ctx, q, k, v, results, words, alibi_slopes)
        return outputs(ctx, results, return_softmax_lse)[:2] if return_softmax_lse else results[0]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None = None, *_: Any) -> Any:
        return *FlashAttnFunc.backward(ctx, dout, dlse)[:3], *(None,) * 6


class FlashAttnVarlenFunction(torch.autograd.Function):
    """Attention of a packed batch with the window's sides as separate arguments; returns out, or (out, softmax_lse)."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cu_seqlens_q: Tensor,
        cu_seqlens_k: Tensor,
        max_seqlen_q: int,
        max_seqlen_k: int,
        causal: bool = False,
        softmax_scale: float | None = None,
        window_size_left: int = -1,
        window_size_right: int = -1,
        alibi_slopes: Tensor | None = None,
        return_softmax_lse: bool = False,
    ) -> Any:
        window = (window_size_left, window_size_right)
        words = make_words(q.shape[-1], 0.0, softmax_scale, causal, window, 0.0, False, max_seqlen_q, max_seqlen_k)
        results = attend(q, k, v, words, alibi_slopes, False, cu_seqlens_q, cu_seqlens_k)
        save(ctx, q, k, v, results, words, alibi_slopes, cu_seqlens_q, cu_seqlens_k)
        return outputs(ctx, results, return_softmax_lse)[:2] if return_softmax_lse else results[0]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None = None, *_: Any) -> Any:
        return *FlashAttnVarlenFunc.backward(ctx, dout, dlse)[:3], *(None,) * 10


def flash_attn_func_with_grad(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    causal: bool = False,
    softmax_scale: float | None = None,
    *,
    dropout_p: float = 0.0,
    window_size: Sequence[int] | None = None,
    window_size_left: int = -1,
    window_size_right: int = -1,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_softmax_lse: bool = False,
) -> Any:
    """Differentiable dense attention; `flash_attn_func` with the window as one pair or side by side.

    Args:
        q: (batch_size, seqlen_q, nheads, headdim); k and v (batch_size, seqlen_k, nheads_k, headdim).
        window_size: (left, right); overrides window_size_left and window_size_right when given.
        return_softmax_lse: return (out, softmax_lse) instead of out.

    The other arguments and errors are those of `flash_attn_func`.
    """
    window = (window_size_left, window_size_right) if window_size is None else window_size
    result = run(
        FlashAttnFunc,
        q,
        k,
        v,
        dropout_p,
        softmax_scale,
        causal,
        window,
        softcap,
        alibi_slopes,
        deterministic,
        return_softmax_lse,
    )
    return result[:2] if return_softmax_lse else result
