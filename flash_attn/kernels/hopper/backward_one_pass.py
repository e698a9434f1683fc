"""Backward for Hopper in one pass: dq, dk and dv from one S and one dP; dq is summed by reductions in global memory.

One warp loads, two warpgroups ("consumers") of 64 keys each differentiate transposed tiles as in `backward_dkdv`, whose loading
partition this is, too. dq = dS K needs the keys of both, so they exchange dS through shared memory; each makes one 64 x 64 part
of dq of the block before, so that no consumer waits for the other's present dS.

    consumer   dP^T = V dO(m)^T   is issued while   P^T(m) comes from S^T(m);   dS^T(m) goes to shared memory;   then
               dV += P^T(m) dO(m)   and   dQ(m-1) = dS(m-1) K   and   dK += dS^T(m) Q(m);   then
               S^T(m+1) = K Q(m+1)^T   runs while dQ(m-1) is reduced

    ring       filled by                     read by        a slot is free when
    tiles      load                          consumers      every consumer has read the number
    k          load                          consumers      every consumer's products with both halves are complete
    v          load                          one consumer   that consumer's dv and dk, which leave through it, have left
    q          load: tile, and its row_lse   consumers      every consumer's products with it are complete
    dout       load: tile, and row_delta     consumers      every consumer's products with it, and with dS(m-1), are complete
    ds         one consumer each half        consumers      dout(m-1) is free: dS(m) replaces dS(m-2)

dq is summed in the workspace of `backward_dq_sum`. The order of the sum varies from run to run; dk and dv are summed in one
fixed order.

With `turns`, dq is summed in the order of the keys. Query blocks are then taken from the last to the first, so that a causal
tile does not wait for rows that it does not see, and two more warps hand the turns on:

    turn       given by                      taken by       passed on by
    block m    a warp that sees the tile     consumers      a warp that makes the sum visible and lets the next tile add to m;
               before done with m                           it frees the slot of the turn, of which there are two
"""

from typing import Any, NamedTuple

