"""Checkpoints of one format made into those of another: tables of names, and what happens to the tensors.

A template is the beginning of a key if it ends in a dot, else a whole key; # stands for the number of a layer.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from flash_attn.errors import InvalidArgument
from flash_attn.models.config import padded_vocab_size, round_up, vocab_multiple

StateDict = dict[str, Tensor]

WORDS = "transformer.embeddings.word_embeddings.weight"
LAYER = "transformer.layers.#."


def rename(state_dict: Mapping[str, Tensor], names: Mapping[str, str], dropped: Iterable[str] = ()) -> StateDict:
    """A new dictionary, its keys renamed by the first template that fits; keys that none fits stay.

    Args:
        names: template -> template.
        dropped: templates of what is left out.
    """
    left_out = {key for template in dropped for key in fitting(state_dict, template)}
    return {_renamed(key, names): tensor for key, tensor in state_dict.items() if key not in left_out}


def inverse(names: Mapping[str, str]) -> dict[str, str]:
    """The table for the way back."""
    return {ours: theirs for theirs, ours in names.items()}


def without_prefix(state_dict: Mapping[str, Tensor], *prefixes: str) -> StateDict:
    """The same under names without the first of the prefixes that they have."""
    return rename(state_dict, dict.fromkeys(prefixes, ""))


def with_prefix(state_dict: Mapping[str, Tensor], prefix: str, names: Iterable[str]) -> StateDict:
    """The same, but the keys that fit one of the templates get a prefix."""
    return rename(state_dict, {name: prefix + name for name in names})


def fitting(state_dict: Mapping[str, Tensor], template: str) -> list[str]:
    """The keys that a template names."""
    return [key for key in state_dict if _pattern(template).match(key)]


def change(state_dict: StateDict, template: str, function: Callable[[Tensor], Tensor]) -> None:
    """Put function(tensor) in place of the tensors that a template names."""
    for key in fitting(state_dict, template):
        state_dict[key] = function(state_dict[key])


def join(state_dict: StateDict, parts: Sequence[str], whole: str) -> None:
    """Put the rows of several tensors, such as those of q, k and v, one after the other in one tensor.

    Raises:
        InvalidArgument: a layer has the first part and lacks another.
    """
    for key in fitting(state_dict, parts[0]):
        names = [_substituted(key, parts[0], part) for part in parts]
        missing = [name for name in names if name not in state_dict]
        if missing:
            raise InvalidArgument(f"the checkpoint has {key} and lacks {missing}")
        state_dict[_substituted(key, parts[0], whole)] = torch.cat([state_dict.pop(name) for name in names])


def split(state_dict: StateDict, whole: str, parts: Sequence[str], sizes: Sequence[int] | None = None) -> None:
    """Undo `join`, given the number of rows of each part, if they differ."""
    for key in fitting(state_dict, whole):
        rows = state_dict.pop(key)
        tensors = rows.chunk(len(parts)) if sizes is None else rows.split(list(sizes))
        for part, tensor in zip(parts, tensors, strict=True):
            state_dict[_substituted(key, whole, part)] = tensor


def pad_vocabulary(state_dict: StateDict, config: Any, tied: bool, shard: bool = False) -> StateDict:
    """Pad embedding and head with rows of zeros to the size that the model gives them, and tie them if asked.

    Args:
        shard: the tensors may hold a part of the vocabulary: round up the rows that they have.

    Raises:
        InvalidArgument: there are more rows than the configuration counts.
    """
    for name in (WORDS, "lm_head.weight", "lm_head.bias"):
        if name in state_dict and not (tied and name == "lm_head.weight"):
            rows = state_dict[name].shape[0]
            size = round_up(rows, vocab_multiple(config)) if shard else padded_vocab_size(config)
            state_dict[name] = padded_rows(state_dict[name], size)
    if tied:
        state_dict["lm_head.weight"] = state_dict[WORDS]
    return state_dict


def padded_rows(tensor: Tensor, rows: int, value: float = 0.0) -> Tensor:
    """tensor with rows of value behind it."""
    if tensor.shape[0] > rows:
        raise InvalidArgument(f"the checkpoint has {tensor.shape[0]} tokens, the padded vocab_size is {rows}")
    return F.pad(tensor, (0, 0) * (tensor.dim() - 1) + (0, rows - tensor.shape[0]), value=value)


def _renamed(key: str, names: Mapping[str, str]) -> str:
    for template, replacement in names.items():
        if _pattern(template).match(key):
            return _substituted(key, template, replacement)
    return key


def _substituted(key: str, template: str, replacement: str) -> str:
    return _pattern(template).sub(replacement.replace("#", r"\1"), key, count=1)


@cache
def _pattern(template: str) -> re.Pattern[str]:
    text = re.escape(template).replace(r"\#", r"(\d+)")
    return re.compile(f"^{text}" if template.endswith(".") else f"^{text}$")
