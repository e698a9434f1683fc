"""Checkpoints and configurations of GPT-NeoX and Pythia: upstream's import path and meaning."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from flash_attn.models.config import gpt2_config, head_dim_of, require_default, rope_parameters, rotary_base
from flash_attn.models.gpt2_checkpoints import heads_apart
from flash_attn.models.state_dict import LAYER, StateDict, change, pad_vocabulary, rename

NAMES = {
    "embed_out.": "lm_head.",
    "gpt_neox.embed_in.": "transformer.embeddings.word_embeddings.",
    "gpt_neox.final_layer_norm.": "transformer.ln_f.",
    "gpt_neox.layers.#.input_layernorm.": LAYER + "norm1.",
    "gpt_neox.layers.#.post_attention_layernorm.": LAYER + "norm2.",
    "gpt_neox.layers.#.mlp.dense_h_to_4h.": LAYER + "mlp.fc1.",
    "gpt_neox.layers.#.mlp.dense_4h_to_h.": LAYER + "mlp.fc2.",
    "gpt_neox.layers.#.attention.query_key_value.": LAYER + "mixer.Wqkv.",
    "gpt_neox.layers.#.attention.dense.": LAYER + "mixer.out_proj.",
}
# masks and angles
DROPPED = tuple(f"gpt_neox.layers.#.attention.{name}" for name in ("bias", "masked_bias", "rotary_emb.inv_freq"))


def remap_state_dict_hf_gpt_neox(state_dict: Mapping[str, Tensor], config: Any) -> StateDict:
    """Hugging Face's GPTNeoXForCausalLM as GPTLMHeadModel.

    Source: flash_attn 2.8.3, flash_attn/models/gpt_neox.py.
    """
    renamed = rename(state_dict, NAMES, DROPPED)
    change(renamed, LAYER + "mixer.Wqkv.", lambda x: heads_apart(x, head_dim_of(config)))
    return pad_vocabulary(renamed, config, tied=getattr(config, "tie_word_embeddings", False))


def gpt_neox_config_to_gpt2_config(gpt_neox_config: Any) -> Any:
    """transformers' GPTNeoXConfig as the GPT2Config of GPTLMHeadModel, without dropout.

    Raises:
        UnsupportedProblem: projections without bias, or scaled angles.

    Source: flash_attn 2.8.3, flash_attn/models/gpt_neox.py.
    """
    require_default(gpt_neox_config, attention_bias=True)
    fraction = rope_parameters(gpt_neox_config).get("partial_rotary_factor")
    return gpt2_config(
        vocab_size=gpt_neox_config.vocab_size,
        n_positions=0,
        n_embd=gpt_neox_config.hidden_size,
        n_layer=gpt_neox_config.num_hidden_layers,
        n_head=gpt_neox_config.num_attention_heads,
        n_inner=gpt_neox_config.intermediate_size,
        activation_function=gpt_neox_config.hidden_act,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        layer_norm_epsilon=gpt_neox_config.layer_norm_eps,
        initializer_range=gpt_neox_config.initializer_range,
        bos_token_id=gpt_neox_config.bos_token_id,
        eos_token_id=gpt_neox_config.eos_token_id,
        prenorm=True,
        parallel_block=gpt_neox_config.use_parallel_residual,
        parallel_block_tied_norm=False,
        rotary_emb_fraction=gpt_neox_config.rotary_pct if fraction is None else fraction,
        rotary_emb_base=rotary_base(gpt_neox_config),
        tie_word_embeddings=gpt_neox_config.tie_word_embeddings,
    )
