"""Launch configurations of the decode, merge and append kernels, and the number of splits of a cache.

Everything follows from shapes: what the device alone knows, such as the lengths in the cache, must not shape a launch, or a
CUDA graph could not replay it.
"""

import functools
import math
from typing import NamedTuple

from flash_attn.hardware import Hardware
from flash_attn.launch import pinned_config
from flash_attn.launch.forward import head_dim_pad
from flash_attn.problem import AttentionProblem

MAX_SPLITS = 128
MAX_PACKED_ROWS = 64  # of the query heads of one key head: the largest tile where not `wide`
WIDE_ROWS = 128  # the largest tile where `wide`
MERGE_SPLITS = 32  # parts a step of the merge kernel; one constant, so that no bit depends on the number of splits
APPEND_ROWS = 16  # (token, head) rows of a program of the append kernel


class DecodeConfig(NamedTuple):
    """Tile and launch shape of one program of the decode kernel."""

    block_n: int  # keys of a loop step
    num_warps: int
    num_stages: int  # key/value tiles in flight; see `pipeline_stages`
    programs_per_sm: int  # that run at the same time: what the number of splits aims to fill
    gather_stages: int | None = None  # in place of num_stages for short loops over gathered keys; see `gathering`


def decode_config(
    problem: AttentionProblem, rows: int, num_tiles: int, paged: bool, hardware: Hardware
) -> DecodeConfig:
    """The configuration for `num_tiles` tiles of `rows` rows, see `block_m`.

    Paged or not, it has the same blocks and warps, so that pages change no bit of a result; where batch invariance was asked
    for, whatever the number of tiles.
    """
    pinned = pinned_config("decode")
    if pinned is not None:
        return pinned
    pad, kind = head_dim_pad(problem.headdim), (problem.dtype, problem.headdim, paged, hardware)
    if wide(problem, hardware) and (rows, pad) in HOPPER_MANY_ROWS:
        return HOPPER_MANY_ROWS[rows, pad]
    room = _choose(False, *kind).programs_per_sm * hardware.num_sms
    config = _choose(keys_per_split() is None and num_tiles > room, *kind)
    # a tile of many rows would fill the registers of the usual warps
    fewest = 8 if rows * pad >= LARGE_TILE else 4 if rows > 16 else 1
    return config._replace(num_warps=max(config.num_warps, fewest))


def gathering(config: DecodeConfig, num_blocks: int) -> DecodeConfig:
    """The configuration of programs that gather so many blocks of keys from pages that are shorter than a block."""
    stages = config.gather_stages
    return config if stages is None or num_blocks > SHORT_GATHER else config._replace(num_stages=stages)


def wide(problem: AttentionProblem, hardware: Hardware) -> bool:
    """Whether many rows have tiles of WIDE_ROWS, and HOPPER_MANY_ROWS their configurations: 16-bit rows, whose alignment the
    compiler knows, on Hopper."""
    return hardware.arch == "sm_90" and problem.dtype != "float32" and problem.headdim % 16 == 0


def block_m(packed_rows: int, largest: int = MAX_PACKED_ROWS) -> int:
    """Rows of a tile that holds the query heads of one key head; tensor-core products need 16."""
    return max(16, min(1 << (packed_rows - 1).bit_length(), largest))


