"""Windows in upstream's words against the mask they stand for, for every small length."""

import itertools

import pytest
import torch

from flash_attn import reference
from flash_attn.errors import InvalidArgument
from flash_attn.problem import bucket, canonical_window, parse_window

LENGTHS = range(1, 8)
SIDES = (-1, 0, 1, 2, 3, 5, 6, 7, 8, 20)


def mask_in_words(causal, left, right, seqlen_q, seqlen_k):
    """Row i sees keys i + seqlen_k - seqlen_q - left to i + seqlen_k - seqlen_q + right; -1 is unbounded; causal is 0."""
    right = 0 if causal else right
    rows = []
    for i in range(seqlen_q):
        diagonal = i + seqlen_k - seqlen_q
        first = 0 if left < 0 else diagonal - left
        last = seqlen_k - 1 if right < 0 else diagonal + right
        rows.append([first <= j <= last for j in range(seqlen_k)])
    return torch.tensor(rows).view(seqlen_q, seqlen_k)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("left", SIDES)
@pytest.mark.parametrize("right", SIDES)
def test_canonical_window_hides_the_same_keys(causal, left, right):
    for seqlen_q, seqlen_k in itertools.product(LENGTHS, LENGTHS):
        window = canonical_window(causal, left, right, seqlen_q, seqlen_k)
        expected = mask_in_words(causal, left, right, seqlen_q, seqlen_k)
        assert torch.equal(reference.visible(seqlen_q, seqlen_k, window), expected), (seqlen_q, seqlen_k, window)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("left, right", list(itertools.product((-1, 0, 2, 5), repeat=2)))
def test_window_of_the_longest_sequence_suits_the_shorter_ones(causal, left, right):
    """Packed batches canonicalise once, with the longest lengths."""
    for longest_q, longest_k in itertools.product((1, 3, 6), repeat=2):
        window = canonical_window(causal, left, right, longest_q, longest_k)
        for seqlen_q, seqlen_k in itertools.product(range(1, longest_q + 1), range(1, longest_k + 1)):
            expected = mask_in_words(causal, left, right, seqlen_q, seqlen_k)
            assert torch.equal(reference.visible(seqlen_q, seqlen_k, window), expected)


def test_a_side_that_hides_nothing_is_none():
    for seqlen_q, seqlen_k, left, right in itertools.product(LENGTHS, LENGTHS, SIDES, SIDES):
        window = canonical_window(False, left, right, seqlen_q, seqlen_k)
        assert (window[0] is None) == bool(mask_in_words(False, left, -1, seqlen_q, seqlen_k).all())
        assert (window[1] is None) == bool(mask_in_words(False, -1, right, seqlen_q, seqlen_k).all())


def test_causal_overrides_the_right_side():
    for right in SIDES:
        assert canonical_window(True, -1, right, 100, 100) == (None, 0)
    assert canonical_window(False, -1, 0, 100, 100) == (None, 0)


@pytest.mark.parametrize(
    "given, sides",
    [
        ((-1, -1), (-1, -1)),
        ([3, 0], (3, 0)),
        (torch.tensor([7, -1]), (7, -1)),
        (torch.tensor([2.0, 1.0]), (2, 1)),
        ((torch.tensor(4), 5.0), (4, 5)),
        (torch.Size([1, 2]), (1, 2)),
    ],
)
def test_parse_window(given, sides):
    parsed = parse_window(given)
    assert parsed == sides and all(type(side) is int for side in parsed)


@pytest.mark.parametrize(
    "given", [(), (1,), (1, 2, 3), (-2, 0), (0, -2), (0.5, 0), (float("nan"), 0), (float("inf"), 0), ("a", 0), None, 3]
)
def test_parse_window_rejects(given):
    with pytest.raises(InvalidArgument, match="window_size"):
        parse_window(given)


def test_bucket():
    assert [bucket(n) for n in (0, 1, 2, 3, 4, 5, 127, 128, 129)] == [0, 1, 2, 4, 4, 8, 128, 128, 256]
