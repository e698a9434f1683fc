"""Which tiles a persistent program works on: the loading warp draws their numbers, decodes them and announces them.

A tile is CONSUMERS * 64 query rows of one head, and the loop over it takes key blocks; or, with `by_keys`, CONSUMERS * 64
keys of one key head, and the loop takes query blocks. All partitions read what was announced from shared memory, so that
a tile's divisions and the sequences' lengths cost time once, and no consumer's.
"""

from typing import Any, NamedTuple

from flash_attn.kernels.algebra.interval import block_bounds, key_blocks, query_interval
from flash_attn.kernels.algebra.span import Span, load_span
from flash_attn.kernels.hopper.pipeline import WARPGROUP_ROWS, Ring, allocate_barriers, gl, gluon, mbarrier

SIZES = [
    "num_tiles", "num_blocks", "heads_together", "seqlen_q", "seqlen_k", "total_q", "total_k", "window_left", "window_right",
    "nheads", "group",
]  # fmt: skip

TILE_FIELDS = gl.constexpr(9)
TILE_STAGES = gl.constexpr(4)  # the tile before, the present one, the following one, and one to write


class Work(NamedTuple):
    """The launch's tiles and the sizes they come from."""

    counter: Any  # (2,) int32, zero: tiles drawn beyond the first of each program, programs that are done
    num_tiles: Any
    num_blocks: Any  # tiles of the longest sequence
    heads_together: Any  # heads whose tiles are drawn in turn, so that what they loop over stays in the L2 cache
    nheads: Any
    group: Any
    seqlen_q: Any
    seqlen_k: Any
    total_q: Any
    total_k: Any
    by_keys: Any = None  # 1 when tiles are key blocks
    in_order: Any = None  # 1 when a tile may wait for one with a lower number
    ahead: Any = None  # 1 when a program draws its next tile at the beginning of the present one
    paged: Any = None  # 1 when a block table says where keys lie


@gluon.jit
def allocate_tiles(CONSUMERS: gl.constexpr):
    """The ring of announced tiles."""
    layout: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    numbers = gl.allocate_shared_memory(gl.int32, [TILE_STAGES * TILE_FIELDS, 1], layout)
    return Ring(numbers, allocate_barriers(TILE_STAGES, 1), allocate_barriers(TILE_STAGES, CONSUMERS), None)


@gluon.jit
def first_tile(work):
    """The number that a program starts with: its own, or where tiles wait for each other one that it draws.

    A program that has not started, because others fill the GPU, then holds no tile that a running one could wait for.
    """
    if work.in_order is None:
        index = gl.program_id(0)
    else:
        index = draw(work)
    return index


@gluon.jit
def draw(work):
    """The next number from the counter."""
    index = gl.atomic_add(work.counter, 1)
    if work.in_order is None:
        index += gl.num_programs(0)
    return index


@gluon.jit
def clear_counter(work):
    """Leave the counter as the next launch wants it, once nobody draws any more."""
    done = gl.atomic_add(work.counter + 1, 1)
    if done == gl.num_programs(0) - 1:
        gl.store(work.counter, 0)
        gl.store(work.counter + 1, 0)


@gluon.jit
def turn_at(index, work):
    """(first head, heads, tiles drawn before) of the turn of a tile.

    The first turn of query tiles takes what no full turn has, so that the last one ends with short tiles everywhere. Key tiles
    have even turns, see `launch.hopper.even_share`: with turns like those the backward at head dim 64 was 4 to 6 % slower at 4k
    and 16k causal tokens (H200, 2026-12-01).
    """
    heads_together, num_heads = work.heads_together, work.num_tiles // work.num_blocks
    tiles_together = heads_together * work.num_blocks
    if work.by_keys is not None:
        first = index // tiles_together * heads_together
        together = gl.minimum(heads_together, num_heads - first)
        rest = index % tiles_together
    else:
        first_turn = (num_heads - 1) % heads_together + 1
        rest = index - first_turn * work.num_blocks
        if rest < 0:
            first, together = 0, first_turn
            rest = index
        else:
            turn = rest // tiles_together
            rest -= turn * tiles_together
            first, together = first_turn + turn * heads_together, heads_together
    return first, together, rest


@gluon.jit
def tile_at(index, work, window):
    """(block, head, batch) of a tile, the longest first: causal rows see more keys the later they are, and causal keys are
    seen by more rows the earlier they are."""
    first, together, rest = turn_at(index, work)
    block, batch_head = rest // together, first + rest % together
    heads = work.nheads
    if work.by_keys is not None:
        heads = work.nheads // work.group
    elif window.right is not None:
        block = work.num_blocks - 1 - block
    return block, batch_head % heads, batch_head // heads


@gluon.jit
def tile_span(batch, sequences, work, PACKED: gl.constexpr):
    """One sequence, as the operands' tensor maps have it: in those of packed tokens the sequences of a cache, and its queries,
    begin `total_k` and `total_q` apart."""
    PAGED: gl.constexpr = work.paged is not None
    span = load_span(sequences, PAGED, batch, work.seqlen_q, work.seqlen_k, work.total_q, work.total_k)
    if PACKED and sequences.cu_seqlens_q is None:
        start_k = span.start_k
        if not PAGED:
            start_k += batch * work.total_k
        span = Span(span.start_q + batch * work.total_q, start_k, span.seqlen_q, span.seqlen_k)
    return span


