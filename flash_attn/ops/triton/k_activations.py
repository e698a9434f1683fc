"""Activations and derivatives under the names of upstream's Triton functions; here they take tensors, not blocks."""

import torch
import torch.nn.functional as F
from torch import Tensor

from flash_attn.ops.activations import gelu_bwd, gelu_fwd

LEAK = 0.01


def tanh(x: Tensor) -> Tensor:
    """tanh(x)."""
    return torch.tanh(x)


def cosh(x: Tensor) -> Tensor:
    """cosh(x)."""
    return torch.cosh(x)


def relu(x: Tensor) -> Tensor:
    """max(x, 0)."""
    return F.relu(x)


def relu_grad(x: Tensor) -> Tensor:
    """1 where x >= 0, else 0."""
    return (x >= 0).to(x.dtype)


def squared_relu(x: Tensor) -> Tensor:
    """max(x, 0)^2."""
    return F.relu(x).square()


def squared_relu_grad(x: Tensor) -> Tensor:
    """2 max(x, 0)."""
    return 2.0 * F.relu(x)


def leaky_relu(x: Tensor) -> Tensor:
    """x where x >= 0, else 0.01 x."""
    return F.leaky_relu(x, LEAK)


def leaky_relu_grad(x: Tensor) -> Tensor:
    """1 where x >= 0, else 0.01."""
    return torch.where(x >= 0, 1.0, LEAK).to(x.dtype)


def gelu(x: Tensor) -> Tensor:
    """x Phi(x), Phi the normal distribution function."""
    return F.gelu(x)


def gelu_grad(x: Tensor) -> Tensor:
    """Derivative of `gelu`."""
    return torch.ops.aten.gelu_backward(torch.ones_like(x), x)


def gelu_approx(x: Tensor) -> Tensor:
    """`gelu` by its tanh approximation."""
    return gelu_fwd(x)


def gelu_approx_grad(x: Tensor) -> Tensor:
    """Derivative of `gelu_approx`."""
    return gelu_bwd(torch.ones_like(x), x)
