"""Decode kernels: few query rows against many keys, which are shared out over programs and merged afterwards.

    split  one program per (batch entry, split, block of packed rows, key head): attention over the split's keys
    merge  one program per row: the softmax of the parts' softmax_lse weighs the parts; a sink counts here, once

The query heads that share a key head lie in one tile: packed row r is query row r // GROUP of head r % GROUP of the group,
so that every key is read once. Which keys a split gets follows from the sequence's own length, on the device. Queries and keys
are dense, packed or a cache; with packed queries a program is launched for every row that the longest sequence has.
"""

import triton
import triton.language as tl

from flash_attn.kernels.algebra.arguments import Dropout, Pages, Sequences, Window
from flash_attn.kernels.algebra.interval import key_blocks
from flash_attn.kernels.algebra.locate import sequence_base
from flash_attn.kernels.algebra.score import LOG2_E, load_slope, unit_log2
from flash_attn.kernels.algebra.softmax import softmax_finish, softmax_step
from flash_attn.kernels.algebra.span import load_span, packed_span
from flash_attn.kernels.portable.chain import join_chain
from flash_attn.kernels.portable.forward import attend


@triton.jit
def split_blocks(begin, end, split, num_splits, fixed_blocks):
    """Key blocks [begin, end) of one split: an equal share, or with `fixed_blocks` the same keys whatever the lengths."""
    if fixed_blocks is not None:
        first, count = split * fixed_blocks, fixed_blocks
    else:
        count = tl.cdiv(end - begin, num_splits)
        first = begin + split * count
    return tl.maximum(first, begin), tl.minimum(first + count, end)


# none of these is compiled in: caches and batches change from call to call
SPLIT_LENGTHS = [
    "seqlen_q", "total_q", "capacity", "appended", "window_left", "window_right", "nheads_k", "num_splits", "fixed_blocks",
    "table_stride", "max_pages", "page_size", "page_shift", "num_pages",
]  # fmt: skip


