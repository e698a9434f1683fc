"""Every kind of call compiles for every architecture: into its shared memory, within its spill budget, on its tensor cores."""

import pytest
import torch

triton = pytest.importorskip("triton")
from triton.experimental import gluon  # noqa: E402
from triton.experimental.gluon import language as gl  # noqa: E402

from flash_attn.kernels.algebra.arguments import Dropout, Pages, Score, Sequences, Tensor, Window  # noqa: E402
from flash_attn.kernels.algebra.dropout import (  # noqa: E402
    drop,
    drop_backward,
    drop_marked,
    keep_mask,
    kept_scale,
    load_key,
    mark_dropped,
    tile_bits,
)
from flash_attn.kernels.algebra.interval import (  # noqa: E402
    block_bounds,
    hide,
    key_blocks,
    key_interval,
    query_interval,
    visible,
)
from flash_attn.kernels.algebra.locate import locate_keys, row_base, row_statistic, sequence_base  # noqa: E402
from flash_attn.kernels.algebra.score import (  # noqa: E402
    gradient_scale,
    key_distance,
    load_slope,
    score_backward,
    score_forward,
    unit_log2,
)
from flash_attn.kernels.algebra.softmax import (  # noqa: E402
    lowest_max,
    lse_log2,
    softmax_backward,
    softmax_delta,
    softmax_finish,
    softmax_pivot,
    softmax_rescale,
    softmax_step,
    softmax_step_bounded,
    softmax_weights,
)
from flash_attn.kernels.algebra.span import Span, load_span  # noqa: E402
from tests.compile import variants  # noqa: E402
from tests.compile.budgets import BUDGETED, budget  # noqa: E402
from tests.compile.variants import Variant  # noqa: E402
from tests.support.stub_driver import ARCHITECTURES, Launch, compiling_for  # noqa: E402

pytestmark = [
    pytest.mark.compile,
    pytest.mark.skipif(triton.knobs.runtime.interpret, reason="needs TRITON_INTERPRET unset"),
]

DIRECTIONS = ("forward", "backward")
OTHERS = [arch for arch in ARCHITECTURES if arch != "sm_90"]


def both(*words, **more) -> list[Variant]:
    return [Variant(direction, *words, **more) for direction in DIRECTIONS]


def hopper() -> list[Variant]:
    """The measured launches: both tables, for the head dims that models use."""
    return [
        variant
        for headdim in (64, 128, 256)
        for causal, long in ((False, True), (True, True), (True, False))
        for variant in both("sm_90", headdim, causal=causal, long=long)
    ]


def features() -> list[Variant]:
    kinds = [name for name in variants.FEATURES if name not in ("plain", "paged", "sinks", "lse_gradient")]
    contained = ("gqa", "softcap", "alibi")  # in others that need more registers
    archs = ("sm_90", "sm_80", "gfx942")
    found = [
        variant
        for arch in archs
        for name in kinds
        if arch == "sm_90" or name not in contained
        for variant in both(arch, 128, feature=name)
    ]
    found += [Variant("forward", arch, 128, feature=name) for arch in archs for name in ("paged", "sinks")]
    found += [Variant("backward", arch, 128, feature="lse_gradient") for arch in archs]
    found += [Variant("forward", "sm_90", headdim, feature="sinks", long=True) for headdim in (64, 128, 256)]
    found += [Variant("backward", "sm_90", headdim, feature="lse_gradient", long=True) for headdim in (64, 128, 256)]
    return found + [variant for name in ("gqa", "everything") for variant in both("sm_90", 64, feature=name)]


def single_precision() -> list[Variant]:
    smallest = [v for arch in ("sm_86", "gfx942") for headdim in (64, 128, 256) for v in both(arch, headdim, "float32")]
    return [*smallest, *both("sm_90", 128, "float32")]


def odd_head_dims() -> list[Variant]:
    hopper = [v for headdim in (16, 40, 59, 96, 192) for v in both("sm_90", headdim)]
    return hopper + [v for arch in ("sm_80", "gfx942") for v in both(arch, 40)]


