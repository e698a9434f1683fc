"""What every test gets: a seed per session, the device, NaN in the package's uninitialised memory."""

import secrets
import sys

import pytest
import torch

SEED = pytest.StashKey[int]()


def pytest_addoption(parser):
    parser.addoption("--seed", type=int, default=None, help="seed of the random inputs (default: a fresh one)")


def pytest_configure(config):
    chosen = config.getoption("--seed")
    fresh = secrets.randbelow(2**31) if chosen is None else chosen
    worker = getattr(config, "workerinput", None)  # of pytest-xdist
    config.stash[SEED] = worker["seed"] if worker else fresh
    if worker:
        torch.set_num_threads(1)  # the workers already occupy the cores


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node):
    """Every worker of pytest-xdist takes the controller's seed."""
    node.workerinput["seed"] = node.config.stash[SEED]


def pytest_report_header(config):
    return f"seed: {config.stash[SEED]} (repeat with --seed)"


def pytest_runtest_setup(item):
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a GPU")


@pytest.fixture(scope="session")
def seed(request) -> int:
    return request.config.stash[SEED]


@pytest.fixture(autouse=True)
def default_generators(seed):
    """Inputs drawn without a generator do not depend on the tests before, so on the order in which workers take them."""
    torch.manual_seed(seed)


@pytest.fixture
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(autouse=True)
def poison(monkeypatch):
    """Memory that flash_attn.* allocates without initialising holds NaN, so that what a kernel leaves out shows."""
    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
        monkeypatch.setattr(owner, name, _poisoned(getattr(owner, name)))


@pytest.fixture
def unpoisoned(poison, monkeypatch):
    """The allocations that `poison` has replaced, as torch.compile knows them."""
    import torch._dynamo.testing

    monkeypatch.undo()
    torch._dynamo.trace_rules.clear_lru_cache()
    torch._dynamo.reset()


def _poisoned(allocate):
    def allocate_poisoned(*args, **kwargs):
        x = allocate(*args, **kwargs)
        caller = sys._getframe(1).f_globals.get("__name__", "")
        if caller.split(".")[0] == "flash_attn" and x.is_floating_point():
            x.fill_(torch.nan)
        return x

    return allocate_poisoned
