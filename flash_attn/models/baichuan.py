"""Checkpoints and configurations of Baichuan: upstream's import path and meaning."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from flash_attn.models.config import gpt2_config
from flash_attn.models.llama import HF_DROPPED, HF_MLP, HF_NAMES
from flash_attn.models.state_dict import LAYER, StateDict, join, pad_vocabulary, rename

NAMES = {**HF_NAMES, "model.layers.#.self_attn.W_pack.": LAYER + "mixer.Wqkv."}
# Not in the configuration: the larger model has ALiBi instead of rotary embeddings, the second release a normalised head.
LARGEST_WITH_ROTARY = 5000  # hidden_size
LARGEST_WITHOUT_NORM_HEAD = 70000  # vocab_size


def remap_state_dict_hf_baichuan(state_dict: Mapping[str, Tensor], config: Any) -> StateDict:
    """Baichuan's checkpoint as GPTLMHeadModel.

    Source: flash_attn 2.8.3, flash_attn/models/baichuan.py.
    """
    renamed = rename(state_dict, NAMES, HF_DROPPED)
    join(renamed, HF_MLP, LAYER + "mlp.fc1.")
    return pad_vocabulary(renamed, config, tied=config.tie_word_embeddings, shard=True)


def baichuan_config_to_gpt2_config(baichuan_config: Any) -> Any:
    """Baichuan's configuration as the GPT2Config of GPTLMHeadModel.

    Source: flash_attn 2.8.3, flash_attn/models/baichuan.py, also for what the sizes tell.
    """
    rotary = baichuan_config.hidden_size < LARGEST_WITH_ROTARY
    return gpt2_config(
        vocab_size=baichuan_config.vocab_size,
        n_positions=0,
        n_embd=baichuan_config.hidden_size,
        n_layer=baichuan_config.num_hidden_layers,
        n_head=baichuan_config.num_attention_heads,
        n_inner=baichuan_config.intermediate_size,
        activation_function="swiglu",
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        layer_norm_epsilon=baichuan_config.rms_norm_eps,
        initializer_range=baichuan_config.initializer_range,
        bos_token_id=baichuan_config.bos_token_id,
        eos_token_id=baichuan_config.eos_token_id,
        pad_token_id=baichuan_config.pad_token_id,
        rms_norm=True,
        rotary_emb_fraction=1.0 if rotary else 0.0,
        rotary_emb_interleaved=False,
        use_alibi=not rotary,
        use_flash_attn=not rotary,
        tie_word_embeddings=False,
        norm_head=baichuan_config.vocab_size > LARGEST_WITHOUT_NORM_HEAD,
        qkv_proj_bias=False,
        out_proj_bias=False,
        mlp_fc1_bias=False,
        mlp_fc2_bias=False,
        mlp_multiple_of=1,
    )
