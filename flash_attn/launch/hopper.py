"""Launch configurations of the Hopper kernels."""

import functools
import math
from typing import NamedTuple

from flash_attn.launch import forward, pinned_config
from flash_attn.problem import AttentionProblem

CONSUMER_ROWS = 64  # query rows of one consumer, a warpgroup
# Blocks of keys that a tile still has to load when its program draws the next one: enough to hide the draw. Drawn at a tile's
# first block, where tiles are few and of many lengths some programs end late: 1 % at head dim 256 and 4k causal tokens, 2 % at
# 192 and in dq at 256, level elsewhere. H200, bf16, 2026-11-29
DRAW_AHEAD = 2
PROGRAMS = 132  # that run at the same time
# Causal tiles of whole heads drawn in turn: two for each program, less those that would begin a third, so that a turn ends
# evenly. Up to 6 % faster at 512 to 2k tokens than the heads whose keys and values fit the L2 cache, level from 4k. 2026-11-30
TILES_TOGETHER = 2 * PROGRAMS
WIDTHS_IN_TWO_PARTS = (80, 96, 144, 160, 192)  # a power of two and 16, 32 or 64 more


class HopperForwardConfig(NamedTuple):
    """Tile and pipeline of one persistent forward program."""

    consumers: int  # warpgroups of 64 query rows each
    block_n: int  # keys of a loop step
    num_stages: int  # key tiles in flight, and value tiles
    overlap: bool  # run the end of a tile beside the start of the next; needs a second Q and a buffer for out
    ping_pong: bool  # consumers take turns on the tensor cores
    registers: int  # of a consumer's thread
    q_in_registers: bool  # products read Q from there, not from shared memory
    tiles_together: int = TILES_TOGETHER  # of whole heads, drawn in turn
    draw_ahead: int = DRAW_AHEAD


class HopperDqConfig(NamedTuple):
    """Pipeline of one persistent dq program of two consumers."""

    block_n: int  # keys of a loop step
    k_stages: int
    v_stages: int
    q_stages: int  # query tiles in flight, and of dout
    registers: int
    heads_together: int
    draw_ahead: int = DRAW_AHEAD


class HopperDkdvConfig(NamedTuple):
    """Pipeline of one persistent dkdv program of two consumers."""

    block_m: int  # queries of a loop step
    k_stages: int  # key tiles in flight, and value tiles
    q_stages: int
    dout_stages: int
    registers: int
    heads_together: int


class HopperOnePassConfig(NamedTuple):
    """Pipeline of one persistent program of two consumers that computes all gradients."""

    block_m: int  # queries of a loop step: a consumer's part of their dq is 64 x 64
    k_stages: int
    registers: int
    heads_together: int
    ahead: bool = False  # draw a tile at the beginning of the one before, not at its end


class HopperTwoPassConfig(NamedTuple):
    """dq, then dk and dv: in one launch, or in one for each."""

    dq: HopperDqConfig
    dkdv: tuple[HopperDkdvConfig, ...]


def head_dim_pad(headdim: int) -> int:
    """The power of two that a tile's head dimension is padded to in shared memory; a swizzled row has at least 64."""
    return max(64, forward.head_dim_pad(headdim))


def product_width(headdim: int) -> int:
    """The columns of a padded tile that products compute."""
    return min(width for width in (*WIDTHS_IN_TWO_PARTS, head_dim_pad(headdim)) if width >= headdim)


def even_share(heads_together: int, heads: int) -> int:
    """Heads whose tiles a backward draws in turn, up to a quarter more or less, such that all turns have about as many.

    Of a few last heads' causal tiles the longest would be left when nothing else is.
    """
    spare = heads_together // 4
    candidates = range(heads_together - spare, heads_together + spare + 1)

    def evenness(share: int) -> float:
        last = (heads - 1) % share + 1
        return last / share - abs(share - heads_together) / (4 * heads_together)

    return heads if heads <= heads_together else max(candidates, key=evenness)


