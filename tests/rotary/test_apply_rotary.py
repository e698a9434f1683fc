"""apply_rotary against complex numbers in fp64: one rounding away at most, in PyTorch, in the interpreter and on the GPU."""

import subprocess
import sys
from typing import NamedTuple

import pytest
import torch

from flash_attn import backends
from flash_attn.errors import InvalidArgument, UnsupportedProblem
from flash_attn.hardware import Hardware
from flash_attn.launch import pinned
from flash_attn.launch.rotary import RotaryConfig, rotary_config
from flash_attn.ops.triton import rotary
from flash_attn.ops.triton.rotary import apply_rotary, rotate_heads
from tests.support.calls import MARKS, places, running_on
from tests.support.rotations import assert_rounded_once, bound, rotated, tables

FP16, BF16, FP32, FP64 = torch.float16, torch.bfloat16, torch.float32, torch.float64


class Case(NamedTuple):
    """Feature by feature what a call asks for; every pair of values below occurs together."""

    dtype: torch.dtype
    shape: tuple[int, int, int, int]  # batch, seqlen, nheads, headdim
    half: int
    interleaved: bool = False
    conjugate: bool = False
    inplace: bool = False
    offsets: str = "int"  # or "int32", "int64"
    table_dtype: torch.dtype | None = None

    def __str__(self):
        words = [str(self.dtype)[6:], "x".join(map(str, self.shape)), f"half{self.half}", self.offsets]
        words += [name for name in ("interleaved", "conjugate", "inplace") if getattr(self, name)]
        return "-".join(words)


CASES = [
    Case(FP16, (2, 17, 4, 64), 32),
    Case(FP16, (2, 17, 4, 64), 16, True, False, True, "int64"),
    Case(FP32, (3, 5, 1, 128), 64, True, True, False, "int32"),
    Case(FP32, (1, 1, 9, 64), 32, False, True, True, "int32"),
    Case(FP16, (2, 33, 3, 59), 10, True, True, False, "int"),
    Case(FP32, (2, 33, 3, 59), 29, False, False, True, "int64", FP16),
    Case(FP16, (4, 1, 5, 96), 24, False, False, False, "int32", FP32),
    Case(FP32, (1, 65, 2, 16), 3, True, False, True, "int"),
    Case(FP16, (1, 7, 2, 256), 128, False, True, False, "int64"),
    Case(FP32, (2, 6, 2, 2), 1, True, False, False, "int32"),
    Case(FP32, (2, 6, 3, 8), 0),
    Case(FP16, (0, 6, 3, 8), 4, False, False, False, "int32"),
    Case(FP32, (2, 0, 3, 8), 4, True, False, True),
    Case(FP16, (2, 4, 0, 8), 4),
]
# not in the interpreter, which rounds to bf16 by cutting off; fp64 is PyTorch's
MORE = [
    Case(BF16, (2, 217, 6, 128), 64, False, False, True, "int64"),
    Case(BF16, (3, 217, 6, 128), 32, True, True, False, "int", FP32),
    Case(BF16, (5, 128, 3, 80), 40, False, True, False, "int32"),
    Case(BF16, (1, 129, 16, 192), 48, True, False, True, "int32"),
    Case(FP16, (2, 1021, 7, 64), 32, True, False, False, "int64"),
]
DOUBLE = [Case(FP64, (2, 17, 3, 20), 6, True, True, False, "int32"), Case(FP64, (2, 17, 3, 20), 10, inplace=True)]
PLACED = [
    pytest.param(case, place, marks=MARKS[place], id=f"{place}-{case}")
    for place, cases in {"cpu": CASES + MORE + DOUBLE, "interpreter": CASES, "gpu": CASES + MORE + DOUBLE}.items()
    for case in cases
]


@pytest.fixture
def generator(seed):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(params=places("cpu", "interpreter", "gpu"))
def device(request):
    with running_on(request.param) as device:
        yield device


def random(generator, device, dtype, *shape):
    return torch.randn(shape, generator=generator).to(device, dtype)


def offsets_of(case, seqlen_ro, device, generator):
    if case.offsets == "int":
        return int(torch.randint(0, seqlen_ro - case.shape[1] + 1, (), generator=generator))
    dtype = getattr(torch, case.offsets)
    return torch.randint(0, seqlen_ro - case.shape[1] + 1, case.shape[:1], generator=generator, dtype=dtype).to(device)


