"""Splits and configurations of the decode kernel on invented hardware, and the plan of a call over a cache."""

import pytest
import torch

from flash_attn import launch
from flash_attn.hardware import Hardware
from flash_attn.launch.decode import (
    FORWARD_ROWS,
    MAX_SPLITS,
    SHORT_GATHER,
    WIDE_ROWS,
    DecodeConfig,
    block_m,
    decode_config,
    gathering,
    keys_per_split,
    prefers_decode,
    split_count,
    wide,
)
from flash_attn.launch.forward import pipeline_stages
from flash_attn.problem import AttentionProblem
from flash_attn.problem_kvcache import CacheTensors, describe_cache, rotary_advances

H200 = Hardware("cuda", "sm_90", 132, 227 * 1024)
SMALL_GPU = Hardware("cuda", "sm_86", 20, 99 * 1024)
CONFIG = DecodeConfig(64, 4, 3, 2)


@pytest.mark.parametrize("paged", [False, True])
@pytest.mark.parametrize("hardware", [H200, SMALL_GPU])
@pytest.mark.parametrize("programs", [1, 8, 63, 128, 512, 4096])
@pytest.mark.parametrize("blocks", [0, 1, 2, 32, 128, 2048])
def test_splits_are_within_bounds(programs, blocks, hardware, paged):
    splits = split_count(programs, blocks, paged, hardware, CONFIG)
    assert 1 <= splits <= max(1, min(MAX_SPLITS, blocks))


def test_few_programs_are_split_and_many_are_not():
    assert split_count(8, 128, False, H200, CONFIG) >= 8  # one sequence of 8k keys, 8 key heads
    assert split_count(8, 2048, False, H200, CONFIG) >= 16
    assert split_count(512, 128, False, H200, CONFIG) == 1  # the batch alone fills the GPU
    assert split_count(8, 1, False, H200, CONFIG) == 1


