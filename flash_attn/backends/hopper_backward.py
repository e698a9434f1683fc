"""Launches the backward kernels of kernels/hopper: in one pass, or in two where results must not vary or do not fit."""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flash_attn import hardware as devices
from flash_attn.backends import tensor_maps
from flash_attn.backends.base import Gradients, Operands
from flash_attn.backends.fixed_arguments import (
    FixedArguments,
    fixed_arguments,
    optional_tensors,
    strides,
)
from flash_attn.backends.launcher import Launcher
from flash_attn.launch.hopper import (
    CONSUMER_ROWS,
    HopperDkdvConfig,
    HopperDqConfig,
    HopperOnePassConfig,
    copy_columns,
    even_share,
    head_dim_pad,
    hopper_backward_config,
    product_width,
)
from flash_attn.problem import AttentionProblem

CONSUMERS = 2
TILE = CONSUMERS * CONSUMER_ROWS  # queries or keys of one tile

Backward = Callable[[Operands, Tensor, Tensor, Tensor, Tensor, Gradients, Tensor], None]


def bind_backward(
    problem: AttentionProblem,
    operands: Operands,
    dout: Tensor,
    out: Tensor,
    gradients: Gradients,
) -> Backward:
    """The launches for tensors like these, as a function of (operands, dout, out, softmax_lse, delta, gradients, counter)."""
    regular = [tensor_maps.regular(x) for x in (dout, *gradients)]
    if all(regular):
        return _bind_regular(problem, operands, dout, out, gradients)
    dout = dout if regular[0] else _copy(dout)
    inner = Gradients(*(_like(x, same) for x, same in zip(gradients, regular[1:], strict=True)))
    launch = _bind_regular(problem, operands, dout, out, inner)

    def copied(operands: Operands, dout: Tensor, out: Tensor, softmax_lse: Tensor, delta: Tensor, gradients: Gradients,
               counter: Tensor) -> None:  # fmt: skip
        """Tensor maps cannot reach these tensors where they are."""
        inner = Gradients(*(_like(x, same) for x, same in zip(gradients, regular[1:], strict=True)))
        launch(operands, dout if regular[0] else _copy(dout), out, softmax_lse, delta, inner, counter)
        for target, result in zip(gradients, inner, strict=True):
            if target is not result:
                target.copy_(result)

    return copied


def _copy(x: Tensor) -> Tensor:
    return x.clone(memory_format=torch.contiguous_format)


def _like(x: Tensor, same: bool) -> Tensor:
    return x if same else torch.empty_like(x, memory_format=torch.contiguous_format)


def _bind_regular(
    problem: AttentionProblem,
    operands: Operands,
    dout: Tensor,
    out: Tensor,
    gradients: Gradients,
) -> Backward:
    config = hopper_backward_config(problem)
    if isinstance(config, HopperOnePassConfig):
        return bind_one_pass(problem, operands, dout, out, gradients, config)
    launch_dq = bind_dq(problem, operands, dout, out, gradients.dq, config.dq)
    wanted = ((True, True),) if len(config.dkdv) == 1 else ((True, False), (False, True))
    launches_dkdv = [
        bind_dkdv(problem, operands, dout, gradients, each, *with_dk_dv)
        for each, with_dk_dv in zip(config.dkdv, wanted, strict=True)
    ]

    def launch(operands: Operands, dout: Tensor, out: Tensor, softmax_lse: Tensor, delta: Tensor, gradients: Gradients,
               counter: Tensor) -> None:  # fmt: skip
        tensors = operands.q, operands.k, operands.v, dout
        rest = softmax_lse, delta, *optional_tensors(operands), counter
        launch_dq(*tensors, gradients.dq, out, *rest, operands.dlse)
        for launch_dkdv in launches_dkdv:
            launch_dkdv(*tensors, gradients.dk, gradients.dv, *rest)

    return launch


class Tiles(NamedTuple):
    """What the persistent kernels draw."""

    num_programs: int
    sizes: tuple[int | None, ...]  # num_tiles, num_blocks, heads_together, then FixedArguments.lengths


def _tiles(q: Tensor, fixed: FixedArguments, seqlen: int, nheads: int, heads_together: int) -> Tiles:
    """The tiles of sequences of up to `seqlen` queries or keys."""
    num_blocks, heads = math.ceil(seqlen / TILE), fixed.batch_size * nheads
    num_tiles = num_blocks * heads
    num_programs = min(num_tiles, devices.of(q.device).num_sms)
    return Tiles(num_programs, (num_tiles, num_blocks, even_share(heads_together, heads), *fixed.lengths))


def _key_maps(
    problem: AttentionProblem, operands: Operands, dout: Tensor, gradients: Gradients, block_m: int
) -> list[tensor_maps.Describe]:
    """Maps of q, k, v, dout, dk and dv for a kernel that owns keys: blocks of queries, and each consumer's rows of the keys."""
    q, k, v, columns = operands.q, operands.k, operands.v, copy_columns(problem.headdim)
    tensors = ((q, block_m), (k, CONSUMER_ROWS), (v, CONSUMER_ROWS), (dout, block_m))
    written = ((gradients.dk, CONSUMER_ROWS), (gradients.dv, CONSUMER_ROWS))
    return [tensor_maps.hopper(x, rows, columns) for x, rows in (*tensors, *written)]


