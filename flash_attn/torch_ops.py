"""The custom operators `flash_attn::_flash_attn_*`: below the autograd functions, above the backends, on any device.

Names, argument order and results are upstream's, which downstream code imports and introspects. `forward` and `backward`
are the same work without the dispatcher: eager calls take them and save its cost.
"""

import contextlib
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor

from flash_attn import hardware, launch
from flash_attn.backends import choose_backend, requested_backend
from flash_attn.backends.base import Gradients, Operands
from flash_attn.problem import AttentionProblem, check_gradients, check_rng_state, describe

ROUNDING = 128  # upstream rounds the sequence sizes of S_dmask and softmax_d up to this


def round_multiple(x: int, m: int) -> int:
    """x rounded up to a multiple of m."""
    return (x + m - 1) // m * m


def maybe_contiguous(x: Tensor | None) -> Tensor | None:
    """x, copied only if its last dimension is not contiguous."""
    return None if x is None else contiguous_last(x)


def contiguous_last(x: Tensor) -> Tensor:
    """x, copied only if its last dimension is not contiguous."""
    return x if x.stride(-1) == 1 else x.contiguous()


# the requested backend and the pinned launch configurations that were in force; autograd's threads do not see the caller's
Scope = tuple[str | None, tuple[tuple[str, Any], ...]]


class Plan:
    """Everything about a call that its tensors' contents and addresses do not change: checks passed, backend chosen."""

    __slots__ = ("backend", "backward_plans", "memo", "problem", "scope", "seqlen_k", "seqlen_q")

    def __init__(
        self, problem: AttentionProblem, seqlen_q: int, seqlen_k: int, device: torch.device, scope: Scope
    ) -> None:
        self.problem = problem
        self.seqlen_q = seqlen_q
        self.seqlen_k = seqlen_k
        self.scope = scope
        self.backend = choose_backend(problem, hardware.of(device), scope[0])
        self.memo: dict[str, Any] = {}
        self.backward_plans: dict[Any, Plan] = {}  # of a forward plan, by what only its backward knows


_plans: dict[Any, Plan] = {}
MAX_PLANS = 4096


def _plan(
    tensors: tuple[Tensor | None, ...],
    numbers: tuple[Any, ...],
    describe_call: Callable[[], tuple[Any, int, int]],
    scope: Scope,
) -> Plan:
    """The plan of a call; calls equal in shapes, strides, dtypes, devices and options share one."""
    key = (*map(_traits, tensors), numbers, scope)
    plan = _plans.get(key)
    if plan is None:
        if len(_plans) >= MAX_PLANS:
            _plans.clear()
        device = cast(Tensor, tensors[0]).device
        plan = _plans[key] = Plan(*describe_call(), device, scope)
    return plan


def _traits(x: Tensor | None) -> Any:
    """What a plan may depend on in a tensor; tensor descriptors need 16-byte alignment."""
    if x is None:
        return None
    return x.shape, x.stride(), x.dtype, x.device, x.data_ptr() % 16 == 0


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float,
    softmax_scale: float,
    causal: bool,
    window_size_left: int,
    window_size_right: int,
    softcap: float,
    alibi_slopes: Tensor | None,
    return_softmax: bool,
    *,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    block_table: Tensor | None = None,
    leftpad_k: Tensor | None = None,
    seqused_k: Tensor | None = None,
    zero_tensors: bool = False,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, Plan]:
    """(out, softmax_lse, S_dmask, rng_state, plan); S_dmask and rng_state are None without dropout."""
    q, k, v = contiguous_last(q), contiguous_last(k), contiguous_last(v)
    numbers = (dropout_p, softmax_scale, causal, window_size_left, window_size_right, softcap)
    optional = (alibi_slopes, cu_seqlens_q, cu_seqlens_k, seqused_k, leftpad_k, block_table)
    plan = _plan(
        (q, k, v, *optional),
        (*numbers, max_seqlen_q, max_seqlen_k),
        lambda: describe(q, k, v, *numbers, *optional, max_seqlen_q=max_seqlen_q, max_seqlen_k=max_seqlen_k),
        (requested_backend(), launch.pins()),
    )
    rng_state = None
    if dropout_p > 0.0:
        # drawn on the device by the default generator: no synchronisation, captured and advanced by CUDA graphs
        rng_state = torch.empty(2, dtype=torch.int64, device=q.device).random_(generator=generator)
    operands = Operands(
        q,
        k,
        v,
        softmax_scale,
        plan.seqlen_q,
        plan.seqlen_k,
        plan.problem.window,
        softcap,
        dropout_p,
        *optional,
        rng_state,
        zero_tensors,
        plan.memo,
    )
    out, softmax_lse, scores = plan.backend.forward(plan.problem, operands, return_softmax and dropout_p > 0.0)
    return out, softmax_lse, scores, rng_state, plan


def backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    softmax_lse: Tensor,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    dropout_p: float,
    softmax_scale: float,
    causal: bool,
    window_size_left: int,
    window_size_right: int,
    softcap: float,
    alibi_slopes: Tensor | None,
    deterministic: bool,
    rng_state: Tensor | None,
    *,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    block_table: Tensor | None = None,
    forward_plan: Plan | None = None,
) -> Tensor:
    """Writes dq, dk, dv; returns delta = rowsum(dout * out), fp32, shaped like softmax_lse.

    `forward_plan` is the plan of the forward whose tensors autograd saved: it stands for their shapes, dtypes and options.
    """
    dout, q, k, v, out = map(contiguous_last, (dout, q, k, v, out))
    softmax_lse = softmax_lse.contiguous()
    optional = (alibi_slopes, cu_seqlens_q, cu_seqlens_k, None, None, block_table)

    def make_plan(scope: Scope) -> Plan:
        numbers = (dropout_p, softmax_scale, causal, window_size_left, window_size_right, softcap)

        def describe_call() -> tuple[AttentionProblem, int, int]:
            description = describe(
                q,
                k,
                v,
                *numbers,
                *optional,
                max_seqlen_q=max_seqlen_q,
                max_seqlen_k=max_seqlen_k,
                deterministic=deterministic,
            )
            check_gradients(q, k, v, dout, out, softmax_lse, dq, dk, dv)
            if dropout_p > 0.0:
                check_rng_state(rng_state, q.device)
            return description

        return _plan(
            (q, k, v, dout, out, softmax_lse, dq, dk, dv, rng_state, *optional),
            (*numbers, max_seqlen_q, max_seqlen_k, deterministic),
            describe_call,
            scope,
        )

    if forward_plan is None:
        plan = make_plan((requested_backend(), launch.pins()))
    else:
        key = (deterministic, *_layouts(q, k, v, dout, out, dq, dk, dv))
        known = forward_plan.backward_plans.get(key)
        plan = forward_plan.backward_plans[key] = make_plan(forward_plan.scope) if known is None else known
    operands = Operands(
        q,
        k,
        v,
        softmax_scale,
        plan.seqlen_q,
        plan.seqlen_k,
        plan.problem.window,
        softcap,
        dropout_p,
        *optional,
        rng_state if dropout_p > 0.0 else None,
        memo=plan.memo,
    )
    pins = plan.scope[1]
    with launch.pinned(**dict(pins)) if pins else contextlib.nullcontext():
        return plan.backend.backward(plan.problem, operands, dout, out, softmax_lse, Gradients(dq, dk, dv))


def _layouts(*tensors: Tensor) -> tuple[Any, ...]:
    """Strides and alignment: what saved-tensor hooks, dout and the gradients can change between two backward passes."""
    addresses = 0
    for x in tensors:
        addresses |= x.data_ptr()
    return (addresses % 16, *[x.stride() for x in tensors])


@torch.library.custom_op("flash_attn::_flash_attn_forward", mutates_args=())
def _flash_attn_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float,
    softmax_scale: float,
    causal: bool,
    window_size_left: int,
    window_size_right: int,
    softcap: float,
    alibi_slopes: Tensor | None,
    return_softmax: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    results = forward(
        q,
        k,
        v,
        dropout_p,
        softmax_scale,
        causal,
        window_size_left,
        window_size_right,
        softcap,
        alibi_slopes,
        return_softmax,
    )
    return four_tensors(*results[:4])