def copy_columns(headdim: int, parts: bool = False) -> int:
    """Columns of one copy of a tile, or of parts of its rows: all, or 64 of them where the last 64 lie past the head dim and
    are not copied. Parts have 64, which lie in one piece in shared memory.

    Such a copy brings nothing but zeros, and yet slows the others: head dims 144 to 192 are 17 to 22 % slower where the memory
    of k and v is unlucky, a matter of physical addresses. H200, 2026-12-01
    """
    pad = head_dim_pad(headdim)
    return 64 if parts or headdim <= pad - 64 else pad


def copy_rows(page_size: int, block_n: int) -> int:
    """Keys of one copy: a block, or as many as lie in one page of a block that has parts of several."""
    return math.gcd(page_size, block_n)


def hopper_forward_config(problem: AttentionProblem) -> HopperForwardConfig:
    """The configuration for one problem."""
    return pinned_config("hopper_forward") or _choose(problem)


@functools.lru_cache(maxsize=4096)
def _choose(problem: AttentionProblem) -> HopperForwardConfig:
    pad = head_dim_pad(problem.headdim)
    config = {64: _tile_of_64, 128: _tile_of_128, 256: _tile_of_256}[pad](problem)
    return config if problem.causal else config._replace(tiles_together=1)


def _narrow(problem: AttentionProblem, width: int) -> bool:
    """Whether the window shows no row more than `width` keys."""
    left, right = problem.window
    return left is not None and right is not None and left + 1 + right <= width


def _tile_of_128(problem: AttentionProblem) -> HopperForwardConfig:
    """The configuration for head dims of 65 to 128: where rows see few keys, much of a large tile is masked."""
    return TWO_SKIPPING if _narrow(problem, NARROW[128]) or _short_causal(problem) else FORWARD[128]


def _tile_of_256(problem: AttentionProblem) -> HopperForwardConfig:
    """The configuration for head dims above 128: Q fits the registers where it is narrower than 256 and features leave room."""
    roomy = product_width(problem.headdim) < 256 and _features(problem) < 2
    return TWO_PARTS if roomy else FORWARD[256]


def _short_causal(problem: AttentionProblem) -> bool:
    return problem.causal and _longest(problem) <= SHORT


def _longest(problem: AttentionProblem) -> int:
    """Queries or keys of the longest sequence, whichever are more."""
    return max(problem.seqlen_q, problem.seqlen_k)


def _tile_of_64(problem: AttentionProblem) -> HopperForwardConfig:
    """The configuration for head dims up to 64: with two consumers where larger tiles are too few for all programs, or the
    queries too few for a larger tile."""
    config = _tile_for_many_rows(problem)
    small = TWO_SKIPPING_Q if problem.window[0] is not None else TWO_IN_TURN if problem.causal else TWO_CONSUMERS
    few = _waves(problem, config.consumers) < FEW_WAVES or problem.seqlen_q <= small.consumers * CONSUMER_ROWS
    sooner = (
        config.consumers > small.consumers
        and few
        and _duration(problem, small.consumers) < SOONER * _duration(problem, config.consumers)
    )
    return small if sooner else config


def _waves(problem: AttentionProblem, consumers: int) -> float:
    """Tiles for each program."""
    tiles = math.ceil(problem.seqlen_q / (consumers * CONSUMER_ROWS))
    return problem.batch_size * problem.nheads * tiles / PROGRAMS


def _duration(problem: AttentionProblem, consumers: int) -> float:
    """Of a launch, in rows times keys of one program after another; of a window all keys, which are as many for every tile."""
    rows, keys, waves = consumers * CONSUMER_ROWS, problem.seqlen_k, _waves(problem, consumers)
    if problem.window == (None, 0):  # the longest tiles come first, the others even out
        mean_keys = keys - max(0, problem.seqlen_q - rows) / 2
        return rows * max(keys, waves * mean_keys)
    return rows * math.ceil(waves) * keys


