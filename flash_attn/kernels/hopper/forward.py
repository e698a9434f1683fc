"""Forward for Hopper: out = softmax(score(q k^T)) v and softmax_lse, persistent and warp-specialised.

One warp loads, two to four warpgroups ("consumers") of 64 query rows each attend. A program takes tiles of
CONSUMERS * 64 query rows of one head from a counter in global memory until there are none.

    load       copies Q(i), then K(n) and V(n+1) from the last block to the first, into the next tile without a break;
               DRAW_AHEAD blocks before the end of a tile draws the next one and announces it
    consumer   S = Q K(n)^T   is issued, then   O += P(n+1) V(n+1);   softmax of S runs while that product does
               its turn on the tensor cores alternates with its neighbour's when PING_PONG; without, it skips small
               blocks that none of its rows sees

    ring       filled by   read by       a slot is free when
    tiles      load        consumers     every consumer has read the number
    q          load        one consumer  that consumer's last Q K^T is complete; without OVERLAP, out has left
    k, v       load        consumers     every consumer's product with it is complete

With OVERLAP (head dims up to 128) the last product with V of a tile runs beside the first product with K of the next one,
so that short sequences do not drain the tensor cores; q then has two slots and out a buffer of its own. At head dim 256
shared memory has room for neither: a tile is finished first, and out leaves through Q's buffer. Products and accumulators are
WIDTH columns wide, in two parts where that is no power of two; tiles in shared memory are padded to HEAD_DIM_PAD. With
Q_IN_REGISTERS consumers read their Q once a tile and Q K^T takes only K from shared memory, at 64 bytes a cycle
in place of 96 (128 keys a step) or of all 128 that there are (64).

Two things here are written for ptxas (12.8): the K/V loop is one loop with a uniform branch around the mask, because it
miscompiles two sibling loops that share a tensor-core descriptor; and the spin on the next K's barrier stands between a
softmax and the wait for P V, because it would otherwise move that wait above the exponentials.
"""

from typing import Any

from flash_attn.kernels.algebra.arguments import Window
from flash_attn.kernels.algebra.dropout import load_key
from flash_attn.kernels.algebra.score import load_slope, unit_log2
from flash_attn.kernels.algebra.softmax import lowest_max
from flash_attn.kernels.hopper.columns import (
    accumulate_columns,
    await_columns,
    first_part,
    inner_products,
    load_columns,
    num_parts,
    scale_columns,
    split_columns,
    zero_columns,
)
from flash_attn.kernels.hopper.forward_load import load_partition
from flash_attn.kernels.hopper.forward_skip import skip_keys, skip_values, unseen_blocks
from flash_attn.kernels.hopper.forward_tiles import drop_block, finish, score_block, softmax_step, store_results
from flash_attn.kernels.hopper.pipeline import (
    FIRST_TURN,
    WARPGROUP_ROWS,
    Place,
    accumulator_layout,
    advance,
    aggregate,
    allocate_buffers,
    allocate_ring,
    await_full,
    await_turn,
    give_turn,
    gl,
    gluon,
    is_ragged,
    matrix,
    mbarrier,
    partial_layout,
    release,
    tma,
    warpgroup_mma_wait,
)
from flash_attn.kernels.hopper.schedule import (
    SIZES,
    TILE_STAGES,
    Work,
    allocate_tiles,
    announced_span,
    announced_tile,
    full_key_blocks,
    tile_field,
)

TURN_THREADS = gl.constexpr(256)


@aggregate
class Program:
    """What the partitions of a program share; what is written in capitals is known when it is compiled."""

    o_desc: Any
    softmax_lse: Any
    tiles: Any
    q_ring: Any
    k_ring: Any
    v_ring: Any
    o_buffers: Any  # one of each consumer; without OVERLAP those of q_ring
    sequences: Any
    work: Any
    pages: Any
    window: Any
    score: Any
    dropout: Any
    HEAD_DIM_PAD: Any
    WIDTH: Any
    BLOCK_N: Any
    CONSUMERS: Any
    STAGES: Any
    OVERLAP: Any
    PING_PONG: Any
    DRAW_AHEAD: Any
    Q_IN_REGISTERS: Any
    PACKED: Any


