"""The differentiable functions and the module: against autograd of apply_rotary_emb_torch and finite differences."""

import copy
import inspect
import itertools

import pytest
import torch

from flash_attn import backends
from flash_attn.errors import InvalidArgument, UnsupportedProblem
from flash_attn.layers import rotary
from flash_attn.layers.rotary import (
    RotaryEmbedding,
    apply_rotary_emb,
    apply_rotary_emb_kv_,
    apply_rotary_emb_qkv_,
    apply_rotary_emb_torch,
)
from flash_attn.ops.triton.rotary import apply_rotary
from tests.support.calls import places, running_on
from tests.support.rotations import assert_rounded_once, bound, rotated, tables

FP16, FP32, FP64 = torch.float16, torch.float32, torch.float64
CPU = torch.device("cpu")


@pytest.fixture
def generator(seed):
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def fresh_compiler():
    """Dynamo counts the recompilations of a function across tests."""
    torch._dynamo.reset()


@pytest.fixture(params=places("cpu", "interpreter", "gpu"))
def device(request):
    with running_on(request.param) as device:
        yield device


def random(generator, device, dtype, *shape):
    return torch.randn(shape, generator=generator).to(device, dtype)


def positions(batch, seqlen, offsets, device):
    start = offsets[:, None] if isinstance(offsets, torch.Tensor) else offsets
    return torch.arange(seqlen, device=device).expand(batch, seqlen) + start


@pytest.mark.parametrize("offsets", [0, 4, [1, 5]], ids=str)
@pytest.mark.parametrize("half", [16, 8], ids=["whole", "part"])
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("inplace", [False, True])
def test_emb(device, generator, inplace, interleaved, half, offsets):
    """Upstream's grid: fraction, pairing, in place (on a leaf too), offsets; forward and backward."""
    offsets = torch.tensor(offsets, device=device) if isinstance(offsets, list) else offsets
    x, dout = (random(generator, device, FP16, 2, 21, 3, 32) for _ in range(2))
    cos, sin = tables(30, half, FP16, device, generator)
    position = positions(2, 21, offsets, device)
    leaf, given = x.clone().requires_grad_(), dout.clone()
    out = apply_rotary_emb(leaf, cos, sin, interleaved, inplace, offsets)
    assert_rounded_once(out.detach(), rotated(x, cos, sin, position, interleaved), bound(x, cos, sin))
    assert torch.equal(leaf.detach(), out.detach() if inplace else x)
    out.backward(given)
    assert_rounded_once(leaf.grad, rotated(dout, cos, sin, position, interleaved, True), bound(dout, cos, sin))
    assert torch.equal(given, dout), "the gradient that arrived was written into"


@pytest.mark.parametrize("interleaved, inplace", [(False, False), (True, True)])
def test_emb_packed(device, generator, interleaved, inplace):
    lengths = [3, 0, 14, 1]
    x, dout = (random(generator, device, FP16, sum(lengths), 2, 32) for _ in range(2))
    cos, sin = tables(14, 12, FP16, device, generator)
    cu_seqlens = torch.tensor([0, *lengths], device=device).cumsum(0, dtype=torch.int32)
    position = torch.cat([torch.arange(n) for n in lengths]).to(device)
    leaf = x.clone().requires_grad_()
    out = apply_rotary_emb(leaf, cos, sin, interleaved, inplace, cu_seqlens=cu_seqlens, max_seqlen=14)
    out.backward(dout)
    assert_rounded_once(out.detach(), rotated(x, cos, sin, position, interleaved), bound(x, cos, sin))
    assert_rounded_once(leaf.grad, rotated(dout, cos, sin, position, interleaved, True), bound(dout, cos, sin))


def reshaped(x, layout):
    return x.transpose(0, 1).contiguous().transpose(0, 1) if layout == "batch-second" else x.clone()


def rotate_three(qkv, nheads_q, nheads_k, tables_q, tables_k, position, interleaved, conjugate=False):
    """The truth of the packed functions, (batch, seqlen, heads, headdim)."""
    q, k, v = qkv.split([nheads_q, nheads_k, nheads_k], 2)
    q = rotated(q, *tables_q, position, interleaved, conjugate)
    k = rotated(k, *tables_k, position, interleaved, conjugate)
    return torch.cat((q, k, v.double()), 2)


