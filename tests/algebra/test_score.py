"""Scores against the reference's formula, their gradient against a numeric derivative of it."""

import itertools

import pytest
import torch

from flash_attn import reference

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402

from flash_attn.kernels.algebra import score as algebra  # noqa: E402
from flash_attn.kernels.algebra.arguments import Score  # noqa: E402
from flash_attn.kernels.algebra.span import Span  # noqa: E402

pytestmark = [
    pytest.mark.interpreter,
    pytest.mark.skipif(not triton.knobs.runtime.interpret, reason="needs TRITON_INTERPRET=1"),
]

ROWS, COLS = 16, 32
LN_2 = 0.6931471805599453


@triton.jit
def score_kernel(
    qk, ds, tile, gradient, slopes, softmax_scale, softcap, seqlen_q, seqlen_k,
    ROWS: tl.constexpr, COLS: tl.constexpr, NEGATIVE: tl.constexpr, HIDDEN: tl.constexpr, ONE_SIDED: tl.constexpr,
):  # fmt: skip
    score = Score(
        softmax_scale, softcap=softcap, alibi_slopes=slopes, stride_alibi_b=0, exact=1, negative=1 if NEGATIVE else None,
        one_sided=1 if ONE_SIDED else None,
    )  # fmt: skip
    rows, cols = tl.arange(0, ROWS)[:, None], tl.arange(0, COLS)[None, :]
    offsets = rows * COLS + cols
    span = Span(0, 0, seqlen_q, seqlen_k)
    x = tl.load(qk + offsets)
    slope = algebra.load_slope(score, tl.program_id(0), 1)
    scores = algebra.score_forward(x, algebra.key_distance(rows, cols, span), score, slope)
    tl.store(tile + offsets, scores * algebra.unit_log2(score))
    scores = tl.where(cols < HIDDEN, float("-inf"), scores)
    upstream = tl.load(ds + offsets)
    tl.store(gradient + offsets, algebra.score_backward(upstream, scores, x, score) * algebra.gradient_scale(score))


def run(qk, ds, softmax_scale, softcap, slopes, seqlens, hidden=0, one_sided=False):
    tile, gradient = torch.empty_like(qk), torch.empty_like(qk)
    score_kernel[(1,)](
        qk, ds, tile, gradient, slopes, abs(softmax_scale), softcap or None, *seqlens,
        ROWS=ROWS, COLS=COLS, NEGATIVE=softmax_scale < 0, HIDDEN=hidden, ONE_SIDED=one_sided,
    )  # fmt: skip
    return tile.double() * LN_2, gradient.double()


def formula(qk, softmax_scale, softcap, slopes, seqlens):
    """reference.scores of operands whose product is qk, at the distances of longer sequences."""
    identity = torch.eye(qk.shape[0], dtype=torch.float64)
    s = reference.scores(
        identity[None, :, None], qk.T[None, :, None], softmax_scale=softmax_scale, softcap=softcap
    )[0, 0]  # fmt: skip
    if slopes is not None:
        distance = reference.distance(*seqlens)[: qk.shape[0], : qk.shape[1]]
        s = s - slopes[1].double() * distance.abs()
    return s


CASES = list(itertools.product((0.3, -0.7), (0.0, 4.0), (None, 0.25), ((16, 32), (50, 32), (16, 90))))


@pytest.mark.parametrize("softmax_scale, softcap, slope, seqlens", CASES)
def test_score_and_gradient(softmax_scale, softcap, slope, seqlens, seed):
    generator = torch.Generator().manual_seed(seed)
    qk, ds = (4.0 * torch.randn(ROWS, COLS, generator=generator) for _ in range(2))
    slopes = None if slope is None else torch.tensor([9.0, slope])
    actual, gradient = run(qk, ds, softmax_scale, softcap, slopes, seqlens)
    words = softmax_scale, softcap, slopes, seqlens
    torch.testing.assert_close(actual, formula(qk.double(), *words), rtol=2e-6, atol=2e-6)

    step = 1e-5
    change = formula(qk.double() + step, *words) - formula(qk.double() - step, *words)
    torch.testing.assert_close(gradient, ds.double() * change / (2 * step), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("seqlens", [(16, 48), (16, 90)])
def test_one_sided_distances_are_what_they_are(seqlens, seed):
    """Where no key lies behind a row's diagonal, the absolute value changes nothing."""
    generator = torch.Generator().manual_seed(seed)
    words = torch.randn(ROWS, COLS, generator=generator), torch.ones(ROWS, COLS), 0.3, 0.0, torch.tensor([9.0, 0.25])
    calls = [run(*words, seqlens, one_sided=one_sided) for one_sided in (False, True)]
    assert all(map(torch.equal, *calls))
    behind = run(*words, (ROWS, COLS // 2), one_sided=True)[0]
    assert behind[0, -1] > run(*words, (ROWS, COLS // 2))[0][0, -1]


def test_gradient_of_a_saturated_softcap_is_zero():
    qk = torch.full((ROWS, COLS), 1e6)
    actual, gradient = run(qk, torch.ones_like(qk), 1.0, 5.0, None, (ROWS, COLS))
    assert torch.all(actual.float() == 5.0) and torch.all(gradient == 0.0)


@pytest.mark.parametrize("slope", [None, 0.25])
@pytest.mark.parametrize("softcap", [0.0, 4.0])
def test_hidden_scores_pass_nothing_on(softcap, slope, seed):
    """Their ds is 0, which no derivative may turn into NaN; the others do not notice."""
    generator = torch.Generator().manual_seed(seed)
    qk, ds = (4.0 * torch.randn(ROWS, COLS, generator=generator) for _ in range(2))
    ds[:, :8] = 0.0
    words = 0.3, softcap, None if slope is None else torch.tensor([9.0, slope]), (ROWS, COLS)
    _tile, gradient = run(qk, ds, *words, hidden=8)
    assert torch.all(gradient[:, :8] == 0.0)
    assert torch.equal(gradient, run(qk, ds, *words)[1])


@triton.jit
def slope_kernel(slopes, stride, out, N: tl.constexpr):
    i = tl.arange(0, N)
    score = Score(1.0, alibi_slopes=slopes, stride_alibi_b=stride)
    tl.store(out + i, algebra.load_slope(score, i // 4, i % 4))


@pytest.mark.parametrize("batched", [False, True])
def test_slope_of_each_head(batched):
    slopes = torch.arange(8.0).view(2, 4) if batched else torch.arange(4.0)
    out = torch.empty(8)
    slope_kernel[(1,)](slopes, 4 if batched else 0, out, N=8)
    assert torch.equal(out.view(2, 4), slopes.expand(2, 4))


@triton.jit
def tanh_kernel(x, out, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(out + i, algebra.tanh(tl.load(x + i)))


def test_tanh():
    x = torch.cat([torch.linspace(-20, 20, 1017), torch.tensor([0.0, -0.0, 1e-6, 1e30, -1e30, 1e4, -1e4])])
    out = torch.empty_like(x)
    tanh_kernel[(1,)](x, out, N=x.numel())
    torch.testing.assert_close(out, torch.tanh(x), rtol=0, atol=3e-7)
    special = torch.tensor([torch.inf, -torch.inf, torch.nan, 0.0])
    tanh_kernel[(1,)](special, out, N=4)
    torch.testing.assert_close(out[:4], torch.tensor([1.0, -1.0, torch.nan, 0.0]), equal_nan=True)
