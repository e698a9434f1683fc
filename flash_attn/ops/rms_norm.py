"""RMS normalisation after dropout and residual: upstream's import path and meaning, in plain PyTorch.

layer_norm.py with the root of the mean square in the place of mean and deviation.
"""

from typing import Any

import torch
from torch import Tensor, nn

from flash_attn.ops.layer_norm import (
    DropoutAddLayerNormFn,
    DropoutAddLayerNormParallelResidualFn,
    DropoutAddLayerNormSubsetFn,
)
from flash_attn.ops.normalization import normalise


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """RMS normalisation of the last dimension."""
    return normalise(x, weight, None, epsilon, x.dtype, is_rms_norm=True)


def dropout_add_rms_norm(
    x0: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    dropout_p: float,
    epsilon: float,
    rowscale: Tensor | None = None,
    layerscale: Tensor | None = None,
    prenorm: bool = False,
    residual_in_fp32: bool = False,
    return_dropout_mask: bool = False,
) -> Any:
    """`dropout_add_layer_norm` with the root of the mean square.

    Source: flash_attn 2.8.3, flash_attn/ops/rms_norm.py.
    """
    options = (residual_in_fp32, prenorm, True, return_dropout_mask)
    return DropoutAddLayerNormFn.apply(x0, residual, weight, bias, rowscale, layerscale, dropout_p, epsilon, *options)


def dropout_add_rms_norm_subset(
    x0: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    dropout_p: float,
    epsilon: float,
    layerscale: Tensor | None = None,
    x0_subset: Tensor | None = None,
    out_subset: Tensor | None = None,
    rowscale_const: float = 1.0,
    out_numrows: int = 0,
    prenorm: bool = False,
    residual_in_fp32: bool = False,
    return_dropout_mask: bool = False,
) -> Any:
    """`dropout_add_layer_norm_subset` with the root of the mean square.

    Source: flash_attn 2.8.3, flash_attn/ops/rms_norm.py.
    """
    subset, scale = (x0_subset, out_subset), (rowscale_const, out_numrows)
    options = (residual_in_fp32, prenorm, True, return_dropout_mask)
    return DropoutAddLayerNormSubsetFn.apply(
        x0, residual, weight, bias, layerscale, *subset, dropout_p, epsilon, *scale, *options
    )


def dropout_add_rms_norm_parallel_residual(
    x0: Tensor,
    x1: Tensor | None,
    residual: Tensor | None,
    weight0: Tensor,
    bias0: Tensor | None,
    weight1: Tensor | None,
    bias1: Tensor | None,
    dropout_p: float,
    epsilon: float,
    prenorm: bool = False,
    residual_in_fp32: bool = False,
    return_dropout_mask: bool = False,
) -> Any:
    """`dropout_add_layer_norm_parallel_residual` with the root of the mean square.

    Source: flash_attn 2.8.3, flash_attn/ops/rms_norm.py.
    """
    options = (residual_in_fp32, prenorm, True, return_dropout_mask)
    return DropoutAddLayerNormParallelResidualFn.apply(
        x0, x1, residual, weight0, bias0, weight1, bias1, dropout_p, epsilon, *options
    )


class RMSNorm(nn.Module):
    """`rms_norm` with its weight.

    Source: flash_attn 2.8.3, flash_attn/ops/rms_norm.py.
    """

    def __init__(
        self, hidden_size: int, eps: float = 1e-5, device: Any = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(hidden_size, device=device, dtype=dtype))
        self.register_parameter("bias", None)

    def reset_parameters(self) -> None:
        """A weight that changes nothing."""
        nn.init.ones_(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        """(..., hidden_size)."""
        return rms_norm(x, self.weight, self.eps)


class DropoutAddRMSNorm(nn.Module):
    """`dropout_add_rms_norm` with its weight; dropout while training.

    Source: flash_attn 2.8.3, flash_attn/ops/rms_norm.py.
    """

    def __init__(
        self,
        hidden_size: int,
        prenorm: bool = False,
        p: float = 0.0,
        eps: float = 1e-5,
        residual_in_fp32: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.prenorm = prenorm
        self.p = p
        self.eps = eps
        self.residual_in_fp32 = residual_in_fp32
        self.weight = nn.Parameter(torch.ones(hidden_size, device=device, dtype=dtype))
        self.register_parameter("bias", None)

    def reset_parameters(self) -> None:
        """A weight that changes nothing."""
        nn.init.ones_(self.weight)

    def forward(self, x0: Tensor, residual: Tensor | None = None) -> Any:
        """out, with prenorm (out, the sum that was normalised)."""
        return dropout_add_rms_norm(
            x0,
            residual,
            self.weight,
            None,
            self.p if self.training else 0.0,
            self.eps,
            prenorm=self.prenorm,
            residual_in_fp32=self.residual_in_fp32,
        )
