"""`python -m flash_attn` as a user runs it, and what it is made of."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from flash_attn import diagnostics

ROOT = Path(__file__).parents[2]

PLANTED = """
import runpy, sys
import flash_attn.backends.cpu as cpu
right = cpu.{function}
def wrong(problem, operands, *arguments):
    result = right(problem, operands, *arguments)
    {fault}
    return result
cpu.{function} = wrong
sys.argv = ["flash_attn", "--no-speed"]
runpy.run_module("flash_attn", run_name="__main__")
"""


def run(*arguments: str) -> subprocess.CompletedProcess:
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment |= {"CUDA_VISIBLE_DEVICES": "", "FLASH_ATTENTION_BACKEND": "cpu"}
    command = [sys.executable, *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT, timeout=300)


def test_reports_and_exits_with_0():
    done = run("-m", "flash_attn", "--no-speed")
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"all {len(diagnostics.CHECKS)} checks pass" in done.stdout
    for word in ("Machine", "Backends", "portable refuses", "Triton", "transformers", "yunchang", "float64", "cpu"):
        assert word in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 100
    assert "Speed" not in done.stdout


@pytest.mark.parametrize(
    "function, fault",
    [
        ("forward", "result.out.mul_(1.02)"),
        ("forward", "result.softmax_lse.add_(0.01)"),
        ("backward", "arguments[-1].dk.mul_(0.97)"),
        ("backward", "raise RuntimeError('planted')"),
    ],
)
def test_a_wrong_result_exits_with_1(function, fault):
    done = run("-c", PLANTED.format(function=function, fault=fault))
    assert done.returncode == 1, done.stdout + done.stderr
    assert "FAILED" in done.stdout


def test_shares_of_exact_and_of_wrong_results():
    torch.manual_seed(0)
    truth = torch.randn(50, 32, dtype=torch.float64)
    matched = truth.half()
    assert diagnostics.share(matched, truth, matched, 1.5) <= 1.0
    assert diagnostics.share((truth * 1.005).half(), truth, matched, 1.5) > 1.0
    one_row = matched.clone()
    one_row[7] *= 1.01
    assert diagnostics.share(one_row, truth, matched, 1.5) > 1.0
    one_row[7, 0] = torch.nan
    assert diagnostics.share(one_row, truth, matched, 1.5) == float("inf")


def test_lse_shares():
    truth = torch.tensor([[1.0, -torch.inf, 5.0]], dtype=torch.float64)
    assert diagnostics.lse_share(truth.float(), truth) < 0.1
    assert diagnostics.lse_share(truth.float() + 0.01, truth) > 1.0
    assert diagnostics.lse_share(torch.tensor([[1.0, 0.0, 5.0]]), truth) == float("inf")
    assert diagnostics.lse_share(torch.tensor([[torch.nan, -torch.inf, 5.0]]), truth) == float("inf")


@pytest.mark.parametrize(
    "version, refused_by",
    [
        ("2.8.3+plus.1", set()),
        ("2.8.4", {"transformer-engine"}),
        ("2.10.0", {"transformer-engine", "xformers", "yunchang"}),
        ("2.5.0", {"diffusers", "xformers", "yunchang"}),
    ],
)
def test_gates_depend_on_the_version(monkeypatch, version, refused_by):
    monkeypatch.setattr(diagnostics, "version", lambda distribution: version)
    monkeypatch.setattr("flash_attn.__version__", version)
    monkeypatch.setattr("importlib.metadata.packages_distributions", lambda: {"flash_attn": ["flash_attn"]})
    device = torch.device("cuda")
    reasons = {client: gate(device) for client, gate in diagnostics.GATES.items()}
    assert {client for client, reason in reasons.items() if reason} == refused_by, reasons


def test_gates_without_an_installed_distribution(monkeypatch):
    monkeypatch.setattr(diagnostics, "version", lambda distribution: None)
    monkeypatch.setattr("importlib.metadata.packages_distributions", dict)
    reasons = {client: gate(torch.device("cuda")) for client, gate in diagnostics.GATES.items()}
    assert "flash-attn" in reasons["transformers"]
    assert "pip install" in reasons["diffusers"]
    assert "pip install" in reasons["transformer-engine"]
    assert reasons["xformers"] is None


def test_transformers_wants_a_gpu(monkeypatch):
    monkeypatch.setattr("importlib.metadata.packages_distributions", lambda: {"flash_attn": ["flash-attn"]})
    assert "cpu" in diagnostics.transformers_gate(torch.device("cpu"))
    monkeypatch.setattr("importlib.metadata.packages_distributions", lambda: {"flash_attn": ["Flash-Attn"]})
    assert "Flash-Attn" in diagnostics.transformers_gate(torch.device("cuda"))


def test_a_missing_name_is_told():
    assert diagnostics.missing_name("flash_attn", "no_such_name") == "flash_attn lacks no_such_name"
    assert "fails" in diagnostics.missing_name("no_such_module_at_all", "x")
