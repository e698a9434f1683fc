"""How attention sits in autograd: packed forms, partial gradients, strides, checkpoints, autocast, torch.compile."""

import math

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import flash_attn
from flash_attn import backends, flash_attn_func, flash_attn_varlen_func
from flash_attn.backward import FlashAttnFunction, FlashAttnVarlenFunction, flash_attn_func_with_grad
from tests.support import calls
from tests.support.cases import BF16, FP16, FP32, Case
from tests.support.inputs import make_inputs

B, S, H, D = 2, 97, 4, 64
CU_SEQLENS = [0, 33, 33, 97, 160]
MAX_SEQLEN = 64
OPTIONS = {
    "plain": {},
    "causal": dict(causal=True),
    "everything": dict(dropout_p=0.2, causal=True, window_size=(40, 0), softcap=3.0, deterministic=True),
}


@pytest.fixture
def device(request):
    with calls.running_on(request.param) as device:
        yield device


everywhere = pytest.mark.parametrize("device", calls.places("cpu", "gpu"), indirect=True)


def randn(*shape, device, seed, dtype=BF16):
    return calls.randn(*shape, dtype=dtype, device=device, seed=seed)


def qkv_leaf(device, seed, *, packed=False, dtype=BF16):
    tokens = (CU_SEQLENS[-1],) if packed else (B, S)
    return randn(*tokens, 3, H, D, device=device, seed=seed, dtype=dtype).requires_grad_()


def gradients(out, inputs, seed):
    dout = randn(*out.shape, device=out.device, seed=seed + 99, dtype=out.dtype)
    return torch.autograd.grad(out, inputs, dout, retain_graph=True)


@everywhere
@pytest.mark.parametrize("name", OPTIONS)
def test_dense_packed_forms_agree(name, device, seed):
    """The same strides, so the same kernels: bitwise, down to the gradient of the packed tensor."""
    chosen = OPTIONS[name]
    qkv = qkv_leaf(device, seed)
    results = []
    for attend in (
        lambda: flash_attn.flash_attn_qkvpacked_func(qkv, **chosen),
        lambda: flash_attn.flash_attn_kvpacked_func(qkv[:, :, 0], qkv[:, :, 1:], **chosen),
        lambda: flash_attn_func(*qkv.unbind(2), **chosen),
    ):
        torch.manual_seed(seed)
        out = attend()
        results.append((out, *gradients(out, qkv, seed)))
    calls.assert_equal(results[0], results[2])
    calls.assert_equal(results[1], results[2])


@everywhere
@pytest.mark.parametrize("name", OPTIONS)
def test_varlen_packed_forms_agree(name, device, seed):
    chosen = OPTIONS[name]
    qkv = qkv_leaf(device, seed, packed=True)
    cu = calls.int32(CU_SEQLENS, device)
    both = (cu, cu, MAX_SEQLEN, MAX_SEQLEN)
    results = []
    for attend in (
        lambda: flash_attn.flash_attn_varlen_qkvpacked_func(qkv, cu, MAX_SEQLEN, **chosen),
        lambda: flash_attn.flash_attn_varlen_kvpacked_func(qkv[:, 0], qkv[:, 1:], *both, **chosen),
        lambda: flash_attn_varlen_func(*qkv.unbind(1), *both, **chosen),
    ):
        torch.manual_seed(seed)
        out = attend()
        results.append((out, *gradients(out, qkv, seed)))
    calls.assert_equal(results[0], results[2])
    calls.assert_equal(results[1], results[2])


@everywhere
def test_kvpacked_with_fewer_key_heads(device, seed):
    q = randn(B, 33, 6, D, device=device, seed=seed).requires_grad_()
    kv = randn(B, S, 2, 2, D, device=device, seed=seed + 1).requires_grad_()
    packed, plain = flash_attn.flash_attn_kvpacked_func(q, kv), flash_attn_func(q, *kv.unbind(2))
    calls.assert_equal(packed, plain)
    calls.assert_equal(gradients(packed, (q, kv), seed), gradients(plain, (q, kv), seed))


