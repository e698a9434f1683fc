"""The Hopper kernels on the CPU, partition by partition: results, and waits that end; see tests.support.gluon_interpreter."""

import itertools
import math
import random
from unittest import mock

import pytest
import torch

pytest.importorskip("triton.experimental.gluon")

from flash_attn import flash_attn_varlen_func, launch
from flash_attn.kernels.algebra.arguments import Window
from flash_attn.kernels.hopper import schedule
from flash_attn.launch.hopper import (
    FORWARD,
    FOUR_CONSUMERS,
    FOUR_SKIPPING,
    THREE_SKIPPING,
    TWO_CONSUMERS,
    TWO_PARTS,
    TWO_SKIPPING,
)
from tests.support import calls, gluon_interpreter
from tests.support.cases import BF16, CASES, FP16, FP32, Case
from tests.support.gluon_interpreter import Barrier, Deadlock, Machine, initialise, interpreted, load
from tests.support.hopper_forms import MASKS, chosen, each_form, every_other, gradients, served
from tests.support.inputs import make_inputs
from tests.support.tolerance import expected

here = pytest.mark.parametrize("device", calls.places("interpreted hopper"), indirect=True)


@pytest.fixture
def device(request, seed):
    with calls.running_on(request.param, seed) as device:
        yield device


ROWS = {
    "64, two": (64, TWO_CONSUMERS),
    "64, three": (64, FORWARD[64]),
    "64, four in turn": (64, FOUR_CONSUMERS),
    "64, three that skip": (64, THREE_SKIPPING),
    "64, four that skip": (64, FOUR_SKIPPING),
    "96": (96, FORWARD[128]),
    "128": (128, FORWARD[128]),
    "128, two that skip": (128, TWO_SKIPPING),
    "136": (136, TWO_PARTS),
    "192": (192, TWO_PARTS),
    "256": (256, FORWARD[256]),
}
LENGTHS = {
    "square": ((257,), (257,)),
    "few keys": ((300, 300), (130, 130)),
    "many keys": ((70,), (520,)),
}
PACKED = {
    "uneven": ((1, 300, 0, 64, 193, 5), (300, 1, 64, 0, 193, 130)),
    "no keys": ((100, 200), (0, 150)),
}


def check_forward(case: Case, row: str, seed: int) -> None:
    inputs = make_inputs(case, "cpu", seed)
    with launch.pinned(hopper_forward=ROWS[row][1]):
        results, keep = calls.forward(case, inputs, seed)
    expected(case, inputs, keep).check(**results)


def check_backward(case: Case, form: str, seed: int) -> None:
    inputs = make_inputs(case, "cpu", seed)
    torch.manual_seed(seed)
    dq, dk, dv = gradients(case, inputs, form)
    expected(case, inputs, calls.keep_under(case, inputs, seed)).check(dq=dq, dk=dk, dv=dv)


@here
@pytest.mark.parametrize("row, mask, lengths", every_other(ROWS, MASKS, LENGTHS))
def test_forward(row, mask, lengths, device, seed):
    check_forward(Case("forward", BF16, ROWS[row][0], 2, 1, *LENGTHS[lengths], **MASKS[mask]), row, seed)


@here
@pytest.mark.parametrize("row, mask, name", every_other(ROWS, ["full", "causal", "window"], PACKED))
def test_forward_of_packed_batches(row, mask, name, device, seed):
    check_forward(Case(name, FP16, ROWS[row][0], 4, 2, *PACKED[name], "varlen", **MASKS[mask]), row, seed)


FEATURES = {
    "softcap": dict(softcap=3.0),
    "alibi": dict(alibi="bh"),
    "sink": dict(sink=FP32),
    "dropout": dict(dropout_p=0.3),
}


@here
@pytest.mark.parametrize("row, mask, feature", every_other(ROWS, ["causal", "band"], FEATURES))
def test_features_of_a_forward(row, mask, feature, device, seed):
    case = Case("features", BF16, ROWS[row][0], 2, 1, (257,) * 2, (300,) * 2, **MASKS[mask], **FEATURES[feature])
    check_forward(case, row, seed)


@here
@pytest.mark.parametrize("lengths", ["square", "few keys"])
@pytest.mark.parametrize("mask", MASKS)
@each_form(64, 96, 128, 256)
def test_backward(headdim, form, mask, lengths, device, seed):
    check_backward(Case("backward", BF16, headdim, 2, 1, *LENGTHS[lengths], **MASKS[mask]), form, seed)


@here
@pytest.mark.parametrize("name", PACKED)
@each_form(64, 128, 192)
def test_backward_of_packed_batches(headdim, form, name, device, seed):
    check_backward(Case(name, FP16, headdim, 4, 2, *PACKED[name], "varlen", causal=True), form, seed)


