"""Sums dq of the one-pass backward for Hopper: in any order, or tile after tile in the order of their keys.

In an ordered sum a consumer adds its part of a block's dq when that is its tile's turn. Two more warps hand the turns on:

    turn       given by                      taken by       passed on by
    block m    a warp that sees the tile     consumers      a warp that makes the sum visible and lets the next tile add to m;
               before done with m                           it frees the slot of the turn, of which there are two
"""

from typing import Any, NamedTuple

from flash_attn.kernels.hopper.backward_dq_sum import PART, first_dq_block, in_register_order
from flash_attn.kernels.hopper.backward_tiles import first_group_block, next_group_block
from flash_attn.kernels.hopper.pipeline import (
    WARPGROUP_ROWS,
    Place,
    advance,
    allocate_barriers,
    await_full,
    gl,
    gluon,
    mbarrier,
    release,
)
from flash_attn.kernels.hopper.schedule import TILE_STAGES, announced_span, announced_tile, query_blocks, tile_field

TURN_STAGES = gl.constexpr(2)  # turns given ahead


class Turn(NamedTuple):
    """Barriers of the consumers' turns to add to dq, (TURN_STAGES,) each."""

    given: Any
    taken: Any
    passed: Any


@gluon.jit
def allocate_turns():
    """Barriers of two consumers."""
    given, taken = allocate_barriers(TURN_STAGES, 1), allocate_barriers(TURN_STAGES, 2)
    return Turn(given, taken, allocate_barriers(TURN_STAGES, 1))


@gluon.jit
def reduce_part(pointer, part):
    """Add one part of dq to the workspace: one 16-byte reduction for every 4 numbers of a thread."""
    numbers = in_register_order(part)
    offsets = gl.arange(0, PART * PART, layout=numbers.type.layout)
    gl.atomic_add(pointer + offsets, numbers, sem="relaxed")


@gluon.jit
def reduce_in_turn(prog, pointer, part, count, real):
    """`reduce_part`, in an ordered sum once it is this tile's turn, but for the spare block; and the number of turns so far."""
    if prog.turn is None:
        reduce_part(pointer, part)
    else:
        slot, phase = count % TURN_STAGES, count // TURN_STAGES & 1
        mbarrier.wait(prog.turn.given.index(slot), phase, pred=real)
        reduce_part(pointer, part)
        mbarrier.arrive(prog.turn.taken.index(slot), count=1, pred=real)
        count += gl.cast(real, gl.int32)
    return count


@gluon.jit
def turn_partition(prog, PASSES: gl.constexpr):
    """Gives the consumers their turns, each when the tile of keys before has added to the block; or, with PASSES, passes them
    on when the consumers have added to it.

    turns (nheads, num_dq_blocks) holds the number of the next tile to add to a block; it only grows, so that even lengths that
    make sequences overlap leave nobody waiting. Programs draw tiles in the order of their keys and finish the earliest first:
    the tile that a program waits for is always under way.
    """
    BLOCK_N: gl.constexpr = 2 * WARPGROUP_ROWS
    t_place, place = Place(0, 0), Place(0, 0)
    await_full(prog.tiles, t_place)
    while tile_field(prog.tiles, t_place.index, 0) >= 0:
        n_block, head_k, batch, begin, end = announced_tile(prog, t_place.index)
        span = announced_span(prog, t_place.index)
        release(prog.tiles, t_place)
        t_place = advance(t_place, TILE_STAGES)
        first = n_block * BLOCK_N
        last = gl.minimum(first + BLOCK_N, span.seqlen_k) - 1
        _begin, _full_begin, _full_end, seen_end = query_blocks(first, last, span, prog.window, prog.BLOCK_M)
        before = first - BLOCK_N
        _begin, _full_begin, _full_end, before_end = query_blocks(before, first - 1, span, prog.window, prog.BLOCK_M)
        sees = seen_end > begin  # a tile that no row sees adds one block of zeros, in any order
        follows = sees & (n_block > 0)
        shared_end = gl.where(follows, before_end, begin)  # the blocks below get something from the tile before, too
        first_block = first_dq_block(batch, span.start_q, prog.num_m, prog.BLOCK_M, prog.PACKED)
        first_head = head_k * prog.work.group
        m_block, head = first_group_block(begin, end, True), first_head
        for _step in range((end - begin) * prog.work.group):
            pointer = prog.turns + gl.cast(head, gl.int64) * prog.num_dq_blocks + first_block + m_block
            if PASSES:
                mbarrier.wait(prog.turn.taken.index(place.index), place.phase)
                if sees:
                    gl.atomic_max(pointer, n_block + 1, sem="release")
                mbarrier.arrive(prog.turn.passed.index(place.index), count=1)
            else:
                mbarrier.wait(prog.turn.passed.index(place.index), place.phase ^ 1)
                waits = m_block < shared_end
                while waits:
                    waits = gl.atomic_add(pointer, 0, sem="acquire") < n_block
                mbarrier.arrive(prog.turn.given.index(place.index), count=1)
            place = advance(place, TURN_STAGES)
            head, m_block = next_group_block(head, m_block, begin, end, first_head, prog.work.group, True)
        await_full(prog.tiles, t_place)
