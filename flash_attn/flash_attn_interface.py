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
from flash_attn.errors import InvalidArgument
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
        deterministic: bitwise reproducible gradients; the portable kernels always are.
        return_attn_probs: also return softmax_lse and S_dmask, for tests.

    Returns:
        out: like q. With return_attn_probs, (out, softmax_lse, S_dmask): softmax_lse (batch_size, nheads, seqlen_q) fp32,
        natural log; S_dmask is empty without dropout, else (batch_size, nheads, seqlen_q and seqlen_k rounded up to 128),
        exp(score - row maximum), negative where dropped. Neither carries a gradient.

    Raises:
        InvalidArgument: shapes, dtypes, devices or ranges disagree; the message names both values.
        UnsupportedProblem: no backend can run it; the message lists each backend's reason.

    Source: upstream's flash_attn_func; Dao et al., FlashAttention-2, 2023.
    """
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


def _host_int(length: Any) -> Any:
    """Callers pass 0-dim tensors too."""
    return int(length) if isinstance(length, Tensor) else length


def _check_packed(name: str, packed: Tensor, ndim: int, dim: int, count: int) -> None:
    if packed.dim() != ndim or packed.shape[dim] != count:
        raise InvalidArgument(
            f"{name} must have {ndim} dimensions with size {count} at {dim}, got {tuple(packed.shape)}"
        )
