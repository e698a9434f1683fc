"""How far a result may be from the truth: computed from the rounding a right kernel cannot avoid, never typed in.

Truth is flash_attn.reference in float64 on the same low-precision inputs. Matched is the same mathematics rounded where
a kernel rounds: P, dS and the results in the input dtype, sums in float32. With e the error against the truth:

    finite
    max|e| <= 2 (max|e_matched| + eps max|ref| + noise sqrt(2 ln n)),   n elements
    rms_row(e) <= factor * (worst matched row) * size_row + noise           for every row
    |lse - ref| <= 1e-4 (1 + |ref|), and -inf exactly where the truth has it

    size_row = max(rms_row(ref), the rms of ref over the rows above the noise)
    worst matched row = max of rms_row(e_matched) / size_row, at least eps / 2

A row near zero (the first causal row of dq, a key that nobody sees, a key far down an ALiBi slope) has no relative
error of its own, so it is measured against the typical row. eps / 2 is the most that rounding a result once can add; it
matters where the matched run has too few rows for a sample, or is exact. The noise is 16 roundoffs of the accumulator
times the typical size of the summed terms: what is left where they cancel, and all there is for float32. The largest of n
normal terms is sqrt(2 ln n) times the typical one.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from flash_attn import reference
from flash_attn.backward.reference_impl import pytorch_flash_attention_backward
from tests.support.cases import Case
from tests.support.inputs import Inputs

MAX_FACTOR = 2.0
ROW_FACTOR = {"out": 1.5, "dq": 2.0, "dk": 2.0, "dv": 2.0}
LSE_TOLERANCE = 1e-4
NOISE_ROUNDOFFS = 16


@dataclass(frozen=True)
class Results:
    """out, dq, dk, dv shaped like q, q, k, v; lse: (B, H, Sq), varlen (H, total_q)."""

    out: Tensor
    lse: Tensor
    dq: Tensor
    dk: Tensor
    dv: Tensor
    dsink: Tensor | None = None  # of the truth, (H,)


@dataclass(frozen=True)
class Expected:
    """The truth and the matched run of one case."""

    reference: Results
    matched: Results
    matched_from: Callable[[Tensor, Tensor], Results]  # the matched backward from a given out and lse
    terms: dict[str, float]  # rms of the terms that sum to each result

    def check(self, **actual: Tensor) -> None:
        """`expected(...).check(out=out, lse=lse, dq=dq)`: assert_close of each.

        With out and lse at hand, once accepted, the matched backward starts from them. delta then carries the same
        rounding in both runs; in a row where one key outweighs the rest its chance differences exceed any fixed factor.
        """
        matched = self.matched
        for what in sorted(actual, key=["out", "lse", "dq", "dk", "dv"].index):
            if what.startswith("d") and matched is self.matched and {"out", "lse"} <= actual.keys():
                matched = self.matched_from(actual["out"], actual["lse"])
            ref, terms = getattr(self.reference, what), self.terms.get(what, 0.0)
            assert_close(actual[what], ref, getattr(matched, what), what, terms=terms)


def assert_dsink_close(
    dsink: Tensor, truth: Results, inputs: Inputs, out: Tensor, lse: Tensor, dlse: Tensor | None = None
) -> None:
    """Accept the gradient of the sinks when no error is larger than what those of out and lse, accepted before, make of it.

    With w = exp(sink - lse) the gradient is -sum of w (dout . out - dlse) over the rows of a head, so that errors e of out and
    lse add at most w (|dout| |e_out| + (|dout| |out| + |dlse|) |e_lse|) a row, to first order.
    """
    dout = inputs.dout.double().abs()
    ref_out, ref_lse = truth.out.abs(), truth.lse
    weights = torch.exp(inputs.sinks.double()[:, None] - ref_lse)
    size = (dout * ref_out).sum(-1).mT + (0.0 if dlse is None else dlse.double().abs())
    inherited = (dout * (out.double() - truth.out).abs()).sum(-1).mT + size * (lse.double() - ref_lse).abs()
    noise = NOISE_ROUNDOFFS * torch.finfo(torch.promote_types(out.dtype, torch.float32)).eps
    terms = weights * (1.1 * inherited + noise * size)
    budget = terms.sum(-1) if terms.dim() == 2 else terms.sum((0, 2))
    budget = budget + torch.finfo(dsink.dtype).eps * truth.dsink.abs() + torch.finfo(dsink.dtype).tiny
    error = (dsink.double() - truth.dsink).abs()
    _require(error <= budget, dsink, truth.dsink, f"dsink: error {error.max().item():.3e}", error / budget)


def assert_close(
    actual: Tensor, reference_fp64: Tensor, matched: Tensor | None, what: str, *, terms: float = 0.0
) -> None:
    """Accept a result by the rules above, or raise AssertionError with the numbers and the worst coordinate.

    Args:
        what: "out", "lse", "dq", "dk" or "dv"; chooses the rule and the factor. "lse" needs no matched run.
        terms: rms of the summed terms, for results that may cancel to nothing; `Expected.check` passes it.
    """
    if actual.shape != reference_fp64.shape:
        raise AssertionError(f"{what}: shape {tuple(actual.shape)}, expected {tuple(reference_fp64.shape)}")
    if reference_fp64.numel() == 0:
        return
    if what == "lse":
        _check_lse(actual, reference_fp64)
        return
    _require(actual.isfinite(), actual, reference_fp64, f"{what}: not finite")
    accumulator = torch.promote_types(actual.dtype, torch.float32)
    eps = torch.finfo(actual.dtype).eps
    size = reference_fp64.abs().max().item()
    noise = NOISE_ROUNDOFFS * torch.finfo(accumulator).eps * max(size, terms)
    peak = math.sqrt(2.0 * math.log(max(2, actual.numel())))
    _check_max(actual, reference_fp64, matched, what, eps * size + noise * peak)
    _check_rows(actual, reference_fp64, matched, what, eps, noise)


def _check_max(actual: Tensor, ref: Tensor, matched: Tensor, what: str, roundoff: float) -> None:
    error = (actual.double() - ref).abs()
    error_matched = (matched.double() - ref).abs().max().item()
    budget = MAX_FACTOR * (error_matched + roundoff)
    _require(
        error <= budget,
        actual,
        ref,
        f"{what}: max error {error.max().item():.3e} > {budget:.3e} (matched {error_matched:.3e})",
        error,
    )


def _check_rows(actual: Tensor, ref: Tensor, matched: Tensor, what: str, eps: float, noise: float) -> None:
    sizes = _rms(ref)
    typical = sizes[sizes > noise].square().mean().sqrt().nan_to_num(noise)
    sizes = sizes.maximum(typical).clamp_min(torch.finfo(torch.float64).tiny)
    error = _rms(actual.double() - ref) / sizes
    worst_matched = max((_rms(matched.double() - ref) / sizes).max().item(), eps / 2)
    budget = ROW_FACTOR[what] * worst_matched + noise / sizes
    _require(
        error <= budget,
        actual,
        ref,
        f"{what}: row rms error {error.max().item():.3e} > {ROW_FACTOR[what]} * {worst_matched:.3e} of the worst "
        f"matched row + {noise / sizes.min().item():.1e}",
        error / budget,
    )


def _check_lse(actual: Tensor, ref: Tensor) -> None:
    _require((actual == -math.inf) == (ref == -math.inf), actual, ref, "lse: -inf in the wrong places")
    seen = ref > -math.inf
    error = torch.where(seen, (actual.double() - ref).abs(), 0.0)
    budget = torch.where(seen, LSE_TOLERANCE * (1 + ref.abs()), 0.0)
    _require(error <= budget, actual, ref, f"lse: error {error.max().item():.3e} > 1e-4 (1 + |lse|)", error)


def _require(ok: Tensor, actual: Tensor, ref: Tensor, message: str, badness: Tensor | None = None) -> None:
    """Raise unless all of ok, quoting the values at the worst coordinate (the first bad one without badness)."""
    if ok.all():
        return
    worst = (~ok).double() if badness is None else badness.nan_to_num(nan=math.inf)
    where = tuple(int(i) for i in torch.unravel_index(worst.argmax(), worst.shape))
    raise AssertionError(
        f"{message}\n  {(~ok).sum().item()} of {ok.numel()} bad, worst at {where}: "
        f"actual {_quote(actual[where])}, expected {_quote(ref[where])}"
    )


def _quote(x: Tensor) -> str:
    values = ", ".join(f"{value:.6g}" for value in x.flatten()[:4].tolist())
    return values if x.ndim == 0 else f"[{values}, ...]" if x.numel() > 4 else f"[{values}]"


def _rms(x: Tensor) -> Tensor:
    """Over the head dimension."""
    return x.square().mean(-1).sqrt()


def expected(
    case: Case, inputs: Inputs, keep: Tensor | list[Tensor] | None = None, dlse: Tensor | None = None
) -> Expected:
    """The truth and the matched run of a case, sequence by sequence.

    Args:
        dlse: the gradient of lse, shaped like it; None is 0.
        keep: the dropout mask, (B, H, Sq, Sk); when varlen a list of (1, H, Sq, Sk). Needed when case.dropout_p > 0.
    """
    if case.dropout_p > 0.0 and keep is None:
        raise ValueError(f"{case.name}: dropout_p = {case.dropout_p} needs keep")
    parts = dense_parts(case, inputs, keep, dlse)
    truth = join(case, [_truth(case, part) for part in parts])
    saved = [_attention(case, part, part.q, part.k, part.v, **_rounding(case)) for part in parts]
    matched = join(case, [_matched(case, part, *forward) for part, forward in zip(parts, saved, strict=True)])
    q, k, v, dout = (
        _rms(x.double().flatten()).nan_to_num().item() for x in (inputs.q, inputs.k, inputs.v, inputs.dout)
    )
    # dS is a difference of terms dout v^T, of rms sqrt(D) rms(dout) rms(v); the default scale takes the sqrt(D) away.
    ds = dout * v + (0.0 if dlse is None else _rms(dlse.double().flatten()).item())
    # dk adds those of all rows, each times its weight, 1 / seqlen_k where all are alike: with one key dS is 0 but for roundoff
    per_key = [sq / sk**2 for sq, sk in zip(case.seqlens_q, case.seqlens_k, strict=True) if sk > 0]
    rows = case.nheads / case.nheads_k * max(per_key, default=0.0)
    terms = {"out": v, "dq": ds * k, "dk": ds * q * max(1.0, math.sqrt(rows)), "dv": dout}
    return Expected(truth, matched, partial(_matched_from, case, parts), terms)


@dataclass(frozen=True)
class Part:
    """One dense batch: the whole of a dense case, or one sequence of a varlen case."""

    q: Tensor
    k: Tensor
    v: Tensor
    dout: Tensor
    alibi_slopes: Tensor | None
    keep: Tensor | None
    dlse: Tensor | None
    sinks: Tensor | None


def dense_parts(
    case: Case, inputs: Inputs, keep: Tensor | list[Tensor] | None = None, dlse: Tensor | None = None
) -> list[Part]:
    """The sequences of a varlen case, or the one batch of a dense case."""
    if case.layout == "dense":
        return [Part(inputs.q, inputs.k, inputs.v, inputs.dout, inputs.alibi_slopes, keep, dlse, inputs.sinks)]
    q, dout = (x.split(case.seqlens_q) for x in (inputs.q, inputs.dout))
    k, v = (x.split(case.seqlens_k) for x in (inputs.k, inputs.v))
    slopes = [inputs.alibi_slopes] * case.batch_size if case.alibi != "bh" else inputs.alibi_slopes.split(1)
    masks = [None] * case.batch_size if keep is None else keep
    rows = [None] * case.batch_size if dlse is None else [x[None] for x in dlse.split(case.seqlens_q, dim=-1)]
    return [
        Part(q[b][None], k[b][None], v[b][None], dout[b][None], slopes[b], masks[b], rows[b], inputs.sinks)
        for b in range(case.batch_size)
    ]


def join(case: Case, results: Sequence[Results]) -> Results:
    """The results of `dense_parts` in the case's own layout."""
    if case.layout == "dense":
        return results[0]
    joined = {name: torch.cat([getattr(r, name)[0] for r in results]) for name in ("out", "dq", "dk", "dv")}
    dsink = None if results[0].dsink is None else sum(r.dsink for r in results)
    return Results(lse=torch.cat([r.lse[0] for r in results], dim=-1), dsink=dsink, **joined)


