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

With `turns`, dq is summed in the order of the keys, see `backward_dq_turns`. Query blocks are then taken from the last to the
first, so that a causal tile does not wait for rows that it does not see.
"""

from typing import Any

from flash_attn.kernels.algebra.arguments import Window
from flash_attn.kernels.algebra.dropout import kept_scale
from flash_attn.kernels.algebra.locate import row_statistic
from flash_attn.kernels.algebra.score import gradient_scale, load_slope
from flash_attn.kernels.hopper.backward_dkdv import load_partition, product_kq, store_gradient
from flash_attn.kernels.hopper.backward_dq_sum import PART, first_dq_block, part_pointer
from flash_attn.kernels.hopper.backward_dq_turns import allocate_turns, reduce_in_turn, turn_partition
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
    split_columns,
    zero_columns,
)
from flash_attn.kernels.hopper.pipeline import (
    WARPGROUP_ROWS,
    Place,
    Ring,
    accumulator_layout,
    advance,
    aggregate,
    allocate_barriers,
    allocate_ring,
    await_full,
    fence_async_shared,
    gl,
    gluon,
    loop_variant,
    matrix,
    mbarrier,
    product,
    release,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from flash_attn.kernels.hopper.schedule import (
    SIZES,
    TILE_STAGES,
    Work,
    allocate_tiles,
    announced_span,
    announced_tile,
    full_query_blocks,
    tile_field,
)

STAGES = gl.constexpr(2)  # of every ring: the dS of a block lies in the slot of its dout


@aggregate
class Program:
    """What the partitions of a program share; what is written in capitals is known when it is compiled."""

    dk_desc: Any
    dv_desc: Any
    dq_sum: Any
    turns: Any  # (nheads, num_dq_blocks) int32; None where dq is summed in any order, and so is turn
    num_dq_blocks: Any  # of a head in dq_sum
    num_m: Any  # query blocks of the longest sequence
    softmax_lse: Any
    delta: Any
    tiles: Any
    turn: Any
    k_ring: Any
    v_ring: Any
    q_ring: Any
    dout_ring: Any
    ds_ring: Any
    row_lse: Any
    row_delta: Any
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
    PACKED: Any


@gluon.jit
def place_before(place):
    """Where the block before lies in a ring of two, maybe of the tile before."""
    index = place.index ^ 1
    return Place(index, place.phase ^ index)


@gluon.jit
def product_dq(prog, slot, k_slot, CONSUMER: gl.constexpr):
    """Issue one consumer's part of dQ = dS K: 64 columns of a block of 64 rows, or 64 rows of a block of 128."""
    left = matrix(prog.ds_ring, slot * 2, WARPGROUP_ROWS, prog.BLOCK_M)
    left_too = matrix(prog.ds_ring, slot * 2 + 1, WARPGROUP_ROWS, prog.BLOCK_M)
    right = matrix(prog.k_ring, k_slot * 2, WARPGROUP_ROWS, prog.HEAD_DIM_PAD)
    right_too = matrix(prog.k_ring, k_slot * 2 + 1, WARPGROUP_ROWS, prog.HEAD_DIM_PAD)
    if prog.BLOCK_M == PART:
        right = right.slice(CONSUMER * PART, PART, dim=1)
        right_too = right_too.slice(CONSUMER * PART, PART, dim=1)
    else:
        left = left.slice(CONSUMER * PART, PART, dim=1)
        left_too = left_too.slice(CONSUMER * PART, PART, dim=1)
    part = product(left.permute((1, 0)), right, PART)
    return warpgroup_mma(left_too.permute((1, 0)), right_too, part, is_async=True)


@gluon.jit
def dq_part(prog, head, block, CONSUMER: gl.constexpr):
    """Pointer to one consumer's part of a block's dq."""
    return part_pointer(prog.dq_sum, head, block, CONSUMER, prog.num_dq_blocks, prog.BLOCK_M, prog.HEAD_DIM_PAD)


