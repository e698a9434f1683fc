"""What a machine's user wants to know before trusting the package: do clients accept it, are its results right.

Results as values; `python -m flash_attn` prints them.
"""

import importlib
import importlib.metadata
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

import flash_attn
from flash_attn import reference
from flash_attn.backward.reference_impl import pytorch_flash_attention_backward


def version(distribution: str) -> str | None:
    """Version of an installed distribution, without importing it."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def release(text: str) -> tuple[int, ...]:
    """(2, 8, 3) of "2.8.3+plus.1"."""
    return tuple(int(part) for part in text.partition("+")[0].split(".") if part.isdigit())


def distribution_version(lowest: str, above: str | None = None) -> str | None:
    """Why the installed distribution's version is not in [lowest, above), or None."""
    found = version("flash-attn")
    if found is None:
        return "no distribution named flash-attn is installed; `pip install .` here makes one"
    if release(found) < release(lowest) or (above is not None and release(found) >= release(above)):
        return f"it wants a version from {lowest}{f' below {above}' if above else ''}, found {found}"
    return None


def missing_name(module: str, *names: str) -> str | None:
    """Which of the names a module lacks, or None."""
    try:
        lacking = [name for name in names if not hasattr(importlib.import_module(module), name)]
    except ImportError as error:
        return f"importing {module} fails: {error}"
    return f"{module} lacks {', '.join(lacking)}" if lacking else None


def transformers_gate(device: torch.device) -> str | None:
    owners = importlib.metadata.packages_distributions().get("flash_attn", [])
    if "flash-attn" not in [name.replace("_", "-") for name in owners]:
        return f"flash_attn must belong to a distribution flash-attn, it belongs to {owners or 'none'}"
    if device.type not in ("cuda", "mlu"):
        return f"its flash_attention_2 needs a CUDA, ROCm or MLU device, and this is {device.type}"
    return distribution_version("2.3.3")


def diffusers_gate(device: torch.device) -> str | None:
    names = ("flash_attn_func", "_wrapped_flash_attn_forward", "_wrapped_flash_attn_backward")
    return distribution_version("2.6.3") or missing_name("flash_attn.flash_attn_interface", *names)


def xformers_gate(device: torch.device) -> str | None:
    if not (2, 7, 1) <= release(flash_attn.__version__) <= (2, 8, 4):
        return f"it wants flash_attn.__version__ from 2.7.1 to 2.8.4, found {flash_attn.__version__}"
    return missing_name("flash_attn.flash_attn_interface", "flash_attn_gpu")


def transformer_engine_gate(device: torch.device) -> str | None:
    return distribution_version("2.1.1", "2.8.4") or missing_name("flash_attn_2_cuda", "varlen_bwd")


def yunchang_gate(device: torch.device) -> str | None:
    if flash_attn.__version__ < "2.6.3":
        return f"it compares versions as strings, and {flash_attn.__version__!r} < '2.6.3'"
    return missing_name("flash_attn.flash_attn_interface", "_flash_attn_forward", "_flash_attn_backward")


GATES: dict[str, Callable[[torch.device], str | None]] = {
    "transformers": transformers_gate,
    "diffusers": diffusers_gate,
    "xformers": xformers_gate,
    "transformer-engine": transformer_engine_gate,
    "yunchang": yunchang_gate,
}


class Check(NamedTuple):
    """A small problem; several lengths make it a packed batch."""

    name: str
    dtype: torch.dtype
    seqlens_q: tuple[int, ...]
    seqlens_k: tuple[int, ...]
    nheads: int
    nheads_k: int
    headdim: int
    causal: bool = False
    window_size: tuple[int, int] = (-1, -1)
    softcap: float = 0.0
    alibi: bool = False
    dropout_p: float = 0.0


CHECKS = [
    Check("causal", torch.float16, (128,), (128,), 8, 8, 64, causal=True),
    Check("packed, causal", torch.float16, (64,) * 4, (64,) * 4, 4, 4, 64, causal=True),
    Check("packed, unequal, shared heads", torch.bfloat16, (17, 0, 60), (40, 5, 33), 6, 2, 64, causal=True),
    Check("rows without keys", torch.bfloat16, (70,), (33,), 2, 1, 128, causal=True),
    Check("window, softcap", torch.bfloat16, (100,), (150,), 4, 2, 80, window_size=(30, 5), softcap=5.0),
    Check("ALiBi, dropout", torch.float16, (100,), (100,), 4, 4, 32, causal=True, alibi=True, dropout_p=0.2),
    Check("single precision", torch.float32, (97,), (97,), 4, 2, 40, causal=True),
    Check("double precision", torch.float64, (33,), (50,), 2, 2, 16, window_size=(9, -1), softcap=2.0),
]

Results = dict[str, Tensor]


def error_shares(check: Check, device: torch.device) -> dict[str, float]:
    """The error of each result divided by the largest one allowed."""
    q, dout = (torch.randn(sum(check.seqlens_q), check.nheads, check.headdim).to(check.dtype) for _ in range(2))
    k, v = (torch.randn(sum(check.seqlens_k), check.nheads_k, check.headdim).to(check.dtype) for _ in range(2))
    slopes = 0.3 * torch.rand(check.nheads) if check.alibi else None
    actual, keep = run(check, device, q, k, v, dout, slopes)
    truth = specification(check, q, k, v, dout, slopes, keep, None)
    matched = specification(check, q, k, v, dout, slopes, keep, check.dtype)
    return {
        what: lse_share(actual[what], truth[what])
        if what == "lse"
        else share(actual[what], truth[what], matched[what], 1.5 if what == "out" else 2.0)
        for what in actual
    }


