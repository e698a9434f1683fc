"""Operators for what upstream's have no argument for: a gradient of softmax_lse. Dense and packed batches alike.

Calls without it take the operators of `torch_ops`, whose names and arguments are upstream's.
"""

from typing import Any

import torch
from torch import Tensor

from flash_attn import dispatch


@torch.library.custom_op("flash_attn::_attention_backward", mutates_args=("dq", "dk", "dv"))
def _attention_backward(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    softmax_lse: Tensor,
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
) -> None:
    dispatch.backward(
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


_ops: Any = torch.ops.flash_attn
_wrapped_attention_backward = _ops._attention_backward
