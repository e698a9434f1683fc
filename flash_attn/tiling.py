"""What of a tensor hardware that copies tiles can read: the conditions of the backends on tensor maps."""

from torch import Tensor

MOST_TOKENS = 2**30  # that a kernel counts through in 32 bits, with as many to spare


def copied_in_tiles(x: Tensor) -> bool:
    """Whether hardware that copies tiles can read x: rows, strides and address multiples of 16 bytes, no repeated elements."""
    if x.numel() == 0 or x.data_ptr() % 16 or x.shape[-1] * x.element_size() % 16:
        return False
    sizes = zip(x.shape[:-1], x.stride()[:-1], strict=True)
    return all(size == 1 or (stride > 0 and stride * x.element_size() % 16 == 0) for size, stride in sizes)


def evenly_spaced(x: Tensor) -> bool:
    """Whether all tokens of a (batch, tokens, heads, dim) tensor are as far apart as neighbours: one sequence of them."""
    batch_size, tokens = x.shape[:2]
    return batch_size * tokens <= MOST_TOKENS and (batch_size == 1 or x.stride(0) == tokens * x.stride(1))
