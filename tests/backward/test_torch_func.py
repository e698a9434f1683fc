"""torch.func over the public functions: `grad`, `vjp`, `vmap` and what is made of them, against eager autograd."""

import copy

import pytest
import torch
from torch.func import functional_call, grad, grad_and_value, jacrev, stack_module_state, vjp, vmap

import flash_attn
from flash_attn import backends, flash_attn_func, flash_attn_varlen_func, flash_attn_with_kvcache, reference
from flash_attn.backward import flash_attn_func_with_grad
from flash_attn.backward.autograd_functions import FlashAttnFunc
from flash_attn.errors import UnsupportedProblem
from flash_attn.modules.mha import MHA
from tests.support import calls
from tests.support.cases import FP16, FP32, Case
from tests.support.inputs import make_inputs
from tests.support.tolerance import expected

FP64 = torch.float64
N, B, S, H, D = 3, 2, 17, 4, 16  # N elements that vmap maps
CU_SEQLENS = [0, 13, 13, 34]
EVERYTHING = dict(dropout_p=0.3, causal=True, window_size=(9, -1), softcap=2.0, deterministic=True)


@pytest.fixture
def device(request):
    with calls.running_on(request.param) as device:
        yield device


everywhere = pytest.mark.parametrize("device", calls.places("cpu", "gpu"), indirect=True)
interpreted = pytest.mark.parametrize("device", calls.places("interpreter"), indirect=True)


def randn(*shape, device, seed, dtype=FP32):
    return calls.randn(*shape, dtype=dtype, device=device, seed=seed)


def lengths(device):
    cu_seqlens = calls.int32(CU_SEQLENS, device)
    return cu_seqlens, cu_seqlens, 21, 21


def dense(attend):
    return lambda qkv, **words: attend(*qkv.unbind(2), **words)


def sinks_of(qkv):
    """Sinks that depend on qkv, so that their gradient shows in its gradient; (H,)."""
    return qkv[0, 0, 0, :, 0] if qkv.dim() == 5 else qkv[0, 0, :, 0]


FORMS = {
    "dense": dense(flash_attn_func),
    "qkvpacked": flash_attn.flash_attn_qkvpacked_func,
    "kvpacked": lambda qkv, **words: flash_attn.flash_attn_kvpacked_func(qkv[:, :, 0], qkv[:, :, 1:], **words),
    "varlen": lambda qkv, **words: flash_attn_varlen_func(*qkv.unbind(1), *lengths(qkv.device), **words),
    "varlen_qkvpacked": lambda qkv, **words: flash_attn.flash_attn_varlen_qkvpacked_func(
        qkv, lengths(qkv.device)[0], 21, **words
    ),
    "varlen_kvpacked": lambda qkv, **words: flash_attn.flash_attn_varlen_kvpacked_func(
        qkv[:, 0], qkv[:, 1:], *lengths(qkv.device), **words
    ),
    "sinks": lambda qkv, **words: FORMS["dense"](qkv, s_aux=sinks_of(qkv), **words),
    "varlen_sinks": lambda qkv, **words: FORMS["varlen"](qkv, s_aux=sinks_of(qkv), **words),
}
OPTIONS = {"plain": {}, "everything": EVERYTHING}


def qkv_of(form, device, seed, mapped=()):
    tokens = (CU_SEQLENS[-1],) if form.startswith("varlen") else (B, S)
    return randn(*mapped, *tokens, 3, H, D, device=device, seed=seed)


def loss_of(form, with_lse=True, **words):
    """A scalar of one qkv, through softmax_lse too."""

    def loss(qkv):
        if not with_lse:
            return FORMS[form](qkv, **words).square().sum()
        out, lse, _ = FORMS[form](qkv, return_attn_probs=True, **words)
        return out.square().sum() + (lse * lse.sigmoid()).sum()

    return loss


