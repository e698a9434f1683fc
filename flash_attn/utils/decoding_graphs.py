"""CUDA graphs of a model's decoding steps: one for each batch size and number of new tokens, all over one set of caches.

A graph replays what was launched while it was recorded, at the same addresses. So the tokens and positions are copied into
the tensors of the recording, and the lengths of the sequences, on which attention depends, stand in
`InferenceParams.lengths_per_sample` on the device.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from flash_attn.errors import InvalidArgument, UnsupportedProblem
from flash_attn.utils.inference_params import InferenceParams, allocate_inference_cache


class CapturedStep:
    """One decoding step of a model as a graph.

    Called with (input_ids, position_ids, seqlen), the first two (batch_size, decoding_seqlen) and the number of tokens that
    the caches hold so far, it returns the logits (batch_size, decoding_seqlen, vocab_size).
    """

    def __init__(
        self, model: Any, inference_params: InferenceParams, batch_size: int, decoding_seqlen: int, mempool: Any
    ) -> None:
        self.model = model
        self.params = inference_params
        self.device = _device(model)
        self.mempool = mempool
        shape = (batch_size, decoding_seqlen)
        self.input_ids = torch.zeros(shape, dtype=torch.long, device=self.device)
        self.position_ids = torch.zeros(shape, dtype=torch.long, device=self.device)
        self.graph = torch.cuda.CUDAGraph()

    def capture(self, n_warmups: int) -> None:
        """Record the step at params.seqlen_offset, after runs that compile kernels and fill caches outside the graph."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(n_warmups):
                self._run_model()
            stream.synchronize()
            if dist.is_initialized():
                dist.barrier()  # no rank may record while another still waits for its collectives
        torch.cuda.current_stream().wait_stream(stream)
        # Modules that replace a table (rotary embeddings grow theirs) must not free what the graph reads.
        self.tables = [x for module in self.model.modules() for x in vars(module).values() if isinstance(x, Tensor)]
        with torch.cuda.graph(self.graph, pool=self.mempool):
            self.logits = self._run_model()

    def __call__(self, input_ids: Tensor, position_ids: Tensor, seqlen: int) -> Tensor:
        with torch.cuda.device(self.device):
            _lengths(self.params).fill_(seqlen)
            self.input_ids.copy_(input_ids)
            self.position_ids.copy_(position_ids)
            self.graph.replay()
            return self.logits.clone()

    def _run_model(self) -> Tensor:
        return self.model(
            self.input_ids,
            position_ids=self.position_ids,
            inference_params=self.params,
            num_last_tokens=self.input_ids.shape[1],
        ).logits


@dataclass
class DecodingCGCache:
    """A model's graphs, and the caches of keys and values that they read and write."""

    max_batch_size: int = 0
    max_seqlen: int = 0
    device: torch.device | None = None
    dtype: torch.dtype | None = None
    callables: dict = field(default_factory=dict)  # (batch_size, decoding_seqlen) -> step
    mempool: Any = None
    inference_params: InferenceParams | None = None

    @property
    def params(self) -> InferenceParams:
        """inference_params, which `update_graph_cache` sets."""
        if self.inference_params is None:
            raise InvalidArgument("this DecodingCGCache has no inference_params, update_graph_cache makes them")
        return self.inference_params

    def forget(self) -> None:
        """Free the graphs and the caches."""
        self.callables, self.mempool, self.inference_params = {}, None, None

    def run(self, input_ids: Tensor, position_ids: Tensor, seqlen: int) -> Tensor:
        """The logits of the step for tokens of this shape, as `CapturedStep`."""
        return self.callables[tuple(input_ids.shape)](input_ids, position_ids, seqlen)


