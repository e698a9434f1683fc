"""Checkpoints and configurations of OPT: upstream's import path and meaning."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from flash_attn.models.config import gpt2_config, require_default
from flash_attn.models.state_dict import LAYER, StateDict, change, join, pad_vocabulary, rename, without_prefix

NAMES = {
    "embed_tokens.": "transformer.embeddings.word_embeddings.",
    "embed_positions.": "transformer.embeddings.position_embeddings.",
    "project_in.": "transformer.embeddings.project_in.",
    "project_out.": "project_out.",
    "final_layer_norm.": "transformer.ln_f.",
    "layer_norm.": "transformer.ln_f.",  # of the checkpoint with 175 billion parameters
    "layers.#.self_attn_layer_norm.": LAYER + "norm1.",
    "layers.#.final_layer_norm.": LAYER + "norm2.",
    "layers.#.fc1.": LAYER + "mlp.fc1.",
    "layers.#.fc2.": LAYER + "mlp.fc2.",
    "layers.#.self_attn.out_proj.": LAYER + "mixer.out_proj.",
}
QKV = tuple(f"layers.#.self_attn.{name}_proj." for name in "qkv")
PADDING_POSITIONS = 2  # the first embeddings of positions belong to no token


def remap_state_dict_hf_opt(state_dict: Mapping[str, Tensor], config: Any) -> StateDict:
    """Hugging Face's OPTForCausalLM or OPTModel as GPTLMHeadModel, whose head is the embedding's weight.

    Source: flash_attn 2.8.3, flash_attn/models/opt.py.
    """
    renamed = rename(without_prefix(state_dict, "model.decoder.", "decoder."), NAMES)
    join(renamed, QKV, LAYER + "mixer.Wqkv.")
    positions = "transformer.embeddings.position_embeddings.weight"
    change(renamed, positions, lambda x: x[PADDING_POSITIONS:])
    return pad_vocabulary(renamed, config, tied=True)


def opt_config_to_gpt2_config(opt_config: Any) -> Any:
    """transformers' OPTConfig as the GPT2Config of GPTLMHeadModel.

    Raises:
        UnsupportedProblem: layers are left out at random, norms have no weights, or the last norm is missing.

    Source: flash_attn 2.8.3, flash_attn/models/opt.py.
    """
    require_default(opt_config, layerdrop=0.0, layer_norm_elementwise_affine=True, _remove_final_layer_norm=False)
    narrow = opt_config.word_embed_proj_dim != opt_config.hidden_size
    bias = getattr(opt_config, "enable_bias", True)
    return gpt2_config(
        vocab_size=opt_config.vocab_size,
        n_positions=opt_config.max_position_embeddings,
        n_embd=opt_config.hidden_size,
        n_layer=opt_config.num_hidden_layers,
        n_head=opt_config.num_attention_heads,
        n_inner=opt_config.ffn_dim,
        activation_function=opt_config.activation_function,
        resid_pdrop=opt_config.dropout,
        embd_pdrop=opt_config.dropout,
        attn_pdrop=opt_config.attention_dropout,
        initializer_range=opt_config.init_std,
        bos_token_id=opt_config.bos_token_id,
        eos_token_id=opt_config.eos_token_id,
        prenorm=opt_config.do_layer_norm_before,
        word_embed_proj_dim=opt_config.word_embed_proj_dim if narrow else None,
        qkv_proj_bias=bias,
        out_proj_bias=bias,
        mlp_fc1_bias=bias,
        mlp_fc2_bias=bias,
    )
