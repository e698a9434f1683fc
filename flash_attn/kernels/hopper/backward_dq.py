"""First backward pass for Hopper: delta and dq, persistent and warp-specialised, each sum in one fixed order.

    P = exp2(score(q k^T) - lse)      dP = dout v^T      dS = P * (dP - delta)      delta = rowsum(dout * out) - dlse

One warp loads, two warpgroups ("consumers") of 64 query rows each differentiate. A program takes tiles of CONSUMERS * 64 query
rows of one head from a counter in global memory until there are none.

    load       draws tile i+1, announces it, copies Q(i) and dO(i) behind the first K and V block, then the others in order
    consumer   delta = rowsum(dO * out)
               dP = dO V(n)^T   is issued while   P(n) comes from S(n);   then   dQ += dS(n) K(n)   and   S(n+1) = Q K(n+1)^T

    ring       filled by   read by       a slot is free when
    tiles      load        consumers     every consumer has read the number
    q          load        one consumer  that consumer's dq, which leaves through it, has left
    dout       load        one consumer  that consumer has issued its last dO V^T and it is complete
    k, v       load        consumers     every consumer's products with it are complete

The K/V loop is one loop with a uniform branch around the mask: ptxas 12.8 miscompiles two sibling loops that share a
tensor-core descriptor.
"""

from flash_attn.kernels.algebra.arguments import Window
from flash_attn.kernels.algebra.dropout import load_key, tile_bits
from flash_attn.kernels.algebra.locate import row_base
from flash_attn.kernels.algebra.score import gradient_scale, load_slope
from flash_attn.kernels.algebra.softmax import lse_log2, softmax_delta
from flash_attn.kernels.hopper.backward_tiles import (
    load_rows,
    load_rows_statistic,
    row_major_layout,
    score_gradient,
    tile_weights,
)
from flash_attn.kernels.hopper.columns import (
    accumulate_columns,
    await_products,
    first_part,
    inner_products,
    store_columns,
    zero_columns,
)
from flash_attn.kernels.hopper.pipeline import (
    WARPGROUP_ROWS,
    accumulator_layout,
    advance,
    allocate_ring,
    along_rows,
    fence_async_shared,
    fill,
    gl,
    gluon,
    loop_variant,
    matrix,
    mbarrier,
    row_coordinates,
    start_store,
    tma,
    warpgroup_mma_wait,
)
from flash_attn.kernels.hopper.schedule import (
    TILE_STAGES,
    Work,
    allocate_tiles,
    announce_next,
    announced_span,
    announced_tile,
    clear_counter,
    draw,
    first_tile,
    full_key_blocks,
    tile_field,
)


@gluon.jit
def load_partition(
    q_desc, dout_desc, k_desc, v_desc, tiles, q_ring, dout_ring, k_ring, v_ring, sequences, work, window,
    CONSUMERS: gl.constexpr, BLOCK_N: gl.constexpr, K_STAGES: gl.constexpr, V_STAGES: gl.constexpr,
    Q_STAGES: gl.constexpr, DRAW_AHEAD: gl.constexpr, PACKED: gl.constexpr,
):  # fmt: skip
    """Draws tiles and keeps the rings full."""
    BLOCK_M: gl.constexpr = CONSUMERS * WARPGROUP_ROWS
    t_slot, t_phase, q_slot, q_phase, k_slot, k_phase, v_slot, v_phase = 0, 1, 0, 1, 0, 1, 0, 1
    announce_next(tiles, t_slot, t_phase, first_tile(work), sequences, work, window, BLOCK_M, BLOCK_N)
    while tile_field(tiles, t_slot, 0) >= 0:
        m_block, head, batch, begin, end = announced_tile(tiles, t_slot)
        span = announced_span(tiles, t_slot, work, PACKED)
        head_k = head // work.group
        for n_block in range(begin, end):
            first = n_block * BLOCK_N
            fill(k_ring, k_slot, k_phase, k_desc, span.start_k, span.seqlen_k, first, batch, head_k, PACKED)
            k_slot, k_phase = advance(k_slot, k_phase, K_STAGES)
            fill(v_ring, v_slot, v_phase, v_desc, span.start_k, span.seqlen_k, first, batch, head_k, PACKED)
            v_slot, v_phase = advance(v_slot, v_phase, V_STAGES)
            if n_block == begin:
                for consumer in gl.static_range(CONSUMERS):
                    slot = q_slot * CONSUMERS + consumer
                    first = m_block * BLOCK_M + consumer * WARPGROUP_ROWS
                    fill(dout_ring, slot, q_phase, dout_desc, span.start_q, span.seqlen_q, first, batch, head, PACKED)
                    fill(q_ring, slot, q_phase, q_desc, span.start_q, span.seqlen_q, first, batch, head, PACKED)
                q_slot, q_phase = advance(q_slot, q_phase, Q_STAGES)
            if n_block == gl.maximum(end - 1 - DRAW_AHEAD, begin):
                t_slot, t_phase = advance(t_slot, t_phase, TILE_STAGES)
                announce_next(tiles, t_slot, t_phase, draw(work), sequences, work, window, BLOCK_M, BLOCK_N)
    clear_counter(work)


