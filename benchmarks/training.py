"""A training step of a Llama-like model end to end, by implementation of attention: `python -m benchmarks.training --out DIR`.

Forward, backward and optimizer. One model serves all implementations, which take turns step by step; each one's loss on the
first batch has to agree with the others' before anything is timed.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks import report
from benchmarks.providers import installed
from benchmarks.timing import synchronize
from flash_attn import backends, flash_attn_func

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]  # (batch, seqlen, heads, headdim) each; causal
LOSS_BOUND = 1e-2  # between implementations: bf16 activations through all layers


class Size(NamedTuple):
    """The model and its batch."""

    layers: int = 8
    width: int = 2048
    heads: int = 16
    heads_k: int = 16
    feed_forward: int = 5504
    vocabulary: int = 32000
    batch: int = 4
    seqlen: int = 4096


TINY = Size(1, 64, 2, 1, 96, 50, 1, 33)


def sdpa(backend: SDPBackend) -> Attention:
    """PyTorch's attention by one implementation."""

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        with sdpa_kernel(backend):
            out = functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])
        return out.transpose(1, 2)

    return attend


def flaggems(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """FlagGems' forward; its backend leaves gradients to our others."""
    with backends.use("flaggems"):
        return flash_attn_func(q, k, v, causal=True)


ATTENTIONS: dict[str, Attention] = {
    "ours": lambda q, k, v: flash_attn_func(q, k, v, causal=True),
    "cudnn": sdpa(SDPBackend.CUDNN_ATTENTION),
    "fa2": sdpa(SDPBackend.FLASH_ATTENTION),
    "flaggems": flaggems,
    "math": sdpa(SDPBackend.MATH),
}


class Layer(nn.Module):
    """Grouped-query attention with rotary positions, then a gated feed-forward layer, each on normalised input."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.headdim = size.width // size.heads
        self.attention_norm, self.feed_forward_norm = nn.RMSNorm(size.width), nn.RMSNorm(size.width)
        self.query = nn.Linear(size.width, size.width, bias=False)
        self.key_value = nn.Linear(size.width, 2 * size.heads_k * self.headdim, bias=False)
        self.project = nn.Linear(size.width, size.width, bias=False)
        self.gate_up = nn.Linear(size.width, 2 * size.feed_forward, bias=False)
        self.down = nn.Linear(size.feed_forward, size.width, bias=False)

    def forward(self, x: Tensor, rotation: Tensor, attention: Attention) -> Tensor:
        normed = self.attention_norm(x)
        q = self.query(normed).unflatten(-1, (-1, self.headdim))
        k, v = self.key_value(normed).unflatten(-1, (2, -1, self.headdim)).unbind(2)
        x = x + self.project(attention(rotate(q, rotation), rotate(k, rotation), v).flatten(2))
        gate, up = self.gate_up(self.feed_forward_norm(x)).chunk(2, dim=-1)
        return x + self.down(functional.silu(gate) * up)


def rotate(x: Tensor, rotation: Tensor) -> Tensor:
    """Rotary positions in halves; rotation (2, seqlen, 1, headdim / 2) holds cosines and sines."""
    cos, sin = rotation
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, first * sin + second * cos], dim=-1)


class Model(nn.Module):
    """Tokens to the mean loss of predicting the next one."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.embed = nn.Embedding(size.vocabulary, size.width)
        self.layers = nn.ModuleList(Layer(size) for _ in range(size.layers))
        self.norm = nn.RMSNorm(size.width)
        self.predict = nn.Linear(size.width, size.vocabulary, bias=False)
        frequencies = 10000.0 ** -torch.linspace(0.0, 1.0, size.width // size.heads // 2)
        angles = torch.arange(size.seqlen)[:, None, None] * frequencies
        self.register_buffer("rotation", torch.stack([angles.cos(), angles.sin()]))

    def forward(self, tokens: Tensor, attention: Attention) -> Tensor:
        x = self.embed(tokens[:, :-1])
        for layer in self.layers:
            x = layer(x, self.rotation, attention)
        return functional.cross_entropy(self.predict(self.norm(x)).flatten(0, 1), tokens[:, 1:].flatten())


def measure(names: Sequence[str], size: Size, device: torch.device, steps: int) -> list[dict[str, Any]]:
    """Milliseconds a step of every implementation, in turns."""
    torch.manual_seed(0)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    model = Model(size).to(device, dtype)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=device.type == "cuda")
    tokens = torch.randint(size.vocabulary, (size.batch, size.seqlen + 1), device=device)

    def step(attention: Attention) -> float:
        start = time.perf_counter()
        model(tokens, attention).backward()
        optimizer.step()
        optimizer.zero_grad()
        synchronize(device)
        return (time.perf_counter() - start) * 1e3

    with torch.no_grad():
        losses = {name: model(tokens, ATTENTIONS[name]).item() for name in names}
    low, high = min(losses.values()), max(losses.values())
    if not high - low <= LOSS_BOUND:
        raise RuntimeError(f"the losses of the first batch differ: {losses}")
    for name in names:
        step(ATTENTIONS[name])
    samples: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(steps):
        for name in names:
            samples[name].append(step(ATTENTIONS[name]))
    return [
        {"provider": name, "median_ms": statistics.median(times), "loss": losses[name], "steps": steps}
        for name, times in samples.items()
    ]


def table(document: dict[str, Any]) -> str:
    size = Size(**document["size"])
    tokens = size.batch * size.seqlen
    rows = [
        [
            report.HEADINGS.get(row["provider"], row["provider"]),
            f"{row['median_ms']:.1f}",
            f"{tokens / row['median_ms']:.0f}",
        ]
        for row in document["training"]
    ]
    title = (
        f"A training step of {size.layers} layers of {size.width}, {size.heads} heads ({size.heads_k} of keys), "
        f"{size.batch} sequences of {size.seqlen} tokens:"
    )
    return f"{title}\n\n{report.markdown(['attention', 'ms a step', 'thousand tokens/s'], rows)}"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.training", description=__doc__)
    default = installed(["ours", "cudnn", "fa2", "flaggems"])
    parser.add_argument("--providers", nargs="+", choices=list(ATTENTIONS), default=default)
    parser.add_argument("--out", type=Path, default=report.RESULTS)
    parser.add_argument("--steps", type=int, default=15)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--tiny", action="store_true", help="the seconds-long run that tests the path of a run")
    options = parser.parse_args(arguments)
    device = torch.device(options.device)
    size = TINY if options.tiny else Size()
    document = {
        "kind": "training",
        "machine": report.machine(device),
        "size": size._asdict(),
        "training": measure(options.providers, size, device, options.steps),
    }
    path = options.out / "training.json"
    report.save_document(path, document)
    sys.stdout.write(f"{table(document)}\n\n{path}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