@everywhere
def test_maximum_lengths_may_be_tensors(device, seed):
    q = randn(CU_SEQLENS[-1], H, D, device=device, seed=seed)
    cu, longest = calls.int32(CU_SEQLENS, device), torch.tensor(MAX_SEQLEN)
    calls.assert_equal(
        flash_attn_varlen_func(q, q, q, cu, cu, longest, longest),
        flash_attn_varlen_func(q, q, q, cu, cu, MAX_SEQLEN, MAX_SEQLEN),
    )


@everywhere
@pytest.mark.parametrize("wanted", ["q", "k", "v", "qk", "kv"])
def test_some_operands_need_no_gradient(wanted, device, seed):
    tensors = dict(zip("qkv", (x.detach() for x in qkv_leaf(device, seed).unbind(2)), strict=True))
    every = [x.clone().requires_grad_() for x in tensors.values()]
    full = dict(zip("qkv", gradients(flash_attn_func(*every, causal=True), every, seed), strict=True))
    partial = {name: x.clone().requires_grad_(name in wanted) for name, x in tensors.items()}
    out = flash_attn_func(*partial.values(), causal=True)
    for name, gradient in zip(wanted, gradients(out, [partial[name] for name in wanted], seed), strict=True):
        calls.assert_equal(gradient, full[name])
    assert all(partial[name].grad is None for name in set("qkv") - set(wanted))


@everywhere
def test_no_gradient_no_graph(device, seed):
    q, k, v = qkv_leaf(device, seed).unbind(2)
    with_graph = flash_attn_func(q, k, v)
    with torch.no_grad():
        without = flash_attn_func(q, k, v)
    assert with_graph.requires_grad and not without.requires_grad
    calls.assert_equal(with_graph, without)


@everywhere
def test_tensors_that_torch_func_left_behind(device, seed):
    q, k, v = (randn(B, S, H, D, device=device, seed=seed + i) for i in range(3))
    k.requires_grad_()
    left = []
    torch.func.grad(lambda x: left.append(x) or x.float().sum())(q)
    assert torch._C._functorch.is_dead_tensor_wrapper(left[0])
    assert torch.equal(flash_attn_func(left[0], k, v), flash_attn_func(q, k, v))


@everywhere
@pytest.mark.parametrize("name", OPTIONS)
def test_a_retained_graph_gives_the_same_gradients_again(name, device, seed):
    torch.manual_seed(seed)
    leaf = qkv_leaf(device, seed)
    out = flash_attn_func(*leaf.unbind(2), **OPTIONS[name])
    calls.assert_equal(gradients(out, leaf, seed), gradients(out, leaf, seed))


@everywhere
def test_one_tensor_as_query_key_and_value(device, seed):
    x = randn(B, S, H, D, device=device, seed=seed, dtype=FP32).requires_grad_()
    y = [x.detach().clone().requires_grad_() for _ in range(3)]
    (together,) = gradients(flash_attn_func(x, x, x), x, seed)
    apart = gradients(flash_attn_func(*y), y, seed)
    torch.testing.assert_close(together, sum(apart), rtol=1e-5, atol=1e-5)


@everywhere
def test_deterministic_changes_nothing(device, seed):
    leaf = qkv_leaf(device, seed)
    results = [flash_attn_func(*leaf.unbind(2), causal=True, deterministic=d) for d in (True, False)]
    calls.assert_equal(*results)
    calls.assert_equal(*(gradients(out, leaf, seed) for out in results))


@everywhere
def test_the_backward_runs_on_the_backend_asked_for(device, seed, monkeypatch):
    """Autograd runs a CUDA backward in a thread of its own."""
    used = []
    for name in ("cpu", "portable", "reference"):
        module = backends.load(name)
        original = module.backward
        monkeypatch.setattr(
            module, "backward", lambda *x, name=name, original=original: used.append(name) or original(*x)
        )
    q = randn(1, 17, 2, 32, device=device, seed=seed, dtype=FP32).requires_grad_()
    with backends.use("reference"):
        flash_attn_func(q, q, q).sum().backward()
    assert used == ["reference"]