def _tile_for_many_rows(problem: AttentionProblem) -> HopperForwardConfig:
    """The configuration for head dims up to 64: large tiles read keys less often, but waste rows on the diagonal and behind the
    last one; many warps hide what each waits for, but leave few registers to each."""
    causal, window = problem.causal, problem.window[0] is not None
    longest = _longest(problem)
    if _narrow(problem, NARROW[64]) or _short_causal(problem):
        return TWO_SKIPPING_Q
    if problem.dropout:
        short = (causal and problem.seqlen_q <= SHORT_DROPOUT) or _narrow(problem, SHORT_DROPOUT)
        return TWO_SKIPPING_Q if short else TWO_DROPPING
    if window and (problem.softcap or problem.alibi or not causal or _narrow(problem, WIDE)):
        return THREE_SKIPPING
    if problem.alibi and (problem.softcap or causal):
        return THREE_SKIPPING if problem.softcap and causal and longest > SHORT_CAUSAL else TWO_IN_TURN
    if causal:
        return _causal_tile_of_64(problem)
    if longest <= (SHORT if problem.softcap or problem.alibi else MEDIUM):
        return TWO_CONSUMERS
    return FOUR_CONSUMERS if problem.softcap or longest <= MEDIUM else FORWARD[64]


def _causal_tile_of_64(problem: AttentionProblem) -> HopperForwardConfig:
    """With a causal mask, a wide window or none, and softcap or no feature."""
    if problem.softcap or problem.window[0] is not None:
        return FOUR_SKIPPING
    if _longest(problem) <= SHORT_CAUSAL:
        return TWO_IN_TURN
    return FOUR_SKIPPING if problem.seqlen_q <= MEDIUM_CAUSAL else FORWARD[64]


def hopper_backward_config(problem: AttentionProblem) -> HopperOnePassConfig | HopperTwoPassConfig:
    """The configuration for the gradients of one problem.

    One pass has 5 products instead of 7, but sums dq in global memory: in an order that varies, or for deterministic results
    tile by tile, where a program waits for the one before. With large heads, or softcap and ALiBi on blocks of 128 queries, it
    does not fit the registers; where loops are short, its beginning and end cost more than two products.
    """
    return pinned_config("hopper_backward") or _choose_backward(problem)


@functools.lru_cache(maxsize=4096)
def _choose_backward(problem: AttentionProblem) -> HopperOnePassConfig | HopperTwoPassConfig:
    pad, group = head_dim_pad(problem.headdim), problem.nheads // max(1, problem.nheads_k)
    config = _one_pass(problem, pad, group)
    if config is not None:
        return config
    dq, dkdv = TWO_PASS[pad][_features(problem) >= CROWDED[pad]]
    heads = _heads_in_turn(problem, pad, group)
    return HopperTwoPassConfig(
        dq._replace(heads_together=heads), tuple(each._replace(heads_together=heads) for each in dkdv)
    )


def _features(problem: AttentionProblem) -> int:
    """How many of softcap, ALiBi and dropout a gradient holds registers for."""
    return problem.softcap + problem.alibi + problem.dropout


