"""The gradients of the Hopper backend compile for sm_90: unserialised, with few spills, within shared memory."""

from typing import Any
from unittest import mock

import pytest
import torch

from flash_attn import hardware as devices
from flash_attn import launch
from flash_attn.backends import hopper
from flash_attn.backends.base import Gradients
from flash_attn.launch.hopper import CROWDED, ONE_PASS, TWO_PASS
from tests.compile import variants
from tests.compile.budgets import HOPPER_BUDGETED
from tests.compile.variants import Variant
from tests.support.stub_driver import ARCHITECTURES, Launch, compiling_for

ARCHITECTURE = ARCHITECTURES["sm_90"]

# Bytes a thread may spill, by (kernel, padded head dim, feature); None stands for any, the first match counts.
BUDGETS: dict[tuple[str | None, int | None, str | None], tuple[int, str]] = {
    ("attn_bwd_kernel", None, "scores"): (
        400,
        "all score features at once; each alone keeps the loop within 100 bytes",
    ),
    ("attn_bwd_kernel", 64, "softcap"): (160, "tanh beside the weights: 20 accesses in a loop of 1100 instructions"),
    ("attn_bwd_kernel", 64, "alibi"): (160, "12 accesses in a loop of 1000 instructions"),
    ("attn_bwd_kernel", 64, "dropout"): (
        480,
        "69 accesses in a loop of 1900 instructions; measured on the H200: 20 to 27 % faster than two passes",
    ),
    ("attn_bwd_kernel", 128, "dropout"): (176, "11 accesses in a loop of 1400 instructions"),
    ("attn_bwd_dq_kernel", 128, "dropout"): (128, "around the loop"),
    ("attn_bwd_dkdv_kernel", 256, "dropout"): (576, "around the loop, where dk is stored"),
    ("attn_bwd_kernel", 128, "varlen"): (176, "one stage of K and V: 12 accesses in loops of 500 to 900 instructions"),
    ("attn_bwd_kernel", 128, None): (144, "one stage of K and V: around the loop; none inside"),
    ("attn_bwd_dkdv_kernel", 128, "scores"): (512, "all score features at once"),
    ("attn_bwd_dq_kernel", 64, "scores"): (448, "all score features at once"),
    ("attn_bwd_dq_kernel", 256, "alibi"): (512, "up to 26 accesses in loops of 500 to 750 instructions"),
    ("attn_bwd_dq_kernel", 256, None): (448, "around the loop, where out is multiplied by dout; none inside"),
    ("attn_bwd_dkdv_kernel", 256, None): (512, "around the loop, where dk is stored; none inside"),
}
DEFAULT = 64, "registers spilled around a loop cost nothing that can be measured"


def budget(kernel: str, pad: int, feature: str) -> tuple[int, str]:
    facts = kernel, pad, feature
    for pattern, found in BUDGETS.items():
        if all(wanted is None or wanted == fact for wanted, fact in zip(pattern, facts, strict=True)):
            return found
    return DEFAULT


KINDS = {  # of the sum of dq: whether causal, and features
    "any order": [
        (True, "plain"),
        (True, "scores"),
        (True, "softcap"),
        (True, "alibi"),
        (False, "plain"),
        (True, "varlen"),
        (False, "lse_gradient"),
        (True, "dropout"),
    ],
    "in order": [(True, "plain"), (True, "scores"), (True, "varlen")],
    "two passes": [(True, "plain"), (True, "scores"), (True, "dropout")],
}


def backward_variants() -> list[tuple[Variant, str]]:
    parts = [(headdim, "float16", True) for headdim in (80, 96, 160, 192)]  # head dims whose products have two parts
    found = [(Variant("backward", "sm_90", *part, long=True), "any order") for part in parts]
    for headdim in (64, 128, 256):
        for form in KINDS if headdim <= 128 else ["any order"]:  # at head dim 256 all are two passes
            found += [(Variant("backward", "sm_90", headdim, "bfloat16", *kind, True), form) for kind in KINDS[form]]
    return found


