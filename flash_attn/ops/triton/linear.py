"""A linear layer with its activation, and the gradient of its input: upstream's import path and meaning."""

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from flash_attn.errors import InvalidArgument
from flash_attn.ops.triton import k_activations

Function = Callable[[Tensor], Tensor]

ACTIVATIONS: dict[str, tuple[Function, Function]] = {
    "gelu": (k_activations.gelu, k_activations.gelu_grad),
    "gelu_approx": (k_activations.gelu_approx, k_activations.gelu_approx_grad),
    "squared_relu": (k_activations.squared_relu, k_activations.squared_relu_grad),
}


def triton_linear_act(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str = "id", save_act_input: bool = False
) -> Any:
    """activation(x weight^T + bias); with save_act_input the pair of it and the activation's input.

    Args:
        x: (..., in_features).
        weight: (out_features, in_features).
        bias: (out_features,).
        activation: "id", "gelu", "gelu_approx" or "squared_relu".

    Source: flash_attn 2.8.3, flash_attn/ops/triton/linear.py.
    """
    functions = _functions(activation)
    act_input = F.linear(x, weight, bias)
    out = act_input if functions is None else functions[0](act_input)
    return (out, act_input) if save_act_input else out


def triton_dgrad_act(
    grad_output: Tensor, weight: Tensor, activation: str = "id", act_input: Tensor | None = None
) -> Tensor:
    """(grad_output weight) activation'(act_input): through a linear layer and the activation before it.

    Args:
        grad_output: (..., out_features).
        weight: (out_features, in_features).
        act_input: (..., in_features); needed unless the activation is "id".

    Source: flash_attn 2.8.3, flash_attn/ops/triton/linear.py.
    """
    functions = _functions(activation)
    grad = grad_output @ weight
    if functions is None:
        return grad
    if act_input is None:
        raise InvalidArgument(f"act_input is required for activation {activation!r}, got None")
    return grad * functions[1](act_input)


def _functions(activation: str) -> tuple[Function, Function] | None:
    """(the activation, its derivative), None for the identity."""
    if activation != "id" and activation not in ACTIVATIONS:
        raise InvalidArgument(f"activation must be one of {['id', *ACTIVATIONS]}, got {activation!r}")
    return ACTIVATIONS.get(activation)
