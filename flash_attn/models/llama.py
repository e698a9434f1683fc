"""Checkpoints and configurations of Llama, Meta's and Hugging Face's: upstream's import path and meaning."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flash_attn.models.config import gpt2_config, head_dim_of, require_default, rotary_base, round_up
from flash_attn.models.state_dict import LAYER, StateDict, change, inverse, join, pad_vocabulary, rename, split

META_NAMES = {
    "tok_embeddings.": "transformer.embeddings.word_embeddings.",
    "norm.": "transformer.ln_f.",
    "output.": "lm_head.",
    "layers.#.attention_norm.": LAYER + "norm1.",
    "layers.#.ffn_norm.": LAYER + "norm2.",
    "layers.#.feed_forward.w2.": LAYER + "mlp.fc2.",
    "layers.#.attention.wo.": LAYER + "mixer.out_proj.",
}
META_DROPPED = ("rope.freqs", "layers.#.attention.inner_attention.rope.freqs")
META_QKV = tuple(f"layers.#.attention.{name}." for name in ("wq", "wk", "wv"))
META_MLP = ("layers.#.feed_forward.w3.", "layers.#.feed_forward.w1.")

HF_NAMES = {
    "model.embed_tokens.": "transformer.embeddings.word_embeddings.",
    "model.norm.": "transformer.ln_f.",
    "model.layers.#.input_layernorm.": LAYER + "norm1.",
    "model.layers.#.post_attention_layernorm.": LAYER + "norm2.",
    "model.layers.#.mlp.down_proj.": LAYER + "mlp.fc2.",
    "model.layers.#.self_attn.o_proj.": LAYER + "mixer.out_proj.",
}
HF_DROPPED = ("model.layers.#.self_attn.rotary_emb.inv_freq",)
HF_QKV = tuple(f"model.layers.#.self_attn.{name}_proj." for name in "qkv")
HF_MLP = ("model.layers.#.mlp.up_proj.", "model.layers.#.mlp.gate_proj.")


def remap_state_dict_meta_llama(state_dict: Mapping[str, Tensor], config: Any) -> StateDict:
    """Meta's Llama, whole or one of its shards, as GPTLMHeadModel; `combine_state_dicts_tp` puts the shards together.

    Source: flash_attn 2.8.3, flash_attn/models/llama.py.
    """
    renamed = rename(state_dict, META_NAMES, META_DROPPED)
    join(renamed, META_QKV, LAYER + "mixer.Wqkv.")
    join(renamed, META_MLP, LAYER + "mlp.fc1.")
    return pad_vocabulary(renamed, config, tied=config.tie_word_embeddings, shard=True)


def remap_state_dict_hf_llama(state_dict: Mapping[str, Tensor], config: Any) -> StateDict:
    """Hugging Face's LlamaForCausalLM as GPTLMHeadModel, which rotates neighbouring features rather than halves.

    Source: flash_attn 2.8.3, flash_attn/models/llama.py.
    """
    renamed = rename(state_dict, HF_NAMES, HF_DROPPED)
    for template in HF_QKV[:2]:
        change(renamed, template, lambda x: _interleaved(x, head_dim_of(config)))
    join(renamed, HF_QKV, LAYER + "mixer.Wqkv.")
    join(renamed, HF_MLP, LAYER + "mlp.fc1.")
    return pad_vocabulary(renamed, config, tied=config.tie_word_embeddings, shard=True)


def inv_remap_state_dict_hf_llama(state_dict: Mapping[str, Tensor], config: Any) -> StateDict:
    """Undo `remap_state_dict_hf_llama`, but for the vocabulary's padding, which stays.

    Source: flash_attn 2.8.3, flash_attn/models/llama.py.
    """
    padded = pad_vocabulary(dict(state_dict), config, tied=config.tie_word_embeddings, shard=True)
    renamed = rename(padded, inverse(HF_NAMES))
    head_dim = head_dim_of(config)
    nheads_k = getattr(config, "n_head_kv", None) or config.num_attention_heads
    kv_dim = nheads_k * head_dim
    split(renamed, LAYER + "mixer.Wqkv.", HF_QKV, (config.hidden_size, kv_dim, kv_dim))
    for template in HF_QKV[:2]:
        change(renamed, template, lambda x: _in_halves(x, head_dim))
    split(renamed, LAYER + "mlp.fc1.", HF_MLP)
    return renamed


def config_from_meta_checkpoint(checkpoint_path: str | os.PathLike, model_name: str) -> Any:
    """transformers' LlamaConfig of Meta's folder checkpoint_path / model_name, from its params.json.

    The vocabulary's size is that of params.json if it names one, else that of tokenizer.model, which sentencepiece reads, else
    32000.

    Source: flash_attn 2.8.3, flash_attn/models/llama.py.
    """
    from transformers import LlamaConfig

    folder = Path(checkpoint_path) / model_name
    params = json.loads((folder / "params.json").read_text())
    config = LlamaConfig(
        vocab_size=_vocab_size(params, folder / "tokenizer.model"),
        hidden_size=params["dim"],
        intermediate_size=_meta_intermediate_size(params),
        num_attention_heads=params["n_heads"],
        num_hidden_layers=params["n_layers"],
        rms_norm_eps=params["norm_eps"],
        num_key_value_heads=params.get("n_kv_heads"),
    )
    if "rope_theta" in params:
        config.rotary_emb_base = params["rope_theta"]
    return config


def config_from_hf_checkpoint(checkpoint_path: str | os.PathLike, model_name: str) -> Any:
    """transformers' LlamaConfig of the folder checkpoint_path / model_name-hf."""
    from transformers import LlamaConfig

    return LlamaConfig.from_pretrained(Path(checkpoint_path) / f"{model_name}-hf" / "config.json")


