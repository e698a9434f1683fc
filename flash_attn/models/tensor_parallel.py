"""The state dict of a GPT cut into those of the ranks of a tensor parallel one, and put together again."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flash_attn.errors import InvalidArgument
from flash_attn.models.config import padded_vocab_size
from flash_attn.models.gpt_block import GATES
from flash_attn.models.state_dict import LAYER, WORDS, StateDict, fitting
from flash_attn.utils.distributed import get_dim_for_local_rank

ON_FIRST_RANK = (LAYER + "mixer.out_proj.bias", LAYER + "mlp.fc2.bias")


class Cut(NamedTuple):
    """How a dimension is shared out over ranks: it consists of blocks, and every rank gets its share of each.

    blocks: how their lengths compare.
    units: into how many equal pieces a block may be cut; None is down to single elements.
    """

    dim: int
    blocks: tuple[int, ...] = (1,)
    units: int | None = None

    def shares(self, size: int, world_size: int) -> list[list[int]]:
        """Length of every rank's share, of each block."""
        lengths = [size * block // sum(self.blocks) for block in self.blocks]
        return [
            [get_dim_for_local_rank(n, world_size, rank, n // (self.units or n)) for rank in range(world_size)]
            for n in lengths
        ]


def shard_state_dict_tp(state_dict: Mapping[str, Tensor], config: Any, world_size: int, rank: int) -> StateDict:
    """The part of a rank; the given dictionary stays as it is.

    Raises:
        InvalidArgument: vocabulary or hidden_size does not divide evenly.

    Source: flash_attn 2.8.3, flash_attn/models/gpt.py.
    """
    _check_sizes(config, world_size)
    sharded = dict(state_dict)
    for key, cut in _cuts(state_dict, config).items():
        tensor = state_dict[key]
        shares = cut.shares(tensor.shape[cut.dim], world_size)
        blocks = tensor.split([sum(share) for share in shares], cut.dim)
        parts = [block.split(share, cut.dim)[rank] for block, share in zip(blocks, shares, strict=True)]
        sharded[key] = torch.cat(parts, cut.dim)
    if rank > 0:
        for template in ON_FIRST_RANK:
            for key in fitting(sharded, template):
                del sharded[key]
    return sharded


def combine_state_dicts_tp(state_dicts: Sequence[Mapping[str, Tensor]], config: Any) -> StateDict:
    """Undo `shard_state_dict_tp`, given the parts in the order of the ranks; what is not split comes from the first.

    Embedding and head may also be split along their features, as in Meta's checkpoints of Llama.

    Raises:
        InvalidArgument: vocabulary or hidden_size does not divide evenly.

    Source: flash_attn 2.8.3, flash_attn/models/gpt.py.
    """
    world_size = len(state_dicts)
    _check_sizes(config, world_size)
    combined = dict(state_dicts[0])
    for key, cut in _cuts(combined, config).items():
        tensors = [each[key] for each in state_dicts]
        if key in (WORDS, "lm_head.weight") and tensors[0].shape[0] != padded_vocab_size(config) // world_size:
            cut = Cut(dim=1)
        shares = cut.shares(sum(tensor.shape[cut.dim] for tensor in tensors), world_size)
        parts = [tensor.split([share[r] for share in shares], cut.dim) for r, tensor in enumerate(tensors)]
        combined[key] = torch.cat([parts[r][b] for b in range(len(shares)) for r in range(world_size)], cut.dim)
    return combined


def _cuts(state_dict: Mapping[str, Tensor], config: Any) -> dict[str, Cut]:
    """Of every key whose tensor is split."""
    nheads = config.num_attention_heads
    nheads_k = getattr(config, "n_head_kv", None) or nheads
    # whole groups are shared out: a head of keys and values with all of its query heads
    by_template = {
        "lm_head.weight": Cut(0),
        "lm_head.bias": Cut(0),
        "transformer.embeddings.position_embeddings.weight": Cut(1),
        WORDS: Cut(0),
        LAYER + "mixer.Wqkv.": Cut(0, (nheads // nheads_k, 1, 1), nheads_k),
        LAYER + "mixer.out_proj.weight": Cut(1, units=nheads_k),
        LAYER + "mlp.fc1.": Cut(0, (1, 1) if config.activation_function in GATES else (1,)),
        LAYER + "mlp.fc2.weight": Cut(1),
    }
    return {key: cut for template, cut in by_template.items() for key in fitting(state_dict, template)}


def _check_sizes(config: Any, world_size: int) -> None:
    for name, size in (("padded vocab_size", padded_vocab_size(config)), ("hidden_size", config.hidden_size)):
        if size % world_size:
            raise InvalidArgument(f"{name} ({size}) must be divisible by world_size ({world_size})")
