"""The specification: attention in plain PyTorch, quadratic in memory. Imports torch only.

    out = dropout(softmax(scores)) v                lse = log sum exp(scores)        over the visible keys of each row
    scores = cap(softmax_scale q k^T) - slope |d|   cap(s) = softcap tanh(s / softcap)
    d = i + seqlen_k - seqlen_q - j                 key j is visible to row i when -right <= d <= left

A row that sees no key has out = 0 and lse = -inf. A sink is one more score of every row, whose value is zero. Everything is
differentiable by autograd.
"""

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

Window = tuple[int | None, int | None]


def distance(seqlen_q: int, seqlen_k: int, device: torch.device | str | None = None) -> Tensor:
    """d = i + seqlen_k - seqlen_q - j, (seqlen_q, seqlen_k): how far key j lies left of row i's diagonal.

    The diagonal is aligned to the bottom right corner: the last row and the last key have distance 0.
    """
    rows = torch.arange(seqlen_q, device=device)[:, None]
    cols = torch.arange(seqlen_k, device=device)
    return rows + (seqlen_k - seqlen_q) - cols


def visible(seqlen_q: int, seqlen_k: int, window: Window, device: torch.device | str | None = None) -> Tensor:
    """Which keys each row may see, bool (seqlen_q, seqlen_k).

    seqlen_q = 3, seqlen_k = 5, window (None, 0), which is causal:

        1 1 1 0 0
        1 1 1 1 0
        1 1 1 1 1

    Args:
        window: (left, right) keys visible on each side of the diagonal, inclusive; None is unbounded.
    """
    left, right = window
    d = distance(seqlen_q, seqlen_k, device)
    mask = torch.ones_like(d, dtype=torch.bool)
    if left is not None:
        mask &= d <= left
    if right is not None:
        mask &= d >= -right
    return mask


