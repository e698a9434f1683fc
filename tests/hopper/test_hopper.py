"""The Hopper backend on a Hopper GPU, asked for by name: the forward in every corner, and the gradients of all cases."""

import math

import pytest
import torch

from flash_attn import (
    backends,
    dispatch,
    flash_attn_func,
    flash_attn_qkvpacked_func,
    flash_attn_varlen_func,
    launch,
    reference,
)
from flash_attn.backends import hopper
from flash_attn.hardware import Hardware
from flash_attn.launch.hopper import (
    CONSUMER_ROWS,
    FORWARD,
    FOUR_CONSUMERS,
    FOUR_SKIPPING,
    THREE_SKIPPING,
    TWO_CONSUMERS,
    TWO_SKIPPING,
)
from flash_attn.problem import describe
from tests.support import calls
from tests.support.cases import BF16, CASES, FP16, SINK_CASES, Case
from tests.support.hopper_forms import served
from tests.support.inputs import make_inputs
from tests.support.tolerance import expected

H200 = Hardware("cuda", "sm_90", 132, 232448)
WIDTHS = tuple(FORWARD)  # one head dim of each kernel
on_hopper = pytest.mark.parametrize("device", calls.places("hopper"), indirect=True)


@pytest.fixture
def device(request):
    with calls.running_on(request.param) as device:
        yield device


@pytest.fixture
def plans(monkeypatch):
    fresh = {}
    monkeypatch.setattr(dispatch, "_plans", fresh)
    return fresh


SERVED = [case for case in CASES if served(case)]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_which_cases_are_served(case, seed):
    """By what the backend says of the case's own tensors."""
    inputs = make_inputs(case, "cpu", seed)
    names = ("cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k") if case.layout == "varlen" else ()
    lengths = dict(zip(names, calls.lengths(case, inputs), strict=True))
    numbers = calls.numbers(case, inputs)
    problem, _, _ = describe(inputs.q, inputs.k, inputs.v, *numbers, **lengths)
    refused = hopper.unsupported(problem, H200)
    if refused is not None and "Triton" in refused:
        pytest.skip(refused)
    assert (refused is None) == served(case), refused


def check(case: Case, device: torch.device, seed: int) -> None:
    """out and softmax_lse against the truth."""
    inputs = make_inputs(case, device, seed)
    results, keep = calls.forward(case, inputs, seed)
    expected(case, inputs, keep).check(**results)


@on_hopper
# each compiles four kernels
@pytest.mark.parametrize("case", SERVED[::6] + [case for case in SINK_CASES if served(case)][2::6], ids=str)
def test_cases_forward_and_backward(case, device, seed, plans):
    inputs = make_inputs(case, device, seed)
    results, keep = calls.forward_and_backward(case, inputs, seed)
    expected(case, inputs, keep).check(**results)
    assert {plan.backend.name for plan in plans.values()} == {"hopper"}


HEAD_DIMS = (8, 16, 40, 64, 72, 96, 104, 128, 136, 160, 192, 200, 256)


@on_hopper
@pytest.mark.parametrize("dtype", [FP16, BF16], ids=["fp16", "bf16"])
@pytest.mark.parametrize("headdim", HEAD_DIMS)
def test_head_dims(headdim, dtype, device, seed):
    check(Case("head-dims", dtype, headdim, 4, 2, (200, 200), (333, 333), causal=True), device, seed)


EDGES = (1, 63, 64, 65, 127, 128, 129, 191, 192, 193, 255, 256, 257, 385)
UNEQUAL = [(257, 63), (513, 65), (513, 1), (1, 257), (63, 513), (129, 640), (640, 200), (192, 128), (193, 129)]