QKV = [
    (shape, num_heads_q, *flags)
    for shape, num_heads_q in (((2, 9, 3, 2, 24), None), ((2, 9, 6, 24), 4), ((2, 9, 6, 24), 2))
    for flags in (
        (False, "plain", 0, False),
        (True, "plain", 3, True),
        (True, "split", [1, 3], False),
        (False, "split", 0, True),
    )
]


@pytest.mark.parametrize("shape, num_heads_q, interleaved, layout, offsets, separate", QKV)
def test_qkv(device, generator, shape, num_heads_q, interleaved, layout, offsets, separate):
    """One launch and two, every layout; v passes untouched and so does its gradient."""
    offsets = torch.tensor(offsets, device=device) if isinstance(offsets, list) else offsets
    nheads_q = num_heads_q or shape[3]
    nheads_k = shape[3] if num_heads_q is None else (shape[2] - num_heads_q) // 2
    qkv, dout = (random(generator, device, FP32, *shape) for _ in range(2))
    both = tables(12, 8, FP32, device, generator)
    other = tables(12, 8, FP32, device, generator) if separate else both
    leaf = qkv.clone().requires_grad_()
    if layout == "split" and num_heads_q is None:
        operand = leaf.transpose(2, 3).contiguous().transpose(2, 3)  # heads before "q, k, v" in memory
    else:
        operand = leaf.clone()
    words = (*other, interleaved) if separate else (None, None, interleaved)
    out = apply_rotary_emb_qkv_(operand, *both, *words, offsets, num_heads_q)
    out.backward(dout)
    position = positions(2, 9, offsets, device)

    def truth(x, conjugate):
        four = x.reshape(2, 9, -1, 24)
        return rotate_three(four, nheads_q, nheads_k, both, other, position, interleaved, conjugate).view(shape)

    largest = max(bound(x, *t) for x in (qkv, dout) for t in (both, other))
    assert torch.equal(operand.detach(), out.detach())
    assert_rounded_once(out.detach(), truth(qkv, False), largest)
    assert_rounded_once(leaf.grad, truth(dout, True), largest)


@pytest.mark.parametrize("interleaved, offsets", [(False, 0), (True, [1, 3])])
def test_kv(device, generator, interleaved, offsets):
    offsets = torch.tensor(offsets, device=device) if isinstance(offsets, list) else offsets
    kv, dout = (random(generator, device, FP16, 2, 9, 2, 3, 24) for _ in range(2))
    cos, sin = tables(12, 8, FP16, device, generator)
    leaf = kv.clone().requires_grad_()
    operand = leaf.clone()
    out = apply_rotary_emb_kv_(operand, cos, sin, interleaved, offsets)
    out.backward(dout)
    position = positions(2, 9, offsets, device)
    for actual, x, conjugate in ((out.detach(), kv, False), (leaf.grad, dout, True), (operand.detach(), kv, False)):
        truth = rotated(x[:, :, 0], cos, sin, position, interleaved, conjugate)
        assert_rounded_once(actual[:, :, 0], truth, bound(x, cos, sin))
        assert torch.equal(actual[:, :, 1], x[:, :, 1])


def test_a_shared_gradient_survives(generator):
    """Autograd hands one tensor to both terms of a sum; upstream's in-place backward rotates it for both."""
    x, z = (random(generator, CPU, FP64, 1, 4, 1, 8).requires_grad_() for _ in range(2))
    cos, sin = tables(4, 4, FP64, CPU, generator)
    (apply_rotary_emb(x.clone(), cos, sin, inplace=True) + z).sum().backward()
    assert torch.equal(z.grad, torch.ones_like(z))


