"""What only a GPU can get wrong: tile edges for every head-dim class, few tiles, streams, graphs, 64-bit offsets."""

import pytest
import torch

from flash_attn import flash_attn_func, launch
from tests.support import calls
from tests.support.cases import BF16, FP32, Case
from tests.support.inputs import make_inputs
from tests.support.tolerance import expected

pytestmark = [pytest.mark.gpu, pytest.mark.parametrize("device", calls.places("gpu"), indirect=True)]


@pytest.fixture
def device(request):
    with calls.running_on(request.param) as device:
        yield device


def operands(device, seed, *shape, dtype=BF16):
    return [calls.randn(*shape, dtype=dtype, device=device, seed=seed + i).requires_grad_() for i in range(3)]


EDGES = [63, 64, 65, 127, 128, 129, 255, 257]
MUCH_LONGER = [(257, 63), (513, 65), (513, 1), (1, 257), (63, 513), (129, 640)]


@pytest.mark.parametrize("seqlen_q, seqlen_k", [(n, n) for n in EDGES] + MUCH_LONGER)
@pytest.mark.parametrize("headdim, pins", [(64, {}), (128, {}), (128, {"one_launch": False}), (256, {})])
def test_tile_edges(headdim, pins, seqlen_q, seqlen_k, device, seed):
    """Causal: whole tiles of rows that see no key, of keys that no row sees; gradients in one launch and in more."""
    case = Case("edges", BF16, headdim, 2, 1, (seqlen_q,), (seqlen_k,), causal=True)
    inputs = make_inputs(case, device, seed)
    with launch.pinned(**pins):
        results, _ = calls.forward_and_backward(case, inputs, seed)
    expected(case, inputs).check(**results)


@pytest.mark.parametrize("headdim", [64, 128, 256])
def test_fewer_tiles_than_processors(headdim, device, seed):
    case = Case("one-tile", BF16, headdim, 1, 1, (64,), (64,))
    inputs = make_inputs(case, device, seed)
    results, _ = calls.forward_and_backward(case, inputs, seed)
    expected(case, inputs).check(**results)


def test_many_more_tiles_than_processors(device, seed):
    """Two thousand short sequences against the same one at a time."""
    q, k, v = (x.detach() for x in operands(device, seed, 2000, 33, 2, 64))
    whole = flash_attn_func(q, k, v, causal=True)
    for batch in (0, 1, 999, 1999):
        part = slice(batch, batch + 1)
        calls.assert_near(whole[part], flash_attn_func(q[part], k[part], v[part], causal=True))


def test_two_streams_at_once(device, seed):
    problems = [operands(device, seed + 10 * i, 4, 257, 8, 64) for i in range(2)]

    def solve(leaves):
        out = flash_attn_func(*leaves, causal=True)
        return out.detach(), *torch.autograd.grad(out, leaves, torch.ones_like(out))

    alone = [solve(leaves) for leaves in problems]
    streams = [torch.cuda.Stream() for _ in problems]
    torch.cuda.synchronize()
    together = [[], []]
    for _ in range(20):
        for i, stream in enumerate(streams):
            with torch.cuda.stream(stream):
                together[i].append(solve(problems[i]))
    torch.cuda.synchronize()
    for wanted, repeats in zip(alone, together, strict=True):
        for got in repeats:
            calls.assert_equal(got, wanted)


def captured(function):
    """(graph, what function returned during its capture), after warming up on a side stream."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            function()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = function()
    return graph, result


def test_a_graph_replays_forward_and_backward(device, seed):
    leaves = operands(device, seed, 2, 129, 4, 64)
    dout = calls.randn(2, 129, 4, 64, dtype=BF16, device=device, seed=seed + 9)

    def step():
        out = flash_attn_func(*leaves, causal=True)
        return out.detach(), *torch.autograd.grad(out, leaves, dout)

    graph, results = captured(step)
    with torch.no_grad():
        for i, x in enumerate(leaves):
            x.copy_(calls.randn(*x.shape, dtype=BF16, device=device, seed=seed + 20 + i))
    graph.replay()
    calls.assert_equal(results, step())


def test_a_graph_replays_dropout_with_fresh_masks(device, seed):
    """v = 1 and dout = 1: out and dv both sum to the kept weights, so their totals agree when their masks do."""
    q, k, _ = operands(device, seed, 2, 129, 4, 64, dtype=FP32)
    v = torch.ones_like(q, requires_grad=True)

    def step():
        out = flash_attn_func(q, k, v, 0.3)
        return out.detach(), *torch.autograd.grad(out, v, torch.ones_like(out))

    graph, (out, dv) = captured(step)
    outs = []
    for _ in range(4):
        graph.replay()
        torch.testing.assert_close(dv.sum((1, 3)), out.sum((1, 3)), rtol=1e-5, atol=1e-3)
        outs.append(out.clone())
    assert all(not torch.equal(a, b) for i, a in enumerate(outs) for b in outs[:i]), "replays repeat their mask"
    assert abs(torch.stack(outs).mean().item() - 1.0) < 0.05


ROW = 2**24  # elements between neighbours: row 128 lies past 2**31


@pytest.mark.parametrize("headdim", [64, 128])
def test_offsets_beyond_32_bits(headdim, device, seed):
    """Keys and values of 160 rows spread over 5 GB, and gradients written back there."""
    seqlen, heads = 160, 1
    if torch.cuda.mem_get_info()[0] < 12 * 2**30:
        pytest.skip("needs 12 GB of free GPU memory")
    plain = [x.detach() for x in operands(device, seed, 1, seqlen, heads, headdim)]
    dout = calls.randn(1, seqlen, heads, headdim, dtype=BF16, device=device, seed=seed + 9)
    words = (0.0, headdim**-0.5, True, -1, -1, 0.0, None)
    ops = torch.ops.flash_attn

    def solve(q, k, v, dq, dk, dv):
        out, lse, _, rng_state = ops._flash_attn_forward(q, k, v, *words, False)
        ops._flash_attn_backward(dout, q, k, v, out, lse, dq, dk, dv, *words, False, rng_state)
        return out, lse, dq.clone(), dk.clone(), dv.clone()

    wanted = solve(*plain, *(torch.empty_like(x) for x in plain))
    buffer = torch.empty(seqlen * ROW, dtype=BF16, device=device)
    far = [
        buffer.as_strided((1, seqlen, heads, headdim), (seqlen * ROW, ROW, headdim, 1), i * headdim) for i in range(6)
    ]
    for view, x in zip(far[:3], plain, strict=True):
        view.copy_(x)
    calls.assert_near(solve(*far), wanted)


def test_a_batch_stride_beyond_32_bits(device, seed):
    q, k, v = (x.detach() for x in operands(device, seed, 2, 65, 2, 64))
    wanted = flash_attn_func(q, k, v)
    stride, size = 2**31 + 4096, 65 * 2 * 64
    buffer = torch.empty(stride + 2 * size, dtype=BF16, device=device)
    far = [buffer.as_strided(x.shape, (stride, 128, 64, 1), i * size) for i, x in enumerate((k, v))]
    for view, x in zip(far, (k, v), strict=True):
        view.copy_(x)
    calls.assert_near(flash_attn_func(q, *far), wanted)
