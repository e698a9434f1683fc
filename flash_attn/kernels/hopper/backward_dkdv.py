"""Second backward pass for Hopper: dk and dv, persistent and warp-specialised, each sum in one fixed order.

    P = exp2(score(q k^T) - lse)      dP = dout v^T      dS = P * (dP - delta)

One warp loads, two warpgroups ("consumers") of 64 keys each differentiate, on transposed tiles (keys down, queries across), so
that P^T and dS^T are left operands in registers. A program takes tiles of CONSUMERS * 64 keys of one key head from a counter
in global memory until there are none; one loop runs through the query heads of the group and their query blocks.

    load       draws tile i+1, announces it, copies K(i) and V(i), then Q and dO blocks with softmax_lse and delta of their rows
    consumer   dP^T = V dO(m)^T   is issued while   P^T(m) comes from S^T(m);   then
               dV += P^T(m) dO(m)   and   dK += dS^T(m) Q(m)   and   S^T(m+1) = K Q(m+1)^T

    ring       filled by                     read by       a slot is free when
    tiles      load                          consumers     every consumer has read the number
    k, v       load                          one consumer  that consumer's dk and dv, which leave through them, have left
    q          load: tile, and its row_lse   consumers     every consumer's products with it are complete
    dout       load: tile, and row_delta     consumers     every consumer's products with it are complete

dk or dv may be left out: at head dim 256 both accumulators do not fit the registers, and a launch for each costs one more
Q K^T. The loop is one loop with a uniform branch around the mask: ptxas 12.8 miscompiles two sibling loops that share a
tensor-core descriptor.
"""

from flash_attn.kernels.algebra.arguments import Window
from flash_attn.kernels.algebra.dropout import kept_scale
from flash_attn.kernels.algebra.score import gradient_scale, load_slope
from flash_attn.kernels.algebra.softmax import lse_log2
from flash_attn.kernels.hopper.backward_tiles import (
    allocate_key_words,
    allocate_statistics,
    first_group_block,
    load_statistic,
    next_group_block,
    score_gradient,
    store_key,
    tile_weights,
    transposed_bits,
    value_weights,
)
from flash_attn.kernels.hopper.columns import (
    accumulate_columns,
    await_product,
    await_products,
    first_part,
    inner_products,
    num_parts,
    store_columns,
    zero_columns,
)
from flash_attn.kernels.hopper.pipeline import (
    WARPGROUP_ROWS,
    accumulator_layout,
    advance,
    allocate_ring,
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
    full_query_blocks,
    tile_at,
    tile_blocks,
    tile_field,
    tile_span,
)


