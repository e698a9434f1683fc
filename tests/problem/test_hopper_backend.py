"""The Hopper backend without a Hopper GPU: what it refuses, when it is chosen, what its launches are made of."""

import inspect
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from flash_attn import backends, dispatch, launch
from flash_attn.backends import explain, hopper, select_backend, tensor_maps, use
from flash_attn.backends.base import Operands
from flash_attn.errors import InvalidArgument, UnsupportedProblem
from flash_attn.hardware import CPU, Hardware
from flash_attn.launch.hopper import (
    CONSUMER_ROWS,
    FEWEST_IN_ORDER,
    FORWARD,
    FOUR_CONSUMERS,
    FOUR_SKIPPING,
    HEADS_IN_ORDER,
    MEDIUM,
    MEDIUM_CAUSAL,
    PROGRAMS,
    SHORT,
    SHORT_CAUSAL,
    SHORT_DROPOUT,
    SHORT_TWO_PASS,
    THREE_SKIPPING,
    TILES_TOGETHER,
    TWO_CONSUMERS,
    TWO_DROPPING,
    TWO_IN_TURN,
    TWO_PARTS,
    TWO_SKIPPING,
    TWO_SKIPPING_Q,
    WIDE,
    HopperOnePassConfig,
    HopperTwoPassConfig,
    even_share,
    head_dim_pad,
    hopper_backward_config,
    hopper_forward_config,
    product_width,
)
from flash_attn.problem import AttentionProblem, describe

HOPPER = Hardware("cuda", "sm_90", 132, 232448)
BLACKWELL = Hardware("cuda", "sm_100", 148, 232448)
CDNA = Hardware("hip", "gfx942", 304, 65536)
BF16 = torch.bfloat16


def problem(**changes) -> AttentionProblem:
    """A large one that nothing speaks against."""
    numbers = dict(layout="dense", dtype="bfloat16", batch_size=4, seqlen_q=4096, seqlen_k=4096, nheads=16, nheads_k=16)
    return AttentionProblem(**{**numbers, **dict(headdim=128, aligned=True), **changes})


needs_gluon = pytest.mark.skipif(
    hopper.unsupported(problem(), HOPPER) is not None or hopper.left_to_others(problem(), HOPPER) is not None,
    reason="not the release of Triton that the kernels have run with on a GPU",
)


@pytest.fixture(autouse=True)
def nothing_requested(monkeypatch):
    monkeypatch.setattr(backends, "_environment", lambda: None)


REFUSALS = [
    (HOPPER, dict(dtype="float32"), "computes fp16 and bf16, not float32"),
    (HOPPER, dict(dtype="float64"), "computes fp16 and bf16, not float64"),
    (HOPPER, dict(layout="paged", page_size=8), "of which pages of 8 are no multiple"),
    (HOPPER, dict(layout="paged_cache", page_size=100), "copies 16 keys of a page at once"),
    (HOPPER, dict(layout="paged_cache", page_size=128, leftpad_k=True), "a left padding shifts blocks"),
    (HOPPER, dict(layout="cache", aligned=False), "tokens of a cache or of pages evenly spaced"),
    (HOPPER, dict(aligned=False), "multiples of 16 bytes"),
    (BLACKWELL, {}, "written for Hopper (sm_90) with its TMA and wgmma; this is sm_100"),
    (CDNA, {}, "this is gfx942"),
    (CPU, {}, "this is cpu"),
]


@pytest.mark.parametrize("hardware, changes, words", REFUSALS)
def test_refusals(hardware, changes, words):
    """Each in its words, in `explain`, and as the error of a call that asks for the backend by name."""
    refused = problem(**changes)
    reason = hopper.unsupported(refused, hardware)
    assert reason is not None and words in reason
    assert explain(refused, hardware)["hopper"] == reason
    with use("hopper"), pytest.raises(UnsupportedProblem) as caught:
        select_backend(refused, hardware)
    assert caught.value.reasons == {"hopper": reason}


