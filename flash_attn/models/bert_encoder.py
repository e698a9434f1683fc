"""The layers of BERT, chosen by its configuration."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flash_attn.bert_padding import pad_input, unpad_input
from flash_attn.errors import InvalidArgument, UnsupportedProblem
from flash_attn.models.gpt_block import TANH_GELU, mlp_checkpoint_lvl
from flash_attn.modules.block import Block
from flash_attn.modules.mha import MHA
from flash_attn.modules.mlp import FusedMLP, Mlp

ACTIVATIONS = ("gelu", "gelu_new", "gelu_fast", "gelu_pytorch_tanh")


def create_mixer_cls(
    config: Any, cross_attn: bool = False, return_residual: bool = False
) -> Callable[[int], nn.Module]:
    """dim -> the attention of a layer.

    Raises:
        UnsupportedProblem: position_embedding_type is neither "absolute" nor "rotary".

    Source: flash_attn 2.8.3, flash_attn/models/bert.py, also for the fields of the configuration.
    """
    return partial(
        MHA,
        num_heads=config.num_attention_heads,
        cross_attn=cross_attn,
        dropout=config.attention_probs_dropout_prob,
        causal=False,
        fused_bias_fc=getattr(config, "fused_bias_fc", False),
        use_flash_attn=getattr(config, "use_flash_attn", False),
        return_residual=return_residual,
        **_rotary_options(config),
    )


def create_mlp_cls(
    config: Any, layer_idx: int | None = None, return_residual: bool = False
) -> Callable[[int], nn.Module]:
    """dim -> the MLP of a layer; fused_mlp needs an approximate gelu.

    Source: flash_attn 2.8.3, flash_attn/models/bert.py, also for the fields of the configuration.
    """
    options: dict[str, Any] = dict(hidden_features=config.intermediate_size, return_residual=return_residual)
    if not getattr(config, "fused_mlp", False):
        return partial(Mlp, activation=partial(F.gelu, approximate=gelu_approximation(config)), **options)
    if gelu_approximation(config) != "tanh":
        raise InvalidArgument(f"fused_mlp needs an approximate gelu, got hidden_act {config.hidden_act!r}")
    return partial(FusedMLP, checkpoint_lvl=mlp_checkpoint_lvl(config, layer_idx), **options)


def create_block(config: Any, layer_idx: int | None = None) -> Block:
    """A layer; with last_layer_subset the last one has cross-attention, so that some tokens alone can be its queries.

    Source: flash_attn 2.8.3, flash_attn/models/bert.py, also for the fields of the configuration.
    """
    cross_attn = getattr(config, "last_layer_subset", False) and layer_idx == config.num_hidden_layers - 1
    # the input of cross-attention that it could return is that of the keys
    return_residual = not cross_attn
    return Block(
        config.hidden_size,
        create_mixer_cls(config, cross_attn, return_residual),
        create_mlp_cls(config, layer_idx, return_residual),
        norm_cls=partial(nn.LayerNorm, eps=config.layer_norm_eps),
        prenorm=False,
        resid_dropout1=config.hidden_dropout_prob,
        resid_dropout2=config.hidden_dropout_prob,
        fused_dropout_add_ln=getattr(config, "fused_dropout_add_ln", False),
        return_residual=return_residual,
    )


def gelu_approximation(config: Any) -> str:
    """What F.gelu calls the kind of gelu that hidden_act names."""
    if config.hidden_act not in ACTIVATIONS:
        raise InvalidArgument(f"hidden_act must be one of {ACTIVATIONS}, got {config.hidden_act!r}")
    return "tanh" if config.hidden_act in TANH_GELU else "none"


class BertEncoder(nn.Module):
    """The layers; with use_flash_attn they compute the tokens that exist only.

    Source: flash_attn 2.8.3, flash_attn/models/bert.py.
    """

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.use_flash_attn = getattr(config, "use_flash_attn", False)
        self.last_layer_subset = getattr(config, "last_layer_subset", False)
        self.layers = nn.ModuleList(create_block(config, index) for index in range(config.num_hidden_layers))

    def forward(
        self, hidden_states: Tensor, key_padding_mask: Tensor | None = None, subset_mask: Tensor | None = None
    ) -> Tensor:
        """Hidden states of all tokens, or of some.

        Args:
            hidden_states: (batch, seqlen, hidden_size).
            key_padding_mask: (batch, seqlen), bool, True = keep.
            subset_mask: (batch, seqlen), bool: return these tokens only, of those that are kept.

        Returns:
            (batch, seqlen, hidden_size), with use_flash_attn 0 at tokens that are not kept, or (tokens, hidden_size).
        """
        if subset_mask is not None and key_padding_mask is not None:
            subset_mask = subset_mask & key_padding_mask
        if key_padding_mask is not None and self.use_flash_attn:
            return self._forward_unpadded(hidden_states, key_padding_mask, subset_mask)
        mixer_kwargs = {} if key_padding_mask is None else {"key_padding_mask": key_padding_mask}
        for layer in self.layers:
            hidden_states = layer(hidden_states, mixer_kwargs=mixer_kwargs)
        return hidden_states if subset_mask is None else hidden_states[subset_mask]

    def _forward_unpadded(self, hidden_states: Tensor, kept: Tensor, subset: Tensor | None) -> Tensor:
        batch, seqlen = kept.shape
        x, indices, cu_seqlens, max_seqlen, *_used = unpad_input(hidden_states, kept)
        lengths = {"cu_seqlens": cu_seqlens, "max_seqlen": max_seqlen}
        for layer in self.layers[:-1]:
            x = layer(x, mixer_kwargs=lengths)
        last = self.layers[-1]
        if not self.last_layer_subset:
            x = last(x, mixer_kwargs=lengths)
            return pad_input(x, indices, batch, seqlen) if subset is None else x[subset[kept]]
        wanted = kept if subset is None else subset
        cu_wanted = F.pad(wanted.sum(dim=-1).cumsum(0), (1, 0)).to(torch.int32)
        keys = {"x_kv": x, "cu_seqlens_k": cu_seqlens, "max_seqlen_k": max_seqlen}
        # max_seqlen may exceed the number of queries
        x = last(x[wanted[kept]], mixer_kwargs={"cu_seqlens": cu_wanted, "max_seqlen": max_seqlen, **keys})
        return pad_input(x, indices, batch, seqlen) if subset is None else x


def _rotary_options(config: Any) -> dict[str, Any]:
    kind = getattr(config, "position_embedding_type", "absolute")
    if kind == "absolute":
        return {}
    if kind != "rotary":
        raise UnsupportedProblem(f"position_embedding_type must be 'absolute' or 'rotary', got {kind!r}")
    return dict(
        rotary_emb_dim=getattr(config, "rotary_emb_dim", config.hidden_size // config.num_attention_heads),
        rotary_emb_base=getattr(config, "rotary_emb_base", 10000.0),
        rotary_emb_scale_base=getattr(config, "rotary_emb_scale_base", None),
        rotary_emb_interleaved=getattr(config, "rotary_emb_interleaved", False),
    )
