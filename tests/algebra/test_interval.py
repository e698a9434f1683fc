"""Intervals against a mask written out element by element; loop bounds against every block of that mask."""

import itertools

import pytest
import torch

from flash_attn import reference

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402

from flash_attn.kernels.algebra.arguments import Window  # noqa: E402
from flash_attn.kernels.algebra.interval import (  # noqa: E402
    block_bounds,
    hide,
    key_blocks,
    key_interval,
    query_interval,
    visible,
)
from flash_attn.kernels.algebra.span import Span  # noqa: E402
from flash_attn.kernels.portable.backward import query_block_bounds  # noqa: E402
from flash_attn.kernels.portable.forward import key_block_bounds  # noqa: E402

pytestmark = [
    pytest.mark.interpreter,
    pytest.mark.skipif(not triton.knobs.runtime.interpret, reason="needs TRITON_INTERPRET=1"),
]

LENGTHS = (1, 2, 3, 5, 8)
SIDES = (0, 1, 3, 9)
PATTERNS = list(itertools.product((False, True), repeat=2))  # which sides of the window are bounded


def windows(has_left, has_right):
    return itertools.product(SIDES if has_left else (None,), SIDES if has_right else (None,))


def columns(records):
    """int32 vectors, one per field, None as 0, padded with the last record to a power of two."""
    size = 1 << (len(records) - 1).bit_length()
    padded = records + [records[-1]] * (size - len(records))
    return [torch.tensor([x or 0 for x in field], dtype=torch.int32) for field in zip(*padded, strict=True)]


@triton.jit
def interval_kernel(
    row, col, seqlen_q, seqlen_k, left, right, out, N: tl.constexpr, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr
):
    i = tl.arange(0, N)
    rows, cols = tl.load(row + i), tl.load(col + i)
    window = Window(tl.load(left + i) if HAS_LEFT else None, tl.load(right + i) if HAS_RIGHT else None)
    span = Span(0, 0, tl.load(seqlen_q + i), tl.load(seqlen_k + i))
    key_lo, key_hi = key_interval(rows, span, window)
    query_lo, query_hi = query_interval(cols, span, window)
    tl.store(out + i, (key_lo <= cols) & (cols < key_hi))
    tl.store(out + N + i, (query_lo <= rows) & (rows < query_hi))
    tl.store(out + 2 * N + i, visible(rows, cols, span, window))


@pytest.mark.parametrize("has_left, has_right", PATTERNS)
def test_intervals_are_the_mask(has_left, has_right):
    records, expected = [], []
    for seqlen_q, seqlen_k, window in itertools.product(LENGTHS, LENGTHS, windows(has_left, has_right)):
        mask = reference.visible(seqlen_q, seqlen_k, window)
        pairs = list(itertools.product(range(seqlen_q), range(seqlen_k)))
        records += [(row, col, seqlen_q, seqlen_k, *window) for row, col in pairs]
        expected += [bool(mask[pair]) for pair in pairs]
    fields = columns(records)
    size = fields[0].numel()
    out = torch.empty(3, size, dtype=torch.int8)
    interval_kernel[(1,)](*fields, out, N=size, HAS_LEFT=has_left, HAS_RIGHT=has_right)
    by_row, by_col, direct = out[:, : len(records)].bool()
    assert by_row.tolist() == expected
    assert by_col.tolist() == expected, "query_interval is not the transpose of key_interval"
    assert direct.tolist() == expected


@pytest.mark.parametrize("has_left, has_right", PATTERNS)
def test_keys_past_the_end_are_hidden(has_left, has_right):
    records = [
        (row, seqlen_k + past, seqlen_q, seqlen_k, *window)
        for seqlen_q, seqlen_k in itertools.product(LENGTHS, (0, *LENGTHS))
        for row, past in itertools.product(range(seqlen_q), (0, 1, 100))
        for window in windows(has_left, has_right)
    ]
    fields = columns(records)
    size = fields[0].numel()
    out = torch.empty(3, size, dtype=torch.int8)
    interval_kernel[(1,)](*fields, out, N=size, HAS_LEFT=has_left, HAS_RIGHT=has_right)
    assert not out[0].any() and not out[2].any()


