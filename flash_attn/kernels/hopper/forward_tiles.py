"""What a consumer of the Hopper forward does to a tile: scores, mask, one step of the online softmax; and its results.

`kernels/algebra` has the formulas. Two are scheduled for this kernel: the sums of a row stay in the parts that its threads
hold, and ALiBi is split into what a score needs and what its row's maximum can carry. tests/algebra/test_softmax.py and
tests/hopper hold both forms together.
"""

from flash_attn.kernels.algebra.dropout import drop, kept_scale, tile_bits
from flash_attn.kernels.algebra.interval import hide_before, hide_behind, key_interval
from flash_attn.kernels.algebra.locate import row_base, row_statistic
from flash_attn.kernels.algebra.score import key_distance, score_forward
from flash_attn.kernels.algebra.softmax import softmax_finish, softmax_pivot, softmax_rescale, softmax_weights
from flash_attn.kernels.hopper.columns import scale_columns, store_columns
from flash_attn.kernels.hopper.pipeline import (
    WARPGROUP_ROWS,
    along_rows,
    fence_async_shared,
    gl,
    gluon,
    partial_layout,
    store_tile,
)


@gluon.jit
def row_maximum(prog, tile, offset):
    """Maximum of each row: over a thread's own columns first, then between the four lanes of a row."""
    layout: gl.constexpr = gl.SliceLayout(1, tile.type.layout)
    partial = gl.max(tile.reshape(WARPGROUP_ROWS, prog.BLOCK_N // 8, 8), 1)
    if prog.score.one_sided is not None:
        partial += offset
    return gl.convert_layout(gl.max(partial, 1), layout)


@gluon.jit
def partial_row_sums(weights, BLOCK_N: gl.constexpr):
    """(64, 8) sums over a thread's own columns; the lanes of a row are added once, at the end of a tile."""
    return gl.convert_layout(gl.sum(weights.reshape(WARPGROUP_ROWS, BLOCK_N // 8, 8), 1), partial_layout())


@gluon.jit
def softmax_step(prog, row_max, row_sums, tile, offset, unit):
    """algebra.softmax.softmax_step, or softmax_step_bounded, with the row sums left in parts, which saves their shuffles."""
    if prog.score.bounded is not None:
        weights, rescale = softmax_weights(tile, unit, 0.0), 1.0
        row_sums = row_sums + partial_row_sums(weights, prog.BLOCK_N)
    else:
        new_max = gl.maximum(row_max, row_maximum(prog, tile, offset))
        pivot = softmax_pivot(new_max, unit)
        weights = softmax_weights(tile, unit, tile_pivot(prog, pivot, offset, unit, tile))
        rescale = softmax_rescale(row_max, unit, pivot)
        row_sums = row_sums * along_rows(rescale, partial_layout()) + partial_row_sums(weights, prog.BLOCK_N)
        row_max = new_max
    return weights, rescale, row_max, row_sums


@gluon.jit
def tile_distance(rows, first_col, span, groups_layout: gl.constexpr, BLOCK_N: gl.constexpr):
    """algebra.score.key_distance in two parts: (64, 8) of the first 8 keys, less (1, BLOCK_N / 8, 1) of each group of 8.

    Integers become floats at the speed of exponentials, so this converts two a row; what a group adds is constant.
    """
    row_layout: gl.constexpr = gl.SliceLayout(1, groups_layout)
    within = first_col + gl.arange(0, 8, layout=gl.SliceLayout(0, row_layout))
    rows = gl.convert_layout(rows, gl.SliceLayout(1, row_layout))
    nearest = key_distance(rows[:, None], within[None, :], span)
    groups = gl.arange(0, BLOCK_N // 8, layout=gl.SliceLayout(0, gl.SliceLayout(2, groups_layout))) * 8
    return nearest, gl.expand_dims(groups[None, :], 2).to(gl.float32)


@gluon.jit
def tile_pivot(prog, pivot, offset, unit, tile):
    """What the exponents of a tile that lacks `offset` are taken against."""
    layout: gl.constexpr = tile.type.layout
    if prog.score.one_sided is None:
        result = pivot[:, None]
    else:
        groups_layout: gl.constexpr = tile.reshape(WARPGROUP_ROWS, prog.BLOCK_N // 8, 8).type.layout
        row_layout: gl.constexpr = gl.SliceLayout(1, groups_layout)
        pivot = gl.convert_layout(pivot, gl.SliceLayout(1, row_layout))[:, None] - offset * unit
        spread = gl.expand_dims(pivot, 1) + gl.zeros((WARPGROUP_ROWS, prog.BLOCK_N // 8, 8), gl.float32, groups_layout)
        result = gl.convert_layout(spread.reshape(WARPGROUP_ROWS, prog.BLOCK_N), layout)
    return result


@gluon.jit
def score_block(prog, tile, first_row, n_block, full_begin, full_end, span, slope):
    """(scores of one block of dot products, -inf where a row may not see a key; what they lack, (64, 8) for each column of a
    group of 8, or 0).

    ALiBi's share of a score is one of the group of 8 keys and one of the row and the place in the group, unless a distance
    may be negative. The second enters the maximum and the pivot of a row instead of every score.
    """
    layout: gl.constexpr = tile.type.layout
    rows = first_row + gl.arange(0, WARPGROUP_ROWS, layout=gl.SliceLayout(1, layout))
    first_col = n_block * prog.BLOCK_N
    grouped = tile.reshape(WARPGROUP_ROWS, prog.BLOCK_N // 8, 8)
    groups_layout: gl.constexpr = grouped.type.layout
    nearest, groups = tile_distance(rows, first_col, span, groups_layout, prog.BLOCK_N)
    if prog.score.one_sided is not None:
        grouped = score_forward(grouped, -groups, prog.score, slope)
        offset = -slope * nearest
    else:
        grouped = score_forward(grouped, gl.expand_dims(nearest, 1) - groups, prog.score, slope)
        offset = 0.0
    tile = gl.convert_layout(grouped.reshape(WARPGROUP_ROWS, prog.BLOCK_N), layout)
    return mask_block(prog, tile, rows, n_block, full_begin, full_end, span), offset


@gluon.jit
def mask_block(prog, tile, rows, n_block, full_begin, full_end, span):
    """Scores of a block, -inf where a row may not see a key. With a window only the side that the block crosses is looked at:
    it may cross both only where none of the blocks is full."""
    lanes = gl.arange(0, prog.BLOCK_N, layout=gl.SliceLayout(0, tile.type.layout))[None, :]
    first_col = n_block * prog.BLOCK_N
    if prog.window.left is None:
        if (n_block < full_begin) | (n_block >= full_end):
            _lo, hi = key_interval(rows, span, prog.window)
            tile = hide_behind(tile, lanes, (hi - first_col)[:, None])
    else:
        if (n_block >= full_end) | (full_begin == full_end):
            _lo, hi = key_interval(rows, span, prog.window)
            tile = hide_behind(tile, lanes, (hi - first_col)[:, None])
        if n_block < full_begin:
            lo, _hi = key_interval(rows, span, prog.window)
            tile = hide_before(tile, lanes, (lo - first_col)[:, None])
    return tile


@gluon.jit
def drop_block(prog, weights, first_row, n_block, key):
    """The weights that multiply v."""
    if prog.dropout.rng_state is not None:
        layout: gl.constexpr = weights.type.layout
        row_lanes = gl.arange(0, WARPGROUP_ROWS, layout=gl.SliceLayout(1, layout))[:, None]
        lanes = gl.arange(0, prog.BLOCK_N, layout=gl.SliceLayout(0, layout))[None, :]
        bits = tile_bits(prog.dropout, key, first_row, row_lanes, n_block * prog.BLOCK_N, lanes)
        weights = drop(prog.dropout, bits, weights)
    return weights


@gluon.jit
def finish(prog, row_max, row_sums, unit, head):
    """(what finishes acc, softmax_lse) from the parts of the row sums."""
    layout: gl.constexpr = row_max.type.layout
    row_sum = gl.convert_layout(gl.sum(row_sums, 1), layout)
    inverse_sum, lse = softmax_finish(row_max, row_sum, unit, prog.score.sinks, head)
    return inverse_sum * kept_scale(prog.dropout), lse


@gluon.jit
def store_results(prog, acc, inverse_sum, lse, first_row, span, batch, head, CONSUMER: gl.constexpr):
    """out and softmax_lse of one consumer's rows; the copy of out is still running on return."""
    buffer = prog.o_buffers.index(CONSUMER)
    out = scale_columns(acc, inverse_sum)
    store_columns(buffer.reshape([WARPGROUP_ROWS, prog.HEAD_DIM_PAD]), out, 1.0, prog.WIDTH)
    fence_async_shared()
    store_tile(prog, prog.o_desc, buffer, span.start_q, span.seqlen_q, first_row, batch, head)
    row_layout: gl.constexpr = lse.type.layout
    rows = first_row + gl.arange(0, WARPGROUP_ROWS, layout=row_layout)
    first = 0  # of the sequence; only packed statistics count through the batch
    if prog.sequences.cu_seqlens_q is not None:
        first = span.start_q
    softmax_lse = row_statistic(prog.softmax_lse, prog.sequences, prog.work.nheads, prog.work.total_q)
    gl.store(row_base(softmax_lse, batch, head, first) + rows, lse, mask=rows < span.seqlen_q)