@gluon.jit
def load_partition(
    q_desc, dout_desc, k_desc, v_desc, softmax_lse, delta, tiles, k_ring, v_ring, q_ring, dout_ring, row_lse, row_delta,
    key_words, sequences, work, window, dropout,
    CONSUMERS: gl.constexpr, BLOCK_M: gl.constexpr, K_STAGES: gl.constexpr, Q_STAGES: gl.constexpr,
    DOUT_STAGES: gl.constexpr, WITH_DK: gl.constexpr, PACKED: gl.constexpr,
):  # fmt: skip
    """Draws tiles and keeps the rings full."""
    IN_ORDER: gl.constexpr = work.in_order is not None
    AHEAD: gl.constexpr = work.ahead is not None
    BLOCK_N: gl.constexpr = CONSUMERS * WARPGROUP_ROWS
    t_slot, t_phase, k_slot, k_phase, q_slot, q_phase, d_slot, d_phase = 0, 1, 0, 1, 0, 1, 0, 1
    index = announce_next(tiles, t_slot, t_phase, first_tile(work), sequences, work, window, BLOCK_N, BLOCK_M)
    while (index < work.num_tiles) if AHEAD else (tile_field(tiles, t_slot, 0) >= 0):
        if AHEAD:
            # With what was announced ptxas orders the first consumer's loop for the worse: 4 to 6 % at head dim 64 and 4k or
            # 16k causal tokens. H200, 2026-11-30
            n_block, head_k, batch = tile_at(index, work, window)
            span = tile_span(batch, sequences, work)
            begin, end = tile_blocks(n_block, span, work, window, BLOCK_N, BLOCK_M)
        else:
            n_block, head_k, batch, begin, end = announced_tile(tiles, t_slot)
            span = announced_span(tiles, t_slot, work, PACKED)
        t_slot, t_phase = advance(t_slot, t_phase, TILE_STAGES)
        for consumer in gl.static_range(CONSUMERS):
            slot = k_slot * CONSUMERS + consumer
            first = n_block * BLOCK_N + consumer * WARPGROUP_ROWS
            fill(k_ring, slot, k_phase, k_desc, span.start_k, span.seqlen_k, first, batch, head_k, PACKED)
            if WITH_DK:
                fill(v_ring, slot, k_phase, v_desc, span.start_k, span.seqlen_k, first, batch, head_k, PACKED)
        k_slot, k_phase = advance(k_slot, k_phase, K_STAGES)
        if AHEAD:
            index = announce_next(tiles, t_slot, t_phase, draw(work), sequences, work, window, BLOCK_N, BLOCK_M)
        head, m_block = head_k * work.group, first_group_block(begin, end, IN_ORDER)
        for _step in range((end - begin) * work.group):
            first = m_block * BLOCK_M
            lse = load_statistic(softmax_lse, batch, head, span, first, float("-inf"), BLOCK_M)
            if WITH_DK:
                row_deltas = load_statistic(delta, batch, head, span, first, 0.0, BLOCK_M)
            fill(q_ring, q_slot, q_phase, q_desc, span.start_q, span.seqlen_q, first, batch, head, PACKED)
            row_lse.index(q_slot).store(lse_log2(lse))
            store_key(key_words, q_slot, dropout, batch * work.nheads + head)
            mbarrier.arrive(q_ring.full.index(q_slot), count=1)
            q_slot, q_phase = advance(q_slot, q_phase, Q_STAGES)
            fill(dout_ring, d_slot, d_phase, dout_desc, span.start_q, span.seqlen_q, first, batch, head, PACKED)
            if WITH_DK:
                row_delta.index(d_slot).store(row_deltas)
                mbarrier.arrive(dout_ring.full.index(d_slot), count=1)
            d_slot, d_phase = advance(d_slot, d_phase, DOUT_STAGES)
            head, m_block = next_group_block(head, m_block, begin, end, head_k * work.group, work.group, IN_ORDER)
        if not AHEAD:  # the program that is done first gets the longest tile, or the one that others wait for
            index = announce_next(tiles, t_slot, t_phase, draw(work), sequences, work, window, BLOCK_N, BLOCK_M)
    clear_counter(work)


