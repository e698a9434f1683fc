"""Spans against plain Python, and inside their tensors whatever the arrays of lengths hold."""

import itertools

import pytest
import torch

from flash_attn.backends import spans as host
from flash_attn.backends.base import Operands

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402

from flash_attn.kernels.algebra.arguments import Sequences  # noqa: E402
from flash_attn.kernels.algebra.span import clamp, load_span  # noqa: E402

pytestmark = [
    pytest.mark.interpreter,
    pytest.mark.skipif(not triton.knobs.runtime.interpret, reason="needs TRITON_INTERPRET=1"),
    pytest.mark.filterwarnings("ignore:overflow encountered"),  # numpy's word for what wraps around on a GPU
]

TOTAL_Q, TOTAL_K = 40, 56
HOSTILE = (-(2**31), -7, 0, 3, 17, 56, 57, 2**31 - 1)


@triton.jit
def span_kernel(
    sequences, seqlen_q, seqlen_k, total_q, total_k, out, step, N: tl.constexpr, PAGED: tl.constexpr
):  # fmt: skip
    i = tl.arange(0, N)
    span = load_span(sequences, PAGED, i * step, seqlen_q, seqlen_k, total_q, total_k)
    tl.store(out + i * 4, span.start_q)
    tl.store(out + i * 4 + 1, span.seqlen_q)
    tl.store(out + i * 4 + 2, span.start_k)
    tl.store(out + i * 4 + 3, span.seqlen_k)


def load(size, step=1, paged=False, seqlen_q=TOTAL_Q, seqlen_k=TOTAL_K, appended=None, **arrays):
    """(size, 4): start_q, seqlen_q, start_k, seqlen_k of batch entries 0, step, 2 step, ..."""
    padded = 1 << (size - 1).bit_length()
    room = padded * step + 1
    padded_arrays = {name: torch.nn.functional.pad(x, (0, room - x.numel())) for name, x in arrays.items()}
    sequences = Sequences(**padded_arrays, appended=appended)
    out = torch.empty(padded, 4, dtype=torch.int32)
    span_kernel[(1,)](sequences, seqlen_q, seqlen_k, TOTAL_Q, TOTAL_K, out, step, N=padded, PAGED=paged)
    return out[:size]


def int32(values):
    return torch.tensor(values, dtype=torch.int32)


def test_dense():
    assert load(2, seqlen_q=9, seqlen_k=11).tolist() == [[0, 9, 0, 11]] * 2


def test_packed():
    actual = load(3, cu_seqlens_q=int32([0, 5, 5, 40]), cu_seqlens_k=int32([0, 10, 14, 56]))
    assert actual.tolist() == [[0, 5, 0, 10], [5, 0, 10, 4], [5, 35, 14, 42]]


def test_seqused_and_leftpad():
    arrays = dict(cu_seqlens_q=int32([0, 4, 8, 12]), cu_seqlens_k=int32([0, 10, 20, 56]))
    used = load(3, **arrays, seqused_k=int32([3, 99, 0]))
    assert used[:, 2:].tolist() == [[0, 3], [10, 10], [20, 0]]
    padded = load(3, **arrays, seqused_k=int32([3, 99, 20]), leftpad_k=int32([2, 4, 30]))
    assert padded[:, 2:].tolist() == [[2, 1], [14, 6], [50, 0]]


@pytest.mark.parametrize("paged", [False, True])
def test_appended_keys_lie_behind_those_in_use(paged):
    """A length below zero is none, and there is no place past the end."""
    used = int32([0, 10, -4, 54, 56, 2**31 - 1, -(2**31), 3])
    spans = load(8, paged=paged, appended=5, seqused_k=used)
    assert spans[:, 2:].tolist() == [[0, n] for n in (5, 15, 5, 56, 56, 56, 5, 8)]
    spans = load(8, paged=paged, appended=5, seqused_k=used, leftpad_k=int32([5, 3, 0, 56, -1, 2**31 - 1, 9, 7]))
    assert spans[:, 2:].tolist() == [[5, 0], [3, 12], [0, 5], [56, 0], [0, 56], [56, 0], [9, 0], [7, 1]]


def test_paged_lengths_are_not_starts():
    arrays = dict(cu_seqlens_q=int32([0, 4, 8]), cu_seqlens_k=int32([0, 30, 86]))
    assert load(2, paged=True, **arrays)[:, 2:].tolist() == [[0, 30], [0, 56]]
    assert load(2, paged=True, **arrays, seqused_k=int32([41, 5]))[:, 2:].tolist() == [[0, 41], [0, 5]]


def assert_inside(spans):
    start_q, seqlen_q, start_k, seqlen_k = spans.long().unbind(1)
    assert bool((spans >= 0).all()), spans[(spans < 0).any(1)][:5]
    assert bool((start_q + seqlen_q <= TOTAL_Q).all())
    assert bool((start_k + seqlen_k <= TOTAL_K).all())


@pytest.mark.parametrize("paged", [False, True], ids=["packed", "paged"])
@pytest.mark.parametrize("appended", [None, 7])
@pytest.mark.parametrize("optional", [(), ("seqused_k",), ("leftpad_k",), ("seqused_k", "leftpad_k")])
def test_hostile_contents_stay_inside(paged, optional, appended):
    """Every start, end, length in use and padding out of HOSTILE, two array elements apart."""
    records = list(itertools.product(HOSTILE, repeat=2 + len(optional)))
    fields = dict(zip(optional, zip(*[record[2:] for record in records], strict=True), strict=True)) if optional else {}
    pairs = int32([record[:2] for record in records]).flatten()
    arrays = {name: int32(values).repeat_interleave(2) for name, values in fields.items()}
    arrays |= dict(cu_seqlens_q=pairs, cu_seqlens_k=pairs)
    assert_inside(load(len(records), step=2, paged=paged, appended=appended, **arrays))


@pytest.mark.parametrize("leftpad", [False, True])
def test_the_backends_in_pytorch_clamp_alike(leftpad):
    values = (-5, 0, 3, 17, 100)
    walk = int32([value for pair in itertools.product(values, repeat=2) for value in pair])
    size = walk.numel() - 1
    pick = int32([values[i % 5] for i in range(size)])
    arrays = dict(cu_seqlens_q=walk, cu_seqlens_k=walk.flip(0).contiguous(), seqused_k=pick)
    if leftpad:
        arrays["leftpad_k"] = pick.flip(0).contiguous()
    q, k = torch.empty(TOTAL_Q, 1, 8), torch.empty(TOTAL_K, 1, 8)
    for appended in (0, 7):
        expected = host.spans(Operands(q, k, k, 1.0, TOTAL_Q, TOTAL_K, **arrays, appended=appended))
        actual = load(size, appended=appended or None, **arrays).tolist()
        assert actual == [[s.start_q, s.seqlen_q, s.start_k, s.seqlen_k] for s in expected]


@triton.jit
def clamp_kernel(value, low, high, out, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(out + i, clamp(tl.load(value + i), tl.load(low + i), tl.load(high + i)))


def test_clamp():
    value, low, high = int32([-5, 5, 15, 5, -1]), int32([0, 0, 0, 8, 8]), int32([10, 10, 10, 3, 3])
    out = torch.empty(8, dtype=torch.int32)
    pad = (0, 3)
    clamp_kernel[(1,)](*(torch.nn.functional.pad(x, pad) for x in (value, low, high)), out, N=8)
    assert out[:5].tolist() == [0, 5, 10, 8, 8]