@torch.inference_mode()
def update_graph_cache(
    model: Any,
    cache: DecodingCGCache | None,
    batch_size: int,
    seqlen_og: int,
    max_seqlen: int,
    decoding_seqlens: Iterable[int] = (1,),
    tensor_parallel: int = 1,
    dtype: torch.dtype | None = None,
    n_warmups: int = 2,
) -> DecodingCGCache:
    """The cache with a graph for every one of decoding_seqlens; what it has already is kept as long as it is large enough.

    Args:
        model: on a GPU; its `allocate_inference_cache(batch_size, max_seqlen, dtype)` makes the caches, or its `config`
            says how large they are.
        cache: of an earlier call for this model, or None.
        seqlen_og: tokens of the prompt.
        max_seqlen: tokens of the prompt and of what is generated.
        decoding_seqlens: numbers of tokens evaluated at a time behind the prompt.
        tensor_parallel: ranks over which the model's heads are split.
        dtype: of the caches; default that of the model's parameters.

    Raises:
        UnsupportedProblem: the model is not on a GPU.

    Source: flash_attn 2.8.3, flash_attn/utils/generation.py.
    """
    device = _device(model)
    _require_gpu(device)
    dtype = dtype or next(iter(model.parameters())).dtype
    cache = cache or DecodingCGCache()
    changed = (cache.device, cache.dtype) != (device, dtype)
    if changed or batch_size > cache.max_batch_size or max_seqlen > cache.max_seqlen:
        cache.forget()
        cache.device, cache.dtype, cache.max_batch_size, cache.max_seqlen = device, dtype, batch_size, max_seqlen
        cache.inference_params = InferenceParams(
            max_seqlen,
            batch_size,
            seqlen_og,
            key_value_memory_dict=_allocate(model, batch_size, max_seqlen, dtype, tensor_parallel),
            lengths_per_sample=torch.full((batch_size,), seqlen_og, dtype=torch.int32, device=device),
        )
        cache.mempool = torch.cuda.graph_pool_handle()
    for decoding_seqlen in decoding_seqlens:
        # a step behind the prompt evaluates fewer tokens than there are places
        if decoding_seqlen < cache.max_seqlen and (batch_size, decoding_seqlen) not in cache.callables:
            cache.callables[batch_size, decoding_seqlen] = capture_graph(
                model, cache.params, batch_size, cache.max_seqlen, decoding_seqlen, cache.mempool, n_warmups
            )
    cache.params.seqlen_offset = 0
    return cache


def capture_graph(
    model: Any,
    inference_params: InferenceParams,
    batch_size: int,
    max_seqlen: int,
    decoding_seqlen: int = 1,
    mempool: Any = None,
    n_warmups: int = 2,
) -> CapturedStep:
    """A graph of the step that evaluates decoding_seqlen tokens of batch_size sequences.

    Recording it overwrites the caches. inference_params must have lengths_per_sample, and stays as it was otherwise.

    Source: flash_attn 2.8.3, flash_attn/utils/generation.py.
    """
    seqlen_offset = inference_params.seqlen_offset
    inference_params.seqlen_offset = max_seqlen - decoding_seqlen
    _lengths(inference_params).fill_(inference_params.seqlen_offset)
    with torch.cuda.device(_device(model)):
        step = CapturedStep(model, inference_params, batch_size, decoding_seqlen, mempool)
        step.capture(n_warmups)
    inference_params.seqlen_offset = seqlen_offset
    return step


def _allocate(
    model: Any, batch_size: int, max_seqlen: int, dtype: torch.dtype, tensor_parallel: int
) -> dict[int, Tensor]:
    """The caches of all layers."""
    if hasattr(model, "allocate_inference_cache"):
        return model.allocate_inference_cache(batch_size, max_seqlen, dtype)
    config = model.config
    nheads = config.num_attention_heads
    headdim = getattr(config, "head_dim", None) or config.hidden_size // nheads
    layers = config.num_hidden_layers
    return allocate_inference_cache(
        batch_size, max_seqlen, nheads // tensor_parallel, headdim, layers, _device(model), dtype
    )


def _require_gpu(device: torch.device) -> None:
    if device.type != "cuda":
        raise UnsupportedProblem(f"cg=True replays CUDA graphs, which needs a model on a GPU, got one on {device}")


def _device(model: Any) -> torch.device:
    return next(iter(model.parameters())).device


def _lengths(params: InferenceParams) -> Tensor:
    if params.lengths_per_sample is None:
        raise InvalidArgument("a captured step needs inference_params.lengths_per_sample, got None")
    return params.lengths_per_sample