def few_queries(problem: AttentionProblem, hardware: Hardware) -> bool:
    """Whether the decode kernel suits a forward: many keys wait for the queries, and one tile holds those of a key head, or a
    few tiles would leave SMs idle and `prefers_decode` says that sharing their keys out is worth a merge.

    The forward kernel would read those keys in one program for each tile and query head. Backends choose for themselves
    between the kernels for more than a tile of queries of a cache.
    """
    rows = problem.seqlen_q * (problem.nheads // max(1, problem.nheads_k))
    many = max(MANY_KEYS, KEYS_PER_QUERY * problem.seqlen_q)
    if rows == 0 or problem.seqlen_k < many or problem.dropout:
        return False
    if rows <= MAX_PACKED_ROWS:
        return True
    forward_tiles = math.ceil(problem.seqlen_q / FORWARD_ROWS) * problem.batch_size * problem.nheads
    if problem.layout in ("cache", "paged_cache") or forward_tiles >= hardware.num_sms:
        return False
    num_tiles = math.ceil(rows / WIDE_ROWS) * problem.batch_size * problem.nheads_k
    return prefers_decode(problem, rows, num_tiles, forward_tiles, 0, hardware)


def chained(hardware: Hardware) -> bool:
    """Whether kernels that follow each other may start early, see `kernels.portable.chain`."""
    return hardware.kind == "cuda" and int(hardware.arch.removeprefix("sm_")) >= 90


def starts_early(num_programs: int, hardware: Hardware) -> bool:
    """Whether the decode kernel may do so. So few programs that each gets a multiprocessor of its own may not: beside a kernel
    that ends, two of them may get the same (20 % slower, H200, 2026-11-30)."""
    return chained(hardware) and num_programs > hardware.num_sms


MANY_KEYS = 256  # with fewer the forward kernel ends before a second launch could begin
KEYS_PER_QUERY = 16
FORWARD_ROWS = 128  # queries of a forward kernel's tile, as a rule


def keys_per_split() -> int | None:
    """The fixed number of keys of a split where batch invariance was asked for, otherwise None."""
    return pinned_config("keys_per_split")


def prefers_decode(
    problem: AttentionProblem,
    packed_rows: int,
    num_tiles: int,
    forward_tiles: float,
    num_splits: int,
    hardware: Hardware,
) -> bool:
    """Whether the decode kernel suits the queries: one tile holds them, or its `num_tiles` of WIDE_ROWS rows, spread over all
    SMs, are done before the forward kernel's `forward_tiles`, each on one.

    Splits that were asked for need it. Batch invariance does not (a row's sums in the forward kernel know no other rows), but
    needs a choice that no batch size changes. Time is in shares of an SM, as many as there are in that of a forward tile.
    """
    if packed_rows <= MAX_PACKED_ROWS or num_splits > 1:
        return True
    spread = DECODE_TILE[head_dim_pad(problem.headdim)] * num_tiles
    merged = MERGE_KEYS + MERGE_KEYS_PER_ROW * problem.batch_size * problem.nheads * problem.seqlen_q
    merge = hardware.num_sms * merged / max(1, problem.seqlen_k)
    return keys_per_split() is None and spread + merge < max(hardware.num_sms, forward_tiles)


@functools.lru_cache(maxsize=4096)
def split_count(num_programs: int, num_blocks: int, slow_alone: bool, hardware: Hardware, config: DecodeConfig) -> int:
    """Splits for the least time, where `num_programs` programs read `num_blocks` blocks of keys each.

    In units of the time in which an SM reads one block. Its programs share its part of the memory's bandwidth, so what counts
    is how many the busiest one has; a lone program reaches all of it but where it is `slow_alone`, because it gathers keys from
    pages or has many rows to compute.
    """

    def duration(splits: int) -> float:
        programs = -(-num_programs * splits // hardware.num_sms)  # of the busiest SM
        waves = -(-programs // config.programs_per_sm)
        merge = 0.0 if splits == 1 else MERGE_BLOCKS + splits * MERGE_BLOCKS_PER_SPLIT
        alone = SLOW_ALONE if slow_alone and config.programs_per_sm > 1 else 1.0
        return max(programs, alone) * -(-num_blocks // splits) + waves * STARTUP_BLOCKS + merge

    return min(range(1, max(1, min(MAX_SPLITS, num_blocks)) + 1), key=duration)


LARGE_TILE = 64 * 128

# of `prefers_decode`: a tile of the decode kernel in tiles of the forward kernels, by head dim; the keys that one of those
# works through while parts are merged, by their rows. H200, 128 to 1024 queries over 1k to 32k keys, 2026-12-01
DECODE_TILE = {16: 1.3, 32: 1.3, 64: 1.3, 128: 1.7, 256: 1.9}
MERGE_KEYS, MERGE_KEYS_PER_ROW = 500, 0.25

# of `split_count`; H200, 2026-11-22
STARTUP_BLOCKS = 2.0
MERGE_BLOCKS = 2.0
MERGE_BLOCKS_PER_SPLIT = 0.03
SLOW_ALONE = 1.2


@functools.lru_cache(maxsize=4096)
def _choose(crowded: bool, dtype: str, headdim: int, paged: bool, hardware: Hardware) -> DecodeConfig:
    if hardware.kind == "cpu":
        return INTERPRETER
    if dtype == "float32":
        table = FP32
    elif hardware.kind == "hip":
        table = RDNA if hardware.arch.startswith("gfx1") else CDNA
    elif hardware.arch in ("sm_90", "sm_100"):
        table = (HOPPER_MANY_PAGED if paged else HOPPER_MANY) if crowded and headdim % 16 == 0 else HOPPER
    else:
        table = NVIDIA
    config = table[head_dim_pad(headdim)]
    # rows whose alignment the compiler cannot know are loaded element by element, through registers
    return config if headdim % 16 == 0 else config._replace(block_n=min(config.block_n, 32), num_warps=8)


INTERPRETER = DecodeConfig(16, 4, 1, 1)

# H200, bf16, 2026-11-22 and 30, benchmarks/tune_decode.py: 4.3 TB/s at 1 us latency need 33 KB in flight on every SM; two
# programs of 104 KB hold 192 KB, and as no third one fits beside them, `split_count` knows how many run at the same time
HOPPER = {
    16: DecodeConfig(128, 4, 4, 4),
    32: DecodeConfig(128, 4, 4, 4),
    64: DecodeConfig(128, 4, 4, 2, 3),
    128: DecodeConfig(64, 4, 4, 2, 3),
    256: DecodeConfig(32, 4, 4, 2, 3),
}
# More tiles than those have room for would run in waves that begin and end together. Programs so small that all fit at once
# read at full speed throughout: 384 tiles of 8k keys 12 % faster, 1024 at head dim 64 3 %, over pages 1 to 20 %.
HOPPER_MANY = HOPPER | {64: DecodeConfig(64, 2, 2, 8), 128: DecodeConfig(64, 2, 2, 4), 256: DecodeConfig(32, 2, 2, 4)}
HOPPER_MANY_PAGED = HOPPER_MANY | {64: DecodeConfig(64, 2, 4, 4)}
# Of gathered keys the page's number travels first: a loop begins sooner with fewer blocks in flight (up to 10 % for 4 blocks, 0
# to 3 % for 62 to 128), and is 1 to 2 % slower when it runs for 256.
SHORT_GATHER = 128
# By rows and head dim, for tiles whose products count as much as their bytes. With 128 rows 1.2 to 1.9 times as fast as with
# 64, which such queries had: 128 to 512 of them over 8k and 32k keys, head dims 64 to 256. With 64 rows 1.03 to 1.8 times as
# fast with 4 warps and 3 stages, which leave room for a second program on an SM, as with 8 and 4: 64 rows of 8 to 512 key
# heads over 2k and 8k keys, head dim 128; at 64, up to 1.15 times as fast as with 128 keys and 4 stages. bf16, 2026-12-01
HOPPER_MANY_ROWS = {
    (64, 64): DecodeConfig(64, 4, 3, 2),
    (64, 128): DecodeConfig(64, 4, 3, 2),
    (128, 16): DecodeConfig(64, 4, 3, 2),
    (128, 32): DecodeConfig(64, 4, 3, 2),
    (128, 64): DecodeConfig(64, 4, 3, 2),
    (128, 128): DecodeConfig(64, 8, 3, 1),
    (128, 256): DecodeConfig(64, 8, 2, 1),
}
# unmeasured hardware: chosen to fit the smallest shared memory of the family
NVIDIA = {
    16: DecodeConfig(64, 4, 3, 4),
    32: DecodeConfig(64, 4, 3, 4),
    64: DecodeConfig(64, 4, 3, 2),
    128: DecodeConfig(64, 4, 2, 2),
    256: DecodeConfig(32, 4, 2, 1),
}
CDNA = {
    16: DecodeConfig(64, 4, 1, 2),
    32: DecodeConfig(64, 4, 1, 2),
    64: DecodeConfig(64, 4, 1, 2),
    128: DecodeConfig(64, 4, 1, 2),
    256: DecodeConfig(32, 4, 1, 2),
}
RDNA = {**CDNA, 256: DecodeConfig(16, 4, 1, 2)}
FP32 = {
    16: DecodeConfig(64, 4, 2, 2),
    32: DecodeConfig(64, 4, 2, 2),
    64: DecodeConfig(32, 4, 2, 2),
    128: DecodeConfig(32, 4, 2, 2),
    256: DecodeConfig(16, 4, 2, 2),
}
