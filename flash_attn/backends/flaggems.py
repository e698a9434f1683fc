"""FlagGems' attention operators, inside what they compute correctly; gradients are left to other backends.

Two operators serve every layout: `flash_attention_forward` (dense) and `flash_attn_varlen_func` (packed, paged). A dense
problem that the first gets wrong goes through the second, as a packed batch of equal sequences. Here is what each is
given and why; docs/flaggems_backward_analysis.md names the lines of FlagGems behind every rule.
"""

import functools
import math
import sys
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flash_attn.backends.base import ForwardResult, Gradients, Operands
from flash_attn.errors import UnsupportedProblem
from flash_attn.hardware import Hardware
from flash_attn.problem import AttentionProblem

name = "flaggems"

forward_only = (
    "FlagGems' attention gradient masks causally whatever was asked, "
    "and with most of its tuning configurations leaves rows of dq unwritten"
)

DENSE_HEADDIMS = (32, 64, 96, 128, 192, 256)  # the dense operator pads to 16 as well, which its launcher then refuses
DENSE_DEVICES = ("cuda",)  # the dense operator asks for the processors of a device of this name, whatever the vendor
DENSE_ROWS = 128  # rows of a program in every configuration that the dense operator keeps
MAX_SEQUENCES = 32768  # a power of two below the 65535 that a grid's second dimension may have
MAX_OFFSET = 2**31 - 1  # elements; the kernels multiply positions by strides in 32 bits


def unsupported(problem: AttentionProblem, hardware: Hardware) -> str | None:
    """Why FlagGems cannot run the problem, or None."""
    package, reason = _package()
    if reason is not None:
        return reason
    device_type = "cuda" if hardware.kind == "hip" else hardware.kind
    if package.device != device_type:
        return f"FlagGems runs on {package.device} here, and these tensors are on {device_type}"
    if getattr(package.config, "use_c_extension", False):
        return "FlagGems' C++ operators are enabled (USE_C_EXTENSION), and only its Triton operators are verified"
    return _outside_domain(problem)


def _outside_domain(problem: AttentionProblem) -> str | None:
    if problem.dtype not in ("float16", "bfloat16"):
        return f"FlagGems' attention takes float16 and bfloat16, not {problem.dtype}"
    if problem.layout in ("cache", "paged_cache"):
        return "FlagGems has no operator over a cache in which new tokens are written and rotated"
    if problem.dropout:
        return "FlagGems' dropout keeps fewer weights than it rescales for, and no backward can rebuild its mask"
    if problem.sinks:
        return "FlagGems' attention has no sinks"
    if problem.leftpad_k:
        return "FlagGems' attention has no left padding of the keys"
    if problem.seqused_k and problem.layout != "paged":
        return "FlagGems reads seqused_k for paged keys only"
    if problem.layout == "paged" and (problem.headdim % 8 or problem.headdim < 16):
        return f"FlagGems' paged attention takes multiples of 8 from 16 as head dimension, not {problem.headdim}"
    if problem.batch_size > MAX_SEQUENCES:
        return (
            f"FlagGems launches its grid's second dimension over the batch, here up to {problem.batch_size} sequences"
        )
    return None


@functools.cache
def _package() -> tuple[Any, str | None]:
    """(flag_gems, None), or (None, why it cannot be used); its import probes devices, so it happens here alone."""
    path = list(sys.path)
    try:
        import flag_gems
        import flag_gems.config
    except ModuleNotFoundError as error:
        if error.name == "flag_gems":
            return None, "FlagGems is not installed; `pip install flag_gems` adds it"
        reason = str(error)
    except Exception as error:  # noqa: BLE001 - a third party's import may raise anything; then it is unusable here
        reason = " ".join(str(error).split()) or type(error).__name__
    else:
        return flag_gems, None
    sys.path[:] = path  # to which it adds its folders of vendors before it finds no device
    return None, f"importing FlagGems fails: {reason}"