@gluon.jit
def accumulate(
    prog, k_slot, place, first_key, begin, end, full_begin, full_end, head, batch, first_block, turn_count, span,
    CONSUMER: gl.constexpr,
):  # fmt: skip
    """Sums of dS^T Q and P^T dO over the query heads of the group and query blocks [begin, end), and dq but for the last."""
    DOWN: gl.constexpr = prog.turn is not None
    layout: gl.constexpr = accumulator_layout(prog.BLOCK_M)
    lanes: gl.constexpr = gl.SliceLayout(0, layout)
    operand: gl.constexpr = gl.DotOperandLayout(0, accumulator_layout(first_part(prog.WIDTH)), 2)
    dtype: gl.constexpr = prog.q_ring.buffers.dtype
    cols = (first_key + gl.arange(0, WARPGROUP_ROWS, layout=gl.SliceLayout(1, layout)))[:, None]
    ends = first_key + WARPGROUP_ROWS > span.seqlen_k  # zero keys past the end must not meet an infinite weight
    dk = zero_columns(prog.WIDTH)
    dv = zero_columns(prog.WIDTH)
    slope = load_slope(prog.score, batch, head)
    await_full(prog.q_ring, place)
    k_tile = matrix(prog.k_ring, k_slot * 2 + CONSUMER, WARPGROUP_ROWS, prog.HEAD_DIM_PAD)
    qk = product_kq(prog, k_tile, place.index)
    qk = warpgroup_mma_wait(0, deps=(qk,))
    m_block, first_head = first_group_block(begin, end, DOWN), head
    spare = prog.num_dq_blocks - 1
    if begin * prog.BLOCK_M >= span.seqlen_q:  # the one block of a tile that no row sees may lie past the end
        first_block = spare - begin
    before = dq_part(prog, head, spare, CONSUMER)
    steps = (end - begin) * prog.work.group
    gl.assume(steps > 0)
    for step in range(steps):
        k_index = k_slot + loop_variant(step)
        k_tile = matrix(prog.k_ring, k_index * 2 + CONSUMER, WARPGROUP_ROWS, prog.HEAD_DIM_PAD)
        v_tile = matrix(prog.v_ring, k_index * 2 + CONSUMER, WARPGROUP_ROWS, prog.HEAD_DIM_PAD)
        q_tile = matrix(prog.q_ring, place.index, prog.BLOCK_M, prog.HEAD_DIM_PAD)
        dout_tile = matrix(prog.dout_ring, place.index, prog.BLOCK_M, prog.HEAD_DIM_PAD)
        await_full(prog.dout_ring, place)
        dp = inner_products(split_columns(v_tile, prog.WIDTH), split_columns(dout_tile, prog.WIDTH), prog.BLOCK_M)
        rows = (m_block * prog.BLOCK_M + gl.arange(0, prog.BLOCK_M, layout=lanes))[None, :]
        masked = (m_block < full_begin) | (m_block >= full_end) | ends
        lse = prog.row_lse.index(place.index).load(lanes)[None, :]
        bits = transposed_bits(prog, place.index, m_block * prog.BLOCK_M, first_key, layout)
        weights, sensitivity = tile_weights(prog, qk, lse, rows, cols, masked, span, slope, bits)
        dp = warpgroup_mma_wait(0, deps=(dp,))
        delta = prog.row_delta.index(place.index).load(lanes)[None, :]
        ds = score_gradient(sensitivity, dp, delta, prog.dropout).to(dtype)
        old = place_before(place)
        mbarrier.wait(prog.dout_ring.empty.index(old.index), old.phase)
        matrix(prog.ds_ring, place.index * 2 + CONSUMER, WARPGROUP_ROWS, prog.BLOCK_M).store(ds)
        fence_async_shared()
        mbarrier.arrive(prog.ds_ring.full.index(place.index * 2 + CONSUMER), count=1)
        p = gl.convert_layout(value_weights(weights, prog.dropout).to(dtype), operand)
        dv = accumulate_columns(p, dout_tile, dv, prog.WIDTH)
        ds = gl.convert_layout(ds, operand)
        mbarrier.wait(prog.ds_ring.full.index(old.index * 2 + 1 - CONSUMER), old.phase)
        # in the first step this multiplies whatever lies there, and the spare block takes it
        dq = product_dq(prog, old.index, k_index, CONSUMER)
        dk = accumulate_columns(ds, q_tile, dk, prog.WIDTH)
        dv, dq, p = await_products(dv, dq, p, num_parts(prog.WIDTH))
        release(prog.dout_ring, place)
        present = dq_part(prog, head, first_block + m_block, CONSUMER)
        head, m_block = next_group_block(head, m_block, begin, end, first_head, prog.work.group, DOWN)
        if prog.score.alibi_slopes is not None:
            slope = load_slope(prog.score, batch, gl.minimum(head, prog.work.nheads - 1))
        old = place
        place = advance(place, STAGES)
        # behind the last block this multiplies whatever lies there, and nothing reads it
        await_full(prog.q_ring, place, step + 1 < steps)
        qk = product_kq(prog, k_tile, place.index)
        turn_count = reduce_in_turn(prog, before, dq, turn_count, step > 0)
        before = present
        dk, qk, ds = await_products(dk, qk, ds)
        release(prog.q_ring, old)
    return dk, dv, before, place, turn_count


