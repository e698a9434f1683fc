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
Q_IN_REGISTERS, for one part, consumers read their Q once a tile and Q K^T takes only K from shared memory, at 64 bytes a cycle
in place of 96 (128 keys a step) or of all 128 that there are (64).

Two things here are written for ptxas (12.8): the K/V loop is one loop with a uniform branch around the mask, because it
miscompiles two sibling loops that share a tensor-core descriptor; and the spin on the next K's barrier stands between a
softmax and the wait for P V, because it would otherwise move that wait above the exponentials.
"""

from flash_attn.kernels.algebra.arguments import Window
from flash_attn.kernels.algebra.dropout import load_key
from flash_attn.kernels.algebra.score import load_slope, unit_log2
from flash_attn.kernels.algebra.softmax import lowest_max
from flash_attn.kernels.hopper.columns import (
    accumulate_columns,
    await_columns,
    first_part,
    inner_products,
    num_parts,
    scale_columns,
    zero_columns,
)
from flash_attn.kernels.hopper.forward_load import load_partition
from flash_attn.kernels.hopper.forward_skip import skip_keys, skip_values, unseen_blocks
from flash_attn.kernels.hopper.forward_tiles import drop_block, finish, score_block, softmax_step, store_tile
from flash_attn.kernels.hopper.pipeline import (
    FIRST_TURN,
    WARPGROUP_ROWS,
    accumulator_layout,
    advance,
    allocate_ring,
    await_turn,
    give_turn,
    gl,
    gluon,
    matrix,
    mbarrier,
    partial_layout,
    tma,
    warpgroup_mma_wait,
)
from flash_attn.kernels.hopper.schedule import (
    TILE_STAGES,
    Work,
    allocate_tiles,
    announced_span,
    full_key_blocks,
    tile_field,
)

TURN_THREADS = gl.constexpr(256)


@gluon.jit
def product_qk(q_tile, k_ring, slot, BLOCK_N: gl.constexpr, HEAD_DIM_PAD: gl.constexpr, WIDTH: gl.constexpr):
    """Issue S = Q K^T, (64, BLOCK_N)."""
    return inner_products(q_tile, matrix(k_ring, slot, BLOCK_N, HEAD_DIM_PAD), BLOCK_N, WIDTH)


@gluon.jit
def own_queries(
    q_ring, index, phase, present, BLOCK_N: gl.constexpr, HEAD_DIM_PAD: gl.constexpr, IN_REGISTERS: gl.constexpr
):
    """Wait for a consumer's Q of a tile that is present: (64, HEAD_DIM_PAD) in shared memory, or read into registers."""
    q_tile = matrix(q_ring, index, WARPGROUP_ROWS, HEAD_DIM_PAD)
    mbarrier.wait(q_ring.full.index(index), phase, pred=present)
    if IN_REGISTERS:
        q_tile = q_tile.load(gl.DotOperandLayout(0, accumulator_layout(BLOCK_N), 2))
    return q_tile


@gluon.jit
def product_pv(weights, v_ring, slot, acc, BLOCK_N: gl.constexpr, HEAD_DIM_PAD: gl.constexpr, WIDTH: gl.constexpr):
    """Issue O += P V."""
    return accumulate_columns(weights, matrix(v_ring, slot, BLOCK_N, HEAD_DIM_PAD), acc, WIDTH)


@gluon.jit
def tile_follows(tiles, slot, phase, last):
    """Whether another tile follows, which only the last step of a tile waits to learn."""
    mbarrier.wait(tiles.full.index(slot), phase, pred=last)
    return last & (tile_field(tiles, slot, 0) >= 0)


