"""Launches the kernels of a cache and of few queries: append, decode with its merge; the forward kernel for many queries.

As in `portable`, a launch is bound once for its shapes and reused. Grids and splits follow from shapes alone.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flash_attn.backends import portable
from flash_attn.backends.base import Append, ForwardResult, Operands
from flash_attn.backends.fixed_arguments import (
    clear,
    fixed_arguments,
    page_numbers,
    pages_of_block,
    statistic_like,
    strides,
    template,
)
from flash_attn.backends.launcher import Launcher
from flash_attn.hardware import Hardware
from flash_attn.launch.decode import (
    APPEND_ROWS,
    MAX_PACKED_ROWS,
    MERGE_SPLITS,
    WIDE_ROWS,
    DecodeConfig,
    block_m,
    chained,
    decode_config,
    gathering,
    keys_per_split,
    prefers_decode,
    split_count,
    starts_early,
    wide,
)
from flash_attn.launch.forward import forward_config, head_dim_pad, pipeline_stages
from flash_attn.launch.rotary import power_of_two
from flash_attn.problem import AttentionProblem


class ForwardKernel(NamedTuple):
    """What attends where there are more queries than the decode kernel suits."""

    launch: Callable[[AttentionProblem, Operands], ForwardResult]
    tiles: Callable[[AttentionProblem, Operands], float]  # in the time of one that an SM has to itself


class Merge(NamedTuple):
    """The launch that merges the parts of a decode call, and templates of the parts."""

    launch: Launcher
    out_like: Tensor
    lse_like: Tensor


class Decode(NamedTuple):
    """The launches of one decode call; without a merge the first one writes the results itself."""

    split: Launcher
    lse_like: Tensor  # a template of softmax_lse
    merge: Merge | None


def portable_tiles(problem: AttentionProblem, operands: Operands) -> float:
    """Of `portable.launch_forward`, which run side by side on an SM."""
    batch_size, seqlen_q, nheads, _ = operands.q.shape
    rows = forward_config(problem, portable.hardware_of(operands.q.device), False).block_m
    return SIDE_BY_SIDE * math.ceil(seqlen_q / rows) * batch_size * nheads


# of the time that a tile takes by itself, where an SM has two. H200, 64 queries, head dims 64 and 128, 2026-12-01
SIDE_BY_SIDE = 0.7
PORTABLE = ForwardKernel(portable.launch_forward, portable_tiles)


def attend_cache(
    problem: AttentionProblem,
    operands: Operands,
    append: Append | None,
    num_splits: int,
    forward: ForwardKernel = PORTABLE,
) -> ForwardResult:
    """See `portable.attend_cache`."""
    memo = {} if operands.memo is None else operands.memo
    q = operands.q if append is None else append_tokens(operands, append, memo)
    if "decode" not in memo:
        memo["decode"] = plan_decode(problem, operands._replace(q=q), num_splits, forward.tiles(problem, operands))
    plan = memo["decode"]
    if plan is None:
        return forward.launch(problem, operands._replace(q=q))
    return decode(q, operands, plan)


def attend_few_queries(problem: AttentionProblem, operands: Operands) -> ForwardResult:
    """The decode kernel over dense, packed or paged keys, for what `few_queries` says yes to."""
    memo = {} if operands.memo is None else operands.memo
    plan = memo.get("few_queries")
    if plan is None:
        plan = memo["few_queries"] = share_out(problem, operands, 0)
    return decode(operands.q, operands, plan)


def append_tokens(operands: Operands, append: Append, memo: dict[str, Any]) -> Tensor:
    """Writes the new tokens; returns the queries, rotated where there are angles."""
    q = operands.q
    q_rotated = q if append.rotary_cos is None else torch.empty_like(q)
    launch = memo.get("append")
    if launch is None:
        launch = memo["append"] = bind_append(operands, append, q_rotated)
    launch(
        q,
        append.k,
        append.v,
        q_rotated,
        operands.k,
        operands.v,
        operands.seqused_k,
        operands.block_table,
        append.rotary_cos,
        append.rotary_sin,
    )
    return q_rotated


def bind_append(operands: Operands, append: Append, q_rotated: Tensor) -> Launcher:
    """The append launch for tensors like these."""
    from flash_attn.kernels.algebra import arguments
    from flash_attn.kernels.portable.append import kv_append_kernel

    batch_size, seqlen_q, nheads, headdim = operands.q.shape
    seqlen_new, nheads_k = append.k.shape[1], append.k.shape[2]
    tensors = (operands.q, append.k, append.v, q_rotated, operands.k, operands.v)
    q_strides, k_strides, v_strides, rotated_strides, k_cache_strides, v_cache_strides = map(strides, tensors)
    pages = page_numbers(operands)
    cos = append.rotary_cos
    angles = (None, None) if cos is None else (cos.stride(0), cos.shape[0])
    numbers = (seqlen_q, seqlen_new, operands.max_seqlen_k, nheads, nheads_k, *pages)

    def build(p: Sequence[Any]) -> tuple[Any, ...]:
        return (
            (p[0], *q_strides),
            (p[1], *k_strides),
            (p[2], *v_strides),
            (p[3], *rotated_strides),
            (p[4], *k_cache_strides),
            (p[5], *v_cache_strides),
            p[6],
            p[7],
            (p[8], p[9], *angles),
            *numbers,
        )

    pairs = 0 if cos is None else cos.shape[1]
    early = chained(portable.hardware_of(operands.q.device))
    constants = {
        "HEAD_DIM": headdim,
        "HEAD_DIM_PAD": head_dim_pad(headdim),
        "PAIRS": pairs,
        "PAIRS_PAD": power_of_two(pairs),
        "INTERLEAVED": append.interleaved,
        "ADVANCE": append.advance,
        "BLOCK": APPEND_ROWS,
    }
    blocks = math.ceil(seqlen_new * nheads_k / APPEND_ROWS)
    if cos is not None:
        blocks += math.ceil(seqlen_q * nheads / APPEND_ROWS)
    kinds = (*[arguments.Tensor] * 6, None, None, arguments.Rotary)
    return Launcher(kv_append_kernel, batch_size * blocks, build, kinds, constants, {"num_warps": 4}, early)


def plan_decode(problem: AttentionProblem, operands: Operands, num_splits: int, forward_tiles: float) -> Decode | None:
    """The launches of the decode kernel, or None where a forward kernel with so many tiles suits the queries better."""
    hardware = portable.hardware_of(operands.q.device)
    rows, num_tiles = packed_rows(operands), decode_tiles(operands, WIDE_ROWS)
    if keys_per_split() is not None:
        num_splits = 0
    if not prefers_decode(problem, rows, num_tiles, forward_tiles, num_splits, hardware):
        return None
    return share_out(problem, operands, num_splits)


def decode_tiles(operands: Operands, rows: int) -> int:
    """Tiles of the decode kernel of so many rows, each with all keys that its queries see."""
    return math.ceil(packed_rows(operands) / rows) * fixed_arguments(operands).batch_size * operands.k.shape[-2]


def packed_rows(operands: Operands) -> int:
    """Rows of the longest sequence's queries with the query heads of a key head side by side."""
    return operands.max_seqlen_q * group_size(operands)


