"""Attention as torch.func sees it: `grad`, `vjp`, `vmap` and what is made of them, such as `jacrev` and per-sample gradients.

torch.func takes autograd classes whose forward has no ctx. Those of eager calls have one, which costs less: under a transform
their forward runs as a plain function, and what it does with autograd happens here, over the same operators.

A head of attention knows no other, so `vmap` puts the mapped dimension beside the heads: one call, of a packed batch too.
Where the elements differ in their dropout masks, their lengths or their pages, it makes one call for each.
"""

from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import (
    CVmapInterpreterPtr,
    RandomnessType,
    TransformType,
    get_interpreter_stack,
    get_unwrapped,
    is_batchedtensor,
    is_functorch_wrapped_tensor,
    maybe_get_level,
)

from flash_attn import dispatch
from flash_attn.backward import call
from flash_attn.dispatch import empty_gradient
from flash_attn.errors import UnsupportedProblem

SECOND_DERIVATIVES = (
    "second derivatives of attention: the kernels differentiate once; for a gradient of gradients use plain PyTorch such as "
    "flash_attn.reference"
)

# Where a tensor holds its heads, from its end: q, k, v, out (..., heads, headdim); softmax_lse (..., heads, rows);
# sinks and slopes (..., heads).
BEFORE_LAST, LAST = -2, -1


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    words: call.Words,
    alibi_slopes: Tensor | None,
    return_softmax: bool,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    block_table: Tensor | None,
    sinks: Tensor | None,
) -> call.Results:
    """`call.attend`, to be transformed."""
    _refuse_functionalize()
    operands = (q, k, v, sinks, alibi_slopes, cu_seqlens_q, cu_seqlens_k, block_table)
    if words.dropout_p > 0.0:
        _check_randomness(operands)
    return *Attention.apply(*operands, words, return_softmax), None


class Attention(torch.autograd.Function):
    """(out, softmax_lse, S_dmask, rng_state) of q, k, v and sinks."""

    @staticmethod
    def forward(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        sinks: Tensor | None,
        alibi_slopes: Tensor | None,
        cu_seqlens_q: Tensor | None,
        cu_seqlens_k: Tensor | None,
        block_table: Tensor | None,
        words: call.Words,
        return_softmax: bool,
    ) -> Any:
        batch = (cu_seqlens_q, cu_seqlens_k, block_table)
        return call.attend(q, k, v, words, alibi_slopes, return_softmax, *batch, sinks)[:4]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        q, k, v, sinks, alibi_slopes, cu_seqlens_q, cu_seqlens_k, block_table, ctx.words, _ = inputs
        out, softmax_lse, scores, rng_state = output
        batch = (cu_seqlens_q, cu_seqlens_k, block_table)
        ctx.save_for_backward(q, k, v, out, softmax_lse, sinks, alibi_slopes, rng_state, *batch)
        ctx.mark_non_differentiable(*[x for x in (scores, rng_state) if x is not None])
        ctx.set_materialize_grads(False)
        ctx.scope = dispatch.current_scope()

    @staticmethod
    def backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None, *_: Any) -> Any:
        gradients = Gradients.apply(dout, dlse, *ctx.saved_tensors, ctx.words, ctx.scope)
        return *gradients, *(None,) * 6

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        raise UnsupportedProblem(call.TANGENTS)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *arguments: Any) -> Any:
        words: call.Words = arguments[8]
        if words.dropout_p > 0.0 or any(dim is not None for dim in in_dims[5:8]):
            return one_by_one(Attention, info.batch_size, in_dims, arguments)
        heads = (BEFORE_LAST,) * 3 + (LAST,) * 2
        folded = beside_heads(arguments[:5], in_dims[:5], info.batch_size, heads)
        out, softmax_lse, *_ = Attention.apply(*folded, *arguments[5:])
        results, out_dims = apart_from_heads((out, softmax_lse), info.batch_size, (BEFORE_LAST,) * 2)
        return (*results, None, None), (*out_dims, None, None)


