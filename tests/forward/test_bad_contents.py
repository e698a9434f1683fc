"""Contents that are wrong and known only on the device, and empty things: never a crash, never a write outside.

A wrong number may give a wrong answer. What is checked is that every allocation of the package and every tensor given to
it lies between sentinels that stay untouched, and that well-formed neighbours in the batch get their right results.
"""

import math
import sys

import pytest
import torch

import flash_attn_2_cuda
from flash_attn import flash_attn_func, flash_attn_varlen_func
from tests.support import calls
from tests.support.cases import BF16, FP16

H, HK, D = 4, 2, 64
TOTAL_Q, TOTAL_K = 160, 192
INT_MAX, INT_MIN = 2**31 - 1, -(2**31)
GUARD = 4096  # elements on either side; a stray tile lands in it
SENTINEL = 7.0


@pytest.fixture
def device(request):
    with calls.running_on(request.param) as device:
        yield device


everywhere = pytest.mark.parametrize("device", calls.places("cpu", "gpu"), indirect=True)
everywhere_unpaged = pytest.mark.parametrize("device", calls.places("cpu", "gpu", "hopper"), indirect=True)


class Guarded:
    """Hands out views into larger buffers of sentinels."""

    def __init__(self):
        self.buffers = []

    def like(self, shape, dtype, device):
        """Uninitialised as far as anyone may rely on it: NaN inside, sentinels outside."""
        size = math.prod(shape)
        buffer = torch.full((size + 2 * GUARD,), SENTINEL, dtype=dtype, device=device)
        inside = buffer[GUARD : GUARD + size]
        inside.fill_(math.nan)
        self.buffers.append((buffer, size))
        return inside.view(shape)

    def copy(self, x):
        return self.like(x.shape, x.dtype, x.device).copy_(x)

    def check(self):
        for buffer, size in self.buffers:
            assert (buffer[:GUARD] == SENTINEL).all() and (buffer[GUARD + size :] == SENTINEL).all()


@pytest.fixture
def guarded(poison, monkeypatch):
    """Whatever flash_attn allocates without initialising is guarded, too; the sentinels are checked at the end."""
    guarded = Guarded()

    def instead_of(allocate, describe):
        def allocate_guarded(*args, **kwargs):
            caller = sys._getframe(1).f_globals.get("__name__", "")
            if caller.split(".")[0] not in ("flash_attn", "flash_attn_2_cuda"):
                return allocate(*args, **kwargs)
            shape, dtype, device = describe(*args, **kwargs)
            return guarded.like(shape, dtype, device) if dtype.is_floating_point else allocate(*args, **kwargs)

        return allocate_guarded

    monkeypatch.setattr(torch, "empty", instead_of(torch.empty, _describe_empty))
    monkeypatch.setattr(torch, "empty_like", instead_of(torch.empty_like, lambda x: (x.shape, x.dtype, x.device)))
    yield guarded
    guarded.check()


def _describe_empty(*shape, dtype=torch.float32, device="cpu"):
    return tuple(shape[0]) if isinstance(shape[0], (tuple, list, torch.Size)) else shape, dtype, device


def operands(device, seed, guarded, *, total_q=TOTAL_Q, total_k=TOTAL_K, dtype=BF16):
    shapes = [(total_q, H, D), (total_k, HK, D), (total_k, HK, D), (total_q, H, D)]
    return [
        guarded.copy(calls.randn(*s, dtype=dtype, device=device, seed=seed + i)) for i, s in enumerate(shapes)
    ]  # q, k, v, dout


def run(device, tensors, cu_q, cu_k, guarded, *, causal, backward=True, max_seqlen=200, **arrays):
    """varlen_fwd and varlen_bwd of flash_attn_2_cuda into guarded out, dq, dk, dv; every number is a list."""
    q, k, v, dout = tensors
    cu_q, cu_k = calls.int32(cu_q, device), calls.int32(cu_k, device)
    arrays = {name: calls.int32(x, device) for name, x in arrays.items()}
    optional = (arrays.get("seqused_k"), arrays.get("leftpad_k"), arrays.get("block_table"))
    words = (D**-0.5, False, causal, -1, -1, 0.0)
    out = guarded.like(q.shape, q.dtype, device)
    _, lse, _, rng_state = flash_attn_2_cuda.varlen_fwd(
        q, k, v, out, cu_q, cu_k, *optional, None, max_seqlen, max_seqlen, 0.0, *words, False, None
    )
    if not backward:
        return out, lse
    gradients = [guarded.like(x.shape, x.dtype, device) for x in (q, k, v)]
    flash_attn_2_cuda.varlen_bwd(
        dout,
        q,
        k,
        v,
        out,
        lse,
        *gradients,
        cu_q,
        cu_k,
        None,
        max_seqlen,
        max_seqlen,
        0.0,
        *words,
        False,
        None,
        rng_state,
    )
    return out, lse, *gradients


