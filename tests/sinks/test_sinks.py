"""Attention sinks through the public functions: every case against the truth, relations, gradients, what is refused."""

import math
from itertools import pairwise

import pytest
import torch

from flash_attn import (
    backends,
    flash_attn_func,
    flash_attn_varlen_func,
    flash_attn_with_kvcache,
    merge_attention_states,
)
from flash_attn.errors import InvalidArgument, UnsupportedProblem
from flash_attn.hardware import Hardware
from flash_attn.problem import AttentionProblem
from tests.support import calls
from tests.support.cases import BF16, FP16, FP32, SINK_CASES, SMALL_SINK_CASES, Case
from tests.support.inputs import make_inputs
from tests.support.tolerance import assert_dsink_close, expected

FP64 = torch.float64
B, S, H, D = 2, 65, 4, 64
KEYLESS = Case("keyless rows", FP16, 64, 4, 2, (70,), (33,), causal=True, sink=FP32)


@pytest.fixture
def device(request):
    with calls.running_on(request.param) as device:
        yield device


everywhere = pytest.mark.parametrize("device", calls.places("cpu", "gpu"), indirect=True)
everywhere_and_interpreted = pytest.mark.parametrize("device", calls.places("cpu", "gpu", "interpreter"), indirect=True)


def randn(*shape, device, seed, dtype=FP32):
    return calls.randn(*shape, dtype=dtype, device=device, seed=seed)


def attend(case, inputs, seed, **extra):
    """(out, lse, leaves): q, k, v and the sinks."""
    leaves = [x.detach().requires_grad_() for x in (inputs.q, inputs.k, inputs.v, inputs.sinks)]
    torch.manual_seed(seed)
    out, lse, _ = calls.public(case, inputs, *leaves[:3], return_attn_probs=True, s_aux=leaves[3], **extra)
    return out, lse, leaves


@pytest.mark.parametrize(
    "case, device",
    # on a GPU each compiles kernels of its own for up to 25 s
    calls.placed({"cpu": SINK_CASES, "gpu": SINK_CASES[::4], "interpreter": SMALL_SINK_CASES}),
    indirect=["device"],
)
def test_results_and_gradients_match_the_truth(case, device, seed):
    inputs = make_inputs(case, device, seed)
    out, lse, leaves = attend(case, inputs, seed)
    dlse = randn(*lse.shape, device=device, seed=seed + 7)
    dq, dk, dv, dsink = torch.autograd.grad((out, lse), leaves, (inputs.dout, dlse))
    out, lse = out.detach(), lse.detach()
    wanted = expected(case, inputs, calls.keep_under(case, inputs, seed), dlse)
    wanted.check(out=out, lse=lse, dq=dq, dk=dk, dv=dv)
    assert dsink.dtype == case.sink and dsink.shape == (case.nheads,)
    assert_dsink_close(dsink, wanted.reference, inputs, out, lse, dlse)


@everywhere_and_interpreted
def test_a_row_without_keys_has_the_sink_alone(device, seed):
    inputs = make_inputs(KEYLESS, device, seed)
    out, lse, leaves = attend(KEYLESS, inputs, seed)
    keyless = KEYLESS.seqlens_q[0] - KEYLESS.seqlens_k[0]
    assert (out[:, :keyless] == 0.0).all()
    calls.assert_near(lse[:, :, :keyless].detach(), leaves[3].detach()[:, None].expand(1, H, keyless))
    dlse = torch.zeros_like(lse)
    dlse[:, :, :keyless] = 1.0
    dq, dk, dv, dsink = torch.autograd.grad((out, lse), leaves, (torch.zeros_like(out), dlse))
    assert all((x == 0.0).all() for x in (dq, dk, dv))
    calls.assert_near(dsink, torch.full_like(dsink, keyless), roundoffs=16)


