"""Attention sinks outside the kernels. Imports torch only.

A sink is one more score of every row of a head, whose value is zero:

    lse_i = log(exp(sink) + sum_j exp(s_ij))        out_i = sum_j exp(s_ij - lse_i) v_j

The weights of the keys are exp(s - lse) as ever, so the gradients of q, k and v know nothing of it.
"""

import torch
from torch import Tensor

from flash_attn.errors import InvalidArgument


def one_name(s_aux: Tensor | None, learnable_sink: Tensor | None) -> Tensor | None:
    """The sinks, which callers name s_aux (FlashAttention-3 as vLLM has it) or learnable_sink (FlashAttention-4)."""
    if learnable_sink is None:
        return s_aux
    if s_aux is not None:
        raise InvalidArgument(
            f"s_aux and learnable_sink are two names of one argument, got both, of shapes {tuple(s_aux.shape)} and "
            f"{tuple(learnable_sink.shape)}"
        )
    return learnable_sink


def sink_gradient(sinks: Tensor, softmax_lse: Tensor, delta: Tensor, cu_seqlens_q: Tensor | None) -> Tensor:
    """dsink = -sum over the rows of a head of P_sink delta, P_sink = exp(sink - lse): dS = P (dP - delta) with dP = 0.

    Args:
        softmax_lse: (batch_size, nheads, seqlen_q), packed (nheads, total_q), sinks included.
        delta: like softmax_lse, rowsum(dout * out) - dlse.
        cu_seqlens_q: of a packed batch, whose rows before the first and after the last sequence hold anything.
    """
    weights = torch.exp(sinks.to(softmax_lse.dtype)[:, None] - softmax_lse)
    terms = (weights * delta).masked_fill(softmax_lse == -torch.inf, 0.0)
    if cu_seqlens_q is not None:
        rows = torch.arange(terms.shape[-1], device=terms.device)
        terms = terms.masked_fill((rows < cu_seqlens_q[0]) | (rows >= cu_seqlens_q[-1]), 0.0)
    total = terms.sum(-1) if terms.dim() == 2 else terms.sum((0, 2))
    return total.neg().to(sinks.dtype)