@everywhere
def test_a_transposed_dout(device, seed):
    leaf = qkv_leaf(device, seed)
    out = flash_attn_func(*leaf.unbind(2), causal=True)
    dout = randn(B, H, S, D, device=device, seed=seed + 1).transpose(1, 2)
    wanted = torch.autograd.grad(out, leaf, dout.contiguous(), retain_graph=True)
    calls.assert_equal(torch.autograd.grad(out, leaf, dout, retain_graph=True), wanted)
    swapped = randn(B, S, D, H, device=device, seed=seed + 1).transpose(2, 3)
    wanted = torch.autograd.grad(out, leaf, swapped.contiguous(), retain_graph=True)
    calls.assert_equal(torch.autograd.grad(out, leaf, swapped), wanted)


@everywhere
def test_an_expanded_dout(device, seed):
    """What out.sum() and (out * weights).sum() send back: strides of 0."""
    leaf = qkv_leaf(device, seed)
    out = flash_attn_func(*leaf.unbind(2))
    row = randn(D, device=device, seed=seed + 1)
    for dout in (torch.ones((), device=device, dtype=BF16).expand_as(out), row.expand_as(out)):
        wanted = torch.autograd.grad(out, leaf, dout.contiguous(), retain_graph=True)
        calls.assert_equal(torch.autograd.grad(out, leaf, dout, retain_graph=True), wanted)


@everywhere
@pytest.mark.parametrize("shape", [(1, S, H, D), (B, S, 1, D), (1, S, 1, D)], ids=str)
def test_expanded_keys_and_values(shape, device, seed):
    q = randn(B, S, H, D, device=device, seed=seed, dtype=FP32).requires_grad_()
    k, v = (randn(*shape, device=device, seed=seed + i, dtype=FP32).requires_grad_() for i in (1, 2))
    expanded = flash_attn_func(q, k.expand(B, S, H, D), v.expand(B, S, H, D))
    copied = flash_attn_func(q, k.expand(B, S, H, D).contiguous(), v.expand(B, S, H, D).contiguous())
    calls.assert_near(expanded, copied)
    calls.assert_near(gradients(expanded, (q, k, v), seed), gradients(copied, (q, k, v), seed))


@everywhere
def test_operands_whose_last_dimension_is_not_contiguous(device, seed):
    q, k, v = (randn(B, S, D, H, device=device, seed=seed + i).transpose(2, 3).requires_grad_() for i in range(3))
    copies = [x.detach().contiguous().requires_grad_() for x in (q, k, v)]
    out, wanted = flash_attn_func(q, k, v), flash_attn_func(*copies)
    calls.assert_equal(out, wanted)
    calls.assert_equal(gradients(out, (q, k, v), seed), gradients(wanted, copies, seed))


@everywhere
@pytest.mark.parametrize("layout", ["dense", "varlen"])
def test_gradients_written_into_views(layout, device, seed):
    """dqkv[:, :, 0] and its like, with untouched sentinels around them."""
    lengths = (
        dict(seqlens_q=(S, S), seqlens_k=(S, S)) if layout == "dense" else dict(seqlens_q=(33, 64), seqlens_k=(33, 64))
    )
    case = Case("views", BF16, D, H, H, layout=layout, causal=True, **lengths)
    inputs = make_inputs(case, device, seed)
    out, lse, _, rng_state = calls.private(case, inputs)
    numbers = calls.numbers(case, inputs)
    tensors = (inputs.dout, inputs.q, inputs.k, inputs.v, out, lse)
    ops = torch.ops.flash_attn
    function = ops._flash_attn_backward if layout == "dense" else ops._flash_attn_varlen_backward
    plain = [torch.empty_like(x) for x in (inputs.q, inputs.k, inputs.v)]
    function(*tensors, *plain, *calls.lengths(case, inputs), *numbers, False, rng_state)
    buffer = torch.full((*inputs.q.shape[:-2], 4, H + 1, D), 7.0, dtype=BF16, device=device)
    views = buffer.unbind(-3)[:3]
    views = [view[..., :H, :] for view in views]
    function(*tensors, *views, *calls.lengths(case, inputs), *numbers, False, rng_state)
    calls.assert_equal(views, plain)
    assert (buffer[..., 3, :, :] == 7.0).all() and (buffer[..., H, :] == 7.0).all()