@everywhere_and_interpreted
def test_a_sink_is_a_key_without_a_value(device, seed):
    """One more feature carries the sink: 1 in every query, sink in one more key of each head, whose value is zero."""
    q, k, v = (randn(1, n, 2, 15, device=device, seed=seed + i) for i, n in enumerate((19, 21, 21)))
    sinks = randn(2, device=device, seed=seed + 3)
    wide_q = torch.cat([q, torch.ones(1, 19, 2, 1, device=device)], -1)
    sink_key = torch.zeros(1, 1, 2, 16, device=device)
    sink_key[..., 15] = sinks / 0.3
    wide_k = torch.cat([torch.cat([k, torch.zeros(1, 21, 2, 1, device=device)], -1), sink_key], 1)
    wide_v = torch.nn.functional.pad(v, (0, 1, 0, 0, 0, 1))
    out, lse, _ = flash_attn_func(q, k, v, softmax_scale=0.3, return_attn_probs=True, s_aux=sinks)
    wanted_out, wanted_lse, _ = flash_attn_func(wide_q, wide_k, wide_v, softmax_scale=0.3, return_attn_probs=True)
    calls.assert_near((out, lse), (wanted_out[..., :15], wanted_lse), roundoffs=16)


@everywhere_and_interpreted
def test_sinks_of_minus_infinity_are_none(device, seed):
    """Rows without a key keep out 0 and lse -inf, and the gradient of such a sink is 0."""
    inputs = make_inputs(KEYLESS, device, seed)
    inputs.sinks.fill_(-math.inf)
    out, lse, leaves = attend(KEYLESS, inputs, seed)
    plain_leaves = [x.detach().requires_grad_() for x in leaves[:3]]
    plain_out, plain_lse, _ = flash_attn_func(*plain_leaves, causal=True, return_attn_probs=True)
    calls.assert_near((out.detach(), lse.detach()), (plain_out.detach(), plain_lse.detach()))
    *found, dsink = torch.autograd.grad((out, lse), leaves, (inputs.dout, torch.ones_like(lse)))
    wanted = torch.autograd.grad((plain_out, plain_lse), plain_leaves, (inputs.dout, torch.ones_like(lse)))
    calls.assert_near(found, wanted)
    assert (dsink == 0.0).all()


@everywhere_and_interpreted
@pytest.mark.parametrize("softmax_scale", [0.125, -0.125, 0.0])
def test_sinks_far_from_the_scores(softmax_scale, device, seed):
    """A heavy sink takes everything, without overflow; a light one nothing. Neither is scaled with the scores."""
    q, k, v = (randn(1, 17, 2, 32, device=device, seed=seed + i) for i in range(3))
    options = dict(softmax_scale=softmax_scale, return_attn_probs=True)
    sinks = torch.tensor([1e4, -1e4], device=device, requires_grad=True)
    out, lse, _ = flash_attn_func(q, k, v, **options, s_aux=sinks)
    plain_out, plain_lse, _ = flash_attn_func(q, k, v, **options)
    assert (out[:, :, 0] == 0.0).all()
    torch.testing.assert_close(lse[:, 0], torch.full_like(lse[:, 0], 1e4))
    calls.assert_near((out[:, :, 1], lse[:, 1]), (plain_out[:, :, 1], plain_lse[:, 1]))
    (dsink,) = torch.autograd.grad(lse.sum(), sinks)
    torch.testing.assert_close(dsink, torch.tensor([17.0, 0.0], device=device), rtol=1e-2, atol=0.0)


@everywhere
def test_a_sink_is_merged_as_a_part_without_keys(device, seed):
    """Split keys: one of the parts has the sinks, whichever."""
    q, k, v = (randn(B, S, H, D, device=device, seed=seed + i) for i in range(3))
    sinks = randn(H, device=device, seed=seed + 3)

    def part(keys, **extra):
        return flash_attn_func(q, k[:, keys], v[:, keys], return_attn_probs=True, **extra)[:2]

    whole = part(slice(None), s_aux=sinks)
    first, second = slice(0, 20), slice(20, None)
    calls.assert_near(merge_attention_states(*part(first, s_aux=sinks), *part(second)), whole, roundoffs=16)
    calls.assert_near(merge_attention_states(*part(first), *part(second, s_aux=sinks)), whole, roundoffs=16)


