"""Kernel arguments as NamedTuples. A feature that is absent is a field that is None."""

from typing import Any, NamedTuple


class Tensor(NamedTuple):
    """A (batch, sequence, head, dim) operand; packed batches have stride_b 0, and every last stride is 1."""

    ptr: Any
    stride_b: Any
    stride_s: Any
    stride_h: Any


class Sequences(NamedTuple):
    """Where each sequence lies in a packed batch or a cache; (batch + 1,) and (batch,) int32 arrays."""

    cu_seqlens_q: Any = None
    cu_seqlens_k: Any = None
    seqused_k: Any = None
    leftpad_k: Any = None
    appended: Any = None  # keys that lie behind the first seqused_k of every sequence and take part, too


class Pages(NamedTuple):
    """Paged keys: k and v are (num_pages, page_size, heads, dim), block_table (batch, max_pages) int32."""

    block_table: Any = None
    stride_b: Any = None
    max_pages: Any = None
    page_size: Any = None
    num_pages: Any = None
    shift: Any = None  # log2(page_size) where that is whole


class Window(NamedTuple):
    """Keys visible left and right of the diagonal, inclusive; None is unbounded, causal is (None, 0)."""

    left: Any = None
    right: Any = None


class Score(NamedTuple):
    """How a dot product becomes a score; see `score`."""

    softmax_scale: Any  # positive; the sign is in `negative`
    softcap: Any = None
    alibi_slopes: Any = None  # (batch or 1, nheads) fp32
    stride_alibi_b: Any = None
    exact: Any = None  # 1 for fp32 operands, whose softcap needs more than half precision
    negative: Any = None  # 1 when the caller's softmax_scale is below zero
    one_sided: Any = None  # 1 when no key lies behind the diagonal of a row that sees it: distances are not negative
    bounded: Any = None  # 1 when weights fit their type without a maximum taken off; see `softmax_step_bounded`
    sinks: Any = None  # (nheads,): a score beside those of the keys, without a value; of a forward


class Rotary(NamedTuple):
    """Angles by position and pair of features: (positions, pairs) arrays with rows stride apart; see `rotary`."""

    cos: Any = None
    sin: Any = None
    stride: Any = None
    num_positions: Any = None


class Dropout(NamedTuple):
    """Which weights are dropped; see `dropout`."""

    rng_state: Any = None  # (2,) int64: seed, offset
    keep_below: Any = None  # a weight is kept when its 16 random bits are below this
    rescale: Any = None  # 1 / (1 - p)