@gluon.jit
def accumulate_dkdv(
    k_ring, v_ring, q_ring, dout_ring, row_lse, row_delta, k_index, q_slot, q_phase, d_slot, d_phase, first_key, begin, end,
    full_begin, full_end, head, batch, span, window, work, score, key_words, dropout,
    BLOCK_M: gl.constexpr, HEAD_DIM_PAD: gl.constexpr, WIDTH: gl.constexpr, Q_STAGES: gl.constexpr, DOUT_STAGES: gl.constexpr,
    WITH_DK: gl.constexpr, WITH_DV: gl.constexpr,
):  # fmt: skip
    """Sums of dS^T Q and P^T dO over the query heads of the group and query blocks [begin, end)."""
    layout: gl.constexpr = accumulator_layout(BLOCK_M)
    lanes: gl.constexpr = gl.SliceLayout(0, layout)
    operand: gl.constexpr = gl.DotOperandLayout(0, accumulator_layout(first_part(WIDTH)), 2)
    PARTS: gl.constexpr = num_parts(WIDTH)
    dtype: gl.constexpr = q_ring.buffers.dtype
    cols = (first_key + gl.arange(0, WARPGROUP_ROWS, layout=gl.SliceLayout(1, layout)))[:, None]
    dk = zero_columns(WIDTH)
    dv = zero_columns(WIDTH)
    slope = load_slope(score, batch, head)
    mbarrier.wait(q_ring.full.index(q_slot), q_phase)
    k_tile = matrix(k_ring, k_index, WARPGROUP_ROWS, HEAD_DIM_PAD)
    qk = inner_products(k_tile, matrix(q_ring, q_slot, BLOCK_M, HEAD_DIM_PAD), BLOCK_M, WIDTH)
    qk = warpgroup_mma_wait(0, deps=(qk,))
    m_block, first_head = first_group_block(begin, end, False), head
    steps = (end - begin) * work.group
    gl.assume(steps > 0)
    for step in range(steps):
        index = k_index + loop_variant(step)
        k_tile = matrix(k_ring, index, WARPGROUP_ROWS, HEAD_DIM_PAD)
        q_tile = matrix(q_ring, q_slot, BLOCK_M, HEAD_DIM_PAD)
        dout_tile = matrix(dout_ring, d_slot, BLOCK_M, HEAD_DIM_PAD)
        mbarrier.wait(dout_ring.full.index(d_slot), d_phase)
        if WITH_DK:
            v_tile = matrix(v_ring, index, WARPGROUP_ROWS, HEAD_DIM_PAD)
            dp = inner_products(v_tile, dout_tile, BLOCK_M, WIDTH)
        rows = (m_block * BLOCK_M + gl.arange(0, BLOCK_M, layout=lanes))[None, :]
        masked = (m_block < full_begin) | (m_block >= full_end)
        lse = row_lse.index(q_slot).load(lanes)[None, :]
        bits = transposed_bits(dropout, key_words, q_slot, m_block * BLOCK_M, first_key, layout, BLOCK_M)
        weights, sensitivity = tile_weights(qk, lse, rows, cols, masked, span, window, score, slope, dropout, bits)
        if WITH_DK:
            dp = warpgroup_mma_wait(0, deps=(dp,))
            delta = row_delta.index(d_slot).load(lanes)[None, :]
            ds = gl.convert_layout(score_gradient(sensitivity, dp, delta, dropout).to(dtype), operand)
            if not WITH_DV:
                mbarrier.arrive(dout_ring.empty.index(d_slot), count=1)
        if WITH_DV:
            p = gl.convert_layout(value_weights(weights, dropout).to(dtype), operand)
            dv = accumulate_columns(p, dout_tile, dv, WIDTH)
        if WITH_DK:
            dk = accumulate_columns(ds, q_tile, dk, WIDTH)
        old_q, old_d = q_slot, d_slot
        q_slot, q_phase = advance(q_slot, q_phase, Q_STAGES)
        d_slot, d_phase = advance(d_slot, d_phase, DOUT_STAGES)
        head, m_block = next_group_block(head, m_block, begin, end, first_head, work.group, False)
        if score.alibi_slopes is not None:
            slope = load_slope(score, batch, gl.minimum(head, work.nheads - 1))
        # behind the last block this multiplies whatever lies there, and nothing reads it
        mbarrier.wait(q_ring.full.index(q_slot), q_phase, pred=step + 1 < steps)
        qk = inner_products(k_tile, matrix(q_ring, q_slot, BLOCK_M, HEAD_DIM_PAD), BLOCK_M, WIDTH)
        if WITH_DV:
            if WITH_DK:
                dv, p = await_product(dv, p, 2 * PARTS)
            else:
                dv, p = await_product(dv, p, PARTS)
            mbarrier.arrive(dout_ring.empty.index(old_d), count=1)
        if WITH_DK:
            dk, qk, ds = await_products(dk, qk, ds)
        else:
            qk = warpgroup_mma_wait(0, deps=(qk,))
        mbarrier.arrive(q_ring.empty.index(old_q), count=1)
    return dk, dv, q_slot, q_phase, d_slot, d_phase


