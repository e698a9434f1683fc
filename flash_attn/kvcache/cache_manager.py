"""PagedKVCache: the tensors of every layer under one block table, and attention over them. No maths is done here.

A step, for all layers of one pass of a model:

    begin_step        host: pages for the new tokens, shared ones replaced by copies (page_table.py)
                      device: one copy brings lengths, positions and the block table; one copies the pages
    attend, a layer   append, rotate and attend: what flash_attn_with_kvcache does; or, for sequences of unequal
                      numbers of new tokens, rotary, `append` and the packed attention
    end_step          host: lengths grow, full pages can be found by content

Nothing waits for the device. Pages freed and taken again are safe because work on one stream runs in order.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from flash_attn.backward.call import attend as attend_packed
from flash_attn.backward.call import make_words
from flash_attn.errors import InvalidArgument, UnsupportedProblem
from flash_attn.kvcache.kv_attention import attend_with_cache
from flash_attn.kvcache.page_table import NewTokens, PageTable, PressureHook, Reservation
from flash_attn.kvcache.strategies import Paged
from flash_attn.problem import INT32_MAX, parse_window

ALIGNMENT = 4  # int32 of each array in the one transfer, so that every tensor begins at 16 bytes


class MemoryReport(NamedTuple):
    """Where the pages are. in_use + cached + free = all of them."""

    pages_in_use: int  # held by at least one sequence
    pages_shared: int  # of these, held by several
    pages_cached: int  # held by none, kept in case their prefix comes again
    pages_free: int
    page_bytes: int  # keys and values of all layers
    tokens_held: int  # summed over sequences: shared ones count once for each
    sequences: int

    @property
    def bytes_in_use(self) -> int:
        """Memory that the sequences need."""
        return self.pages_in_use * self.page_bytes

    @property
    def bytes_allocated(self) -> int:
        """Memory of the whole cache."""
        return (self.pages_in_use + self.pages_cached + self.pages_free) * self.page_bytes

    def __str__(self) -> str:
        return (
            f"{self.sequences} sequences, {self.tokens_held} tokens in {self.pages_in_use} pages"
            f" ({self.pages_shared} shared); {self.pages_cached} pages cached, {self.pages_free} free;"
            f" {self.bytes_in_use / 2**20:.1f} of {self.bytes_allocated / 2**20:.1f} MiB in use"
        )


class Step(NamedTuple):
    """The open step as the device sees it; int32 tensors."""

    new: tuple[int, ...]  # tokens that each sequence appends
    max_seqlen_k: int
    last_position: int  # in the text, of any new token
    dropped: bool  # whether a sequence has lost pages, so that places in the cache are not places in the text
    cache_seqlens: Tensor  # (batch,), tokens in pages before the step
    positions: Tensor  # (batch,), place in the text of each sequence's first new token
    cu_seqlens_q: Tensor  # (batch + 1,), of the new tokens end to end
    cu_seqlens_k: Tensor  # (batch + 1,), of all tokens in pages after the step
    slots: Tensor  # (total new tokens,), page * page_size + offset
    block_table: Tensor  # (batch, pages)


class PagedKVCache(PageTable):
    """Keys and values of many sequences and all layers, in pages.

    `add`, `fork`, `truncate` and `free` manage sequences, which are plain numbers. A pass of the model is a step:

        with cache.step(sequences, new_tokens):
            for layer in ...:
                out = cache.attend(layer, q, k, v)

    Args:
        num_pages: of page_size tokens each, for all sequences together.
        page_size: tokens in a page; every size from 1 works.
        strategy: how sequences hold pages: `Paged()`, `Static(length)` or `RollingWindow(window, sinks)`.
        share_prefixes: whether sequences that begin with the same pages of tokens share them.
        on_pressure: called with (missing pages, sequences that must stay) when pages run out; it may free or truncate
            other sequences. If it makes no room, OutOfPages is raised.

    Attributes:
        k, v: (num_layers, num_pages, page_size, nheads_k, headdim).
    """

    def __init__(
        self,
        num_layers: int,
        num_pages: int,
        page_size: int,
        nheads_k: int,
        headdim: int,
        dtype: torch.dtype = torch.float16,
        device: torch.device | str = "cpu",
        *,
        strategy: Paged = Paged(),  # noqa: B008 - a frozen value
        share_prefixes: bool = True,
        on_pressure: PressureHook | None = None,
    ) -> None:
        super().__init__(num_pages, page_size, strategy, share_prefixes, on_pressure)
        if num_pages * page_size > INT32_MAX:
            raise InvalidArgument(f"num_pages * page_size must be below 2^31, got {num_pages} * {page_size}")
        shape = (num_layers, num_pages, page_size, nheads_k, headdim)
        if min(shape) < 1:
            raise InvalidArgument(f"num_layers, nheads_k and headdim must be at least 1, got {num_layers}, {shape[3:]}")
        self.k, self.v = (torch.empty(shape, dtype=dtype, device=device) for _ in range(2))
        self._on_device: Step | None = None

    @property
    def device(self) -> torch.device:
        """Where keys and values are."""
        return self.k.device

    @property
    def block_table(self) -> Tensor:
        """Of the open step: (batch, pages), int32; -1 where a sequence has fewer pages than another."""
        if self._on_device is None:
            raise InvalidArgument("no step is open: call begin_step first")
        return self._on_device.block_table

    @contextmanager
    def step(self, sequences: Sequence[int], new_tokens: Sequence[NewTokens]) -> Iterator[None]:
        """`begin_step`, and `end_step` behind the block; an exception in the block undoes the step."""
        self.begin_step(sequences, new_tokens)
        try:
            yield
        except BaseException:
            self.end_step(commit=False)
            raise
        self.end_step()

    def begin_step(self, sequences: Sequence[int], new_tokens: Sequence[NewTokens]) -> None:
        """Makes room for new tokens at the end of each sequence.

        Args:
            sequences: the batch, in the order of the tensors that `attend` will get.
            new_tokens: of each sequence the tokens it appends, integers on the host, or how many; a sequence that was
                ever told only how many is not found by content.

        Raises:
            OutOfPages: too few pages, and the pressure hook did not help. Every sequence is as before.
            InvalidArgument: a step is open, a sequence is unknown or occurs twice, or grows beyond its strategy.
        """
        reservation = self._reserve(sequences, new_tokens)
        try:
            self._on_device, (source, target) = self._transfer(reservation)
            if len(target):
                for pages in (self.k, self.v):
                    pages[:, target] = pages[:, source]
        except BaseException:  # such as a device without memory for the copy
            self._take_back(reservation.copied)
            self.end_step(commit=False)
            raise

    def end_step(self, commit: bool = True) -> None:
        """The new tokens of every layer are stored; or, without `commit`, the step did not happen."""
        if commit:
            self._commit()
        else:
            self._cancel()
        self._on_device = None

    @torch.no_grad()
    def attend(
        self,
        layer: int,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        causal: bool = True,
        window_size: Sequence[int] = (-1, -1),
        softmax_scale: float | None = None,
        softcap: float = 0.0,
        alibi_slopes: Tensor | None = None,
        rotary_cos: Tensor | None = None,
        rotary_sin: Tensor | None = None,
        rotary_interleaved: bool = True,
        num_splits: int = 0,
        return_softmax_lse: bool = False,
        s_aux: Tensor | None = None,
    ) -> Any:
        """Appends k and v to the open step's sequences, and attends with q over all their keys. Forward only.

        With rotary_cos and rotary_sin, q and k are rotated at their places in the text. Causal masks and windows are
        aligned to the last key kept. Under a rolling window the keys are those kept when the step began, and k.

        Args:
            q: (batch, new, nheads, headdim) where every sequence appends equally many tokens;
                (total_new, nheads, headdim), sequence after sequence, in any case.
            k: like q with nheads_k heads.
            v: like k.
            rotary_cos: (positions, rotary_dim / 2), and rotary_sin.

        The other arguments are those of `flash_attn_with_kvcache`.

        Returns:
            out: like q. With return_softmax_lse (out, softmax_lse): (batch, nheads, new) or (nheads, total_new).

        Raises:
            InvalidArgument: no step is open, or the tensors do not fit it.
            UnsupportedProblem: a window or ALiBi where sinks are kept: distances in the cache are not distances in the
                text then.
        """
        step = self._check_attend(layer, q, k, v)
        if not self.strategy.contiguous and (alibi_slopes is not None or parse_window(window_size)[0] >= 0):
            raise UnsupportedProblem(
                f"{self.strategy} keeps sinks apart from its window, where window_size {tuple(window_size)} and "
                f"alibi_slopes {'given' if alibi_slopes is not None else None} count keys as if all were there"
            )
        if (rotary_cos is None) != (rotary_sin is None):
            raise InvalidArgument("rotary_cos and rotary_sin must be given together, got one of them")
        packed = q.dim() == 3
        if packed and num_splits > 1:
            raise UnsupportedProblem(f"packed queries are attended without splits, got num_splits = {num_splits}")
        if rotary_cos is not None and rotary_sin is not None and (packed or self._places_differ(step, rotary_cos)):
            if not causal and parse_window(window_size) == (-1, -1):
                raise UnsupportedProblem(
                    "where `attend` rotates by itself, q must be causal or in a window, got neither"
                )
            q, k = self._rotate(step, rotary_cos, rotary_sin, rotary_interleaved, q, k)
            rotary_cos = rotary_sin = None
        if packed:
            self.append(layer, k, v)
            words = make_words(
                q.shape[-1], 0.0, softmax_scale, causal, window_size, softcap, False, max(step.new), step.max_seqlen_k
            )
            lengths = (step.cu_seqlens_q, step.cu_seqlens_k, step.block_table)
            out, lse = attend_packed(q, self.k[layer], self.v[layer], words, alibi_slopes, False, *lengths, s_aux)[:2]
        else:
            out, lse = attend_with_cache(
                q,
                self.k[layer],
                self.v[layer],
                k,
                v,
                rotary_cos,
                rotary_sin,
                step.cache_seqlens,
                None,
                None,
                step.block_table,
                softmax_scale,
                causal,
                window_size,
                softcap,
                rotary_interleaved,
                alibi_slopes,
                num_splits,
                s_aux,
            )
        return (out, lse) if return_softmax_lse else out

    @torch.no_grad()
    def append(self, layer: int, k: Tensor, v: Tensor) -> None:
        """Stores the open step's keys and values as they are, for callers that attend by other means.

        Args:
            k: (batch, new, nheads_k, headdim) or (total_new, nheads_k, headdim), and v.
        """
        slots = self._check_attend(layer, k, k, v).slots
        for pages, new in ((self.k, k), (self.v, v)):
            pages[layer].flatten(0, 1)[slots] = new.reshape(-1, *new.shape[-2:])

    def read(self, layer: int, sequence: int) -> tuple[Tensor, Tensor]:
        """A copy of the keys and values that a sequence keeps, in order: each (tokens kept, nheads_k, headdim)."""
        pages = torch.from_numpy(self.pages(sequence)).to(self.device)
        kept = int(self._kept(self._row(sequence)))
        k, v = (x[layer][pages].flatten(0, 1)[:kept] for x in (self.k, self.v))
        return k, v

    def memory_report(self) -> MemoryReport:
        """How the pages are used now."""
        references = self._allocator.references
        rows = np.fromiter(self._rows.values(), np.int32)
        return MemoryReport(
            pages_in_use=int((references > 0).sum()),
            pages_shared=int((references > 1).sum()),
            pages_cached=int(self._reusable().sum()),
            pages_free=self._allocator.num_free,
            page_bytes=2 * self.k[:, 0].numel() * self.k.element_size(),
            tokens_held=int(self._kept(rows).sum()),
            sequences=len(rows),
        )

    def _transfer(self, reservation: Reservation) -> tuple[Step, tuple[Tensor, Tensor]]:
        """The reservation on the device by one copy, and the pages to copy (from, to)."""
        rows, new, kept, table = reservation.rows, reservation.new, reservation.kept, reservation.block_table
        cu_seqlens_q, cu_seqlens_k = (np.concatenate([[0], np.cumsum(x)]).astype(np.int32) for x in (new, kept + new))
        places = np.arange(cu_seqlens_q[-1]) + np.repeat(kept - cu_seqlens_q[:-1], new)
        pages = table[np.repeat(np.arange(len(rows)), new), places // self.page_size]
        slots = pages * self.page_size + places % self.page_size
        arrays = (kept, reservation.positions, cu_seqlens_q, cu_seqlens_k, slots, table, *reservation.copied)
        *tensors, source, target = _to_device(arrays, self.device)
        step = Step(
            tuple(new.tolist()),
            int((kept + new).max()),
            int((reservation.positions + new).max()) - 1,
            bool((reservation.positions > kept).any()),
            *tensors,
        )
        return step, (source, target)

    def _check_attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Step:
        step = self._on_device
        if step is None:
            raise InvalidArgument("no step is open: call begin_step first")
        num_layers, _, _, nheads_k, headdim = self.k.shape
        if not 0 <= layer < num_layers:
            raise InvalidArgument(f"layer must be between 0 and {num_layers - 1}, got {layer}")
        if q.dim() == 4 and len(set(step.new)) > 1:
            raise InvalidArgument(
                f"sequences that append {list(step.new)} tokens need packed tensors (total, heads, headdim), got q of "
                f"shape {tuple(q.shape)}"
            )
        tokens = (len(step.new), step.new[0]) if q.dim() == 4 else (sum(step.new),)
        if tuple(q.shape[:-2]) != tokens:
            raise InvalidArgument(f"q must begin with {tokens}, the new tokens of the step, got shape {tuple(q.shape)}")
        for name, x in (("k", k), ("v", v)):
            if tuple(x.shape) != (*tokens, nheads_k, headdim):
                raise InvalidArgument(f"{name} must have shape {(*tokens, nheads_k, headdim)}, got {tuple(x.shape)}")
            if x.dtype != self.k.dtype or x.device != self.device:
                raise InvalidArgument(
                    f"{name} must be {self.k.dtype} on {self.device} like the cache, got {x.dtype} on {x.device}"
                )
        return step

    def _places_differ(self, step: Step, rotary_cos: Tensor) -> bool:
        """Whether places in the cache are not places in the text, or the last page ends beyond the rotary tables."""
        return step.dropped or step.block_table.shape[1] * self.page_size > rotary_cos.shape[0]

    def _rotate(self, step: Step, cos: Tensor, sin: Tensor, interleaved: bool, *xs: Tensor) -> list[Tensor]:
        """The new tokens' q and k, rotated at their places in the text."""
        from flash_attn.layers.rotary import apply_rotary_emb

        if step.last_position >= cos.shape[0]:
            raise InvalidArgument(
                f"rotary_cos has {cos.shape[0]} positions, the step reaches position {step.last_position}"
            )
        lengths: dict[str, Any] = dict(seqlen_offsets=step.positions)
        if xs[0].dim() == 3:
            lengths |= dict(cu_seqlens=step.cu_seqlens_q, max_seqlen=max(step.new))
        return [apply_rotary_emb(x, cos, sin, interleaved=interleaved, **lengths) for x in xs]


def _to_device(arrays: Sequence[Any], device: torch.device) -> list[Tensor]:
    """int32 arrays as tensors on the device, by one transfer that nobody waits for."""
    sizes = [-(-array.size // ALIGNMENT) * ALIGNMENT for array in arrays]
    starts = [0, *np.cumsum(sizes).tolist()]
    staged = torch.empty(starts[-1], dtype=torch.int32, pin_memory=device.type == "cuda")
    view = staged.numpy()
    for start, array in zip(starts, arrays, strict=False):
        view[start : start + array.size] = array.ravel()
    moved = staged.to(device, non_blocking=True)
    return [moved[start : start + array.size].view(array.shape) for start, array in zip(starts, arrays, strict=False)]
