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

from typing import Any

from flash_attn.kernels.algebra.arguments import Window
from flash_attn.kernels.algebra.dropout import load_key, tile_bits
from flash_attn.kernels.algebra.locate import row_base, row_statistic
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
    along_rows,
    await_full,
    fence_async_shared,
    fill_keys,
    fill_queries,
    gl,
    gluon,
    loop_variant,
    matrix,
    num_copies,
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
    full_key_blocks,
    tile_field,
)


@aggregate
class Program:
    """What the partitions of a program share; what is written in capitals is known when it is compiled."""

    dq_desc: Any
    out: Any
    softmax_lse: Any
    dlse: Any
    delta: Any
    tiles: Any
    q_ring: Any
    dout_ring: Any
    k_ring: Any
    v_ring: Any
    sequences: Any
    work: Any
    window: Any
    score: Any
    dropout: Any
    HEAD_DIM: Any
    HEAD_DIM_PAD: Any
    WIDTH: Any
    BLOCK_N: Any
    CONSUMERS: Any
    K_STAGES: Any
    V_STAGES: Any
    Q_STAGES: Any
    DRAW_AHEAD: Any
    PACKED: Any


@gluon.jit
def load_partition(prog):
    """Draws tiles and keeps the rings full."""
    BLOCK_M: gl.constexpr = prog.CONSUMERS * WARPGROUP_ROWS
    t_place, q_place, k_place, v_place = Place(0, 1), Place(0, 1), Place(0, 1), Place(0, 1)
    announce_next(prog, t_place, first_tile(prog.work), BLOCK_M, prog.BLOCK_N)
    while tile_field(prog.tiles, t_place.index, 0) >= 0:
        m_block, head, batch, begin, end = announced_tile(prog, t_place.index)
        span = announced_span(prog, t_place.index)
        head_k = head // prog.work.group
        for n_block in range(begin, end):
            first = n_block * prog.BLOCK_N
            fill_keys(prog, prog.k_ring, k_place, span, first, batch, head_k)
            k_place = advance(k_place, prog.K_STAGES)
            fill_keys(prog, prog.v_ring, v_place, span, first, batch, head_k)
            v_place = advance(v_place, prog.V_STAGES)
            if n_block == begin:
                for consumer in gl.static_range(prog.CONSUMERS):
                    place = Place(q_place.index * prog.CONSUMERS + consumer, q_place.phase)
                    first = m_block * BLOCK_M + consumer * WARPGROUP_ROWS
                    fill_queries(prog, prog.dout_ring, place, span, first, batch, head)
                    fill_queries(prog, prog.q_ring, place, span, first, batch, head)
                q_place = advance(q_place, prog.Q_STAGES)
            if n_block == gl.maximum(end - 1 - prog.DRAW_AHEAD, begin):
                t_place = advance(t_place, TILE_STAGES)
                announce_next(prog, t_place, draw(prog.work), BLOCK_M, prog.BLOCK_N)
    clear_counter(prog.work)


@gluon.jit
def row_delta_of(prog, out_rows, dout_tile, layout: gl.constexpr):
    """rowsum(dout * out), one number a row."""
    dout_rows = dout_tile.load(out_rows.type.layout)
    if num_copies(prog.dout_ring.descriptor, prog.HEAD_DIM_PAD) > num_copies(prog.dout_ring.descriptor, prog.WIDTH):
        dims = gl.arange(0, prog.HEAD_DIM_PAD, layout=gl.SliceLayout(0, out_rows.type.layout))
        dout_rows = gl.where((dims < prog.WIDTH)[None, :], dout_rows, 0.0)  # the last columns hold whatever lay there
    return gl.convert_layout(gl.sum(out_rows.to(gl.float32) * dout_rows.to(gl.float32), 1), layout)


