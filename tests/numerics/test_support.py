"""The cases cover what they promise, and their inputs look as the kernels will meet them."""

from itertools import combinations, product
from types import FunctionType

import pytest
import torch

from tests.support.cases import AXES, CASES, FP16, FP32, SMALL_CASES, Case, pairwise
from tests.support.inputs import GUARD, make_inputs, random_keep


def test_every_pair_of_values_occurs():
    axes = {axis: list(values) for axis, values in AXES.items()}
    rows = pairwise(axes)
    seen = {pair for row in rows for pair in combinations(row_items(row, axes), 2)}
    wanted = {((a, x), (b, y)) for a, b in combinations(axes, 2) for x, y in product(axes[a], axes[b])}
    assert wanted <= seen
    assert rows == pairwise(axes)


def row_items(row, axes):
    return [(axis, row[axis]) for axis in axes]


def test_cases_are_named_and_bounded():
    cases = CASES + SMALL_CASES
    assert len({case.name for case in cases}) == len(cases)
    for case in cases:
        assert case.nheads % case.nheads_k == 0 and len(case.seqlens_q) == len(case.seqlens_k)
        assert max(sum(case.seqlens_q), sum(case.seqlens_k)) <= 700
        if case.layout == "dense":
            assert len(set(case.seqlens_q)) == len(set(case.seqlens_k)) == 1
    for case in SMALL_CASES:
        assert case.dtype in (FP16, FP32) and max(case.seqlens_q + case.seqlens_k) <= 48


@pytest.mark.parametrize("case", CASES[:12] + SMALL_CASES, ids=str)
def test_inputs_have_the_shapes_of_the_case(case):
    inputs = make_inputs(case, "cpu", 1)
    dense = case.layout == "dense"
    tokens_q = (case.batch_size, case.seqlens_q[0]) if dense else (sum(case.seqlens_q),)
    tokens_k = (case.batch_size, case.seqlens_k[0]) if dense else (sum(case.seqlens_k),)
    assert inputs.q.shape == inputs.dout.shape == (*tokens_q, case.nheads, case.headdim)
    assert inputs.k.shape == inputs.v.shape == (*tokens_k, case.nheads_k, case.headdim)
    for x in (inputs.q, inputs.k, inputs.v, inputs.dout):
        assert x.dtype == case.dtype and x.isfinite().all() and x.stride(-1) == 1
    if not dense:
        assert inputs.cu_seqlens_q.diff().tolist() == list(case.seqlens_q) and inputs.cu_seqlens_k.dtype == torch.int32
    assert (inputs.max_seqlen_q, inputs.max_seqlen_k) == (max(case.seqlens_q), max(case.seqlens_k))


def case_with(strides, **sizes):
    sizes = {"seqlens_q": (5, 5), "seqlens_k": (5, 5), "nheads": 4, "nheads_k": 4} | sizes
    return Case("strides", torch.float16, 16, strides=strides, **sizes)


def test_packed_inputs_share_one_buffer():
    inputs = make_inputs(case_with("packed"), "cpu", 1)
    assert inputs.q.stride() == (6 * 3 * 4 * 16, 3 * 4 * 16, 16, 1)
    assert inputs.k.data_ptr() - inputs.q.data_ptr() == 4 * 16 * 2
    inputs = make_inputs(case_with("packed", nheads_k=2), "cpu", 1)
    assert inputs.k.stride(1) == 2 * 2 * 16 and inputs.v.data_ptr() - inputs.k.data_ptr() == 2 * 16 * 2


def test_transposed_inputs_are_head_major():
    inputs = make_inputs(case_with("transposed"), "cpu", 1)
    assert inputs.q.stride() == inputs.dout.stride() == (4 * 6 * 16, 16, 6 * 16, 1)


@pytest.mark.parametrize("strides", ["contiguous", "packed", "transposed"])
def test_inputs_lie_in_nan(strides):
    inputs = make_inputs(case_with(strides), "cpu", 1)
    for x in (inputs.q, inputs.k, inputs.v, inputs.dout):
        flat = torch.tensor([], dtype=x.dtype).set_(x.untyped_storage())
        assert flat[:GUARD].isnan().all() and flat[-GUARD:].isnan().all()
        if strides == "contiguous":
            assert x.is_contiguous()
        else:
            after = flat.as_strided((2, 1, 4, 16), x.stride(), x.storage_offset() + 5 * x.stride(1))
            assert after.isnan().all() or x is inputs.dout


def test_seed_and_name_decide_the_numbers():
    case = CASES[0]
    assert torch.equal(make_inputs(case, "cpu", 1).q, make_inputs(case, "cpu", 1).q)
    assert not torch.equal(make_inputs(case, "cpu", 1).q, make_inputs(case, "cpu", 2).q)


def test_keep_matches_the_layout():
    dense, varlen = (next(c for c in CASES if c.dropout_p and c.layout == layout) for layout in ("dense", "varlen"))
    keep = random_keep(dense, "cpu", 1)
    assert keep.shape == (dense.batch_size, dense.nheads, dense.seqlens_q[0], dense.seqlens_k[0])
    shapes = [(1, varlen.nheads, *pair) for pair in zip(varlen.seqlens_q, varlen.seqlens_k, strict=True)]
    assert [tuple(mask.shape) for mask in random_keep(varlen, "cpu", 1)] == shapes
    assert random_keep(CASES[0], "cpu", 1) is None


def test_uninitialised_memory_of_the_package_is_nan():
    def allocate():
        a = torch.empty(3)
        return a, torch.empty_like(a), a.new_empty(2)

    inside = FunctionType(allocate.__code__, {"__name__": "flash_attn.somewhere", "torch": torch})
    assert all(x.isnan().all() for x in inside())