def bind_dq(
    problem: AttentionProblem,
    operands: Operands,
    dout: Tensor,
    out: Tensor,
    dq: Tensor,
    config: HopperDqConfig,
) -> Launcher:
    """The launch that writes delta and dq."""
    from flash_attn.kernels.algebra import arguments
    from flash_attn.kernels.hopper.backward_dq import attn_bwd_dq_kernel

    q, k, v = operands.q, operands.k, operands.v
    columns, fixed = copy_columns(problem.headdim), fixed_arguments(operands)
    tiles = _tiles(q, fixed, operands.max_seqlen_q, q.shape[-2], config.heads_together)
    q_map, dout_map, dq_map = (tensor_maps.hopper(x, CONSUMER_ROWS, columns) for x in (q, dout, dq))
    k_map, v_map = (tensor_maps.hopper(x, config.block_n, columns) for x in (k, v))
    out_strides = strides(out)

    def build(p: Sequence[Any]) -> tuple[Any, ...]:
        return (
            q_map(p[0]),
            k_map(p[1]),
            v_map(p[2]),
            dout_map(p[3]),
            dq_map(p[4]),
            (p[5], *out_strides),
            p[6],
            p[15] if problem.lse_gradient else None,
            p[7],
            (p[8], p[9], p[10], p[11], None),
            (fixed.scale, fixed.softcap, p[12], *fixed.backward_score),
            (p[13], *fixed.dropout),
            p[14],
            *tiles.sizes,
        )

    constants = {
        "HEAD_DIM": problem.headdim,
        "HEAD_DIM_PAD": head_dim_pad(problem.headdim),
        "WIDTH": product_width(problem.headdim),
        "BLOCK_N": config.block_n,
        "CONSUMERS": CONSUMERS,
        "K_STAGES": config.k_stages,
        "V_STAGES": config.v_stages,
        "Q_STAGES": config.q_stages,
        "DRAW_AHEAD": config.draw_ahead,
        "REGISTERS": config.registers,
    }
    kinds = (*[None] * 5, arguments.Tensor, *[None] * 3, arguments.Sequences, arguments.Score, arguments.Dropout)
    return Launcher(attn_bwd_dq_kernel, tiles.num_programs, build, kinds, constants, {"num_warps": 4})


def bind_dkdv(
    problem: AttentionProblem,
    operands: Operands,
    dout: Tensor,
    gradients: Gradients,
    config: HopperDkdvConfig,
    with_dk: bool,
    with_dv: bool,
) -> Launcher:
    """The launch that writes dk, dv or both, once delta is there."""
    from flash_attn.kernels.algebra import arguments
    from flash_attn.kernels.hopper.backward_dkdv import attn_bwd_dkdv_kernel

    pad, fixed = head_dim_pad(problem.headdim), fixed_arguments(operands)
    tiles = _tiles(operands.k, fixed, operands.max_seqlen_k, operands.k.shape[-2], config.heads_together)
    q_map, k_map, v_map, dout_map, dk_map, dv_map = _key_maps(problem, operands, dout, gradients, config.block_m)

    def build(p: Sequence[Any]) -> tuple[Any, ...]:
        return (
            q_map(p[0]),
            k_map(p[1]),
            v_map(p[2]) if with_dk else None,
            dout_map(p[3]),
            dk_map(p[4]) if with_dk else None,
            dv_map(p[5]) if with_dv else None,
            p[6],
            p[7],
            (p[8], p[9], p[10], p[11], None),
            (fixed.scale, fixed.softcap, p[12], *fixed.backward_score),
            (p[13], *fixed.dropout),
            p[14],
            *tiles.sizes,
        )

    constants = {
        "HEAD_DIM_PAD": pad,
        "WIDTH": product_width(problem.headdim),
        "BLOCK_M": config.block_m,
        "CONSUMERS": CONSUMERS,
        "K_STAGES": config.k_stages,
        "Q_STAGES": config.q_stages,
        "DOUT_STAGES": config.dout_stages,
        "REGISTERS": config.registers,
    }
    kinds = (*[None] * 8, arguments.Sequences, arguments.Score, arguments.Dropout)
    return Launcher(attn_bwd_dkdv_kernel, tiles.num_programs, build, kinds, constants, {"num_warps": 4})


