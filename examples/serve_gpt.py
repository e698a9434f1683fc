"""Serves 64 prompts of mixed lengths with shared prefixes from one paged cache, in one continuous batch.

The GPT of gpt.py is not trained: with large random weights each token depends on all before it, so that a single wrong
key changes what follows. Compares every token with generation of one prompt at a time without a cache, prints what the
cache saved, and saves demo/serve_gpt.png: pages in use over time.
"""

import random
import time
from pathlib import Path

import torch

import gpt
from flash_attn.kvcache import PagedKVCache
from progress import Progress
from serving import Request, Server, Statistics, generate_alone

PLOT = Path(__file__).resolve().parent.parent / "demo" / "serve_gpt.png"
REQUESTS, PREFIXES = 64, 5
NUM_PAGES, PAGE_SIZE, MAX_BATCH = 160, 8, 24  # too few pages for so large a batch, so that some requests have to wait
TIE = 1e-3  # logits this close may change places when sums are rounded in another order


def main() -> None:
    """The whole demonstration."""
    setting = setting_for(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    model = make_model(setting)
    requests = make_requests(random.Random(0))
    cache = make_cache(setting)
    start = time.perf_counter()
    with Progress("serving", REQUESTS, unit="request", figure="pages in use") as progress:
        statistics = Server(model, cache, MAX_BATCH).serve(requests, progress)
    seconds = time.perf_counter() - start
    print_statistics(requests, statistics, seconds)
    save_plot(statistics)
    gaps = []
    with Progress("one at a time, no cache", REQUESTS, unit="request", figure="tokens") as progress:
        for request in requests:
            alone = generate_alone(model, request, setting.device)
            if alone != request.generated:
                gaps.append(gap_where_they_part(model, request, alone, setting.device))
            progress(len(alone))
    print(f"Requests whose tokens differ from one-at-a-time dense generation: {len(gaps)} of {REQUESTS}")
    if gaps:
        print(f"  logits of the two tokens where they part are {max(gaps):.1e} apart at most; a tie is {TIE}")
    if max(gaps, default=0.0) > TIE:
        raise SystemExit("the batch and the single requests disagree")


def setting_for(device: torch.device) -> gpt.Setting:
    """The same model everywhere, in float32: rounding must not decide between two tokens."""
    return gpt.setting_for(device)._replace(layers=3, heads=4, headdim=32, dtype=torch.float32)


def make_model(setting: gpt.Setting) -> gpt.GPT:
    """A GPT whose attention is far from uniform."""
    torch.manual_seed(0)
    model = gpt.GPT(setting)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith("qkv.weight"):
                weight.mul_(4)
    return model.to(setting.device).eval()


def make_cache(setting: gpt.Setting) -> PagedKVCache:
    """One cache for all layers."""
    return PagedKVCache(
        setting.layers, NUM_PAGES, PAGE_SIZE, setting.heads, setting.headdim, setting.dtype, setting.device
    )


def make_requests(order: random.Random) -> list[Request]:
    """Prompts that begin like one of a few documents and go on like another."""
    documents = [text for text in gpt.standard_library() if len(text) > 400]
    prefixes = [order.choice(documents)[: order.randint(40, 120)] for _ in range(PREFIXES)]
    requests = []
    for _ in range(REQUESTS):
        own = order.choice(documents)[: order.randint(4, 60)]
        requests.append(Request([gpt.BOUNDARY, *order.choice(prefixes), *own], max_new=order.randint(6, 36)))
    return requests


def print_statistics(requests: list[Request], statistics: Statistics, seconds: float) -> None:
    """How much was computed, and how much was not."""
    reports, generated = statistics.reports, sum(len(request.generated) for request in requests)
    peak = max(reports, key=lambda report: report.pages_in_use)
    unshared = max(report.tokens_held for report in reports) / PAGE_SIZE
    longest = max(len(request.tokens) for request in requests)
    print(
        f"{len(requests)} requests, {sum(len(r.prompt) for r in requests)} prompt tokens, {generated} generated in"
        f" {len(reports)} steps, {seconds:.1f} s, {generated / seconds:,.0f} tokens/s"
    )
    print(
        f"  batch: {max(statistics.batch_sizes)} requests at most, {statistics.preemptions} times one had to step back"
    )
    print(f"  tokens computed {statistics.tokens_computed}, found by content {statistics.tokens_reused}")
    print(
        f"  pages in use at most {peak.pages_in_use} of {NUM_PAGES}; without sharing {unshared:.0f}, in rows of the longest"
        f" request {max(statistics.batch_sizes) * longest / PAGE_SIZE:.0f}"
    )


def save_plot(statistics: Statistics) -> None:
    """Pages in use, shared and cached, and the batch, step by step."""
    try:
        import matplotlib
    except ImportError:
        print("No plot: matplotlib is not installed")
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot

    reports = statistics.reports
    figure, (page_axes, batch_axes) = pyplot.subplots(
        2, 1, figsize=(10, 6), sharex=True, height_ratios=(3, 1), layout="constrained"
    )
    page_axes.stackplot(
        range(len(reports)),
        [report.pages_in_use - report.pages_shared for report in reports],
        [report.pages_shared for report in reports],
        [report.pages_cached for report in reports],
        labels=("held by one request", "shared", "cached prefixes"),
        alpha=0.8,
    )
    page_axes.plot(
        [report.tokens_held / PAGE_SIZE for report in reports], "k--", linewidth=1, label="tokens / page size, unshared"
    )
    page_axes.axhline(NUM_PAGES, color="grey", linewidth=1, label="all pages")
    page_axes.set(ylabel="pages", title=f"{REQUESTS} requests through one cache of {NUM_PAGES} pages")
    page_axes.legend(fontsize=8, loc="lower left")
    batch_axes.plot(statistics.batch_sizes)
    batch_axes.set(xlabel="step", ylabel="requests in the batch")
    PLOT.parent.mkdir(exist_ok=True)
    figure.savefig(PLOT, dpi=130)
    pyplot.close(figure)
    print(f"Plot: {PLOT.relative_to(PLOT.parent.parent)}")


@torch.no_grad()
def gap_where_they_part(model: gpt.GPT, request: Request, alone: list[int], device: torch.device) -> float:
    """How far apart the logits of the two tokens are at the first difference: rounding explains next to nothing only."""
    both = list(zip(request.generated, alone, strict=False))
    place = next(place for place, (batched, single) in enumerate(both) if batched != single)
    batch = gpt.pack([[*request.prompt, *alone[:place], gpt.BOUNDARY]], device)
    logits = model(batch, gpt.plain_attention)[-1]
    return float((logits[both[place][0]] - logits[both[place][1]]).abs())


if __name__ == "__main__":
    main()
