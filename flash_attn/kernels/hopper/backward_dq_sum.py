"""dq of the one-pass backward for Hopper as a sum in global memory: its workspace, and the small kernels around the large one.

The workspace holds fp32 parts of 64 x 64, each in the order of the accumulator's registers, so that every thread reduces 16
adjacent bytes. `attn_bwd_rows_kernel` clears it and computes delta; `attn_bwd_convert_kernel` brings it in order.
"""

from flash_attn.kernels.algebra.locate import row_base, row_statistic, sequence_base
from flash_attn.kernels.algebra.score import gradient_scale
from flash_attn.kernels.algebra.softmax import lse_log2, softmax_delta
from flash_attn.kernels.algebra.span import load_span
from flash_attn.kernels.hopper.backward_tiles import load_rows, load_rows_statistic, row_major_layout
from flash_attn.kernels.hopper.pipeline import gl, gluon

PART = gl.constexpr(64)  # rows and columns of one consumer's part of a dq block


@gluon.jit
def in_register_order(part):
    """A (64, 64) accumulator as (4096,), with the 4 numbers of a thread's rows r and r + 8 adjacent; moves no data."""
    return part.reshape([4, 2, 8, 8, 4, 2]).permute((0, 3, 2, 4, 1, 5)).reshape([PART * PART])


@gluon.jit
def in_matrix_order(numbers):
    """The inverse of in_register_order."""
    return numbers.reshape([4, 8, 8, 4, 2, 2]).permute((0, 4, 2, 1, 3, 5)).reshape([PART, PART])


@gluon.jit
def first_dq_block(batch, start_q, num_m, BLOCK_M: gl.constexpr, PACKED: gl.constexpr):
    """The number of a sequence's first query block among all blocks of a head in the workspace.

    In a packed batch a sequence starts a new block, and no more blocks are lost than there are sequences. The last block of a
    head belongs to no sequence: it takes sums that nobody reads, which costs less than a branch around the reductions (3 % of
    the kernel, H200, 2026-11-22).
    """
    if PACKED:
        block = start_q // BLOCK_M + batch
    else:
        block = batch * num_m
    return block


@gluon.jit
def part_pointer(dq_sum, head, block, part, num_dq_blocks, BLOCK_M: gl.constexpr, HEAD_DIM_PAD: gl.constexpr):
    """Pointer to one part of a query block's dq in the workspace, (nheads, num_dq_blocks, 2, 4096) fp32."""
    return dq_sum + (gl.cast(head, gl.int64) * num_dq_blocks + block) * (BLOCK_M * HEAD_DIM_PAD) + part * (PART * PART)


@gluon.jit
def block_of_program(num_m, nheads):
    """(query block, head, batch) of a program that works on one query block of one head.

    From the last head to the first: the products begin with what the cache still holds of the first, and end with the last.
    """
    index = gl.num_programs(0) - 1 - gl.program_id(0)
    batch_head = index // num_m
    return index % num_m, batch_head % nheads, batch_head // nheads


