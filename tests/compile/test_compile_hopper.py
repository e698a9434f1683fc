"""Every launch of the Hopper forward compiles: on its tensor cores and tile copies, unserialised, within its budgets.

Registers are those of the launch, 64K over its threads; what a consumer may use is in its configuration, and ptxas spills
where that is too little.
"""

import re
from dataclasses import dataclass
from itertools import cycle
from unittest import mock

import pytest
import torch

triton = pytest.importorskip("triton")

from flash_attn import launch  # noqa: E402
from flash_attn.backends import hopper  # noqa: E402
from flash_attn.backends.base import Operands  # noqa: E402
from flash_attn.launch.hopper import (  # noqa: E402
    FORWARD,
    FOUR_CONSUMERS,
    FOUR_SKIPPING,
    MEDIUM,
    MEDIUM_CAUSAL,
    SHORT,
    SHORT_CAUSAL,
    THREE_SKIPPING,
    TILES_TOGETHER,
    TWO_CONSUMERS,
    TWO_DROPPING,
    TWO_IN_TURN,
    TWO_PARTS,
    TWO_SKIPPING,
    TWO_SKIPPING_Q,
    head_dim_pad,
    hopper_forward_config,
)
from flash_attn.problem import AttentionProblem, describe  # noqa: E402
from flash_attn.problem_kvcache import CacheTensors, describe_cache  # noqa: E402
from tests.compile.budgets import HOPPER_BUDGETED, hopper_budget  # noqa: E402
from tests.support.stub_driver import ARCHITECTURES, Launch, compiling_for  # noqa: E402

pytestmark = [
    pytest.mark.compile,
    pytest.mark.skipif(triton.knobs.runtime.interpret, reason="needs TRITON_INTERPRET unset"),
]

ARCHITECTURE = ARCHITECTURES["sm_90"]
NHEADS = 8
LONG = 2 * MEDIUM_CAUSAL

# What a call asks for besides the mask; each entry is a set of features that compile together.
FEATURES = {
    "plain": (),
    "gqa": ("gqa",),
    "left": ("left",),
    "band": ("left", "right"),
    "narrow": ("narrow",),
    "wide": ("wide",),
    "softcap": ("softcap",),
    "alibi": ("alibi",),
    "varlen": ("varlen", "gqa"),
    "seqused_k": ("varlen", "seqused_k"),
    "leftpad_k": ("varlen", "leftpad_k"),
    "sinks": ("sinks", "gqa"),
    "dropout": ("dropout",),
    "pages": ("varlen", "gqa", "pages"),
    "cache": ("cache", "gqa", "seqused_k"),
    "cache_pages": ("cache", "gqa", "seqused_k", "pages"),
    "cache_small_pages": ("cache", "gqa", "seqused_k", "pages", "small"),
    "cache_index": ("cache", "leftpad_k", "index"),
    "everything": ("varlen", "gqa", "left", "softcap", "alibi", "seqused_k", "leftpad_k", "sinks", "dropout"),
}


@dataclass(frozen=True)
class Variant:
    """One kind of call."""

    headdim: int
    causal: bool
    feature: str = "plain"  # of FEATURES
    dtype: str = "bfloat16"
    seqlen: int = LONG

    def __str__(self) -> str:
        mask, length = "causal" if self.causal else "full", "" if self.seqlen == LONG else str(self.seqlen)
        return "-".join(filter(None, (f"d{self.headdim}", self.dtype, mask, self.feature, length)))


