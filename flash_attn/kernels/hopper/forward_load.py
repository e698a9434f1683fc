"""The loading warp of the Hopper forward: draws tiles, announces them, and keeps the rings of Q, K and V full."""

from flash_attn.kernels.algebra.locate import locate_keys
from flash_attn.kernels.hopper.pipeline import WARPGROUP_ROWS, Place, advance, fill, fill_queries, gl, gluon
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
def load_queries(prog, q_place, m_block, span, batch, head):
    """Copy the rows of every consumer, once its slot is free."""
    for consumer in gl.static_range(prog.CONSUMERS):
        first = (m_block * prog.CONSUMERS + consumer) * WARPGROUP_ROWS
        slot = q_place.index * prog.CONSUMERS + consumer
        fill_queries(prog, prog.q_ring, Place(slot, q_place.phase), span, first, batch, head)
    return advance(q_place, 2 if prog.OVERLAP else 1)


@gluon.jit
def place_keys(prog, batch, span, first):
    """Where the block of keys `first`, first + 1, ... lies: (first token of a run, its length, the block's place in that run).

    The run is the sequence; or what the block has of a page, none where the table names no page.
    """
    pages = prog.pages
    if pages.block_table is None:
        start, length = span.start_k, span.seqlen_k
    else:
        page, slot, valid = locate_keys(pages, batch, span.start_k + first, first < span.seqlen_k)
        start = gl.where(valid, page * pages.page_size + slot, 0)
        length = gl.where(valid, gl.minimum(span.seqlen_k - first, prog.BLOCK_N), 0)
        first = 0
    return start, length, first


@gluon.jit
def load_partition(prog):
    """Draws tiles and keeps the rings full: in the order in which consumers read, values one block behind the keys."""
    BLOCK_M: gl.constexpr = prog.CONSUMERS * WARPGROUP_ROWS
    t_place, q_place, k_place, v_place = Place(0, 1), Place(0, 1), Place(0, 1), Place(0, 1)
    value, value_start, value_length, value_batch, value_head = -1, 0, 0, 0, 0  # the values that come next; -1: none
    announce_next(prog, t_place, first_tile(prog.work), BLOCK_M, prog.BLOCK_N)
    while tile_field(prog.tiles, t_place.index, 0) >= 0:
        m_block, head, batch, begin, end = announced_tile(prog, t_place.index)
        span = announced_span(prog, t_place.index)
        head_k = head // prog.work.group
        if prog.OVERLAP:
            q_place = load_queries(prog, q_place, m_block, span, batch, head)
        for n_block in range(end - 1, begin - 1, -1):
            start, length, first = place_keys(prog, batch, span, n_block * prog.BLOCK_N)
            fill(prog, prog.k_ring, k_place, start, length, first, batch, head_k)
            k_place = advance(k_place, prog.STAGES)
            if value >= 0:
                fill(prog, prog.v_ring, v_place, value_start, value_length, value, value_batch, value_head)
                v_place = advance(v_place, prog.STAGES)
            value, value_start, value_length, value_batch, value_head = first, start, length, batch, head_k
            if not prog.OVERLAP:
                if n_block == end - 1:  # out of the tile before leaves through the same buffer
                    q_place = load_queries(prog, q_place, m_block, span, batch, head)
            if n_block == gl.minimum(begin + prog.DRAW_AHEAD, end - 1):
                t_place = advance(t_place, TILE_STAGES)
                announce_next(prog, t_place, draw(prog.work), BLOCK_M, prog.BLOCK_N)
    if value >= 0:
        fill(prog, prog.v_ring, v_place, value_start, value_length, value, value_batch, value_head)
    clear_counter(prog.work)
