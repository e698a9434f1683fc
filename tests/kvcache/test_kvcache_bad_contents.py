"""Lengths, pages and indices that are wrong and known only on the device: never an access outside, and good neighbours.

The host's own check of lengths on a CPU is off here, so that the CPU backends and the interpreted kernels meet them, too.
"""

import math

import pytest
import torch

from flash_attn import dispatch, flash_attn_with_kvcache
from tests.support import calls
from tests.support.cases import FP16
from tests.support.kvcache import bits

B, H, HK, D = 2, 4, 2, 32
ROOM, PAGE, NEW = 48, 16, 3
INT_MAX, INT_MIN = 2**31 - 1, -(2**31)
GUARD, SENTINEL = 4096, 7.0


@pytest.fixture
def device(request, monkeypatch):
    monkeypatch.setattr(dispatch, "check_room", lambda *numbers: None)
    with calls.running_on(request.param) as device:
        yield device


everywhere = pytest.mark.parametrize("device", calls.places("cpu", "gpu", "interpreter"), indirect=True)


class Call:
    """A call whose caches lie between sentinels; B sequences of ROOM places, in rows or in pages 0, 1, 2 and 3, 4, 5."""

    def __init__(self, device, seed, seqlens, *, paged=False, rotary=True, seqlen_q=NEW):
        shape = (6, PAGE, HK, D) if paged else (B, ROOM, HK, D)
        self.buffers = []
        caches = [self.guarded(calls.randn(*shape, dtype=FP16, device=device, seed=seed + i)) for i in range(2)]
        self.before = [cache.clone() for cache in caches]
        self.k, self.v = (calls.randn(B, NEW, HK, D, dtype=FP16, device=device, seed=seed + 2 + i) for i in range(2))
        angles = calls.randn(ROOM, 8, dtype=FP16, device=device, seed=seed + 4)
        self.arguments = dict(
            q=calls.randn(B, seqlen_q, H, D, dtype=FP16, device=device, seed=seed + 5),
            k_cache=caches[0],
            v_cache=caches[1],
            k=self.k,
            v=self.v,
            rotary_cos=angles.cos() if rotary else None,
            rotary_sin=angles.sin() if rotary else None,
            cache_seqlens=calls.int32(seqlens, device),
            block_table=calls.int32([[0, 1, 2], [3, 4, 5]], device) if paged else None,
            causal=True,
            num_splits=2,
            return_softmax_lse=True,
        )

    def guarded(self, x):
        buffer = torch.full((x.numel() + 2 * GUARD,), SENTINEL, dtype=x.dtype, device=x.device)
        self.buffers.append(buffer)
        return buffer[GUARD:-GUARD].view(x.shape).copy_(x)

    def run(self, **changes):
        """The results, after a look at the sentinels."""
        out, lse = flash_attn_with_kvcache(**self.arguments | changes)
        for buffer in self.buffers:
            assert (buffer[:GUARD] == SENTINEL).all() and (buffer[-GUARD:] == SENTINEL).all()
        assert out.isfinite().all(), "something outside the caches was read"
        return out, lse

    @property
    def caches(self):
        return self.arguments["k_cache"], self.arguments["v_cache"]

    def written(self):
        """Which of the caches' tokens changed: (rows or pages, places), over heads and features."""
        return [
            (bits(cache) != bits(old)).flatten(2).any(-1) for cache, old in zip(self.caches, self.before, strict=True)
        ]


SAME_AS = {
    "negative": ([-5, 20], [0, 20]),
    "most negative": ([INT_MIN, 20], [0, 20]),
    "minus one, as padding rows have": ([20, -1], [20, 0]),
}


@everywhere
@pytest.mark.parametrize("paged", [False, True])
@pytest.mark.parametrize("name", SAME_AS)
def test_lengths_below_zero_are_zero(name, paged, device, seed):
    bad, good = (Call(device, seed, seqlens, paged=paged) for seqlens in SAME_AS[name])
    calls.assert_equal(bad.run(), good.run())
    calls.assert_equal(bad.caches, good.caches)


@everywhere
@pytest.mark.parametrize("paged", [False, True])
@pytest.mark.parametrize("seqlen", [ROOM, ROOM + 1, INT_MAX])
def test_lengths_past_the_end_write_nothing(seqlen, paged, device, seed):
    call = Call(device, seed, [seqlen, 20], paged=paged, rotary=False)
    out, lse = call.run()
    neighbour = Call(device, seed, [20, 20], paged=paged, rotary=False)
    calls.assert_equal([x[1] for x in neighbour.run()], [out[1], lse[1]])
    for written in call.written():
        sequences = written.view(B, ROOM)
        assert not sequences[0].any() and sequences[1].nonzero().flatten().tolist() == [20, 21, 22]
    full = Call(device, seed, [ROOM, 20], paged=paged, rotary=False)
    calls.assert_equal(full.run(k=None, v=None)[0][0], out[0])


@everywhere
@pytest.mark.parametrize("paged", [False, True])
def test_new_tokens_are_written_as_far_as_there_is_room(paged, device, seed):
    call = Call(device, seed, [ROOM - 1, ROOM - 2], paged=paged, rotary=False)
    call.run()
    for written, cache, new in zip(call.written(), call.caches, (call.k, call.v), strict=True):
        sequences = written.view(B, ROOM)
        assert [row.nonzero().flatten().tolist() for row in sequences] == [[ROOM - 1], [ROOM - 2, ROOM - 1]]
        tokens = cache.reshape(B, ROOM, HK, D)
        calls.assert_equal([tokens[0, -1:], tokens[1, -2:]], [new[0, :1], new[1, :2]])


