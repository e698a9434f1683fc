"""Layer normalisation after dropout and residual: upstream's import path and meaning, in plain PyTorch.

    z = dropout(rowscale * x0) * layerscale + residual,    out = layer_norm(z) * weight + bias

rms_norm.py is the same with the root of the mean square.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flash_attn.errors import InvalidArgument
from flash_attn.ops.normalization import add_dropped, normalise


class DropoutAddLayerNormFn:
    """`dropout_add_layer_norm`, or with is_rms_norm its sibling, under upstream's name of their autograd function.

    Autograd follows the parts, so that it can be differentiated as often as they can.

    Source: flash_attn 2.8.3, flash_attn/ops/layer_norm.py.
    """

    @staticmethod
    def apply(
        x0: Tensor,
        residual: Tensor | None,
        gamma: Tensor,
        beta: Tensor | None,
        rowscale: Tensor | None,
        colscale: Tensor | None,
        dropout_p: float,
        epsilon: float,
        residual_in_fp32: bool = False,
        prenorm: bool = False,
        is_rms_norm: bool = False,
        return_dmask: bool = False,
    ) -> Any:
        """As `dropout_add_layer_norm`; gamma and beta are its weight and bias, colscale its layerscale."""
        _check(x0, residual, None, dropout_p)
        mix = add_dropped(x0, residual, None, rowscale, dropout_p, colscale)
        results = [normalise(mix.z, gamma, beta, epsilon, x0.dtype, is_rms_norm=is_rms_norm)]
        if prenorm:
            results.append(mix.z.to(_residual_dtype(x0, residual, residual_in_fp32)))
        if return_dmask:
            results.append(_kept(mix.mask, x0))
        return results[0] if len(results) == 1 else tuple(results)


class DropoutAddLayerNormSubsetFn:
    """`dropout_add_layer_norm_subset`, or with is_rms_norm its sibling, under upstream's name of their autograd function.

    Source: flash_attn 2.8.3, flash_attn/ops/layer_norm.py.
    """

    @staticmethod
    def apply(
        x0: Tensor,
        residual: Tensor | None,
        gamma: Tensor,
        beta: Tensor | None,
        colscale: Tensor | None,
        x0_subset: Tensor | None,
        out_subset: Tensor | None,
        dropout_p: float,
        epsilon: float,
        rowscale_const: float,
        out_numrows: int,
        residual_in_fp32: bool = False,
        prenorm: bool = False,
        is_rms_norm: bool = False,
        return_dmask: bool = False,
    ) -> Any:
        """As `dropout_add_layer_norm_subset`; gamma and beta are its weight and bias, colscale its layerscale."""
        _check_subset(x0, residual, x0_subset, out_subset, rowscale_const, out_numrows)
        options = (residual_in_fp32, prenorm, is_rms_norm, return_dmask)
        if x0_subset is None or out_subset is None:
            return DropoutAddLayerNormFn.apply(x0, residual, gamma, beta, None, colscale, dropout_p, epsilon, *options)
        _check(x0, None, None, dropout_p)
        wide = torch.promote_types(x0.dtype, torch.float32)
        rowscale = None if rowscale_const == 1.0 else x0.new_full(x0.shape[:-1], rowscale_const, dtype=wide)
        mix = add_dropped(x0, None, None, rowscale, dropout_p, colscale)
        z = _gather_rows(mix.z.reshape(-1, x0.shape[-1]), x0_subset.flatten())
        if residual is not None:
            z = z.to(wide) + residual.reshape(-1, x0.shape[-1])
        normalised = normalise(z, gamma, beta, epsilon, x0.dtype, is_rms_norm=is_rms_norm)
        results = [_scatter_rows(normalised, out_subset.flatten(), out_numrows).reshape(-1, *x0.shape[1:])]
        if prenorm:
            results.append(z.to(_residual_dtype(x0, residual, residual_in_fp32)).reshape(-1, *x0.shape[1:]))
        if return_dmask:
            results.append(_kept(mix.mask, x0))
        return results[0] if len(results) == 1 else tuple(results)


class DropoutAddLayerNormParallelResidualFn:
    """`dropout_add_layer_norm_parallel_residual`, or with is_rms_norm its sibling, under upstream's name of their function.

    Source: flash_attn 2.8.3, flash_attn/ops/layer_norm.py.
    """

    @staticmethod
    def apply(
        x0: Tensor,
        x1: Tensor | None,
        residual: Tensor | None,
        gamma0: Tensor,
        beta0: Tensor | None,
        gamma1: Tensor | None,
        beta1: Tensor | None,
        dropout_p: float,
        epsilon: float,
        residual_in_fp32: bool = False,
        prenorm: bool = False,
        is_rms_norm: bool = False,
        return_dmask: bool = False,
    ) -> Any:
        """As `dropout_add_layer_norm_parallel_residual`; gamma and beta are its weights and biases."""
        _check(x0, residual, x1, dropout_p)
        mix = add_dropped(x0, residual, x1, None, dropout_p)
        results: list[Tensor | None] = [normalise(mix.z, gamma0, beta0, epsilon, x0.dtype, is_rms_norm=is_rms_norm)]
        if gamma1 is None:
            results.append(None)
        else:
            results.append(normalise(mix.z, gamma1, beta1, epsilon, x0.dtype, is_rms_norm=is_rms_norm))
        if prenorm:
            results.append(mix.z.to(_residual_dtype(x0, residual, residual_in_fp32)))
        if return_dmask:
            results += [_kept(mix.mask, x0), _kept(mix.mask1, x0)]
        return tuple(results)


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
        return_dropout_mask: (..., hidden), uint8, 1 where kept; all 1 without dropout.

    Source: flash_attn 2.8.3, flash_attn/ops/layer_norm.py.
    """
    options = (residual_in_fp32, prenorm, False, return_dropout_mask)
    return DropoutAddLayerNormFn.apply(x0, residual, weight, bias, rowscale, layerscale, dropout_p, epsilon, *options)


