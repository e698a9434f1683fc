"""The launches that the compile tests build: the portable backend's own, on fake hardware."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch

from flash_attn.backends import portable
from flash_attn.backends.base import Operands
from flash_attn.hardware import Hardware
from flash_attn.launch.forward import head_dim_pad
from flash_attn.problem import AttentionProblem, describe

BATCH_SIZE, NHEADS, PAGE = 2, 8, 64
SHORT, LONG = 256, 8192  # tensor descriptors are for long sequences only

# What a call asks for besides the mask; each entry is a set of features that compile together.
FEATURES = {
    "plain": (),
    "gqa": ("gqa",),
    "scores": ("window", "softcap", "alibi"),
    "dropout": ("dropout",),
    "varlen": ("varlen", "gqa"),
    "paged": ("varlen", "paged", "gqa"),
    "everything": ("varlen", "gqa", "window", "softcap", "alibi", "dropout"),
}

@dataclass(frozen=True)
class Variant:
    """One kernel, specialised the way one kind of call does."""

    kernel: str  # "forward", "dq" or "dkdv"
    arch: str
    headdim: int
    dtype: str = "bfloat16"
    causal: bool = True
    feature: str = "plain"  # of FEATURES
    long: bool = False

    def __str__(self) -> str:
        mask = "causal" if self.causal else "full"
        feature = "" if self.feature == "plain" else self.feature
        length = "long" if self.long else ""
        words = (self.kernel, self.arch, f"d{self.headdim}", self.dtype, mask, feature, length)
        return "-".join(filter(None, words))

    @property
    def pad(self) -> int:
        return head_dim_pad(self.headdim)


def tensors_of(variant: Variant) -> tuple[AttentionProblem, Operands]:
    """A call of the variant's kind; its tensors are never read."""
    features = FEATURES[variant.feature]
    dtype = getattr(torch, variant.dtype)
    nheads_k = NHEADS // 4 if "gqa" in features else NHEADS
    packed = "varlen" in features
    seqlen = LONG if variant.long else SHORT
    tokens = (BATCH_SIZE * seqlen,) if packed else (BATCH_SIZE, seqlen)
    q = torch.empty(*tokens, NHEADS, variant.headdim, dtype=dtype)
    pages = (seqlen // PAGE * BATCH_SIZE, PAGE) if "paged" in features else tokens
    k, v = (torch.empty(*pages, nheads_k, variant.headdim, dtype=dtype) for _ in range(2))
    lengths = torch.arange(BATCH_SIZE + 1, dtype=torch.int32) * seqlen if packed else None
    optional: dict[str, Any] = {
        "alibi_slopes": torch.ones(NHEADS) if "alibi" in features else None,
        "cu_seqlens_q": lengths,
        "cu_seqlens_k": lengths,
        "block_table": torch.zeros(BATCH_SIZE, seqlen // PAGE, dtype=torch.int32) if "paged" in features else None,
    }
    dropout_p = 0.1 if "dropout" in features else 0.0
    softcap = 30.0 if "softcap" in features else 0.0
    left = 64 if "window" in features else -1
    problem, seqlen_q, seqlen_k = describe(
        q, k, v, dropout_p, 0.1, variant.causal, left, -1, softcap, **optional, max_seqlen_q=seqlen, max_seqlen_k=seqlen
    )
    rng_state = torch.zeros(2, dtype=torch.int64) if dropout_p else None
    operands = Operands(
        q, k, v, 0.1, seqlen_q, seqlen_k, problem.window, softcap, dropout_p, **optional, rng_state=rng_state
    )
    return problem, operands


def launches(variant: Variant, hardware: Hardware) -> Iterator[tuple[Any, tuple, dict, dict]]:
    """(kernel, arguments, constants, options) of every launch of the variant."""
    problem, operands = tensors_of(variant)
    with mock.patch.object(portable, "hardware_of", lambda device: hardware):
        bound, tensors = _BIND[variant.kernel](problem, operands)
    for launcher in bound:
        yield launcher.kernel, launcher.build(tensors, tensors), launcher.constants, launcher.options


def _statistic(operands: Operands) -> torch.Tensor:
    q = operands.q
    return torch.empty((q.shape[1], q.shape[0]) if q.dim() == 3 else (q.shape[0], q.shape[2], q.shape[1]))


def _forward(problem: AttentionProblem, operands: Operands) -> tuple[list, tuple]:
    q, k, v, *_ = operands
    lse = _statistic(operands)
    tensors = (q, k, v, q, lse, *portable._optional_tensors(operands), operands.block_table)
    return [portable.bind_forward(problem, operands, q, lse)], tensors


def _dq(problem: AttentionProblem, operands: Operands) -> tuple[list, tuple]:
    q, k, v, *_ = operands
    lse = _statistic(operands)
    tensors = (q, k, v, q, q, q, lse, lse, lse, *portable._optional_tensors(operands))
    return [portable.bind_dq(problem, operands, q, q, lse, q)], tensors


def _dkdv(problem: AttentionProblem, operands: Operands) -> tuple[list, tuple]:
    q, k, v, *_ = operands
    lse = _statistic(operands)
    tensors = (q, k, v, q, k, v, lse, lse, *portable._optional_tensors(operands))
    return list(portable.bind_dkdv(problem, operands, q, lse, k, v)), tensors


_BIND = {"forward": _forward, "dq": _dq, "dkdv": _dkdv}
