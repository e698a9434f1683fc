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

from typing import Any

from flash_attn.kernels.algebra.arguments import Window
from flash_attn.kernels.algebra.dropout import kept_scale
from flash_attn.kernels.algebra.locate import row_statistic
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
    split_columns,
    store_columns,
    zero_columns,
)
from flash_attn.kernels.hopper.pipeline import (
    WARPGROUP_ROWS,
    Place,
    accumulator_layout,
    advance,
    aggregate,
    allocate_ring,
    await_full,
    fence_async_shared,
    fill_keys,
    fill_queries,
    gl,
    gluon,
    loop_variant,
    matrix,
    mbarrier,
    release,
    store_tile,
    tma,
    warpgroup_mma_wait,
)
from flash_attn.kernels.hopper.schedule import (
    SIZES,
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


@aggregate
class Program:
    """What the partitions of a program share; what is written in capitals is known when it is compiled."""

    dk_desc: Any
    dv_desc: Any
    softmax_lse: Any
    delta: Any
    tiles: Any
    k_ring: Any
    v_ring: Any  # k_ring in a launch without dk
    q_ring: Any
    dout_ring: Any
    row_lse: Any  # of the blocks in q_ring; row_delta of those in dout_ring
    row_delta: Any  # None without dk
    key_words: Any  # None without dropout
    sequences: Any
    work: Any
    window: Any
    score: Any
    dropout: Any
    HEAD_DIM_PAD: Any
    WIDTH: Any
    BLOCK_M: Any
    CONSUMERS: Any
    K_STAGES: Any
    Q_STAGES: Any
    DOUT_STAGES: Any
    WITH_DK: Any
    WITH_DV: Any
    PACKED: Any


@gluon.jit
def load_partition(prog):
    """Draws tiles and keeps the rings full."""
    IN_ORDER: gl.constexpr = prog.work.in_order is not None
    AHEAD: gl.constexpr = prog.work.ahead is not None
    BLOCK_N: gl.constexpr = prog.CONSUMERS * WARPGROUP_ROWS
    t_place, k_place, q_place, d_place = Place(0, 1), Place(0, 1), Place(0, 1), Place(0, 1)
    index = announce_next(prog, t_place, first_tile(prog.work), BLOCK_N, prog.BLOCK_M)
    while (index < prog.work.num_tiles) if AHEAD else (tile_field(prog.tiles, t_place.index, 0) >= 0):
        if AHEAD:
            # With what was announced ptxas orders the first consumer's loop for the worse: 4 to 6 % at head dim 64 and 4k or
            # 16k causal tokens. H200, 2026-11-30
            n_block, head_k, batch = tile_at(index, prog.work, prog.window)
            span = tile_span(batch, prog.sequences, prog.work, prog.PACKED)
            begin, end = tile_blocks(n_block, span, prog.work, prog.window, BLOCK_N, prog.BLOCK_M)
        else:
            n_block, head_k, batch, begin, end = announced_tile(prog, t_place.index)
            span = announced_span(prog, t_place.index)
        t_place = advance(t_place, TILE_STAGES)
        for consumer in gl.static_range(prog.CONSUMERS):
            place = Place(k_place.index * prog.CONSUMERS + consumer, k_place.phase)
            first = n_block * BLOCK_N + consumer * WARPGROUP_ROWS
            fill_keys(prog, prog.k_ring, place, span, first, batch, head_k)
            if prog.WITH_DK:
                fill_keys(prog, prog.v_ring, place, span, first, batch, head_k)
        k_place = advance(k_place, prog.K_STAGES)
        if AHEAD:
            index = announce_next(prog, t_place, draw(prog.work), BLOCK_N, prog.BLOCK_M)
        first_head = head_k * prog.work.group
        head, m_block = first_head, first_group_block(begin, end, IN_ORDER)
        for _step in range((end - begin) * prog.work.group):
            first = m_block * prog.BLOCK_M
            lse = load_statistic(prog.softmax_lse, batch, head, span, first, float("-inf"), prog.BLOCK_M)
            if prog.WITH_DK:
                row_deltas = load_statistic(prog.delta, batch, head, span, first, 0.0, prog.BLOCK_M)
            fill_queries(prog, prog.q_ring, q_place, span, first, batch, head)
            prog.row_lse.index(q_place.index).store(lse_log2(lse))
            store_key(prog, q_place.index, batch * prog.work.nheads + head)
            mbarrier.arrive(prog.q_ring.full.index(q_place.index), count=1)
            q_place = advance(q_place, prog.Q_STAGES)
            fill_queries(prog, prog.dout_ring, d_place, span, first, batch, head)
            if prog.WITH_DK:
                prog.row_delta.index(d_place.index).store(row_deltas)
                mbarrier.arrive(prog.dout_ring.full.index(d_place.index), count=1)
            d_place = advance(d_place, prog.DOUT_STAGES)
            head, m_block = next_group_block(head, m_block, begin, end, first_head, prog.work.group, IN_ORDER)
        if not AHEAD:  # the program that is done first gets the longest tile, or the one that others wait for
            index = announce_next(prog, t_place, draw(prog.work), BLOCK_N, prog.BLOCK_M)
    clear_counter(prog.work)


@gluon.jit
def product_kq(prog, k_tile, slot):
    """Issue S^T = K Q^T, (64, BLOCK_M)."""
    q_tile = matrix(prog.q_ring, slot, prog.BLOCK_M, prog.HEAD_DIM_PAD)
    return inner_products(split_columns(k_tile, prog.WIDTH), split_columns(q_tile, prog.WIDTH), prog.BLOCK_M)


@gluon.jit
def accumulate_dkdv(prog, k_index, q_place, d_place, first_key, begin, end, full_begin, full_end, head, batch, span):
    """Sums of dS^T Q and P^T dO over the query heads of the group and query blocks [begin, end)."""
    layout: gl.constexpr = accumulator_layout(prog.BLOCK_M)
    lanes: gl.constexpr = gl.SliceLayout(0, layout)
    operand: gl.constexpr = gl.DotOperandLayout(0, accumulator_layout(first_part(prog.WIDTH)), 2)
    PARTS: gl.constexpr = num_parts(prog.WIDTH)
    dtype: gl.constexpr = prog.q_ring.buffers.dtype
    cols = (first_key + gl.arange(0, WARPGROUP_ROWS, layout=gl.SliceLayout(1, layout)))[:, None]
    dk = zero_columns(prog.WIDTH)
    dv = zero_columns(prog.WIDTH)
    slope = load_slope(prog.score, batch, head)
    await_full(prog.q_ring, q_place)
    k_tile = matrix(prog.k_ring, k_index, WARPGROUP_ROWS, prog.HEAD_DIM_PAD)
    qk = product_kq(prog, k_tile, q_place.index)
    qk = warpgroup_mma_wait(0, deps=(qk,))
    m_block, first_head = first_group_block(begin, end, False), head
    steps = (end - begin) * prog.work.group
    gl.assume(steps > 0)
    for step in range(steps):
        index = k_index + loop_variant(step)
        k_tile = matrix(prog.k_ring, index, WARPGROUP_ROWS, prog.HEAD_DIM_PAD)
        q_tile = matrix(prog.q_ring, q_place.index, prog.BLOCK_M, prog.HEAD_DIM_PAD)
        dout_tile = matrix(prog.dout_ring, d_place.index, prog.BLOCK_M, prog.HEAD_DIM_PAD)
        await_full(prog.dout_ring, d_place)
        if prog.WITH_DK:
            v_tile = matrix(prog.v_ring, index, WARPGROUP_ROWS, prog.HEAD_DIM_PAD)
            dp = inner_products(split_columns(v_tile, prog.WIDTH), split_columns(dout_tile, prog.WIDTH), prog.BLOCK_M)
        rows = (m_block * prog.BLOCK_M + gl.arange(0, prog.BLOCK_M, layout=lanes))[None, :]
        masked = (m_block < full_begin) | (m_block >= full_end)
        lse = prog.row_lse.index(q_place.index).load(lanes)[None, :]
        bits = transposed_bits(prog, q_place.index, m_block * prog.BLOCK_M, first_key, layout)
        weights, sensitivity = tile_weights(prog, qk, lse, rows, cols, masked, span, slope, bits)
        if prog.WITH_DK:
            dp = warpgroup_mma_wait(0, deps=(dp,))
            delta = prog.row_delta.index(d_place.index).load(lanes)[None, :]
            ds = gl.convert_layout(score_gradient(sensitivity, dp, delta, prog.dropout).to(dtype), operand)
            if not prog.WITH_DV:
                release(prog.dout_ring, d_place)
        if prog.WITH_DV:
            p = gl.convert_layout(value_weights(weights, prog.dropout).to(dtype), operand)
            dv = accumulate_columns(p, dout_tile, dv, prog.WIDTH)
        if prog.WITH_DK:
            dk = accumulate_columns(ds, q_tile, dk, prog.WIDTH)
        old_q, old_d = q_place, d_place
        q_place = advance(q_place, prog.Q_STAGES)
        d_place = advance(d_place, prog.DOUT_STAGES)
        head, m_block = next_group_block(head, m_block, begin, end, first_head, prog.work.group, False)
        if prog.score.alibi_slopes is not None:
            slope = load_slope(prog.score, batch, gl.minimum(head, prog.work.nheads - 1))
        # behind the last block this multiplies whatever lies there, and nothing reads it
        await_full(prog.q_ring, q_place, step + 1 < steps)
        qk = product_kq(prog, k_tile, q_place.index)
        if prog.WITH_DV:
            if prog.WITH_DK:
                dv, p = await_product(dv, p, 2 * PARTS)
            else:
                dv, p = await_product(dv, p, PARTS)
            release(prog.dout_ring, old_d)
        if prog.WITH_DK:
            dk, qk, ds = await_products(dk, qk, ds)
        else:
            qk = warpgroup_mma_wait(0, deps=(qk,))
        release(prog.q_ring, old_q)
    return dk, dv, q_place, d_place


@gluon.jit
def store_gradient(prog, descriptor, buffer, gradient, scale, first_key, span, batch, head_k):
    """One consumer's keys of dk or dv; the copy is still running on return."""
    store_columns(buffer.reshape([WARPGROUP_ROWS, prog.HEAD_DIM_PAD]), gradient, scale, prog.WIDTH)
    fence_async_shared()
    store_tile(prog, descriptor, buffer, span.start_k, span.seqlen_k, first_key, batch, head_k)


@gluon.jit
def dkdv_partition(prog, CONSUMER: gl.constexpr):
    """One consumer."""
    BLOCK_N: gl.constexpr = prog.CONSUMERS * WARPGROUP_ROWS
    t_place, k_place, q_place, d_place = Place(0, 0), Place(0, 0), Place(0, 0), Place(0, 0)
    await_full(prog.tiles, t_place)
    while tile_field(prog.tiles, t_place.index, 0) >= 0:
        n_block, head_k, batch, begin, end = announced_tile(prog, t_place.index)
        first_key = n_block * BLOCK_N + CONSUMER * WARPGROUP_ROWS
        span = announced_span(prog, t_place.index)
        release(prog.tiles, t_place)
        t_place = advance(t_place, TILE_STAGES)
        full_begin, full_end = full_query_blocks(first_key, span, prog.window, prog.BLOCK_M)
        k_index = k_place.index * prog.CONSUMERS + CONSUMER
        own_place = Place(k_index, k_place.phase)
        await_full(prog.k_ring, own_place)
        if prog.WITH_DK:
            await_full(prog.v_ring, own_place)
        dk, dv, q_place, d_place = accumulate_dkdv(
            prog, k_index, q_place, d_place, first_key, begin, end, full_begin, full_end, head_k * prog.work.group, batch, span
        )  # fmt: skip
        if prog.WITH_DV:
            buffer, scale = prog.v_ring.buffers.index(k_index), kept_scale(prog.dropout)
            store_gradient(prog, prog.dv_desc, buffer, dv, scale, first_key, span, batch, head_k)
        if prog.WITH_DK:
            buffer, scale = prog.k_ring.buffers.index(k_index), gradient_scale(prog.score)
            store_gradient(prog, prog.dk_desc, buffer, dk, scale, first_key, span, batch, head_k)
        tma.store_wait(0)
        release(prog.k_ring, own_place)
        if prog.WITH_DK:
            release(prog.v_ring, own_place)
        k_place = advance(k_place, prog.K_STAGES)
        await_full(prog.tiles, t_place)


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
    k_ring = allocate_ring(k_desc, HEAD_DIM_PAD, K_STAGES * CONSUMERS, 1)
    q_ring = allocate_ring(q_desc, HEAD_DIM_PAD, Q_STAGES, CONSUMERS, 2)
    row_lse = allocate_statistics(Q_STAGES, BLOCK_M)
    if WITH_DK:
        v_ring = allocate_ring(v_desc, HEAD_DIM_PAD, K_STAGES * CONSUMERS, 1)
        dout_ring = allocate_ring(dout_desc, HEAD_DIM_PAD, DOUT_STAGES, CONSUMERS, 2)
        row_delta = allocate_statistics(DOUT_STAGES, BLOCK_M)
    else:
        v_ring, row_delta = k_ring, None  # dv then leaves through the slots of k
        dout_ring = allocate_ring(dout_desc, HEAD_DIM_PAD, DOUT_STAGES, CONSUMERS)
    key_words = None
    if dropout.rng_state is not None:
        key_words = allocate_key_words(Q_STAGES)
    tiles = allocate_tiles(CONSUMERS)
    softmax_lse = row_statistic(softmax_lse, sequences, nheads, total_q)
    delta = row_statistic(delta, sequences, nheads, total_q)
    prog = Program(
        dk_desc, dv_desc, softmax_lse, delta, tiles, k_ring, v_ring, q_ring, dout_ring, row_lse, row_delta, key_words,
        sequences, work, window, score, dropout,
        HEAD_DIM_PAD, WIDTH, BLOCK_M, CONSUMERS, K_STAGES, Q_STAGES, DOUT_STAGES, WITH_DK, WITH_DV, PACKED,
    )  # fmt: skip
    gl.warp_specialize([
        (dkdv_partition, (prog, 0)),
        (dkdv_partition, (prog, 1)),
        (load_partition, (prog,)),
    ], [4, 1], [REGISTERS, 24])  # fmt: skip
