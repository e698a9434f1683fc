"""Two-layer perceptrons, plain and gated, whole or split over ranks: upstream's import path and meaning."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flash_attn.ops.activations import swiglu
from flash_attn.ops.fused_dense import ColumnParallelLinear, FusedMLP, ParallelFusedMLP, RowParallelLinear

__all__ = ["FusedMLP", "GatedMlp", "Mlp", "ParallelFusedMLP", "ParallelGatedMlp", "ParallelMLP"]

Activation = Callable[..., Tensor]


class Mlp(nn.Module):
    """fc2(activation(fc1(x))).

    Args:
        hidden_features: default 4 * in_features.
        out_features: default in_features.
        return_residual: return (out, x).

    Source: flash_attn 2.8.3, flash_attn/modules/mlp.py.
    """

    def __init__(
        self,
        in_features: int,
        hidden_features: int | None = None,
        out_features: int | None = None,
        activation: Activation = F.gelu,
        bias1: bool = True,
        bias2: bool = True,
        return_residual: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        hidden_features = hidden_features or 4 * in_features
        self.return_residual = return_residual
        self.fc1 = nn.Linear(in_features, hidden_features, bias=bias1, device=device, dtype=dtype)
        self.activation = activation
        self.fc2 = nn.Linear(hidden_features, out_features or in_features, bias=bias2, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Any:
        """(..., in_features) -> (..., out_features)."""
        y = self.fc2(self.activation(self.fc1(x)))
        return (y, x) if self.return_residual else y


class ParallelMLP(nn.Module):
    """`Mlp` whose hidden features are split over the ranks of a process group.

    Source: flash_attn 2.8.3, flash_attn/modules/mlp.py.
    """

    def __init__(
        self,
        in_features: int,
        hidden_features: int | None = None,
        out_features: int | None = None,
        activation: Activation = F.gelu,
        process_group: Any = None,
        sequence_parallel: bool = True,
        bias1: bool = True,
        bias2: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        hidden_features = hidden_features or 4 * in_features
        shared: dict[str, Any] = dict(sequence_parallel=sequence_parallel, device=device, dtype=dtype)
        self.fc1 = ColumnParallelLinear(in_features, hidden_features, process_group, bias=bias1, **shared)
        self.activation = activation
        self.fc2 = RowParallelLinear(hidden_features, out_features or in_features, process_group, bias=bias2, **shared)

    def forward(self, x: Tensor) -> Tensor:
        """This rank's part of x -> its part of the result; the whole of both without sequence_parallel."""
        return self.fc2(self.activation(self.fc1(x)))


class GatedMlp(nn.Module):
    """fc2(y * activation(gate)), (y, gate) the halves of fc1(x).

    Args:
        hidden_features: of each half, rounded up to multiple_of; default 8 / 3 * in_features.
        out_features: default in_features.
        return_residual: return (out, x).

    Source: flash_attn 2.8.3, flash_attn/modules/mlp.py.
    """

    def __init__(
        self,
        in_features: int,
        hidden_features: int | None = None,
        out_features: int | None = None,
        activation: Activation = F.sigmoid,
        bias1: bool = True,
        bias2: bool = True,
        multiple_of: int = 128,
        return_residual: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        hidden_features = _gated_features(in_features, hidden_features, multiple_of)
        self.return_residual = return_residual
        self.fc1 = nn.Linear(in_features, 2 * hidden_features, bias=bias1, device=device, dtype=dtype)
        self.activation = activation
        self.fc2 = nn.Linear(hidden_features, out_features or in_features, bias=bias2, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Any:
        """(..., in_features) -> (..., out_features)."""
        y = self.fc2(_gated(self.fc1(x), self.activation))
        return (y, x) if self.return_residual else y


class ParallelGatedMlp(nn.Module):
    """`GatedMlp` whose hidden features are split over the ranks: each holds its part of both halves.

    Source: flash_attn 2.8.3, flash_attn/modules/mlp.py.
    """

    def __init__(
        self,
        in_features: int,
        process_group: Any,
        hidden_features: int | None = None,
        out_features: int | None = None,
        activation: Activation = F.sigmoid,
        bias1: bool = True,
        bias2: bool = True,
        multiple_of: int = 128,
        sequence_parallel: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        hidden_features = _gated_features(in_features, hidden_features, multiple_of)
        shared: dict[str, Any] = dict(sequence_parallel=sequence_parallel, device=device, dtype=dtype)
        # a unit of 2 keeps every rank's two halves equal
        self.fc1 = ColumnParallelLinear(
            in_features, 2 * hidden_features, process_group, bias=bias1, multiple_of=2, **shared
        )
        self.activation = activation
        self.fc2 = RowParallelLinear(hidden_features, out_features or in_features, process_group, bias=bias2, **shared)

    def forward(self, x: Tensor) -> Tensor:
        """This rank's part of x -> its part of the result; the whole of both without sequence_parallel."""
        return self.fc2(_gated(self.fc1(x), self.activation))


def _gated_features(in_features: int, hidden_features: int | None, multiple_of: int) -> int:
    hidden_features = int(8 * in_features / 3) if hidden_features is None else hidden_features
    return -(-hidden_features // multiple_of) * multiple_of


def _gated(x: Tensor, activation: Activation) -> Tensor:
    if activation is F.sigmoid:
        return F.glu(x, dim=-1)
    y, gate = x.chunk(2, dim=-1)
    return swiglu(gate, y) if activation is F.silu else y * activation(gate)
