"""Decoders in the manner of GPT-2, with what GPT-J, GPT-NeoX, OPT, Llama and others change: upstream's path and meaning."""

import logging
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flash_attn.errors import InvalidArgument, UnsupportedProblem
from flash_attn.models.baichuan import remap_state_dict_hf_baichuan
from flash_attn.models.bigcode import remap_state_dict_hf_bigcode
from flash_attn.models.btlm import remap_state_dict_hf_btlm
from flash_attn.models.config import padded_vocab_size, require_config
from flash_attn.models.falcon import remap_state_dict_hf_falcon
from flash_attn.models.gpt2_checkpoints import remap_state_dict_hf_gpt2, remap_state_dict_megatron
from flash_attn.models.gpt_block import (
    create_block,
    create_mixer_cls,
    create_mlp_cls,
    norm_cls,
    require_activation,
)
from flash_attn.models.gpt_block import init_weights as _init_weights
from flash_attn.models.gpt_neox import remap_state_dict_hf_gpt_neox
from flash_attn.models.gptj import remap_state_dict_hf_gptj
from flash_attn.models.llama import remap_state_dict_hf_llama
from flash_attn.models.opt import remap_state_dict_hf_opt
from flash_attn.models.state_dict import StateDict, rename
from flash_attn.models.tensor_parallel import combine_state_dicts_tp, shard_state_dict_tp
from flash_attn.modules.embedding import GPT2Embeddings, ParallelGPT2Embeddings
from flash_attn.ops.fused_dense import ColumnParallelLinear, fused_dense_func
from flash_attn.ops.triton.layer_norm import RMSNorm, layer_norm_fn
from flash_attn.utils.distributed import all_gather_raw, sync_shared_params
from flash_attn.utils.generation import GenerationMixin, InferenceParams
from flash_attn.utils.pretrained import state_dict_from_pretrained

__all__ = [
    "GPTLMHeadModel",
    "GPTModel",
    "GPTPreTrainedModel",
    "combine_state_dicts_tp",
    "create_block",
    "create_mixer_cls",
    "create_mlp_cls",
    "remap_state_dict_hf_baichuan",
    "remap_state_dict_hf_bigcode",
    "remap_state_dict_hf_btlm",
    "remap_state_dict_hf_falcon",
    "remap_state_dict_hf_gpt2",
    "remap_state_dict_hf_gpt_neox",
    "remap_state_dict_hf_gptj",
    "remap_state_dict_hf_llama",
    "remap_state_dict_hf_opt",
    "remap_state_dict_megatron",
    "shard_state_dict_tp",
]

logger = logging.getLogger("flash_attn")

# how the name of a checkpoint begins -> what makes it into a state dict of these models
FORMATS: dict[str, Callable[..., StateDict]] = {
    "gpt2": remap_state_dict_hf_gpt2,
    "facebook/opt": remap_state_dict_hf_opt,
    "EleutherAI/gpt-j-": remap_state_dict_hf_gptj,
    "togethercomputer/GPT-JT-": remap_state_dict_hf_gptj,
    "EleutherAI/gpt-neox-": remap_state_dict_hf_gpt_neox,
    "EleutherAI/pythia-": remap_state_dict_hf_gpt_neox,
    "togethercomputer/RedPajama-INCITE-": remap_state_dict_hf_gpt_neox,
    "tiiuae/falcon-": remap_state_dict_hf_falcon,
    "meta-llama/Llama-": remap_state_dict_hf_llama,
    "bigcode/": remap_state_dict_hf_bigcode,
    "WizardLM/": remap_state_dict_hf_bigcode,
    "baichuan-inc/": remap_state_dict_hf_baichuan,
    "cerebras/btlm-": remap_state_dict_hf_btlm,
}
# read without a default; transformers' GPT2Config has all of them
FIELDS = (
    "vocab_size hidden_size max_position_embeddings num_hidden_layers num_attention_heads n_inner activation_function "
    "resid_pdrop embd_pdrop attn_pdrop layer_norm_epsilon initializer_range scale_attn_weights "
    "scale_attn_by_inverse_layer_idx"
)


class CausalLMOutput(NamedTuple):
    """logits: (batch, seqlen, vocab_size)."""

    logits: Tensor