@gluon.jit
def product_qk(prog, q_tile, slot):
    """Issue S = Q K^T, (64, BLOCK_N)."""
    k_tile = matrix(prog.k_ring, slot, prog.BLOCK_N, prog.HEAD_DIM_PAD)
    return inner_products(q_tile, split_columns(k_tile, prog.WIDTH), prog.BLOCK_N)


@gluon.jit
def own_queries(prog, place, present):
    """Wait for a consumer's Q of a tile that is present: (64, WIDTH), in parts, in shared memory or read into registers."""
    q_tile = split_columns(matrix(prog.q_ring, place.index, WARPGROUP_ROWS, prog.HEAD_DIM_PAD), prog.WIDTH)
    await_full(prog.q_ring, place, present)
    if prog.Q_IN_REGISTERS:
        q_tile = load_columns(q_tile, gl.DotOperandLayout(0, accumulator_layout(prog.BLOCK_N), 2))
    return q_tile


@gluon.jit
def product_pv(prog, weights, slot, acc):
    """Issue O += P V."""
    v_tile = matrix(prog.v_ring, slot, prog.BLOCK_N, prog.HEAD_DIM_PAD)
    return accumulate_columns(weights, v_tile, acc, prog.WIDTH)


@gluon.jit
def tile_follows(tiles, place, last):
    """Whether another tile follows, which only the last step of a tile waits to learn."""
    await_full(tiles, place, last)
    return last & (tile_field(tiles, place.index, 0) >= 0)


@gluon.jit
def attend_blocks(
    prog, q_tile, weights, acc, row_max, row_sums, k_place, v_place, first_row, begin, last, full_begin, full_end, follows,
    unread, next_place, span, slope, unit, key, CONSUMER: gl.constexpr,
):  # fmt: skip
    """Key blocks last - 1 down to begin; the product of the last weights with their values stays to be done."""
    NEXT: gl.constexpr = (CONSUMER + 1) % prog.CONSUMERS
    operand: gl.constexpr = weights.type.layout
    for step in range(0, last - begin):
        n_block = last - 1 - step
        if prog.PING_PONG:
            await_turn(FIRST_TURN + CONSUMER, TURN_THREADS)
        tile = product_qk(prog, q_tile, k_place.index)
        await_full(prog.v_ring, v_place)
        acc = product_pv(prog, weights, v_place.index, acc)
        if prog.PING_PONG:
            give_turn(FIRST_TURN + NEXT, TURN_THREADS)
        if prog.OVERLAP:
            follows = tile_follows(prog.tiles, next_place, n_block == begin)
        tile = warpgroup_mma_wait(num_parts(prog.WIDTH), deps=(tile,))
        release(prog.k_ring, k_place)
        k_place = advance(k_place, prog.STAGES)
        tile, offset = score_block(prog, tile, first_row, n_block, full_begin, full_end, span, slope)
        p, rescale, row_max, row_sums = softmax_step(prog, row_max, row_sums, tile, offset, unit)
        p = drop_block(prog, p, first_row, n_block, key)
        await_full(prog.k_ring, k_place, (n_block > begin) | unread | follows)
        acc = await_columns(acc)
        release(prog.v_ring, v_place)
        v_place = advance(v_place, prog.STAGES)
        weights = gl.convert_layout(p.to(prog.k_ring.buffers.dtype), operand)
        if prog.score.bounded is None:
            acc = scale_columns(acc, rescale)
    return weights, acc, row_max, row_sums, k_place, v_place, follows


