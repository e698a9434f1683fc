"""The identity that other packages look for: distribution, version, top-level modules, a package others can extend."""

import subprocess
import sys
from importlib import metadata

import pytest

import flash_attn

PUBLIC_VERSION = "2.8.3"  # clients compare with this release; a local segment after "+" does not count


@pytest.fixture(scope="module")
def distribution() -> metadata.Distribution:
    try:
        return metadata.distribution("flash-attn")
    except metadata.PackageNotFoundError:
        pytest.skip("flash-attn is not installed; `make setup` does it")


def test_distribution_has_the_name_and_version_clients_gate_on(distribution):
    assert distribution.metadata["Name"] == "flash-attn"
    assert distribution.version.split("+")[0] == PUBLIC_VERSION


def test_version_equals_metadata(distribution):
    assert flash_attn.__version__ == distribution.version


def test_top_level_names_both_modules(distribution):
    assert (distribution.read_text("top_level.txt") or "").split() == ["flash_attn", "flash_attn_2_cuda"]
    owners = metadata.packages_distributions()
    assert "flash-attn" in owners["flash_attn"]
    assert "flash-attn" in owners["flash_attn_2_cuda"]


def test_torch_and_einops_are_all_it_requires(distribution):
    required = [line for line in distribution.requires or [] if "extra ==" not in line]
    assert sorted(required) == ["einops", "torch>=2.6"]


def test_another_distribution_can_add_a_subpackage(tmp_path):
    subpackage = tmp_path / "flash_attn" / "cute"
    subpackage.mkdir(parents=True)
    (subpackage / "__init__.py").write_text("answer = 42\n")
    code = f"import sys; sys.path.append({str(tmp_path)!r}); import flash_attn.cute; print(flash_attn.cute.answer)"
    finished = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert finished.stdout == "42\n", finished.stderr


def test_native_module_is_the_one_the_interface_uses():
    import flash_attn_2_cuda
    from flash_attn.flash_attn_interface import flash_attn_gpu

    assert flash_attn_gpu is flash_attn_2_cuda


def test_no_subpackage_named_cute_is_shipped():
    from importlib.util import find_spec

    assert find_spec("flash_attn.cute") is None