BAD_TABLES = {
    "padding": [[0, -1, -1], [3, 4, 5]],
    "too large": [[0, 6, INT_MAX], [3, 4, 5]],
    "most negative": [[0, INT_MIN, -2], [3, 4, 5]],
}


@everywhere
@pytest.mark.parametrize("name", BAD_TABLES)
def test_pages_that_do_not_exist(name, device, seed):
    """Sequence 0 has 15 tokens on a page of 16; of its three new ones, two have no place, and count as zeros."""
    call = Call(device, seed, [15, 20], paged=True, rotary=False)
    out, lse = call.run(block_table=calls.int32(BAD_TABLES[name], device))
    for written in call.written():
        assert written.nonzero().tolist() == [[0, 15], [4, 4], [4, 5], [4, 6]]
    good = Call(device, seed, [15, 20], paged=True, rotary=False)
    good.k[0, 1:], good.v[0, 1:] = 0.0, 0.0
    calls.assert_equal(good.run(), [out, lse])


@everywhere
@pytest.mark.parametrize("page, headdim", [(4, 32), (8, 32), (16, 128), (32, 64)])
def test_some_pages_of_a_block_do_not_exist(page, headdim, device, seed):
    """They count as pages of zeros, wherever they lie in a block of keys that takes several pages."""
    shape = (9, page, HK, headdim)
    k, v = (calls.randn(*shape, dtype=FP16, device=device, seed=seed + i) for i in range(2))
    k[8], v[8] = 0.0, 0.0
    q = calls.randn(2, 1, H, headdim, dtype=FP16, device=device, seed=seed + 2)
    lengths = calls.int32([8 * page - 1, 5 * page], device)
    tables = ([0, -1, 1, 2, 9, 3, INT_MIN, 4], [-1, 5, INT_MAX, 6, 7, 0, 0, 0])
    zeros = [[number if 0 <= number < 9 else 8 for number in table] for table in tables]
    found, wanted = (
        flash_attn_with_kvcache(
            q, k, v, cache_seqlens=lengths, block_table=calls.int32(table, device), return_softmax_lse=True
        )
        for table in (tables, zeros)
    )
    calls.assert_equal(found, wanted)
    assert found[0].isfinite().all()


@everywhere
def test_padding_rows_of_a_batch(device, seed):
    """As continuous batching pads: no pages, length -1, and new tokens that go nowhere."""
    call = Call(device, seed, [-1, 20], paged=True)
    call.run(block_table=calls.int32([[-1] * 3, [3, 4, 5]], device))
    for written in call.written():
        assert written.nonzero()[:, 0].unique().tolist() == [4]
    out, lse = call.run(
        block_table=calls.int32([[-1] * 3, [3, 4, 5]], device), k=None, v=None, rotary_cos=None, rotary_sin=None
    )
    assert out[0].count_nonzero() == 0 and (lse[0] == -math.inf).all()


@everywhere
@pytest.mark.parametrize("bad", [-1, B, INT_MAX, INT_MIN])
def test_batch_indices_that_do_not_exist(bad, device, seed):
    call = Call(device, seed, [20, 20], rotary=False)
    out, lse = call.run(cache_batch_idx=calls.int32([bad, 1], device))
    for written in call.written():
        assert written.nonzero().tolist() == [[1, 20], [1, 21], [1, 22]]
    assert out[0].count_nonzero() == 0, "rows that do not exist have values"
    good = Call(device, seed, [20, 20], rotary=False)
    calls.assert_equal([x[1] for x in good.run()], [out[1], lse[1]])


@everywhere
@pytest.mark.parametrize("paged", [False, True])
def test_padding_past_the_tokens(paged, device, seed):
    """No key is left; negative padding is none."""
    call = Call(device, seed, [20, 20], paged=paged)
    out, lse = call.run(cache_leftpad=calls.int32([23, INT_MAX], device))
    assert out.count_nonzero() == 0 and (lse == -math.inf).all()
    good, negative = (Call(device, seed, [20, 20], paged=paged) for _ in range(2))
    calls.assert_equal(negative.run(cache_leftpad=calls.int32([-1, INT_MIN], device)), good.run())


@everywhere
def test_queries_past_the_angles(device, seed):
    """More queries than new tokens, at the very end: positions without angles are not rotated, and nothing is read there."""
    call = Call(device, seed, [ROOM - NEW, ROOM - NEW], seqlen_q=9)
    call.run()


@everywhere
@pytest.mark.parametrize("shape", [(0, 1), (2, 0)], ids=["no sequences", "no queries"])
def test_nothing_to_do(shape, device, seed):
    batch, seqlen_q = shape
    call = Call(device, seed, [20, 20])
    part = {name: call.arguments[name][:batch] for name in ("q", "k", "v", "cache_seqlens")}
    out, lse = call.run(**part | dict(q=part["q"][:, :seqlen_q]))
    assert out.shape == (batch, seqlen_q, H, D) and lse.shape == (batch, H, seqlen_q)
    for written in call.written():
        assert written.any(1).sum() == batch, "new tokens are appended even where nobody asks"
