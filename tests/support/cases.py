"""Named problems. `CASES` covers every pair of values of the axes below; `SMALL_CASES` is for the Triton interpreter.

The axes are lists of values and `CASES` follows from them without randomness, so a name means the same problem always.
"""

from dataclasses import dataclass, replace
from functools import partial
from itertools import combinations, cycle, product

import torch

FP16, BF16, FP32 = torch.float16, torch.bfloat16, torch.float32


@dataclass(frozen=True)
class Case:
    """One attention problem, without its tensors."""

    name: str
    dtype: torch.dtype
    headdim: int
    nheads: int
    nheads_k: int
    seqlens_q: tuple[int, ...]  # one entry per sequence; equal entries when dense
    seqlens_k: tuple[int, ...]
    layout: str = "dense"  # "dense" | "varlen"
    window: tuple[int, int] = (-1, -1)  # public: -1 is unbounded
    causal: bool = False
    softcap: float = 0.0
    alibi: str | None = None  # None | "h" | "bh"
    dropout_p: float = 0.0
    strides: str = "contiguous"  # "contiguous" | "packed" | "transposed"
    sink: torch.dtype | None = None

    def __str__(self) -> str:
        return self.name

    @property
    def batch_size(self) -> int:
        return len(self.seqlens_q)

    @property
    def interval(self) -> tuple[int | None, int | None]:
        """The window as flash_attn.reference takes it: None is unbounded, causal is a right side of 0."""
        left, right = (side if side >= 0 else None for side in self.window)
        return left, 0 if self.causal else right


# Lengths come in classes, so that a class is a value of its axis and its members take turns.
LENGTHS = {
    "square": [((n, n), (n, n)) for n in (64, 63, 65, 1, 127, 128, 129, 97, 16, 17)],
    "decode": [((1, 1), (127, 127)), ((1,), (65,)), ((2,), (257,)), ((1, 1, 1), (33, 33, 33)), ((3,), (509,))],
    "short_q": [((64,), (65,)), ((113,), (203,)), ((31, 31), (129, 129)), ((63,), (320,)), ((128,), (191,))],
    "short_k": [((65,), (64,)), ((203,), (113,)), ((129, 129), (1, 1)), ((257,), (63,)), ((130,), (128,))],
    "varlen": [
        ((64, 1, 129), (64, 1, 129)),
        ((0, 17, 63, 128), (5, 0, 65, 97)),
        ((1, 1, 1), (129, 1, 64)),
        ((127, 0, 31), (127, 0, 31)),
        ((113, 2, 65), (40, 131, 64)),
    ],
}

FEW_QUERIES = {
    "one": [((1, 1), (300, 300)), ((1,), (2049,)), ((1, 1, 1), (256, 256, 256))],
    "several": [((3,), (509,)), ((5, 5), (384, 384)), ((7,), (1000,))],
    "varlen": [((1, 1, 1), (300, 1, 65)), ((2, 0, 3), (500, 40, 0)), ((1, 5, 4), (129, 257, 1030)), ((1, 0), (777, 9))],
    "tiles": [
        ((130,), (2200,)),
        ((1, 200, 70), (300, 2500, 900)),
        ((65, 65), (2049, 2049)),
        ((129, 0, 64), (3000, 5, 70)),
    ],
}

AXES = {
    "dtype": {"bf16": BF16, "fp16": FP16, "fp32": FP32},
    "headdim": {f"d{d}": d for d in (64, 128, 16, 40, 59, 80, 96, 111, 160, 192, 256)},
    "heads": {"mha": (2, 2), "gqa": (6, 2), "mqa": (3, 1)},
    "lengths": {name: name for name in LENGTHS},
    "mask": {
        "full": ((-1, -1), False),
        "causal": ((-1, -1), True),
        "left": ((37, -1), False),
        "band": ((16, 32), False),
        "diagonal": ((0, 0), False),
        "causal_band": ((50, -1), True),
    },
    "softcap": {"": 0.0, "softcap": 3.0},
    "alibi": {"": None, "alibi_h": "h", "alibi_bh": "bh"},
    "dropout": {"": 0.0, "dropout": 0.17},
    "strides": {"": "contiguous", "packed": "packed", "transposed": "transposed"},
}


def pairwise(axes: dict[str, list]) -> list[dict]:
    """Rows that hold every pair of values of two different axes at least once: greedy, deterministic.

    Each row starts from the first pair still missing; every other axis then takes the value that adds most missing
    pairs, the least used value on a tie.
    """
    missing = dict.fromkeys(
        ((a, x), (b, y)) for a, b in combinations(axes, 2) for x, y in product(axes[a], axes[b])
    )  # a dict keeps the order, which a set does not
    used = dict.fromkeys(((axis, value) for axis in axes for value in axes[axis]), 0)
    rows = []
    while missing:
        row = dict(next(iter(missing)))
        for axis in axes:
            if axis not in row:
                row[axis] = min(axes[axis], key=partial(_preference, missing, used, row, axis))
        for pair in combinations(((axis, row[axis]) for axis in axes), 2):
            missing.pop(pair, None)
        for item in row.items():
            used[item] += 1
        rows.append(row)
    return rows


def _preference(missing: dict, used: dict, row: dict, axis: str, value: str) -> tuple[int, int]:
    """Smallest for the value that adds most missing pairs to the row, then for the least used."""
    new = axis, value
    return -sum((item, new) in missing or (new, item) in missing for item in row.items()), used[new]


