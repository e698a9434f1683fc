"""PagedCache: PagedKVCache as a transformers `Cache`, for `generate(past_key_values=PagedCache(model.config, ...))`.

The only module that imports transformers (5 or newer). transformers rotates and attends itself, so a layer's `update`
appends the new keys and values to the pages and returns all of them, gathered: (batch, heads, seqlen, headdim). Beams
are forks: reordering them copies no keys, only the last page of a beam that goes on in several directions.
"""

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from flash_attn.errors import InvalidArgument, UnsupportedProblem
from flash_attn.kvcache.cache_manager import PagedKVCache
from flash_attn.kvcache.strategies import Static

# A sliding layer keeps every key here; transformers' own mask hides those outside its window.
LAYER_TYPES = ("full_attention", "sliding_attention", "chunked_attention")


class PagedLayer(CacheLayerMixin):
    """One layer of a PagedCache, as transformers calls it."""

    is_sliding = False
    is_croppable = True
    supports_early_init = False

    def __init__(self, cache: "PagedCache", number: int) -> None:
        super().__init__()
        self.cache, self.number = cache, number
        self.seqlen = 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing: the cache allocates all layers together."""

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Appends (batch, heads, new, headdim) and returns (batch, heads, seqlen, headdim), keys and values."""
        return self.cache.append(self, key_states, value_states)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """(keys after the next update, first of them)."""
        return self.seqlen + query_length, 0

    def get_seq_length(self) -> int:
        """Tokens stored."""
        return self.seqlen

    def get_max_length(self) -> int:
        """The strategy's limit, -1 for none."""
        return self.cache.max_length


class PagedCache(Cache):
    """A paged cache for `generate`, greedy, sampled, in beams or assisted.

    Pages are allocated at the first update, which shows the shapes. One object can serve several calls of `generate`, in
    turn: continue the same batch, or `reset` it.

    Args:
        config: the model's configuration.
        num_pages: of page_size tokens, for all sequences and beams together.
        page_size: tokens in a page.
        max_length: reserves pages for so many tokens of every sequence from the start; None takes them on demand.

    Raises:
        UnsupportedProblem: a layer of the model is no attention, or borrows the keys of another.
        OutOfPages: while generating, when the pages do not suffice.
    """

    def __init__(self, config: Any, num_pages: int, page_size: int = 16, max_length: int | None = None) -> None:
        config = config.get_text_config(decoder=True)
        foreign = sorted(set(getattr(config, "layer_types", None) or ()) - set(LAYER_TYPES))
        if foreign or getattr(config, "kv_sharing_modes", None) is not None:
            raise UnsupportedProblem(f"PagedCache holds layers {LAYER_TYPES} with keys of their own, got {foreign}")
        super().__init__(layers=[PagedLayer(self, number) for number in range(config.num_hidden_layers)])
        self.num_pages, self.page_size = num_pages, page_size
        self.max_length = -1 if max_length is None else max_length
        self.pages: PagedKVCache | None = None
        self.sequences: list[int] = []
        self._table: Tensor | None = None  # of the pass in progress

    def append(self, layer: PagedLayer, key_states: Tensor, value_states: Tensor) -> tuple[Tensor, Tensor]:
        """`update` of one layer; the first of a pass opens a step, the last one ends it."""
        new = key_states.shape[2]
        pages = self.pages or self._allocate(key_states)
        if not self.sequences:
            self.sequences = [pages.add() for _ in range(key_states.shape[0])]
        if self._table is None:
            pages.begin_step(self.sequences, [new] * len(self.sequences))
            self._table = pages.block_table.long()
        if layer.seqlen != pages.length(self.sequences[0]):
            raise InvalidArgument(
                f"layer {layer.number} is updated twice in one pass: it has {layer.seqlen} tokens, the pass began with "
                f"{pages.length(self.sequences[0])}; after a pass that failed, reset the cache"
            )
        pages.append(layer.number, key_states.transpose(1, 2), value_states.transpose(1, 2))
        layer.seqlen += new
        gathered = [x[layer.number][self._table].flatten(1, 2)[:, : layer.seqlen] for x in (pages.k, pages.v)]
        if all(other.seqlen == layer.seqlen for other in self.layers):
            pages.end_step()
            self._table = None
        return gathered[0].transpose(1, 2), gathered[1].transpose(1, 2)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Sequence i goes on from what sequence beam_idx[i] holds."""
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keeps these sequences of the batch, in this order; one may occur several times."""
        pages = self._between_passes()
        if pages is None:
            return
        chosen = torch.arange(len(self.sequences))[indices.cpu()].tolist()
        forks = [pages.fork(self.sequences[index]) for index in chosen]
        for sequence in self.sequences:
            pages.free(sequence)
        self.sequences = forks

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each sequence `repeats` times, side by side."""
        self.batch_select_indices(torch.arange(len(self.sequences)).repeat_interleave(repeats))

    def crop(self, tokens_to_remove: int) -> None:
        """Removes the last -tokens_to_remove tokens of every sequence.

        Raises:
            InvalidArgument: a positive number, which once meant a length, or more tokens than there are.
        """
        pages = self._between_passes()
        tokens_to_remove = int(tokens_to_remove)  # assisted generation passes a tensor
        if tokens_to_remove > 0:
            raise InvalidArgument(f"crop takes minus the number of tokens to remove, got {tokens_to_remove}")
        if pages is None or tokens_to_remove == 0:
            return
        length = pages.length(self.sequences[0]) + tokens_to_remove
        for sequence in self.sequences:
            pages.truncate(sequence, length)
        for layer in self.layers:
            layer.seqlen = length

    def reset(self) -> None:
        """Forgets every sequence; the pages stay allocated."""
        if self.pages is not None:
            if self._table is not None:
                self.pages.end_step(commit=False)
            for sequence in self.sequences:
                self.pages.free(sequence)
        self.sequences, self._table = [], None
        for layer in self.layers:
            layer.seqlen = 0

    def _between_passes(self) -> PagedKVCache | None:
        """The pages, None before the first pass."""
        if self._table is not None:
            raise InvalidArgument(
                "not every layer was updated in the last pass; after a pass that failed, reset the cache"
            )
        return self.pages if self.sequences else None

    def _allocate(self, key_states: Tensor) -> PagedKVCache:
        _, nheads_k, _, headdim = key_states.shape
        options: dict[str, Any] = {} if self.max_length < 0 else dict(strategy=Static(self.max_length))
        self.pages = PagedKVCache(
            len(self.layers), self.num_pages, self.page_size, nheads_k, headdim, key_states.dtype, key_states.device,
            share_prefixes=False, **options,
        )  # fmt: skip
        return self.pages
