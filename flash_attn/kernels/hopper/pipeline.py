"""What the Hopper kernels share: rings of tiles in shared memory, layouts, turns; and all that Gluon's releases change.

A ring is a few buffers in shared memory with two barriers each: `full` (its bytes have landed) and `empty` (every reader is
done). Producer and readers keep (index, phase) of their place in it; the phase flips when the index wraps.
"""

from typing import Any, NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.language.core import _aggregate  # gluon.aggregate in later releases

__all__ = ["fence_async_shared", "gl", "gluon", "mbarrier", "tma", "warpgroup_mma", "warpgroup_mma_wait"]

# copies through a tensor map, renamed after Triton 3.7
start_load = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared
start_store = tma.async_store if hasattr(tma, "async_store") else tma.async_copy_shared_to_global
_memory = gl.shared_memory_descriptor
reinterpret = _memory.reinterpret if hasattr(_memory, "reinterpret") else _memory._reinterpret  # renamed then, too

WARPGROUP_ROWS = gl.constexpr(64)  # rows of one warpgroup's tensor-core product
RAGGED_ORIGIN = gl.constexpr(1 << 30)


def aggregate(fields: type) -> type:
    """Makes a class of annotated fields one argument of kernels' functions, built from their values in order.

    Like a NamedTuple, but its constants stay known at compile time, and it is passed on whole.
    """

    def initialise(self: Any, *values: Any) -> None:
        for name, value in zip(fields.__annotations__, values, strict=True):
            setattr(self, name, gl.constexpr(None) if value is None else value)

    initialise.__triton_builtin__ = True  # type: ignore[attr-defined]  # no source of a kernel's
    fields.__init__ = initialise  # type: ignore[misc]
    fields.__annotations__ = dict.fromkeys(fields.__annotations__, object)
    return _aggregate(fields)


@aggregate
class Ring:
    """Buffers of one kind and their barriers, (depth, ...) each; and the tensor map that fills them, if one does."""

    buffers: Any
    full: Any
    empty: Any
    descriptor: Any


@gluon.jit
def allocate_ring(
    descriptor, COLUMNS: gl.constexpr, DEPTH: gl.constexpr, READERS: gl.constexpr, WRITERS: gl.constexpr = 1,
    ROWS: gl.constexpr = None,
):  # fmt: skip
    """A ring of DEPTH tiles for a tensor map, each filled by WRITERS arrivals and released by READERS."""
    buffers = allocate_buffers(descriptor, COLUMNS, DEPTH, ROWS)
    return Ring(buffers, allocate_barriers(DEPTH, WRITERS), allocate_barriers(DEPTH, READERS), descriptor)


@gluon.jit
def allocate_buffers(descriptor, COLUMNS: gl.constexpr, DEPTH: gl.constexpr, ROWS: gl.constexpr = None):
    """Room in shared memory for DEPTH tiles that are copied by a tensor map; ROWS where one copy has fewer than a tile."""
    SHAPE: gl.constexpr = _tile_shape(descriptor.block_type.shape, ROWS, COLUMNS)
    return gl.allocate_shared_memory(descriptor.dtype, [DEPTH] + SHAPE, descriptor.layout)


@gluon.constexpr_function
def _tile_shape(box, rows, columns):
    """Of (1, ..., rows, 1, columns) boxes."""
    return [*box[:-3], box[-3] if rows is None else rows, 1, columns]


