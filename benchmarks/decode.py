"""One decode step over a cache, beside PyTorch's attention: `python -m benchmarks.decode --out DIR`.

Bandwidth is the bytes of keys and values that have to be read, over time. Launches of all providers alternate, each after
the last-level cache was overwritten; the device is kept busy long enough that no host time shows. `step` captures a CUDA
graph of 32 layers that append, rotate and attend, whose kernels may leave no gap.
"""

import argparse
import contextlib
import math
import statistics
import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import flash_attn
from benchmarks import report
from benchmarks.host import host_time
from benchmarks.providers import in_pages, installed
from benchmarks.timing import ERROR_BOUND, significant, synchronize, two_norm_error
from flash_attn import backends
from flash_attn.kvcache.kv_attention import batch_invariant

FLUSH_BYTES = 512 * 2**20  # 120 us on an H200: longer than the host needs for a call
LAYERS = 32


class DecodeCase(NamedTuple):
    """One query token for each sequence, all of `seqlen` cached tokens."""

    batch: int
    seqlen: int
    nheads: int
    nheads_k: int
    headdim: int
    dtype: str = "bfloat16"

    @property
    def name(self) -> str:
        length = f"{self.seqlen // 1024}k" if self.seqlen % 1024 == 0 else str(self.seqlen)
        return f"B{self.batch} S{length} H{self.nheads}/{self.nheads_k} D{self.headdim}"

    @property
    def bytes(self) -> int:
        """Of the keys and values."""
        element = getattr(torch, self.dtype).itemsize
        return 2 * element * self.batch * self.seqlen * self.nheads_k * self.headdim


CASES = [
    DecodeCase(1, 8192, 32, 8, 128),
    DecodeCase(1, 131072, 32, 8, 128),
    DecodeCase(16, 8192, 32, 8, 128),
    DecodeCase(64, 8192, 32, 8, 128),
    DecodeCase(16, 32768, 32, 8, 128),
    DecodeCase(16, 8192, 32, 32, 128),
    DecodeCase(64, 2048, 64, 8, 128),
    DecodeCase(128, 4096, 32, 8, 64),
]
TINY = [DecodeCase(2, 64, 4, 2, 16, "float32")]


class Cache(NamedTuple):
    """Tensors of a case; one token is left free in every sequence for the appending providers."""

    q: Tensor
    k_cache: Tensor  # (batch, seqlen, nheads_k, headdim)
    v_cache: Tensor
    k: Tensor
    v: Tensor
    cos: Tensor
    sin: Tensor
    seqlens: Tensor


