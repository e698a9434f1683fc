"""BERT and its heads for pretraining: upstream's import path and meaning."""

import logging
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from flash_attn.errors import InvalidArgument
from flash_attn.losses.cross_entropy import CrossEntropyLoss
from flash_attn.models.bert_checkpoints import inv_remap_state_dict, remap_state_dict
from flash_attn.models.bert_encoder import (
    BertEncoder,
    create_block,
    create_mixer_cls,
    create_mlp_cls,
    gelu_approximation,
)
from flash_attn.models.config import padded_vocab_size, require_config, vocab_multiple
from flash_attn.modules.embedding import BertEmbeddings
from flash_attn.ops.fused_dense import FusedDense
from flash_attn.ops.triton.layer_norm import layer_norm_fn
from flash_attn.utils.pretrained import state_dict_from_pretrained

__all__ = [
    "BertEncoder",
    "BertForPreTraining",
    "BertForPreTrainingOutput",
    "BertLMPredictionHead",
    "BertModel",
    "BertModelOutput",
    "BertPooler",
    "BertPreTrainedModel",
    "BertPreTrainingHeads",
    "BertPredictionHeadTransform",
    "create_block",
    "create_mixer_cls",
    "create_mlp_cls",
    "inv_remap_state_dict",
    "remap_state_dict",
]

logger = logging.getLogger("flash_attn")

# read without a default; transformers' BertConfig has all of them
FIELDS = (
    "vocab_size hidden_size max_position_embeddings type_vocab_size pad_token_id num_hidden_layers num_attention_heads "
    "intermediate_size hidden_act hidden_dropout_prob attention_probs_dropout_prob layer_norm_eps initializer_range"
)


@dataclass
class BertModelOutput:
    """last_hidden_state: (batch, seqlen, hidden_size), or (tokens, hidden_size); pooler_output: (batch, hidden_size)."""

    last_hidden_state: Tensor
    pooler_output: Tensor | None


@dataclass
class BertForPreTrainingOutput:
    """prediction_logits: (batch, seqlen, vocab_size), or (tokens, vocab_size); seq_relationship_logits: (batch, 2)."""

    loss: Tensor | None
    prediction_logits: Tensor
    seq_relationship_logits: Tensor


class BertPooler(nn.Module):
    """tanh of a linear layer of the first token.

    Source: flash_attn 2.8.3, flash_attn/models/bert.py.
    """

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.dense = _linear(config)(config.hidden_size, config.hidden_size)
        self.activation = nn.Tanh()

    def forward(self, hidden_states: Tensor, pool: bool = True) -> Tensor:
        """(batch, seqlen, hidden_size) -> (batch, hidden_size); without pool of all that is given."""
        return self.activation(self.dense(hidden_states[:, 0] if pool else hidden_states))


