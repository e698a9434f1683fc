"""Products and accumulators as wide as the head dim, where shared memory is padded to a power of two.

Gluon knows no other tiles than powers of two. A width of two of them, 192 = 128 + 64, has products and accumulators of two
parts, each of which reads its columns of the padded tile; an accumulator is a tuple of one part or two.
"""

from flash_attn.kernels.hopper.pipeline import (
    WARPGROUP_ROWS,
    accumulator_layout,
    along_rows,
    gl,
    gluon,
    warpgroup_mma,
    warpgroup_mma_wait,
)


@gluon.jit
def split_columns(tile, WIDTH: gl.constexpr):
    """The first WIDTH columns of a tile in shared memory, as a tuple of one part or two."""
    FIRST: gl.constexpr = first_part(WIDTH)
    if FIRST == WIDTH:
        parts = (tile,)
    else:
        parts = (tile.slice(0, FIRST, 1), tile.slice(FIRST, WIDTH - FIRST, 1))
    return parts


@gluon.jit
def load_columns(parts, layout: gl.constexpr):
    """The parts of a tile in registers."""
    if len(parts) == 1:
        loaded = (parts[0].load(layout),)
    else:
        loaded = (parts[0].load(layout), parts[1].load(layout))
    return loaded


@gluon.jit
def inner_products(left, right, COLUMNS: gl.constexpr):
    """Issue left @ right^T, (64, COLUMNS), of two tiles in parts: right in shared memory, left there or in registers."""
    zeros = gl.zeros((WARPGROUP_ROWS, COLUMNS), gl.float32, accumulator_layout(COLUMNS))
    result = warpgroup_mma(left[0], right[0].permute((1, 0)), zeros, use_acc=False, is_async=True)
    if len(left) == 2:
        result = warpgroup_mma(left[1], right[1].permute((1, 0)), result, is_async=True)
    return result


@gluon.constexpr_function
def first_part(width):
    """The largest power of two in a width: Gluon's tiles have no other, so a product of other widths has two parts."""
    return 1 << (width.bit_length() - 1)


@gluon.constexpr_function
def num_parts(width):
    """Products, and accumulators, of that width: one, or two."""
    return 1 if first_part(width) == width else 2


@gluon.jit
def zero_columns(WIDTH: gl.constexpr):
    """A (64, WIDTH) accumulator, as a tuple of its parts."""
    FIRST: gl.constexpr = first_part(WIDTH)
    first = gl.zeros((WARPGROUP_ROWS, FIRST), gl.float32, accumulator_layout(FIRST))
    if FIRST == WIDTH:
        parts = (first,)
    else:
        REST: gl.constexpr = WIDTH - FIRST
        parts = (first, gl.zeros((WARPGROUP_ROWS, REST), gl.float32, accumulator_layout(REST)))
    return parts


@gluon.jit
def accumulate_columns(left, right, parts, WIDTH: gl.constexpr):
    """Issue parts += left @ right, with left in registers and right in shared memory."""
    FIRST: gl.constexpr = first_part(WIDTH)
    if FIRST == WIDTH:
        parts = (warpgroup_mma(left, right, parts[0], is_async=True),)
    else:
        REST: gl.constexpr = WIDTH - FIRST
        operand: gl.constexpr = gl.DotOperandLayout(0, accumulator_layout(REST), 2)
        first = warpgroup_mma(left, right.slice(0, FIRST, 1), parts[0], is_async=True)
        rest = gl.convert_layout(left, operand)
        parts = (first, warpgroup_mma(rest, right.slice(FIRST, REST, 1), parts[1], is_async=True))
    return parts


@gluon.jit
def await_columns(parts):
    """Wait for all products, an accumulator's last ones among them."""
    if len(parts) == 1:
        parts = (warpgroup_mma_wait(0, deps=(parts[0],)),)
    else:
        parts = warpgroup_mma_wait(0, deps=(parts[0], parts[1]))
    return parts


@gluon.jit
def await_product(parts, left, OUTSTANDING: gl.constexpr):
    """Wait for an accumulator and its left operand; OUTSTANDING later products may go on."""
    if len(parts) == 1:
        first, left = warpgroup_mma_wait(OUTSTANDING, deps=(parts[0], left))
        parts = (first,)
    else:
        first, rest, left = warpgroup_mma_wait(OUTSTANDING, deps=(parts[0], parts[1], left))
        parts = (first, rest)
    return parts, left


@gluon.jit
def await_products(parts, tile, left, OUTSTANDING: gl.constexpr = 0):
    """Wait for an accumulator, its left operand, and a tile; OUTSTANDING later products may go on."""
    if len(parts) == 1:
        first, tile, left = warpgroup_mma_wait(OUTSTANDING, deps=(parts[0], tile, left))
        parts = (first,)
    else:
        first, rest, tile, left = warpgroup_mma_wait(OUTSTANDING, deps=(parts[0], parts[1], tile, left))
        parts = (first, rest)
    return parts, tile, left


@gluon.jit
def scale_columns(parts, factor):
    """An accumulator times a factor of each of its rows."""
    if len(parts) == 1:
        parts = (scale_rows(parts[0], factor),)
    else:
        parts = (scale_rows(parts[0], factor), scale_rows(parts[1], factor))
    return parts


@gluon.jit
def scale_rows(tile, factor):
    """A tile times a factor of each of its rows."""
    layout: gl.constexpr = tile.type.layout
    return tile * along_rows(factor, layout)


@gluon.jit
def store_columns(buffer, parts, scale, WIDTH: gl.constexpr):
    """An accumulator times a scalar, into the first WIDTH columns of a buffer in shared memory."""
    FIRST: gl.constexpr = first_part(WIDTH)
    if FIRST == WIDTH:
        buffer.store((parts[0] * scale).to(buffer.dtype))
    else:
        buffer.slice(0, FIRST, 1).store((parts[0] * scale).to(buffer.dtype))
        buffer.slice(FIRST, WIDTH - FIRST, 1).store((parts[1] * scale).to(buffer.dtype))
