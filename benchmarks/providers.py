"""Implementations of attention behind one shape of call; each is imported, none is rewritten.

A provider takes and returns (batch, seqlen, heads, headdim), or (tokens, heads, headdim) for packed batches, and says
in a sentence which cases it cannot run.
"""

import contextlib
import functools
import importlib.util
import itertools
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.cases import WINDOW_SIZE, Case

REFERENCE_PAIRS = 2**30  # scores the reference may hold at once


class Inputs(NamedTuple):
    """Random operands of one case."""

    q: Tensor
    k: Tensor
    v: Tensor
    dout: Tensor
    alibi_slopes: Tensor | None  # (nheads,), fp32
    cu_seqlens: Tensor | None  # (batch + 1,), int32; queries, and keys outside pages
    cu_seqlens_k: Tensor | None = None  # keys in pages
    block_table: Tensor | None = None  # (batch, pages of a sequence), int32
    sinks: Tensor | None = None  # (nheads,), in the operands' dtype
    cache_seqlens: Tensor | None = None  # (batch,), int32; tokens in a cache, the new ones included

    @property
    def operands(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.q, self.k, self.v


def make_inputs(case: Case, device: torch.device, seed: int = 0) -> Inputs:
    """Standard normal operands; q, k and v require gradients when the case is a backward."""
    generator = torch.Generator(device).manual_seed(seed)
    tokens_q, tokens_k = case.tokens
    lead_q, lead_k = (
        ((tokens_q,), (tokens_k,))
        if case.layout != "dense"
        else (
            (case.batch, case.seqlen_q),
            (case.batch, case.seqlen_k),
        )
    )

    def normal(lead: tuple[int, ...], nheads: int) -> Tensor:
        shape = (*lead, nheads, case.headdim)
        return torch.randn(shape, generator=generator, device=device, dtype=getattr(torch, case.dtype))

    if case.layout == "paged":
        lead_k = (tokens_k // case.page_size, case.page_size)
    q, k, v = normal(lead_q, case.nheads), normal(lead_k, case.nheads_k), normal(lead_k, case.nheads_k)
    for operand in (q, k, v):
        operand.requires_grad_(case.direction == "backward")
    dout = normal(lead_q, case.nheads)
    inputs = Inputs(q, k, v, dout, _slopes(case, device), _boundaries([q for q, _k in case.sequences], case, device))
    if case.sinks:
        sinks = torch.randn(case.nheads, generator=generator, device=device, dtype=q.dtype)
        inputs = inputs._replace(sinks=sinks.requires_grad_(case.direction == "backward"))
    if case.layout != "paged":
        return inputs
    table = torch.randperm(lead_k[0], generator=generator, device=device).int().view(case.batch, -1)
    return inputs._replace(cu_seqlens_k=_boundaries([k for _q, k in case.sequences], case, device), block_table=table)


def in_pages(k: Tensor, v: Tensor, page_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """(k pages, v pages, block table): the same tokens in pages of random order; (batch, seqlen, heads, headdim) each."""
    batch, seqlen = k.shape[:2]
    num_pages = batch * seqlen // page_size
    order = torch.randperm(num_pages, device=k.device, generator=torch.Generator(k.device).manual_seed(1))
    pages = []
    for x in (k, v):
        shuffled = torch.empty_like(x).view(num_pages, page_size, *x.shape[2:])
        shuffled[order] = x.view_as(shuffled)
        pages.append(shuffled)
    return *pages, order.int().view(batch, -1)


def _slopes(case: Case, device: torch.device) -> Tensor | None:
    if not case.alibi:
        return None
    return torch.tensor([2.0 ** (-8.0 * (head + 1) / case.nheads) for head in range(case.nheads)], device=device)


def _boundaries(lengths: list[int], case: Case, device: torch.device) -> Tensor | None:
    if case.layout == "dense":
        return None
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device=device)


class Provider(NamedTuple):
    """One implementation; `scope` has to be entered around every call."""

    name: str
    title: str
    unsupported: Callable[[Case, torch.device], str | None]
    forward: Callable[[Case, Inputs], Tensor]
    scope: Callable[[], AbstractContextManager[Any]] = contextlib.nullcontext
    compiles: bool = False  # builds kernels on first use, so that compiling beforehand in parallel pays
    needs: str = ""  # a package without which the provider is left out


def launch(provider: Provider, case: Case, inputs: Inputs) -> Callable[[], tuple[Tensor, ...]]:
    """What is timed: a forward without gradients, or only the backward of one retained graph."""
    if case.direction == "forward":
        return lambda: (provider.forward(case, inputs),)
    with provider.scope():
        out = provider.forward(case, inputs)
    leaves = inputs.operands if inputs.sinks is None else (*inputs.operands, inputs.sinks)
    return lambda: torch.autograd.grad(out, leaves, inputs.dout, retain_graph=True)[:3]


def _ours(case: Case, inputs: Inputs) -> Tensor:
    import flash_attn

    words = {
        "dropout_p": case.dropout_p,
        "causal": case.causal,
        "window_size": case.window,
        "softcap": case.softcap,
        "alibi_slopes": inputs.alibi_slopes,
        "s_aux": inputs.sinks,
    }
    if case.layout != "dense":
        ends_k = inputs.cu_seqlens if inputs.cu_seqlens_k is None else inputs.cu_seqlens_k
        lengths = (inputs.cu_seqlens, ends_k, case.seqlen_q, case.seqlen_k)
        return flash_attn.flash_attn_varlen_func(*inputs.operands, *lengths, **words, block_table=inputs.block_table)
    return flash_attn.flash_attn_func(*inputs.operands, **words)


def _using(name: str) -> Callable[[], AbstractContextManager[Any]]:
    def scope() -> AbstractContextManager[Any]:
        from flash_attn import backends

        return backends.use(name)

    return scope


def _our_backend(name: str) -> Provider:
    return Provider(name, f"flash_attn, backend {name}", lambda _c, _d: None, _ours, _using(name), compiles=True)


def _flaggems_unsupported(case: Case, device: torch.device) -> str | None:
    if case.direction == "backward":
        return "the backend flaggems leaves gradients to our other backends"
    if case.dropout_p or case.sinks or case.dtype not in ("bfloat16", "float16"):
        return "the backend flaggems takes fp16 and bf16 without dropout and sinks"
    return None if device.type == "cuda" else "FlagGems needs an accelerator"


def _flaggems_sdpa(case: Case, inputs: Inputs) -> Tensor:
    """FlagGems' scaled_dot_product_attention, the only one of its attention functions that has a gradient."""
    import flag_gems

    q, k, v = (operand.transpose(1, 2).contiguous() for operand in inputs.operands)
    out = flag_gems.scaled_dot_product_attention(
        q, k, v, is_causal=case.causal, enable_gqa=case.nheads != case.nheads_k
    )
    if out.requires_grad:
        out.register_hook(Tensor.contiguous)  # its backward asserts that dout is contiguous
    return out.transpose(1, 2)


def _flaggems_sdpa_unsupported(case: Case, device: torch.device) -> str | None:
    features = case.alibi or case.sinks or case.softcap or case.dropout_p or case.window != WINDOW_SIZE
    if case.layout != "dense" or features:
        return "FlagGems' SDPA takes dense batches without ALiBi, sinks, softcap, dropout or window"
    if case.causal and case.seqlen_q != case.seqlen_k:
        return "FlagGems' SDPA aligns its causal mask top left"
    return None if device.type == "cuda" else "FlagGems needs an accelerator"


def _sdpa(case: Case, inputs: Inputs) -> Tensor:
    """PyTorch's scaled_dot_product_attention; its causal mask is top-left aligned, so lengths have to be equal."""
    q, k, v = (operand.transpose(1, 2) for operand in inputs.operands)
    grouped = case.nheads != case.nheads_k
    out = F.scaled_dot_product_attention(q, k, v, None, case.dropout_p, is_causal=case.causal, enable_gqa=grouped)
    return out.transpose(1, 2)


def _fa2(case: Case, inputs: Inputs) -> Tensor:
    """FlashAttention-2 inside PyTorch; packed batches and windows are reachable only through its own operator."""
    if case.layout == "dense" and case.window == WINDOW_SIZE:
        return _sdpa(case, inputs)
    left, right = (side if side >= 0 else None for side in case.window)
    return torch.ops.aten._flash_attention_forward(
        *inputs.operands,
        inputs.cu_seqlens,
        inputs.cu_seqlens,
        case.seqlen_q,
        case.seqlen_k,
        case.dropout_p,
        case.causal,
        False,
        window_size_left=left,
        window_size_right=0 if case.causal else right,
    )[0]


def _fa2_unsupported(case: Case, device: torch.device) -> str | None:
    if case.layout == "paged":
        return "PyTorch's FlashAttention-2 operator takes no pages"
    if case.alibi or case.sinks or case.softcap:
        return "PyTorch's FlashAttention-2 operator has no ALiBi gradient, no sinks and no softcap"
    if case.causal and case.seqlen_q != case.seqlen_k:
        return "PyTorch's causal mask is top-left aligned"
    if device.type != "cuda" and (case.layout != "dense" or case.window != WINDOW_SIZE or case.dropout_p):
        return "PyTorch's CPU attention has no packed batches, windows or dropout"
    if device.type == "cuda" and case.dtype not in ("bfloat16", "float16"):
        return f"PyTorch's FlashAttention-2 is fp16 and bf16 only, not {case.dtype}"
    return None


def _cudnn_unsupported(case: Case, device: torch.device) -> str | None:
    if device.type != "cuda":
        return "cuDNN needs an NVIDIA GPU"
    if case.alibi or case.sinks or case.softcap or case.window != WINDOW_SIZE or case.layout != "dense":
        return "PyTorch's cuDNN attention takes no ALiBi, sinks, softcap, window or packed batch"
    if case.causal and case.seqlen_q != case.seqlen_k:
        return "PyTorch's causal mask is top-left aligned"
    if case.dtype not in ("bfloat16", "float16"):
        return f"cuDNN attention is fp16 and bf16 only, not {case.dtype}"
    return None


def _flex_unsupported(case: Case, device: torch.device) -> str | None:
    if device.type != "cuda":
        return "FlexAttention is measured on GPUs only"
    if case.dropout_p or case.sinks:
        return "FlexAttention has no dropout and no sinks"
    if case.layout != "dense":
        return "FlexAttention is measured on dense batches only"
    return None


def _flex(case: Case, inputs: Inputs) -> Tensor:
    attend = _compiled_flex(case._replace(direction="", name="", baseline=""), inputs.q.device)
    q, k, v = (operand.transpose(1, 2) for operand in inputs.operands)
    return attend(q, k, v).transpose(1, 2)


@functools.cache
def _compiled_flex(case: Case, device: torch.device) -> Callable[..., Tensor]:
    """FlexAttention for one case, compiled once with its mask and score functions."""
    import torch._dynamo.config
    import torch._functorch.config
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    torch._dynamo.config.recompile_limit = 1024  # one compilation a case; beyond the limit it would run uncompiled
    torch._functorch.config.donated_buffer = False  # the backward is timed on one retained graph
    left = case.window[0]

    def mask_mod(_batch: Tensor, _head: Tensor, row: Tensor, col: Tensor) -> Tensor:
        visible = row >= col
        return visible & (row - col <= left) if left >= 0 else visible

    block_mask = create_block_mask(mask_mod, None, None, case.seqlen_q, case.seqlen_k, device) if case.causal else None
    return functools.partial(
        torch.compile(flex_attention, dynamic=False),
        score_mod=_score_mod(case, device),
        block_mask=block_mask,
        enable_gqa=case.nheads != case.nheads_k,
    )


def _score_mod(case: Case, device: torch.device) -> Callable[..., Tensor] | None:
    slopes, softcap = _slopes(case, device), case.softcap
    if slopes is not None:
        return lambda score, _batch, head, row, col: score - slopes[head] * (row - col).abs()
    if softcap:
        return lambda score, _batch, _head, _row, _col: softcap * torch.tanh(score / softcap)
    return None


def _reference(case: Case, inputs: Inputs) -> Tensor:
    from flash_attn import reference

    return reference.attention(
        *inputs.operands,
        window=canonical_window(case),
        softcap=case.softcap,
        alibi_slopes=inputs.alibi_slopes,
        sinks=inputs.sinks,
        compute_dtype=torch.float32,
    )[0].to(inputs.q.dtype)


def _reference_unsupported(case: Case, _device: torch.device) -> str | None:
    if case.layout != "dense" or case.dropout_p:
        return "the reference is measured on dense batches without dropout"
    if case.batch * case.nheads * case.seqlen_q * case.seqlen_k > REFERENCE_PAIRS:
        return f"the reference would hold more than {REFERENCE_PAIRS} scores"
    return None


def canonical_window(case: Case) -> tuple[int | None, int | None]:
    """The window with None for an unbounded side; causal is (left, 0)."""
    left, right = (side if side >= 0 else None for side in case.window)
    return left, 0 if case.causal else right


PROVIDERS: dict[str, Provider] = {
    provider.name: provider
    for provider in (
        Provider("ours", "flash_attn, its own choice of backend", lambda _c, _d: None, _ours, compiles=True),
        *(_our_backend(name) for name in ("portable", "hopper", "cpu")),
        Provider(
            "flaggems",
            "FlagGems, through flash_attn's backend",
            _flaggems_unsupported,
            _ours,
            _using("flaggems"),
            compiles=True,
            needs="flag_gems",
        ),
        Provider(
            "flaggems_sdpa",
            "FlagGems' scaled_dot_product_attention",
            _flaggems_sdpa_unsupported,
            _flaggems_sdpa,
            compiles=True,
            needs="flag_gems",
        ),
        Provider(
            "fa2",
            "PyTorch SDPA FLASH_ATTENTION (FlashAttention-2)",
            _fa2_unsupported,
            _fa2,
            lambda: sdpa_kernel(SDPBackend.FLASH_ATTENTION),
        ),
        Provider(
            "cudnn",
            "PyTorch SDPA CUDNN_ATTENTION",
            _cudnn_unsupported,
            _sdpa,
            lambda: sdpa_kernel(SDPBackend.CUDNN_ATTENTION),
        ),
        Provider("flex", "PyTorch FlexAttention, compiled", _flex_unsupported, _flex, compiles=True),
        Provider("reference", "flash_attn.reference, fp32", _reference_unsupported, _reference),
    )
}
OURS = ("ours", "portable", "hopper", "cpu")


def installed(names: Sequence[str], providers: Mapping[str, Any] = PROVIDERS) -> list[str]:
    """The providers whose packages, named in `needs`, are there."""
    return [name for name in names if not providers[name].needs or importlib.util.find_spec(providers[name].needs)]