def group_size(operands: Operands) -> int:
    """Query heads of one key head."""
    return operands.q.shape[-2] // operands.k.shape[-2]


def share_out(problem: AttentionProblem, operands: Operands, num_splits: int) -> Decode:
    """The launches for tensors like these; `num_splits` 0 leaves the choice."""
    hardware = portable.hardware_of(operands.q.device)
    per_split = keys_per_split()
    rows = block_m(packed_rows(operands), WIDE_ROWS if wide(problem, hardware) else MAX_PACKED_ROWS)
    num_tiles = decode_tiles(operands, rows)
    config = decode_config(problem, rows, num_tiles, operands.block_table is not None, hardware)
    gathered = operands.block_table is not None and pages_of_block(operands, config.block_n) is None
    num_blocks = math.ceil(visible_keys(operands) / config.block_n)
    fixed_blocks = None
    if per_split is not None:
        fixed_blocks = math.ceil(per_split / config.block_n)
        num_splits = math.ceil(operands.max_seqlen_k / (fixed_blocks * config.block_n))
    elif num_splits == 0:
        slow_alone = gathered or rows > MAX_PACKED_ROWS
        num_splits = split_count(num_tiles, num_blocks, slow_alone, hardware, config)
    num_splits = max(1, num_splits)
    if gathered:
        config = gathering(config, math.ceil(num_blocks / num_splits))
    return bind_decode(problem, operands, hardware, config, rows, num_splits, fixed_blocks)


def visible_keys(operands: Operands) -> int:
    """Keys that the queries of one sequence may see together, at most."""
    left, right = operands.window
    if left is None or right is None:
        return operands.max_seqlen_k
    return min(operands.max_seqlen_k, operands.max_seqlen_q + left + right)


