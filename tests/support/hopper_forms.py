"""What the Hopper backend serves, masks, and the forms of its backward, for tests that go through all of them."""

import contextlib
import itertools
from collections.abc import Iterator

import pytest
import torch

from flash_attn import launch
from flash_attn.launch.hopper import CROWDED, ONE_PASS, TWO_PASS, head_dim_pad
from tests.support import calls
from tests.support.cases import FP32, Case

MASKS = {
    "full": {},
    "causal": dict(causal=True),
    "window": dict(window=(100, 0)),
    "band": dict(window=(63, 65)),
}


def every_other(*axes):
    """Half of a product: each value beside each of every other axis."""
    counted = itertools.product(*map(enumerate, axes))
    return [tuple(value for _, value in each) for each in counted if sum(i for i, _ in each) % 2 == 0]


def served(case: Case) -> bool:
    return case.dtype != FP32 and case.headdim % 8 == 0 and min(sum(case.seqlens_q), sum(case.seqlens_k)) > 0


def forms(headdim: int) -> tuple[str, ...]:
    """Every form of the backward that a head dim has."""
    return ("any order", "in order", "two passes")[0 if head_dim_pad(headdim) in ONE_PASS else 2 :]


def each_form(*headdims: int) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("headdim, form", [(d, form) for d in headdims for form in forms(d)])


@contextlib.contextmanager
def chosen(form: str, headdim: int, features: int = 0) -> Iterator[bool]:
    """`deterministic` of a call in one form, with so many of softcap, ALiBi and dropout; head dim 64 draws tiles early."""
    pad = head_dim_pad(headdim)
    if form == "two passes":
        config = TWO_PASS[pad][features >= CROWDED[pad]]
    else:
        config = ONE_PASS[pad]._replace(heads_together=3, ahead=pad == 64)
    with launch.pinned(hopper_backward=config):
        yield form != "any order"


def gradients(case, inputs, form, q=None, k=None, v=None, dout=None):
    """(dq, dk, dv) of a case, or of other tensors in its place."""
    given = (inputs.q if q is None else q, inputs.k if k is None else k, inputs.v if v is None else v)
    leaves = [x.detach().requires_grad_() for x in given]
    features = (case.softcap > 0.0) + (case.alibi is not None) + (case.dropout_p > 0.0)
    with chosen(form, case.headdim, features) as deterministic:
        out = calls.public(case, inputs, *leaves, deterministic=deterministic)
        return torch.autograd.grad(out, leaves, inputs.dout if dout is None else dout)