class GPTPreTrainedModel(nn.Module):
    """A model with a configuration that can take the weights of a checkpoint.

    Args:
        config: transformers' GPT2Config, or any other object with its fields; fields of these models alone may be missing.

    Source: flash_attn 2.8.3, flash_attn/models/gpt.py.
    """

    def __init__(self, config: Any) -> None:
        super().__init__()
        require_config(config, "GPT2Config", FIELDS.split())
        self.config = config

    @classmethod
    def from_pretrained(
        cls,
        model_name: str,
        config: Any,
        *args: Any,
        strict: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
        world_size: int = 1,
        rank: int = 0,
        **kwargs: Any,
    ) -> Any:
        """A model with the weights of a checkpoint.

        Args:
            model_name: of the Hugging Face hub, or a folder; the format follows from how it begins (`FORMATS`).
            config: of this model, such as llama_config_to_gpt2_config gives it.
            world_size, rank: load this rank's part of a model that is split over ranks.

        Raises:
            UnsupportedProblem: the name tells no format.
        """
        remap = next((remap for prefix, remap in FORMATS.items() if model_name.startswith(prefix)), None)
        if remap is None:
            raise UnsupportedProblem(
                f"model {model_name} is not supported, its name must begin with one of {[*FORMATS]}"
            )
        model: Any = cls(config, *args, **dict(device=device, dtype=dtype), **kwargs)
        state_dict = remap(state_dict_from_pretrained(model_name, device="cpu", dtype=dtype), config)
        if world_size > 1:
            state_dict = shard_state_dict_tp(state_dict, config, world_size, rank)
        logger.info("%s: %s", model_name, model.load_state_dict(state_dict, strict=strict))
        return model