@triton.jit
def hide_kernel(
    scores, out, first_row, first_col, seqlen_q, seqlen_k, left, right,
    N: tl.constexpr, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr,
):  # fmt: skip
    i = tl.arange(0, N)
    offsets = i[:, None] * N + i[None, :]
    rows, tile = first_row + i, tl.load(scores + offsets)
    window = Window(left if HAS_LEFT else None, right if HAS_RIGHT else None)
    span = Span(0, 0, seqlen_q, seqlen_k)
    lo, hi = key_interval(rows, span, window)
    tl.store(out + offsets, hide(tile, i[None, :], (lo - first_col)[:, None], (hi - first_col)[:, None], window))
    seen = visible(rows[:, None], first_col + i[None, :], span, window)
    tl.store(out + N * N + offsets, tl.where(seen, tile, float("-inf")))


@pytest.mark.parametrize("has_left, has_right", PATTERNS)
def test_hiding_is_visibility(has_left, has_right, seed):
    """A tile anywhere, of which keys are counted from its first column."""
    scores = torch.randn(8, 8, generator=torch.Generator().manual_seed(seed))
    tiles = itertools.product((0, 5, 16), (0, 8, 16), ((24, 24), (13, 24), (24, 13), (3, 0)), (0, 3), (0, 6))
    for first_row, first_col, (seqlen_q, seqlen_k), left, right in tiles:
        out = torch.empty(2, 8, 8)
        hide_kernel[(1,)](
            scores, out, first_row, first_col, seqlen_q, seqlen_k, left, right,
            N=8, HAS_LEFT=has_left, HAS_RIGHT=has_right,
        )  # fmt: skip
        assert torch.equal(out[0], out[1])