@on_hopper
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("seqlen_q, seqlen_k", [(n, n) for n in EDGES] + UNEQUAL)
@pytest.mark.parametrize("headdim", WIDTHS)
def test_tile_edges(headdim, seqlen_q, seqlen_k, causal, device, seed):
    """Tiles of one block, tiles whose rows see no key, ragged tails, tiles without anything to mask."""
    check(Case("edges", BF16, headdim, 2, 1, (seqlen_q,), (seqlen_k,), causal=causal), device, seed)


WINDOWS = [(-1, 0), (0, 0), (5, 0), (300, 0), (-1, 100), (128, 128), (64, -1), (63, 65), (0, -1)]


@on_hopper
@pytest.mark.parametrize("seqlens", [(512, 512), (384, 640), (640, 384), (500, 777)], ids=str)
@pytest.mark.parametrize("window", WINDOWS, ids=str)
@pytest.mark.parametrize("headdim", WIDTHS)
def test_windows(headdim, window, seqlens, device, seed):
    """Masked blocks at the start of a tile, at its end, at both, and nowhere."""
    seqlen_q, seqlen_k = seqlens
    check(Case("windows", FP16, headdim, 2, 2, (seqlen_q,), (seqlen_k,), window=window), device, seed)


TILES = {
    "two": (64, TWO_CONSUMERS),
    "three in turn": (64, FORWARD[64]),
    "four in turn": (64, FOUR_CONSUMERS),
    "two in turn": (128, FORWARD[128]),
    "two that skip": (128, TWO_SKIPPING),
    "three that skip": (64, THREE_SKIPPING),
    "four that skip": (64, FOUR_SKIPPING),
}
SIDES = [(-1, 0), (300, 0), (64, -1), (63, 65)]
LENGTHS = [(256, 256), (257, 257), (700, 700), (257, 63), (513, 1), (63, 513), (640, 200)]
UNSEEN = [
    (consumers, window, *lengths)
    for consumers in TILES
    for window in (SIDES if "skip" in consumers else SIDES[1::2])
    for lengths in (LENGTHS if "skip" in consumers else LENGTHS[2::2])
]


