"""Cross entropy from logits, in plain PyTorch: upstream's import path and meaning, on any device.

With x = logit_scale * logits over C classes, s = label_smoothing and target y,

    loss = lse - (1 - s) x_y - s / C sum(x) + z,    z = lse_square_scale * lse^2,    lse = log(sum(exp(x)))
    dx   = (1 + 2 lse_square_scale lse) exp(x - lse) - (1 - s) [c = y] - s / C

Rows are taken a few at a time, so that no copy of all logits in a wider dtype ever exists: kept for the backward are the
logits themselves and one lse per row.
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from flash_attn.errors import InvalidArgument
from flash_attn.utils.distributed import all_gather_raw, all_reduce_raw

ELEMENTS_AT_A_TIME = 1 << 24  # 64 MiB in fp32


class CrossEntropyLoss(torch.autograd.Function):
    """(losses, z_losses) of `cross_entropy_loss`; z_losses carries no gradient."""

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        labels: Tensor,
        precomputed_lse: Tensor | None = None,
        smoothing: float = 0.0,
        logit_scale: float = 1.0,
        lse_square_scale: float = 0.0,
        ignore_index: int = -100,
        inplace_backward: bool = False,
        process_group: Any = None,
    ) -> tuple[Tensor, Tensor]:
        _check(logits, labels, precomputed_lse)
        rank = 0 if process_group is None else dist.get_rank(process_group)
        world_size = 1 if process_group is None else dist.get_world_size(process_group)
        ctx.total_classes = world_size * logits.shape[1]
        ctx.smoothing, ctx.logit_scale, ctx.lse_square_scale = smoothing, logit_scale, lse_square_scale
        ctx.inplace_backward = inplace_backward
        # A label that names no class counts as ignored, so that nothing is read outside the row.
        counted = (labels != ignore_index) & (labels >= 0) & (labels < ctx.total_classes)
        local_labels = torch.where(counted, labels, 0).long() - rank * logits.shape[1]
        known_lse = precomputed_lse if logit_scale == 1.0 and smoothing == 0.0 else None

        lse, target = _scores(logits, local_labels, known_lse, smoothing, logit_scale, ctx.total_classes)
        if world_size > 1:
            lse, target = _over_vocabulary(lse, target, process_group)
        z_losses = lse_square_scale * lse.square() if lse_square_scale != 0.0 else torch.zeros_like(lse)
        losses = torch.where(counted, lse - target + z_losses, 0.0)
        z_losses = torch.where(counted, z_losses, 0.0)
        ctx.save_for_backward(logits, lse, local_labels, counted)
        ctx.mark_non_differentiable(z_losses)
        return losses, z_losses

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_losses: Tensor, _grad_z_losses: Tensor) -> tuple[Tensor | None, ...]:
        logits, lse, labels, counted = ctx.saved_tensors
        dlogits = logits if ctx.inplace_backward else torch.empty_like(logits)
        smoothing = ctx.smoothing
        weight = 1.0 + 2.0 * ctx.lse_square_scale * lse
        outer = grad_losses.to(lse.dtype) * ctx.logit_scale
        for rows in _row_chunks(logits):
            dx = _scaled(logits[rows], ctx.logit_scale, lse.dtype)
            dx = dx.sub(lse[rows, None]).exp_().mul_(weight[rows, None])
            if smoothing > 0.0:
                dx.sub_(smoothing / ctx.total_classes)
            here, column = _columns(labels[rows], logits.shape[1])
            dx.scatter_add_(1, column, here.to(dx.dtype) * (smoothing - 1.0))
            dx.mul_(outer[rows, None]).masked_fill_(~counted[rows, None], 0.0)
            dlogits[rows] = dx.to(dlogits.dtype)
        return dlogits, *[None] * 8


def cross_entropy_loss(
    logits: Tensor,
    labels: Tensor,
    precomputed_lse: Tensor | None = None,
    label_smoothing: float = 0.0,
    logit_scale: float = 1.0,
    lse_square_scale: float = 0.0,
    ignore_index: int = -100,
    inplace_backward: bool = False,
    process_group: Any = None,
) -> tuple[Tensor, Tensor]:
    """Cross entropy of every row, and the part of it that lse_square_scale adds.

    Args:
        logits: (batch, vocab_size) of a floating dtype; with a process_group this rank's part of the vocabulary.
        labels: (batch,), int64 or int32, classes of the whole vocabulary; one that names no class counts as ignored.
        precomputed_lse: (batch,) fp32, logsumexp of the (local) logits; taken where label_smoothing is 0 and logit_scale
            is 1, computed anew otherwise.
        label_smoothing: probability spread evenly over all classes.
        logit_scale: multiplies the logits first.
        lse_square_scale: adds lse_square_scale * lse^2 to a loss (z-loss).
        ignore_index: the loss of a row with this label is 0, and so is its gradient.
        inplace_backward: the backward writes the gradient into logits.
        process_group: the vocabulary is split evenly over its ranks, in order; every rank gets the whole loss.

    Returns:
        losses: (batch,), fp32 (fp64 for fp64 logits). z_losses: like losses, without gradient.

    Raises:
        InvalidArgument: shapes or devices disagree; the message names both.

    Source: flash_attn 2.8.3, flash_attn/ops/triton/cross_entropy.py.
    """
    return CrossEntropyLoss.apply(
        logits,
        labels,
        precomputed_lse,
        label_smoothing,
        logit_scale,
        lse_square_scale,
        ignore_index,
        inplace_backward,
        process_group,
    )


def _scores(
    logits: Tensor, labels: Tensor, known_lse: Tensor | None, smoothing: float, logit_scale: float, classes: int
) -> tuple[Tensor, Tensor]:
    """(logsumexp, (1 - s) x_y + s / C sum(x)) of every row of the local logits."""
    dtype = torch.promote_types(logits.dtype, torch.float32)
    lse = torch.empty(logits.shape[0], dtype=dtype, device=logits.device)
    target = torch.empty_like(lse)
    for rows in _row_chunks(logits):
        here, column = _columns(labels[rows], logits.shape[1])
        picked = _scaled(logits[rows].gather(1, column), logit_scale, dtype)
        target[rows] = torch.where(here, (1.0 - smoothing) * picked, 0.0).squeeze(1)
        if known_lse is not None:
            continue
        x = _scaled(logits[rows], logit_scale, dtype)
        lse[rows] = x.logsumexp(dim=1)
        if smoothing > 0.0:
            target[rows] += x.sum(dim=1) * (smoothing / classes)
    return lse if known_lse is None else known_lse.to(dtype), target


def _over_vocabulary(lse: Tensor, target: Tensor, process_group: Any) -> tuple[Tensor, Tensor]:
    """The whole vocabulary's (lse, target) from every rank's."""
    parts, _ = all_gather_raw(lse[None], process_group)
    return parts.logsumexp(dim=0), all_reduce_raw(target, process_group)[0]


def _scaled(logits: Tensor, logit_scale: float, dtype: torch.dtype) -> Tensor:
    x = logits.to(dtype)
    return x if logit_scale == 1.0 else x * logit_scale


def _columns(labels: Tensor, classes: int) -> tuple[Tensor, Tensor]:
    """(whether the label is one of the local columns, the column or 0), both (rows, 1)."""
    here = ((labels >= 0) & (labels < classes)).unsqueeze(1)
    return here, torch.where(here, labels.unsqueeze(1), 0)


def _row_chunks(logits: Tensor) -> Iterator[slice]:
    rows = max(1, ELEMENTS_AT_A_TIME // max(1, logits.shape[1]))
    return (slice(start, start + rows) for start in range(0, logits.shape[0], rows))


def _check(logits: Tensor, labels: Tensor, precomputed_lse: Tensor | None) -> None:
    if logits.dim() != 2 or not logits.is_floating_point():
        raise InvalidArgument(
            f"logits must be floating with shape (batch, vocab_size), got {logits.dtype} {tuple(logits.shape)}"
        )
    for name, x in (("labels", labels), ("precomputed_lse", precomputed_lse)):
        if x is None:
            continue
        if x.shape != logits.shape[:1]:
            raise InvalidArgument(f"{name} must have shape (batch,) = ({logits.shape[0]},), got {tuple(x.shape)}")
        if x.device != logits.device:
            raise InvalidArgument(f"{name} must be on the device of logits, {logits.device}, not {x.device}")
    if labels.dtype not in (torch.int64, torch.int32):
        raise InvalidArgument(f"labels must have dtype int64 or int32, got {labels.dtype}")
