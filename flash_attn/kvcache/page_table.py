"""The host's bookkeeping: which pages every sequence holds, and how that changes. Imports numpy only; no tensors.

A sequence is a number that is never used again. Its row of the table lists its pages; page n holds the tokens that are
n-th among those kept. Pages are shared between forks and, by content, between equal prefixes; a page is written by nobody
but its sole holder.
"""

import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from flash_attn.errors import InvalidArgument, OutOfPages
from flash_attn.kvcache.allocator import Ints, PageAllocator
from flash_attn.kvcache.prefix import PrefixIndex, Text, Tokens, as_tokens
from flash_attn.kvcache.strategies import Paged, pages_of

NO_PAGE = -1
NOTHING = np.zeros(0, np.int32)

# (missing pages, sequences that must stay) -> None; frees sequences of the caller's choice
PressureHook = Callable[[int, frozenset[int]], None]
# how many tokens a sequence appends, or which
NewTokens = Any


class Reservation(NamedTuple):
    """A step: who appends how many tokens, and where they go. Arrays are int32, one entry a sequence."""

    sequences: tuple[int, ...]
    rows: Ints
    new: Ints  # tokens that each appends
    tokens: list[Tokens | None]  # which, if known
    kept: Ints  # tokens in its pages before the step
    positions: Ints  # place in the text of the first new token
    block_table: Ints  # (batch, pages)
    copied: tuple[Ints, Ints]  # contents to copy before the step: from pages, to pages


