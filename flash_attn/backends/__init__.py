"""The ordered table of backends and the choice among them.

`select_backend` takes the first backend that does not refuse a problem. A backend that was asked for by name, through
`use("portable")` or the environment variable FLASH_ATTENTION_BACKEND, is never replaced by another: it runs or its reason is
raised. `explain` shows every backend's verdict.
"""

import contextlib
import contextvars
import functools
import importlib
import logging
import os
from collections.abc import Iterator
from typing import cast

from flash_attn.backends.base import Backend
from flash_attn.errors import InvalidArgument, UnsupportedProblem
from flash_attn.hardware import Hardware
from flash_attn.problem import AttentionProblem

ENVIRONMENT_VARIABLE = "FLASH_ATTENTION_BACKEND"

MODULES = {
    "portable": "flash_attn.backends.portable",
    "cpu": "flash_attn.backends.cpu",
    "reference": "flash_attn.backends.reference",
}

# backends that are asked for by entry points of their own but do not exist here
ABSENT = {
    "flaggems": "the FlagGems backend is not part of this release; its entry points in flash_attn.backward compute with the "
    "backend chosen here",
}

_requested: contextvars.ContextVar[str | None] = contextvars.ContextVar("flash_attn_backend", default=None)
_log = logging.getLogger("flash_attn")


@contextlib.contextmanager
def use(name: str | None) -> Iterator[None]:
    """Run every attention call inside the block on the named backend; None leaves the choice to the environment.

    Raises:
        InvalidArgument: there is no backend of that name.
    """
    token = _requested.set(_checked(name) if name is not None else None)
    try:
        yield
    finally:
        _requested.reset(token)


def requested_backend() -> str | None:
    """The backend asked for by `use` or the environment, None for the automatic choice."""
    name = _requested.get()
    return name if name is not None else _environment()


@functools.cache
def _environment() -> str | None:
    """FLASH_ATTENTION_BACKEND as it was at the first call; reading it again would cost a microsecond every time."""
    return os.environ.get(ENVIRONMENT_VARIABLE) or None


def select_backend(problem: AttentionProblem, hardware: Hardware) -> Backend:
    """The backend that runs a problem, with regard to what was asked for.

    Raises:
        UnsupportedProblem: the requested backend, or every backend, refuses; the message quotes the reasons.
    """
    return choose_backend(problem, hardware, requested_backend())


@functools.lru_cache(maxsize=4096)
def choose_backend(problem: AttentionProblem, hardware: Hardware, requested: str | None) -> Backend:
    """As `select_backend`, with regard to what was asked for elsewhere: autograd's threads do not see the caller's scope."""
    names = [_checked(requested)] if requested else list(MODULES)
    reasons: dict[str, str] = {}
    for name in names:
        backend = load(name)
        reason = backend.unsupported(problem, hardware)
        if reason is None:
            _log.debug("%s runs %s on %s %s", name, problem, hardware.kind, hardware.arch)
            if name == "reference" and not requested and hardware.kind != "cpu" and problem.dtype != "float64":
                _log.warning("attention runs in plain PyTorch, without fused kernels: %s", reasons)
            return backend
        reasons[name] = reason
    whom = f"backend {requested!r} cannot run this problem" if requested else "no backend can run this problem"
    raise UnsupportedProblem(f"{whom}: {problem} on {hardware.kind} {hardware.arch}".rstrip(), reasons)


def explain(problem: AttentionProblem, hardware: Hardware) -> dict[str, str]:
    """Every backend's verdict on a problem: "runs it", "could run it", or why not. Absent backends say where they route."""
    verdicts: dict[str, str] = {}
    for name in MODULES:
        reason = load(name).unsupported(problem, hardware)
        if reason is None:
            reason = "could run it" if "runs it" in verdicts.values() else "runs it"
        verdicts[name] = reason
    return {**verdicts, **ABSENT}


@functools.cache
def load(name: str) -> Backend:
    """The backend module of that name; importing it must not need its hardware."""
    return cast(Backend, importlib.import_module(MODULES[_checked(name)]))


def _checked(name: str) -> str:
    if name not in MODULES:
        raise InvalidArgument(f"there is no backend {name!r}; the backends are {', '.join(MODULES)}")
    return name