def test_an_overwritten_operand_is_noticed(generator):
    """exp keeps its result for its backward; writing into it must raise, not give a wrong gradient."""
    x = random(generator, CPU, FP64, 1, 4, 1, 8).requires_grad_()
    cos, sin = tables(4, 4, FP64, CPU, generator)
    out = apply_rotary_emb(x.exp(), cos, sin, inplace=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


@pytest.mark.parametrize("part", ["split", "slices"])
def test_parts_of_one_tensor_rotate_in_place(device, generator, part):
    """As layers do that project q, k and v at once."""
    qkv, dout = (random(generator, device, FP32, 2, 7, 4 * 16) for _ in range(2))
    cos, sin = tables(7, 8, FP32, device, generator)
    leaf = qkv.clone().requires_grad_()
    whole = leaf.clone()
    q, kv = whole.split([32, 32], -1) if part == "split" else (whole[..., :32], whole[..., 32:])
    q, kv = q.unflatten(-1, (2, 16)), kv.unflatten(-1, (2, 1, 16))
    out = torch.cat([apply_rotary_emb(q, cos, sin, inplace=True), apply_rotary_emb_kv_(kv, cos, sin).flatten(2, 3)], 2)
    out.backward(dout.view(out.shape))
    position, turned = positions(2, 7, 0, device), slice(None, 3)
    for actual, x, conjugate in ((out.detach(), qkv, False), (whole.detach(), qkv, False), (leaf.grad, dout, True)):
        actual, x = (t.view(2, 7, 4, 16) for t in (actual, x))
        truth = rotated(x[:, :, turned], cos, sin, position, conjugate=conjugate)
        assert_rounded_once(actual[:, :, turned], truth, bound(x, cos, sin))
        assert torch.equal(actual[:, :, 3], x[:, :, 3])


DIFFERENTIABLE = {
    "emb": ((1, 3, 2, 5), lambda x, t, offsets: apply_rotary_emb(x, *t, seqlen_offsets=offsets)),
    "emb_": ((1, 3, 2, 5), lambda x, t, offsets: apply_rotary_emb(x.clone(), *t, True, True, seqlen_offsets=offsets)),
    "packed": (
        (3, 2, 5),
        lambda x, t, offsets: apply_rotary_emb(
            x, *t, False, False, offsets, torch.tensor([0, 3], dtype=torch.int32, device=x.device), 3
        ),
    ),
    "qkv_": ((1, 2, 3, 1, 4), lambda x, t, offsets: apply_rotary_emb_qkv_(x.clone(), *t, seqlen_offsets=offsets)),
    "gqa_": (
        (1, 2, 4, 4),
        lambda x, t, offsets: apply_rotary_emb_qkv_(x.clone(), *t, *t[::-1], True, offsets, num_heads_q=2),
    ),
    "kv_": ((1, 3, 2, 1, 4), lambda x, t, offsets: apply_rotary_emb_kv_(x.clone(), *t, seqlen_offsets=offsets)),
}


@pytest.mark.parametrize("name", DIFFERENTIABLE)
@pytest.mark.parametrize("offsets", [1, [1]], ids=str)
def test_finite_differences(generator, name, offsets):
    shape, function = DIFFERENTIABLE[name]
    offsets = torch.tensor(offsets) if isinstance(offsets, list) else offsets
    turn = tables(4, 2, FP64, CPU, generator)
    x = random(generator, CPU, FP64, *shape).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: function(x, turn, offsets), (x,))
    assert torch.autograd.gradgradcheck(lambda x: function(x, turn, offsets), (x,))


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_torch_func(device, generator, name):
    """Gradients, those of every sample and second ones; in place on what the function itself has made."""
    shape, function = DIFFERENTIABLE[name]
    turn = tables(4, 2, FP32, device, generator)
    samples = random(generator, device, FP32, 2, *shape)

    def loss(x):
        return function(x, turn, 1).sin().sum()

    def gradient(x):
        leaf = x.clone().requires_grad_()
        return torch.autograd.grad(loss(leaf), leaf, create_graph=True)[0], leaf

    wanted = torch.stack([gradient(x)[0].detach() for x in samples])
    torch.testing.assert_close(torch.func.grad(loss)(samples[0]), wanted[0], rtol=0, atol=0)
    torch.testing.assert_close(torch.func.vmap(torch.func.grad(loss))(samples), wanted, rtol=0, atol=0)
    first, leaf = gradient(samples[0])
    (second,) = torch.autograd.grad(first.sin().sum(), leaf)
    by_func = torch.func.grad(lambda x: torch.func.grad(loss)(x).sin().sum())(samples[0])
    torch.testing.assert_close(by_func, second, rtol=0, atol=0)


@pytest.mark.parametrize("name", ["emb", "packed"])
def test_torch_func_maps_offsets_and_refuses_tangents(generator, name):
    shape, function = DIFFERENTIABLE[name]
    turn = tables(4, 2, FP32, CPU, generator)
    x, offsets = random(generator, CPU, FP32, *shape), torch.tensor([[0], [2], [1]])
    mapped = torch.func.vmap(lambda offset: function(x, turn, offset))(offsets)
    wanted = torch.stack([function(x, turn, offset) for offset in offsets])
    torch.testing.assert_close(mapped, wanted, rtol=0, atol=0)
    with pytest.raises(UnsupportedProblem, match="forward-mode derivatives"):
        torch.func.jvp(lambda x: function(x, turn, 1), (x,), (x,))


