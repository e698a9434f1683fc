"""Checkpoints of GPT-2, from Hugging Face's hub and from Megatron-LM."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from flash_attn.models.config import head_dim_of
from flash_attn.models.state_dict import LAYER, StateDict, change, pad_vocabulary, rename, without_prefix

GPT2_NAMES = {
    "wte.": "transformer.embeddings.word_embeddings.",
    "wpe.": "transformer.embeddings.position_embeddings.",
    "ln_f.": "transformer.ln_f.",
    "h.#.ln_1.": LAYER + "norm1.",
    "h.#.ln_2.": LAYER + "norm2.",
    "h.#.mlp.c_fc.": LAYER + "mlp.fc1.",
    "h.#.mlp.c_proj.": LAYER + "mlp.fc2.",
    "h.#.attn.c_attn.": LAYER + "mixer.Wqkv.",
    "h.#.attn.c_proj.": LAYER + "mixer.out_proj.",
}
# buffers of masks
GPT2_DROPPED = ("h.#.attn.bias", "h.#.attn.masked_bias")
# stored as (in_features, out_features)
CONV1D = tuple(LAYER + name + ".weight" for name in ("mixer.Wqkv", "mixer.out_proj", "mlp.fc1", "mlp.fc2"))

MEGATRON_NAMES = {
    "embedding.word_embeddings.": "transformer.embeddings.word_embeddings.",
    "embedding.position_embeddings.": "transformer.embeddings.position_embeddings.",
    "final_layernorm.": "transformer.ln_f.",
    "layers.#.input_layernorm.": LAYER + "norm1.",
    "layers.#.post_attention_layernorm.": LAYER + "norm2.",
    "layers.#.mlp.dense_h_to_4h.": LAYER + "mlp.fc1.",
    "layers.#.mlp.dense_4h_to_h.": LAYER + "mlp.fc2.",
    "layers.#.self_attention.query_key_value.": LAYER + "mixer.Wqkv.",
    "layers.#.self_attention.dense.": LAYER + "mixer.out_proj.",
}


def remap_state_dict_hf_gpt2(state_dict: Mapping[str, Tensor], config: Any) -> StateDict:
    """Hugging Face's GPT2Model or GPT2LMHeadModel as GPTLMHeadModel, whose head is the embedding's weight.

    Source: flash_attn 2.8.3, flash_attn/models/gpt.py.
    """
    renamed = rename(without_prefix(state_dict, "transformer."), GPT2_NAMES, GPT2_DROPPED)
    for template in CONV1D:
        change(renamed, template, Tensor.t)
    return pad_vocabulary(renamed, config, tied=True)


def remap_state_dict_megatron(state_dict: Mapping[str, Tensor], config: Any) -> StateDict:
    """Megatron-LM's GPT as GPTLMHeadModel, whose head is the embedding's weight.

    Source: flash_attn 2.8.3, flash_attn/models/gpt.py.
    """
    short = without_prefix(state_dict, "language_model.encoder.", "language_model.")
    # of a release that stored the positions as GPT-2 does
    short = rename(short, {"wpe.": "embedding.position_embeddings."})
    renamed = rename(short, MEGATRON_NAMES, ("layers.#.self_attention.rotary_emb.inv_freq",))
    change(renamed, LAYER + "mixer.Wqkv.", lambda x: heads_apart(x, head_dim_of(config)))
    return pad_vocabulary(renamed, config, tied=True, shard=True)


def heads_apart(qkv: Tensor, head_dim: int) -> Tensor:
    """Rows (nheads, 3, headdim) as (3, nheads, headdim)."""
    return qkv.unflatten(0, (-1, 3, head_dim)).transpose(0, 1).flatten(0, 2)