@pytest.fixture
def triton_release(monkeypatch):
    """A function that pretends another Triton; None is none at all."""

    def pretend(release):
        module = None if release is None else SimpleNamespace(__version__=release)
        monkeypatch.setitem(sys.modules, "triton", module)
        hopper._release.cache_clear()

    yield pretend
    hopper._release.cache_clear()


@pytest.mark.parametrize("release", ["3.5.1", "3.10.0", "4.0.0"])
def test_unknown_releases_of_triton(release, triton_release):
    triton_release(release)
    major_minor = release.rpartition(".")[0]
    words = f"written for the Gluon of Triton 3.6, 3.7, 3.8, 3.9; this is {major_minor}"
    assert hopper.unsupported(problem(), HOPPER) == words


@pytest.mark.parametrize("release", ["3.6.0", "3.6.1+git1"])
def test_the_release_that_has_run_on_a_gpu(release, triton_release):
    triton_release(release)
    assert explain(problem(), HOPPER)["hopper"] == "runs it"


@pytest.mark.parametrize("release", ["3.7.1", "3.9.2+git1"])
def test_releases_that_have_only_compiled_the_kernels(release, triton_release):
    """They are used where the backend is asked for by name."""
    triton_release(release)
    choose = backends.choose_backend.__wrapped__  # it keeps its answers, and a process has one Triton
    assert choose(problem(), HOPPER, None).name == "portable"
    assert choose(problem(), HOPPER, "hopper").name == "hopper"
    verdict = explain(problem(), HOPPER)["hopper"]
    assert verdict == f"could run it, but has run on a GPU with Triton 3.6 only; this is {release[:3]}"


def test_without_triton(triton_release):
    triton_release(None)
    reason = hopper.unsupported(problem(), HOPPER)
    assert reason is not None and reason.startswith("Triton is not installed")


@needs_gluon
@pytest.mark.parametrize(
    "changes",
    [
        dict(dtype="float16"),
        dict(layout="varlen", nheads_k=2),
        dict(layout="varlen", seqused_k=True, leftpad_k=True),
        dict(window=(100, 0), softcap=True, alibi=True),
        dict(dropout=True, window=(None, 0), headdim=128),
        dict(window=(None, 7), headdim=8),
        dict(headdim=256, window=(None, 0)),
        dict(deterministic=True),
    ],
)
def test_what_it_serves(changes):
    assert select_backend(problem(**changes), HOPPER).name == "hopper"


@needs_gluon
def test_small_problems_are_left_to_the_portable_backend():
    """Unless the backend is asked for by name."""
    small = problem(batch_size=1, seqlen_q=256, seqlen_k=256, nheads=8)
    assert hopper.left_to_others(small, HOPPER) is not None and hopper.left_to_others(problem(), HOPPER) is None
    assert select_backend(small, HOPPER).name == "portable"
    with use("hopper"):
        assert select_backend(small, HOPPER).name == "hopper"
    assert explain(small, HOPPER)["portable"] == "runs it"
    assert explain(small, HOPPER)["hopper"] == f"could run it, but {hopper.left_to_others(small, HOPPER)}"


@needs_gluon
def test_few_queries_are_left_to_the_portable_backend():
    """A decoding step of a large batch, whose keys must be shared out."""
    step = problem(batch_size=64, seqlen_q=1, seqlen_k=32768, nheads=32, nheads_k=8)
    assert explain(step, HOPPER)["portable"] == "runs it"
    assert explain(step, HOPPER)["hopper"] == "could run it, but splits no keys, which so few queries need"
    assert explain(step._replace(seqlen_q=64), HOPPER)["hopper"] == "runs it"