@pytest.mark.parametrize("case, place", PLACED)
def test_dense(case, place, generator):
    with running_on(place) as device, backends.use(None if case.dtype == FP64 else backends.requested_backend()):
        batch, seqlen, _, _ = case.shape
        x = random(generator, device, case.dtype, *case.shape)
        cos, sin = tables(seqlen + 9, case.half, case.table_dtype or case.dtype, device, generator)
        offsets = offsets_of(case, seqlen + 9, device, generator)
        start = offsets[:, None].long() if isinstance(offsets, torch.Tensor) else offsets
        position = torch.arange(seqlen, device=device).expand(batch, seqlen) + start
        truth = rotated(x, cos, sin, position, case.interleaved, case.conjugate)
        operand = x.clone()
        words = dict(interleaved=case.interleaved, inplace=case.inplace, conjugate=case.conjugate)
        out = apply_rotary(operand, cos, sin, offsets, **words)
        assert (out is operand) == case.inplace and (case.inplace or torch.equal(operand, x))
        assert_rounded_once(out, truth, bound(x, cos, sin))
        assert torch.equal(out[..., 2 * case.half :], x[..., 2 * case.half :])


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("lengths", [[7, 0, 1, 12], [0, 33, 0], [20], [], [1] * 17], ids=str)
@pytest.mark.parametrize("offsets", [0, 3, "tensor"])
def test_packed(device, generator, lengths, interleaved, inplace, offsets):
    """Two more tokens before, three after the sequences: they stay as they are."""
    total, longest = sum(lengths) + 5, max(lengths, default=0)
    cu_seqlens = torch.tensor([2, *lengths]).cumsum(0, dtype=torch.int32).to(device)
    x = random(generator, device, FP16, total, 3, 24)
    cos, sin = tables(longest + 4, 8, FP16, device, generator)
    if offsets == "tensor":
        offsets = torch.randint(0, 5, (len(lengths),), generator=generator, dtype=torch.int32).to(device)
    starts = offsets.tolist() if isinstance(offsets, torch.Tensor) else [offsets] * len(lengths)
    rows = [torch.arange(n) + start for n, start in zip(lengths, starts, strict=True)]
    position = torch.cat([torch.tensor([-1] * 2), *rows, torch.tensor([-1] * 3)]).to(device)
    truth = rotated(x, cos, sin, position, interleaved)
    out = apply_rotary(x.clone(), cos, sin, offsets, cu_seqlens, longest, interleaved, inplace)
    assert_rounded_once(out, truth, bound(x, cos, sin))


@pytest.mark.filterwarnings(
    "ignore:invalid value encountered"
)  # numpy's word for infinity times 0, computed and discarded
@pytest.mark.parametrize("interleaved", [False, True])
def test_some_heads(device, generator, interleaved):
    x = random(generator, device, FP16, 2, 9, 7, 40)
    cos, sin = tables(9, 16, FP16, device, generator)
    x[:, :, 5:] = torch.inf  # as good as NaN to a product with 0
    truth = rotated(x[:, :, :5], cos, sin, torch.arange(9, device=device).expand(2, 9), interleaved)
    for inplace in (False, True):
        out = rotate_heads(x.clone(), cos, sin, interleaved=interleaved, inplace=inplace, nheads_rotated=5)
        assert_rounded_once(out[:, :, :5], truth, bound(x[:, :, :5], cos, sin))
        assert torch.equal(out[:, :, 5:], x[:, :, 5:])


STRIDES = {
    "heads-first": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "sequence-first": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "slice": lambda x: torch.nn.functional.pad(x, (3, 5), value=torch.nan)[..., 3:-5],
    "last-strided": lambda x: x.repeat_interleave(2, -1)[..., ::2],
    "dim-first": lambda x: x.transpose(1, 3).contiguous().transpose(1, 3),
}


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("strides", STRIDES)
def test_strides(device, generator, strides, inplace):
    x = STRIDES[strides](random(generator, device, FP32, 2, 6, 3, 20))
    wide = tables(8, 16, FP32, device, generator)
    for cos, sin in (wide, [t[:, :8] for t in wide], [t[:, ::2] for t in wide], [t[:1, :8].expand(8, 8) for t in wide]):
        truth = rotated(x, cos[:, :8], sin[:, :8], torch.arange(6, device=device).expand(2, 6))
        operand = x.clone(memory_format=torch.preserve_format) if strides != "slice" else STRIDES["slice"](x)
        out = apply_rotary(operand, cos[:, :8], sin[:, :8], inplace=inplace)
        assert (out is operand) == inplace
        assert_rounded_once(out, truth, bound(x, cos, sin))


