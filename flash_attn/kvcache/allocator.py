"""Pages as numbers: which are free, and how many holders the others have. Imports numpy only.

A page whose last holder lets go is not free yet: the caller of `release` decides whether to keep it for its contents or
to `reclaim` it.
"""

from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from flash_attn.errors import InvalidArgument, OutOfPages

Ints: TypeAlias = NDArray[np.int32]


class PageAllocator:
    """Reference counts, and a stack of free pages.

    Args:
        num_pages: pages are numbered from 0.
    """

    def __init__(self, num_pages: int) -> None:
        if num_pages < 1:
            raise InvalidArgument(f"num_pages must be at least 1, got {num_pages}")
        self.references = np.zeros(num_pages, np.int32)  # holders of each page
        self._stack = np.arange(num_pages, dtype=np.int32)[::-1].copy()  # the first num_free entries are free pages
        self.num_free = num_pages

    @property
    def num_pages(self) -> int:
        """All pages there are."""
        return len(self.references)

    def allocate(self, count: int) -> Ints:
        """`count` free pages, each with one holder.

        Raises:
            OutOfPages: fewer are free.
        """
        if count > self.num_free:
            raise OutOfPages(f"{count} pages are needed, {self.num_free} of {self.num_pages} are free")
        pages = self._stack[self.num_free - count : self.num_free][::-1].copy()
        self.num_free -= count
        self.references[pages] = 1
        return pages

    def share(self, pages: Ints) -> None:
        """One more holder for each page; a page may occur more than once."""
        np.add.at(self.references, pages, 1)

    def release(self, pages: Ints) -> Ints:
        """One holder less for each page; returns those that nobody holds any more.

        Raises:
            InvalidArgument: a page has fewer holders than let go of it; nothing changes then.
        """
        unique, count = np.unique(pages, return_counts=True)
        held = self.references[unique]
        if (held < count).any():
            wrong = int(np.argmax(held < count))
            raise InvalidArgument(f"page {unique[wrong]} is released {count[wrong]} times, held {held[wrong]} times")
        self.references[unique] = held - count
        return unique[held == count]

    def reclaim(self, pages: Ints) -> None:
        """Makes pages without a holder free."""
        self._stack[self.num_free : self.num_free + len(pages)] = pages
        self.num_free += len(pages)
