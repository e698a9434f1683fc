"""Device time of several implementations, checked first and then interleaved launch by launch.

Launches alternate between providers inside one loop, in a new order each time, so that clock and temperature hit all of them
alike; the median and quartiles of single launches are reported. The cache is cold, and inputs rotate among several sets.
"""

import math
import random
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.cases import Case
from benchmarks.providers import Inputs, Provider, canonical_window, launch, make_inputs

ERROR_BOUND = {"bfloat16": 1e-2, "float16": 3e-3, "float32": 1e-4}  # relative two-norm of each result
DROPOUT_BIAS_BOUND = 0.05  # dropout is unbiased; a forgotten rescale by 1 - p = 0.9 would be off by 0.1
CACHE_BYTES = 60 * 2**20  # last-level cache of the largest device of interest
MAX_INPUT_SETS = 8
FILLER_BYTES = 2**30  # 0.3 ms on an H200, more than the host takes for any call
FP64_SCORES = 2**28  # larger slices are checked in fp32
MIN_ROUNDS, MAX_ROUNDS = 7, 200


class Result(NamedTuple):
    """One provider on one case: a time, or the reason why there is none."""

    case: Case
    provider: str
    median_ms: float | None = None
    quartiles_ms: tuple[float, float] | None = None
    launches: int = 0
    error: float | None = None  # against the reference on slices; with dropout the bias
    refused: str | None = None
    clock_mhz: int | None = None  # streaming multiprocessors, read while the launches ran

    @property
    def tflops(self) -> float | None:
        return self.case.flops / self.median_ms / 1e9 if self.median_ms else None


class Slice(NamedTuple):
    """One key head of one sequence with its query heads, and the right results for it."""

    index_q: tuple[int | slice, ...]
    index_k: tuple[int | slice, ...]
    expected: tuple[Tensor, ...]  # (out,) or (dq, dk, dv)


class Contender(NamedTuple):
    """A provider ready to be timed on a case: one launch for every input set."""

    case: Case
    provider: Provider
    launches: list[Callable[[], tuple[Tensor, ...]]]
    error: float


def measure_group(
    cases: Sequence[Case], providers: Sequence[Provider], device: torch.device, budget_s: float
) -> list[Result]:
    """Checks and times every provider on every case of one group in a single interleaved loop."""
    results: list[Result] = []
    contenders: list[Contender] = []
    for case in cases:
        input_sets = [make_inputs(case, device, seed) for seed in range(count_input_sets(case))]
        slices = expected_slices(case, input_sets[0])
        for provider in providers:
            ready = prepare(case, provider, input_sets, slices, device)
            if isinstance(ready, Contender):
                contenders.append(ready)
            else:
                results.append(Result(case, provider.name, refused=ready))
    return results + time_contenders(contenders, device, budget_s * max(1, len(cases)))


def time_contenders(contenders: Sequence[Contender], device: torch.device, budget_s: float) -> list[Result]:
    """Medians and quartiles of one interleaved loop over all of them."""
    results: list[Result] = []
    times, clock = interleave(contenders, device, budget_s)
    for contender, samples in zip(contenders, times, strict=True):
        low, median, high = statistics.quantiles(samples, n=4, method="inclusive")
        results.append(
            Result(
                contender.case,
                contender.provider.name,
                median_ms=significant(median),
                quartiles_ms=(significant(low), significant(high)),
                launches=len(samples),
                error=significant(contender.error),
                clock_mhz=clock,
            )
        )
    return results


def significant(value: float) -> float:
    """Five digits, which is more than a measurement holds."""
    return float(f"{value:.5g}")


def count_input_sets(case: Case) -> int:
    """Enough sets that a rotation does not find its operands in the cache."""
    tokens_q, tokens_k = case.tokens
    element = torch.finfo(getattr(torch, case.dtype)).bits // 8
    operand_bytes = element * case.headdim * (tokens_q * case.nheads + 2 * tokens_k * case.nheads_k)
    return min(MAX_INPUT_SETS, max(1, math.ceil(2 * CACHE_BYTES / max(operand_bytes, 1))))


