"""A stand-in for the package flag_gems: its two attention operators, recorded, and computed by the specification.

It takes FlagGems' own signatures (compared with the real ones in tests/flaggems/test_interpreted.py), turns windows into
masks as FlagGems' launchers do, returns +inf for a row that sees no key, and refuses, by assertion, every call that
FlagGems 5.0.2 computes wrongly.
"""

import inspect
import math
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from flash_attn import backends, dispatch, reference
from flash_attn.backends import spans
from flash_attn.backends.base import Operands

MAX_INT32 = 2**31 - 1


class StandIn:
    """What the adapter uses of flag_gems."""

    def __init__(self, device: str = "cpu") -> None:
        self.device = device
        self.config = SimpleNamespace(use_c_extension=False)
        self.calls: list[tuple[str, dict[str, Any]]] = []

    @property
    def operators(self) -> list[str]:
        """The operators called so far."""
        return [name for name, _ in self.calls]

    def flash_attention_forward(
        self,
        query,
        key,
        value,
        cumulative_sequence_length_q,
        cumulative_sequence_length_k,
        max_q,
        max_k,
        dropout_p,
        is_causal,
        return_debug_mask,
        *,
        scale=None,
        softcap=0.0,
        window_size_left=None,
        window_size_right=None,
        seqused_k=None,
        alibi_slopes=None,
        disable_splitkv=False,
    ):
        self._record("dense", locals())
        seqlen_q, nheads, headdim = query.shape[1:]
        seqlen_k = key.shape[1]
        assert cumulative_sequence_length_q is None and cumulative_sequence_length_k is None and seqused_k is None
        assert dropout_p == 0.0 and not return_debug_mask and scale > 0.0
        assert disable_splitkv, "the combination of splits writes other rows"
        assert headdim in (32, 64, 96, 128, 192, 256)
        assert value.stride() == key.stride(), "v is read with the strides of k"
        for x in (query, key, value):
            assert x.stride(0) == x.shape[1] * x.stride(1), "compiled masks are kept by strides"
            assert x.stride(0) % (x.shape[2] * x.shape[3]) == 0, "the kernel declares this to the compiler"
        left = -1 if window_size_left is None or window_size_left >= seqlen_k else window_size_left
        right = -1 if window_size_right is None or window_size_right >= seqlen_k else window_size_right
        if seqlen_q == 1 and alibi_slopes is None:
            is_causal = False
        right = 0 if is_causal else right
        causal, local = left < 0 and right == 0, left >= 0 and right >= 0
        assert not (causal and alibi_slopes is not None), "the LSE of causal ALiBi is moved"
        if causal or local:
            assert seqlen_q <= 128 or seqlen_q % 128 == 0, "keys of the rows before a partial block are lost"
        window = (left, right) if local else (None, 0 if causal else None)
        out, lse = attention(query, key, value, scale, window, softcap, alibi_slopes)
        return torch.empty_like(query).copy_(out), lse, None, None, None

    def flash_attn_varlen_func(
        self,
        q,
        k,
        v,
        max_seqlen_q,
        cu_seqlens_q,
        max_seqlen_k,
        cu_seqlens_k=None,
        seqused_k=None,
        q_v=None,
        dropout_p=0.0,
        softmax_scale=None,
        causal=False,
        window_size=None,
        softcap=0.0,
        alibi_slopes=None,
        deterministic=False,
        return_attn_probs=False,
        block_table=None,
        return_softmax_lse=False,
        out=None,
        scheduler_metadata=None,
        q_descale=None,
        k_descale=None,
        v_descale=None,
        s_aux=None,
        num_splits=0,
        cp_world_size=1,
        cp_rank=0,
        cp_tot_seqused_k=None,
        fa_version=2,
    ):
        self._record("packed", locals())
        assert dropout_p == 0.0 and softmax_scale > 0.0 and return_softmax_lse
        assert (cu_seqlens_k is None) != (seqused_k is None)
        assert (block_table is None) == (seqused_k is None), "lengths in use are read for paged keys only"
        assert q.shape[-1] % 8 == 0 and q.shape[-1] >= 16
        assert k.stride() == v.stride()
        left, right = (-1 if side >= max_seqlen_k else side for side in window_size)
        if max_seqlen_q == 1 and alibi_slopes is None:
            causal = False
        assert not (causal and alibi_slopes is not None), "the LSE of causal ALiBi is moved"
        swaps = max_seqlen_q == 1 and alibi_slopes is None and q.shape[1] > k.shape[-2] and left < 0 and right < 0
        assert not swaps, "the LSE comes in another order"
        assert left < 0 or right >= 0, "an unbounded right side counts as -1"
        assert left >= 0 or right < 0, "a right side alone is ignored"
        if block_table is not None:
            assert k.stride(0) == k.shape[1] * k.stride(1), "pages are taken to follow one another"
            assert block_table.min() >= 0 and block_table.max() < k.shape[0]
            assert seqused_k.max() <= block_table.shape[1] * k.shape[1]
            cu_seqlens_k = torch.zeros_like(cu_seqlens_q)
        else:
            assert cu_seqlens_k.min() >= 0 and cu_seqlens_k.max() <= k.shape[0]
        assert cu_seqlens_q.min() >= 0 and cu_seqlens_q.max() <= q.shape[0]
        window = (left, right) if left >= 0 else (None, 0 if causal else None)
        operands = Operands(
            q, k, v, softmax_scale, max_seqlen_q, max_seqlen_k, window, softcap, 0.0, alibi_slopes,
            cu_seqlens_q, cu_seqlens_k, seqused_k, None, block_table,
        )  # fmt: skip
        result, lse = torch.full_like(q, math.nan), q.new_full((q.shape[1], q.shape[0]), math.nan, dtype=torch.float32)
        for span in spans.spans(operands):
            keys = (spans.keys(x, span, block_table) for x in (k, v))
            slopes = spans.slopes(operands, span)
            span_out, span_lse = attention(spans.queries(q, span), *keys, softmax_scale, window, softcap, slopes)
            spans.queries(result, span).copy_(span_out)
            spans.statistic(lse, span).copy_(span_lse)
        return result, lse

    def _record(self, name: str, arguments: dict[str, Any]) -> None:
        self.calls.append((name, {key: value for key, value in arguments.items() if key != "self"}))


def attention(
    q: Tensor, k: Tensor, v: Tensor, scale: float, window: Any, softcap: float, slopes: Tensor | None
) -> tuple[Tensor, Tensor]:
    """reference.attention with FlagGems' LSE of a row that sees no key."""
    words = dict(softmax_scale=scale, window=window, softcap=softcap, alibi_slopes=slopes)
    out, lse = reference.attention(q, k, v, **words)
    return out.to(q.dtype), lse.float().masked_fill(lse == -math.inf, math.inf)


def parameters(function: Any) -> list[tuple[str, Any]]:
    """Names and defaults of a signature, without self."""
    found = inspect.signature(function).parameters.values()
    return [(p.name, p.default) for p in found if p.name != "self"]


def forget() -> None:
    """Forgets which backends were chosen: the package that a choice depended on has changed."""
    dispatch._plans.clear()
    for cached in (backends.choose_backend, backends.choose_backward_backend):
        cached.cache_clear()
