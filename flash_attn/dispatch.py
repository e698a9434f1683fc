"""From a call to a backend: the checks, the plan that remembers them, and the tensors' way through.

`forward`, `backward` and `attend_cache` are what the registered operators of `torch_ops` do, without the dispatcher: eager
calls come here directly and save its cost.
"""

import contextlib
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor

from flash_attn import hardware, launch
from flash_attn.backends import choose_backend, choose_backward_backend, requested_backend
from flash_attn.backends.base import Append, Backend, Gradients, Operands
from flash_attn.problem import AttentionProblem, check_gradients, check_rng_state, describe
from flash_attn.problem_kvcache import CacheTensors, check_room, describe_cache, rotary_advances

# the requested backend and the pinned launch configurations that were in force; autograd's threads do not see the caller's
Scope = tuple[str | None, tuple[tuple[str, Any], ...]]
Choose = Callable[[AttentionProblem, hardware.Hardware, str | None], Backend]


class Plan:
    """Everything about a call that its tensors' contents and addresses do not change: checks passed, backend chosen."""

    __slots__ = ("backend", "backward_plans", "memo", "problem", "scope", "seqlen_k", "seqlen_q")

    def __init__(
        self,
        problem: AttentionProblem,
        seqlen_q: int,
        seqlen_k: int,
        device: torch.device,
        scope: Scope,
        choose: Choose,
    ) -> None:
        self.problem = problem
        self.seqlen_q = seqlen_q
        self.seqlen_k = seqlen_k
        self.scope = scope
        self.backend = choose(problem, hardware.of(device), scope[0])
        self.memo: dict[str, Any] = {}
        self.backward_plans: dict[Any, Plan] = {}  # of a forward plan, by what only its backward knows


UNSCOPED = contextlib.nullcontext()
_plans: dict[Any, Plan] = {}
MAX_PLANS = 4096


def _plan(
    tensors: tuple[Tensor | None, ...],
    numbers: tuple[Any, ...],
    describe_call: Callable[[], tuple[Any, int, int]],
    scope: Scope,
    choose: Choose,
) -> Plan:
    """The plan of a call; calls equal in shapes, strides, dtypes, devices and options share one."""
    key = (*map(_traits, tensors), numbers, scope)
    plan = _plans.get(key)
    if plan is None:
        if len(_plans) >= MAX_PLANS:
            _plans.clear()
        device = cast(Tensor, tensors[0]).device
        plan = _plans[key] = Plan(*describe_call(), device, scope, choose)
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
    sinks: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, Plan]:
    """(out, softmax_lse, S_dmask, rng_state, plan); S_dmask and rng_state are None without dropout."""
    q, k, v = contiguous_last(q), contiguous_last(k), contiguous_last(v)
    numbers = (dropout_p, softmax_scale, causal, window_size_left, window_size_right, softcap)
    optional = (alibi_slopes, cu_seqlens_q, cu_seqlens_k, seqused_k, leftpad_k, block_table)
    if sinks is not None:
        sinks = sinks.contiguous()
    plan = _plan(
        (q, k, v, *optional, sinks),
        (*numbers, max_seqlen_q, max_seqlen_k),
        lambda: describe(
            q, k, v, *numbers, *optional, sinks=sinks, max_seqlen_q=max_seqlen_q, max_seqlen_k=max_seqlen_k
        ),
        (requested_backend(), launch.pins()),
        choose_backend,
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
        sinks=sinks,
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
    dlse: Tensor | None = None,
    forward_plan: Plan | None = None,
) -> Tensor:
    """Writes dq, dk, dv; returns delta = rowsum(dout * out) - dlse, fp32, shaped like softmax_lse.

    `forward_plan` is the plan of the forward whose tensors autograd saved: it stands for their shapes, dtypes and options.
    """
    dout, q, k, v, out = map(contiguous_last, (dout, q, k, v, out))
    softmax_lse = softmax_lse.contiguous()
    if dlse is not None:
        dlse = dlse.contiguous()
    optional = (alibi_slopes, cu_seqlens_q, cu_seqlens_k, None, None, block_table)

    numbers = (dropout_p, softmax_scale, causal, window_size_left, window_size_right, softcap)

    def describe_call() -> tuple[AttentionProblem, int, int]:
        lengths = dict(max_seqlen_q=max_seqlen_q, max_seqlen_k=max_seqlen_k)
        words = dict(lengths, deterministic=deterministic, direction="backward")
        problem, seqlen_q, seqlen_k = describe(q, k, v, *numbers, *optional, **words)  # type: ignore[arg-type]
        check_gradients(q, k, v, dout, out, softmax_lse, dq, dk, dv, dlse)
        if dropout_p > 0.0:
            check_rng_state(rng_state, q.device)
        return problem._replace(lse_gradient=dlse is not None), seqlen_q, seqlen_k

    def make_plan(scope: Scope) -> Plan:
        tensors = (q, k, v, dout, out, softmax_lse, dq, dk, dv, rng_state, *optional, dlse)
        words = (*numbers, max_seqlen_q, max_seqlen_k, deterministic)
        return _plan(tensors, words, describe_call, scope, choose_backward_backend)

    if forward_plan is None:
        plan = make_plan((requested_backend(), launch.pins()))
    else:
        key = (deterministic, dlse is None, *_layouts(q, k, v, dout, out, dq, dk, dv))
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
        dlse=dlse,
    )
    _, pins = plan.scope
    with launch.pinned(**dict(pins)) if pins else UNSCOPED:
        return plan.backend.backward(plan.problem, operands, dout, out, softmax_lse, Gradients(dq, dk, dv))


