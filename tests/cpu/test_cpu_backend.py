"""The backends written in PyTorch, "cpu" and "reference": every case, every layout, bad contents, memory."""

import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from flash_attn import backends, dispatch, hardware, problem, random_bits, reference
from flash_attn.backends import cpu, spans
from flash_attn.errors import UnsupportedProblem
from tests.support.cases import BF16, CASES, FP16, FP32, SMALL_CASES, Case
from tests.support.inputs import make_inputs
from tests.support.tolerance import expected

BACKENDS = ("cpu", "reference")
RNG_STATE = torch.tensor([20, 2**35 + 1])


@pytest.fixture(params=BACKENDS)
def backend(request):
    with backends.use(request.param):
        yield request.param


@pytest.fixture
def fixed_rng(monkeypatch):
    """The forward draws RNG_STATE."""
    draw = torch.Tensor.random_
    monkeypatch.setattr(
        torch.Tensor,
        "random_",
        lambda x, *args, **kwargs: x.copy_(RNG_STATE) if x.dtype == torch.int64 and x.shape == (2,) else draw(x, *args),
    )


def numbers(case: Case) -> tuple:
    """dropout_p, softmax_scale, causal, window_size_left, window_size_right, softcap."""
    return case.dropout_p, case.headdim**-0.5, case.causal, *case.window, case.softcap


def packing(case: Case, inputs) -> dict:
    if case.layout == "dense":
        return {}
    return dict(
        cu_seqlens_q=inputs.cu_seqlens_q,
        cu_seqlens_k=inputs.cu_seqlens_k,
        max_seqlen_q=inputs.max_seqlen_q,
        max_seqlen_k=inputs.max_seqlen_k,
    )


def run(case: Case, inputs, *, return_softmax=False):
    """Every result by name; the gradients are written into slices of one packed buffer where they fit."""
    out, lse, scores, rng_state, _ = dispatch.forward(
        inputs.q, inputs.k, inputs.v, *numbers(case), inputs.alibi_slopes, return_softmax, **packing(case, inputs)
    )
    if case.strides == "packed" and inputs.q.shape == inputs.k.shape:
        dq, dk, dv = torch.full((*inputs.q.shape[:-2], 3, *inputs.q.shape[-2:]), math.nan, dtype=case.dtype).unbind(-3)
    else:
        dq, dk, dv = (torch.full_like(x, math.nan) for x in (inputs.q, inputs.k, inputs.v))
    delta = dispatch.backward(
        inputs.dout,
        inputs.q,
        inputs.k,
        inputs.v,
        out,
        lse,
        dq,
        dk,
        dv,
        *numbers(case),
        inputs.alibi_slopes,
        False,
        rng_state,
        **packing(case, inputs),
    )
    return dict(out=out, lse=lse, scores=scores, dq=dq, dk=dk, dv=dv, delta=delta)


def keep_of(case: Case):
    if case.dropout_p == 0.0:
        return None
    masks = [
        random_bits.keep_mask(
            RNG_STATE,
            case.dropout_p,
            torch.arange(batch * case.nheads, (batch + 1) * case.nheads),
            torch.arange(seqlen_q),
            torch.arange(seqlen_k),
        )[None]
        for batch, (seqlen_q, seqlen_k) in enumerate(zip(case.seqlens_q, case.seqlens_k, strict=True))
    ]
    return masks if case.layout == "varlen" else torch.cat(masks)


