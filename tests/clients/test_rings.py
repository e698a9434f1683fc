"""Ring attention of other packages over two processes on the CPU: outputs and gradients against attention in one piece."""

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from tests.clients import ring_worker
from tests.clients.ring_worker import RINGS, WORLD
from tests.support import tolerance
from tests.support.inputs import make_inputs

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("package", RINGS)
def test_two_processes_give_what_one_does(package, tmp_path, seed):
    if find_spec(package) is None:
        pytest.skip(f"needs {package}")
    command = [sys.executable, "-m", "tests.clients.ring_worker"]
    workers = [
        subprocess.Popen([*command, str(rank), str(tmp_path), str(seed), package], cwd=ROOT, stderr=subprocess.PIPE)
        for rank in range(WORLD)
    ]
    errors = [worker.communicate(timeout=300)[1].decode() for worker in workers]
    assert [worker.returncode for worker in workers] == [0, 0], "\n".join(errors)
    parts = [torch.load(tmp_path / f"{rank}.pt") for rank in range(WORLD)]
    for name, ring in RINGS[package].items():
        check(ring, [part[name] for part in parts], seed)


def check(ring: ring_worker.Ring, parts: list[dict[str, torch.Tensor]], seed: int) -> None:
    inputs = make_inputs(ring.case, "cpu", seed)
    dim = 1 if ring.case.layout == "dense" else 0
    order = torch.cat([ring.rows(rank) for rank in range(WORLD)]).argsort()
    whole = {name: torch.cat([part[name] for part in parts], dim).index_select(dim, order) for name in parts[0]}
    expected = tolerance.expected(ring.case, inputs)
    for what, actual in whole.items():
        truth, matched = getattr(expected.reference, what), getattr(expected.matched, what)
        # each rank's share is rounded before the shares are added: WORLD independent errors where one pass has one
        matched = truth + WORLD**0.5 * (matched - truth)
        tolerance.assert_close(actual, truth, matched, what, terms=expected.terms[what])