def test_expanded_input(device, generator):
    x = random(generator, device, FP32, 2, 6, 1, 20).expand(2, 6, 3, 20)
    cos, sin = tables(6, 8, FP32, device, generator)
    truth = rotated(x, cos, sin, torch.arange(6, device=device).expand(2, 6))
    assert_rounded_once(apply_rotary(x, cos, sin), truth, bound(x, cos, sin))
    with pytest.raises(InvalidArgument, match=r"share one memory location, shape \(2, 6, 3, 20\)"):
        apply_rotary(x, cos, sin, inplace=True)


@pytest.mark.filterwarnings("ignore:overflow encountered")  # numpy's word for what wraps around on a GPU
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_positions_without_a_row_stay(device, generator, dtype):
    """Offsets are known on the device alone: one before the table, one past it, extremes."""
    extremes = torch.iinfo(dtype)
    offsets = torch.tensor([-2, 5, extremes.max, extremes.min, 0], dtype=dtype, device=device)
    x = random(generator, device, FP32, 5, 6, 2, 16)
    cos, sin = tables(8, 8, FP32, device, generator)
    position = torch.full((5, 6), -1)
    position[0, 2:], position[1, :3], position[4] = torch.arange(4), torch.arange(5, 8), torch.arange(6)
    truth = rotated(x, cos, sin, position.to(device))
    assert_rounded_once(apply_rotary(x, cos, sin, offsets), truth, bound(x, cos, sin))
    assert torch.equal(apply_rotary(x, cos, sin, offsets)[2:4], x[2:4])


@pytest.mark.filterwarnings("ignore:overflow encountered")  # numpy's word for what wraps around on a GPU
@pytest.mark.parametrize("contents", [[9, 3, -5, 2**31 - 1], [-(2**31), 2**31 - 1, 0, 4], [50, 50, 50, 50]])
def test_hostile_cu_seqlens_stay_inside(device, generator, contents):
    """Wrong lengths rotate by wrong angles, but read and write x, cos and sin alone: NaN surrounds them."""
    x = torch.full((40, 2, 16), torch.nan, device=device)
    x[10:30] = random(generator, device, FP32, 20, 2, 16)
    before = x.clone()
    cos, sin = tables(8, 8, FP32, device, generator)
    cos, sin = (torch.nn.functional.pad(t, (0, 0, 4, 4), value=torch.nan)[4:-4] for t in (cos, sin))
    cu_seqlens = torch.tensor(contents, dtype=torch.int32, device=device)
    offsets = torch.tensor([-3, 2, 0], device=device)
    out = apply_rotary(x[10:30], cos, sin, offsets, cu_seqlens, 8)
    assert bool(out.isfinite().all())
    apply_rotary(x[10:30], cos, sin, offsets, cu_seqlens, 8, inplace=True)
    assert torch.equal(x[10:30], out)
    torch.testing.assert_close(x[:10], before[:10], equal_nan=True)
    torch.testing.assert_close(x[30:], before[30:], equal_nan=True)


def test_a_plan_serves_every_offset_and_table_length(device, generator):
    x = random(generator, device, FP32, 1, 2, 2, 16)
    cos, sin = tables(40, 8, FP32, device, generator)
    rotary._plans.clear()
    for offset, seqlen_ro in ((0, 2), (1, 40), (16, 18), (38, 40)):
        truth = rotated(x, cos, sin, torch.arange(2, device=device)[None] + offset)
        assert_rounded_once(apply_rotary(x, cos[:seqlen_ro], sin[:seqlen_ro], offset), truth, bound(x, cos, sin))
    assert len(rotary._plans) == 1


