"""An MLP with the squared ReLU: upstream's import path and meaning."""

from typing import Any

import torch
from torch import Tensor

from flash_attn.errors import UnsupportedProblem
from flash_attn.ops.fused_dense import FusedMLP, fused_mlp_func


def fused_dense_sqrelu_dense_function(
    x: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor, bias2: Tensor, checkpoint_lvl: int = 0
) -> Tensor:
    """relu(x weight1^T + bias1)^2 weight2^T + bias2; checkpoint_lvl as in `fused_mlp_func`."""
    return fused_mlp_func(x, weight1, weight2, bias1, bias2, activation="sqrelu", checkpoint_lvl=checkpoint_lvl)


class FusedDenseSqreluDenseFunc:
    """`fused_dense_sqrelu_dense_function` under upstream's name of its autograd function; autograd follows the parts instead.

    Source: flash_attn 2.8.3, flash_attn/ops/triton/mlp.py.
    """

    apply = staticmethod(fused_dense_sqrelu_dense_function)


class FusedDenseSqreluDense(FusedMLP):
    """`fused_dense_sqrelu_dense_function` with its weights.

    Raises:
        UnsupportedProblem: a bias is left out, as upstream.

    Source: flash_attn 2.8.3, flash_attn/ops/triton/mlp.py.
    """

    def __init__(
        self,
        in_features: int,
        hidden_features: int | None = None,
        out_features: int | None = None,
        bias1: bool = True,
        bias2: bool = True,
        checkpoint_lvl: int = 0,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if not (bias1 and bias2):
            raise UnsupportedProblem(f"FusedDenseSqreluDense needs both biases, got {bias1} and {bias2}")
        super().__init__(
            in_features,
            hidden_features,
            out_features,
            activation="sqrelu",
            checkpoint_lvl=checkpoint_lvl,
            device=device,
            dtype=dtype,
        )
