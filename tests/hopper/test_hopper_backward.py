"""Gradients of the Hopper backend on a Hopper GPU: in one pass that sums dq in any order or in that of the keys, and in two."""

import math
from dataclasses import replace

import pytest
import torch

from flash_attn import flash_attn_func, flash_attn_qkvpacked_func, flash_attn_varlen_func
from flash_attn.launch.hopper import FORWARD, ONE_PASS
from tests.support import calls
from tests.support.cases import BF16, FP16, Case
from tests.support.hopper_forms import chosen, each_form, forms, gradients
from tests.support.inputs import make_inputs
from tests.support.tolerance import expected

WIDTHS = tuple(FORWARD)  # one head dim of each kernel
on_hopper = pytest.mark.parametrize("device", calls.places("hopper"), indirect=True)


@pytest.fixture
def device(request):
    with calls.running_on(request.param) as device:
        yield device


def check(case: Case, device: torch.device, seed: int, form: str) -> None:
    inputs = make_inputs(case, device, seed)
    torch.manual_seed(seed)
    dq, dk, dv = gradients(case, inputs, form)
    expected(case, inputs, calls.keep_under(case, inputs, seed)).check(dq=dq, dk=dk, dv=dv)


@on_hopper
@each_form(8, 40, 64, 80, 96, 128, 160, 192, 256)
def test_head_dims(headdim, form, device, seed):
    check(Case("head-dims", FP16, headdim, 4, 2, (200, 200), (333, 333), causal=True), device, seed, form)


EDGES = [(n, n) for n in (1, 63, 64, 65, 127, 128, 129, 193, 257)]
UNEQUAL = [(257, 63), (513, 65), (513, 2), (1, 257), (63, 513), (129, 640), (640, 200)]
LENGTHS = [(*lengths, True) for lengths in EDGES + UNEQUAL] + [(*lengths, False) for lengths in (EDGES + UNEQUAL)[::2]]


@on_hopper
@pytest.mark.parametrize("seqlen_q, seqlen_k, causal", LENGTHS)
@each_form(*WIDTHS)
def test_tile_edges(headdim, seqlen_q, seqlen_k, causal, form, device, seed):
    """Tiles of one block, keys that no row sees, rows that see no key, ragged tails."""
    case = Case("edges", BF16, headdim, 2, 1, (seqlen_q,), (seqlen_k,), causal=causal)
    check(case, device, seed, form)


FEATURES = {
    "diagonal": dict(window=(0, 0)),
    "band": dict(window=(128, 63)),
    "causal band": dict(window=(300, -1), causal=True),
    "softcap, causal": dict(softcap=3.0, causal=True),
    "alibi": dict(alibi="bh"),
    "alibi, softcap, band": dict(alibi="h", softcap=3.0, window=(200, 100)),
    "dropout": dict(dropout_p=0.17),
    "dropout, softcap, band": dict(dropout_p=0.5, softcap=3.0, window=(200, 100)),
    "dropout, alibi": dict(dropout_p=0.1, alibi="h", causal=True),
}


def features_and_forms() -> list[tuple[str, int, str]]:
    """With two of softcap, ALiBi and dropout head dim 64 has two passes alone; where there is one pass, two add little, and the
    order of the sum of dq takes turns. At head dim 256, whose three kernels compile longest, others contain the simplest."""
    found = []
    for turn, (feature, words) in enumerate(FEATURES.items()):
        crowded = len({"softcap", "alibi", "dropout_p"} & words.keys()) >= 2
        for headdim in WIDTHS if crowded or "dropout_p" in words else WIDTHS[:2]:
            one_pass = headdim in ONE_PASS and not (headdim == 64 and crowded)
            names = forms(headdim) if feature == "band" else forms(headdim)[turn % 2 :][:1]
            found += [(feature, headdim, form) for form in (names if one_pass else ["two passes"])]
    return found


@on_hopper
@pytest.mark.parametrize("feature, headdim, form", features_and_forms())
def test_features(feature, headdim, form, device, seed):
    for seqlen_q, seqlen_k in ((500, 777), (640, 384)):
        case = Case(feature, FP16, headdim, 4, 2, (seqlen_q,) * 2, (seqlen_k,) * 2, **FEATURES[feature])
        check(case, device, seed, form)


@on_hopper
@pytest.mark.parametrize("layout", ["dense", "varlen"])
@each_form(*WIDTHS)
def test_a_gradient_of_softmax_lse(headdim, form, layout, device, seed):
    """Beside one of out; NaN for rows that see no key, as a loss that takes a logarithm of zero sends back."""
    case = Case("lse", BF16, headdim, 4, 2, (300, 130), (170, 130), layout, causal=True)
    if layout == "dense":
        case = replace(case, seqlens_q=(300, 300), seqlens_k=(170, 170))
    inputs = make_inputs(case, device, seed)
    leaves = [x.detach().requires_grad_() for x in (inputs.q, inputs.k, inputs.v)]
    with chosen(form, headdim) as deterministic:
        out, lse, _ = calls.public(case, inputs, *leaves, deterministic=deterministic, return_attn_probs=True)
        dlse = calls.randn(*lse.shape, dtype=lse.dtype, device=device, seed=seed + 7)
        dlse = dlse.masked_fill(lse == -math.inf, math.nan)
        dq, dk, dv = torch.autograd.grad((out, lse), leaves, (inputs.dout, dlse))
    expected(case, inputs, None, dlse.nan_to_num()).check(dq=dq, dk=dk, dv=dv)