@gluon.jit
def attend_overlapped(prog, CONSUMER: gl.constexpr):
    """One consumer, with OVERLAP: the first key block of a tile runs beside the last values of the tile before."""
    BLOCK_M: gl.constexpr = prog.CONSUMERS * WARPGROUP_ROWS
    NEXT: gl.constexpr = (CONSUMER + 1) % prog.CONSUMERS
    tile_layout: gl.constexpr = accumulator_layout(prog.BLOCK_N)
    operand: gl.constexpr = gl.DotOperandLayout(0, accumulator_layout(first_part(prog.WIDTH)), 2)
    row_layout: gl.constexpr = gl.SliceLayout(1, tile_layout)
    dtype: gl.constexpr = prog.o_buffers.dtype
    unit = unit_log2(prog.score)
    t_place, q_place, k_place, v_place = Place(0, 0), Place(0, 0), Place(0, 0), Place(0, 0)
    lowest = gl.full((WARPGROUP_ROWS,), lowest_max(prog.score), gl.float32, row_layout)
    nothing = gl.zeros((WARPGROUP_ROWS, 8), gl.float32, partial_layout())
    row_max, row_sums = lowest, nothing
    weights = gl.convert_layout(gl.zeros((WARPGROUP_ROWS, prog.BLOCK_N), dtype, tile_layout), operand)
    acc = zero_columns(prog.WIDTH)
    if prog.PING_PONG and CONSUMER == prog.CONSUMERS - 1:
        give_turn(FIRST_TURN + 0, TURN_THREADS)
    old_slot, unread = 0, 0  # values that the tiles before left in their ring
    await_full(prog.tiles, t_place)
    present = tile_field(prog.tiles, t_place.index, 0) >= 0
    pending = present & (t_place.index > 0)  # whether the tile before still needs its last product
    await_full(prog.k_ring, k_place, present)
    while present | pending:
        first_row = tile_field(prog.tiles, t_place.index, 0) * BLOCK_M + CONSUMER * WARPGROUP_ROWS
        begin, end = tile_field(prog.tiles, t_place.index, 3), tile_field(prog.tiles, t_place.index, 4)
        span = announced_span(prog, t_place.index)
        before, behind = unseen_blocks(prog, first_row, begin, end, span, present, CONSUMER)
        k_place = skip_keys(prog, k_place, behind, True)
        begin, end, unread = begin + before, end - behind, unread + behind
        own_place = Place(q_place.index * prog.CONSUMERS + CONSUMER, q_place.phase)
        q_tile = own_queries(prog, own_place, present)
        if prog.PING_PONG:
            await_turn(FIRST_TURN + CONSUMER, TURN_THREADS)
        tile = product_qk(prog, q_tile, k_place.index)
        await_full(prog.v_ring, v_place, pending)
        acc = product_pv(prog, weights, v_place.index, acc)
        if prog.PING_PONG:
            give_turn(FIRST_TURN + NEXT, TURN_THREADS)
        full_begin, full_end = full_key_blocks(first_row, span, prog.window, prog.BLOCK_N)
        batch, head = tile_field(prog.tiles, t_place.index, 2), tile_field(prog.tiles, t_place.index, 1)
        slope = load_slope(prog.score, batch, head)
        key = load_key(prog.dropout, batch * prog.work.nheads + head)
        next_place = advance(t_place, TILE_STAGES)
        follows = tile_follows(prog.tiles, next_place, present & (end - begin == 1))
        tile = warpgroup_mma_wait(num_parts(prog.WIDTH), deps=(tile,))
        release(prog.k_ring, k_place, present)
        k_place = advance(k_place, prog.STAGES)
        tile, offset = score_block(prog, tile, first_row, end - 1, full_begin, full_end, span, slope)
        inverse_sum, lse = finish(prog, row_max, row_sums, unit, tile_field(prog.tiles, old_slot, 1))
        p, _rescale, row_max, row_sums = softmax_step(prog, lowest, nothing, tile, offset, unit)
        p = drop_block(prog, p, first_row, end - 1, key)
        more = (end - begin > 1) | (before > 0) | follows
        await_full(prog.k_ring, k_place, present & more)
        acc = await_columns(acc)
        weights = gl.convert_layout(p.to(dtype), operand)
        if pending:
            release(prog.v_ring, v_place)
            v_place = advance(v_place, prog.STAGES)
            tma.store_wait(0)
            old_row = tile_field(prog.tiles, old_slot, 0) * BLOCK_M + CONSUMER * WARPGROUP_ROWS
            old_span = announced_span(prog, old_slot)
            old_batch, old_head = tile_field(prog.tiles, old_slot, 2), tile_field(prog.tiles, old_slot, 1)
            store_results(prog, acc, inverse_sum, lse, old_row, old_span, old_batch, old_head, CONSUMER)
            mbarrier.arrive(prog.tiles.empty.index(old_slot), count=1)
        v_place = skip_values(prog, v_place, unread)
        acc = zero_columns(prog.WIDTH)
        last = gl.where(present, end - 1, begin)
        weights, acc, row_max, row_sums, k_place, v_place, follows = attend_blocks(
            prog, q_tile, weights, acc, row_max, row_sums, k_place, v_place, first_row, begin, last, full_begin, full_end,
            follows, before > 0, next_place, span, slope, unit, key, CONSUMER,
        )  # fmt: skip
        k_place = skip_keys(prog, k_place, before, follows)
        unread = before
        release(prog.q_ring, own_place, present)
        q_place = advance(q_place, 2)
        old_slot, t_place = t_place.index, next_place
        pending, present = present, follows
    tma.store_wait(0)
    if prog.PING_PONG and CONSUMER == 0:
        await_turn(FIRST_TURN + 0, TURN_THREADS)


