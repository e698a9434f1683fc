"""Every case of a cache through the public function, against the truth: the CPU backends, the GPU, the interpreter."""

import pytest

from flash_attn import backends
from tests.support import calls
from tests.support.kvcache import (
    CACHE_CASES,
    SINK_CACHE_CASES,
    SMALL_CACHE_CASES,
    SMALL_SINK_CACHE_CASES,
    run_and_check,
)


@pytest.fixture
def device(request):
    with calls.running_on(request.param) as device:
        yield device


@pytest.mark.parametrize(
    "case, device",
    calls.placed(
        {
            "cpu": CACHE_CASES + SINK_CACHE_CASES[::3],
            "gpu": CACHE_CASES + SINK_CACHE_CASES[::2],
            "interpreter": SMALL_CACHE_CASES + SMALL_SINK_CACHE_CASES,
        }
    ),
    indirect=["device"],
)
def test_kvcache_matches_the_truth(case, device, seed):
    run_and_check(case, device, seed)


@pytest.mark.parametrize("case", CACHE_CASES[::5] + SINK_CACHE_CASES[::10], ids=str)
def test_kvcache_of_the_reference_backend_matches_the_truth(case, seed):
    with backends.use("reference"):
        run_and_check(case, "cpu", seed)