class BertPredictionHeadTransform(nn.Module):
    """Linear layer, gelu and norm.

    Source: flash_attn 2.8.3, flash_attn/models/bert.py.
    """

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.fused_dropout_add_ln = getattr(config, "fused_dropout_add_ln", False)
        self.dense = _linear(config)(config.hidden_size, config.hidden_size)
        self.transform_act_fn = nn.GELU(approximate=gelu_approximation(config))
        self.layer_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Like hidden_states."""
        return _norm(self.layer_norm, self.transform_act_fn(self.dense(hidden_states)), self.fused_dropout_add_ln)


class BertLMPredictionHead(nn.Module):
    """Logits of the masked tokens.

    Source: flash_attn 2.8.3, flash_attn/models/bert.py.
    """

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.transform = BertPredictionHeadTransform(config)
        self.decoder = _linear(config)(config.hidden_size, padded_vocab_size(config), bias=True)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """(..., hidden_size) -> (..., vocab_size), the vocabulary padded."""
        return self.decoder(self.transform(hidden_states))


class BertPreTrainingHeads(nn.Module):
    """Logits of the masked tokens, and of whether the second sentence follows the first.

    Source: flash_attn 2.8.3, flash_attn/models/bert.py.
    """

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.predictions = BertLMPredictionHead(config)
        self.seq_relationship = nn.Linear(config.hidden_size, 2)

    def forward(self, sequence_output: Tensor, pooled_output: Tensor) -> tuple[Tensor, Tensor]:
        """((..., vocab_size), (batch, 2))."""
        return self.predictions(sequence_output), self.seq_relationship(pooled_output)


class BertPreTrainedModel(nn.Module):
    """A model with a configuration that can take the weights of a checkpoint.

    Args:
        config: transformers' BertConfig, or any other object with its fields; fields of these models alone may be missing.

    Source: flash_attn 2.8.3, flash_attn/models/bert.py.
    """

    def __init__(self, config: Any) -> None:
        super().__init__()
        require_config(config, "BertConfig", FIELDS.split())
        self.config = config

    @classmethod
    def from_pretrained(cls, model_name: str, config: Any, *inputs: Any, **kwargs: Any) -> Any:
        """A model with the weights of a checkpoint that it has a place for; the log names the others.

        Args:
            model_name: of the Hugging Face hub, or a folder.

        Raises:
            InvalidArgument: no weight has a place.
        """
        model = cls(config, *inputs, **kwargs)
        state_dict = remap_state_dict(state_dict_from_pretrained(model_name), config)
        if not hasattr(model, "bert"):
            state_dict = {key.removeprefix("bert."): tensor for key, tensor in state_dict.items()}
        if not state_dict.keys() & model.state_dict().keys():
            raise InvalidArgument(
                f"the checkpoint {model_name} has no weight of {cls.__name__}, but {[*state_dict][:3]}"
            )
        found = model.load_state_dict(state_dict, strict=False)
        level = logging.WARNING if found.missing_keys or found.unexpected_keys else logging.INFO
        logger.log(level, "%s: %s", model_name, found)
        return model


class BertModel(BertPreTrainedModel):
    """Embeddings, layers and pooler.

    Source: flash_attn 2.8.3, flash_attn/models/bert.py.
    """

    def __init__(self, config: Any, add_pooling_layer: bool = True) -> None:
        super().__init__(config)
        gelu_approximation(config)  # refuses an unknown activation
        self.pad_vocab_size_multiple = vocab_multiple(config)
        self.fused_dropout_add_ln = getattr(config, "fused_dropout_add_ln", False)
        self.embeddings = BertEmbeddings(
            config.hidden_size,
            padded_vocab_size(config),
            config.max_position_embeddings,
            config.type_vocab_size,
            padding_idx=config.pad_token_id,
        )
        self.emb_drop = nn.Dropout(config.hidden_dropout_prob)
        self.emb_ln = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.encoder = BertEncoder(config)
        self.pooler = BertPooler(config) if add_pooling_layer else None
        self.apply(partial(_init_weights, initializer_range=config.initializer_range))

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        masked_tokens_mask: Tensor | None = None,
    ) -> BertModelOutput:
        """Hidden states and the pooled first token.

        Args:
            input_ids, position_ids, token_type_ids: (batch, seqlen).
            attention_mask: (batch, seqlen), not 0 = keep; the first token of every sequence is one to keep.
            masked_tokens_mask: (batch, seqlen), bool: return the hidden states of these tokens only.
        """
        hidden_states = self.embeddings(input_ids, position_ids=position_ids, token_type_ids=token_type_ids)
        hidden_states = self.emb_drop(_norm(self.emb_ln, hidden_states, self.fused_dropout_add_ln))
        kept = None if attention_mask is None else attention_mask.bool()
        if masked_tokens_mask is None:
            output = self.encoder(hidden_states, key_padding_mask=kept)
            return BertModelOutput(output, None if self.pooler is None else self.pooler(output))
        first = torch.zeros_like(masked_tokens_mask)
        first[:, 0] = True
        subset = masked_tokens_mask | first
        output = self.encoder(hidden_states, key_padding_mask=kept, subset_mask=subset)
        subset = subset if kept is None else subset & kept
        pooled = None if self.pooler is None else self.pooler(output[first[subset]], pool=False)
        return BertModelOutput(output[masked_tokens_mask[subset]], pooled)


class BertForPreTraining(BertPreTrainedModel):
    """`BertModel` with the heads for masked tokens and for the next sentence.

    Fields of the configuration: dense_seq_output computes the logits of the labelled tokens only, last_layer_subset the last
    layer, too; use_xentropy takes this package's cross entropy, whose backward overwrites the logits.

    Source: flash_attn 2.8.3, flash_attn/models/bert.py.
    """

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.dense_seq_output = getattr(config, "dense_seq_output", False)
        self.last_layer_subset = getattr(config, "last_layer_subset", False)
        if self.last_layer_subset and not self.dense_seq_output:
            raise InvalidArgument("last_layer_subset needs dense_seq_output=True, got False")
        loss_cls: Any = nn.CrossEntropyLoss
        if getattr(config, "use_xentropy", False):
            loss_cls = partial(CrossEntropyLoss, inplace_backward=True)
        self.bert = BertModel(config)
        self.cls = BertPreTrainingHeads(config)
        self.mlm_loss = loss_cls(ignore_index=0)
        self.nsp_loss = loss_cls(ignore_index=-1)
        self.apply(partial(_init_weights, initializer_range=config.initializer_range))
        self.tie_weights()

    def tie_weights(self) -> None:
        """Make the decoder's weight that of the embedding."""
        self.cls.predictions.decoder.weight = self.bert.embeddings.word_embeddings.weight

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        next_sentence_label: Tensor | None = None,
    ) -> BertForPreTrainingOutput:
        """Logits, and given both kinds of labels the sum of the two losses.

        Args:
            attention_mask: as in `BertModel.forward`.
            labels: (batch, seqlen), 0 where there is nothing to predict, as at tokens that attention_mask hides.
            next_sentence_label: (batch,), -1 is ignored.
        """
        labelled = None if labels is None or not self.dense_seq_output else labels > 0
        outputs = self.bert(
            input_ids,
            position_ids=position_ids,
            token_type_ids=token_type_ids,
            attention_mask=attention_mask,
            masked_tokens_mask=labelled if self.last_layer_subset else None,
        )
        hidden_states = outputs.last_hidden_state
        if labelled is not None and not self.last_layer_subset:
            hidden_states = hidden_states[labelled]
        logits, next_logits = self.cls(hidden_states, outputs.pooler_output)
        loss = None
        if labels is not None and next_sentence_label is not None:
            targets = labels.flatten() if labelled is None else labels[labelled]
            masked_loss = self.mlm_loss(logits.flatten(0, -2), targets)
            next_loss = self.nsp_loss(next_logits, next_sentence_label.flatten())
            loss = masked_loss.float() + next_loss.float()
        return BertForPreTrainingOutput(loss, logits, next_logits)


def _linear(config: Any) -> type[nn.Linear]:
    return FusedDense if getattr(config, "fused_bias_fc", False) else nn.Linear


def _norm(norm: nn.LayerNorm, x: Tensor, fused: bool) -> Tensor:
    return layer_norm_fn(x, norm.weight, norm.bias, eps=norm.eps) if fused else norm(x)


def _init_weights(module: nn.Module, initializer_range: float = 0.02) -> None:
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=initializer_range)
    if isinstance(module, nn.Linear) and module.bias is not None:
        nn.init.zeros_(module.bias)
    if isinstance(module, nn.Embedding) and module.padding_idx is not None:
        with torch.no_grad():
            module.weight[module.padding_idx].zero_()