class GPTModel(GPTPreTrainedModel):
    """Embeddings, layers and the last norm.

    Args:
        process_group: ranks over which vocabulary, heads and hidden features are split; with the configuration's
            sequence_parallel, which is the default, tokens are too, and hidden states are (tokens of this rank, hidden_size).

    Source: flash_attn 2.8.3, flash_attn/models/gpt.py.
    """

    def __init__(
        self, config: Any, process_group: Any = None, device: Any = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__(config)
        require_activation(config.activation_function)
        factory: dict[str, Any] = dict(device=device, dtype=dtype)
        self.process_group = process_group
        self.sequence_parallel = getattr(config, "sequence_parallel", True)
        self.embeddings_multiplier = getattr(config, "mup_embeddings_multiplier", 1.0)
        self.residual_in_fp32 = getattr(config, "residual_in_fp32", False)
        self.prenorm = getattr(config, "prenorm", True)
        self.parallel_block = getattr(config, "parallel_block", False)
        self.fused_dropout_add_ln = getattr(config, "fused_dropout_add_ln", False)
        self.embeddings = _embeddings(config, process_group, factory)
        self.layers = nn.ModuleList(
            create_block(config, index, process_group, **factory) for index in range(config.num_hidden_layers)
        )
        self._share_rotary_tables()
        if self.prenorm:
            self.drop_f = nn.Dropout(config.resid_pdrop)
            self.ln_f = norm_cls(config, **factory)(config.hidden_size)
            if process_group is not None:
                for parameter in self.ln_f.parameters():
                    parameter._shared_params = True
                    if self.sequence_parallel:
                        parameter._sequence_parallel = True
        self.apply(_initialiser(config))
        self.tie_weights()

    def _share_rotary_tables(self) -> None:
        mixers: list[Any] = [layer.mixer for layer in self.layers]
        for mixer in mixers[1:]:
            if mixer.rotary_emb_dim > 0:
                mixer.rotary_emb = mixers[0].rotary_emb

    def tie_weights(self) -> None:
        """Give all ranks the first rank's values of what they share."""
        if self.process_group is not None:
            sync_shared_params(self, self.process_group)

    def allocate_inference_cache(
        self, batch_size: int, max_seqlen: int, dtype: torch.dtype | None = None, **kwargs: Any
    ) -> dict[int, Tensor]:
        """The caches of the layers, to be key_value_memory_dict of an InferenceParams."""
        layers: Any = self.layers
        return {
            index: layer.allocate_inference_cache(batch_size, max_seqlen, dtype=dtype, **kwargs)
            for index, layer in enumerate(layers)
        }

    def forward(
        self, input_ids: Tensor, position_ids: Tensor | None = None, inference_params: InferenceParams | None = None
    ) -> Tensor:
        """input_ids and position_ids (batch, seqlen) -> (batch, seqlen, hidden_size)."""
        embedding_kwargs: dict[str, Any] = {}
        mixer_kwargs: dict[str, Any] = {}
        if self.process_group is not None and self.sequence_parallel:
            # batch and seqlen become one dimension, so that it splits evenly even for a small batch
            embedding_kwargs["combine_batch_seqlen_dim"] = True
            mixer_kwargs["seqlen"] = input_ids.shape[1]
        if inference_params is not None:
            mixer_kwargs["inference_params"] = inference_params
        hidden_states = self.embeddings(input_ids, position_ids=position_ids, **embedding_kwargs)
        if self.embeddings_multiplier != 1.0:
            hidden_states = hidden_states * self.embeddings_multiplier
        if not self.prenorm:
            for layer in self.layers:
                hidden_states = layer(hidden_states, mixer_kwargs=mixer_kwargs)
            return hidden_states
        hidden_states2 = residual = None
        for layer in self.layers:
            if self.parallel_block:
                hidden_states, hidden_states2, residual = layer(
                    hidden_states, hidden_states2, residual, mixer_kwargs=mixer_kwargs
                )
            else:
                hidden_states, residual = layer(hidden_states, residual, mixer_kwargs=mixer_kwargs)
        return self._last_norm(hidden_states, hidden_states2, residual)

    def _last_norm(self, x: Tensor, x1: Tensor | None, residual: Tensor | None) -> Tensor:
        """The norm of the sum of all three."""
        norm: Any = self.ln_f
        if not self.fused_dropout_add_ln:
            total = self.drop_f(x) if residual is None else self.drop_f(x) + residual
            total = total if x1 is None else total + self.drop_f(x1)
            return norm(total.to(norm.weight.dtype))
        return layer_norm_fn(
            x,
            norm.weight,
            norm.bias,
            residual=residual,
            x1=x1,
            eps=norm.eps,
            dropout_p=self.drop_f.p if self.training else 0.0,
            prenorm=False,
            is_rms_norm=isinstance(norm, RMSNorm),
        )


class GPTLMHeadModel(GPTPreTrainedModel, GenerationMixin):
    """`GPTModel` with a head over the vocabulary.

    Source: flash_attn 2.8.3, flash_attn/models/gpt.py.
    """

    def __init__(
        self, config: Any, process_group: Any = None, device: Any = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__(config)
        factory: dict[str, Any] = dict(device=device, dtype=dtype)
        self.process_group = process_group
        self.transformer = GPTModel(config, process_group, **factory)
        self.tie_word_embeddings = getattr(config, "tie_word_embeddings", True)
        self.norm_head = getattr(config, "norm_head", False)
        self.output_scale = getattr(config, "mup_output_multiplier", 1.0) * getattr(config, "mup_width_scale", 1.0)
        embed_dim, word_dim = config.hidden_size, getattr(config, "word_embed_proj_dim", None)
        self.project_out = None if word_dim is None else nn.Linear(embed_dim, word_dim, bias=False, **factory)
        features = (embed_dim if word_dim is None else word_dim, padded_vocab_size(config))
        bias = getattr(config, "lm_head_bias", False)
        if process_group is None:
            self.lm_head: nn.Linear = nn.Linear(*features, bias=bias, **factory)
        else:
            sequence_parallel = getattr(config, "sequence_parallel", True)
            self.lm_head = ColumnParallelLinear(
                *features, process_group, bias=bias, sequence_parallel=sequence_parallel, **factory
            )
        self.apply(_initialiser(config))
        self.tie_weights()

    def tie_weights(self) -> None:
        """Make the head's weight that of the embedding, if the configuration says so; `GPTModel.tie_weights`."""
        if self.tie_word_embeddings:
            self.lm_head.weight = self.transformer.embeddings.word_embeddings.weight
        self.transformer.tie_weights()

    def allocate_inference_cache(
        self, batch_size: int, max_seqlen: int, dtype: torch.dtype | None = None, **kwargs: Any
    ) -> dict[int, Tensor]:
        """`GPTModel.allocate_inference_cache`."""
        return self.transformer.allocate_inference_cache(batch_size, max_seqlen, dtype=dtype, **kwargs)

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor | None = None,
        inference_params: InferenceParams | None = None,
        num_last_tokens: int = 0,
    ) -> CausalLMOutput:
        """Logits.

        Args:
            input_ids, position_ids: (batch, seqlen).
            inference_params: of a generation.
            num_last_tokens: if more than 0, of the last so many tokens only.

        Returns:
            logits: (batch, seqlen, vocab_size), the vocabulary padded. With a process_group this rank's part of the
            vocabulary, in a generation the whole; with sequence_parallel (batch * seqlen, this rank's part).

        Raises:
            InvalidArgument: sequence_parallel in a generation or with num_last_tokens.
        """
        if input_ids.dim() != 2:
            raise InvalidArgument(f"input_ids must have shape (batch, seqlen), got {tuple(input_ids.shape)}")
        sequence_parallel = self.process_group is not None and self.transformer.sequence_parallel
        if sequence_parallel and (inference_params is not None or num_last_tokens > 0):
            raise InvalidArgument(
                f"sequence_parallel is not supported in a generation, nor with num_last_tokens, got {num_last_tokens}"
            )
        hidden_states = self.transformer(input_ids, position_ids=position_ids, inference_params=inference_params)
        if num_last_tokens > 0:
            hidden_states = hidden_states[:, -num_last_tokens:]
        if self.project_out is not None:
            hidden_states = self.project_out(hidden_states)
        if self.output_scale != 1.0:
            hidden_states = hidden_states * self.output_scale
        logits = self._logits(hidden_states)
        if self.process_group is not None and inference_params is not None:
            parts, _ = all_gather_raw(logits.unsqueeze(0), self.process_group)
            logits = parts.movedim(0, -2).flatten(-2)
        return CausalLMOutput(logits)

    def _logits(self, hidden_states: Tensor) -> Tensor:
        if not self.norm_head:
            return self.lm_head(hidden_states)
        weight = F.normalize(self.lm_head.weight)
        return fused_dense_func(
            hidden_states,
            weight,
            self.lm_head.bias,
            process_group=self.process_group,
            sequence_parallel=self.transformer.sequence_parallel,
        )

    def load_state_dict(self, state_dict: Any, strict: bool = True, assign: bool = False) -> Any:
        """nn.Module's, which also takes upstream's first format: norms counted from ln_0, before the first layer."""
        if "transformer.ln_0.weight" in state_dict:
            state_dict = rename(state_dict, _names_since_ln_0(len(self.transformer.layers)))
        return super().load_state_dict(state_dict, strict=strict, assign=assign)


def _embeddings(config: Any, process_group: Any, factory: dict[str, Any]) -> Any:
    sizes = (config.hidden_size, padded_vocab_size(config), config.max_position_embeddings)
    word_dim = getattr(config, "word_embed_proj_dim", None)
    if process_group is None:
        return GPT2Embeddings(*sizes, word_embed_proj_dim=word_dim, **factory)
    if word_dim is not None:
        raise UnsupportedProblem(f"a vocabulary split over ranks supports no word_embed_proj_dim, got {word_dim}")
    sequence_parallel = getattr(config, "sequence_parallel", True)
    return ParallelGPT2Embeddings(*sizes, process_group=process_group, sequence_parallel=sequence_parallel, **factory)


def _initialiser(config: Any) -> Callable[[nn.Module], None]:
    return partial(
        _init_weights,
        n_layer=config.num_hidden_layers,
        initializer_range=config.initializer_range,
        mup_width_scale=getattr(config, "mup_width_scale", 1.0),
    )


def _names_since_ln_0(layers: int) -> dict[str, str]:
    """Norms that followed attention and MLP come before what is next now."""
    names = {"transformer.ln_0.": "transformer.layers.0.norm1."}
    for index in range(layers):
        here, after = f"transformer.layers.{index}.", f"transformer.layers.{index + 1}."
        names[f"{here}norm1."] = f"{here}norm2."
        names[f"{here}norm2."] = f"{after}norm1." if index + 1 < layers else "transformer.ln_f."
    return names
