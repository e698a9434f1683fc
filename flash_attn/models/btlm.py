"""Checkpoints and configurations of BTLM, a GPT-2 with gates, ALiBi and μP: upstream's import path and meaning."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from flash_attn.models.config import gpt2_config
from flash_attn.models.gpt2_checkpoints import CONV1D, GPT2_DROPPED, GPT2_NAMES
from flash_attn.models.state_dict import LAYER, StateDict, change, join, pad_vocabulary, rename, without_prefix

NAMES = {**GPT2_NAMES, "h.#.mlp.c_fc.": LAYER + "mlp.y.", "h.#.mlp.c_fc2.": LAYER + "mlp.gate."}
DROPPED = (*GPT2_DROPPED, "relative_pe.slopes")
MLP = (LAYER + "mlp.y.", LAYER + "mlp.gate.")


def remap_state_dict_hf_btlm(state_dict: Mapping[str, Tensor], config: Any) -> StateDict:
    """BTLM's checkpoint as GPTLMHeadModel, whose head is the embedding's weight.

    Source: flash_attn 2.8.3, flash_attn/models/btlm.py.
    """
    renamed = rename(without_prefix(state_dict, "transformer."), NAMES, DROPPED)
    for template in (*CONV1D, *(part + "weight" for part in MLP)):
        change(renamed, template, Tensor.t)
    join(renamed, MLP, LAYER + "mlp.fc1.")
    return pad_vocabulary(renamed, config, tied=True)


def btlm_config_to_gpt2_config(btlm_config: Any) -> Any:
    """BTLM's configuration as the GPT2Config of GPTLMHeadModel.

    Source: flash_attn 2.8.3, flash_attn/models/btlm.py.
    """
    alibi = btlm_config.position_embedding_type == "alibi"
    return gpt2_config(
        vocab_size=btlm_config.vocab_size,
        n_positions=0 if alibi else btlm_config.n_positions,
        n_embd=btlm_config.hidden_size,
        n_layer=btlm_config.num_hidden_layers,
        n_head=btlm_config.num_attention_heads,
        n_inner=btlm_config.n_inner,
        activation_function=btlm_config.activation_function,
        resid_pdrop=btlm_config.resid_pdrop,
        embd_pdrop=btlm_config.embd_pdrop,
        attn_pdrop=btlm_config.attn_pdrop,
        layer_norm_epsilon=btlm_config.layer_norm_epsilon,
        initializer_range=btlm_config.initializer_range,
        bos_token_id=btlm_config.bos_token_id,
        eos_token_id=btlm_config.eos_token_id,
        use_alibi=alibi,
        use_flash_attn=alibi,
        mup_width_scale=btlm_config.mup_width_scale,
        mup_embeddings_multiplier=btlm_config.mup_embeddings_scale,
        mup_output_multiplier=btlm_config.mup_output_alpha,
        mup_scale_qk_dot_by_d=btlm_config.mup_scale_qk_dot_by_d,
        mlp_multiple_of=1,
    )
