"""Blocks of a tile of the Hopper forward that a consumer passes over, because none of its rows sees them.

Consumers read every block of a tile together. Under a mask the first of them need not read the tile's last blocks, and with a
window the last of them not the first: they give those slots of the rings back unread. That pays where blocks are no larger than
a consumer's rows, and works where consumers take no turns, which keep them at a common pace.
"""

from flash_attn.kernels.hopper.pipeline import WARPGROUP_ROWS, advance, await_full, gl, gluon, release
from flash_attn.kernels.hopper.schedule import consumer_key_blocks


@gluon.jit
def unseen_blocks(prog, first_row, begin, end, span, present, CONSUMER: gl.constexpr):
    """How many of a tile's first and of its last key blocks the consumer passes over; at least one block stays.

    At the border of two tiles no more than those of CONSUMERS - 1 consumers: their values stay in the ring until the consumer's
    product before them is done, beside those of the two blocks that it works on. With fewer stages all would wait forever.
    """
    before, behind = 0, 0
    if prog.BLOCK_N <= WARPGROUP_ROWS and not prog.PING_PONG:
        BLOCKS: gl.constexpr = WARPGROUP_ROWS // prog.BLOCK_N  # of keys as long as a consumer's rows
        gl.static_assert(prog.STAGES > prog.CONSUMERS * BLOCKS)
        own_begin, _full_begin, _full_end, own_end = consumer_key_blocks(first_row, span, prog.window, prog.BLOCK_N)
        most = gl.minimum((prog.CONSUMERS - 1 - CONSUMER) * BLOCKS, end - begin - 1)
        behind = gl.where(present, gl.maximum(gl.minimum(end - own_end, most), 0), 0)
        if prog.window.left is not None:
            most = gl.minimum(CONSUMER * BLOCKS, end - behind - begin - 1)
            before = gl.where(present, gl.maximum(gl.minimum(own_begin - begin, most), 0), 0)
    return before, behind


@gluon.jit
def skip_keys(prog, place, count, follows):
    """Give back as many full slots unread, and wait for the one behind them, if any follows."""
    for step in range(0, count):
        release(prog.k_ring, place)
        place = advance(place, prog.STAGES)
        await_full(prog.k_ring, place, (step + 1 < count) | follows)
    return place


@gluon.jit
def skip_values(prog, place, count):
    """Give back as many slots unread."""
    for _ in range(0, count):
        await_full(prog.v_ring, place)
        release(prog.v_ring, place)
        place = advance(place, prog.STAGES)
    return place