@gluon.jit
def attend_blocks(
    q_tile, weights, acc, row_max, row_sums, k_ring, v_ring, k_slot, k_phase, v_slot, v_phase, first_row, begin, last,
    full_begin, full_end, follows, unread, tiles, next_slot, next_phase, span, window, score, slope, unit, dropout,
    key,
    CONSUMER: gl.constexpr, CONSUMERS: gl.constexpr, BLOCK_N: gl.constexpr, HEAD_DIM_PAD: gl.constexpr, WIDTH: gl.constexpr,
    STAGES: gl.constexpr, PING_PONG: gl.constexpr,
):  # fmt: skip
    """Key blocks last - 1 down to begin; the product of the last weights with their values stays to be done."""
    NEXT: gl.constexpr = (CONSUMER + 1) % CONSUMERS
    operand: gl.constexpr = weights.type.layout
    for step in range(0, last - begin):
        n_block = last - 1 - step
        if PING_PONG:
            await_turn(FIRST_TURN + CONSUMER, TURN_THREADS)
        tile = product_qk(q_tile, k_ring, k_slot, BLOCK_N, HEAD_DIM_PAD, WIDTH)
        mbarrier.wait(v_ring.full.index(v_slot), v_phase)
        acc = product_pv(weights, v_ring, v_slot, acc, BLOCK_N, HEAD_DIM_PAD, WIDTH)
        if PING_PONG:
            give_turn(FIRST_TURN + NEXT, TURN_THREADS)
        if tiles is not None:
            follows = tile_follows(tiles, next_slot, next_phase, n_block == begin)
        tile = warpgroup_mma_wait(num_parts(WIDTH), deps=(tile,))
        mbarrier.arrive(k_ring.empty.index(k_slot), count=1)
        k_slot, k_phase = advance(k_slot, k_phase, STAGES)
        tile, offset = score_block(tile, first_row, n_block, full_begin, full_end, span, window, score, slope, BLOCK_N)
        p, rescale, row_max, row_sums = softmax_step(row_max, row_sums, tile, offset, unit, score, BLOCK_N)
        p = drop_block(p, first_row, n_block, dropout, key, BLOCK_N)
        mbarrier.wait(k_ring.full.index(k_slot), k_phase, pred=(n_block > begin) | unread | follows)
        acc = await_columns(acc)
        mbarrier.arrive(v_ring.empty.index(v_slot), count=1)
        v_slot, v_phase = advance(v_slot, v_phase, STAGES)
        weights = gl.convert_layout(p.to(q_tile.dtype), operand)
        if score.bounded is None:
            acc = scale_columns(acc, rescale)
    return weights, acc, row_max, row_sums, k_slot, k_phase, v_slot, v_phase, follows