@here
@pytest.mark.parametrize(
    "feature", [dict(softcap=3.0), dict(alibi="bh"), dict(dropout_p=0.3), dict(softcap=3.0, dropout_p=0.2)], ids=str
)
@each_form(64, 128, 256)
def test_features_of_a_backward(headdim, form, feature, device, seed):
    check_backward(Case("features", BF16, headdim, 2, 1, (257,), (300,), causal=True, **feature), form, seed)


SERVED = [case for case in CASES if served(case)]


@here
@pytest.mark.parametrize("case", SERVED[::3], ids=str)
def test_cases_forward_and_backward(case, device, seed):
    inputs = make_inputs(case, device, seed)
    results, keep = calls.forward_and_backward(case, inputs, seed)
    expected(case, inputs, keep).check(**results)


@here
@pytest.mark.parametrize("ends", [[0, 300, 100, 200], [0, 50, 10_000, 200], [150, -70, 60, 2**31 - 1]], ids=str)
@each_form(64, 256)
def test_lengths_that_make_no_sense(headdim, ends, form, device, seed):
    """No access outside a tensor, and an end."""
    tensors = [calls.randn(200, 4, headdim, dtype=BF16, device=device, seed=seed + i) for i in range(4)]
    leaves, cu = [x.requires_grad_() for x in tensors[:3]], calls.int32(ends, device)
    with chosen(form, headdim) as deterministic:
        out = flash_attn_varlen_func(*leaves, cu, cu, 250, 250, causal=True, deterministic=deterministic)
        torch.autograd.grad(out, leaves, tensors[3])


@here
@pytest.mark.parametrize("turn", range(8))
def test_tiles_that_one_program_takes_in_turn(turn, device, seed):
    """Consumers that skip blocks, and sums in order, whoever goes on first."""
    case = Case("turns", BF16, 64, 3, 1, (300,) * 2, (300,) * 2, window=(130, 0))
    with interpreted(1 + turn % 3, seed + turn):
        check_forward(case, "64, four that skip", seed + turn)
        check_backward(case, "in order", seed + turn)


TURNS = [(1, 1, 5), (6, 6, 3), (11, 2, 7), (12, 8, 4), (44, 8, 3), (9, 4, 1)]


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("heads, together, num_blocks", TURNS)
@pytest.mark.parametrize("by_keys", [None, 1])
def test_tiles_are_drawn_once_turn_after_turn(by_keys, heads, together, num_blocks, causal, seed):
    """A turn's longest tiles first; what no full turn takes comes first of query tiles, and last of key tiles."""
    window = Window(None, 0 if causal else None)
    work = schedule.Work(
        None, heads * num_blocks, num_blocks, together, heads, 1, None, None, None, None, by_keys=by_keys
    )
    with interpreted(1, seed):
        drawn = iter([schedule.tile_at(i, work, window) for i in range(work.num_tiles)])
    rest = heads % together
    full = range(0 if by_keys else rest, heads - rest + 1 if by_keys else heads + 1, together)
    bounds = [*full, heads] if by_keys else [0, *full]
    for begin, end in itertools.pairwise(bounds):
        for block in sorted(range(num_blocks), reverse=causal and not by_keys):
            assert [next(drawn) for _ in range(begin, end)] == [(block, head, 0) for head in range(begin, end)]
    assert next(drawn, None) is None


def test_fewer_stages_than_skipping_needs(seed):
    """Are refused where the kernel is compiled; without that it would hang."""
    config = FOUR_SKIPPING._replace(num_stages=FOUR_SKIPPING.consumers - 1)
    case = Case("stages", BF16, 64, 2, 2, (700,), (700,), causal=True)
    inputs = make_inputs(case, "cpu", seed)
    with (
        calls.running_on("interpreted hopper", seed),
        launch.pinned(hopper_forward=config),
        pytest.raises(AssertionError),
    ):
        calls.forward(case, inputs, seed)
    with (
        mock.patch.object(gluon_interpreter, "assert_", lambda condition: None),
        calls.running_on("interpreted hopper", seed),
        launch.pinned(hopper_forward=config),
        pytest.raises(Deadlock),
    ):
        calls.forward(case, inputs, seed)


def test_the_interpreter_notices_waits_without_end(seed):
    barriers = [Barrier(), Barrier()]
    machine = Machine(0, 1, random.Random(seed))

    def partition(mine, other):
        machine.pause(lambda: other.passed(0))
        mine.arrive()

    for barrier in barriers:
        initialise(barrier, 1)
    with pytest.raises(Deadlock):
        machine.specialize([(partition, barriers), (partition, barriers[::-1])], None, None)


def test_the_interpreter_notices_accesses_outside_a_tensor():
    pointer = gluon_interpreter.pointer_to(torch.zeros(4))
    assert load(pointer + 3) == 0.0
    assert load(pointer + 4, mask=False, other=math.inf) == math.inf
    for outside in (4, -1):
        with pytest.raises(IndexError):
            load(pointer + outside)
