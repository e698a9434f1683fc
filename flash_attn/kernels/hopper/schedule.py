"""Which tiles a persistent program works on: the loading warp draws their numbers, decodes them and announces them.

A tile is CONSUMERS * 64 query rows of one head. Consumers read what was announced from shared memory, so that no consumer
spends time on divisions or on the sequences' lengths.
"""

from typing import Any, NamedTuple

from flash_attn.kernels.algebra.interval import key_blocks
from flash_attn.kernels.algebra.span import Span, load_span
from flash_attn.kernels.hopper.pipeline import gl, gluon, mbarrier

TILE_FIELDS = gl.constexpr(8)
TILE_STAGES = gl.constexpr(4)  # the tile before, the present one, the following one, and one to write


class Work(NamedTuple):
    """The launch's tiles and the sizes they come from."""

    counter: Any  # (2,) int32, zero: tiles drawn beyond the first of each program, programs that are done
    num_tiles: Any
    num_m: Any  # query blocks of the longest sequence
    heads_together: Any  # heads whose tiles are drawn in turn, so that their keys stay in the L2 cache
    nheads: Any
    group: Any
    seqlen_q: Any
    seqlen_k: Any
    total_q: Any
    total_k: Any


@gluon.jit
def tile_at(index, work, window):
    """(query block, head, batch) of a tile; causal rows see more keys the later they are: longest first."""
    tiles_together = work.heads_together * work.num_m
    rest = index % tiles_together
    m_block = rest // work.heads_together
    batch_head = index // tiles_together * work.heads_together + rest % work.heads_together
    if window.right is not None:
        m_block = work.num_m - 1 - m_block
    return m_block, batch_head % work.nheads, batch_head // work.nheads


@gluon.jit
def tile_span(batch, sequences, work):
    return load_span(sequences, False, batch, work.seqlen_q, work.seqlen_k, work.total_q, work.total_k)


@gluon.jit
def tile_blocks(m_block, span, window, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr):
    """Key blocks [begin, end) of a tile; at least one, so that every tile runs through the same pipeline."""
    first = m_block * BLOCK_M
    last = gl.minimum(first + BLOCK_M, span.seqlen_q) - 1
    begin, _full_begin, _full_end, end = key_blocks(first, last, span, window, BLOCK_N)
    return begin, gl.maximum(end, begin + 1)


@gluon.jit
def next_tile(index, sequences, work, window, BLOCK_M: gl.constexpr):
    """The first tile from `index` on that has rows, drawing from the counter; num_tiles or more when there is none."""
    if sequences.cu_seqlens_q is not None:
        empty = index < work.num_tiles
        while empty:
            m_block, _head, batch = tile_at(index, work, window)
            span = tile_span(batch, sequences, work)
            empty = m_block * BLOCK_M >= span.seqlen_q
            if empty:
                index = gl.num_programs(0) + gl.atomic_add(work.counter, 1)
                empty = index < work.num_tiles
    return index


@gluon.jit
def announce(tiles, slot, phase, index, sequences, work, window, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr):
    """Hand a tile to the consumers, decoded; query block -1 says that there is none any more."""
    m_block, head, batch = tile_at(gl.minimum(index, work.num_tiles - 1), work, window)
    span = tile_span(batch, sequences, work)
    begin, end = tile_blocks(m_block, span, window, BLOCK_M, BLOCK_N)
    m_block = gl.where(index < work.num_tiles, m_block, -1)
    mbarrier.wait(tiles.empty.index(slot), phase)
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    values = (m_block, head, batch, begin, end, span.start_q, span.seqlen_q, span.seqlen_k)
    for field in gl.static_range(TILE_FIELDS):
        tiles.buffers.index(slot * TILE_FIELDS + field).store(gl.full([1], values[field], gl.int32, layout))
    mbarrier.arrive(tiles.full.index(slot), count=1)


@gluon.jit
def tile_field(tiles, slot, FIELD: gl.constexpr):
    """One number of an announced tile."""
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [gl.num_warps()], [0])
    return gl.max(tiles.buffers.index(slot * TILE_FIELDS + FIELD).load(layout), 0)


@gluon.jit
def announced_span(tiles, slot, work, PACKED: gl.constexpr):
    """The span of an announced tile; consumers need no start_k."""
    if PACKED:
        span = Span(tile_field(tiles, slot, 5), 0, tile_field(tiles, slot, 6), tile_field(tiles, slot, 7))
    else:
        span = Span(0, 0, work.seqlen_q, work.seqlen_k)
    return span
