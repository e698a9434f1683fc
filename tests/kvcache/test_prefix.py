"""Prefixes found by content: what is reused, what is not, and what goes first when pages run out."""

import pytest
import torch

from flash_attn.errors import InvalidArgument, OutOfPages
from flash_attn.kvcache import PagedKVCache, RollingWindow

PAGE = 4


def make(num_pages=16, **options) -> PagedKVCache:
    return PagedKVCache(1, num_pages, PAGE, 1, 1, torch.float32, **options)


def append(cache, sequence, tokens) -> None:
    """A step whose keys are the tokens."""
    with cache.step([sequence], [tokens]):
        k = torch.tensor(tokens, dtype=torch.float32)[None, :, None, None]
        cache.append(0, k, -k)


def stored(cache, tokens) -> int:
    """A sequence of these tokens."""
    sequence = cache.add(tokens)
    append(cache, sequence, tokens[cache.length(sequence) :])
    return sequence


def found(cache, tokens) -> int:
    """How many of the tokens a new sequence finds."""
    sequence = cache.add(tokens)
    length = cache.length(sequence)
    assert cache.read(0, sequence)[0].flatten().tolist() == tokens[:length]
    cache.free(sequence)
    return length


@pytest.mark.parametrize("length, reused", [(0, 0), (1, 0), (4, 0), (5, 4), (8, 4), (9, 8), (11, 8), (13, 8)])
def test_whole_pages_are_reused_but_never_the_last_token(length, reused):
    cache = make()
    stored(cache, list(range(11)))
    assert found(cache, list(range(length))) == reused


def test_a_page_is_found_only_behind_the_same_tokens():
    cache = make()
    stored(cache, [1, 2, 3, 4, 5, 6, 7, 8, 9])
    assert found(cache, [1, 2, 3, 0, 5, 6, 7, 8, 9]) == 0
    assert found(cache, [5, 6, 7, 8, 9]) == 0
    assert found(cache, [1, 2, 3, 4, 5, 6, 7, 0, 9]) == 4


def test_sharing_takes_no_page_and_outlives_the_owner():
    cache = make()
    owner = stored(cache, list(range(9)))
    before = cache.memory_report().pages_in_use
    heirs = [cache.add(list(range(9))) for _ in range(3)]
    assert cache.memory_report().pages_in_use == before
    assert cache.memory_report().pages_shared == 2
    cache.free(owner)
    assert cache.read(0, heirs[0])[0].flatten().tolist() == list(range(8))
    for heir in heirs:
        cache.free(heir)
    assert cache.memory_report()[:4] == (0, 0, 2, 14)
    assert found(cache, list(range(9))) == 8


def test_generated_tokens_are_found_too():
    cache = make()
    sequence = stored(cache, [1, 2])
    for token in range(3, 8):
        append(cache, sequence, [token])
    assert found(cache, list(range(1, 9))) == 4


def test_tokens_never_told_are_not_found():
    cache = make()
    sequence = cache.add()
    with cache.step([sequence], [6]):
        cache.append(0, torch.zeros(1, 6, 1, 1), torch.zeros(1, 6, 1, 1))
    append(cache, sequence, [1, 2, 3, 4])
    assert not cache._prefixes.indexed.any()


def test_a_page_cut_and_written_again_is_no_longer_found_as_it_was():
    cache = make()
    sequence = stored(cache, list(range(9)))
    cache.truncate(sequence, 6)
    assert found(cache, list(range(9))) == 8  # not yet overwritten
    append(cache, sequence, [60, 70])
    assert found(cache, list(range(9))) == 4
    assert found(cache, [0, 1, 2, 3, 4, 5, 60, 70, 80]) == 8


def test_a_cut_page_that_others_hold_is_copied_and_stays_found():
    cache = make()
    sequence = stored(cache, list(range(9)))
    reader = cache.add(list(range(9)))
    cache.truncate(sequence, 6)
    append(cache, sequence, [60, 70])
    assert cache.read(0, reader)[0].flatten().tolist() == list(range(8))
    assert found(cache, list(range(9))) == 8


def test_the_prefix_used_longest_ago_goes_first_and_its_end_before_its_beginning():
    cache = make(num_pages=6)
    first, second = list(range(9)), [10 + token for token in range(9)]
    for text in (first, second):
        cache.free(stored(cache, text))
    assert found(cache, first) == 8  # a use: now `second` is the older one
    assert cache.memory_report()[:4] == (0, 0, 4, 2)
    cache.free(stored(cache, [20, 21, 22, 23, 24, 25, 26, 27, 28]))  # three pages, one more than are free
    assert (found(cache, first), found(cache, second)) == (8, 4)


def test_pages_in_use_are_not_given_up():
    cache = make(num_pages=4)
    holder = stored(cache, list(range(9)))
    other = cache.add()
    with pytest.raises(OutOfPages, match="2 pages are needed, 1 of 4 are free"):
        cache.begin_step([other], [5])
    assert cache.read(0, holder)[0].flatten().tolist() == list(range(9))


def test_nothing_computed_behind_a_gap_is_shared():
    """What a page holds after others were dropped depends on how the text was cut into steps."""
    cache = make(strategy=RollingWindow(window=4))
    sequence = cache.add()
    for token in range(16):
        append(cache, sequence, [token])
    assert cache.pages(sequence).size == 1
    assert found(cache, list(range(17))) == 4  # token 7 came after page 0 had been dropped


def test_prefixes_are_not_shared_when_told_so():
    cache = make(share_prefixes=False)
    stored(cache, list(range(9)))
    assert found(cache, list(range(9))) == 0


@pytest.mark.parametrize("tokens", [[[1, 2]], [0.5], 3, "text"])
def test_tokens_must_be_integers_in_a_row(tokens):
    with pytest.raises(InvalidArgument, match="tokens must be 1-D integers"):
        make().add(tokens)