BAD_LENGTHS = {
    "decreasing": ([0, 60, 30, 160], [0, 100, 20, 192]),
    "past the end": ([0, 32, 64, 100000], [0, INT_MAX, 64, 300]),
    "negative": ([-7, 32, -20, 160], [INT_MIN, 64, 100, 192]),
    "all past the end": ([1000, 2000, 3000, 4000], [1000, 2000, 3000, 4000]),
    "one past the end": ([0, 32, 64, 161], [0, 32, 64, 193]),
    "extremes": ([INT_MIN, INT_MAX, INT_MIN, INT_MAX], [INT_MAX, INT_MIN, INT_MAX, INT_MIN]),
    "longer than promised": ([0, 10, 20, 160], [0, 10, 20, 192]),
}


@everywhere_unpaged
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("name", BAD_LENGTHS)
def test_lengths_stay_inside(name, causal, device, seed, guarded):
    tensors = operands(device, seed, guarded)
    max_seqlen = 32 if name == "longer than promised" else 200
    run(device, tensors, *BAD_LENGTHS[name], guarded, causal=causal, max_seqlen=max_seqlen)
    for x in tensors:
        assert x.isfinite().all(), "an operand was overwritten"


@everywhere_unpaged
def test_neighbours_of_a_bad_length_are_right(device, seed, guarded):
    """The last length is nonsense; the sequences before it are as they would be without it."""
    tensors = operands(device, seed, guarded)
    bad = run(device, tensors, [0, 40, 100, INT_MAX], [0, 70, 128, INT_MIN], guarded, causal=True)
    good = run(device, tensors, [0, 40, 100, 160], [0, 70, 128, 192], guarded, causal=True)
    calls.assert_equal((bad[0][:100], bad[1][:, :100], bad[2][:100]), (good[0][:100], good[1][:, :100], good[2][:100]))
    calls.assert_equal((bad[3][:128], bad[4][:128]), (good[3][:128], good[4][:128]))


BAD_COUNTS = {
    "used past the end": dict(seqused_k=[1000, INT_MAX, 193]),
    "used negative": dict(seqused_k=[-1, INT_MIN, 0]),
    "padding past the end": dict(leftpad_k=[1000, INT_MAX, 193]),
    "padding negative": dict(leftpad_k=[-1, INT_MIN, -1000]),
    "padding past what is used": dict(seqused_k=[5, INT_MIN, 64], leftpad_k=[6, INT_MAX, 64]),
}


@everywhere_unpaged
@pytest.mark.parametrize("name", BAD_COUNTS)
def test_key_counts_stay_inside(name, device, seed, guarded):
    check_key_counts(name, device, *operands(device, seed, guarded), guarded)


@everywhere
@pytest.mark.parametrize("name", BAD_COUNTS)
def test_key_counts_of_pages_stay_inside(name, device, seed, guarded):
    q, k, v, dout = operands(device, seed, guarded)
    k, v = (x.unflatten(0, (-1, 16)) for x in (k, v))
    check_key_counts(name, device, q, k, v, dout, guarded, block_table=[[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]])


def check_key_counts(name, device, q, k, v, dout, guarded, **table):
    lengths = ([0, 40, 100, 160], [0, 64, 128, 192])
    arrays = {**BAD_COUNTS[name], **table}
    out, _ = run(device, (q, k, v, dout), *lengths, guarded, causal=True, backward=False, **arrays)
    assert out.isfinite().all(), "keys outside the tensors were read"


BAD_PAGES = {
    "negative": [[0, -1, 2, 3], [INT_MIN, 5, 6, 7], [8, 9, -2, 11]],
    "too large": [[0, 12, 2, 3], [INT_MAX, 5, 6, 7], [8, 9, 100000, 11]],
    "none valid": [[-1] * 4, [12] * 4, [INT_MAX] * 4],
}


@everywhere
@pytest.mark.parametrize("name", BAD_PAGES)
@pytest.mark.parametrize("cu_k", [[0, 64, 128, 192], [0, INT_MAX, INT_MIN, 192]], ids=["lengths", "bad lengths"])
def test_pages_stay_inside(name, cu_k, device, seed, guarded):
    q, k, v, dout = operands(device, seed, guarded)
    k, v = (x.unflatten(0, (-1, 16)) for x in (k, v))
    out, _ = run(
        device, (q, k, v, dout), [0, 40, 100, 160], cu_k, guarded,
        causal=False, backward=False, block_table=BAD_PAGES[name],
    )  # fmt: skip
    assert out.isfinite().all(), "pages outside the cache were read"
    if name == "none valid" and cu_k[1] == 64:
        assert out.count_nonzero() == 0, "pages that do not exist have values"


