"""The public functions under what traces, repeats, copies or fakes them: compilers, checkpoints, fake tensors, threads."""

import copy
import functools
import io
import itertools
import pickle
import threading

import pytest
import torch
from torch.export import Dim
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

import flash_attn
from flash_attn import flash_attn_func, flash_attn_varlen_func, flash_attn_with_kvcache
from flash_attn.modules.mha import MHA
from tests.support import calls
from tests.support.cases import BF16, FP32

B, S, H, D = 2, 17, 4, 16
PLACES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
COMPILERS = ["aot_eager", "aot_eager_decomp_partition"]

everywhere = pytest.mark.parametrize("device", PLACES)


def randn(*shape, device="cpu", seed, dtype=FP32):
    return calls.randn(*shape, dtype=dtype, device=device, seed=seed)


OPTIONS = (0.0, 0.3, True, (9, 0), 2.0)  # dropout_p to softcap


def by_position(device, seed, seqlen=S):
    """Every public function with its tensors and all options in upstream's order: name -> (function, tensors, others)."""
    qkv = randn(B, seqlen, 3, H, D, device=device, seed=seed)
    q, k, v = qkv.unbind(2)
    rows = qkv.flatten(0, 1)
    ends = calls.int32([0, seqlen, 2 * seqlen], device)
    lengths = (ends, ends, seqlen, seqlen)
    options = (*OPTIONS, torch.tensor([0.1, 0.2, 0.3, 0.4], device=device), True, True)
    caches = [randn(B, 80, H, D, device=device, seed=seed + i) for i in (1, 2)]
    cos, sin = (randn(80, D // 2, device=device, seed=seed + i) for i in (3, 4))
    cached = (cos, sin, calls.int32([7, 30], device), calls.int32([1, 0], device), calls.int32([0, 2], device))
    cache_options = (None, 0.3, True, (9, 0), 2.0, False, options[5], 1, True)
    return {
        "flash_attn_func": (flash_attn_func, (q, k, v), options),
        "flash_attn_qkvpacked_func": (flash_attn.flash_attn_qkvpacked_func, (qkv,), options),
        "flash_attn_kvpacked_func": (flash_attn.flash_attn_kvpacked_func, (q, qkv[:, :, 1:]), options),
        "flash_attn_varlen_func": (flash_attn_varlen_func, rows.unbind(1), (*lengths, *options, None)),
        "flash_attn_varlen_qkvpacked_func": (
            flash_attn.flash_attn_varlen_qkvpacked_func,
            (rows,),
            (ends, seqlen, *options),
        ),
        "flash_attn_varlen_kvpacked_func": (
            flash_attn.flash_attn_varlen_kvpacked_func,
            (rows[:, 0], rows[:, 1:]),
            (*lengths, *options),
        ),
        "flash_attn_with_kvcache": (flash_attn_with_kvcache, (q, *caches, k, v), (*cached, *cache_options)),
    }


ORDER = "dropout_p softmax_scale causal window_size softcap alibi_slopes deterministic return_attn_probs"
LENGTHS = "cu_seqlens_q cu_seqlens_k max_seqlen_q max_seqlen_k"
CACHE_ORDER = (
    "k v rotary_cos rotary_sin cache_seqlens cache_batch_idx cache_leftpad block_table softmax_scale causal window_size "
    "softcap rotary_interleaved alibi_slopes num_splits return_softmax_lse"
)
PUBLIC = list(by_position("cpu", 0))


def test_a_compiler_that_does_not_know_the_depth_of_transforms(seed, unpoisoned, monkeypatch):
    """As that of torch 2.11."""
    rules = torch._dynamo.trace_rules.get_torch_obj_rule_map()
    monkeypatch.delitem(rules, torch._C._functorch.get_dynamic_layer_stack_depth, raising=False)
    q, k, v = (randn(B, S, H, D, seed=seed + i).requires_grad_() for i in range(3))
    compiled = torch.compile(flash_attn_func, fullgraph=True, backend="eager")
    calls.assert_near(compiled(q, k, v, causal=True), flash_attn_func(q, k, v, causal=True))


@everywhere
@pytest.mark.parametrize("name", PUBLIC)
def test_compiles_whole_with_every_option_by_position(name, device, seed, unpoisoned):
    """Compiled for one length, it serves the next; results and gradients are those of eager calls."""
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(lambda *x: by_position_function(*x), fullgraph=True, dynamic=True, backend=counter)
    by_position_function, compilations = by_position(device, seed)[name][0], []
    for seqlen in (S, 23):
        results = []
        for call in (by_position_function, compiled):
            _, tensors, others = by_position(device, seed, seqlen)[name]
            leaves = [x.clone().requires_grad_(name != "flash_attn_with_kvcache") for x in tensors]
            out, lse, *_ = call(*leaves, *others)
            if name == "flash_attn_with_kvcache":
                results.append((out, lse, *leaves[1:3]))
            else:
                results.append((out, lse, *torch.autograd.grad(out.sin().sum() + lse.sin().sum(), leaves)))
        calls.assert_near(results[1], results[0], roundoffs=16.0)
        compilations.append(counter.frame_count)
    assert len(set(compilations)) == 1, f"compiled again for another length: {compilations}"


@everywhere
@pytest.mark.parametrize("name", PUBLIC)
def test_positions_are_upstreams(name, device, seed):
    """The values by upstream's names instead of its order."""
    names = {
        "flash_attn_func": f"q k v {ORDER}",
        "flash_attn_qkvpacked_func": f"qkv {ORDER}",
        "flash_attn_kvpacked_func": f"q kv {ORDER}",
        "flash_attn_varlen_func": f"q k v {LENGTHS} {ORDER} block_table",
        "flash_attn_varlen_qkvpacked_func": f"qkv cu_seqlens max_seqlen {ORDER}",
        "flash_attn_varlen_kvpacked_func": f"q kv {LENGTHS} {ORDER}",
        "flash_attn_with_kvcache": f"q k_cache v_cache {CACHE_ORDER}",
    }[name].split()
    function, tensors, others = by_position(device, seed)[name]
    _, same_tensors, same_others = by_position(device, seed)[name]
    named = dict(zip(names, (*same_tensors, *same_others), strict=True))
    calls.assert_equal(function(*tensors, *others), function(**named))


class Packed(torch.nn.Module):
    def forward(self, q, k, v, cu_seqlens, max_seqlen: int):
        return flash_attn_varlen_func(q, k, v, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, causal=True)


@pytest.mark.parametrize("strict", [True, False])
def test_an_exported_packed_batch_serves_other_lengths(strict, seed, unpoisoned):
    """The tokens, the sequences and the longest one are all dynamic."""
    q, k, v = (randn(40, H, D, seed=seed + i) for i in range(3))
    tokens = Dim("tokens", min=2, max=512)
    sizes = ({0: tokens}, {0: tokens}, {0: tokens}, {0: Dim("ends", min=2, max=64)}, Dim.DYNAMIC)
    example = (q, k, v, calls.int32([0, 17, 40], "cpu"), 23)
    program = torch.export.export(Packed(), example, dynamic_shapes=sizes, strict=strict).module()
    for ends in ([0, 17, 40], [0, 30], [0, 5, 5, 36]):
        longest = max(b - a for a, b in itertools.pairwise(ends))
        inputs = (q[: ends[-1]], k[: ends[-1]], v[: ends[-1]], calls.int32(ends, "cpu"), longest)
        calls.assert_near(program(*inputs), Packed()(*inputs))


class Cached(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("k_cache", torch.zeros(B, 64, H, D))
        self.register_buffer("v_cache", torch.zeros(B, 64, H, D))

    def forward(self, q, k, v, seqlens):
        return flash_attn_with_kvcache(
            q, self.k_cache, self.v_cache, k, v, cache_seqlens=seqlens, causal=True, return_softmax_lse=True
        )


@pytest.mark.parametrize("strict", [True, False])
def test_an_exported_cache_takes_any_number_of_tokens_after_saving(strict, seed, unpoisoned):
    tokens = {1: Dim("tokens", min=2, max=32)}
    q, k, v = (randn(B, 5, H, D, seed=seed + i) for i in range(3))
    seqlens = calls.int32([0, 3], "cpu")
    example = (q, k, v, seqlens)
    program = torch.export.export(Cached(), example, dynamic_shapes=(tokens, tokens, tokens, None), strict=strict)
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    loaded, module = torch.export.load(file).module(), Cached()
    for seqlen in (5, 9, 3):
        q, k, v = (randn(B, seqlen, H, D, seed=seed + seqlen + i) for i in range(3))
        calls.assert_near(loaded(q, k, v, seqlens), module(q, k, v, seqlens))
        seqlens = seqlens + seqlen
    calls.assert_equal((loaded.k_cache, loaded.v_cache), (module.k_cache, module.v_cache))


@everywhere
def test_aot_autograd_on_its_own(device, seed, unpoisoned):
    from functorch.compile import aot_function, nop

    x = randn(B, S, H, D, device=device, seed=seed).requires_grad_()

    def loss(x):
        return flash_attn_func(x, x, x, causal=True).square().sum()

    compiled = aot_function(loss, fw_compiler=nop, bw_compiler=nop)
    gradients = [torch.autograd.grad(call(x), x) for call in (loss, compiled)]
    calls.assert_near(gradients[1], gradients[0], roundoffs=16.0)


def kept_weights(region, compiler, device, seed, **words):
    """(row sums of dv, those of out) of a dropout region inside a checkpoint: v is 1, so equal if both passes drop the same."""
    q, k = (randn(1, 33, 2, D, device=device, seed=seed + i).requires_grad_() for i in range(2))
    v = torch.ones(1, 33, 2, D, device=device, requires_grad=True)

    def step(*x):
        return checkpoint(region, *x, **words) * 1.0

    run = step if compiler is None else torch.compile(step, fullgraph=True, backend=compiler)
    torch.manual_seed(seed)
    out = run(q, k, v)
    torch.rand(7, device=device)  # the generator moves on before the backward
    out.sum().backward()
    assert not torch.allclose(out, torch.ones_like(out))
    return v.grad.sum((1, 3)), out.detach().sum((1, 3))


def dropped(q, k, v):
    return flash_attn_func(q * 2, k, v, 0.5)


def dropped_packed(q, k, v):
    ends = calls.int32([0, 20, 33], q.device)
    rows = (x.flatten(0, 1) for x in (q, k, v))
    return flash_attn_varlen_func(*rows, ends, ends, 20, 20, 0.5).unflatten(0, (1, 33))


def dropped_with_sinks(q, k, v):
    sinks = torch.full((2,), -torch.inf, device=q.device)
    return flash_attn_func(q * 2, k, v, 0.5, s_aux=sinks)


@everywhere
@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("region", [dropped, dropped_packed, dropped_with_sinks])
@pytest.mark.parametrize("compiler", [None, *COMPILERS])
def test_a_checkpoint_repeats_its_dropout(compiler, region, use_reentrant, device, seed, unpoisoned):
    """A compiled checkpoint that drew anew would give the gradient of another loss."""
    torch.testing.assert_close(*kept_weights(region, compiler, device, seed, use_reentrant=use_reentrant))


@everywhere
@pytest.mark.parametrize("choice", [CheckpointPolicy.MUST_SAVE, CheckpointPolicy.PREFER_RECOMPUTE], ids=str)
@pytest.mark.parametrize("compiler", [None, *COMPILERS])
def test_a_policy_may_name_the_operator(compiler, choice, device, seed, unpoisoned, monkeypatch):
    operator = torch.ops.flash_attn._flash_attn_forward.default
    forwards = count_forwards(monkeypatch)

    def policy(context, op, *arguments, **words):
        return choice if op is operator else CheckpointPolicy.PREFER_RECOMPUTE

    contexts = functools.partial(create_selective_checkpoint_contexts, policy)
    sums = kept_weights(dropped, compiler, device, seed, use_reentrant=False, context_fn=contexts)
    torch.testing.assert_close(*sums)
    assert len(forwards) == (1 if choice is CheckpointPolicy.MUST_SAVE else 2)


def count_forwards(monkeypatch):
    from flash_attn import torch_ops

    forwards, original = [], torch_ops.forward
    monkeypatch.setattr(torch_ops, "forward", lambda *x, **words: forwards.append(1) or original(*x, **words))
    return forwards


def shapes_of(device, seed):
    """The shapes, dtypes and strides of everything that the public functions return."""
    results = []
    for function, tensors, others in by_position(device, seed).values():
        others = [torch.zeros_like(x) if isinstance(x, torch.Tensor) else x for x in others]
        results += function(*(torch.zeros_like(x) for x in tensors), *others)
    return [(x.shape, x.dtype, x.stride()) for x in results]


def test_fake_tensors(seed, unpoisoned):
    wanted = shapes_of("cpu", seed)
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True):
        assert shapes_of("cpu", seed) == wanted
        x = torch.empty(B, S, H, D, requires_grad=True)
        out, lse, _ = flash_attn_func(x, x, x, 0.3, return_attn_probs=True)
        (gradient,) = torch.autograd.grad(out.sum() + lse.sum(), x)
    assert gradient.shape == x.shape and type(gradient) is type(x)


def test_tensors_without_memory(seed):
    """The device "meta": shapes and dtypes, nothing is computed."""
    q = torch.empty(B, S, H, D, dtype=BF16, device="meta", requires_grad=True)
    k = torch.empty(B, 33, 2, D, dtype=BF16, device="meta", requires_grad=True)
    out, lse, _ = flash_attn_func(q, k, k, causal=True, return_attn_probs=True)
    assert out.is_meta and out.shape == q.shape and out.dtype == BF16
    assert lse.shape == (B, H, S) and lse.dtype == FP32
    dq, dk = torch.autograd.grad(out.sum() + lse.sum(), (q, k))
    assert dq.is_meta and dq.shape == q.shape and dk.shape == k.shape
    ends = torch.empty(3, dtype=torch.int32, device="meta")
    assert flash_attn_varlen_func(q[0], k[0], k[0], ends, ends, 9, 33).shape == q[0].shape
    cache = torch.empty(B, 64, 2, D, dtype=BF16, device="meta")
    assert flash_attn_with_kvcache(q, cache, cache, cache_seqlens=7).shape == q.shape


@everywhere
def test_threads_call_at_once(device, seed):
    """Each with shapes of its own, new and known to the other, with and without a backend asked for."""
    inputs = [randn(1, 9 + 5 * i, 2, D, device=device, seed=seed + i) for i in range(6)]

    def both(x):
        leaf = x.clone().requires_grad_()
        out = flash_attn_func(leaf, leaf, leaf, causal=True)
        return out.detach(), torch.autograd.grad(out.square().sum(), leaf)[0]

    wanted, failures = [both(x) for x in inputs], []
    flash_attn.dispatch._plans.clear()
    start = threading.Barrier(4)

    def work(first):
        start.wait()
        try:
            for turn in range(5 * len(inputs)):
                number = (first + turn) % len(inputs)
                calls.assert_equal(both(inputs[number]), wanted[number])
        except Exception as error:  # noqa: BLE001 - of any kind, to be shown by the main thread
            failures.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures, failures[0]


def test_modules_are_copied_and_pickled(seed):
    torch.manual_seed(seed)
    words = dict(causal=True, rotary_emb_dim=D, use_flash_attn=True, dtype=FP32)
    module, x = MHA(H * D, H, num_heads_kv=2, **words), randn(B, S, H * D, seed=seed)
    wanted = module(x)  # tables of cosines, launches and plans exist when it is copied
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        calls.assert_equal(other(x), wanted)
