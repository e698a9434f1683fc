"""Operators for what upstream's have no argument for: sinks, a gradient of softmax_lse. Dense and packed batches alike.

Calls without either take the operators of `torch_ops`, whose names and arguments are upstream's.
"""

from typing import Any

import torch
from torch import Tensor

from flash_attn import dispatch, torch_ops
from flash_attn.sinks import sink_gradient


@torch.library.custom_op("flash_attn::_attention_forward", mutates_args=(), **torch_ops.RANDOM)
def _attention_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    s_aux: Tensor,
    dropout_p: float,
    softmax_scale: float,
    causal: bool,
    window_size_left: int,
    window_size_right: int,
    softcap: float,
    alibi_slopes: Tensor | None,
    return_softmax: bool,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    max_seqlen_q: int | None,
    max_seqlen_k: int | None,
    block_table: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(out, softmax_lse, S_dmask, rng_state), as upstream's operators."""
    results = dispatch.forward(
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
        sinks=s_aux,
    )
    return torch_ops.four_tensors(*results[:4])


@_attention_forward.register_fake
def _attention_forward_fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    s_aux: Tensor,
    dropout_p: float,
    softmax_scale: float,
    causal: bool,
    window_size_left: int,
    window_size_right: int,
    softcap: float,
    alibi_slopes: Tensor | None,
    return_softmax: bool,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    max_seqlen_q: int | None,
    max_seqlen_k: int | None,
    block_table: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    numbers = (dropout_p, softmax_scale, causal, window_size_left, window_size_right, softcap, alibi_slopes)
    if cu_seqlens_q is None:
        return torch_ops._flash_attn_forward_fake(q, k, v, *numbers, return_softmax)
    lengths: Any = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    return torch_ops._flash_attn_varlen_forward_fake(q, k, v, *lengths, *numbers, return_softmax)


@torch.library.custom_op("flash_attn::_attention_backward", mutates_args=("dq", "dk", "dv"))
def _attention_backward(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    softmax_lse: Tensor,
    s_aux: Tensor | None,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    dropout_p: float,
    softmax_scale: float,
    causal: bool,
    window_size_left: int,
    window_size_right: int,
    softcap: float,
    alibi_slopes: Tensor | None,
    deterministic: bool,
    rng_state: Tensor | None,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    max_seqlen_q: int | None,
    max_seqlen_k: int | None,
) -> Tensor:
    """Writes dq, dk and dv; returns the gradient of s_aux, empty without one."""
    delta = dispatch.backward(
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
        dlse=dlse,
    )
    return delta.new_empty(0) if s_aux is None else sink_gradient(s_aux, softmax_lse, delta, cu_seqlens_q)


@_attention_backward.register_fake
def _attention_backward_fake(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    softmax_lse: Tensor,
    s_aux: Tensor | None,
    *_: Any,
) -> Tensor:
    return softmax_lse.new_empty(0) if s_aux is None else s_aux.new_empty(s_aux.shape)


_ops: Any = torch.ops.flash_attn
_wrapped_attention_forward = _ops._attention_forward
_wrapped_attention_backward = _ops._attention_backward
