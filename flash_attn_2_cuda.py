"""Upstream's compiled extension, in Python: the same functions with the same positional arguments.

xformers and others call these through `flash_attn.flash_attn_interface.flash_attn_gpu`. `out_`, `dq_`, `dk_` and `dv_` are
filled when given.

Source: flash_attn 2.8.3, csrc/flash_attn/flash_api.cpp.
"""

from typing import Any

import torch
from torch import Tensor

from flash_attn import dispatch, torch_ops
from flash_attn.errors import InvalidArgument
from flash_attn.problem_kvcache import CacheTensors


def fwd(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out_: Tensor | None,
    alibi_slopes_: Tensor | None,
    p_dropout: float,
    softmax_scale: float,
    is_causal: bool,
    window_size_left: int,
    window_size_right: int,
    softcap: float,
    return_softmax: bool,
    gen_: torch.Generator | None = None,
) -> list[Tensor]:
    """[out, softmax_lse, S_dmask, rng_state] of a dense batch."""
    _check_return_softmax(return_softmax, p_dropout)
    results = dispatch.forward(
        q,
        k,
        v,
        p_dropout,
        softmax_scale,
        is_causal,
        window_size_left,
        window_size_right,
        softcap,
        alibi_slopes_,
        return_softmax,
        generator=gen_,
    )
    return _filled(out_, torch_ops.four_tensors(*results[:4]))


def varlen_fwd(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out_: Tensor | None,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    seqused_k: Tensor | None,
    leftpad_k_: Tensor | None,
    block_table_: Tensor | None,
    alibi_slopes_: Tensor | None,
    max_seqlen_q: int,
    max_seqlen_k: int,
    p_dropout: float,
    softmax_scale: float,
    zero_tensors: bool,
    is_causal: bool,
    window_size_left: int,
    window_size_right: int,
    softcap: float,
    return_softmax: bool,
    gen_: torch.Generator | None = None,
    num_splits: int = 0,
) -> list[Tensor]:
    """[out, softmax_lse, S_dmask, rng_state] of a packed batch; num_splits is a hint without effect on the result."""
    _check_return_softmax(return_softmax, p_dropout)
    results = dispatch.forward(
        q,
        k,
        v,
        p_dropout,
        softmax_scale,
        is_causal,
        window_size_left,
        window_size_right,
        softcap,
        alibi_slopes_,
        return_softmax,
        cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_k=cu_seqlens_k,
        max_seqlen_q=max_seqlen_q,
        max_seqlen_k=max_seqlen_k,
        block_table=block_table_,
        leftpad_k=leftpad_k_,
        seqused_k=seqused_k,
        zero_tensors=zero_tensors,
        generator=gen_,
    )
    return _filled(out_, torch_ops.four_tensors(*results[:4]))


def bwd(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    softmax_lse: Tensor,
    dq_: Tensor | None,
    dk_: Tensor | None,
    dv_: Tensor | None,
    alibi_slopes_: Tensor | None,
    p_dropout: float,
    softmax_scale: float,
    is_causal: bool,
    window_size_left: int,
    window_size_right: int,
    softcap: float,
    deterministic: bool,
    gen_: torch.Generator | None = None,
    rng_state: Tensor | None = None,
) -> list[Tensor]:
    """[dq, dk, dv, softmax_d] of a dense batch."""
    dq, dk, dv = _gradients(q, k, v, dq_, dk_, dv_)
    softmax_d = torch_ops._wrapped_flash_attn_backward(
        dout,
        q,
        k,
        v,
        out,
        softmax_lse,
        dq,
        dk,
        dv,
        p_dropout,
        softmax_scale,
        is_causal,
        window_size_left,
        window_size_right,
        softcap,
        alibi_slopes_,
        deterministic,
        rng_state,
    )
    return [dq, dk, dv, softmax_d]


def varlen_bwd(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    softmax_lse: Tensor,
    dq_: Tensor | None,
    dk_: Tensor | None,
    dv_: Tensor | None,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    alibi_slopes_: Tensor | None,
    max_seqlen_q: int,
    max_seqlen_k: int,
    p_dropout: float,
    softmax_scale: float,
    zero_tensors: bool,
    is_causal: bool,
    window_size_left: int,
    window_size_right: int,
    softcap: float,
    deterministic: bool,
    gen_: torch.Generator | None = None,
    rng_state: Tensor | None = None,
) -> list[Tensor]:
    """[dq, dk, dv, softmax_d] of a packed batch."""
    dq, dk, dv = _gradients(q, k, v, dq_, dk_, dv_)
    softmax_d = torch_ops._wrapped_flash_attn_varlen_backward(
        dout,
        q,
        k,
        v,
        out,
        softmax_lse,
        dq,
        dk,
        dv,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q,
        max_seqlen_k,
        p_dropout,
        softmax_scale,
        is_causal,
        window_size_left,
        window_size_right,
        softcap,
        alibi_slopes_,
        deterministic,
        rng_state,
        zero_tensors,
    )
    return [dq, dk, dv, softmax_d]


def fwd_kvcache(
    q: Tensor,
    kcache: Tensor,
    vcache: Tensor,
    k_: Tensor | None,
    v_: Tensor | None,
    seqlens_k_: Tensor | None,
    rotary_cos_: Tensor | None,
    rotary_sin_: Tensor | None,
    cache_batch_idx_: Tensor | None,
    leftpad_k_: Tensor | None,
    block_table_: Tensor | None,
    alibi_slopes_: Tensor | None,
    out_: Tensor | None,
    softmax_scale: float,
    is_causal: bool,
    window_size_left: int,
    window_size_right: int,
    softcap: float,
    is_rotary_interleaved: bool,
    num_splits: int,
) -> list[Tensor]:
    """[out, softmax_lse] of queries over a cache, into which k_ and v_ are written first."""
    results = dispatch.attend_cache(
        q,
        kcache,
        vcache,
        CacheTensors(
            k_,
            v_,
            rotary_cos_,
            rotary_sin_,
            seqlens_k_,
            cache_batch_idx_,
            leftpad_k_,
            block_table_,
            alibi_slopes_,
        ),
        softmax_scale,
        is_causal,
        window_size_left,
        window_size_right,
        softcap,
        is_rotary_interleaved,
        num_splits,
    )
    return _filled(out_, results)


def _check_return_softmax(return_softmax: bool, p_dropout: float) -> None:
    if return_softmax and not p_dropout > 0.0:
        raise InvalidArgument(f"return_softmax is only supported when p_dropout > 0.0, got p_dropout = {p_dropout}")


def _filled(out_: Tensor | None, results: tuple[Tensor, ...]) -> list[Tensor]:
    """The results, with out copied into the caller's tensor when one was given."""
    out, *others = results
    if out_ is None:
        return [out, *others]
    if out_.dtype != out.dtype:
        raise InvalidArgument(f"Output must have the same dtype as inputs, got {out_.dtype} and {out.dtype}")
    if out_.shape != out.shape or out_.device != out.device:
        raise InvalidArgument(
            f"out must have shape {tuple(out.shape)} on {out.device}, got {tuple(out_.shape)} on {out_.device}"
        )
    return [out_.copy_(out), *others]


def _gradients(q: Tensor, k: Tensor, v: Tensor, dq: Tensor | None, dk: Tensor | None, dv: Tensor | None) -> Any:
    """The tensors a backward writes to, new ones where none are given."""
    return tuple(
        dispatch.empty_gradient(like) if given is None else given for given, like in ((dq, q), (dk, k), (dv, v))
    )
