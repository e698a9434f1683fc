"""Every kind of call over a cache compiles for every architecture: append, decode with its merge, forward over pages."""

from dataclasses import dataclass
from unittest import mock

import pytest
import torch

triton = pytest.importorskip("triton")

from flash_attn.backends import portable  # noqa: E402
from flash_attn.backends.base import Append, Operands  # noqa: E402
from flash_attn.backends.launcher import Launcher  # noqa: E402
from flash_attn.problem import describe  # noqa: E402
from flash_attn.problem_kvcache import CacheTensors, describe_cache  # noqa: E402
from tests.compile.budgets import BUDGETED, cache_budget  # noqa: E402
from tests.support.stub_driver import ARCHITECTURES, Launch, compiling_for  # noqa: E402

pytestmark = [
    pytest.mark.compile,
    pytest.mark.skipif(triton.knobs.runtime.interpret, reason="needs TRITON_INTERPRET unset"),
]

BATCH_SIZE, ROOM = 4, 8192


@dataclass(frozen=True)
class Variant:
    """One kind of call on one architecture."""

    arch: str
    headdim: int
    dtype: str = "bfloat16"
    seqlen_q: int = 1
    nheads: int = 32
    nheads_k: int = 8
    page: int = 0
    batch_idx: bool = False
    leftpad: bool = False
    new: bool = False
    rotary: str = ""  # "interleaved" or "halves"
    scores: bool = False  # window, softcap and ALiBi
    sinks: bool = False
    num_splits: int = 0
    batch_size: int = BATCH_SIZE
    room: int = ROOM

    def __str__(self) -> str:
        words = [self.arch, f"d{self.headdim}", self.dtype, f"q{self.seqlen_q}", f"h{self.nheads}.{self.nheads_k}"]
        words += [f"page{self.page}"] * bool(self.page) + ["idx"] * self.batch_idx + ["leftpad"] * self.leftpad
        words += [f"b{self.batch_size}"] * (self.batch_size != BATCH_SIZE)
        words += ["new"] * self.new + [self.rotary] * bool(self.rotary)
        return "-".join([*words, *["scores"] * self.scores, *["sinks"] * self.sinks])