@triton.jit
def key_blocks_kernel(
    first, last, seqlen_q, seqlen_k, left, right, out,
    N: tl.constexpr, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    i = tl.arange(0, N)
    window = Window(tl.load(left + i) if HAS_LEFT else None, tl.load(right + i) if HAS_RIGHT else None)
    span = Span(0, 0, tl.load(seqlen_q + i), tl.load(seqlen_k + i))
    begin, full_begin, full_end, end = key_blocks(tl.load(first + i), tl.load(last + i), span, window, BLOCK)
    tl.store(out + i, begin)
    tl.store(out + N + i, full_begin)
    tl.store(out + 2 * N + i, full_end)
    tl.store(out + 3 * N + i, end)


@pytest.mark.parametrize("block", [1, 2, 4])
@pytest.mark.parametrize("has_left, has_right", PATTERNS)
def test_key_blocks_of_any_rows(has_left, has_right, block):
    """Of every range of rows, wherever a tile may begin."""
    records = [
        (first, last, seqlen_q, seqlen_k, *window)
        for seqlen_q, seqlen_k, window in itertools.product(LENGTHS, LENGTHS, windows(has_left, has_right))
        for first in range(seqlen_q)
        for last in range(first, seqlen_q)
    ]
    fields = columns(records)
    size = fields[0].numel()
    out = torch.empty(4, size, dtype=torch.int32)
    key_blocks_kernel[(1,)](*fields, out, N=size, HAS_LEFT=has_left, HAS_RIGHT=has_right, BLOCK=block)
    for (first, last, seqlen_q, seqlen_k, *window), bounds in zip(records, out.T.tolist(), strict=False):
        mask = reference.visible(seqlen_q, seqlen_k, tuple(window))
        check_bounds(mask[first : last + 1], block, bounds, whole_blocks=True)


@triton.jit
def bounds_kernel(
    block, seqlen_q, seqlen_k, left, right, out,
    N: tl.constexpr, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, OVER_KEYS: tl.constexpr,
):  # fmt: skip
    i = tl.arange(0, N)
    window = Window(tl.load(left + i) if HAS_LEFT else None, tl.load(right + i) if HAS_RIGHT else None)
    span = Span(0, 0, tl.load(seqlen_q + i), tl.load(seqlen_k + i))
    if OVER_KEYS:
        bounds = key_block_bounds(tl.load(block + i), span, window, BLOCK_M, BLOCK_N)
    else:
        bounds = query_block_bounds(tl.load(block + i), span, window, BLOCK_M, BLOCK_N)
    begin, full_begin, full_end, end = bounds
    tl.store(out + i, begin)
    tl.store(out + N + i, full_begin)
    tl.store(out + 2 * N + i, full_end)
    tl.store(out + 3 * N + i, end)


def check_bounds(mask, block_size, bounds, whole_blocks):
    """`mask` holds the rows of one program across everything it loops over."""
    begin, full_begin, full_end, end = bounds
    assert 0 <= begin <= full_begin <= full_end <= end
    blocks = mask.split(block_size, dim=1)
    assert end <= len(blocks) or begin == end
    for number, block in enumerate(blocks):
        if not begin <= number < end:
            assert not block.any(), f"block {number} has visible pairs and is skipped"
        if full_begin <= number < full_end:
            assert block.all(), f"block {number} has hidden pairs and is not masked"
            assert not whole_blocks or block.shape[1] == block_size, f"block {number} runs past the end without a mask"


@pytest.mark.parametrize("block_m, block_n", [(2, 2), (4, 2), (1, 3), (2, 4), (16, 16)])
@pytest.mark.parametrize("over_keys", [True, False], ids=["key_blocks", "query_blocks"])
@pytest.mark.parametrize("has_left, has_right", PATTERNS)
def test_block_bounds(has_left, has_right, over_keys, block_m, block_n):
    records = [
        (block, seqlen_q, seqlen_k, *window)
        for seqlen_q, seqlen_k, window in itertools.product(LENGTHS, LENGTHS, windows(has_left, has_right))
        for block in range(-(-seqlen_q // block_m) if over_keys else -(-seqlen_k // block_n))
    ]
    fields = columns(records)
    size = fields[0].numel()
    out = torch.empty(4, size, dtype=torch.int32)
    bounds_kernel[(1,)](
        *fields, out, N=size, HAS_LEFT=has_left, HAS_RIGHT=has_right, BLOCK_M=block_m, BLOCK_N=block_n,
        OVER_KEYS=over_keys,
    )  # fmt: skip
    own, looped = (block_m, block_n) if over_keys else (block_n, block_m)
    for (block, seqlen_q, seqlen_k, *window), bounds in zip(records, out.T.tolist(), strict=False):
        mask = reference.visible(seqlen_q, seqlen_k, tuple(window))
        mask = mask if over_keys else mask.T
        check_bounds(mask[block * own : (block + 1) * own], looped, bounds, whole_blocks=over_keys)


@triton.jit
def raw_bounds_kernel(first_lo, last_lo, first_hi, last_hi, out, N: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.arange(0, N)
    begin, full_begin, full_end, end = block_bounds(
        tl.load(first_lo + i), tl.load(last_lo + i), tl.load(first_hi + i), tl.load(last_hi + i), BLOCK
    )
    tl.store(out + i, begin)
    tl.store(out + N + i, full_begin)
    tl.store(out + 2 * N + i, full_end)
    tl.store(out + 3 * N + i, end)


@pytest.mark.parametrize("block", [1, 4, 16])
def test_block_bounds_of_any_intervals(block):
    """Also of intervals that are empty, negative or reversed, which sequences of hostile lengths give."""
    ends = (-(2**20), -17, -1, 0, 1, 7, 16, 33, 2**20)
    records = [
        (first_lo, last_lo, first_hi, last_hi)
        for first_lo, last_lo, first_hi, last_hi in itertools.product(ends, repeat=4)
        if first_lo <= last_lo and first_hi <= last_hi
    ]
    fields = columns(records)
    size = fields[0].numel()
    out = torch.empty(4, size, dtype=torch.int32)
    raw_bounds_kernel[(1,)](*fields, out, N=size, BLOCK=block)
    begin, full_begin, full_end, end = out
    first_lo, last_lo, first_hi, last_hi = fields
    assert bool(((begin >= 0) & (begin <= full_begin) & (full_begin <= full_end) & (full_end <= end)).all())
    assert bool((begin * block <= first_lo.clamp_min(0)).all()), "a visible element comes before the loop"
    assert bool((end * block >= last_hi).all()), "a visible element comes after the loop"
    middle = full_begin < full_end
    assert bool((full_begin * block >= last_lo)[middle].all())
    assert bool((full_end * block <= first_hi)[middle].all())
