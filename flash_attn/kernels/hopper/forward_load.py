"""The loading warp of the Hopper forward: draws tiles, announces them, and keeps the rings of Q, K and V full."""

from flash_attn.kernels.hopper.pipeline import WARPGROUP_ROWS, advance, fill, gl, gluon
from flash_attn.kernels.hopper.schedule import (
    TILE_STAGES,
    announce_next,
    announced_span,
    announced_tile,
    clear_counter,
    draw,
    first_tile,
    tile_field,
)


@gluon.jit
def load_queries(
    q_desc, q_ring, q_slot, q_phase, m_block, span, batch, head,
    CONSUMERS: gl.constexpr, Q_STAGES: gl.constexpr, PACKED: gl.constexpr,
):  # fmt: skip
    """Copy the rows of every consumer, once its slot is free."""
    for consumer in gl.static_range(CONSUMERS):
        first = (m_block * CONSUMERS + consumer) * WARPGROUP_ROWS
        slot = q_slot * CONSUMERS + consumer
        fill(q_ring, slot, q_phase, q_desc, span.start_q, span.seqlen_q, first, batch, head, PACKED)
    return advance(q_slot, q_phase, Q_STAGES)


@gluon.jit
def load_partition(
    q_desc, k_desc, v_desc, tiles, q_ring, k_ring, v_ring, sequences, work, window,
    CONSUMERS: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr, Q_STAGES: gl.constexpr,
    DRAW_AHEAD: gl.constexpr, PACKED: gl.constexpr,
):  # fmt: skip
    """Draws tiles and keeps the rings full: in the order in which consumers read, values one block behind the keys."""
    BLOCK_M: gl.constexpr = CONSUMERS * WARPGROUP_ROWS
    t_slot, t_phase, q_slot, q_phase, k_slot, k_phase, v_slot, v_phase = 0, 1, 0, 1, 0, 1, 0, 1
    value, value_start, value_length, value_batch, value_head = -1, 0, 0, 0, 0  # the values that come next; -1: none
    announce_next(tiles, t_slot, t_phase, first_tile(work), sequences, work, window, BLOCK_M, BLOCK_N)
    while tile_field(tiles, t_slot, 0) >= 0:
        m_block, head, batch, begin, end = announced_tile(tiles, t_slot)
        span = announced_span(tiles, t_slot, work, PACKED)
        head_k = head // work.group
        if Q_STAGES == 2:
            q_slot, q_phase = load_queries(
                q_desc, q_ring, q_slot, q_phase, m_block, span, batch, head, CONSUMERS, Q_STAGES, PACKED
            )
        for n_block in range(end - 1, begin - 1, -1):
            first = n_block * BLOCK_N
            fill(k_ring, k_slot, k_phase, k_desc, span.start_k, span.seqlen_k, first, batch, head_k, PACKED)
            k_slot, k_phase = advance(k_slot, k_phase, STAGES)
            if value >= 0:
                fill(v_ring, v_slot, v_phase, v_desc, value_start, value_length, value, value_batch, value_head, PACKED)
                v_slot, v_phase = advance(v_slot, v_phase, STAGES)
            value, value_start, value_length = first, span.start_k, span.seqlen_k
            value_batch, value_head = batch, head_k
            if Q_STAGES == 1:
                if n_block == end - 1:  # out of the tile before leaves through the same buffer
                    q_slot, q_phase = load_queries(
                        q_desc, q_ring, q_slot, q_phase, m_block, span, batch, head, CONSUMERS, Q_STAGES, PACKED
                    )
            if n_block == gl.minimum(begin + DRAW_AHEAD, end - 1):
                t_slot, t_phase = advance(t_slot, t_phase, TILE_STAGES)
                announce_next(tiles, t_slot, t_phase, draw(work), sequences, work, window, BLOCK_M, BLOCK_N)
    if value >= 0:
        fill(v_ring, v_slot, v_phase, v_desc, value_start, value_length, value, value_batch, value_head, PACKED)
    clear_counter(work)