def bind_decode(
    problem: AttentionProblem,
    operands: Operands,
    hardware: Hardware,
    config: DecodeConfig,
    rows: int,
    num_splits: int,
    fixed_blocks: int | None,
) -> Decode:
    """The launches for tensors like these, with tiles of so many rows."""
    from flash_attn.kernels.algebra import arguments
    from flash_attn.kernels.portable.decode import attn_decode_split_kernel

    q = operands.q
    group = group_size(operands)
    _, scale, softcap, forward_score, _, _, (seqlen_q, _, total_q, capacity, *_) = fixed_arguments(operands)
    q_strides, k_strides, v_strides = map(strides, (q, operands.k, operands.v))
    out_strides = result_strides(q)
    pages = page_numbers(operands)
    num_stages = pipeline_stages(config.num_stages, operands.block_table is not None)
    # one part is merged too where splits are fixed: a merge moves the last bit of softmax_lse, however many parts it has
    parts = num_splits > 1 or fixed_blocks is not None
    total_q = total_q if q.dim() == 3 else None
    lengths = (seqlen_q, total_q, capacity, operands.appended or None, *operands.window)
    numbers = (*lengths, operands.k.shape[-2], num_splits, fixed_blocks, *pages)

    def build(p: Sequence[Any]) -> tuple[Any, ...]:
        return (
            (p[0], *q_strides),
            (p[1], *k_strides),
            (p[2], *v_strides),
            (p[3], *out_strides),
            p[4],
            p[5],
            p[6],
            p[7],
            p[8],
            p[9],
            (scale, softcap, p[10], *forward_score, None if parts else p[11]),
            *numbers,
        )

    constants = {
        "PARTS": parts,
        "PAGES": pages_of_block(operands, config.block_n),
        "GROUP": group,
        "HEAD_DIM": problem.headdim,
        "HEAD_DIM_PAD": head_dim_pad(problem.headdim),
        "BLOCK_M": rows,
        "BLOCK_N": config.block_n,
        "PRECISION": "ieee",
        "STAGES": num_stages,
    }
    kinds = (*[arguments.Tensor] * 4, *[None] * 6, arguments.Score)
    options = {"num_warps": config.num_warps, "num_stages": num_stages}
    num_programs = decode_tiles(operands, rows) * num_splits if q.numel() else 0
    early = starts_early(num_programs, hardware)
    split = Launcher(attn_decode_split_kernel, num_programs, build, kinds, constants, options, early)
    return Decode(split, statistic_like(q), bind_merge(operands, num_splits) if parts else None)


def result_strides(q: Tensor) -> tuple[int, int, int]:
    """(batch, sequence, head) strides of the out that a call will allocate."""
    return strides(torch.empty_like(q, device="meta"))


def bind_merge(operands: Operands, num_splits: int) -> Merge:
    """The launch that merges the parts of queries like these."""
    from flash_attn.kernels.algebra import arguments
    from flash_attn.kernels.portable.decode import attn_decode_merge_kernel

    q = operands.q
    *_, nheads, headdim = q.shape
    batch_size, seqlen_q = fixed_arguments(operands).batch_size, operands.max_seqlen_q
    total_q = q.shape[0] if q.dim() == 3 else None
    out_strides = result_strides(q)

    def build(p: Sequence[Any]) -> tuple[Any, ...]:
        return p[0], p[1], (p[2], *out_strides), p[3], p[4], p[5], seqlen_q, total_q, nheads, num_splits

    early = chained(portable.hardware_of(q.device))
    constants = {"HEAD_DIM": headdim, "HEAD_DIM_PAD": head_dim_pad(headdim), "BLOCK_SPLITS": MERGE_SPLITS}
    kinds = (None, None, arguments.Tensor, None)
    num_programs = batch_size * seqlen_q * nheads
    launch = Launcher(attn_decode_merge_kernel, num_programs, build, kinds, constants, {"num_warps": 4}, early)
    parts = (batch_size, seqlen_q, nheads, num_splits)
    return Merge(launch, template((*parts, headdim), q.device), template(parts, q.device))


def decode(q: Tensor, operands: Operands, plan: Decode) -> ForwardResult:
    """One launch, or with splits two; q stands for that of the operands."""
    out, softmax_lse = torch.empty_like(q), torch.empty_like(plan.lse_like)
    if operands.zero_tensors:
        clear(out, softmax_lse)
    part_out, part_lse = out, softmax_lse
    if plan.merge is not None:
        part_out, part_lse = torch.empty_like(plan.merge.out_like), torch.empty_like(plan.merge.lse_like)
    plan.split(
        q,
        operands.k,
        operands.v,
        part_out,
        part_lse,
        operands.cu_seqlens_q,
        operands.cu_seqlens_k,
        operands.seqused_k,
        operands.leftpad_k,
        operands.block_table,
        operands.alibi_slopes,
        operands.sinks,
    )
    if plan.merge is not None:
        plan.merge.launch(part_out, part_lse, out, softmax_lse, operands.cu_seqlens_q, operands.sinks)
    return ForwardResult(out, softmax_lse)
