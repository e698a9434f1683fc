"""Weights of a pretrained model as one dictionary: upstream's import path and meaning. The hub needs transformers."""

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flash_attn.errors import InvalidArgument

# in the order in which they are looked for
WEIGHT_FILES = (
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
    "model.safetensors",
    "model.safetensors.index.json",
)


def state_dict_from_pretrained(
    model_name: str, device: torch.device | str | None = None, dtype: torch.dtype | None = None
) -> dict[str, Tensor]:
    """All tensors of a model, from one file or from shards, PyTorch's format before safetensors.

    Args:
        model_name: a folder, or the name of a model of the Hugging Face hub.
        device: where the tensors end up.
        dtype: of all of them; other than fp32 they are converted on the CPU first.

    Raises:
        InvalidArgument: there are no weights of that name.

    Source: flash_attn 2.8.3, flash_attn/utils/pretrained.py.
    """
    first = str(device or "cpu") if dtype in (torch.float32, None) else "cpu"
    tensors: dict[str, Tensor] = {}
    for path in _files(model_name):
        tensors.update(_load(path, first))
    return {name: tensor.to(dtype=dtype).to(device=device) for name, tensor in tensors.items()}


def _files(model_name: str) -> list[str]:
    folder = Path(model_name)
    for name in WEIGHT_FILES:
        found = folder / name if folder.is_dir() else _from_hub(model_name, name)
        if found is None or not Path(found).is_file():
            continue
        return _shards(model_name, str(found)) if name.endswith(".json") else [str(found)]
    raise InvalidArgument(f"model {model_name} has none of {WEIGHT_FILES}")


def _from_hub(model_name: str, name: str) -> str | None:
    from transformers.utils.hub import cached_file

    return cached_file(model_name, name, _raise_exceptions_for_missing_entries=False)


def _shards(model_name: str, index: str) -> list[str]:
    """The files that an index names, beside it in a folder, else from the hub."""
    if Path(model_name).is_dir():
        names = json.loads(Path(index).read_text())["weight_map"].values()
        return [str(Path(model_name) / name) for name in sorted(set(names))]
    from transformers.utils.hub import get_checkpoint_shard_files

    paths, _metadata = get_checkpoint_shard_files(model_name, index)
    return paths


def _load(path: str, device: str) -> dict[str, Any]:
    if not path.endswith(".safetensors"):
        return torch.load(path, map_location=device, weights_only=True)
    from safetensors.torch import load_file

    return load_file(path, device=device)