def test_splits_share_the_keys_evenly():
    """From one program to many, the busiest SM reads at most a fifth more than its share, where splits allow."""
    for programs in range(1, 4 * H200.num_sms):
        splits = split_count(programs, 512, False, H200, CONFIG)
        busiest = -(-programs * splits // H200.num_sms) * -(-512 // splits)
        share = programs * 512 / H200.num_sms
        assert busiest <= 1.2 * share or programs * MAX_SPLITS < H200.num_sms, f"{programs} programs: {busiest}"


@pytest.mark.parametrize("rows, tile", [(1, 16), (4, 16), (16, 16), (17, 32), (64, 64), (65, 64), (4000, 64)])
def test_tiles_hold_a_group(rows, tile):
    assert block_m(rows) == tile


@pytest.mark.parametrize("rows, tile", [(1, 16), (64, 64), (65, 128), (128, 128), (4000, 128)])
def test_wide_tiles_hold_more(rows, tile):
    assert block_m(rows, WIDE_ROWS) == tile


def test_what_has_wide_tiles():
    """What was measured: 16-bit rows, whose alignment the compiler knows, on Hopper."""
    problem = AttentionProblem("cache", "float16", 1, 512, 8192, 8, 8, 64)
    assert wide(problem, H200)
    assert not wide(problem, SMALL_GPU) and not wide(problem._replace(dtype="float32"), H200)
    assert not wide(problem._replace(headdim=40), H200)
    for headdim in (16, 32, 64, 128, 256):
        config = decode_config(problem._replace(headdim=headdim), WIDE_ROWS, 8, False, H200)
        assert config == decode_config(problem._replace(headdim=headdim), WIDE_ROWS, 10_000, True, H200)


def test_lone_programs_with_many_rows_are_split_where_two_fit():
    assert split_count(32, 128, True, H200, CONFIG) == 8
    assert split_count(32, 128, True, H200, CONFIG._replace(programs_per_sm=1)) == 4


def test_the_forward_kernel_takes_long_chunks():
    problem = AttentionProblem("cache", "bfloat16", 1, 128, 8192, 32, 8, 128)
    assert prefers_decode(problem, 64, 10**6, 10**6, 0, H200)
    assert prefers_decode(problem, 4096, 10**6, 1, 2, H200), "splits were asked for"
    with launch.pinned(keys_per_split=256):
        assert prefers_decode(problem, 64, 10**6, 1, 0, H200)
        assert not prefers_decode(problem, 65, 1, 1000, 0, H200), "the batch would choose the kernel"


# (head dim, queries, heads, key heads, keys): us of the decode kernel, of the forward kernel
MEASURED = {
    (128, 128, 8, 8, 8192): (26.9, 105.2),
    (128, 512, 8, 8, 8192): (60.6, 104.2),
    (128, 512, 8, 8, 32768): (163.5, 374.7),
    (128, 1024, 8, 8, 16384): (177.2, 195.3),
    (128, 128, 32, 8, 8192): (60.3, 104.2),
    (128, 256, 32, 8, 8192): (109.2, 104.9),
    (128, 384, 32, 8, 8192): (167.5, 107.2),
    (128, 128, 8, 8, 1024): (17.3, 19.1),
    (128, 128, 32, 8, 1024): (30.9, 19.6),
    (64, 128, 32, 8, 8192): (39.9, 85.0),
    (64, 256, 32, 8, 8192): (68.7, 86.7),
    (64, 384, 32, 8, 8192): (119.3, 86.7),
    (64, 512, 8, 8, 8192): (40.4, 83.7),
    (64, 128, 32, 8, 1024): (22.4, 15.6),
    (256, 128, 16, 16, 8192): (64.2, 172.4),
    (256, 256, 16, 4, 8192): (93.5, 170.3),
    (32, 256, 16, 16, 8192): (33.8, 97.5),
}


# The same of tiles of 64 rows. With 128 the decode kernel takes 171.3 of 171.8 us and 38.8 of 42.7 where it loses here, which
# is too little for parts in memory.
SETTLED = {
    (128, 128, 32, 8, 32768): (299, 378),
    (256, 256, 32, 8, 8192): (315, 174),
    (256, 128, 32, 8, 1024): (46, 33),
}


@pytest.mark.parametrize("case", [*MEASURED, *SETTLED], ids=str)
def test_a_few_tiles_of_queries_go_to_the_faster_kernel(case):
    """On an H200, 2026-12-01, bf16, one causal sequence."""
    headdim, seqlen_q, nheads, nheads_k, seqlen_k = case
    problem = AttentionProblem("cache", "bfloat16", 1, seqlen_q, seqlen_k, nheads, nheads_k, headdim, (None, 0))
    rows, (decode, forward) = seqlen_q * nheads // nheads_k, MEASURED.get(case) or SETTLED[case]
    tiles, forward_tiles = -(-rows // WIDE_ROWS) * nheads_k, -(-seqlen_q // FORWARD_ROWS) * nheads
    assert prefers_decode(problem, rows, tiles, forward_tiles, 0, H200) == (decode < forward)


@pytest.mark.parametrize("headdim", [1, 8, 16, 32, 40, 64, 96, 128, 256])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_120", "gfx942", "gfx1100"])
def test_every_problem_has_a_configuration(arch, dtype, headdim):
    kind = "hip" if arch.startswith("gfx") else "cuda"
    problem = AttentionProblem("cache", dtype, 4, 1, 4096, 32, 8, headdim)
    for num_tiles in (1, 10_000):
        plain, paged = (
            decode_config(problem, 16, num_tiles, pages, Hardware(kind, arch, 100, 64 * 1024))
            for pages in (False, True)
        )
        assert plain.block_n in (16, 32, 64, 128) and plain.num_warps in (2, 4, 8)
        assert plain[:2] == paged[:2] == gathering(paged, 1)[:2], "pages would change bits of a result"


def test_short_loops_over_gathered_keys_have_fewer_stages():
    assert gathering(CONFIG, 1) == CONFIG
    config = CONFIG._replace(gather_stages=2)
    assert gathering(config, SHORT_GATHER).num_stages == 2 and gathering(config, SHORT_GATHER + 1) == config


def test_many_tiles_run_in_small_programs():
    """Together on the GPU rather than in waves; but for batch invariance, which no batch may change."""
    problem = AttentionProblem("cache", "bfloat16", 4, 1, 4096, 32, 8, 128)
    few, many = (decode_config(problem, 16, tiles, False, H200) for tiles in (2 * H200.num_sms, 2 * H200.num_sms + 1))
    assert few.programs_per_sm == 2 < many.programs_per_sm and few.num_warps > many.num_warps
    with launch.pinned(keys_per_split=256):
        assert decode_config(problem, 16, 10_000, False, H200) == few


def test_a_lone_program_that_gathers_keys_is_split():
    assert split_count(128, 128, True, H200, CONFIG) == 2
    assert split_count(128, 128, False, H200, CONFIG) == 1


def test_pins():
    pinned = DecodeConfig(32, 2, 2, 1)
    problem = AttentionProblem("cache", "float16", 4, 1, 4096, 32, 8, 64)
    with launch.pinned(decode=pinned, keys_per_split=256):
        assert decode_config(problem, 16, 8, False, H200) is pinned and keys_per_split() == 256
    assert decode_config(problem, 16, 8, False, H200) != pinned and keys_per_split() is None


def test_pages_take_a_load_more():
    assert [pipeline_stages(n, paged=False) for n in (1, 2, 3)] == [1, 2, 3]
    assert [pipeline_stages(n, paged=True) for n in (1, 2, 3)] == [1, 3, 5]


@pytest.mark.parametrize(
    "words, advances",
    [
        ((False, -1, -1), False),
        ((True, -1, -1), True),
        ((False, 5, -1), True),
        ((False, -1, 0), True),
        ((False, 100, -1), False),  # a side as wide as the cache is none
        ((False, -1, 100), False),
    ],
)
def test_which_queries_advance(words, advances):
    assert rotary_advances(*words, 100) == advances


def test_the_problem_of_a_cache():
    q, cache, lengths = torch.zeros(3, 1, 8, 64), torch.zeros(5, 100, 2, 64), torch.zeros(3, dtype=torch.int32)
    tensors = CacheTensors(cache_seqlens=lengths, cache_leftpad=lengths)
    problem, seqlen_q, room = describe_cache(q, cache, cache, tensors, 0.1, True, 30, -1, 0.0, 0)
    assert (seqlen_q, room) == (1, 100)
    assert problem == AttentionProblem(
        "cache", "float32", 4, 1, 128, 8, 2, 64, (30, None), seqused_k=True, leftpad_k=True, aligned=True
    )
    table = torch.zeros(3, 7, dtype=torch.int32)
    problem, _, room = describe_cache(q, cache, cache, CacheTensors(block_table=table), 0.1, False, -1, -1, 5.0, 128)
    assert (problem.layout, problem.seqused_k, problem.softcap, room) == ("paged_cache", False, True, 700)
    assert (problem.page_size, problem.aligned) == (100, True)
    strided = torch.zeros(100, 5, 2, 64).transpose(0, 1)
    assert not describe_cache(q, strided, cache, CacheTensors(block_table=table), 0.1, False, -1, -1, 0.0, 0)[0].aligned