@gluon.jit
def one_pass_partition(prog, CONSUMER: gl.constexpr):
    """One consumer."""
    BLOCK_N: gl.constexpr = 2 * WARPGROUP_ROWS
    t_place, k_place, place, turn_count = Place(0, 0), Place(0, 0), Place(0, 0), 0
    await_full(prog.tiles, t_place)
    while tile_field(prog.tiles, t_place.index, 0) >= 0:
        n_block, head_k, batch, begin, end = announced_tile(prog, t_place.index)
        first_key = n_block * BLOCK_N + CONSUMER * WARPGROUP_ROWS
        span = announced_span(prog, t_place.index)
        first_block = first_dq_block(batch, span.start_q, prog.num_m, prog.BLOCK_M, prog.PACKED)
        release(prog.tiles, t_place)
        t_place = advance(t_place, TILE_STAGES)
        full_begin, full_end = full_query_blocks(first_key, span, prog.window, prog.BLOCK_M)
        for half in gl.static_range(2):
            await_full(prog.k_ring, Place(k_place.index * 2 + half, k_place.phase))
        own_place = Place(k_place.index * 2 + CONSUMER, k_place.phase)
        await_full(prog.v_ring, own_place)
        dk, dv, last, place, turn_count = accumulate(
            prog, k_place.index, place, first_key, begin, end, full_begin, full_end, head_k * prog.work.group, batch,
            first_block, turn_count, span, CONSUMER,
        )  # fmt: skip
        old = place_before(place)
        mbarrier.wait(prog.ds_ring.full.index(old.index * 2 + 1 - CONSUMER), old.phase)
        dq = product_dq(prog, old.index, k_place.index, CONSUMER)
        buffer = prog.v_ring.buffers.index(own_place.index)
        dv_scale = kept_scale(prog.dropout)
        store_gradient(prog, prog.dv_desc, buffer, dv, dv_scale, first_key, span, batch, head_k)
        dq = warpgroup_mma_wait(0, deps=(dq,))
        for half in gl.static_range(2):
            release(prog.k_ring, Place(k_place.index * 2 + half, k_place.phase))
        turn_count = reduce_in_turn(prog, last, dq, turn_count, True)
        tma.store_wait(0)
        scale = gradient_scale(prog.score)
        store_gradient(prog, prog.dk_desc, buffer, dk, scale, first_key, span, batch, head_k)
        tma.store_wait(0)
        release(prog.v_ring, own_place)
        k_place = advance(k_place, prog.K_STAGES)
        await_full(prog.tiles, t_place)


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
    k_ring = allocate_ring(k_desc, HEAD_DIM_PAD, K_STAGES * 2, 2)
    v_ring = allocate_ring(v_desc, HEAD_DIM_PAD, K_STAGES * 2, 1)
    q_ring = allocate_ring(q_desc, HEAD_DIM_PAD, STAGES, 2, 2)
    dout_ring = allocate_ring(dout_desc, HEAD_DIM_PAD, STAGES, 2, 2)
    row_lse = allocate_statistics(STAGES, BLOCK_M)
    row_delta = allocate_statistics(STAGES, BLOCK_M)
    key_words = None
    if dropout.rng_state is not None:
        key_words = allocate_key_words(STAGES)
    ds_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([WARPGROUP_ROWS, BLOCK_M], q_desc.dtype)
    ds_buffers = gl.allocate_shared_memory(q_desc.dtype, [STAGES * 2, WARPGROUP_ROWS, BLOCK_M], ds_layout)
    ds_ring = Ring(ds_buffers, allocate_barriers(STAGES * 2, 1), dout_ring.empty, None)
    if ORDERED:
        tiles = allocate_tiles(4)
        turn = allocate_turns()
    else:
        tiles = allocate_tiles(2)
        turn = None
    softmax_lse = row_statistic(softmax_lse, sequences, nheads, total_q)
    delta = row_statistic(delta, sequences, nheads, total_q)
    prog = Program(
        dk_desc, dv_desc, dq_sum, turns, num_dq_blocks, num_m, softmax_lse, delta, tiles, turn, k_ring, v_ring, q_ring,
        dout_ring, ds_ring, row_lse, row_delta, key_words, sequences, work, window, score, dropout,
        HEAD_DIM_PAD, WIDTH, BLOCK_M, 2, K_STAGES, STAGES, STAGES, True, PACKED,
    )  # fmt: skip
    if ORDERED:
        gl.warp_specialize([
            (one_pass_partition, (prog, 0)),
            (one_pass_partition, (prog, 1)),
            (load_partition, (prog,)),
            (turn_partition, (prog, False)),
            (turn_partition, (prog, True)),
        ], [4, 1, 1, 1], [REGISTERS, 24, 24, 24])  # fmt: skip
    else:
        gl.warp_specialize([
            (one_pass_partition, (prog, 0)),
            (one_pass_partition, (prog, 1)),
            (load_partition, (prog,)),
        ], [4, 1], [REGISTERS, 24])  # fmt: skip
