"""The registered operator: its schema, torch.compile without graph breaks, gradients that are never there, CUDA graphs."""

import inspect

import pytest
import torch

from flash_attn import flash_attn_with_kvcache
from flash_attn.kvcache import operator
from tests.support import calls
from tests.support.cases import BF16, FP16
from tests.support.kvcache import CacheCase, bits, changed, expected_of, make_cache_inputs

NAMES = (
    "q k_cache v_cache k v rotary_cos rotary_sin cache_seqlens cache_batch_idx cache_leftpad block_table softmax_scale "
    "causal window_size_left window_size_right softcap rotary_interleaved alibi_slopes num_splits s_aux"
)
ARGUMENTS = NAMES.split()
CASES = {
    "append": CacheCase("operator", FP16, 32, 4, 2, 1, (17, 30), 1, "halves", 32, causal=True),
    "pages": CacheCase("operator", FP16, 32, 4, 2, 2, (17, 30), 2, page=16, leftpad=(3, 0), alibi="h", softcap=2.0),
    "read": CacheCase("operator", FP16, 32, 4, 2, 3, (17, 30), batch_idx=True, window=(9, -1)),
    "int": CacheCase("operator", FP16, 32, 4, 2, 1, (17, 17), 1, seqlens_as="int"),
    "sinks": CacheCase("operator", FP16, 32, 4, 2, 1, (17, 30), 1, causal=True, sink=BF16),
}


@pytest.fixture
def device(request):
    with calls.running_on(request.param) as device:
        yield device


everywhere = pytest.mark.parametrize("device", calls.places("cpu", "gpu"), indirect=True)


def operator_arguments(case, device, seed):
    """Positional arguments of the operator, over caches without NaN, which the checks compare."""
    given = finite(make_cache_inputs(case, device, seed).arguments)
    given |= dict(softmax_scale=0.2, window_size_left=case.window[0], window_size_right=case.window[1])
    if case.seqlens_as == "int":
        given["cache_seqlens"] = calls.int32([given["cache_seqlens"]] * case.batch_size, device)
    return [given[name] for name in ARGUMENTS]


def test_schema():
    schema = operator._wrapped_flash_attn_with_kvcache.default._schema
    assert [argument.name for argument in schema.arguments] == ARGUMENTS
    written = [a.name for a in schema.arguments if a.alias_info is not None and a.alias_info.is_write]
    assert written == ["k_cache", "v_cache"] and len(schema.returns) == 2
    assert list(inspect.signature(operator._flash_attn_with_kvcache._init_fn).parameters) == ARGUMENTS


@everywhere
@pytest.mark.parametrize("name", CASES)
def test_opcheck(name, device, seed):
    torch.library.opcheck(
        torch.ops.flash_attn._flash_attn_with_kvcache.default, operator_arguments(CASES[name], device, seed)
    )


def finite(arguments):
    """The arguments with zeros where the caches hold NaN: what grows into them is compared, too."""
    for name in ("k_cache", "v_cache"):
        arguments[name].nan_to_num_()
    return arguments


@everywhere
@pytest.mark.parametrize("name", CASES)
def test_compiled_without_a_graph_break(name, device, seed, unpoisoned):
    """The same results, the same caches; and again with grown lengths, for which nothing is compiled anew."""
    eager, compiled = (finite(make_cache_inputs(CASES[name], device, seed).arguments) for _ in range(2))
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    function = torch.compile(flash_attn_with_kvcache, fullgraph=True, backend=counter)
    for _step in range(4):
        calls.assert_equal(function(**compiled), flash_attn_with_kvcache(**eager))
        for cache in ("k_cache", "v_cache"):
            calls.assert_equal(bits(compiled[cache]), bits(eager[cache]))
        for arguments in (eager, compiled):
            arguments["cache_seqlens"] = arguments["cache_seqlens"] + 1
    assert counter.frame_count == (
        2 if CASES[name].seqlens_as == "int" else 1
    )  # an int becomes dynamic once it changes


@everywhere
def test_compiled_with_what_surrounds_it(device, seed, unpoisoned):
    """The write into the cache keeps its place among other uses of the cache; inductor where there is a compiler for it."""
    eager, compiled = (finite(make_cache_inputs(CASES["append"], device, seed).arguments) for _ in range(2))

    def step(arguments):
        before = arguments["k_cache"].sum(dtype=torch.float32)
        out, _ = flash_attn_with_kvcache(**arguments | dict(q=arguments["q"] * 2))
        return out + 1, before, arguments["k_cache"].sum(dtype=torch.float32)

    backend = "inductor" if device.type == "cuda" else "aot_eager"
    calls.assert_near(torch.compile(step, fullgraph=True, backend=backend)(compiled), step(eager), roundoffs=16.0)
    calls.assert_near(compiled["k_cache"], eager["k_cache"])


