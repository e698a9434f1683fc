"""A small GPT on Python's own standard library: data, model, two ways to attend, training, sampling.

Each character is a token. A document is one top-level definition of one source file; a batch is documents end to end,
with cu_seqlens saying where each begins, and no padding anywhere.
"""

import ast
import math
import random
import sysconfig
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from flash_attn import flash_attn_varlen_func

BOUNDARY = 0  # opens and closes every document
VOCABULARY = 128  # ASCII


class Setting(NamedTuple):
    """How large everything is."""

    layers: int
    heads: int
    headdim: int
    tokens_per_batch: int
    longest_document: int
    learning_rate: float
    steps: int
    dtype: torch.dtype
    device: torch.device


class Packed(NamedTuple):
    """A batch of documents end to end."""

    tokens: Tensor  # (total,)
    targets: Tensor  # (total,), the token after each
    positions: Tensor  # (total,), counted from the start of its document
    cu_seqlens: Tensor  # (documents + 1,), int32
    max_seqlen: int


# (q, k, v, batch) -> out; each (total, heads, headdim), causal within every document
Attention = Callable[[Tensor, Tensor, Tensor, Packed], Tensor]


def setting_for(device: torch.device) -> Setting:
    """Minutes on two CPU cores; on a GPU a larger model in bfloat16."""
    if device.type == "cpu":
        return Setting(4, 4, 32, 1024, 512, 5e-3, 200, torch.float32, device)
    return Setting(8, 8, 64, 32768, 4096, 1e-3, 500, torch.bfloat16, device)


def flash_attention(q: Tensor, k: Tensor, v: Tensor, batch: Packed) -> Tensor:
    """One call for all documents."""
    return flash_attn_varlen_func(
        q, k, v, batch.cu_seqlens, batch.cu_seqlens, batch.max_seqlen, batch.max_seqlen, causal=True
    )


def plain_attention(q: Tensor, k: Tensor, v: Tensor, batch: Packed) -> Tensor:
    """softmax(q k^T / sqrt(headdim)) v, one document at a time."""
    lengths = batch.cu_seqlens.diff().tolist()
    documents = zip(*(x.transpose(0, 1).split(lengths, dim=1) for x in (q, k, v)), strict=True)
    return torch.cat([causal_softmax(*document) for document in documents], dim=1).transpose(0, 1)