@everywhere_and_interpreted
def test_a_packed_batch_is_its_sequences(device, seed):
    """With rows before the first and after the last sequence, which hold anything and count nowhere."""
    lengths, before, after = (9, 0, 21), 5, 3
    total = before + sum(lengths) + after
    leaves = [randn(total, n, 16, device=device, seed=seed + n).requires_grad_() for n in (H, 2, 2)]
    sinks = randn(H, device=device, seed=seed).requires_grad_()
    ends = [before, before + 9, before + 9, before + 30]
    cu = calls.int32(ends, device)
    out, lse, _ = flash_attn_varlen_func(*leaves, cu, cu, 21, 21, causal=True, return_attn_probs=True, s_aux=sinks)
    inside = slice(ends[0], ends[-1])
    dout, dlse = randn(*out.shape, device=device, seed=seed + 5), randn(*lse.shape, device=device, seed=seed + 6)
    found = torch.autograd.grad((out[inside], lse[:, inside]), (*leaves, sinks), (dout[inside], dlse[:, inside]))
    wanted = [torch.zeros_like(x) for x in (*leaves, sinks)]
    for begin, end in pairwise(ends):
        parts = [x.detach()[None, begin:end].requires_grad_() for x in leaves]
        row_out, row_lse, _ = flash_attn_func(*parts, causal=True, return_attn_probs=True, s_aux=sinks)
        calls.assert_near(
            (out[begin:end].detach(), lse[:, begin:end].detach()), (row_out[0].detach(), row_lse[0].detach())
        )
        results = torch.autograd.grad((row_out[0], row_lse[0]), (*parts, sinks), (dout[begin:end], dlse[:, begin:end]))
        for total_gradient, gradient in zip(wanted, results, strict=True):
            target = total_gradient if gradient.dim() == 1 else total_gradient[begin:end]
            target += gradient if gradient.dim() == 1 else gradient[0]
    calls.assert_near(
        [x[inside] if x.dim() > 1 else x for x in found], [x[inside] if x.dim() > 1 else x for x in wanted], 16
    )


@everywhere
def test_keys_in_pages(device, seed):
    q = randn(30, H, 32, device=device, seed=seed, dtype=FP16)
    k, v = (randn(48, 2, 32, device=device, seed=seed + i, dtype=FP16) for i in (1, 2))
    sinks = randn(H, device=device, seed=seed + 3, dtype=BF16)
    order = torch.tensor([2, 0, 1], device=device)
    pages_k, pages_v = (
        torch.empty_like(x).view(3, 16, 2, 32).index_copy_(0, order, x.view(3, 16, 2, 32)) for x in (k, v)
    )
    lengths = (calls.int32([0, 30], device), calls.int32([0, 48], device), 30, 48)
    options = dict(causal=True, return_attn_probs=True, s_aux=sinks)
    plain = flash_attn_varlen_func(q, k, v, *lengths, **options)
    paged = flash_attn_varlen_func(q, pages_k, pages_v, *lengths, **options, block_table=order.int()[None])
    calls.assert_near(paged[:2], plain[:2])


@everywhere
@pytest.mark.parametrize("dtype", [FP32, BF16, FP16], ids=str)
def test_strides_and_who_wants_a_gradient(dtype, device, seed):
    """Sinks from a larger tensor; only they, or only the others, want a gradient."""
    q, k, v = (randn(B, S, H, D, device=device, seed=seed + i, dtype=BF16) for i in range(3))
    spread = randn(H, 3, device=device, seed=seed + 3, dtype=dtype).requires_grad_()
    alone = flash_attn_func(q, k, v, causal=True, s_aux=spread[:, 1])
    dout = randn(*alone.shape, device=device, seed=seed + 4, dtype=BF16)
    (dspread,) = torch.autograd.grad(alone, spread, dout)
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    sinks = spread.detach()[:, 1].contiguous()
    others = flash_attn_func(*leaves, causal=True, s_aux=sinks)
    calls.assert_equal(alone.detach(), others.detach())
    without = torch.autograd.grad(others, leaves, dout)
    sinks = sinks.requires_grad_()
    together = flash_attn_func(*leaves, causal=True, s_aux=sinks)
    *found, dsink = torch.autograd.grad(together, (*leaves, sinks), dout)
    calls.assert_equal(found, without)
    assert dspread.dtype == dtype and dsink.abs().max() > 0
    calls.assert_equal(dspread[:, 1], dsink)
    assert (dspread[:, ::2] == 0.0).all()


@everywhere
def test_the_same_bits_every_time(device, seed):
    inputs = make_inputs(KEYLESS, device, seed)
    results = []
    for _ in range(2):
        out, lse, leaves = attend(KEYLESS, inputs, seed)
        results.append((out.detach(), lse.detach(), *torch.autograd.grad(out, leaves, inputs.dout)))
    calls.assert_equal(*results)


