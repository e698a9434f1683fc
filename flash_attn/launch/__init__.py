"""(problem, hardware) -> launch configuration: pure functions over stored measurements, no device queries, no Triton.

Precedence: a configuration pinned with `pinned(...)`, then the stored table, then the heuristic for unmeasured hardware.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

_pinned: dict[str, Any] = {}


@contextlib.contextmanager
def pinned(**configs: Any) -> Iterator[None]:
    """Use the given configurations (`forward=`, `dq=`, `dkdv=`) inside the block, whatever the problem."""
    before = dict(_pinned)
    _pinned.update(configs)
    try:
        yield
    finally:
        _pinned.clear()
        _pinned.update(before)


def pinned_config(kernel: str) -> Any | None:
    """The configuration pinned for a kernel, or None."""
    return _pinned.get(kernel)