@pytest.mark.parametrize("case", CASES + SMALL_CASES, ids=str)
def test_forward_and_backward_match_the_truth(backend, case, seed, fixed_rng):
    inputs = make_inputs(case, "cpu", seed)
    results = run(case, inputs)
    results.pop("scores")
    delta = results.pop("delta")
    expected(case, inputs, keep_of(case)).check(**results)
    rowsum = (inputs.dout.double() * results["out"].double()).sum(-1).transpose(-1, -2)
    torch.testing.assert_close(delta.double(), rowsum, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("features", ["plain", "causal", "everything"])
@pytest.mark.parametrize("layout", ["dense", "varlen"])
def test_float64_is_exact(backend, layout, features, seed, fixed_rng):
    extra = {
        "plain": {},
        "causal": dict(causal=True),
        "everything": dict(window=(11, 5), softcap=2.0, alibi="bh", dropout_p=0.3),
    }
    lengths = ((31, 31), (31, 31)) if layout == "dense" else ((31, 0, 7), (31, 4, 20))
    case = Case("float64", torch.float64, 24, 4, 2, *lengths, layout=layout, **extra[features])
    inputs = make_inputs(case, "cpu", seed)
    truth = expected(case, inputs, keep_of(case)).reference
    results = run(case, inputs)
    assert results["lse"].dtype == torch.float64
    for what in ("out", "lse", "dq", "dk", "dv"):
        torch.testing.assert_close(results[what], getattr(truth, what), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("scale", [-0.7, 0.0, 3.0])
@pytest.mark.parametrize("softcap", [0.0, 2.0])
def test_any_softmax_scale(backend, scale, softcap, seed):
    generator = torch.Generator().manual_seed(seed)
    q, k, v, dout = (torch.randn(2, 20, 3, 16, dtype=torch.float64, generator=generator) for _ in range(4))
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    truth, truth_lse = reference.attention(*leaves, softmax_scale=scale, softcap=softcap, window=(None, 0))
    gradients = torch.autograd.grad(truth, leaves, dout)
    words = (0.0, scale, True, -1, -1, softcap, None)
    out, lse, *_ = dispatch.forward(q, k, v, *words, False)
    actual = [torch.empty_like(x) for x in (q, k, v)]
    dispatch.backward(dout, q, k, v, out, lse, *actual, *words, False, None)
    for got, want in zip((out, lse, *actual), (truth, truth_lse, *gradients), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("layout", ["dense", "varlen"])
def test_dropout_scores(backend, layout, seed, fixed_rng):
    case = Case("scores", FP32, 16, 4, 2, (70, 70), (150, 150), layout, (60, 9), dropout_p=0.3, softcap=5.0, alibi="h")
    inputs = make_inputs(case, "cpu", seed)
    scores = run(case, inputs, return_softmax=True)["scores"]
    assert scores.shape == (2, 4, 128, 256)
    assert scores.dtype == case.dtype
    q, k = (x.unflatten(0, (2, -1)) if layout == "varlen" else x for x in (inputs.q, inputs.k))
    s = reference.scores(
        q.double(), k.double(), softmax_scale=0.25, softcap=5.0, alibi_slopes=inputs.alibi_slopes
    ).masked_fill(~reference.visible(70, 150, (60, 9)), -math.inf)
    p = torch.exp(s - s.amax(-1, keepdim=True))
    keep = keep_of(case) if layout == "dense" else torch.cat(keep_of(case))
    torch.testing.assert_close(scores[:, :, :70, :150].double(), torch.where(keep, p, -p), rtol=1e-4, atol=1e-5)
    assert scores[:, :, 70:].count_nonzero() == scores[:, :, :, 150:].count_nonzero() == 0


def test_dropout_scores_stay_within_the_maximum_lengths(backend, seed):
    """Sequences longer than the promised maximum lose the rest of their scores, nothing else."""
    q = torch.randn(300, 2, 8)
    cu_seqlens = torch.tensor([0, 300], dtype=torch.int32)
    out, _, scores, *_ = dispatch.forward(
        q, q, q, 0.5, 1.0, True, -1, -1, 0.0, None, True,
        cu_seqlens_q=cu_seqlens, cu_seqlens_k=cu_seqlens, max_seqlen_q=100, max_seqlen_k=100,
    )  # fmt: skip
    assert scores.shape == (1, 2, 128, 128)
    assert scores.abs().amax() <= 1.0
    assert out.isfinite().all()


def varlen(q, k, v, cu_seqlens_q, cu_seqlens_k, *, causal=True, **extra):
    """out and lse of a packed batch of arrays given as lists."""
    arrays = {name: torch.tensor(x, dtype=torch.int32) for name, x in extra.items()}
    out, lse, *_ = dispatch.forward(
        q,
        k,
        v,
        0.0,
        q.shape[-1] ** -0.5,
        causal,
        -1,
        -1,
        0.0,
        None,
        False,
        cu_seqlens_q=torch.tensor(cu_seqlens_q, dtype=torch.int32),
        cu_seqlens_k=torch.tensor(cu_seqlens_k, dtype=torch.int32),
        max_seqlen_q=64,
        max_seqlen_k=64,
        **arrays,
    )
    return out, lse


def packed_inputs(seed, total_q=40, total_k=50, dtype=FP32):
    generator = torch.Generator().manual_seed(seed)
    shapes = ((total_q, 4, 16), (total_k, 2, 16), (total_k, 2, 16))
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


def check_varlen(result, q, k, v, cu_seqlens_q, cu_seqlens_k, **extra):
    arrays = {name: torch.tensor(x, dtype=torch.int32) for name, x in extra.items()}
    truth, truth_lse = reference.attention_varlen(
        q, k, v, torch.tensor(cu_seqlens_q), torch.tensor(cu_seqlens_k), window=(None, 0), **arrays
    )
    out, lse = result
    torch.testing.assert_close(out.double(), truth, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(lse.double(), truth_lse, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("extra", [{"seqused_k": [9, 0, 20]}, {"leftpad_k": [3, 0, 7]}, {}], ids=str)
def test_lengths_and_left_padding(backend, extra, seed):
    q, k, v = packed_inputs(seed)
    lengths = ([0, 10, 17, 40], [0, 15, 20, 50])
    check_varlen(varlen(q, k, v, *lengths, **extra), q, k, v, *lengths, **extra)


def test_seqused_with_left_padding(backend, seed):
    q, k, v = packed_inputs(seed)
    lengths, extra = ([0, 10, 17, 40], [0, 15, 20, 50]), {"seqused_k": [12, 5, 30], "leftpad_k": [3, 1, 8]}
    check_varlen(varlen(q, k, v, *lengths, **extra), q, k, v, *lengths, **extra)


@pytest.mark.parametrize("dtype", [FP16, FP32])
def test_pages(backend, dtype, seed):
    q, k, v = packed_inputs(seed, total_k=6 * 8, dtype=dtype)
    pages_k, pages_v = (x.unflatten(0, (6, 8)) for x in (k, v))
    table = [[5, 0, 3], [2, 4, -1]]
    order = torch.tensor([*range(40, 48), *range(8), *range(24, 32), *range(16, 24), *range(32, 40)])
    lengths = ([0, 11, 20], [0, 20, 33])
    paged = varlen(q[:20], pages_k, pages_v, *lengths, block_table=table)
    contiguous = torch.cat([torch.arange(20), 24 + torch.arange(13)])
    plain = varlen(q[:20], k[order][contiguous], v[order][contiguous], *lengths)
    for got, want in zip(paged, plain, strict=True):
        assert torch.equal(got, want)
    short = varlen(q[:20], pages_k, pages_v, *lengths, block_table=table, seqused_k=[12, 24], leftpad_k=[2, 9])
    contiguous = torch.cat([torch.arange(2, 12), 24 + torch.arange(9, 16)])
    plain = varlen(q[:20], k[order][contiguous], v[order][contiguous], lengths[0], [0, 10, 17])
    # positions 16 and up of the second sequence name no page: they are keys of zeros
    assert torch.equal(short[0][:11], plain[0][:11])
    zeros = torch.zeros(8, 2, 16, dtype=dtype)
    second = (
        torch.cat([k[order][24 + torch.arange(9, 16)], zeros]),
        torch.cat([v[order][24 + torch.arange(9, 16)], zeros]),
    )
    plain = varlen(q[11:20], *second, [0, 9], [0, 15])
    assert torch.equal(short[0][11:], plain[0])


BAD_LENGTHS = {
    "decreasing": ([0, 30, 10, 40], [0, 20, 50, 30]),
    "past the end": ([0, 10, 20, 1000], [0, 2**31 - 1, 20, 90]),
    "negative": ([-5, 10, -20, 40], [-(2**31), 15, 20, 50]),
    "all past the end": ([100, 200, 300, 400], [100, 200, 300, 400]),
}


@pytest.mark.parametrize("lengths", BAD_LENGTHS.values(), ids=BAD_LENGTHS)
@pytest.mark.parametrize("causal", [True, False])
def test_wrong_lengths_stay_inside(backend, lengths, causal, seed):
    q, k, v = packed_inputs(seed)
    out, lse = varlen(q, k, v, *lengths, causal=causal)
    assert out.isfinite().all()
    buffers = [torch.full((x.shape[0] + 2, *x.shape[1:]), 7.0) for x in (q, k, v)]
    words = (0.0, 0.25, causal, -1, -1, 0.0, None, False, None)
    cu_seqlens_q, cu_seqlens_k = (torch.tensor(x, dtype=torch.int32) for x in lengths)
    dispatch.backward(
        torch.randn_like(q), q, k, v, out, lse, *(x[1:-1] for x in buffers), *words,
        cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k, max_seqlen_q=64, max_seqlen_k=64,
    )  # fmt: skip
    assert all((x[[0, -1]] == 7.0).all() for x in buffers)


@pytest.mark.parametrize(
    "extra",
    [
        {"seqused_k": [1000, -3, 2**31 - 1]},
        {"leftpad_k": [1000, -3, -(2**31)]},
        {"seqused_k": [5, 5, 5], "leftpad_k": [6, 2**31 - 1, 5]},
    ],
    ids=str,
)
@pytest.mark.parametrize("paged", [False, True])
def test_wrong_key_counts_stay_inside(backend, extra, paged, seed):
    q, k, v = packed_inputs(seed, total_k=48)
    if paged:
        k, v = (x.unflatten(0, (6, 8)) for x in (k, v))
        extra = {**extra, "block_table": [[-1, 99, 2**31 - 1], [5, -(2**31), 6], [0, 1, 2]]}
    out, _ = varlen(q, k, v, [0, 10, 17, 40], [0, 15, 20, 48], **extra)
    assert out.isfinite().all()


def test_pages_that_do_not_exist_are_keys_of_zeros(backend):
    """Scores of 0 against values of 0: the lse counts them, the output is 0."""
    q, k, v = packed_inputs(0, total_k=48)
    k, v = (x.unflatten(0, (6, 8)) for x in (k, v))
    table = [[-1, 6, 2**31 - 1]]
    out, lse = varlen(q[:5], k, v, [0, 5], [0, 20], causal=False, block_table=table)
    assert out.count_nonzero() == 0
    torch.testing.assert_close(lse, torch.full_like(lse, math.log(20)))


def test_no_pages_at_all(backend):
    q, k, _ = packed_inputs(0)
    no_pages, empty_pages = k.new_empty(0, 8, 2, 16), k.new_zeros(3, 8, 2, 16)
    out, lse = varlen(q[:5], no_pages, no_pages, [0, 5], [0, 8], causal=False, block_table=[[0]])
    assert out.count_nonzero() == 0
    torch.testing.assert_close(lse, torch.full_like(lse, math.log(8)))
    table = torch.zeros(1, 0, dtype=torch.int32)
    cu_seqlens = torch.tensor([0, 5], dtype=torch.int32)
    out, lse, *_ = dispatch.forward(
        q[:5], empty_pages, empty_pages, 0.0, 1.0, False, -1, -1, 0.0, None, False,
        cu_seqlens_q=cu_seqlens, cu_seqlens_k=cu_seqlens, max_seqlen_q=5, max_seqlen_k=5, block_table=table,
    )  # fmt: skip
    assert (lse == -math.inf).all()


def test_rows_outside_every_sequence(backend, seed):
    q, k, v = packed_inputs(seed)
    out, lse = varlen(q, k, v, [5, 10, 20], [0, 10, 20])
    outside = torch.ones(40, dtype=torch.bool)
    outside[5:20] = False
    assert out[outside].count_nonzero() == 0
    assert (lse[:, outside] == -math.inf).all()


def test_paged_backward_is_refused(backend):
    q, k, v = packed_inputs(0, total_k=48)
    k, v = (x.unflatten(0, (6, 8)) for x in (k, v))
    cu_seqlens = torch.tensor([0, 40], dtype=torch.int32)
    with pytest.raises(UnsupportedProblem, match="forward only"):
        dispatch.backward(
            q, q, k, v, q, torch.zeros(4, 40), q.clone(), k.clone(), v.clone(),
            0.0, 0.25, True, -1, -1, 0.0, None, False, None,
            cu_seqlens_q=cu_seqlens, cu_seqlens_k=cu_seqlens, max_seqlen_q=40, max_seqlen_k=40,
            block_table=torch.zeros(1, 6, dtype=torch.int32),
        )  # fmt: skip


@pytest.mark.parametrize(
    "shape_q, shape_k",
    [
        ((0, 5, 2, 8), (0, 5, 2, 8)),
        ((2, 0, 2, 8), (2, 5, 2, 8)),
        ((2, 5, 2, 8), (2, 0, 2, 8)),
        ((2, 0, 2, 8), (2, 0, 2, 8)),
    ],
    ids=str,
)
def test_empty_dense_batches(backend, shape_q, shape_k):
    q, k, v = torch.randn(shape_q), torch.randn(shape_k), torch.randn(shape_k)
    words = (0.0, 1.0, False, -1, -1, 0.0, None)
    out, lse, *_ = dispatch.forward(q, k, v, *words, False)
    assert out.shape == q.shape
    assert out.count_nonzero() == 0
    assert (lse == -math.inf).all()
    gradients = [torch.full_like(x, math.nan) for x in (q, k, v)]
    dispatch.backward(torch.randn_like(q), q, k, v, out, lse, *gradients, *words, False, None)
    assert all(x.count_nonzero() == 0 for x in gradients)


def test_strips_agree_with_the_fused_operator(monkeypatch, seed):
    """The same problems, once fused and once in strips of a few rows."""
    for causal, seqlen_k in ((True, 65), (False, 65), (False, 33)):
        case = Case("agree", FP32, 16, 4, 2, (65, 65), (seqlen_k, seqlen_k), causal=causal)
        inputs = make_inputs(case, "cpu", seed)
        with backends.use("cpu"):
            fused = run(case, inputs)
            with monkeypatch.context() as patch:
                patch.setattr(cpu, "_fused_causal", lambda operands, span: None)
                patch.setattr(cpu, "STRIP_ELEMENTS", 600)
                strips = run(case, inputs)
        for what in ("out", "lse", "dq", "dk", "dv", "delta"):
            torch.testing.assert_close(strips[what], fused[what], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("elements", [1, 100, 3000, 10**6])
def test_any_strip_size(monkeypatch, elements, seed, fixed_rng):
    case = Case(
        "strips", FP32, 16, 6, 2, (70, 33), (41, 97), "varlen", (20, 13), softcap=2.0, alibi="bh", dropout_p=0.2
    )
    inputs = make_inputs(case, "cpu", seed)
    monkeypatch.setattr(cpu, "STRIP_ELEMENTS", elements)
    with backends.use("cpu"):
        results = run(case, inputs)
    del results["scores"], results["delta"]
    expected(case, inputs, keep_of(case)).check(**results)


def test_backward_is_linear_in_dout(backend, seed):
    case = Case("linear", torch.float64, 16, 4, 2, (40,), (40,), window=(9, -1), softcap=3.0, alibi="h")
    inputs = make_inputs(case, "cpu", seed)
    words = (*numbers(case), inputs.alibi_slopes)
    out, lse, *_ = dispatch.forward(inputs.q, inputs.k, inputs.v, *words, False)

    def gradients(dout):
        result = [torch.empty_like(x) for x in (inputs.q, inputs.k, inputs.v)]
        dispatch.backward(dout, inputs.q, inputs.k, inputs.v, out, lse, *result, *words, False, None)
        return result

    a, b = inputs.dout, torch.randn_like(inputs.dout)
    for joint, first, second in zip(gradients(2 * a + b), gradients(a), gradients(b), strict=True):
        torch.testing.assert_close(joint, 2 * first + second)


def test_backward_of_a_part_of_the_keys(backend, seed):
    """With the whole row's lse and out, the gradients of blocks of keys add up: what ring attention does."""
    case = Case("ring", torch.float64, 16, 2, 2, (24,), (40,))
    inputs = make_inputs(case, "cpu", seed)
    whole = run(case, inputs)
    words = (*numbers(case), None, False, None)
    dq = torch.zeros_like(inputs.q)
    for begin, end in ((0, 24), (24, 40)):
        k, v = inputs.k[:, begin:end].contiguous(), inputs.v[:, begin:end].contiguous()
        part = [torch.empty_like(x) for x in (inputs.q, k, v)]
        dispatch.backward(inputs.dout, inputs.q, k, v, whole["out"], whole["lse"], *part, *words)
        dq += part[0]
        torch.testing.assert_close(part[1], whole["dk"][:, begin:end])
        torch.testing.assert_close(part[2], whole["dv"][:, begin:end])
    torch.testing.assert_close(dq, whole["dq"])


def test_bitwise_reproducible(backend, seed, fixed_rng):
    case = Case("repeat", BF16, 32, 4, 2, (130, 7), (99, 64), "varlen", causal=True, dropout_p=0.1)
    inputs = make_inputs(case, "cpu", seed)
    first, second = run(case, inputs), run(case, inputs)
    for what in ("out", "lse", "dq", "dk", "dv"):
        assert torch.equal(first[what], second[what])


def test_dense_lengths_and_padding_of_a_batch():
    """seqused_k and leftpad_k of a dense batch resolve to one span a sequence."""
    q, k = torch.zeros(2, 3, 1, 8), torch.zeros(2, 10, 1, 8)
    used, leftpad = (torch.tensor(x, dtype=torch.int32) for x in ([7, 99], [2, 4]))
    operands = backends.base.Operands(q, k, k, 1.0, 3, 10, seqused_k=used, leftpad_k=leftpad)
    assert [tuple(s) for s in spans.spans(operands)] == [(0, 1, 0, 0, 3, 2, 5), (1, 1, 1, 0, 3, 4, 6)]


def test_cpu_refuses_other_devices_in_a_sentence():
    some = problem.AttentionProblem("dense", "float32", 1, 16, 16, 1, 1, 16)
    assert cpu.unsupported(some, hardware.CPU) is None
    assert "cuda" in cpu.unsupported(some, hardware.Hardware("cuda", "sm_90", 132, 232448))


class LargestTensor(TorchDispatchMode):
    """Elements of the largest storage that any operator returns."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for x in result if isinstance(result, tuple | list) else [result]:
            if isinstance(x, torch.Tensor):
                self.elements = max(self.elements, x.untyped_storage().nbytes() // x.element_size())
        return result


def largest_tensor(seqlen: int, **extra) -> int:
    case = Case("memory", FP32, 8, 2, 1, (seqlen,), (seqlen,), **extra)
    inputs = make_inputs(case, "cpu", 0)
    with backends.use("cpu"), LargestTensor() as largest:
        run(case, inputs)
    return largest.elements


@pytest.mark.parametrize(
    "extra",
    [dict(causal=True), dict(causal=True, alibi="h"), dict(window=(64, 64)), dict(softcap=2.0), dict(dropout_p=0.1)],
    ids=str,
)
def test_memory_is_linear_in_the_sequence_length(monkeypatch, extra):
    """With a small strip, no tensor outgrows a few times the largest input; the scores would be 512 x 512 x 2."""
    seqlen = 512
    monkeypatch.setattr(cpu, "STRIP_ELEMENTS", 8 * seqlen)
    assert largest_tensor(seqlen, **extra) <= 4 * (2 * seqlen * 8)


def test_strips_are_bounded():
    """The default strip holds at most STRIP_ELEMENTS scores, and a row of one group when that is more."""
    for seqlen_q, seqlen_k, window in ((300, 4000, (None, None)), (1, 10**6, (None, 0)), (5000, 5000, (256, 0))):
        q, k = torch.zeros(1, seqlen_q, 8, 1), torch.zeros(1, seqlen_k, 2, 1)
        operands = backends.base.Operands(q, k, k, 1.0, seqlen_q, seqlen_k, window=window)
        (span,) = spans.spans(operands)
        strips = cpu.StripAttention(operands, span, q, k, k)
        covered = 0
        for heads, rows, cols in strips._strips():
            num_heads, num_rows = len(range(2)[heads]), rows.stop - rows.start
            covered += num_heads * num_rows
            assert num_heads * 4 * num_rows * (cols.stop - cols.start) <= max(cpu.STRIP_ELEMENTS, 4 * seqlen_k)
        assert covered == 2 * seqlen_q
