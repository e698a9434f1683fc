"""Prepares .venv in this checkout for `make`. Standard library only; safe to repeat; fast when nothing changed.

Which torch is used, in this order:
1. the one that already drives a GPU in the Python running this script: .venv borrows its packages (no download);
2. the one found in .venv, if a developer put another version or build there;
3. the version pinned in constraints/torch.txt, in whatever build the package index offers.
Triton comes with GPU builds of torch. Where none came, constraints/triton-without-gpu.txt names the one to install.
With --clients it adds what tests alone need: FlagGems, without its dependencies, which pin an old numpy (without a GPU only the
sources of its kernels are used), and likewise the clients whose code tests/clients runs, with what constraints/clients.txt says
they need.
"""

import argparse
import hashlib
import platform
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
VENV_PYTHON = VENV / "bin" / "python"
STAMP = VENV / "setup-stamp"
CLIENTS_STAMP = VENV / "clients-stamp"
PINS = ROOT / "constraints" / "python.txt"
TORCH_PIN = ROOT / "constraints" / "torch.txt"
TRITON_PIN = ROOT / "constraints" / "triton-without-gpu.txt"
FLAGGEMS_PIN = ROOT / "constraints" / "flaggems.txt"
CLIENTS_PIN = ROOT / "constraints" / "clients.txt"
INPUTS = (Path(__file__).resolve(), ROOT / "pyproject.toml", PINS, TORCH_PIN, TRITON_PIN, FLAGGEMS_PIN, CLIENTS_PIN)

NEEDED = ("torch", "einops", "numpy", "setuptools", "pytest", "xdist", "hypothesis")
USEFUL = ("mypy", "ruff", "matplotlib", "tqdm")
PACKAGES = {"xdist": "pytest-xdist"}  # where the package is not called like its module

DRIVES_A_GPU = """
import sys, torch
recent = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 6)
sys.exit(not (recent and (torch.cuda.is_available() or torch.xpu.is_available())))
"""
SUITS_THE_INTERPRETER = """
import sys, numpy
sys.exit(tuple(map(int, numpy.__version__.split(".")[:2])) >= (2, 4))
"""
HAS_ITS_OWN_PIP = "import sys, pip; sys.exit(not pip.__file__.startswith(sys.prefix))"
SHOW_VERSIONS = """
from importlib.metadata import distributions
found = {d.metadata["Name"]: d.version for d in distributions()}
print(", ".join(f"{name} {found.get(name, 'absent')}" for name in ("torch", "triton", "numpy", "pytest")))
"""


def main() -> None:
    """Creates or completes .venv, or returns at once when it is up to date."""
    if sys.version_info < (3, 10):  # noqa: UP036 — `python3` may be any version when make starts this
        raise SystemExit(f"Python 3.10 or newer is needed, not {platform.python_version()}: try make PYTHON=python3.12")
    parser = argparse.ArgumentParser(description="Prepares .venv in this checkout.")
    parser.add_argument("--clients", action="store_true", help="also what tests alone need")
    options = parser.parse_args()
    wanted = fingerprint()
    if not stamped(STAMP, wanted):
        for stamp in (STAMP, CLIENTS_STAMP):
            stamp.unlink(missing_ok=True)
        if succeeds(sys.executable, DRIVES_A_GPU):
            borrow_packages()
            install_missing()
        else:
            create_own()
            install_tools()
        say(f"ready: Python {platform.python_version()}, {output_of(SHOW_VERSIONS)}")
        STAMP.write_text(wanted)
    if options.clients and not stamped(CLIENTS_STAMP, wanted):
        if succeeds(VENV_PYTHON, HAS_ITS_OWN_PIP):
            install_clients()
        CLIENTS_STAMP.write_text(wanted)


def stamped(stamp: Path, wanted: str) -> bool:
    """Whether what the stamp stands for was done, for the same inputs."""
    return stamp.is_file() and stamp.read_text() == wanted and VENV_PYTHON.exists()


def fingerprint() -> str:
    """Changes whenever a new set-up is needed: other pins, another Python, a checkout that moved."""
    digest = hashlib.sha256()
    for path in INPUTS:
        digest.update(path.read_bytes())
    digest.update(f"{sys.executable} {sys.version} {ROOT}".encode())
    return digest.hexdigest()


