"""Linear layers and MLPs, alone or split over the ranks of a process group: upstream's import path and meaning.

The products are PyTorch's own; what upstream fuses by hand, cuBLAS and torch.compile fuse where they can.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from flash_attn.errors import InvalidArgument
from flash_attn.ops.activations import sqrelu_fwd
from flash_attn.utils.distributed import CopyFunc, all_gather, all_reduce, get_dim_for_local_rank, reduce_scatter

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu_approx": partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
    "sqrelu": sqrelu_fwd,
}


def fused_dense_func(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    return_residual: bool = False,
    process_group: Any = None,
    sequence_parallel: bool = True,
) -> Any:
    """x weight^T + bias; with return_residual the pair of it and x.

    Args:
        x: (..., in_features); with a process_group and sequence_parallel this rank's part of the first dimension.
        weight: (out_features, in_features), with a process_group this rank's rows.
        process_group: gather x first, or without sequence_parallel take x as it is and sum its gradient over the ranks.

    Source: flash_attn 2.8.3, flash_attn/ops/fused_dense.py.
    """
    total_x = _enter(x, process_group, sequence_parallel)
    out = F.linear(total_x, weight, bias)
    return (out, x) if return_residual else out


def fused_mlp_func(
    x: Tensor,
    weight1: Tensor,
    weight2: Tensor,
    bias1: Tensor | None = None,
    bias2: Tensor | None = None,
    activation: str = "gelu_approx",
    save_pre_act: bool = True,
    return_residual: bool = False,
    checkpoint_lvl: int = 0,
    heuristic: int = 0,
    process_group: Any = None,
    sequence_parallel: bool = True,
) -> Any:
    """activation(x weight1^T + bias1) weight2^T + bias2; with return_residual the pair of it and x.

    Args:
        activation: "gelu_approx", "relu" or "sqrelu".
        save_pre_act: False is checkpoint_lvl 2.
        checkpoint_lvl: the backward computes anew 0 nothing, 1 the activation, 2 also its input.
        heuristic: -1 to 4; chooses an algorithm of upstream's kernel, and none here.
        process_group, sequence_parallel: as in `fused_dense_func`; the results of the ranks are still to be summed.

    Raises:
        InvalidArgument: an unknown activation, checkpoint_lvl or heuristic.

    Source: flash_attn 2.8.3, flash_attn/ops/fused_dense.py.
    """
    _check_mlp(activation, checkpoint_lvl)
    if not -1 <= heuristic <= 4:
        raise InvalidArgument(f"heuristic must be -1 to 4, got {heuristic}")

    def second(pre_activation: Tensor) -> Tensor:
        return F.linear(ACTIVATIONS[activation](pre_activation), weight2, bias2)

    def both(total_x: Tensor) -> Tensor:
        return second(F.linear(total_x, weight1, bias1))

    total_x = _enter(x, process_group, sequence_parallel)
    level = checkpoint_lvl if save_pre_act else 2
    if level == 0:
        out = both(total_x)
    elif level == 1:
        out = checkpoint(second, F.linear(total_x, weight1, bias1), use_reentrant=False)
    else:
        out = checkpoint(both, total_x, use_reentrant=False)
    return (out, x) if return_residual else out


class FusedDenseFunc:
    """`fused_dense_func` under upstream's name of its autograd function; autograd follows the parts instead.

    Source: flash_attn 2.8.3, flash_attn/ops/fused_dense.py.
    """

    apply = staticmethod(fused_dense_func)


class FusedMLPFunc:
    """`fused_mlp_func` under upstream's name of its autograd function; autograd follows the parts instead.

    Source: flash_attn 2.8.3, flash_attn/ops/fused_dense.py.
    """

    @staticmethod
    def apply(
        x: Tensor,
        weight1: Tensor,
        bias1: Tensor | None,
        weight2: Tensor,
        bias2: Tensor | None,
        activation: str = "gelu_approx",
        save_pre_act: bool = True,
        return_residual: bool = False,
        checkpoint_lvl: int = 0,
        heuristic: int = 0,
        process_group: Any = None,
        sequence_parallel: bool = True,
    ) -> Any:
        """`fused_mlp_func`, each bias behind its weight."""
        return fused_mlp_func(
            x,
            weight1,
            weight2,
            bias1,
            bias2,
            activation,
            save_pre_act,
            return_residual,
            checkpoint_lvl,
            heuristic,
            process_group,
            sequence_parallel,
        )


class FusedDense(nn.Linear):
    """nn.Linear that can also return its input.

    Source: flash_attn 2.8.3, flash_attn/ops/fused_dense.py.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        return_residual: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_features, out_features, bias=bias, device=device, dtype=dtype)
        self.return_residual = return_residual

    def forward(self, x: Tensor, process_group: Any = None) -> Any:
        """`fused_dense_func` of x; with a process_group x is gathered over its ranks first."""
        return fused_dense_func(x, self.weight, self.bias, self.return_residual, process_group)


