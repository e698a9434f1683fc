"""Dropout bits: the plain PyTorch decision, its twin in Triton, and their statistics."""

import itertools
import math

import pytest
import torch

from flash_attn import random_bits

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402

from flash_attn.kernels.algebra import dropout  # noqa: E402
from flash_attn.kernels.algebra.arguments import Dropout  # noqa: E402

WORD = 2**32


def state(seed: int, offset: int) -> torch.Tensor:
    return torch.tensor([seed, offset], dtype=torch.int64)


def mask(seed=1, p=0.5, heads=1, rows=256, cols=256) -> torch.Tensor:
    return random_bits.keep_mask(state(seed, 2**40 + 3), p, *map(torch.arange, (heads, rows, cols)))


def philox_4x32_plain(counter, key, rounds=10):
    c, k = list(counter), list(key)
    for _ in range(rounds):
        a, b = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [b // WORD ^ c[1] ^ k[0], b % WORD, a // WORD ^ c[3] ^ k[1], a % WORD]
        k = [(k[0] + 0x9E3779B9) % WORD, (k[1] + 0xBB67AE85) % WORD]
    return tuple(c)


def patch_hash_plain(row_patch, col_patch, row_key, col_key, mix_key):
    x = (row_patch * 0x9E3779B1 + row_key) % WORD ^ (col_patch * 0x85EBCA77 + col_key) % WORD
    x = x * 0x7FEB352D % WORD
    x = x ^ x >> 15 ^ mix_key
    return x * 0xD35A2D97 % WORD, x * 0x846CA68B % WORD


def keep_plain(seed, offset, p, batch_head, row, col):
    words = (offset % WORD, offset // WORD % WORD, batch_head, 0)
    keys = philox_4x32_plain(words, (seed % WORD, seed // WORD % WORD))[:3]
    high, low = patch_hash_plain(row // 16 * 8 + row % 8, col // 16 * 8 + col % 8, *keys)
    word = high if row // 8 % 2 else low
    return (word >> 16 if col // 8 % 2 else word % 2**16) < round((1 - p) * 2**16)


WORDS_4X32 = [
    # Random123's known answers for philox4x32-10: counter, key, result
    ((0,) * 4, (0,) * 2, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((WORD - 1,) * 4, (WORD - 1,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize("counter, key, result", WORDS_4X32)
def test_philox_4x32_known_answers(counter, key, result):
    words = random_bits.philox_4x32(tuple(map(torch.tensor, counter)), tuple(map(torch.tensor, key)))
    assert tuple(map(int, words)) == result == philox_4x32_plain(counter, key)


def test_multiply_is_exact():
    for a, b in itertools.product((0, 1, 0xFFFF, 0x10000, 0x80000001, WORD - 1), repeat=2):
        high, low = random_bits.multiply(torch.tensor(a), b)
        assert int(high) * WORD + int(low) == a * b


@pytest.mark.parametrize("seed, offset", [(0, 0), (2**63 - 1, 2**63 - 1), (-1, -2), (0x123456789ABCDEF, 2**33 + 5)])
def test_keep_mask_equals_plain_python(seed, offset):
    heads, rows, cols = [0, 7, 2**31 - 1], [0, 5, 8, 23, 2**31 - 9], [1, 9, 15, 16, 1000, 2**31 - 1]
    actual = random_bits.keep_mask(state(seed, offset), 0.3, *map(torch.tensor, (heads, rows, cols)))
    expected = [[[keep_plain(seed, offset, 0.3, h, r, c) for c in cols] for r in rows] for h in heads]
    assert actual.tolist() == expected


def test_any_tiles_give_the_same_bits():
    whole = mask(heads=3, rows=70, cols=90)
    for block_m, block_n in ((1, 90), (16, 16), (7, 13), (70, 1)):
        rows = torch.arange(70).split(block_m)
        cols = torch.arange(90).split(block_n)
        tiles = [
            torch.cat([random_bits.keep_mask(state(1, 2**40 + 3), 0.5, torch.arange(3), r, c) for c in cols], 2)
            for r in rows
        ]
        assert torch.equal(torch.cat(tiles, 1), whole)


def test_empty_axes():
    for shape in ((0, 4, 4), (2, 0, 4), (2, 4, 0)):
        assert random_bits.keep_mask(state(1, 2), 0.5, *map(torch.arange, shape)).shape == shape


@triton.jit
def mask_kernel(rng_state, keep_below, out, head, row, col, size, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    arguments = Dropout(rng_state, keep_below, 1.0)
    key = dropout.load_key(arguments, tl.program_id(0) * 0 + head)
    row_lanes = row % 16 + tl.arange(0, BLOCK_M)[:, None]
    col_lanes = col % 16 + tl.arange(0, BLOCK_N)[None, :]
    row_word = dropout.row_words(arguments, key, row - row % 16, row_lanes)
    col_word = dropout.col_words(arguments, key, col - col % 16, col_lanes)
    keep = dropout.keep_mask(arguments, dropout.random_bits(arguments, key, row_lanes, col_lanes, row_word, col_word))
    tl.store(out + tl.arange(0, BLOCK_M)[:, None] * size + tl.arange(0, BLOCK_N)[None, :], keep.to(tl.int8))


def triton_mask(device, seed, offset, p, head, row, col, block_m, block_n):
    out = torch.empty(block_m, block_n, dtype=torch.int8, device=device)
    rng_state = state(seed, offset).to(device)
    mask_kernel[(1,)](
        rng_state, random_bits.keep_below(p), out, head, row, col, block_n, BLOCK_M=block_m, BLOCK_N=block_n
    )
    return out.bool()


CORNERS = [
    (0, 0, 0.5, 0, 0, 0, 16, 32),
    (2**63 - 1, 2**62 + 12345, 0.1, 5, 1024, 4096, 32, 16),
    (-1, -7, 0.17, 100_003, 2**20 + 8, 2**30 + 16, 16, 64),
    (987654321012345, 1, 0.9, 2**31 - 1, 2**31 - 64, 2**31 - 64, 32, 32),
]


def check_triton_twin(device, seed, offset, p, head, row, col, block_m, block_n):
    expected = random_bits.keep_mask(
        state(seed, offset),
        p,
        torch.tensor([head]),
        torch.arange(row, row + block_m),
        torch.arange(col, col + block_n),
    )
    actual = triton_mask(device, seed, offset, p, head, row, col, block_m, block_n)
    assert torch.equal(actual.cpu(), expected[0])


@pytest.mark.interpreter
@pytest.mark.parametrize("corner", CORNERS)
def test_triton_interpreted_gives_the_same_bits(corner):
    if not triton.knobs.runtime.interpret:
        pytest.skip("needs TRITON_INTERPRET=1")
    check_triton_twin("cpu", *corner)


@pytest.mark.gpu
@pytest.mark.parametrize("corner", CORNERS)
def test_triton_compiled_gives_the_same_bits(corner, device):
    check_triton_twin(device, *corner)


@triton.jit
def marks_kernel(rng_state, keep_below, rescale, weights, dweights, out, SIZE: tl.constexpr):
    """By bits, and by marks: the weights that multiply v, and gradients of all weights."""
    arguments = Dropout(rng_state, keep_below, rescale)
    lanes = tl.arange(0, SIZE)
    offsets = lanes[:, None] * SIZE + lanes[None, :]
    tile, gradient = tl.load(weights + offsets), tl.load(dweights + offsets)
    bits = dropout.tile_bits(arguments, dropout.load_key(arguments, 3), 48, lanes[:, None], 4096, lanes[None, :])
    marked = dropout.mark_dropped(arguments, bits, tile)
    area = SIZE * SIZE
    tl.store(out + offsets, dropout.drop(arguments, bits, tile))
    tl.store(out + area + offsets, dropout.drop_marked(marked))
    tl.store(out + 2 * area + offsets, dropout.drop(arguments, bits, gradient) * dropout.kept_scale(arguments))
    tl.store(out + 3 * area + offsets, dropout.drop_backward(arguments, marked, gradient))
    tl.store(out + 4 * area + offsets, tl.abs(marked))


def check_marks(device, seed):
    """Weights that are 0 are not kept apart; their gradient meets a factor of 0."""
    generator = torch.Generator().manual_seed(seed)
    weights, dweights = torch.rand(32, 32, generator=generator), torch.randn(32, 32, generator=generator)
    weights[weights < 0.1] = 0.0
    weights[5, 7] = math.nan
    out = torch.full((5, 32, 32), math.nan, device=device)
    marks_kernel[(1,)](
        state(seed, 7).to(device),
        random_bits.keep_below(0.3),
        1 / 0.7,
        weights.to(device),
        dweights.to(device),
        out,
        SIZE=32,
    )
    by_bits, by_marks, gradient, marked_gradient, unmarked = out.cpu()
    keep = random_bits.keep_mask(
        state(seed, 7), 0.3, torch.tensor([3]), torch.arange(48, 80), torch.arange(4096, 4128)
    )[0]
    assert by_marks[5, 7].isnan() and (gradient * weights)[5, 7].isnan() and (marked_gradient * weights)[5, 7].isnan()
    by_bits[5, 7] = by_marks[5, 7] = weights[5, 7] = unmarked[5, 7] = 0.0
    assert torch.equal(by_bits, torch.where(keep, weights, 0.0)) and torch.equal(by_marks, by_bits)
    assert torch.equal(unmarked, weights)
    assert torch.equal(gradient * weights, marked_gradient * weights)


@pytest.mark.interpreter
def test_marks_interpreted(seed):
    if not triton.knobs.runtime.interpret:
        pytest.skip("needs TRITON_INTERPRET=1")
    check_marks("cpu", seed)


@pytest.mark.gpu
def test_marks_compiled(seed, device):
    check_marks(device, seed)


SIGMAS = 5.0


def z_score(successes: torch.Tensor, p: float) -> float:
    """Standard deviations between the fraction of successes and its probability."""
    n = successes.numel()
    return abs(successes.double().sum().item() - n * p) / math.sqrt(n * p * (1 - p))


def chi_square_z(counts: torch.Tensor, probabilities: torch.Tensor) -> float:
    """Chi-square of independent cells as standard deviations above its mean."""
    expected = counts.sum() * probabilities
    freedom = counts.numel() - 1
    statistic = ((counts - expected) ** 2 / expected).sum().item()
    return (statistic - freedom) / math.sqrt(2 * freedom)


def joint_z(bits: list[torch.Tensor], p_keep: float) -> float:
    """Chi-square of the joint outcomes of equally shaped masks against independence."""
    code = sum(b.long() << i for i, b in enumerate(bits))
    counts = torch.bincount(code.flatten(), minlength=1 << len(bits)).double()
    ones = torch.tensor([bin(i).count("1") for i in range(1 << len(bits))]).double()
    return chi_square_z(counts, p_keep**ones * (1 - p_keep) ** (len(bits) - ones))


@pytest.mark.parametrize("p", [0.1, 0.17, 0.5])
@pytest.mark.parametrize("seed", [0, 42, 2**62 + 9])
def test_fraction_dropped(p, seed):
    kept = mask(seed, p, heads=4)
    p_keep = random_bits.keep_below(p) / random_bits.LEVELS
    assert abs(p_keep - (1 - p)) < 1 / random_bits.LEVELS
    assert z_score(kept, p_keep) < SIGMAS
    for axis in (1, 2):  # no row and no column is special
        counts = kept.double().sum(axis)
        worst = (counts - kept.shape[axis] * p_keep).abs().max() / math.sqrt(kept.shape[axis] * p_keep * (1 - p_keep))
        assert worst < SIGMAS + 0.5


@pytest.mark.parametrize("p", [0.1, 0.17, 0.5])
def test_neighbours_are_independent(p):
    kept = mask(3, p, heads=8)
    p_keep = random_bits.keep_below(p) / random_bits.LEVELS
    for distance in (1, 2, 8, 16):
        assert joint_z([kept[:, :-distance], kept[:, distance:]], p_keep) < SIGMAS
        assert joint_z([kept[:, :, :-distance], kept[:, :, distance:]], p_keep) < SIGMAS


@pytest.mark.parametrize("p", [0.1, 0.17, 0.5])
def test_members_of_a_patch_are_independent(p):
    kept = mask(4, p, heads=8).unflatten(2, (16, 2, 8)).unflatten(1, (16, 2, 8))  # (N, 16, 2, 8, 16, 2, 8)
    members = [kept[:, :, r, :, :, c] for r in (0, 1) for c in (0, 1)]
    p_keep = random_bits.keep_below(p) / random_bits.LEVELS
    assert joint_z(members, p_keep) < SIGMAS
    correlation = torch.corrcoef(torch.stack([m.flatten().double() for m in members]))
    bound = SIGMAS / math.sqrt(members[0].numel())
    assert (correlation - torch.eye(4)).abs().max() < bound


def test_heads_are_independent():
    kept = mask(5, 0.3, heads=9)
    p_keep = random_bits.keep_below(0.3) / random_bits.LEVELS
    assert joint_z([kept[:-1], kept[1:]], p_keep) < SIGMAS
    assert joint_z([kept[:1].expand(8, -1, -1), kept[1:]], p_keep) < SIGMAS


def test_seeds_and_offsets_are_independent():
    p_keep = random_bits.keep_below(0.3) / random_bits.LEVELS
    axes = tuple(map(torch.arange, (2, 256, 256)))
    states = [(1, 1), (2, 1), (1, 2), (2, 2), (1 + WORD, 1), (1, 1 + WORD), (-1, 1)]
    masks = [random_bits.keep_mask(state(*s), 0.3, *axes) for s in states]
    for a, b in itertools.combinations(masks, 2):
        assert joint_z([a, b], p_keep) < SIGMAS


def test_keys_and_queries_are_not_symmetric():
    """Weight (i, j) tells nothing about weight (j, i)."""
    kept = mask(6, 0.5, heads=4)
    above = torch.ones(256, 256).triu(1).bool()
    assert joint_z([kept[:, above], kept.transpose(1, 2)[:, above]], 0.5) < SIGMAS


@pytest.mark.parametrize("p", [0.1, 0.5])
def test_spectrum_is_flat(p):
    """No lattice: every frequency of the mask has the power of white noise, an exponential variable."""
    kept = mask(7, p, heads=2, rows=1024, cols=1024).double()
    p_keep = random_bits.keep_below(p) / random_bits.LEVELS
    noise = (kept - p_keep) / math.sqrt(p_keep * (1 - p_keep))
    power = torch.fft.fft2(noise).abs() ** 2 / (1024 * 1024)
    assert power.max() < math.log(power.numel()) + 10


@pytest.mark.parametrize("step", [1, 4, 16, 64, 256])
def test_corners_of_rectangles_are_independent(step):
    """The four corners of a rectangle share two rows and two keys, the weak point of hashes that combine both."""
    kept = mask(8, 0.5, heads=2, rows=1024, cols=1024)
    for other in (1, 8, 32, 128):
        corners = [kept[:, r : r + 1024 - step, c : c + 1024 - other] for r in (0, step) for c in (0, other)]
        assert joint_z(corners, 0.5) < SIGMAS + 1
