"""Checkpoints and configurations of GPT BigCode, as StarCoder has it: upstream's import path and meaning."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from flash_attn.errors import UnsupportedProblem
from flash_attn.models.config import gpt2_config, head_dim_of
from flash_attn.models.gpt2_checkpoints import GPT2_DROPPED, GPT2_NAMES
from flash_attn.models.state_dict import (
    LAYER,
    WORDS,
    StateDict,
    change,
    inverse,
    pad_vocabulary,
    rename,
    with_prefix,
    without_prefix,
)

CONFIG_FIELDS = (
    "activation_function attn_pdrop bos_token_id embd_pdrop eos_token_id initializer_range layer_norm_epsilon "
    "max_batch_size max_sequence_length model_type multi_query n_embd n_head n_inner n_layer n_positions resid_pdrop "
    "scale_attn_weights summary_activation summary_first_dropout summary_proj_to_labels summary_type summary_use_proj "
    "use_cache vocab_size"
)


def remap_state_dict_hf_bigcode(state_dict: Mapping[str, Tensor], config: Any) -> StateDict:
    """Hugging Face's GPTBigCodeForCausalLM as GPTLMHeadModel, with its one head of k and v repeated for all of q.

    Raises:
        UnsupportedProblem: without multi_query, as upstream.

    Source: flash_attn 2.8.3, flash_attn/models/bigcode.py.
    """
    _require_multi_query(config)
    renamed = rename(without_prefix(state_dict, "transformer."), GPT2_NAMES, GPT2_DROPPED)
    head_dim = head_dim_of(config)

    def repeated(qkv: Tensor) -> Tensor:
        q, kv = qkv[: config.hidden_size], qkv[config.hidden_size :].unflatten(0, (2, 1, head_dim))
        return torch.cat([q, kv.expand(2, config.num_attention_heads, *kv.shape[2:]).flatten(0, 2)])

    change(renamed, LAYER + "mixer.Wqkv.", repeated)
    return pad_vocabulary(renamed, config, tied=True)


def inv_remap_state_dict_hf_bigcode(state_dict: Mapping[str, Tensor], config: Any) -> StateDict:
    """Undo `remap_state_dict_hf_bigcode`: of the heads of k and v the first is kept.

    Source: flash_attn 2.8.3, flash_attn/models/bigcode.py.
    """
    _require_multi_query(config)
    unpadded = dict(state_dict)
    unpadded[WORDS] = unpadded["lm_head.weight"] = state_dict[WORDS][: config.vocab_size]
    head_dim = head_dim_of(config)

    def once(qkv: Tensor) -> Tensor:
        q, k, v = qkv.split(config.hidden_size)
        return torch.cat([q, k[:head_dim], v[:head_dim]])

    change(unpadded, LAYER + "mixer.Wqkv.", once)
    return with_prefix(rename(unpadded, inverse(GPT2_NAMES)), "transformer.", GPT2_NAMES)


def bigcode_config_to_gpt2_config(bigcode_config: Any) -> Any:
    """transformers' GPTBigCodeConfig as the GPT2Config of GPTLMHeadModel.

    Source: flash_attn 2.8.3, flash_attn/models/bigcode.py.
    """
    # which of those that no model here reads exist depends on the release of transformers
    return gpt2_config(
        **{name: getattr(bigcode_config, name) for name in CONFIG_FIELDS.split() if hasattr(bigcode_config, name)}
    )


def _require_multi_query(config: Any) -> None:
    if not config.multi_query:
        raise UnsupportedProblem(f"only multi-query attention is supported, got multi_query {config.multi_query}")
