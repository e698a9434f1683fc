"""The specification as a backend: flash_attn.reference and the written-out gradients, on any device and any dtype.

Memory is quadratic: several matrices of seqlen_q x seqlen_k x nheads in float32 (float64 for float64 inputs) live at
once, for one sequence of a packed batch at a time, for all the sequences of a dense one. It is for checking, for
float64 on GPUs, and for hardware that nothing else serves.
"""

import math

import torch
from torch import Tensor

from flash_attn import random_bits, reference
from flash_attn.backends import spans
from flash_attn.backends.base import Append, ForwardResult, Gradients, Operands
from flash_attn.backends.cache_append import append_tokens
from flash_attn.backends.spans import Span
from flash_attn.backward.reference_impl import pytorch_flash_attention_backward
from flash_attn.hardware import Hardware
from flash_attn.problem import AttentionProblem

name = "reference"


def unsupported(problem: AttentionProblem, hardware: Hardware) -> str | None:
    """It runs every problem whose score matrices fit in memory."""
    return None


def forward(problem: AttentionProblem, operands: Operands, return_scores: bool = False) -> ForwardResult:
    """Span by span; rows outside every sequence get out 0 and softmax_lse -inf."""
    q = operands.q
    compute_dtype = spans.accumulator(q.dtype)
    result = spans.allocate_result(operands, return_scores)
    for span in spans.spans(operands):
        q_span, keep = spans.queries(q, span), _keep(operands, span)
        k_span, v_span = (spans.keys(x, span, operands.block_table) for x in (operands.k, operands.v))
        out_span, lse_span = reference.attention(
            q_span,
            k_span,
            v_span,
            softmax_scale=operands.softmax_scale,
            window=operands.window,
            softcap=operands.softcap,
            alibi_slopes=spans.slopes(operands, span),
            keep=keep,
            dropout_p=operands.dropout_p,
            sinks=operands.sinks,
            compute_dtype=compute_dtype,
        )
        spans.queries(result.out, span).copy_(out_span)
        spans.statistic(result.softmax_lse, span).copy_(lse_span)
        if result.dropout_scores is not None and keep is not None:
            scores = result.dropout_scores.narrow(0, span.first, span.num_sequences)
            _write_scores(scores, operands, span, q_span.to(compute_dtype), k_span.to(compute_dtype), keep)
    return result


def backward(
    problem: AttentionProblem,
    operands: Operands,
    dout: Tensor,
    out: Tensor,
    softmax_lse: Tensor,
    gradients: Gradients,
) -> Tensor:
    """Span by span; tokens outside every sequence get gradient 0."""
    compute_dtype = spans.accumulator(operands.q.dtype)
    delta = spans.softmax_delta(dout, out, operands.dlse, softmax_lse)
    left, right = (-1 if side is None else side for side in operands.window)
    spans.blank_gradients(operands, gradients)
    for span in spans.spans(operands):
        dq, dk, dv = pytorch_flash_attention_backward(
            spans.queries(dout, span),
            spans.queries(operands.q, span),
            spans.keys(operands.k, span),
            spans.keys(operands.v, span),
            spans.queries(out, span),
            spans.statistic(softmax_lse, span),
            softmax_scale=operands.softmax_scale,
            window_size=(left, right),
            softcap=operands.softcap,
            alibi_slopes=spans.slopes(operands, span),
            keep=_keep(operands, span),
            dropout_p=operands.dropout_p,
            compute_dtype=compute_dtype,
            dlse=None if operands.dlse is None else spans.statistic(operands.dlse, span),
        )
        spans.queries(gradients.dq, span).copy_(dq)
        spans.keys(gradients.dk, span).copy_(dk)
        spans.keys(gradients.dv, span).copy_(dv)
    return delta


@torch.no_grad()
def attend_cache(
    problem: AttentionProblem, operands: Operands, append: Append | None, num_splits: int
) -> ForwardResult:
    """The new tokens into the caches, then `forward` over them; splits would change nothing here."""
    if append is not None:
        operands = operands._replace(q=append_tokens(operands, append))
    return forward(problem, operands)


def _keep(operands: Operands, span: Span) -> Tensor | None:
    """(num_sequences, nheads, seqlen_q, seqlen_k), or None without dropout."""
    if operands.rng_state is None or operands.dropout_p == 0.0:
        return None
    rows, cols = (torch.arange(length, device=operands.q.device) for length in (span.seqlen_q, span.seqlen_k))
    heads = spans.batch_heads(operands, span)
    keep = random_bits.keep_mask(operands.rng_state, operands.dropout_p, heads, rows, cols)
    return keep.unflatten(0, (span.num_sequences, operands.q.shape[-2]))


def _write_scores(scores: Tensor, operands: Operands, span: Span, q: Tensor, k: Tensor, keep: Tensor) -> None:
    """exp(score - row maximum), negative where dropped, into one span's S_dmask."""
    if span.seqlen_q == 0 or span.seqlen_k == 0:
        return
    s = reference.scores(
        q,
        k,
        softmax_scale=operands.softmax_scale,
        softcap=operands.softcap,
        alibi_slopes=spans.slopes(operands, span),
    )
    s = s.masked_fill(~reference.visible(span.seqlen_q, span.seqlen_k, operands.window, q.device), -math.inf)
    p = torch.exp(s - s.amax(-1, keepdim=True).nan_to_num(neginf=0.0))
    tile = scores[:, :, : span.seqlen_q, : span.seqlen_k]
    tile.copy_(torch.where(keep, p, -p)[:, :, : tile.shape[2], : tile.shape[3]])
