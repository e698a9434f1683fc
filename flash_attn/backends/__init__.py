"""The table of backends and the choice among them.

`select_backend` takes the first backend that does not refuse a problem. A backend that was asked for by name, through
`use("portable")` or the environment variable FLASH_ATTENTION_BACKEND, is never replaced by another: it runs or its reason is
raised. One that computes no gradients says so; `choose_backward_backend` then takes the next that does, and logs it.
`explain` shows every backend's verdict.
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
    "hopper": "flash_attn.backends.hopper",
    "portable": "flash_attn.backends.portable",
    "cpu": "flash_attn.backends.cpu",
    "flaggems": "flash_attn.backends.flaggems",
    "reference": "flash_attn.backends.reference",
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
    names = [_checked(requested)] if requested else _suitable(problem, hardware)
    return _first_able(problem, hardware, names, requested)


@functools.lru_cache(maxsize=4096)
def choose_backward_backend(problem: AttentionProblem, hardware: Hardware, requested: str | None) -> Backend:
    """As `choose_backend` for gradients: a backend that computes none is replaced by the first that does."""
    if requested and forward_only(requested) is None:
        return choose_backend(problem, hardware, requested)
    order = _suitable(problem, hardware)
    chosen = _first_able(problem, hardware, [name for name in order if forward_only(name) is None], None)
    asked = requested or order[0]
    if requested or (forward_only(asked) and load(asked).unsupported(problem, hardware) is None):
        _log_routing_once(asked, chosen.name)
    return chosen


def automatic_order(hardware: Hardware) -> list[str]:
    """The backends in the order they are tried in: FlagGems' first on the hardware of other vendors, elsewhere on request."""
    if hardware.kind in ("cuda", "hip", "cpu"):
        return [name for name in MODULES if name != "flaggems"]
    return sorted(MODULES, key=lambda name: name != "flaggems")


def _suitable(problem: AttentionProblem, hardware: Hardware) -> list[str]:
    """The backends of `automatic_order` without those that leave the problem to others."""
    return [name for name in automatic_order(hardware) if _left_to_others(name, problem, hardware) is None]


def _left_to_others(name: str, problem: AttentionProblem, hardware: Hardware) -> str | None:
    """Why the automatic choice passes a backend over that does not refuse the problem, or None."""
    backend = load(name)
    leaves = getattr(backend, "left_to_others", None)
    return None if leaves is None or backend.unsupported(problem, hardware) else leaves(problem, hardware)


def forward_only(name: str) -> str | None:
    """Why the gradients of a backend's forward are computed by another, or None where it computes them."""
    return getattr(load(name), "forward_only", None)


@functools.cache
def _log_routing_once(name: str, chosen: str) -> None:
    _log.info("gradients of backend %s are computed by %s: %s", name, chosen, forward_only(name))


def _first_able(problem: AttentionProblem, hardware: Hardware, names: list[str], requested: str | None) -> Backend:
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
    """Every backend's verdict on a problem: "runs it" for the automatic choice, "could run it", or why not.

    A backend that leaves the problem to others adds why; one that computes no gradients who does, and why.
    """
    refusals = {name: load(name).unsupported(problem, hardware) for name in MODULES}
    chosen = next((name for name in _suitable(problem, hardware) if refusals[name] is None), None)

    def verdict(name: str) -> str:
        left = _left_to_others(name, problem, hardware)
        able = "runs it" if name == chosen else "could run it" if left is None else f"could run it, but {left}"
        return able + _gradients_by(name, problem, hardware)

    return {name: verdict(name) if reason is None else reason for name, reason in refusals.items()}


def able(verdict: str) -> bool:
    """Whether a verdict of `explain` is that of a backend which accepts the problem."""
    return verdict.startswith(("runs it", "could run it"))


def _gradients_by(name: str, problem: AttentionProblem, hardware: Hardware) -> str:
    why = forward_only(name)
    return "" if why is None else f", gradients by {choose_backward_backend(problem, hardware, None).name}: {why}"


@functools.cache
def load(name: str) -> Backend:
    """The backend module of that name; importing it must not need its hardware."""
    return cast(Backend, importlib.import_module(MODULES[_checked(name)]))


def _checked(name: str) -> str:
    if name not in MODULES:
        raise InvalidArgument(f"there is no backend {name!r}; the backends are {', '.join(MODULES)}")
    return name
