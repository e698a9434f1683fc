"""Every case forward, through the public functions, against the truth: the CPU backend, the GPU, the interpreter."""

import pytest

from tests.support import calls
from tests.support.cases import CASES, SMALL_CASES
from tests.support.inputs import make_inputs
from tests.support.tolerance import expected


@pytest.fixture
def device(request):
    with calls.running_on(request.param) as device:
        yield device


@pytest.mark.parametrize(
    "case, device",
    calls.placed({"cpu": CASES, "gpu": CASES, "interpreter": SMALL_CASES}),
    indirect=["device"],
)
def test_forward_matches_the_truth(case, device, seed):
    inputs = make_inputs(case, device, seed)
    results, keep = calls.forward(case, inputs, seed)
    expected(case, inputs, keep).check(**results)
