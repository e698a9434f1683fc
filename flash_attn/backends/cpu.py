"""Attention on the CPU: PyTorch's fused operator where it applies, strips of PyTorch operations elsewhere.

The fused operator (`aten::_scaled_dot_product_flash_attention_for_cpu`) knows full attention of any lengths and causal
masks of square ones, returns the logsumexp and has a backward. It crashes the process on empty sequences, hides keys
before it scales (NaN for a negative scale), reads keys of heads that do not exist where heads share them (torch 2.6), and
sums dk and dv in a half type; so it gets none of the first three, and half types as float32.

A strip is some query rows of some heads by all the keys those rows see: the softmax needs no second pass, and memory is
a fixed number of elements or, for longer rows, a few rows. Sums are in float32, and in float64 for float64.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from flash_attn import random_bits
from flash_attn.backends import spans
from flash_attn.backends.base import Append, ForwardResult, Gradients, Operands
from flash_attn.backends.cache_append import append_tokens
from flash_attn.backends.spans import Span
from flash_attn.hardware import Hardware
from flash_attn.problem import AttentionProblem, canonical_window

name = "cpu"

STRIP_ELEMENTS = 1 << 19  # scores of one strip
STRIP_ROWS = 128  # at most

_aten: Any = torch.ops.aten
_fused_forward = _aten._scaled_dot_product_flash_attention_for_cpu
_fused_backward = _aten._scaled_dot_product_flash_attention_for_cpu_backward
# 2.11 is the oldest release in which it was tested
FUSED_SHARES_HEADS = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 11)


def unsupported(problem: AttentionProblem, hardware: Hardware) -> str | None:
    """Why the CPU cannot run the problem, or None."""
    if hardware.kind != "cpu":
        return f"it computes on the CPU, and these tensors are on {hardware.kind}"
    return None


def forward(problem: AttentionProblem, operands: Operands, return_scores: bool = False) -> ForwardResult:
    """Span by span; rows outside every sequence get out 0 and softmax_lse -inf, or the sink."""
    q = operands.q
    work = spans.accumulator(q.dtype)
    result = spans.allocate_result(operands, return_scores)
    for span in _nonempty_spans(operands):
        q_span = spans.queries(q, span).to(work)
        k_span, v_span = (spans.keys(x, span, operands.block_table).to(work) for x in (operands.k, operands.v))
        causal = _fused_causal(operands, span)
        if causal is None:
            strips = StripAttention(operands, span, q_span, k_span, v_span)
            out_span, lse_span = strips.forward()
            if result.dropout_scores is not None:
                strips.write_scores(result.dropout_scores)
        else:
            out_span, lse_span = _fused_forward(
                q_span.transpose(1, 2),
                k_span.transpose(1, 2),
                v_span.transpose(1, 2),
                0.0,
                causal,
                scale=operands.softmax_scale,
            )
            out_span = out_span.transpose(1, 2)
        out_span, lse_span = spans.with_sinks(out_span, lse_span, operands.sinks)
        spans.queries(result.out, span).copy_(out_span)
        spans.statistic(result.softmax_lse, span).copy_(lse_span)
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
    work = spans.accumulator(operands.q.dtype)
    delta = spans.softmax_delta(dout, out, operands.dlse, softmax_lse)
    spans.blank_gradients(operands, gradients)
    for span in _nonempty_spans(operands):
        q_span, dout_span = (spans.queries(x, span).to(work) for x in (operands.q, dout))
        k_span, v_span = (spans.keys(x, span).to(work) for x in (operands.k, operands.v))
        lse_span = spans.statistic(softmax_lse, span).to(work)
        causal = _fused_causal(operands, span)
        if causal is None:
            strips = StripAttention(operands, span, q_span, k_span, v_span)
            dq, dk, dv = strips.backward(dout_span, lse_span, spans.statistic(delta, span))
        else:
            tensors = (dout_span, q_span, k_span, v_span, spans.queries(out, span).to(work))
            transposed = _fused_backward(
                *(x.transpose(1, 2) for x in tensors), lse_span, 0.0, causal, scale=operands.softmax_scale
            )
            dq, dk, dv = (x.transpose(1, 2) for x in transposed)
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


def _fused_causal(operands: Operands, span: Span) -> bool | None:
    """The fused operator's `is_causal` for a span; None where the operator does not apply."""
    if (
        operands.dlse is not None
        or operands.softcap > 0.0
        or operands.dropout_p > 0.0
        or operands.alibi_slopes is not None
    ):
        return None
    if operands.q.shape[-2] != operands.k.shape[-2] and not FUSED_SHARES_HEADS:
        return None
    left, right = _span_window(operands, span)
    if left is not None or operands.softmax_scale <= 0.0:
        return None
    if right is None:
        return False
    return True if right == 0 and span.seqlen_q == span.seqlen_k else None


