"""What every autograd class shares: one forward, one backward, and what passes between them.

While something listens to operators (torch.compile, a dispatch mode), calls go through the registered operator; otherwise
straight to its implementation, which saves the dispatcher's host time. Under a transform of torch.func they go through
`transforms`.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._C._functorch import (
    get_dynamic_layer_stack_depth,
    is_batchedtensor,
    is_functorch_wrapped_tensor,
    is_legacy_batchedtensor,
)
from torch.autograd import forward_ad

from flash_attn import dispatch, torch_ops
from flash_attn.backward import operators
from flash_attn.errors import UnsupportedProblem
from flash_attn.problem import parse_window
from flash_attn.sinks import sink_gradient

# (out, softmax_lse, S_dmask, rng_state, plan); the plan is known to direct calls only
Results = tuple[Tensor, Tensor, Tensor | None, Tensor | None, dispatch.Plan | None]

TANGENTS = (
    "forward-mode derivatives (torch.func.jvp, jacfwd, hessian, torch.autograd.forward_ad): the kernels compute gradients "
    "alone; use torch.func.vjp or jacrev, or plain PyTorch such as flash_attn.reference"
)

COMPILED_RANDOMNESS = (
    "dropout of attention inside a transform of torch.func inside torch.compile, where vmap's randomness is not known: leave "
    "that part to eager execution, which fullgraph=False does by itself"
)
NESTED = (
    "attention inside more than one transform of torch.func inside torch.compile: leave that part to eager execution, which "
    "fullgraph=False does by itself"
)


class Words(NamedTuple):
    """The options of a call as upstream's functions name them, without tensors."""

    dropout_p: float
    softmax_scale: float
    causal: bool
    window_size: tuple[int, int]
    softcap: float
    deterministic: bool
    max_seqlen_q: int | None = None
    max_seqlen_k: int | None = None


def once_differentiable(backward: Callable[..., Any]) -> Callable[..., Any]:
    """torch's decorator, whose host time is spent only where a graph of the gradients is asked for."""
    guarded = torch.autograd.function.once_differentiable(backward)

    @functools.wraps(backward)
    def choose(ctx: Any, *gradients: Any) -> Any:
        try:
            return (guarded if torch.is_grad_enabled() else backward)(ctx, *gradients)
        except RuntimeError as error:
            _refuse_batched(gradients, error)
            raise

    return choose


def _refuse_batched(gradients: tuple[Tensor | None, ...], error: RuntimeError) -> None:
    """Say what an error comes from where it comes from gradients without memory of their own."""
    if any(x is not None and (is_batchedtensor(x) or is_legacy_batchedtensor(x)) for x in gradients):
        raise UnsupportedProblem(
            "several gradients at once (is_grads_batched, vectorize=True, vmap) from a graph built without torch.func: take "
            "them one by one, or use torch.func.jacrev, or torch.func.vmap over the function that torch.func.vjp returns"
        ) from error


def make_words(
    headdim: int,
    dropout_p: float,
    softmax_scale: float | None,
    causal: bool,
    window_size: Sequence[int],
    softcap: float,
    deterministic: bool,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
) -> Words:
    """The options as plain numbers: callers also pass one-element tensors."""
    if dropout_p > 0.0 and torch.compiler.is_compiling() and transform_depth() > 0:
        raise NotImplementedError(COMPILED_RANDOMNESS)
    if softmax_scale is None:
        softmax_scale = headdim**-0.5 if headdim > 0 else 1.0
    return Words(
        float(dropout_p),
        float(softmax_scale),
        bool(causal),
        parse_window(window_size),
        float(softcap),
        deterministic,
        max_seqlen_q,
        max_seqlen_k,
    )


def transform_depth() -> int:
    """How many transforms of torch.func are at work."""
    return get_dynamic_layer_stack_depth()


# torch.compiler.assume_constant_result without importing the compiler: torch 2.11's does not know the function, and a
# transform is at the same depth while it is traced.
transform_depth._dynamo_marked_constant = True  # type: ignore[attr-defined]


def run(function: type[torch.autograd.Function], *arguments: Any) -> Any:
    """function.apply(...), or its forward alone where nothing needs a gradient, which saves autograd's host time.

    Under a transform of torch.func the forward's own steps are what is transformed.
    """
    compiling = torch.compiler.is_compiling()
    if compiling:
        if transform_depth() > 1:  # the compiler takes an outer derivative for zero
            raise NotImplementedError(NESTED)
        arguments = _distinct(arguments)
    if forward_ad._current_level >= 0:
        refuse_tangents(arguments)
    if not torch.is_grad_enabled():
        return function.forward(None, *arguments, False)
    tensors = [x for x in arguments if isinstance(x, Tensor)]
    if not any(x.requires_grad for x in tensors):
        return function.forward(None, *arguments, False)
    if torch._C._are_functorch_transforms_active() and not compiling:
        return function.forward(None, *arguments, False)
    if compiling or any(map(is_functorch_wrapped_tensor, tensors)):
        return function.apply(*arguments, True)
    # what Function.apply comes to where no argument is torch.func's; its own search costs several times this one
    return super(torch.autograd.Function, function).apply(*arguments, True)  # type: ignore[misc]


def refuse_tangents(arguments: tuple[Any, ...]) -> None:
    """Kernels would drop them without a word."""
    if any(isinstance(x, Tensor) and forward_ad.unpack_dual(x).tangent is not None for x in arguments):
        raise UnsupportedProblem(TANGENTS)