def compile_backward(variant: Variant, form: str, cache_dir: str) -> list[Launch]:
    """What the backend launches for the variant; streams and devices do not exist."""
    problem, operands = variants.operands_of(variant)
    q, k, v, *_ = operands
    statistic = (q.shape[1], q.shape[0]) if q.dim() == 3 else (q.shape[0], q.shape[2], q.shape[1])
    softmax_lse = torch.empty(statistic, device="meta")
    gradients = Gradients(*map(torch.empty_like, (q, k, v)))
    if problem.lse_gradient:
        operands = operands._replace(dlse=softmax_lse)
    counter = torch.empty(2, dtype=torch.int32, device="meta")
    with (
        compiling_for("sm_90", cache_dir) as launches,
        mock.patch.object(devices, "of", lambda device: ARCHITECTURE.hardware),
        mock.patch.object(hopper, "tile_counter", lambda device: counter),
        launch.pinned(**pins(variant, form)),
    ):
        problem = problem._replace(deterministic=form != "any order")
        hopper.backward(problem, operands, torch.empty_like(q), torch.empty_like(q), softmax_lse, gradients)
    return launches


@pytest.mark.parametrize("variant, form", backward_variants(), ids=str)
def test_backward(variant, form, tmp_path):
    launches = compile_backward(variant, form, str(tmp_path))
    passes = {launch.kernel for launch in launches}
    assert passes == ({"attn_bwd_dq_kernel", "attn_bwd_dkdv_kernel"} if two_passes(variant, form) else ONE_PASS_KERNELS)
    for found in launches:
        report, (spills, reason) = found.report, budget(found.kernel, variant.pad, variant.feature)
        assert not report.warnings, f"{found.kernel}: {report}"
        assert not HOPPER_BUDGETED or report.spill_bytes <= spills, (
            f"{found.kernel} may spill {spills} bytes ({reason}): {report}"
        )
        assert report.shared_memory <= ARCHITECTURE.shared_memory, f"{found.kernel}: {report}"
        assert (report.wgmma > 0) == (report.tma > 0) == (found.kernel not in AROUND), f"{found.kernel}: {report}"


@pytest.mark.parametrize("headdim, feature", [(128, "plain"), (64, "varlen"), (256, "plain")])
def test_lengths_share_binaries(headdim, feature, tmp_path, monkeypatch):
    """Lengths and numbers of heads are not compiled in."""
    variant, launches = Variant("backward", "sm_90", headdim, "bfloat16", True, feature, True), []
    for seqlen, nheads in ((4096, 8), (5003, 12)):
        monkeypatch.setattr(variants, "LONG", seqlen)
        monkeypatch.setattr(variants, "NHEADS", nheads)
        launches += compile_backward(variant, "any order", str(tmp_path))
    assert len({id(found.compiled) for found in launches}) == len(launches) // 2


AROUND = {"attn_bwd_rows_kernel", "attn_bwd_convert_kernel"}
ONE_PASS_KERNELS = {"attn_bwd_kernel"} | AROUND


FEATURES_THAT_CROWD = {"softcap": 1, "alibi": 1, "dropout": 1, "scores": 2}


def pins(variant: Variant, form: str) -> dict[str, Any]:
    """The configuration of a form that the sizes of a variant do not ask for by themselves."""
    if two_passes(variant, form):
        features = FEATURES_THAT_CROWD.get(variant.feature, 0)
        return {"hopper_backward": TWO_PASS[variant.pad][features >= CROWDED[variant.pad]]}
    if form == "in order":
        return {"hopper_backward": ONE_PASS[variant.pad]} if variant.causal else {}
    early = variant.pad == 64 and not variant.causal
    return {"hopper_backward": ONE_PASS[64]._replace(ahead=True)} if early else {}


def two_passes(variant: Variant, form: str) -> bool:
    return form == "two passes" or variant.pad == 256 or (variant.pad == 64 and variant.feature == "scores")
