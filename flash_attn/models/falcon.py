"""Checkpoints and configurations of Falcon: upstream's import path and meaning."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from flash_attn.models.config import gpt2_config, head_dim_of, require_default, rotary_base
from flash_attn.models.state_dict import LAYER, StateDict, change, pad_vocabulary, rename

NAMES = {
    "transformer.word_embeddings.": "transformer.embeddings.word_embeddings.",
    "transformer.h.#.input_layernorm.": LAYER + "norm1.",
    "transformer.h.#.post_attention_layernorm.": LAYER + "norm2.",
    "transformer.h.#.ln_attn.": LAYER + "norm1.",
    "transformer.h.#.ln_mlp.": LAYER + "norm2.",
    "transformer.h.#.mlp.dense_h_to_4h.": LAYER + "mlp.fc1.",
    "transformer.h.#.mlp.dense_4h_to_h.": LAYER + "mlp.fc2.",
    "transformer.h.#.self_attention.query_key_value.": LAYER + "mixer.Wqkv.",
    "transformer.h.#.self_attention.dense.": LAYER + "mixer.out_proj.",
}
DROPPED = ("transformer.h.#.self_attention.rotary_emb.inv_freq",)


def remap_state_dict_hf_falcon(state_dict: Mapping[str, Tensor], config: Any) -> StateDict:
    """Hugging Face's FalconForCausalLM as GPTLMHeadModel.

    Source: flash_attn 2.8.3, flash_attn/models/falcon.py.
    """
    renamed = rename(state_dict, NAMES, DROPPED)
    groups = getattr(config, "n_head_kv", None) or 1
    change(renamed, LAYER + "mixer.Wqkv.", lambda x: _groups_apart(x, groups, head_dim_of(config)))
    return pad_vocabulary(renamed, config, tied=config.tie_word_embeddings)


def falcon_config_to_gpt2_config(falcon_config: Any) -> Any:
    """transformers' FalconConfig as the GPT2Config of GPTLMHeadModel.

    Raises:
        UnsupportedProblem: ALiBi, which Falcon scales by headdim^-0.5, or scaled angles.

    Source: flash_attn 2.8.3, flash_attn/models/falcon.py.
    """
    require_default(falcon_config, alibi=False)
    return gpt2_config(
        vocab_size=falcon_config.vocab_size,
        n_positions=0,
        n_embd=falcon_config.hidden_size,
        n_layer=falcon_config.num_hidden_layers,
        n_head=falcon_config.num_attention_heads,
        n_inner=getattr(falcon_config, "ffn_hidden_size", None) or 4 * falcon_config.hidden_size,
        activation_function=getattr(falcon_config, "activation", "gelu"),
        resid_pdrop=falcon_config.hidden_dropout,
        embd_pdrop=0.0,
        attn_pdrop=falcon_config.attention_dropout,
        layer_norm_epsilon=falcon_config.layer_norm_epsilon,
        initializer_range=falcon_config.initializer_range,
        bos_token_id=falcon_config.bos_token_id,
        eos_token_id=falcon_config.eos_token_id,
        parallel_block=falcon_config.parallel_attn,
        n_head_kv=_nheads_k(falcon_config),
        parallel_block_tied_norm=_norms(falcon_config) == 1,
        rotary_emb_fraction=1.0,
        rotary_emb_interleaved=False,
        rotary_emb_base=rotary_base(falcon_config),
        tie_word_embeddings=falcon_config.tie_word_embeddings,
        qkv_proj_bias=falcon_config.bias,
        out_proj_bias=falcon_config.bias,
        mlp_fc1_bias=falcon_config.bias,
        mlp_fc2_bias=falcon_config.bias,
        lm_head_bias=False,
    )


def _groups_apart(qkv: Tensor, groups: int, head_dim: int) -> Tensor:
    """Rows of each group, its heads of q and its one of k and of v, as those of all q, all k and all v."""
    grouped = qkv.unflatten(0, (groups, -1, head_dim))
    q, k, v = grouped[:, :-2], grouped[:, -2], grouped[:, -1]
    return torch.cat([q.flatten(0, 2), k.flatten(0, 1), v.flatten(0, 1)])


def _nheads_k(config: Any) -> int:
    """The original configurations name it n_head_kv; transformers' num_kv_heads counts in the newer architecture alone."""
    if getattr(config, "n_head_kv", None) is not None:
        return config.n_head_kv
    if getattr(config, "new_decoder_architecture", False):
        return config.num_kv_heads
    return 1 if getattr(config, "multi_query", False) else config.num_attention_heads


def _norms(config: Any) -> int:
    """Norms before a layer's two branches; the original configurations do not tell, but with several heads of k have two."""
    if getattr(config, "num_ln_in_parallel_attn", None) is not None:
        return config.num_ln_in_parallel_attn
    if hasattr(config, "new_decoder_architecture") and getattr(config, "n_head_kv", None) is None:
        return 2 if config.new_decoder_architecture else 1
    return 1 if _nheads_k(config) == 1 else 2
