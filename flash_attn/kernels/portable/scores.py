"""The matrix of unnormalised dropout weights, for callers that ask for return_attn_probs."""

import triton
import triton.language as tl

from flash_attn.kernels.algebra.arguments import Window
from flash_attn.kernels.algebra.dropout import col_words, keep_mask, load_key, random_bits, row_words
from flash_attn.kernels.algebra.interval import visible
from flash_attn.kernels.algebra.locate import sequence_base
from flash_attn.kernels.algebra.score import key_distance, load_slope, score_forward, unit_log2
from flash_attn.kernels.algebra.softmax import softmax_step
from flash_attn.kernels.algebra.span import load_span
from flash_attn.kernels.portable.forward import LENGTHS, key_block_bounds, load_keys
from flash_attn.kernels.portable.tiles import load_rows


@triton.jit
def masked_scores(
    q_tile, k, k_base, pages, batch, head_k, n_block, rows, span, window, score, slope,
    PAGES: tl.constexpr, BLOCK_N: tl.constexpr, HEAD_DIM: tl.constexpr, HEAD_DIM_PAD: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """(scores, their key positions) of one tile, -inf where a row may not see a key."""
    k_tile = load_keys(k, None, k_base, pages, batch, head_k, n_block, span, PAGES, BLOCK_N, HEAD_DIM, HEAD_DIM_PAD)
    qk = tl.dot(q_tile, k_tile.T, input_precision=PRECISION)
    cols = n_block * BLOCK_N + tl.arange(0, BLOCK_N)
    tile = score_forward(qk, key_distance(rows[:, None], cols[None, :], span), score, slope)
    return tl.where(visible(rows[:, None], cols[None, :], span, window), tile, float("-inf")), cols


@triton.jit(do_not_specialize=LENGTHS)
def attn_scores_kernel(
    q, k, scores, stride_b, stride_h, stride_s, sequences, pages, score, dropout,
    seqlen_q, seqlen_k, total_q, total_k, window_left, window_right, nheads, group,
    PAGES: tl.constexpr, HEAD_DIM: tl.constexpr, HEAD_DIM_PAD: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """scores[b, h, i, j] = exp(score - row maximum), negative where the weight is dropped; two passes over the keys."""
    num_m = tl.cdiv(seqlen_q, BLOCK_M)
    m_block = tl.program_id(0) % num_m
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
    slope = load_slope(score, batch, head)
    key = load_key(dropout, batch_head)
    row_word = row_words(dropout, key, m_block * BLOCK_M, tl.arange(0, BLOCK_M)[:, None])
    unit = unit_log2(score)
    row_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    row_sum = tl.zeros([BLOCK_M], tl.float32)
    begin, _full_begin, _full_end, end = key_block_bounds(m_block, span, window, BLOCK_M, BLOCK_N)
    for n_block in tl.range(begin, end):
        tile, _cols = masked_scores(q_tile, k, k_base, pages, batch, head_k, n_block, rows, span, window, score, slope,
                                    PAGES, BLOCK_N, HEAD_DIM, HEAD_DIM_PAD, PRECISION)  # fmt: skip
        _weights, _rescale, row_max, row_sum = softmax_step(row_max, row_sum, tile, unit)
    pivot_log2 = tl.where(row_max == float("-inf"), 0.0, row_max * unit)
    base = scores + tl.cast(batch, tl.int64) * stride_b + tl.cast(head, tl.int64) * stride_h
    # a key past max_seqlen_k has no place in the result
    last = tl.minimum(span.seqlen_k, seqlen_k)
    for n_block in tl.range(begin, end):
        tile, cols = masked_scores(q_tile, k, k_base, pages, batch, head_k, n_block, rows, span, window, score, slope,
                                   PAGES, BLOCK_N, HEAD_DIM, HEAD_DIM_PAD, PRECISION)  # fmt: skip
        weights = tl.math.exp2(tile * unit - pivot_log2[:, None])
        col_word = col_words(dropout, key, n_block * BLOCK_N, tl.arange(0, BLOCK_N)[None, :])
        bits = random_bits(dropout, key, rows[:, None], cols[None, :], row_word, col_word)
        weights = tl.where(keep_mask(dropout, bits), weights, -weights)
        inside = (rows < tl.minimum(span.seqlen_q, seqlen_q))[:, None] & (cols < last)[None, :]
        pointers = base + rows.to(tl.int64)[:, None] * stride_s + cols[None, :]
        tl.store(pointers, weights.to(scores.dtype.element_ty), mask=inside)
