"""What happens around transformers: it is imported by `register` alone, and named when it is absent or too old."""

import subprocess
import sys

import pytest

from flash_attn.integrations.transformers import register


def test_the_module_imports_nothing_of_transformers():
    code = "import sys, flash_attn.integrations.transformers; sys.exit('transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_an_absent_transformers_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match='attn_implementation="fa_plus" needs transformers 5 or newer'):
        register()


def test_an_old_transformers_is_named_with_its_version(monkeypatch):
    pytest.importorskip("transformers")
    monkeypatch.setattr("transformers.__version__", "4.57.1")
    with pytest.raises(ImportError, match=r"needs transformers 5 or newer, found 4\.57\.1"):
        register()