def test_no_gradient_and_a_new_version(device, generator):
    x = random(generator, device, FP32, 1, 2, 2, 16).requires_grad_()
    cos, sin = tables(2, 8, FP32, device, generator)
    assert not apply_rotary(x, cos, sin).requires_grad
    version = x._version
    assert apply_rotary(x, cos, sin, inplace=True) is x and x._version > version
    with torch.inference_mode():
        y = torch.ones(1, 2, 2, 16, device=device)
        apply_rotary(y, cos, sin, inplace=True)
    assert torch.equal(y, apply_rotary(torch.ones_like(y), cos, sin))


@pytest.mark.parametrize("inplace", [False, True])
def test_operators(device, generator, inplace):
    x = random(generator, device, FP32, 2, 6, 2, 16)
    cos, sin = tables(9, 4, FP32, device, generator)
    operator = torch.ops.flash_attn._apply_rotary_ if inplace else torch.ops.flash_attn._apply_rotary
    offsets = torch.tensor([1, 2], device=device)
    cu_seqlens = torch.tensor([0, 3, 6], dtype=torch.int32, device=device)
    utilities = ("test_schema", "test_faketensor")
    for arguments in (
        (x, cos, sin, 1, None, None, None, True, False, None),
        (x, cos, sin, 0, offsets, None, None, False, True, 1),
        (x[0], cos, sin, 0, offsets, cu_seqlens, 3, False, False, None),
        (x.transpose(1, 3).contiguous().transpose(1, 3), cos, sin, 1, None, None, None, True, False, None),
    ):
        torch.library.opcheck(operator, arguments, test_utils=utilities)


def wrong(**words):
    """Arguments of a right call, with some replaced."""
    right = dict(x=torch.ones(2, 6, 3, 16), cos=torch.ones(8, 4), sin=torch.ones(8, 4))
    return {**right, **words}


INT = torch.tensor([0, 2, 6], dtype=torch.int32)
BAD = {
    r"rotary_dim must be <= headdim, got 18 and 16": wrong(cos=torch.ones(8, 9), sin=torch.ones(8, 9)),
    r"Only support headdim <= 256, got 257": wrong(x=torch.ones(1, 2, 1, 257)),
    r"seqlen_ro must be >= seqlen, got seqlen_ro 5 and seqlen 6": wrong(cos=torch.ones(5, 4), sin=torch.ones(5, 4)),
    r"got seqlen_offsets 3, seqlen 6 and seqlen_ro 8": wrong(seqlen_offsets=3),
    r"got seqlen_offsets -1, seqlen 6 and seqlen_ro 8": wrong(seqlen_offsets=-1),
    r"sin must have the shape of cos, \(8, 4\), got \(7, 4\)": wrong(sin=torch.ones(7, 4)),
    r"sin must have the shape of cos, \(8, 4\), got \(8, 3\)": wrong(sin=torch.ones(8, 3)),
    r"same dtype, got torch.float32 and torch.float16": wrong(sin=torch.ones(8, 4).half()),
    r"floating dtype, got torch.int64": wrong(cos=torch.ones(8, 4).long(), sin=torch.ones(8, 4).long()),
    r"x must be of a floating dtype .* got torch.int32": wrong(x=torch.ones(2, 6, 3, 16).int()),
    r"cos must have shape \(seqlen_ro, rotary_dim / 2\), got \(1, 8, 4\)": wrong(cos=torch.ones(1, 8, 4)),
    r"sin must have shape \(seqlen_ro, rotary_dim / 2\), got \(4,\)": wrong(sin=torch.ones(4)),
    r"x must have shape \(batch, seqlen, nheads, headdim\), got \(6, 3, 16\)": wrong(x=torch.ones(6, 3, 16)),
    r"with cu_seqlens, got \(2, 6, 3, 16\)": wrong(cu_seqlens=INT, max_seqlen=4),
    r"max_seqlen must be passed, got max_seqlen None": wrong(x=torch.ones(6, 3, 16), cu_seqlens=INT),
    r"seqlen_ro 8 and seqlen 9": wrong(x=torch.ones(6, 3, 16), cu_seqlens=INT, max_seqlen=9),
    r"cu_seqlens must have shape \(batch \+ 1,\), got \(1, 3\)": wrong(
        x=torch.ones(6, 3, 16), cu_seqlens=INT[None], max_seqlen=4
    ),
    r"cu_seqlens must have dtype int32 or int64, got torch.int16": wrong(
        x=torch.ones(6, 3, 16), cu_seqlens=INT.short(), max_seqlen=4
    ),
    r"seqlen_offsets must have shape \(batch,\) = \(2,\), got \(3,\)": wrong(seqlen_offsets=INT),
    r"seqlen_offsets must have dtype int32 or int64, got torch.float32": wrong(seqlen_offsets=torch.ones(2)),
    r"cos must be on the device of x, cpu, not meta": wrong(cos=torch.ones(8, 4, device="meta")),
    r"seqlen_offsets must be on the device of x, cpu, not meta": wrong(seqlen_offsets=INT[:2].to("meta")),
}