@everywhere
def test_the_operator_accepts_absent_gradient_buffers(device, seed):
    case = Case("absent", BF16, D, H, H, (S, S), (S, S))
    inputs = make_inputs(case, device, seed)
    out, lse, _, rng_state = calls.private(case, inputs)
    dk = torch.empty_like(inputs.k)
    delta = torch.ops.flash_attn._flash_attn_backward(
        inputs.dout,
        inputs.q,
        inputs.k,
        inputs.v,
        out,
        lse,
        None,
        dk,
        None,
        *calls.numbers(case, inputs),
        False,
        rng_state,
    )
    assert dk.isfinite().all()
    assert delta.shape == (B, H, 128) and delta.dtype == FP32
    rowsum = (inputs.dout.double() * out.double()).sum(-1).transpose(1, 2)
    torch.testing.assert_close(delta[:, :, :S].double(), rowsum, rtol=1e-4, atol=1e-3)


@everywhere
def test_softmax_d_of_a_packed_batch_is_padded(device, seed):
    case = Case("padded", BF16, D, H, H, (33, 64), (33, 64), "varlen")
    inputs = make_inputs(case, device, seed)
    out, lse, _, rng_state = calls.private(case, inputs)
    delta = torch.ops.flash_attn._flash_attn_varlen_backward(
        inputs.dout, inputs.q, inputs.k, inputs.v, out, lse, None, None, None,
        *calls.lengths(case, inputs), *calls.numbers(case, inputs), False, rng_state,
    )  # fmt: skip
    assert delta.shape == (H, 97 + 128 * 2)


@everywhere
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_activation_checkpointing_repeats_the_dropout(use_reentrant, device, seed):
    leaf = qkv_leaf(device, seed)

    def attend(x):
        return flash_attn.flash_attn_qkvpacked_func(x, 0.3, causal=True)

    results = []
    for call in (attend, lambda x: checkpoint(attend, x, use_reentrant=use_reentrant)):
        torch.manual_seed(seed)
        out = call(leaf)
        dout = randn(*out.shape, device=device, seed=seed + 1)
        out.backward(dout)
        results.append((out.detach(), leaf.grad))
        leaf.grad = None
    calls.assert_equal(*results)


@everywhere
def test_autocast_inputs(device, seed):
    """Projections in autocast are bf16; fp32 weights receive fp32 gradients through the attention."""
    x = randn(B, S, H * D, device=device, seed=seed, dtype=FP32)
    weight = (randn(3 * H * D, H * D, device=device, seed=seed + 1, dtype=FP32) / 16).requires_grad_()
    with torch.autocast(device.type, dtype=BF16):
        qkv = torch.nn.functional.linear(x, weight).unflatten(-1, (3, H, D))
        out = flash_attn.flash_attn_qkvpacked_func(qkv, causal=True)
    assert qkv.dtype == out.dtype == BF16
    out.float().square().sum().backward()
    assert weight.grad.dtype == FP32 and weight.grad.isfinite().all() and weight.grad.abs().max() > 0


@everywhere
def test_backward_under_autocast_is_the_same(device, seed):
    leaves = [x.detach().clone().requires_grad_() for x in qkv_leaf(device, seed).unbind(2)]
    wanted = gradients(flash_attn_func(*leaves), leaves, seed)
    with torch.autocast(device.type, dtype=FP16):
        calls.assert_equal(gradients(flash_attn_func(*leaves), leaves, seed), wanted)


@everywhere
def test_the_dense_class_takes_the_window_side_by_side(device, seed):
    leaf = qkv_leaf(device, seed)
    slopes = torch.tensor([0.1, 0.2, 0.3, 0.4], device=device)
    wanted = flash_attn_func(*leaf.unbind(2), softmax_scale=0.2, window_size=(20, 9), alibi_slopes=slopes)
    out, lse = FlashAttnFunction.apply(*leaf.unbind(2), False, 0.2, 20, 9, slopes, True)
    calls.assert_equal(out, wanted)
    assert lse.shape == (B, H, S) and lse.dtype == FP32 and lse.requires_grad
    calls.assert_equal(gradients(out, leaf, seed), gradients(wanted, leaf, seed))
    calls.assert_equal(FlashAttnFunction.apply(*leaf.unbind(2), True), flash_attn_func(*leaf.unbind(2), causal=True))