def _span_window(operands: Operands, span: Span) -> tuple[int | None, int | None]:
    """The window as far as it hides any key of the span's own lengths."""
    left, right = (-1 if side is None else side for side in operands.window)
    return canonical_window(False, left, right, span.seqlen_q, span.seqlen_k)


def _nonempty_spans(operands: Operands) -> Iterator[Span]:
    nheads = operands.q.shape[-2]
    return (s for s in spans.spans(operands) if s.num_sequences * s.seqlen_q * s.seqlen_k * nheads > 0)


class Strip(NamedTuple):
    """Rows of some key heads' query groups, by the keys that any of these rows sees."""

    heads: slice
    rows: slice
    cols: slice


class StripAttention:
    """Attention of one span strip by strip, with every feature.

    Tensors are by key head, n = num_sequences * nheads_k of them: queries (n, group, seqlen_q, headdim), keys
    (n, seqlen_k, headdim), scores of a strip (some of n, group, rows, cols).
    """

    def __init__(self, operands: Operands, span: Span, q: Tensor, k: Tensor, v: Tensor) -> None:
        self.operands = operands
        self.span = span
        self.num_sequences, self.nheads_k = k.shape[0], k.shape[2]
        self.group = q.shape[2] // self.nheads_k
        self.window = _span_window(operands, span)
        self.offset = span.seqlen_k - span.seqlen_q
        self.q = self._group_heads(q * operands.softmax_scale)
        self.k, self.v = (x.transpose(1, 2).flatten(0, 1) for x in (k, v))
        slopes = spans.slopes(operands, span)
        self.slopes = None if slopes is None else slopes.reshape(-1, self.group, 1, 1).to(q.dtype)
        self.batch_heads = spans.batch_heads(operands, span).view(-1, self.group)

    def forward(self) -> tuple[Tensor, Tensor]:
        """out (num_sequences, seqlen_q, nheads, headdim), softmax_lse (num_sequences, nheads, seqlen_q)."""
        out = torch.zeros_like(self.q)
        softmax_lse = self.q.new_full(self.q.shape[:-1], -torch.inf)
        keep_probability = 1.0 - self.operands.dropout_p
        for strip in self._strips():
            p, row_max = self._exponentials(strip)
            row_sum = p.sum(-1, keepdim=True)  # at least 1, 0 for a row that sees no key
            softmax_lse[strip.heads, :, strip.rows] = (row_max + row_sum.log()).squeeze(-1)
            if self.operands.dropout_p > 0.0:
                p.mul_(self._keep(strip))
            o = torch.bmm(p.flatten(1, 2), self.v[strip.heads, strip.cols]).unflatten(1, (self.group, -1))
            out[strip.heads, :, strip.rows] = o / row_sum.masked_fill(row_sum == 0.0, 1.0).mul_(keep_probability)
        return self._ungroup_heads(out), softmax_lse.view(self.num_sequences, -1, self.span.seqlen_q)

    def backward(self, dout: Tensor, softmax_lse: Tensor, delta: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """dq, dk, dv, (num_sequences, seqlen, heads, headdim)."""
        dout = self._group_heads(dout)
        # a row that sees no key: exp(-inf - 0) = 0
        lse = softmax_lse.masked_fill(softmax_lse == -torch.inf, 0.0)
        lse, delta = (x.reshape(-1, self.group, self.span.seqlen_q, 1) for x in (lse, delta))
        dq, dk, dv = torch.zeros_like(self.q), torch.zeros_like(self.k), torch.zeros_like(self.v)
        for strip in self._strips():
            heads, rows, cols = strip
            dout_rows, q_rows = dout[heads, :, rows].flatten(1, 2), self.q[heads, :, rows].flatten(1, 2)
            scores, tanh = self._scores(strip)
            p = scores.sub_(lse[heads, :, rows]).exp_()
            dp = torch.bmm(dout_rows, self.v[heads, cols].mT).view_as(p)
            dropped = p
            if self.operands.dropout_p > 0.0:
                factor = self._keep(strip).to(p.dtype).mul_(1.0 / (1.0 - self.operands.dropout_p))
                dropped = p * factor
                dp.mul_(factor)
            dv[heads, cols].baddbmm_(dropped.flatten(1, 2).mT, dout_rows)
            ds = dp.sub_(delta[heads, :, rows]).mul_(p)
            if tanh is not None:
                ds.mul_(1.0 - tanh.square_())
            ds = ds.flatten(1, 2)
            dq[heads, :, rows] = torch.bmm(ds, self.k[heads, cols]).unflatten(1, (self.group, -1))
            dk[heads, cols].baddbmm_(ds.mT, q_rows)
        dq.mul_(self.operands.softmax_scale)
        dk, dv = (x.unflatten(0, (self.num_sequences, -1)).transpose(1, 2) for x in (dk, dv))
        return self._ungroup_heads(dq), dk, dv

    def write_scores(self, scores: Tensor) -> None:
        """exp(score - row maximum), negative where dropped, into S_dmask as far as its maximum lengths reach."""
        target = scores.narrow(0, self.span.first, self.num_sequences).unflatten(1, (-1, self.group)).flatten(0, 1)
        for strip in self._strips():
            p, _ = self._exponentials(strip)
            p = torch.where(self._keep(strip), p, -p)
            tile = target[strip.heads, :, strip.rows, strip.cols]
            tile.copy_(p[:, :, : tile.shape[2], : tile.shape[3]])

    def _exponentials(self, strip: Strip) -> tuple[Tensor, Tensor]:
        """exp(score - row maximum) and the row maximum (heads, group, rows, 1), 0 for a row that sees no key."""
        scores, _ = self._scores(strip)
        row_max = scores.amax(-1, keepdim=True)
        row_max.masked_fill_(row_max == -torch.inf, 0.0)
        return scores.sub_(row_max).exp_(), row_max

    def _scores(self, strip: Strip) -> tuple[Tensor, Tensor | None]:
        """Natural-log scores, -inf where hidden, and with softcap the tanh that it took."""
        heads, rows, cols = strip
        scores = torch.bmm(self.q[heads, :, rows].flatten(1, 2), self.k[heads, cols].mT)
        scores = scores.unflatten(1, (self.group, -1))
        tanh = None
        if self.operands.softcap > 0.0:
            tanh = scores.div_(self.operands.softcap).tanh_()
            scores = tanh * self.operands.softcap
        left, right = self._hiding_sides(strip)
        if self.slopes is None and left is None and right is None:
            return scores, tanh
        distance = torch.arange(rows.start, rows.stop)[:, None] + self.offset - torch.arange(cols.start, cols.stop)
        if self.slopes is not None:
            scores.addcmul_(self.slopes[heads], distance.abs().to(scores.dtype), value=-1.0)
        if left is not None:
            scores.masked_fill_(distance > left, -torch.inf)
        if right is not None:
            scores.masked_fill_(distance < -right, -torch.inf)
        return scores, tanh

    def _hiding_sides(self, strip: Strip) -> tuple[int | None, int | None]:
        """The window, without a side that hides no key of the strip."""
        left, right = self.window
        farthest_left = strip.rows.stop - 1 + self.offset - strip.cols.start
        farthest_right = strip.cols.stop - 1 - (strip.rows.start + self.offset)
        return (
            left if left is not None and farthest_left > left else None,
            right if right is not None and farthest_right > right else None,
        )

    def _keep(self, strip: Strip) -> Tensor:
        """Which weights dropout keeps, bool."""
        heads = self.batch_heads[strip.heads]
        rows, cols = (torch.arange(side.start, side.stop) for side in (strip.rows, strip.cols))
        rng_state = cast(Tensor, self.operands.rng_state)  # given when weights are dropped
        keep = random_bits.keep_mask(rng_state, self.operands.dropout_p, heads.flatten(), rows, cols)
        return keep.unflatten(0, heads.shape)

    def _strips(self) -> Iterator[Strip]:
        """Strips in order of rows; rows that see no key are left out where whole strips of them are."""
        left, right = self.window
        seqlen_q, seqlen_k = self.span.seqlen_q, self.span.seqlen_k
        reach = seqlen_k if left is None or right is None else min(seqlen_k, STRIP_ROWS + left + right)
        num_rows = max(1, min(STRIP_ELEMENTS // (self.group * reach), STRIP_ROWS, seqlen_q))
        num_heads = max(1, STRIP_ELEMENTS // (self.group * reach * num_rows))
        for head in range(0, self.k.shape[0], num_heads):
            for row in range(0, seqlen_q, num_rows):
                end = min(row + num_rows, seqlen_q)
                begin_k = 0 if left is None else max(0, row + self.offset - left)
                end_k = seqlen_k if right is None else min(seqlen_k, end + self.offset + right)
                if begin_k < end_k:
                    yield Strip(slice(head, head + num_heads), slice(row, end), slice(begin_k, end_k))

    def _group_heads(self, x: Tensor) -> Tensor:
        """(num_sequences, seqlen, nheads, headdim) -> (num_sequences * nheads_k, group, seqlen, headdim)."""
        return x.transpose(1, 2).reshape(-1, self.group, x.shape[1], x.shape[3])

    def _ungroup_heads(self, x: Tensor) -> Tensor:
        """The inverse of `_group_heads`."""
        return x.unflatten(0, (self.num_sequences, -1)).flatten(1, 2).transpose(1, 2)
