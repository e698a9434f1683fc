"""Activations and their derivatives, in plain PyTorch: upstream's import path and meaning.

gelu is the tanh approximation, 0.5 x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))).
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def bias_gelu(y: Tensor, bias: Tensor) -> Tensor:
    """gelu(y + bias), like y."""
    return F.gelu(bias + y, approximate="tanh").to(y.dtype)


def bias_gelu_back(g: Tensor, y: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients (of y, of bias) of `bias_gelu`, y (batch, features) and bias (features,)."""
    grad = torch.ops.aten.gelu_backward(g, (bias + y).to(g.dtype), approximate="tanh")
    return grad.to(y.dtype), grad.sum(dim=0, dtype=bias.dtype)


def gelu_fwd(x: Tensor) -> Tensor:
    """gelu(x)."""
    return F.gelu(x, approximate="tanh")


def gelu_bwd(g: Tensor, x: Tensor) -> Tensor:
    """g gelu'(x), like x."""
    return torch.ops.aten.gelu_backward(g, x.to(g.dtype), approximate="tanh").to(x.dtype)


def relu_bwd(g: Tensor, x: Tensor) -> Tensor:
    """g where x >= 0, like x."""
    return torch.where(x >= 0, g, 0.0).to(x.dtype)


def sqrelu_fwd(x: Tensor) -> Tensor:
    """relu(x)^2."""
    return F.relu(x).square()


def sqrelu_bwd(g: Tensor, x: Tensor) -> Tensor:
    """2 g relu(x), like x."""
    return (2.0 * g * F.relu(x)).to(x.dtype)


def swiglu_fwd(x: Tensor, y: Tensor) -> Tensor:
    """silu(x) y in fp32, rounded once."""
    wide = torch.promote_types(x.dtype, torch.float32)
    return (F.silu(x.to(wide)) * y).to(x.dtype)


def swiglu_bwd(x: Tensor, y: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients (of x, of y) of `swiglu_fwd`."""
    wide = torch.promote_types(x.dtype, torch.float32)
    sigmoid = torch.sigmoid(x.to(wide))
    dx = sigmoid * (1.0 + x * (1.0 - sigmoid)) * g * y
    return dx.to(x.dtype), (x * sigmoid * g).to(y.dtype)


class GeLUFunction(torch.autograd.Function):
    """`bias_gelu` that keeps its inputs alone for the backward."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(input, bias)
        return bias_gelu(input, bias)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, Tensor]:
        return bias_gelu_back(grad_output, *ctx.saved_tensors)


class FastGeLUFunction(torch.autograd.Function):
    """`gelu_fwd` that keeps its input alone for the backward."""

    @staticmethod
    def forward(ctx: Any, input: Tensor) -> Tensor:
        ctx.save_for_backward(input)
        return gelu_fwd(input)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> Tensor:
        return gelu_bwd(grad_output, *ctx.saved_tensors)


class SwiGLUFunction(torch.autograd.Function):
    """`swiglu_fwd` that keeps its inputs alone for the backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor) -> Tensor:
        ctx.save_for_backward(x, y)
        return swiglu_fwd(x, y)

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor, Tensor]:
        x, y = ctx.saved_tensors
        return swiglu_bwd(x, y, dout)


bias_gelu_impl = GeLUFunction.apply
fast_gelu_impl = FastGeLUFunction.apply
swiglu = SwiGLUFunction.apply
