"""Many new tokens over a cache, beside PyTorch's attention: `python -m benchmarks.prefill --out DIR`.

Causal; the queries are the last of the tokens that the cache already holds, so that all providers compute the same.
TFLOP/s count the products of visible (query, key) pairs. Results are checked and launches timed as by benchmarks.run: in
alternation, each after the last-level cache was overwritten.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right

import flash_attn
from benchmarks import providers, report
from benchmarks.cases import Case, size_name
from benchmarks.providers import Inputs, Provider, in_pages, installed, make_inputs
from benchmarks.timing import Contender, Result, expected_slices, prepare, time_contenders

BUDGET_S = 1.0  # of interleaved launches a case


def prefill(
    batch: int, seqlen_q: int, seqlen_k: int, headdim: int, nheads: int, nheads_k: int, dtype: str = "bfloat16"
) -> Case:
    """`seqlen_q` new tokens at the end of the `seqlen_k` of every sequence."""
    lengths = f"Q{size_name(seqlen_q)} K{size_name(seqlen_k)}"
    name = f"D{headdim} B{batch} {lengths} H{nheads}/{nheads_k}"
    return Case(name, "forward", batch, seqlen_q, seqlen_k, nheads, nheads_k, headdim, dtype, causal=True)


HEADS = {128: (32, 8), 64: (32, 8), 256: (16, 4)}  # head dim: heads of queries, of keys
LENGTHS = [  # batch, new tokens, tokens of a sequence
    (4, 4096, 4096),  # whole prompts
    (8, 512, 8192),  # chunks
    (1, 2048, 32768),  # a long context
    (16, 128, 4096),  # short chunks
]
CASES = [
    *(prefill(*lengths, headdim, *heads) for headdim, heads in HEADS.items() for lengths in LENGTHS),
    # one short chunk: few tiles of queries
    prefill(1, 256, 8192, 128, 32, 8),
    *(prefill(1, 512, seqlen_k, 128, 8, 8) for seqlen_k in (8192, 32768)),
    prefill(1, 128, 8192, 64, 32, 8),
]
TINY = [prefill(2, 256, 256, 16, 4, 2, "float32"), prefill(2, 32, 512, 16, 4, 2, "float32")]


def over_cache(case: Case, inputs: Inputs) -> Tensor:
    return flash_attn.flash_attn_with_kvcache(
        *inputs.operands, cache_seqlens=inputs.cache_seqlens, block_table=inputs.block_table, causal=True
    )


def packed(case: Case, inputs: Inputs) -> Tensor:
    """What servers with pages of their own call: the queries of all sequences one after another."""
    lengths = (inputs.cu_seqlens, inputs.cu_seqlens_k, case.seqlen_q, case.seqlen_k)
    return flash_attn.flash_attn_varlen_func(
        inputs.q.flatten(0, 1), inputs.k, inputs.v, *lengths, causal=True, block_table=inputs.block_table
    ).view_as(inputs.q)


def lower_right(case: Case, inputs: Inputs) -> Tensor:
    """PyTorch's attention with the last query at the last key, which is_causal means for equal lengths only."""
    q, k, v = (x.transpose(1, 2) for x in inputs.operands)
    bias = causal_lower_right(case.seqlen_q, case.seqlen_k)
    return F.scaled_dot_product_attention(q, k, v, bias, enable_gqa=case.nheads != case.nheads_k).transpose(1, 2)


def _refuses_nothing(case: Case, device: torch.device) -> None:
    """No case is refused beforehand."""


PROVIDERS: dict[str, Provider] = {
    provider.name: provider
    for provider in (
        Provider("dense", "flash_attn", _refuses_nothing, over_cache),
        Provider("page256", "page 256", _refuses_nothing, over_cache),
        Provider("page16", "page 16", _refuses_nothing, over_cache),
        Provider("varlen256", "flash_attn_varlen_func, page 256", _refuses_nothing, packed),
        providers.PROVIDERS["ours"]._replace(name="func", title="flash_attn_func"),
        providers.PROVIDERS["cudnn"]._replace(title="cuDNN"),
        Provider("fa2", "FA2", _refuses_nothing, lower_right, lambda: sdpa_kernel(SDPBackend.FLASH_ATTENTION)),
        providers.PROVIDERS["flaggems"]._replace(title="FlagGems, page 16", forward=packed),
    )
}
PAGES = {"page256": 256, "page16": 16, "varlen256": 256, "flaggems": 16}  # tokens of a page; the others' cache is dense
PEERS = ("cudnn", "fa2", "flaggems")  # whose refusal is no failure


