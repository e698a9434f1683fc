"""Collectives of tensor and sequence parallelism, on torch.distributed: upstream's import path and meaning.

all_gather and reduce_scatter work along the first dimension, and each is the gradient of the other.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from flash_attn.errors import InvalidArgument

# torch 2.13 renamed both and warns of the old names
ALL_GATHER: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
REDUCE_SCATTER: Any = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def all_gather_raw(input_: Tensor, process_group: Any, async_op: bool = False) -> tuple[Tensor, Any]:
    """(the inputs of all ranks one after the other, a handle to wait for if async_op), without gradient."""
    world_size = dist.get_world_size(process_group)
    output = input_.new_empty(world_size * input_.shape[0], *input_.shape[1:])
    handle = ALL_GATHER(output, input_.contiguous(), group=process_group, async_op=async_op)
    return output, handle


def reduce_scatter_raw(input_: Tensor, process_group: Any, async_op: bool = False) -> tuple[Tensor, Any]:
    """(this rank's part of the sum over ranks, a handle to wait for if async_op), without gradient.

    Raises:
        InvalidArgument: the first dimension does not divide evenly.
    """
    world_size = dist.get_world_size(process_group)
    if input_.shape[0] % world_size != 0:
        raise InvalidArgument(f"the first dimension, {input_.shape[0]}, must be divisible by world_size {world_size}")
    output = input_.new_empty(input_.shape[0] // world_size, *input_.shape[1:])
    handle = REDUCE_SCATTER(output, input_.contiguous(), group=process_group, async_op=async_op)
    return output, handle


def all_reduce_raw(input_: Tensor, process_group: Any, async_op: bool = False) -> tuple[Tensor, Any]:
    """(the sum over ranks, written into a contiguous input, a handle to wait for if async_op), without gradient."""
    input_ = input_.contiguous()
    handle = dist.all_reduce(input_, group=process_group, async_op=async_op)
    return input_, handle


class AllGatherFunc(torch.autograd.Function):
    """`all_gather_raw` whose gradient is `reduce_scatter_raw`."""

    @staticmethod
    def forward(ctx: Any, input_: Tensor, process_group: Any) -> Tensor:
        ctx.process_group = process_group
        return all_gather_raw(input_, process_group)[0]

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None]:
        return reduce_scatter_raw(grad_output, ctx.process_group)[0], None


class ReduceScatterFunc(torch.autograd.Function):
    """`reduce_scatter_raw` whose gradient is `all_gather_raw`."""

    @staticmethod
    def forward(ctx: Any, input_: Tensor, process_group: Any) -> Tensor:
        ctx.process_group = process_group
        return reduce_scatter_raw(input_, process_group)[0]

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None]:
        return all_gather_raw(grad_output, ctx.process_group)[0], None


class AllReduceFunc(torch.autograd.Function):
    """The sum over ranks, of a copy; every rank's gradient passes through, for all ranks go on with the same sum."""

    @staticmethod
    def forward(ctx: Any, input_: Tensor, process_group: Any) -> Tensor:
        return all_reduce_raw(input_.clone(memory_format=torch.contiguous_format), process_group)[0]

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None]:
        return grad_output, None


class CopyFunc(torch.autograd.Function):
    """The input, whose gradient is summed over the ranks: the way into a layer that is split over them."""

    @staticmethod
    def forward(ctx: Any, input_: Tensor, process_group: Any) -> Tensor:
        ctx.process_group = process_group
        return input_.view_as(input_)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None]:
        return all_reduce_raw(grad_output.clone(), ctx.process_group)[0], None


all_gather = AllGatherFunc.apply
reduce_scatter = ReduceScatterFunc.apply
all_reduce = AllReduceFunc.apply


def sync_shared_params(model: torch.nn.Module, process_group: Any) -> None:
    """Give all ranks the first rank's values of the parameters marked with `_shared_params = True`."""
    source = dist.get_global_rank(process_group, 0)
    with torch.no_grad():
        for parameter in _marked(model, "_shared_params"):
            dist.broadcast(parameter, src=source, group=process_group)


def allreduce_sequence_parallel_grad(model: torch.nn.Module, process_group: Any) -> None:
    """Sum over the ranks the gradients of the parameters marked with `_sequence_parallel = True`, in place.

    Raises:
        InvalidArgument: such a parameter has no gradient.
    """
    parameters = _marked(model, "_sequence_parallel")
    if any(parameter.grad is None for parameter in parameters):
        raise InvalidArgument("a parameter with _sequence_parallel = True has no gradient")
    with torch.no_grad():
        for gradient in (parameter.grad for parameter in parameters if parameter.grad is not None):
            summed, _ = all_reduce_raw(gradient, process_group)
            gradient.copy_(summed)


def get_dim_for_local_rank(dim: int, world_size: int, local_rank: int, multiple_of: int = 1) -> int:
    """How much of dim, counted in units of multiple_of, falls to a rank; the first ranks take what is left over."""
    each, left_over = divmod(dim // multiple_of, world_size)
    return (each + int(local_rank < left_over)) * multiple_of


def _marked(model: torch.nn.Module, mark: str) -> list[torch.nn.Parameter]:
    """The marked parameters in the order of their names, which all ranks share though only some have every parameter."""
    named = {name: parameter for name, parameter in model.named_parameters() if getattr(parameter, mark, False)}
    return [parameter for _, parameter in sorted(named.items())]