def prepare(
    case: Case, provider: Provider, input_sets: Sequence[Inputs], slices: Sequence[Slice], device: torch.device
) -> Contender | str:
    """A checked contender, or the sentence that says why this provider is not timed."""
    reason = provider.unsupported(case, device)
    if reason is not None:
        return reason
    try:
        launches = [launch(provider, case, inputs) for inputs in input_sets]
        with provider.scope(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # SDPA warns about each backend that it was told not to use
            error = relative_error(case, launches[0](), slices)
    except Exception as failure:  # noqa: BLE001 - one provider's failure must not lose the others' results
        words = str(failure).strip().splitlines() or [""]
        return f"{type(failure).__name__}: {words[0]}"
    bound = DROPOUT_BIAS_BOUND if case.dropout_p else ERROR_BOUND[case.dtype]
    if not error < bound:
        return f"wrong result: error {error:.2e}, allowed {bound:.0e}"
    return Contender(case, provider, launches, error)


def expected_slices(case: Case, inputs: Inputs) -> list[Slice]:
    """The first and the last key head of the first and the last sequence, by the reference in higher precision."""
    last = (len(case.sequences) - 1, case.nheads_k - 1)
    return [_expected_slice(case, inputs, sequence, head_k) for sequence, head_k in dict.fromkeys(((0, 0), last))]


def _expected_slice(case: Case, inputs: Inputs, sequence: int, head_k: int) -> Slice:
    from flash_attn import reference

    group = case.nheads // case.nheads_k
    heads = slice(head_k * group, (head_k + 1) * group)
    index_q = (*_sequence_index(case, sequence), heads)
    index_k = (*_sequence_index(case, sequence), slice(head_k, head_k + 1))
    seqlen_q, seqlen_k = case.sequences[sequence]
    k, v = inputs.k, inputs.v
    if inputs.block_table is not None:
        index_k = (slice(None), index_k[-1])
        k, v = (x[inputs.block_table[sequence].long()].flatten(0, 1) for x in (k, v))
    precise = torch.float64 if seqlen_q * seqlen_k * group <= FP64_SCORES else torch.float32
    backward = case.direction == "backward"
    operands = [
        tensor.detach()[index].to(precise).unsqueeze(0).requires_grad_(backward)
        for tensor, index in ((inputs.q, index_q), (k, index_k), (v, index_k))
    ]
    slopes, sinks = inputs.alibi_slopes, inputs.sinks
    out = reference.attention(
        *operands,
        softmax_scale=case.headdim**-0.5,
        window=canonical_window(case),
        softcap=case.softcap,
        alibi_slopes=None if slopes is None else slopes[heads],
        sinks=None if sinks is None else sinks.detach()[heads],
        compute_dtype=precise,
    )[0]
    if not backward:
        return Slice(index_q, index_k, (out[0],))
    gradients = torch.autograd.grad(out, operands, inputs.dout[index_q].to(precise).unsqueeze(0))
    return Slice(index_q, index_k, tuple(gradient[0] for gradient in gradients))


def _sequence_index(case: Case, sequence: int) -> tuple[int | slice, ...]:
    """Index of one sequence's queries in a dense or packed tensor, up to its head dimension; of its keys, outside pages."""
    if case.layout == "dense":
        return (sequence, slice(None))
    start = sum(length for length, _ in case.sequences[:sequence])
    return (slice(start, start + case.sequences[sequence][0]),)


def relative_error(case: Case, results: tuple[Tensor, ...], slices: Sequence[Slice]) -> float:
    """Worst relative two-norm over results and slices; with dropout the worst deviation of the projection from 1."""
    distance = projection_bias if case.dropout_p else two_norm_error
    errors = []
    for part in slices:
        indices = (part.index_q,) if len(results) == 1 else (part.index_q, part.index_k, part.index_k)
        for result, index, want in zip(results, indices, part.expected, strict=True):
            errors.append(distance(result.detach()[index].to(want.dtype), want))
    return math.nan if any(map(math.isnan, errors)) else max(errors)


def two_norm_error(got: Tensor, want: Tensor) -> float:
    return ((got - want).norm() / want.norm()).item()


def projection_bias(got: Tensor, want: Tensor) -> float:
    """abs(<got, want> / <want, want> - 1) over the middle half of the sequence.

    Under a causal mask the first rows and keys are the largest and see the fewest weights, so that a single dropped one
    moves the sum over all of them by percents.
    """
    quarter = want.shape[0] // 4
    got, want = (x[quarter : x.shape[0] - quarter] for x in (got, want))
    return abs((got * want).sum().item() / want.square().sum().item() - 1.0)


def interleave(
    contenders: Sequence[Contender], device: torch.device, budget_s: float
) -> tuple[list[list[float]], int | None]:
    """Milliseconds of every launch of every contender, in alternation, and the clock while they ran."""
    if not contenders:
        return [], None
    filler = torch.empty(FILLER_BYTES, dtype=torch.uint8, device=device) if device.type == "cuda" else None
    _run_round(contenders, 0, device, filler)
    synchronize(device)
    start = time.perf_counter()
    _run_round(contenders, 1, device, filler)
    synchronize(device)
    rounds = budget_s / max(time.perf_counter() - start, 1e-6)
    rounds = max(MIN_ROUNDS, min(MAX_ROUNDS, int(rounds)))
    marks = [_run_round(contenders, index, device, filler) for index in range(rounds)]
    clock = read_clock(device)
    synchronize(device)
    return [[_elapsed_ms(*marks[index][place]) for index in range(rounds)] for place in range(len(contenders))], clock


Mark = torch.cuda.Event | float


def _run_round(
    contenders: Sequence[Contender], index: int, device: torch.device, filler: Tensor | None
) -> list[tuple[Mark, Mark]]:
    """One launch of each, in an order of the round's own.

    On a GPU the filler is written before each: launches find the cache cold, the clock not lowered by the one before (by up to
    5 %, H200, 2026-11-29), and an end of the queue that the host has had time to reach.
    """
    marks: dict[int, tuple[Mark, Mark]] = {}
    for place in random.Random(index).sample(range(len(contenders)), len(contenders)):
        contender = contenders[place]
        with contender.provider.scope():
            call = contender.launches[index % len(contender.launches)]
            if filler is not None:
                filler.zero_()
            before = _mark(device)
            call()
            marks[place] = before, _mark(device)
    return [marks[place] for place in range(len(contenders))]


def _mark(device: torch.device) -> Mark:
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _elapsed_ms(before: Mark, after: Mark) -> float:
    if isinstance(before, float):
        return (after - before) * 1e3
    return before.elapsed_time(after)


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def read_clock(device: torch.device) -> int | None:
    """Clock of the streaming multiprocessors in MHz, None where it cannot be read."""
    if device.type != "cuda":
        return None
    try:
        return int(torch.cuda.clock_rate(device))
    except (ImportError, RuntimeError, AttributeError):
        return None
