"""Checkpoints and configurations of GPT-J: upstream's import path and meaning."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from flash_attn.errors import UnsupportedProblem
from flash_attn.models.config import gpt2_config
from flash_attn.models.state_dict import LAYER, StateDict, join, pad_vocabulary, rename

NAMES = {
    "transformer.wte.": "transformer.embeddings.word_embeddings.",
    "transformer.h.#.ln_1.": LAYER + "norm1.",
    "transformer.h.#.mlp.fc_in.": LAYER + "mlp.fc1.",
    "transformer.h.#.mlp.fc_out.": LAYER + "mlp.fc2.",
    "transformer.h.#.attn.out_proj.": LAYER + "mixer.out_proj.",
}
# masks and angles
DROPPED = tuple(f"transformer.h.#.attn.{name}" for name in ("bias", "masked_bias", "embed_positions"))
QKV = tuple(f"transformer.h.#.attn.{name}_proj." for name in "qkv")


def remap_state_dict_hf_gptj(state_dict: Mapping[str, Tensor], config: Any) -> StateDict:
    """Hugging Face's GPTJForCausalLM as GPTLMHeadModel.

    Source: flash_attn 2.8.3, flash_attn/models/gptj.py.
    """
    renamed = rename(state_dict, NAMES, DROPPED)
    join(renamed, QKV, LAYER + "mixer.Wqkv.")
    return pad_vocabulary(renamed, config, tied=config.tie_word_embeddings)


def gptj_config_to_gpt2_config(gptj_config: Any) -> Any:
    """transformers' GPTJConfig as the GPT2Config of GPTLMHeadModel.

    Raises:
        UnsupportedProblem: rotary_dim is None.

    Source: flash_attn 2.8.3, flash_attn/models/gptj.py.
    """
    head_dim = gptj_config.n_embd // gptj_config.n_head
    if gptj_config.rotary_dim is None:
        raise UnsupportedProblem("GPT-J rotates rotary_dim features of a head, got None")
    return gpt2_config(
        vocab_size=gptj_config.vocab_size,
        n_positions=0,
        n_embd=gptj_config.n_embd,
        n_layer=gptj_config.n_layer,
        n_head=gptj_config.n_head,
        n_inner=gptj_config.n_inner,
        activation_function=gptj_config.activation_function,
        resid_pdrop=gptj_config.resid_pdrop,
        embd_pdrop=gptj_config.embd_pdrop,
        attn_pdrop=gptj_config.attn_pdrop,
        layer_norm_epsilon=gptj_config.layer_norm_epsilon,
        initializer_range=gptj_config.initializer_range,
        bos_token_id=gptj_config.bos_token_id,
        eos_token_id=gptj_config.eos_token_id,
        prenorm=True,
        parallel_block=True,
        parallel_block_tied_norm=True,
        rotary_emb_fraction=gptj_config.rotary_dim / head_dim,
        rotary_emb_interleaved=True,
        tie_word_embeddings=False,
        qkv_proj_bias=False,
        out_proj_bias=False,
        lm_head_bias=True,
    )