def attend_cache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    tensors: CacheTensors,
    softmax_scale: float,
    causal: bool,
    window_size_left: int,
    window_size_right: int,
    softcap: float,
    rotary_interleaved: bool,
    num_splits: int,
    int_seqlens: int | None = None,
) -> tuple[Tensor, Tensor]:
    """(out, softmax_lse) of queries over a cache, into which the new tokens were written first.

    `int_seqlens` stands for a `cache_seqlens` of equal numbers, which the host knows.
    """
    window = (causal, window_size_left, window_size_right)
    numbers = (softmax_scale, *window, softcap, num_splits)
    plan = _plan(
        (q, k_cache, v_cache, *tensors),
        (*numbers, rotary_interleaved, int_seqlens is None),
        lambda: describe_cache(
            contiguous_last(q), k_cache, v_cache, _contiguous(tensors), *numbers, given_seqlens=int_seqlens is not None
        ),
        (requested_backend(), launch.pins()),
        choose_backend,
    )
    if "contiguous" not in plan.memo:
        same = zip(_contiguous(tensors), tensors, strict=True)
        plan.memo["contiguous"] = contiguous_last(q) is q and all(a is b for a, b in same)
    if not plan.memo["contiguous"]:
        q, tensors = contiguous_last(q), _contiguous(tensors)
    k, v, cos, sin, seqlens, batch_idx, leftpad, block_table, alibi_slopes, sinks = tensors
    seqlen_new = 0 if k is None else k.shape[1]
    if int_seqlens is not None:
        check_room(int_seqlens, seqlen_new, plan.seqlen_k)
        seqlens = torch.full((q.shape[0],), int_seqlens, dtype=torch.int32, device=q.device)
    elif seqlens is not None and k is not None and seqlens.device.type == "cpu":
        check_room(seqlens, seqlen_new, plan.seqlen_k)
    append = None
    if k is not None and v is not None:
        append = Append(k, v, cos, sin, rotary_interleaved, rotary_advances(*window, plan.seqlen_k))
    operands = Operands(
        q,
        k_cache,
        v_cache,
        softmax_scale,
        plan.seqlen_q,
        plan.seqlen_k,
        plan.problem.window,
        softcap,
        alibi_slopes=alibi_slopes,
        seqused_k=seqlens,
        leftpad_k=leftpad,
        block_table=block_table if batch_idx is None else batch_idx[:, None],
        appended=seqlen_new,
        memo=plan.memo,
        sinks=sinks,
    )
    out, softmax_lse, _ = plan.backend.attend_cache(plan.problem, operands, append, num_splits)
    return out, softmax_lse


def _contiguous(tensors: CacheTensors) -> CacheTensors:
    """The tensors, copied where their last dimension is not contiguous."""
    return CacheTensors(*[x if x is None or x.dim() == 0 else contiguous_last(x) for x in tensors])


def _layouts(*tensors: Tensor) -> tuple[Any, ...]:
    """Strides and alignment: what saved-tensor hooks, dout and the gradients can change between two backward passes."""
    addresses = 0
    for x in tensors:
        addresses |= x.data_ptr()
    return (addresses % 16, *[x.stride() for x in tensors])


def contiguous_last(x: Tensor) -> Tensor:
    """x, copied only if its last dimension is not contiguous."""
    return x if x.stride(-1) == 1 else x.contiguous()


def empty_gradient(like: Tensor) -> Tensor:
    """Memory for the gradient of an operand, with a contiguous last dimension."""
    if like.stride(-1) == 1:
        return torch.empty_like(like)
    return torch.empty_like(like, memory_format=torch.contiguous_format)
