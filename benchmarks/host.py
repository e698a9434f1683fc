"""Host time of a call, peak memory, and the time of a first call: `python -m benchmarks.host --out DIR`.

Host time is what the interpreter spends before the call returns: nothing synchronises inside a batch of calls, and the
kernels of the small problem are shorter than the calls, so that the queue never fills.
"""

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import report
from benchmarks.cases import Case, plain
from benchmarks.providers import OURS, PROVIDERS, Inputs, Provider, make_inputs
from benchmarks.timing import synchronize

CALLS, BATCHES = 200, 9
SMALL = {
    "batch": 2,
    "nheads": 8,
    "nheads_k": 8,
}  # with S 128 and D 64: the small problem whose device time is negligible
MEMORY_SHAPES = ((64, 4096), (128, 4096), (128, 16384))  # headdim, seqlen
FRESH: dict[str, dict[str, Any]] = {
    "D64 causal": {"headdim": 64},
    "D128 causal": {"headdim": 128},
    "D256 causal": {"headdim": 256},
    "D128 causal ALiBi dropout": {"headdim": 128, "alibi": True, "dropout_p": 0.1},
    "D96 causal GQA": {"headdim": 96, "nheads": 8, "nheads_k": 2},
}


def small_problem(headdim: int, seqlen: int, causal: bool, direction: str, **changes: Any) -> Case:
    return plain(headdim, seqlen, causal, direction, **SMALL | changes)


def calls(provider: Provider, case: Case, inputs: Inputs) -> dict[str, Callable[[], object]]:
    """The three calls whose host time is stated; `inputs` require gradients."""
    without = Inputs(*(operand.detach() for operand in inputs.operands), *inputs[3:])

    def forward_backward() -> tuple[Tensor, ...]:
        return torch.autograd.grad(provider.forward(case, inputs), inputs.operands, inputs.dout)

    return {
        "forward": lambda: provider.forward(case, without),
        "forward, gradients wanted": lambda: provider.forward(case, inputs),
        "forward and backward": forward_backward,
    }


def host_time(call: Callable[[], object], device: torch.device, count: int, batches: int) -> list[float]:
    """Microseconds a call, one figure a batch."""
    samples = []
    for _batch in range(batches + 1):
        start = time.perf_counter()
        for _call in range(count):
            call()
        samples.append((time.perf_counter() - start) / count * 1e6)
        synchronize(device)
    return samples[1:]