def config_from_checkpoint(checkpoint_path: str | os.PathLike, model_name: str, checkpoint_format: str = "meta") -> Any:
    """`config_from_meta_checkpoint`, or for any other format `config_from_hf_checkpoint`."""
    if checkpoint_format == "meta":
        return config_from_meta_checkpoint(checkpoint_path, model_name)
    return config_from_hf_checkpoint(checkpoint_path, model_name)


def state_dicts_from_checkpoint(checkpoint_path: str | os.PathLike, model_name: str) -> list[dict]:
    """Meta's shards consolidated.*.pth in the order of their ranks."""
    paths = sorted((Path(checkpoint_path) / model_name).glob("consolidated.*.pth"))
    return [torch.load(path, map_location="cpu", weights_only=True) for path in paths]


def llama_config_to_gpt2_config(llama_config: Any) -> Any:
    """transformers' LlamaConfig as the GPT2Config of GPTLMHeadModel.

    Raises:
        UnsupportedProblem: an activation other than silu, scaled angles, or heads of another size.

    Source: flash_attn 2.8.3, flash_attn/models/llama.py.
    """
    head_dim_of(llama_config)
    require_default(llama_config, hidden_act="silu")
    attention_bias, mlp_bias = (getattr(llama_config, name, False) for name in ("attention_bias", "mlp_bias"))
    return gpt2_config(
        vocab_size=llama_config.vocab_size,
        n_positions=0,
        n_embd=llama_config.hidden_size,
        n_layer=llama_config.num_hidden_layers,
        n_head=llama_config.num_attention_heads,
        n_inner=llama_config.intermediate_size,
        activation_function="swiglu",
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        layer_norm_epsilon=llama_config.rms_norm_eps,
        initializer_range=llama_config.initializer_range,
        bos_token_id=llama_config.bos_token_id,
        eos_token_id=llama_config.eos_token_id,
        pad_token_id=llama_config.pad_token_id,
        rms_norm=True,
        rotary_emb_fraction=1.0,
        rotary_emb_interleaved=True,
        rotary_emb_base=rotary_base(llama_config),
        tie_word_embeddings=llama_config.tie_word_embeddings,
        qkv_proj_bias=attention_bias,
        out_proj_bias=attention_bias,
        mlp_fc1_bias=mlp_bias,
        mlp_fc2_bias=mlp_bias,
        mlp_multiple_of=1,
        n_head_kv=llama_config.num_key_value_heads,
    )


def _interleaved(x: Tensor, head_dim: int) -> Tensor:
    """Rows (nheads, 2, headdim / 2) as (nheads, headdim / 2, 2)."""
    return x.unflatten(0, (-1, 2, head_dim // 2)).transpose(1, 2).flatten(0, 2)


def _in_halves(x: Tensor, head_dim: int) -> Tensor:
    """Undo `_interleaved`."""
    return x.unflatten(0, (-1, head_dim // 2, 2)).transpose(1, 2).flatten(0, 2)


def _meta_intermediate_size(params: Mapping[str, Any]) -> int:
    """Two thirds of four times dim, scaled and rounded up as Meta's model does it."""
    size = int(2 * 4 * params["dim"] / 3)
    if params.get("ffn_dim_multiplier") is not None:
        size = int(params["ffn_dim_multiplier"] * size)
    return round_up(size, params.get("multiple_of", 1))


def _vocab_size(params: Mapping[str, Any], tokenizer: Path) -> int:
    if params.get("vocab_size", -1) > 0:
        return params["vocab_size"]
    if not tokenizer.is_file():
        return 32000
    from sentencepiece import SentencePieceProcessor

    return SentencePieceProcessor(str(tokenizer)).vocab_size()