def _truth(case: Case, part: Part) -> Results:
    q, k, v = (x.detach().double().requires_grad_() for x in (part.q, part.k, part.v))
    leaves = (q, k, v)
    if part.sinks is not None:
        part = replace(part, sinks=part.sinks.detach().double().requires_grad_())
        leaves += (part.sinks,)
    out, lse = _attention(case, part, q, k, v)
    dlse = torch.zeros_like(lse) if part.dlse is None else part.dlse.double()
    gradients = torch.autograd.grad((out, lse), leaves, (part.dout.double(), dlse))
    return Results(out.detach(), lse.detach(), *gradients)


def _rounding(case: Case) -> dict[str, torch.dtype]:
    return {"compute_dtype": torch.promote_types(case.dtype, torch.float32), "round_to": case.dtype}


def _matched(case: Case, part: Part, out: Tensor, lse: Tensor) -> Results:
    gradients = pytorch_flash_attention_backward(
        part.dout,
        part.q,
        part.k,
        part.v,
        out,
        lse,
        causal=case.causal,
        window_size=case.window,
        softcap=case.softcap,
        alibi_slopes=part.alibi_slopes,
        keep=part.keep,
        dropout_p=case.dropout_p,
        dlse=part.dlse,
        **_rounding(case),
    )
    return Results(out, lse, *gradients)


def _matched_from(case: Case, parts: list[Part], out: Tensor, lse: Tensor) -> Results:
    if case.layout == "dense":
        return _matched(case, parts[0], out, lse)
    outs, lses = out.split(case.seqlens_q), lse.split(case.seqlens_q, dim=-1)
    return join(
        case,
        [_matched(case, *each) for each in zip(parts, (x[None] for x in outs), (x[None] for x in lses), strict=True)],
    )


def _attention(case: Case, part: Part, q: Tensor, k: Tensor, v: Tensor, **rounding) -> tuple[Tensor, Tensor]:
    return reference.attention(
        q,
        k,
        v,
        window=case.interval,
        softcap=case.softcap,
        alibi_slopes=part.alibi_slopes,
        keep=part.keep,
        dropout_p=case.dropout_p,
        sinks=part.sinks,
        **rounding,
    )