VARLEN = {
    "uneven": ((1, 700, 0, 64, 193, 5), (700, 1, 64, 0, 193, 300)),
    "one long among many empty": ((0,) * 70 + (900,) + (0,) * 70, (0,) * 70 + (900,) + (0,) * 70),
    "many short": ((17, 33, 1, 64, 65) * 60, (17, 1, 33, 65, 64) * 60),
    "no keys": ((100, 200), (0, 150)),
}


@on_hopper
@pytest.mark.parametrize("name, causal", [(name, i % 2 == 0) for i, name in enumerate(VARLEN)] + [("uneven", False)])
@each_form(*WIDTHS)
def test_packed_batches(headdim, name, causal, form, device, seed):
    seqlens_q, seqlens_k = VARLEN[name]
    case = Case(name, BF16, headdim, 4, 2, seqlens_q, seqlens_k, "varlen", causal=causal)
    check(case, device, seed, form)


@on_hopper
@pytest.mark.parametrize("nheads, nheads_k, batch_size", [(12, 1, 3), (7, 7, 5), (16, 4, 1), (3, 3, 1)])
@each_form(*WIDTHS)
def test_groups_of_heads(headdim, nheads, nheads_k, batch_size, form, device, seed):
    lengths = (400,) * batch_size
    case = Case("heads", BF16, headdim, nheads, nheads_k, lengths, lengths, causal=True)
    check(case, device, seed, form)


@on_hopper
@each_form(*WIDTHS)
def test_poisoned_neighbours(headdim, form, device, seed):
    """NaN in every token outside the batch does not reach it; packed sequences beside each other do not mix."""
    outside, lengths = 90, (37, 130, 250)
    total = sum(lengths) + 2 * outside
    shape = (total, 4, headdim)
    tensors = [calls.randn(*shape, dtype=BF16, device=device, seed=seed + i) for i in range(4)]
    inside = slice(outside, total - outside)
    clean = [x[inside].clone() for x in tensors]
    for x, kept in zip(tensors, clean, strict=True):
        x.fill_(math.nan)
        x[inside] = kept
    ends = [outside]
    for length in lengths:
        ends.append(ends[-1] + length)
    cu, alone = calls.int32(ends, device), calls.int32([end - outside for end in ends], device)
    for causal in (False, True):
        case = Case("neighbours", BF16, headdim, 4, 4, lengths, lengths, "varlen", causal=causal)
        inputs = make_inputs(case, device, seed)
        leaves = [x.detach().requires_grad_() for x in tensors[:3]]
        with chosen(form, headdim) as deterministic:
            out = flash_attn_varlen_func(*leaves, cu, cu, 250, 250, causal=causal, deterministic=deterministic)
        got = torch.autograd.grad(out, leaves, tensors[3])
        q, k, v, dout = clean
        inputs = replace(inputs, q=q, k=k, v=v, dout=dout, cu_seqlens_q=alone, cu_seqlens_k=alone)
        dq, dk, dv = (x[inside] for x in got)
        expected(case, inputs).check(dq=dq, dk=dk, dv=dv)


@on_hopper
@pytest.mark.parametrize(
    "ends", [[0, 300, 100, 200], [0, 50, 10_000, 200], [150, -70, 60, 2**31 - 1], [200, 0, 0, 0]], ids=str
)
@each_form(*WIDTHS)
def test_lengths_that_make_no_sense(headdim, ends, form, device, seed):
    """Write nothing outside the tensors, and end."""
    q, k, v, dout = (calls.randn(200, 4, headdim, dtype=BF16, device=device, seed=seed + i) for i in range(4))
    cu = calls.int32(ends, device)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    with chosen(form, headdim) as deterministic:
        out = flash_attn_varlen_func(*leaves, cu, cu, 300, 300, causal=True, deterministic=deterministic)
    torch.autograd.grad(out, leaves, dout)
    torch.cuda.synchronize()


@on_hopper
@each_form(*WIDTHS)
@pytest.mark.parametrize("kind", ["expanded", "transposed", "odd address"])
def test_other_strides_of_dout(kind, headdim, form, device, seed):
    """Also those that tensor maps cannot reach give the gradients of a contiguous copy."""
    case = Case("dout", BF16, headdim, 4, 2, (200, 200), (200, 200), causal=True)
    inputs = make_inputs(case, device, seed)
    shape = inputs.dout.shape
    if kind == "expanded":
        dout = calls.randn(1, 1, 1, 1, dtype=BF16, device=device, seed=seed).expand(shape)
    elif kind == "transposed":
        dout = inputs.dout.transpose(1, 2).contiguous().transpose(1, 2)
    else:
        dout = torch.empty(shape.numel() + 1, dtype=BF16, device=device)[1:].view(shape).copy_(inputs.dout)
    got = gradients(case, inputs, form, dout=dout)
    expected(case, replace(inputs, dout=dout.contiguous())).check(**dict(zip(("dq", "dk", "dv"), got, strict=True)))