def bind_one_pass(
    problem: AttentionProblem,
    operands: Operands,
    dout: Tensor,
    out: Tensor,
    gradients: Gradients,
    config: HopperOnePassConfig,
) -> Backward:
    """Three launches: delta and zeros, all products, dq from its sum."""
    q = operands.q
    pad, fixed = head_dim_pad(problem.headdim), fixed_arguments(operands)
    nheads, num_m = q.shape[-2], math.ceil(operands.max_seqlen_q / config.block_m)
    num_dq_blocks = fixed.batch_size * num_m + 1
    if q.dim() == 3:
        num_dq_blocks = q.shape[0] // config.block_m + fixed.batch_size + 1
    blocks = num_dq_blocks, num_m
    launch_rows, launch_convert = _bind_rows(problem, operands, dout, out, gradients.dq, config, fixed, blocks)
    launch_products = _bind_products(problem, operands, dout, gradients, config, fixed, blocks)
    size, num_turns = nheads * num_dq_blocks * config.block_m * pad, nheads * num_dq_blocks

    def launch(operands: Operands, dout: Tensor, out: Tensor, softmax_lse: Tensor, delta: Tensor, gradients: Gradients,
               counter: Tensor) -> None:  # fmt: skip
        dq_sum = torch.empty(size, dtype=torch.float32, device=dout.device)
        turns = torch.empty(num_turns, dtype=torch.int32, device=dout.device) if problem.deterministic else None
        optional = optional_tensors(operands)
        launch_rows(out, dout, delta, dq_sum, turns, *optional[:4], softmax_lse, operands.dlse)
        launch_products(operands.q, operands.k, operands.v, dout, gradients.dk, gradients.dv, dq_sum, turns, softmax_lse,
                        delta, *optional, counter)  # fmt: skip
        launch_convert(dq_sum, gradients.dq, *optional[:4])

    return launch


def _bind_products(
    problem: AttentionProblem,
    operands: Operands,
    dout: Tensor,
    gradients: Gradients,
    config: HopperOnePassConfig,
    fixed: FixedArguments,
    blocks: tuple[int, int],
) -> Launcher:
    """The launch that writes dk and dv, and adds up dq."""
    from flash_attn.kernels.algebra import arguments
    from flash_attn.kernels.hopper.backward_one_pass import attn_bwd_kernel

    pad = head_dim_pad(problem.headdim)
    tiles = _tiles(operands.k, fixed, operands.max_seqlen_k, operands.k.shape[-2], config.heads_together)
    q_map, k_map, v_map, dout_map, dk_map, dv_map = _key_maps(problem, operands, dout, gradients, config.block_m)

    def build(p: Sequence[Any]) -> tuple[Any, ...]:
        return (
            q_map(p[0]),
            k_map(p[1]),
            v_map(p[2]),
            dout_map(p[3]),
            dk_map(p[4]),
            dv_map(p[5]),
            p[6],
            p[7],
            p[8],
            p[9],
            (p[10], p[11], p[12], p[13], None),
            (fixed.scale, fixed.softcap, p[14], *fixed.backward_score),
            (p[15], *fixed.dropout),
            p[16],
            *blocks,
            *tiles.sizes,
        )

    constants = {
        "HEAD_DIM_PAD": pad,
        "WIDTH": product_width(problem.headdim),
        "BLOCK_M": config.block_m,
        "K_STAGES": config.k_stages,
        "AHEAD": config.ahead,
        "REGISTERS": config.registers,
    }
    kinds = (*[None] * 10, arguments.Sequences, arguments.Score, arguments.Dropout)
    return Launcher(attn_bwd_kernel, tiles.num_programs, build, kinds, constants, {"num_warps": 4})


def _bind_rows(
    problem: AttentionProblem,
    operands: Operands,
    dout: Tensor,
    out: Tensor,
    dq: Tensor,
    config: HopperOnePassConfig,
    fixed: FixedArguments,
    blocks: tuple[int, int],
) -> tuple[Launcher, Launcher]:
    """The launches before and after: delta and zeros for dq's sum; dq."""
    from flash_attn.kernels.algebra import arguments
    from flash_attn.kernels.hopper.backward_dq_sum import attn_bwd_convert_kernel, attn_bwd_rows_kernel

    nheads = operands.q.shape[-2]
    out_strides, dout_strides, dq_strides = map(strides, (out, dout, dq))
    seqlen_q, _seqlen_k, total_q, *_ = fixed.lengths
    sizes = *blocks, seqlen_q, total_q, nheads

    def build_rows(p: Sequence[Any]) -> tuple[Any, ...]:
        return (
            (p[0], *out_strides),
            (p[1], *dout_strides),
            p[9] if problem.lse_gradient else None,
            p[10] if problem.lse_gradient else None,
            p[2],
            p[3],
            p[4],
            (p[5], p[6], p[7], p[8], None),
            *sizes,
        )

    def build_convert(p: Sequence[Any]) -> tuple[Any, ...]:
        score = fixed.scale, fixed.softcap, None, *fixed.backward_score
        return p[0], (p[1], *dq_strides), (p[2], p[3], p[4], p[5], None), score, *sizes

    constants = {
        "HEAD_DIM": problem.headdim,
        "HEAD_DIM_PAD": head_dim_pad(problem.headdim),
        "BLOCK_M": config.block_m,
    }
    programs = blocks[1] * nheads * fixed.batch_size
    options = {"num_warps": 4}
    rows_kinds = (*[arguments.Tensor] * 2, *[None] * 5, arguments.Sequences)
    convert_kinds = (None, arguments.Tensor, arguments.Sequences, arguments.Score)
    return (
        Launcher(attn_bwd_rows_kernel, programs, build_rows, rows_kinds, constants, options),
        Launcher(attn_bwd_convert_kernel, programs, build_convert, convert_kinds, constants, options),
    )