def other_architectures() -> list[Variant]:
    """sm_89 runs the instructions of sm_86, so one head dim shows that it compiles."""
    found = [
        v for arch in OTHERS for headdim in (64, 128) for v in both(arch, headdim) if (arch, headdim) != ("sm_89", 64)
    ]
    return found + [v for arch in ("sm_80", "sm_86", "gfx942", "gfx1100") for v in both(arch, 256)]


def one_launch() -> list[Variant]:
    """All gradients at once, which small problems take up to head dim 128."""
    found = [
        Variant("one_launch", "sm_90", headdim, causal=causal) for headdim in (64, 128) for causal in (False, True)
    ]
    kinds = ("scores", "dropout", "varlen", "lse_gradient", "everything")
    found += [Variant("one_launch", "sm_90", 128, feature=name) for name in kinds]
    found += [Variant("one_launch", arch, 64, feature="everything") for arch in ("sm_90", "sm_80", "gfx942", "gfx1100")]
    found += [Variant("one_launch", "sm_90", headdim) for headdim in (40, 96)]
    found += [Variant("one_launch", arch, 64, "float32") for arch in ("sm_90", "gfx942")]
    found += [Variant("one_launch", arch, 128) for arch in ("sm_80", "sm_120", "gfx90a", "gfx950")]
    return [*found, Variant("one_launch", "gfx1100", 64)]


VARIANTS = [*hopper(), *features(), *single_precision(), *odd_head_dims(), *other_architectures(), *one_launch()]


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_variant(variant, tmp_path):
    architecture = ARCHITECTURES[variant.arch]
    with compiling_for(variant.arch, str(tmp_path)) as launches:
        variants.launch(variant, architecture.hardware)
    found = [fault for launch in launches for fault in faults(variant, launch, architecture.shared_memory)]
    assert launches
    assert variant.direction != "one_launch" or [launch.kernel for launch in launches] == ["attn_bwd_kernel"]
    if found:
        pytest.fail("\n".join(found), pytrace=False)


def faults(variant: Variant, launch: Launch, shared_memory: int) -> list[str]:
    """What is wrong with one launch, in words."""
    report, found = launch.report, []
    allowed = budget(launch.kernel, variant.arch, variant.pad, _kind(variant))
    if BUDGETED and report.spill_bytes > allowed.spill_bytes:
        found.append(f"spills {report.spill_bytes} bytes of {allowed.spill_bytes} ({allowed.reason})")
    if report.shared_memory > shared_memory:
        found.append(f"needs {report.shared_memory} bytes of shared memory of {shared_memory}")
    if not _on_tensor_cores(variant, launch):
        found.append("does not use the tensor cores")
    if (report.tma > 0) != (launch.descriptors > 0):
        found.append(f"{report.tma} TMA copies from {launch.descriptors} tensor descriptors")
    if not allowed.serialised:
        found += report.warnings
    found += launch.short_of_buffers
    return [f"{launch.kernel} {words}: {report}" for words in found]


def _kind(variant: Variant) -> str:
    """What a budget may depend on besides kernel, architecture and head dim."""
    if variant.dtype != "bfloat16":
        return variant.dtype
    return "odd" if variant.headdim != variant.pad else variant.feature


def _on_tensor_cores(variant: Variant, launch: Launch) -> bool:
    report = launch.report
    if variant.dtype == "float32" and variant.arch.startswith("sm_"):
        return report.wgmma + report.mma + report.tcgen05 == 0  # exact fp32 products have no tensor cores
    if variant.arch == "sm_90":
        return report.wgmma > 0
    if variant.arch == "sm_100":
        return report.tcgen05 + report.mma > 0
    return (report.mma if variant.arch.startswith("sm_") else report.mfma) > 0


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("headdim", [64, 128])
def test_long_dense_calls_use_tensor_descriptors(direction, headdim, tmp_path):
    with compiling_for("sm_90", str(tmp_path)) as launches:
        variants.launch(Variant(direction, "sm_90", headdim, long=True), ARCHITECTURES["sm_90"].hardware)
    assert all(launch.report.tma > 0 for launch in launches)


