"""What is measured: named cases, grouped into sweeps. Imports neither torch nor a backend."""

import functools
import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

TOKENS = 16384
HIDDEN = 2048
DIRECTIONS = ("forward", "backward")
BACKWARD_FLOPS = 2.5  # five products where the forward has two

PAPER = "FlashAttention-2 (arXiv 2307.08691), section 4: 16k tokens, hidden size 2048"
WINDOW_SIZE = (-1, -1)


class Case(NamedTuple):
    """One attention call of a fixed shape; `baseline` names the plain case that its cost is stated against."""

    name: str
    direction: str  # "forward" or "backward"
    batch: int
    seqlen_q: int  # of the longest sequence when layout is "varlen"
    seqlen_k: int
    nheads: int
    nheads_k: int
    headdim: int
    dtype: str = "bfloat16"
    causal: bool = False
    window: tuple[int, int] = WINDOW_SIZE  # keys left, right of the diagonal, inclusive; -1 is unbounded
    softcap: float = 0.0
    alibi: bool = False
    sinks: bool = False
    dropout_p: float = 0.0
    layout: str = "dense"  # "dense", "varlen" or "paged": packed queries, keys in pages of page_size
    lengths: tuple[int, ...] = ()  # varlen: tokens of every sequence, queries and keys alike
    page_size: int = 0
    source: str = ""
    baseline: str = ""

    @property
    def sequences(self) -> tuple[tuple[int, int], ...]:
        """(seqlen_q, seqlen_k) of every sequence."""
        if self.layout == "varlen":
            return tuple((length, length) for length in self.lengths)
        return ((self.seqlen_q, self.seqlen_k),) * self.batch

    @property
    def tokens(self) -> tuple[int, int]:
        """Query and key tokens over the batch."""
        return sum(q for q, _k in self.sequences), sum(k for _q, k in self.sequences)

    @property
    def visible_pairs(self) -> int:
        """(query, key) pairs that take part, over the batch, for one head."""
        left, right = self.window
        return sum(visible_pairs(q, k, left, 0 if self.causal else right) for q, k in self.sequences)

    @property
    def flops(self) -> float:
        """Multiplications and additions of the products, counting visible pairs only."""
        return self._direction_factor * 4.0 * self.headdim * self.nheads * self.visible_pairs

    @property
    def conventional_flops(self) -> float:
        """The count of the literature: all pairs, half of them when causal; windows are not counted."""
        pairs = sum(q * k for q, k in self.sequences)
        return self._direction_factor * 4.0 * self.headdim * self.nheads * pairs * (0.5 if self.causal else 1.0)

    @property
    def _direction_factor(self) -> float:
        return BACKWARD_FLOPS if self.direction == "backward" else 1.0

    def to_json(self) -> dict[str, Any]:
        """The fields that differ from their defaults."""
        return {name: value for name, value in self._asdict().items() if value != self._field_defaults.get(name)}

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> "Case":
        return cls(**{name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()})


@functools.cache
def visible_pairs(seqlen_q: int, seqlen_k: int, left: int, right: int) -> int:
    """Pairs inside the window of one sequence: row i sees [i + seqlen_k - seqlen_q - left, ... + right]."""
    pairs = 0
    for row in range(seqlen_q):
        diagonal = row + seqlen_k - seqlen_q
        low = max(0, diagonal - left) if left >= 0 else 0
        high = min(seqlen_k, diagonal + right + 1) if right >= 0 else seqlen_k
        pairs += max(0, high - low)
    return pairs


def size_name(length: int) -> str:
    """16384 as "16k"."""
    return f"{length // 1024}k" if length % 1024 == 0 else str(length)