def variants() -> list[Variant]:
    """Every row of the launch tables as it is; then every feature, in turn over the rows and the dtypes."""
    rows = [(headdim, causal, LONG) for headdim in FORWARD for causal in (False, True)]
    rows += [(64, True, SHORT_CAUSAL), (64, True, MEDIUM_CAUSAL), (64, False, MEDIUM)]
    rows += [(64, True, SHORT), (128, True, SHORT)]
    plain = [Variant(headdim, causal, seqlen=seqlen) for headdim, causal, seqlen in rows]
    turns, dtypes = cycle(rows), cycle(("float16", "bfloat16"))
    features = [name for name in FEATURES if name != "plain"]
    mixed = [
        Variant(headdim, causal and feature != "band", feature, next(dtypes), seqlen)
        for feature in features
        for headdim, causal, seqlen in (next(turns),)
    ]
    heaviest = [Variant(headdim, True, "everything") for headdim in FORWARD]
    sinks = [Variant(headdim, causal, "sinks", seqlen=seqlen) for headdim, causal, seqlen in rows[1::2]]
    odd = [Variant(headdim, True) for headdim in (40, 80, 96, 160, 192)]
    odd += [Variant(headdim, True, feature) for headdim in (96, 192) for feature in ("softcap", "alibi", "everything")]
    masks = [Variant(headdim, True, "narrow") for headdim in (64, 128)]
    masks += [
        Variant(64, False, "left"),
        Variant(64, True, "left"),
        Variant(64, True, "wide"),
        Variant(64, False, "softcap"),
    ]
    paged = [Variant(headdim, causal, "cache_pages", seqlen=seqlen) for headdim, causal, seqlen in rows[::3]]
    paged += [Variant(headdim, True, "cache_small_pages") for headdim in (*FORWARD, 192)]
    dropped = [Variant(headdim, causal, "dropout") for headdim in FORWARD for causal in (False, True)]
    return list(dict.fromkeys([*plain, *mixed, *heaviest, *sinks, *odd, *masks, *paged, *dropped]))


def operands_of(variant: Variant, batch_size: int = 2) -> tuple[AttentionProblem, Operands]:
    """A call of the variant's kind, on the meta device."""
    features, dtype = FEATURES[variant.feature], getattr(torch, variant.dtype)
    nheads_k = NHEADS // 4 if "gqa" in features else NHEADS
    packed = "varlen" in features
    tokens = (batch_size * variant.seqlen,) if packed else (batch_size, variant.seqlen)
    q = _meta(*tokens, NHEADS, variant.headdim, dtype=dtype)
    page = 16 if "small" in features else 256
    pages = variant.seqlen // page
    rows = (batch_size + 1, variant.seqlen + 13) if "index" in features else tokens
    places = (batch_size * pages, page) if "pages" in features else rows
    k, v = (_meta(*places, nheads_k, variant.headdim, dtype=dtype) for _ in range(2))
    table = _meta(batch_size, 1 if "index" in features else pages, dtype=torch.int32)
    cu_seqlens = _meta(batch_size + 1, dtype=torch.int32) if packed else None
    optional = {
        "alibi_slopes": _meta(NHEADS) if "alibi" in features else None,
        "cu_seqlens_q": cu_seqlens,
        "cu_seqlens_k": cu_seqlens,
        "seqused_k": _meta(batch_size, dtype=torch.int32) if "seqused_k" in features else None,
        "leftpad_k": _meta(batch_size, dtype=torch.int32) if "leftpad_k" in features else None,
    }
    if "pages" in features or "index" in features:
        optional["block_table"] = table
    left, right = (1000 if side in features else -1 for side in ("left", "right"))
    left = {"narrow": 64, "wide": 2000}.get(variant.feature, left)
    dropout_p = 0.1 if "dropout" in features else 0.0
    softcap = 30.0 if "softcap" in features else 0.0
    longest = dict(max_seqlen_q=variant.seqlen, max_seqlen_k=variant.seqlen)
    sinks = _meta(NHEADS, dtype=dtype) if "sinks" in features else None
    if "cache" in features:
        return _cache_operands(variant, q, k, v, optional)
    problem, *lengths = describe(
        q, k, v, dropout_p, 0.1, variant.causal, left, right, softcap, **optional, **longest, sinks=sinks
    )
    if dropout_p > 0.0:
        optional["rng_state"] = _meta(2, dtype=torch.int64)
    return problem, Operands(q, k, v, 0.1, *lengths, problem.window, softcap, dropout_p, **optional, sinks=sinks)


def _cache_operands(variant, q, k, v, optional) -> tuple[AttentionProblem, Operands]:
    """Over a cache, with as many new tokens as queries."""
    names = dict(cache_seqlens="seqused_k", cache_leftpad="leftpad_k")
    tensors = {name: optional.get(source) for name, source in names.items()}
    if "index" in FEATURES[variant.feature]:
        tensors["cache_batch_idx"] = optional["block_table"][:, 0]
    else:
        tensors["block_table"] = optional.get("block_table")
    problem, *lengths = describe_cache(q, k, v, CacheTensors(**tensors), 0.1, variant.causal, -1, -1, 0.0, 0)
    words = optional | dict(appended=q.shape[1])
    return problem, Operands(q, k, v, 0.1, *lengths, problem.window, **words)