FEATURES = {
    "keyless rows": dict(causal=True),
    "window": dict(window_size=(2, 1)),
    "softcap": dict(softcap=1.5),
    "alibi": dict(alibi_slopes=[0.3, 0.7]),
    "dropout": dict(dropout_p=0.4),
    "everything": dict(causal=True, window_size=(3, 0), softcap=2.0, alibi_slopes=[0.1, 0.5], dropout_p=0.3),
}


@everywhere
@pytest.mark.parametrize("backend", [None, "reference"])
@pytest.mark.parametrize("name", FEATURES)
def test_every_entry_of_the_jacobian(name, backend, device, seed):
    q = randn(1, 5, 2, 3, device=device, seed=seed, dtype=FP64)
    k, v = (randn(1, 4, 1, 3, device=device, seed=seed + i, dtype=FP64) for i in (1, 2))
    sinks = randn(2, device=device, seed=seed + 3, dtype=FP64)
    chosen = dict(FEATURES[name])
    if "alibi_slopes" in chosen:
        chosen["alibi_slopes"] = torch.tensor(chosen["alibi_slopes"], device=device)

    def outputs(q, k, v, sinks):
        torch.manual_seed(0)
        return flash_attn_func(q, k, v, **chosen, return_attn_probs=True, s_aux=sinks)[:2]

    with backends.use(backend):
        leaves = [x.requires_grad_() for x in (q, k, v, sinks)]
        assert torch.autograd.gradcheck(outputs, leaves, rtol=1e-5, atol=1e-7)


@everywhere
def test_every_entry_of_the_jacobian_of_a_packed_batch(device, seed):
    leaves = [randn(7, 2, 3, device=device, seed=seed + i, dtype=FP64) for i in range(3)]
    leaves.append(randn(2, device=device, seed=seed + 3, dtype=FP64))
    cu_q, cu_k = (calls.int32(x, device) for x in ([0, 3, 3, 7], [0, 2, 7, 7]))

    def outputs(q, k, v, sinks):
        return flash_attn_varlen_func(q, k, v, cu_q, cu_k, 4, 5, causal=True, return_attn_probs=True, s_aux=sinks)[:2]

    with backends.use(None):
        assert torch.autograd.gradcheck(outputs, [x.requires_grad_() for x in leaves], rtol=1e-5, atol=1e-7)


def dense_loss(qkv, sinks, cu_seqlens):
    return flash_attn_func(*qkv.unbind(2), causal=True, s_aux=sinks).square().sum()


def varlen_loss(qkv, sinks, cu_seqlens):
    lengths = (cu_seqlens, cu_seqlens, 64, 64)
    out, lse, _ = flash_attn_varlen_func(*qkv.unbind(1), *lengths, causal=True, return_attn_probs=True, s_aux=sinks)
    return out.square().sum() + lse.square().sum()


