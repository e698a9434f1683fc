"""PageAllocator: pages are given once, counted, and come back when the last holder lets go."""

import numpy as np
import pytest

from flash_attn.errors import InvalidArgument, OutOfPages
from flash_attn.kvcache.allocator import PageAllocator


def test_allocate_gives_every_page_once():
    allocator = PageAllocator(10)
    pages = np.concatenate([allocator.allocate(count) for count in (3, 0, 7)])
    assert sorted(pages) == list(range(10)) and allocator.num_free == 0
    assert (allocator.references == 1).all()


def test_allocate_names_what_is_needed_and_what_is_free():
    allocator = PageAllocator(4)
    allocator.allocate(3)
    with pytest.raises(OutOfPages, match="2 pages are needed, 1 of 4 are free"):
        allocator.allocate(2)
    assert allocator.num_free == 1


def test_release_returns_a_page_after_its_last_holder():
    allocator = PageAllocator(4)
    pages = allocator.allocate(2)
    allocator.share(pages[[0, 0, 1]])
    assert list(allocator.references[pages]) == [3, 2]
    assert len(allocator.release(pages[[0, 1]])) == 0
    assert list(allocator.release(pages[[0, 1, 0]])) == sorted(pages)
    assert allocator.num_free == 2
    allocator.reclaim(pages)
    assert sorted(allocator.allocate(4)) == [0, 1, 2, 3]


def test_release_of_a_page_that_is_not_held_changes_nothing():
    allocator = PageAllocator(3)
    (page,) = allocator.allocate(1)
    with pytest.raises(InvalidArgument, match=f"page {page} is released 2 times, held 1 times"):
        allocator.release(np.array([page, page], np.int32))
    assert allocator.references[page] == 1


def test_an_allocator_needs_a_page():
    with pytest.raises(InvalidArgument, match="at least 1, got 0"):
        PageAllocator(0)
