"""Which page holds which tokens, found by content, and which page to give up first. Imports numpy only.

The keys and values of a token depend on every token before it, so a page is known by a chain of hashes:

    digest_n = hash(digest_{n-1}, tokens of page n)

Only full pages are indexed. Whoever writes into an indexed page takes it out of the index first.
"""

import hashlib
from array import array
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from flash_attn.errors import InvalidArgument
from flash_attn.kvcache.allocator import Ints

Tokens = array  # of "q": int64, grows in place
DIGEST_BYTES = 16  # two different prefixes collide with probability 2^-64 among 2^32 pages


def as_tokens(tokens: Any) -> Tokens:
    """Any 1-D array of whole numbers on the host, as int64."""
    if type(tokens) is list:
        try:
            return array("q", tokens)  # one token: 0.7 us, 4 us through numpy (2-core x86, 2026-11-22)
        except (TypeError, OverflowError):
            pass  # the check below says what is wrong
    values = np.asarray(tokens)
    if values.ndim != 1 or (values.size > 0 and values.dtype.kind not in "iu"):
        raise InvalidArgument(f"tokens must be 1-D integers, got shape {values.shape} and dtype {values.dtype}")
    return array("q", values.astype(np.int64).tobytes())


class Text(NamedTuple):
    """What a sequence holds: its tokens, and the digest of every page they fill."""

    tokens: Tokens
    chain: list[bytes]

    def copy(self) -> "Text":
        return Text(self.tokens[:], self.chain[:])

    def shorten(self, length: int, page_size: int) -> None:
        """Keeps the first `length` tokens."""
        del self.tokens[length:], self.chain[length // page_size :]

    def next_digest(self, page_size: int) -> bytes:
        """The digest of the first page after the chain, which the tokens fill."""
        number = len(self.chain)
        parent = self.chain[-1] if self.chain else b""
        block = self.tokens[number * page_size : (number + 1) * page_size].tobytes()
        return hashlib.blake2b(parent + block, digest_size=DIGEST_BYTES).digest()


class PrefixIndex:
    """Pages by content, each with the time of its last use."""

    def __init__(self, num_pages: int, page_size: int) -> None:
        self.page_size = page_size
        self.indexed = np.zeros(num_pages, np.bool_)
        self._page_of: dict[bytes, int] = {}
        self._digest_of: dict[int, bytes] = {}
        self._last_used = np.zeros(num_pages, np.int64)
        self._depth = np.zeros(num_pages, np.int64)  # pages before it in its sequence
        self._clock = 0

    def match(self, tokens: Tokens) -> tuple[Ints, Text]:
        """The pages that hold the longest known prefix, and that prefix.

        The last token never matches: somebody has to compute what comes after it.
        """
        text = Text(tokens, [])
        pages: list[int] = []
        for _ in range((len(tokens) - 1) // self.page_size):
            digest = text.next_digest(self.page_size)
            page = self._page_of.get(digest)
            if page is None:
                break
            pages.append(page)
            text.chain.append(digest)
        found = np.array(pages, np.int32)
        self.touch(found)
        return found, Text(tokens[: len(pages) * self.page_size], text.chain)

    def extend(self, text: Text, tokens: Tokens, pages: Ints) -> None:
        """Appends tokens to a text whose page n is `pages[n]`, and indexes the pages they fill.

        A page whose content another page is known for stays out of the index.
        """
        text.tokens.extend(tokens)
        while len(text.chain) < len(text.tokens) // self.page_size:
            digest, number = text.next_digest(self.page_size), len(text.chain)
            text.chain.append(digest)
            page = int(pages[number])
            if self._page_of.setdefault(digest, page) == page:
                self._digest_of[page] = digest
                self._depth[page] = number
                self.indexed[page] = True

    def touch(self, pages: Ints) -> None:
        """The pages are in use now."""
        self._clock += 1
        self._last_used[pages] = self._clock

    def oldest(self, candidates: NDArray[np.bool_], count: int) -> Ints:
        """The `count` pages used longest ago among the candidates, later pages of a sequence first."""
        pages = np.flatnonzero(candidates).astype(np.int32)
        return pages[np.lexsort((-self._depth[pages], self._last_used[pages]))[:count]]

    def forget(self, pages: Ints) -> None:
        """Takes pages out of the index."""
        for page in pages[self.indexed[pages]].tolist():
            del self._page_of[self._digest_of.pop(page)]
        self.indexed[pages] = False