def _one_pass(problem: AttentionProblem, pad: int, group: int) -> HopperOnePassConfig | None:
    """The configuration of one pass where that serves the problem best."""
    config = ONE_PASS.get(pad)
    if config is None or (_features(problem) >= 2 and config.block_m == 128):
        return None
    plain = problem.window == (None, 0) and not _features(problem)
    if pad == 128 and plain and _longest(problem) <= SHORT_TWO_PASS:
        return None
    if pad == 128 and problem.seqlen_q * group > (LONG_CAUSAL if problem.causal else LONG):
        config = config._replace(k_stages=1)
    bytes_q = 8 * problem.seqlen_q * pad * group  # Q, dout and dq in fp32
    if not problem.deterministic:
        num_tiles = problem.batch_size * problem.nheads_k * math.ceil(problem.seqlen_k / (2 * CONSUMER_ROWS))
        ahead = pad == 64 and num_tiles >= AHEAD_TILES
        return config._replace(heads_together=_heads_in_turn(problem, pad, group), ahead=ahead)
    heads = math.ceil(HEADS_IN_ORDER / group)
    if not problem.causal:
        heads = min(heads, max(FEWEST_IN_ORDER, ORDERED_L2_SHARE // max(1, bytes_q)))
    queue = PROGRAMS / max(1, min(heads, problem.batch_size * problem.nheads_k))
    steps = math.ceil(problem.seqlen_q / config.block_m) * group
    enough = steps >= queue * (CAUSAL_STEPS if problem.causal else STEPS)
    return config._replace(heads_together=heads) if enough else None


def _heads_in_turn(problem: AttentionProblem, pad: int, group: int) -> int:
    """Heads whose tiles are drawn in turn when these differ in length."""
    if not problem.causal:
        return 1
    return (HEADS_TOGETHER if group == 1 else GROUPED_HEADS_TOGETHER)[pad]


# causal tokens at head dim 128: loops of up to 16 blocks a head, where two passes are 5 % faster, of grouped heads 27 %
SHORT_TWO_PASS = 1024
# heads that make up for the tail of long tiles, even where the cache does not hold them: than as many as it holds, 3 to 5 %
# faster at 1k tokens and head dims 128 and 256; than 8, up to 7 % of grouped heads with 128.
# H200, bf16, 16k tokens, hidden 2048 and 8 of 32 heads, 2026-11-23 and 30
HEADS_TOGETHER, GROUPED_HEADS_TOGETHER = {64: 32, 128: 16, 256: 16}, {64: 32, 128: 32, 256: 16}

# Deterministic results of one pass: 3 to 17 % slower than in any order, where two passes are up to 40 %. Programs that work on
# one head follow each other at a distance of one or two steps; the more heads, the shorter that queue, but the less of what
# they loop over stays in the L2 cache. In short sequences the queue is not worth it: two passes are 11 to 15 % faster at 1k
# causal tokens, level at 2k. H200, bf16, 16k tokens, hidden 2048, 2026-11-22.
HEADS_IN_ORDER, FEWEST_IN_ORDER = 32, 4
ORDERED_L2_SHARE = 2**25
STEPS, CAUSAL_STEPS = 1.5, 4.0  # of a tile's loop for each program in the queue

# (as a rule, where as many of softcap, ALiBi and dropout as in CROWDED leave fewer registers), each dq, then dkdv, or dk and
# dv; chosen to compile with few spills in the loops
TWO_PASS: dict[int, tuple[HopperTwoPassConfig, HopperTwoPassConfig]] = {
    64: (
        HopperTwoPassConfig(HopperDqConfig(128, 2, 2, 2, 240, 1), (HopperDkdvConfig(128, 2, 2, 2, 240, 1),)),
        HopperTwoPassConfig(HopperDqConfig(128, 2, 2, 2, 240, 1), (HopperDkdvConfig(64, 2, 2, 2, 240, 1),)),
    ),
    128: (
        HopperTwoPassConfig(HopperDqConfig(128, 2, 2, 1, 240, 1), (HopperDkdvConfig(64, 2, 2, 2, 240, 1),)),
        HopperTwoPassConfig(HopperDqConfig(64, 2, 2, 2, 240, 1), (HopperDkdvConfig(64, 2, 2, 2, 240, 1),)),
    ),
    256: (
        HopperTwoPassConfig(
            HopperDqConfig(64, 2, 1, 1, 240, 1),
            (HopperDkdvConfig(64, 1, 2, 1, 240, 1), HopperDkdvConfig(64, 1, 2, 2, 240, 1)),
        ),
        HopperTwoPassConfig(
            HopperDqConfig(32, 2, 2, 1, 240, 1),
            (HopperDkdvConfig(32, 1, 2, 2, 240, 1), HopperDkdvConfig(64, 1, 2, 2, 240, 1)),
        ),
    ),
}
CROWDED = {64: 1, 128: 2, 256: 2}
# Tiles drawn early cost nothing between one and the next, 2 to 4 % at head dim 64 and 4k or 16k tokens, but leave programs with
# more work than others: 21 to 36 % with two tiles for each of them, whatever the head dim. H200, 2026-11-23
AHEAD_TILES = 2048
# queries of a tile's loop from which on a second tile of K and V costs more than loading them late: 3 % at 4k and 16k tokens,
# 2 % at 16k causal tokens, 3 % at 4k causal tokens of grouped heads; H200, 2026-11-22 and 23
LONG, LONG_CAUSAL = 2048, 8192
ONE_PASS = {64: HopperOnePassConfig(128, 2, 240, 1), 128: HopperOnePassConfig(64, 2, 240, 1)}

# H200, bf16, 16k tokens, hidden 2048, 2026-11-22
FORWARD = {
    64: HopperForwardConfig(3, 128, 2, True, True, 160, False),
    128: HopperForwardConfig(2, 128, 2, True, True, 240, False),
    256: HopperForwardConfig(2, 64, 2, False, False, 240, False),
}
# Products of 64 keys with Q in shared memory read it at its full rate. Q in registers and turns: 3 to 4 % together at head dims
# 144 to 192 and 4k or 16k tokens, 1 to 3 % causal. 2026-12-01
TWO_PARTS = FORWARD[256]._replace(q_in_registers=True, ping_pong=True)
# Where larger tiles waste more than they gain. A third stage is worth 8 % at 1k tokens (2026-11-23). Q in registers, for which
# four consumers or 128 keys for three leave no room: 2 % over four consumers at 1k tokens. Under a causal mask turns are worth
# 1 % on top, with ALiBi 4 % at 4k tokens and 14 at 16k; 3 % over two that read Q from shared memory at 1k and 1.5k tokens.
# Dropout wants the registers itself, 4 % at 4k. 2026-11-30
TWO_CONSUMERS = HopperForwardConfig(2, 128, 3, True, False, 240, True)
TWO_IN_TURN = TWO_CONSUMERS._replace(ping_pong=True)
TWO_DROPPING = TWO_IN_TURN._replace(q_in_registers=False)
# Half the keys a step, so that 112 registers hold it, and twice the warps to hide what each waits for: 4 to 10 % with softcap,
# which waits for two exponentials a score. 2026-11-30
FOUR_CONSUMERS = HopperForwardConfig(4, 64, 3, True, True, 112, False)
# Under a mask each consumer skips the blocks that none of its rows sees, which it cannot while they take turns: 3 % over four
# in turn at 4k causal tokens, 4 % with a softcap; 2 % over two consumers at 3k. Level at 8k. 2026-11-30
FOUR_SKIPPING = HopperForwardConfig(4, 64, 6, True, False, 112, False)
# The same with smaller tiles, of which windows and short causal sequences mask less. 4k tokens: three consumers are 4 % faster
# than four with a window of 512 keys and level with 1024, 5 % than those without Q in registers with a band of 513, 9 % than
# two with a softcap and 1024 keys; two that skip are 8 % faster than three with 128 keys, level with 256, and at head dim 128
# 22, 16 and 3 % than two in turn with 128, 256 and 512 keys. 512 causal tokens 4 %, with dropout 25. 2026-11-30
THREE_SKIPPING = HopperForwardConfig(3, 64, 5, True, False, 160, True)
TWO_SKIPPING = HopperForwardConfig(2, 64, 4, True, False, 240, False)
TWO_SKIPPING_Q = TWO_SKIPPING._replace(q_in_registers=True)
# Two consumers where larger tiles are few for each program, and these end that much sooner by the count of tiles: most programs
# would wait for the last tiles of others.
FEW_WAVES, SOONER = 3, 0.85
# keys that a row sees at most, up to which two consumers that skip are the fastest, above 576 tiles in turn at head dim 128;
# and up to which three are at 64
NARROW, WIDE = {64: 256, 128: 576}, 1024
# Tokens up to which two consumers are the fastest: MEDIUM without a mask, SHORT with a softcap or ALiBi, SHORT_CAUSAL causal;
# two that skip: SHORT causal, SHORT_DROPOUT with dropout; and causal queries up to which four that skip are: MEDIUM_CAUSAL
SHORT, MEDIUM, SHORT_CAUSAL, MEDIUM_CAUSAL, SHORT_DROPOUT = 512, 1024, 2048, 4096, 1024