def launch(variant: Variant) -> None:
    """Everything that the portable backend launches for the variant, on the meta device."""
    dtype = getattr(torch, variant.dtype)
    batch, seqlen_q, headdim = variant.batch_size, variant.seqlen_q, variant.headdim
    rows = (batch * variant.room // variant.page, variant.page) if variant.page else (batch, variant.room)
    q = _meta(batch, seqlen_q, variant.nheads, headdim, dtype=dtype)
    k_cache = _meta(*rows, variant.nheads_k, headdim, dtype=dtype)
    new = _meta(batch, seqlen_q, variant.nheads_k, headdim, dtype=dtype) if variant.new else None
    angles = _meta(variant.room, max(16, headdim // 16 * 16) // 2, dtype=dtype) if variant.rotary else None
    indices = _meta(batch, dtype=torch.int32)
    table = _meta(batch, variant.room // variant.page, dtype=torch.int32) if variant.page else None
    leftpad = indices if variant.leftpad else None
    batch_idx = indices if variant.batch_idx else None
    slopes = _meta(variant.nheads) if variant.scores else None
    softcap, left = (30.0, 300) if variant.scores else (0.0, -1)
    sinks = _meta(variant.nheads, dtype=dtype) if variant.sinks else None
    tensors = CacheTensors(new, new, angles, angles, indices, batch_idx, leftpad, table, slopes, sinks)
    problem, seqlen_q, room = describe_cache(
        q, k_cache, k_cache, tensors, 0.1, True, left, -1, softcap, variant.num_splits
    )
    operands = Operands(
        q, k_cache, k_cache, 0.1, seqlen_q, room, problem.window, softcap, alibi_slopes=slopes, seqused_k=indices,
        leftpad_k=leftpad, block_table=indices[:, None] if variant.batch_idx else table,
        appended=seqlen_q if variant.new else 0, sinks=sinks,
    )  # fmt: skip
    append = Append(new, new, angles, angles, variant.rotary == "interleaved") if variant.new else None
    hardware = ARCHITECTURES[variant.arch].hardware
    with mock.patch.object(portable, "hardware_of", lambda device: hardware):
        portable.attend_cache(problem, operands, append, variant.num_splits)


def _meta(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def features(arch: str) -> list[Variant]:
    return [
        Variant(arch, 128, new=True, rotary="halves"),
        Variant(arch, 128, page=16, new=True, rotary="interleaved"),
        Variant(arch, 128, page=256, new=True),
        Variant(arch, 128, page=24, leftpad=True),
        Variant(arch, 128, batch_idx=True, leftpad=True),
        Variant(arch, 128, scores=True, num_splits=4),
        Variant(arch, 128, sinks=True, num_splits=1),
        Variant(arch, 128, sinks=True, num_splits=4),
        Variant(arch, 128, seqlen_q=1024, sinks=True),
        Variant(arch, 128, seqlen_q=8),
        Variant(arch, 128, seqlen_q=16, page=16),
        Variant(arch, 128, seqlen_q=1024, page=16),
        Variant(arch, 128, seqlen_q=1024, batch_idx=True),
    ]


def shapes(arch: str) -> list[Variant]:
    return [
        Variant(arch, 64, nheads=64),
        Variant(arch, 64, nheads_k=32),
        Variant(arch, 96, page=16),
        Variant(arch, 256),
    ]


VARIANTS = [
    *(v for arch in ("sm_90", "sm_80", "gfx942") for v in (*features(arch), *shapes(arch))),
    *(Variant("sm_90", d, seqlen_q=16, page=p) for d in (64, 256) for p in (0, 16)),
    *(Variant("sm_90", d, seqlen_q=n, page=p, batch_size=64) for d in (64, 128, 256) for n in (1, 16) for p in (0, 16)),
    *(Variant("sm_90", d, seqlen_q=128, nheads=8, page=p, scores=not p) for d in (16, 64, 128, 256) for p in (0, 16)),
    Variant("sm_90", 128, nheads_k=32),
    Variant("sm_90", 256, page=16),
    Variant("sm_90", 40, new=True, rotary="halves"),
    Variant("sm_90", 59, page=16),
    *(Variant(arch, d, "float32", new=True, rotary="halves") for arch in ("sm_90", "sm_86") for d in (64, 128, 256)),
    Variant("gfx942", 128, "float32"),
    Variant("sm_90", 128, "float16", new=True, rotary="interleaved", page=64),
    *(Variant(arch, d, page=p) for arch in ("sm_86", "sm_100", "sm_120", "gfx1100") for d in (64, 128, 256) for p in (0, 16)),
    Variant("sm_89", 128),
    Variant("gfx90a", 128),
    Variant("gfx950", 128),
]  # fmt: skip


def launch_few_queries(arch: str, headdim: int, page: int, batch_size: int, longest: int) -> None:
    """A decoding step of packed queries over packed keys, or with `page` over pages."""
    tokens = (batch_size * longest // page, page) if page else (batch_size * longest,)
    q = _meta(batch_size, 32, headdim, dtype=torch.bfloat16)
    k = _meta(*tokens, 8, headdim, dtype=torch.bfloat16)
    ends = _meta(batch_size + 1, dtype=torch.int32)
    table = _meta(batch_size, longest // page, dtype=torch.int32) if page else None
    optional = dict(cu_seqlens_q=ends, cu_seqlens_k=ends, block_table=table)
    words = dict(max_seqlen_q=1, max_seqlen_k=longest)
    problem, *lengths = describe(q, k, k, 0.0, 0.1, True, -1, -1, 0.0, **optional, **words)
    operands = Operands(q, k, k, 0.1, *lengths, problem.window, 0.0, **optional)
    with mock.patch.object(portable, "hardware_of", lambda device: ARCHITECTURES[arch].hardware):
        portable.forward(problem, operands)


@pytest.mark.parametrize(
    "arch, headdim", [*(("sm_90", d) for d in (40, 64, 128, 256)), ("sm_80", 128), ("gfx942", 128)]
)
@pytest.mark.parametrize("page", [0, 16])
def test_few_queries(page, headdim, arch, tmp_path):
    """One step with and one without splits."""
    with compiling_for(arch, str(tmp_path)) as launches:
        launch_few_queries(arch, headdim, page, batch_size=1, longest=8192)
        launch_few_queries(arch, headdim, page, batch_size=512, longest=256)
    assert [each.kernel for each in launches] == [
        "attn_decode_split_kernel", "attn_decode_merge_kernel", "attn_decode_split_kernel"
    ]  # fmt: skip
    variant = Variant(arch, headdim, page=page)
    assert not [fault for each in launches for fault in faults(variant, each)]


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_cache_variant(variant, tmp_path):
    with compiling_for(variant.arch, str(tmp_path)) as launches:
        launch(variant)
    found = [fault for each in launches for fault in faults(variant, each)]
    kernels = {each.kernel for each in launches}
    assert ("kv_append_kernel" in kernels) == variant.new
    assert kernels & {"attn_decode_split_kernel", "attn_fwd_kernel"}
    if found:
        pytest.fail("\n".join(found), pytrace=False)


def faults(variant: Variant, launch: Launch) -> list[str]:
    """What is wrong with one launch, in words."""
    report, found = launch.report, []
    budget = cache_budget(launch.kernel, variant.arch, variant.headdim, variant.dtype)
    if BUDGETED and report.spill_bytes > budget.spill_bytes:
        found.append(f"spills {report.spill_bytes} bytes of {budget.spill_bytes} ({budget.reason})")
    if report.shared_memory > ARCHITECTURES[variant.arch].shared_memory:
        found.append(f"needs {report.shared_memory} bytes of shared memory")
    products = report.wgmma + report.mma + report.tcgen05 + report.mfma
    attends = launch.kernel in ("attn_decode_split_kernel", "attn_fwd_kernel")
    exact = variant.dtype == "float32" and variant.arch.startswith("sm_")
    if attends and (products > 0) == exact:
        found.append("does not use the tensor cores" if not exact else "rounds fp32 on tensor cores")
    aligned = variant.headdim % 16 == 0  # the compiler knows of strides whether 16 divides them
    if attends and aligned and variant.arch == "sm_90" and report.cp_async == 0:
        found.append("does not load asynchronously")
    return [f"{launch.kernel} {words}: {report}" for words in [*found, *report.warnings, *launch.short_of_buffers]]


@pytest.mark.parametrize("feature", features("sm_90"), ids=str)
def test_compiled_kernels_are_called_in_their_signatures_order(feature, monkeypatch):
    """Later launches pass everything by position, which only a GPU would notice to be wrong."""
    bound: list[Launcher] = []
    monkeypatch.setattr(Launcher, "_dispatch", lambda self, tensors, numbers, aligned: bound.append((self, tensors)))
    launch(feature)
    for launcher, tensors in bound:
        arguments = launcher.build([0] * len(tensors))
        names = launcher.kernel.arg_names
        assert names[len(arguments) :] == list(launcher.constants)
        assert len(launcher.kinds) <= len(arguments)
        for argument, kind in zip(arguments, launcher.kinds, strict=False):
            assert kind is None or argument is None or len(argument) == len(kind._fields)


@pytest.mark.parametrize("arch, chained", [("sm_80", False), ("sm_90", True), ("sm_120", True), ("gfx942", False)])
def test_kernels_that_may_start_early_wait_first(arch, chained, tmp_path, monkeypatch):
    """Before they read anything; where the hardware cannot start them early, nothing asks for it."""
    early: dict[str, bool] = {}
    bind = Launcher.__init__

    def note(self, kernel, *arguments):
        bind(self, kernel, *arguments)
        early[kernel.__name__] = early.get(kernel.__name__, False) or self.early

    monkeypatch.setattr(Launcher, "__init__", note)
    with compiling_for(arch, str(tmp_path)) as launches:
        launch(Variant(arch, 64, page=16, new=True, rotary="halves", num_splits=64))
    assert early == {each.kernel: chained for each in launches} and len(early) == 3
    for each in launches:
        assembly = each.compiled.asm["ptx" if "ptx" in each.compiled.asm else "amdgcn"]
        wait, read = assembly.find("griddepcontrol.wait"), assembly.find("ld.global")
        assert 0 < wait < read if chained else wait < 0


def binaries(launches: list[Launch]) -> dict[str, int]:
    """Kernel -> how many different binaries of it were made."""
    kernels: dict[str, set[int]] = {}
    for each in launches:
        kernels.setdefault(each.kernel, set()).add(id(each.compiled))
    return {kernel: len(found) for kernel, found in kernels.items()}


def test_lengths_and_batches_share_a_binary(tmp_path):
    """Caches grow, batches change, pages are added: nothing is compiled anew."""
    with compiling_for("sm_90", str(tmp_path)) as launches:
        for batch_size, room, num_splits in ((4, 8192, 3), (3, 4096 + 64, 16), (17, 512, 33)):
            launch(Variant("sm_90", 64, page=16, new=True, num_splits=num_splits, batch_size=batch_size, room=room))
    assert binaries(launches) == {"kv_append_kernel": 1, "attn_decode_split_kernel": 1, "attn_decode_merge_kernel": 1}


@pytest.mark.parametrize("pages", [(4, 8, 24, 48), (128, 256, 512)])
def test_page_sizes_share_binaries(pages, tmp_path):
    """Those that a block may cross, and those that hold whole blocks; where a block is whole pages, their number counts."""
    with compiling_for("sm_90", str(tmp_path)) as launches:
        for page in pages:
            launch(Variant("sm_90", 64, page=page, room=1536))
    assert binaries(launches)["attn_decode_split_kernel"] <= 2  # one for multiples of 16, one for the others
