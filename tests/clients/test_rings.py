"""Ring attention of other packages over two processes on the CPU: outputs and gradients against attention in one piece."""

from importlib.util import find_spec

import pytest
import torch

from tests.clients import ring_worker
from tests.clients.ring_worker import RINGS
from tests.support import tolerance
from tests.support.inputs import make_inputs
from tests.support.processes import WORLD, in_two_processes


@pytest.fixture(scope="module")
def results(tmp_path_factory, seed):
    """What both processes computed, by package; all in one pair of processes, which takes seconds to start."""
    folder = tmp_path_factory.mktemp("rings")
    packages = [package for package in RINGS if find_spec(package) is not None]
    in_two_processes(ring_worker.work, folder, folder, seed, packages)
    return {name: [torch.load(folder / f"{name}-{rank}.pt") for rank in range(WORLD)] for name in packages}


@pytest.mark.parametrize("package", RINGS)
def test_two_processes_give_what_one_does(package, results, seed):
    if package not in results:
        pytest.skip(f"needs {package}")
    for name, ring in RINGS[package].items():
        check(ring, [part[name] for part in results[package]], seed)


def check(ring: ring_worker.Ring, parts: list[dict[str, torch.Tensor]], seed: int) -> None:
    inputs = make_inputs(ring.case, "cpu", seed)
    dim = 1 if ring.case.layout == "dense" else 0
    order = torch.cat([ring.rows(rank) for rank in range(WORLD)]).argsort()
    whole = {name: torch.cat([part[name] for part in parts], dim).index_select(dim, order) for name in parts[0]}
    expected = tolerance.expected(ring.case, inputs)
    backward = expected.matched_from(whole["out"], expected.reference.lse.float())  # as `Expected.check` does
    for what in ring.right:
        truth = getattr(expected.reference, what)
        matched = getattr(expected.matched if what == "out" else backward, what)
        # each rank's share is rounded before the shares are added: WORLD independent errors where one pass has one
        matched = truth + WORLD**0.5 * (matched - truth)
        tolerance.assert_close(whole[what], truth, matched, what, terms=expected.terms[what])
