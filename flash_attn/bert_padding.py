"""Between padded batches and packed tokens: take the tokens that a mask keeps, and put them back.

A padded batch is (batch, seqlen, ...). Packed tokens are (total, ...), sequence after sequence; cu_seqlens says where
each begins. Imports torch and einops, whose `rearrange` and `repeat` callers take from here.
"""

from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor

from flash_attn.errors import InvalidArgument

__all__ = [
    "IndexFirstAxis",
    "IndexFirstAxisResidual",
    "IndexPutFirstAxis",
    "index_first_axis",
    "index_first_axis_residual",
    "index_put_first_axis",
    "pad_input",
    "rearrange",
    "repeat",
    "unpad_input",
    "unpad_input_for_concatenated_sequences",
]


class IndexFirstAxis(torch.autograd.Function):
    """rows[indices]; a row taken twice receives the sum of both gradients."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, indices: Tensor) -> Tensor:
        ctx.save_for_backward(indices)
        ctx.num_rows = input.shape[0]
        return input.index_select(0, indices)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None]:
        (indices,) = ctx.saved_tensors
        grad_input = grad_output.new_zeros(ctx.num_rows, *grad_output.shape[1:])
        return grad_input.index_add(0, indices, grad_output), None


class IndexPutFirstAxis(torch.autograd.Function):
    """A tensor of `first_axis_dim` rows that is `values` at `indices` and 0 elsewhere; the indices differ."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, indices: Tensor, first_axis_dim: int) -> Tensor:
        ctx.save_for_backward(indices)
        # transformers passes int32, which index_copy_ refuses
        return values.new_zeros(first_axis_dim, *values.shape[1:]).index_copy_(0, indices.long(), values)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None, None]:
        (indices,) = ctx.saved_tensors
        return grad_output.index_select(0, indices), None, None


class IndexFirstAxisResidual(torch.autograd.Function):
    """(rows[indices], rows): one node for a branch and the residual beside it, so their gradients meet in place."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(indices)
        return input.index_select(0, indices), input.detach()

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor, grad_residual: Tensor) -> tuple[Tensor, None]:
        (indices,) = ctx.saved_tensors
        return grad_residual.index_add(0, indices, grad_output), None


def index_first_axis(input: Tensor, indices: Tensor) -> Tensor:
    """The rows of `input` named by `indices`, differentiable.

    Args:
        input: (rows, ...).
        indices: (total,), int64 or int32.

    Returns:
        (total, ...).
    """
    return IndexFirstAxis.apply(input, indices)


def index_put_first_axis(values: Tensor, indices: Tensor, first_axis_dim: int) -> Tensor:
    """`values` spread over `first_axis_dim` rows, the rest 0, differentiable.

    Args:
        values: (total, ...).
        indices: (total,), int64; all different.
        first_axis_dim: how many rows the result has.

    Returns:
        (first_axis_dim, ...).
    """
    return IndexPutFirstAxis.apply(values, indices, first_axis_dim)


def index_first_axis_residual(input: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
    """The rows named by `indices`, and `input` itself for a residual connection, differentiable.

    Args:
        input: (rows, ...).
        indices: (total,), int64 or int32.

    Returns:
        ((total, ...), (rows, ...)).
    """
    return IndexFirstAxisResidual.apply(input, indices)


def unpad_input(
    hidden_states: Tensor, attention_mask: Tensor, unused_mask: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, int, Tensor]:
    """Packs the tokens of a padded batch. Waits for the device once, to learn how many there are.

    Args:
        hidden_states: (batch, seqlen, ...).
        attention_mask: (batch, seqlen), bool or int; 1 where a token counts.
        unused_mask: like attention_mask; 1 where room is kept for a token that does not count yet.

    Returns:
        hidden_states: (total, ...), the tokens of either mask.
        indices: (total,), where they were in the flattened batch.
        cu_seqlens: (batch + 1,), int32, where each sequence begins.
        max_seqlen: the longest sequence, of either mask.
        seqused: (batch,), int32, the tokens of attention_mask alone.

    Raises:
        InvalidArgument: a mask does not have the batch's shape.
    """
    _require_mask_shape("attention_mask", attention_mask, hidden_states)
    used = attention_mask.bool()
    kept = used
    if unused_mask is not None:
        _require_mask_shape("unused_mask", unused_mask, hidden_states)
        kept = used | unused_mask.bool()
    cu_seqlens, max_seqlen = _pack_lengths(kept.sum(dim=-1, dtype=torch.int32))
    indices = kept.flatten().nonzero().flatten()
    return (
        index_first_axis(hidden_states.flatten(0, 1), indices),
        indices,
        cu_seqlens,
        max_seqlen,
        used.sum(dim=-1, dtype=torch.int32),
    )


def unpad_input_for_concatenated_sequences(
    hidden_states: Tensor, attention_mask_in_length: Tensor
) -> tuple[Tensor, Tensor, Tensor, int]:
    """Packs the tokens of a padded batch whose rows hold several sequences each, one after another.

    A row of lengths [2, 3, 0, 0, 0, 0] means: two tokens of one sequence, three of the next, one of padding.

    Args:
        hidden_states: (batch, seqlen, ...).
        attention_mask_in_length: (batch, seqlen), int; the lengths of a row's sequences, 0 where there are no more.

    Returns:
        hidden_states: (total, ...).
        indices: (total,), where the tokens were in the flattened batch.
        cu_seqlens: (sequences + 1,), int32, where each sequence begins.
        max_seqlen: the longest sequence.

    Raises:
        InvalidArgument: the lengths do not have the batch's shape.
    """
    _require_mask_shape("attention_mask_in_length", attention_mask_in_length, hidden_states)
    lengths = attention_mask_in_length.flatten()
    cu_seqlens, max_seqlen = _pack_lengths(lengths[lengths.nonzero().flatten()].to(torch.int32))
    tokens_of_row = attention_mask_in_length.sum(dim=-1, keepdim=True)
    positions = torch.arange(hidden_states.shape[1], device=tokens_of_row.device)
    indices = (positions < tokens_of_row).flatten().nonzero().flatten()
    return index_first_axis(hidden_states.flatten(0, 1), indices), indices, cu_seqlens, max_seqlen


def pad_input(hidden_states: Tensor, indices: Tensor, batch: int, seqlen: int) -> Tensor:
    """Puts packed tokens back into a padded batch; the padding is 0.

    Args:
        hidden_states: (total, ...).
        indices: (total,), as unpad_input returned them.
        batch: rows of the batch.
        seqlen: length of a row, padding included.

    Returns:
        (batch, seqlen, ...).
    """
    return index_put_first_axis(hidden_states, indices, batch * seqlen).unflatten(0, (batch, seqlen))


def _pack_lengths(lengths: Tensor) -> tuple[Tensor, int]:
    """cu_seqlens and the longest of the lengths, 0 where there are none."""
    cu_seqlens = F.pad(lengths.cumsum(dim=0, dtype=torch.int32), (1, 0))
    return cu_seqlens, int(lengths.max()) if lengths.numel() else 0


def _require_mask_shape(name: str, mask: Tensor, hidden_states: Tensor) -> None:
    if mask.shape != hidden_states.shape[:2]:
        raise InvalidArgument(
            f"{name} must have shape (batch_size, seqlen) = {tuple(hidden_states.shape[:2])}, got {tuple(mask.shape)}"
        )