@on_hopper
@each_form(*WIDTHS)
def test_packed_qkv(headdim, form, device, seed):
    """Gradients written into views of one tensor are those of three."""
    qkv = calls.randn(2, 333, 3, 5, headdim, dtype=BF16, device=device, seed=seed).requires_grad_()
    dout = calls.randn(2, 333, 5, headdim, dtype=BF16, device=device, seed=seed + 1)
    with chosen(form, headdim) as deterministic:
        out = flash_attn_qkvpacked_func(qkv, causal=True, deterministic=deterministic)
    (dqkv,) = torch.autograd.grad(out, qkv, dout)
    case = Case("packed", BF16, headdim, 5, 5, (333, 333), (333, 333), causal=True)
    q, k, v = (x.contiguous() for x in qkv.detach().unbind(2))
    inputs = replace(make_inputs(case, device, seed), q=q, k=k, v=v, dout=dout)
    dq, dk, dv = dqkv.unbind(2)
    expected(case, inputs).check(dq=dq, dk=dk, dv=dv)


REPEATED = [
    Case("causal", BF16, 64, 8, 2, (2048,) * 2, (2048,) * 2, causal=True),
    Case("full", BF16, 128, 8, 2, (1000,) * 2, (1300,) * 2),
    Case("varlen", BF16, 128, 8, 2, (1, 900, 0, 333), (64, 900, 5, 333), "varlen", causal=True),
    Case("wide", BF16, 256, 8, 2, (1000,) * 2, (1000,) * 2, causal=True),
]


@on_hopper
@pytest.mark.parametrize("case, form", [(case, form) for case in REPEATED for form in forms(case.headdim)], ids=str)
def test_the_same_bits_every_time(case, form, device, seed):
    """dk and dv always; dq when asked for."""
    inputs = make_inputs(case, device, seed)
    first = gradients(case, inputs, form)
    for _ in range(50):
        again = gradients(case, inputs, form)
        calls.assert_equal(again[1:], first[1:])
        if form != "any order":
            calls.assert_equal(again[0], first[0])


def problem(device, seed, seqlen, headdim):
    """(q, k, v) that want gradients, and dout."""
    tensors = [calls.randn(2, seqlen, 8, headdim, dtype=BF16, device=device, seed=seed + i) for i in range(4)]
    return [x.requires_grad_() for x in tensors[:3]], tensors[3]


@on_hopper
@each_form(*WIDTHS)
def test_two_streams_at_once(headdim, form, device, seed):
    """Launches beside each other draw from counters of their own and sum in workspaces of their own."""
    problems = [problem(device, seed + 10 * i, 1000 + i, headdim) for i in range(2)]

    def differentiate(leaves, dout):
        with chosen(form, headdim) as deterministic:
            out = flash_attn_func(*leaves, causal=True, deterministic=deterministic)
        return torch.autograd.grad(out, leaves, dout)

    alone = [differentiate(*each) for each in problems]
    streams = [torch.cuda.Stream() for _ in problems]
    torch.cuda.synchronize()
    together = [[], []]
    for _ in range(10):
        for i, stream in enumerate(streams):
            with torch.cuda.stream(stream):
                together[i].append(differentiate(*problems[i]))
    torch.cuda.synchronize()
    for wanted, repeats in zip(alone, together, strict=True):
        for got in repeats:
            calls.assert_equal(got[1:], wanted[1:])
            if form == "any order":
                calls.assert_near(got[0], wanted[0])
            else:
                calls.assert_equal(got[0], wanted[0])


@on_hopper
@each_form(*WIDTHS)
def test_a_captured_step(headdim, form, device, seed):
    """Forward and gradients in a CUDA graph, replayed with fresh contents."""
    leaves, dout = problem(device, seed, 1500, headdim)

    def step():
        with chosen(form, headdim) as deterministic:
            out = flash_attn_func(*leaves, causal=True, deterministic=deterministic)
        return torch.autograd.grad(out, leaves, dout)

    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    fresh, fresh_dout = problem(device, seed + 9, 1500, headdim)
    with torch.no_grad():
        for x, contents in zip((*leaves, dout), (*fresh, fresh_dout), strict=True):
            x.copy_(contents)
    for _ in range(3):
        graph.replay()
    torch.cuda.synchronize()
    replayed = [x.clone() for x in captured]
    wanted = step()
    calls.assert_equal(replayed[1:], wanted[1:])
    if form != "any order":
        calls.assert_equal(replayed[0], wanted[0])
    else:
        calls.assert_near(replayed[0], wanted[0])
