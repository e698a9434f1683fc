"""The forms of the Hopper backward, for tests that go through all of them."""

import contextlib
from collections.abc import Iterator

import pytest

from flash_attn import launch
from flash_attn.launch.hopper import CROWDED, ONE_PASS, TWO_PASS, head_dim_pad


def forms(headdim: int) -> tuple[str, ...]:
    """Every form of the backward that a head dim has."""
    return ("any order", "in order", "two passes")[0 if head_dim_pad(headdim) in ONE_PASS else 2 :]


def each_form(*headdims: int) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("headdim, form", [(d, form) for d in headdims for form in forms(d)])


@contextlib.contextmanager
def chosen(form: str, headdim: int, score_features: int = 0) -> Iterator[bool]:
    """`deterministic` of a call in one form, with so many of softcap and ALiBi; at head dim 64 tiles are drawn early."""
    pad = head_dim_pad(headdim)
    if form == "two passes":
        config = TWO_PASS[pad][score_features >= CROWDED[pad]]
    else:
        config = ONE_PASS[pad]._replace(heads_together=3, ahead=pad == 64)
    with launch.pinned(hopper_backward=config):
        yield form != "any order"
