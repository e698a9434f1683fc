"""The cross entropy loss as a module: upstream's import path and meaning."""

from typing import Any

import torch
from torch import Tensor

from flash_attn.errors import InvalidArgument
from flash_attn.ops.triton.cross_entropy import cross_entropy_loss

REDUCTIONS = ("mean", "none", "sum")


class CrossEntropyLoss(torch.nn.Module):
    """`cross_entropy_loss` with a reduction; the mean is over the labels that are not ignored.

    Args:
        reduction: "mean", "sum" or "none".
        return_z_loss: return (loss, z_loss), both reduced.

    The other arguments are those of `flash_attn.ops.triton.cross_entropy.cross_entropy_loss`.

    Source: flash_attn 2.8.3, flash_attn/losses/cross_entropy.py.
    """

    def __init__(
        self,
        ignore_index: int = -100,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
        logit_scale: float = 1.0,
        lse_square_scale: float = 0.0,
        inplace_backward: bool = False,
        process_group: Any = None,
        return_z_loss: bool = False,
    ) -> None:
        super().__init__()
        if reduction not in REDUCTIONS:
            raise InvalidArgument(f"reduction must be one of {REDUCTIONS}, got {reduction!r}")
        self.ignore_index = ignore_index
        self.reduction = reduction
        self.label_smoothing = label_smoothing
        self.logit_scale = logit_scale
        self.lse_square_scale = lse_square_scale
        self.inplace_backward = inplace_backward
        self.process_group = process_group
        self.return_z_loss = return_z_loss

    def forward(self, input: Tensor, target: Tensor, precomputed_lse: Tensor | None = None) -> Any:
        """The reduced loss, or (loss, z_loss).

        Args:
            input: (batch, vocab_size).
            target: (batch,).
            precomputed_lse: (batch,), logsumexp of input.
        """
        losses = cross_entropy_loss(
            input,
            target,
            precomputed_lse=precomputed_lse,
            label_smoothing=self.label_smoothing,
            logit_scale=self.logit_scale,
            lse_square_scale=self.lse_square_scale,
            ignore_index=self.ignore_index,
            inplace_backward=self.inplace_backward,
            process_group=self.process_group,
        )
        loss, z_loss = (self._reduce(x, target) for x in losses)
        return (loss, z_loss) if self.return_z_loss else loss

    def _reduce(self, losses: Tensor, target: Tensor) -> Tensor:
        if self.reduction == "mean":
            return losses.sum() / (target != self.ignore_index).sum()
        return losses.sum() if self.reduction == "sum" else losses