@gluon.jit
def attend_serially(prog, CONSUMER: gl.constexpr):
    """One consumer that finishes a tile before the next one; out leaves through Q's buffer."""
    BLOCK_M: gl.constexpr = prog.CONSUMERS * WARPGROUP_ROWS
    tile_layout: gl.constexpr = accumulator_layout(prog.BLOCK_N)
    operand: gl.constexpr = gl.DotOperandLayout(0, accumulator_layout(first_part(prog.WIDTH)), 2)
    row_layout: gl.constexpr = gl.SliceLayout(1, tile_layout)
    dtype: gl.constexpr = prog.o_buffers.dtype
    unit = unit_log2(prog.score)
    t_place, own_place, k_place, v_place = Place(0, 0), Place(CONSUMER, 0), Place(0, 0), Place(0, 0)
    lowest = gl.full((WARPGROUP_ROWS,), lowest_max(prog.score), gl.float32, row_layout)
    nothing = gl.zeros((WARPGROUP_ROWS, 8), gl.float32, partial_layout())
    if prog.PING_PONG and CONSUMER == prog.CONSUMERS - 1:
        give_turn(FIRST_TURN + 0, TURN_THREADS)
    await_full(prog.tiles, t_place)
    while tile_field(prog.tiles, t_place.index, 0) >= 0:
        m_block, head, batch, begin, end = announced_tile(prog, t_place.index)
        first_row = m_block * BLOCK_M + CONSUMER * WARPGROUP_ROWS
        span = announced_span(prog, t_place.index)
        full_begin, full_end = full_key_blocks(first_row, span, prog.window, prog.BLOCK_N)
        slope = load_slope(prog.score, batch, head)
        key = load_key(prog.dropout, batch * prog.work.nheads + head)
        q_tile = own_queries(prog, own_place, True)
        await_full(prog.k_ring, k_place)
        tile = product_qk(prog, q_tile, k_place.index)
        tile = warpgroup_mma_wait(0, deps=(tile,))
        release(prog.k_ring, k_place)
        k_place = advance(k_place, prog.STAGES)
        tile, offset = score_block(prog, tile, first_row, end - 1, full_begin, full_end, span, slope)
        p, _rescale, row_max, row_sums = softmax_step(prog, lowest, nothing, tile, offset, unit)
        p = drop_block(prog, p, first_row, end - 1, key)
        weights = gl.convert_layout(p.to(dtype), operand)
        await_full(prog.k_ring, k_place, end - begin > 1)
        acc = zero_columns(prog.WIDTH)
        weights, acc, row_max, row_sums, k_place, v_place, _follows = attend_blocks(
            prog, q_tile, weights, acc, row_max, row_sums, k_place, v_place, first_row, begin, end - 1, full_begin, full_end,
            False, False, t_place, span, slope, unit, key, CONSUMER,
        )  # fmt: skip
        await_full(prog.v_ring, v_place)
        acc = product_pv(prog, weights, v_place.index, acc)
        inverse_sum, lse = finish(prog, row_max, row_sums, unit, head)
        release(prog.tiles, t_place)
        t_place = advance(t_place, TILE_STAGES)
        await_full(prog.tiles, t_place)
        acc = await_columns(acc)
        release(prog.v_ring, v_place)
        v_place = advance(v_place, prog.STAGES)
        store_results(prog, acc, inverse_sum, lse, first_row, span, batch, head, CONSUMER)
        tma.store_wait(0)
        release(prog.q_ring, own_place)
        own_place = Place(CONSUMER, own_place.phase ^ 1)
    if prog.PING_PONG and CONSUMER == 0:
        await_turn(FIRST_TURN + 0, TURN_THREADS)