def compile_forward(*calls: tuple[AttentionProblem, Operands], cache_dir) -> list[Launch]:
    """What the backend launches for the calls; streams and devices do not exist."""
    with (
        compiling_for("sm_90", str(cache_dir)) as launches,
        mock.patch.object(hopper.devices, "of", lambda device: ARCHITECTURE.hardware),
        mock.patch.object(hopper, "tile_counter", lambda device: _meta(2, dtype=torch.int32)),
    ):
        for problem, operands in calls:
            assert hopper.unsupported(problem, ARCHITECTURE.hardware) is None
            hopper.forward(problem, operands)
    return launches


def faults(variant: Variant, found: Launch) -> list[str]:
    """What is wrong with a launch, in words."""
    report, allowed = found.report, hopper_budget(head_dim_pad(variant.headdim), variant.feature)
    wrong = list(report.warnings)
    if report.wgmma == 0:
        wrong.append("does not use the tensor cores")
    if report.tma == 0:
        wrong.append("does not copy tiles")
    if HOPPER_BUDGETED and report.spill_bytes > allowed.spill_bytes:
        wrong.append(f"spills {report.spill_bytes} bytes of {allowed.spill_bytes} ({allowed.reason})")
    if report.shared_memory > ARCHITECTURE.shared_memory:
        wrong.append(f"needs {report.shared_memory} bytes of shared memory of {ARCHITECTURE.shared_memory}")
    return [f"{words}: {report}" for words in wrong]


@pytest.mark.parametrize("variant", variants(), ids=str)
def test_variant(variant, tmp_path):
    (found,) = compile_forward(operands_of(variant), cache_dir=tmp_path)
    if wrong := faults(variant, found):
        pytest.fail("\n".join(wrong), pytrace=False)


def test_the_variants_cover_the_tables_and_the_features():
    """Every configuration, feature and dtype."""
    chosen = {
        hopper_forward_config(operands_of(variant)[0])._replace(tiles_together=TILES_TOGETHER) for variant in variants()
    }
    configs = {*FORWARD.values(), TWO_CONSUMERS, TWO_IN_TURN, TWO_DROPPING, FOUR_CONSUMERS}
    configs |= {TWO_PARTS, TWO_SKIPPING, TWO_SKIPPING_Q, THREE_SKIPPING, FOUR_SKIPPING}
    assert chosen == {config._replace(tiles_together=TILES_TOGETHER) for config in configs}
    assert {variant.feature for variant in variants()} == set(FEATURES)
    assert {variant.dtype for variant in variants()} == {"float16", "bfloat16"}


@pytest.mark.parametrize("feature", ["plain", "varlen"])
def test_lengths_share_a_binary(feature, tmp_path, monkeypatch):
    """Lengths and numbers of heads are not compiled in."""
    calls = []
    for seqlen, batch_size, nheads in ((4096, 2, 8), (4112, 1, 16), (8192, 3, 24), (4100, 2, 8), (5003, 3, 40)):
        monkeypatch.setitem(globals(), "NHEADS", nheads)
        calls.append(operands_of(Variant(64, False, feature, seqlen=seqlen), batch_size))
    assert len({id(found.compiled) for found in compile_forward(*calls, cache_dir=tmp_path)}) == 1


def test_consumers_have_their_registers(tmp_path):
    """setmaxnreg raises each consumer to what its configuration says, and lowers the loading warp."""
    for variant in (Variant(64, False), Variant(128, False)):
        problem, operands = operands_of(variant)
        config = hopper_forward_config(problem)
        (found,) = compile_forward((problem, operands), cache_dir=tmp_path)
        ptx = found.compiled.asm["ptx"]
        assert f"setmaxnreg.inc.sync.aligned.u32 \t{config.registers};" in re.sub(r"\s+(\d+;)", r" \t\1", ptx)
        assert found.compiled.metadata.num_warps == 4 * (config.consumers + 1)


def test_one_pipeline_without_overlap_at_any_head_dim(tmp_path):
    """A pinned configuration reaches the kernel."""
    problem, operands = operands_of(Variant(128, True))
    config = hopper_forward_config(problem)._replace(overlap=False)
    with launch.pinned(hopper_forward=config):
        (serial,) = compile_forward((problem, operands), cache_dir=tmp_path)
    (overlapped,) = compile_forward((problem, operands), cache_dir=tmp_path)
    assert serial.report.shared_memory < overlapped.report.shared_memory


def _meta(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")