def causal_softmax(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention of one document; each (heads, seqlen, headdim)."""
    scores = q @ k.transpose(1, 2) / math.sqrt(q.shape[-1])
    hidden = torch.ones(scores.shape[1:], dtype=torch.bool, device=q.device).triu(1)
    return scores.masked_fill(hidden, -math.inf).softmax(dim=-1) @ v


ATTENTIONS: dict[str, Attention] = {"flash": flash_attention, "plain": plain_attention}


class Block(nn.Module):
    """Attention and a feed-forward layer, each on normalised input and added to the stream."""

    def __init__(self, setting: Setting) -> None:
        super().__init__()
        self.heads, width = setting.heads, setting.heads * setting.headdim
        self.attention_norm, self.feed_forward_norm = nn.RMSNorm(width), nn.RMSNorm(width)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.project = nn.Linear(width, width, bias=False)
        self.feed_forward = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor, rotation: Tensor, attention: Attention, batch: Packed) -> Tensor:
        q, k, v = self.qkv(self.attention_norm(x)).unflatten(-1, (3, self.heads, -1)).unbind(1)
        attended = attention(rotate(q, rotation), rotate(k, rotation), v, batch)
        x = x + self.project(attended.flatten(1))
        return x + self.feed_forward(self.feed_forward_norm(x))


class GPT(nn.Module):
    """Tokens to logits, with rotary positions."""

    def __init__(self, setting: Setting) -> None:
        super().__init__()
        width = setting.heads * setting.headdim
        self.headdim = setting.headdim
        self.embed = nn.Embedding(VOCABULARY, width)
        self.blocks = nn.ModuleList(Block(setting) for _ in range(setting.layers))
        self.norm = nn.RMSNorm(width)
        self.predict = nn.Linear(width, VOCABULARY, bias=False)

    def forward(self, batch: Packed, attention: Attention) -> Tensor:
        x = self.embed(batch.tokens)
        rotation = rotation_at(batch.positions, self.headdim)
        for block in self.blocks:
            x = block(x, rotation, attention, batch)
        return self.predict(self.norm(x))


def rotation_at(positions: Tensor, headdim: int) -> Tensor:
    """Cosines and sines of each position's angles: (2, total, 1, headdim / 2)."""
    frequencies = 10000.0 ** -torch.linspace(0, 1, headdim // 2, device=positions.device)
    angles = positions[:, None, None] * frequencies
    return torch.stack([angles.cos(), angles.sin()])


def rotate(x: Tensor, rotation: Tensor) -> Tensor:
    """x (total, heads, headdim) with each half-pair turned by its position's angle."""
    cos, sin = rotation.to(x.dtype)
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def standard_library() -> list[bytes]:
    """The source of every top-level function and class in the standard library's own modules."""
    documents = []
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        source = path.read_text(encoding="utf-8", errors="replace")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            definitions = [node for node in ast.parse(source).body if isinstance(node, ast.FunctionDef | ast.ClassDef)]
        lines = source.splitlines(keepends=True)
        texts = ("".join(lines[node.lineno - 1 : node.end_lineno]) for node in definitions)
        documents += [text.encode("ascii", errors="replace") for text in texts]
    return documents


def batches(documents: list[bytes], setting: Setting, seed: int) -> Iterator[Packed]:
    """Endless batches of exactly tokens_per_batch tokens; the last document of each is cut to fit."""
    order = random.Random(seed)
    while True:
        rows: list[list[int]] = []
        room = setting.tokens_per_batch
        while room > 1:
            text = order.choice(documents)[: setting.longest_document]
            rows.append([BOUNDARY, *text, BOUNDARY][: room + 1])
            room -= len(rows[-1]) - 1
        yield pack(rows, setting.device)


def pack(rows: list[list[int]], device: torch.device) -> Packed:
    """Documents, each one token longer than what the model reads, as a batch."""
    lengths = [len(row) - 1 for row in rows]
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0)
    return Packed(
        tokens=torch.tensor([token for row in rows for token in row[:-1]], device=device),
        targets=torch.tensor([token for row in rows for token in row[1:]], device=device),
        positions=torch.cat([torch.arange(length) for length in lengths]).to(device),
        cu_seqlens=cu_seqlens.to(device, torch.int32),
        max_seqlen=max(lengths),
    )


class Training(NamedTuple):
    """What one training run gave."""

    model: GPT
    losses: list[float]
    tokens_per_second: float


def train(attention: Attention, setting: Setting, seconds: float, progress: Callable[[float], None]) -> Training:
    """Trains a new model from a fixed seed; stops early if it takes longer than `seconds`."""
    torch.manual_seed(0)
    model = GPT(setting).to(setting.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=setting.learning_rate, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, setting.learning_rate, total_steps=setting.steps, pct_start=0.1, cycle_momentum=False
    )
    source = batches(standard_library(), setting, seed=0)
    losses: list[float] = []
    step_seconds: list[float] = []
    while len(losses) < setting.steps and sum(step_seconds) < seconds:
        batch = next(source)
        start = time.perf_counter()
        with torch.autocast(setting.device.type, setting.dtype, enabled=setting.dtype != torch.float32):
            logits = model(batch, attention)
        loss = functional.cross_entropy(logits.float(), batch.targets)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
        step_seconds.append(time.perf_counter() - start)
        progress(losses[-1])
    typical = sorted(step_seconds)[len(step_seconds) // 2]
    return Training(model, losses, setting.tokens_per_batch / typical)


@torch.no_grad()
def sample(model: GPT, attention: Attention, setting: Setting, prompt: str, length: int) -> str:
    """Continues the prompt, one character at a time, until `length` characters or the end of the document."""
    generator = torch.Generator(setting.device).manual_seed(0)
    tokens = [BOUNDARY, *prompt.encode()]
    while len(tokens) <= length:
        batch = pack([[*tokens, BOUNDARY]], setting.device)
        with torch.autocast(setting.device.type, setting.dtype, enabled=setting.dtype != torch.float32):
            logits = model(batch, attention)[-1].float()
        token = int(torch.multinomial(functional.softmax(logits / 0.7, dim=-1), 1, generator=generator))
        if token == BOUNDARY:
            break
        tokens.append(token)
    return bytes(tokens[1:]).decode()
