"""Time launch configurations and numbers of splits of the decode kernel: the measurements behind launch/decode.py.

    python -m benchmarks.tune_decode --out DIR [--pages 0 16 256] [--filter WORD ...]

Every candidate is compiled in a process pool first, then timed on the cases of benchmarks.decode, each call after the
last-level cache was overwritten. Printed are the best configurations with their best number of splits, and what the stored
configuration and `split_count` make of the case.
"""

import argparse
import concurrent.futures
import json
import multiprocessing
import pathlib
import statistics
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import triton

from benchmarks.decode import CASES, FLUSH_BYTES, Cache, DecodeCase, make_cache
from benchmarks.providers import in_pages
from flash_attn import flash_attn_with_kvcache, hardware, launch
from flash_attn.launch.decode import MAX_SPLITS, DecodeConfig

CONFIGS = {  # (block_n, warps, stages, programs per SM)
    64: [(128, 4, 3, 3), (128, 4, 4, 2), (64, 4, 3, 4), (64, 4, 4, 4), (128, 8, 3, 3), (64, 2, 4, 4), (256, 8, 3, 1),
         (64, 2, 2, 8), (64, 2, 3, 5)],
    128: [(64, 4, 3, 3), (64, 4, 4, 2), (64, 4, 5, 1), (64, 8, 3, 3), (32, 4, 4, 4), (32, 4, 6, 2), (128, 8, 3, 1),
          (128, 4, 3, 1), (64, 2, 4, 2), (32, 2, 5, 3), (64, 2, 2, 4)],
}  # fmt: skip
SPLITS = (1, 2, 3, 4, 5, 6, 8, 11, 12, 16, 22, 24, 32, 33, 44, 48, 64, 66, 96, 128)


class Candidate(NamedTuple):
    headdim: int
    group: int
    page: int  # 0 is a dense cache
    config: DecodeConfig


def arguments_of(cache: Cache, page: int) -> dict[str, Any]:
    """What a call over the cache, or over its pages, is given."""
    caches = cache.k_cache, cache.v_cache
    k_cache, v_cache, table = in_pages(*caches, page) if page else (*caches, None)
    return dict(
        q=cache.q, k_cache=k_cache, v_cache=v_cache, block_table=table, cache_seqlens=cache.seqlens, causal=True
    )


def compile_candidate(candidate: Candidate) -> tuple[Candidate, str | None]:
    """Run one candidate once on a small problem, which leaves its binaries in Triton's cache."""
    case = DecodeCase(2, 1024, 8 * candidate.group, 8, candidate.headdim)
    arguments = arguments_of(make_cache(case, torch.device("cuda")), candidate.page)
    try:
        with launch.pinned(decode=candidate.config):
            for num_splits in (1, 4):
                flash_attn_with_kvcache(**arguments, num_splits=num_splits)
        torch.cuda.synchronize()
    except triton.runtime.errors.OutOfResources as error:
        return candidate, repr(error)[:120]
    return candidate, None


def microseconds(call: Callable[[], Any], flush: torch.Tensor, rounds: int) -> float:
    """Median device time of a call with a cold cache."""
    call()
    pairs = []
    for _round in range(rounds):
        pair = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        flush.zero_()
        pair[0].record()
        call()
        pair[1].record()
        pairs.append(pair)
    torch.cuda.synchronize()
    return statistics.median(a.elapsed_time(b) * 1e3 for a, b in pairs)


def worth_trying(case: DecodeCase, num_sms: int) -> list[int]:
    """Numbers of splits that give every SM something to do and no more than eight programs."""
    programs = case.batch * case.nheads_k
    return [n for n in SPLITS if n <= MAX_SPLITS and (n == 1 or 0.5 * num_sms <= programs * n <= 8 * num_sms)]


def measure(case: DecodeCase, page: int, configs: Sequence[DecodeConfig], rounds: int) -> list[dict[str, Any]]:
    """A row for each configuration and number of splits; the stored ones have config None and splits 0."""
    num_sms = hardware.of(torch.device("cuda", torch.cuda.current_device())).num_sms
    arguments = arguments_of(make_cache(case, torch.device("cuda")), page)
    flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device="cuda")
    rows = []
    for config in (None, *configs):
        for num_splits in [0, *worth_trying(case, num_sms)] if config else [0]:
            with launch.pinned(**({"decode": config} if config else {})):
                time = microseconds(
                    lambda n=num_splits: flash_attn_with_kvcache(**arguments, num_splits=n), flush, rounds
                )
            rows.append(
                dict(
                    case=case.name, page=page, config=config, splits=num_splits, us=time, tbps=case.bytes / time * 1e-6
                )
            )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=pathlib.Path, required=True)
    parser.add_argument("--pages", nargs="+", type=int, default=[0, 16, 256])
    parser.add_argument("--filter", nargs="+", default=[], metavar="WORD", help="keep cases whose name has every word")
    parser.add_argument("--rounds", type=int, default=12)
    options = parser.parse_args()
    cases = [case for case in CASES if all(word in case.name for word in options.filter)]
    candidates = dict.fromkeys(
        Candidate(case.headdim, case.nheads // case.nheads_k, page, DecodeConfig(*config))
        for case in cases
        for page in options.pages
        for config in CONFIGS[case.headdim]
    )
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(16, mp_context=context) as pool:
        outcomes = dict(pool.map(compile_candidate, candidates))
    rows = []
    for case in cases:
        for page in options.pages:
            kind = case.headdim, case.nheads // case.nheads_k, page
            fitting = [c.config for c, error in outcomes.items() if error is None and c[:3] == kind]
            found = measure(case, page, fitting, options.rounds)
            rows += found
            print(f"{case.name} page {page}: stored {found[0]['us']:.1f} us {found[0]['tbps']:.2f} TB/s")
            best: dict[Any, list[dict[str, Any]]] = {}
            for row in found[1:]:
                best.setdefault(row["config"], []).append(row)
            for config, group in sorted(best.items(), key=lambda item: min(row["us"] for row in item[1]))[:5]:
                fastest = min(group, key=lambda row: row["us"])
                chosen = next(row for row in group if row["splits"] == 0)
                print(f"   {tuple(config)!s:18} splits {fastest['splits']:3}: {fastest['us']:.1f} us {fastest['tbps']:.2f}"
                      f"   chosen {chosen['us']:.1f} us")  # fmt: skip
            torch.cuda.empty_cache()
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "tune_decode.json").write_text(json.dumps(rows))


if __name__ == "__main__":
    main()