@gluon.jit
def row_delta_of(out_rows, dout_tile, layout: gl.constexpr):
    """rowsum(dout * out), one number a row."""
    dout_rows = dout_tile.load(out_rows.type.layout)
    return gl.convert_layout(gl.sum(out_rows.to(gl.float32) * dout_rows.to(gl.float32), 1), layout)


@gluon.jit
def accumulate_dq(
    q_ring, dout_ring, k_ring, v_ring, q_index, k_slot, k_phase, v_slot, v_phase, row_lse, row_delta, rows, first_row,
    begin, end, full_begin, full_end, span, window, score, slope, dropout, key,
    BLOCK_N: gl.constexpr, HEAD_DIM_PAD: gl.constexpr, WIDTH: gl.constexpr, K_STAGES: gl.constexpr, V_STAGES: gl.constexpr,
):  # fmt: skip
    """Sum of dS K over key blocks [begin, end)."""
    layout: gl.constexpr = accumulator_layout(BLOCK_N)
    operand: gl.constexpr = gl.DotOperandLayout(0, accumulator_layout(first_part(WIDTH)), 2)
    dtype: gl.constexpr = q_ring.buffers.dtype
    lanes = gl.arange(0, BLOCK_N, layout=gl.SliceLayout(0, layout))
    row_lanes = gl.arange(0, WARPGROUP_ROWS, layout=gl.SliceLayout(1, layout))[:, None]
    dq = zero_columns(WIDTH)
    mbarrier.wait(k_ring.full.index(k_slot), k_phase)
    q_tile = matrix(q_ring, q_index, WARPGROUP_ROWS, HEAD_DIM_PAD)
    qk = inner_products(q_tile, matrix(k_ring, k_slot, BLOCK_N, HEAD_DIM_PAD), BLOCK_N, WIDTH)
    qk = warpgroup_mma_wait(0, deps=(qk,))
    gl.assume(end > begin)
    for n_block in range(begin, end):
        index = q_index + loop_variant(n_block)
        q_tile = matrix(q_ring, index, WARPGROUP_ROWS, HEAD_DIM_PAD)
        dout_tile = matrix(dout_ring, index, WARPGROUP_ROWS, HEAD_DIM_PAD)
        mbarrier.wait(v_ring.full.index(v_slot), v_phase)
        dp = inner_products(dout_tile, matrix(v_ring, v_slot, BLOCK_N, HEAD_DIM_PAD), BLOCK_N, WIDTH)
        cols = (n_block * BLOCK_N + lanes)[None, :]
        masked = (n_block < full_begin) | (n_block >= full_end)
        bits = tile_bits(dropout, key, first_row, row_lanes, n_block * BLOCK_N, lanes[None, :])
        _weights, sensitivity = tile_weights(
            qk, along_rows(row_lse, layout), rows[:, None], cols, masked, span, window, score, slope, dropout, bits
        )
        dp = warpgroup_mma_wait(0, deps=(dp,))
        mbarrier.arrive(v_ring.empty.index(v_slot), count=1)
        v_slot, v_phase = advance(v_slot, v_phase, V_STAGES)
        ds = score_gradient(sensitivity, dp, along_rows(row_delta, layout), dropout).to(dtype)
        ds = gl.convert_layout(ds, operand)
        dq = accumulate_columns(ds, matrix(k_ring, k_slot, BLOCK_N, HEAD_DIM_PAD), dq, WIDTH)
        old_slot = k_slot
        k_slot, k_phase = advance(k_slot, k_phase, K_STAGES)
        # behind the last block this multiplies whatever lies there, and nothing reads it
        mbarrier.wait(k_ring.full.index(k_slot), k_phase, pred=n_block + 1 < end)
        qk = inner_products(q_tile, matrix(k_ring, k_slot, BLOCK_N, HEAD_DIM_PAD), BLOCK_N, WIDTH)
        dq, qk, ds = await_products(dq, qk, ds)
        mbarrier.arrive(k_ring.empty.index(old_slot), count=1)
    return dq, k_slot, k_phase, v_slot, v_phase