@gluon.jit
def allocate_barriers(COUNT: gl.constexpr, ARRIVALS: gl.constexpr):
    """COUNT barriers in shared memory that each wait for ARRIVALS."""
    barriers = gl.allocate_shared_memory(gl.int64, [COUNT, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(COUNT):
        mbarrier.init(barriers.index(i), count=ARRIVALS)
    return barriers


class Place(NamedTuple):
    """Where a producer or a reader is in a ring."""

    index: Any
    phase: Any


@gluon.jit
def await_full(ring, place, pred=True):
    """Wait until what a slot holds has landed."""
    mbarrier.wait(ring.full.index(place.index), place.phase, pred=pred)


@gluon.jit
def release(ring, place, pred=True):
    """Say that this reader is done with a slot."""
    mbarrier.arrive(ring.empty.index(place.index), count=1, pred=pred)


@gluon.jit
def advance(place, DEPTH: gl.constexpr):
    """The next place in a ring."""
    index, phase = place.index + 1, place.phase
    if index == DEPTH:
        index = 0
        phase ^= 1
    return Place(index, phase)


@gluon.jit
def row_coordinates(span_start, seqlen, first, batch, head, column, PACKED: gl.constexpr):
    """Coordinates of rows first, first + 1, ... of one sequence, from a column on, in the tensor map of an operand.

    Dense tensors have a map of (batch, sequence, head, dim). A packed batch has a ragged one of five dimensions, in which
    the end of the sequence coincides with the end of the map: rows past it read as zero and are not written.
    """
    if PACKED:
        coordinates = [RAGGED_ORIGIN, span_start + seqlen, RAGGED_ORIGIN - seqlen + first, head, column]
    else:
        coordinates = [batch, first, head, column]
    return coordinates


@gluon.constexpr_function
def is_ragged(descriptor):
    """Whether a tensor map is one of packed tokens, see `row_coordinates`."""
    return len(descriptor.block_type.shape) == 5


@gluon.constexpr_function
def num_copies(descriptor, width):
    """Copies of a tile: one, or one for each box of a tensor map that has some of the tile's first `width` columns."""
    columns = descriptor.block_type.shape[-1]
    return (width + columns - 1) // columns


@gluon.constexpr_function
def num_boxes(descriptor, shape):
    """Boxes of a tensor map that make up a tile of that shape, one above the other and side by side."""
    box = descriptor.block_type.shape
    return (shape[-3] // box[-3]) * (shape[-1] // box[-1])


@gluon.jit
def copied_part(buffer, descriptor, copy):
    """The part of a tile that one of its copies fills or reads. A swizzled tile lies in shared memory column by column of 128
    bytes and in each row by row, so that parts of so many columns are tiles themselves."""
    SHAPE: gl.constexpr = descriptor.block_type.shape
    BOXES: gl.constexpr = num_boxes(descriptor, buffer.shape)
    if BOXES > 1:
        buffer = reinterpret(buffer, buffer.dtype, [BOXES] + SHAPE, descriptor.layout).index(copy)
    return buffer


@gluon.constexpr_function
def num_parts_of_rows(ring):
    """Parts of a tile of a ring that copies fill one above the other."""
    return ring.buffers.shape[-3] // ring.descriptor.block_type.shape[-3]


@gluon.jit
def expect_tile(prog, ring, place):
    """Wait until a slot is free, and have its barrier wait for a tile."""
    descriptor = ring.descriptor
    COPIES: gl.constexpr = num_copies(descriptor, prog.WIDTH) * num_parts_of_rows(ring)
    mbarrier.wait(ring.empty.index(place.index), place.phase)
    mbarrier.expect(ring.full.index(place.index), COPIES * descriptor.block_type.nbytes)


@gluon.jit
def copy_rows(prog, ring, slot, part, span_start, seqlen, first, batch, head):
    """Start the copy of rows first, first + 1, ... of a sequence into a part of a slot's rows; rows outside are zero."""
    descriptor, buffer = ring.descriptor, ring.buffers.index(slot)
    for column in range(num_copies(descriptor, prog.WIDTH)):
        first_column = column * descriptor.block_type.shape[-1]
        coordinates = row_coordinates(span_start, seqlen, first, batch, head, first_column, prog.PACKED)
        copied = copied_part(buffer, descriptor, column * num_parts_of_rows(ring) + part)
        start_load(descriptor, coordinates, ring.full.index(slot), copied)


@gluon.jit
def fill(prog, ring, place, span_start, seqlen, first, batch, head):
    """Start the copy of a tile of rows first, first + 1, ... of a sequence into a slot, once that is free."""
    expect_tile(prog, ring, place)
    copy_rows(prog, ring, place.index, 0, span_start, seqlen, first, batch, head)


@gluon.jit
def fill_queries(prog, ring, place, span, first, batch, head):
    """`fill` with rows of q, or of what is shaped like it."""
    fill(prog, ring, place, span.start_q, span.seqlen_q, first, batch, head)


@gluon.jit
def fill_keys(prog, ring, place, span, first, batch, head_k):
    """`fill` with rows of k, or of what is shaped like it."""
    fill(prog, ring, place, span.start_k, span.seqlen_k, first, batch, head_k)


@gluon.jit
def store_tile(prog, descriptor, buffer, span_start, seqlen, first, batch, head):
    """Start the copy of a tile in shared memory to rows first, first + 1, ... of a sequence; rows outside are left out."""
    for copy in range(num_copies(descriptor, prog.WIDTH)):
        column = copy * descriptor.block_type.shape[-1]
        coordinates = row_coordinates(span_start, seqlen, first, batch, head, column, prog.PACKED)
        start_store(descriptor, coordinates, copied_part(buffer, descriptor, copy))


@gluon.jit
def matrix(ring, slot, ROWS: gl.constexpr, COLUMNS: gl.constexpr):
    """A slot of a ring as an operand of a product."""
    return ring.buffers.index(slot).reshape([ROWS, COLUMNS])


@gluon.jit
def loop_variant(step):
    """0, which the compiler cannot know: added to an index, it keeps the tensor-core descriptors of loop-invariant operands
    from being computed ahead of the loop, where each would hold two registers."""
    return step >> 30


@gluon.jit
def product(left, right, COLUMNS: gl.constexpr):
    """Issue left @ right, (64, COLUMNS)."""
    zeros = gl.zeros((WARPGROUP_ROWS, COLUMNS), gl.float32, accumulator_layout(COLUMNS))
    return warpgroup_mma(left, right, zeros, use_acc=False, is_async=True)


@gluon.constexpr_function
def accumulator_layout(columns):
    """Registers of one warpgroup's (64, columns) product: a thread holds rows r and r + 8, pairs of columns."""
    return gl.NVMMADistributedLayout([3, 0], [4, 1], [16, columns, 16])


@gluon.constexpr_function
def partial_layout():
    """(64, 8) partial row sums in the registers of the accumulator's threads: 4 lanes of 2 columns per row."""
    return gl.DistributedLinearLayout(
        reg_bases=[[0, 1], [8, 0]],
        lane_bases=[[0, 2], [0, 4], [1, 0], [2, 0], [4, 0]],
        warp_bases=[[16, 0], [32, 0]],
        block_bases=[],
        shape=[64, 8],
    )


@gluon.jit
def along_rows(x, layout: gl.constexpr):
    """A vector with one value a row as a column that broadcasts over a tile of the given layout; moves no data."""
    return gl.convert_layout(x, gl.SliceLayout(1, layout))[:, None]


@gluon.constexpr_function
def _named_barrier(operation, threads):
    return f"{operation} $1, {threads}; mov.u32 $0, 0;"


@gluon.jit
def await_turn(barrier, THREADS: gl.constexpr):
    """Wait at a hardware barrier until all of its THREADS have arrived or wait. Ids 8 to 15 are not used by Triton."""
    gl.inline_asm_elementwise(
        _named_barrier("bar.sync", THREADS), "=r,r,~{memory}", [barrier], dtype=gl.int32, is_pure=False, pack=1
    )


@gluon.jit
def give_turn(barrier, THREADS: gl.constexpr):
    """Arrive at a hardware barrier without waiting."""
    gl.inline_asm_elementwise(
        _named_barrier("bar.arrive", THREADS), "=r,r,~{memory}", [barrier], dtype=gl.int32, is_pure=False, pack=1
    )


FIRST_TURN = gl.constexpr(8)  # barrier of the first consumer's turn on the tensor cores
