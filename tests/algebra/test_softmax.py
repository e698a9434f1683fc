"""The online softmax folded tile by tile against one softmax of the whole row, and the weights recomputed from its lse."""

import math

import pytest
import torch

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402

from flash_attn.kernels.algebra import softmax as algebra  # noqa: E402
from flash_attn.kernels.algebra.arguments import Score  # noqa: E402

pytestmark = [
    pytest.mark.interpreter,
    pytest.mark.skipif(not triton.knobs.runtime.interpret, reason="needs TRITON_INTERPRET=1"),
]

ROWS, TILE = 16, 8
LOG2_E = 1.0 / math.log(2.0)


@triton.jit
def step_in_parts(row_max, row_sums, tile, unit, ROWS: tl.constexpr, TILE: tl.constexpr, PARTS: tl.constexpr):
    """softmax_step with (ROWS, PARTS) parts of the row sums, as in kernels/hopper."""
    new_max = tl.maximum(row_max, tl.max(tile, 1))
    pivot_log2 = algebra.softmax_pivot(new_max, unit)
    weights = algebra.softmax_weights(tile, unit, pivot_log2[:, None])
    rescale = algebra.softmax_rescale(row_max, unit, pivot_log2)
    parts = tl.sum(weights.reshape(ROWS, TILE // PARTS, PARTS), 1)
    return weights, rescale, new_max, row_sums * rescale[:, None] + parts


@triton.jit
def fold_kernel(
    scores, values, unit, sinks, out, lse, tiles, ROWS: tl.constexpr, TILE: tl.constexpr, PARTS: tl.constexpr,
    BOUNDED: tl.constexpr,
):  # fmt: skip
    """out = softmax(scores * unit / log2(e)) values, one value per key; the row sums in one or several parts.

    Where there are sinks, each row has its own.
    """
    rows = tl.arange(0, ROWS)
    row_max = tl.full([ROWS], algebra.lowest_max(Score(1.0, bounded=1 if BOUNDED else None)), tl.float32)
    row_sum = tl.zeros([ROWS], tl.float32)
    row_sums = tl.zeros([ROWS, PARTS], tl.float32)
    acc = tl.zeros([ROWS], tl.float32)
    for number in range(tiles):
        cols = number * TILE + tl.arange(0, TILE)
        tile = tl.load(scores + rows[:, None] * tiles * TILE + cols[None, :])
        if BOUNDED:
            rescale = 1.0
            weights, row_sum = algebra.softmax_step_bounded(row_sum, tile, unit)
        elif PARTS == 1:
            weights, rescale, row_max, row_sum = algebra.softmax_step(row_max, row_sum, tile, unit)
        else:
            weights, rescale, row_max, row_sums = step_in_parts(row_max, row_sums, tile, unit, ROWS, TILE, PARTS)
        acc = acc * rescale + tl.sum(weights * tl.load(values + cols)[None, :], 1)
    if PARTS > 1:
        row_sum = tl.sum(row_sums, 1)
    inverse_sum, row_lse = algebra.softmax_finish(row_max, row_sum, unit, sinks, rows)
    tl.store(out + rows, acc * inverse_sum)
    tl.store(lse + rows, row_lse)


BOUNDED = 0  # in place of a number of parts


@pytest.fixture(params=[1, 4, BOUNDED], ids=["step", "step-in-parts", "step-bounded"])
def parts(request):
    return request.param


def fold(scores, values, scale, parts, sinks=None):
    out, lse = torch.empty(ROWS), torch.empty(ROWS)
    tiles = scores.shape[1] // TILE
    fold_kernel[(1,)](
        scores, values, scale * LOG2_E, sinks, out, lse, tiles,
        ROWS=ROWS, TILE=TILE, PARTS=max(parts, 1), BOUNDED=parts == BOUNDED,
    )  # fmt: skip
    return out, lse


def check_fold(scores, values, scale, parts, sinks=None):
    out, lse = fold(scores, values, scale, parts, sinks)
    exact = scores.double() * scale
    if sinks is not None:
        exact, values = torch.cat([exact, sinks.double()[:, None]], 1), torch.nn.functional.pad(values, (0, 1))
    empty = torch.isinf(exact).all(1)
    assert torch.equal(lse == -torch.inf, empty) and torch.all(out[empty] == 0.0)
    weights = torch.softmax(exact, 1).nan_to_num()
    torch.testing.assert_close(lse.double(), torch.logsumexp(exact, 1), rtol=1e-6, atol=2e-6)
    torch.testing.assert_close(out.double(), weights @ values.double(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("scale", [1.0, 0.125, 30.0, 1e-30])
@pytest.mark.parametrize("tiles", [1, 2, 5])
def test_folding_is_softmax(tiles, scale, seed, parts):
    generator = torch.Generator().manual_seed(seed)
    scores = 3.0 * torch.randn(ROWS, tiles * TILE, generator=generator)
    if parts == BOUNDED:
        scores = scores.clamp(-50.0 / scale, 50.0 / scale)
    check_fold(scores, torch.randn(tiles * TILE, generator=generator), scale, parts)


@pytest.mark.parametrize("hidden", [(0,), (1,), (3,), (0, 1), (1, 2), (0, 1, 2, 3)])
def test_tiles_without_a_visible_key(hidden, seed, parts):
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(ROWS, 4 * TILE, generator=generator)
    for tile in hidden:
        scores[:, tile * TILE : (tile + 1) * TILE] = -torch.inf
    check_fold(scores, torch.randn(4 * TILE, generator=generator), 1.0, parts)


def test_rows_hide_different_keys(seed, parts):
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(ROWS, 3 * TILE, generator=generator)
    scores[torch.rand(scores.shape, generator=generator) < 0.7] = -torch.inf
    scores[3], scores[7, 1:] = -torch.inf, -torch.inf
    check_fold(scores, torch.randn(3 * TILE, generator=generator), 1.0, parts)


@pytest.mark.parametrize("order", [1, -1], ids=["rising", "falling"])
def test_scores_far_apart(order, parts):
    """Each tile's maximum lies hundreds above or below the one before: sums must neither overflow nor lose the needle."""
    if parts == BOUNDED:
        pytest.skip("such scores are not bounded")
    scores = torch.linspace(-3000, 3000, 4 * TILE)[::1].repeat(ROWS, 1)
    check_fold(scores.flip(1) if order < 0 else scores, torch.arange(4.0 * TILE), 1.0, parts)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("scale", [1.0, 0.125, 1e-30])
def test_a_sink_is_one_more_score_without_a_value(scale, dtype, seed, parts):
    """In natural units whatever the scale; for rows without a key, too, and with sinks that outweigh everything or nothing."""
    generator = torch.Generator().manual_seed(seed)
    scores = 3.0 * torch.randn(ROWS, 2 * TILE, generator=generator)
    scores[3], scores[4] = -torch.inf, -torch.inf
    sinks = (3.0 * torch.randn(ROWS, generator=generator)).to(dtype)
    sinks[4:8] = torch.tensor([-torch.inf, -torch.inf, 1e4, -1e4])
    check_fold(scores, torch.randn(2 * TILE, generator=generator), scale, parts, sinks)


@triton.jit
def weights_kernel(
    scores, unit, lse, dweights, delta, dlse, weights, dscores, lse2, ROWS: tl.constexpr, TILE: tl.constexpr
):
    rows, cols = tl.arange(0, ROWS), tl.arange(0, TILE)
    offsets = rows[:, None] * TILE + cols[None, :]
    row_lse = algebra.lse_log2(tl.load(lse + rows))
    tl.store(lse2 + rows, row_lse)
    p = algebra.softmax_weights(tl.load(scores + offsets), unit, row_lse[:, None])
    tl.store(weights + offsets, p)
    row_delta = algebra.softmax_delta(tl.load(delta + rows), tl.load(dlse + rows), row_lse)
    tl.store(dscores + offsets, algebra.softmax_backward(p, tl.load(dweights + offsets), row_delta[:, None]))


def recompute(scores, scale, lse, dweights, delta, dlse):
    weights, dscores, lse2 = torch.empty_like(scores), torch.empty_like(scores), torch.empty_like(lse)
    weights_kernel[(1,)](
        scores, scale * LOG2_E, lse, dweights, delta, dlse, weights, dscores, lse2, ROWS=ROWS, TILE=TILE
    )  # fmt: skip
    return weights, dscores, lse2


def test_weights_and_gradient_from_lse(seed):
    generator = torch.Generator().manual_seed(seed)
    scores, dweights = (torch.randn(ROWS, TILE, generator=generator) for _ in range(2))
    exact = scores.double().mul(0.5).requires_grad_()
    p = torch.softmax(exact, 1)
    dlse = torch.randn(ROWS, generator=generator)
    (expected,) = torch.autograd.grad((p, torch.logsumexp(exact, 1)), exact, (dweights.double(), dlse.double()))
    lse = torch.logsumexp(exact, 1).float().detach()
    delta = (p * dweights).sum(1).float().detach()
    weights, dscores, _ = recompute(scores, 0.5, lse, dweights, delta, dlse)
    torch.testing.assert_close(weights.double(), p.detach(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(dscores.double(), expected, rtol=1e-4, atol=1e-5)


def test_rows_without_a_key_weigh_nothing():
    """Whatever their scores: the mask may be skipped where lse says that there is nothing."""
    lse = torch.full((ROWS,), -torch.inf)
    scores = torch.full((ROWS, TILE), 50.0)
    scores[: ROWS // 2] = -torch.inf
    dlse = torch.full((ROWS,), torch.nan)
    weights, dscores, lse2 = recompute(scores, 1.0, lse, torch.ones_like(scores), torch.zeros(ROWS), dlse)
    assert torch.all(lse2 == torch.inf)
    assert torch.all(weights == 0.0) and torch.all(dscores == 0.0)
