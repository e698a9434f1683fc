"""Padded and packed inputs for tests: upstream's import path and meaning."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from flash_attn.bert_padding import pad_input, unpad_input
from flash_attn.errors import InvalidArgument

MODES = ("full", "random", "third")


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
    kvpacked: bool = False,
    qkvpacked: bool = False,
) -> tuple[Any, ...]:
    """Packed and padded leaves of the same values, with the functions that pad results and gradients again.

    Args:
        q: (batch_size, seqlen_q, nheads, headdim).
        k, v: (batch_size, seqlen_k, nheads_k, headdim).
        query_padding_mask, key_padding_mask: (batch_size, seqlen), bool; the same for qkvpacked.

    Returns:
        (q, k, v packed, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, q, k, v padded, pad_output, pad_dq, pad_dk);
        kvpacked: (q, kv packed, the four lengths, q, kv padded, pad_output, pad_dq, pad_dkv);
        qkvpacked: (qkv packed, cu_seqlens, max_seqlen, qkv padded, pad_output, pad_dqkv).

    Raises:
        InvalidArgument: both packed forms are asked for, or qkvpacked with masks that differ.
    """
    if kvpacked and qkvpacked:
        raise InvalidArgument("kvpacked and qkvpacked exclude each other: got both")
    packed_q, pad_q, cu_seqlens_q, max_seqlen_q = _pack(q, query_padding_mask)
    packed_k, pad_k, cu_seqlens_k, max_seqlen_k = _pack(k, key_padding_mask)
    packed_v = _pack(v, key_padding_mask)[0]
    lengths = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    if qkvpacked:
        if packed_q.shape != packed_k.shape or not torch.equal(cu_seqlens_q, cu_seqlens_k):
            raise InvalidArgument(
                f"qkvpacked needs q and k alike, got {tuple(packed_q.shape)} and {tuple(packed_k.shape)}"
            )
        packed, padded = torch.stack([packed_q, packed_k, packed_v], dim=1), torch.stack([q, k, v], dim=2)
        return _leaf(packed), cu_seqlens_q, max_seqlen_q, _leaf(padded), pad_q, pad_q
    if kvpacked:
        packed, padded = torch.stack([packed_k, packed_v], dim=1), torch.stack([k, v], dim=2)
        return _leaf(packed_q), _leaf(packed), *lengths, _leaf(q), _leaf(padded), pad_q, pad_q, pad_k
    leaves = [_leaf(x) for x in (packed_q, packed_k, packed_v, q, k, v)]
    return *leaves[:3], *lengths, *leaves[3:], pad_q, pad_q, pad_k


def _pack(x: Tensor, mask: Tensor | None) -> tuple[Tensor, Callable[[Tensor], Tensor], Tensor, int]:
    """(packed, the function that pads again, cu_seqlens, the longest sequence)."""
    batch_size, seqlen = x.shape[:2]
    if mask is not None:
        packed, indices, cu_seqlens, longest, _ = unpad_input(x, mask)
        return packed, partial(pad_input, indices=indices, batch=batch_size, seqlen=seqlen), cu_seqlens, longest
    cu_seqlens = torch.arange(batch_size + 1, dtype=torch.int32, device=x.device) * seqlen
    return x.flatten(0, 1), lambda packed: packed.unflatten(0, (batch_size, seqlen)), cu_seqlens, seqlen


def _leaf(x: Tensor) -> Tensor:
    return x.detach().clone().requires_grad_()