def _pairwise_cases(lengths: dict[str, list], axes: dict[str, dict]) -> list[Case]:
    turns = {name: cycle(members) for name, members in lengths.items()}
    cases = []
    for number, row in enumerate(pairwise({axis: list(values) for axis, values in axes.items()})):
        value = {axis: axes[axis][row[axis]] for axis in axes}
        nheads, nheads_k = value["heads"]
        window, causal = value["mask"]
        seqlens_q, seqlens_k = next(turns[value["lengths"]])
        cases.append(
            Case(
                name="-".join(filter(None, (f"{number:02}", *(row[axis] for axis in axes)))),
                dtype=value["dtype"],
                headdim=value["headdim"],
                nheads=nheads,
                nheads_k=nheads_k,
                seqlens_q=seqlens_q,
                seqlens_k=seqlens_k,
                layout="dense" if len(set(seqlens_q)) == len(set(seqlens_k)) == 1 else "varlen",
                window=window,
                causal=causal,
                softcap=value["softcap"],
                alibi=value["alibi"],
                dropout_p=value["dropout"],
                strides=value["strides"],
            )
        )
    return cases


# Each of these names something that once went wrong, here or elsewhere.
REGRESSIONS = [
    Case("one-token", BF16, 64, 1, 1, (1,), (1,)),
    Case("headdim-1", FP32, 1, 2, 1, (33,), (33,), causal=True),
    Case("headdim-8", FP16, 8, 4, 2, (65,), (65,), causal=True),
    Case("all-rows-empty", FP16, 64, 2, 2, (70,), (0,)),
    Case("varlen-no-keys-at-all", BF16, 64, 2, 2, (5, 70), (0, 0), "varlen"),
    Case("varlen-no-tokens-at-all", BF16, 64, 2, 2, (0, 0), (0, 0), "varlen"),
    Case("causal-first-block-empty", BF16, 128, 2, 1, (300,), (120,), causal=True),
    Case("window-past-the-end", FP16, 64, 2, 2, (100,), (100,), window=(200, 200)),
    Case("causal-ignores-right-side", BF16, 64, 2, 2, (130,), (130,), window=(20, 7), causal=True),
    Case("right-only-short-q", BF16, 64, 2, 1, (70,), (150,), window=(-1, 9), alibi="h"),
    Case("right-only-short-k", FP16, 96, 2, 2, (150,), (70,), window=(-1, 9), softcap=3.0),
    Case("many-heads", BF16, 64, 24, 8, (33, 33), (65, 65), causal=True),
    Case("three-blocks-and-one", FP16, 64, 1, 1, (385,), (385,), causal=True),
]

CASES = _pairwise_cases(LENGTHS, AXES) + REGRESSIONS
FEW_QUERIES_CASES = _pairwise_cases(FEW_QUERIES, AXES | {"lengths": {x: x for x in FEW_QUERIES}, "dropout": {"": 0.0}})

# At most three blocks of 16 to 32 tokens a side and few programs: about 1 s each. Interpreted bf16 dots are wrong.
SMALL_CASES = [
    Case("small-full", FP16, 32, 1, 1, (32,), (32,)),
    Case("small-fp32", FP32, 16, 2, 2, (33,), (47,)),
    Case("small-causal", FP16, 64, 2, 1, (48,), (48,), causal=True),
    Case("small-causal-short-q", FP32, 32, 1, 1, (17,), (48,), causal=True),
    Case("small-causal-empty-rows", FP16, 32, 1, 1, (48,), (21,), causal=True),
    Case("small-left", FP32, 16, 1, 1, (40,), (40,), window=(7, -1)),
    Case("small-right", FP16, 16, 1, 1, (31,), (45,), window=(-1, 5)),
    Case("small-band", FP32, 32, 2, 1, (48,), (48,), window=(9, 6)),
    Case("small-diagonal", FP16, 32, 1, 1, (33,), (33,), window=(0, 0)),
    Case("small-softcap", FP32, 32, 1, 1, (33,), (33,), softcap=2.0, causal=True),
    Case("small-alibi", FP16, 32, 4, 2, (20,), (37,), alibi="h"),
    Case("small-alibi-causal-short-k", FP32, 16, 2, 2, (37, 37), (20, 20), alibi="bh", causal=True),
    Case("small-dropout", FP32, 32, 2, 1, (33,), (40,), dropout_p=0.25, window=(20, -1)),
    Case("small-odd-headdim", FP16, 40, 2, 2, (29,), (29,), causal=True, strides="packed"),
    Case("small-decode", FP32, 64, 3, 1, (1,), (47,), strides="transposed"),
    Case("small-varlen", FP16, 32, 2, 1, (17, 0, 1, 30), (17, 4, 33, 0), "varlen", causal=True),
    Case("small-everything", FP32, 24, 2, 1, (33, 5), (21, 40), "varlen", (12, -1), True, 2.0, "bh", 0.25, "packed"),
]


def with_sinks(cases: list) -> list:
    """The same problems with attention sinks, in turn of every dtype."""
    return [
        replace(case, name=f"sink-{case.name}", sink=dtype) for case, dtype in zip(cases, cycle((FP32, BF16, FP16)))
    ]


SMALL_FEW_QUERIES_CASES = [
    Case("few-one", FP16, 32, 4, 2, (1,), (100,), causal=True),
    Case("few-one-fp32", FP32, 40, 2, 2, (1, 1), (64, 64), strides="packed"),
    Case("few-band", FP32, 16, 3, 1, (5,), (70,), window=(40, 3), strides="transposed"),
    Case("few-scores", FP16, 24, 4, 2, (3,), (49,), causal=True, softcap=2.0, alibi="h"),
    Case("few-packed", FP16, 32, 2, 1, (1, 0, 3), (90, 20, 33), "varlen", causal=True),
    Case("few-packed-all", FP32, 40, 4, 2, (2, 5, 1), (17, 70, 0), "varlen", (30, 2), False, 3.0, "bh", sink=FP32),
]

SINK_CASES, SMALL_SINK_CASES = with_sinks(CASES), with_sinks(SMALL_CASES)
