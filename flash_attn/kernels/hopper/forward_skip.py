"""Blocks of a tile of the Hopper forward that a consumer passes over, because none of its rows sees them.

Consumers read every block of a tile together. Under a mask the first of them need not read the tile's last blocks, and with a
window the last of them not the first: they give those slots of the rings back unread. That pays where blocks are no larger than
a consumer's rows, and works where consumers take no turns, which keep them at a common pace.
"""

from flash_attn.kernels.hopper.pipeline import WARPGROUP_ROWS, advance, gl, gluon, mbarrier
from flash_attn.kernels.hopper.schedule import consumer_key_blocks


@gluon.jit
def unseen_blocks(
    first_row, begin, end, span, window, present, CONSUMER: gl.constexpr, CONSUMERS: gl.constexpr, BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr, PING_PONG: gl.constexpr,
):  # fmt: skip
    """How many of a tile's first and of its last key blocks the consumer passes over; at least one block stays.

    At the border of two tiles no more than those of CONSUMERS - 1 consumers: their values stay in the ring until the consumer's
    product before them is done, beside those of the two blocks that it works on. With fewer stages all would wait forever.
    """
    before, behind = 0, 0
    if BLOCK_N <= WARPGROUP_ROWS and not PING_PONG:
        gl.static_assert(STAGES > CONSUMERS * WARPGROUP_ROWS // BLOCK_N)
        own_begin, _full_begin, _full_end, own_end = consumer_key_blocks(first_row, span, window, BLOCK_N)
        most = gl.minimum((CONSUMERS - 1 - CONSUMER) * WARPGROUP_ROWS // BLOCK_N, end - begin - 1)
        behind = gl.where(present, gl.maximum(gl.minimum(end - own_end, most), 0), 0)
        if window.left is not None:
            most = gl.minimum(CONSUMER * WARPGROUP_ROWS // BLOCK_N, end - behind - begin - 1)
            before = gl.where(present, gl.maximum(gl.minimum(own_begin - begin, most), 0), 0)
    return before, behind


@gluon.jit
def skip_keys(k_ring, slot, phase, count, follows, STAGES: gl.constexpr):
    """Give back as many full slots unread, and wait for the one behind them, if any follows."""
    for step in range(0, count):
        mbarrier.arrive(k_ring.empty.index(slot), count=1)
        slot, phase = advance(slot, phase, STAGES)
        mbarrier.wait(k_ring.full.index(slot), phase, pred=(step + 1 < count) | follows)
    return slot, phase


@gluon.jit
def skip_values(v_ring, slot, phase, count, STAGES: gl.constexpr):
    """Give back as many slots unread."""
    for _ in range(0, count):
        mbarrier.wait(v_ring.full.index(slot), phase)
        mbarrier.arrive(v_ring.empty.index(slot), count=1)
        slot, phase = advance(slot, phase, STAGES)
    return slot, phase
