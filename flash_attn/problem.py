"""One attention call as a small hashable value, and the checks that every call passes exactly once.

`describe` validates the tensors and words of a call and returns an `AttentionProblem`: canonical, tensor-free, fit to be a
cache key for the choice of backend and launch configuration. Lengths in it are bucketed to powers of two, so that nearby
calls share one decision; exact lengths travel with the tensors.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from flash_attn.errors import InvalidArgument
from flash_attn.tiling import copied_in_tiles, evenly_spaced

MAX_HEADDIM = 256
DTYPES = {
    torch.float16: "float16",
    torch.bfloat16: "bfloat16",
    torch.float32: "float32",
    torch.float64: "float64",
}
INT32_MAX = 2**31 - 1

Window = tuple[int | None, int | None]


class AttentionProblem(NamedTuple):
    """What a backend needs to know to accept a call and to choose its launch configuration."""

    layout: str  # "dense", "varlen", "paged", or of a cache "cache" or "paged_cache"
    dtype: str  # "float16", "bfloat16", "float32" or "float64"
    batch_size: int  # bucketed
    seqlen_q: int  # longest query sequence, bucketed
    seqlen_k: int  # longest key sequence, bucketed
    nheads: int
    nheads_k: int
    headdim: int
    window: Window = (None, None)  # keys visible left and right of the diagonal; causal is (None, 0)
    softcap: bool = False
    alibi: bool = False
    dropout: bool = False
    seqused_k: bool = False
    leftpad_k: bool = False
    deterministic: bool = False
    aligned: bool = False  # `tiling.copied_in_tiles`, and in a cache or in pages `tiling.evenly_spaced`
    sinks: bool = False  # of a forward: gradients follow from softmax_lse, which contains them
    lse_gradient: bool = False  # of a backward: whether softmax_lse has a gradient, too
    page_size: int = 0  # tokens of a page, where a block table has the keys

    @property
    def causal(self) -> bool:
        """Whether no row sees a key right of the diagonal."""
        return self.window[1] == 0


def bucket(length: int) -> int:
    """The smallest power of two that is at least `length`; 0 stays 0."""
    return 1 << (length - 1).bit_length() if length > 0 else 0


def canonical_window(causal: bool, left: int, right: int, seqlen_q: int, seqlen_k: int) -> Window:
    """(causal, left, right) in upstream's words as (left, right) with None for a side that hides no key.

    Row i sees keys [i + seqlen_k - seqlen_q - left, i + seqlen_k - seqlen_q + right].
    """
    bounded_left = left if 0 <= left < seqlen_k - 1 else None
    if causal:
        return bounded_left, 0
    return bounded_left, right if 0 <= right < seqlen_q - 1 else None


def parse_window(window_size: Sequence[int]) -> tuple[int, int]:
    """(left, right) as Python ints; accepts any two-element sequence, tensors included.

    Raises:
        InvalidArgument: not two elements, or an element that is no whole number of at least -1.
    """
    try:
        left, right = window_size
    except (TypeError, ValueError):
        raise InvalidArgument(f"window_size must be (left, right), got {window_size!r}") from None
    return _window_side("left", left), _window_side("right", right)


def _window_side(side: str, value: int) -> int:
    if type(value) is int and value >= -1:
        return value
    try:
        whole = int(value)
    except (TypeError, ValueError, OverflowError):
        whole = None
    if whole is None or whole != value or whole < -1:
        raise InvalidArgument(f"window_size {side} must be a whole number of keys, or -1 for unbounded, got {value!r}")
    return whole


def describe(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float,
    softmax_scale: float,
    causal: bool,
    window_size_left: int,
    window_size_right: int,
    softcap: float,
    alibi_slopes: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    seqused_k: Tensor | None = None,
    leftpad_k: Tensor | None = None,
    block_table: Tensor | None = None,
    *,
    sinks: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    deterministic: bool = False,
    direction: str = "forward",
) -> tuple[AttentionProblem, int, int]:
    """Checks a call; returns its problem and the exact longest lengths (seqlen_q, seqlen_k).

    Raises:
        InvalidArgument: shapes, dtypes, devices or ranges disagree; the message names both values.

    Source: the checks of upstream's flash_api.cpp, whose words the messages start with.
    """
    varlen = cu_seqlens_q is not None
    check_operands(q, k, v, 3 if varlen else 4, direction)
    nheads, nheads_k, headdim = q.shape[-2], k.shape[-2], q.shape[-1]
    if cu_seqlens_q is not None:
        batch_size, seqlen_q, seqlen_k = _check_varlen(
            q, k, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, seqused_k, leftpad_k, block_table
        )
    else:
        batch_size, seqlen_q, seqlen_k = q.shape[0], q.shape[1], k.shape[1]
        if k.shape[0] != batch_size:
            raise InvalidArgument(
                f"k must have shape (batch_size, seqlen_k, num_heads_k, head_size) with q's batch size {batch_size}, "
                f"got {tuple(k.shape)}"
            )
    check_numbers(dropout_p, softmax_scale, softcap, window_size_left, window_size_right)
    check_head_terms(alibi_slopes, sinks, batch_size, nheads, q.device)
    problem = AttentionProblem(
        layout="dense" if not varlen else ("varlen" if block_table is None else "paged"),
        dtype=DTYPES[q.dtype],
        batch_size=bucket(batch_size),
        seqlen_q=bucket(seqlen_q),
        seqlen_k=bucket(seqlen_k),
        nheads=nheads,
        nheads_k=nheads_k,
        headdim=headdim,
        window=canonical_window(causal, window_size_left, window_size_right, seqlen_q, seqlen_k),
        softcap=softcap > 0.0,
        alibi=alibi_slopes is not None,
        dropout=dropout_p > 0.0,
        seqused_k=seqused_k is not None,
        leftpad_k=leftpad_k is not None,
        deterministic=deterministic,
        aligned=all(map(copied_in_tiles, (q, k, v))) and (block_table is None or all(map(evenly_spaced, (k, v)))),
        sinks=sinks is not None,
        page_size=0 if block_table is None else k.shape[1],
    )
    return problem, seqlen_q, seqlen_k


def check_gradients(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dout: Tensor,
    out: Tensor,
    softmax_lse: Tensor,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    dlse: Tensor | None = None,
) -> None:
    """Checks the tensors that only a backward has; q, k and v have passed `describe`.

    Raises:
        InvalidArgument: a shape, dtype, device or stride disagrees; the message names both values.
    """
    for name, tensor, same_dtype, like in (
        ("out", out, "query and out must have the same dtype", q),
        ("dout", dout, "query and dout must have the same dtype", q),
        ("dq", dq, "dq must have the same dtype as q", q),
        ("dk", dk, "dk must have the same dtype as q", k),
        ("dv", dv, "dv must have the same dtype as q", v),
    ):
        if tensor.dtype != like.dtype:
            raise InvalidArgument(f"{same_dtype}, got {like.dtype} and {tensor.dtype}")
        if tensor.shape != like.shape:
            raise InvalidArgument(f"{name} must have shape {tuple(like.shape)}, got {tuple(tensor.shape)}")
        if tensor.stride(-1) != 1 and tensor.shape[-1] > 1:
            what = f"{name} tensor" if like is q and name != "dq" else name
            raise InvalidArgument(f"{what} must have contiguous last dimension, got strides {tensor.stride()}")
        check_device(name, tensor, q.device)
    expected = (q.shape[1], q.shape[0]) if q.dim() == 3 else (q.shape[0], q.shape[2], q.shape[1])
    if softmax_lse.shape != expected:
        raise InvalidArgument(f"softmax_lse must have shape {expected}, got {tuple(softmax_lse.shape)}")
    if softmax_lse.dtype not in (torch.float32, torch.float64):
        raise InvalidArgument(f"softmax_lse must have dtype fp32, got {softmax_lse.dtype}")
    check_device("softmax_lse", softmax_lse, q.device)
    if dlse is not None:
        if dlse.shape != expected or dlse.dtype != softmax_lse.dtype:
            raise InvalidArgument(
                f"the gradient of softmax_lse must have its shape and dtype, {expected} and {softmax_lse.dtype}, "
                f"got {tuple(dlse.shape)} and {dlse.dtype}"
            )
        check_device("the gradient of softmax_lse", dlse, q.device)


def check_rng_state(rng_state: Tensor | None, device: torch.device) -> None:
    """Checks the (seed, offset) that a backward with dropout takes from its forward."""
    if rng_state is None:
        raise InvalidArgument("dropout_p > 0 needs the rng_state that the forward returned, got None")
    if rng_state.dtype != torch.int64 or rng_state.shape != (2,):
        raise InvalidArgument(
            f"rng_state must be two int64 numbers, got shape {tuple(rng_state.shape)} and dtype {rng_state.dtype}"
        )
    check_device("rng_state", rng_state, device)


def check_operands(q: Tensor, k: Tensor, v: Tensor, ndim: int, direction: str) -> None:
    """Shapes, dtypes, devices and strides of q, k and v; q has `ndim` dimensions."""
    if q.dim() != ndim or k.dim() not in (ndim, 4) or v.dim() != k.dim():
        words = "(batch_size, seqlen, num_heads, head_size)" if ndim == 4 else "(total, num_heads, head_size)"
        raise InvalidArgument(
            f"q, k and v must have shape {words}, got {tuple(q.shape)}, {tuple(k.shape)} and {tuple(v.shape)}"
        )
    if q.dtype not in DTYPES:
        raise InvalidArgument(
            f"FlashAttention only support fp16 and bf16 data type, and here fp32 and fp64 too; got {q.dtype}"
        )
    if k.dtype != q.dtype:
        raise InvalidArgument(f"query and key must have the same dtype, got {q.dtype} and {k.dtype}")
    if v.dtype != q.dtype:
        raise InvalidArgument(f"query and value must have the same dtype, got {q.dtype} and {v.dtype}")
    check_same_device(q, k, v)
    nheads, headdim = q.shape[-2], q.shape[-1]
    nheads_k = k.shape[-2]
    if not 1 <= headdim <= MAX_HEADDIM:
        raise InvalidArgument(
            f"FlashAttention {direction} only supports head dimension at most {MAX_HEADDIM} and at least 1, got {headdim}"
        )
    if k.shape[-1] != headdim or v.shape != k.shape:
        raise InvalidArgument(
            f"k and v must have shape (..., num_heads_k, head_size) with q's head size {headdim}, "
            f"got {tuple(k.shape)} and {tuple(v.shape)}"
        )
    if nheads_k < 1 or nheads % nheads_k != 0:
        raise InvalidArgument(
            f"Number of heads in key/value must divide number of heads in query, got {nheads_k} and {nheads}"
        )
    if headdim > 1 and (q.stride(-1) != 1 or k.stride(-1) != 1 or v.stride(-1) != 1):
        raise InvalidArgument(
            f"Input tensor must have contiguous last dimension, got last strides {q.stride(-1)}, {k.stride(-1)} "
            f"and {v.stride(-1)} of q, k and v"
        )


def check_same_device(q: Tensor, k: Tensor, v: Tensor) -> None:
    """Where nothing is computed, on the device "meta" or for a compiler, all that a call checks."""
    if k.device != q.device or v.device != q.device:
        raise InvalidArgument(f"q, k and v must be on the same device, got {q.device}, {k.device} and {v.device}")


def _check_varlen(
    q: Tensor,
    k: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor | None,
    max_seqlen_q: int | None,
    max_seqlen_k: int | None,
    seqused_k: Tensor | None,
    leftpad_k: Tensor | None,
    block_table: Tensor | None,
) -> tuple[int, int, int]:
    """Checks what only packed batches have; returns (batch_size, max_seqlen_q, max_seqlen_k)."""
    if cu_seqlens_k is None:
        raise InvalidArgument("cu_seqlens_k must be given with cu_seqlens_q, got None")
    device = q.device
    check_index("cu_seqlens_q", cu_seqlens_q, None, device)
    batch_size = cu_seqlens_q.shape[0] - 1
    if batch_size < 0:
        raise InvalidArgument(f"cu_seqlens_q must have shape (batch_size + 1), got {tuple(cu_seqlens_q.shape)}")
    check_index("cu_seqlens_k", cu_seqlens_k, (batch_size + 1,), device)
    if seqused_k is not None:
        check_index("seqused_k", seqused_k, (batch_size,), device)
    if leftpad_k is not None:
        check_index("leftpad_k", leftpad_k, (batch_size,), device)
    if block_table is None:
        if k.dim() != 3:
            raise InvalidArgument(
                f"k must have shape (total_k, num_heads_k, head_size) without a block_table, got {tuple(k.shape)}"
            )
    else:
        check_block_table(block_table, k, batch_size, device)
    return batch_size, _length("max_seqlen_q", max_seqlen_q), _length("max_seqlen_k", max_seqlen_k)


def check_block_table(block_table: Tensor, k: Tensor, batch_size: int, device: torch.device) -> None:
    """A table of pages, and keys that lie in pages."""
    if k.dim() != 4 or k.shape[1] < 1:
        raise InvalidArgument(
            f"k must have shape (num_blocks, page_block_size, num_heads_k, head_size) with a block_table, "
            f"got {tuple(k.shape)}"
        )
    if block_table.dtype != torch.int32:
        raise InvalidArgument(f"block_table must have dtype torch.int32, got {block_table.dtype}")
    if block_table.dim() != 2 or block_table.shape[0] != batch_size:
        raise InvalidArgument(
            f"block_table must have shape (batch_size, max_num_blocks_per_seq) with batch size {batch_size}, "
            f"got {tuple(block_table.shape)}"
        )
    if block_table.shape[1] > 1 and block_table.stride(-1) != 1:
        raise InvalidArgument(f"block_table must have contiguous last dimension, got strides {block_table.stride()}")
    check_device("block_table", block_table, device)


def check_index(name: str, tensor: Tensor, shape: tuple[int, ...] | None, device: torch.device) -> None:
    """An int32 vector of per-sequence numbers."""
    if tensor.dtype != torch.int32:
        raise InvalidArgument(f"{name} must have dtype int32, got {tensor.dtype}")
    if tensor.dim() != 1 or (shape is not None and tensor.shape != shape):
        words = "(batch_size + 1)" if shape is None else str(shape)
        raise InvalidArgument(f"{name} must have shape {words}, got {tuple(tensor.shape)}")
    if not tensor.is_contiguous():
        raise InvalidArgument(f"{name} must be contiguous, got strides {tensor.stride()}")
    check_device(name, tensor, device)


def check_numbers(dropout_p: float, softmax_scale: float, softcap: float, left: int, right: int) -> None:
    """Ranges of the options."""
    if not 0.0 <= dropout_p < 1.0:
        raise InvalidArgument(f"p_dropout must be at least 0 and < 1, got {dropout_p}")
    if not math.isfinite(softmax_scale):
        raise InvalidArgument(f"softmax_scale must be finite, got {softmax_scale}")
    if not 0.0 <= softcap < math.inf:
        raise InvalidArgument(f"softcap must be finite and at least 0 (0 is off), got {softcap}")
    if left < -1 or right < -1:
        raise InvalidArgument(f"window_size must be at least -1 on each side, got ({left}, {right})")


def check_head_terms(
    alibi_slopes: Tensor | None, sinks: Tensor | None, batch_size: int, nheads: int, device: torch.device
) -> None:
    """What heads add to their scores, and beside them."""
    if alibi_slopes is not None:
        _check_alibi(alibi_slopes, batch_size, nheads, device)
    if sinks is not None:
        _check_sinks(sinks, nheads, device)


def _check_sinks(sinks: Tensor, nheads: int, device: torch.device) -> None:
    """One logit a head."""
    if sinks.dtype not in DTYPES:
        raise InvalidArgument(f"s_aux must have dtype fp32, bf16, fp16 or fp64, got {sinks.dtype}")
    if sinks.shape != (nheads,):
        raise InvalidArgument(
            f"s_aux must have shape {(nheads,)}, one number for each query head, got {tuple(sinks.shape)}"
        )
    check_device("s_aux", sinks, device)


def _check_alibi(alibi_slopes: Tensor, batch_size: int, nheads: int, device: torch.device) -> None:
    """One slope a head, or a head of a sequence."""
    if alibi_slopes.dtype != torch.float32:
        raise InvalidArgument(f"ALiBi slopes must have dtype fp32, got {alibi_slopes.dtype}")
    if alibi_slopes.shape not in ((nheads,), (batch_size, nheads)):
        raise InvalidArgument(
            f"alibi_slopes must have shape {(nheads,)} or {(batch_size, nheads)}, got {tuple(alibi_slopes.shape)}"
        )
    if nheads > 1 and alibi_slopes.stride(-1) != 1:
        raise InvalidArgument(
            f"ALiBi slopes tensor must have contiguous last dimension, got strides {alibi_slopes.stride()}"
        )
    check_device("alibi_slopes", alibi_slopes, device)


def check_device(name: str, tensor: Tensor, device: torch.device) -> None:
    """Every tensor lies where q does."""
    if tensor.device != device:
        where = "CUDA" if device.type == "cuda" else "q's device"
        raise InvalidArgument(f"{name} must be on {where}: q is on {device}, {name} on {tensor.device}")


def _length(name: str, value: int | None) -> int:
    if value is None or not 0 <= value <= INT32_MAX:
        raise InvalidArgument(f"{name} must be between 0 and {INT32_MAX}, got {value}")
    return int(value)
