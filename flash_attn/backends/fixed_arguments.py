"""Kernel arguments that follow from the shapes, strides and options of a call, without the pointers that some lead with; and
the tensors that a forward writes."""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flash_attn import random_bits
from flash_attn.backends.base import Operands
from flash_attn.launch.backward import BackwardConfig
from flash_attn.launch.forward import ForwardConfig, head_dim_pad
from flash_attn.problem import AttentionProblem

# of a softcap: sums of exp(50) over 2^20 keys, times values up to 2^30, stay inside the range of fp32, weights in that of bf16
LARGEST_BOUND = 50.0
MOST_PAGES = 4  # of a block; over pages of 8 tokens a load for each key is faster (H200, 2026-12-01)
SMALLEST_SCALE = 1e-30  # stands for softmax_scale 0, whose scores must still mask with -inf


class FixedArguments(NamedTuple):
    """What most kernels take."""

    batch_size: int
    scale: float  # Score's fields: scale, softcap, (slopes), ...
    softcap: float | None
    forward_score: tuple[Any, ...]  # slope stride, exact, negative, one_sided, bounded; (sinks) follow
    backward_score: tuple[Any, ...]  # the same without what belongs to a forward
    dropout: tuple[Any, ...]  # Dropout's fields after the pointer
    lengths: tuple[int | None, ...]  # seqlen_q, seqlen_k, total_q, total_k, window left and right, nheads, group


def fixed_arguments(operands: Operands) -> FixedArguments:
    q, k, slopes = operands.q, operands.k, operands.alibi_slopes
    nheads = q.shape[-2]
    total_k = k.shape[0] if k.dim() == 3 else k.shape[1]
    if operands.block_table is not None:
        total_k = operands.block_table.shape[1] * k.shape[1]
    dropout_p = operands.dropout_p
    score = (
        None if slopes is None else (slopes.stride(0) if slopes.dim() == 2 else 0),
        1 if q.dtype == torch.float32 else None,
        1 if operands.softmax_scale < 0.0 else None,
    )
    return FixedArguments(
        batch_size=q.shape[0] if operands.cu_seqlens_q is None else operands.cu_seqlens_q.shape[0] - 1,
        scale=max(abs(operands.softmax_scale), SMALLEST_SCALE),
        softcap=operands.softcap if operands.softcap > 0.0 else None,
        forward_score=(
            *score,
            1 if slopes is not None and operands.window[1] == 0 else None,
            1 if 0.0 < operands.softcap <= LARGEST_BOUND and slopes is None and q.dtype != torch.float16 else None,
        ),
        backward_score=(*score, None, None, None),
        dropout=(random_bits.keep_below(dropout_p), 1.0 / (1.0 - dropout_p)) if dropout_p > 0.0 else (None, None),
        lengths=(
            operands.max_seqlen_q,
            operands.max_seqlen_k,
            q.shape[0] if q.dim() == 3 else q.shape[1],
            total_k,
            *operands.window,
            nheads,
            nheads // k.shape[-2],
        ),
    )


def empty_results(operands: Operands, memo: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Memory for (out, softmax_lse); 0 and -inf where `zero_tensors` asks for it, or no launch will write."""
    q = operands.q
    out = torch.empty_like(q)
    lse_like = memo.get("lse_like")
    if lse_like is None:
        lse_like = memo["lse_like"] = statistic_like(q)
    softmax_lse = torch.empty_like(lse_like)
    if operands.zero_tensors or operands.max_seqlen_q == 0:
        clear(out, softmax_lse)
    return out, softmax_lse


def clear(out: Tensor, softmax_lse: Tensor) -> None:
    """The results of rows that see no key."""
    out.zero_()
    softmax_lse.fill_(-math.inf)


def statistic_like(q: Tensor) -> Tensor:
    """A `template` of softmax_lse: (batch, nheads, seqlen_q), packed (nheads, total_q)."""
    shape = (q.shape[1], q.shape[0]) if q.dim() == 3 else (q.shape[0], q.shape[2], q.shape[1])
    return template(shape, q.device)


def template(shape: tuple[int, ...], device: torch.device) -> Tensor:
    """One fp32 number seen as many: `empty_like` of it costs the host half of an `empty` with dtype and device."""
    return torch.empty((), dtype=torch.float32, device=device).expand(shape)


def optional_tensors(operands: Operands) -> tuple[Tensor | None, ...]:
    return (
        operands.cu_seqlens_q,
        operands.cu_seqlens_k,
        operands.seqused_k,
        operands.leftpad_k,
        operands.alibi_slopes,
        operands.rng_state,
    )


def strides(x: Tensor) -> tuple[int, int, int]:
    """(batch, sequence, head) strides; packed batches have no batch stride."""
    if x.dim() == 3:
        stride_s, stride_h, _ = x.stride()
        return 0, stride_s, stride_h
    return x.stride()[:3]  # type: ignore[return-value]


def page_numbers(operands: Operands) -> tuple[int | None, ...]:
    """Pages' fields after the pointer: stride of the table, pages a sequence, tokens a page, pages in all, log2 of tokens."""
    table = operands.block_table
    if table is None:
        return (None,) * 5
    num_pages, page_size = operands.k.shape[:2]
    shift = page_size.bit_length() - 1 if page_size & (page_size - 1) == 0 else None
    return table.stride(0), table.shape[1], page_size, num_pages, shift


def pages_of_block(operands: Operands, block_n: int) -> int | None:
    """Pages that hold a block of keys: one, or so many whole ones; None where its keys may lie in any, or in no page."""
    table, page_size = operands.block_table, operands.k.shape[1]
    if table is None:
        return None
    if table.shape[1] == 1:
        return 1
    aligned = operands.leftpad_k is None and 0 in (page_size % block_n, block_n % page_size)
    pages = math.ceil(block_n / page_size)
    return pages if aligned and pages <= MOST_PAGES else None


def tile_constants(
    problem: AttentionProblem, config: ForwardConfig | BackwardConfig
) -> tuple[dict[str, Any], dict[str, Any]]:
    """(constexprs of a portable kernel, Triton's launch options)."""
    constants = {
        "HEAD_DIM": problem.headdim,
        "HEAD_DIM_PAD": head_dim_pad(problem.headdim),
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "PRECISION": "ieee",
        "STAGES": config.num_stages,
    }
    return constants, {"num_warps": config.num_warps, "num_stages": config.num_stages}


def forward_constants(
    problem: AttentionProblem, operands: Operands, config: ForwardConfig
) -> tuple[dict[str, Any], dict[str, Any]]:
    """`tile_constants` of a kernel whose keys may be paged."""
    constants, options = tile_constants(problem, config)
    return {"PAGES": pages_of_block(operands, config.block_n)} | constants, options
