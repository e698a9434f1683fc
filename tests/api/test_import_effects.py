"""What `import flash_attn` does to a process: next to nothing. Each check runs in a process of its own."""

import json
import subprocess
import sys

import pytest

PROBE = """
import json, os, sys, time
import torch

queries = []
for name in ("init", "_lazy_init", "is_available", "device_count", "current_device", "get_device_properties",
             "get_device_capability", "get_device_name"):
    def query(*args, name=name, **kwargs):
        queries.append(name)
        raise RuntimeError("importing queried a device")
    setattr(torch.cuda, name, query)

modules, path, environment = set(sys.modules), list(sys.path), dict(os.environ)
filters, threads = list(__import__("warnings").filters), torch.get_num_threads()
start = time.perf_counter()
import flash_attn
import flash_attn.flash_attn_interface
import flash_attn.layers.rotary
seconds = time.perf_counter() - start
print(json.dumps({
    "new_modules": sorted({name.split(".")[0] for name in set(sys.modules) - modules}),
    "same_path": sys.path == path,
    "same_environment": dict(os.environ) == environment,
    "same_filters": list(__import__("warnings").filters) == filters,
    "same_threads": torch.get_num_threads() == threads,
    "queries": queries,
    "seconds": seconds,
}), file=sys.stderr)
"""

LONGEST_IMPORT = 0.3  # seconds beyond torch's own
ATTEMPTS = 3  # the fastest counts: other work on the machine only ever adds time


def probe() -> dict:
    finished = subprocess.run([sys.executable, "-c", PROBE], capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout == ""
    (report,) = finished.stderr.splitlines()
    return json.loads(report)


@pytest.fixture(scope="module")
def effects() -> dict:
    return probe()


@pytest.mark.parametrize("module", ["triton", "einops", "matplotlib", "flag_gems", "transformers"])
def test_import_leaves_optional_modules_alone(effects, module):
    assert module not in effects["new_modules"]


@pytest.mark.parametrize("what", ["same_path", "same_environment", "same_filters", "same_threads"])
def test_import_changes_nothing_of_the_process(effects, what):
    assert effects[what]


def test_import_queries_no_device(effects):
    assert effects["queries"] == []


def test_import_is_fast(effects):
    fastest = effects["seconds"]
    for _ in range(ATTEMPTS - 1):
        if fastest < LONGEST_IMPORT:
            break
        fastest = min(fastest, probe()["seconds"])
    assert fastest < LONGEST_IMPORT
