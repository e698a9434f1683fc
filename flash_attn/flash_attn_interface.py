"""The drop-in surface: upstream's functions, argument for argument, and the private names that its users import.

Source: flash_attn 2.8.3, flash_attn/flash_attn_interface.py fixes every signature and meaning here.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

import flash_attn_2_cuda as flash_attn_gpu
from flash_attn.backward.autograd_functions import (
    FlashAttnFunc,
    FlashAttnKVPackedFunc,
    FlashAttnQKVPackedFunc,
    FlashAttnVarlenFunc,
    FlashAttnVarlenKVPackedFunc,
    FlashAttnVarlenQKVPackedFunc,
)
from flash_attn.backward.call import run
from flash_attn.backward.sink_function import FlashAttnSinkFunc
from flash_attn.errors import InvalidArgument
from flash_attn.kvcache.kv_attention import attend_with_cache
from flash_attn.sinks import one_name
from flash_attn.torch_ops import (
    _flash_attn_backward,
    _flash_attn_forward,
    _flash_attn_varlen_backward,
    _flash_attn_varlen_forward,
    _wrapped_flash_attn_backward,
    _wrapped_flash_attn_forward,
    _wrapped_flash_attn_varlen_backward,
    _wrapped_flash_attn_varlen_forward,
    maybe_contiguous,
    round_multiple,
)

__all__ = [
    "FlashAttnFunc",
    "FlashAttnKVPackedFunc",
    "FlashAttnQKVPackedFunc",
    "FlashAttnVarlenFunc",
    "FlashAttnVarlenKVPackedFunc",
    "FlashAttnVarlenQKVPackedFunc",
    "USE_TRITON_ROCM",
    "_flash_attn_backward",
    "_flash_attn_forward",
    "_flash_attn_varlen_backward",
    "_flash_attn_varlen_forward",
    "_get_block_size_n",
    "_wrapped_flash_attn_backward",
    "_wrapped_flash_attn_forward",
    "_wrapped_flash_attn_varlen_backward",
    "_wrapped_flash_attn_varlen_forward",
    "flash_attn_func",
    "flash_attn_gpu",
    "flash_attn_kvpacked_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_func",
    "flash_attn_varlen_kvpacked_func",
    "flash_attn_varlen_qkvpacked_func",
    "flash_attn_with_kvcache",
    "maybe_contiguous",
    "round_multiple",
]

USE_TRITON_ROCM = torch.version.hip is not None

WHOLE_ROW = 1 << 30  # more keys than any row of S_dmask has


def _get_block_size_n(device: torch.device, head_dim: int, is_dropout: bool, is_causal: bool) -> int:
    """Keys per block of S_dmask whose row maximum is shared: here the whole row, since S_dmask is exp(s - row maximum)."""
    return WHOLE_ROW


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Sequence[int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    *,
    s_aux: Tensor | None = None,
    learnable_sink: Tensor | None = None,
) -> Any:
    """Attention: softmax(scale * q k^T + bias) v, differentiable, memory linear in the sequence lengths.

    A causal mask is aligned to the bottom right corner: with seqlen_q = 2 and seqlen_k = 5, or 5 and 2 (1 = visible),

        1 1 1 1 0        0 0
        1 1 1 1 1        0 0
                         0 0
                         1 0
                         1 1

    A row that sees no key has out 0 and softmax_lse -inf. Query head h uses key head h // (nheads // nheads_k).

    Args:
        q: (batch_size, seqlen_q, nheads, headdim), fp16, bf16, fp32 or fp64, headdim 1 to 256.
        k: (batch_size, seqlen_k, nheads_k, headdim), nheads divisible by nheads_k.
        v: like k.
        dropout_p: probability that a weight is dropped; use 0 for evaluation.
        softmax_scale: multiplies q k^T; default headdim**-0.5.
        causal: hide keys after the diagonal; overrides the right side of window_size.
        window_size: (left, right) keys visible on each side of the diagonal, inclusive; -1 is unbounded.
        softcap: c > 0 replaces a score s by c * tanh(s / c); 0 is off.
        alibi_slopes: (nheads,) or (batch_size, nheads), fp32; adds -slope * |i + seqlen_k - seqlen_q - j| to a score.
        deterministic: bitwise reproducible gradients; only dq of the Hopper kernels is not by default.
        return_attn_probs: also return softmax_lse and S_dmask, for tests.
        s_aux: (nheads,), fp32, bf16, fp16 or fp64: attention sinks. Each is one more score in the softmax of every row of its
            head, whose value is zero: neither scaled nor capped, hidden by no mask, never dropped. A row without any key
            then has softmax_lse s_aux. Differentiable.
        learnable_sink: another name of s_aux, as in FlashAttention-4.

    Returns:
        out: like q. With return_attn_probs, (out, softmax_lse, S_dmask): softmax_lse (batch_size, nheads, seqlen_q) fp32,
        natural log, sinks included; S_dmask is empty without dropout, else (batch_size, nheads, seqlen_q and seqlen_k
        rounded up to 128), exp(score - row maximum), negative where dropped. softmax_lse carries a gradient, S_dmask none.

    Raises:
        InvalidArgument: shapes, dtypes, devices or ranges disagree; the message names both values.
        UnsupportedProblem: no backend can run it; the message lists each backend's reason.

    Source: upstream's flash_attn_func; Dao et al., FlashAttention-2, 2023; for s_aux, gpt-oss in transformers, and
    FlashAttention-4's learnable_sink, whose LSE includes it.
    """
    if s_aux is not None or learnable_sink is not None:
        return run(
            FlashAttnSinkFunc,
            q,
            k,
            v,
            one_name(s_aux, learnable_sink),
            *(None,) * 4,
            dropout_p,
            softmax_scale,
            causal,
            window_size,
            softcap,
            alibi_slopes,
            deterministic,
            return_attn_probs,
            None,
        )
    return run(
        FlashAttnFunc,
        q,
        k,
        v,
        dropout_p,
        softmax_scale,
        causal,
        window_size,
        softcap,
        alibi_slopes,
        deterministic,
        return_attn_probs,
    )


def flash_attn_qkvpacked_func(
    qkv: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Sequence[int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Any:
    """`flash_attn_func` of one packed tensor; its gradient is written packed, without concatenation.

    Args:
        qkv: (batch_size, seqlen, 3, nheads, headdim).

    The other arguments, results and errors are those of `flash_attn_func`.

    Source: upstream's flash_attn_qkvpacked_func.
    """
    _check_packed("qkv", qkv, 5, 2, 3)
    return run(
        FlashAttnQKVPackedFunc,
        qkv,
        dropout_p,
        softmax_scale,
        causal,
        window_size,
        softcap,
        alibi_slopes,
        deterministic,
        return_attn_probs,
    )


def flash_attn_kvpacked_func(
    q: Tensor,
    kv: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Sequence[int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Any:
    """`flash_attn_func` with packed keys and values; their gradient is written packed, without concatenation.

    Args:
        q: (batch_size, seqlen_q, nheads, headdim).
        kv: (batch_size, seqlen_k, 2, nheads_k, headdim).

    The other arguments, results and errors are those of `flash_attn_func`.

    Source: upstream's flash_attn_kvpacked_func.
    """
    _check_packed("kv", kv, 5, 2, 2)
    return run(
        FlashAttnKVPackedFunc,
        q,
        kv,
        dropout_p,
        softmax_scale,
        causal,
        window_size,
        softcap,
        alibi_slopes,
        deterministic,
        return_attn_probs,
    )


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Sequence[int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: Tensor | None = None,
    *,
    s_aux: Tensor | None = None,
    learnable_sink: Tensor | None = None,
) -> Any:
    """`flash_attn_func` of a batch of sequences packed one after the other, without padding.

    Masks are aligned to each sequence's own lengths. Rows of q outside every sequence are left unspecified.

    Args:
        q: (total_q, nheads, headdim).
        k: (total_k, nheads_k, headdim), or with a block_table (num_pages, page_block_size, nheads_k, headdim).
        v: like k.
        cu_seqlens_q: (batch_size + 1,), int32: sequence b holds rows cu_seqlens_q[b] to cu_seqlens_q[b + 1].
        cu_seqlens_k: (batch_size + 1,), int32.
        max_seqlen_q: host int, at least the longest query sequence; sizes the launch.
        max_seqlen_k: host int, at least the longest key sequence.
        block_table: (batch_size, max_pages), int32: page of every page_block_size keys of a sequence. Forward only.

    The other arguments and errors are those of `flash_attn_func`.

    Returns:
        out: like q. With return_attn_probs, (out, softmax_lse, S_dmask): softmax_lse (nheads, total_q) fp32, natural log;
        S_dmask as in `flash_attn_func`, with the maximum lengths.

    Source: upstream's flash_attn_varlen_func.
    """
    if s_aux is not None or learnable_sink is not None:
        return run(
            FlashAttnSinkFunc,
            q,
            k,
            v,
            one_name(s_aux, learnable_sink),
            cu_seqlens_q,
            cu_seqlens_k,
            _host_int(max_seqlen_q),
            _host_int(max_seqlen_k),
            dropout_p,
            softmax_scale,
            causal,
            window_size,
            softcap,
            alibi_slopes,
            deterministic,
            return_attn_probs,
            block_table,
        )
    return run(
        FlashAttnVarlenFunc,
        q,
        k,
        v,
        cu_seqlens_q,
        cu_seqlens_k,
        _host_int(max_seqlen_q),
        _host_int(max_seqlen_k),
        dropout_p,
        softmax_scale,
        causal,
        window_size,
        softcap,
        alibi_slopes,
        deterministic,
        return_attn_probs,
        block_table,
    )


def flash_attn_varlen_qkvpacked_func(
    qkv: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Sequence[int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Any:
    """`flash_attn_varlen_func` of one packed tensor.

    Args:
        qkv: (total, 3, nheads, headdim).
        cu_seqlens: (batch_size + 1,), int32.
        max_seqlen: host int, at least the longest sequence.

    The other arguments, results and errors are those of `flash_attn_varlen_func`.

    Source: upstream's flash_attn_varlen_qkvpacked_func.
    """
    _check_packed("qkv", qkv, 4, 1, 3)
    return run(
        FlashAttnVarlenQKVPackedFunc,
        qkv,
        cu_seqlens,
        _host_int(max_seqlen),
        dropout_p,
        softmax_scale,
        causal,
        window_size,
        softcap,
        alibi_slopes,
        deterministic,
        return_attn_probs,
    )


def flash_attn_varlen_kvpacked_func(
    q: Tensor,
    kv: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Sequence[int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Any:
    """`flash_attn_varlen_func` with packed keys and values.

    Args:
        q: (total_q, nheads, headdim).
        kv: (total_k, 2, nheads_k, headdim).

    The other arguments, results and errors are those of `flash_attn_varlen_func`.

    Source: upstream's flash_attn_varlen_kvpacked_func.
    """
    _check_packed("kv", kv, 4, 1, 2)
    return run(
        FlashAttnVarlenKVPackedFunc,
        q,
        kv,
        cu_seqlens_q,
        cu_seqlens_k,
        _host_int(max_seqlen_q),
        _host_int(max_seqlen_k),
        dropout_p,
        softmax_scale,
        causal,
        window_size,
        softcap,
        alibi_slopes,
        deterministic,
        return_attn_probs,
    )


def flash_attn_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    rotary_cos: Tensor | None = None,
    rotary_sin: Tensor | None = None,
    cache_seqlens: int | Tensor | None = None,
    cache_batch_idx: Tensor | None = None,
    cache_leftpad: Tensor | None = None,
    block_table: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Sequence[int] = (-1, -1),
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    alibi_slopes: Tensor | None = None,
    num_splits: int = 0,
    return_softmax_lse: bool = False,
    *,
    s_aux: Tensor | None = None,
    learnable_sink: Tensor | None = None,
) -> Any:
    """Attention of new queries over a cache of keys and values, which first takes up the new keys and values, in place.

    With n = cache_seqlens[b] and seqlen_new new tokens, which land at positions n to n + seqlen_new - 1 of sequence b, its
    queries attend to positions cache_leftpad[b] to n + seqlen_new - 1. Masks are aligned to the last of these, as in
    `flash_attn_func`: with seqlen_q = 2 and 5 keys, causal (1 = visible),

        1 1 1 1 0
        1 1 1 1 1

    A row that sees no key has out 0 and softmax_lse -inf. Forward only. Launches depend on shapes alone, so that the call
    can be captured in a CUDA graph, and compiled with torch.compile(fullgraph=True).

    Nothing is read or written outside the caches, whatever the arrays hold: a negative length counts as 0, one past the
    cache's end as the end. New tokens that have no place (past the end, or in a page whose id names none, such as -1) are
    not written; keys of such pages count as zeros. `flash_attn.kvcache.kv_attention.batch_invariant` makes results
    independent, to the bit, of what else is in the batch.

    Args:
        q: (batch_size, seqlen_q, nheads, headdim), fp16, bf16 or fp32, on a CPU also fp64; headdim 1 to 256.
        k_cache: (batch_size_cache, seqlen_cache, nheads_k, headdim), or with a block_table
            (num_pages, page_block_size, nheads_k, headdim); any strides, the last dimension contiguous.
        v_cache: like k_cache.
        k: (batch_size, seqlen_new, nheads_k, headdim), new keys; needs v and cache_seqlens.
        v: like k.
        rotary_cos: (seqlen_rotary, rotary_dim / 2), dtype of q, seqlen_rotary at least the cache's length, rotary_dim a
            multiple of 16 up to headdim; turns k and q, needs k. New key j has the angle of position n + j, left padding
            counted. Query i has that of position n + i under a causal or local mask, otherwise every query that of n.
        rotary_sin: like rotary_cos.
        cache_seqlens: tokens in the cache before the new ones, (batch_size,) int32, or an int for every sequence; None is
            a full cache.
        cache_batch_idx: (batch_size,) int32: sequence b lies at k_cache[cache_batch_idx[b]]. Should not repeat itself where
            there are new tokens. Not with a block_table.
        cache_leftpad: (batch_size,) int32: positions before it are skipped.
        block_table: (batch_size, max_pages), int32: page of every page_block_size tokens of a sequence; any page size.
        softmax_scale: multiplies q k^T; default headdim**-0.5.
        causal: hide keys after the diagonal; overrides the right side of window_size.
        window_size: (left, right) keys visible on each side of the diagonal, inclusive; -1 is unbounded.
        softcap: c > 0 replaces a score s by c * tanh(s / c); 0 is off.
        rotary_interleaved: features 2i and 2i + 1 form a pair (GPT-J); otherwise i and i + rotary_dim / 2 (GPT-NeoX).
        alibi_slopes: (nheads,) or (batch_size, nheads), fp32; adds -slope * |i + seqlen_k - seqlen_q - j| to a score.
        num_splits: parts that the keys of a sequence are shared out to; 0 chooses, 1 to 128.
        return_softmax_lse: also return softmax_lse.
        s_aux: (nheads,), attention sinks, as in `flash_attn_func`. So is learnable_sink.

    Returns:
        out: like q. With return_softmax_lse, (out, softmax_lse): (batch_size, nheads, seqlen_q) fp32, natural log.

    Raises:
        InvalidArgument: shapes, dtypes, devices or ranges disagree, or lengths that the host knows (an int, or a tensor on
            the CPU) leave no room for the new tokens; the message names both values. The caches are untouched.
        UnsupportedProblem: no backend can run it; the message lists each backend's reason.

    Source: upstream's flash_attn_with_kvcache; rotary positions from its flash_fwd_kernel.h; an int cache_seqlens has q's
    batch size, as after 2.8.3.
    """
    out, softmax_lse = attend_with_cache(
        q,
        k_cache,
        v_cache,
        k,
        v,
        rotary_cos,
        rotary_sin,
        cache_seqlens,
        cache_batch_idx,
        cache_leftpad,
        block_table,
        softmax_scale,
        causal,
        window_size,
        softcap,
        rotary_interleaved,
        alibi_slopes,
        num_splits,
        one_name(s_aux, learnable_sink),
    )
    return (out, softmax_lse) if return_softmax_lse else out


def _host_int(length: Any) -> Any:
    """Callers pass 0-dim tensors too."""
    return int(length) if isinstance(length, Tensor) else length


def _check_packed(name: str, packed: Tensor, ndim: int, dim: int, count: int) -> None:
    if packed.dim() != ndim or packed.shape[dim] != count:
        raise InvalidArgument(
            f"{name} must have {ndim} dimensions with size {count} at {dim}, got {tuple(packed.shape)}"
        )