def measure_host(
    provider_names: Sequence[str], device: torch.device, dtype: str, count: int = CALLS, batches: int = BATCHES
) -> list[dict[str, Any]]:
    """Host time of every provider; rounds alternate between providers, so that drift hits all alike."""
    case = small_problem(64, 128, False, "backward", dtype=dtype)
    inputs = make_inputs(case, device)
    samples: dict[tuple[str, str], list[float]] = {}
    for _round in range(3):
        for name in provider_names:
            provider = PROVIDERS[name]
            if provider.unsupported(case, device) is not None:
                continue
            with provider.scope():
                for what, call in calls(provider, case, inputs).items():
                    samples.setdefault((name, what), []).extend(host_time(call, device, count, max(1, batches // 3)))
    return [
        {"provider": name, "what": what, "median_us": statistics.median(values), "lowest_us": min(values)}
        for (name, what), values in samples.items()
    ]


def measure_memory(provider: Provider, case: Case, device: torch.device) -> list[dict[str, Any]]:
    """Peak bytes beyond the inputs, beside what has to be there: results, LSE and delta."""
    inputs = make_inputs(case, device)
    rows = []
    statistics_bytes = 4 * case.batch * case.nheads * case.seqlen_q
    out_bytes = inputs.q.numel() * inputs.q.element_size()
    gradient_bytes = sum(operand.numel() * operand.element_size() for operand in inputs.operands)
    for what, call in calls(provider, case, inputs).items():
        with provider.scope():
            call()
            synchronize(device)
            torch.cuda.empty_cache()
            before = torch.cuda.memory_allocated(device)
            torch.cuda.reset_peak_memory_stats(device)
            call()
            synchronize(device)
        backward = what == "forward and backward"
        rows.append(
            {
                "provider": provider.name,
                "shape": f"B{case.batch} S{case.seqlen_q} H{case.nheads} D{case.headdim}",
                "what": what,
                "peak_extra_bytes": torch.cuda.max_memory_allocated(device) - before,
                "outputs_bytes": out_bytes + (gradient_bytes if backward else 0),
                "statistics_bytes": statistics_bytes * (2 if backward else 1),
            }
        )
    return rows


def first_call(problem: str, provider_name: str, device: torch.device) -> dict[str, Any]:
    """Seconds of the first forward and the first backward of a problem in this process.

    Another problem runs before it, so that what a compiler does once a machine is stated apart, as `setup_s`; and another
    gradient, for which PyTorch imports sympy: 2.4 s where Python may not keep its bytecode (H200's machine, 2026-11-30).
    """
    provider = PROVIDERS[provider_name]
    other = small_problem(32, 64, False, "forward", dtype="float16")
    case = small_problem(**{"seqlen": 1024, "causal": True, "direction": "backward"} | FRESH[problem])
    other_inputs, inputs = make_inputs(other, device), make_inputs(case, device)
    x = torch.ones(1, device=device, requires_grad=True)
    synchronize(device)
    moments = [time.perf_counter()]

    def finish() -> None:
        synchronize(device)
        moments.append(time.perf_counter())

    with provider.scope():
        provider.forward(other, other_inputs)
        torch.autograd.grad(2 * x, x, torch.ones_like(x))
        finish()
        out = provider.forward(case, inputs)
        finish()
        torch.autograd.grad(out, inputs.operands, inputs.dout)
        finish()
    setup, forward, backward = (after - before for before, after in itertools.pairwise(moments))
    return {"problem": problem, "setup_s": setup, "forward_s": forward, "backward_s": backward}


def first_call_in_fresh_process(problem: str, provider_name: str) -> dict[str, Any]:
    """The same with an empty compilation cache."""
    with tempfile.TemporaryDirectory() as cache:
        command = [sys.executable, "-m", "benchmarks.host", "--first-call", problem, "--providers", provider_name]
        finished = subprocess.run(
            command,
            cwd=report.ROOT,
            env=os.environ | {"TRITON_CACHE_DIR": cache},
            check=True,
            stdout=subprocess.PIPE,
            text=True,
        )
    return json.loads(finished.stdout.splitlines()[-1])


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.host", description=__doc__)
    parser.add_argument("--providers", nargs="+", choices=list(PROVIDERS), default=["ours", "fa2", "cudnn"])
    parser.add_argument("--out", type=Path, default=report.RESULTS)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--tiny", action="store_true", help="a few calls: the path of a run, not a measurement")
    parser.add_argument("--skip-compile", action="store_true", help="leave out the first calls, about 10 s each")
    parser.add_argument("--first-call", choices=list(FRESH), help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    device = torch.device(options.device)
    if options.first_call:
        sys.stdout.write(json.dumps(first_call(options.first_call, options.providers[0], device)) + "\n")
        return 0
    amount = {"count": 3, "batches": 3} if options.tiny else {}
    document: dict[str, Any] = {"kind": "host", "machine": report.machine(device), "memory": [], "compile": []}
    document["host_us"] = measure_host(
        options.providers, device, "bfloat16" if device.type == "cuda" else "float32", **amount
    )
    ours = next((name for name in options.providers if name in OURS), None)
    if ours is not None and device.type == "cuda":
        for headdim, seqlen in MEMORY_SHAPES:
            document["memory"] += measure_memory(PROVIDERS[ours], plain(headdim, seqlen, True, "backward"), device)
        if not options.skip_compile:
            document["compile"] = [first_call_in_fresh_process(problem, ours) for problem in FRESH]
    path = options.out / "host.json"
    report.save_document(path, document)
    sys.stdout.write(f"{report.host_section(document)}\n\n{path}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
