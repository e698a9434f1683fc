"""Results as JSON, and the tables of the documents made from them.

`python -m benchmarks.report` rewrites the tables between the markers; `--check` only says whether they are up to date.
"""

import argparse
import datetime
import hashlib
import importlib
import json
import math
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

import flash_attn
from benchmarks.cases import DIRECTIONS, Case
from benchmarks.providers import OURS, PROVIDERS
from benchmarks.timing import Result

ROOT = Path(__file__).resolve().parent.parent
RESULTS = Path(__file__).resolve().parent / "results"
DOCUMENTS = {  # and the names of the result files whose tables they show
    ROOT / "docs" / "benchmarks.md": "*",
    ROOT / "docs" / "flaggems_backward_analysis.md": "flaggems*",
    ROOT / "docs" / "zh" / "flaggems_backward_analysis.md": "flaggems*",
}
BEGIN = "<!-- begin generated: python -m benchmarks.report -->"
END = "<!-- end generated -->"
HEADINGS = {"ours": "flash_attn", "fa2": "FA2", "cudnn": "cuDNN", "flex": "FlexAttention"}
HEADINGS |= {"flaggems": "FlagGems", "flaggems_sdpa": "FlagGems SDPA"}

Row = list[str]


def machine(device: torch.device) -> dict[str, Any]:
    """Hardware, clocks, versions, commit and date of a run."""
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or "CPU",
        "nvidia_smi": query_nvidia_smi() if device.type == "cuda" else {},
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version() if device.type == "cuda" else None,
        "triton": _version("triton"),
        "commit": _git("rev-parse", "--short=12", "HEAD"),
        "modified": bool(_git("status", "--porcelain", "--untracked-files=no", "--", "flash_attn")),
        "source": source_hash(Path(flash_attn.__file__).parent),
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
    }


def query_nvidia_smi() -> dict[str, str]:
    """Driver, clocks and power as the driver's tool states them; empty without the tool."""
    fields = ("driver_version", "clocks.sm", "clocks.mem", "clocks.max.sm", "power.draw", "power.limit")
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return {}
    command = [tool, f"--query-gpu={','.join(fields)}", "--format=csv,noheader"]
    finished = subprocess.run(command, capture_output=True, text=True, check=False)
    values = finished.stdout.strip().splitlines()
    return dict(zip(fields, map(str.strip, values[0].split(",")), strict=False)) if values else {}


def _version(module: str) -> str | None:
    try:
        return getattr(importlib.import_module(module), "__version__", None)
    except ImportError:
        return None


def _git(*words: str) -> str | None:
    """Output of a git command in the repository; None outside one, which a copied tree may be."""
    if shutil.which("git") is None:
        return None
    finished = subprocess.run(["git", "-C", str(ROOT), *words], capture_output=True, text=True, check=False)
    return finished.stdout.strip() if finished.returncode == 0 else None


def source_hash(package: Path) -> str:
    """Names what was measured even where no commit can be read."""
    digest = hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        digest.update(path.relative_to(package).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:12]


def result_to_json(result: Result) -> dict[str, Any]:
    defaults = Result._field_defaults
    fields = {name: value for name, value in result._asdict().items() if value != defaults.get(name)}
    fields["case"] = result.case.to_json()
    if result.median_ms is not None:
        fields["tflops"] = round(result.tflops, 2)
        if result.case.seqlen_q == result.case.seqlen_k or not result.case.causal:
            fields["tflops_conventional"] = round(result.case.conventional_flops / result.median_ms / 1e9, 2)
    return fields


def result_from_json(fields: dict[str, Any]) -> Result:
    known = {name: fields[name] for name in Result._fields if name in fields}
    quartiles = known.get("quartiles_ms")
    known["quartiles_ms"] = tuple(quartiles) if quartiles is not None else None
    return Result(**known | {"case": Case.from_json(known["case"])})


def save(path: Path, sweep: str, about: dict[str, Any], results: Sequence[Result]) -> None:
    save_document(
        path, {"kind": "kernel", "sweep": sweep, "machine": about, "results": list(map(result_to_json, results))}
    )