from flash_attn.kernels.algebra.arguments import Window
from flash_attn.kernels.algebra.dropout import kept_scale
from flash_attn.kernels.algebra.score import gradient_scale, load_slope
from flash_attn.kernels.hopper.backward_dkdv import SIZES, load_partition, store_gradient
from flash_attn.kernels.hopper.backward_dq_sum import PART, first_dq_block, in_register_order, part_pointer
from flash_attn.kernels.hopper.backward_tiles import (
    allocate_key_words,
    allocate_statistics,
    first_group_block,
    next_group_block,
    score_gradient,
    tile_weights,
    transposed_bits,
    value_weights,
)
from flash_attn.kernels.hopper.columns import (
    accumulate_columns,
    await_products,
    first_part,
    inner_products,
    num_parts,
    zero_columns,
)
from flash_attn.kernels.hopper.pipeline import (
    WARPGROUP_ROWS,
    Ring,
    accumulator_layout,
    advance,
    allocate_barriers,
    allocate_ring,
    fence_async_shared,
    gl,
    gluon,
    loop_variant,
    matrix,
    mbarrier,
    product,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from flash_attn.kernels.hopper.schedule import (
    TILE_STAGES,
    Work,
    allocate_tiles,
    announced_span,
    full_query_blocks,
    query_blocks,
    tile_field,
)

STAGES = gl.constexpr(2)  # of every ring: the dS of a block lies in the slot of its dout
TURN_STAGES = gl.constexpr(2)  # turns given ahead


class Turn(NamedTuple):
    """Barriers of the consumers' turns to add to dq, (TURN_STAGES,) each."""

    given: Any
    taken: Any
    passed: Any


@gluon.jit
def product_dq(
    ds_ring, k_ring, slot, k_slot, CONSUMER: gl.constexpr, BLOCK_M: gl.constexpr, HEAD_DIM_PAD: gl.constexpr
):
    """Issue one consumer's part of dQ = dS K: 64 columns of a block of 64 rows, or 64 rows of a block of 128."""
    left = matrix(ds_ring, slot * 2, WARPGROUP_ROWS, BLOCK_M)
    left_too = matrix(ds_ring, slot * 2 + 1, WARPGROUP_ROWS, BLOCK_M)
    right = matrix(k_ring, k_slot * 2, WARPGROUP_ROWS, HEAD_DIM_PAD)
    right_too = matrix(k_ring, k_slot * 2 + 1, WARPGROUP_ROWS, HEAD_DIM_PAD)
    if BLOCK_M == PART:
        right = right.slice(CONSUMER * PART, PART, dim=1)
        right_too = right_too.slice(CONSUMER * PART, PART, dim=1)
    else:
        left = left.slice(CONSUMER * PART, PART, dim=1)
        left_too = left_too.slice(CONSUMER * PART, PART, dim=1)
    part = product(left.permute((1, 0)), right, PART)
    return warpgroup_mma(left_too.permute((1, 0)), right_too, part, is_async=True)


@gluon.jit
def reduce_part(pointer, part):
    """Add one part of dq to the workspace: one 16-byte reduction for every 4 numbers of a thread."""
    numbers = in_register_order(part)
    offsets = gl.arange(0, PART * PART, layout=numbers.type.layout)
    gl.atomic_add(pointer + offsets, numbers, sem="relaxed")


@gluon.jit
def reduce_in_turn(pointer, part, turn, count, real):
    """`reduce_part`, in an ordered sum once it is this tile's turn, but for the spare block; and the number of turns so far."""
    if turn is None:
        reduce_part(pointer, part)
    else:
        slot, phase = count % TURN_STAGES, count // TURN_STAGES & 1
        mbarrier.wait(turn.given.index(slot), phase, pred=real)
        reduce_part(pointer, part)
        mbarrier.arrive(turn.taken.index(slot), count=1, pred=real)
        count += gl.cast(real, gl.int32)
    return count


@gluon.jit
def turn_partition(
    turns, turn, num_dq_blocks, num_m, tiles, work, window, PASSES: gl.constexpr, BLOCK_M: gl.constexpr,
    PACKED: gl.constexpr,
):  # fmt: skip
    """Gives the consumers their turns, each when the tile of keys before has added to the block; or, with PASSES, passes them
    on when the consumers have added to it.

    turns (nheads, num_dq_blocks) holds the number of the next tile to add to a block; it only grows, so that even lengths that
    make sequences overlap leave nobody waiting. Programs draw tiles in the order of their keys and finish the earliest first:
    the tile that a program waits for is always under way.
    """
    BLOCK_N: gl.constexpr = 2 * WARPGROUP_ROWS
    t_slot, t_phase, slot, phase = 0, 0, 0, 0
    mbarrier.wait(tiles.full.index(t_slot), t_phase)
    while tile_field(tiles, t_slot, 0) >= 0:
        n_block = tile_field(tiles, t_slot, 0)
        head, batch = tile_field(tiles, t_slot, 1) * work.group, tile_field(tiles, t_slot, 2)
        begin, end = tile_field(tiles, t_slot, 3), tile_field(tiles, t_slot, 4)
        span = announced_span(tiles, t_slot, work, PACKED)
        mbarrier.arrive(tiles.empty.index(t_slot), count=1)
        t_slot, t_phase = advance(t_slot, t_phase, TILE_STAGES)
        first = n_block * BLOCK_N
        last = gl.minimum(first + BLOCK_N, span.seqlen_k) - 1
        _begin, _full_begin, _full_end, seen_end = query_blocks(first, last, span, window, BLOCK_M)
        _begin, _full_begin, _full_end, before_end = query_blocks(first - BLOCK_N, first - 1, span, window, BLOCK_M)
        sees = seen_end > begin  # a tile that no row sees adds one block of zeros, in any order
        follows = sees & (n_block > 0)
        shared_end = gl.where(follows, before_end, begin)  # the blocks below get something from the tile before, too
        first_block = first_dq_block(batch, span.start_q, num_m, BLOCK_M, PACKED)
        m_block, first_head = first_group_block(begin, end, True), head
        for _step in range((end - begin) * work.group):
            pointer = turns + gl.cast(head, gl.int64) * num_dq_blocks + first_block + m_block
            if PASSES:
                mbarrier.wait(turn.taken.index(slot), phase)
                if sees:
                    gl.atomic_max(pointer, n_block + 1, sem="release")
                mbarrier.arrive(turn.passed.index(slot), count=1)
            else:
                mbarrier.wait(turn.passed.index(slot), phase ^ 1)
                waits = m_block < shared_end
                while waits:
                    waits = gl.atomic_add(pointer, 0, sem="acquire") < n_block
                mbarrier.arrive(turn.given.index(slot), count=1)
            slot, phase = advance(slot, phase, TURN_STAGES)
            head, m_block = next_group_block(head, m_block, begin, end, first_head, work.group, True)
        mbarrier.wait(tiles.full.index(t_slot), t_phase)


@gluon.jit
def accumulate(
    k_ring, v_ring, q_ring, dout_ring, ds_ring, row_lse, row_delta, dq_sum, k_slot, slot, phase, first_key, begin, end,
    full_begin, full_end, head, batch, first_block, num_dq_blocks, turn, turn_count, span, window, work, score, key_words,
    dropout,
    CONSUMER: gl.constexpr, BLOCK_M: gl.constexpr, HEAD_DIM_PAD: gl.constexpr, WIDTH: gl.constexpr,
):  # fmt: skip
    """Sums of dS^T Q and P^T dO over the query heads of the group and query blocks [begin, end), and dq but for the last."""
    DOWN: gl.constexpr = turn is not None
    layout: gl.constexpr = accumulator_layout(BLOCK_M)
    lanes: gl.constexpr = gl.SliceLayout(0, layout)
    operand: gl.constexpr = gl.DotOperandLayout(0, accumulator_layout(first_part(WIDTH)), 2)
    dtype: gl.constexpr = q_ring.buffers.dtype
    cols = (first_key + gl.arange(0, WARPGROUP_ROWS, layout=gl.SliceLayout(1, layout)))[:, None]
    ends = first_key + WARPGROUP_ROWS > span.seqlen_k  # zero keys past the end must not meet an infinite weight
    dk = zero_columns(WIDTH)
    dv = zero_columns(WIDTH)
    slope = load_slope(score, batch, head)
    mbarrier.wait(q_ring.full.index(slot), phase)
    k_tile = matrix(k_ring, k_slot * 2 + CONSUMER, WARPGROUP_ROWS, HEAD_DIM_PAD)
    qk = inner_products(k_tile, matrix(q_ring, slot, BLOCK_M, HEAD_DIM_PAD), BLOCK_M, WIDTH)
    qk = warpgroup_mma_wait(0, deps=(qk,))
    m_block, first_head = first_group_block(begin, end, DOWN), head
    spare = num_dq_blocks - 1
    if begin * BLOCK_M >= span.seqlen_q:  # the one block of a tile that no row sees may lie past the end
        first_block = spare - begin
    before = part_pointer(dq_sum, head, spare, CONSUMER, num_dq_blocks, BLOCK_M, HEAD_DIM_PAD)
    steps = (end - begin) * work.group
    gl.assume(steps > 0)
    for step in range(steps):
        k_index = k_slot + loop_variant(step)
        k_tile = matrix(k_ring, k_index * 2 + CONSUMER, WARPGROUP_ROWS, HEAD_DIM_PAD)
        v_tile = matrix(v_ring, k_index * 2 + CONSUMER, WARPGROUP_ROWS, HEAD_DIM_PAD)
        q_tile = matrix(q_ring, slot, BLOCK_M, HEAD_DIM_PAD)
        dout_tile = matrix(dout_ring, slot, BLOCK_M, HEAD_DIM_PAD)
        mbarrier.wait(dout_ring.full.index(slot), phase)
        dp = inner_products(v_tile, dout_tile, BLOCK_M, WIDTH)
        rows = (m_block * BLOCK_M + gl.arange(0, BLOCK_M, layout=lanes))[None, :]
        masked = (m_block < full_begin) | (m_block >= full_end) | ends
        lse = row_lse.index(slot).load(lanes)[None, :]
        bits = transposed_bits(dropout, key_words, slot, m_block * BLOCK_M, first_key, layout, BLOCK_M)
        weights, sensitivity = tile_weights(qk, lse, rows, cols, masked, span, window, score, slope, dropout, bits)
        dp = warpgroup_mma_wait(0, deps=(dp,))
        delta = row_delta.index(slot).load(lanes)[None, :]
        ds = score_gradient(sensitivity, dp, delta, dropout).to(dtype)
        old_slot, old_phase = slot ^ 1, phase ^ (slot ^ 1)  # of the block before, maybe in the tile before
        mbarrier.wait(dout_ring.empty.index(old_slot), old_phase)
        matrix(ds_ring, slot * 2 + CONSUMER, WARPGROUP_ROWS, BLOCK_M).store(ds)
        fence_async_shared()
        mbarrier.arrive(ds_ring.full.index(slot * 2 + CONSUMER), count=1)
        p = gl.convert_layout(value_weights(weights, dropout).to(dtype), operand)
        dv = accumulate_columns(p, dout_tile, dv, WIDTH)
        ds = gl.convert_layout(ds, operand)
        mbarrier.wait(ds_ring.full.index(old_slot * 2 + 1 - CONSUMER), old_phase)
        # in the first step this multiplies whatever lies there, and the spare block takes it
        dq = product_dq(ds_ring, k_ring, old_slot, k_index, CONSUMER, BLOCK_M, HEAD_DIM_PAD)
        dk = accumulate_columns(ds, q_tile, dk, WIDTH)
        dv, dq, p = await_products(dv, dq, p, num_parts(WIDTH))
        mbarrier.arrive(dout_ring.empty.index(slot), count=1)
        present = part_pointer(dq_sum, head, first_block + m_block, CONSUMER, num_dq_blocks, BLOCK_M, HEAD_DIM_PAD)
        head, m_block = next_group_block(head, m_block, begin, end, first_head, work.group, DOWN)
        if score.alibi_slopes is not None:
            slope = load_slope(score, batch, gl.minimum(head, work.nheads - 1))
        old_slot = slot
        slot, phase = advance(slot, phase, STAGES)
        # behind the last block this multiplies whatever lies there, and nothing reads it
        mbarrier.wait(q_ring.full.index(slot), phase, pred=step + 1 < steps)
        qk = inner_products(k_tile, matrix(q_ring, slot, BLOCK_M, HEAD_DIM_PAD), BLOCK_M, WIDTH)
        turn_count = reduce_in_turn(before, dq, turn, turn_count, step > 0)
        before = present
        dk, qk, ds = await_products(dk, qk, ds)
        mbarrier.arrive(q_ring.empty.index(old_slot), count=1)
    return dk, dv, before, slot, phase, turn_count


@gluon.jit
def one_pass_partition(
    dk_desc, dv_desc, dq_sum, num_dq_blocks, num_m, turn, tiles, k_ring, v_ring, q_ring, dout_ring, ds_ring, row_lse,
    row_delta, key_words, work, window, score, dropout,
    CONSUMER: gl.constexpr, BLOCK_M: gl.constexpr, HEAD_DIM_PAD: gl.constexpr, WIDTH: gl.constexpr, K_STAGES: gl.constexpr,
    PACKED: gl.constexpr,
):  # fmt: skip
    """One consumer."""
    BLOCK_N: gl.constexpr = 2 * WARPGROUP_ROWS
    t_slot, t_phase, k_slot, k_phase, slot, phase, turn_count = 0, 0, 0, 0, 0, 0, 0
    mbarrier.wait(tiles.full.index(t_slot), t_phase)
    while tile_field(tiles, t_slot, 0) >= 0:
        first_key = tile_field(tiles, t_slot, 0) * BLOCK_N + CONSUMER * WARPGROUP_ROWS
        head_k, batch = tile_field(tiles, t_slot, 1), tile_field(tiles, t_slot, 2)
        begin, end = tile_field(tiles, t_slot, 3), tile_field(tiles, t_slot, 4)
        span = announced_span(tiles, t_slot, work, PACKED)
        first_block = first_dq_block(batch, span.start_q, num_m, BLOCK_M, PACKED)
        mbarrier.arrive(tiles.empty.index(t_slot), count=1)
        t_slot, t_phase = advance(t_slot, t_phase, TILE_STAGES)
        full_begin, full_end = full_query_blocks(first_key, span, window, BLOCK_M)
        mbarrier.wait(k_ring.full.index(k_slot * 2), k_phase)
        mbarrier.wait(k_ring.full.index(k_slot * 2 + 1), k_phase)
        v_index = k_slot * 2 + CONSUMER
        mbarrier.wait(v_ring.full.index(v_index), k_phase)
        dk, dv, last, slot, phase, turn_count = accumulate(
            k_ring, v_ring, q_ring, dout_ring, ds_ring, row_lse, row_delta, dq_sum, k_slot, slot, phase, first_key, begin,
            end, full_begin, full_end, head_k * work.group, batch, first_block, num_dq_blocks, turn, turn_count, span, window,
            work, score, key_words, dropout, CONSUMER, BLOCK_M, HEAD_DIM_PAD, WIDTH,
        )  # fmt: skip
        old_slot, old_phase = slot ^ 1, phase ^ (slot ^ 1)
        mbarrier.wait(ds_ring.full.index(old_slot * 2 + 1 - CONSUMER), old_phase)
        dq = product_dq(ds_ring, k_ring, old_slot, k_slot, CONSUMER, BLOCK_M, HEAD_DIM_PAD)
        buffer = v_ring.buffers.index(v_index)
        dv_scale = kept_scale(dropout)
        store_gradient(dv_desc, buffer, dv, dv_scale, first_key, span, batch, head_k, HEAD_DIM_PAD, WIDTH, PACKED)
        dq = warpgroup_mma_wait(0, deps=(dq,))
        mbarrier.arrive(k_ring.empty.index(k_slot * 2), count=1)
        mbarrier.arrive(k_ring.empty.index(k_slot * 2 + 1), count=1)
        turn_count = reduce_in_turn(last, dq, turn, turn_count, True)
        tma.store_wait(0)
        scale = gradient_scale(score)
        store_gradient(dk_desc, buffer, dk, scale, first_key, span, batch, head_k, HEAD_DIM_PAD, WIDTH, PACKED)
        tma.store_wait(0)
        mbarrier.arrive(v_ring.empty.index(v_index), count=1)
        k_slot, k_phase = advance(k_slot, k_phase, K_STAGES)
        mbarrier.wait(tiles.full.index(t_slot), t_phase)


@gluon.jit(do_not_specialize=[*SIZES, "num_dq_blocks", "num_m"])
def attn_bwd_kernel(
    q_desc, k_desc, v_desc, dout_desc, dk_desc, dv_desc, dq_sum, turns, softmax_lse, delta, sequences, score, dropout, counter,
    num_dq_blocks, num_m, num_tiles, num_blocks, heads_together, seqlen_q, seqlen_k, total_q, total_k, window_left,
    window_right, nheads, group,
    HEAD_DIM_PAD: gl.constexpr, WIDTH: gl.constexpr, BLOCK_M: gl.constexpr, K_STAGES: gl.constexpr, AHEAD: gl.constexpr,
    REGISTERS: gl.constexpr,
):  # fmt: skip
    PACKED: gl.constexpr = sequences.cu_seqlens_q is not None
    ORDERED: gl.constexpr = turns is not None
    sizes = num_tiles, num_blocks, heads_together, nheads, group, seqlen_q, seqlen_k, total_q, total_k
    work = Work(counter, *sizes, 1, 1 if ORDERED else None, 1 if AHEAD and not ORDERED else None)
    window = Window(window_left, window_right)
    k_ring = allocate_ring(k_desc, K_STAGES * 2, 2)
    v_ring = allocate_ring(v_desc, K_STAGES * 2, 1)
    q_ring = allocate_ring(q_desc, STAGES, 2, 2)
    dout_ring = allocate_ring(dout_desc, STAGES, 2, 2)
    row_lse = allocate_statistics(STAGES, BLOCK_M)
    row_delta = allocate_statistics(STAGES, BLOCK_M)
    key_words = allocate_key_words(dropout, STAGES, row_lse)
    ds_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([WARPGROUP_ROWS, BLOCK_M], q_desc.dtype)
    ds_buffers = gl.allocate_shared_memory(q_desc.dtype, [STAGES * 2, WARPGROUP_ROWS, BLOCK_M], ds_layout)
    ds_ring = Ring(ds_buffers, allocate_barriers(STAGES * 2, 1), dout_ring.empty)
    if ORDERED:
        tiles = allocate_tiles(4)
        given, taken = allocate_barriers(TURN_STAGES, 1), allocate_barriers(TURN_STAGES, 2)
        turn = Turn(given, taken, allocate_barriers(TURN_STAGES, 1))
        gl.warp_specialize([
            (one_pass_partition, (dk_desc, dv_desc, dq_sum, num_dq_blocks, num_m, turn, tiles, k_ring, v_ring, q_ring,
                                  dout_ring, ds_ring, row_lse, row_delta, key_words, work, window, score, dropout,
                                  0, BLOCK_M, HEAD_DIM_PAD, WIDTH, K_STAGES, PACKED)),
            (one_pass_partition, (dk_desc, dv_desc, dq_sum, num_dq_blocks, num_m, turn, tiles, k_ring, v_ring, q_ring,
                                  dout_ring, ds_ring, row_lse, row_delta, key_words, work, window, score, dropout,
                                  1, BLOCK_M, HEAD_DIM_PAD, WIDTH, K_STAGES, PACKED)),
            (load_partition, (q_desc, dout_desc, k_desc, v_desc, softmax_lse, delta, tiles, k_ring, v_ring, q_ring,
                              dout_ring, row_lse, row_delta, key_words, sequences, work, window, dropout,
                              2, BLOCK_M, K_STAGES, STAGES, STAGES, True, PACKED)),
            (turn_partition, (turns, turn, num_dq_blocks, num_m, tiles, work, window, False, BLOCK_M, PACKED)),
            (turn_partition, (turns, turn, num_dq_blocks, num_m, tiles, work, window, True, BLOCK_M, PACKED)),
        ], [4, 1, 1, 1], [REGISTERS, 24, 24, 24])  # fmt: skip
    else:
        tiles = allocate_tiles(2)
        gl.warp_specialize([
            (one_pass_partition, (dk_desc, dv_desc, dq_sum, num_dq_blocks, num_m, None, tiles, k_ring, v_ring, q_ring,
                                  dout_ring, ds_ring, row_lse, row_delta, key_words, work, window, score, dropout,
                                  0, BLOCK_M, HEAD_DIM_PAD, WIDTH, K_STAGES, PACKED)),
            (one_pass_partition, (dk_desc, dv_desc, dq_sum, num_dq_blocks, num_m, None, tiles, k_ring, v_ring, q_ring,
                                  dout_ring, ds_ring, row_lse, row_delta, key_words, work, window, score, dropout,
                                  1, BLOCK_M, HEAD_DIM_PAD, WIDTH, K_STAGES, PACKED)),
            (load_partition, (q_desc, dout_desc, k_desc, v_desc, softmax_lse, delta, tiles, k_ring, v_ring, q_ring,
                              dout_ring, row_lse, row_delta, key_words, sequences, work, window, dropout,
                              2, BLOCK_M, K_STAGES, STAGES, STAGES, True, PACKED)),
        ], [4, 1], [REGISTERS, 24])  # fmt: skip