@gluon.jit
def store_gradient(descriptor, buffer, gradient, scale, first_key, span, batch, head_k,
                   HEAD_DIM_PAD: gl.constexpr, WIDTH: gl.constexpr, PACKED: gl.constexpr):  # fmt: skip
    """One consumer's keys of dk or dv; the copy is still running on return."""
    store_columns(buffer.reshape([WARPGROUP_ROWS, HEAD_DIM_PAD]), gradient, scale, WIDTH)
    fence_async_shared()
    coordinates = row_coordinates(span.start_k, span.seqlen_k, first_key, batch, head_k, PACKED)
    start_store(descriptor, coordinates, buffer)


@gluon.jit
def dkdv_partition(
    dk_desc, dv_desc, tiles, k_ring, v_ring, q_ring, dout_ring, row_lse, row_delta, key_words, work, window, score, dropout,
    CONSUMER: gl.constexpr, CONSUMERS: gl.constexpr, BLOCK_M: gl.constexpr, HEAD_DIM_PAD: gl.constexpr, WIDTH: gl.constexpr,
    K_STAGES: gl.constexpr, Q_STAGES: gl.constexpr, DOUT_STAGES: gl.constexpr, WITH_DK: gl.constexpr,
    WITH_DV: gl.constexpr, PACKED: gl.constexpr,
):  # fmt: skip
    """One consumer."""
    BLOCK_N: gl.constexpr = CONSUMERS * WARPGROUP_ROWS
    t_slot, t_phase, k_slot, k_phase, q_slot, q_phase, d_slot, d_phase = 0, 0, 0, 0, 0, 0, 0, 0
    mbarrier.wait(tiles.full.index(t_slot), t_phase)
    while tile_field(tiles, t_slot, 0) >= 0:
        first_key = tile_field(tiles, t_slot, 0) * BLOCK_N + CONSUMER * WARPGROUP_ROWS
        head_k, batch = tile_field(tiles, t_slot, 1), tile_field(tiles, t_slot, 2)
        begin, end = tile_field(tiles, t_slot, 3), tile_field(tiles, t_slot, 4)
        span = announced_span(tiles, t_slot, work, PACKED)
        mbarrier.arrive(tiles.empty.index(t_slot), count=1)
        t_slot, t_phase = advance(t_slot, t_phase, TILE_STAGES)
        full_begin, full_end = full_query_blocks(first_key, span, window, BLOCK_M)
        k_index = k_slot * CONSUMERS + CONSUMER
        mbarrier.wait(k_ring.full.index(k_index), k_phase)
        if WITH_DK:
            mbarrier.wait(v_ring.full.index(k_index), k_phase)
        dk, dv, q_slot, q_phase, d_slot, d_phase = accumulate_dkdv(
            k_ring, v_ring, q_ring, dout_ring, row_lse, row_delta, k_index, q_slot, q_phase, d_slot, d_phase, first_key,
            begin, end, full_begin, full_end, head_k * work.group, batch, span, window, work, score, key_words, dropout,
            BLOCK_M, HEAD_DIM_PAD, WIDTH, Q_STAGES, DOUT_STAGES, WITH_DK, WITH_DV,
        )  # fmt: skip
        if WITH_DV:
            store_gradient(dv_desc, v_ring.buffers.index(k_index), dv, kept_scale(dropout), first_key, span, batch, head_k,
                           HEAD_DIM_PAD, WIDTH, PACKED)  # fmt: skip
        if WITH_DK:
            store_gradient(dk_desc, k_ring.buffers.index(k_index), dk, gradient_scale(score), first_key, span, batch, head_k,
                           HEAD_DIM_PAD, WIDTH, PACKED)  # fmt: skip
        tma.store_wait(0)
        mbarrier.arrive(k_ring.empty.index(k_index), count=1)
        if WITH_DK:
            mbarrier.arrive(v_ring.empty.index(k_index), count=1)
        k_slot, k_phase = advance(k_slot, k_phase, K_STAGES)
        mbarrier.wait(tiles.full.index(t_slot), t_phase)