def eager(function, *inputs, seed=0):
    """(value, gradient of each input) by eager autograd, dropout drawn from the seed."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    torch.manual_seed(seed)
    value = function(*leaves)
    return value.detach(), *torch.autograd.grad(value, leaves)


def seeded(transformed, *inputs, seed=0):
    torch.manual_seed(seed)
    return transformed(*inputs)


@everywhere
@pytest.mark.parametrize("with_lse", [False, True])
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("form", FORMS)
def test_grad_is_that_of_autograd(form, options, with_lse, device, seed):
    """The same kernels on the same numbers: to the bit."""
    qkv = qkv_of(form, device, seed)
    loss = loss_of(form, with_lse, **OPTIONS[options])
    value, gradient = eager(loss, qkv)
    calls.assert_equal(seeded(grad(loss), qkv), gradient)
    calls.assert_equal(seeded(grad_and_value(loss), qkv), (gradient, value))
    torch.manual_seed(0)
    primal, pull = vjp(loss, qkv)
    calls.assert_equal((primal, *pull(torch.ones_like(primal))), (value, gradient))


@interpreted
def test_the_kernels_are_transformed(device, seed):
    """One head and few rows, since an interpreted program takes a second; sinks, dropout and softmax_lse among them."""
    q, k, v = (randn(2, 1, 5, 1, D, device=device, seed=seed + i) for i in range(3))
    sinks = randn(2, 1, device=device, seed=seed + 3)

    def loss(q, k, v, sinks, dropout_p=0.0):
        words = dict(causal=True, s_aux=sinks, return_attn_probs=True)
        out, lse, _ = flash_attn_func(q, k, v, dropout_p, **words)
        return out.square().sum() + lse.sin().sum()

    operands = (q, k, v, sinks)
    wanted = [eager(loss, *one)[1:] for one in zip(*operands, strict=True)]
    every = vmap(grad(loss, (0, 1, 2, 3)))(*operands)
    calls.assert_near(every, [torch.stack(column) for column in zip(*wanted, strict=True)], roundoffs=64.0)
    first = [x[0] for x in operands]
    dropped = seeded(grad(lambda *x: loss(*x, dropout_p=0.4), (0, 1, 2, 3)), *first)
    calls.assert_equal(dropped, eager(lambda *x: loss(*x, dropout_p=0.4), *first)[1:])


@everywhere
@pytest.mark.parametrize(
    "case",
    [
        Case("func", FP16, 40, 6, 2, (33, 33), (47, 47), causal=True, alibi="bh", softcap=3.0, sink=FP16),
        Case("func", FP32, 16, 4, 2, (17, 0, 30), (33, 5, 9), "varlen", window=(9, 4), alibi="h"),
    ],
    ids=["dense", "varlen"],
)
def test_gradients_match_the_truth(case, device, seed):
    inputs = make_inputs(case, device, seed)

    def attend(q, k, v):
        return calls.public(case, inputs, q, k, v, return_attn_probs=True)[:2]

    (out, lse), pull = vjp(attend, inputs.q, inputs.k, inputs.v)
    dlse = randn(*lse.shape, device=device, seed=seed + 1).masked_fill(lse == -torch.inf, 0.0)
    dq, dk, dv = pull((inputs.dout, dlse))
    expected(case, inputs, dlse=dlse).check(out=out, lse=lse, dq=dq, dk=dk, dv=dv)


def test_gradients_in_double_precision(seed):
    q, k, v = (randn(B, S, H, D, device="cpu", seed=seed + i, dtype=FP64) for i in range(3))
    mask = reference.visible(S, S, (None, 0))

    def wanted(q, k, v):
        scores = torch.einsum("bihd,bjhd->bhij", q, k) * D**-0.5
        p = scores.masked_fill(~mask, -torch.inf).softmax(-1)
        return torch.einsum("bhij,bjhd->bihd", p, v).sin().sum()

    def loss(q, k, v):
        return flash_attn_func(q, k, v, causal=True).sin().sum()

    every = (0, 1, 2)
    torch.testing.assert_close(grad(loss, every)(q, k, v), grad(wanted, every)(q, k, v), rtol=1e-10, atol=1e-12)


@everywhere
def test_the_form_with_a_gradient_by_name(device, seed):
    q, k, v = (randn(B, S, H, D, device=device, seed=seed + i) for i in range(3))

    def loss(q, k, v):
        return flash_attn_func_with_grad(q, k, v, causal=True, return_softmax_lse=True)[0].square().sum()

    calls.assert_equal(grad(loss, (0, 1, 2))(q, k, v), eager(loss, q, k, v)[1:])


@everywhere
def test_some_operands_need_no_gradient(device, seed):
    q, k, v = (randn(B, S, H, D, device=device, seed=seed + i) for i in range(3))

    def loss(k, v):
        return flash_attn_func(q, k, v).square().sum()

    calls.assert_equal(grad(loss)(k, v), eager(lambda k: loss(k, v), k)[1])
    calls.assert_equal(grad(loss, 1)(k, v), eager(lambda v: loss(k, v), v)[1])


@everywhere
def test_a_loss_of_the_lse_alone(device, seed):
    qkv = qkv_of("dense", device, seed)

    def loss(qkv):
        return FORMS["dense"](qkv, return_attn_probs=True)[1].square().sum()

    calls.assert_equal(grad(loss)(qkv), eager(loss, qkv)[1])


@everywhere
def test_probabilities_carry_no_gradient(device, seed):
    qkv = qkv_of("dense", device, seed)

    def loss(qkv):
        out, _, probabilities = FORMS["dense"](qkv, dropout_p=0.4, return_attn_probs=True)
        return (out.sum() + probabilities.sum()), probabilities

    (gradient, probabilities), expected_gradient = (
        seeded(grad(loss, has_aux=True), qkv),
        eager(lambda x: loss(x)[0], qkv),
    )
    calls.assert_equal(gradient, expected_gradient[1])
    assert probabilities.shape == (B, H, 128, 128) and (probabilities < 0).any()


@everywhere
def test_a_graph_outside_of_the_transform(device, seed):
    """What torch.func does not differentiate by, eager autograd still does."""
    qkv = qkv_of("dense", device, seed).requires_grad_()
    weight = randn(D, device=device, seed=seed + 1)
    loss = loss_of("dense", causal=True)
    derivative = grad(lambda w: (w.sum() * loss(qkv)).sum())(weight)
    assert derivative.requires_grad
    (through,) = torch.autograd.grad(derivative.sum(), qkv)
    torch.testing.assert_close(through, D * eager(loss, qkv)[1], rtol=1e-5, atol=1e-5)


@everywhere
def test_both_passes_run_on_the_backend_asked_for(device, seed, monkeypatch):
    """Autograd runs a CUDA backward in a thread of its own."""
    used = []
    for name in ("cpu", "portable", "reference"):
        for direction in ("forward", "backward"):
            original = getattr(backends.load(name), direction)

            def noted(*arguments, name=name, direction=direction, original=original):
                used.append((name, direction))
                return original(*arguments)

            monkeypatch.setattr(backends.load(name), direction, noted)
    with backends.use("reference"):
        _, pull = vjp(loss_of("dense"), qkv_of("dense", device, seed))
    pull(torch.ones((), device=device))
    assert used == [("reference", "forward"), ("reference", "backward")]


MAPPED_FORMS = ["dense", "qkvpacked", "varlen", "varlen_kvpacked", "sinks", "varlen_sinks"]


@everywhere
@pytest.mark.parametrize("form", MAPPED_FORMS)
def test_vmap_of_a_forward(form, device, seed):
    mapped = qkv_of(form, device, seed, (N,))
    words = dict(causal=True, softcap=2.0, return_attn_probs=True)
    out, lse, _ = vmap(lambda qkv: FORMS[form](qkv, **words))(mapped)
    for i in range(N):
        calls.assert_near((out[i], lse[i]), FORMS[form](mapped[i], **words)[:2])


@everywhere
@pytest.mark.parametrize("form", MAPPED_FORMS)
def test_gradients_of_every_sample(form, device, seed):
    mapped = qkv_of(form, device, seed, (N,))
    loss = loss_of(form, causal=True)
    wanted = torch.stack([eager(loss, qkv)[1] for qkv in mapped])
    calls.assert_near(vmap(grad(loss))(mapped), wanted, roundoffs=64.0)
    calls.assert_near(grad(lambda x: vmap(loss)(x).sum())(mapped), wanted, roundoffs=64.0)
    calls.assert_near(
        vmap(grad(loss), in_dims=3, out_dims=1)(mapped.movedim(0, 3)).movedim(1, 0), wanted, roundoffs=64.0
    )


@everywhere
def test_gradients_of_every_sample_take_one_call(device, seed, monkeypatch):
    backend = backends.load(backends.requested_backend())
    count = []
    for direction in ("forward", "backward"):
        original = getattr(backend, direction)
        monkeypatch.setattr(
            backend, direction, lambda *x, d=direction, original=original: count.append(d) or original(*x)
        )
    vmap(grad(loss_of("dense")))(qkv_of("dense", device, seed, (N,)))
    assert count == ["forward", "backward"]


@everywhere
def test_two_dimensions_are_mapped(device, seed):
    mapped = qkv_of("sinks", device, seed, (N, 2))
    loss = loss_of("sinks", causal=True)
    wanted = torch.stack([torch.stack([eager(loss, qkv)[1] for qkv in row]) for row in mapped])
    calls.assert_near(vmap(vmap(grad(loss)))(mapped), wanted, roundoffs=64.0)
    calls.assert_near(vmap(lambda x: grad(lambda y: vmap(loss)(y).sum())(x))(mapped), wanted, roundoffs=64.0)


@everywhere
@pytest.mark.parametrize(
    "mapped", ["q", "k", "v", "slopes", "sinks", "qv", "k sinks", "batch slopes", "q batch slopes"]
)
def test_operands_that_are_not_mapped_serve_every_element(mapped, device, seed):
    """Grouped heads: the keys of an element must meet the queries of that element."""
    shapes = dict(q=(B, S, H, D), k=(B, 23, 2, D), v=(B, 23, 2, D), slopes=(H,), sinks=(H,))
    if "batch" in mapped:
        shapes["slopes"] = (B, H)
    names = [name for name in shapes if name in mapped]
    operands = {
        name: randn(*((N,) if name in names else ()), *shape, device=device, seed=seed + i)
        for i, (name, shape) in enumerate(shapes.items())
    }

    def loss(q, k, v, slopes, sinks):
        out, lse, _ = flash_attn_func(q, k, v, alibi_slopes=slopes, s_aux=sinks, causal=True, return_attn_probs=True)
        return out.square().sum() + lse.sin().sum()

    in_dims = tuple(0 if name in names else None for name in operands)
    wanted_by = (0, 1, 2, 4)
    gradients = vmap(grad(loss, wanted_by), in_dims)(*operands.values())
    total = grad(lambda *x: vmap(loss, in_dims)(*x).sum(), wanted_by)(*operands.values())
    for number, argument in enumerate(wanted_by):
        single = []
        for i in range(N):
            one = [x[i] if name in names else x for name, x in operands.items()]
            single.append(grad(loss, argument)(*one))
        calls.assert_near(gradients[number], torch.stack(single), roundoffs=64.0)
        together = torch.stack(single) if in_dims[argument] == 0 else sum(single)
        calls.assert_near(total[number], together, roundoffs=256.0)


@everywhere
def test_lengths_may_be_mapped(device, seed):
    qkv = qkv_of("varlen", device, seed)
    ends = calls.int32([[0, 13, 34], [0, 30, 34], [0, 0, 31]], device)

    def loss(qkv, ends):
        out = flash_attn.flash_attn_varlen_qkvpacked_func(qkv, ends, 34, causal=True)
        rows = torch.arange(len(out), device=device)
        return out.masked_fill((rows >= ends[-1])[:, None, None], 0.0).square().sum()

    gradients = vmap(grad(loss), (None, 0))(qkv, ends)
    for gradient, one in zip(gradients, ends, strict=True):
        wanted = grad(loss)(qkv, one)
        calls.assert_equal(gradient[: one[-1]], wanted[: one[-1]])


@everywhere
def test_pages_may_be_mapped(device, seed):
    q = randn(20, H, D, device=device, seed=seed)
    k, v = (randn(6, 16, H, D, device=device, seed=seed + i) for i in (1, 2))
    cu_q, cu_k = calls.int32([0, 8, 20], device), calls.int32([0, 30, 50], device)
    tables = calls.int32([[[0, 1], [2, 3]], [[5, 4], [3, 0]]], device)

    def attend(q, table):
        return flash_attn_varlen_func(q, k, v, cu_q, cu_k, 12, 30, causal=True, block_table=table)

    for out, table in zip(vmap(attend, (None, 0))(q, tables), tables, strict=True):
        calls.assert_equal(out, attend(q, table))
    several = torch.stack((q, -q))
    calls.assert_near(vmap(attend, (0, None))(several, tables[0]), torch.stack([attend(x, tables[0]) for x in several]))


@everywhere
@pytest.mark.parametrize("form", ["dense", "varlen", "sinks"])
def test_dropout_draws_a_mask_for_every_element(form, device, seed):
    mapped = qkv_of(form, device, seed)[None].expand(N, *([-1] * (4 + (form != "varlen"))))
    loss = loss_of(form, **EVERYTHING)
    torch.manual_seed(seed)
    gradients = vmap(grad(loss), randomness="different")(mapped)
    torch.manual_seed(seed)
    wanted = [grad(loss)(qkv) for qkv in mapped]
    calls.assert_near(list(gradients), wanted)
    assert not torch.equal(gradients[0], gradients[1])


@everywhere
def test_the_jacobian_keeps_the_mask_of_its_forward(device, seed):
    """jacrev maps the backward alone: every row of the Jacobian is of one forward."""
    q = randn(1, 3, 2, 4, device=device, seed=seed)

    def attend(q):
        return flash_attn_func(q, q, q, 0.4, causal=True)

    torch.manual_seed(seed)
    wanted = torch.autograd.functional.jacobian(attend, q)
    torch.manual_seed(seed)
    calls.assert_near(jacrev(attend)(q), wanted)


@everywhere
def test_jacobians(device, seed):
    q = randn(1, 5, 2, 4, device=device, seed=seed)
    k = randn(1, 6, 1, 4, device=device, seed=seed + 1)

    def attend(q, k):
        return flash_attn_func(q, k, k, causal=True, softcap=2.0)

    calls.assert_near(jacrev(attend, (0, 1))(q, k), torch.autograd.functional.jacobian(attend, (q, k)), roundoffs=16.0)


@everywhere
def test_randomness_must_say_what_dropout_does(device, seed):
    qkv = qkv_of("dense", device, seed)
    loss = loss_of("dense", dropout_p=0.3)
    with pytest.raises(UnsupportedProblem, match="randomness='error': randomness='different' draws a mask"):
        vmap(loss)(qkv[None])
    with pytest.raises(UnsupportedProblem, match="randomness='same' and a mapped operand"):
        vmap(grad(loss), randomness="same")(qkv[None])
    weights = torch.ones(N, device=device)
    with pytest.raises(UnsupportedProblem, match="randomness='different' and no mapped operand"):
        vmap(lambda w: w * loss(qkv), randomness="different")(weights)
    slopes = torch.rand(N, H, device=device)
    with pytest.raises(UnsupportedProblem, match="randomness='same' and a mapped operand"):
        vmap(lambda s: FORMS["dense"](qkv, dropout_p=0.3, alibi_slopes=s), randomness="same")(slopes)
    shared = seeded(vmap(lambda w: w * loss(qkv), randomness="same"), weights)
    calls.assert_equal(shared, eager(loss, qkv)[0].expand(N))


class Model(torch.nn.Module):
    """A projection and an attention with rotary embedding over (B, S, H * D)."""

    def __init__(self, device, seed):
        super().__init__()
        torch.manual_seed(seed)
        words = dict(causal=True, rotary_emb_dim=D, use_flash_attn=True, device=device, dtype=FP32)
        self.attention = MHA(H * D, H, **words)
        self.project = torch.nn.Linear(H * D, 1, device=device)

    def forward(self, x):
        return self.project(self.attention(x))


def loss_of_model(model, parameters, x, y):
    return (functional_call(model, parameters, (x,)) - y).square().sum()


@everywhere
def test_functional_call_of_a_module(device, seed):
    model = Model(device, seed)
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    x, y = randn(B, S, H * D, device=device, seed=seed), randn(B, S, 1, device=device, seed=seed + 1)
    (model(x) - y).square().sum().backward()
    gradients = grad(lambda p: loss_of_model(model, p, x, y))(parameters)
    for name, p in model.named_parameters():
        calls.assert_near(gradients[name], p.grad, roundoffs=16.0)


@everywhere
def test_gradients_of_every_sample_by_the_parameters(device, seed):
    model = Model(device, seed)
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    x, y = randn(N, S, H * D, device=device, seed=seed), randn(N, S, 1, device=device, seed=seed + 1)

    def loss(parameters, x, y):
        return loss_of_model(model, parameters, x[None], y[None])

    gradients = vmap(grad(loss), (None, 0, 0))(parameters, x, y)
    for i in range(N):
        model.zero_grad()
        (model(x[i : i + 1]) - y[i]).square().sum().backward()
        # against the largest of all: a bias adds terms that cancel
        each = [(gradients[name][i].flatten(), p.grad.flatten()) for name, p in model.named_parameters()]
        calls.assert_near(*map(torch.cat, zip(*each, strict=True)), roundoffs=64.0)


@everywhere
def test_an_ensemble_of_modules(device, seed):
    models = [Model(device, seed + i) for i in range(N)]
    parameters, buffers = stack_module_state(models)
    base = copy.deepcopy(models[0])
    x = randn(B, S, H * D, device=device, seed=seed)
    outs = vmap(lambda p, b: functional_call(base, (p, b), (x,)))(parameters, buffers)
    calls.assert_near(list(outs), [model(x) for model in models], roundoffs=16.0)


@everywhere
def test_what_is_not_computed_says_so(device, seed):
    qkv = qkv_of("dense", device, seed)
    loss = loss_of("dense", with_lse=False)
    cache = torch.zeros(B, S, H, D, device=device)
    basis = torch.ones(N, B, S, H, D, device=device)
    leaf = qkv.clone().requires_grad_()
    out = FORMS["dense"](leaf)
    for call, reason in (
        (lambda: torch.func.jvp(loss, (qkv,), (qkv,)), "forward-mode derivatives .*use torch.func.vjp or jacrev"),
        (lambda: torch.func.jacfwd(loss)(qkv), "forward-mode derivatives"),
        (lambda: torch.func.linearize(loss, qkv), "forward-mode derivatives"),
        (lambda: torch.func.jvp(grad(loss), (qkv,), (qkv,)), "forward-mode derivatives"),
        (lambda: torch.func.hessian(loss)(qkv), "forward-mode derivatives"),
        (lambda: grad(lambda x: grad(loss)(x).square().sum())(qkv), "second derivatives .*use plain PyTorch"),
        (lambda: torch.func.functionalize(loss)(qkv), "torch.func.functionalize of attention"),
        (lambda: vmap(loss)(qkv[None][:0]), "vmap over a dimension of size 0"),
        (lambda: torch.autograd.grad(out, leaf, basis, is_grads_batched=True), "several gradients at once"),
        (lambda: vmap(lambda v: torch.autograd.grad(out, leaf, v))(basis), "several gradients at once"),
        (
            lambda: grad(lambda q: flash_attn_with_kvcache(q, cache, cache).sum())(qkv[:, :, 0]),
            "writes into its caches",
        ),
        (
            lambda: vmap(lambda q: flash_attn_with_kvcache(q, cache, cache))(qkv[None, :, :, 0]),
            "writes into its caches",
        ),
    ):
        with pytest.raises(UnsupportedProblem, match=reason):
            call()


def test_the_classes_themselves_are_refused(seed):
    """torch.func takes classes with a setup_context, which costs every eager call host time."""
    q = randn(B, S, H, D, device="cpu", seed=seed)
    options = (0.0, None, False, (-1, -1), 0.0, None, False, False)
    with pytest.raises(RuntimeError, match="must override the setup_context"):
        grad(lambda q: FlashAttnFunc.apply(q, q, q, *options).sum())(q)


@everywhere
def test_gradients_that_are_switched_off(device, seed):
    qkv = qkv_of("dense", device, seed)

    def loss(qkv):
        with torch.no_grad():
            constant = FORMS["dense"](qkv)
        return (constant * FORMS["dense"](qkv)).sum()

    calls.assert_equal(grad(loss)(qkv), eager(loss, qkv)[1])


@everywhere
@pytest.mark.parametrize("requires_grad", [False, True])
def test_dual_numbers_are_refused(requires_grad, device, seed):
    """Kernels would drop the tangent, and the derivative with it."""
    q, tangent = (randn(B, S, H, D, device=device, seed=seed + i) for i in range(2))
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(q.requires_grad_(requires_grad), tangent)
        with pytest.raises(UnsupportedProblem, match="forward-mode derivatives"):
            flash_attn_func(q.detach(), dual, dual)
        assert flash_attn_func(*(q.detach(),) * 3).isfinite().all()


@pytest.mark.parametrize("device", calls.places("cpu", "interpreter", "gpu"), indirect=True)
def test_what_a_transform_does_not_see_is_left_alone(device, seed):
    """A call on constants, under jvp too, and a cache that no level of a transform has made."""
    q = randn(B, S, H, D, device=device, seed=seed)
    cache, x = torch.zeros(B, S, H, D, device=device), torch.ones(3, device=device)

    def constant():
        return flash_attn_func(q, q, q).sum() + flash_attn_with_kvcache(q, cache, cache).sum()

    value = constant()
    calls.assert_near(grad(lambda x: (x * constant()).sum())(x), value.expand(3))
    calls.assert_near(torch.func.jvp(lambda x: x * constant(), (x,), (x,))[1], value.expand(3))
    calls.assert_near(vmap(lambda x: x * constant())(x), value.expand(3))


@everywhere
@pytest.mark.parametrize("form", ["dense", "varlen_sinks"])
def test_compiled_and_traced(form, device, seed, unpoisoned):
    qkv = qkv_of(form, device, seed)
    loss = loss_of(form, causal=True)
    wanted = eager(loss, qkv)[1]
    compiled = torch.compile(grad(loss), fullgraph=True, backend="aot_eager")
    calls.assert_near(compiled(qkv), wanted, roundoffs=16.0)
    traced = torch.fx.experimental.proxy_tensor.make_fx(grad(loss))(qkv)
    calls.assert_near(traced(-qkv), eager(loss, -qkv)[1], roundoffs=16.0)
    assert "torch.ops.flash_attn" in traced.code


@everywhere
@pytest.mark.parametrize(
    "transform, reason",
    [
        (lambda loss: vmap(grad(loss)), "more than one transform"),
        (lambda loss: grad(lambda x: vmap(loss)(x).sum()), "more than one transform"),
        (lambda loss: grad(lambda x: grad(lambda y: loss(y[0]))(x).square().sum()), "more than one transform"),
        (lambda loss: vmap(lambda x: loss(x, dropout_p=0.3)), "vmap's randomness is not known"),
    ],
    ids=["per sample", "total", "twice", "dropout"],
)
def test_what_the_compiler_would_get_wrong_it_leaves_to_eager_execution(transform, reason, device, seed, unpoisoned):
    """Silent zeros and unasked masks otherwise; after the graph break the transforms are eager, and do or refuse it."""
    mapped = qkv_of("dense", device, seed, (N,))

    def loss(qkv, **words):
        return FORMS["dense"](qkv, causal=True, **words).square().sum()

    with pytest.raises(torch._dynamo.exc.Unsupported, match=reason):
        torch.compile(transform(loss), fullgraph=True, backend="aot_eager")(mapped)
    broken = torch.compile(transform(loss), backend="aot_eager")
    try:
        wanted = transform(loss)(mapped)
    except UnsupportedProblem as error:
        with pytest.raises(UnsupportedProblem) as caught:
            broken(mapped)
        assert str(caught.value) == str(error)
    else:
        calls.assert_near(broken(mapped), wanted, roundoffs=16.0)