@gluon.jit
def query_blocks(first_key, last_key, span, window, BLOCK: gl.constexpr):
    """Query blocks that see keys first_key .. last_key: [begin, full_begin, full_end, end).

    A block that crosses the end of the sequence is full, too: its further rows have weights 0 from their softmax_lse.
    """
    first_lo, first_hi = query_interval(first_key, span, window)
    last_lo, last_hi = query_interval(last_key, span, window)
    begin, full_begin, full_end, end = block_bounds(first_lo, last_lo, first_hi, last_hi, BLOCK)
    if window.left is None:
        full_end = end
    if window.right is None:
        full_begin = begin
    return begin, full_begin, full_end, end


@gluon.jit
def consumer_key_blocks(first_row, span, window, BLOCK: gl.constexpr):
    """Key blocks that some row of one consumer sees and, of those, which every row sees whole; see `key_blocks`."""
    last_row = gl.minimum(first_row + WARPGROUP_ROWS, gl.maximum(span.seqlen_q, first_row + 1)) - 1
    return key_blocks(first_row, last_row, span, window, BLOCK)


@gluon.jit
def full_key_blocks(first_row, span, window, BLOCK: gl.constexpr):
    """Key blocks [full_begin, full_end) that every row of one consumer sees whole."""
    _begin, full_begin, full_end, _end = consumer_key_blocks(first_row, span, window, BLOCK)
    return full_begin, full_end


@gluon.jit
def full_query_blocks(first_key, span, window, BLOCK: gl.constexpr):
    """Query blocks [full_begin, full_end) that see every key of one consumer."""
    last_key = gl.minimum(first_key + WARPGROUP_ROWS, gl.maximum(span.seqlen_k, first_key + 1)) - 1
    _begin, full_begin, full_end, _end = query_blocks(first_key, last_key, span, window, BLOCK)
    return full_begin, full_end


@gluon.jit
def tile_blocks(block, span, work, window, TILE: gl.constexpr, STEP: gl.constexpr):
    """Blocks [begin, end) of STEP keys, or queries, for a tile of TILE queries, or keys.

    There is at least one, so that every tile runs through the same pipeline.
    """
    first = block * TILE
    if work.by_keys is not None:
        last = gl.minimum(first + TILE, span.seqlen_k) - 1
        begin, _full_begin, _full_end, end = query_blocks(first, last, span, window, STEP)
    else:
        last = gl.minimum(first + TILE, span.seqlen_q) - 1
        begin, _full_begin, _full_end, end = key_blocks(first, last, span, window, STEP)
    return begin, gl.maximum(end, begin + 1)


@gluon.jit
def next_tile(index, sequences, work, window, PACKED: gl.constexpr, TILE: gl.constexpr):
    """(number, block, head, batch, span) of the first tile from `index` on that has rows, drawing from the counter; block -1
    when there is none."""
    if sequences.cu_seqlens_q is None:
        block, head, batch = tile_at(gl.minimum(index, work.num_tiles - 1), work, window)
        span = tile_span(batch, sequences, work, PACKED)
    else:
        block, head, batch, span = index, index, index, Span(index, index, index, index)
        searching = index >= 0
        while searching:
            block, head, batch = tile_at(gl.minimum(index, work.num_tiles - 1), work, window)
            span = tile_span(batch, sequences, work, PACKED)
            length = span.seqlen_q if work.by_keys is None else span.seqlen_k
            searching = (index < work.num_tiles) & (block * TILE >= length)
            if searching:
                index = draw(work)
    return index, gl.where(index < work.num_tiles, block, -1), head, batch, span


@gluon.jit
def announce_next(prog, place, index, TILE: gl.constexpr, STEP: gl.constexpr):
    """Hand the first tile from `index` on that has rows to all partitions, decoded, block -1 for none; returns its number."""
    tiles, work, window = prog.tiles, prog.work, prog.window
    index, block, head, batch, span = next_tile(index, prog.sequences, work, window, prog.PACKED, TILE)
    begin, end = tile_blocks(block, span, work, window, TILE, STEP)
    mbarrier.wait(tiles.empty.index(place.index), place.phase)
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    values = (block, head, batch, begin, end, span.start_q, span.start_k, span.seqlen_q, span.seqlen_k)
    for field in gl.static_range(TILE_FIELDS):
        tiles.buffers.index(place.index * TILE_FIELDS + field).store(gl.full([1], values[field], gl.int32, layout))
    mbarrier.arrive(tiles.full.index(place.index), count=1)
    return index


@gluon.jit
def tile_field(tiles, slot, FIELD: gl.constexpr):
    """One number of an announced tile."""
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [gl.num_warps()], [0])
    return gl.max(tiles.buffers.index(slot * TILE_FIELDS + FIELD).load(layout), 0)


@gluon.jit
def announced_tile(prog, slot):
    """(block, head, batch, begin, end) of an announced tile."""
    tiles = prog.tiles
    block, head, batch = tile_field(tiles, slot, 0), tile_field(tiles, slot, 1), tile_field(tiles, slot, 2)
    return block, head, batch, tile_field(tiles, slot, 3), tile_field(tiles, slot, 4)


@gluon.jit
def announced_span(prog, slot):
    """The span of an announced tile."""
    tiles = prog.tiles
    if prog.PACKED:
        span = Span(
            tile_field(tiles, slot, 5),
            tile_field(tiles, slot, 6),
            tile_field(tiles, slot, 7),
            tile_field(tiles, slot, 8),
        )
    else:
        span = Span(0, 0, prog.work.seqlen_q, prog.work.seqlen_k)
    return span