@gluon.jit
def key_products(prog, left, ring, slot):
    """Issue left @ right^T, (64, BLOCK_N), with a block of keys or values on the right."""
    right = matrix(ring, slot, prog.BLOCK_N, prog.HEAD_DIM_PAD)
    return inner_products(split_columns(left, prog.WIDTH), split_columns(right, prog.WIDTH), prog.BLOCK_N)


@gluon.jit
def accumulate_dq(
    prog, q_index, k_place, v_place, row_lse, row_delta, rows, first_row, begin, end, full_begin, full_end, span, slope, key
):  # fmt: skip
    """Sum of dS K over key blocks [begin, end)."""
    layout: gl.constexpr = accumulator_layout(prog.BLOCK_N)
    operand: gl.constexpr = gl.DotOperandLayout(0, accumulator_layout(first_part(prog.WIDTH)), 2)
    dtype: gl.constexpr = prog.q_ring.buffers.dtype
    lanes = gl.arange(0, prog.BLOCK_N, layout=gl.SliceLayout(0, layout))
    row_lanes = gl.arange(0, WARPGROUP_ROWS, layout=gl.SliceLayout(1, layout))[:, None]
    dq = zero_columns(prog.WIDTH)
    await_full(prog.k_ring, k_place)
    q_tile = matrix(prog.q_ring, q_index, WARPGROUP_ROWS, prog.HEAD_DIM_PAD)
    qk = key_products(prog, q_tile, prog.k_ring, k_place.index)
    qk = warpgroup_mma_wait(0, deps=(qk,))
    gl.assume(end > begin)
    for n_block in range(begin, end):
        index = q_index + loop_variant(n_block)
        q_tile = matrix(prog.q_ring, index, WARPGROUP_ROWS, prog.HEAD_DIM_PAD)
        dout_tile = matrix(prog.dout_ring, index, WARPGROUP_ROWS, prog.HEAD_DIM_PAD)
        await_full(prog.v_ring, v_place)
        dp = key_products(prog, dout_tile, prog.v_ring, v_place.index)
        cols = (n_block * prog.BLOCK_N + lanes)[None, :]
        masked = (n_block < full_begin) | (n_block >= full_end)
        bits = tile_bits(prog.dropout, key, first_row, row_lanes, n_block * prog.BLOCK_N, lanes[None, :])
        lse = along_rows(row_lse, layout)
        _weights, sensitivity = tile_weights(prog, qk, lse, rows[:, None], cols, masked, span, slope, bits)
        dp = warpgroup_mma_wait(0, deps=(dp,))
        release(prog.v_ring, v_place)
        v_place = advance(v_place, prog.V_STAGES)
        ds = score_gradient(sensitivity, dp, along_rows(row_delta, layout), prog.dropout).to(dtype)
        ds = gl.convert_layout(ds, operand)
        dq = accumulate_columns(ds, matrix(prog.k_ring, k_place.index, prog.BLOCK_N, prog.HEAD_DIM_PAD), dq, prog.WIDTH)
        old_place = k_place
        k_place = advance(k_place, prog.K_STAGES)
        # behind the last block this multiplies whatever lies there, and nothing reads it
        await_full(prog.k_ring, k_place, n_block + 1 < end)
        qk = key_products(prog, q_tile, prog.k_ring, k_place.index)
        dq, qk, ds = await_products(dq, qk, ds)
        release(prog.k_ring, old_place)
    return dq, k_place, v_place


