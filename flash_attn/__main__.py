"""`python -m flash_attn`: what this machine has, which backend serves what, whether results are right and how fast.

Exit code 1 when a numerical check fails. `--no-speed` leaves the speed check out.
"""

import argparse
import functools
import platform
import statistics
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

import flash_attn
from flash_attn import backends, diagnostics, hardware
from flash_attn.problem import AttentionProblem

WIDTH = 96
PACKAGES = ("triton", "numpy", "einops", "flag_gems")
CAUSAL = (None, 0)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m flash_attn", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--no-speed", action="store_true", help="leave out the speed check")
    arguments = parser.parse_args()
    device = default_device()
    print_machine(device)
    print_backends(device)
    print_clients(device)
    failures = print_checks(device)
    if not arguments.no_speed:
        print_speed(device)
    return 1 if failures else 0


def default_device() -> torch.device:
    """The accelerator that attention tensors usually live on here, or the CPU."""
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return torch.device("cpu") if accelerator is None else accelerator


def print_machine(device: torch.device) -> None:
    found = hardware.of(device)
    rows = [
        ("flash_attn", flash_attn.__version__),
        ("Python", platform.python_version()),
        ("PyTorch", torch.__version__),
    ]
    rows += [(package, diagnostics.version(package) or "not installed") for package in PACKAGES]
    if found.kind == "cpu":
        rows.append(("device", f"cpu, {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads"))
    else:
        name = torch.get_device_module(device).get_device_name(device)
        processors = f"{found.num_sms} multiprocessors, {found.shared_memory // 1024} KiB shared memory"
        rows.append(("device", f"{name}, {found.arch or found.kind}, {processors}"))
    heading("Machine")
    for label, text in rows:
        item(label, text)


PROBLEMS = {
    "training, bf16, D 128, causal": AttentionProblem("dense", "bfloat16", 2, 4096, 4096, 16, 16, 128, CAUSAL),
    "packed documents, bf16, D 64": AttentionProblem("varlen", "bfloat16", 8, 2048, 2048, 16, 4, 64, CAUSAL),
    "window, softcap, fp16, D 256": AttentionProblem("dense", "float16", 1, 8192, 8192, 8, 4, 256, (4095, 0), True),
    "ALiBi, dropout, fp16, D 64": AttentionProblem(
        "dense", "float16", 4, 1024, 1024, 8, 8, 64, CAUSAL, alibi=True, dropout=True
    ),
    "paged keys, bf16, D 128": AttentionProblem("paged", "bfloat16", 32, 512, 4096, 32, 8, 128, page_size=256),
    "decoding over a paged cache, bf16, D 128": AttentionProblem(
        "paged_cache", "bfloat16", 32, 1, 4096, 32, 8, 128, page_size=16
    ),
    "float32, D 64": AttentionProblem("dense", "float32", 4, 512, 512, 8, 8, 64),
    "float64, D 32": AttentionProblem("dense", "float64", 2, 64, 64, 4, 4, 32),
}


def print_backends(device: torch.device) -> None:
    heading("Backends")
    requested = backends.requested_backend()
    item("asked for", requested or f"none, so the first that can; {backends.ENVIRONMENT_VARIABLE} asks for one")
    refusals: dict[str, dict[str, list[str]]] = {}
    for label, problem in PROBLEMS.items():
        verdicts = backends.explain(problem._replace(aligned=True), hardware.of(device))
        able = [name for name, verdict in verdicts.items() if backends.able(verdict)]
        able.sort(key=lambda name: not verdicts[name].startswith("runs it"))
        others = f" ({', '.join(able[1:])} could)" if able[1:] else ""
        item(label, f"{able[0]}{others}" if able else "no backend")
        for name in [name for name in verdicts if name not in able]:
            refusals.setdefault(name, {}).setdefault(verdicts[name], []).append(label)
    for name, reasons in refusals.items():
        for reason, labels in reasons.items():
            which = "all of these" if len(labels) == len(PROBLEMS) else "; ".join(labels)
            item(f"{name} refuses", f"{which}: {reason}")


def print_clients(device: torch.device) -> None:
    heading("Clients of flash_attn, whether they would accept this package [their version here]")
    for client, gate in diagnostics.GATES.items():
        installed = diagnostics.version(client)
        reason = gate(device)
        verdict = "accepts it" if reason is None else f"would not use it: {reason}"
        item(client, f"{verdict} [{installed or 'not installed'}]")


