"""(problem, hardware) -> launch configuration: pure functions over stored measurements, no device queries, no Triton.

Precedence: a configuration pinned with `pinned(...)`, then the stored table, then the heuristic for unmeasured hardware.
"""

import contextlib
import contextvars
from collections.abc import Iterator
from typing import Any

_pinned: contextvars.ContextVar[tuple[tuple[str, Any], ...]] = contextvars.ContextVar("flash_attn_launch", default=())


@contextlib.contextmanager
def pinned(**configs: Any) -> Iterator[None]:
    """Use the given configurations (`forward=`, `dq=`, `dkdv=`, `one_launch=`, ...) inside the block, whatever the problem."""
    token = _pinned.set(tuple({**dict(_pinned.get()), **configs}.items()))
    try:
        yield
    finally:
        _pinned.reset(token)


def pins() -> tuple[tuple[str, Any], ...]:
    """Every pinned configuration, hashable."""
    return _pinned.get()


def pinned_config(kernel: str) -> Any | None:
    """The configuration pinned for a kernel, or None."""
    return dict(_pinned.get()).get(kernel)
