"""Hugging Face's checkpoints of BERT as flash_attn.models.bert names them, and back."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from flash_attn.models.config import padded_vocab_size, vocab_multiple
from flash_attn.models.state_dict import StateDict, inverse, join, padded_rows, rename, split

NAMES = {
    "bert.embeddings.LayerNorm.": "bert.emb_ln.",
    "bert.encoder.layer.#.attention.output.LayerNorm.": "bert.encoder.layers.#.norm1.",
    "bert.encoder.layer.#.output.LayerNorm.": "bert.encoder.layers.#.norm2.",
    "bert.encoder.layer.#.intermediate.dense.": "bert.encoder.layers.#.mlp.fc1.",
    "bert.encoder.layer.#.output.dense.": "bert.encoder.layers.#.mlp.fc2.",
    "bert.encoder.layer.#.attention.output.dense.": "bert.encoder.layers.#.mixer.out_proj.",
    "cls.predictions.transform.LayerNorm.": "cls.predictions.transform.layer_norm.",
    "cls.predictions.bias": "cls.predictions.decoder.bias",
}
DROPPED = ("bert.embeddings.position_ids",)
QUERY, KEY, VALUE = (f"bert.encoder.layer.#.attention.self.{name}." for name in ("query", "key", "value"))
MIXER = "bert.encoder.layers.#.mixer."
# TensorFlow's names, in which the published checkpoints are
NORM_NAMES = {"LayerNorm.gamma": "LayerNorm.weight", "LayerNorm.beta": "LayerNorm.bias"}

EMBEDDING, DECODER = "bert.embeddings.word_embeddings.weight", "cls.predictions.decoder.weight"
DECODER_BIAS = "cls.predictions.decoder.bias"
NEVER = -100.0  # logit of a token that only pads the vocabulary


def remap_state_dict(state_dict: Mapping[str, Tensor], config: Any) -> StateDict:
    """Hugging Face's BertForPreTraining, or another model with its names, as BertForPreTraining here.

    Source: flash_attn 2.8.3, flash_attn/models/bert.py.
    """
    renamed = rename(_with_ends(state_dict, NORM_NAMES), NAMES, DROPPED)
    if getattr(config, "last_layer_subset", False):
        query, key, value, mixer = (_of_last_layer(name, config) for name in (QUERY, KEY, VALUE, MIXER))
        join(renamed, (query,), mixer + "Wq.")
        join(renamed, (key, value), mixer + "Wkv.")
    join(renamed, (QUERY, KEY, VALUE), MIXER + "Wqkv.")
    if DECODER_BIAS in renamed:
        renamed.setdefault(DECODER, renamed[EMBEDDING])
    if vocab_multiple(config) > 1:
        for name, padding in ((EMBEDDING, 0.0), (DECODER, 0.0), (DECODER_BIAS, NEVER)):
            if name in renamed:
                renamed[name] = padded_rows(renamed[name], padded_vocab_size(config), padding)
    return renamed


def inv_remap_state_dict(state_dict: Mapping[str, Tensor], config: Any) -> StateDict:
    """Undo `remap_state_dict`; weight and bias of the norms get TensorFlow's names gamma and beta, as upstream.

    The padding of the vocabulary goes: what stays is orig_vocab_size, if the configuration has it, else vocab_size.

    Source: flash_attn 2.8.3, flash_attn/models/bert.py.
    """
    unpadded = dict(state_dict)
    if vocab_multiple(config) > 1:
        for name in (EMBEDDING, DECODER, DECODER_BIAS):
            unpadded[name] = unpadded[name][: getattr(config, "orig_vocab_size", config.vocab_size)]
    split(unpadded, MIXER + "Wqkv.", (QUERY, KEY, VALUE))
    split(unpadded, MIXER + "Wq.", (QUERY,))
    split(unpadded, MIXER + "Wkv.", (KEY, VALUE))
    return _with_ends(rename(unpadded, inverse(NAMES)), inverse(NORM_NAMES))


def _with_ends(state_dict: Mapping[str, Tensor], ends: Mapping[str, str]) -> StateDict:
    """The same under names that end otherwise."""
    renamed = {}
    for key, tensor in state_dict.items():
        end = next((end for end in ends if key.endswith(end)), None)
        renamed[key if end is None else key.removesuffix(end) + ends[end]] = tensor
    return renamed


def _of_last_layer(template: str, config: Any) -> str:
    return template.replace("#", str(config.num_hidden_layers - 1))
