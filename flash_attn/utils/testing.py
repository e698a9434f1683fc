"""Padded and packed inputs, masks and attention for tests: upstream's import path and meaning."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flash_attn.bert_padding import pad_input, unpad_input
from flash_attn.errors import InvalidArgument
from flash_attn.reference import Window, repeat_heads

MODES = ("full", "random", "third")
NOWHERE = 2**32  # the position of a key in the left padding: right of every window


class Packed(NamedTuple):
    """Tokens without padding, the function that pads again, and the lengths; seqused only where there is a mask."""

    x: Tensor
    pad: Callable[[Tensor], Tensor]
    cu_seqlens: Tensor
    max_seqlen: int
    seqused: Tensor | None


def generate_random_padding_mask(
    max_seqlen: int, batch_size: int, device: torch.device | str, mode: str = "random", zero_lengths: bool = False
) -> Tensor:
    """(batch_size, max_seqlen), bool, True for the tokens that count, which come first.

    Args:
        mode: lengths are all max_seqlen ("full"), within 20 of it ("random"), or at least a third of it ("third").
        zero_lengths: every fifth sequence and the last are empty.

    Raises:
        InvalidArgument: an unknown mode.
    """
    if mode not in MODES:
        raise InvalidArgument(f"mode must be one of {MODES}, got {mode!r}")
    least = {"full": max_seqlen, "random": max(0 if zero_lengths else 1, max_seqlen - 20), "third": max_seqlen // 3}
    lengths = torch.randint(least[mode], max_seqlen + 1, (batch_size, 1), device=device)
    if zero_lengths:
        lengths[::5] = 0
        lengths[-1] = 0
    return torch.arange(max_seqlen, device=device) < lengths


def generate_qkv(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    query_padding_mask: Tensor | None = None,
    key_padding_mask: Tensor | None = None,
    qv: Tensor | None = None,
    kvpacked: bool = False,
    qkvpacked: bool = False,
    query_unused_mask: Tensor | None = None,
    key_unused_mask: Tensor | None = None,
) -> tuple[Any, ...]:
    """Packed and padded leaves of the same values, with the functions that pad results and gradients again.

    Args:
        q: (batch_size, seqlen_q, nheads, headdim).
        k: (batch_size, seqlen_k, nheads_k, headdim).
        v: (batch_size, seqlen_k, nheads_k, headdim_v).
        query_padding_mask, key_padding_mask: (batch_size, seqlen), bool; the same for qkvpacked.
        qv: (batch_size, seqlen_q, nheads, headdim_v), returned without gradient; not in the packed forms.
        query_unused_mask, key_unused_mask: (batch_size, seqlen), bool, tokens that keep their room but are not in use.

    Returns:
        (q, k, v, qv packed, cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k, max_seqlen_q, max_seqlen_k, q, k, v, qv
        padded, pad_output, pad_dq, pad_dk); seqused and qv are None without a mask and without qv.
        kvpacked: (q, kv packed, cu_seqlens and max_seqlen of both, q, kv padded, pad_output, pad_dq, pad_dkv);
        qkvpacked: (qkv packed, cu_seqlens, max_seqlen, qkv padded, pad_output, pad_dqkv).

    Raises:
        InvalidArgument: both packed forms are asked for, one with qv or unused masks, qkvpacked with masks that differ, or
            an unused mask without its padding mask.
    """
    if kvpacked and qkvpacked:
        raise InvalidArgument("kvpacked and qkvpacked exclude each other: got both")
    extras = dict(qv=qv, query_unused_mask=query_unused_mask, key_unused_mask=key_unused_mask)
    given = [name for name, each in extras.items() if each is not None]
    if (kvpacked or qkvpacked) and given:
        raise InvalidArgument(f"kvpacked and qkvpacked go without {', '.join(given)}")
    query, key = _pack(q, query_padding_mask, query_unused_mask), _pack(k, key_padding_mask, key_unused_mask)
    packed_v = _pack(v, key_padding_mask, key_unused_mask).x
    cu_seqlens, max_seqlens = (query.cu_seqlens, key.cu_seqlens), (query.max_seqlen, key.max_seqlen)
    if qkvpacked:
        if query.x.shape != key.x.shape or not torch.equal(*cu_seqlens):
            raise InvalidArgument(f"qkvpacked needs q and k alike, got {tuple(query.x.shape)} and {tuple(key.x.shape)}")
        packed, padded = torch.stack([query.x, key.x, packed_v], dim=1), torch.stack([q, k, v], dim=2)
        return _leaf(packed), query.cu_seqlens, query.max_seqlen, _leaf(padded), query.pad, query.pad
    pads = (query.pad, query.pad, key.pad)
    if kvpacked:
        packed, padded = torch.stack([key.x, packed_v], dim=1), torch.stack([k, v], dim=2)
        return _leaf(query.x), _leaf(packed), *cu_seqlens, *max_seqlens, _leaf(q), _leaf(padded), *pads
    packed_qv = None if qv is None else _pack(qv, query_padding_mask, query_unused_mask).x.detach()
    lengths = (*cu_seqlens, query.seqused, key.seqused, *max_seqlens)
    leaves = [_leaf(x) for x in (query.x, key.x, packed_v, q, k, v)]
    return *leaves[:3], packed_qv, *lengths, *leaves[3:], None if qv is None else qv.detach(), *pads


def construct_local_mask(
    seqlen_q: int,
    seqlen_k: int,
    window_size: Window = (None, None),
    sink_token_length: int = 0,
    query_padding_mask: Tensor | None = None,
    key_padding_mask: Tensor | None = None,
    key_leftpad: Tensor | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    """Which keys a row must not see, bool (seqlen_q, seqlen_k), or (batch_size, 1, seqlen_q, seqlen_k) with masks.

    Args:
        window_size: (left, right) keys visible on each side of the diagonal, which ends in the last row and key; None is
            unbounded.
        sink_token_length: so many first keys are visible however far left they are.
        query_padding_mask, key_padding_mask: (batch_size, seqlen), bool; their sums are the lengths. That padded keys are
            hidden is left to the caller.
        key_leftpad: (batch_size,); so many keys of each sequence are hidden, and the next is the first.
    """
    rows, cols = _positions(seqlen_q, seqlen_k, query_padding_mask, key_padding_mask, key_leftpad, device)
    left, right = window_size
    hidden = (cols == NOWHERE) | torch.zeros_like(rows, dtype=torch.bool)
    if right is not None:
        hidden = hidden | (cols > rows + right)
    if left is not None:
        hidden = hidden | ((cols < rows - left) & (cols >= sink_token_length))
    return hidden


def construct_chunk_mask(
    seqlen_q: int,
    seqlen_k: int,
    attention_chunk: int,
    query_padding_mask: Tensor | None = None,
    key_padding_mask: Tensor | None = None,
    key_leftpad: Tensor | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    """Like `construct_local_mask`, with everything hidden that is not in the diagonal's chunk of attention_chunk keys."""
    rows, cols = _positions(seqlen_q, seqlen_k, query_padding_mask, key_padding_mask, key_leftpad, device)
    return rows.div(attention_chunk, rounding_mode="floor") != cols.div(attention_chunk, rounding_mode="floor")


