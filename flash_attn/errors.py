"""The errors a caller can meet. All are RuntimeErrors, which upstream raises for the same faults."""

from collections.abc import Mapping


class InvalidArgument(ValueError, RuntimeError):
    """Arguments contradict each other or the contract; the text quotes the values at fault."""


class UnsupportedProblem(NotImplementedError, RuntimeError):
    """No backend can run the problem; the text lists each backend's reason."""

    def __init__(self, message: str, reasons: Mapping[str, str] | None = None) -> None:
        self.reasons = dict(reasons or {})
        lines = [message, *(f"  {name}: {reason}" for name, reason in self.reasons.items())]
        super().__init__("\n".join(lines))


class OutOfPages(RuntimeError):
    """A paged cache has fewer pages left than an operation needs; the text names both numbers."""