def forward(problem: AttentionProblem, operands: Operands, return_scores: bool = False) -> ForwardResult:
    """One launch of FlagGems, and a few elementwise ones that translate; nothing waits for the device."""
    q = operands.q
    if not _any_pair(operands):
        shape = (*q.shape[:-3], q.shape[-2], q.shape[-3])
        return ForwardResult(torch.zeros_like(q), q.new_full(shape, -math.inf, dtype=torch.float32))
    _check_offsets(operands)
    call = _with_positive_scale(operands)
    if operands.cu_seqlens_q is not None:
        out, softmax_lse = _packed(problem, call)
    elif _dense_operator_is_right(call):
        out, softmax_lse = _dense(call)
    else:
        out, softmax_lse = _dense_as_packed(problem, call)
    softmax_lse.masked_fill_(softmax_lse == math.inf, -math.inf)  # FlagGems' value for a row that sees no key
    if operands.zero_tensors and operands.cu_seqlens_q is not None:
        _blank_outside(out, softmax_lse, operands.cu_seqlens_q)
    return ForwardResult(_laid_out_like(q, out), softmax_lse)


def backward(
    problem: AttentionProblem,
    operands: Operands,
    dout: Tensor,
    out: Tensor,
    softmax_lse: Tensor,
    gradients: Gradients,
) -> Tensor:
    """Not computed here: the table of backends takes the next one that can."""
    raise UnsupportedProblem(f"backend {name!r} computes no gradients", {name: forward_only})


def _any_pair(operands: Operands) -> bool:
    """Whether any query may see any key, as far as shapes tell."""
    lengths = [operands.q.numel(), operands.k.numel(), operands.max_seqlen_q, operands.max_seqlen_k]
    if operands.cu_seqlens_q is not None:
        lengths.append(operands.cu_seqlens_q.shape[0] - 1)
    if operands.block_table is not None:
        lengths.append(operands.block_table.shape[1])
    return 0 not in lengths


def _check_offsets(operands: Operands) -> None:
    """Refuses what only tensors tell: operands past 32-bit offsets, pages that do not follow one another."""
    k, v = operands.k, operands.v
    for letter, x in (("q", operands.q), ("k", k), ("v", v)):
        last = sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
        if last > MAX_OFFSET:
            raise _refusal(f"FlagGems computes addresses in 32 bits, and {letter} reaches over {last + 1} elements")
    if operands.block_table is None:
        return
    if k.stride() != v.stride():
        raise _refusal(f"FlagGems reads v with the strides of k, here {k.stride()} and {v.stride()}")
    if k.shape[0] > 1 and k.stride(0) != k.shape[1] * k.stride(1):
        raise _refusal(f"FlagGems takes pages to follow one another, and here shape {tuple(k.shape)} has {k.stride()}")


def _refusal(reason: str) -> UnsupportedProblem:
    return UnsupportedProblem(f"backend {name!r} cannot run this problem", {name: reason})


def _with_positive_scale(operands: Operands) -> Operands:
    """The same scores with softmax_scale > 0: FlagGems masks before it scales, and takes 0 for the default."""
    scale = operands.softmax_scale
    if scale > 0.0:
        return operands
    q = -operands.q if scale < 0.0 else torch.zeros_like(operands.q)
    return operands._replace(q=q, softmax_scale=abs(scale) or 1.0)


def _dense_operator_is_right(operands: Operands) -> bool:
    """Whether `flash_attention_forward` computes a dense problem correctly; `_dense_as_packed` takes the rest."""
    package, _ = _package()
    batch_size, seqlen_q, nheads, _headdim = operands.q.shape
    if package.device not in DENSE_DEVICES or batch_size * nheads > 2 * MAX_SEQUENCES - 1:
        return False  # its grid has a row per batch and head
    left, right = operands.window
    if left is None and right is None:
        return True
    if seqlen_q > DENSE_ROWS and seqlen_q % DENSE_ROWS:
        return False  # it counts visible keys from the end of the last, partial, block of rows
    if left is None:
        return right == 0 and operands.alibi_slopes is None  # one-sided windows are ignored; causal ALiBi moves the LSE
    return right is not None and right < operands.k.shape[1]


