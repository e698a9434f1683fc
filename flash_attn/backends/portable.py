"""Launches kernels/portable: the whole feature set, on any hardware that Triton compiles for, and in its interpreter.

What a launch needs besides the tensors' contents follows from their shapes, strides and options alone; it is bound once, into
the operands' `memo`, and reused.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from flash_attn.backends import tensor_maps
from flash_attn.backends.base import Append, ForwardResult, Gradients, Operands
from flash_attn.backends.dropout_scores import dropout_scores
from flash_attn.backends.fixed_arguments import (
    empty_results,
    fixed_arguments,
    forward_constants,
    optional_tensors,
    page_numbers,
    strides,
    tile_constants,
)
from flash_attn.backends.launcher import Launcher, compile_together, launch_all
from flash_attn.hardware import Hardware
from flash_attn.hardware import of as hardware_of
from flash_attn.launch.backward import BackwardConfig, dkdv_config, dq_config, one_launch_config
from flash_attn.launch.decode import few_queries, keys_per_split
from flash_attn.launch.forward import forward_config, head_dim_pad, pipeline_stages, worth_descriptors
from flash_attn.problem import AttentionProblem

name = "portable"

OLDEST_TRITON = (3, 5)


def unsupported(problem: AttentionProblem, hardware: Hardware) -> str | None:
    """Why Triton's kernels cannot run the problem, or None."""
    reason = no_kernels(problem.dtype, hardware)
    if reason is not None:
        return reason
    if hardware.kind == "cpu" and problem.dtype == "bfloat16":
        return "Triton's interpreter multiplies bfloat16 wrongly; use float16 or float32 with it"
    if hardware.kind == "cuda" and int(hardware.arch.removeprefix("sm_")) < 80:
        return f"FlashAttention only supports Ampere GPUs or newer, this one is {hardware.arch}"
    return None


def no_kernels(dtype: str, hardware: Hardware) -> str | None:
    """Why no kernel of ours runs on operands of that dtype, whatever it computes, or None."""
    reason = triton_missing()
    if reason is not None:
        return reason
    if dtype == "float64":
        return "float64 is not a Triton kernel dtype here; the reference backend computes it"
    if hardware.kind == "cpu" and not _interpreting():
        return "Triton compiles for GPUs; on the CPU it runs only in its interpreter (TRITON_INTERPRET=1)"
    return None


@functools.cache
def triton_missing() -> str | None:
    """Why no kernel can be compiled, or None."""
    try:
        import triton
    except ImportError:
        return "Triton is not installed; `pip install triton` adds it"
    if tuple(map(int, triton.__version__.split(".")[:2])) < OLDEST_TRITON:
        needed = ".".join(map(str, OLDEST_TRITON))
        return (
            f"the kernels need Triton {needed} or newer, which torch 2.9 and newer bring; this is {triton.__version__}"
        )
    return None


def _interpreting() -> bool:
    import triton

    return bool(triton.knobs.runtime.interpret)


def forward(problem: AttentionProblem, operands: Operands, return_scores: bool = False) -> ForwardResult:
    """One launch; a second one for the dropout scores when asked for, or to merge splits where queries are few."""
    memo = {} if operands.memo is None else operands.memo
    if "shares_keys" not in memo:
        hardware = hardware_of(operands.q.device)
        memo["shares_keys"] = keys_per_split() is None and few_queries(problem, hardware)
    if memo["shares_keys"]:
        from flash_attn.backends import portable_cache

        return portable_cache.attend_few_queries(problem, operands)
    return launch_forward(problem, operands, return_scores)


def launch_forward(problem: AttentionProblem, operands: Operands, return_scores: bool = False) -> ForwardResult:
    """The forward kernel, whatever the number of queries."""
    q = operands.q
    memo = {} if operands.memo is None else operands.memo
    out, softmax_lse = empty_results(operands, memo)
    launch = memo.get("forward")
    if launch is None:
        launch = memo["forward"] = bind_forward(problem, operands, out)
    optional = optional_tensors(operands)
    tensors = (q, operands.k, operands.v, out, softmax_lse, *optional, operands.block_table, operands.sinks)
    launch(*tensors)
    return ForwardResult(out, softmax_lse, dropout_scores(problem, operands) if return_scores else None)


def backward(
    problem: AttentionProblem,
    operands: Operands,
    dout: Tensor,
    out: Tensor,
    softmax_lse: Tensor,
    gradients: Gradients,
) -> Tensor:
    """Row statistics and dq per query block, dk and dv per key block: in one launch, or one after the other."""
    delta = torch.empty_like(softmax_lse)
    if operands.q.numel() == 0:
        gradients.dk.zero_()
        gradients.dv.zero_()
        return delta
    memo = {} if operands.memo is None else operands.memo
    unbound = "backward" not in memo
    if unbound:
        memo["backward"] = bind_backward(problem, operands, dout, out, gradients)
    launchers, q, k, v = memo["backward"], operands.q, operands.k, operands.v
    lse_log2 = torch.empty_like(softmax_lse) if len(launchers) > 1 else None
    optional = optional_tensors(operands)
    tensors = q, k, v, out, dout, *gradients, softmax_lse, delta, lse_log2, *optional, operands.dlse
    if unbound and len(launchers) > 1:
        compile_together((name, problem, q.device), lambda: launch_all(launchers, *tensors))
    launch_all(launchers, *tensors)
    return delta