def run(
    check: Check, device: torch.device, q: Tensor, k: Tensor, v: Tensor, dout: Tensor, slopes: Tensor | None
) -> tuple[Results, Tensor | None]:
    """The package's results on the device, and which weights dropout kept."""
    leaves = [x.to(device).requires_grad_() for x in (q, k, v)]
    options: dict[str, Any] = dict(
        dropout_p=check.dropout_p,
        causal=check.causal,
        window_size=check.window_size,
        softcap=check.softcap,
        alibi_slopes=None if slopes is None else slopes.to(device),
        return_attn_probs=True,
    )
    if len(check.seqlens_q) == 1:
        q_b, k_b, v_b = (x[None] for x in leaves)
        out, lse, scores = flash_attn.flash_attn_func(q_b, k_b, v_b, **options)
        out, lse = out[0], lse[0]
    else:
        for side, seqlens in (("q", check.seqlens_q), ("k", check.seqlens_k)):
            options[f"cu_seqlens_{side}"] = torch.tensor([0, *seqlens]).cumsum(0).int().to(device)
            options[f"max_seqlen_{side}"] = max(seqlens)
        q_t, k_t, v_t = leaves
        out, lse, scores = flash_attn.flash_attn_varlen_func(q_t, k_t, v_t, **options)
    gradients = torch.autograd.grad(out, leaves, dout.to(device))
    keep = (scores >= 0)[:, :, : q.shape[0], : k.shape[0]].cpu() if check.dropout_p > 0.0 else None
    results = (out.detach(), lse.detach(), *gradients)
    return dict(zip(("out", "lse", "dq", "dk", "dv"), (x.cpu() for x in results), strict=True)), keep


def specification(
    check: Check,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dout: Tensor,
    slopes: Tensor | None,
    keep: Tensor | None,
    round_to: torch.dtype | None,
) -> Results:
    """The reference in float64, or rounding to a dtype where a kernel rounds."""
    work = torch.float64 if round_to is None else torch.promote_types(round_to, torch.float32)
    same: dict[str, Any] = dict(softcap=check.softcap, alibi_slopes=slopes, keep=keep, dropout_p=check.dropout_p)
    same |= dict(compute_dtype=work, round_to=round_to)
    left, right = (None if side < 0 else side for side in check.window_size)
    parts = []
    packed = zip(
        q.split(check.seqlens_q), k.split(check.seqlens_k), v.split(check.seqlens_k), dout.split(check.seqlens_q),
        strict=True,
    )  # fmt: skip
    for sequence in packed:
        q_b, k_b, v_b, dout_b = (x[None].to(work) for x in sequence)
        out, lse = reference.attention(q_b, k_b, v_b, window=(left, 0 if check.causal else right), **same)
        gradients = pytorch_flash_attention_backward(
            dout_b, q_b, k_b, v_b, out, lse, check.causal, None, check.window_size, **same
        )
        parts.append((out[0], lse[0].mT, *(gradient[0] for gradient in gradients)))
    joined = dict(zip(("out", "lse", "dq", "dk", "dv"), map(torch.cat, zip(*parts, strict=True)), strict=True))
    return joined | {"lse": joined["lse"].mT}


def share(actual: Tensor, truth: Tensor, matched: Tensor, row_factor: float) -> float:
    """Largest error and largest row's rms error, each divided by its budget.

    max|e| <= 2 (max|e_matched| + eps max|truth| + noise); rms_row(e) <= row_factor worst matched row + noise, relative
    to the row's size. The noise is 64 roundoffs of the accumulator: all there is where nothing is rounded on the way.
    """
    eps = torch.finfo(actual.dtype).eps
    size = truth.abs().max().item()
    noise = 64 * torch.finfo(torch.promote_types(actual.dtype, torch.float32)).eps * max(size, 1.0)
    error, error_matched = (actual.double() - truth).abs(), (matched.double() - truth).abs()
    largest = error.max().item() / (2 * (error_matched.max().item() + eps * size + noise))
    sizes = rms(truth).maximum(rms(truth).square().mean().sqrt())
    worst_matched = max((rms(error_matched) / sizes).max().item(), eps / 2)
    row = (rms(error) / sizes / (row_factor * worst_matched + noise / sizes)).max().item()
    return max(largest, row) if actual.isfinite().all() else float("inf")


def lse_share(actual: Tensor, truth: Tensor) -> float:
    """|e| <= 1e-4 (1 + |truth|), and -inf exactly where the truth has it."""
    seen = truth > -torch.inf
    if not torch.equal(actual > -torch.inf, seen):
        return float("inf")
    error = (actual.double() - truth).abs() / (1e-4 * (1 + truth.abs()))
    return error[seen].nan_to_num(torch.inf).max().item()


def rms(x: Tensor) -> Tensor:
    """Over the last dimension."""
    return x.double().square().mean(-1).sqrt()