@everywhere
@pytest.mark.parametrize("observed", [False, True])
def test_nothing_has_a_gradient(observed, device, seed, monkeypatch):
    """Forward only: tensors that want gradients are accepted, leaves are written into, and the result wants none."""
    inputs = make_cache_inputs(CASES["append"], device, seed)
    expected = expected_of(CASES["append"], inputs)
    for name in ("q", "k", "v", "k_cache", "v_cache"):
        inputs.arguments[name].requires_grad_()
    if observed:
        from flash_attn.kvcache import kv_attention

        monkeypatch.setattr(kv_attention, "observed", lambda x: True)
    out, lse = flash_attn_with_kvcache(**inputs.arguments)
    assert not out.requires_grad and not lse.requires_grad
    for name in ("q", "k", "v", "k_cache", "v_cache"):
        inputs.arguments[name].requires_grad_(False)
    expected.check(out, lse)


@everywhere
def test_the_result_alone_or_with_its_lse(device, seed):
    arguments = make_cache_inputs(CASES["read"], device, seed).arguments
    out, lse = flash_attn_with_kvcache(**arguments)
    assert out.shape == arguments["q"].shape and lse.shape == (2, 4, 3) and lse.dtype == torch.float32
    calls.assert_equal(flash_attn_with_kvcache(**arguments | dict(return_softmax_lse=False)), out)


STEPS = 4


@pytest.mark.gpu
@pytest.mark.parametrize("device", calls.places("gpu"), indirect=True)
@pytest.mark.parametrize("fields", [dict(), dict(page=16), dict(seqlen_q=70, seqlen_new=1, page=16)], ids=str)
def test_a_graph_replays_with_other_lengths(fields, device, seed):
    """Captured once; replayed over growing lengths, of which some reach other splits, pages and an empty sequence."""
    base = CacheCase("graph", BF16, 128, 32, 8, 1, (1500, 40, 0), 1, "halves", 128, causal=True, spare=600)
    case = changed(base, **fields)
    captured, eager = (make_cache_inputs(case, device, seed).arguments for _ in range(2))
    for arguments in (captured, eager):
        if case.page:  # every page has an owner, also those that later steps reach
            num_pages = arguments["k_cache"].shape[0]
            table = torch.arange(num_pages, dtype=torch.int32, device=device)[: arguments["block_table"].numel()]
            arguments["block_table"] = table.view_as(arguments["block_table"])
        finite(arguments)
    snapshot = [captured[name].clone() for name in ("k_cache", "v_cache")]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        flash_attn_with_kvcache(**captured)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = flash_attn_with_kvcache(**captured)
    for name, old in zip(("k_cache", "v_cache"), snapshot, strict=True):
        captured[name].copy_(old)
    for seqlens in ([1500, 40, 0], [1501, 41, 1], [2000, 7, 600], [-1, 1, 1900]):
        for arguments in (captured, eager):
            arguments["cache_seqlens"].copy_(calls.int32(seqlens, device))
        graph.replay()
        calls.assert_equal(results, flash_attn_with_kvcache(**eager))
        for name in ("k_cache", "v_cache"):
            calls.assert_equal(bits(captured[name]), bits(eager[name]))


@pytest.mark.gpu
@pytest.mark.parametrize("device", calls.places("gpu"), indirect=True)
def test_nothing_synchronises(device, seed):
    inputs = make_cache_inputs(changed(CASES["pages"], headdim=64), device, seed)
    flash_attn_with_kvcache(**inputs.arguments)
    torch.cuda.set_sync_debug_mode("error")
    try:
        flash_attn_with_kvcache(**inputs.arguments)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@pytest.mark.parametrize("device", calls.places("gpu"), indirect=True)
@pytest.mark.parametrize("batch_size", [2, 40])
def test_kernels_that_start_early_wait_for_the_one_before(batch_size, device, seed):
    """Steps in close succession: each reads what a kernel right before it wrote, into operands and parts that the step before
    still uses. `batch_size` 40 decodes without splits, 2 with them."""
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=generator, device=device, dtype=BF16)

    caches = [normal(batch_size, 2048, 8, 128) for _ in range(2)]
    steps = [(normal(batch_size, 1, 32, 128), normal(batch_size, 1, 8, 128), 16 * step) for step in range(40)]

    def run(wait):
        k_cache, v_cache = (cache.clone() for cache in caches)
        q, k, seqlens = torch.empty_like(steps[0][0]), torch.empty_like(steps[0][1]), calls.int32([0], device)
        results = []
        for q_new, k_new, length in steps:
            for target, value in ((q, q_new), (k, k_new)):
                target.copy_(value)
            lengths = seqlens.fill_(length).expand(batch_size).contiguous()
            k_cache.mul_(0.99)
            results.append(flash_attn_with_kvcache(q, k_cache, v_cache, k, k, cache_seqlens=lengths, causal=True))
            if wait:
                torch.cuda.synchronize(device)
        return [*results, k_cache, v_cache]

    calls.assert_equal(run(wait=False), run(wait=True))