@_flash_attn_forward.register_fake
def _flash_attn_forward_fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float,
    softmax_scale: float,
    causal: bool,
    window_size_left: int,
    window_size_right: int,
    softcap: float,
    alibi_slopes: Tensor | None,
    return_softmax: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    batch_size, seqlen_q, nheads, _ = q.shape
    scores = (batch_size, nheads, round_multiple(seqlen_q, ROUNDING), round_multiple(k.shape[1], ROUNDING))
    return (
        torch.empty_like(q),
        q.new_empty((batch_size, nheads, seqlen_q), dtype=_lse_dtype(q)),
        q.new_empty(scores if return_softmax and dropout_p > 0.0 else (0,)),
        q.new_empty((2,), dtype=torch.int64),
    )


@torch.library.custom_op("flash_attn::_flash_attn_varlen_forward", mutates_args=())
def _flash_attn_varlen_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float,
    softmax_scale: float,
    causal: bool,
    window_size_left: int = -1,
    window_size_right: int = -1,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    return_softmax: bool = False,
    block_table: Tensor | None = None,
    leftpad_k: Tensor | None = None,
    seqused_k: Tensor | None = None,
    zero_tensors: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    results = forward(
        q,
        k,
        v,
        dropout_p,
        softmax_scale,
        causal,
        window_size_left,
        window_size_right,
        softcap,
        alibi_slopes,
        return_softmax,
        cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_k=cu_seqlens_k,
        max_seqlen_q=max_seqlen_q,
        max_seqlen_k=max_seqlen_k,
        block_table=block_table,
        leftpad_k=leftpad_k,
        seqused_k=seqused_k,
        zero_tensors=zero_tensors,
    )
    return four_tensors(*results[:4])


@_flash_attn_varlen_forward.register_fake
def _flash_attn_varlen_forward_fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float,
    softmax_scale: float,
    causal: bool,
    window_size_left: int = -1,
    window_size_right: int = -1,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    return_softmax: bool = False,
    block_table: Tensor | None = None,
    leftpad_k: Tensor | None = None,
    seqused_k: Tensor | None = None,
    zero_tensors: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    batch_size = cu_seqlens_q.shape[0] - 1
    total_q, nheads, _ = q.shape
    scores = (batch_size, nheads, round_multiple(max_seqlen_q, ROUNDING), round_multiple(max_seqlen_k, ROUNDING))
    return (
        torch.empty_like(q),
        q.new_empty((nheads, total_q), dtype=_lse_dtype(q)),
        q.new_empty(scores if return_softmax and dropout_p > 0.0 else (0,)),
        q.new_empty((2,), dtype=torch.int64),
    )


@torch.library.custom_op("flash_attn::_flash_attn_backward", mutates_args=("dq", "dk", "dv"))
def _flash_attn_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    softmax_lse: Tensor,
    dq: Tensor | None,
    dk: Tensor | None,
    dv: Tensor | None,
    dropout_p: float,
    softmax_scale: float,
    causal: bool,
    window_size_left: int,
    window_size_right: int,
    softcap: float,
    alibi_slopes: Tensor | None,
    deterministic: bool,
    rng_state: Tensor | None = None,
) -> Tensor:
    delta = backward(
        dout,
        q,
        k,
        v,
        out,
        softmax_lse,
        _or_empty(dq, q),
        _or_empty(dk, k),
        _or_empty(dv, v),
        dropout_p,
        softmax_scale,
        causal,
        window_size_left,
        window_size_right,
        softcap,
        alibi_slopes,
        deterministic,
        rng_state,
    )
    return torch.nn.functional.pad(delta, (0, round_multiple(q.shape[1], ROUNDING) - q.shape[1]))


