"""Tiny decoders of transformers with random weights, and how each becomes one of flash_attn.models.gpt."""

from importlib import import_module
from typing import Any, NamedTuple

import torch
import transformers

from flash_attn.models.gpt import GPTLMHeadModel

VOCABULARY = 61
SIZES = dict(
    vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, bos_token_id=1, eos_token_id=2
)
GPT2_SIZES = dict(vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=64, bos_token_id=1, eos_token_id=2)
LLAMA = SIZES | dict(intermediate_size=40, num_key_value_heads=2, max_position_embeddings=64)
NEOX = SIZES | dict(intermediate_size=40, max_position_embeddings=64)
OPT = SIZES | dict(ffn_dim=40, max_position_embeddings=64, pad_token_id=0)


class Decoder(NamedTuple):
    """A model by the names of its classes, with the words of its configuration.

    module: of flash_attn.models; name: in the names of its functions.
    """

    config: str
    model: str
    words: dict[str, Any]
    module: str
    name: str


def llama(**words: Any) -> Decoder:
    return Decoder("LlamaConfig", "LlamaForCausalLM", LLAMA | words, "llama", "llama")


def neox(**words: Any) -> Decoder:
    return Decoder("GPTNeoXConfig", "GPTNeoXForCausalLM", NEOX | words, "gpt_neox", "gpt_neox")


def opt(**words: Any) -> Decoder:
    return Decoder("OPTConfig", "OPTForCausalLM", OPT | dict(word_embed_proj_dim=32) | words, "opt", "opt")


def falcon(**words: Any) -> Decoder:
    return Decoder("FalconConfig", "FalconForCausalLM", SIZES | words, "falcon", "falcon")


DECODERS = {
    "gpt2": Decoder("GPT2Config", "GPT2LMHeadModel", GPT2_SIZES | dict(n_inner=40), "gpt", "gpt2"),
    "gpt2, scaled by the layer": Decoder(
        "GPT2Config",
        "GPT2LMHeadModel",
        GPT2_SIZES | dict(scale_attn_by_inverse_layer_idx=True, activation_function="relu"),
        "gpt",
        "gpt2",
    ),
    "llama": llama(),
    "llama, one head of keys, another base, biases, tied": llama(
        num_key_value_heads=1,
        rope_parameters={"rope_type": "default", "rope_theta": 500.0},
        attention_bias=True,
        mlp_bias=True,
        tie_word_embeddings=True,
    ),
    "gpt-neox": neox(),
    "gpt-neox, in sequence, half rotary": neox(
        use_parallel_residual=False,
        hidden_act="gelu_fast",
        rope_parameters={"rope_type": "default", "rope_theta": 300.0, "partial_rotary_factor": 0.5},
    ),
    "gpt-j": Decoder("GPTJConfig", "GPTJForCausalLM", GPT2_SIZES | dict(rotary_dim=4), "gptj", "gptj"),
    "opt": opt(),
    "opt, norms behind, narrow words": opt(do_layer_norm_before=False, word_embed_proj_dim=16, enable_bias=True),
    "opt, no biases": opt(enable_bias=False),
    "falcon, one head of keys": falcon(),
    "falcon, newer": falcon(new_decoder_architecture=True, num_kv_heads=2, bias=True),
    "falcon, newer with one norm": falcon(new_decoder_architecture=True, num_kv_heads=2, num_ln_in_parallel_attn=1),
    "falcon, all heads, in sequence": falcon(multi_query=False, parallel_attn=False, bias=True),
    "bigcode": Decoder(
        "GPTBigCodeConfig", "GPTBigCodeForCausalLM", GPT2_SIZES | dict(n_inner=40), "bigcode", "bigcode"
    ),
}


def build(decoder: Decoder, seed: int) -> Any:
    """transformers' model in fp32, eager; all of its parameters random, those of the norms too."""
    config = getattr(transformers, decoder.config)(**decoder.words)
    model = getattr(transformers, decoder.model)._from_config(config, attn_implementation="eager").eval()
    model.generation_config.eos_token_id = None
    randomise(model, seed)
    return model


def randomise(model: torch.nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = 0.2 * torch.randn(parameter.shape, generator=generator)
            is_norm = parameter.dim() == 1 and bool((parameter == 1).all())
            parameter.copy_(1 + noise if is_norm else noise)


def gpt_config(decoder: Decoder, config: Any, **options: Any) -> Any:
    """The configuration of the GPTLMHeadModel, with options of its own."""
    if decoder.name == "gpt2":
        converted = config
    else:
        module = import_module(f"flash_attn.models.{decoder.module}")
        converted = getattr(module, f"{decoder.name}_config_to_gpt2_config")(config)
    for name, value in options.items():
        setattr(converted, name, value)
    return converted


def remap(decoder: Decoder, state_dict: Any, config: Any) -> dict[str, torch.Tensor]:
    module = import_module(f"flash_attn.models.{decoder.module}")
    return getattr(module, f"remap_state_dict_hf_{decoder.name}")(state_dict, config)


def converted(decoder: Decoder, model: Any, **options: Any) -> GPTLMHeadModel:
    """The GPTLMHeadModel with the weights of transformers' model."""
    config = gpt_config(decoder, model.config, **options)
    ours = GPTLMHeadModel(config).eval()
    ours.load_state_dict(remap(decoder, model.state_dict(), config), strict=True)
    return ours
