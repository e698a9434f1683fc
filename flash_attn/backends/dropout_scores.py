"""Launches the kernel that writes the dropout scores, which the backends on Triton share."""

import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from flash_attn.backends.base import Operands
from flash_attn.backends.fixed_arguments import (
    fixed_arguments,
    forward_constants,
    optional_tensors,
    page_numbers,
    strides,
)
from flash_attn.backends.launcher import Launcher
from flash_attn.launch.forward import ForwardConfig
from flash_attn.problem import AttentionProblem


def dropout_scores(problem: AttentionProblem, operands: Operands) -> Tensor:
    """S_dmask: exp(score - row maximum), negative where dropped; (batch, nheads, round128(seqlen_q), round128(seqlen_k))."""
    from flash_attn.kernels.algebra import arguments
    from flash_attn.kernels.portable.scores import attn_scores_kernel

    q, k = operands.q, operands.k
    batch_size, scale, softcap, _forward, backward_score, dropout, lengths = fixed_arguments(operands)
    padded = [math.ceil(length / 128) * 128 for length in (operands.max_seqlen_q, operands.max_seqlen_k)]
    scores = q.new_zeros(batch_size, q.shape[-2], *padded)
    block = 16 if q.device.type == "cpu" else 64
    q_strides, k_strides, score_strides = strides(q), strides(k), scores.stride()[:3]
    pages = page_numbers(operands)

    def build(p: Sequence[Any]) -> tuple[Any, ...]:
        return (
            (p[0], *q_strides),
            (p[1], *k_strides),
            p[2],
            *score_strides,
            (p[3], p[4], p[5], p[6], None),
            (p[9], *pages),
            (scale, softcap, p[7], *backward_score),
            (p[8], *dropout),
            *lengths,
        )

    num_programs = math.ceil(operands.max_seqlen_q / block) * batch_size * q.shape[-2]
    constants, options = forward_constants(problem, operands, ForwardConfig(block, block, 4, 1))
    kinds = (
        arguments.Tensor,
        arguments.Tensor,
        *[None] * 4,
        arguments.Sequences,
        arguments.Pages,
        arguments.Score,
        arguments.Dropout,
    )
    launch = Launcher(attn_scores_kernel, num_programs if q.numel() else 0, build, kinds, constants, options)
    launch(q, k, scores, *optional_tensors(operands), operands.block_table)
    return scores
