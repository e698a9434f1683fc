"""A model as a generation sees it: tokens in, logits of the next ones out, its caches and their length kept in step."""

import contextlib
import logging
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from flash_attn.utils.decoding_graphs import DecodingCGCache, update_graph_cache
from flash_attn.utils.inference_params import InferenceParams

_log = logging.getLogger("flash_attn")


@dataclass
class DecoderOutput:
    """The tokens of a generation and the logits from which they were chosen.

    sequences: (batch, length), the prompt first.
    scores: one (batch, vocab_size) per new token, None if not kept; of `decode_speculative` (batch, new tokens, vocab_size).
    """

    sequences: Tensor
    scores: tuple[Tensor, ...] | Tensor | None = None


class Decoder:
    """A model, called as `model(input_ids, position_ids=, inference_params=, num_last_tokens=)`, in one generation.

    params.seqlen_offset tokens lie in its caches; setting it back forgets those behind it.
    """

    def __init__(
        self, model: Any, params: InferenceParams, vocab_size: int | None = None, graphs: DecodingCGCache | None = None
    ) -> None:
        self.model = model
        self.params = params
        self.vocab_size = vocab_size
        self.graphs = graphs

    @classmethod
    def start(
        cls,
        model: Any,
        prompt: Tensor,
        max_length: int,
        vocab_size: int | None,
        tensor_parallel: int,
        cg: bool,
        decoding_seqlens: Iterable[int] = (1,),
    ) -> "Decoder":
        """For a prompt (batch, seqlen). With cg the graphs, for the given numbers of tokens, stay with the model."""
        batch_size, seqlen = prompt.shape
        if not cg:
            return cls(model, InferenceParams(max_length, batch_size), vocab_size)
        graphs = update_graph_cache(
            model,
            getattr(model, "_decoding_cache", None),
            batch_size,
            seqlen,
            max_length,
            decoding_seqlens,
            tensor_parallel,
        )
        model._decoding_cache = graphs
        graphs.params.reset(max_length, batch_size)
        return cls(model, graphs.params, vocab_size, graphs)

    def logits(self, input_ids: Tensor, num_last_tokens: int = 1) -> Tensor:
        """Evaluate the next tokens, (batch, seqlen); (batch, num_last_tokens, vocab_size) behind the last of them."""
        offset, seqlen = self.params.seqlen_offset, input_ids.shape[1]
        position_ids = None
        if offset > 0:
            positions = torch.arange(offset, offset + seqlen, dtype=torch.long, device=input_ids.device)
            position_ids = positions.expand(input_ids.shape)
        if self.graphs is not None and position_ids is not None:
            logits = self.graphs.run(input_ids, position_ids, offset)[:, -num_last_tokens:]
        else:
            logits = self.model(
                input_ids,
                position_ids=position_ids,
                inference_params=self.params,
                num_last_tokens=num_last_tokens,
            ).logits
        self.params.seqlen_offset += seqlen
        return logits[..., : self.vocab_size]


@contextlib.contextmanager
def logged_time(enabled: bool, device: torch.device, tensor_parallel: int) -> Iterator[None]:
    """If enabled, log how long the body takes on the device and on all ranks."""
    if not enabled:
        yield
        return
    start = _finished_at(device, tensor_parallel)
    yield
    milliseconds = 1000 * (_finished_at(device, tensor_parallel) - start)
    _log.info("Prompt processing + decoding time: %.0f ms", milliseconds)


def _finished_at(device: torch.device, tensor_parallel: int) -> float:
    if tensor_parallel > 1:
        dist.barrier()
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return time.perf_counter()