def save_document(path: Path, document: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(one_row_a_line(document) + "\n")


def one_row_a_line(document: dict[str, Any]) -> str:
    """JSON whose differences between runs are readable: every element of a list on a line of its own."""
    parts = []
    for name, value in document.items():
        rows = [f"  {json.dumps(row)}" for row in value] if isinstance(value, list) else []
        text = "[\n" + ",\n".join(rows) + "\n ]" if rows else json.dumps(value)
        parts.append(f" {json.dumps(name)}: {text}")
    return "{\n" + ",\n".join(parts) + "\n}"


def load_results(document: dict[str, Any]) -> list[Result]:
    return [result_from_json(fields) for fields in document["results"]]


def geometric_mean(values: Sequence[float]) -> float:
    return math.exp(sum(map(math.log, values)) / len(values))


def times(results: Iterable[Result]) -> dict[tuple[str, str], float]:
    """(case name, provider) -> median milliseconds."""
    return {(r.case.name, r.provider): r.median_ms for r in results if r.median_ms is not None}


def our_provider(results: Sequence[Result]) -> str:
    """The provider of this package that the tables put first."""
    present = {result.provider for result in results}
    return next((name for name in OURS if name in present), OURS[0])


def speedups(results: Sequence[Result], ours: str, peer: str, direction: str) -> list[float]:
    """Speed of ours over the peer, for every case of a direction that both ran."""
    found = times(results)
    names = dict.fromkeys(r.case.name for r in results if r.case.direction == direction)
    return [found[n, peer] / found[n, ours] for n in names if (n, ours) in found and (n, peer) in found]


def markdown(header: Row, rows: Sequence[Row]) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in [header, ["---"] * len(header), *rows])


def speed_table(results: Sequence[Result], direction: str) -> str:
    """TFLOP/s of every provider and the ratio to each peer, one row a case."""
    results = [result for result in results if result.case.direction == direction]
    if not results:
        return ""
    ours, found = our_provider(results), times(results)
    by_key = {(r.case.name, r.provider): r for r in results}
    present = {result.provider for result in results}
    peers = [name for name in PROVIDERS if name in present and name != ours]
    rows = []
    for case in {result.case.name: result.case for result in results}.values():
        row = [case_title(case), _cell(by_key.get((case.name, ours)))]
        row += [_cell(by_key.get((case.name, peer))) for peer in peers]
        row += [_ratio(found, case.name, ours, peer) for peer in peers]
        rows.append(row)
    for title, summary in (("geometric mean", geometric_mean), ("lowest", min)):
        ratios = [speedups(results, ours, peer, direction) for peer in peers]
        cells = [f"{summary(values):.2f}" if values else "-" for values in ratios]
        rows.append([f"**{title}**", *[""] * (1 + len(peers)), *cells])
    titles = [HEADINGS.get(name, name) for name in (ours, *peers)]
    return markdown(["case", *titles, *(f"{titles[0]} / {title}" for title in titles[1:])], rows)


def case_title(case: Case) -> str:
    """The case in words, without what every row shares."""
    return case.name.removesuffix(f"-{case.direction}").replace("-", " ")


def _cell(result: Result | None) -> str:
    return f"{result.tflops:.0f}" if result is not None and result.tflops is not None else "-"


def _ratio(found: dict[tuple[str, str], float], name: str, ours: str, peer: str) -> str:
    if (name, ours) not in found or (name, peer) not in found:
        return "-"
    return f"{found[name, peer] / found[name, ours]:.2f}"


def feature_costs(results: Sequence[Result]) -> list[tuple[Case, str, float]]:
    """(case, provider, cost): time per visible pair over that of the plain baseline, minus 1."""
    found = times(results)
    cases = {result.case.name: result.case for result in results}
    costs = []
    for (name, provider), milliseconds in found.items():
        case = cases[name]
        if case.baseline and (case.baseline, provider) in found:
            plain = found[case.baseline, provider] / cases[case.baseline].visible_pairs
            costs.append((case, provider, milliseconds / case.visible_pairs / plain - 1.0))
    return costs


def feature_table(results: Sequence[Result]) -> str:
    rows = [
        [case.name.replace("-", " "), HEADINGS.get(provider, provider), f"{cost:+.0%}"]
        for case, provider, cost in feature_costs(results)
    ]
    return markdown(["case", "provider", "time per visible pair against the plain kernel"], rows) if rows else ""


def error_table(results: Sequence[Result]) -> str:
    """Relative two-norm of each provider's error against the specification; results too wrong to be timed are bold."""
    by_key = {(r.case.name, r.provider): r for r in results}
    names = [name for name in PROVIDERS if any(r.provider == name for r in results)]
    rows = [
        [f"{case_title(case)} {case.direction}", *(_error_cell(by_key.get((case.name, name))) for name in names)]
        for case in {r.case.name: r.case for r in results}.values()
    ]
    return markdown(["case", *(HEADINGS.get(name, name) for name in names)], rows)


def _error_cell(result: Result | None) -> str:
    if result is None:
        return "-"
    if result.error is not None:
        return f"{result.error:.1e}"
    wrong = (result.refused or "").partition("wrong result: error ")[2].partition(",")[0]
    return f"**{wrong}**" if wrong else "-"


def refusals(results: Sequence[Result], headings: Mapping[str, str] = HEADINGS) -> list[str]:
    """Why providers have no number, each reason once with the number of cases."""
    counts: dict[tuple[str, str], int] = {}
    for result in results:
        if result.refused is not None:
            counts[result.provider, result.refused] = counts.get((result.provider, result.refused), 0) + 1
    return [f"{headings.get(name, name)}, {count} cases: {reason}" for (name, reason), count in counts.items()]