@needs_gluon
def test_small_is_a_matter_of_work():
    """Queries * keys * heads * head dim * sequences; the threshold itself is enough."""
    edge = problem(batch_size=1, seqlen_q=1024, seqlen_k=1024, nheads=16, headdim=128)
    assert hopper.left_to_others(edge, HOPPER) is None
    for field in ("seqlen_q", "seqlen_k", "nheads", "headdim"):
        assert hopper.left_to_others(edge._replace(**{field: getattr(edge, field) // 2}), HOPPER) is not None
        half = edge._replace(**{field: getattr(edge, field) // 2}, batch_size=2)
        assert hopper.left_to_others(half, HOPPER) is None


@needs_gluon
def test_it_computes_gradients():
    verdicts = explain(problem(), HOPPER)
    assert (verdicts["hopper"], verdicts["portable"]) == ("runs it", "could run it")
    for requested in (None, "hopper"):
        assert backends.choose_backward_backend(problem(), HOPPER, requested).name == "hopper"


@needs_gluon
@pytest.mark.parametrize("layout, page_size", [("cache", 0), ("paged_cache", 16), ("paged_cache", 256), ("paged", 48)])
@pytest.mark.parametrize("headdim", [64, 128, 256])
def test_it_serves_many_queries_of_caches_and_pages(headdim, layout, page_size):
    """Few are left to the decode kernel."""
    many = problem(layout=layout, page_size=page_size, headdim=headdim, leftpad_k=layout == "cache")
    assert explain(many, HOPPER)["hopper"] == "runs it"
    few = explain(many._replace(seqlen_q=1), HOPPER)
    assert few["portable"] == "runs it" and "splits no keys" in few["hopper"]
    half = explain(many._replace(seqlen_q=64, nheads=64, seqlen_k=65536), HOPPER)
    assert half["hopper"] == "runs it" if headdim == 256 else "most of each empty" in half["hopper"]


def operand(layout, dtype=BF16, headdim=64, seqlen=8, heads=4):
    """A (2, seqlen, heads, headdim) operand laid out in some way."""
    plain = torch.zeros(2, seqlen, heads, headdim, dtype=dtype)
    if layout == "contiguous":
        return plain
    if layout == "transposed":
        return torch.zeros(2, heads, seqlen, headdim, dtype=dtype).transpose(1, 2)
    if layout == "packed":
        return torch.zeros(2, seqlen, 3, heads, headdim, dtype=dtype)[:, :, 1]
    if layout == "odd rows":
        return torch.zeros(2, seqlen, heads, headdim + 1, dtype=dtype)[..., :headdim]
    if layout == "wide rows":
        return torch.zeros(2, seqlen, heads, headdim + 16 // dtype.itemsize, dtype=dtype)[..., :headdim]
    if layout == "expanded batch":
        return plain[:1].expand(2, -1, -1, -1)
    if layout == "expanded heads":
        return plain[:, :, :1].expand(-1, -1, heads, -1)
    offset = {"offset by 2 bytes": 1, "offset by 16 bytes": 8}[layout]
    buffer = torch.zeros(plain.numel() + 16, dtype=dtype)
    assert buffer.data_ptr() % 16 == 0
    return buffer[offset : offset + plain.numel()].view(plain.shape)


ALIGNED = {
    "contiguous": True, "transposed": True, "packed": True, "wide rows": True, "offset by 16 bytes": True,
    "odd rows": False, "expanded batch": False, "expanded heads": False, "offset by 2 bytes": False,
}  # fmt: skip


@pytest.mark.parametrize("which", [0, 1, 2], ids=["q", "k", "v"])
@pytest.mark.parametrize("layout", ALIGNED)
def test_aligned(layout, which):
    tensors = [operand("contiguous") for _ in range(3)]
    tensors[which] = operand(layout)
    assert describe(*tensors, 0.0, 1.0, False, -1, -1, 0.0)[0].aligned == ALIGNED[layout]


@pytest.mark.parametrize(
    "dtype, headdim, aligned",
    [(BF16, 8, True), (BF16, 12, False), (BF16, 59, False), (BF16, 136, True), (torch.float32, 4, True)],
)
def test_aligned_head_dims(dtype, headdim, aligned):
    tensors = [operand("contiguous", dtype, headdim) for _ in range(3)]
    assert describe(*tensors, 0.0, 1.0, False, -1, -1, 0.0)[0].aligned == aligned


def test_strides_of_single_elements_do_not_matter():
    """A dimension of one element may have any stride; its tensor map has one that the hardware takes."""
    odd = torch.zeros(64 * 8, dtype=BF16).as_strided((1, 8, 1, 64), (7, 64, 3, 1))
    assert describe(odd, odd, odd, 0.0, 1.0, False, -1, -1, 0.0)[0].aligned
    described = tensor_maps.hopper(odd, 64, 64)(odd.data_ptr())
    assert described.strides == [64, 64, 64, 1] and described.shape == [1, 8, 1, 64]
    none = torch.zeros(1, 0, 1, 64, dtype=BF16)
    assert not describe(odd, none, none, 0.0, 1.0, False, -1, -1, 0.0)[0].aligned, "a map has no empty side"


def in_turns(config):
    """A configuration but for the order of its tiles."""
    return config._replace(tiles_together=TILES_TOGETHER)


OF_64 = (TWO_CONSUMERS, TWO_IN_TURN, TWO_DROPPING, FOUR_CONSUMERS, TWO_SKIPPING_Q, THREE_SKIPPING, FOUR_SKIPPING)
CONFIGS = {*FORWARD.items(), *((64, config) for config in OF_64), (128, TWO_SKIPPING), (256, TWO_PARTS)}
LOAD_REGISTERS, REGISTER_FILE = 24, 65536


@pytest.mark.parametrize("pad, config", sorted(CONFIGS))
def test_registers_of_the_warpgroups_fit(pad, config):
    """Every warpgroup has 128 threads. The first consumer gets what the launch leaves when the others have theirs."""
    threads = 128 * (config.consumers + 1)
    at_launch = REGISTER_FILE // threads // 8 * 8
    others = [config.registers] * (config.consumers - 1) + [LOAD_REGISTERS]
    first = (at_launch * threads - 128 * sum(others)) // 128 // 8 * 8
    assert first >= config.registers
    assert all(registers % 8 == 0 and 24 <= registers <= 240 for registers in (config.registers, *others))
    assert 128 * (first + sum(others)) <= REGISTER_FILE


def shared_bytes(pad, config):
    """Tiles of Q, K, V and out in 2 bytes an element, and room for barriers and numbers."""
    queries = (
        config.consumers * CONSUMER_ROWS * (3 if config.overlap else 1)
    )  # two of Q and one of out, or one for both
    keys = 2 * config.num_stages * config.block_n
    return 2 * pad * (queries + keys) + 1024


@pytest.mark.parametrize("pad, config", sorted(CONFIGS))
def test_shared_memory_fits(pad, config):
    assert shared_bytes(pad, config) <= HOPPER.shared_memory == 227 * 1024
    assert config.block_n % 16 == 0 and config.block_n & (config.block_n - 1) == 0
    assert config.consumers in (2, 3, 4), "the kernel has partitions for so many"
    assert not config.ping_pong or config.consumers * 128 >= 256, "a turn has two warpgroups"


def test_every_problem_has_a_configuration():
    for headdim in range(1, 257):
        pad = head_dim_pad(headdim)
        assert pad in FORWARD and headdim <= pad and (pad == 64 or pad < 2 * headdim)
        for window in ((None, None), (None, 0), (9, 9)):
            config = hopper_forward_config(problem(headdim=headdim, window=window))
            assert (pad, in_turns(config)) in CONFIGS


def square(length, causal, **words):
    """A problem of as many keys as queries, at head dim 64 unless asked for another."""
    words = {"headdim": 64, "window": (None, 0 if causal else None)} | words
    return problem(seqlen_q=length, seqlen_k=length, **words)


@pytest.mark.parametrize(
    "given, wanted",
    [
        (square(SHORT, True), TWO_SKIPPING_Q),
        (square(SHORT, True)._replace(seqlen_k=MEDIUM), TWO_IN_TURN),
        (square(SHORT_CAUSAL, True), TWO_IN_TURN),
        (square(SHORT_CAUSAL, True)._replace(seqlen_k=4 * MEDIUM_CAUSAL), FOUR_SKIPPING),
        (square(MEDIUM_CAUSAL, True), FOUR_SKIPPING),
        (square(2 * MEDIUM_CAUSAL, True), FORWARD[64]),
        (square(2 * MEDIUM_CAUSAL, True, window=(100, 0), softcap=True), TWO_SKIPPING_Q),
        (square(2 * MEDIUM_CAUSAL, True, window=(WIDE - 1, 0)), THREE_SKIPPING),
        (square(2 * MEDIUM_CAUSAL, True, window=(WIDE, 0)), FOUR_SKIPPING),
        (square(2 * MEDIUM_CAUSAL, True, window=(WIDE, 0), softcap=True), THREE_SKIPPING),
        (square(2 * MEDIUM_CAUSAL, True, window=(WIDE, 0), alibi=True), THREE_SKIPPING),
        (square(SHORT_CAUSAL, True, alibi=True, softcap=True), TWO_IN_TURN),
        (square(2 * SHORT_CAUSAL, True, alibi=True, softcap=True), THREE_SKIPPING),
        (square(SHORT_DROPOUT, True, dropout=True), TWO_SKIPPING_Q),
        (square(MEDIUM_CAUSAL, True, dropout=True, window=(900, 0)), TWO_SKIPPING_Q),
        (square(MEDIUM_CAUSAL, True, dropout=True), TWO_DROPPING),
        (square(MEDIUM_CAUSAL, False, dropout=True, softcap=True), TWO_DROPPING),
        (square(SHORT_CAUSAL, True, softcap=True), FOUR_SKIPPING),
        (square(2 * MEDIUM_CAUSAL, True, softcap=True), FOUR_SKIPPING),
        (square(2 * MEDIUM_CAUSAL, True, alibi=True), TWO_IN_TURN),
        (square(MEDIUM_CAUSAL, True, batch_size=1, nheads=12), TWO_IN_TURN),
        (square(MEDIUM_CAUSAL, True, batch_size=1, nheads=24), FOUR_SKIPPING),
        (square(MEDIUM_CAUSAL, True, batch_size=1, nheads=12, window=(2000, 0)), TWO_SKIPPING_Q),
        (square(MEDIUM_CAUSAL, False, batch_size=1, nheads=8), TWO_CONSUMERS),
        (square(MEDIUM_CAUSAL, False, batch_size=1, nheads=12), FORWARD[64]),
        (square(MEDIUM, False), TWO_CONSUMERS),
        (square(MEDIUM, False)._replace(seqlen_k=2 * MEDIUM), FORWARD[64]),
        (square(SHORT, False, softcap=True), TWO_CONSUMERS),
        (square(MEDIUM, False, alibi=True), FOUR_CONSUMERS),
        (square(2 * MEDIUM, False, window=(100, None)), THREE_SKIPPING),
        (square(2 * MEDIUM, False, window=(128, 128)), THREE_SKIPPING),
        (square(2 * MEDIUM, False, window=(128, 127)), TWO_SKIPPING_Q),
        (square(2 * MEDIUM, False, softcap=True), FOUR_CONSUMERS),
        (square(2 * MEDIUM, False, alibi=True), FORWARD[64]),
        (square(2 * MEDIUM, False, alibi=True, softcap=True), TWO_IN_TURN),
        (square(SHORT, True, headdim=128), TWO_SKIPPING),
        (square(SHORT, False, headdim=128), FORWARD[128]),
        (square(SHORT, True, headdim=80)._replace(seqlen_k=MEDIUM), FORWARD[128]),
        (square(MEDIUM, True, headdim=96, window=(575, 0)), TWO_SKIPPING),
        (square(MEDIUM, True, headdim=96, window=(576, 0)), FORWARD[128]),
        (square(MEDIUM, False, headdim=128, window=(100, None)), FORWARD[128]),
        (square(MEDIUM, True, headdim=192, window=(9, 0)), TWO_PARTS),
        (square(MEDIUM, False, headdim=136, dropout=True), TWO_PARTS),
        (square(MEDIUM, False, headdim=136, dropout=True, alibi=True), FORWARD[256]),
        (square(MEDIUM, True, headdim=200), FORWARD[256]),
    ],
)
def test_consumers(given, wanted):
    assert in_turns(hopper_forward_config(given)) == wanted


def test_heads_of_causal_tiles_of_a_backward_are_drawn_in_turn():
    """As many as make up for long tiles, more where heads are grouped; tiles of equal length need none beside them."""

    def heads(**words):
        config = hopper_backward_config(
            problem(**{"nheads": 4, "nheads_k": 4, "seqlen_k": 4096, "seqlen_q": 4096, **words})
        )
        passes = (config.dq, *config.dkdv) if isinstance(config, HopperTwoPassConfig) else (config,)
        (count,) = {each.heads_together for each in passes}
        return count

    for headdim in (64, 128, 256):
        causal = heads(headdim=headdim, window=(None, 0))
        assert causal >= 16 and heads(headdim=headdim, window=(None, 0), nheads_k=1) >= causal
        assert heads(headdim=headdim, window=(None, None)) == 1


@needs_gluon
@pytest.mark.parametrize("length", [1, 128, 512, 1024, 4096, 2**18])
@pytest.mark.parametrize("causal", [False, True])
def test_causal_tiles_of_a_forward_are_drawn_in_even_turns(causal, length, monkeypatch):
    """Heads in turn have two tiles for each program, or as many fewer as whole heads want."""
    monkeypatch.setattr(hopper.devices, "of", lambda device: HOPPER)
    q = torch.empty(2, length, 480, 128, dtype=BF16, device="meta")
    given, *_ = describe(q, q, q, 0.0, 1.0, causal, -1, -1, 0.0)
    operands = Operands(q, q, q, 1.0, length, length, given.window, memo={})
    launcher = hopper.bind_forward(given, operands, q)
    num_tiles, num_m, heads_together = launcher.build([0] * 14)[10:13]
    assert num_tiles == 960 * num_m
    assert heads_together == (max(1, 2 * PROGRAMS // num_m) if causal else 1)
    assert heads_together * num_m <= max(2 * PROGRAMS, num_m)


@pytest.mark.parametrize("wanted", [1, 2, 8, 16, 33, 66])
def test_turns_of_a_backward_are_even(wanted):
    """About as many heads as asked, and a last turn that is at least as full as with just so many."""

    def last(share):
        return ((heads - 1) % share + 1) / share

    for heads in range(2000):
        share = even_share(wanted, heads)
        assert share == heads if heads <= wanted else abs(share - wanted) <= wanted // 4
        assert heads <= wanted or last(share) >= last(wanted)


def test_turns_of_heads_as_measured():
    """Numbers of heads at 16k tokens and hidden size 2048, and what was fastest."""
    assert [even_share(33, heads) for heads in (512, 256, 128)] == [32] * 3
    assert [even_share(8, heads) for heads in (64, 44)] == [8, 9]


def test_products_leave_out_the_padding():
    """In two parts, powers of two of at least 16 columns."""
    widths = {8: 64, 64: 64, 72: 80, 80: 80, 96: 96, 104: 128, 136: 144, 160: 160, 192: 192, 200: 256, 256: 256}
    assert {headdim: product_width(headdim) for headdim in widths} == widths
    for headdim in range(1, 257):
        width = product_width(headdim)
        rest = width - (1 << (width.bit_length() - 1))
        assert headdim <= width <= head_dim_pad(headdim) and (rest == 0 or rest in (16, 32, 64))


def test_short_causal_gradients_take_two_passes():
    sizes = dict(seqlen_q=SHORT_TWO_PASS, seqlen_k=SHORT_TWO_PASS, window=(None, 0))
    assert isinstance(hopper_backward_config(problem(**sizes)), HopperTwoPassConfig)
    for other in (
        dict(seqlen_k=SHORT_TWO_PASS + 1),
        dict(window=(None, None)),
        dict(headdim=64),
        dict(alibi=True),
    ):
        assert isinstance(hopper_backward_config(problem(**{**sizes, **other})), HopperOnePassConfig)


def test_tiles_are_drawn_early_where_every_program_has_many():
    sizes = dict(headdim=64, window=(None, 0), seqlen_q=4096, seqlen_k=4096)
    assert hopper_backward_config(problem(**sizes, nheads=32, nheads_k=32, batch_size=4)).ahead
    assert not hopper_backward_config(problem(**sizes, nheads=32, nheads_k=8, batch_size=1)).ahead
    assert not hopper_backward_config(problem(**{**sizes, "headdim": 128}, nheads=32, nheads_k=32, batch_size=4)).ahead


def test_deterministic_gradients_take_one_pass_where_programs_do_not_queue():
    def config(headdim, seqlen, causal, **words):
        words = {"nheads": 32, "nheads_k": 32, "batch_size": 4, **words}
        window = (None, 0 if causal else None)
        return hopper_backward_config(
            problem(headdim=headdim, seqlen_q=seqlen, seqlen_k=seqlen, window=window, deterministic=True, **words)
        )

    for headdim, causal, two_passes, one_pass in (
        (64, True, 2048, 4096),
        (128, True, 1024, 2048),
        (64, False, 512, 1024),
        (128, False, 256, 512),
    ):
        assert isinstance(config(headdim, two_passes, causal), HopperTwoPassConfig)
        assert isinstance(config(headdim, one_pass, causal), HopperOnePassConfig)
    assert isinstance(config(128, 4096, True, nheads=2, nheads_k=2, batch_size=1), HopperTwoPassConfig), "two heads"
    assert isinstance(config(256, 4096, True), HopperTwoPassConfig), "no registers"
    assert isinstance(config(64, 4096, True, softcap=True), HopperOnePassConfig)
    assert isinstance(config(64, 4096, True, softcap=True, alibi=True), HopperTwoPassConfig), "no registers"
    assert config(128, 2048, False).heads_together > config(128, 16384, False).heads_together == FEWEST_IN_ORDER
    assert config(128, 4096, True, nheads_k=8).heads_together == HEADS_IN_ORDER // 4


def test_a_pinned_configuration():
    pinned = FORWARD[128]._replace(ping_pong=False)
    with launch.pinned(hopper_forward=pinned):
        assert hopper_forward_config(problem()) is pinned
    assert in_turns(hopper_forward_config(problem())) == FORWARD[128]


@pytest.fixture
def streams(monkeypatch):
    """Streams that exist by number alone."""
    state = SimpleNamespace(current=0, capturing=False)
    monkeypatch.setattr(hopper, "_counters", {})
    monkeypatch.setattr(hopper.devices, "current_stream", lambda device: state.current)
    monkeypatch.setattr(hopper.devices, "is_capturing", lambda device: state.capturing)
    return state


def test_a_tile_counter_for_each_stream(streams):
    device, found = torch.device("cpu"), {}
    for streams.current in (0, 7, 0, 7):
        counter = hopper.tile_counter(device)
        assert counter.dtype == torch.int32 and counter.tolist() == [0, 0]
        assert found.setdefault(streams.current, counter) is counter
    assert found[0].data_ptr() != found[7].data_ptr()


def test_a_tile_counter_for_each_captured_launch(streams):
    device = torch.device("cpu")
    eager = hopper.tile_counter(device)
    streams.capturing = True
    captured = [hopper.tile_counter(device) for _ in range(2)]
    streams.capturing = False
    assert hopper.tile_counter(device) is eager
    assert len({x.data_ptr() for x in (eager, *captured)}) == 3
    assert all(x.tolist() == [0, 0] for x in captured)


METADATA = dict(swizzle=3, elem_size=2, elem_type=10, fp4_padded=False)


@pytest.mark.parametrize("layout", ["contiguous", "transposed", "packed"])
@pytest.mark.parametrize("form", ["portable", "hopper", "ragged"])
def test_a_tensor_map_is_what_triton_encodes(form, layout, monkeypatch):
    """Triton's own launcher makes the same calls to the driver from a TensorMap as from its descriptor."""
    pytest.importorskip("triton")
    from triton.backends.nvidia import driver

    x = operand(layout)
    x = x[0] if form == "ragged" else x
    describe_operand = (tensor_maps.portable if form == "portable" else tensor_maps.hopper)(x, 64, 64)
    real, ours = describe_operand(x), describe_operand(x.data_ptr())
    assert not isinstance(real, tensor_maps.TensorMap) and isinstance(ours, tensor_maps.TensorMap)
    encoded = []
    fills = ("fill_tma_descriptor", "fill_tma_descriptor_tiled")  # the second name since Triton 3.9
    utils = SimpleNamespace(**dict.fromkeys(fills, lambda *words: encoded.append(words) or "map"))
    ignored = [None] * (len(inspect.signature(driver.make_tensordesc_arg).parameters) - 2)
    monkeypatch.setattr(driver.triton.runtime.driver, "_active", SimpleNamespace(utils=utils), raising=False)
    for metadata in (None, {**METADATA, "block_size": real.block_shape}):
        arguments = [driver.make_tensordesc_arg(each, metadata, *ignored) for each in (real, ours)]
        if metadata is None:
            arguments = [rest for _base, *rest in arguments]
        assert arguments[0] == arguments[1]
    assert len(encoded) == 2 and encoded[0] == encoded[1]
    assert encoded[0][0] == x.data_ptr()


def reached(described, coordinates):
    """Element offset that a tile's first element has, or None outside the map."""
    if not all(0 <= at < size for at, size in zip(coordinates, described.shape, strict=True)):
        return None
    return sum(at * stride for at, stride in zip(coordinates, described.strides, strict=True)) % 2**63


@pytest.mark.parametrize("start, length", [(0, 5), (3, 1), (7, 9), (0, 16), (16, 0)])
def test_ragged_coordinates_end_with_the_sequence(start, length):
    """As kernels/hopper/pipeline.row_coordinates computes them: row r of a sequence, or outside of the map."""
    origin = tensor_maps.RAGGED_ORIGIN
    x = torch.zeros(16, 3, 64, dtype=BF16)
    described = tensor_maps.hopper(x, 64, 64)(x.data_ptr())
    for row in (-1, 0, 1, length - 1, length, length + 1, 1000):
        offset = reached(described, (origin, start + length, origin - length + row, 2, 0))
        if 0 <= row < length:
            assert offset == (start + row) * x.stride(0) + 2 * x.stride(1)
        elif row >= length:
            assert offset is None


def test_the_kernel_counts_from_the_same_origin():
    pytest.importorskip("triton")
    from flash_attn.kernels.hopper import pipeline

    assert pipeline.RAGGED_ORIGIN.value == tensor_maps.RAGGED_ORIGIN
    assert pipeline.WARPGROUP_ROWS.value == CONSUMER_ROWS


def test_it_is_first_in_the_table():
    assert list(backends.MODULES)[:2] == ["hopper", "portable"]
    with pytest.raises(InvalidArgument, match="hopper, portable"), use("Hopper"):
        pass


def test_importing_the_backend_imports_no_triton():
    program = "import sys, flash_attn.backends.hopper; sys.exit('triton' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


def test_the_address_is_part_of_a_plan(monkeypatch):
    """A call with an address off by two bytes does not find the plan of an aligned one."""
    monkeypatch.setattr(dispatch, "_plans", {})
    for layout in ("contiguous", "offset by 2 bytes"):
        x = operand(layout)
        dispatch.forward(x, x, x, 0.0, 1.0, False, -1, -1, 0.0, None, False)
    assert [plan.problem.aligned for plan in dispatch._plans.values()] == [True, False]
