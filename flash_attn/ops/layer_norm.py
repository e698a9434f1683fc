"""Layer normalisation after dropout and residual: upstream's import path and meaning, in plain PyTorch.

    z = dropout(rowscale * x0) * layerscale + residual,    out = layer_norm(z) * weight + bias

rms_norm.py is the same with the root of the mean square.
"""

from typing import Any

import torch
from torch import Tensor, nn

from flash_attn.errors import InvalidArgument
from flash_attn.ops.normalization import add_dropped, normalise


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, epsilon: float) -> Tensor:
    """Layer normalisation of the last dimension."""
    return normalise(x, weight, bias, epsilon, x.dtype)


def dropout_add_layer_norm(
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
    """out, with more asked for the tuple (out, z if prenorm, the mask if return_dropout_mask).

    Args:
        x0: (..., hidden).
        residual: like x0, of any floating dtype, which is also the dtype of the returned z.
        rowscale: (...).
        layerscale: (hidden,).
        residual_in_fp32: z is returned in fp32 where there is no residual.
        return_dropout_mask: (..., hidden), bool, True where kept; all True without dropout.

    Source: flash_attn 2.8.3, flash_attn/ops/layer_norm.py.
    """
    scales = (rowscale, layerscale)
    return add_norm(
        x0, residual, weight, bias, dropout_p, epsilon, scales, prenorm, residual_in_fp32, return_dropout_mask, False
    )


def dropout_add_layer_norm_parallel_residual(
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
    """Two normalisations of z = dropout(x0) + dropout(x1) + residual.

    Returns:
        (out0, out1 or None without weight1, z if prenorm, both masks if return_dropout_mask).

    Source: flash_attn 2.8.3, flash_attn/ops/layer_norm.py.
    """
    weights = (weight0, bias0, weight1, bias1)
    return add_two_norms(
        x0, x1, residual, weights, dropout_p, epsilon, prenorm, residual_in_fp32, return_dropout_mask, False
    )


class DropoutAddLayerNorm(nn.Module):
    """`dropout_add_layer_norm` with its weights; dropout while training.

    Source: flash_attn 2.8.3, flash_attn/ops/layer_norm.py.
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
        self.bias = nn.Parameter(torch.zeros(hidden_size, device=device, dtype=dtype))

    def reset_parameters(self) -> None:
        """Weights that change nothing."""
        nn.init.ones_(self.weight)
        nn.init.zeros_(self.bias)

    def forward(self, x0: Tensor, residual: Tensor | None = None) -> Any:
        """out, with prenorm (out, z)."""
        return dropout_add_layer_norm(
            x0,
            residual,
            self.weight,
            self.bias,
            self.p if self.training else 0.0,
            self.eps,
            prenorm=self.prenorm,
            residual_in_fp32=self.residual_in_fp32,
        )


def add_norm(
    x0: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    dropout_p: float,
    epsilon: float,
    scales: tuple[Tensor | None, Tensor | None],
    prenorm: bool,
    residual_in_fp32: bool,
    return_dropout_mask: bool,
    is_rms_norm: bool,
) -> Any:
    """`dropout_add_layer_norm`, or its sibling with the root of the mean square."""
    _check(x0, residual, None, dropout_p)
    mix = add_dropped(x0, residual, None, scales[0], dropout_p, scales[1])
    results = [normalise(mix.z, weight, bias, epsilon, x0.dtype, is_rms_norm=is_rms_norm)]
    if prenorm:
        results.append(mix.z.to(_residual_dtype(x0, residual, residual_in_fp32)))
    if return_dropout_mask:
        results.append(_mask(mix.mask, x0))
    return results[0] if len(results) == 1 else tuple(results)


def add_two_norms(
    x0: Tensor,
    x1: Tensor | None,
    residual: Tensor | None,
    weights: tuple[Tensor, Tensor | None, Tensor | None, Tensor | None],
    dropout_p: float,
    epsilon: float,
    prenorm: bool,
    residual_in_fp32: bool,
    return_dropout_mask: bool,
    is_rms_norm: bool,
) -> Any:
    """`dropout_add_layer_norm_parallel_residual`, or its sibling with the root of the mean square."""
    _check(x0, residual, x1, dropout_p)
    weight0, bias0, weight1, bias1 = weights
    mix = add_dropped(x0, residual, x1, None, dropout_p)
    results: list[Tensor | None] = [normalise(mix.z, weight0, bias0, epsilon, x0.dtype, is_rms_norm=is_rms_norm)]
    if weight1 is None:
        results.append(None)
    else:
        results.append(normalise(mix.z, weight1, bias1, epsilon, x0.dtype, is_rms_norm=is_rms_norm))
    if prenorm:
        results.append(mix.z.to(_residual_dtype(x0, residual, residual_in_fp32)))
    if return_dropout_mask:
        results += [_mask(mix.mask, x0), None if x1 is None else _mask(mix.mask1, x1)]
    return tuple(results)


def _residual_dtype(x0: Tensor, residual: Tensor | None, residual_in_fp32: bool) -> torch.dtype:
    if residual is not None:
        return residual.dtype
    return torch.float32 if residual_in_fp32 else x0.dtype


def _mask(mask: Tensor | None, x: Tensor) -> Tensor:
    return torch.ones(x.shape, dtype=torch.bool, device=x.device) if mask is None else mask


def _check(x0: Tensor, residual: Tensor | None, x1: Tensor | None, dropout_p: float) -> None:
    for name, each in (("residual", residual), ("x1", x1)):
        if each is not None and each.shape != x0.shape:
            raise InvalidArgument(f"{name} must have the shape of x0, {tuple(x0.shape)}, got {tuple(each.shape)}")
    if not 0.0 <= dropout_p < 1.0:
        raise InvalidArgument(f"dropout_p must be at least 0 and below 1, got {dropout_p}")