def attend_cache(
    problem: AttentionProblem, operands: Operands, append: Append | None, num_splits: int
) -> ForwardResult:
    """The new tokens into the caches, then attention over them: one launch for each, and one to merge splits."""
    from flash_attn.backends import portable_cache

    return portable_cache.attend_cache(problem, operands, append, num_splits)


def bind_forward(problem: AttentionProblem, operands: Operands, out: Tensor) -> Launcher:
    """The forward launch for tensors like these."""
    from flash_attn.kernels.algebra import arguments
    from flash_attn.kernels.portable.forward import attn_fwd_kernel

    q, k, v = operands.q, operands.k, operands.v
    hardware = hardware_of(q.device)
    tma = _descriptors_fit(problem, hardware, k, v)
    config = forward_config(problem, hardware, tma)
    config = config._replace(num_stages=pipeline_stages(config.num_stages, operands.block_table is not None))
    tma = tma and config.tma
    k_map, v_map = (tensor_maps.portable(x, config.block_n, head_dim_pad(problem.headdim)) for x in (k, v))
    batch_size, scale, softcap, forward_score, _backward, dropout, lengths = fixed_arguments(operands)
    q_strides, k_strides, v_strides, out_strides = map(strides, (q, k, v, out))
    pages, appended = page_numbers(operands), operands.appended or None

    def build(p: Sequence[Any]) -> tuple[Any, ...]:
        return (
            (p[0], *q_strides),
            (p[1], *k_strides),
            (p[2], *v_strides),
            (p[3], *out_strides),
            p[4],
            k_map(p[1]) if tma else None,
            v_map(p[2]) if tma else None,
            (p[5], p[6], p[7], p[8], appended),
            (p[11], *pages),
            (scale, softcap, p[9], *forward_score, p[12]),
            (p[10], *dropout),
            *lengths,
        )

    num_programs = math.ceil(operands.max_seqlen_q / config.block_m) * batch_size * q.shape[-2]
    kinds = (
        *[arguments.Tensor] * 4,
        *[None] * 3,
        arguments.Sequences,
        arguments.Pages,
        arguments.Score,
        arguments.Dropout,
    )
    return Launcher(
        attn_fwd_kernel,
        num_programs if q.numel() else 0,
        build,
        kinds,
        *forward_constants(problem, operands, config),
    )


def bind_backward(
    problem: AttentionProblem,
    operands: Operands,
    dout: Tensor,
    out: Tensor,
    gradients: Gradients,
) -> tuple[Launcher, ...]:
    """The launches of a backward, for tensors like these.

    Each takes q, k, v, out, dout, dq, dk, dv, softmax_lse, delta, lse_log2 and the optional tensors, so that their pointers are
    read once. A single one needs no lse_log2.
    """
    config = one_launch_config(problem, hardware_of(operands.q.device))
    if config is not None:
        return (bind_one_launch(problem, operands, dout, out, gradients, config),)
    launch_dq = bind_dq(problem, operands, dout, out, gradients.dq)
    return launch_dq, *bind_dkdv(problem, operands, dout, gradients.dk, gradients.dv)


def bind_one_launch(
    problem: AttentionProblem,
    operands: Operands,
    dout: Tensor,
    out: Tensor,
    gradients: Gradients,
    config: BackwardConfig,
) -> Launcher:
    """The launch that writes delta, dq, dk and dv, for tensors like these."""
    from flash_attn.kernels.algebra import arguments
    from flash_attn.kernels.portable.backward import attn_bwd_kernel

    q, k, v = operands.q, operands.k, operands.v
    batch_size, scale, softcap, _forward, backward_score, dropout, lengths = fixed_arguments(operands)
    q_strides, k_strides, v_strides, out_strides, dout_strides = map(strides, (q, k, v, out, dout))
    dq_strides, dk_strides, dv_strides = map(strides, gradients)
    num_query_tiles = math.ceil(operands.max_seqlen_q / config.block_m) * batch_size * q.shape[-2]
    num_key_tiles = math.ceil(operands.max_seqlen_k / config.block_n) * batch_size * k.shape[-2] if k.numel() else 0

    def build(p: Sequence[Any]) -> tuple[Any, ...]:
        return (
            (p[0], *q_strides),
            (p[1], *k_strides),
            (p[2], *v_strides),
            (p[3], *out_strides),
            (p[4], *dout_strides),
            (p[5], *dq_strides),
            (p[6], *dk_strides),
            (p[7], *dv_strides),
            p[8],
            p[17] if problem.lse_gradient else None,
            p[9],
            (p[11], p[12], p[13], p[14], None),
            (scale, softcap, p[15], *backward_score),
            (p[16], *dropout),
            *lengths,
            num_key_tiles,
        )

    kinds = (*[arguments.Tensor] * 8, *[None] * 3, arguments.Sequences, arguments.Score, arguments.Dropout)
    num_programs = num_key_tiles + num_query_tiles
    return Launcher(attn_bwd_kernel, num_programs, build, kinds, *tile_constants(problem, config))


