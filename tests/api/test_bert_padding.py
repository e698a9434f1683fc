"""Packing and padding: round trips, gradients, masks, concatenated sequences, empty rows."""

import pytest
import torch

from flash_attn import bert_padding
from flash_attn.bert_padding import (
    IndexFirstAxisResidual,
    index_first_axis,
    index_first_axis_residual,
    index_put_first_axis,
    pad_input,
    unpad_input,
    unpad_input_for_concatenated_sequences,
)
from flash_attn.errors import InvalidArgument

MASK = torch.tensor([[1, 1, 0, 0], [0, 0, 0, 0], [0, 1, 1, 1]])


def hidden_of(mask: torch.Tensor, *feature_shape: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(*mask.shape, *feature_shape, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("mask_dtype", [torch.bool, torch.int32, torch.int64])
@pytest.mark.parametrize("feature_shape", [(5,), (2, 3), ()])
def test_unpad_then_pad_is_the_masked_batch(mask_dtype, feature_shape):
    hidden = hidden_of(MASK, *feature_shape)
    packed, indices, cu_seqlens, max_seqlen, seqused = unpad_input(hidden, MASK.to(mask_dtype))

    assert torch.equal(packed, hidden[MASK.bool()])
    assert indices.tolist() == [0, 1, 9, 10, 11]
    assert cu_seqlens.tolist() == [0, 2, 2, 5]
    assert cu_seqlens.dtype == torch.int32
    assert max_seqlen == 3
    assert type(max_seqlen) is int
    assert seqused.tolist() == [2, 0, 3]
    assert seqused.dtype == torch.int32

    keep = MASK.reshape(*MASK.shape, *[1] * len(feature_shape))
    for indices_dtype in (torch.int64, torch.int32):
        assert torch.equal(pad_input(packed, indices.to(indices_dtype), *MASK.shape), hidden * keep)


def test_unpad_input_keeps_room_for_unused_tokens():
    unused = torch.tensor([[0, 0, 1, 0], [1, 0, 0, 0], [1, 0, 0, 0]])
    hidden = hidden_of(MASK, 5)
    packed, indices, cu_seqlens, max_seqlen, seqused = unpad_input(hidden, MASK, unused)

    assert torch.equal(packed, hidden[(MASK + unused).bool()])
    assert indices.tolist() == [0, 1, 2, 4, 8, 9, 10, 11]
    assert cu_seqlens.tolist() == [0, 3, 4, 8]
    assert max_seqlen == 4
    assert seqused.tolist() == [2, 0, 3]


@pytest.mark.parametrize("shape", [(3, 4), (0, 4), (2, 0)])
def test_unpad_input_of_nothing(shape):
    mask = torch.zeros(shape, dtype=torch.bool)
    packed, indices, cu_seqlens, max_seqlen, seqused = unpad_input(hidden_of(mask, 5), mask)

    assert packed.shape == (0, 5)
    assert indices.shape == (0,)
    assert cu_seqlens.tolist() == [0] * (shape[0] + 1)
    assert max_seqlen == 0
    assert seqused.tolist() == [0] * shape[0]
    assert torch.equal(pad_input(packed, indices, *shape), torch.zeros(*shape, 5, dtype=torch.float64))


def test_unpad_input_for_concatenated_sequences_splits_each_row():
    lengths = torch.tensor([[2, 3, 0, 0, 0, 0], [3, 2, 0, 0, 0, 0], [6, 0, 0, 0, 0, 0], [0, 0, 0, 0, 0, 0]])
    hidden = hidden_of(lengths, 5)
    packed, indices, cu_seqlens, max_seqlen = unpad_input_for_concatenated_sequences(hidden, lengths)

    assert cu_seqlens.tolist() == [0, 2, 5, 8, 10, 16]
    assert cu_seqlens.dtype == torch.int32
    assert max_seqlen == 6
    assert type(max_seqlen) is int
    assert indices.tolist() == [0, 1, 2, 3, 4, 6, 7, 8, 9, 10, *range(12, 18)]
    assert torch.equal(packed, hidden.flatten(0, 1)[indices])


def test_masks_of_another_shape_are_refused():
    hidden = hidden_of(MASK, 5)
    with pytest.raises(InvalidArgument, match=r"attention_mask .*\(3, 4\).*\(3, 3\)"):
        unpad_input(hidden, MASK[:, :3])
    with pytest.raises(InvalidArgument, match=r"unused_mask .*\(3, 4\).*\(2, 4\)"):
        unpad_input(hidden, MASK, MASK[:2])
    with pytest.raises(RuntimeError, match="attention_mask_in_length"):
        unpad_input_for_concatenated_sequences(hidden, MASK[:2])


def test_gradients_agree_with_finite_differences():
    rows = hidden_of(torch.zeros(1, 6), 2, 3)[0].requires_grad_()
    taken, repeated = torch.tensor([4, 0, 5]), torch.tensor([4, 0, 4])
    check = torch.autograd.gradcheck
    assert check(lambda x: index_first_axis(x, taken), rows)
    assert check(lambda x: index_first_axis(x, repeated), rows)
    assert check(lambda x: index_put_first_axis(x, torch.tensor([7, 1, 0, 3, 2, 5]), 9), rows)
    assert torch.autograd.gradgradcheck(lambda x: index_first_axis(x, taken) ** 2, rows)


def test_residual_collects_both_gradients_and_spares_the_caller_s():
    rows = hidden_of(torch.zeros(1, 4), 3)[0].requires_grad_()
    indices = torch.tensor([2, 0])
    taken, residual = index_first_axis_residual(rows, indices)
    assert torch.equal(taken, rows[indices])
    assert torch.equal(residual, rows)

    grad_taken, grad_residual = torch.ones_like(taken), torch.full_like(residual, 10.0)
    torch.autograd.backward([taken, residual], [grad_taken, grad_residual])
    assert rows.grad is not None
    assert rows.grad[:, 0].tolist() == [11.0, 10.0, 11.0, 10.0]
    assert grad_residual.eq(10.0).all()


def test_padding_and_packing_are_each_other_s_gradient():
    hidden = hidden_of(MASK, 5).requires_grad_()
    packed, indices, *_ = unpad_input(hidden, MASK)
    weights = hidden_of(MASK, 5) + 1
    (pad_input(packed, indices, *MASK.shape) * weights).sum().backward()
    assert hidden.grad is not None
    assert torch.equal(hidden.grad, weights * MASK[..., None])


def test_names_that_clients_import_from_here():
    import einops

    assert bert_padding.rearrange is einops.rearrange
    assert bert_padding.repeat is einops.repeat
    assert IndexFirstAxisResidual.apply is not None
    assert all(hasattr(bert_padding, name) for name in bert_padding.__all__)