def attention_ref(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    query_padding_mask: Tensor | None = None,
    key_padding_mask: Tensor | None = None,
    key_leftpad: Tensor | None = None,
    attn_bias: Tensor | None = None,
    dropout_p: float = 0.0,
    dropout_mask: Tensor | None = None,
    causal: bool = False,
    qv: Tensor | None = None,
    q_descale: Tensor | None = None,
    k_descale: Tensor | None = None,
    v_descale: Tensor | None = None,
    window_size: Window = (None, None),
    attention_chunk: int = 0,
    sink_token_length: int = 0,
    learnable_sink: Tensor | None = None,
    softcap: float = 0.0,
    upcast: bool = True,
    reorder_ops: bool = False,
    intermediate_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention of a padded batch in plain PyTorch, quadratic in memory, differentiable.

    Args:
        q: (batch_size, seqlen_q, nheads, headdim).
        k: (batch_size, seqlen_k, nheads_k, headdim).
        v: (batch_size, seqlen_k, nheads_k, headdim_v).
        query_padding_mask, key_padding_mask: (batch_size, seqlen), bool, True for the tokens that count.
        key_leftpad, window_size, sink_token_length, attention_chunk: as in the masks above; chunk 0 is none.
        attn_bias: broadcastable to (batch_size, nheads, seqlen_q, seqlen_k), added after softcap.
        dropout_p: v is multiplied by 1 / (1 - dropout_p), with dropout_mask or without.
        dropout_mask: (batch_size, nheads, seqlen_q, seqlen_k), bool, True where kept.
        qv: (batch_size, seqlen_q, nheads, headdim_v); the scores are q k^T + qv v^T over sqrt(headdim + headdim_v).
        q_descale, k_descale, v_descale: (batch_size, nheads_k), factors of q and qv, of k, of v.
        learnable_sink: (nheads,), one more score of every row, whose value is 0.
        upcast: compute in fp32, or fp64 if that is the dtype; otherwise in the dtype of the inputs.
        reorder_ops: scale k in place of q.
        intermediate_dtype: round the weights to it before they meet v.

    Returns:
        out: (batch_size, seqlen_q, nheads, headdim_v), like q. attention: (batch_size, nheads, seqlen_q, seqlen_k), like q,
        the weights before dropout. Rows in the padding, and rows that see no key, are 0 in both.
    """
    dtype, seqlen_q, seqlen_k = q.dtype, q.shape[1], k.shape[1]
    q, k, v = _operand(q, q_descale, upcast), _operand(k, k_descale, upcast), _operand(v, v_descale, upcast)
    qv = None if qv is None else _operand(qv, q_descale, upcast)
    s = _scores(q, k, v, qv, softcap, reorder_ops)

    lengths = (query_padding_mask, key_padding_mask, key_leftpad, q.device)
    window = (window_size[0], 0) if causal else window_size
    hidden = construct_local_mask(seqlen_q, seqlen_k, window, sink_token_length, *lengths)
    if attention_chunk > 0:
        hidden = hidden | construct_chunk_mask(seqlen_q, seqlen_k, attention_chunk, *lengths)
    if key_padding_mask is not None:
        hidden = hidden | ~key_padding_mask[:, None, None]
    attention = _softmax(s, hidden, attn_bias, learnable_sink).to(v.dtype)
    if query_padding_mask is not None:
        attention = attention.masked_fill(~query_padding_mask[:, None, :, None], 0.0)

    p = attention if dropout_mask is None else attention.masked_fill(~dropout_mask, 0.0)
    if intermediate_dtype is not None:
        p = p.to(intermediate_dtype).to(p.dtype)
    out = torch.einsum("bhij,bjhd->bihd", p, repeat_heads(v, q.shape[2]) * (1.0 / (1.0 - dropout_p)))
    return out.to(dtype), attention.to(dtype)


def _positions(
    seqlen_q: int,
    seqlen_k: int,
    query_padding_mask: Tensor | None,
    key_padding_mask: Tensor | None,
    key_leftpad: Tensor | None,
    device: torch.device | str | None,
) -> tuple[Tensor, Tensor]:
    """(the diagonal's key of each row, (..., seqlen_q, 1); the position of each key, (..., 1, seqlen_k))."""
    length_q = seqlen_q if query_padding_mask is None else query_padding_mask.sum(-1)[:, None, None, None]
    length_k = seqlen_k if key_padding_mask is None else key_padding_mask.sum(-1)[:, None, None, None]
    rows = torch.arange(seqlen_q, device=device)[:, None] + length_k - length_q
    cols = torch.arange(seqlen_k, device=device)[None]
    if key_leftpad is not None:
        padding = key_leftpad[:, None, None, None]
        cols = torch.where(cols >= padding, cols - padding, NOWHERE)
    return rows, cols


def _operand(x: Tensor, descale: Tensor | None, upcast: bool) -> Tensor:
    """x (batch_size, seqlen, heads, headdim) in the dtype of the computation, times its factor (batch_size, nheads_k)."""
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    x = x.to(wide) if upcast else x
    if descale is None:
        return x
    factor = descale.repeat_interleave(x.shape[2] // descale.shape[1], dim=1)[:, None, :, None]
    return (x.to(wide) * factor).to(x.dtype)


def _scores(q: Tensor, k: Tensor, v: Tensor, qv: Tensor | None, softcap: float, scale_k: bool) -> Tensor:
    """(batch_size, nheads, seqlen_q, seqlen_k), before masks and bias; either factor of q k^T is scaled."""
    nheads = q.shape[2]
    softmax_scale = (q.shape[-1] + (0 if qv is None else v.shape[-1])) ** -0.5
    q, k = (q, k * softmax_scale) if scale_k else (q * softmax_scale, k)
    s = torch.einsum("bihd,bjhd->bhij", q, repeat_heads(k, nheads))
    if qv is not None:
        s = s + torch.einsum("bihd,bjhd->bhij", qv * softmax_scale, repeat_heads(v, nheads))
    return softcap * torch.tanh(s / softcap) if softcap > 0.0 else s


def _softmax(s: Tensor, hidden: Tensor, attn_bias: Tensor | None, learnable_sink: Tensor | None) -> Tensor:
    """The weights of the visible keys; a row that sees none keeps its scores until the end, free of NaN in the backward."""
    s = s.masked_fill(hidden & ~hidden.all(-1, keepdim=True), -math.inf)
    if attn_bias is not None:
        s = s + attn_bias
    seqlen_k = s.shape[-1]
    if learnable_sink is not None:
        s = torch.cat([s, learnable_sink[:, None, None].expand(*s.shape[:-1], 1)], dim=-1)
    wide = torch.promote_types(s.dtype, torch.float32)
    return torch.softmax(s, dim=-1, dtype=wide)[..., :seqlen_k].masked_fill(hidden, 0.0)


def _pack(x: Tensor, mask: Tensor | None, unused_mask: Tensor | None) -> Packed:
    batch_size, seqlen = x.shape[:2]
    if mask is not None:
        packed, indices, cu_seqlens, longest, seqused = unpad_input(x, mask, unused_mask)
        return Packed(
            packed, partial(pad_input, indices=indices, batch=batch_size, seqlen=seqlen), cu_seqlens, longest, seqused
        )
    if unused_mask is not None:
        raise InvalidArgument("query_unused_mask and key_unused_mask need their padding masks")
    cu_seqlens = torch.arange(batch_size + 1, dtype=torch.int32, device=x.device) * seqlen
    return Packed(x.flatten(0, 1), lambda packed: packed.unflatten(0, (batch_size, seqlen)), cu_seqlens, seqlen, None)


def _leaf(x: Tensor) -> Tensor:
    return x.detach().clone().requires_grad_()
