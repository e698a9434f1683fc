"""One of two processes in a ring of gloo: runs the ring functions of other packages on its share and stores the results.

python -m tests.clients.ring_worker RANK FOLDER SEED PACKAGE
"""

import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from tests.support.cases import BF16, Case
from tests.support.inputs import Inputs, make_inputs

WORLD = 2
LENGTH = 64
SEQUENCES = (16, 32, 80)  # multiples of 2 * WORLD, in which zigzag cuts each

# bf16, since ring_flash_attn returns dq in nothing else, and in fp32 overwrites it: its copy is then the buffer itself
dense = dict(headdim=16, nheads=4, seqlens_q=(LENGTH,) * 2, seqlens_k=(LENGTH,) * 2)
packed = dict(headdim=16, nheads=4, seqlens_q=SEQUENCES, seqlens_k=SEQUENCES, layout="varlen")
GROUPED = Case("ring", BF16, nheads_k=2, causal=True, **dense)
FULL = Case("ring, full", BF16, nheads_k=2, **dense)
EQUAL_HEADS = Case("ring, equal heads", BF16, nheads_k=4, causal=True, **dense)
PACKED = Case("ring, packed", BF16, nheads_k=2, causal=True, **packed)
PACKED_FULL = Case("ring, packed, full", BF16, nheads_k=2, **packed)


def in_turn(length: int, rank: int) -> Tensor:
    """The positions of a sequence that a rank holds: one contiguous part."""
    return torch.arange(length).chunk(WORLD)[rank]


def zigzag(length: int, rank: int) -> Tensor:
    """Part `rank` from the front and the same from the back."""
    parts = torch.arange(length).chunk(2 * WORLD)
    return torch.cat([parts[rank], parts[2 * WORLD - 1 - rank]])


def stripes(length: int, rank: int) -> Tensor:
    return torch.arange(rank, length, WORLD)


class Ring(NamedTuple):
    """A case, which positions of a sequence a rank holds, and how the package is asked for it."""

    case: Case
    shares: Callable[[int, int], Tensor]
    function: str
    ulysses: int = 1  # ranks that share out the heads instead
    whole: bool = False  # whether the ranks share out the packed batch, rather than each of its sequences

    def rows(self, rank: int) -> Tensor:
        """The rows of the whole batch that a rank holds."""
        if self.case.layout == "dense":
            return self.shares(LENGTH, rank)
        if self.whole:
            return self.shares(sum(SEQUENCES), rank)
        starts = torch.tensor([0, *SEQUENCES]).cumsum(0)
        return torch.cat([start + self.shares(n, rank) for start, n in zip(starts, SEQUENCES, strict=False)])


RINGS = {
    "ring_flash_attn": {
        "ring": Ring(GROUPED, in_turn, "ring_flash_attn_func"),
        "ring, full": Ring(FULL, in_turn, "ring_flash_attn_func"),
        "zigzag": Ring(GROUPED, zigzag, "zigzag_ring_flash_attn_func"),
        "stripe": Ring(GROUPED, stripes, "stripe_flash_attn_func"),
        "ring, packed": Ring(PACKED, in_turn, "ring_flash_attn_varlen_func"),
        "ring, packed, full": Ring(PACKED_FULL, in_turn, "ring_flash_attn_varlen_func"),
        "zigzag, packed": Ring(PACKED, zigzag, "zigzag_ring_flash_attn_varlen_func"),
        "llama3, packed": Ring(PACKED, in_turn, "llama3_flash_attn_varlen_func", whole=True),
    },
    "yunchang": {
        "ring": Ring(GROUPED, in_turn, "basic"),
        "zigzag": Ring(GROUPED, zigzag, "zigzag"),
        "stripe": Ring(GROUPED, stripes, "strip"),
        "ulysses": Ring(EQUAL_HEADS, in_turn, "", ulysses=2),
    },
}


def attend_with_ring_flash_attn(ring: Ring, *tensors: Any) -> Tensor:
    """q, k, v, and for a packed batch the rank's cu_seqlens and max_seqlen."""
    # Its adapters for transformers import names that transformers 5 has no more; nothing else of it needs them.
    adapters = types.ModuleType("ring_flash_attn.adapters")
    adapters.substitute_hf_flash_attn = adapters.update_ring_flash_attn_params = None  # type: ignore[attr-defined]
    sys.modules["ring_flash_attn.adapters"] = adapters
    import ring_flash_attn

    words: dict[str, Any] = dict(causal=ring.case.causal)
    if ring.whole:
        *qkv, cu_seqlens, _max_seqlen = tensors
        prepare = ring_flash_attn.llama3_flash_attn_prepare_cu_seqlens
        *lengths, local_k_slice = prepare(cu_seqlens, ring.case.causal, dist.get_rank(), WORLD)
        tensors, words = (*qkv, *lengths), words | dict(heads_k_stride=1, local_k_slice=local_k_slice)
    return getattr(ring_flash_attn, ring.function)(*tensors, **words)


def attend_with_yunchang(ring: Ring, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    import yunchang

    yunchang.set_seq_parallel_pg(ring.ulysses, WORLD // ring.ulysses, dist.get_rank(), WORLD)
    if ring.ulysses == WORLD:  # gloo refuses what a ring of one process sends to itself
        attention = yunchang.UlyssesAttention(sequence_process_group=yunchang.globals.PROCESS_GROUP.ULYSSES_PG)
    else:
        attention = yunchang.LongContextAttention(ring_impl_type=ring.function)
    return attention(q, k, v, causal=ring.case.causal)


def share(ring: Ring, inputs: Inputs, rows: Tensor, attend: Callable[..., Tensor]) -> dict[str, Tensor]:
    """out, dq, dk, dv of a rank's rows."""
    dim = 1 if ring.case.layout == "dense" else 0
    q, k, v, dout = (x.index_select(dim, rows) for x in (inputs.q, inputs.k, inputs.v, inputs.dout))
    leaves = [x.requires_grad_() for x in (q, k, v)]
    lengths: tuple[Any, ...] = ()
    if ring.case.layout == "varlen":
        parts = 1 if ring.whole else WORLD
        lengths = (inputs.cu_seqlens_q // parts, inputs.max_seqlen_q // parts)
    out = attend(ring, *leaves, *lengths)
    dq, dk, dv = torch.autograd.grad(out, leaves, dout)
    return dict(out=out.detach(), dq=dq, dk=dk, dv=dv)


def main(rank: int, folder: Path, seed: int, package: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=WORLD)
    attend = attend_with_yunchang if package == "yunchang" else attend_with_ring_flash_attn
    results = {}
    for name, ring in RINGS[package].items():
        results[name] = share(ring, make_inputs(ring.case, "cpu", seed), ring.rows(rank), attend)
    torch.save(results, folder / f"{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), sys.argv[4])