def borrow_packages() -> None:
    """A .venv that sees this Python's packages, even when this Python is itself a virtual environment."""
    say(f"using the torch of {sys.executable}, which drives this machine's GPU")
    create_venv("--without-pip")
    borrowed = [folder for folder in sys.path if folder.endswith(("site-packages", "dist-packages"))]
    own = output_of("import sysconfig; print(sysconfig.get_path('purelib'))")
    Path(own, "borrowed.pth").write_text("".join(f"{folder}\n" for folder in borrowed))


def install_missing() -> None:
    """Adds what the borrowed packages lack. Without a network linters and plots may stay absent, test tools may not."""
    missing = [name for name in (*NEEDED, *USEFUL) if not importable(name)]
    if not succeeds(VENV_PYTHON, SUITS_THE_INTERPRETER):
        missing.append("numpy")
    if missing:
        wanted = [PACKAGES.get(name, name) for name in missing]
        if not pip("install", "--retries", "0", "--timeout", "10", "--constraint", str(PINS), *wanted, check=False):
            say(f"no download possible, going on without these or with other versions of them: {', '.join(missing)}")
    absent = [name for name in NEEDED if not importable(name)]
    if absent:
        raise SystemExit(f"set-up failed: {', '.join(absent)} cannot be imported and could not be installed")
    pip("install", "--no-deps", "--no-build-isolation", "--editable", str(ROOT))


def create_own() -> None:
    """A .venv that shares nothing with this Python. One made earlier is kept, with the torch it holds."""
    if not succeeds(VENV_PYTHON, HAS_ITS_OWN_PIP):
        create_venv()


def install_tools() -> None:
    """Torch first; then Triton if torch brought none; then the rest, so that nothing overrules torch's choice."""
    if not importable("torch"):
        say("installing torch")
        pip("install", "--no-compile", "--constraint", str(PINS), "--requirement", str(TORCH_PIN))
    if sys.platform == "linux" and not importable("triton"):
        say("installing triton, which this build of torch did not bring")
        pip("install", "--requirement", str(TRITON_PIN))
    say("installing the tools for tests and demo")
    pip("install", "--constraint", str(PINS), "setuptools", "wheel")
    pip("install", "--constraint", str(PINS), "--no-build-isolation", "--editable", f"{ROOT}[dev]")


def install_clients() -> None:
    """What tests run beside this package; without a network they are skipped."""
    say("installing the packages whose own code the tests run")
    if not pip("install", "--no-deps", "--requirement", str(FLAGGEMS_PIN), check=False):
        say("going on without FlagGems, whose tests are then skipped")
    if not pip("install", "--no-deps", "--no-compile", "--requirement", str(CLIENTS_PIN), check=False):
        say("going on without transformers and other clients, whose tests are then skipped")


def create_venv(*options: str) -> None:
    """A fresh .venv in place of any other."""
    shutil.rmtree(VENV, ignore_errors=True)
    subprocess.run([sys.executable, "-m", "venv", *options, str(VENV)], check=True)


def pip(*arguments: str, check: bool = True) -> bool:
    """Runs pip inside .venv; whether it succeeded. One that may fail does so without a word."""
    command = [str(VENV_PYTHON), "-m", "pip", "--disable-pip-version-check", "--quiet", "--quiet", *arguments]
    return subprocess.run(command, check=check, capture_output=not check).returncode == 0


def importable(module: str) -> bool:
    """Whether .venv finds a module; it is not imported."""
    return succeeds(VENV_PYTHON, f"import importlib.util, sys; sys.exit(importlib.util.find_spec({module!r}) is None)")


def succeeds(python: str | Path, code: str) -> bool:
    """Whether a Python runs the code to exit status 0."""
    if not Path(python).exists():
        return False
    return subprocess.run([str(python), "-c", code], capture_output=True, check=False).returncode == 0


def output_of(code: str) -> str:
    """What the code prints in .venv."""
    finished = subprocess.run([str(VENV_PYTHON), "-c", code], check=True, capture_output=True, text=True)
    return finished.stdout.strip()


def say(message: str) -> None:
    """Progress for the person who typed make."""
    print(f"set-up: {message}", flush=True)


if __name__ == "__main__":
    main()