def kernel_section(document: dict[str, Any]) -> str:
    results = load_results(document)
    parts = []
    for direction in DIRECTIONS:
        table = speed_table(results, direction)
        if table:
            parts += [f"{direction.capitalize()}, TFLOP/s:", table]
    costs = feature_table(results)
    parts += ["Cost of each feature at equal visible pairs:", costs] if costs else []
    if document["sweep"] == "flaggems":
        parts += ["Error against the specification, wrong results in bold:", error_table(results)]
    return "\n\n".join([*parts, "\n".join(f"- {line}" for line in refusals(results))]).rstrip()


def host_section(document: dict[str, Any]) -> str:
    host = [[row["provider"], row["what"], f"{row['median_us']:.0f}"] for row in document["host_us"]]
    memory = [
        [
            row["shape"],
            row["what"],
            _mebibytes(row["peak_extra_bytes"]),
            _mebibytes(row["outputs_bytes"]),
            _mebibytes(row["statistics_bytes"]),
            _mebibytes(row["peak_extra_bytes"] - row["outputs_bytes"] - row["statistics_bytes"]),
        ]
        for row in document["memory"]
    ]
    compile_columns = ("setup_s", "forward_s", "backward_s")
    compile_rows = [
        [row["problem"], *(f"{row[column]:.2f}" for column in compile_columns)] for row in document["compile"]
    ]
    sections = (
        ("Host time of one eager call, (2, 128, 8, 64) bf16, us:", ["provider", "call", "median"], host),
        (
            "Peak memory beyond the inputs, MiB:",
            ["shape", "call", "peak", "outputs and gradients", "LSE and delta", "anything else"],
            memory,
        ),
        (
            "First calls of a fresh process with an empty compilation cache, s:",
            ["problem", "some other problem before it", "its forward", "its backward"],
            compile_rows,
        ),
    )
    return "\n\n".join(part for title, header, rows in sections if rows for part in (title, markdown(header, rows)))


def _mebibytes(count: int) -> str:
    return f"{count / 2**20:.1f}"


def decode_section(document: dict[str, Any]) -> str:
    from benchmarks import decode

    return decode.table(document)


def prefill_section(document: dict[str, Any]) -> str:
    from benchmarks import prefill

    return prefill.table(document)


def training_section(document: dict[str, Any]) -> str:
    from benchmarks import training

    return training.table(document)


SECTIONS: dict[str, Callable[[dict[str, Any]], str]] = {
    "kernel": kernel_section,
    "host": host_section,
    "decode": decode_section,
    "prefill": prefill_section,
    "training": training_section,
}


def machine_line(about: dict[str, Any]) -> str:
    """One sentence on where and of what a file was measured."""
    versions = ", ".join(f"{name} {about[name]}" for name in ("torch", "triton", "cudnn") if about.get(name))
    commit = about.get("commit") or "unknown"
    return f"{about['device']}, {versions}; {about['date']}; commit {commit}, source {about['source']}."


def generated_part(directory: Path, names: str = "*") -> str:
    """Every result file of these names as a section."""
    parts = []
    for path in sorted(directory.glob(f"{names}.json")):
        document = json.loads(path.read_text())
        parts += [f"## {path.stem}", machine_line(document["machine"]), SECTIONS[document["kind"]](document)]
    return "\n\n".join(parts) or "Nothing measured yet."


def updated_document(text: str, directory: Path, names: str = "*") -> str:
    """The document with the part between its markers made anew."""
    head, marker, rest = text.partition(BEGIN)
    _old, end, tail = rest.partition(END)
    if not marker or not end:
        raise ValueError(f"the document lacks the markers {BEGIN!r} and {END!r}")
    return f"{head}{BEGIN}\n\n{generated_part(directory, names)}\n\n{END}{tail}"


def short_table(results: Sequence[Result]) -> str:
    """What a run prints last."""
    lines = [table for direction in DIRECTIONS if (table := speed_table(results, direction))]
    lines += [feature_table(results)] if any(result.case.baseline for result in results) else []
    lines += refusals(results)
    return "\n\n".join(filter(None, lines))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=__doc__)
    parser.add_argument(
        "--check", action="store_true", help="change nothing; exit code 1 when the tables are out of date"
    )
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--document", type=Path, help="this one alone, with every result")
    options = parser.parse_args(arguments)
    out_of_date = 0
    for path, names in ({options.document: "*"} if options.document else DOCUMENTS).items():
        old = path.read_text()
        new = updated_document(old, options.results, names)
        if not options.check:
            path.write_text(new)
        elif new != old:
            sys.stderr.write(f"{path} is out of date: run python -m benchmarks.report\n")
            out_of_date = 1
    return out_of_date


if __name__ == "__main__":
    sys.exit(main())