def dropout_add_layer_norm_subset(
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
    """`dropout_add_layer_norm` of rows of which only some are in x0, and only some are wanted (stochastic depth).

    Args:
        x0: (..., hidden), the rows that there are; the others are 0.
        residual: (..., hidden), all rows.
        x0_subset: (...), int, for each of all rows 1 + its row of x0, or 0 where x0 lacks it.
        out_subset: (...), int, for each of all rows 1 + its row of out, or 0 where out lacks it.
        rowscale_const: multiplies x0.
        out_numrows: rows of out. Those that out_subset does not name are 0.

    Returns:
        out (-1, *x0.shape[1:]), with more asked for the tuple (out, z of all rows if prenorm, the mask of x0's shape if
        return_dropout_mask). Without subsets all rows are in both.

    Raises:
        InvalidArgument: one subset without the other, their sizes, or rowscale_const or out_numrows without them.

    Source: flash_attn 2.8.3, flash_attn/ops/layer_norm.py.
    """
    subset, scale = (x0_subset, out_subset), (rowscale_const, out_numrows)
    options = (residual_in_fp32, prenorm, False, return_dropout_mask)
    return DropoutAddLayerNormSubsetFn.apply(
        x0, residual, weight, bias, layerscale, *subset, dropout_p, epsilon, *scale, *options
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
        (out0, out1 or None without weight1, z if prenorm, both masks if return_dropout_mask; without x1 its mask is all 1).

    Source: flash_attn 2.8.3, flash_attn/ops/layer_norm.py.
    """
    options = (residual_in_fp32, prenorm, False, return_dropout_mask)
    return DropoutAddLayerNormParallelResidualFn.apply(
        x0, x1, residual, weight0, bias0, weight1, bias1, dropout_p, epsilon, *options
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


def _gather_rows(x: Tensor, places: Tensor) -> Tensor:
    """Row places[i] - 1 of x (rows, hidden) for each i, and 0 where there is no such row."""
    return F.pad(x, (0, 0, 1, 0)).index_select(0, _existing(places, x.shape[0]))


def _scatter_rows(x: Tensor, places: Tensor, rows: int) -> Tensor:
    """(rows, hidden), 0 but for the rows places[i] - 1, which are x[i]; places that do not exist are left out."""
    return x.new_zeros(rows + 1, x.shape[-1]).index_copy(0, _existing(places, rows), x)[1:]


def _existing(places: Tensor, rows: int) -> Tensor:
    return places.long().masked_fill((places < 0) | (places > rows), 0)


def _check_subset(
    x0: Tensor,
    residual: Tensor | None,
    x0_subset: Tensor | None,
    out_subset: Tensor | None,
    rowscale_const: float,
    out_numrows: int,
) -> None:
    if (x0_subset is None) != (out_subset is None):
        missing = "x0_subset" if x0_subset is None else "out_subset"
        raise InvalidArgument(f"x0_subset and out_subset go together, got no {missing}")
    if x0_subset is None or out_subset is None:
        if rowscale_const != 1.0 or out_numrows != 0:
            raise InvalidArgument(
                f"rowscale_const ({rowscale_const}) and out_numrows ({out_numrows}) need x0_subset and out_subset"
            )
        return
    for name, each in (("x0_subset", x0_subset), ("out_subset", out_subset)):
        if each.is_floating_point() or each.dtype == torch.bool:
            raise InvalidArgument(f"{name} must be of an integer dtype, got {each.dtype}")
    rows = {"x0_subset": x0_subset.numel(), "out_subset": out_subset.numel()}
    if residual is not None:
        rows["residual"] = residual.shape[:-1].numel()
    if len(set(rows.values())) > 1:
        raise InvalidArgument(f"all must have the same number of rows, got {rows}")
    if residual is not None and residual.shape[-1] != x0.shape[-1]:
        raise InvalidArgument(f"residual must have the {x0.shape[-1]} columns of x0, got {residual.shape[-1]}")
    if out_numrows < 0:
        raise InvalidArgument(f"out_numrows must be at least 0, got {out_numrows}")


def _residual_dtype(x0: Tensor, residual: Tensor | None, residual_in_fp32: bool) -> torch.dtype:
    if residual is not None:
        return residual.dtype
    return torch.float32 if residual_in_fp32 else x0.dtype


def _kept(mask: Tensor | None, x: Tensor) -> Tensor:
    """The mask as upstream's kernels return it, in bytes, all 1 where nothing can be dropped."""
    return torch.ones(x.shape, dtype=torch.uint8, device=x.device) if mask is None else mask.to(torch.uint8)


def _check(x0: Tensor, residual: Tensor | None, x1: Tensor | None, dropout_p: float) -> None:
    for name, each in (("residual", residual), ("x1", x1)):
        if each is not None and each.shape != x0.shape:
            raise InvalidArgument(f"{name} must have the shape of x0, {tuple(x0.shape)}, got {tuple(each.shape)}")
    if not 0.0 <= dropout_p < 1.0:
        raise InvalidArgument(f"dropout_p must be at least 0 and below 1, got {dropout_p}")
