"""Continuous batching over a PagedKVCache: requests join and leave the batch at every step, prompts enter in chunks.

When pages run out, the request that came last gives up its own and waits again; its tokens are kept, and most of its
pages are found again by content.
"""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

import gpt
from flash_attn.errors import OutOfPages
from flash_attn.kvcache import MemoryReport, PagedKVCache

CHUNK = 64  # tokens of a prompt that enter in one step


@dataclass
class Request:
    """A prompt and what has been generated after it."""

    prompt: list[int]
    max_new: int
    generated: list[int] = field(default_factory=list)

    @property
    def tokens(self) -> list[int]:
        return self.prompt + self.generated

    @property
    def finished(self) -> bool:
        return len(self.generated) == self.max_new or self.generated[-1:] == [gpt.BOUNDARY]


class Statistics(NamedTuple):
    """What serving took."""

    reports: list[MemoryReport]  # of every step
    batch_sizes: list[int]
    tokens_computed: int
    tokens_reused: int  # found in the cache instead
    preemptions: int


class Server:
    """Serves requests with one model and one cache, greedily."""

    def __init__(self, model: gpt.GPT, cache: PagedKVCache, max_batch: int) -> None:
        self.model, self.cache, self.max_batch = model, cache, max_batch
        self.waiting: deque[Request] = deque()
        self.running: dict[int, Request] = {}  # by sequence, oldest first
        self.computed = self.reused = self.preemptions = 0

    @torch.no_grad()
    def serve(self, requests: list[Request], progress: Callable[[float], None]) -> Statistics:
        """Runs until every request is finished; progress is told the pages in use once for each."""
        self.waiting.extend(requests)
        reports, batch_sizes = [], []
        while self.waiting or self.running:
            self.admit()
            chunks = self.begin_step()
            logits = self.forward(chunks)
            self.cache.end_step()
            reports.append(self.cache.memory_report())
            batch_sizes.append(len(chunks))
            for request in self.take_tokens(chunks, logits):
                if request.finished:
                    progress(reports[-1].pages_in_use)
        return Statistics(reports, batch_sizes, self.computed, self.reused, self.preemptions)

    def admit(self) -> None:
        """Waiting requests join while the batch and the pages have room for them."""
        while self.waiting and len(self.running) < self.max_batch:
            tokens = self.waiting[0].tokens
            unread = sum(len(request.tokens) - self.cache.length(s) for s, request in self.running.items())
            if self.running and self.cache.num_available * self.cache.page_size <= unread + len(tokens):
                return
            sequence = self.cache.add(tokens)
            self.running[sequence] = self.waiting.popleft()
            self.reused += self.cache.length(sequence)

    def begin_step(self) -> dict[int, list[int]]:
        """Opens a step with the next tokens of every running request, fewer requests if need be."""
        while True:
            lengths = {sequence: self.cache.length(sequence) for sequence in self.running}
            chunks = {s: request.tokens[lengths[s] :][:CHUNK] for s, request in self.running.items()}
            try:
                self.cache.begin_step(list(chunks), list(chunks.values()))
                return chunks
            except OutOfPages:
                if len(self.running) == 1:
                    raise
                sequence, request = self.running.popitem()
                self.cache.free(sequence)
                self.waiting.appendleft(request)
                self.preemptions += 1

    def forward(self, chunks: dict[int, list[int]]) -> Tensor:
        """Logits of the token after each chunk, (batch, vocabulary)."""
        starts = [self.cache.length(sequence) for sequence in chunks]
        batch = gpt.pack([[*chunk, gpt.BOUNDARY] for chunk in chunks.values()], self.cache.device)
        offsets = torch.tensor(starts).repeat_interleave(torch.tensor([len(chunk) for chunk in chunks.values()]))
        batch = batch._replace(positions=batch.positions + offsets.to(self.cache.device))
        self.computed += len(batch.tokens)
        return self.model(batch, self.attention())[batch.cu_seqlens[1:] - 1]

    def attention(self) -> gpt.Attention:
        """attend for one layer after the other; single tokens as a batch, chunks of prompts packed."""
        layers = iter(range(len(self.cache.k)))

        def attend(q: Tensor, k: Tensor, v: Tensor, batch: gpt.Packed) -> Tensor:
            if batch.max_seqlen > 1:
                return self.cache.attend(next(layers), q, k, v)
            return self.cache.attend(next(layers), *(x.unsqueeze(1) for x in (q, k, v))).squeeze(1)

        return attend

    def take_tokens(self, chunks: dict[int, list[int]], logits: Tensor) -> list[Request]:
        """Appends the likeliest token where a prompt has been read to its end; finished requests leave."""
        advanced = []
        for sequence, token in zip(chunks, logits.argmax(-1).tolist(), strict=True):
            request = self.running[sequence]
            if self.cache.length(sequence) < len(request.tokens):
                continue
            request.generated.append(token)
            advanced.append(request)
            if request.finished:
                self.cache.free(sequence)
                del self.running[sequence]
        return advanced


@torch.no_grad()
def generate_alone(model: gpt.GPT, request: Request, device: torch.device) -> list[int]:
    """The request by itself, without a cache: the whole text through plain attention for every token."""
    alone = Request(request.prompt, request.max_new)
    while not alone.finished:
        batch = gpt.pack([[*alone.tokens, gpt.BOUNDARY]], device)
        alone.generated.append(int(model(batch, gpt.plain_attention)[-1].argmax()))
    return alone.generated
