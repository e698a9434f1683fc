"""Embeddings of tokens, positions and token types, whole or split over ranks: upstream's import path and meaning."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from flash_attn.errors import InvalidArgument, UnsupportedProblem
from flash_attn.utils.distributed import all_reduce, reduce_scatter


class GPT2Embeddings(nn.Module):
    """Embedding of the token plus that of its position.

    Args:
        max_position_embeddings: 0 or less is no positions.
        word_embed_proj_dim: embed tokens in this many features and project to embed_dim, as OPT-350m does.

    Source: flash_attn 2.8.3, flash_attn/modules/embedding.py.
    """

    def __init__(
        self,
        embed_dim: int,
        vocab_size: int,
        max_position_embeddings: int,
        padding_idx: int | None = None,
        word_embed_proj_dim: int | None = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        factory: dict[str, Any] = dict(device=device, dtype=dtype)
        word_dim = embed_dim if word_embed_proj_dim is None else word_embed_proj_dim
        self.word_embeddings = nn.Embedding(vocab_size, word_dim, padding_idx=padding_idx, **factory)
        self.project_in = None
        if word_embed_proj_dim is not None:
            self.project_in = nn.Linear(word_dim, embed_dim, bias=False, **factory)
        self.max_position_embeddings = max_position_embeddings
        if max_position_embeddings > 0:
            self.position_embeddings = nn.Embedding(max_position_embeddings, embed_dim, **factory)

    def forward(self, input_ids: Tensor, position_ids: Tensor | None = None) -> Tensor:
        """input_ids and position_ids (batch, seqlen) -> (batch, seqlen, embed_dim)."""
        embeddings = self.word_embeddings(input_ids)
        if self.project_in is not None:
            embeddings = self.project_in(embeddings)
        if self.max_position_embeddings > 0:
            embeddings = embeddings + self.position_embeddings(_positions(input_ids, position_ids))
        return embeddings


class BertEmbeddings(nn.Module):
    """Embeddings of the token, its position and its type, summed.

    Args:
        max_position_embeddings, type_vocab_size: 0 or less is none of them.

    Source: flash_attn 2.8.3, flash_attn/modules/embedding.py.
    """

    def __init__(
        self,
        embed_dim: int,
        vocab_size: int,
        max_position_embeddings: int,
        type_vocab_size: int,
        padding_idx: int | None = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        factory: dict[str, Any] = dict(device=device, dtype=dtype)
        self.word_embeddings = nn.Embedding(vocab_size, embed_dim, padding_idx=padding_idx, **factory)
        self.max_position_embeddings = max_position_embeddings
        self.type_vocab_size = type_vocab_size
        if max_position_embeddings > 0:
            self.position_embeddings = nn.Embedding(max_position_embeddings, embed_dim, **factory)
        if type_vocab_size > 0:
            self.token_type_embeddings = nn.Embedding(type_vocab_size, embed_dim, **factory)

    def forward(
        self, input_ids: Tensor, position_ids: Tensor | None = None, token_type_ids: Tensor | None = None
    ) -> Tensor:
        """All ids (batch, seqlen), positions in order and type 0 by default -> (batch, seqlen, embed_dim)."""
        embeddings = self.word_embeddings(input_ids)
        if self.max_position_embeddings > 0:
            embeddings = embeddings + self.position_embeddings(_positions(input_ids, position_ids))
        if self.type_vocab_size > 0:
            if token_type_ids is None:
                token_type_ids = torch.zeros(input_ids.shape[1], dtype=torch.long, device=input_ids.device)
            embeddings = embeddings + self.token_type_embeddings(token_type_ids)
        return embeddings


class VocabParallelEmbedding(nn.Embedding):
    """An embedding whose tokens are split over the ranks: 0 for the others' tokens, so that the ranks' sum is right.

    Source: flash_attn 2.8.3, flash_attn/modules/embedding.py.
    """

    def __init__(
        self, num_embeddings: int, *args: Any, process_group: Any = None, padding_idx: int | None = None, **kwargs: Any
    ) -> None:
        world_size = 1 if process_group is None else dist.get_world_size(process_group)
        if world_size > 1 and padding_idx is not None:
            raise UnsupportedProblem(f"a vocabulary split over ranks supports no padding_idx, got {padding_idx}")
        local = _evenly("num_embeddings", num_embeddings, world_size)
        super().__init__(local, *args, **kwargs, padding_idx=padding_idx)  # type: ignore[misc]
        self.process_group = process_group

    def forward(self, input: Tensor) -> Tensor:
        """(...) -> (..., embedding_dim)."""
        if self.process_group is None:
            return super().forward(input)
        local = input - dist.get_rank(self.process_group) * self.num_embeddings
        elsewhere = (local < 0) | (local >= self.num_embeddings)
        return super().forward(local.masked_fill(elsewhere, 0)).masked_fill(elsewhere.unsqueeze(-1), 0.0)


class ColumnParallelEmbedding(nn.Embedding):
    """An embedding whose features are split over the ranks.

    Source: flash_attn 2.8.3, flash_attn/modules/embedding.py.
    """

    def __init__(
        self, num_embeddings: int, embedding_dim: int, *args: Any, process_group: Any = None, **kwargs: Any
    ) -> None:
        world_size = 1 if process_group is None else dist.get_world_size(process_group)
        super().__init__(num_embeddings, _evenly("embedding_dim", embedding_dim, world_size), *args, **kwargs)
        self.process_group = process_group


class ParallelGPT2Embeddings(nn.Module):
    """`GPT2Embeddings` split over the ranks of a process group.

    Args:
        sequence_parallel: every rank keeps its part of the first dimension; otherwise all have the whole.

    Source: flash_attn 2.8.3, flash_attn/modules/embedding.py.
    """

    def __init__(
        self,
        embed_dim: int,
        vocab_size: int,
        max_position_embeddings: int,
        process_group: Any,
        padding_idx: int | None = None,
        sequence_parallel: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        shared: dict[str, Any] = dict(process_group=process_group, device=device, dtype=dtype)
        self.process_group = process_group
        self.sequence_parallel = sequence_parallel
        self.word_embeddings = VocabParallelEmbedding(vocab_size, embed_dim, padding_idx=padding_idx, **shared)
        self.max_position_embeddings = max_position_embeddings
        if max_position_embeddings > 0:
            self.position_embeddings = ColumnParallelEmbedding(max_position_embeddings, embed_dim, **shared)

    def forward(
        self, input_ids: Tensor, position_ids: Tensor | None = None, combine_batch_seqlen_dim: bool = False
    ) -> Tensor:
        """(batch, seqlen) -> (batch, seqlen, embed_dim), with combine_batch_seqlen_dim (batch * seqlen, embed_dim)."""
        embeddings = self.word_embeddings(input_ids)
        if self.max_position_embeddings > 0:
            local = self.position_embeddings(_positions(input_ids, position_ids))
            before = local.shape[-1] * dist.get_rank(self.process_group)
            after = embeddings.shape[-1] - before - local.shape[-1]
            embeddings = embeddings + nn.functional.pad(local, (before, after))
        if combine_batch_seqlen_dim:
            embeddings = embeddings.flatten(0, 1)
        if dist.get_world_size(self.process_group) == 1:
            return embeddings
        combine = reduce_scatter if self.sequence_parallel else all_reduce
        return combine(embeddings, self.process_group)


def _positions(input_ids: Tensor, position_ids: Tensor | None) -> Tensor:
    if position_ids is not None:
        return position_ids
    return torch.arange(input_ids.shape[1], dtype=torch.long, device=input_ids.device)


def _evenly(name: str, size: int, world_size: int) -> int:
    if size % world_size:
        raise InvalidArgument(f"{name} ({size}) must be divisible by world_size ({world_size})")
    return size // world_size
