"""Dropout, residual and layer or RMS normalisation in one call, in plain PyTorch: upstream's import path and meaning.

    z   = dropout(rowscale * x) + dropout(x1) + residual
    out = normalise(z) * weight + bias,    out1 = normalise(z) * weight1 + bias1

z is formed in fp32 and normalised before it is rounded to the dtype in which it is returned as the next residual.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from flash_attn.errors import InvalidArgument
from flash_attn.ops.normalization import add_dropped, normalise


def layer_norm_fn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None = None,
    x1: Tensor | None = None,
    weight1: Tensor | None = None,
    bias1: Tensor | None = None,
    eps: float = 1e-6,
    dropout_p: float = 0.0,
    rowscale: Tensor | None = None,
    prenorm: bool = False,
    residual_in_fp32: bool = False,
    zero_centered_weight: bool = False,
    is_rms_norm: bool = False,
    return_dropout_mask: bool = False,
    out_dtype: torch.dtype | None = None,
    out: Tensor | None = None,
    residual_out: Tensor | None = None,
) -> Any:
    """Normalise dropout(rowscale * x) + dropout(x1) + residual over the last dimension, differentiably.

    Args:
        x: (..., hidden).
        weight, bias: (hidden,).
        residual: like x, of any floating dtype, which is also the dtype of the returned sum.
        x1: like x; excludes rowscale.
        weight1, bias1: (hidden,); a second result from the same normalised values.
        dropout_p: probability that an element of x or x1 is dropped, at least 0 and below 1.
        rowscale: (...), multiplies every row of x, before dropout.
        prenorm: also return the sum that was normalised.
        residual_in_fp32: return it in fp32 where there is no residual; otherwise in the dtype of x.
        zero_centered_weight: the weights stand for 1 + weight.
        is_rms_norm: divide by the root of the mean square; no mean is subtracted.
        return_dropout_mask: also return both masks, bool like x, True where kept; None where nothing was dropped.
        out_dtype: of out and out1; default that of x.
        out, residual_out: like x; written in place.

    Returns:
        out; with more asked for the tuple (out, out1 if weight1, sum if prenorm, two masks if return_dropout_mask).

    Raises:
        InvalidArgument: shapes disagree, or x1 comes with rowscale; the message names both.

    Source: flash_attn 2.8.3, flash_attn/ops/triton/layer_norm.py.
    """
    _check(x, (weight, bias, weight1, bias1), (residual, x1, out, residual_out), rowscale, x1, dropout_p)
    mix = add_dropped(x, residual, x1, rowscale, dropout_p)
    if residual is not None:
        residual_dtype = residual.dtype
    else:
        residual_dtype = torch.float32 if residual_in_fp32 else x.dtype
    dtype = _result_dtype(x, out_dtype, out)
    normed = normalise(mix.z, weight, bias, eps, dtype, zero_centered_weight, is_rms_norm)
    results = [normed if out is None else out.copy_(normed)]
    if weight1 is not None:
        results.append(normalise(mix.z, weight1, bias1, eps, dtype, zero_centered_weight, is_rms_norm))
    if prenorm or residual_out is not None:
        z = mix.z.to(residual_dtype)
        z = z if residual_out is None else residual_out.copy_(z)
        results += [z] if prenorm else []
    if return_dropout_mask:
        return (*results, mix.mask, mix.mask1)
    return results[0] if len(results) == 1 else tuple(results)


def rms_norm_fn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None = None,
    x1: Tensor | None = None,
    weight1: Tensor | None = None,
    bias1: Tensor | None = None,
    eps: float = 1e-6,
    dropout_p: float = 0.0,
    rowscale: Tensor | None = None,
    prenorm: bool = False,
    residual_in_fp32: bool = False,
    zero_centered_weight: bool = False,
    return_dropout_mask: bool = False,
    out_dtype: torch.dtype | None = None,
    out: Tensor | None = None,
    residual_out: Tensor | None = None,
) -> Any:
    """`layer_norm_fn` with is_rms_norm.

    Source: flash_attn 2.8.3, flash_attn/ops/triton/layer_norm.py.
    """
    return layer_norm_fn(
        x,
        weight,
        bias,
        residual,
        x1,
        weight1,
        bias1,
        eps,
        dropout_p,
        rowscale,
        prenorm,
        residual_in_fp32,
        zero_centered_weight,
        True,
        return_dropout_mask,
        out_dtype,
        out,
        residual_out,
    )


def layer_norm_linear_fn(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor | None,
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    residual: Tensor | None = None,
    eps: float = 1e-6,
    prenorm: bool = False,
    residual_in_fp32: bool = False,
    is_rms_norm: bool = False,
) -> Any:
    """A linear layer of `layer_norm_fn`, computed in the dtype of x, or under autocast in its dtype.

    Args:
        linear_weight: (out_features, hidden).
        linear_bias: (out_features,).

    Returns:
        (..., out_features), with prenorm the pair of it and the sum that was normalised.

    Source: flash_attn 2.8.3, flash_attn/ops/triton/layer_norm.py.
    """
    kind = x.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
    normed, z = layer_norm_fn(
        x,
        norm_weight,
        norm_bias,
        residual,
        eps=eps,
        prenorm=True,
        residual_in_fp32=residual_in_fp32,
        is_rms_norm=is_rms_norm,
        out_dtype=dtype,
    )
    linear_bias = None if linear_bias is None else linear_bias.to(dtype)
    out = F.linear(normed, linear_weight.to(dtype), linear_bias)
    return (out, z) if prenorm else out


class LayerNormFn:
    """`layer_norm_fn` under upstream's name of its autograd function; autograd follows the parts instead.

    Source: flash_attn 2.8.3, flash_attn/ops/triton/layer_norm.py.
    """

    apply = staticmethod(layer_norm_fn)


class LayerNormLinearFn:
    """`layer_norm_linear_fn` under upstream's name of its autograd function; autograd follows the parts instead.

    Source: flash_attn 2.8.3, flash_attn/ops/triton/layer_norm.py.
    """

    apply = staticmethod(layer_norm_linear_fn)


class RMSNorm(torch.nn.Module):
    """`rms_norm_fn` with its weight.

    Args:
        dropout_p: of x, while training.
        zero_centered_weight: the weight stands for 1 + weight and begins at 0 instead of 1.

    Source: flash_attn 2.8.3, flash_attn/ops/triton/layer_norm.py.
    """

    def __init__(
        self,
        hidden_size: int,
        eps: float = 1e-5,
        dropout_p: float = 0.0,
        zero_centered_weight: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.eps = eps
        self.drop = torch.nn.Dropout(dropout_p) if dropout_p > 0.0 else None
        self.zero_centered_weight = zero_centered_weight
        self.weight = torch.nn.Parameter(torch.empty(hidden_size, device=device, dtype=dtype))
        self.register_parameter("bias", None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """A weight that changes nothing."""
        torch.nn.init.constant_(self.weight, 0.0 if self.zero_centered_weight else 1.0)

    def forward(
        self, x: Tensor, residual: Tensor | None = None, prenorm: bool = False, residual_in_fp32: bool = False
    ) -> Any:
        """out, with prenorm (out, the sum of dropout(x) and residual)."""
        return rms_norm_fn(
            x,
            self.weight,
            None,
            residual=residual,
            eps=self.eps,
            dropout_p=self.drop.p if self.drop is not None and self.training else 0.0,
            prenorm=prenorm,
            residual_in_fp32=residual_in_fp32,
            zero_centered_weight=self.zero_centered_weight,
        )


def layer_norm_ref(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None = None,
    x1: Tensor | None = None,
    weight1: Tensor | None = None,
    bias1: Tensor | None = None,
    eps: float = 1e-6,
    dropout_p: float = 0.0,
    rowscale: Tensor | None = None,
    prenorm: bool = False,
    zero_centered_weight: bool = False,
    dropout_mask: Tensor | None = None,
    dropout_mask1: Tensor | None = None,
    upcast: bool = False,
) -> Any:
    """The same sum and layer normalisation step by step in the dtype of the operands, or with upcast in fp32.

    Args:
        dropout_mask, dropout_mask1: bool like x, True where x and x1 are kept; random where they are None.

    The other arguments and the results are those of `layer_norm_fn`; the sum is returned in the dtype of the computation.

    Source: flash_attn 2.8.3, flash_attn/ops/triton/layer_norm.py.
    """
    masks = (dropout_mask, dropout_mask1)
    inputs = (residual, x1, weight1, bias1)
    return _reference(
        x, weight, bias, inputs, eps, dropout_p, rowscale, prenorm, zero_centered_weight, masks, upcast, False
    )


def rms_norm_ref(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None = None,
    x1: Tensor | None = None,
    weight1: Tensor | None = None,
    bias1: Tensor | None = None,
    eps: float = 1e-6,
    dropout_p: float = 0.0,
    rowscale: Tensor | None = None,
    prenorm: bool = False,
    zero_centered_weight: bool = False,
    dropout_mask: Tensor | None = None,
    dropout_mask1: Tensor | None = None,
    upcast: bool = False,
) -> Any:
    """`layer_norm_ref` with the root of the mean square.

    Source: flash_attn 2.8.3, flash_attn/ops/triton/layer_norm.py.
    """
    masks = (dropout_mask, dropout_mask1)
    inputs = (residual, x1, weight1, bias1)
    return _reference(
        x, weight, bias, inputs, eps, dropout_p, rowscale, prenorm, zero_centered_weight, masks, upcast, True
    )


def _reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    inputs: tuple[Tensor | None, ...],
    eps: float,
    dropout_p: float,
    rowscale: Tensor | None,
    prenorm: bool,
    zero_centered_weight: bool,
    masks: tuple[Tensor | None, Tensor | None],
    upcast: bool,
    is_rms_norm: bool,
) -> Any:
    dtype = x.dtype
    if upcast:
        x, weight, bias = x.float(), weight.float(), None if bias is None else bias.float()
    residual, x1, weight1, bias1 = (each.float() if upcast and each is not None else each for each in inputs)
    z = x if rowscale is None else x * rowscale[..., None]
    z = _drop_or_sample(z, masks[0], dropout_p)
    if x1 is not None:
        if rowscale is not None:
            raise InvalidArgument("rowscale is not supported with parallel LayerNorm: got both rowscale and x1")
        z = z + _drop_or_sample(x1, masks[1], dropout_p)
    if residual is not None:
        z = (z + residual).to(z.dtype)
    results = []
    for gain, shift in ((weight, bias), (weight1, bias1)):
        if gain is None:
            continue
        gain = gain + 1.0 if zero_centered_weight else gain
        if is_rms_norm:
            y = z * torch.rsqrt(z.square().mean(dim=-1, keepdim=True) + eps) * gain
            y = y if shift is None else y + shift
        else:
            y = F.layer_norm(z.to(gain.dtype), z.shape[-1:], gain, shift, eps)
        results.append(y.to(dtype))
    if prenorm:
        results.append(z)
    return results[0] if len(results) == 1 else tuple(results)


def _drop_or_sample(x: Tensor, mask: Tensor | None, dropout_p: float) -> Tensor:
    if dropout_p == 0.0:
        return x
    return F.dropout(x, dropout_p) if mask is None else x.masked_fill(~mask, 0.0) / (1.0 - dropout_p)


def _result_dtype(x: Tensor, out_dtype: torch.dtype | None, out: Tensor | None) -> torch.dtype:
    if out is None:
        return x.dtype if out_dtype is None else out_dtype
    if out_dtype not in (None, out.dtype):
        raise InvalidArgument(f"out_dtype is {out_dtype}, but out has dtype {out.dtype}")
    return out.dtype


def _check(
    x: Tensor,
    per_feature: tuple[Tensor | None, ...],
    like_x: tuple[Tensor | None, ...],
    rowscale: Tensor | None,
    x1: Tensor | None,
    dropout_p: float,
) -> None:
    for name, each in zip(("weight", "bias", "weight1", "bias1"), per_feature, strict=True):
        if each is not None and each.shape != x.shape[-1:]:
            raise InvalidArgument(f"{name} must have shape {tuple(x.shape[-1:])}, got {tuple(each.shape)}")
    for name, each in zip(("residual", "x1", "out", "residual_out"), like_x, strict=True):
        if each is not None and each.shape != x.shape:
            raise InvalidArgument(f"{name} must have the shape of x, {tuple(x.shape)}, got {tuple(each.shape)}")
    if per_feature[3] is not None and per_feature[2] is None:
        raise InvalidArgument("bias1 needs weight1, got weight1 None")
    if not 0.0 <= dropout_p < 1.0:
        raise InvalidArgument(f"dropout_p must be at least 0 and below 1, got {dropout_p}")
    if rowscale is None:
        return
    if x1 is not None:
        raise InvalidArgument("rowscale is not supported with parallel LayerNorm: got both rowscale and x1")
    if rowscale.shape != x.shape[:-1]:
        raise InvalidArgument(f"rowscale must have shape {tuple(x.shape[:-1])}, got {tuple(rowscale.shape)}")