@on_hopper
@pytest.mark.parametrize("consumers, window, seqlen_q, seqlen_k", UNSEEN)
def test_blocks_that_a_consumer_does_not_see(consumers, window, seqlen_q, seqlen_k, device, seed):
    """At the beginning of a tile, at its end, and so of several tiles that one program computes in turn."""
    batch_size = min(40, 12000 // max(seqlen_q, seqlen_k))
    headdim, config = TILES[consumers]
    case = Case("unseen", BF16, headdim, 4, 2, (seqlen_q,) * batch_size, (seqlen_k,) * batch_size, window=window)
    with launch.pinned(hopper_forward=config):
        check(case, device, seed)


@on_hopper
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("name", ["uneven", "many short"])
@pytest.mark.parametrize("consumers", TILES)
def test_packed_batches_in_every_tile(consumers, name, causal, device, seed):
    headdim, config = TILES[consumers]
    with launch.pinned(hopper_forward=config):
        test_packed_batches(headdim, name, causal, device, seed)


@on_hopper
@pytest.mark.parametrize("headdim", WIDTHS)
def test_rows_without_keys(headdim, device, seed):
    q, k, v = (x[:, :n] for x, n in zip(tensors(device, seed, 2, 300, 4, headdim), (300, 120, 120), strict=True))
    out, lse, _ = flash_attn_func(q, k, v, causal=True, return_attn_probs=True)
    assert (out[:, :180] == 0.0).all() and (lse[:, :, :180] == -math.inf).all()
    assert out[:, 180:].isfinite().all() and lse[:, :, 180:].isfinite().all()


@on_hopper
@pytest.mark.parametrize("headdim", WIDTHS)
@pytest.mark.parametrize("tiles", [-131, -1, 0, 1, 2, 132, 133, 1000])
def test_more_and_fewer_tiles_than_processors(tiles, headdim, device, seed):
    """As many as there are, one more, one less; a program draws none, one or several."""
    num_sms = torch.cuda.get_device_properties(device).multi_processor_count
    batch_size = max(1, num_sms + tiles)
    case = Case("tiles", BF16, headdim, 1, 1, (CONSUMER_ROWS,) * batch_size, (70,) * batch_size, causal=True)
    check(case, device, seed)


@on_hopper
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("nheads, nheads_k, batch_size", [(12, 1, 3), (7, 7, 5), (16, 4, 1), (3, 3, 1)])
def test_heads_drawn_together(nheads, nheads_k, batch_size, causal, device, seed):
    """Numbers of heads that five divides, and others; several query blocks of each."""
    lengths = (700,) * batch_size
    blocks = math.ceil(700 / (FORWARD[64].consumers * CONSUMER_ROWS))
    with launch.pinned(hopper_forward=FORWARD[64]._replace(tiles_together=5 * blocks)):
        check(Case("heads", BF16, 64, nheads, nheads_k, lengths, lengths, causal=causal), device, seed)


VARLEN = {
    "uneven": ((1, 700, 0, 64, 193, 5), (700, 1, 64, 0, 193, 300)),
    "one long among many empty": ((0,) * 70 + (900,) + (0,) * 70, (0,) * 70 + (900,) + (0,) * 70),
    "many short": ((17, 33, 1, 64, 65) * 60, (17, 1, 33, 65, 64) * 60),
    "no keys": ((100, 200), (0, 150)),
    "blocks": ((128, 192, 256, 384), (128, 256, 192, 384)),
}


@on_hopper
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("name", VARLEN)
@pytest.mark.parametrize("headdim", WIDTHS)
def test_packed_batches(headdim, name, causal, device, seed):
    seqlens_q, seqlens_k = VARLEN[name]
    check(Case(name, BF16, headdim, 4, 2, seqlens_q, seqlens_k, "varlen", causal=causal), device, seed)


@on_hopper
@pytest.mark.parametrize("headdim", WIDTHS)
@pytest.mark.parametrize("length", [1, 63, 64, 100, 128, 130, 200])
def test_poisoned_neighbours(length, headdim, device, seed):
    """NaN in every token before and after a sequence does not reach it; tokens outside the batch are not written.

    Both calls name the same longest sequence, which chooses the tiles.
    """
    before, after, outside = 37, 250, 90
    total = outside + before + length + after + outside
    shape = (total, 4, headdim)
    q, k, v = (calls.randn(*shape, dtype=BF16, device=device, seed=seed + i) for i in range(3))
    inside = slice(outside + before, outside + before + length)
    clean = [x[inside].clone() for x in (q, k, v)]
    for x, kept in zip((q, k, v), clean, strict=True):
        x.fill_(math.nan)
        x[inside] = kept
    ends = [outside, outside + before, outside + before + length, total - outside]
    cu = calls.int32(ends, device)
    alone = calls.int32([0, length], device)
    for causal in (False, True):
        words = dict(causal=causal, return_attn_probs=True)
        out, lse, _ = flash_attn_varlen_func(q, k, v, cu, cu, total, total, **words)
        wanted, wanted_lse, _ = flash_attn_varlen_func(*clean, alone, alone, total, total, **words)
        calls.assert_equal((out[inside], lse[:, inside]), (wanted, wanted_lse))
        for rows in (slice(0, outside), slice(total - outside, total)):
            assert out[rows].isnan().all() and lse[:, rows].isnan().all(), "rows outside every sequence were written"


@on_hopper
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("padded", [False, True], ids=["seqused_k", "leftpad_k"])
@pytest.mark.parametrize("headdim", WIDTHS)
def test_used_and_padded_keys(headdim, padded, causal, device, seed):
    """Keys in the middle of longer sequences, between NaN, against the same keys packed."""
    starts, seqlens_k, capacity = ((30, 0, 129, 64) if padded else (0,) * 4), (100, 257, 0, 64), 400
    case = Case("used", BF16, headdim, 4, 2, (70, 257, 9, 130), seqlens_k, "varlen", causal=causal)
    inputs = make_inputs(case, device, seed)
    k, v = (torch.full((4 * capacity, *x.shape[1:]), math.nan, dtype=BF16, device=device) for x in (inputs.k, inputs.v))
    for wide, packed in ((k, inputs.k), (v, inputs.v)):
        for i, part in enumerate(packed.split(seqlens_k)):
            wide[i * capacity + starts[i] : i * capacity + starts[i] + seqlens_k[i]] = part
    cu_seqlens_k = calls.int32([i * capacity for i in range(5)], device)
    used = calls.int32([start + n for start, n in zip(starts, seqlens_k, strict=True)], device)
    out, lse, _, _ = torch.ops.flash_attn._flash_attn_varlen_forward(
        inputs.q, k, v, inputs.cu_seqlens_q, cu_seqlens_k, 257, capacity, *calls.numbers(case, inputs),
        seqused_k=used, leftpad_k=calls.int32(list(starts), device) if padded else None,
    )  # fmt: skip
    expected(case, inputs).check(out=out, lse=lse)


@on_hopper
@pytest.mark.parametrize("scale", [-0.3, 0.0, 1e-3, 2.0])
def test_scales(scale, device, seed):
    q, k, v = (calls.randn(2, 200, 4, 64, dtype=FP16, device=device, seed=seed + i) for i in range(3))
    words = dict(softmax_scale=scale, causal=True, return_attn_probs=True)
    out, lse, _ = flash_attn_func(q, k, v, **words)
    truth, truth_lse = reference.attention(q, k, v, softmax_scale=scale, window=(None, 0))
    with backends.use("portable"):
        other, other_lse, _ = flash_attn_func(q, k, v, **words)
    for ours, theirs, exact in ((out, other, truth), (lse, other_lse, truth_lse)):
        limit = 2.0 * (theirs.double() - exact).abs().max() + torch.finfo(ours.dtype).eps * exact.abs().max()
        assert (ours.double() - exact).abs().max() <= limit


@on_hopper
@pytest.mark.parametrize("nheads", [1, 5, 8])
def test_packed_qkv(nheads, device, seed):
    """Views of one tensor, whose rows are far apart, give the bits of tensors of their own."""
    qkv = calls.randn(2, 333, 3, nheads, 128, dtype=BF16, device=device, seed=seed)
    packed = flash_attn_qkvpacked_func(qkv, causal=True)
    calls.assert_equal(packed, flash_attn_func(*(x.contiguous() for x in qkv.unbind(2)), causal=True))
    calls.assert_equal(packed, flash_attn_func(*qkv.unbind(2), causal=True))


REPEATED = [
    Case("causal-gqa", BF16, 64, 8, 2, (2500,) * 4, (2500,) * 4, causal=True),
    Case("short-causal", FP16, 64, 8, 2, (700,) * 8, (700,) * 8, causal=True),
    Case("full", BF16, 128, 16, 4, (1000,) * 4, (1300,) * 4, alibi="h"),
    Case("varlen", BF16, 128, 8, 2, (1, 900, 0, 333), (64, 900, 5, 333), "varlen", causal=True, window=(200, -1)),
    Case("wide", BF16, 256, 8, 2, (1000,) * 3, (1000,) * 3, causal=True, softcap=5.0),
]


@on_hopper
@pytest.mark.parametrize("case", REPEATED, ids=str)
def test_the_same_bits_every_time(case, device, seed):
    """Whichever program draws which tile."""
    inputs = make_inputs(case, device, seed)
    first, _ = calls.forward(case, inputs, seed)
    for _ in range(20):
        again, _ = calls.forward(case, inputs, seed)
        for name, x in again.items():
            calls.assert_equal(x, first[name])


def tensors(device, seed, *shape):
    return [calls.randn(*shape, dtype=BF16, device=device, seed=seed + i) for i in range(3)]


@on_hopper
@pytest.mark.parametrize("headdim", WIDTHS)
def test_two_streams_at_once(headdim, device, seed):
    """Launches beside each other draw from counters of their own."""
    problems = [tensors(device, seed + 10 * i, 4, 1000 + i, 8, headdim) for i in range(2)]
    alone = [flash_attn_func(*problem, causal=True) for problem in problems]
    streams = [torch.cuda.Stream() for _ in problems]
    torch.cuda.synchronize()
    together = [[], []]
    for _ in range(20):
        for i, stream in enumerate(streams):
            with torch.cuda.stream(stream):
                together[i].append(flash_attn_func(*problems[i], causal=True))
    torch.cuda.synchronize()
    for wanted, repeats in zip(alone, together, strict=True):
        for got in repeats:
            calls.assert_equal(got, wanted)


@on_hopper
@pytest.mark.parametrize("headdim", WIDTHS)
def test_a_graph_replays_beside_eager_launches(headdim, device, seed):
    """Two launches in the graph, fresh contents, replays on one stream while another launches the same eagerly."""
    static = tensors(device, seed, 2, 1500, 8, headdim)
    other = tensors(device, seed + 5, 2, 1500, 8, headdim)

    def twice(q, k, v):
        out = flash_attn_func(q, k, v, causal=True)
        return out, flash_attn_func(out, k, v)

    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        twice(*static)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = twice(*static)
    for x, fresh in zip(static, tensors(device, seed + 9, 2, 1500, 8, headdim), strict=True):
        x.copy_(fresh)
    wanted, wanted_other = twice(*static), twice(*other)
    torch.cuda.synchronize()
    eager, replayed = [], []
    for _ in range(5):
        graph.replay()
        replayed.append([x.clone() for x in captured])
        with torch.cuda.stream(side):
            eager.append(twice(*other))
    torch.cuda.synchronize()
    for got in replayed:
        calls.assert_equal(got, wanted)
    for got in eager:
        calls.assert_equal(got, wanted_other)


@on_hopper
@pytest.mark.parametrize("headdim", WIDTHS)
def test_the_automatic_choice(headdim, device, seed, plans):
    """Is this backend where the problem is large, with the same bits, and the portable one where it is small."""
    large, small = tensors(device, seed, 4, 2048, 8, headdim), tensors(device, seed, 1, 64, 2, headdim)
    forced = flash_attn_func(*large, causal=True)
    plans.clear()
    with backends.use(None):
        calls.assert_equal(flash_attn_func(*large, causal=True), forced)
        assert [plan.backend.name for plan in plans.values()] == ["hopper"]
        plans.clear()
        flash_attn_func(*small, causal=True)
        assert [plan.backend.name for plan in plans.values()] == ["portable"]
        plans.clear()
        flash_attn_func(*(x[..., :-1] for x in large), causal=True)
        assert [plan.backend.name for plan in plans.values()] == ["portable"], "a head dim that no tensor map has"


@on_hopper
def test_strides_beyond_32_bits(device, seed):
    """Sequences 2**31 elements apart, read and written through tensor maps."""
    if torch.cuda.mem_get_info()[0] < 24 * 2**30:
        pytest.skip("needs 24 GB of free GPU memory")
    q, k, v = tensors(device, seed, 2, 200, 2, 64)
    wanted = flash_attn_func(q, k, v, causal=True)
    stride, size = 2**31 + 4096, 200 * 2 * 64
    buffer = torch.empty(stride + 4 * size, dtype=BF16, device=device)
    far = [buffer.as_strided(q.shape, (stride, 128, 64, 1), i * size) for i in range(3)]
    for view, x in zip(far, (q, k, v), strict=True):
        view.copy_(x)
    calls.assert_equal(flash_attn_func(*far, causal=True), wanted)