@pytest.mark.parametrize("leaf", [False, True])
@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_compiled(fresh_compiler, generator, name, grad, leaf):
    shape, function = DIFFERENTIABLE[name]
    turn = tables(4, 2, FP32, CPU, generator)
    x = random(generator, CPU, FP32, *shape)

    def step(x):
        return function(x if leaf else 2 * x, turn, 1)

    results = []
    for call in (step, torch.compile(step, backend="aot_eager", fullgraph=True)):
        operand = x.clone().requires_grad_(grad)
        out = call(operand)
        if grad:
            out.sin().sum().backward()
        results.append((out.detach(), operand.detach(), operand.grad if grad else out))
    for eager, compiled in zip(*results, strict=True):
        torch.testing.assert_close(compiled, eager, rtol=0, atol=0)


@pytest.mark.gpu
@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_inductor(fresh_compiler, generator, name, grad):
    device = torch.device("cuda")
    shape, function = DIFFERENTIABLE[name]
    turn = tables(4, 2, FP32, device, generator)
    x = random(generator, device, FP32, *shape)
    results = []
    with torch.device(device):
        for call in (function, torch.compile(function, fullgraph=True)):
            operand = x.clone().requires_grad_(grad)
            out = call(2 * operand, turn, 1)
            if grad:
                out.sin().sum().backward()
            results.append((out.detach(), operand.grad if grad else out))
    for eager, compiled in zip(*results, strict=True):
        torch.testing.assert_close(compiled, eager)


@pytest.mark.gpu
def test_a_graph_replays_decoding(generator):
    """Offsets in a tensor advance on the device between replays."""
    device = torch.device("cuda")
    x = random(generator, device, FP16, 2, 1, 4, 64)
    cos, sin = tables(40, 32, FP16, device, generator)
    offsets = torch.tensor([3, 30], dtype=torch.int32, device=device)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            apply_rotary(x, cos, sin, offsets)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = apply_rotary(x, cos, sin, offsets)
    for _ in range(3):
        offsets += 2
        graph.replay()
        assert_rounded_once(out, rotated(x, cos, sin, offsets[:, None].long()), bound(x, cos, sin))


@pytest.mark.parametrize("interleaved", [False, True])
def test_torch_function(generator, interleaved):
    x = random(generator, CPU, FP64, 2, 5, 3, 12)
    cos, sin = tables(5, 4, FP64, CPU, generator)
    wanted = rotated(x, cos, sin, positions(2, 5, 0, CPU), interleaved)
    for c, s in ((cos, sin), (cos.expand(2, 5, 4), sin.expand(2, 5, 4))):
        torch.testing.assert_close(apply_rotary_emb_torch(x, c, s, interleaved), wanted)


def test_rotate_half():
    x = torch.tensor([1, 2, 3, 4])
    assert rotary.rotate_half(x).tolist() == [-3, -4, 1, 2]
    assert rotary.rotate_half(x, interleaved=True).tolist() == [-2, 1, -4, 3]


def angles(dim, base, seqlen):
    return torch.outer(torch.arange(seqlen).double(), base ** (-torch.arange(0, dim, 2).double() / dim))