@pytest.mark.parametrize("message", BAD)
@pytest.mark.parametrize("inplace", [False, True])
def test_bad_arguments(message, inplace):
    with pytest.raises(InvalidArgument, match=message):
        apply_rotary(**BAD[message], inplace=inplace)


def test_a_known_plan_does_not_excuse_a_bad_length():
    apply_rotary(**wrong())
    for message in ("got seqlen_offsets 3, seqlen 6", "sin must have the shape of cos"):
        with pytest.raises(InvalidArgument, match=message):
            apply_rotary(**next(words for text, words in BAD.items() if message in text.replace("\\", "")))


def test_the_requested_backend_is_never_replaced():
    with (
        backends.use("portable"),
        pytest.raises(UnsupportedProblem, match="portable: float64 is not a Triton kernel dtype"),
    ):
        apply_rotary(**wrong(x=torch.ones(2, 6, 3, 16, dtype=FP64)))


def test_the_cpu_needs_no_triton():
    program = (
        "import sys, torch, flash_attn.layers.rotary as r; c = torch.ones(4, 2);"
        "r.apply_rotary_emb(torch.ones(1, 4, 1, 4, requires_grad=True), c, c).sum().backward();"
        "assert 'triton' not in sys.modules"
    )
    finished = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr


@pytest.mark.parametrize("fault", ["next-position", "sign", "pairs", "one-row", "one-ulp"])
def test_the_bound_notices_faults(fault, generator):
    device = torch.device("cpu")
    x = random(generator, device, FP16, 2, 6, 2, 16)
    cos, sin = tables(9, 8, FP16, device, generator)
    position = torch.arange(6).expand(2, 6)
    truth = rotated(x, cos, sin, position)
    faulty = {
        "next-position": rotated(x, cos, sin, position + 1),
        "sign": rotated(x, cos, sin, position, conjugate=True),
        "pairs": rotated(x, cos, sin, position, interleaved=True),
        "one-row": torch.where(torch.arange(6)[:, None, None] == 3, x.double(), truth),
        "one-ulp": truth * (1 + torch.finfo(FP16).eps),
    }[fault]
    with pytest.raises(AssertionError, match="wrong"):
        assert_rounded_once(faulty.half(), truth, bound(x, cos, sin))


H200 = Hardware("cuda", "sm_90", 132, 227 * 1024)


@pytest.mark.parametrize("tokens", [1, 3, 64, 1000, 1 << 20])
@pytest.mark.parametrize("nheads", [1, 5, 32])
@pytest.mark.parametrize("width", [1, 16, 128, 256])
def test_launch_configurations(tokens, nheads, width):
    config = rotary_config(width, tokens, nheads, H200)
    programs = -(-tokens // config.block_m) * -(-nheads // config.block_h)
    assert config.block_m * width <= 2048 and config.block_m < 2 * tokens and config.num_warps in (1, 2, 4)
    assert programs >= 132 or (config.block_m, config.block_h) == (1, 1)


def test_a_pinned_configuration_counts():
    with pinned(rotary=RotaryConfig(2, 1, 1)):
        assert rotary_config(128, 1 << 20, 32, H200) == RotaryConfig(2, 1, 1)


def test_the_kernel_has_upstreams_name():
    pytest.importorskip("triton")
    from flash_attn.kernels.portable.rotary import rotary_kernel

    assert rotary.rotary_kernel is rotary_kernel
    with pytest.raises(AttributeError, match="no_such_kernel"):
        rotary.no_such_kernel  # noqa: B018
