"""The arithmetic that all fused normalisations share, in fp32 whatever the dtypes of the operands."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Mix(NamedTuple):
    """What is normalised, and the dropout masks (True = kept) that went into it."""

    z: Tensor
    mask: Tensor | None
    mask1: Tensor | None


def add_dropped(
    x: Tensor,
    residual: Tensor | None,
    x1: Tensor | None,
    rowscale: Tensor | None,
    dropout_p: float,
    layerscale: Tensor | None = None,
) -> Mix:
    """dropout(rowscale * x) * layerscale + dropout(x1) * layerscale + residual, in fp32 unless it is x itself."""
    mask, mask1 = (_keep(each, dropout_p) for each in (x, x1))
    if (residual, x1, rowscale, layerscale, mask) == (None,) * 5:
        return Mix(x, None, None)
    z = _wide(x)
    if rowscale is not None:
        z = z * _wide(rowscale).unsqueeze(-1)
    z = _drop(z, mask, dropout_p)
    if x1 is not None:
        z = z + _drop(_wide(x1), mask1, dropout_p)
    if layerscale is not None:
        z = z * _wide(layerscale)
    return Mix(z if residual is None else z + residual, mask, mask1)


def normalise(
    z: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    dtype: torch.dtype,
    zero_centered_weight: bool = False,
    is_rms_norm: bool = False,
) -> Tensor:
    """normalise(z) * weight + bias, rounded to dtype once; PyTorch's fused kernels keep their sums in fp32."""
    if zero_centered_weight:
        weight = 1.0 + _wide(weight)
    if not z.dtype == weight.dtype == dtype or (bias is not None and bias.dtype != dtype):
        z, weight, bias = _wide(z), _wide(weight), None if bias is None else _wide(bias)
        wide = torch.promote_types(z.dtype, weight.dtype)
        z, weight, bias = z.to(wide), weight.to(wide), None if bias is None else bias.to(wide)
    if not is_rms_norm:
        return F.layer_norm(z, z.shape[-1:], weight, bias, eps).to(dtype)
    out = F.rms_norm(z, z.shape[-1:], weight, eps)
    return (out if bias is None else out + bias).to(dtype)


def _keep(x: Tensor | None, dropout_p: float) -> Tensor | None:
    if x is None or dropout_p == 0.0:
        return None
    return torch.empty(x.shape, dtype=torch.bool, device=x.device).bernoulli_(1.0 - dropout_p)


def _drop(x: Tensor, mask: Tensor | None, dropout_p: float) -> Tensor:
    return x if mask is None else x.masked_fill(~mask, 0.0) / (1.0 - dropout_p)


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
