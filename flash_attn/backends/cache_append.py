"""New tokens into a cache in PyTorch operations, for the backends written in them: what kernels/portable/append.py launches.

Contents of cache_seqlens and block_table are clamped or skipped alike: nothing outside the cache is written.
"""

import torch
from torch import Tensor

from flash_attn.backends.base import Append, Operands


def append_tokens(operands: Operands, append: Append) -> Tensor:
    """Writes the new keys and values into the caches; returns the queries, rotated where there are angles."""
    q, k_cache = operands.q, operands.k
    seqlen_q, seqlen_new = q.shape[1], append.k.shape[1]
    table = operands.block_table
    capacity = k_cache.shape[1] if table is None else table.shape[1] * k_cache.shape[1]
    seqlens = torch.zeros(q.shape[0]) if operands.seqused_k is None else operands.seqused_k
    first = seqlens.long().clamp(0, capacity)[:, None]
    positions = first + torch.arange(seqlen_new, device=q.device)
    k = rotated(append.k, positions, append)
    valid = positions < capacity
    batch = torch.arange(q.shape[0], device=q.device)[:, None].expand_as(positions)
    page, slot = batch, positions
    if table is not None:
        page_size = k_cache.shape[1]
        index = (positions // page_size).clamp(max=table.shape[1] - 1)
        page, slot = table.long().gather(1, index), positions % page_size
        valid = valid & (page >= 0) & (page < k_cache.shape[0])
    operands.k[page[valid], slot[valid]] = k[valid]
    operands.v[page[valid], slot[valid]] = append.v[valid]
    rows = torch.arange(seqlen_q, device=q.device) if append.advance else torch.zeros_like(first[0]).expand(seqlen_q)
    return rotated(q, first + rows, append)


def rotated(x: Tensor, positions: Tensor, append: Append) -> Tensor:
    """x (batch, seqlen, heads, dim) turned by the angles of its positions; unchanged beyond the angles and without any."""
    if append.rotary_cos is None or append.rotary_sin is None:
        return x
    work = torch.promote_types(x.dtype, torch.float32)
    num_positions, pairs = append.rotary_cos.shape
    known = (positions < num_positions)[..., None, None]
    angles = positions.clamp(max=num_positions - 1)
    cos = append.rotary_cos[angles][:, :, None].to(work).where(known, 1.0)
    sin = append.rotary_sin[angles][:, :, None].to(work).where(known, 0.0)
    turned = x[..., : 2 * pairs].to(work)
    planes = turned.unflatten(-1, (pairs, 2) if append.interleaved else (2, pairs))
    first, second = planes.unbind(-1 if append.interleaved else -2)
    planes = torch.stack((first * cos - second * sin, first * sin + second * cos), dim=-1 if append.interleaved else -2)
    return torch.cat((planes.flatten(-2).to(x.dtype), x[..., 2 * pairs :]), dim=-1)
