"""compute-sanitizer finds no access outside an allocation, and no race in shared memory, in small problems."""

import ast
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from flash_attn.kernels import hopper
from tests.support.calls import skip_unless_hopper

REPOSITORY = Path(__file__).parents[2]
TIMEOUT_S = 300
OPTIONS = ("--report-api-errors", "no", "--print-limit", "100000")
FAIL_ON_ERROR = ("--error-exitcode", "1")
# What these write others read after they have met at an mbarrier, which racecheck does not follow from one warp's code into
# another's: a tile's numbers and a head's dropout key in the first two, what Triton itself hands to partitions in the kernels.
HANDED_OVER = {
    "announce_next",
    "store_key",
    "attn_fwd_kernel",
    "attn_bwd_kernel",
    "attn_bwd_dq_kernel",
    "attn_bwd_dkdv_kernel",
}


SOLVED = {"portable": 20, "hopper": 10}  # problems


def sanitize(tool: str, backend: str, *options: str) -> str:
    """What the tool says of the cases of a backend, all of which were solved."""
    sanitizer = shutil.which("compute-sanitizer")
    if sanitizer is None:
        pytest.skip("compute-sanitizer is not on the PATH")
    if backend == "hopper":
        skip_unless_hopper()
    program = [sys.executable, "-m", "tests.gpu.sanitizer_cases", backend]
    command = [sanitizer, "--tool", tool, *OPTIONS, *options, *program]
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    finished = subprocess.run(
        command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=TIMEOUT_S, check=False
    )
    output = finished.stdout + finished.stderr
    assert f"solved {SOLVED[backend]}\n" in finished.stdout and finished.returncode == 0, output[-5000:]
    return output


def writers(output: str) -> set[str]:
    """The functions of kernels/hopper in whose lines the reported writes lie; other files' lines as they are."""
    found = set()
    for name, line in set(re.findall(r"Write access at .* in (\w+\.py):(\d+)", output)):
        source = Path(hopper.__file__).parent / name
        functions = ast.parse(source.read_text()).body if source.exists() else []
        around = [f.name for f in functions if isinstance(f, ast.FunctionDef) and f.lineno <= int(line) <= f.end_lineno]
        found.update(around or {f"{name}:{line}"})
    return found


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["portable", "hopper"])
def test_memcheck_finds_nothing(backend):
    output = sanitize("memcheck", backend, *FAIL_ON_ERROR)
    assert "ERROR SUMMARY: 0 errors" in output, output[-5000:]


@pytest.mark.gpu
def test_racecheck_finds_nothing_in_portable_kernels():
    output = sanitize("racecheck", "portable", *FAIL_ON_ERROR)
    assert "RACECHECK SUMMARY: 0 hazards" in output, output[-5000:]


@pytest.mark.gpu
def test_racecheck_finds_only_what_hopper_partitions_hand_over():
    output = sanitize("racecheck", "hopper")
    assert "RACECHECK SUMMARY" in output, output[-5000:]
    assert writers(output) <= HANDED_OVER, output[-5000:]