def _dense(operands: Operands) -> tuple[Tensor, Tensor]:
    package, _ = _package()
    headdim = operands.q.shape[-1]
    padded = next(size for size in DENSE_HEADDIMS if size >= headdim)
    q, k, v = (_sized_by_strides(_pad(x, padded)) for x in (operands.q, operands.k, operands.v))
    if k.stride() != v.stride():
        k, v = (x.clone(memory_format=torch.contiguous_format) for x in (k, v))
    left, right = operands.window
    causal = left is None and right == 0
    out, softmax_lse, *_rest = package.flash_attention_forward(
        q,
        k,
        v,
        None,
        None,
        q.shape[1],
        k.shape[1],
        0.0,
        causal,
        False,
        scale=operands.softmax_scale,
        softcap=operands.softcap,
        window_size_left=left,
        window_size_right=None if causal else right,
        alibi_slopes=operands.alibi_slopes,
        disable_splitkv=True,  # its combination of splits writes rows where only (batch, heads, rows) memory has them
    )
    return out[..., :headdim], softmax_lse


def _sized_by_strides(x: Tensor) -> Tensor:
    """x in memory whose strides give its sequence length: FlagGems keys compiled masks by strides, not by lengths.

    The batch stride is then also a multiple of heads * headdim, which its kernel tells the compiler.
    """
    batch_stride, row_stride = x.stride(0), x.stride(1)
    if batch_stride == x.shape[1] * row_stride and batch_stride % (x.shape[2] * x.shape[3]) == 0:
        return x
    return x.clone(memory_format=torch.contiguous_format)


def _dense_as_packed(problem: AttentionProblem, operands: Operands) -> tuple[Tensor, Tensor]:
    """A dense batch as a packed one of equal sequences."""
    q, k, v = operands.q, operands.k, operands.v
    batch_size, seqlen_q, nheads, _headdim = q.shape
    ends = torch.arange(batch_size + 1, dtype=torch.int32, device=q.device)
    packed = operands._replace(
        q=q.flatten(0, 1),
        k=k.flatten(0, 1),
        v=v.flatten(0, 1),
        cu_seqlens_q=ends * seqlen_q,
        cu_seqlens_k=ends * k.shape[1],
    )
    out, softmax_lse = _packed(problem, packed)
    softmax_lse = softmax_lse.view(nheads, batch_size, seqlen_q).transpose(0, 1).contiguous()
    return out.view(q.shape), softmax_lse


def _packed(problem: AttentionProblem, operands: Operands) -> tuple[Tensor, Tensor]:
    headdim = operands.q.shape[-1]
    if operands.block_table is None:
        padded = max(16, math.ceil(headdim / 8) * 8)
        q, k, v = (_pad(x, padded) for x in (operands.q, operands.k, operands.v))
        if k.stride() != v.stride():
            k, v = (x.clone(memory_format=torch.contiguous_format) for x in (k, v))
        operands = operands._replace(q=q, k=k, v=v)
    mask = _packed_mask(problem, operands)
    grouped = operands.q.shape[1] > operands.k.shape[-2]
    if operands.max_seqlen_q == 1 and grouped and mask == FULL and operands.alibi_slopes is None:
        out, softmax_lse = _one_query_each(operands)
    else:
        out, softmax_lse = _call_packed(operands, mask)
    return out[..., :headdim], softmax_lse


class _Mask(NamedTuple):
    """A window in the words of `flash_attn_varlen_func`."""

    causal: bool
    window_size: tuple[int, int]
    longest: int  # max_seqlen_k; a side of the window at least as large would be ignored


FULL = _Mask(False, (-1, -1), 0)


def _packed_mask(problem: AttentionProblem, operands: Operands) -> _Mask:
    """The window, with a bucketed length on a side that hides nothing: one side alone is ignored or taken for 0 and -1.

    A causal mask with ALiBi is a window too, since FlagGems' causal ALiBi moves the LSE by a constant for each row.
    """
    left, right = operands.window
    if operands.max_seqlen_q == 1:
        right = None  # the only row is the last one
    if left is None and right is None:
        return FULL
    if left is None and right == 0 and operands.alibi_slopes is None:
        return _Mask(True, (-1, -1), 0)
    left = problem.seqlen_k if left is None else left
    right = problem.seqlen_q if right is None else right
    return _Mask(False, (left, right), max(left, right) + 1)


