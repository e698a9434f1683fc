"""Single modules of installed packages, without what their packages import on the way to them.

A package that trains language models imports ray or vLLM first; its attention needs neither. Named packages are loaded
without their __init__, named modules are stand-ins whose every attribute is an empty class. flash_attn is never one.
"""

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from importlib.machinery import ModuleSpec
from importlib.util import find_spec, module_from_spec
from pathlib import Path
from types import ModuleType

import pytest

VERL = ("verl", "verl.utils", "verl.models", "verl.models.transformers")


class StandIn(ModuleType):
    """A module of something that is not used: classes to annotate with, to derive from and to make objects of."""

    def __getattr__(self, name: str) -> type:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {"__init__": lambda self, *words, **options: None})


@contextmanager
def parts_of(package: str, bare: tuple[str, ...] = (), absent: tuple[str, ...] = ()) -> Iterator[None]:
    """Inside, `bare` packages are no more than their folders and `absent` modules are stand-ins; afterwards all is undone.

    Skips the test where the package is not installed.
    """
    spec = find_spec(package)
    if spec is None:
        pytest.skip(f"needs {package}")
    (root,) = spec.submodule_search_locations
    before = set(sys.modules)
    with pytest.MonkeyPatch.context() as patch:
        for name in bare:
            folder = Path(root).joinpath(*name.split(".")[1:])
            spec = ModuleSpec(name, loader=None, is_package=True)
            spec.submodule_search_locations = [str(folder)]
            module = module_from_spec(spec)
            module.__file__ = str(folder / "__init__.py")  # torch asks every module for it
            module.__version__ = metadata.version(metadata.packages_distributions()[package][0])
            patch.setitem(sys.modules, name, module)
        for name in absent:
            patch.setitem(sys.modules, name, StandIn(name))
        try:
            yield
        finally:
            for name in set(sys.modules) - before:
                if name.split(".")[0] == package:
                    del sys.modules[name]


def load(name: str) -> ModuleType:
    return importlib.import_module(name)


@contextmanager
def as_if_on_a_gpu() -> Iterator[None]:
    """transformers believes in a GPU, what it asks of the package stays. Skips without an installed distribution."""
    if "flash_attn" not in metadata.packages_distributions():
        pytest.skip("flash-attn is not installed; `make setup` does it")
    utils = load("transformers.utils.import_utils")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(utils, "is_torch_cuda_available", lambda: True)
        utils.is_flash_attn_2_available.cache_clear()
        yield
    utils.is_flash_attn_2_available.cache_clear()