@everywhere
@pytest.mark.parametrize("loss", [dense_loss, varlen_loss])
def test_compiles_whole_with_a_dynamic_length(loss, device, seed, unpoisoned):
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(loss, fullgraph=True, dynamic=True, backend=counter)
    compilations = []
    for tokens in (96, 80):
        shape = (tokens, 3, H, D) if loss is varlen_loss else (2, tokens, 3, H, D)
        leaf, eager = (randn(*shape, device=device, seed=seed).requires_grad_() for _ in range(2))
        sinks, eager_sinks = (randn(H, device=device, seed=seed + 1).requires_grad_() for _ in range(2))
        cu_seqlens = calls.int32([0, 40, tokens], device)
        with backends.use(None):
            compiled(leaf, sinks, cu_seqlens).backward()
            loss(eager, eager_sinks, cu_seqlens).backward()
        torch.testing.assert_close(leaf.grad, eager.grad, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(sinks.grad, eager_sinks.grad, rtol=1e-4, atol=1e-4)
        compilations.append(counter.frame_count)
    assert len(set(compilations)) == 1, f"compiled again for another length: {compilations}"


OPCHECKS = {
    "dense": Case("opcheck", FP32, 32, 4, 2, (17, 17), (33, 33), causal=True, sink=FP32),
    "varlen": Case("opcheck", FP16, 32, 4, 2, (17, 5), (20, 33), "varlen", alibi="h", sink=BF16),
}


@everywhere
@pytest.mark.parametrize("with_dlse", [False, True])
@pytest.mark.parametrize("name", OPCHECKS)
def test_opcheck(name, with_dlse, device, seed):
    case = OPCHECKS[name]
    inputs = make_inputs(case, device, seed)
    tensors = (inputs.q, inputs.k, inputs.v)
    numbers, lengths = calls.numbers(case, inputs), calls.lengths(case, inputs) or (None,) * 4
    ops = torch.ops.flash_attn
    forward = (*tensors, inputs.sinks, *numbers, False, *lengths, None)
    torch.library.opcheck(ops._attention_forward, forward)
    out, lse, _, rng_state = ops._attention_forward(*forward)
    dlse = randn(*lse.shape, device=device, seed=seed) if with_dlse else None
    saved = (inputs.dout, dlse, *tensors, out, lse, inputs.sinks, *map(torch.zeros_like, tensors))
    torch.library.opcheck(ops._attention_backward, (*saved, *numbers, False, rng_state, *lengths))


def every_function(device):
    """Each function that takes sinks, as a function of the keyword arguments alone."""
    x = torch.zeros(1, 8, 4, 16, device=device)
    cu = calls.int32([0, 8], device)
    return {
        "dense": lambda **words: flash_attn_func(x, x, x, **words),
        "varlen": lambda **words: flash_attn_varlen_func(x[0], x[0], x[0], cu, cu, 8, 8, **words),
        "kvcache": lambda **words: flash_attn_with_kvcache(x, x, x, **words),
    }


@everywhere
@pytest.mark.parametrize("name", ["dense", "varlen", "kvcache"])
def test_both_names_say_the_same(name, device):
    attend = every_function(device)[name]
    sinks = torch.zeros(4, device=device)
    calls.assert_equal(attend(learnable_sink=sinks), attend(s_aux=sinks))
    with pytest.raises(InvalidArgument, match=r"got both, of shapes \(4,\) and \(4,\)"):
        attend(s_aux=sinks, learnable_sink=sinks)


@everywhere
@pytest.mark.parametrize(
    "sinks, words",
    [
        (torch.zeros(2), r"shape \(4,\), one number for each query head, got \(2,\)"),
        (torch.zeros(1, 4), r"shape \(4,\).*got \(1, 4\)"),
        (torch.zeros(()), r"shape \(4,\).*got \(\)"),
        (torch.zeros(4, dtype=torch.int32), "dtype fp32, bf16, fp16 or fp64, got torch.int32"),
        (torch.zeros(4, device="meta"), "q is on .*, s_aux on meta"),
    ],
)
@pytest.mark.parametrize("name", ["dense", "varlen", "kvcache"])
def test_sinks_that_do_not_fit(name, sinks, words, device, monkeypatch):
    """Refused before any backend is asked."""
    for backend in ("cpu", "portable"):
        for entry in ("forward", "attend_cache"):
            monkeypatch.setattr(backends.load(backend), entry, lambda *_: pytest.fail("launched"))
    sinks = sinks if sinks.is_meta else sinks.to(device)
    with pytest.raises(InvalidArgument, match=words):
        every_function(device)[name](s_aux=sinks)


def test_who_serves_them():
    hopper = Hardware("cuda", "sm_90", 132, 232448)
    problem = AttentionProblem("dense", "bfloat16", 4, 4096, 4096, 16, 16, 128, aligned=True, sinks=True)
    verdicts = backends.explain(problem, hopper)
    plain = backends.explain(problem._replace(sinks=False), hopper)
    for name in ("hopper", "portable", "reference", "cpu"):
        assert verdicts[name] == plain[name]


def test_flaggems_refuses(monkeypatch):
    flaggems = backends.load("flaggems")
    problem = AttentionProblem("dense", "float16", 1, 16, 16, 2, 2, 64, sinks=True)
    assert flaggems._outside_domain(problem._replace(sinks=False)) is None
    reason = flaggems._outside_domain(problem)
    assert reason == "FlagGems' attention has no sinks"
    monkeypatch.setattr(flaggems, "unsupported", lambda problem, hardware: flaggems._outside_domain(problem))
    x = torch.zeros(1, 8, 4, 64, dtype=FP16)
    with backends.use("flaggems"), pytest.raises(UnsupportedProblem, match="has no sinks"):
        flash_attn_func(x, x, x, s_aux=torch.zeros(4))