SIZES = [
    "num_tiles", "num_blocks", "heads_together", "seqlen_q", "seqlen_k", "total_q", "total_k", "window_left", "window_right",
    "nheads", "group",
]  # fmt: skip


@gluon.jit(do_not_specialize=SIZES)
def attn_bwd_dkdv_kernel(
    q_desc, k_desc, v_desc, dout_desc, dk_desc, dv_desc, softmax_lse, delta, sequences, score, dropout, counter,
    num_tiles, num_blocks, heads_together, seqlen_q, seqlen_k, total_q, total_k, window_left, window_right, nheads, group,
    HEAD_DIM_PAD: gl.constexpr, WIDTH: gl.constexpr, BLOCK_M: gl.constexpr, CONSUMERS: gl.constexpr, K_STAGES: gl.constexpr,
    Q_STAGES: gl.constexpr, DOUT_STAGES: gl.constexpr, REGISTERS: gl.constexpr,
):  # fmt: skip
    PACKED: gl.constexpr = sequences.cu_seqlens_q is not None
    WITH_DK: gl.constexpr = dk_desc is not None
    WITH_DV: gl.constexpr = dv_desc is not None
    work = Work(counter, num_tiles, num_blocks, heads_together, nheads, group, seqlen_q, seqlen_k, total_q, total_k, 1)
    window = Window(window_left, window_right)
    k_ring = allocate_ring(k_desc, K_STAGES * CONSUMERS, 1)
    q_ring = allocate_ring(q_desc, Q_STAGES, CONSUMERS, 2)
    row_lse = allocate_statistics(Q_STAGES, BLOCK_M)
    if WITH_DK:
        v_ring = allocate_ring(v_desc, K_STAGES * CONSUMERS, 1)
        dout_ring = allocate_ring(dout_desc, DOUT_STAGES, CONSUMERS, 2)
        row_delta = allocate_statistics(DOUT_STAGES, BLOCK_M)
    else:
        v_ring = k_ring
        dout_ring = allocate_ring(dout_desc, DOUT_STAGES, CONSUMERS)
        row_delta = row_lse
    key_words = allocate_key_words(dropout, Q_STAGES, row_lse)
    tiles = allocate_tiles(CONSUMERS)
    gl.warp_specialize([
        (dkdv_partition, (dk_desc, dv_desc, tiles, k_ring, v_ring, q_ring, dout_ring, row_lse, row_delta, key_words, work,
                          window, score, dropout, 0, CONSUMERS, BLOCK_M, HEAD_DIM_PAD, WIDTH, K_STAGES, Q_STAGES,
                          DOUT_STAGES, WITH_DK, WITH_DV, PACKED)),
        (dkdv_partition, (dk_desc, dv_desc, tiles, k_ring, v_ring, q_ring, dout_ring, row_lse, row_delta, key_words, work,
                          window, score, dropout, 1, CONSUMERS, BLOCK_M, HEAD_DIM_PAD, WIDTH, K_STAGES, Q_STAGES,
                          DOUT_STAGES, WITH_DK, WITH_DV, PACKED)),
        (load_partition, (q_desc, dout_desc, k_desc, v_desc, softmax_lse, delta, tiles, k_ring, v_ring, q_ring, dout_ring,
                          row_lse, row_delta, key_words, sequences, work, window, dropout, CONSUMERS, BLOCK_M, K_STAGES,
                          Q_STAGES, DOUT_STAGES, WITH_DK, PACKED)),
    ], [4, 1], [REGISTERS, 24])  # fmt: skip