@gluon.jit
def dq_partition(prog, CONSUMER: gl.constexpr):
    """One consumer."""
    BLOCK_M: gl.constexpr = prog.CONSUMERS * WARPGROUP_ROWS
    row_layout: gl.constexpr = gl.SliceLayout(1, accumulator_layout(prog.BLOCK_N))
    t_place, q_place, k_place, v_place = Place(0, 0), Place(0, 0), Place(0, 0), Place(0, 0)
    await_full(prog.tiles, t_place)
    while tile_field(prog.tiles, t_place.index, 0) >= 0:
        m_block, head, batch, begin, end = announced_tile(prog, t_place.index)
        first_row = m_block * BLOCK_M + CONSUMER * WARPGROUP_ROWS
        span = announced_span(prog, t_place.index)
        release(prog.tiles, t_place)
        t_place = advance(t_place, TILE_STAGES)
        full_begin, full_end = full_key_blocks(first_row, span, prog.window, prog.BLOCK_N)
        slope = load_slope(prog.score, batch, head)
        key = load_key(prog.dropout, batch * prog.work.nheads + head)
        rows = first_row + gl.arange(0, WARPGROUP_ROWS, layout=row_layout)
        out_index = gl.convert_layout(rows, gl.SliceLayout(1, row_major_layout(prog.HEAD_DIM_PAD)))
        out_rows = load_rows(prog.out, span, batch, head, out_index, prog.HEAD_DIM, prog.HEAD_DIM_PAD)
        row_lse = lse_log2(load_rows_statistic(prog.softmax_lse, span, batch, head, rows, float("-inf")))
        q_index = q_place.index * prog.CONSUMERS + CONSUMER
        own_place = Place(q_index, q_place.phase)
        await_full(prog.dout_ring, own_place)
        dout_tile = matrix(prog.dout_ring, q_index, WARPGROUP_ROWS, prog.HEAD_DIM_PAD)
        row_delta = row_delta_of(prog, out_rows, dout_tile, row_layout)
        if prog.dlse is not None:
            row_delta = softmax_delta(row_delta, load_rows_statistic(prog.dlse, span, batch, head, rows, 0.0), row_lse)
        gl.store(row_base(prog.delta, batch, head, span.start_q) + rows, row_delta, mask=rows < span.seqlen_q)
        await_full(prog.q_ring, own_place)
        dq, k_place, v_place = accumulate_dq(
            prog, q_index, k_place, v_place, row_lse, row_delta, rows, first_row, begin, end, full_begin, full_end, span,
            slope, key,
        )  # fmt: skip
        release(prog.dout_ring, own_place)
        dq_tile = matrix(prog.q_ring, q_index, WARPGROUP_ROWS, prog.HEAD_DIM_PAD)
        store_columns(dq_tile, dq, gradient_scale(prog.score), prog.WIDTH)
        fence_async_shared()
        dq_buffer = prog.q_ring.buffers.index(q_index)
        store_tile(prog, prog.dq_desc, dq_buffer, span.start_q, span.seqlen_q, first_row, batch, head)
        tma.store_wait(0)
        release(prog.q_ring, own_place)
        q_place = advance(q_place, prog.Q_STAGES)
        await_full(prog.tiles, t_place)


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
    q_ring = allocate_ring(q_desc, HEAD_DIM_PAD, Q_STAGES * CONSUMERS, 1)
    dout_ring = allocate_ring(dout_desc, HEAD_DIM_PAD, Q_STAGES * CONSUMERS, 1)
    k_ring = allocate_ring(k_desc, HEAD_DIM_PAD, K_STAGES, CONSUMERS)
    v_ring = allocate_ring(v_desc, HEAD_DIM_PAD, V_STAGES, CONSUMERS)
    tiles = allocate_tiles(CONSUMERS)
    softmax_lse = row_statistic(softmax_lse, sequences, nheads, total_q)
    delta = row_statistic(delta, sequences, nheads, total_q)
    dlse = row_statistic(dlse, sequences, nheads, total_q)
    prog = Program(
        dq_desc, out, softmax_lse, dlse, delta, tiles, q_ring, dout_ring, k_ring, v_ring, sequences, work, window, score,
        dropout,
        HEAD_DIM, HEAD_DIM_PAD, WIDTH, BLOCK_N, CONSUMERS, K_STAGES, V_STAGES, Q_STAGES, DRAW_AHEAD, PACKED,
    )  # fmt: skip
    gl.warp_specialize([
        (dq_partition, (prog, 0)),
        (dq_partition, (prog, 1)),
        (load_partition, (prog,)),
    ], [4, 1], [REGISTERS, 24])  # fmt: skip