@gluon.jit(do_not_specialize=["num_dq_blocks", "num_m", "seqlen_q", "total_q", "nheads"])
def attn_bwd_rows_kernel(
    out, dout, softmax_lse, dlse, delta, dq_sum, turns, sequences, num_dq_blocks, num_m, seqlen_q, total_q, nheads,
    HEAD_DIM: gl.constexpr, HEAD_DIM_PAD: gl.constexpr, BLOCK_M: gl.constexpr,
):  # fmt: skip
    """delta = rowsum(dout * out) - dlse of one query block, and zeros where its dq will be summed and its turns counted."""
    PACKED: gl.constexpr = sequences.cu_seqlens_q is not None
    layout: gl.constexpr = gl.SliceLayout(1, row_major_layout(HEAD_DIM_PAD))
    m_block, head, batch = block_of_program(num_m, nheads)
    span = load_span(sequences, False, batch, seqlen_q, 0, total_q, 0)
    softmax_lse = row_statistic(softmax_lse, sequences, nheads, total_q)
    dlse = row_statistic(dlse, sequences, nheads, total_q)
    delta = row_statistic(delta, sequences, nheads, total_q)
    if m_block * BLOCK_M < span.seqlen_q:
        rows = m_block * BLOCK_M + gl.arange(0, BLOCK_M, layout=layout)
        out_rows = load_rows(out, span, batch, head, rows, HEAD_DIM, HEAD_DIM_PAD)
        dout_rows = load_rows(dout, span, batch, head, rows, HEAD_DIM, HEAD_DIM_PAD)
        row_delta = gl.sum(out_rows.to(gl.float32) * dout_rows.to(gl.float32), 1)
        if dlse is not None:
            lse = load_rows_statistic(softmax_lse, span, batch, head, rows, float("-inf"))
            row_delta = softmax_delta(row_delta, load_rows_statistic(dlse, span, batch, head, rows, 0.0), lse_log2(lse))
        gl.store(row_base(delta, batch, head, span.start_q) + rows, row_delta, mask=rows < span.seqlen_q)
        block = first_dq_block(batch, span.start_q, num_m, BLOCK_M, PACKED) + m_block
        numbers: gl.constexpr = gl.BlockedLayout([4], [32], [4], [0])
        offsets = gl.arange(0, BLOCK_M * HEAD_DIM_PAD, layout=numbers)
        base = part_pointer(dq_sum, head, block, 0, num_dq_blocks, BLOCK_M, HEAD_DIM_PAD)
        gl.store(base + offsets, gl.zeros([BLOCK_M * HEAD_DIM_PAD], gl.float32, numbers))
        if turns is not None:
            gl.store(turns + gl.cast(head, gl.int64) * num_dq_blocks + block, 0)


@gluon.jit(do_not_specialize=["num_dq_blocks", "num_m", "seqlen_q", "total_q", "nheads"])
def attn_bwd_convert_kernel(
    dq_sum, dq, sequences, score, num_dq_blocks, num_m, seqlen_q, total_q, nheads,
    HEAD_DIM: gl.constexpr, HEAD_DIM_PAD: gl.constexpr, BLOCK_M: gl.constexpr,
):  # fmt: skip
    """dq of one query block from its sum in the workspace."""
    PACKED: gl.constexpr = sequences.cu_seqlens_q is not None
    m_block, head, batch = block_of_program(num_m, nheads)
    span = load_span(sequences, False, batch, seqlen_q, 0, total_q, 0)
    order: gl.constexpr = gl.BlockedLayout([4], [32], [4], [0])
    layout: gl.constexpr = row_major_layout(PART)
    dtype: gl.constexpr = dq.ptr.dtype.element_ty
    staging = gl.allocate_shared_memory(dtype, [2, PART, PART], gl.NVMMASharedLayout(128, 16, rank=2))
    if m_block * BLOCK_M < span.seqlen_q:
        block = first_dq_block(batch, span.start_q, num_m, BLOCK_M, PACKED) + m_block
        offsets = gl.arange(0, PART * PART, layout=order)
        for part in gl.static_range(2):
            base = part_pointer(dq_sum, head, block, part, num_dq_blocks, BLOCK_M, HEAD_DIM_PAD)
            tile = in_matrix_order(gl.load(base + offsets)) * gradient_scale(score)
            staging.index(part).store(tile.to(dtype))
            rows = m_block * BLOCK_M + gl.arange(0, PART, layout=gl.SliceLayout(1, layout))
            dims = gl.arange(0, PART, layout=gl.SliceLayout(0, layout))
            if BLOCK_M == PART:
                dims += part * PART
            else:
                rows += part * PART
            mask = (rows < span.seqlen_q)[:, None]
            if HEAD_DIM != HEAD_DIM_PAD:
                mask = mask & (dims < HEAD_DIM)[None, :]
            pointers = sequence_base(dq, batch, head, span.start_q) + rows.to(gl.int64)[:, None] * dq.stride_s
            gl.store(pointers + dims[None, :], staging.index(part).load(layout), mask=mask)
