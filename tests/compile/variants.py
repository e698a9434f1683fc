"""The calls that the compile tests make: through the portable backend itself, on fake hardware and tensors without memory."""

from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch

from flash_attn import launch as configurations
from flash_attn.backends import portable
from flash_attn.backends.base import Gradients, Operands
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
    "softcap": ("softcap",),
    "alibi": ("alibi",),
    "dropout": ("dropout",),
    "varlen": ("varlen", "gqa"),
    "paged": ("varlen", "paged", "gqa"),
    "sinks": ("sinks",),
    "lse_gradient": ("lse_gradient",),
    "everything": ("varlen", "gqa", "window", "softcap", "alibi", "dropout"),
}


@dataclass(frozen=True)
class Variant:
    """One direction of one kind of call on one architecture."""

    direction: str  # "forward", "backward" in separate launches, or "one_launch" for all gradients
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
        words = (self.arch, self.direction, f"d{self.headdim}", self.dtype, mask, feature, length)
        return "-".join(filter(None, words))

    @property
    def pad(self) -> int:
        return head_dim_pad(self.headdim)


def operands_of(variant: Variant) -> tuple[AttentionProblem, Operands]:
    """A call of the variant's kind, on the meta device."""
    features, dtype = FEATURES[variant.feature], getattr(torch, variant.dtype)
    nheads_k = NHEADS // 4 if "gqa" in features else NHEADS
    packed = "varlen" in features
    seqlen = LONG if variant.long else SHORT
    tokens = (BATCH_SIZE * seqlen,) if packed else (BATCH_SIZE, seqlen)
    pages = (BATCH_SIZE * seqlen // PAGE, PAGE) if "paged" in features else tokens
    q = _meta(*tokens, NHEADS, variant.headdim, dtype=dtype)
    k, v = (_meta(*pages, nheads_k, variant.headdim, dtype=dtype) for _ in range(2))
    lengths = _meta(BATCH_SIZE + 1, dtype=torch.int32) if packed else None
    optional: dict[str, Any] = {
        "alibi_slopes": _meta(NHEADS) if "alibi" in features else None,
        "cu_seqlens_q": lengths,
        "cu_seqlens_k": lengths,
        "block_table": _meta(BATCH_SIZE, seqlen // PAGE, dtype=torch.int32) if "paged" in features else None,
    }
    dropout_p = 0.1 if "dropout" in features else 0.0
    softcap = 30.0 if "softcap" in features else 0.0
    left = 64 if "window" in features else -1
    sinks = _meta(NHEADS, dtype=dtype) if "sinks" in features else None
    longest = dict(max_seqlen_q=seqlen, max_seqlen_k=seqlen)
    problem, seqlen_q, seqlen_k = describe(
        q, k, v, dropout_p, 0.1, variant.causal, left, -1, softcap, **optional, **longest, sinks=sinks
    )
    problem = problem._replace(lse_gradient="lse_gradient" in features)
    rng_state = _meta(2, dtype=torch.int64) if dropout_p else None
    operands = Operands(
        q,
        k,
        v,
        0.1,
        seqlen_q,
        seqlen_k,
        problem.window,
        softcap,
        dropout_p,
        **optional,
        rng_state=rng_state,
        sinks=sinks,
    )
    return problem, operands


def launch(variant: Variant, hardware: Hardware) -> None:
    """Everything that the portable backend launches for the variant."""
    problem, operands = operands_of(variant)
    q, k, v, *_ = operands
    pins = {"one_launch": False} if variant.direction == "backward" else {}
    with mock.patch.object(portable, "hardware_of", lambda device: hardware), configurations.pinned(**pins):
        if variant.direction == "forward":
            portable.forward(problem, operands)
        else:
            statistic = (q.shape[1], q.shape[0]) if q.dim() == 3 else (q.shape[0], q.shape[2], q.shape[1])
            gradients = Gradients(*map(torch.empty_like, (q, k, v)))
            if problem.lse_gradient:
                operands = operands._replace(dlse=_meta(*statistic))
            portable.backward(problem, operands, q, q, _meta(*statistic), gradients)


def _meta(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")