def make_cache(case: DecodeCase, device: torch.device, seed: int = 0) -> Cache:
    """Standard normal tokens."""
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device, dtype=getattr(torch, case.dtype))

    caches = [normal(case.batch, case.seqlen, case.nheads_k, case.headdim) for _ in range(2)]
    new = [normal(case.batch, 1, case.nheads_k, case.headdim) for _ in range(2)]
    angles = normal(case.seqlen, case.headdim // 2)
    seqlens = torch.full((case.batch,), case.seqlen, dtype=torch.int32, device=device)
    q = normal(case.batch, 1, case.nheads, case.headdim)
    return Cache(q, *caches, *new, angles.cos(), angles.sin(), seqlens)


Call = Callable[[], Tensor]


def ours(case: DecodeCase, cache: Cache) -> Call:
    return lambda: flash_attn.flash_attn_with_kvcache(
        cache.q, cache.k_cache, cache.v_cache, cache_seqlens=cache.seqlens, causal=True
    )


def ours_paged(page: int) -> Callable[[DecodeCase, Cache], Call]:
    def make(case: DecodeCase, cache: Cache) -> Call:
        k_pages, v_pages, table = in_pages(cache.k_cache, cache.v_cache, page)
        return lambda: flash_attn.flash_attn_with_kvcache(
            cache.q, k_pages, v_pages, cache_seqlens=cache.seqlens, block_table=table, causal=True
        )

    return make


def ours_appending(rotary: bool) -> Callable[[DecodeCase, Cache], Call]:
    """The last token of every sequence is written again: the same amount of keys to read."""

    def make(case: DecodeCase, cache: Cache) -> Call:
        before = cache.seqlens - 1
        angles = {"rotary_cos": cache.cos, "rotary_sin": cache.sin} if rotary else {}
        k_cache, v_cache = cache.k_cache.clone(), cache.v_cache.clone()
        return lambda: flash_attn.flash_attn_with_kvcache(
            cache.q, k_cache, v_cache, cache.k, cache.v, **angles, cache_seqlens=before, causal=True,
            rotary_interleaved=False,
        )  # fmt: skip

    return make


def without_a_cache(case: DecodeCase, cache: Cache) -> Call:
    """What transformers' generate calls for a batch without padding."""
    return lambda: flash_attn.flash_attn_func(cache.q, cache.k_cache, cache.v_cache, causal=True)


def varlen_paged(page: int) -> Callable[[DecodeCase, Cache], Call]:
    """What servers with pages of their own call: packed queries, one for each sequence."""

    def make(case: DecodeCase, cache: Cache) -> Call:
        k_pages, v_pages, table = in_pages(cache.k_cache, cache.v_cache, page)
        q = cache.q[:, 0]
        ends_q = torch.arange(case.batch + 1, dtype=torch.int32, device=q.device)
        ends_k = ends_q * case.seqlen
        longest = (1, case.seqlen)
        return lambda: flash_attn.flash_attn_varlen_func(
            q, k_pages, v_pages, ends_q, ends_k, *longest, causal=True, block_table=table
        )[:, None]

    return make


def sdpa(case: DecodeCase, cache: Cache) -> Call:
    q, k, v = (x.transpose(1, 2) for x in (cache.q, cache.k_cache, cache.v_cache))
    grouped = case.nheads != case.nheads_k
    return lambda: F.scaled_dot_product_attention(q, k, v, enable_gqa=grouped).transpose(1, 2)


class Provider(NamedTuple):
    title: str
    make: Callable[[DecodeCase, Cache], Call]
    scope: Callable[[], AbstractContextManager[Any]] = contextlib.nullcontext
    same_result: bool = True  # as attention over the whole cache
    needs: str = ""  # a package without which the provider is left out


PROVIDERS = {
    "dense": Provider("flash_attn", ours),
    "page16": Provider("page 16", ours_paged(16)),
    "page256": Provider("page 256", ours_paged(256)),
    "func": Provider("flash_attn_func", without_a_cache),
    "varlen16": Provider("flash_attn_varlen_func, page 16", varlen_paged(16)),
    "append": Provider("append", ours_appending(False), same_result=False),
    "rotary": Provider("append, rotary", ours_appending(True), same_result=False),
    "invariant": Provider("batch invariant", ours, batch_invariant),
    "cudnn": Provider("cuDNN", sdpa, lambda: sdpa_kernel(SDPBackend.CUDNN_ATTENTION)),
    "fa2": Provider("FA2", sdpa, lambda: sdpa_kernel(SDPBackend.FLASH_ATTENTION)),
    "flaggems": Provider("FlagGems, page 16", varlen_paged(16), lambda: backends.use("flaggems"), needs="flag_gems"),
    "math": Provider("PyTorch", sdpa),
}
PEERS = ("cudnn", "fa2", "flaggems", "math")  # whose refusal is no failure


def measure(case: DecodeCase, names: Sequence[str], device: torch.device, rounds: int) -> list[dict[str, Any]]:
    """A row for each provider: microseconds and TB/s, or why there is no time."""
    cache = make_cache(case, device)
    rows: list[dict[str, Any]] = []
    ready: dict[str, Call] = {}
    for name in names:
        provider = PROVIDERS[name]
        try:
            call = provider.make(case, cache)
            with provider.scope():
                error = relative_error(case, cache, call()) if provider.same_result else 0.0
                host = statistics.median(host_time(call, device, 50 if device.type == "cuda" else 2, 3))
            if not error < ERROR_BOUND[case.dtype]:
                raise ArithmeticError(f"wrong result: error {error:.2e}")
        except Exception as failure:  # noqa: BLE001 - one provider's failure must not lose the others' results
            words = str(failure).strip().splitlines() or [""]
            rows.append({"case": case.name, "provider": name, "refused": f"{type(failure).__name__}: {words[0]}"})
            continue
        ready[name] = call
        rows.append({"case": case.name, "provider": name, "host_us": significant(host), "error": significant(error)})
    for name, samples in interleaved(ready, device, rounds).items():
        row = next(row for row in rows if row["provider"] == name)
        low, median, high = statistics.quantiles(samples, n=4, method="inclusive")
        row["median_us"], row["quartiles_us"] = significant(median), (significant(low), significant(high))
        row["terabytes_per_s"] = significant(case.bytes / median * 1e-6)
    return rows


def relative_error(case: DecodeCase, cache: Cache, out: Tensor) -> float:
    """Of the first and the last sequence, against the specification in fp64."""
    from flash_attn import reference

    errors = []
    for b in {0, case.batch - 1}:
        part = slice(b, b + 1)
        wanted, _ = reference.attention(cache.q[part], cache.k_cache[part], cache.v_cache[part])
        errors.append(two_norm_error(out[part].double(), wanted))
    return math.nan if any(map(math.isnan, errors)) else max(errors)


def interleaved(ready: dict[str, Call], device: torch.device, rounds: int) -> dict[str, list[float]]:
    """Microseconds of every call."""
    if device.type != "cuda":
        return {name: host_time(call, device, 1, max(2, rounds)) for name, call in ready.items()}
    flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device=device)
    marks: dict[str, list[tuple[torch.cuda.Event, torch.cuda.Event]]] = {name: [] for name in ready}
    for _round in range(rounds + 2):
        for name, call in ready.items():
            pair = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            with PROVIDERS[name].scope():
                flush.zero_()
                pair[0].record()
                call()
                pair[1].record()
            marks[name].append(pair)
    synchronize(device)
    return {name: [a.elapsed_time(b) * 1e3 for a, b in pairs[2:]] for name, pairs in marks.items()}