def _distinct(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    """The same arguments with each repeated tensor as an alias: the compiler takes a tensor into a Function only once."""
    seen: list[Tensor] = []
    result = []
    for argument in arguments:
        if isinstance(argument, Tensor):
            if any(argument is other for other in seen):
                argument = argument.view_as(argument)
            seen.append(argument)
        result.append(argument)
    return tuple(result)


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    words: Words,
    alibi_slopes: Tensor | None,
    return_softmax: bool,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    block_table: Tensor | None = None,
    sinks: Tensor | None = None,
) -> Results:
    """One forward."""
    if torch._C._are_functorch_transforms_active() and not torch.compiler.is_compiling():
        from flash_attn.backward import transforms

        batch = (cu_seqlens_q, cu_seqlens_k, block_table)
        return transforms.attend(q, k, v, words, alibi_slopes, return_softmax, *batch, sinks)
    left, right = words.window_size
    numbers = (
        words.dropout_p,
        words.softmax_scale,
        words.causal,
        left,
        right,
        words.softcap,
        alibi_slopes,
        return_softmax,
    )
    if not torch_ops.observed(q):
        return dispatch.forward(
            q,
            k,
            v,
            *numbers,
            cu_seqlens_q=cu_seqlens_q,
            cu_seqlens_k=cu_seqlens_k,
            max_seqlen_q=words.max_seqlen_q,
            max_seqlen_k=words.max_seqlen_k,
            block_table=block_table,
            sinks=sinks,
        )
    lengths = (cu_seqlens_q, cu_seqlens_k, words.max_seqlen_q, words.max_seqlen_k)
    if sinks is not None:
        return *operators._wrapped_attention_forward(q, k, v, sinks, *numbers, *lengths, block_table), None
    if cu_seqlens_q is None:
        return *torch_ops._wrapped_flash_attn_forward(q, k, v, *numbers), None
    return *torch_ops._wrapped_flash_attn_varlen_forward(q, k, v, *lengths, *numbers, block_table=block_table), None


def differentiate(
    words: Words,
    plan: dispatch.Plan | None,
    saved: tuple[Any, ...],
    dout: Tensor | None,
    dlse: Tensor | None,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    sinks: Tensor | None = None,
    scope: dispatch.Scope | None = None,
) -> Tensor | None:
    """Writes the gradients of the call whose `save` kept these tensors, and returns that of the sinks.

    An absent gradient of a result is 0. `scope` is the forward's, where its plan is not known.
    """
    q, k, v, out, softmax_lse, rng_state, alibi_slopes, cu_seqlens_q, cu_seqlens_k, block_table = saved
    if dout is None:
        dout = torch.zeros_like(out)
    observed = torch_ops.observed(q)
    if plan is not None and not observed:
        delta = dispatch.differentiate(plan, saved, dout, dlse, dq, dk, dv, words.deterministic)
        return None if sinks is None else sink_gradient(sinks, softmax_lse, delta, cu_seqlens_q)
    left, right = words.window_size
    tensors = (dout, q, k, v, out, softmax_lse, dq, dk, dv)
    numbers = (words.dropout_p, words.softmax_scale, words.causal, left, right, words.softcap, alibi_slopes)
    rest = (words.deterministic, rng_state)
    lengths = (cu_seqlens_q, cu_seqlens_k, words.max_seqlen_q, words.max_seqlen_k)
    if block_table is not None or not observed:  # the operators take no pages
        names = ("cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k")
        varlen = dict(zip(names, lengths, strict=True), block_table=block_table)
        delta = dispatch.backward(*tensors, *numbers, *rest, **varlen, dlse=dlse, scope=scope)
        return None if sinks is None else sink_gradient(sinks, softmax_lse, delta, cu_seqlens_q)
    if dlse is not None or sinks is not None:
        forward_tensors = (q, k, v, out, softmax_lse, sinks)
        dsinks = operators._wrapped_attention_backward(
            dout, dlse, *forward_tensors, dq, dk, dv, *numbers, *rest, *lengths
        )
        return None if sinks is None else dsinks
    if cu_seqlens_q is None:
        torch_ops._wrapped_flash_attn_backward(*tensors, *numbers, *rest)
    else:
        torch_ops._wrapped_flash_attn_varlen_backward(*tensors, *lengths, *numbers, *rest)
    return None


def save(
    ctx: Any,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    results: Results,
    words: Words,
    alibi_slopes: Tensor | None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    block_table: Tensor | None = None,
) -> None:
    out, softmax_lse, _, rng_state, plan = results
    ctx.save_for_backward(q, k, v, out, softmax_lse, rng_state, alibi_slopes, cu_seqlens_q, cu_seqlens_k, block_table)
    ctx.words = words
    ctx.plan = plan


def outputs(ctx: Any, results: Results, return_softmax: bool) -> Any:
    """out, or (out, softmax_lse, S_dmask) where the last one carries no gradient."""
    out, softmax_lse, scores, _, _ = results
    if not return_softmax:
        return out
    if scores is None:
        scores = out.new_empty((0,))
    if ctx is not None:
        ctx.mark_non_differentiable(scores)
        if not torch.compiler.is_compiling():  # which does not know the method, and fills in zeros
            ctx.set_materialize_grads(False)
    return out, softmax_lse, scores
