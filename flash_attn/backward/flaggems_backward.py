"""Gradients under FlagGems' name: dense and packed entry points that write dq, dk and dv.

They ask for the backend `flaggems`. FlagGems has no attention gradient that is right on a domain known beforehand
(docs/flaggems_backward_analysis.md), so the table of backends routes them to the first that computes gradients, from
FlagGems' out and softmax_lse as from any other forward's. The logger "flash_attn" says so once, at level info, and
`backends.explain` shows it.
"""

import torch
from torch import Tensor

from flash_attn import dispatch
from flash_attn.backends import use
from flash_attn.backward.call import make_words


@torch.no_grad()
def flaggems_flash_attn_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    softmax_lse: Tensor,
    dq: Tensor | None = None,
    dk: Tensor | None = None,
    dv: Tensor | None = None,
    causal: bool = False,
    softmax_scale: float | None = None,
    window_size_left: int = -1,
    window_size_right: int = -1,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of dense attention with respect to q, k and v, from the results of its forward.

    Args:
        dout: (batch_size, seqlen_q, nheads, headdim), the gradient of out.
        q: like dout, fp16, bf16, fp32 or fp64.
        k: (batch_size, seqlen_k, nheads_k, headdim).
        v: like k.
        out: like q, of the forward.
        softmax_lse: (batch_size, nheads, seqlen_q), of the forward, natural log.
        dq: like q; written and returned when given. So are dk and dv.
        causal: hide keys after the bottom right diagonal; overrides window_size_right.
        softmax_scale: multiplies q k^T; default headdim**-0.5.
        window_size_left: keys visible left of the diagonal; -1 is unbounded. So is window_size_right.
        alibi_slopes: (nheads,) or (batch_size, nheads), fp32.
        deterministic: bitwise reproducible gradients.

    Returns:
        dq, dk, dv: like q, k, v.

    Raises:
        InvalidArgument: shapes, dtypes, devices or ranges disagree; the message names both values.
        UnsupportedProblem: no backend can run it; the message lists each backend's reason.
    """
    window_size = (window_size_left, window_size_right)
    words = make_words(q.shape[-1], 0.0, softmax_scale, causal, window_size, 0.0, deterministic)
    gradients = _or_empty(dq, q), _or_empty(dk, k), _or_empty(dv, v)
    with use("flaggems"):
        dispatch.backward(
            dout,
            q,
            k,
            v,
            out,
            softmax_lse,
            *gradients,
            words.dropout_p,
            words.softmax_scale,
            words.causal,
            *words.window_size,
            words.softcap,
            alibi_slopes,
            words.deterministic,
            None,
        )
    return gradients


@torch.no_grad()
def flaggems_flash_attn_varlen_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    softmax_lse: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dq: Tensor | None = None,
    dk: Tensor | None = None,
    dv: Tensor | None = None,
    causal: bool = False,
    softmax_scale: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of attention of a packed batch, computed packed: nothing is padded.

    Args:
        dout: (total_q, nheads, headdim), the gradient of out.
        q: like dout.
        k: (total_k, nheads_k, headdim).
        v: like k.
        out: like q, of the forward.
        softmax_lse: (nheads, total_q), of the forward, natural log.
        cu_seqlens_q: (batch_size + 1,), int32: sequence b holds rows cu_seqlens_q[b] to cu_seqlens_q[b + 1].
        cu_seqlens_k: (batch_size + 1,), int32.
        max_seqlen_q: host int, at least the longest query sequence.
        max_seqlen_k: host int, at least the longest key sequence.

    The other arguments, results and errors are those of `flaggems_flash_attn_backward`.
    """
    words = make_words(
        q.shape[-1], 0.0, softmax_scale, causal, (-1, -1), 0.0, False, int(max_seqlen_q), int(max_seqlen_k)
    )
    gradients = _or_empty(dq, q), _or_empty(dk, k), _or_empty(dv, v)
    with use("flaggems"):
        dispatch.backward(
            dout,
            q,
            k,
            v,
            out,
            softmax_lse,
            *gradients,
            words.dropout_p,
            words.softmax_scale,
            words.causal,
            *words.window_size,
            words.softcap,
            None,
            words.deterministic,
            None,
            cu_seqlens_q=cu_seqlens_q,
            cu_seqlens_k=cu_seqlens_k,
            max_seqlen_q=words.max_seqlen_q,
            max_seqlen_k=words.max_seqlen_k,
        )
    return gradients


def _or_empty(gradient: Tensor | None, like: Tensor) -> Tensor:
    return torch.empty_like(like, memory_format=torch.contiguous_format) if gradient is None else gradient