@gluon.jit
def attend_overlapped(
    o_desc, softmax_lse, tiles, q_ring, k_ring, v_ring, o_buffers, sequences, work, window, score, dropout,
    CONSUMER: gl.constexpr, CONSUMERS: gl.constexpr, BLOCK_N: gl.constexpr, HEAD_DIM_PAD: gl.constexpr, WIDTH: gl.constexpr,
    STAGES: gl.constexpr, PING_PONG: gl.constexpr, Q_IN_REGISTERS: gl.constexpr, PACKED: gl.constexpr,
):  # fmt: skip
    """One consumer, with OVERLAP: the first key block of a tile runs beside the last values of the tile before."""
    BLOCK_M: gl.constexpr = CONSUMERS * WARPGROUP_ROWS
    NEXT: gl.constexpr = (CONSUMER + 1) % CONSUMERS
    tile_layout: gl.constexpr = accumulator_layout(BLOCK_N)
    operand: gl.constexpr = gl.DotOperandLayout(0, accumulator_layout(first_part(WIDTH)), 2)
    row_layout: gl.constexpr = gl.SliceLayout(1, tile_layout)
    dtype: gl.constexpr = o_buffers.dtype
    unit = unit_log2(score)
    t_slot, t_phase, q_slot, q_phase, k_slot, k_phase, v_slot, v_phase = 0, 0, 0, 0, 0, 0, 0, 0
    lowest = gl.full((WARPGROUP_ROWS,), lowest_max(score), gl.float32, row_layout)
    nothing = gl.zeros((WARPGROUP_ROWS, 8), gl.float32, partial_layout())
    row_max, row_sums = lowest, nothing
    weights = gl.convert_layout(gl.zeros((WARPGROUP_ROWS, BLOCK_N), dtype, tile_layout), operand)
    acc = zero_columns(WIDTH)
    if PING_PONG and CONSUMER == CONSUMERS - 1:
        give_turn(FIRST_TURN + 0, TURN_THREADS)
    old_slot, unread = 0, 0  # values that the tiles before left in their ring
    mbarrier.wait(tiles.full.index(t_slot), t_phase)
    present = tile_field(tiles, t_slot, 0) >= 0
    pending = present & (t_slot > 0)  # whether the tile before still needs its last product
    mbarrier.wait(k_ring.full.index(k_slot), k_phase, pred=present)
    while present | pending:
        first_row = tile_field(tiles, t_slot, 0) * BLOCK_M + CONSUMER * WARPGROUP_ROWS
        begin, end = tile_field(tiles, t_slot, 3), tile_field(tiles, t_slot, 4)
        span = announced_span(tiles, t_slot, work, PACKED)
        before, behind = unseen_blocks(first_row, begin, end, span, window, present, CONSUMER, CONSUMERS, BLOCK_N, STAGES,
                                       PING_PONG)  # fmt: skip
        k_slot, k_phase = skip_keys(k_ring, k_slot, k_phase, behind, True, STAGES)
        begin, end, unread = begin + before, end - behind, unread + behind
        q_index = q_slot * CONSUMERS + CONSUMER
        q_tile = own_queries(q_ring, q_index, q_phase, present, BLOCK_N, HEAD_DIM_PAD, Q_IN_REGISTERS)
        if PING_PONG:
            await_turn(FIRST_TURN + CONSUMER, TURN_THREADS)
        tile = product_qk(q_tile, k_ring, k_slot, BLOCK_N, HEAD_DIM_PAD, WIDTH)
        mbarrier.wait(v_ring.full.index(v_slot), v_phase, pred=pending)
        acc = product_pv(weights, v_ring, v_slot, acc, BLOCK_N, HEAD_DIM_PAD, WIDTH)
        if PING_PONG:
            give_turn(FIRST_TURN + NEXT, TURN_THREADS)
        full_begin, full_end = full_key_blocks(first_row, span, window, BLOCK_N)
        slope = load_slope(score, tile_field(tiles, t_slot, 2), tile_field(tiles, t_slot, 1))
        key = load_key(dropout, tile_field(tiles, t_slot, 2) * work.nheads + tile_field(tiles, t_slot, 1))
        next_slot, next_phase = advance(t_slot, t_phase, TILE_STAGES)
        follows = tile_follows(tiles, next_slot, next_phase, present & (end - begin == 1))
        tile = warpgroup_mma_wait(num_parts(WIDTH), deps=(tile,))
        mbarrier.arrive(k_ring.empty.index(k_slot), count=1, pred=present)
        k_slot, k_phase = advance(k_slot, k_phase, STAGES)
        tile, offset = score_block(tile, first_row, end - 1, full_begin, full_end, span, window, score, slope, BLOCK_N)
        inverse_sum, lse = finish(row_max, row_sums, unit, score, dropout, tile_field(tiles, old_slot, 1))
        p, _rescale, row_max, row_sums = softmax_step(lowest, nothing, tile, offset, unit, score, BLOCK_N)
        p = drop_block(p, first_row, end - 1, dropout, key, BLOCK_N)
        mbarrier.wait(k_ring.full.index(k_slot), k_phase, pred=present & ((end - begin > 1) | (before > 0) | follows))
        acc = await_columns(acc)
        weights = gl.convert_layout(p.to(dtype), operand)
        if pending:
            mbarrier.arrive(v_ring.empty.index(v_slot), count=1)
            v_slot, v_phase = advance(v_slot, v_phase, STAGES)
            tma.store_wait(0)
            old_row = tile_field(tiles, old_slot, 0) * BLOCK_M + CONSUMER * WARPGROUP_ROWS
            store_tile(o_desc, o_buffers.index(CONSUMER), acc, inverse_sum, softmax_lse, lse, old_row,
                       announced_span(tiles, old_slot, work, PACKED), tile_field(tiles, old_slot, 2),
                       tile_field(tiles, old_slot, 1), HEAD_DIM_PAD, WIDTH, PACKED)  # fmt: skip
            mbarrier.arrive(tiles.empty.index(old_slot), count=1)
        v_slot, v_phase = skip_values(v_ring, v_slot, v_phase, unread, STAGES)
        acc = zero_columns(WIDTH)
        last = gl.where(present, end - 1, begin)
        weights, acc, row_max, row_sums, k_slot, k_phase, v_slot, v_phase, follows = attend_blocks(
            q_tile, weights, acc, row_max, row_sums, k_ring, v_ring, k_slot, k_phase, v_slot, v_phase, first_row, begin,
            last, full_begin, full_end, follows, before > 0, tiles, next_slot, next_phase, span, window, score, slope, unit,
            dropout, key,
            CONSUMER, CONSUMERS, BLOCK_N, HEAD_DIM_PAD, WIDTH, STAGES, PING_PONG,
        )  # fmt: skip
        k_slot, k_phase = skip_keys(k_ring, k_slot, k_phase, before, follows, STAGES)
        unread = before
        mbarrier.arrive(q_ring.empty.index(q_index), count=1, pred=present)
        q_slot, q_phase = advance(q_slot, q_phase, 2)
        old_slot, t_slot, t_phase = t_slot, next_slot, next_phase
        pending, present = present, follows
    tma.store_wait(0)
    if PING_PONG and CONSUMER == 0:
        await_turn(FIRST_TURN + 0, TURN_THREADS)