@everywhere
def test_the_packed_batch_class_takes_the_window_side_by_side(device, seed):
    leaf = qkv_leaf(device, seed, packed=True)
    cu = calls.int32(CU_SEQLENS, device)
    lengths = (cu, cu, MAX_SEQLEN, MAX_SEQLEN)
    wanted = flash_attn_varlen_func(*leaf.unbind(1), *lengths, causal=True, window_size=(20, 0))
    out, lse = FlashAttnVarlenFunction.apply(*leaf.unbind(1), *lengths, True, None, 20, 0, None, True)
    calls.assert_equal(out, wanted)
    assert lse.shape == (H, CU_SEQLENS[-1])
    calls.assert_equal(gradients(out, leaf, seed), gradients(wanted, leaf, seed))


@everywhere
def test_func_with_grad_takes_keywords(device, seed):
    leaf = qkv_leaf(device, seed)
    q, k, v = leaf.unbind(2)
    wanted = flash_attn_func(q, k, v, window_size=(20, 9), softcap=3.0, causal=False, softmax_scale=0.2)
    pair = flash_attn_func_with_grad(q=q, k=k, v=v, window_size=(20, 9), softcap=3.0, softmax_scale=0.2)
    sides = flash_attn_func_with_grad(q, k, v, False, 0.2, window_size_left=20, window_size_right=9, softcap=3.0)
    calls.assert_equal((pair, sides), (wanted, wanted))
    calls.assert_equal(gradients(sides, leaf, seed), gradients(wanted, leaf, seed))
    out, lse = flash_attn_func_with_grad(q, k, v, return_softmax_lse=True, deterministic=True)
    calls.assert_equal((out, lse), flash_attn_func(q, k, v, return_attn_probs=True)[:2])
    torch.manual_seed(seed)
    dropped = flash_attn_func_with_grad(q, k, v, dropout_p=0.2)
    torch.manual_seed(seed)
    calls.assert_equal(dropped, flash_attn_func(q, k, v, 0.2))


PROBS = {
    "dense": Case("probs", FP32, D, H, 2, (S, S), (150, 150), window=(60, 9), dropout_p=0.3),
    "causal": Case("probs", BF16, D, H, H, (200,), (200,), causal=True, dropout_p=0.17),
    "varlen": Case("probs", FP32, D, H, 2, (S, 20), (S, 70), "varlen", dropout_p=0.3),
}


@everywhere
@pytest.mark.parametrize("layout", ["dense", "varlen"])
def test_attn_probs_without_dropout(layout, device, seed):
    leaf = qkv_leaf(device, seed, packed=layout == "varlen")
    cu = calls.int32(CU_SEQLENS, device)
    attend, dim, extra = (flash_attn_func, 2, ()) if layout == "dense" else (
        flash_attn_varlen_func, 1, (cu, cu, MAX_SEQLEN, MAX_SEQLEN)
    )  # fmt: skip
    out, lse, scores = attend(*leaf.unbind(dim), *extra, return_attn_probs=True)
    assert lse.shape == ((B, H, S) if layout == "dense" else (H, CU_SEQLENS[-1])) and lse.dtype == FP32
    assert scores.numel() == 0
    assert out.requires_grad and lse.requires_grad and not scores.requires_grad
    calls.assert_equal(out, attend(*leaf.unbind(dim), *extra))