@gluon.jit
def dq_partition(
    dq_desc, out, softmax_lse, dlse, delta, tiles, q_ring, dout_ring, k_ring, v_ring, work, window, score, dropout,
    CONSUMER: gl.constexpr, CONSUMERS: gl.constexpr, BLOCK_N: gl.constexpr, HEAD_DIM: gl.constexpr,
    HEAD_DIM_PAD: gl.constexpr, WIDTH: gl.constexpr, K_STAGES: gl.constexpr, V_STAGES: gl.constexpr, Q_STAGES: gl.constexpr,
    PACKED: gl.constexpr,
):  # fmt: skip
    """One consumer."""
    BLOCK_M: gl.constexpr = CONSUMERS * WARPGROUP_ROWS
    row_layout: gl.constexpr = gl.SliceLayout(1, accumulator_layout(BLOCK_N))
    t_slot, t_phase, q_slot, q_phase, k_slot, k_phase, v_slot, v_phase = 0, 0, 0, 0, 0, 0, 0, 0
    mbarrier.wait(tiles.full.index(t_slot), t_phase)
    while tile_field(tiles, t_slot, 0) >= 0:
        first_row = tile_field(tiles, t_slot, 0) * BLOCK_M + CONSUMER * WARPGROUP_ROWS
        head, batch = tile_field(tiles, t_slot, 1), tile_field(tiles, t_slot, 2)
        begin, end = tile_field(tiles, t_slot, 3), tile_field(tiles, t_slot, 4)
        span = announced_span(tiles, t_slot, work, PACKED)
        mbarrier.arrive(tiles.empty.index(t_slot), count=1)
        t_slot, t_phase = advance(t_slot, t_phase, TILE_STAGES)
        full_begin, full_end = full_key_blocks(first_row, span, window, BLOCK_N)
        slope = load_slope(score, batch, head)
        key = load_key(dropout, batch * work.nheads + head)
        rows = first_row + gl.arange(0, WARPGROUP_ROWS, layout=row_layout)
        out_index = gl.convert_layout(rows, gl.SliceLayout(1, row_major_layout(HEAD_DIM_PAD)))
        out_rows = load_rows(out, span, batch, head, out_index, HEAD_DIM, HEAD_DIM_PAD)
        row_lse = lse_log2(load_rows_statistic(softmax_lse, span, batch, head, rows, float("-inf")))
        q_index = q_slot * CONSUMERS + CONSUMER
        mbarrier.wait(dout_ring.full.index(q_index), q_phase)
        row_delta = row_delta_of(out_rows, matrix(dout_ring, q_index, WARPGROUP_ROWS, HEAD_DIM_PAD), row_layout)
        if dlse is not None:
            row_delta = softmax_delta(row_delta, load_rows_statistic(dlse, span, batch, head, rows, 0.0), row_lse)
        gl.store(row_base(delta, batch, head, span.start_q) + rows, row_delta, mask=rows < span.seqlen_q)
        mbarrier.wait(q_ring.full.index(q_index), q_phase)
        dq, k_slot, k_phase, v_slot, v_phase = accumulate_dq(
            q_ring, dout_ring, k_ring, v_ring, q_index, k_slot, k_phase, v_slot, v_phase, row_lse, row_delta, rows,
            first_row, begin, end, full_begin, full_end, span, window, score, slope, dropout, key,
            BLOCK_N, HEAD_DIM_PAD, WIDTH, K_STAGES, V_STAGES,
        )  # fmt: skip
        mbarrier.arrive(dout_ring.empty.index(q_index), count=1)
        store_columns(matrix(q_ring, q_index, WARPGROUP_ROWS, HEAD_DIM_PAD), dq, gradient_scale(score), WIDTH)
        fence_async_shared()
        coordinates = row_coordinates(span.start_q, span.seqlen_q, first_row, batch, head, PACKED)
        start_store(dq_desc, coordinates, q_ring.buffers.index(q_index))
        tma.store_wait(0)
        mbarrier.arrive(q_ring.empty.index(q_index), count=1)
        q_slot, q_phase = advance(q_slot, q_phase, Q_STAGES)
        mbarrier.wait(tiles.full.index(t_slot), t_phase)