def repeat_heads(x: Tensor, nheads: int) -> Tensor:
    """(B, Sk, Hk, D) -> (B, Sk, H, D): query head h uses key head h // (H // Hk)."""
    return x.repeat_interleave(nheads // x.shape[2], dim=2)


def scores(
    q: Tensor, k: Tensor, *, softmax_scale: float, softcap: float = 0.0, alibi_slopes: Tensor | None = None
) -> Tensor:
    """Natural-log scores before masking, (B, H, Sq, Sk): scale, then softcap, then the ALiBi bias.

    Args:
        q: (B, Sq, H, D).
        k: (B, Sk, Hk, D).
        softcap: c in c tanh(s / c); 0 is off.
        alibi_slopes: (H,) or (B, H); the bias is -slope |i + Sk - Sq - j|.
    """
    batch_size, seqlen_q, nheads, _ = q.shape
    s = torch.einsum("bihd,bjhd->bhij", q, repeat_heads(k, nheads)) * softmax_scale
    if softcap > 0.0:
        s = softcap * torch.tanh(s / softcap)
    if alibi_slopes is not None:
        slopes = alibi_slopes.to(s.dtype).expand(batch_size, nheads)[:, :, None, None]
        s = s - slopes * distance(seqlen_q, k.shape[1], q.device).abs()
    return s


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    softmax_scale: float | None = None,
    window: Window = (None, None),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    keep: Tensor | None = None,
    dropout_p: float = 0.0,
    sinks: Tensor | None = None,
    compute_dtype: torch.dtype = torch.float64,
    round_to: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention of one dense batch.

    Args:
        q: (B, Sq, H, D); any length and the batch may be zero.
        k: (B, Sk, Hk, D), H a multiple of Hk.
        v: like k.
        softmax_scale: multiplies q k^T; default D**-0.5.
        window: (left, right) as in `visible`.
        keep: bool, broadcastable to (B, H, Sq, Sk); where False the weight is dropped. None is no dropout.
        dropout_p: with keep, the kept weights are scaled by 1 / (1 - dropout_p). The lse ignores dropout.
        sinks: (H,), natural-log scores that take part in the softmax of every row: neither scaled, capped, hidden nor dropped.
        round_to: round where a fused kernel rounds: P = exp(scores - row max) before P v, and out. The sum of the
            unrounded P stays in compute_dtype, which should then be the kernel's accumulator, float32.

    Returns:
        out: like q, in round_to or else compute_dtype. softmax_lse: (B, H, Sq), compute_dtype, natural log.

    Source: FlashAttention-2 (arXiv:2307.08691) section 2; upstream's flash_attn_func for mask, softcap and ALiBi.
    """
    q, k, v = (x.to(compute_dtype) for x in (q, k, v))
    softmax_scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    seqlen_k = k.shape[1]
    mask = visible(q.shape[1], seqlen_k, window, q.device)
    s = scores(q, k, softmax_scale=softmax_scale, softcap=softcap, alibi_slopes=alibi_slopes)
    s = s.masked_fill(~mask, -math.inf)
    if sinks is not None:
        sink = sinks.to(compute_dtype)[:, None, None].expand(*s.shape[:-1], 1)
        s, mask = torch.cat([s, sink], -1), torch.cat([mask.expand(s.shape), sink > -math.inf], -1)

    # The padding gives amax a key where there is none; 0 for an empty row keeps exp and its gradient free of NaN.
    row_max = functional.pad(s.detach(), (0, 1), value=-math.inf).amax(-1, keepdim=True).nan_to_num(neginf=0.0)
    p = torch.exp(s - row_max)
    empty = ~mask.any(-1)
    row_sum = p.sum(-1).masked_fill(empty, 1.0)  # (B, H, Sq)
    softmax_lse = (row_max.squeeze(-1) + torch.log(row_sum)).masked_fill(empty, -math.inf)

    p = p[..., :seqlen_k]
    if keep is not None:
        p = p.masked_fill(~keep, 0.0)
        row_sum = row_sum * (1.0 - dropout_p)
    if round_to is not None:
        p = p.to(round_to).to(compute_dtype)
    out = torch.einsum("bhij,bjhd->bihd", p, repeat_heads(v, q.shape[2])) / row_sum.transpose(1, 2)[..., None]
    return out.to(round_to or compute_dtype), softmax_lse


def attention_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    *,
    seqused_k: Tensor | None = None,
    leftpad_k: Tensor | None = None,
    block_table: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    keep: list[Tensor] | None = None,
    compute_dtype: torch.dtype = torch.float64,
    round_to: torch.dtype | None = None,
    **same: Any,
) -> tuple[Tensor, Tensor]:
    """`attention` of each sequence of a packed batch. Rows outside every sequence: out 0, lse -inf.

    Args:
        q: (total_q, H, D); sequence b is rows cu_seqlens_q[b] to cu_seqlens_q[b + 1].
        k: (total_k, Hk, D), or (num_pages, page_block_size, Hk, D) with block_table.
        v: like k.
        seqused_k: (B,) keys in use, left padding included; default the difference of cu_seqlens_k.
        leftpad_k: (B,) keys to skip at the start of each sequence.
        block_table: (B, max_pages); token t of sequence b sits in page block_table[b, t // page_block_size].
        alibi_slopes: (H,) or (B, H).
        keep: one mask per sequence, broadcastable to (1, H, seqlen_q, seqlen_k).
        same: the other arguments of `attention`.

    Returns:
        out: (total_q, H, D). softmax_lse: (H, total_q).
    """
    total_q, nheads, _ = q.shape
    out = q.new_zeros(q.shape, dtype=round_to or compute_dtype)
    softmax_lse = q.new_full((nheads, total_q), -math.inf, dtype=compute_dtype)
    starts_q = cu_seqlens_q.tolist()
    starts_k = cu_seqlens_k.tolist()
    batch_size = len(starts_q) - 1
    for b in range(batch_size):
        rows = slice(starts_q[b], starts_q[b + 1])
        begin = 0 if leftpad_k is None else int(leftpad_k[b])
        end = starts_k[b + 1] - starts_k[b] if seqused_k is None else int(seqused_k[b])
        tokens = torch.arange(begin, max(begin, end), device=k.device)
        keys = starts_k[b] + tokens if block_table is None else _page_slots(block_table[b], tokens, k.shape[1])
        out_b, lse_b = attention(
            q[None, rows],
            (k if block_table is None else k.flatten(0, 1))[None, keys],
            (v if block_table is None else v.flatten(0, 1))[None, keys],
            alibi_slopes=None if alibi_slopes is None else alibi_slopes.expand(batch_size, nheads)[b : b + 1],
            keep=None if keep is None else keep[b],
            compute_dtype=compute_dtype,
            round_to=round_to,
            **same,
        )
        out[rows] = out_b[0]
        softmax_lse[:, rows] = lse_b[0]
    return out, softmax_lse


def _page_slots(pages: Tensor, tokens: Tensor, page_block_size: int) -> Tensor:
    """Where the tokens of one sequence lie in the flattened pages."""
    return pages[tokens // page_block_size].long() * page_block_size + tokens % page_block_size
