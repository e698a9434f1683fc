"""Compiles what a run will need in parallel processes; the compilers keep their results on disk.

Workers are spawned, not forked, so that each starts CUDA for itself.
"""

import concurrent.futures
import itertools
import multiprocessing
import os
from collections.abc import Sequence

import torch

from benchmarks.cases import WINDOW_SIZE, Case
from benchmarks.providers import PROVIDERS, launch, make_inputs

MAX_WORKERS = 16


def prewarm(cases: Sequence[Case], provider_names: Sequence[str], device: str) -> None:
    """Runs every case once in worker processes; failures are left to the measurement, which reports them."""
    names = [name for name in provider_names if PROVIDERS[name].compiles]
    tasks = [(name, batch) for name in names for batch in share_kernels(cases)]
    if not tasks:
        return
    workers = min(MAX_WORKERS, len(tasks), os.cpu_count() or 1)
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(workers, mp_context=context) as pool:
        for name, batch in tasks:
            pool.submit(run_once, name, batch, device)


def share_kernels(cases: Sequence[Case]) -> list[list[Case]]:
    """Cases that differ in lengths only, which mostly run the same kernels."""

    def variant(case: Case) -> tuple[object, ...]:
        features = (case.window != WINDOW_SIZE, case.softcap > 0, case.alibi, case.sinks, case.dropout_p > 0)
        grouped = case.nheads != case.nheads_k
        return case.direction, case.headdim, case.dtype, case.causal, case.layout, grouped, features

    ordered = sorted(cases, key=lambda case: repr(variant(case)))
    return [list(batch) for _key, batch in itertools.groupby(ordered, key=variant)]


def run_once(provider_name: str, cases: Sequence[Case], device: str) -> None:
    """One launch of each case, in a process that ends afterwards."""
    provider = PROVIDERS[provider_name]
    where = torch.device(device)
    for case in cases:
        if provider.unsupported(case, where) is None:
            with provider.scope():
                launch(provider, case, make_inputs(case, where))()
