"""compute-sanitizer finds no access outside an allocation in seventeen small problems."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
TIMEOUT_S = 300
OPTIONS = ("--tool", "memcheck", "--report-api-errors", "no", "--error-exitcode", "1")


@pytest.mark.gpu
def test_memcheck_finds_nothing():
    sanitizer = shutil.which("compute-sanitizer")
    if sanitizer is None:
        pytest.skip("compute-sanitizer is not on the PATH")
    command = [sanitizer, *OPTIONS, sys.executable, "-m", "tests.gpu.sanitizer_cases"]
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    finished = subprocess.run(
        command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=TIMEOUT_S, check=False
    )
    output = finished.stdout + finished.stderr
    assert "solved 17" in finished.stdout, output[-5000:]
    assert "ERROR SUMMARY: 0 errors" in output and finished.returncode == 0, output[-5000:]