class PageTable:
    """Sequences, their pages and their lengths."""

    def __init__(
        self,
        num_pages: int,
        page_size: int,
        strategy: Paged,
        share_prefixes: bool,
        on_pressure: PressureHook | None,
    ) -> None:
        if page_size < 1:
            raise InvalidArgument(f"page_size must be at least 1, got {page_size}")
        self.page_size = page_size
        self.strategy = strategy
        self.share_prefixes = share_prefixes
        self.on_pressure = on_pressure
        self._allocator = PageAllocator(num_pages)
        self._prefixes = PrefixIndex(num_pages, page_size)
        self._rows: dict[int, int] = {}
        self._texts: dict[int, Text | None] = {}
        self._names = itertools.count()
        self._free_rows: list[int] = []
        self._table = np.full((0, max(1, strategy.reserved_pages(page_size))), NO_PAGE, np.int32)
        self._length = NOTHING  # tokens appended and not truncated
        self._dropped = NOTHING  # whole pages lost behind the sinks
        self._busy: frozenset[int] = frozenset()  # sequences of the open or coming step
        self._step: Reservation | None = None

    @property
    def sequences(self) -> tuple[int, ...]:
        """All sequences, oldest first."""
        return tuple(self._rows)

    @property
    def num_available(self) -> int:
        """Pages that are free, or kept only in case their prefix comes again."""
        return self._allocator.num_free + int(self._reusable().sum())

    def length(self, sequence: int) -> int:
        """Tokens of a sequence, dropped ones included."""
        return int(self._length[self._row(sequence)])

    def pages(self, sequence: int) -> Ints:
        """The pages that a sequence holds, in order."""
        row = self._table[self._row(sequence)]
        return row[row != NO_PAGE]

    def add(self, tokens: Any = ()) -> int:
        """A new sequence, which begins with as much of `tokens` as the cache already holds in whole pages.

        `length` of the result says how much that is; the last token is never among it. The rest is for the caller to
        append.

        Args:
            tokens: the prompt, a 1-D array of integers on the host.

        Raises:
            OutOfPages: the strategy reserves pages, and fewer are left.
        """
        self._require_idle("add")
        prompt = as_tokens(tokens)
        sequence, row = self._new_row()
        if self.share_prefixes:
            pages, self._texts[sequence] = self._prefixes.match(prompt)
            self._allocator.share(pages)
            self._table[row, : self._widen(len(pages))] = pages
            self._length[row] = len(pages) * self.page_size
        self._hold_reserved(sequence, row)
        return sequence

    def fork(self, sequence: int) -> int:
        """A new sequence with the same tokens. Both hold the same pages; whoever writes into one first takes a copy."""
        self._require_idle("fork")
        parent = self._row(sequence)
        text = self._texts[sequence]
        child, row = self._new_row()
        self._length[row], self._dropped[row] = self._length[parent], self._dropped[parent]
        used = pages_of(int(self._kept(parent)), self.page_size)
        self._table[row, :used] = self._table[parent, :used]
        self._allocator.share(self._table[row, :used])
        self._texts[child] = None if text is None else text.copy()
        self._hold_reserved(child, row)
        return child

    def free(self, sequence: int) -> None:
        """Ends a sequence. Its pages become free unless others hold them or their prefix may come again."""
        self._require_unused(sequence, "free")
        self._remove(sequence)

    def truncate(self, sequence: int, length: int) -> None:
        """Keeps the first `length` tokens of a sequence.

        Raises:
            InvalidArgument: `length` is not between 0 and the sequence's own, or tokens that a shorter sequence would
                have to see are dropped already.
        """
        self._require_unused(sequence, "truncate")
        row = self._row(sequence)
        if not 0 <= length <= self._length[row]:
            raise InvalidArgument(
                f"length must be between 0 and the sequence's {self._length[row]} tokens, got {length}"
            )
        gap = self.strategy.sink_pages(self.page_size) * self.page_size
        gap_end = gap + int(self._dropped[row]) * self.page_size
        if length <= gap:
            self._dropped[row] = 0
        elif self._dropped[row] and (first := int(self.strategy.first_needed(np.array(length)))) < gap_end:
            raise InvalidArgument(
                f"a sequence of {length} tokens would have to see token {max(first, gap)}, and tokens {gap} to "
                f"{gap_end - 1} are dropped"
            )
        self._length[row] = length
        if (text := self._texts[sequence]) is not None:
            text.shorten(length, self.page_size)
        self._trim(np.array([row]))

    def _reserve(self, sequences: Sequence[int], new_tokens: Sequence[NewTokens]) -> Reservation:
        """Gives every sequence pages of its own for its new tokens; nothing but stale pages changes when it raises."""
        self._require_idle("begin a step")
        rows, new, tokens = self._check_step(sequences, new_tokens)
        self._drop_stale(rows)
        kept = self._kept(rows)
        first, last = kept // self.page_size, (kept + new - 1) // self.page_size
        self._widen(int(last.max()) + 1)
        cells = _cells(rows, first, last)
        partial = (cells[1] == np.repeat(first, last - first + 1)) & np.repeat(
            kept % self.page_size > 0, last - first + 1
        )
        self._busy = frozenset(sequences)
        try:
            copied = self._own(cells, partial)
        except BaseException:
            self._busy = frozenset()
            raise
        width = max(int(last.max()) + 1, self.strategy.reserved_pages(self.page_size))
        block_table = self._table[rows, :width]
        positions = self._length[rows]
        self._step = Reservation(tuple(sequences), rows, new, tokens, kept, positions, block_table, copied)
        return self._step

    def _commit(self) -> None:
        """The tokens of the step are stored: lengths grow, and full pages can be found by content."""
        step = self._open_step()
        self._length[step.rows] += step.new
        for sequence, row, tokens in zip(step.sequences, step.rows.tolist(), step.tokens, strict=True):
            self._extend_text(sequence, row, tokens)
        self._close()

    def _cancel(self) -> None:
        """The step did not happen; pages reserved for it are let go."""
        self._trim(self._open_step().rows)
        self._close()

    def _take_back(self, copied: tuple[Ints, Ints]) -> None:
        """The contents were not copied: the open step's sequences hold the old pages again, which others kept alive."""
        source, target = copied
        old = np.arange(-1, self._allocator.num_pages, dtype=np.int32)  # old[page + 1]
        old[target + 1] = source
        rows = self._open_step().rows
        self._table[rows] = old[self._table[rows] + 1]
        self._allocator.share(source)
        self._release(target)

    def _close(self) -> None:
        self._step, self._busy = None, frozenset()

    def _open_step(self) -> Reservation:
        if self._step is None:
            raise InvalidArgument("no step is open: call begin_step first")
        return self._step

    def _row(self, sequence: int) -> int:
        row = self._rows.get(sequence)
        if row is None:
            raise InvalidArgument(f"sequence {sequence!r} is unknown or freed; there are {len(self._rows)} sequences")
        return row

    def _kept(self, rows: Any) -> Any:
        """Tokens that are in pages."""
        return self._length[rows] - self._dropped[rows] * self.page_size

    def _reusable(self) -> NDArray[np.bool_]:
        """Pages without a holder whose prefix may come again."""
        return self._prefixes.indexed & (self._allocator.references == 0)

    def _new_row(self) -> tuple[int, int]:
        if not self._free_rows:
            grown = max(8, 2 * len(self._length))
            self._free_rows = list(range(len(self._length), grown))[::-1]
            self._table = _padded(self._table, (grown, self._table.shape[1]), NO_PAGE)
            self._length, self._dropped = (_padded(x, (grown,), 0) for x in (self._length, self._dropped))
        sequence, row = next(self._names), self._free_rows.pop()
        self._length[row] = self._dropped[row] = 0
        self._rows[sequence] = row
        self._texts[sequence] = None
        return sequence, row

    def _widen(self, width: int) -> int:
        """Makes the table at least so wide; returns the width asked for."""
        rows, present = self._table.shape
        if width > present:
            self._table = _padded(self._table, (rows, max(width, 2 * present)), NO_PAGE)
        return width

    def _remove(self, sequence: int) -> None:
        row = self._row(sequence)
        self._release(self.pages(sequence))
        self._table[row] = NO_PAGE
        del self._rows[sequence], self._texts[sequence]
        self._free_rows.append(row)

    def _hold_reserved(self, sequence: int, row: int) -> None:
        """The pages that the strategy wants held from the start; the sequence is gone again if there are too few."""
        reserved = self._table[row, : self.strategy.reserved_pages(self.page_size)]
        lacking = int((reserved == NO_PAGE).sum())
        try:
            self._make_room(lambda: lacking, frozenset([sequence]))
        except BaseException:
            self._remove(sequence)
            raise
        table_row = self._table[row, : len(reserved)]  # a hook may have grown the table
        table_row[table_row == NO_PAGE] = self._take(lacking)

    def _drop_stale(self, rows: Ints) -> None:
        """Drops what the strategy's window has left behind, and closes the gap in the table."""
        stale = self.strategy.stale_pages(self._length[rows], self._dropped[rows], self.page_size)
        rows, stale = rows[stale > 0], stale[stale > 0]
        if len(rows) == 0:
            return
        sinks, width = self.strategy.sink_pages(self.page_size), self._table.shape[1]
        self._release(self._table[_cells(rows, np.full_like(stale, sinks), sinks + stale - 1)])
        columns = np.arange(width) + np.where(np.arange(width) >= sinks, stale[:, None], 0)
        moved = np.take_along_axis(self._table[rows], np.minimum(columns, width - 1), axis=1)
        self._table[rows] = np.where(columns < width, moved, NO_PAGE)
        self._dropped[rows] += stale

    def _trim(self, rows: Ints) -> None:
        """Lets go of pages behind the last token, except what the strategy reserves."""
        used = np.maximum(-(-self._kept(rows) // self.page_size), self.strategy.reserved_pages(self.page_size))
        table = self._table[rows]
        unused = (np.arange(table.shape[1]) >= used[:, None]) & (table != NO_PAGE)
        self._table[rows] = np.where(unused, NO_PAGE, table)
        self._release(table[unused])

    def _own(self, cells: tuple[Ints, Ints], partial: NDArray[np.bool_]) -> tuple[Ints, Ints]:
        """Puts a page of its sequence's own into every cell; returns (from, to) of the partial ones to copy."""
        self._make_room(lambda: int(self._not_own(self._table[cells]).sum()), self._busy)
        before = self._table[cells]
        wanted = self._not_own(before)
        after = before.copy()
        after[wanted] = self._take(int(wanted.sum()))
        self._table[cells] = after
        shared = wanted & (before != NO_PAGE)
        self._release(before[shared])
        self._prefixes.forget(before[~wanted])
        return before[shared & partial], after[shared & partial]

    def _not_own(self, pages: Ints) -> NDArray[np.bool_]:
        """Which pages, each about to be written by the sequence in its place, are absent or not that sequence's alone.

        Where all holders of a page are about to write, the first keeps it.
        """
        unique, first, inverse, writers = np.unique(pages, return_index=True, return_inverse=True, return_counts=True)
        references = np.where(unique == NO_PAGE, 0, self._allocator.references[unique])
        result = (references != 1)[inverse]
        result[first[references == writers]] = False
        return result

    def _make_room(self, needed: Callable[[], int], stay: frozenset[int]) -> None:
        """Asks the pressure hook until enough pages are available, or raises OutOfPages when it cannot help."""
        if needed() <= self._allocator.num_free:
            return
        while (missing := needed() - self.num_available) > 0:
            if self.on_pressure is not None:
                outer, self._busy = self._busy, stay
                try:
                    self.on_pressure(missing, stay)
                finally:
                    self._busy = outer
            if needed() - self.num_available >= missing:
                raise OutOfPages(
                    f"{needed()} pages are needed, {self.num_available} of {self._allocator.num_pages} are free or "
                    f"hold only prefixes that nobody uses; {len(self._rows)} sequences hold the rest"
                )

    def _take(self, count: int) -> Ints:
        """Free pages, after giving up the prefixes used longest ago if need be."""
        lacking = count - self._allocator.num_free
        if lacking > 0:
            oldest = self._prefixes.oldest(self._reusable(), lacking)
            self._prefixes.forget(oldest)
            self._allocator.reclaim(oldest)
        return self._allocator.allocate(count)

    def _release(self, pages: Ints) -> None:
        unheld = self._allocator.release(pages)
        known = self._prefixes.indexed[unheld]
        self._prefixes.touch(unheld[known])
        self._allocator.reclaim(unheld[~known])

    def _extend_text(self, sequence: int, row: int, tokens: Tokens | None) -> None:
        """Remembers the tokens and indexes pages that became full, in a sequence all of whose tokens are known.

        What is computed after a page was dropped depends on how the text was cut into steps, not on the text alone, so
        it is never found by content.
        """
        text = self._texts[sequence]
        if text is None:
            return
        if tokens is None or self._dropped[row]:
            self._texts[sequence] = None
            return
        self._prefixes.extend(text, tokens, self._table[row])

    def _check_step(
        self, sequences: Sequence[int], new_tokens: Sequence[NewTokens]
    ) -> tuple[Ints, Ints, list[Tokens | None]]:
        """(rows, counts, tokens) of a step whose arguments make sense."""
        if len(sequences) == 0 or len(set(sequences)) != len(sequences):
            raise InvalidArgument(f"a step needs at least one sequence, each once, got {list(sequences)}")
        if len(new_tokens) != len(sequences):
            raise InvalidArgument(f"new_tokens has {len(new_tokens)} entries for {len(sequences)} sequences")
        rows = np.array([self._row(sequence) for sequence in sequences], np.int32)
        tokens = [None if isinstance(entry, int | np.integer) else as_tokens(entry) for entry in new_tokens]
        counts = [int(entry) if known is None else len(known) for entry, known in zip(new_tokens, tokens, strict=True)]
        if min(counts) < 1:
            raise InvalidArgument(f"every sequence of a step appends at least 1 token, got {counts}")
        new = np.array(counts, np.int32)
        limit = self.strategy.max_length
        if limit is not None and (longest := int((self._length[rows] + new).max())) > limit:
            raise InvalidArgument(f"the strategy allows sequences of {limit} tokens, the step needs {longest}")
        return rows, new, tokens

    def _require_idle(self, what: str) -> None:
        if self._busy:
            raise InvalidArgument(
                f"cannot {what} while a step of sequences {sorted(self._busy)} is open or in preparation"
            )

    def _require_unused(self, sequence: int, what: str) -> None:
        if sequence in self._busy:
            raise InvalidArgument(f"cannot {what} sequence {sequence}: it is part of the step of {sorted(self._busy)}")


def _cells(rows: Ints, first: Ints, last: Ints) -> tuple[Ints, Ints]:
    """(row, column) of every cell from column `first` to `last` of each row."""
    count = last - first + 1
    begin = np.cumsum(count) - count
    return np.repeat(rows, count), np.arange(count.sum()) + np.repeat(first - begin, count)


def _padded(x: Any, shape: tuple[int, ...], value: int) -> Any:
    """x in the corner of a larger array."""
    larger = np.full(shape, value, x.dtype)
    larger[tuple(slice(size) for size in x.shape)] = x
    return larger