@_flash_attn_backward.register_fake
def _flash_attn_backward_fake(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    softmax_lse: Tensor,
    dq: Tensor | None,
    dk: Tensor | None,
    dv: Tensor | None,
    dropout_p: float,
    softmax_scale: float,
    causal: bool,
    window_size_left: int,
    window_size_right: int,
    softcap: float,
    alibi_slopes: Tensor | None,
    deterministic: bool,
    rng_state: Tensor | None = None,
) -> Tensor:
    batch_size, seqlen_q, nheads, _ = q.shape
    return q.new_empty((batch_size, nheads, round_multiple(seqlen_q, ROUNDING)), dtype=_lse_dtype(q))


@torch.library.custom_op("flash_attn::_flash_attn_varlen_backward", mutates_args=("dq", "dk", "dv"))
def _flash_attn_varlen_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    softmax_lse: Tensor,
    dq: Tensor | None,
    dk: Tensor | None,
    dv: Tensor | None,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float,
    softmax_scale: float,
    causal: bool,
    window_size_left: int,
    window_size_right: int,
    softcap: float,
    alibi_slopes: Tensor | None,
    deterministic: bool,
    rng_state: Tensor | None = None,
    zero_tensors: bool = False,
) -> Tensor:
    dq, dk, dv = _or_empty(dq, q), _or_empty(dk, k), _or_empty(dv, v)
    if zero_tensors:
        for gradient in (dq, dk, dv):
            gradient.zero_()
    delta = backward(
        dout,
        q,
        k,
        v,
        out,
        softmax_lse,
        dq,
        dk,
        dv,
        dropout_p,
        softmax_scale,
        causal,
        window_size_left,
        window_size_right,
        softcap,
        alibi_slopes,
        deterministic,
        rng_state,
        cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_k=cu_seqlens_k,
        max_seqlen_q=max_seqlen_q,
        max_seqlen_k=max_seqlen_k,
    )
    return torch.nn.functional.pad(delta, (0, ROUNDING * (cu_seqlens_q.shape[0] - 1)))


@_flash_attn_varlen_backward.register_fake
def _flash_attn_varlen_backward_fake(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    softmax_lse: Tensor,
    dq: Tensor | None,
    dk: Tensor | None,
    dv: Tensor | None,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float,
    softmax_scale: float,
    causal: bool,
    window_size_left: int,
    window_size_right: int,
    softcap: float,
    alibi_slopes: Tensor | None,
    deterministic: bool,
    rng_state: Tensor | None = None,
    zero_tensors: bool = False,
) -> Tensor:
    batch_size = cu_seqlens_q.shape[0] - 1
    total_q, nheads, _ = q.shape
    return q.new_empty((nheads, total_q + ROUNDING * batch_size), dtype=_lse_dtype(q))


def four_tensors(
    out: Tensor, softmax_lse: Tensor, scores: Tensor | None, rng_state: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """An operator returns tensors only: absent scores are empty, an absent rng_state is zero."""
    return (
        out,
        softmax_lse,
        out.new_empty((0,)) if scores is None else scores,
        out.new_zeros((2,), dtype=torch.int64) if rng_state is None else rng_state,
    )


def _lse_dtype(q: Tensor) -> torch.dtype:
    """softmax_lse and delta are fp32, and fp64 for fp64 inputs."""
    return torch.float64 if q.dtype == torch.float64 else torch.float32


def empty_gradient(like: Tensor) -> Tensor:
    """Memory for the gradient of an operand, with a contiguous last dimension."""
    if like.stride(-1) == 1:
        return torch.empty_like(like)
    return torch.empty_like(like, memory_format=torch.contiguous_format)


def _or_empty(gradient: Tensor | None, like: Tensor) -> Tensor:
    return empty_gradient(like) if gradient is None else gradient


_ops: Any = torch.ops.flash_attn
_wrapped_flash_attn_forward = _ops._flash_attn_forward
_wrapped_flash_attn_backward = _ops._flash_attn_backward
_wrapped_flash_attn_varlen_forward = _ops._flash_attn_varlen_forward
_wrapped_flash_attn_varlen_backward = _ops._flash_attn_varlen_backward