@everywhere
@pytest.mark.parametrize("name", PROBS)
def test_attn_probs_with_dropout(name, device, seed):
    """Signs are the dropout mask, magnitudes exp(score - row maximum): together they rebuild the output."""
    case = PROBS[name]
    inputs = make_inputs(case, device, seed)
    torch.manual_seed(seed)
    leaves = [x.detach().requires_grad_() for x in (inputs.q, inputs.k, inputs.v)]
    out, lse, scores = calls.public(case, inputs, *leaves, return_attn_probs=True)
    assert lse.requires_grad and not scores.requires_grad
    _, keep = calls.lse_and_keep(case, inputs, out, seed)
    rounded = [math.ceil(max(lengths) / 128) * 128 for lengths in (case.seqlens_q, case.seqlens_k)]
    assert scores.shape == (case.batch_size, case.nheads, *rounded) and scores.dtype == case.dtype
    masks = keep if case.layout == "varlen" else keep.split(1)
    outs = out.split(case.seqlens_q) if case.layout == "varlen" else out
    values = inputs.v.split(case.seqlens_k) if case.layout == "varlen" else inputs.v
    dropped = seen = 0
    for batch, (seqlen_q, seqlen_k) in enumerate(zip(case.seqlens_q, case.seqlens_k, strict=True)):
        part = scores[batch, :, :seqlen_q, :seqlen_k].double()
        visible = part != 0
        assert torch.equal((part > 0)[visible], masks[batch][0][visible])
        dropped, seen = dropped + int((part < 0).sum()), seen + int(visible.sum())
        rebuilt = rebuild(part, values[batch], case.dropout_p)
        eps = torch.finfo(case.dtype).eps
        torch.testing.assert_close(outs[batch].double(), rebuilt, rtol=4 * eps, atol=16 * eps)
        assert part.abs().amax(-1).max() <= 1.0 + eps
        assert scores[batch, :, seqlen_q:].count_nonzero() == scores[batch, :, :, seqlen_k:].count_nonzero() == 0
    fraction = dropped / seen
    assert abs(fraction - case.dropout_p) < 0.01, f"{fraction} of the weights dropped, p = {case.dropout_p}"


