"""The autograd class of attention with sinks: a class of its own, so that upstream's keep their arguments."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from flash_attn.backward.call import Words, attend, differentiate, make_words, once_differentiable, outputs
from flash_attn.dispatch import empty_gradient


class FlashAttnSinkFunc(torch.autograd.Function):
    """Attention with sinks of a dense or a packed batch; keys may lie in pages, which carry no gradient."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        s_aux: Tensor,
        cu_seqlens_q: Tensor | None,
        cu_seqlens_k: Tensor | None,
        max_seqlen_q: int | None,
        max_seqlen_k: int | None,
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
        numbers = (dropout_p, softmax_scale, causal, window_size, softcap, deterministic, max_seqlen_q, max_seqlen_k)
        words: Words = make_words(q.shape[-1], *numbers)
        results = attend(q, k, v, words, alibi_slopes, return_softmax, cu_seqlens_q, cu_seqlens_k, block_table, s_aux)
        if is_grad_enabled:
            out, softmax_lse, _, rng_state, ctx.plan = results
            batch = (alibi_slopes, cu_seqlens_q, cu_seqlens_k, block_table)
            ctx.save_for_backward(q, k, v, out, softmax_lse, rng_state, *batch, s_aux)
            ctx.words = words
        return outputs(ctx, results, return_softmax)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None = None, *_: Any) -> Any:
        *saved, sinks = ctx.saved_tensors
        q, k, v = saved[:3]
        dq, dk, dv = empty_gradient(q), empty_gradient(k), empty_gradient(v)
        dsink = differentiate(ctx.words, ctx.plan, saved, dout, dlse, dq, dk, dv, sinks)
        return dq, dk, dv, dsink, *(None,) * 14