@triton.jit(do_not_specialize=SPLIT_LENGTHS)
def attn_decode_split_kernel(
    q, k, v, out, softmax_lse, cu_seqlens_q, cu_seqlens_k, seqused_k, leftpad_k, block_table, score,
    seqlen_q, total_q, capacity, appended, window_left, window_right, nheads_k, num_splits, fixed_blocks,
    table_stride, max_pages, page_size, num_pages, page_shift,
    PARTS: tl.constexpr, PAGES: tl.constexpr, GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr, HEAD_DIM_PAD: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """With PARTS, out and softmax_lse are (batch, seqlen_q, nheads, num_splits, dim) and without dim, contiguous.

    `capacity` bounds the keys of a sequence; packed ones count through the batch.
    """
    num_m = tl.cdiv(seqlen_q * GROUP, BLOCK_M)
    head_k = tl.program_id(0) % nheads_k  # neighbours read the same tokens: their heads lie side by side in memory
    m_block = tl.program_id(0) // nheads_k % num_m
    split = tl.program_id(0) // (nheads_k * num_m) % num_splits
    batch = tl.program_id(0) // (nheads_k * num_m * num_splits)
    window = Window(window_left, window_right)
    pages = Pages(block_table, table_stride, max_pages, page_size, num_pages, page_shift)
    join_chain()
    sequences = Sequences(cu_seqlens_q, cu_seqlens_k, seqused_k, leftpad_k, appended)
    span = load_span(sequences, block_table is not None, batch, seqlen_q, capacity, total_q, capacity)

    num_rows = tl.minimum(span.seqlen_q, seqlen_q) * GROUP if cu_seqlens_q is not None else seqlen_q * GROUP
    first_row = m_block * BLOCK_M
    last_row = tl.minimum(first_row + BLOCK_M, num_rows) - 1
    begin, full_begin, full_end, end = key_blocks(first_row // GROUP, last_row // GROUP, span, window, BLOCK_N)
    begin, end = split_blocks(begin, end, split, num_splits, fixed_blocks)
    if cu_seqlens_q is not None:
        end = tl.where(first_row < num_rows, end, begin)

    packed = first_row + tl.arange(0, BLOCK_M)
    rows = packed // GROUP
    heads = head_k * GROUP + packed % GROUP
    dims = tl.arange(0, HEAD_DIM_PAD)
    inside = packed < num_rows
    mask = inside[:, None] & (dims < HEAD_DIM)[None, :]
    q_rows = sequence_base(q, batch, heads, span.start_q + rows)
    q_tile = tl.load(q_rows[:, None] + dims[None, :], mask=mask, other=0.0)
    acc, row_max, row_sum = attend(
        q_tile, k, v, None, None, sequence_base(k, batch, head_k, span.start_k),
        sequence_base(v, batch, head_k, span.start_k), pages, batch, head_k, rows, span, window, score,
        load_slope(score, batch, heads[:, None]), Dropout(None, None, None), 0, 0, (begin, full_begin, full_end, end),
        PAGES, BLOCK_M, BLOCK_N, HEAD_DIM, HEAD_DIM_PAD, PRECISION, STAGES,
    )  # fmt: skip
    inverse_sum, lse = softmax_finish(row_max, row_sum, unit_log2(score), score.sinks, heads)
    values = (acc * inverse_sum[:, None]).to(out.ptr.dtype.element_ty)
    if PARTS:
        parts = (tl.cast(batch * seqlen_q + rows, tl.int64) * (nheads_k * GROUP) + heads) * num_splits + split
        if begin < end:  # the merge leaves out parts without keys
            tl.store(out.ptr + parts[:, None] * HEAD_DIM + dims[None, :], values, mask=mask)
        tl.store(softmax_lse + parts, lse, mask=inside)
    else:
        tl.store(sequence_base(out, batch, heads, span.start_q + rows)[:, None] + dims[None, :], values, mask=mask)
        lse_rows = statistic_row(batch, heads, span.start_q + rows, nheads_k * GROUP, seqlen_q, total_q)
        tl.store(softmax_lse + lse_rows, lse, mask=inside)


@triton.jit
def statistic_row(batch, head, row, nheads, seqlen_q, total_q):
    """Where a row's softmax_lse stands: (batch, nheads, seqlen_q), or (nheads, total_q) where that is not None."""
    if total_q is not None:
        return tl.cast(head, tl.int64) * total_q + row
    return tl.cast(batch * nheads + head, tl.int64) * seqlen_q + row


@triton.jit(do_not_specialize=["seqlen_q", "total_q", "nheads", "num_splits"])
def attn_decode_merge_kernel(
    part_out, part_lse, out, softmax_lse, cu_seqlens_q, sinks, seqlen_q, total_q, nheads, num_splits,
    HEAD_DIM: tl.constexpr, HEAD_DIM_PAD: tl.constexpr, BLOCK_SPLITS: tl.constexpr,
):  # fmt: skip
    """part_out (batch, seqlen_q, nheads, num_splits, dim) and part_lse without dim, both contiguous."""
    join_chain()
    row = tl.program_id(0)
    head = row % nheads
    query = row // nheads % seqlen_q
    batch = row // (nheads * seqlen_q)
    token = query
    if cu_seqlens_q is not None:
        start_q, length = packed_span(cu_seqlens_q, batch, total_q)
        if query >= length:
            return
        token += start_q
    first_part = tl.cast(row, tl.int64) * num_splits
    dims = tl.arange(0, HEAD_DIM_PAD)
    acc = tl.zeros([HEAD_DIM_PAD], tl.float32)
    row_max = tl.full([1], float("-inf"), tl.float32)
    row_sum = tl.zeros([1], tl.float32)
    # steps of a fixed size: parts that are empty, or beyond the last one, change no bit of the result
    for first in tl.range(0, num_splits, BLOCK_SPLITS):
        parts = first + tl.arange(0, BLOCK_SPLITS)
        inside = parts < num_splits
        lse = tl.load(part_lse + first_part + parts, mask=inside, other=float("-inf"))
        # those without keys were not written; they are read all the same, for no load to wait for the one above
        mask = inside[:, None] & (dims < HEAD_DIM)[None, :]
        tile = tl.load(part_out + (first_part + parts)[:, None] * HEAD_DIM + dims[None, :], mask=mask, other=0.0)
        # contracted to a fused multiply-add, the rescaling by 1 of a step without parts would move the last bit
        if tl.max(lse, 0) > float("-inf"):
            tile = tl.where((lse > float("-inf"))[:, None], tile, 0.0)
            weights, rescale, row_max, row_sum = softmax_step(row_max, row_sum, lse[None, :], LOG2_E)
            acc = acc * rescale + tl.sum(tl.trans(weights) * tile, 0)
    inverse_sum, lse = softmax_finish(row_max, row_sum, LOG2_E, sinks, head)
    values = (acc * inverse_sum).to(out.ptr.dtype.element_ty)
    tl.store(sequence_base(out, batch, head, token) + dims, values, mask=dims < HEAD_DIM)
    lse_row = statistic_row(batch, head, token, nheads, seqlen_q, total_q)
    tl.store(softmax_lse + lse_row + tl.arange(0, 1), lse)
