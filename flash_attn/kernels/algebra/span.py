"""Where one sequence of the batch starts and how long it is, whatever its lengths say.

Contents of cu_seqlens, seqused_k and leftpad_k are known on the device only: every start and length is clamped to the
tensors, so that a wrong number gives a wrong answer but never an access out of bounds.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl


class Span(NamedTuple):
    """One sequence, resolved: first token and number of tokens of its queries and keys."""

    start_q: Any
    start_k: Any
    seqlen_q: Any
    seqlen_k: Any


@triton.jit
def clamp(value, low, high):
    """value limited to [low, high]; low wins where they cross."""
    return tl.maximum(tl.minimum(value, high), low)


@triton.jit
def packed_span(cu_seqlens, batch, total):
    """(start, length) of one sequence in a packed batch of `total` tokens."""
    start = clamp(tl.load(cu_seqlens + batch), 0, total)
    end = clamp(tl.load(cu_seqlens + batch + 1), start, total)
    return start, end - start


@triton.jit
def load_span(sequences, paged, batch, seqlen_q, seqlen_k, total_q, total_k):
    """The span of one batch entry. Paged keys have no start, and total_k is what the block table can address."""
    start_q = 0
    start_k = 0
    if sequences.cu_seqlens_q is not None:
        start_q, seqlen_q = packed_span(sequences.cu_seqlens_q, batch, total_q)
    if sequences.cu_seqlens_k is not None:
        if paged:
            seqlen_k = tl.load(sequences.cu_seqlens_k + batch + 1) - tl.load(sequences.cu_seqlens_k + batch)
        else:
            start_k, seqlen_k = packed_span(sequences.cu_seqlens_k, batch, total_k)
    if sequences.seqused_k is not None:
        seqused_k = tl.load(sequences.seqused_k + batch)
        if sequences.appended is not None:
            seqused_k = clamp(seqused_k, 0, total_k) + sequences.appended
        seqlen_k = seqused_k if paged else tl.minimum(seqused_k, seqlen_k)
    if sequences.leftpad_k is not None:
        leftpad = clamp(tl.load(sequences.leftpad_k + batch), 0, total_k - start_k)
        start_k += leftpad
        seqlen_k -= leftpad
    return Span(start_q, start_k, seqlen_q, clamp(seqlen_k, 0, total_k - start_k))