@pytest.mark.parametrize("direction", [*DIRECTIONS, "one_launch"])
@pytest.mark.parametrize("feature", ["plain", "varlen"])
def test_lengths_share_a_binary(direction, feature, tmp_path, monkeypatch):
    """Lengths, window sizes and numbers of heads vary from call to call and are not compiled in."""
    with compiling_for("sm_90", str(tmp_path)) as launches:
        lengths = ((256, 8), (320, 12), (511, 4)) if direction == "one_launch" else ((256, 8), (320, 16), (1023, 24))
        for seqlen, nheads in lengths:
            monkeypatch.setattr(variants, "SHORT", seqlen)
            monkeypatch.setattr(variants, "NHEADS", nheads)
            variants.launch(Variant(direction, "sm_90", 64, feature=feature), ARCHITECTURES["sm_90"].hardware)
    kernels = {launch.kernel for launch in launches}
    assert len(launches) == 3 * len(kernels)
    assert len({id(launch.compiled) for launch in launches}) == len(kernels)


SIZE = 64


@gluon.jit
def probe_kernel(
    x, out, lengths, sequences, pages, score, dropout, left, right,
    FUNCTION: gl.constexpr, SIZE: gl.constexpr, WARP: gl.constexpr,
):  # fmt: skip
    layout: gl.constexpr = gl.BlockedLayout([1, 4], [WARP // 8, 8], [4, 1], [1, 0])
    rows = gl.arange(0, SIZE, layout=gl.SliceLayout(1, layout))
    cols = gl.arange(0, SIZE, layout=gl.SliceLayout(0, layout))
    offsets = rows[:, None] * SIZE + cols[None, :]
    tile = gl.load(x + offsets)
    row_values = gl.load(x + rows)
    span = Span(0, 0, gl.load(lengths), gl.load(lengths + 1))
    window = Window(left, right)
    batch = gl.program_id(0)
    if FUNCTION == "key_interval":
        lo, hi = key_interval(rows, span, window)
        tile += (hi - lo)[:, None]
    elif FUNCTION == "query_interval":
        lo, hi = query_interval(cols, span, window)
        tile += (hi - lo)[None, :]
    elif FUNCTION == "visible":
        tile = gl.where(visible(rows[:, None], cols[None, :], span, window), tile, 0.0)
    elif FUNCTION == "hide":
        lo, hi = key_interval(rows, span, window)
        tile = hide(tile, cols[None, :], lo[:, None], hi[:, None], window)
    elif FUNCTION == "key_blocks":
        begin, full_begin, full_end, end = key_blocks(batch, batch + 1, span, window, 16)
        tile += begin + full_begin + full_end + end
    elif FUNCTION == "block_bounds":
        begin, full_begin, full_end, end = block_bounds(batch, batch + 1, batch + 2, batch + 3, 16)
        tile += begin + full_begin + full_end + end
    elif FUNCTION == "score_forward":
        slope = load_slope(score, batch, 0)
        tile = score_forward(tile, key_distance(rows[:, None], cols[None, :], span), score, slope) * unit_log2(score)
    elif FUNCTION == "score_backward":
        tile = score_backward(tile, tile, tile, score) * gradient_scale(score)
    elif FUNCTION == "softmax_step":
        weights, rescale, row_max, row_sum = softmax_step(row_values, row_values, tile, 1.0)
        inverse_sum, lse = softmax_finish(row_max, row_sum, 1.0, score.sinks, batch)
        tile = weights * (rescale * inverse_sum + lse)[:, None]
    elif FUNCTION == "softmax_step_bounded":
        weights, row_sum = softmax_step_bounded(row_values, tile, 1.0)
        tile = weights + (row_sum - lowest_max(score))[:, None]
    elif FUNCTION == "softmax_pivot":
        pivot = softmax_pivot(row_values, 1.0)
        tile = softmax_weights(tile, 1.0, pivot[:, None]) * softmax_rescale(row_values, 1.0, pivot)[:, None]
    elif FUNCTION == "softmax_weights":
        weights = softmax_weights(tile, 1.0, lse_log2(row_values)[:, None])
        row_delta = softmax_delta(row_values, row_values, lse_log2(row_values))
        tile = softmax_backward(weights, tile, row_delta[:, None])
    elif FUNCTION == "drop":
        key = load_key(dropout, batch)
        bits = tile_bits(dropout, key, batch * SIZE, rows[:, None], batch * SIZE, cols[None, :])
        marked = mark_dropped(dropout, bits, tile)
        tile = drop_marked(marked) + drop_backward(dropout, marked, tile)
        tile = gl.where(keep_mask(dropout, bits), tile, drop(dropout, bits, tile)) * kept_scale(dropout)
    elif FUNCTION == "load_span":
        found = load_span(sequences, False, batch, 8, 8, 8, 8)
        tile += found.start_q + found.start_k + found.seqlen_q + found.seqlen_k
    elif FUNCTION == "locate_keys":
        page, slot, valid = locate_keys(pages, batch, rows, rows < span.seqlen_k)
        tile += gl.where(valid, page + slot, 0)[:, None]
    elif FUNCTION == "sequence_base":
        operand = Tensor(x, SIZE * SIZE, SIZE, SIZE)
        tile += gl.load(sequence_base(operand, batch, 0, span.start_q) + offsets)
        statistic = row_statistic(x, sequences, 4, SIZE)
        tile += gl.load(row_base(statistic, batch, 0, span.start_q) + rows)[:, None]
    gl.store(out + offsets, tile)


FUNCTIONS = (
    "key_interval", "query_interval", "visible", "hide", "key_blocks", "block_bounds", "score_forward", "score_backward",
    "softmax_step", "softmax_step_bounded", "softmax_pivot", "softmax_weights", "drop", "load_span", "locate_keys",
    "sequence_base",
)  # fmt: skip


def _meta(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


@pytest.mark.parametrize("arch", ["sm_90", "gfx942"])
def test_gluon_calls_every_algebra_function(arch, tmp_path):
    indices = _meta(8, dtype=torch.int32)
    with compiling_for(arch, str(tmp_path)) as launches:
        for function in FUNCTIONS:
            probe_kernel[(1,)](
                _meta(SIZE, SIZE),
                _meta(SIZE, SIZE),
                indices,
                Sequences(indices, indices, indices, indices, 3),
                Pages(indices, 4, 4, 16, 8, 4),
                Score(0.1, softcap=30.0, alibi_slopes=_meta(4), stride_alibi_b=0, negative=1, sinks=_meta(4)),
                Dropout(_meta(2, dtype=torch.int64), 60000, 1.1),
                5,
                0,
                FUNCTION=function,
                SIZE=SIZE,
                WARP=ARCHITECTURES[arch].target.warp_size,
                num_warps=4,
            )
    assert len(launches) == len(FUNCTIONS)
    assert all(launch.report.spill_bytes == 0 for launch in launches)


def test_the_probe_covers_the_algebra():
    """A new device function belongs into the probe, unless another one there calls it."""
    from flash_attn.kernels.algebra import dropout, interval, locate, score, softmax, span

    modules = (interval, score, softmax, dropout, span, locate)
    functions = {
        function.__name__: function.src
        for module in modules
        for function in vars(module).values()
        if isinstance(function, triton.JITFunction) and function.__module__ == module.__name__
    }
    callers = {name: source for name, source in functions.items() if f"{name}(" in probe_kernel.src}
    reached = {name for name in functions for caller in callers if name != caller and f"{name}(" in callers[caller]}
    second = {name for name in functions for caller in reached if name != caller and f"{name}(" in functions[caller]}
    assert functions.keys() - callers.keys() - reached - second == set()