def rebuild(scores, v, dropout_p):
    """out (seqlen_q, heads, headdim) from one sequence's S_dmask (heads, seqlen_q, seqlen_k)."""
    p = scores.abs() / scores.abs().sum(-1, keepdim=True).clamp_min(1e-30)
    p = p.masked_fill(scores < 0, 0.0) / (1 - dropout_p)
    v = v.double().repeat_interleave(scores.shape[0] // v.shape[1], dim=1)
    return torch.einsum("hij,jhd->ihd", p, v)


@everywhere
def test_dropout_follows_the_generator(device, seed):
    q, k, v = qkv_leaf(device, seed).unbind(2)
    outs = []
    for manual in (1, 1, 2):
        torch.manual_seed(manual)
        outs.append((flash_attn_func(q, k, v, 0.5), flash_attn_func(q, k, v, 0.5)))
    calls.assert_equal(outs[0], outs[1])
    assert not torch.equal(outs[0][0], outs[0][1]), "two calls drop the same weights"
    assert not torch.equal(outs[0][0], outs[2][0]), "two seeds drop the same weights"


OPCHECKS = {
    "dense": Case("opcheck", FP32, 32, 4, 2, (17, 17), (33, 33), causal=True),
    "features": Case("opcheck", FP16, 32, 2, 2, (17,), (33,), window=(9, 4), softcap=2.0, alibi="bh", strides="packed"),
    "varlen": Case("opcheck", FP32, 32, 4, 2, (17, 5), (20, 33), "varlen"),
}


@everywhere
@pytest.mark.parametrize("name", OPCHECKS)
def test_opcheck(name, device, seed):
    case = OPCHECKS[name]
    inputs = make_inputs(case, device, seed)
    ops = torch.ops.flash_attn
    dense = case.layout == "dense"
    forward = ops._flash_attn_forward if dense else ops._flash_attn_varlen_forward
    backward = ops._flash_attn_backward if dense else ops._flash_attn_varlen_backward
    lengths, numbers = calls.lengths(case, inputs), calls.numbers(case, inputs)
    torch.library.opcheck(forward, (inputs.q, inputs.k, inputs.v, *lengths, *numbers, False))
    out, lse, _, rng_state = calls.private(case, inputs)
    gradients = [torch.zeros_like(x) for x in (inputs.q, inputs.k, inputs.v)]
    tensors = (inputs.dout, inputs.q, inputs.k, inputs.v, out, lse, *gradients)
    torch.library.opcheck(backward, (*tensors, *lengths, *numbers, False, rng_state))


@everywhere
@pytest.mark.parametrize("layout", ["dense", "varlen"])
@pytest.mark.parametrize("return_softmax", [False, True])
def test_fake_results_look_like_the_real_ones(layout, return_softmax, device, seed):
    """With dropout too, which opcheck cannot repeat."""
    lengths = ((17, 17), (150, 150)) if layout == "dense" else ((17, 5), (20, 150))
    case = Case("fake", FP16, 32, 4, 2, *lengths, layout=layout, dropout_p=0.2)
    inputs = make_inputs(case, device, seed)
    real = calls.private(case, inputs, return_softmax)
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fields = {name: mode.from_tensor(x) if isinstance(x, torch.Tensor) else x for name, x in vars(inputs).items()}
        fake = calls.private(case, type(inputs)(**fields), return_softmax)
    for a, b in zip(real, fake, strict=True):
        assert (a.shape, a.dtype, a.device, a.stride()) == (b.shape, b.dtype, b.device, b.stride())


def compiled_against_eager(backend, device, seed, loss, shapes):
    """loss(qkv, cu_seqlens) whole and with gradients; what is compiled for the first shape serves the others."""
    counter = torch._dynamo.testing.CompileCounterWithBackend(backend)
    compiled = torch.compile(loss, fullgraph=True, dynamic=True, backend=counter)
    compilations = []
    for shape in shapes:
        eager_leaf, leaf = (randn(*shape, device=device, seed=seed, dtype=FP32).requires_grad_() for _ in range(2))
        tokens = shape[0]
        cu_seqlens = calls.int32([0, tokens // 2, tokens], device)
        wanted, got = loss(eager_leaf, cu_seqlens), compiled(leaf, cu_seqlens)
        wanted.backward()
        got.backward()
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(leaf.grad, eager_leaf.grad, rtol=1e-5, atol=1e-5)
        compilations.append(counter.frame_count)
    assert len(set(compilations)) == 1, f"compiled again for another length: {compilations}"


def dense_loss(qkv, cu_seqlens):
    return (flash_attn_func(*qkv.unbind(2), causal=True) * 0.5).square().sum()


def varlen_loss(qkv, cu_seqlens):
    lengths = (cu_seqlens, cu_seqlens.clone(), 64, 64)
    return (flash_attn_varlen_func(*qkv.unbind(1), *lengths, causal=True) * 0.5).square().sum()


def varlen_loss_of_one_tensor(qkv, cu_seqlens):
    lengths = (cu_seqlens, cu_seqlens, 64, 64)
    return (flash_attn_varlen_func(*qkv.unbind(1), *lengths, causal=True) * 0.5).square().sum()


def packed_loss(qkv, cu_seqlens):
    return (flash_attn.flash_attn_varlen_qkvpacked_func(qkv, cu_seqlens, 64, causal=True) * 0.5).square().sum()


DENSE_SHAPES = [(2, size, 3, 4, 64) for size in (48, 33, 96)]
PACKED_SHAPES = [(size, 3, 4, 64) for size in (48, 33, 96)]


@everywhere
@pytest.mark.parametrize("loss", [dense_loss, varlen_loss, varlen_loss_of_one_tensor, packed_loss])
def test_compiles_whole_with_a_dynamic_length(loss, device, seed, unpoisoned):
    shapes = DENSE_SHAPES if loss is dense_loss else PACKED_SHAPES
    with backends.use(None):
        compiled_against_eager("aot_eager", device, seed, loss, shapes)


@pytest.mark.gpu
@pytest.mark.parametrize("device", calls.places("gpu"), indirect=True)
def test_compiles_with_inductor(device, seed, unpoisoned):
    with backends.use(None):
        compiled_against_eager("inductor", device, seed, dense_loss, DENSE_SHAPES[:2])


@everywhere
def test_compiled_dropout_keeps_its_mask_for_the_backward(device, seed, unpoisoned):
    """v = 1: out is the kept weight of each row, dv its column sums, so their totals agree when the masks do."""
    q, k = (randn(1, 33, 2, 64, device=device, seed=seed + i, dtype=FP32).requires_grad_() for i in (0, 1))
    v = torch.ones(1, 33, 2, 64, device=device, requires_grad=True)
    with backends.use(None):
        out = torch.compile(lambda *x: flash_attn_func(*x, 0.4), fullgraph=True, backend="aot_eager")(q, k, v)
        out.sum().backward()
    assert not torch.allclose(out, torch.ones_like(out))
    torch.testing.assert_close(v.grad.sum((1, 3)), out.detach().sum((1, 3)), rtol=1e-4, atol=1e-3)