@gluon.jit
def attend_serially(
    o_desc, softmax_lse, tiles, q_ring, k_ring, v_ring, o_buffers, sequences, work, window, score, dropout,
    CONSUMER: gl.constexpr, CONSUMERS: gl.constexpr, BLOCK_N: gl.constexpr, HEAD_DIM_PAD: gl.constexpr, WIDTH: gl.constexpr,
    STAGES: gl.constexpr, PING_PONG: gl.constexpr, PACKED: gl.constexpr,
):  # fmt: skip
    """One consumer that finishes a tile before the next one; out leaves through Q's buffer."""
    BLOCK_M: gl.constexpr = CONSUMERS * WARPGROUP_ROWS
    tile_layout: gl.constexpr = accumulator_layout(BLOCK_N)
    operand: gl.constexpr = gl.DotOperandLayout(0, accumulator_layout(first_part(WIDTH)), 2)
    row_layout: gl.constexpr = gl.SliceLayout(1, tile_layout)
    dtype: gl.constexpr = o_buffers.dtype
    unit = unit_log2(score)
    t_slot, t_phase, q_phase, k_slot, k_phase, v_slot, v_phase = 0, 0, 0, 0, 0, 0, 0
    lowest = gl.full((WARPGROUP_ROWS,), lowest_max(score), gl.float32, row_layout)
    nothing = gl.zeros((WARPGROUP_ROWS, 8), gl.float32, partial_layout())
    q_tile = matrix(q_ring, CONSUMER, WARPGROUP_ROWS, HEAD_DIM_PAD)
    if PING_PONG and CONSUMER == CONSUMERS - 1:
        give_turn(FIRST_TURN + 0, TURN_THREADS)
    mbarrier.wait(tiles.full.index(t_slot), t_phase)
    while tile_field(tiles, t_slot, 0) >= 0:
        first_row = tile_field(tiles, t_slot, 0) * BLOCK_M + CONSUMER * WARPGROUP_ROWS
        head, batch = tile_field(tiles, t_slot, 1), tile_field(tiles, t_slot, 2)
        begin, end = tile_field(tiles, t_slot, 3), tile_field(tiles, t_slot, 4)
        span = announced_span(tiles, t_slot, work, PACKED)
        full_begin, full_end = full_key_blocks(first_row, span, window, BLOCK_N)
        slope = load_slope(score, batch, head)
        key = load_key(dropout, batch * work.nheads + head)
        mbarrier.wait(q_ring.full.index(CONSUMER), q_phase)
        q_phase ^= 1
        mbarrier.wait(k_ring.full.index(k_slot), k_phase)
        tile = product_qk(q_tile, k_ring, k_slot, BLOCK_N, HEAD_DIM_PAD, WIDTH)
        tile = warpgroup_mma_wait(0, deps=(tile,))
        mbarrier.arrive(k_ring.empty.index(k_slot), count=1)
        k_slot, k_phase = advance(k_slot, k_phase, STAGES)
        tile, offset = score_block(tile, first_row, end - 1, full_begin, full_end, span, window, score, slope, BLOCK_N)
        p, _rescale, row_max, row_sums = softmax_step(lowest, nothing, tile, offset, unit, score, BLOCK_N)
        p = drop_block(p, first_row, end - 1, dropout, key, BLOCK_N)
        weights = gl.convert_layout(p.to(dtype), operand)
        mbarrier.wait(k_ring.full.index(k_slot), k_phase, pred=end - begin > 1)
        acc = zero_columns(WIDTH)
        weights, acc, row_max, row_sums, k_slot, k_phase, v_slot, v_phase, _follows = attend_blocks(
            q_tile, weights, acc, row_max, row_sums, k_ring, v_ring, k_slot, k_phase, v_slot, v_phase, first_row, begin,
            end - 1, full_begin, full_end, False, False, None, 0, 0, span, window, score, slope, unit, dropout, key,
            CONSUMER, CONSUMERS, BLOCK_N, HEAD_DIM_PAD, WIDTH, STAGES, PING_PONG,
        )  # fmt: skip
        mbarrier.wait(v_ring.full.index(v_slot), v_phase)
        acc = product_pv(weights, v_ring, v_slot, acc, BLOCK_N, HEAD_DIM_PAD, WIDTH)
        inverse_sum, lse = finish(row_max, row_sums, unit, score, dropout, head)
        mbarrier.arrive(tiles.empty.index(t_slot), count=1)
        t_slot, t_phase = advance(t_slot, t_phase, TILE_STAGES)
        mbarrier.wait(tiles.full.index(t_slot), t_phase)
        acc = await_columns(acc)
        mbarrier.arrive(v_ring.empty.index(v_slot), count=1)
        v_slot, v_phase = advance(v_slot, v_phase, STAGES)
        store_tile(o_desc, o_buffers.index(CONSUMER), acc, inverse_sum, softmax_lse, lse, first_row, span, batch, head,
                   HEAD_DIM_PAD, WIDTH, PACKED)  # fmt: skip
        tma.store_wait(0)
        mbarrier.arrive(q_ring.empty.index(CONSUMER), count=1)
    if PING_PONG and CONSUMER == 0:
        await_turn(FIRST_TURN + 0, TURN_THREADS)