def print_checks(device: torch.device) -> int:
    """Prints each result's error as a share of what it may be; returns how many checks fail."""
    heading("Numerical check against float64 (1.00 is the largest error allowed)")
    print(f"  {'problem':<34}{'dtype':<10}" + "".join(f"{what:>7}" for what in ("out", "lse", "dq", "dk", "dv")))
    failures = 0
    for check in diagnostics.CHECKS:
        torch.manual_seed(0)
        try:
            shares = diagnostics.error_shares(check, device)
        except Exception as error:  # noqa: BLE001 - whatever goes wrong is this check's result
            failures += 1
            item(check.name, f"FAILED: {type(error).__name__}: {error}")
            continue
        failed = not all(share <= 1.0 for share in shares.values())
        failures += failed
        figures = "".join(f"{share:7.2f}" for share in shares.values())
        print(f"  {check.name:<34}{str(check.dtype).removeprefix('torch.'):<10}{figures}{'  FAILED' if failed else ''}")
    total = len(diagnostics.CHECKS)
    print(f"  {failures} of {total} checks FAILED" if failures else f"  all {total} checks pass")
    return failures


Attend = Callable[[], Any]
SECONDS = 0.6  # per case and direction, for each of the two


def print_speed(device: torch.device) -> None:
    heading("Speed beside torch.nn.functional.scaled_dot_product_attention (medians, milliseconds)")
    print(f"  {'problem':<44}{'direction':<10}{'ours':>9}{'PyTorch':>9}{'ratio':>8}")
    for label, dtype, shape, causal in speed_cases(device):
        q, k, v = leaves = [torch.randn(shape, device=device, dtype=dtype, requires_grad=True) for _ in range(3)]
        dout = torch.randn(shape, device=device, dtype=dtype)
        ours: Attend = functools.partial(flash_attn.flash_attn_func, q, k, v, causal=causal)
        theirs: Attend = functools.partial(pytorch_attention, q, k, v, causal)
        pairs: dict[str, tuple[Attend, Attend]] = {
            "forward": (ours, theirs),
            "backward": (differentiate(ours, dout, leaves), differentiate(theirs, dout, leaves)),
        }
        for direction, functions in pairs.items():
            mine, other = medians(functions, device)
            print(f"  {label:<44}{direction:<10}{mine:>9.3f}{other:>9.3f}{other / mine:>7.2f}x")


def pytorch_attention(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    """PyTorch's own attention in this package's layout."""
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    return functional.scaled_dot_product_attention(q, k, v, is_causal=causal).transpose(1, 2)


def speed_cases(device: torch.device) -> Iterator[tuple[str, torch.dtype, tuple[int, ...], bool]]:
    """label, dtype, (batch, seqlen, heads, head dim), causal."""
    if device.type == "cpu":
        sizes, dtype = [(1, 1024, 4, 64)], torch.float32
    else:
        sizes, dtype = [(2, 4096, 16, 64), (2, 4096, 16, 128)], torch.bfloat16
    for shape in sizes:
        for causal in (False, True):
            sizes_text = ", ".join(f"{name} {size}" for name, size in zip(("B", "S", "H", "D"), shape, strict=True))
            name = str(dtype).removeprefix("torch.")
            yield f"{sizes_text}, {name}{', causal' if causal else ''}", dtype, shape, causal


def differentiate(forward: Attend, dout: Tensor, leaves: list[Tensor]) -> Attend:
    """The backward of one forward, repeatable."""
    out = forward()
    return lambda: torch.autograd.grad(out, leaves, dout, retain_graph=True)


def medians(functions: tuple[Attend, ...], device: torch.device) -> list[float]:
    """Milliseconds of each function, called in turns for SECONDS each."""
    times: list[list[float]] = [[] for _ in functions]
    for function in functions:
        timed(function, device)
    end = time.perf_counter() + SECONDS * len(functions)
    while time.perf_counter() < end or len(times[0]) < 3:
        for function, sample in zip(functions, times, strict=True):
            sample.append(timed(function, device))
    return [1000 * statistics.median(sample) for sample in times]


def timed(function: Attend, device: torch.device) -> float:
    """Seconds of a call, device work included."""
    begin = time.perf_counter()
    function()
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return time.perf_counter() - begin


def heading(text: str) -> None:
    print(f"\n{text}\n{'-' * len(text)}")


def item(label: str, text: str) -> None:
    print(textwrap.fill(f"{label + ': ':<32}{text}", WIDTH, initial_indent="  ", subsequent_indent=" " * 34))


if __name__ == "__main__":
    sys.exit(main())