def make_cache(case: Case, device: torch.device) -> Inputs:
    """Standard normal tokens in a dense cache, and the lengths that some providers ask for."""
    counts = torch.arange(case.batch + 1, dtype=torch.int32, device=device)
    seqlens = torch.full((case.batch,), case.seqlen_k, dtype=torch.int32, device=device)
    return make_inputs(case, device)._replace(
        cu_seqlens=counts * case.seqlen_q, cu_seqlens_k=counts * case.seqlen_k, cache_seqlens=seqlens
    )


def paged(inputs: Inputs, page_size: int) -> Inputs:
    """The same tokens in pages of random order."""
    k, v, table = in_pages(inputs.k, inputs.v, page_size)
    return inputs._replace(k=k, v=v, block_table=table)


def measure(case: Case, names: Sequence[str], device: torch.device, budget_s: float) -> list[Result]:
    """A result for each provider, from one interleaved loop of `budget_s` seconds."""
    inputs = make_cache(case, device)
    slices = expected_slices(case, inputs)
    caches = {0: inputs} | {page: paged(inputs, page) for page in {PAGES[name] for name in names if name in PAGES}}
    refused: list[Result] = []
    contenders: list[Contender] = []
    for name in names:
        ready = prepare(case, PROVIDERS[name], [caches[PAGES.get(name, 0)]], slices, device)
        if isinstance(ready, Contender):
            contenders.append(ready)
        else:
            refused.append(Result(case, name, refused=ready))
    return refused + time_contenders(contenders, device, budget_s)


def table(document: dict[str, Any]) -> str:
    """TFLOP/s and microseconds of every provider, one row a case, and why providers have no number."""
    results = report.load_results(document)
    found = {(result.case.name, result.provider): result for result in results}
    names = [name for name in PROVIDERS if any(result.provider == name for result in results)]
    titles = {name: PROVIDERS[name].title for name in names}
    rows = [[case, *(_cell(found.get((case, name))) for name in names)] for case in dict.fromkeys(c for c, _ in found)]
    ratios = [report.speedups(results, "dense", name, "forward") for name in names]
    means = [f"{report.geometric_mean(values):.2f}" if values else "-" for values in ratios]
    parts = [
        "The queries are the last Q of the K tokens that every sequence has in the cache, causal. flash_attn is "
        "`flash_attn_with_kvcache` over a dense cache, page n the same over pages of n tokens in random order; "
        "`flash_attn_func` takes the tokens without a cache. FA2 is PyTorch's, through `causal_lower_right`.",
        "TFLOP/s of visible pairs (microseconds); last, flash_attn's speed over each in the cases that both ran:",
        report.markdown(["case", *titles.values()], [*rows, ["**geometric mean**", *means]]),
        "\n".join(f"- {line}" for line in report.refusals(results, titles)),
    ]
    return "\n\n".join(parts).rstrip()


def _cell(result: Result | None) -> str:
    if result is None or result.median_ms is None:
        return "-"
    return f"{result.tflops:.0f} ({result.median_ms * 1e3:.0f})"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.prefill", description=__doc__)
    parser.add_argument(
        "--providers", nargs="+", choices=list(PROVIDERS), default=list(PROVIDERS),
        help="those whose package is missing are left out",
    )  # fmt: skip
    parser.add_argument("--filter", nargs="+", default=[], metavar="WORD", help="keep cases whose name has every word")
    parser.add_argument("--out", type=Path, default=report.RESULTS, help="folder of prefill.json")
    parser.add_argument("--budget", type=float, default=BUDGET_S, help="seconds of launches a case")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--tiny", action="store_true", help="the path of a run, not a measurement")
    options = parser.parse_args(arguments)
    device = torch.device(options.device)
    cases = [case for case in (TINY if options.tiny else CASES) if all(word in case.name for word in options.filter)]
    names = installed(options.providers, PROVIDERS)
    results: list[Result] = []
    for case in cases:
        results += measure(case, names, device, options.budget)
        if device.type == "cuda":
            torch.cuda.empty_cache()
    rows = list(map(report.result_to_json, results))
    document = {"kind": "prefill", "machine": report.machine(device), "results": rows}
    path = options.out / "prefill.json"
    report.save_document(path, document)
    sys.stdout.write(f"{table(document)}\n\n{path}\n")
    return int(any(result.refused is not None for result in results if result.provider not in PEERS))


if __name__ == "__main__":
    sys.exit(main())