@everywhere
def test_more_keys_than_the_table_names(device, seed, guarded):
    """cu_seqlens_k promises 192 keys, the table has room for 64."""
    q, k, v, dout = operands(device, seed, guarded)
    k, v = (x.unflatten(0, (-1, 16)) for x in (k, v))
    wide, narrow = (
        run(
            device, (q[:40], k, v, dout[:40]), [0, 40], [0, length], guarded,
            causal=True, backward=False, block_table=[[5, 0, 11, 2]],
        )
        for length in (192, 64)
    )  # fmt: skip
    calls.assert_equal(wide, narrow)


@everywhere_unpaged
@pytest.mark.parametrize("bad", [math.nan, math.inf], ids=str)
def test_bad_values_stay_in_their_sequence(bad, device, seed, guarded):
    """NaN or inf in the keys and values of one sequence do not reach the others."""
    q, k, v, dout = operands(device, seed, guarded)
    lengths = ([0, 40, 100, 160], [0, 64, 128, 192])
    good = run(device, (q, k, v, dout), *lengths, guarded, causal=True)
    k[64:128], v[64:128] = bad, bad
    poisoned = run(device, (q, k, v, dout), *lengths, guarded, causal=True)
    for rows in (slice(0, 40), slice(100, 160)):
        calls.assert_equal([x[rows] for x in (poisoned[0], poisoned[2])], [x[rows] for x in (good[0], good[2])])
        calls.assert_equal(poisoned[1][:, rows], good[1][:, rows])
    for keys in (slice(0, 64), slice(128, 192)):
        calls.assert_equal([x[keys] for x in poisoned[3:]], [x[keys] for x in good[3:]])


everywhere_and_interpreted = pytest.mark.parametrize(
    "device", calls.places("cpu", "gpu", "interpreter"), indirect=True
)  # in fp16: interpreted bf16 is wrong

EMPTY_DENSE = {
    "batch": ((0, 5, 4, 64), (0, 5, 2, 64)),
    "queries": ((2, 0, 4, 64), (2, 5, 2, 64)),
    "keys": ((2, 5, 4, 64), (2, 0, 2, 64)),
    "both": ((2, 0, 4, 64), (2, 0, 2, 64)),
    "heads": ((2, 5, 0, 64), (2, 5, 2, 64)),
}


@everywhere_and_interpreted
@pytest.mark.parametrize("options", [{}, dict(causal=True, dropout_p=0.3)], ids=str)
@pytest.mark.parametrize("name", EMPTY_DENSE)
def test_empty_dense(name, options, device, seed, guarded):
    shape_q, shape_k = EMPTY_DENSE[name]
    q, k, v = (
        guarded.copy(calls.randn(*shape, dtype=FP16, device=device, seed=seed + i)).requires_grad_()
        for i, shape in enumerate((shape_q, shape_k, shape_k))
    )
    out, lse, _ = flash_attn_func(q, k, v, **options, return_attn_probs=True)
    assert out.shape == q.shape and out.count_nonzero() == 0
    assert lse.shape == (shape_q[0], shape_q[2], shape_q[1]) and (lse == -math.inf).all()
    for x, gradient in zip((q, k, v), torch.autograd.grad(out, (q, k, v), torch.ones_like(out)), strict=True):
        assert gradient.shape == x.shape and gradient.count_nonzero() == 0


EMPTY_VARLEN = {
    "no sequences": (0, 0, [0], [0]),
    "no tokens": (0, 0, [0, 0, 0], [0, 0, 0]),
    "no queries": (0, 7, [0, 0, 0], [0, 3, 7]),
    "no keys": (7, 0, [0, 3, 7], [0, 0, 0]),
    "every other one": (7, 5, [0, 0, 7, 7], [0, 5, 5, 5]),
}


@everywhere_and_interpreted
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("name", EMPTY_VARLEN)
def test_empty_varlen(name, causal, device, seed, guarded):
    total_q, total_k, cu_q, cu_k = EMPTY_VARLEN[name]
    tensors = operands(device, seed, guarded, total_q=total_q, total_k=total_k, dtype=FP16)
    q, k, v = (x.requires_grad_() for x in tensors[:3])
    lengths = (calls.int32(cu_q, device), calls.int32(cu_k, device), total_q, total_k)
    out, lse, _ = flash_attn_varlen_func(q, k, v, *lengths, causal=causal, return_attn_probs=True)
    assert out.shape == q.shape and out.count_nonzero() == 0
    assert lse.shape == (H, total_q) and (lse == -math.inf).all()
    for x, gradient in zip((q, k, v), torch.autograd.grad(out, (q, k, v), torch.ones_like(out)), strict=True):
        assert gradient.shape == x.shape and gradient.count_nonzero() == 0


@everywhere_and_interpreted
def test_maximum_lengths_of_zero(device, seed, guarded):
    """A caller whose batch is empty says 0, whatever the arrays hold."""
    q, k, v, _ = operands(device, seed, guarded, total_q=7, total_k=7, dtype=FP16)
    cu = calls.int32([0, 0, 0], device)
    out = flash_attn_varlen_func(q, k, v, cu, cu, 0, 0)
    assert out.shape == q.shape and out.count_nonzero() == 0