def plain(headdim: int, seqlen: int, causal: bool, direction: str, **changes: Any) -> Case:
    """The usual cell: 16k tokens, hidden size 2048; `changes` replace fields."""
    nheads = max(1, HIDDEN // headdim)
    case = Case(
        name="",
        direction=direction,
        batch=TOKENS // seqlen,
        seqlen_q=seqlen,
        seqlen_k=seqlen,
        nheads=nheads,
        nheads_k=nheads,
        headdim=headdim,
        causal=causal,
        source=PAPER,
    )._replace(**changes)
    return case if case.name else case._replace(name=describe_name(case))


def describe_name(case: Case) -> str:
    """A name that says what differs from a plain bf16 multi-head call."""
    words = [f"D{case.headdim}", f"S{size_name(case.seqlen_q)}", "causal" if case.causal else "full"]
    if case.dtype != "bfloat16":
        words.append(case.dtype)
    if case.nheads != case.nheads_k:
        words.append(f"H{case.nheads}/{case.nheads_k}")
    if case.window != WINDOW_SIZE:
        words.append(f"window{case.window[0]}")
    words += [f"softcap{case.softcap:g}"] * (case.softcap > 0) + ["alibi"] * case.alibi + ["sinks"] * case.sinks
    words += [f"dropout{case.dropout_p:g}"] * (case.dropout_p > 0)
    if case.layout == "varlen":
        words.append("equal" if len(set(case.lengths)) == 1 else "mixed")
    words += [f"B{case.batch}", f"K{size_name(case.seqlen_k)}", f"page{case.page_size}"] * (case.layout == "paged")
    return "-".join([*words, case.direction])


def main_sweep(direction: str) -> list[Case]:
    """Head dims x lengths x mask at a constant number of tokens: 18 cells."""
    return [
        plain(headdim, seqlen, causal, direction)
        for headdim, causal, seqlen in itertools.product((64, 128, 256), (False, True), (1024, 4096, 16384))
    ]


def feature_sweep(direction: str) -> list[Case]:
    """Each feature beside the plain kernel it is compared with, at an equal number of visible pairs."""
    sweep = []
    for headdim in (64, 128):
        baseline = plain(headdim, 4096, True, direction)
        variants: tuple[dict[str, Any], ...] = ({"dropout_p": 0.1}, {"alibi": True}, {"softcap": 30.0}, {"sinks": True})
        sweep.append(baseline)
        sweep += [plain(headdim, 4096, True, direction, baseline=baseline.name, **fields) for fields in variants]
        # A row sees about 1024 keys on average, as under a causal mask at 2k, which is therefore its plain kernel.
        equal_pairs = plain(headdim, 2048, True, direction)
        sweep.append(equal_pairs)
        sweep.append(plain(headdim, 16384, True, direction, window=(1023, 0), baseline=equal_pairs.name))
    return sweep


MIXED_LENGTHS = (8192, 256, 4096, 512, 1024, 256, 2048)  # 16k tokens, as packed training batches mix them


def shape_sweep(direction: str) -> list[Case]:
    """Grouped heads, packed batches, fp16, head dims that are no power of two, and narrow windows."""
    llama = {"nheads": 32, "nheads_k": 8, "source": "Llama-3 8B attention, 32 query and 8 key heads"}
    packed = {"layout": "varlen", "source": "packed training batch of 16k tokens"}
    equal = dict(packed, batch=16, lengths=(1024,) * 16)
    mixed = dict(packed, batch=len(MIXED_LENGTHS), lengths=MIXED_LENGTHS)
    return [
        plain(128, 4096, True, direction, **llama),
        plain(128, 16384, True, direction, **llama),
        plain(128, 1024, True, direction, **equal),
        plain(128, 8192, True, direction, **mixed),
        plain(64, 8192, True, direction, **mixed),
        plain(128, 4096, True, direction, dtype="float16"),
        *(plain(headdim, 4096, True, direction) for headdim in (80, 96, 192)),
        *(plain(headdim, 16384, True, direction, window=(127, 0)) for headdim in (64, 128)),
    ]


def flaggems_sweep(direction: str) -> list[Case]:
    """The main sweep, packed batches, and one new query against keys in pages."""
    packed = {"layout": "varlen", "batch": len(MIXED_LENGTHS), "lengths": MIXED_LENGTHS}
    cases = main_sweep(direction) + [plain(headdim, 8192, True, direction, **packed) for headdim in (64, 128)]
    if direction == "forward":
        decode = {"nheads": 32, "nheads_k": 8, "layout": "paged", "batch": 64, "source": "decoding, Llama-3 8B heads"}
        sizes = itertools.product((1024, 8192), (16, 256))
        cases += [plain(128, 1, False, direction, **decode, seqlen_k=keys, page_size=page) for keys, page in sizes]
    return cases


def tiny_sweep(direction: str) -> list[Case]:
    """Seconds on a CPU: the path of a run, not a measurement."""
    small = {"batch": 1, "nheads": 2, "nheads_k": 2, "dtype": "float32", "source": ""}
    return [
        plain(16, 64, False, direction, **small),
        plain(16, 64, True, direction, **small),
        plain(16, 64, True, direction, **small | {"softcap": 30.0, "baseline": f"D16-S64-causal-float32-{direction}"}),
    ]


SWEEPS: dict[str, Callable[[str], list[Case]]] = {
    "main": main_sweep,
    "features": feature_sweep,
    "shapes": shape_sweep,
    "flaggems": flaggems_sweep,
    "tiny": tiny_sweep,
}


def sweep_cases(sweep: str, directions: tuple[str, ...] = DIRECTIONS, words: tuple[str, ...] = ()) -> list[Case]:
    """The cases of a sweep whose names contain every one of `words`; a baseline stays with the cases that need it."""
    cases = [case for direction in directions for case in SWEEPS[sweep](direction)]
    chosen = {case.name for case in cases if all(word in case.name for word in words)}
    needed = {case.baseline for case in cases if case.name in chosen}
    return [case for case in cases if case.name in chosen | needed]


def comparison_groups(cases: list[Case]) -> list[list[Case]]:
    """Cases to be timed in one interleaved loop: each baseline with the cases stated against it."""
    groups: dict[str, list[Case]] = {}
    for case in cases:
        groups.setdefault(case.baseline or case.name, []).append(case)
    return list(groups.values())
