"""How a sequence's pages grow and shrink: on demand, all at once, or in a rolling window behind sinks. Imports numpy.

A sequence of `length` tokens has lost `dropped` whole pages between its sinks and its window:

    tokens    | sinks | dropped pages |  window  | new tokens
    table     | sinks |  window  | new tokens
"""

from dataclasses import dataclass

import numpy as np

from flash_attn.errors import InvalidArgument
from flash_attn.kvcache.allocator import Ints


def pages_of(tokens: int, page_size: int) -> int:
    """How many pages so many tokens fill, the last perhaps in part."""
    return -(-tokens // page_size)


@dataclass(frozen=True)
class Paged:
    """Pages on demand; nothing is dropped."""

    @property
    def max_length(self) -> int | None:
        """The longest sequence allowed, None for any."""
        return None

    @property
    def contiguous(self) -> bool:
        """Whether the keys kept are consecutive tokens, so that distances in the cache are distances in the text."""
        return True

    def reserved_pages(self, page_size: int) -> int:
        """Pages that a sequence holds from its first moment to its last."""
        return 0

    def sink_pages(self, page_size: int) -> int:
        """Pages at the start that are never dropped."""
        return 0

    def first_needed(self, length: Ints) -> Ints:
        """The earliest token, sinks aside, that the token after `length` others has to see."""
        return np.zeros_like(length)

    def stale_pages(self, length: Ints, dropped: Ints, page_size: int) -> Ints:
        """How many more pages behind the sinks each sequence can drop before its next token."""
        return np.maximum(self.first_needed(length) // page_size - self.sink_pages(page_size) - dropped, 0)


@dataclass(frozen=True)
class Static(Paged):
    """Room for `length` tokens from the start: a sequence that was added never lacks a page, its table never grows."""

    length: int

    def __post_init__(self) -> None:
        _at_least("length", self.length, 1)

    @property
    def max_length(self) -> int | None:
        return self.length

    def reserved_pages(self, page_size: int) -> int:
        return pages_of(self.length, page_size)


@dataclass(frozen=True)
class RollingWindow(Paged):
    """Keeps the first `sinks` tokens and the last `window`, both rounded up to whole pages.

    A step attends over what is kept when it begins and its own new tokens. Its first token therefore sees the sinks and
    at least the last `window` tokens, itself included; a page is dropped once every token in it is older. Tokens keep the
    positions that they had in the text.
    """

    window: int
    sinks: int = 0

    def __post_init__(self) -> None:
        _at_least("window", self.window, 1)
        _at_least("sinks", self.sinks, 0)

    @property
    def contiguous(self) -> bool:
        return self.sinks == 0

    def sink_pages(self, page_size: int) -> int:
        return pages_of(self.sinks, page_size)

    def first_needed(self, length: Ints) -> Ints:
        return np.maximum(length - self.window + 1, 0)


def _at_least(name: str, value: int, least: int) -> None:
    if value < least:
        raise InvalidArgument(f"{name} must be at least {least}, got {value}")