@gluon.jit
def attend_partition(
    o_desc, softmax_lse, tiles, q_ring, k_ring, v_ring, o_buffers, sequences, work, window, score, dropout,
    CONSUMER: gl.constexpr, CONSUMERS: gl.constexpr, BLOCK_N: gl.constexpr, HEAD_DIM_PAD: gl.constexpr, WIDTH: gl.constexpr,
    STAGES: gl.constexpr, OVERLAP: gl.constexpr, PING_PONG: gl.constexpr, Q_IN_REGISTERS: gl.constexpr, PACKED: gl.constexpr,
):  # fmt: skip
    """One consumer."""
    if OVERLAP:
        attend_overlapped(o_desc, softmax_lse, tiles, q_ring, k_ring, v_ring, o_buffers, sequences, work, window, score,
                          dropout, CONSUMER, CONSUMERS, BLOCK_N, HEAD_DIM_PAD, WIDTH, STAGES, PING_PONG, Q_IN_REGISTERS,
                          PACKED)  # fmt: skip
    else:
        attend_serially(o_desc, softmax_lse, tiles, q_ring, k_ring, v_ring, o_buffers, sequences, work, window, score,
                        dropout, CONSUMER, CONSUMERS, BLOCK_N, HEAD_DIM_PAD, WIDTH, STAGES, PING_PONG, PACKED)  # fmt: skip


SIZES = [
    "num_tiles", "num_blocks", "heads_together", "seqlen_q", "seqlen_k", "total_q", "total_k", "window_left", "window_right",
    "nheads", "group",
]  # fmt: skip


