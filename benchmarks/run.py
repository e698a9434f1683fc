"""Measures sweeps of cases: `python -m benchmarks.run --sweep main --providers ours fa2 cudnn --out DIR`."""

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

import torch

from benchmarks import report
from benchmarks.cases import DIRECTIONS, SWEEPS, Case, comparison_groups, sweep_cases
from benchmarks.prewarm import prewarm
from benchmarks.providers import OURS, PROVIDERS, installed
from benchmarks.timing import Result, measure_group

BUDGET_S = 0.25  # of interleaved launches a case

Item = TypeVar("Item")


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.run", description=__doc__)
    parser.add_argument("--sweep", nargs="+", choices=[name for name in SWEEPS if name != "tiny"], default=["main"])
    parser.add_argument("--tiny", action="store_true", help="the seconds-long sweep that tests the path of a run")
    parser.add_argument("--directions", nargs="+", choices=DIRECTIONS, default=list(DIRECTIONS))
    parser.add_argument("--providers", nargs="+", choices=list(PROVIDERS), default=["ours", "fa2", "cudnn", "flaggems"])
    parser.add_argument("--filter", nargs="+", default=[], metavar="WORD", help="keep cases whose name has every word")
    parser.add_argument("--out", type=Path, default=report.RESULTS, help="folder of the JSON files")
    parser.add_argument("--name", help="file name without .json; default the sweep's name")
    parser.add_argument("--budget", type=float, default=BUDGET_S, help="seconds of launches a case")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--no-prewarm", action="store_true", help="compile while measuring, not in parallel before")
    parser.add_argument("--base", metavar="REV", help="measure that commit's package too and print the change")
    options = parser.parse_args(arguments)
    if options.tiny:
        options.sweep = ["tiny"]
    options.providers = installed(options.providers)
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    if options.base:
        return compare_with(options, list(sys.argv[1:] if arguments is None else arguments))
    device = torch.device(options.device)
    wrong = False
    for sweep in options.sweep:
        cases = sweep_cases(sweep, tuple(options.directions), tuple(options.filter))
        if device.type == "cuda" and not options.no_prewarm:
            prewarm(cases, options.providers, options.device)
        results = measure(cases, options.providers, device, options.budget)
        path = options.out / f"{options.name or sweep}.json"
        report.save(path, sweep, report.machine(device), results)
        sys.stdout.write(f"{report.short_table(results)}\n\n{path}\n")
        wrong |= any(result.provider in OURS and result.refused is not None for result in results)
    return int(wrong)


def measure(
    cases: Sequence[Case], provider_names: Sequence[str], device: torch.device, budget_s: float
) -> list[Result]:
    """Every group of cases on every provider, with a progress bar."""
    providers = [PROVIDERS[name] for name in provider_names]
    results: list[Result] = []
    for group in progress(comparison_groups(list(cases))):
        results += measure_group(group, providers, device, budget_s)
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return results


def progress(items: Sequence[Item]) -> Iterable[Item]:
    try:
        from tqdm import tqdm
    except ImportError:
        return items
    return tqdm(items, unit="group", mininterval=1.0)


def compare_with(options: argparse.Namespace, words: list[str]) -> int:
    """Runs the same sweep on another commit's package and on this one, with this tree's benchmarks."""
    position = next(index for index, word in enumerate(words) if word.split("=")[0] == "--base")
    del words[position : position + (1 if "=" in words[position] else 2)]
    with overlay(options.base) as base, tempfile.TemporaryDirectory() as out:
        tables = []
        for label, folder in (("base", base), ("new", report.ROOT)):
            command = [sys.executable, "-m", "benchmarks.run", *words, "--out", str(Path(out, label))]
            environment = os.environ | {"PYTHONPATH": str(folder)}
            subprocess.run(command, cwd=folder, env=environment, check=False)  # refused cases leave their JSON
            documents = [json.loads(path.read_text()) for path in sorted(Path(out, label).glob("*.json"))]
            tables.append([result for document in documents for result in report.load_results(document)])
        sys.stdout.write(change_table(*tables) + "\n")
    return 0


def change_table(base: Sequence[Result], new: Sequence[Result]) -> str:
    """Speed of the new package over the base, both relative to the peer that ran beside it, where there is one."""
    ours = report.our_provider(new)
    before, after = report.times(base), report.times(new)
    peer = next((result.provider for result in new if result.provider not in OURS), None)
    rows, changes = [], []
    for name in dict.fromkeys(result.case.name for result in new):
        if (name, ours) not in before or (name, ours) not in after:
            continue
        drift = 1.0
        if (name, peer) in before and (name, peer) in after:
            drift = after[name, peer] / before[name, peer]
        changes.append(before[name, ours] / after[name, ours] * drift)
        rows.append([name, f"{before[name, ours]:.3f}", f"{after[name, ours]:.3f}", f"{changes[-1]:.3f}"])
    if changes:
        rows.append(["geometric mean", "", "", f"{report.geometric_mean(changes):.3f}"])
    return report.markdown(["case", "base, ms", "new, ms", f"speed-up{f' relative to {peer}' if peer else ''}"], rows)


@contextlib.contextmanager
def overlay(revision: str) -> Iterator[Path]:
    """A folder with another commit's package and this tree's benchmarks."""
    with tempfile.TemporaryDirectory() as temporary:
        tree, folder = Path(temporary, "tree"), Path(temporary, "overlay")
        git = ["git", "-C", str(report.ROOT), "worktree"]
        subprocess.run([*git, "add", "--detach", str(tree), revision], check=True, capture_output=True)
        try:
            folder.mkdir()
            for module in tree.glob("flash_attn*"):
                folder.joinpath(module.name).symlink_to(module)
            folder.joinpath("benchmarks").symlink_to(report.ROOT / "benchmarks")
            yield folder
        finally:
            subprocess.run([*git, "remove", "--force", str(tree)], check=True, capture_output=True)


if __name__ == "__main__":
    sys.exit(main())