@gluon.jit
def attend_partition(prog, CONSUMER: gl.constexpr):
    """One consumer."""
    if prog.OVERLAP:
        attend_overlapped(prog, CONSUMER)
    else:
        attend_serially(prog, CONSUMER)


@gluon.jit(do_not_specialize=SIZES)
def attn_fwd_kernel(
    q_desc, k_desc, v_desc, o_desc, softmax_lse, sequences, pages, score, dropout, counter,
    num_tiles, num_blocks, heads_together, seqlen_q, seqlen_k, total_q, total_k, window_left, window_right, nheads, group,
    HEAD_DIM_PAD: gl.constexpr, WIDTH: gl.constexpr, BLOCK_N: gl.constexpr, CONSUMERS: gl.constexpr, STAGES: gl.constexpr,
    OVERLAP: gl.constexpr, PING_PONG: gl.constexpr, DRAW_AHEAD: gl.constexpr, REGISTERS: gl.constexpr,
    Q_IN_REGISTERS: gl.constexpr,
):  # fmt: skip
    PACKED: gl.constexpr = is_ragged(q_desc)
    Q_STAGES: gl.constexpr = 2 if OVERLAP else 1
    work = Work(
        counter, num_tiles, num_blocks, heads_together, nheads, group, seqlen_q, seqlen_k, total_q, total_k,
        paged=None if pages.block_table is None else 1,
    )  # fmt: skip
    window = Window(window_left, window_right)
    q_ring = allocate_ring(q_desc, HEAD_DIM_PAD, Q_STAGES * CONSUMERS, 1)
    k_ring = allocate_ring(k_desc, HEAD_DIM_PAD, STAGES, CONSUMERS, ROWS=BLOCK_N)
    v_ring = allocate_ring(v_desc, HEAD_DIM_PAD, STAGES, CONSUMERS, ROWS=BLOCK_N)
    tiles = allocate_tiles(CONSUMERS)
    if OVERLAP:
        o_buffers = allocate_buffers(o_desc, HEAD_DIM_PAD, CONSUMERS)
    else:
        o_buffers = q_ring.buffers
    prog = Program(
        o_desc, softmax_lse, tiles, q_ring, k_ring, v_ring, o_buffers, sequences, work, pages, window, score, dropout,
        HEAD_DIM_PAD, WIDTH, BLOCK_N, CONSUMERS, STAGES, OVERLAP, PING_PONG, DRAW_AHEAD, Q_IN_REGISTERS, PACKED,
    )  # fmt: skip
    if CONSUMERS == 2:
        gl.warp_specialize([
            (attend_partition, (prog, 0)),
            (attend_partition, (prog, 1)),
            (load_partition, (prog,)),
        ], [4, 1], [REGISTERS, 24])  # fmt: skip
    elif CONSUMERS == 3:
        gl.warp_specialize([
            (attend_partition, (prog, 0)),
            (attend_partition, (prog, 1)),
            (attend_partition, (prog, 2)),
            (load_partition, (prog,)),
        ], [4, 4, 1], [REGISTERS, REGISTERS, 24])  # fmt: skip
    else:
        gl.warp_specialize([
            (attend_partition, (prog, 0)),
            (attend_partition, (prog, 1)),
            (attend_partition, (prog, 2)),
            (attend_partition, (prog, 3)),
            (load_partition, (prog,)),
        ], [4, 4, 4, 1], [REGISTERS, REGISTERS, REGISTERS, 24])  # fmt: skip