def measure_step(case: DecodeCase, device: torch.device) -> dict[str, Any]:
    """A captured step of 32 layers, each with a cache of its own, against 32 times its longest part alone."""
    caches = [make_cache(case, device, seed) for seed in range(4)]  # four caches take turns: more than the L2 holds
    steps = [ours_appending(True)(case, caches[layer % len(caches)]) for layer in range(len(caches))]
    for step in steps:
        step()
    synchronize(device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for layer in range(LAYERS):
            steps[layer % len(steps)]()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    graph.replay()
    start.record()
    for _ in range(10):
        graph.replay()
    end.record()
    synchronize(device)
    layer_us = start.elapsed_time(end) * 1e3 / (10 * LAYERS)
    return {
        "case": case.name,
        "layer_us": significant(layer_us),
        "terabytes_per_s": significant(case.bytes / layer_us * 1e-6),
    }


def table(document: dict[str, Any]) -> str:
    """TB/s and microseconds of every provider, one row a case; then the captured steps."""
    rows_of: dict[str, dict[str, dict[str, Any]]] = {}
    for row in document["results"]:
        rows_of.setdefault(row["case"], {})[row["provider"]] = row
    names = [name for name in PROVIDERS if any(name in rows for rows in rows_of.values())]
    lines = [[case, *(_cell(rows.get(name)) for name in names)] for case, rows in rows_of.items()]
    parts = [
        "TB/s of keys and values (microseconds):",
        report.markdown(["case", *(PROVIDERS[n].title for n in names)], lines),
    ]
    hosts = [
        (name, [r["host_us"] for rows in rows_of.values() if "host_us" in (r := rows.get(name, {}))]) for name in names
    ]
    parts += ["Host time of a call, microseconds, lowest of the cases: "
              + ", ".join(f"{PROVIDERS[name].title} {min(values):.0f}" for name, values in hosts if values) + "."]  # fmt: skip
    if document.get("step"):
        cells = [[row["case"], f"{row['layer_us']:.1f}", f"{row['terabytes_per_s']:.2f}"] for row in document["step"]]
        header = ["case", "a layer of a captured step, us", "TB/s"]
        parts += [f"A CUDA graph of {LAYERS} layers that append, rotate and attend:", report.markdown(header, cells)]
    refused = {
        f"- {PROVIDERS[row['provider']].title}, {row['case']}: {row['refused']}"
        for row in document["results"]
        if "refused" in row
    }
    return "\n\n".join([*parts, "\n".join(sorted(refused))]).rstrip()


def _cell(row: dict[str, Any] | None) -> str:
    return f"{row['terabytes_per_s']:.2f} ({row['median_us']:.0f})" if row and "median_us" in row else "-"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.decode", description=__doc__)
    parser.add_argument(
        "--providers", nargs="+", choices=list(PROVIDERS), default=[n for n in PROVIDERS if n != "math"],
        help="those whose package is missing are left out",
    )  # fmt: skip
    parser.add_argument("--filter", nargs="+", default=[], metavar="WORD", help="keep cases whose name has every word")
    parser.add_argument("--out", type=Path, default=report.RESULTS, help="folder of decode.json")
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--tiny", action="store_true", help="the path of a run, not a measurement")
    parser.add_argument("--skip-step", action="store_true", help="leave out the captured steps")
    options = parser.parse_args(arguments)
    device = torch.device(options.device)
    cases = [case for case in (TINY if options.tiny else CASES) if all(word in case.name for word in options.filter)]
    names = installed(options.providers, PROVIDERS)
    document: dict[str, Any] = {"kind": "decode", "machine": report.machine(device), "results": [], "step": []}
    for case in cases:
        document["results"] += measure(case, names, device, options.rounds)
        if device.type == "cuda":
            torch.cuda.empty_cache()
            if not options.skip_step and case.bytes < 2**33:
                document["step"].append(measure_step(case, device))
                torch.cuda.empty_cache()
    path = options.out / "decode.json"
    report.save_document(path, document)
    sys.stdout.write(f"{table(document)}\n\n{path}\n")
    return int(any("refused" in row for row in document["results"] if row["provider"] not in PEERS))


if __name__ == "__main__":
    sys.exit(main())