SIZES = [
    "num_tiles", "num_blocks", "heads_together", "seqlen_q", "seqlen_k", "total_q", "total_k", "window_left", "window_right",
    "nheads", "group",
]  # fmt: skip


@gluon.jit(do_not_specialize=SIZES)
def attn_bwd_dq_kernel(
    q_desc, k_desc, v_desc, dout_desc, dq_desc, out, softmax_lse, dlse, delta, sequences, score, dropout, counter,
    num_tiles, num_blocks, heads_together, seqlen_q, seqlen_k, total_q, total_k, window_left, window_right, nheads, group,
    HEAD_DIM: gl.constexpr, HEAD_DIM_PAD: gl.constexpr, WIDTH: gl.constexpr, BLOCK_N: gl.constexpr, CONSUMERS: gl.constexpr,
    K_STAGES: gl.constexpr, V_STAGES: gl.constexpr, Q_STAGES: gl.constexpr, DRAW_AHEAD: gl.constexpr, REGISTERS: gl.constexpr,
):  # fmt: skip
    PACKED: gl.constexpr = sequences.cu_seqlens_q is not None
    work = Work(counter, num_tiles, num_blocks, heads_together, nheads, group, seqlen_q, seqlen_k, total_q, total_k)
    window = Window(window_left, window_right)
    q_ring = allocate_ring(q_desc, Q_STAGES * CONSUMERS, 1)
    dout_ring = allocate_ring(dout_desc, Q_STAGES * CONSUMERS, 1)
    k_ring = allocate_ring(k_desc, K_STAGES, CONSUMERS)
    v_ring = allocate_ring(v_desc, V_STAGES, CONSUMERS)
    tiles = allocate_tiles(CONSUMERS)
    gl.warp_specialize([
        (dq_partition, (dq_desc, out, softmax_lse, dlse, delta, tiles, q_ring, dout_ring, k_ring, v_ring, work, window, score,
                        dropout, 0, CONSUMERS, BLOCK_N, HEAD_DIM, HEAD_DIM_PAD, WIDTH, K_STAGES, V_STAGES, Q_STAGES, PACKED)),
        (dq_partition, (dq_desc, out, softmax_lse, dlse, delta, tiles, q_ring, dout_ring, k_ring, v_ring, work, window, score,
                        dropout, 1, CONSUMERS, BLOCK_N, HEAD_DIM, HEAD_DIM_PAD, WIDTH, K_STAGES, V_STAGES, Q_STAGES, PACKED)),
        (load_partition, (q_desc, dout_desc, k_desc, v_desc, tiles, q_ring, dout_ring, k_ring, v_ring, sequences, work,
                          window, CONSUMERS, BLOCK_N, K_STAGES, V_STAGES, Q_STAGES, DRAW_AHEAD, PACKED)),
    ], [4, 1], [REGISTERS, 24])  # fmt: skip
