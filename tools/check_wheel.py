"""Builds the wheel, installs it into an empty environment beside this one's torch, and imports it there."""

import subprocess
import sys
import sysconfig
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TOP_LEVEL = ("flash_attn", "flash_attn_2_cuda")

IMPORT_IT = """
import sys
from importlib.metadata import version
import flash_attn, flash_attn_2_cuda, flash_attn.bert_padding
assert flash_attn.__file__.startswith(sys.prefix), f"imported from {flash_attn.__file__}, not from the wheel"
assert flash_attn.__version__ == version("flash-attn"), (flash_attn.__version__, version("flash-attn"))
print(f"wheel: flash-attn {flash_attn.__version__} imports")
"""


def main() -> None:
    """Exits with an error if the wheel is incomplete or does not import."""
    with tempfile.TemporaryDirectory() as folder:
        wheel = build(Path(folder))
        compare_with_source(wheel)
        python = install(wheel, Path(folder) / "environment")
        subprocess.run([str(python), "-c", IMPORT_IT], check=True, cwd=folder)


def build(folder: Path) -> Path:
    """The wheel of this checkout, built from a copy so that no build folder is left here."""
    source = folder / "source"
    tracked = [*(ROOT / name for name in ("pyproject.toml", "README.md", "LICENSE")), *source_files()]
    for path in tracked:
        copy = source / path.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(path.read_bytes())
    pip("wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(folder), str(source))
    (wheel,) = folder.glob("*.whl")
    return wheel


def source_files() -> list[Path]:
    """Every file of the package."""
    files = (path for name in TOP_LEVEL for path in (ROOT / f"{name}.py", *(ROOT / name).rglob("*")))
    return sorted(path for path in files if path.is_file() and "__pycache__" not in path.parts)


def compare_with_source(wheel: Path) -> None:
    """The wheel holds the package's files, top_level.txt, and nothing else."""
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        (top_level,) = (name for name in names if name.endswith("top_level.txt"))
        found = tuple(archive.read(top_level).decode().split())
    if found != TOP_LEVEL:
        raise SystemExit(f"top_level.txt names {found}, expected {TOP_LEVEL}")
    packed = {name for name in names if ".dist-info/" not in name}
    difference = packed ^ {str(path.relative_to(ROOT)) for path in source_files()}
    if difference:
        raise SystemExit(f"wheel and source differ in {sorted(difference)}")


def install(wheel: Path, environment: Path) -> Path:
    """The Python of a new environment that holds the wheel and sees torch; editable installs are not seen."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(environment)], check=True)
    python = environment / "bin" / "python"
    paths = subprocess.run(
        [str(python), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
        check=True,
        capture_output=True,
        text=True,
    )
    borrowed = [sysconfig.get_path("purelib"), *(folder for folder in sys.path if folder.endswith("-packages"))]
    Path(paths.stdout.strip(), "borrowed.pth").write_text("".join(f"{folder}\n" for folder in dict.fromkeys(borrowed)))
    pip("--python", str(python), "install", "--no-deps", "--no-index", "--ignore-installed", str(wheel))
    return python


def pip(*arguments: str) -> None:
    """Runs this environment's pip."""
    subprocess.run([sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet", *arguments], check=True)


if __name__ == "__main__":
    main()