def _one_query_each(operands: Operands) -> tuple[Tensor, Tensor]:
    """Sequences of at most one query: the heads of a group become rows, so that a group reads its keys once.

    FlagGems does the same, but takes row b for sequence b, and returns softmax_lse in the order of (key head, batch,
    group) under the shape (heads, batch).
    """
    q, k, ends = operands.q, operands.k, _clamped(operands.cu_seqlens_q, operands.q.shape[0])
    total_q, nheads, headdim = q.shape
    nheads_k, batch_size = k.shape[-2], ends.shape[0] - 1
    group = nheads // nheads_k
    row_of_sequence = ends[:-1].clamp(max=total_q - 1)
    sequence_of_row = (
        torch.searchsorted(ends, torch.arange(total_q, dtype=torch.int32, device=q.device), right=True) - 1
    )
    sequence_of_row.clamp_(0, batch_size - 1)
    rows = q.index_select(0, row_of_sequence).unflatten(1, (nheads_k, group))
    grouped = operands._replace(
        q=rows.transpose(1, 2).reshape(batch_size * group, nheads_k, headdim),
        cu_seqlens_q=torch.arange(batch_size + 1, dtype=torch.int32, device=q.device) * group,
        max_seqlen_q=group,
    )
    out, softmax_lse = _call_packed(grouped, FULL)
    out = out.unflatten(0, (batch_size, group)).transpose(1, 2).flatten(1, 2)
    softmax_lse = softmax_lse.view(nheads_k, batch_size, group).transpose(1, 2).flatten(0, 1)
    return out.index_select(0, sequence_of_row), softmax_lse.index_select(1, sequence_of_row)


def _call_packed(operands: Operands, mask: _Mask) -> tuple[Tensor, Tensor]:
    package, _ = _package()
    q, k, table = operands.q, operands.k, operands.block_table
    cu_seqlens_k, seqused_k = _clamped(operands.cu_seqlens_k, k.shape[0]), None
    if table is not None:
        used = operands.cu_seqlens_k.diff() if operands.seqused_k is None else operands.seqused_k  # type: ignore[union-attr]
        cu_seqlens_k, seqused_k = None, _clamped(used, table.shape[1] * k.shape[1])
        table = _clamped(table, k.shape[0] - 1)
    return package.flash_attn_varlen_func(
        q,
        k,
        operands.v,
        max_seqlen_q=operands.max_seqlen_q,
        cu_seqlens_q=_clamped(operands.cu_seqlens_q, q.shape[0]),
        max_seqlen_k=max(operands.max_seqlen_k, mask.longest),
        cu_seqlens_k=cu_seqlens_k,
        seqused_k=seqused_k,
        softmax_scale=operands.softmax_scale,
        causal=mask.causal,
        window_size=mask.window_size,
        softcap=operands.softcap,
        alibi_slopes=operands.alibi_slopes,
        block_table=table,
        return_softmax_lse=True,
    )


def _clamped(numbers: Tensor | None, largest: int) -> Any:
    """Contents that FlagGems trusts, kept where they address memory of ours; int32, on the device."""
    return None if numbers is None else numbers.clamp(0, largest)


def _pad(x: Tensor, headdim: int) -> Tensor:
    """x with zeros up to a head dim that FlagGems takes; they change neither scores nor the first columns of out."""
    return x if x.shape[-1] == headdim else torch.nn.functional.pad(x, (0, headdim - x.shape[-1]))


def _blank_outside(out: Tensor, softmax_lse: Tensor, cu_seqlens_q: Tensor) -> None:
    """out 0 and softmax_lse -inf for the rows of a packed batch that lie before or after every sequence."""
    rows = torch.arange(out.shape[0], device=out.device)
    outside = (rows < cu_seqlens_q[0]) | (rows >= cu_seqlens_q[-1])
    out.masked_fill_(outside[:, None, None], 0.0)
    softmax_lse.masked_fill_(outside, -math.inf)


def _laid_out_like(q: Tensor, out: Tensor) -> Tensor:
    """out with the strides that an operator's result has: those of torch.empty_like(q)."""
    if out.stride() == q.stride():
        return out
    like = torch.empty_like(q)
    return out if out.stride() == like.stride() else like.copy_(out)
