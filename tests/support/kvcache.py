"""Calls over a cache: named cases, their tensors, and the truth, which appends and rotates by itself.

Whatever a call must not read is NaN: padding, tokens past the end, pages that nobody owns, memory around the tensors.
"""

import math
import zlib
from dataclasses import dataclass, replace
from itertools import cycle
from typing import Any

import torch
from torch import Tensor

from flash_attn import flash_attn_with_kvcache, reference
from tests.support.cases import AXES, BF16, FP16, FP32, pairwise, with_sinks
from tests.support.inputs import GUARD, random_sinks
from tests.support.tolerance import LSE_TOLERANCE, MAX_FACTOR, assert_close


@dataclass(frozen=True)
class CacheCase:
    """One call of flash_attn_with_kvcache, without its tensors."""

    name: str
    dtype: torch.dtype
    headdim: int
    nheads: int
    nheads_k: int
    seqlen_q: int
    seqlens: tuple[int, ...]  # tokens in the cache of each sequence, before the new ones
    seqlen_new: int = 0
    rotary: str = ""  # "interleaved" or "halves"
    rotary_dim: int = 0
    page: int = 0  # tokens of a page; 0 is a cache of rows
    batch_idx: bool = False
    leftpad: tuple[int, ...] = ()
    window: tuple[int, int] = (-1, -1)
    causal: bool = False
    softcap: float = 0.0
    alibi: str | None = None  # None | "h" | "bh"
    num_splits: int = 0
    permuted: bool = False  # the caches are views of (seqlen, batch, heads, dim) memory
    seqlens_as: str = "tensor"  # "tensor" | "int", for equal lengths | "none", for full caches
    sink: torch.dtype | None = None
    spare: int = 21  # tokens that a cache has room for beyond those in use

    def __str__(self) -> str:
        return self.name

    @property
    def batch_size(self) -> int:
        return len(self.seqlens)

    @property
    def room(self) -> int:
        """Tokens that the cache of a sequence holds."""
        if self.seqlens_as == "none":
            return self.seqlens[0]
        needed = max(self.seqlens) + self.seqlen_new + self.spare
        return -(-needed // self.page) * self.page if self.page else needed

    @property
    def interval(self) -> tuple[int | None, int | None]:
        left, right = (side if side >= 0 else None for side in self.window)
        return left, 0 if self.causal else right

    @property
    def first_keys(self) -> tuple[int, ...]:
        return self.leftpad or (0,) * self.batch_size


@dataclass
class CacheInputs:
    """The arguments of a call by name, and where sequence b's token t lies: k_cache[page[b][t], slot[b][t]]."""

    arguments: dict[str, Any]
    pages: list[Tensor]
    slots: list[Tensor]

    @property
    def caches(self) -> tuple[Tensor, Tensor]:
        return self.arguments["k_cache"], self.arguments["v_cache"]


LENGTHS = {
    "mixed": [((0, 37, 190), "tensor"), ((130, 1), "tensor"), ((255, 16, 64, 3), "tensor")],
    "edges": [((63, 64, 65), "tensor"), ((127, 129), "tensor"), ((256,), "tensor")],
    "equal": [((77, 77), "int"), ((128,), "int"), ((0, 0), "int")],
    "long": [((700,), "tensor"), ((513, 40), "tensor")],
    "full": [((65, 65), "none"), ((192,), "none")],
}
CACHE_AXES = {
    "dtype": AXES["dtype"],
    "headdim": {f"d{d}": d for d in (64, 128, 16, 40, 59, 96, 192, 256)},
    "heads": {"mha": (2, 2), "gqa": (6, 2), "mqa": (8, 1)},
    "lengths": {name: name for name in LENGTHS},
    "queries": {"q1": (1,), "few": (2, 3, 7), "many": (17, 33, 70), "most": (150, 129)},
    "append": {
        "": ("", 0),
        "new": ("", 0),
        "gptj": ("interleaved", 256),
        "neox": ("halves", 256),
        "gptj_part": ("interleaved", 16),
        "neox_part": ("halves", 32),
    },
    "place": {"": 0, "idx": -1, "page1": 1, "page3": 3, "page16": 16, "page64": 64, "page256": 256},
    "leftpad": {"": False, "leftpad": True},
    "mask": {k: v for k, v in AXES["mask"].items() if k != "diagonal"},
    "softcap": AXES["softcap"],
    "alibi": AXES["alibi"],
    "splits": {"": 0, "one": 1, "three": 3},
    "strides": {"": False, "permuted": True},
}


def _pairwise_cases() -> list[CacheCase]:
    turns = {name: cycle(members) for name, members in LENGTHS.items()}
    rows_turns = {name: cycle(members) for name, members in CACHE_AXES["queries"].items()}
    cases = []
    for number, row in enumerate(pairwise({axis: list(values) for axis, values in CACHE_AXES.items()})):
        value = {axis: CACHE_AXES[axis][row[axis]] for axis in CACHE_AXES}
        nheads, nheads_k = value["heads"]
        seqlen_q, (seqlens, seqlens_as) = next(rows_turns[row["queries"]]), next(turns[value["lengths"]])
        rotary, rotary_dim = value["append"]
        page = max(value["place"], 0)
        if seqlens_as == "none" and (value["leftpad"] or (page and seqlens[0] % page)):
            seqlens_as = "tensor"
        appends = row["append"] != "" and seqlens_as != "none"
        window, causal = value["mask"]
        cases.append(
            CacheCase(
                name="-".join(filter(None, (f"{number:02}", *(row[axis] for axis in CACHE_AXES)))),
                dtype=value["dtype"],
                headdim=value["headdim"],
                nheads=nheads,
                nheads_k=nheads_k,
                seqlen_q=seqlen_q,
                seqlens=seqlens,
                seqlen_new=(seqlen_q if number % 3 else 4) if appends else 0,
                rotary=rotary if appends else "",
                rotary_dim=min(rotary_dim, value["headdim"] // 16 * 16),
                page=page,
                batch_idx=value["place"] < 0,
                leftpad=tuple(n * 2 // (3 + i) for i, n in enumerate(seqlens)) if value["leftpad"] else (),
                window=window,
                causal=causal,
                softcap=value["softcap"],
                alibi=value["alibi"],
                num_splits=value["splits"],
                permuted=value["strides"],
                seqlens_as=seqlens_as,
                spare=0 if number % 4 == 0 else 21,
            )
        )
    return cases


REGRESSIONS = [
    CacheCase("decode", BF16, 128, 32, 8, 1, (300, 17), 1, "halves", 128, causal=True),
    CacheCase("one-key", FP16, 64, 4, 2, 1, (0, 0), 1, causal=True),
    CacheCase("nothing-at-all", BF16, 64, 4, 2, 3, (0, 0)),
    CacheCase("more-queries-than-keys", FP16, 64, 4, 2, 9, (2, 5), 1, causal=True),
    CacheCase("headdim-1", FP32, 1, 2, 1, 2, (33,), 2, causal=True),
    CacheCase("more-splits-than-keys", BF16, 64, 4, 2, 1, (5, 1, 0), 1, num_splits=128),
    CacheCase("window-of-a-long-cache", BF16, 64, 4, 2, 1, (700, 90), 1, window=(31, 0), num_splits=4),
    CacheCase("group-of-seventeen", FP16, 64, 17, 1, 2, (150,), 2, causal=True),
    CacheCase("group-past-a-tile", BF16, 64, 48, 1, 3, (150, 80), 3, causal=True, num_splits=2),
    CacheCase("leftpad-of-everything", FP16, 64, 4, 2, 1, (40, 64), leftpad=(40, 63)),
    CacheCase("leftpad-pages", BF16, 64, 4, 2, 1, (200, 64), 1, page=16, leftpad=(100, 9), causal=True),
    CacheCase("pages-of-a-block", BF16, 128, 8, 2, 1, (700, 31), 1, page=16, causal=True, num_splits=3),
    CacheCase("pages-of-a-block-forward", FP16, 96, 4, 2, 70, (130, 77), 70, "halves", 64, page=32, causal=True),
    CacheCase("full-pages", FP16, 128, 8, 2, 1, (256, 255), 0, page=64, spare=0),
    CacheCase("last-free-place", FP16, 64, 8, 2, 1, (63, 10), 1, page=16, spare=0, causal=True),
]
CACHE_CASES = _pairwise_cases() + REGRESSIONS

# for the interpreter: few programs, at most three blocks of 16 keys
SMALL_CACHE_CASES = [
    CacheCase("small-decode", FP16, 32, 4, 2, 1, (17, 33), spare=7),
    CacheCase("small-append", FP16, 32, 4, 2, 1, (17, 30), 1, causal=True, num_splits=2),
    CacheCase("small-gptj", FP32, 32, 2, 1, 2, (9, 20), 2, "interleaved", 32, causal=True),
    CacheCase("small-neox", FP16, 40, 2, 2, 3, (9, 20), 3, "halves", 32, num_splits=3),
    CacheCase("small-neox-window", FP32, 16, 2, 2, 2, (30,), 2, "halves", 16, window=(9, 3)),
    CacheCase("small-page1", FP16, 16, 2, 1, 1, (20, 3), 1, page=1, spare=4),
    CacheCase("small-page3", FP32, 16, 2, 1, 2, (20, 5), 1, "interleaved", 16, page=3, causal=True, num_splits=2),
    CacheCase("small-page4", FP16, 32, 4, 2, 1, (37, 5), 1, page=4, causal=True, num_splits=2),
    CacheCase("small-page8", FP32, 16, 2, 1, 2, (30, 17), 2, "halves", 16, page=8, window=(9, -1)),
    CacheCase("small-page16", FP16, 32, 4, 1, 1, (33, 16), 1, page=16, num_splits=2),
    CacheCase("small-page16-leftpad", FP16, 32, 2, 2, 1, (33, 16), 1, page=16, leftpad=(18, 3)),
    CacheCase("small-idx", FP32, 16, 2, 2, 2, (20, 9), 2, batch_idx=True, causal=True),
    CacheCase("small-idx-leftpad", FP16, 32, 2, 1, 1, (40, 9), 1, batch_idx=True, leftpad=(21, 8)),
    CacheCase("small-int", FP16, 32, 2, 1, 1, (21, 21), 1, seqlens_as="int", permuted=True),
    CacheCase("small-none", FP16, 32, 2, 1, 2, (37, 37), seqlens_as="none", softcap=2.0),
    CacheCase("small-alibi", FP32, 16, 4, 2, 2, (20, 37), alibi="bh", causal=True, num_splits=2),
    CacheCase("small-window", FP16, 32, 4, 2, 1, (47, 20), window=(9, -1), num_splits=2),
    CacheCase("small-empty", FP16, 32, 2, 1, 3, (0, 1), causal=True, num_splits=2),
    CacheCase("small-many-rows", FP16, 32, 4, 1, 20, (30,), 20, "halves", 32, causal=True, num_splits=2),
    CacheCase("small-forward-kernel", FP16, 32, 4, 1, 20, (13,), 7, page=16, causal=True),
    CacheCase("small-forward-kernel-page8", FP16, 32, 4, 1, 20, (23, 5), 1, page=8, causal=True),
    CacheCase("small-forward-kernel-page3", FP16, 32, 4, 1, 20, (23,), 1, page=3, window=(7, 2)),
    CacheCase("small-forward-kernel-idx", FP32, 16, 4, 1, 17, (19, 40), 1, batch_idx=True, leftpad=(3, 17)),
]

SINK_CACHE_CASES, SMALL_SINK_CACHE_CASES = with_sinks(CACHE_CASES), with_sinks(SMALL_CACHE_CASES)


def make_cache_inputs(case: CacheCase, device: torch.device | str, seed: int) -> CacheInputs:
    """Standard normal tokens in the case's places; NaN everywhere else."""
    generator = torch.Generator().manual_seed(seed + zlib.crc32(case.name.encode()))
    pages, slots, table, batch_idx, num_rows = _places(case, generator)
    shape = (num_rows, case.page or case.room, case.nheads_k, case.headdim)
    caches = [_nan(case, shape, device) for _ in range(2)]
    for cache in caches:
        for page, slot, n, first in zip(pages, slots, case.seqlens, case.first_keys, strict=True):
            tokens = torch.randn(max(n - first, 0), *shape[2:], generator=generator).to(device, case.dtype)
            cache[page[first:n].to(device), slot[first:n].to(device)] = tokens

    def randn(*size: int) -> Tensor:
        return torch.randn(size, generator=generator).to(device, case.dtype)

    q = randn(case.batch_size, case.seqlen_q, case.nheads, case.headdim)
    new = (case.batch_size, case.seqlen_new, case.nheads_k, case.headdim)
    angles = torch.randn(case.room + 3, case.rotary_dim // 2, generator=generator)
    slopes = {"h": (case.nheads,), "bh": (case.batch_size, case.nheads)}
    seqlens = torch.tensor(case.seqlens, dtype=torch.int32, device=device)
    arguments = dict(
        q=q,
        k_cache=caches[0],
        v_cache=caches[1],
        k=randn(*new) if case.seqlen_new else None,
        v=randn(*new) if case.seqlen_new else None,
        rotary_cos=angles.cos().to(device, case.dtype) if case.rotary else None,
        rotary_sin=angles.sin().to(device, case.dtype) if case.rotary else None,
        cache_seqlens={"tensor": seqlens, "int": case.seqlens[0], "none": None}[case.seqlens_as],
        cache_batch_idx=batch_idx if batch_idx is None else batch_idx.to(device),
        cache_leftpad=torch.tensor(case.leftpad, dtype=torch.int32, device=device) if case.leftpad else None,
        block_table=table if table is None else table.to(device),
        causal=case.causal,
        window_size=case.window,
        softcap=case.softcap,
        rotary_interleaved=case.rotary == "interleaved",
        alibi_slopes=None
        if case.alibi is None
        else (0.3 * torch.rand(slopes[case.alibi], generator=generator)).to(device),
        num_splits=case.num_splits,
        return_softmax_lse=True,
        s_aux=None if case.sink is None else random_sinks(case.nheads, case.sink, device, generator),
    )
    return CacheInputs(arguments, pages, slots)


def _places(case: CacheCase, generator: torch.Generator) -> tuple[list[Tensor], list[Tensor], Any, Any, int]:
    """(page and slot of every token of each sequence, block table, batch index, pages or rows of the cache)."""
    tokens = torch.arange(case.room)
    if case.page:
        blocks, spare = case.room // case.page, 3
        order = torch.randperm(case.batch_size * blocks + spare, generator=generator)
        table = order[: case.batch_size * blocks].view(case.batch_size, blocks).int()
        pages = [table[b].long()[tokens // case.page] for b in range(case.batch_size)]
        used = torch.tensor([[-(-(n + case.seqlen_new) // case.page)] for n in case.seqlens])
        table = table.where(torch.arange(blocks) < used, torch.tensor(-1, dtype=torch.int32))
        return pages, [tokens % case.page] * case.batch_size, table, None, len(order)
    rows = torch.arange(case.batch_size)
    batch_idx = None
    if case.batch_idx:
        rows = torch.randperm(case.batch_size + 2, generator=generator)[: case.batch_size]
        batch_idx = rows.int()
    pages = [torch.full_like(tokens, int(row)) for row in rows]
    return pages, [tokens] * case.batch_size, None, batch_idx, case.batch_size + (2 if case.batch_idx else 0)


def _nan(case: CacheCase, shape: tuple[int, ...], device: torch.device | str) -> Tensor:
    size = math.prod(shape)
    buffer = torch.full((size + 2 * GUARD,), math.nan, dtype=case.dtype, device=device)[GUARD : GUARD + size]
    if case.permuted:
        return buffer.view(shape[1], shape[0], *shape[2:]).transpose(0, 1)
    return buffer.view(shape)


@dataclass(frozen=True)
class CacheExpected:
    """What a call should leave in the caches, and compute."""

    case: CacheCase
    inputs: CacheInputs
    caches: tuple[Tensor, Tensor]  # before the call
    q: Tensor  # rotated in fp64
    k: Tensor | None  # new keys, rotated in fp64
    noise: Tensor | None  # sum of the terms of each rotated key

    def check(self, out: Tensor, lse: Tensor) -> None:
        """The caches bit by bit, apart from the rounding of rotated keys; then out and lse from what is in them."""
        self.check_caches()
        case = self.case
        work = torch.promote_types(case.dtype, torch.float32)
        truth = [self._attention(b, self.q[b], torch.float64) for b in range(case.batch_size)]
        rounded = self.q.to(case.dtype)
        matched = [self._attention(b, rounded[b], work, case.dtype) for b in range(case.batch_size)]
        (ref_out, ref_lse), (matched_out, matched_lse) = (
            map(torch.cat, zip(*x, strict=True)) for x in (truth, matched)
        )
        assert_close(out, ref_out, matched_out, "out", terms=1.0)  # values are standard normal
        if not case.rotary:
            assert_close(lse, ref_lse, None, "lse")
            return
        assert torch.equal(lse == -math.inf, ref_lse == -math.inf), "lse: -inf in the wrong places"
        seen = ref_lse > -math.inf
        inherited = (matched_lse.double() - ref_lse)[seen].abs().max().item() if seen.any() else 0.0
        budget = LSE_TOLERANCE * (1 + ref_lse.abs()) + MAX_FACTOR * inherited
        error = (lse.double() - ref_lse).abs()
        assert (error <= budget)[seen].all(), (
            f"lse: error {error[seen].max().item():.3e}, from rounding {inherited:.3e}"
        )

    def check_caches(self) -> None:
        case, new_v = self.case, self.inputs.arguments["v"]
        for actual, before, new in zip(self.inputs.caches, self.caches, (self.k, new_v), strict=True):
            wanted = before.clone()
            for b, n in enumerate(case.seqlens):
                places = self._places_of_new(b, n, actual.device)
                if new is None or places[0].numel() == 0:
                    continue
                written, exact = actual[places], new[b, : places[0].numel()].double()
                if case.rotary and new is self.k:
                    eps, accumulator = torch.finfo(case.dtype).eps, torch.finfo(torch.float32).eps
                    budget = 0.5001 * eps * exact.abs() + 4 * accumulator * self.noise[b, : places[0].numel()] + 1e-7
                    error = (written.double() - exact).abs()
                    assert (error <= budget).all(), f"rotated keys of sequence {b} differ by {error.max().item():.3e}"
                else:
                    assert torch.equal(written.double(), exact), f"new tokens of sequence {b} are not in the cache"
                wanted[places] = written
            assert torch.equal(bits(actual), bits(wanted)), "the cache changed outside the new tokens"

    def _places_of_new(self, b: int, n: int, device: torch.device) -> tuple[Tensor, Tensor]:
        new = slice(n, n + self.case.seqlen_new)
        return self.inputs.pages[b][new].to(device), self.inputs.slots[b][new].to(device)

    def _attention(
        self, b: int, q: Tensor, compute: torch.dtype, round_to: torch.dtype | None = None
    ) -> tuple[Tensor, Tensor]:
        case, arguments = self.case, self.inputs.arguments
        keys = slice(case.first_keys[b], case.seqlens[b] + case.seqlen_new)
        page, slot = (x[b][keys].to(q.device) for x in (self.inputs.pages, self.inputs.slots))
        slopes = arguments["alibi_slopes"]
        return reference.attention(
            q[None],
            *(cache[page, slot][None] for cache in self.inputs.caches),
            window=case.interval,
            softcap=case.softcap,
            alibi_slopes=None if slopes is None else slopes.expand(case.batch_size, case.nheads)[b : b + 1],
            sinks=arguments["s_aux"],
            compute_dtype=compute,
            round_to=round_to,
        )


def expected_of(case: CacheCase, inputs: CacheInputs) -> CacheExpected:
    """To be called before the call that it judges."""
    arguments = inputs.arguments
    seqlens = torch.tensor(case.seqlens, device=arguments["q"].device)[:, None]
    rows = torch.arange(case.seqlen_q, device=seqlens.device)
    bounded = [side for side in case.window if 0 <= side < case.room]
    q, _ = rotated(case, arguments, arguments["q"], seqlens + (rows if case.causal or bounded else 0 * rows))
    k, noise = arguments["k"], None
    if k is not None:
        k, noise = rotated(case, arguments, k, seqlens + torch.arange(case.seqlen_new, device=seqlens.device))
    k_cache, v_cache = inputs.caches
    return CacheExpected(case, inputs, (k_cache.clone(), v_cache.clone()), q, k, noise)


def rotated(case: CacheCase, arguments: dict[str, Any], x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    """x in fp64, each pair of features as a complex number times exp(i angle); and the sizes of the summed terms."""
    x = x.double()
    if not case.rotary:
        return x, x.abs()
    inside = positions.clamp(max=case.room + 2)
    turn = torch.complex(arguments["rotary_cos"].double(), arguments["rotary_sin"].double())[inside][:, :, None]
    turn = torch.where((positions < case.room + 3)[:, :, None, None], turn, torch.ones_like(turn))
    part, rest = x[..., : case.rotary_dim], x[..., case.rotary_dim :]
    half = case.rotary_dim // 2
    if case.rotary == "interleaved":
        turned = torch.view_as_real(torch.view_as_complex(part.reshape(*part.shape[:-1], half, 2).contiguous()) * turn)
        turned = turned.reshape(part.shape)
    else:
        z = torch.complex(part[..., :half].contiguous(), part[..., half:].contiguous()) * turn
        turned = torch.cat((z.real, z.imag), -1)
    size = x.abs().amax(-1, keepdim=True).expand_as(x)
    return torch.cat((turned, rest), -1), 2 * size


def bits(x: Tensor) -> Tensor:
    """The bit patterns, in which NaN equals itself."""
    return x.contiguous().view({2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()])


def run_and_check(case: CacheCase, device: torch.device | str, seed: int) -> None:
    """One call against the truth."""
    inputs = make_cache_inputs(case, device, seed)
    expected = expected_of(case, inputs)
    out, lse = flash_attn_with_kvcache(**inputs.arguments)
    expected.check(out, lse)


def changed(case: CacheCase, **fields: Any) -> CacheCase:
    """The case with other fields, under the same name: the same random tokens where shapes agree."""
    return replace(case, **fields)
