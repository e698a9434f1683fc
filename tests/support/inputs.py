"""Tensors for a case: random, in the case's memory layout, surrounded by NaN.

A kernel that reads past a sequence, a head or a buffer and lets the value through returns NaN.
"""

import math
import zlib
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from tests.support.cases import Case

GUARD = 1024  # elements of NaN before and after every buffer; keeps 16-byte alignment for any dtype


@dataclass(frozen=True)
class Inputs:
    """Dense q, dout: (B, Sq, H, D); k, v: (B, Sk, Hk, D). Varlen: (total, heads, D) with cu_seqlens."""

    q: Tensor
    k: Tensor
    v: Tensor
    dout: Tensor
    alibi_slopes: Tensor | None  # (H,) or (B, H), fp32
    cu_seqlens_q: Tensor | None  # (B + 1,), int32; None when dense
    cu_seqlens_k: Tensor | None
    max_seqlen_q: int
    max_seqlen_k: int
    sinks: Tensor | None = None  # (H,)


def make_inputs(case: Case, device: torch.device | str, seed: int) -> Inputs:
    """Standard normal q, k, v and dout. The numbers depend on the seed and the case's name, not on the device."""
    generator = torch.Generator().manual_seed(seed + zlib.crc32(case.name.encode()))
    tokens_q, tokens_k = _tokens(case, case.seqlens_q), _tokens(case, case.seqlens_k)
    rows = (*tokens_q, case.nheads, case.headdim)
    keys = (*tokens_k, case.nheads_k, case.headdim)
    if case.strides == "packed" and rows == keys:
        q, k, v = _packed(case.dtype, device, rows, 3)
    elif case.strides == "packed":
        (q,) = _packed(case.dtype, device, rows, 1)
        k, v = _packed(case.dtype, device, keys, 2)
    else:
        allocate = _transposed if case.strides == "transposed" else _contiguous
        q, k, v = (allocate(case.dtype, device, shape) for shape in (rows, keys, keys))
    dout = (_transposed if case.strides == "transposed" else _contiguous)(case.dtype, device, rows)
    for x in (q, k, v, dout):
        x.copy_(torch.randn(x.shape, generator=generator))
    return Inputs(
        q,
        k,
        v,
        dout,
        alibi_slopes=_slopes(case, device, generator),
        cu_seqlens_q=_cu_seqlens(case, case.seqlens_q, device),
        cu_seqlens_k=_cu_seqlens(case, case.seqlens_k, device),
        max_seqlen_q=max(case.seqlens_q),
        max_seqlen_k=max(case.seqlens_k),
        sinks=None if case.sink is None else random_sinks(case.nheads, case.sink, device, generator),
    )


def random_sinks(nheads: int, dtype: torch.dtype, device: torch.device | str, generator: torch.Generator) -> Tensor:
    """Some heads give most of their weight to the sink, some next to nothing."""
    return (2.0 + 2.0 * torch.randn(nheads, generator=generator)).to(device, dtype)


def random_keep(case: Case, device: torch.device | str, seed: int) -> Tensor | list[Tensor] | None:
    """A dropout mask as `tolerance.expected` takes it: (B, H, Sq, Sk), or (1, H, Sq, Sk) per sequence when varlen."""
    if case.dropout_p == 0.0:
        return None
    generator = torch.Generator().manual_seed(seed)
    lengths = list(zip(case.seqlens_q, case.seqlens_k, strict=True))
    masks = [(torch.rand(1, case.nheads, *pair, generator=generator) >= case.dropout_p).to(device) for pair in lengths]
    return masks if case.layout == "varlen" else torch.cat(masks)


def _tokens(case: Case, seqlens: tuple[int, ...]) -> tuple[int, ...]:
    """(total,) when varlen, (B, S) when dense."""
    return (sum(seqlens),) if case.layout == "varlen" else (len(seqlens), seqlens[0])


def _contiguous(dtype: torch.dtype, device: torch.device | str, shape: tuple[int, ...]) -> Tensor:
    """A contiguous tensor inside a larger buffer of NaN."""
    size = math.prod(shape)
    return torch.full((size + 2 * GUARD,), math.nan, dtype=dtype, device=device)[GUARD : GUARD + size].view(shape)


def _packed(dtype: torch.dtype, device: torch.device | str, shape: tuple[int, ...], parts: int) -> tuple[Tensor, ...]:
    """Slices of one (..., S + 1, parts, heads, D) buffer: a row of NaN follows each sequence."""
    *batch, seqlen, heads, headdim = shape
    buffer = _contiguous(dtype, device, (*batch, seqlen + 1, parts, heads, headdim))
    return buffer.narrow(-4, 0, seqlen).unbind(-3)


def _transposed(dtype: torch.dtype, device: torch.device | str, shape: tuple[int, ...]) -> Tensor:
    """(..., heads, S + 1, D) memory seen as (..., S, heads, D): a row of NaN follows each head."""
    *batch, seqlen, heads, headdim = shape
    return _contiguous(dtype, device, (*batch, heads, seqlen + 1, headdim)).narrow(-2, 0, seqlen).transpose(-2, -3)


def _slopes(case: Case, device: torch.device | str, generator: torch.Generator) -> Tensor | None:
    shapes = {"h": (case.nheads,), "bh": (case.batch_size, case.nheads)}
    return None if case.alibi is None else (0.3 * torch.rand(shapes[case.alibi], generator=generator)).to(device)


def _cu_seqlens(case: Case, seqlens: tuple[int, ...], device: torch.device | str) -> Tensor | None:
    if case.layout == "dense":
        return None
    return torch.tensor([0, *accumulate(seqlens)], dtype=torch.int32, device=device)
