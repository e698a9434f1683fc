"""What a generation hands to every layer: where it stands, and the caches of keys and values."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from flash_attn.errors import InvalidArgument

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@dataclass
class InferenceParams:
    """Where a generation stands, handed to every layer.

    key_value_memory_dict: layer index -> (max_batch_size, max_seqlen, 2, nheads, headdim).
    lengths_per_sample: (batch,), int32; takes the place of seqlen_offset where the sequences differ in length.
    """

    max_seqlen: int
    max_batch_size: int
    seqlen_offset: int = 0
    batch_size_offset: int = 0
    key_value_memory_dict: dict = field(default_factory=dict)
    lengths_per_sample: Tensor | None = None

    def reset(self, max_seqlen: int, max_batch_size: int) -> None:
        """Begin a new generation in the same memory."""
        self.max_seqlen = max_seqlen
        self.max_batch_size = max_batch_size
        self.seqlen_offset = 0
        if self.lengths_per_sample is not None:
            self.lengths_per_sample.zero_()


def allocate_inference_cache(
    max_batch_size: int,
    max_seqlen: int,
    nheads: int,
    headdim: int,
    layers: int | Sequence[int],
    device: torch.device | str,
    dtype: torch.dtype = torch.float16,
) -> dict[int, Tensor]:
    """An empty cache (max_batch_size, max_seqlen, 2, nheads, headdim) for each layer, or for the first `layers` layers.

    Raises:
        InvalidArgument: dtype is not a floating one that attention takes.

    Source: flash_attn 2.8.3, flash_attn/utils/generation.py.
    """
    if dtype not in DTYPES:
        raise InvalidArgument(f"dtype must be one of {DTYPES}, got {dtype}")
    shape = (max_batch_size, max_seqlen, 2, nheads, headdim)
    indices = range(layers) if isinstance(layers, int) else layers
    return {index: torch.empty(shape, device=device, dtype=dtype) for index in indices}