class ColumnParallelLinear(nn.Linear):
    """A linear layer whose outputs are split over the ranks.

    Args:
        sequence_parallel: the first dimension of the input is split too, and gathered; otherwise the input is whole.
        multiple_of: units in which the outputs are shared out; the first ranks take what is left over.

    Source: flash_attn 2.8.3, flash_attn/ops/fused_dense.py.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        process_group: Any,
        bias: bool = True,
        sequence_parallel: bool = True,
        multiple_of: int = 1,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        local = _local_features("out_features", out_features, process_group, multiple_of)
        super().__init__(in_features, local, bias=bias, device=device, dtype=dtype)
        self.process_group = process_group
        self.sequence_parallel = sequence_parallel

    def forward(self, x: Tensor) -> Tensor:
        """(..., this rank's outputs)."""
        return fused_dense_func(
            x, self.weight, self.bias, process_group=self.process_group, sequence_parallel=self.sequence_parallel
        )


class RowParallelLinear(nn.Linear):
    """A linear layer whose inputs are split over the ranks; only the first has the bias.

    Args:
        sequence_parallel: every rank keeps its part of the first dimension of the sum; otherwise all have the whole.
        multiple_of: units in which the inputs are shared out.

    Source: flash_attn 2.8.3, flash_attn/ops/fused_dense.py.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        process_group: Any,
        bias: bool = True,
        sequence_parallel: bool = True,
        multiple_of: int = 1,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        local = _local_features("in_features", in_features, process_group, multiple_of)
        first = dist.get_rank(process_group) == 0
        super().__init__(local, out_features, bias=bias and first, device=device, dtype=dtype)
        self.process_group = process_group
        self.sequence_parallel = sequence_parallel

    def forward(self, x: Tensor) -> Tensor:
        """The sum over the ranks."""
        return _leave(F.linear(x, self.weight, self.bias), self.process_group, self.sequence_parallel)


class FusedMLP(nn.Module):
    """Two linear layers with an activation between them, `fused_mlp_func` with its weights.

    Source: flash_attn 2.8.3, flash_attn/ops/fused_dense.py.
    """

    def __init__(
        self,
        in_features: int,
        hidden_features: int | None = None,
        out_features: int | None = None,
        bias1: bool = True,
        bias2: bool = True,
        activation: str = "gelu_approx",
        return_residual: bool = False,
        checkpoint_lvl: int = 0,
        heuristic: int | str = "auto",
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        _check_mlp(activation, checkpoint_lvl)
        hidden_features = hidden_features or 4 * in_features
        self.activation = activation
        self.return_residual = return_residual
        self.checkpoint_lvl = checkpoint_lvl
        self.heuristic = heuristic
        self.fc1 = nn.Linear(in_features, hidden_features, bias=bias1, device=device, dtype=dtype)
        self.fc2 = nn.Linear(hidden_features, out_features or in_features, bias=bias2, device=device, dtype=dtype)

    def forward(self, x: Tensor, process_group: Any = None) -> Any:
        """The MLP of x; with a process_group x is gathered first, and its ranks' results are summed and split again."""
        out = fused_mlp_func(
            x,
            self.fc1.weight,
            self.fc2.weight,
            self.fc1.bias,
            self.fc2.bias,
            activation=self.activation,
            save_pre_act=self.training,
            return_residual=self.return_residual,
            checkpoint_lvl=self.checkpoint_lvl,
            heuristic=_heuristic(self.heuristic),
            process_group=process_group,
        )
        if self.return_residual:
            out, x = out
        if process_group is not None:
            out = reduce_scatter(out, process_group)
        return (out, x) if self.return_residual else out


class ParallelFusedMLP(nn.Module):
    """`FusedMLP` whose hidden features are split over the ranks.

    Source: flash_attn 2.8.3, flash_attn/ops/fused_dense.py.
    """

    def __init__(
        self,
        in_features: int,
        hidden_features: int | None = None,
        out_features: int | None = None,
        activation: str = "gelu_approx",
        process_group: Any = None,
        bias1: bool = True,
        bias2: bool = True,
        sequence_parallel: bool = True,
        checkpoint_lvl: int = 0,
        heuristic: int | str = "auto",
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        _check_mlp(activation, checkpoint_lvl)
        if process_group is None:
            raise InvalidArgument("ParallelFusedMLP needs a process_group, got None")
        hidden_features = hidden_features or 4 * in_features
        factory: dict[str, Any] = dict(device=device, dtype=dtype)
        self.activation = activation
        self.process_group = process_group
        self.sequence_parallel = sequence_parallel
        self.checkpoint_lvl = checkpoint_lvl
        self.heuristic = heuristic
        self.fc1 = ColumnParallelLinear(in_features, hidden_features, process_group, bias=bias1, **factory)
        self.fc2 = RowParallelLinear(hidden_features, out_features or in_features, process_group, bias=bias2, **factory)

    def forward(self, x: Tensor) -> Tensor:
        """The MLP of x, summed over the ranks."""
        out = fused_mlp_func(
            x,
            self.fc1.weight,
            self.fc2.weight,
            self.fc1.bias,
            self.fc2.bias,
            activation=self.activation,
            save_pre_act=self.training,
            checkpoint_lvl=self.checkpoint_lvl,
            heuristic=_heuristic(self.heuristic),
            process_group=self.process_group,
            sequence_parallel=self.sequence_parallel,
        )
        return _leave(out, self.process_group, self.sequence_parallel)


def _enter(x: Tensor, process_group: Any, sequence_parallel: bool) -> Tensor:
    if process_group is None:
        return x
    return all_gather(x, process_group) if sequence_parallel else CopyFunc.apply(x, process_group)


def _leave(out: Tensor, process_group: Any, sequence_parallel: bool) -> Tensor:
    return reduce_scatter(out, process_group) if sequence_parallel else all_reduce(out, process_group)


def _heuristic(heuristic: int | str) -> int:
    return 0 if heuristic == "auto" else int(heuristic)


def _check_mlp(activation: str, checkpoint_lvl: int) -> None:
    if activation not in ACTIVATIONS:
        raise InvalidArgument(f"activation must be one of {sorted(ACTIVATIONS)}, got {activation!r}")
    if checkpoint_lvl not in (0, 1, 2):
        raise InvalidArgument(f"checkpoint_lvl must be 0, 1 or 2, got {checkpoint_lvl}")


def _local_features(name: str, features: int, process_group: Any, multiple_of: int) -> int:
    if features % multiple_of:
        raise InvalidArgument(f"{name} ({features}) must be a multiple of {multiple_of}")
    world_size, rank = dist.get_world_size(process_group), dist.get_rank(process_group)
    return get_dim_for_local_rank(features, world_size, rank, multiple_of)
