"""Layer normalisation after dropout and residual: upstream's import path and meaning, in plain PyTorch.

    z = dropout(rowscale * x0) * layerscale + residual,    out = layer_norm(z) * weight + bias

rms_norm.py is the same with the root of the mean square.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flash_attn.errors import InvalidArgument
from flash_attn.ops.normalization import add_dropped, normalise


class Subset(NamedTuple):
    """Which rows x0 has and which are wanted, as in `dropout_add_layer_norm_subset`."""

    x0_subset: Tensor | None
    out_subset: Tensor | None
    rowscale_const: float
    out_numrows: int


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
    subset = Subset(x0_subset, out_subset, rowscale_const, out_numrows)
    return add_norm_subset(
        x0,
        residual,
        weight,
        bias,
        dropout_p,
        epsilon,
        layerscale,
        subset,
        prenorm,
        residual_in_fp32,
        return_dropout_mask,
        False,
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


def add_norm_subset(
    x0: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    dropout_p: float,
    epsilon: float,
    layerscale: Tensor | None,
    subset: Subset,
    prenorm: bool,
    residual_in_fp32: bool,
    return_dropout_mask: bool,
    is_rms_norm: bool,
) -> Any:
    """`dropout_add_layer_norm_subset`, or its sibling with the root of the mean square."""
    _check_subset(x0, residual, subset)
    x0_subset, out_subset, rowscale_const, out_numrows = subset
    if x0_subset is None or out_subset is None:
        scales = (None, layerscale)
        return add_norm(
            x0,
            residual,
            weight,
            bias,
            dropout_p,
            epsilon,
            scales,
            prenorm,
            residual_in_fp32,
            return_dropout_mask,
            is_rms_norm,
        )
    _check(x0, None, None, dropout_p)
    wide = torch.promote_types(x0.dtype, torch.float32)
    rowscale = None if rowscale_const == 1.0 else x0.new_full(x0.shape[:-1], rowscale_const, dtype=wide)
    mix = add_dropped(x0, None, None, rowscale, dropout_p, layerscale)
    z = _gather_rows(mix.z.reshape(-1, x0.shape[-1]), x0_subset.flatten())
    if residual is not None:
        z = z.to(wide) + residual.reshape(-1, x0.shape[-1])
    normalised = normalise(z, weight, bias, epsilon, x0.dtype, is_rms_norm=is_rms_norm)
    results = [_scatter_rows(normalised, out_subset.flatten(), out_numrows).reshape(-1, *x0.shape[1:])]
    if prenorm:
        results.append(z.to(_residual_dtype(x0, residual, residual_in_fp32)).reshape(-1, *x0.shape[1:]))
    if return_dropout_mask:
        results.append(_mask(mix.mask, x0))
    return results[0] if len(results) == 1 else tuple(results)


def _gather_rows(x: Tensor, places: Tensor) -> Tensor:
    """Row places[i] - 1 of x (rows, hidden) for each i, and 0 where there is no such row."""
    return F.pad(x, (0, 0, 1, 0)).index_select(0, _existing(places, x.shape[0]))


def _scatter_rows(x: Tensor, places: Tensor, rows: int) -> Tensor:
    """(rows, hidden), 0 but for the rows places[i] - 1, which are x[i]; places that do not exist are left out."""
    return x.new_zeros(rows + 1, x.shape[-1]).index_copy(0, _existing(places, rows), x)[1:]


def _existing(places: Tensor, rows: int) -> Tensor:
    return places.long().masked_fill((places < 0) | (places > rows), 0)


def _check_subset(x0: Tensor, residual: Tensor | None, subset: Subset) -> None:
    x0_subset, out_subset, rowscale_const, out_numrows = subset
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