def growths(dim, scale_base, seqlen):
    scale = (torch.arange(0, dim, 2).double() + 0.4 * dim) / (1.4 * dim)
    return scale ** ((torch.arange(seqlen).double() - seqlen // 2) / scale_base)[:, None]


@pytest.mark.parametrize("scale_base", [None, 512.0])
def test_tables(scale_base):
    module = RotaryEmbedding(16, base=500, scale_base=scale_base)
    module._update_cos_sin_cache(50, torch.device("cpu"), FP32)
    angle = angles(16, 500, 50)
    growth = 1 if scale_base is None else growths(16, scale_base, 50)
    close = dict(rtol=1e-5, atol=1e-5, check_dtype=False)
    torch.testing.assert_close(module._cos_cached, angle.cos() * growth, **close)
    torch.testing.assert_close(module._sin_cached, angle.sin() * growth, **close)
    if scale_base is None:
        assert module._cos_k_cached is module._sin_k_cached is module.scale is None
    else:
        torch.testing.assert_close(module._cos_k_cached, angle.cos() / growth, **close)
        torch.testing.assert_close(module._sin_k_cached, angle.sin() / growth, **close)
    assert module.state_dict() == {} and dict(module.named_buffers())["inv_freq"].dtype == FP32


def test_tables_keep_fp32_precision_in_a_cast_module():
    module = RotaryEmbedding(16, scale_base=512).bfloat16()
    exact = RotaryEmbedding(16, scale_base=512)
    for m in (module, exact):
        m._update_cos_sin_cache(5000, CPU, torch.bfloat16)
    assert torch.equal(module._cos_cached, exact._cos_cached) and torch.equal(module._sin_k_cached, exact._sin_k_cached)


def test_tables_are_kept_and_renewed():
    module = RotaryEmbedding(8)
    module._update_cos_sin_cache(10, CPU, FP32)
    first = module._cos_cached
    module._update_cos_sin_cache(9, CPU, FP32)
    assert module._cos_cached is first
    module._update_cos_sin_cache(11, CPU, FP32)
    assert module._cos_cached.shape == (11, 4) and module._seq_len_cached == 11
    module._update_cos_sin_cache(11, CPU, FP16)
    assert module._sin_cached.dtype == FP16
    with torch.inference_mode():
        module._update_cos_sin_cache(12, CPU, FP16)
    assert module._cos_cached.is_inference()
    module._update_cos_sin_cache(12, CPU, FP16)
    assert not module._cos_cached.is_inference(), "tables of inference mode cannot be saved for a backward"


@pytest.mark.parametrize("scale_base", [None, 512.0])
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("offset", [0, 3, [1, 3]], ids=str)
def test_module(device, generator, scale_base, interleaved, offset):
    """Packed q, k, v, grouped q, k, v, and q beside k, v agree with the tables, which other tests check."""
    module = RotaryEmbedding(16, interleaved=interleaved, scale_base=scale_base, device=device)
    offset = torch.tensor(offset, device=device) if isinstance(offset, list) else offset
    qkv = random(generator, device, FP32, 2, 9, 3, 2, 24)
    words = dict(seqlen_offset=offset, max_seqlen=12)
    packed = module(qkv.clone(), **words)
    q_tables = (module._cos_cached, module._sin_cached)
    k_tables = q_tables if scale_base is None else (module._cos_k_cached, module._sin_k_cached)
    position = positions(2, 9, offset, device)
    truth = rotate_three(qkv.flatten(2, 3), 2, 2, q_tables, k_tables, position, interleaved).view(qkv.shape)
    assert_rounded_once(packed, truth, max(bound(qkv, *q_tables), bound(qkv, *k_tables)))
    grouped = module(qkv.flatten(2, 3).clone(), num_heads_q=2, **words)
    assert torch.equal(grouped, packed.flatten(2, 3))
    q, kv = module(qkv[:, :, 0].clone(), qkv[:, :, 1:].clone(), **words)
    assert torch.equal(q, packed[:, :, 0]) and torch.equal(kv, packed[:, :, 1:])


@pytest.mark.parametrize("scale_base", [None, 512.0])
@pytest.mark.parametrize("grad", [False, True])
def test_module_compiled(fresh_compiler, generator, scale_base, grad):
    module = RotaryEmbedding(8, scale_base=scale_base)
    qkv = random(generator, CPU, FP32, 1, 5, 3, 1, 8)
    results = []
    for call in (copy.deepcopy(module), torch.compile(module, backend="aot_eager", fullgraph=True)):
        x = qkv.clone().requires_grad_(grad)
        q, kv = call(x[:, :, 0] * 1, x[:, :, 1:] * 1)
        packed = call(x * 1)
        if grad:
            (packed.sin().sum() + q.sin().sum()).backward()
        results.append((q.detach(), kv.detach(), packed.detach(), x.grad if grad else q))
    for eager, compiled in zip(*results, strict=True):
        torch.testing.assert_close(compiled, eager)


def test_the_scope_reaches_the_backward(monkeypatch, generator):
    """Autograd's threads do not see the caller's scope."""
    asked = []
    forward = rotary.ApplyRotaryEmb.forward
    monkeypatch.setattr(
        rotary.ApplyRotaryEmb, "forward", lambda *a: (asked.append(backends.requested_backend()), forward(*a))[1]
    )
    x = random(generator, CPU, FP32, 1, 4, 1, 8).requires_grad_()
    with backends.use("reference"):
        out = apply_rotary_emb(x, *tables(4, 4, FP32, CPU, generator))
    out.sum().backward()
    assert asked == ["reference", "reference"]


HALF = torch.ones(4, 2)
BAD = {
    r"\(batch, seqlen, 3, nheads, headdim\), got \(1, 4, 2, 1, 4\)": lambda: apply_rotary_emb_qkv_(
        torch.ones(1, 4, 2, 1, 4), HALF, HALF
    ),
    r"num_heads_q must be given .* got None for shape \(1, 4, 3, 4\)": lambda: apply_rotary_emb_qkv_(
        torch.ones(1, 4, 3, 4), HALF, HALF
    ),
    r"num_heads_q + 2 \* num_heads_k heads with num_heads_q 2, got 5": lambda: apply_rotary_emb_qkv_(
        torch.ones(1, 4, 5, 4), HALF, HALF, num_heads_q=2
    ),
    r"with num_heads_q 6, got 5": lambda: apply_rotary_emb_qkv_(torch.ones(1, 4, 5, 4), HALF, HALF, num_heads_q=6),
    r"qkv must have 4 or 5 dimensions, got shape \(4, 5, 4\)": lambda: apply_rotary_emb_qkv_(
        torch.ones(4, 5, 4), HALF, HALF
    ),
    r"\(batch, seqlen, 2, nheads, headdim\), got \(1, 4, 3, 1, 4\)": lambda: apply_rotary_emb_kv_(
        torch.ones(1, 4, 3, 1, 4), HALF, HALF
    ),
    r"rotary_dim must be <= headdim, got 4 and 3": lambda: apply_rotary_emb_torch(torch.ones(1, 4, 3, 3), HALF, HALF),
    r"seqlen_offset of type Tensor needs max_seqlen": lambda: RotaryEmbedding(4)(
        torch.ones(1, 4, 3, 1, 4), seqlen_offset=torch.tensor([1])
    ),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_arguments(message):
    with pytest.raises(InvalidArgument, match=message.replace("q + 2", r"q \+ 2")):
        BAD[message]()


SIGNATURES = {
    apply_rotary: "x, cos, sin, seqlen_offsets=0, cu_seqlens=None, max_seqlen=None, interleaved=False, inplace=False, "
    "conjugate=False",
    apply_rotary_emb: "x, cos, sin, interleaved=False, inplace=False, seqlen_offsets=0, cu_seqlens=None, max_seqlen=None",
    apply_rotary_emb_torch: "x, cos, sin, interleaved=False",
    rotary.rotate_half: "x, interleaved=False",
    apply_rotary_emb_qkv_: "qkv, cos, sin, cos_k=None, sin_k=None, interleaved=False, seqlen_offsets=0, num_heads_q=None",
    apply_rotary_emb_kv_: "kv, cos, sin, interleaved=False, seqlen_offsets=0",
    RotaryEmbedding: "dim, base=10000.0, interleaved=False, scale_base=None, device=None",
    RotaryEmbedding.forward: "self, qkv, kv=None, seqlen_offset=0, max_seqlen=None, num_heads_q=None",
    RotaryEmbedding._update_cos_sin_cache: "self, seqlen, device=None, dtype=None",
}


@pytest.mark.parametrize("function", SIGNATURES, ids=lambda f: f.__qualname__)
def test_signatures_are_upstreams(function):
    parameters = inspect.signature(function).parameters.values()
    words = [p.name if p.default is p.empty else f"{p.name}={p.default}" for p in parameters]
    assert ", ".join(words) == SIGNATURES[function]
    assert rotary.apply_rotary_emb_func is apply_rotary_emb


def test_classes_take_upstreams_positions(generator):
    x = random(generator, CPU, FP32, 1, 4, 3, 8)
    cos, sin = tables(6, 2, FP32, CPU, generator)
    for interleaved, offset in itertools.product((False, True), (0, 2)):
        wanted = apply_rotary(x, cos, sin, offset, interleaved=interleaved)
        out = rotary.ApplyRotaryEmb.apply(x.clone().requires_grad_(), cos, sin, interleaved, False, offset, None, None)
        assert torch.equal(out, wanted)
        qkv = torch.cat((x, x), 2)
        rotary.ApplyRotaryEmbQKV_.apply(qkv, cos, sin, None, None, interleaved, offset, 4)
        assert torch.equal(
            qkv[:, :, :5], apply_rotary(torch.cat((x, x), 2), cos, sin, offset, None, None, interleaved)[:, :, :5]
        )
        kv = torch.stack((x, x), 2)
        rotary.ApplyRotaryEmbKV_.apply(kv, cos, sin, interleaved, offset)
        assert torch.equal(kv[:, :, 0], wanted) and torch.equal(kv[:, :, 1], x)
