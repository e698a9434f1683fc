"""Forward kernel: out = softmax(score(q k^T)) v and softmax_lse, one program per (query block, head, batch).

    for each block of keys that some row of the program sees:
        tile = score(q k^T), masked if the block straddles the edge of some row's interval
        fold tile into (row_max, row_sum, acc)

One loop with a uniform branch around the mask: against a masked, an unmasked and a masked loop it compiles in half the time,
needs fewer registers, and stays clear of a ptxas 12.8 fault with sibling loops that share a tensor-core descriptor.
"""

import triton
import triton.language as tl

from flash_attn.kernels.algebra.arguments import Window
from flash_attn.kernels.algebra.dropout import col_words, drop, kept_scale, load_key, random_bits, row_words
from flash_attn.kernels.algebra.interval import key_blocks, visible
from flash_attn.kernels.algebra.locate import row_base, row_statistic, sequence_base
from flash_attn.kernels.algebra.score import key_distance, load_slope, score_forward, unit_log2
from flash_attn.kernels.algebra.softmax import lowest_max, softmax_finish, softmax_step, softmax_step_bounded
from flash_attn.kernels.algebra.span import load_span
from flash_attn.kernels.portable.tiles import load_page_rows, load_paged_rows, load_rows, store_rows


@triton.jit
def key_block_bounds(m_block, span, window, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Key blocks that the rows of one query block see: [begin, full_begin, full_end, end)."""
    last_row = tl.minimum(m_block * BLOCK_M + BLOCK_M, span.seqlen_q) - 1
    return key_blocks(m_block * BLOCK_M, last_row, span, window, BLOCK_N)


@triton.jit
def load_keys(
    t, desc, base, pages, batch, head_k, n_block, span,
    PAGES: tl.constexpr, BLOCK_N: tl.constexpr, HEAD_DIM: tl.constexpr, HEAD_DIM_PAD: tl.constexpr,
):  # fmt: skip
    """One (BLOCK_N, HEAD_DIM_PAD) tile of keys or values; PAGES hold it, or None where any key may lie in any page."""
    if desc is not None:
        tile = desc.load([batch, n_block * BLOCK_N, head_k, 0]).reshape(BLOCK_N, HEAD_DIM_PAD)
    elif PAGES is not None:
        first = span.start_k + n_block * BLOCK_N
        end = span.start_k + span.seqlen_k
        tile = load_page_rows(t, pages, batch, head_k, first, end, PAGES, BLOCK_N, HEAD_DIM, HEAD_DIM_PAD)
    elif pages.block_table is not None:
        cols = n_block * BLOCK_N + tl.arange(0, BLOCK_N)
        tile = load_paged_rows(t, pages, batch, head_k, span.start_k, cols, span.seqlen_k, HEAD_DIM, HEAD_DIM_PAD)
    else:
        tile = load_rows(t, base, n_block * BLOCK_N, span.seqlen_k, BLOCK_N, HEAD_DIM, HEAD_DIM_PAD)
    return tile


@triton.jit
def attend(
    q_tile, k, v, k_desc, v_desc, k_base, v_base, pages, batch, head_k, rows, span, window, score, slope, dropout, key,
    row_word, bounds,
    PAGES: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, HEAD_DIM: tl.constexpr, HEAD_DIM_PAD: tl.constexpr,
    PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Online softmax of one query block over its key blocks; returns (acc, row_max, row_sum)."""
    begin, full_begin, full_end, end = bounds
    unit = unit_log2(score)
    acc = tl.zeros([BLOCK_M, HEAD_DIM_PAD], tl.float32)
    row_max = tl.full([BLOCK_M], lowest_max(score), tl.float32)
    row_sum = tl.zeros([BLOCK_M], tl.float32)
    lanes = tl.arange(0, BLOCK_N)
    for n_block in tl.range(begin, end, num_stages=STAGES):
        k_tile = load_keys(
            k, k_desc, k_base, pages, batch, head_k, n_block, span, PAGES, BLOCK_N, HEAD_DIM, HEAD_DIM_PAD
        )
        qk = tl.dot(q_tile, k_tile.T, input_precision=PRECISION)
        cols = n_block * BLOCK_N + lanes
        tile = score_forward(qk, key_distance(rows[:, None], cols[None, :], span), score, slope)
        if (n_block < full_begin) | (n_block >= full_end):
            tile = tl.where(visible(rows[:, None], cols[None, :], span, window), tile, float("-inf"))
        if score.bounded is not None:
            weights, row_sum = softmax_step_bounded(row_sum, tile, unit)
        else:
            weights, rescale, row_max, row_sum = softmax_step(row_max, row_sum, tile, unit)
        if dropout.rng_state is not None:
            col_word = col_words(dropout, key, n_block * BLOCK_N, lanes[None, :])
            bits = random_bits(dropout, key, rows[:, None], cols[None, :], row_word, col_word)
            weights = drop(dropout, bits, weights)
        v_tile = load_keys(
            v, v_desc, v_base, pages, batch, head_k, n_block, span, PAGES, BLOCK_N, HEAD_DIM, HEAD_DIM_PAD
        )
        weights = weights.to(v_tile.dtype)
        if score.bounded is None:
            acc = acc * rescale[:, None]
        acc = tl.dot(weights, v_tile, acc, input_precision=PRECISION)
    return acc, row_max, row_sum


LENGTHS = ["seqlen_q", "seqlen_k", "total_q", "total_k", "window_left", "window_right", "nheads"]


@triton.jit(do_not_specialize=LENGTHS)
def attn_fwd_kernel(
    q, k, v, out, softmax_lse, k_desc, v_desc, sequences, pages, score, dropout,
    seqlen_q, seqlen_k, total_q, total_k, window_left, window_right, nheads, group,
    PAGES: tl.constexpr, HEAD_DIM: tl.constexpr, HEAD_DIM_PAD: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    num_m = tl.cdiv(seqlen_q, BLOCK_M)
    m_block = num_m - 1 - tl.program_id(0) % num_m  # causal rows see more keys the later they are: longest first
    batch_head = tl.program_id(0) // num_m
    head = batch_head % nheads
    batch = batch_head // nheads
    head_k = head // group
    window = Window(window_left, window_right)
    span = load_span(sequences, pages.block_table is not None, batch, seqlen_q, seqlen_k, total_q, total_k)
    if m_block * BLOCK_M >= span.seqlen_q:
        return
    rows = m_block * BLOCK_M + tl.arange(0, BLOCK_M)
    q_tile = load_rows(q, sequence_base(q, batch, head, span.start_q), m_block * BLOCK_M, span.seqlen_q,
                       BLOCK_M, HEAD_DIM, HEAD_DIM_PAD)  # fmt: skip
    k_base = sequence_base(k, batch, head_k, span.start_k)
    v_base = sequence_base(v, batch, head_k, span.start_k)
    slope = load_slope(score, batch, head)
    key = load_key(dropout, batch_head)
    acc, row_max, row_sum = attend(
        q_tile, k, v, k_desc, v_desc, k_base, v_base, pages, batch, head_k, rows, span, window, score, slope, dropout, key,
        row_words(dropout, key, m_block * BLOCK_M, tl.arange(0, BLOCK_M)[:, None]),
        key_block_bounds(m_block, span, window, BLOCK_M, BLOCK_N),
        PAGES, BLOCK_M, BLOCK_N, HEAD_DIM, HEAD_DIM_PAD, PRECISION, STAGES,
    )  # fmt: skip
    inverse_sum, lse = softmax_finish(row_max, row_sum, unit_log2(score), score.sinks, head)
    acc *= (inverse_sum * kept_scale(dropout))[:, None]
    store_rows(out, sequence_base(out, batch, head, span.start_q), acc, m_block * BLOCK_M, span.seqlen_q,
               BLOCK_M, HEAD_DIM, HEAD_DIM_PAD)  # fmt: skip
    softmax_lse = row_statistic(softmax_lse, sequences, nheads, total_q)
    tl.store(row_base(softmax_lse, batch, head, span.start_q) + rows, lse, mask=rows < span.seqlen_q)
