"""PagedKVCache against a model that keeps every sequence's tokens in a list, after any sequence of operations."""

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from flash_attn.errors import InvalidArgument, OutOfPages
from flash_attn.kvcache import Paged, PagedKVCache, RollingWindow, Static

LAYERS, HEADS, HEADDIM = 2, 1, 2
MANY = 10**6

TOKEN = st.integers(0, 1)  # so few that prefixes repeat
USUALLY = st.sampled_from([True, True, True, True, False])
strategies = st.one_of(
    st.just(Paged()),
    st.builds(Static, st.integers(1, 12)),
    st.builds(RollingWindow, st.integers(1, 7), st.integers(0, 5)),
)


def contents(text: list[int], layer: int) -> torch.Tensor:
    """The key of every token: a number that depends on all tokens up to it, as a real key does."""
    numbers = [hash((layer, *text[: place + 1])) % 2**24 for place in range(len(text))]
    return torch.tensor(numbers, dtype=torch.float32)[:, None, None].expand(-1, HEADS, HEADDIM)


class Machine(RuleBasedStateMachine):
    """The model: `texts` and, for a rolling window, which places `kept` of each sequence are not dropped."""

    @initialize(strategy=strategies, num_pages=st.integers(1, 30), page_size=st.integers(1, 4), data=st.data())
    def create(self, strategy, num_pages, page_size, data):
        hook = self.free_oldest if data.draw(st.booleans(), "hook") else None
        self.cache = PagedKVCache(
            LAYERS, num_pages, page_size, HEADS, HEADDIM, torch.float32,
            strategy=strategy, share_prefixes=data.draw(USUALLY, "share"), on_pressure=hook,
        )  # fmt: skip
        self.texts: dict[int, list[int]] = {}
        self.kept: dict[int, list[int]] = {}
        self.history: list[list[int]] = [[]]

    def free_oldest(self, missing, stay):
        assert missing > 0
        idle = [sequence for sequence in self.texts if sequence not in stay]
        for sequence in stay & self.texts.keys():
            with pytest.raises(InvalidArgument, match="part of the step"):
                self.cache.free(sequence)
        if idle:
            self.cache.free(idle[0])
            del self.texts[idle[0]], self.kept[idle[0]]

    def pick(self, data) -> int:
        return data.draw(st.sampled_from(sorted(self.texts)), "sequence")

    @precondition(lambda self: len(self.texts) < 6)
    @rule(data=st.data(), end=st.lists(TOKEN, max_size=4))
    def add(self, data, end):
        prompt = data.draw(st.sampled_from(self.history), "begins like") + end
        try:
            sequence = self.cache.add(prompt)
        except OutOfPages:
            assert isinstance(self.cache.strategy, Static)
            return
        found = self.cache.length(sequence)
        assert found % self.cache.page_size == 0 and found <= max(len(prompt) - 1, 0)
        self.texts[sequence] = prompt[:found]
        self.kept[sequence] = list(range(found))

    @precondition(lambda self: 0 < len(self.texts) < 6)
    @rule(data=st.data())
    def fork(self, data):
        parent = self.pick(data)
        text, kept = self.texts[parent], self.kept[parent]
        try:
            child = self.cache.fork(parent)
        except OutOfPages:
            assert isinstance(self.cache.strategy, Static)
            return
        self.texts[child], self.kept[child] = text[:], kept[:]

    @precondition(lambda self: self.texts)
    @rule(data=st.data())
    def free(self, data):
        sequence = self.pick(data)
        self.cache.free(sequence)
        del self.texts[sequence], self.kept[sequence]
        with pytest.raises(InvalidArgument, match="unknown or freed"):
            self.cache.length(sequence)

    @precondition(lambda self: self.texts)
    @rule(data=st.data())
    def truncate(self, data):
        sequence = self.pick(data)
        length = data.draw(st.integers(0, len(self.texts[sequence])), "length")
        remaining = [place for place in self.kept[sequence] if place < length]
        dropped = set(range(len(self.texts[sequence]))) - set(self.kept[sequence])
        inside_gap = dropped and min(dropped) < length <= max(dropped)
        if not inside_gap and set(self.needed(length)) <= set(remaining):
            self.cache.truncate(sequence, length)
            self.kept[sequence] = remaining
            del self.texts[sequence][length:]
        else:
            with pytest.raises(InvalidArgument, match="are dropped"):
                self.cache.truncate(sequence, length)

    @precondition(lambda self: self.texts)
    @rule(data=st.data())
    def step(self, data):
        chosen = data.draw(st.lists(st.sampled_from(sorted(self.texts)), min_size=1, unique=True), "sequences")
        new = [data.draw(st.lists(TOKEN, min_size=1, max_size=6), "new") for _ in chosen]
        told = [tokens if data.draw(USUALLY, "told") else len(tokens) for tokens in new]
        limit = self.cache.strategy.max_length or MANY
        if any(len(self.texts[s]) + len(n) > limit for s, n in zip(chosen, new, strict=True)):
            with pytest.raises(InvalidArgument, match=f"sequences of {limit} tokens"):
                self.cache.begin_step(chosen, told)
            return
        for sequence in chosen:
            self.drop_stale(sequence)
        if not data.draw(USUALLY, "device works"):
            self.cache._transfer = lambda reservation: 1 / 0
        try:
            self.cache.begin_step(chosen, told)
        except OutOfPages:
            assert self.cache.num_available < sum(map(self.most_pages, chosen, new))
            return
        except ZeroDivisionError:
            return
        finally:
            vars(self.cache).pop("_transfer", None)
        for layer in range(LAYERS):
            k = torch.cat([contents(self.texts[s] + n, layer)[-len(n) :] for s, n in zip(chosen, new, strict=True)])
            self.cache.append(layer, k, -k)
        commit = data.draw(st.booleans(), "commit")
        self.cache.end_step(commit)
        for sequence, tokens in zip(chosen, new, strict=True):
            if commit:
                length = len(self.texts[sequence])
                self.kept[sequence] += range(length, length + len(tokens))
                self.texts[sequence] += tokens
                self.history.append(self.texts[sequence][:])

    def most_pages(self, sequence: int, new: list[int]) -> int:
        """Pages that a step can need for one sequence: those it lacks, and copies of those it shares and writes."""
        page_size, pages, kept = self.cache.page_size, self.cache.pages(sequence), len(self.kept[sequence])
        after = -(-(kept + len(new)) // page_size)
        written = pages[kept // page_size : after]  # after a fork and a truncation more than one may be shared
        return max(after - len(pages), 0) + int((self.cache._allocator.references[written] > 1).sum())

    def needed(self, length: int) -> list[int]:
        """Which of `length` tokens the next one has to see; all of them unless the window rolls."""
        strategy, page_size = self.cache.strategy, self.cache.page_size
        if not isinstance(strategy, RollingWindow):
            return list(range(length))
        sinks = -(-strategy.sinks // page_size) * page_size
        return [place for place in range(length) if place < sinks or place > length - strategy.window]

    def drop_stale(self, sequence: int) -> None:
        page_size = self.cache.page_size
        length = len(self.texts[sequence])
        pages = {place // page_size for place in [*self.needed(length), length]}
        self.kept[sequence] = [place for place in self.kept[sequence] if place // page_size in pages]

    @invariant()
    def every_sequence_reads_its_own_tokens(self):
        for sequence, text in self.texts.items():
            assert self.cache.length(sequence) == len(text)
            for layer in range(LAYERS):
                k, v = self.cache.read(layer, sequence)
                expected = contents(text, layer)[self.kept[sequence]]
                assert torch.equal(k, expected) and torch.equal(v, -expected)

    @invariant()
    def every_page_is_accounted_for(self):
        cache, allocator = self.cache, self.cache._allocator
        held = np.zeros(allocator.num_pages, int)
        for sequence in self.texts:
            held[cache.pages(sequence)] += 1
        assert (held == allocator.references).all()
        free = allocator._stack[: allocator.num_free]
        cached = cache._reusable()
        assert len(set(free.tolist())) == len(free) and not held[free].any() and not cached[free].any()
        assert len(free) + cached.sum() + (held > 0).sum() == allocator.num_pages
        report = cache.memory_report()
        assert report[:4] == ((held > 0).sum(), (held > 1).sum(), cached.sum(), len(free))
        assert report.tokens_held == sum(map(len, self.kept.values()))

    @invariant()
    def no_page_is_held_in_vain(self):
        reserved = self.cache.strategy.reserved_pages(self.cache.page_size)
        for sequence, kept in self.kept.items():
            assert len(self.cache.pages(sequence)) == max(-(-len(kept) // self.cache.page_size), reserved)

    def teardown(self):
        if not hasattr(self, "cache"):
            return
        for sequence in self.texts:
            self.cache.free(sequence)
        assert self.cache.num_available == self.cache._allocator.num_pages


TestManager = Machine.TestCase
TestManager.settings = settings(
    max_examples=60,
    stateful_step_count=40,
    deadline=None,
    suppress_health_check=list(HealthCheck),
    phases=(Phase.explicit, Phase.generate),  # shrinking a history of tensors takes minutes and helps little
)
