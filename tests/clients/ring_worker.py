"""One of two processes in a ring: runs the parallel attention of other packages on its share and stores the results."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from tests.clients.loading import VERL, as_if_on_a_gpu, load, parts_of
from tests.support.cases import BF16, Case
from tests.support.inputs import Inputs, make_inputs
from tests.support.processes import WORLD

LENGTH = 64
SEQUENCES = (16, 32, 80)  # multiples of 2 * WORLD, in which zigzag cuts each
ODD = (16, 32, 79)  # together no multiple of WORLD

# bf16, since ring_flash_attn returns dq in nothing else, and in fp32 overwrites it: its copy is then the buffer itself
dense = dict(headdim=16, nheads=4, seqlens_q=(LENGTH,) * 2, seqlens_k=(LENGTH,) * 2)
packed = dict(headdim=16, nheads=4, seqlens_q=SEQUENCES, seqlens_k=SEQUENCES, layout="varlen")
GROUPED = Case("ring", BF16, nheads_k=2, causal=True, **dense)
FULL = Case("ring, full", BF16, nheads_k=2, **dense)
EQUAL_HEADS = Case("ring, equal heads", BF16, nheads_k=4, causal=True, **dense)
PACKED = Case("ring, packed", BF16, nheads_k=2, causal=True, **packed)
PACKED_FULL = Case("ring, packed, full", BF16, nheads_k=2, **packed)
ALONE = Case("ring, alone", BF16, nheads_k=2, causal=True, **(packed | dict(seqlens_q=(96,), seqlens_k=(96,))))
PADDED = Case("ring, padded", BF16, nheads_k=2, causal=True, **(packed | dict(seqlens_q=ODD, seqlens_k=ODD)))


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
    right: tuple[str, ...] = (
        "out",
        "dq",
        "dk",
        "dv",
    )  # what the package computes right, whatever attention it is given

    def rows(self, rank: int) -> Tensor:
        """The rows of the whole batch that a rank holds."""
        if self.case.layout == "dense":
            return self.shares(LENGTH, rank)
        lengths = self.case.seqlens_q
        if self.whole:
            return self.shares(sum(lengths), rank)
        starts = torch.tensor([0, *lengths]).cumsum(0)
        return torch.cat([start + self.shares(n, rank) for start, n in zip(starts, lengths, strict=False)])


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
    "swift": {
        "zigzag, packed": Ring(PACKED, zigzag, "", right=("out",)),
        "zigzag, one sequence": Ring(ALONE, zigzag, "", right=("out",)),
    },
    "verl": {
        "qwen2_vl, ulysses, packed": Ring(PACKED, in_turn, "qwen2_vl", ulysses=2, whole=True),
        "glm4v, ulysses, packed": Ring(PACKED, in_turn, "glm4v", ulysses=2, whole=True),
    },
    "openrlhf": {"llama3, padded": Ring(PADDED, in_turn, "", whole=True)},
}


def attend_with_ring_flash_attn(ring: Ring, *tensors: Any) -> Tensor:
    """q, k, v, and for a packed batch the rank's cu_seqlens and max_seqlen."""
    # Its adapters look for this name where transformers 4 had it.
    utils, home = load("transformers.modeling_flash_attention_utils"), load("transformers.utils")
    utils.is_flash_attn_greater_or_equal_2_10 = home.is_flash_attn_greater_or_equal_2_10
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


def attend_with_swift(ring: Ring, q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int) -> Tensor:
    with parts_of("swift", bare=("swift", "swift.sequence_parallel")):
        zigzag = load("swift.sequence_parallel.zigzag_ring_attn")
    q, k, v = (x[None] for x in (q, k, v))
    lengths = cu_seqlens * WORLD, max_seqlen * WORLD
    return zigzag.zigzag_ring_flash_attn_varlen_func(q, k, v, *lengths, causal=True, group=dist.group.WORLD)[0]


def attend_with_verl(ring: Ring, q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, _max_seqlen: int) -> Tensor:
    """Told where sequences begin by their positions."""
    with as_if_on_a_gpu(), parts_of("verl", VERL):
        load("verl.utils.ulysses").set_ulysses_sequence_parallel_group(dist.group.WORLD)
        attend = load(f"verl.models.transformers.{ring.function}")._custom_flash_attention_forward
        positions = torch.cat([torch.arange(length) for length in ring.case.seqlens_q])[ring.rows(dist.get_rank())]
        return attend(*(x[None] for x in (q, k, v)), None, q.shape[0], position_ids=positions[None])[0]


def attend_with_openrlhf(ring: Ring, q: Tensor, k: Tensor, v: Tensor, _cu_seqlens: Tensor, _max_seqlen: int) -> Tensor:
    """From a padded batch of tokens to a padded batch of results, by way of llama3's ring over the tokens in between."""
    with parts_of("openrlhf", ("openrlhf", "openrlhf.models")):
        utils = load("openrlhf.models.ring_attn_utils")
    utils.set_ring_attn_group(dist.group.WORLD)
    lengths, rows = torch.tensor(ring.case.seqlens_q), ring.rows(dist.get_rank())
    mask = torch.arange(int(lengths.max())) < lengths[:, None]
    tokens = mask.flatten().cumsum(0).view(mask.shape) * mask
    mine, positions, _next, padding, indices = utils.unpad_and_slice_tensor(tokens, mask.long(), dist.group.WORLD)
    assert torch.equal(mine[mine > 0], 1 + rows)
    assert torch.equal(positions[mine > 0], torch.cat([torch.arange(length) for length in lengths])[rows])
    llama3 = load("ring_flash_attn").llama3_flash_attn_varlen_func
    parameters = load("ring_flash_attn.adapters.hf_adapter").DATA_PARAMS
    q, k, v = (torch.nn.functional.pad(x, (0, 0, 0, 0, 0, mine.shape[1] - x.shape[0])) for x in (q, k, v))
    out = llama3(q, k, v, heads_k_stride=1, causal=True, **parameters)
    return utils.gather_and_pad_tensor(out[None], dist.group.WORLD, padding, indices, *mask.shape)[mask][rows, 0]


ATTEND = {
    "ring_flash_attn": attend_with_ring_flash_attn,
    "yunchang": attend_with_yunchang,
    "swift": attend_with_swift,
    "verl": attend_with_verl,
    "openrlhf": attend_with_openrlhf,
}


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


def work(rank: int, folder: Path, seed: int, packages: list[str]) -> None:
    for package in packages:
        results = {}
        for name, ring in RINGS[package].items():
            results[name] = share(ring, make_inputs(ring.case, "cpu", seed), ring.rows(rank), ATTEND[package])
        torch.save(results, folder / f"{package}-{rank}.pt")