@gluon.jit(do_not_specialize=SIZES)
def attn_fwd_kernel(
    q_desc, k_desc, v_desc, o_desc, softmax_lse, sequences, score, dropout, counter,
    num_tiles, num_blocks, heads_together, seqlen_q, seqlen_k, total_q, total_k, window_left, window_right, nheads, group,
    HEAD_DIM_PAD: gl.constexpr, WIDTH: gl.constexpr, BLOCK_N: gl.constexpr, CONSUMERS: gl.constexpr, STAGES: gl.constexpr,
    OVERLAP: gl.constexpr, PING_PONG: gl.constexpr, DRAW_AHEAD: gl.constexpr, REGISTERS: gl.constexpr,
    Q_IN_REGISTERS: gl.constexpr,
):  # fmt: skip
    PACKED: gl.constexpr = sequences.cu_seqlens_q is not None
    Q_STAGES: gl.constexpr = 2 if OVERLAP else 1
    work = Work(counter, num_tiles, num_blocks, heads_together, nheads, group, seqlen_q, seqlen_k, total_q, total_k)
    window = Window(window_left, window_right)
    q_ring = allocate_ring(q_desc, Q_STAGES * CONSUMERS, 1)
    k_ring = allocate_ring(k_desc, STAGES, CONSUMERS)
    v_ring = allocate_ring(v_desc, STAGES, CONSUMERS)
    tiles = allocate_tiles(CONSUMERS)
    if OVERLAP:
        o_buffers = gl.allocate_shared_memory(o_desc.dtype, [CONSUMERS] + o_desc.block_type.shape, o_desc.layout)
    else:
        o_buffers = q_ring.buffers
    if CONSUMERS == 2:
        gl.warp_specialize([
            (attend_partition, (o_desc, softmax_lse, tiles, q_ring, k_ring, v_ring, o_buffers, sequences, work, window, score,
                      dropout, 0, CONSUMERS, BLOCK_N, HEAD_DIM_PAD, WIDTH, STAGES, OVERLAP, PING_PONG, Q_IN_REGISTERS, PACKED)),
            (attend_partition, (o_desc, softmax_lse, tiles, q_ring, k_ring, v_ring, o_buffers, sequences, work, window, score,
                      dropout, 1, CONSUMERS, BLOCK_N, HEAD_DIM_PAD, WIDTH, STAGES, OVERLAP, PING_PONG, Q_IN_REGISTERS, PACKED)),
            (load_partition, (q_desc, k_desc, v_desc, tiles, q_ring, k_ring, v_ring, sequences, work, window,
                              CONSUMERS, BLOCK_N, STAGES, Q_STAGES, DRAW_AHEAD, PACKED)),
        ], [4, 1], [REGISTERS, 24])  # fmt: skip
    elif CONSUMERS == 3:
        gl.warp_specialize([
            (attend_partition, (o_desc, softmax_lse, tiles, q_ring, k_ring, v_ring, o_buffers, sequences, work, window, score,
                      dropout, 0, CONSUMERS, BLOCK_N, HEAD_DIM_PAD, WIDTH, STAGES, OVERLAP, PING_PONG, Q_IN_REGISTERS, PACKED)),
            (attend_partition, (o_desc, softmax_lse, tiles, q_ring, k_ring, v_ring, o_buffers, sequences, work, window, score,
                      dropout, 1, CONSUMERS, BLOCK_N, HEAD_DIM_PAD, WIDTH, STAGES, OVERLAP, PING_PONG, Q_IN_REGISTERS, PACKED)),
            (attend_partition, (o_desc, softmax_lse, tiles, q_ring, k_ring, v_ring, o_buffers, sequences, work, window, score,
                      dropout, 2, CONSUMERS, BLOCK_N, HEAD_DIM_PAD, WIDTH, STAGES, OVERLAP, PING_PONG, Q_IN_REGISTERS, PACKED)),
            (load_partition, (q_desc, k_desc, v_desc, tiles, q_ring, k_ring, v_ring, sequences, work, window,
                              CONSUMERS, BLOCK_N, STAGES, Q_STAGES, DRAW_AHEAD, PACKED)),
        ], [4, 4, 1], [REGISTERS, REGISTERS, 24])  # fmt: skip
    else:
        gl.warp_specialize([
            (attend_partition, (o_desc, softmax_lse, tiles, q_ring, k_ring, v_ring, o_buffers, sequences, work, window, score,
                      dropout, 0, CONSUMERS, BLOCK_N, HEAD_DIM_PAD, WIDTH, STAGES, OVERLAP, PING_PONG, Q_IN_REGISTERS, PACKED)),
            (attend_partition, (o_desc, softmax_lse, tiles, q_ring, k_ring, v_ring, o_buffers, sequences, work, window, score,
                      dropout, 1, CONSUMERS, BLOCK_N, HEAD_DIM_PAD, WIDTH, STAGES, OVERLAP, PING_PONG, Q_IN_REGISTERS, PACKED)),
            (attend_partition, (o_desc, softmax_lse, tiles, q_ring, k_ring, v_ring, o_buffers, sequences, work, window, score,
                      dropout, 2, CONSUMERS, BLOCK_N, HEAD_DIM_PAD, WIDTH, STAGES, OVERLAP, PING_PONG, Q_IN_REGISTERS, PACKED)),
            (attend_partition, (o_desc, softmax_lse, tiles, q_ring, k_ring, v_ring, o_buffers, sequences, work, window, score,
                      dropout, 3, CONSUMERS, BLOCK_N, HEAD_DIM_PAD, WIDTH, STAGES, OVERLAP, PING_PONG, Q_IN_REGISTERS, PACKED)),
            (load_partition, (q_desc, k_desc, v_desc, tiles, q_ring, k_ring, v_ring, sequences, work, window,
                              CONSUMERS, BLOCK_N, STAGES, Q_STAGES, DRAW_AHEAD, PACKED)),
        ], [4, 4, 4, 1], [REGISTERS, REGISTERS, REGISTERS, 24])  # fmt: skip
