"""The worked example, smaller: continuous batching gives the tokens of one-at-a-time generation."""

import importlib
import random
from pathlib import Path

import pytest
import torch

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture
def example(monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLES)
    example = importlib.import_module("serve_gpt")
    texts = random.Random(0)
    documents = [bytes(texts.choices(range(1, 128), k=500)) for _ in range(50)]
    monkeypatch.setattr(example.gpt, "standard_library", lambda: documents)  # the real one takes seconds to parse
    return example


@pytest.mark.parametrize("num_pages", [30, 400], ids=["few pages", "many pages"])
@pytest.mark.parametrize("where", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_serving_gives_the_tokens_of_one_at_a_time_generation(example, where, num_pages, monkeypatch, tmp_path):
    monkeypatch.setattr(example, "NUM_PAGES", num_pages)
    monkeypatch.setattr(example, "PLOT", tmp_path / "demo" / "plot.png")
    setting = example.setting_for(torch.device(where))._replace(layers=2, heads=2)
    model, cache = example.make_model(setting), example.make_cache(setting)
    requests = example.make_requests(random.Random(1))[:10]
    finished = []
    statistics = example.Server(model, cache, max_batch=6).serve(requests, finished.append)

    assert len(finished) == len(requests)
    assert (statistics.preemptions > 0) == (num_pages == 30)
    assert statistics.tokens_reused > 0
    assert num_pages == 30 or max(report.pages_shared for report in statistics.reports) > 0
    assert cache.sequences == () and cache.num_available == num_pages
    for request in requests:
        alone = example.generate_alone(model, request, setting.device)
        if alone != request.generated:
            assert example.gap_where_they_part(model, request, alone, setting.device) < example.TIE
    assert len({token for request in requests for token in request.generated}) > 20  # no monotonous text
    pytest.importorskip("matplotlib")
    example.save_plot(statistics)
    assert (tmp_path / "demo" / "plot.png").stat().st_size > 10_000
