"""Pages of keys, also where the block table names none."""

import pytest
import torch

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402

from flash_attn.kernels.algebra.arguments import Pages  # noqa: E402
from flash_attn.kernels.algebra.locate import locate_keys  # noqa: E402

pytestmark = [
    pytest.mark.interpreter,
    pytest.mark.skipif(not triton.knobs.runtime.interpret, reason="needs TRITON_INTERPRET=1"),
]

NUM_PAGES, MAX_PAGES = 6, 4


@triton.jit
def locate_kernel(pages, batch, first, seqlen, out, N: tl.constexpr):
    i = tl.arange(0, N)
    positions = first + i
    page, slot, valid = locate_keys(pages, batch, positions, positions < seqlen)
    tl.store(out + i, page)
    tl.store(out + N + i, slot)
    tl.store(out + 2 * N + i, valid.to(tl.int32))


def locate(table, batch, page_size, first, seqlen, size=64, shifting=False):
    """(page, slot, valid) of `size` positions; the table's rows lie among numbers of real pages."""
    surroundings = torch.full((table.shape[0] + 2, table.shape[1] + 3), 1, dtype=torch.int32)
    inner = surroundings[1:-1, : table.shape[1]]
    inner.copy_(table)
    out = torch.empty(3, size, dtype=torch.int32)
    shift = page_size.bit_length() - 1 if shifting else None
    pages = Pages(inner, inner.stride(0), table.shape[1], page_size, NUM_PAGES, shift)
    locate_kernel[(1,)](pages, batch, first, seqlen, out, N=size)
    return out[0], out[1], out[2].bool()


TABLE = torch.tensor([[5, 0, 3, 1], [2, 2, 4, 0]], dtype=torch.int32)


@pytest.mark.parametrize(
    "page_size, shifting", [(1, False), (3, False), (16, False), (1, True), (16, True), (256, True)]
)
@pytest.mark.parametrize("batch", [0, 1])
def test_pages_and_slots(page_size, shifting, batch):
    for first in range(0, MAX_PAGES * page_size, 64):
        page, slot, valid = locate(TABLE, batch, page_size, first, MAX_PAGES * page_size, shifting=shifting)
        positions = torch.arange(first, first + 64)
        inside = positions < MAX_PAGES * page_size
        assert torch.equal(valid, inside)
        assert torch.equal(page[inside], TABLE[batch, positions[inside] // page_size])
        assert torch.equal(slot[inside].long(), positions[inside] % page_size)


def test_positions_past_the_sequence_are_not_valid():
    _, _, valid = locate(TABLE, 0, 8, 0, 19)
    assert torch.equal(valid, torch.arange(64) < 19)


def test_positions_past_the_table_are_not_valid():
    """A length in use beyond what the table addresses reads nothing, neither of the next row nor past the last."""
    for batch in (0, 1):
        page, _, valid = locate(TABLE, batch, 8, 0, 10_000)
        assert torch.equal(valid, torch.arange(64) < MAX_PAGES * 8)
        assert torch.all(page[~valid] == -1)


@pytest.mark.parametrize("wrong", [-1, -(2**31), NUM_PAGES, 2**31 - 1])
def test_numbers_that_name_no_page(wrong):
    table = TABLE.clone()
    table[0, 1] = wrong
    _, slot, valid = locate(table, 0, 8, 0, 32)
    positions = torch.arange(64)
    assert torch.equal(valid, (positions < 32) & (positions // 8 != 1))
    assert bool(((slot >= 0) & (slot < 8)).all())
