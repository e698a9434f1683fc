"""The rotary kernel compiles for every architecture without spills, and moves 16 bytes a load where strides allow."""

from unittest import mock

import pytest
import torch

triton = pytest.importorskip("triton")

from flash_attn import hardware  # noqa: E402
from flash_attn.ops.triton import rotary  # noqa: E402
from tests.compile.budgets import BUDGETED  # noqa: E402
from tests.support.stub_driver import ARCHITECTURES, Launch, compiling_for  # noqa: E402

pytestmark = [
    pytest.mark.compile,
    pytest.mark.skipif(triton.knobs.runtime.interpret, reason="needs TRITON_INTERPRET unset"),
]

ARCHS = ("sm_80", "sm_90", "sm_100", "gfx942", "gfx1100")
# headdim, half, interleaved, packed, in place, offsets in a tensor
KINDS = {
    "halves": (128, 64, False, False, False, False),
    "interleaved": (128, 64, True, False, True, True),
    "packed": (64, 32, False, True, False, True),
    "part": (96, 16, True, True, False, False),
    "odd": (59, 10, True, False, False, False),
    "wide": (256, 128, False, False, True, True),
}
DTYPES = {"halves": torch.float32, "interleaved": torch.float16}


def meta(*shape, dtype):
    return torch.empty(shape, dtype=dtype, device="meta")


def launch(arch: str, kind: str, seqlen: int = 2048, nheads: int = 16, offset: int = 3) -> None:
    """One rotation of tensors without memory."""
    headdim, half, interleaved, packed, inplace, offsets = KINDS[kind]
    dtype = DTYPES.get(kind, torch.bfloat16)
    x = meta(2 * seqlen, nheads, headdim, dtype=dtype) if packed else meta(2, seqlen, nheads, headdim, dtype=dtype)
    table = meta(2 * seqlen, half, dtype=dtype)
    starts = meta(2, dtype=torch.int64) if offsets else None
    cu_seqlens = meta(3, dtype=torch.int32) if packed else None
    out = x if inplace else torch.empty_like(x)
    turn = rotary.Turn(table, table, offset, starts, cu_seqlens, seqlen, interleaved)
    with mock.patch.object(hardware, "of", lambda device: ARCHITECTURES[arch].hardware):
        bound = rotary._bind(x, out, turn, inplace)
        bound(x, out, table, table, starts, cu_seqlens, numbers=(offset, 2 * seqlen))


def compiled(arch: str, cache_dir: str, *calls: dict) -> list[Launch]:
    with compiling_for(arch, cache_dir) as launches:
        for words in calls:
            launch(arch, **words)
    return launches


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("arch", ARCHS)
def test_no_spills(arch, kind, tmp_path):
    (found,) = compiled(arch, str(tmp_path), dict(kind=kind))
    assert not BUDGETED or found.report.spill_bytes == 0, found.report
    assert found.report.shared_memory <= ARCHITECTURES[arch].shared_memory


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "odd"])
def test_loads_and_stores_are_16_bytes(kind, tmp_path):
    (found,) = compiled("sm_90", str(tmp_path), dict(kind=kind))
    ptx = found.compiled.asm["ptx"]
    assert ptx.count("st.global") == ptx.count("st.global.v4.b32")
    assert "ld.global.v4.b32" in ptx and "ld.global.b16" not in ptx


@pytest.mark.parametrize("kind", ["halves", "packed"])
def test_lengths_share_a_binary(kind, tmp_path):
    sizes = ((2048, 16, 0), (2064, 32, 1), (4096, 24, 77))
    calls = [dict(kind=kind, seqlen=seqlen, nheads=nheads, offset=offset) for seqlen, nheads, offset in sizes]
    found = compiled("sm_90", str(tmp_path), *calls)
    assert len(found) == 3 and len({id(each.compiled) for each in found}) == 1
