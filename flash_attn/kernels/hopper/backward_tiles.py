"""What the Hopper backward passes share: the weights of a tile recomputed, and addresses of rows."""

from flash_attn.kernels.algebra.dropout import drop_backward, drop_marked, load_key, mark_dropped, tile_bits
from flash_attn.kernels.algebra.interval import hide, key_interval
from flash_attn.kernels.algebra.locate import row_base, sequence_base
from flash_attn.kernels.algebra.score import key_distance, score_backward, score_forward, unit_log2
from flash_attn.kernels.algebra.softmax import softmax_backward, softmax_weights
from flash_attn.kernels.hopper.pipeline import WARPGROUP_ROWS, gl, gluon


@gluon.jit
def tile_weights(prog, qk, row_lse, rows, cols, masked, span, slope, bits):
    """(softmax weights, the same times d(score)/d(q . k)) of a tile of dot products, in either orientation; 0 where a row may
    not see a key, negative where dropped."""
    tile = score_forward(qk, key_distance(rows, cols, span), prog.score, slope)
    if masked:
        lo, hi = key_interval(rows, span, prog.window)
        tile = hide(tile, cols, lo, hi, prog.window)
    weights = softmax_weights(tile, unit_log2(prog.score), row_lse)
    if prog.dropout.rng_state is not None:
        weights = mark_dropped(prog.dropout, bits, weights)
    return weights, score_backward(weights, tile, qk, prog.score)


@gluon.jit
def value_weights(weights, dropout):
    """What multiplied v of the weights of `tile_weights`, but for `kept_scale`."""
    if dropout.rng_state is not None:
        weights = drop_marked(weights)
    return weights


@gluon.jit
def score_gradient(sensitivity, dp, row_delta, dropout):
    """dS of a tile, from what `tile_weights` says of it and from dP = dO V^T."""
    if dropout.rng_state is not None:
        dp = drop_backward(dropout, sensitivity, dp)
        sensitivity = gl.abs(sensitivity)
    return softmax_backward(sensitivity, dp, row_delta)


@gluon.constexpr_function
def row_major_layout(columns):
    """Tiles of that many columns in registers as whole rows: neighbouring threads hold 8 neighbouring elements each."""
    return gl.BlockedLayout([1, 8], [256 // columns, columns // 8], [4, 1], [1, 0])


@gluon.jit
def load_rows(t, span, batch, head, rows, HEAD_DIM: gl.constexpr, HEAD_DIM_PAD: gl.constexpr):
    """Rows of a query-like operand through registers; zero outside the sequence and the head dim."""
    layout: gl.constexpr = rows.type.layout.parent
    dims = gl.arange(0, HEAD_DIM_PAD, layout=gl.SliceLayout(0, layout))
    mask = (rows < span.seqlen_q)[:, None]
    if HEAD_DIM != HEAD_DIM_PAD:
        mask = mask & (dims < HEAD_DIM)[None, :]
    base = sequence_base(t, batch, head, span.start_q)
    return gl.load(base + rows.to(gl.int64)[:, None] * t.stride_s + dims[None, :], mask=mask, other=0.0)


@gluon.jit
def load_rows_statistic(t, span, batch, head, rows, other):
    """Per-row statistics of query rows; `other` past the end of the sequence."""
    return gl.load(row_base(t, batch, head, span.start_q) + rows, mask=rows < span.seqlen_q, other=other)


@gluon.jit
def allocate_statistics(DEPTH: gl.constexpr, BLOCK_M: gl.constexpr):
    """Room in shared memory for one fp32 number of every row of DEPTH query blocks."""
    return gl.allocate_shared_memory(gl.float32, [DEPTH, BLOCK_M], gl.SwizzledSharedLayout(1, 1, 1, [0]))


@gluon.jit
def load_statistic(t, batch, head, span, first, other, BLOCK_M: gl.constexpr):
    """Per-row statistics of one query block, in the registers of one warp; `other` past the end of the sequence."""
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    rows = first + gl.arange(0, BLOCK_M, layout=layout)
    return load_rows_statistic(t, span, batch, head, rows, other)


@gluon.jit
def allocate_key_words(DEPTH: gl.constexpr):
    """Room in shared memory for dropout's key, three words for each head, of DEPTH query blocks."""
    return gl.allocate_shared_memory(gl.uint32, [DEPTH * 3, 1], gl.SwizzledSharedLayout(1, 1, 1, [0]))


@gluon.jit
def store_key(prog, slot, batch_head):
    """Keep a block's key in its slot, by one warp: once for all consumers, and where heads change in a tile."""
    if prog.dropout.rng_state is not None:
        layout: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
        words = load_key(prog.dropout, batch_head)
        for i in gl.static_range(3):
            prog.key_words.index(slot * 3 + i).store(gl.full([1], words[i], gl.uint32, layout))


@gluon.jit
def stored_key(key_words, slot):
    """What `store_key` kept."""
    return _word(key_words, slot * 3), _word(key_words, slot * 3 + 1), _word(key_words, slot * 3 + 2)


@gluon.jit
def _word(key_words, index):
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [gl.num_warps()], [0])
    return gl.max(key_words.index(index).load(layout), 0)


@gluon.jit
def transposed_bits(prog, slot, first_row, first_key, layout: gl.constexpr):
    """`tile_bits` of a block of queries and one consumer's keys, (64, BLOCK_M), under the words of the block's slot."""
    bits = 0
    if prog.dropout.rng_state is not None:
        row_lanes = gl.arange(0, prog.BLOCK_M, layout=gl.SliceLayout(0, layout))[None, :]
        key_lanes = gl.arange(0, WARPGROUP_ROWS, layout=gl.SliceLayout(1, layout))[:, None]
        bits = tile_bits(prog.dropout, stored_key(prog.key_words, slot), first_row, row_lanes, first_key, key_lanes)
    return bits


@gluon.jit
def first_group_block(begin, end, DOWN: gl.constexpr):
    """The query block with which a tile of keys begins: the first, or the last."""
    if DOWN:
        m_block = end - 1
    else:
        m_block = begin
    return m_block


@gluon.jit
def next_group_block(head, m_block, begin, end, first_head, group, DOWN: gl.constexpr):
    """The next step of the loop over the query heads of a group and their blocks [begin, end), flattened.

    Downwards, where tiles wait for each other, the heads of a block follow each other: programs that pass through a head one
    after the other would queue at its first block.
    """
    if DOWN:
        head += 1
        if head == first_head + group:
            head = first_head
            m_block -= 1
    else:
        m_block += 1
        if m_block == end:
            m_block = begin
            head += 1
    return head, m_block
