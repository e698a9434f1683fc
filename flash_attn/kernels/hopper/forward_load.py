"""The loading warp of the Hopper forward: draws tiles, announces them, and keeps the rings of Q, K and V full."""

from flash_attn.kernels.algebra.locate import locate_keys
from flash_attn.kernels.algebra.span import Span
from flash_attn.kernels.hopper.pipeline import (
    WARPGROUP_ROWS,
    Place,
    advance,
    copy_rows,
    expect_tile,
    fill_keys,
    fill_queries,
    gl,
    gluon,
    num_parts_of_rows,
)
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
def locate_rows(prog, batch, span, first, ROWS: gl.constexpr):
    """(token that key `first` is, how many of it and the next ROWS - 1 there are), all in one page; none where the table names
    no page."""
    pages = prog.pages
    page, slot, valid = locate_keys(pages, batch, span.start_k + first, first < span.seqlen_k)
    start = gl.where(valid, page * pages.page_size + slot, 0)
    return start, gl.where(valid, gl.minimum(span.seqlen_k - first, ROWS), 0)


@gluon.jit
def fill_keys_or_pages(prog, ring, place, span, first, batch, head):
    """`fill_keys`, from pages where there are some: a page's number is read before what it is needed for."""
    if prog.pages.block_table is None:
        fill_keys(prog, ring, place, span, first, batch, head)
    else:
        ROWS: gl.constexpr = ring.descriptor.block_type.shape[-3]
        PARTS: gl.constexpr = num_parts_of_rows(ring)
        start, length = locate_rows(prog, batch, span, first, ROWS)
        expect_tile(prog, ring, place)
        for part in range(PARTS):
            this_start, this_length = start, length
            if PARTS > 1:
                start, length = locate_rows(prog, batch, span, first + (part + 1) * ROWS, ROWS)
            copy_rows(prog, ring, place.index, part, this_start, this_length, 0, batch, head)


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
            first = n_block * prog.BLOCK_N
            fill_keys_or_pages(prog, prog.k_ring, k_place, span, first, batch, head_k)
            k_place = advance(k_place, prog.STAGES)
            if value >= 0:
                value_span = Span(0, value_start, 0, value_length)
                fill_keys_or_pages(prog, prog.v_ring, v_place, value_span, value, value_batch, value_head)
                v_place = advance(v_place, prog.STAGES)
            value, value_start, value_length = first, span.start_k, span.seqlen_k
            value_batch, value_head = batch, head_k
            if not prog.OVERLAP:
                if n_block == end - 1:  # out of the tile before leaves through the same buffer
                    q_place = load_queries(prog, q_place, m_block, span, batch, head)
            if n_block == gl.minimum(begin + prog.DRAW_AHEAD, end - 1):
                t_place = advance(t_place, TILE_STAGES)
                announce_next(prog, t_place, draw(prog.work), BLOCK_M, prog.BLOCK_N)
    if value >= 0:
        value_span = Span(0, value_start, 0, value_length)
        fill_keys_or_pages(prog, prog.v_ring, v_place, value_span, value, value_batch, value_head)
    clear_counter(prog.work)
