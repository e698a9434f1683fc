"""Backward kernels: two passes, no atomics, so every gradient is bitwise reproducible.

    P = exp2(score(q k^T) - lse)      dP = dout v^T      dS = P * (dP - delta)      delta = rowsum(dout * out) - dlse

    dq pass, one program per query block:   delta, then dq = sum over key blocks of dS k
    dkdv pass, one program per key block and key head:
        dv = sum of P^T dout,  dk = sum of dS^T q  over the query heads of the group and their query blocks

Each pass is a launch, and the second reads the row statistics of the first. Small problems take both in one launch, whose dkdv
programs compute the statistics themselves, since programs of a launch have no order.

The dkdv pass works on transposed tiles (keys down, queries across), so that P^T and dS^T are left operands as they are.
"""

import triton
import triton.language as tl

from flash_attn.kernels.algebra.arguments import Window
from flash_attn.kernels.algebra.dropout import col_words, drop, kept_scale, load_key, random_bits, row_words
from flash_attn.kernels.algebra.interval import block_bounds, query_interval, visible
from flash_attn.kernels.algebra.locate import row_base, row_statistic, sequence_base
from flash_attn.kernels.algebra.score import (
    gradient_scale,
    key_distance,
    load_slope,
    score_backward,
    score_forward,
    unit_log2,
)
from flash_attn.kernels.algebra.softmax import lse_log2, softmax_backward, softmax_delta, softmax_weights
from flash_attn.kernels.algebra.span import load_span
from flash_attn.kernels.portable.forward import LENGTHS, key_block_bounds
from flash_attn.kernels.portable.tiles import load_rows, store_rows


@triton.jit
def tile_gradients(qk, dp, row_lse, row_delta, rows, cols, masked, span, window, score, slope, dropout, bits):
    """(weights that multiplied v, gradient of qk) of one tile: the whole chain rule, for either orientation of the tile."""
    tile = score_forward(qk, key_distance(rows, cols, span), score, slope)
    weights = softmax_weights(tile, unit_log2(score), row_lse)
    if masked:
        weights = tl.where(visible(rows, cols, span, window), weights, 0.0)
    used = weights
    if dropout.rng_state is not None:
        used = drop(dropout, bits, weights)
        dp = drop(dropout, bits, dp) * kept_scale(dropout)
    return used, softmax_backward(score_backward(weights, tile, qk, score), dp, row_delta)