class Gradients(torch.autograd.Function):
    """(dq, dk, dv, dsinks) of an `Attention`."""

    @staticmethod
    def forward(
        dout: Tensor | None,
        dlse: Tensor | None,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        softmax_lse: Tensor,
        sinks: Tensor | None,
        alibi_slopes: Tensor | None,
        rng_state: Tensor | None,
        cu_seqlens_q: Tensor | None,
        cu_seqlens_k: Tensor | None,
        block_table: Tensor | None,
        words: call.Words,
        scope: dispatch.Scope,
    ) -> Any:
        gradients = empty_gradient(q), empty_gradient(k), empty_gradient(v)
        batch = (alibi_slopes, cu_seqlens_q, cu_seqlens_k, block_table)
        saved = (q, k, v, out, softmax_lse, rng_state, *batch)
        return *gradients, call.differentiate(words, None, saved, dout, dlse, *gradients, sinks, scope)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        raise UnsupportedProblem(SECOND_DERIVATIVES)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        raise UnsupportedProblem(SECOND_DERIVATIVES)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *arguments: Any) -> Any:
        words: call.Words = arguments[13]
        if words.dropout_p > 0.0 or any(dim is not None for dim in in_dims[10:13]):
            return one_by_one(Gradients, info.batch_size, in_dims, arguments)
        heads = (BEFORE_LAST,) * 7 + (LAST,) * 2
        folded = beside_heads(arguments[:9], in_dims[:9], info.batch_size, heads)
        gradients = Gradients.apply(*folded, *arguments[9:])
        return apart_from_heads(gradients, info.batch_size, (BEFORE_LAST,) * 3 + (LAST,))


def beside_heads(
    tensors: tuple[Tensor | None, ...], in_dims: tuple[int | None, ...], batch_size: int, heads: tuple[int, ...]
) -> list[Tensor | None]:
    """The tensors with batch_size times as many heads; one that is not mapped serves every element."""
    _require_elements(batch_size)
    folded: list[Tensor | None] = []
    for x, dim, head in zip(tensors, in_dims, heads, strict=True):
        if x is not None:
            x = x.expand(batch_size, *x.shape) if dim is None else x.movedim(dim, 0)
            x = x.movedim(0, head - 1).flatten(head - 1, head)
        folded.append(x)
    return folded


def apart_from_heads(
    tensors: tuple[Tensor | None, ...], batch_size: int, heads: tuple[int, ...]
) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """`beside_heads` backwards: the tensors, and where each holds the mapped dimension."""
    pairs = zip(tensors, heads, strict=True)
    results = tuple(None if x is None else x.unflatten(head, (batch_size, -1)) for x, head in pairs)
    return results, tuple(None if x is None else x.dim() + head - 1 for x, head in zip(results, heads, strict=True))


def one_by_one(
    function: type[torch.autograd.Function], batch_size: int, in_dims: tuple[Any, ...], arguments: tuple[Any, ...]
) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """A call for each element of the mapped dimension, and where the results hold that dimension."""
    _require_elements(batch_size)
    mapped = [isinstance(x, Tensor) and dim is not None for x, dim in zip(arguments, in_dims, strict=True)]
    parts = [
        [x.select(dim, i) if split else x for x, dim, split in zip(arguments, in_dims, mapped, strict=True)]
        for i in range(batch_size)
    ]
    columns = zip(*[function.apply(*part) for part in parts], strict=True)
    results = tuple(None if column[0] is None else torch.stack(column) for column in columns)
    return results, tuple(None if x is None else 0 for x in results)


def _require_elements(batch_size: int) -> None:
    if batch_size == 0:
        raise UnsupportedProblem("vmap over a dimension of size 0: there is no element whose results have a shape")


def _refuse_functionalize() -> None:
    if any(interpreter.key() == TransformType.Functionalize for interpreter in get_interpreter_stack() or ()):
        raise UnsupportedProblem(
            "torch.func.functionalize of attention: torch.compile and torch.export do that themselves"
        )


def _check_randomness(operands: tuple[Tensor | None, ...]) -> None:
    """Dropout draws a mask for each element that is mapped, so this must be what vmap was asked for."""
    mapped = {level for x in operands if x is not None for level in _mapped_levels(x)}
    for interpreter in get_interpreter_stack() or ():
        if interpreter.key() != TransformType.Vmap:
            continue
        randomness = CVmapInterpreterPtr(interpreter).randomness()
        if randomness == RandomnessType.Error:
            raise UnsupportedProblem(
                "dropout under vmap with randomness='error': randomness='different' draws a mask for each element"
            )
        if (randomness == RandomnessType.Different) != (interpreter.level() in mapped):
            one, operand = ("same", "a mapped") if randomness == RandomnessType.Same else ("different", "no mapped")
            raise UnsupportedProblem(
                f"dropout under vmap with randomness={one!r} and {operand} operand: every mapped element draws a mask of "
                "its own, and what is not mapped is computed once"
            )


def _mapped_levels(x: Tensor) -> list[int]:
    """The levels of vmap that map x."""
    levels = []
    while is_functorch_wrapped_tensor(x):
        if is_batchedtensor(x):
            levels.append(maybe_get_level(x))
        x = get_unwrapped(x)
    return levels