def bind_dq(problem: AttentionProblem, operands: Operands, dout: Tensor, out: Tensor, dq: Tensor) -> Launcher:
    """The launch that writes delta, lse_log2 and dq, for tensors like these."""
    from flash_attn.kernels.algebra import arguments
    from flash_attn.kernels.portable.backward import attn_bwd_dq_kernel

    q, k, v = operands.q, operands.k, operands.v
    hardware = hardware_of(q.device)
    tma = _descriptors_fit(problem, hardware, k, v)
    config = dq_config(problem, hardware, tma)
    tma = tma and config.tma
    k_map, v_map = (tensor_maps.portable(x, config.block_n, head_dim_pad(problem.headdim)) for x in (k, v))
    batch_size, scale, softcap, _forward, backward_score, dropout, lengths = fixed_arguments(operands)
    q_strides, k_strides, v_strides, out_strides, dout_strides, dq_strides = map(strides, (q, k, v, out, dout, dq))

    def build(p: Sequence[Any]) -> tuple[Any, ...]:
        return (
            (p[0], *q_strides),
            (p[1], *k_strides),
            (p[2], *v_strides),
            (p[3], *out_strides),
            (p[4], *dout_strides),
            (p[5], *dq_strides),
            p[8],
            p[17] if problem.lse_gradient else None,
            p[9],
            p[10],
            k_map(p[1]) if tma else None,
            v_map(p[2]) if tma else None,
            (p[11], p[12], p[13], p[14], None),
            (scale, softcap, p[15], *backward_score),
            (p[16], *dropout),
            *lengths,
        )

    num_programs = math.ceil(operands.max_seqlen_q / config.block_m) * batch_size * q.shape[-2]
    kinds = (*[arguments.Tensor] * 6, *[None] * 6, arguments.Sequences, arguments.Score, arguments.Dropout)
    return Launcher(
        attn_bwd_dq_kernel, num_programs if q.numel() else 0, build, kinds, *tile_constants(problem, config)
    )


def bind_dkdv(
    problem: AttentionProblem, operands: Operands, dout: Tensor, dk: Tensor, dv: Tensor
) -> tuple[Launcher, ...]:
    """The launch that writes dk and dv, or the two that write one each, for tensors like these."""
    from flash_attn.kernels.algebra import arguments
    from flash_attn.kernels.portable.backward import attn_bwd_dkdv_kernel

    q, k, v = operands.q, operands.k, operands.v
    hardware = hardware_of(q.device)
    fit = _descriptors_fit(problem, hardware, q, dout)
    batch_size, scale, softcap, _forward, backward_score, dropout, lengths = fixed_arguments(operands)
    q_strides, k_strides, v_strides, dout_strides, dk_strides, dv_strides = map(strides, (q, k, v, dout, dk, dv))

    def launcher(config: BackwardConfig, with_dk: bool, with_dv: bool) -> Launcher:
        tma = fit and config.tma
        q_map, dout_map = (tensor_maps.portable(x, config.block_m, head_dim_pad(problem.headdim)) for x in (q, dout))

        def build(p: Sequence[Any]) -> tuple[Any, ...]:
            return (
                (p[0], *q_strides),
                (p[1], *k_strides),
                (p[2], *v_strides),
                (p[4], *dout_strides),
                (p[6], *dk_strides) if with_dk else None,
                (p[7], *dv_strides) if with_dv else None,
                p[9],
                p[10],
                q_map(p[0]) if tma else None,
                dout_map(p[4]) if tma else None,
                (p[11], p[12], p[13], p[14], None),
                (scale, softcap, p[15], *backward_score),
                (p[16], *dropout),
                *lengths,
            )

        num_programs = math.ceil(operands.max_seqlen_k / config.block_n) * batch_size * k.shape[-2]
        kinds = (*[arguments.Tensor] * 6, *[None] * 4, arguments.Sequences, arguments.Score, arguments.Dropout)
        return Launcher(
            attn_bwd_dkdv_kernel, num_programs if k.numel() else 0, build, kinds, *tile_constants(problem, config)
        )

    configs = dkdv_config(problem, hardware, fit)
    if isinstance(configs, BackwardConfig):
        return (launcher(configs, True, True),)
    dk_config, dv_config = configs
    return launcher(dk_config, True, False), launcher(dv_config, False, True)


def _descriptors_fit(problem: AttentionProblem, hardware: Hardware, *looped: Tensor) -> bool:
    """Whether tensor descriptors pay for the problem and can read these operands."""
    return worth_descriptors(problem, hardware) and all(x.numel() > 0 and tensor_maps.regular(x) for x in looped)