@triton.jit
def accumulate_dq(
    q_tile, dout_tile, row_lse, row_delta, k, v, k_desc, v_desc, k_base, v_base, batch, head_k, rows, span, window, score,
    slope, dropout, key, row_word, bounds,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, HEAD_DIM: tl.constexpr, HEAD_DIM_PAD: tl.constexpr,
    PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Sum of dS k over the key blocks that one query block sees."""
    begin, full_begin, full_end, end = bounds
    dq = tl.zeros([BLOCK_M, HEAD_DIM_PAD], tl.float32)
    lanes = tl.arange(0, BLOCK_N)
    for n_block in tl.range(begin, end, num_stages=STAGES):
        if k_desc is not None:
            k_tile = k_desc.load([batch, n_block * BLOCK_N, head_k, 0]).reshape(BLOCK_N, HEAD_DIM_PAD)
            v_tile = v_desc.load([batch, n_block * BLOCK_N, head_k, 0]).reshape(BLOCK_N, HEAD_DIM_PAD)
        else:
            k_tile = load_rows(k, k_base, n_block * BLOCK_N, span.seqlen_k, BLOCK_N, HEAD_DIM, HEAD_DIM_PAD)
            v_tile = load_rows(v, v_base, n_block * BLOCK_N, span.seqlen_k, BLOCK_N, HEAD_DIM, HEAD_DIM_PAD)
        qk = tl.dot(q_tile, k_tile.T, input_precision=PRECISION)
        dp = tl.dot(dout_tile, v_tile.T, input_precision=PRECISION)
        cols = n_block * BLOCK_N + lanes
        col_word = col_words(dropout, key, n_block * BLOCK_N, lanes[None, :])
        bits = random_bits(dropout, key, rows[:, None], cols[None, :], row_word, col_word)
        masked = (n_block < full_begin) | (n_block >= full_end)
        _used, dqk = tile_gradients(qk, dp, row_lse[:, None], row_delta[:, None], rows[:, None], cols[None, :], masked,
                                    span, window, score, slope, dropout, bits)  # fmt: skip
        dq = tl.dot(dqk.to(k_tile.dtype), k_tile, dq, input_precision=PRECISION)
    return dq


@triton.jit
def query_statistics(
    out, softmax_lse, dlse, dout_tile, batch, head, first, rows, span,
    BLOCK_M: tl.constexpr, HEAD_DIM: tl.constexpr, HEAD_DIM_PAD: tl.constexpr,
):  # fmt: skip
    """(lse in base 2, delta) of the rows of one query block; rows outside the sequence get (inf, 0)."""
    out_base = sequence_base(out, batch, head, span.start_q)
    out_tile = load_rows(out, out_base, first, span.seqlen_q, BLOCK_M, HEAD_DIM, HEAD_DIM_PAD)
    row_delta = tl.sum(dout_tile.to(tl.float32) * out_tile.to(tl.float32), 1)
    lse_rows = row_base(softmax_lse, batch, head, span.start_q) + rows
    row_lse = lse_log2(tl.load(lse_rows, mask=rows < span.seqlen_q, other=float("-inf")))
    if dlse is not None:
        dlse_rows = row_base(dlse, batch, head, span.start_q) + rows
        row_delta = softmax_delta(row_delta, tl.load(dlse_rows, mask=rows < span.seqlen_q, other=0.0), row_lse)
    return row_lse, row_delta


@triton.jit
def dq_tile(
    program, q, k, v, out, dout, dq, softmax_lse, dlse, delta, row_lse_log2, k_desc, v_desc, sequences, score, dropout,
    seqlen_q, seqlen_k, total_q, total_k, window, nheads, group,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, HEAD_DIM: tl.constexpr, HEAD_DIM_PAD: tl.constexpr,
    PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """dq and delta of one query block, and its lse in base 2 where somebody reads that."""
    num_m = tl.cdiv(seqlen_q, BLOCK_M)
    m_block = num_m - 1 - program % num_m
    batch_head = program // num_m
    head = batch_head % nheads
    batch = batch_head // nheads
    head_k = head // group
    span = load_span(sequences, False, batch, seqlen_q, seqlen_k, total_q, total_k)
    softmax_lse = row_statistic(softmax_lse, sequences, nheads, total_q)
    dlse = row_statistic(dlse, sequences, nheads, total_q)
    delta = row_statistic(delta, sequences, nheads, total_q)
    row_lse_log2 = row_statistic(row_lse_log2, sequences, nheads, total_q)
    first = m_block * BLOCK_M
    if first < span.seqlen_q:
        rows = first + tl.arange(0, BLOCK_M)
        q_base = sequence_base(q, batch, head, span.start_q)
        q_tile = load_rows(q, q_base, first, span.seqlen_q, BLOCK_M, HEAD_DIM, HEAD_DIM_PAD)
        dout_base = sequence_base(dout, batch, head, span.start_q)
        dout_tile = load_rows(dout, dout_base, first, span.seqlen_q, BLOCK_M, HEAD_DIM, HEAD_DIM_PAD)
        row_lse, row_delta = query_statistics(out, softmax_lse, dlse, dout_tile, batch, head, first, rows, span,
                                              BLOCK_M, HEAD_DIM, HEAD_DIM_PAD)  # fmt: skip
        tl.store(row_base(delta, batch, head, span.start_q) + rows, row_delta, mask=rows < span.seqlen_q)
        if row_lse_log2 is not None:
            tl.store(row_base(row_lse_log2, batch, head, span.start_q) + rows, row_lse, mask=rows < span.seqlen_q)
        k_base = sequence_base(k, batch, head_k, span.start_k)
        v_base = sequence_base(v, batch, head_k, span.start_k)
        slope = load_slope(score, batch, head)
        key = load_key(dropout, batch_head)
        acc = accumulate_dq(
            q_tile, dout_tile, row_lse, row_delta, k, v, k_desc, v_desc, k_base, v_base, batch, head_k, rows, span, window,
            score, slope, dropout, key, row_words(dropout, key, first, tl.arange(0, BLOCK_M)[:, None]),
            key_block_bounds(m_block, span, window, BLOCK_M, BLOCK_N),
            BLOCK_M, BLOCK_N, HEAD_DIM, HEAD_DIM_PAD, PRECISION, STAGES,
        )  # fmt: skip
        store_rows(dq, sequence_base(dq, batch, head, span.start_q), acc * gradient_scale(score), first, span.seqlen_q,
                   BLOCK_M, HEAD_DIM, HEAD_DIM_PAD)  # fmt: skip


@triton.jit(do_not_specialize=LENGTHS)
def attn_bwd_dq_kernel(
    q, k, v, out, dout, dq, softmax_lse, dlse, delta, row_lse_log2, k_desc, v_desc, sequences, score, dropout,
    seqlen_q, seqlen_k, total_q, total_k, window_left, window_right, nheads, group,
    HEAD_DIM: tl.constexpr, HEAD_DIM_PAD: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    dq_tile(
        tl.program_id(0), q, k, v, out, dout, dq, softmax_lse, dlse, delta, row_lse_log2, k_desc, v_desc, sequences, score,
        dropout, seqlen_q, seqlen_k, total_q, total_k, Window(window_left, window_right), nheads, group,
        BLOCK_M, BLOCK_N, HEAD_DIM, HEAD_DIM_PAD, PRECISION, STAGES,
    )  # fmt: skip


@triton.jit
def group_step(step, num_blocks, group):
    """(query head of the group, block) of a step in the flattened loop over both."""
    if group == 1:
        member, block = step * 0, step
    else:
        member, block = step // num_blocks, step % num_blocks
    return member, block


@triton.jit
def accumulate_dkdv(
    k_tile, v_tile, q, out, dout, q_desc, dout_desc, softmax_lse, dlse, delta, row_lse_log2, batch, head_k, group, first,
    cols, span, window, score, dropout, nheads, bounds,
    WITH_DK: tl.constexpr, WITH_DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, HEAD_DIM: tl.constexpr,
    HEAD_DIM_PAD: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Sums of dS^T q and P^T dout over the query heads of the group and the query blocks that see one key block.

    The statistics of the rows come from `delta` and `row_lse_log2`, or where these are None from what they follow from.
    """
    begin, full_begin, full_end, end = bounds
    dk = tl.zeros([BLOCK_N, HEAD_DIM_PAD], tl.float32)
    dv = tl.zeros([BLOCK_N, HEAD_DIM_PAD], tl.float32)
    slope = load_slope(score, batch, head_k * group)
    key = load_key(dropout, batch * nheads + head_k * group)
    lanes = tl.arange(0, BLOCK_M)
    for step in tl.range(0, (end - begin) * group, num_stages=STAGES):
        member, block = group_step(step, end - begin, group)
        head = head_k * group + member
        m_block = begin + block
        rows = m_block * BLOCK_M + lanes
        if q_desc is not None:
            q_tile = q_desc.load([batch, m_block * BLOCK_M, head, 0]).reshape(BLOCK_M, HEAD_DIM_PAD)
            dout_tile = dout_desc.load([batch, m_block * BLOCK_M, head, 0]).reshape(BLOCK_M, HEAD_DIM_PAD)
        else:
            q_base = sequence_base(q, batch, head, span.start_q)
            q_tile = load_rows(q, q_base, m_block * BLOCK_M, span.seqlen_q, BLOCK_M, HEAD_DIM, HEAD_DIM_PAD)
            dout_base = sequence_base(dout, batch, head, span.start_q)
            dout_tile = load_rows(dout, dout_base, m_block * BLOCK_M, span.seqlen_q, BLOCK_M, HEAD_DIM, HEAD_DIM_PAD)
        if row_lse_log2 is not None:
            lse_rows = row_base(row_lse_log2, batch, head, span.start_q) + rows
            row_lse = tl.load(lse_rows, mask=rows < span.seqlen_q, other=float("inf"))
            delta_rows = row_base(delta, batch, head, span.start_q) + rows
            row_delta = tl.load(delta_rows, mask=rows < span.seqlen_q, other=0.0)
        else:
            row_lse, row_delta = query_statistics(out, softmax_lse, dlse, dout_tile, batch, head, m_block * BLOCK_M, rows,
                                                  span, BLOCK_M, HEAD_DIM, HEAD_DIM_PAD)  # fmt: skip
        qk = tl.dot(k_tile, q_tile.T, input_precision=PRECISION)
        dp = tl.dot(v_tile, dout_tile.T, input_precision=PRECISION)
        if (block == 0) & (member > 0):
            slope = load_slope(score, batch, head)
            key = load_key(dropout, batch * nheads + head)
        row_word = row_words(dropout, key, m_block * BLOCK_M, lanes[None, :])
        col_word = col_words(dropout, key, first, tl.arange(0, BLOCK_N)[:, None])
        bits = random_bits(dropout, key, rows[None, :], cols[:, None], row_word, col_word)
        masked = (m_block < full_begin) | (m_block >= full_end)
        used, dqk = tile_gradients(qk, dp, row_lse[None, :], row_delta[None, :], rows[None, :], cols[:, None], masked,
                                   span, window, score, slope, dropout, bits)  # fmt: skip
        if WITH_DV:
            dv = tl.dot(used.to(dout_tile.dtype), dout_tile, dv, input_precision=PRECISION)
        if WITH_DK:
            dk = tl.dot(dqk.to(q_tile.dtype), q_tile, dk, input_precision=PRECISION)
    return dk, dv


@triton.jit
def query_block_bounds(n_block, span, window, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Query blocks that see one key block: [begin, full_begin, full_end, end). Rows past the sequence end need no mask."""
    first_lo, first_hi = query_interval(n_block * BLOCK_N, span, window)
    last_lo, last_hi = query_interval(tl.minimum(n_block * BLOCK_N + BLOCK_N, span.seqlen_k) - 1, span, window)
    begin, full_begin, full_end, end = block_bounds(first_lo, last_lo, first_hi, last_hi, BLOCK_M)
    if window.left is None:
        full_end = end
    if window.right is None:
        full_begin = begin
    return begin, full_begin, full_end, end


@triton.jit
def dkdv_tile(
    program, q, k, v, out, dout, dk, dv, softmax_lse, dlse, delta, row_lse_log2, q_desc, dout_desc, sequences, score, dropout,
    seqlen_q, seqlen_k, total_q, total_k, window, nheads, group,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, HEAD_DIM: tl.constexpr, HEAD_DIM_PAD: tl.constexpr,
    PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """dk and dv of one key block, or either; see `accumulate_dkdv`."""
    num_n = tl.cdiv(seqlen_k, BLOCK_N)
    n_block = program % num_n  # causal keys are seen by more rows the earlier they are: longest first
    batch_head = program // num_n
    nheads_k = nheads // group
    head_k = batch_head % nheads_k
    batch = batch_head // nheads_k
    span = load_span(sequences, False, batch, seqlen_q, seqlen_k, total_q, total_k)
    softmax_lse = row_statistic(softmax_lse, sequences, nheads, total_q)
    dlse = row_statistic(dlse, sequences, nheads, total_q)
    delta = row_statistic(delta, sequences, nheads, total_q)
    row_lse_log2 = row_statistic(row_lse_log2, sequences, nheads, total_q)
    first = n_block * BLOCK_N
    if first < span.seqlen_k:
        cols = first + tl.arange(0, BLOCK_N)
        k_base = sequence_base(k, batch, head_k, span.start_k)
        k_tile = load_rows(k, k_base, first, span.seqlen_k, BLOCK_N, HEAD_DIM, HEAD_DIM_PAD)
        v_base = sequence_base(v, batch, head_k, span.start_k)
        v_tile = load_rows(v, v_base, first, span.seqlen_k, BLOCK_N, HEAD_DIM, HEAD_DIM_PAD)
        dk_acc, dv_acc = accumulate_dkdv(
            k_tile, v_tile, q, out, dout, q_desc, dout_desc, softmax_lse, dlse, delta, row_lse_log2, batch, head_k, group,
            first, cols, span, window, score, dropout, nheads, query_block_bounds(n_block, span, window, BLOCK_M, BLOCK_N),
            dk is not None, dv is not None, BLOCK_M, BLOCK_N, HEAD_DIM, HEAD_DIM_PAD, PRECISION, STAGES,
        )  # fmt: skip
        if dk is not None:
            store_rows(dk, sequence_base(dk, batch, head_k, span.start_k), dk_acc * gradient_scale(score), first,
                       span.seqlen_k, BLOCK_N, HEAD_DIM, HEAD_DIM_PAD)  # fmt: skip
        if dv is not None:
            store_rows(dv, sequence_base(dv, batch, head_k, span.start_k), dv_acc * kept_scale(dropout), first,
                       span.seqlen_k, BLOCK_N, HEAD_DIM, HEAD_DIM_PAD)  # fmt: skip


@triton.jit(do_not_specialize=LENGTHS)
def attn_bwd_dkdv_kernel(
    q, k, v, dout, dk, dv, delta, row_lse_log2, q_desc, dout_desc, sequences, score, dropout,
    seqlen_q, seqlen_k, total_q, total_k, window_left, window_right, nheads, group,
    HEAD_DIM: tl.constexpr, HEAD_DIM_PAD: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    dkdv_tile(
        tl.program_id(0), q, k, v, None, dout, dk, dv, None, None, delta, row_lse_log2, q_desc, dout_desc, sequences, score,
        dropout, seqlen_q, seqlen_k, total_q, total_k, Window(window_left, window_right), nheads, group,
        BLOCK_M, BLOCK_N, HEAD_DIM, HEAD_DIM_PAD, PRECISION, STAGES,
    )  # fmt: skip


@triton.jit(do_not_specialize=[*LENGTHS, "num_key_tiles"])
def attn_bwd_kernel(
    q, k, v, out, dout, dq, dk, dv, softmax_lse, dlse, delta, sequences, score, dropout,
    seqlen_q, seqlen_k, total_q, total_k, window_left, window_right, nheads, group, num_key_tiles,
    HEAD_DIM: tl.constexpr, HEAD_DIM_PAD: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    window = Window(window_left, window_right)
    program = tl.program_id(0)
    if program < num_key_tiles:  # longest first: four products against three, and every query head of a group
        # One stage: with more, Triton 3.6 copies the next dout over the tile that the product for dv still reads: a tile that
        # goes into registers, too, gets no buffer to spare.
        dkdv_tile(
            program, q, k, v, out, dout, dk, dv, softmax_lse, dlse, None, None, None, None, sequences, score, dropout,
            seqlen_q, seqlen_k, total_q, total_k, window, nheads, group,
            BLOCK_M, BLOCK_N, HEAD_DIM, HEAD_DIM_PAD, PRECISION, 1,
        )  # fmt: skip
    else:
        dq_tile(
            program - num_key_tiles, q, k, v, out, dout, dq, softmax_lse, dlse, delta, None, None, None, sequences, score,
            dropout, seqlen_q, seqlen_k, total_q, total_k, window, nheads, group,
            BLOCK_M, BLOCK_N, HEAD_DIM, HEAD_DIM_PAD, PRECISION, STAGES,
        )  # fmt: skip
