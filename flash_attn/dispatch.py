"""From a call to a backend: the checks, the plan that remembers them, and the tensors' way through.

`forward`, `backward` and `attend_cache` are what the registered operators of `torch_ops` do, without the dispatcher: eager
calls come here directly and save its cost.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from flash_attn import hardware, launch
from flash_attn.backends import choose_backend, choose_backward_backend, requested_backend
from flash_attn.backends.base import Append, Backend, Gradients, Operands
from flash_attn.errors import UnsupportedProblem
from flash_attn.problem import AttentionProblem, check_gradients, check_rng_state, describe
from flash_attn.problem_kvcache import CacheTensors, check_room, describe_cache, rotary_advances

# the requested backend and the pinned launch configurations that were in force; autograd's threads do not see the caller's
Scope = tuple[str | None, tuple[tuple[str, Any], ...]]
# (q, k, v, out, softmax_lse, rng_state, alibi_slopes, cu_seqlens_q, cu_seqlens_k, block_table)
Saved = tuple[Any, ...]
Choose = Callable[[AttentionProblem, hardware.Hardware, str | None], Backend]


class Plan:
    """Everything about a call that its tensors' contents and addresses do not change: checks passed, backend chosen."""

    __slots__ = (
        "backend",
        "backward_plans",
        "contiguous",
        "memo",
        "numbers",
        "options",
        "problem",
        "scope",
        "seqlen_k",
    )

    def __init__(
        self,
        description: tuple[AttentionProblem, int, int],
        options: tuple[Any, ...],
        contiguous: bool,
        device: torch.device,
        scope: Scope,
        choose: Choose,
    ) -> None:
        self.problem, seqlen_q, self.seqlen_k = description
        self.options = options  # as its key names them
        self.contiguous = contiguous  # along the last dimension; otherwise the call copies its tensors
        self.scope = scope
        self.backend = choose(self.problem, hardware.of(device), scope[0])
        dropout_p, softmax_scale, _causal, _left, _right, softcap, *_lengths = options
        # what stands behind q, k and v in the operands
        self.numbers = (softmax_scale, seqlen_q, self.seqlen_k, self.problem.window, softcap, dropout_p)
        self.memo: dict[str, Any] = {}
        self.backward_plans: dict[Any, Plan] = {}  # of a forward plan, by what only its backward knows


_plans: dict[Any, Plan] = {}
MAX_PLANS = 4096


def _keep(key: Any, plan: Plan) -> Plan:
    if len(_plans) >= MAX_PLANS:
        _plans.clear()
    _plans[key] = plan
    return plan


def _traits(tensors: Sequence[Tensor | None]) -> list[Any]:
    """What a plan may depend on in each tensor; tensor descriptors need 16-byte alignment."""
    return [x if x is None else (x.shape, x.stride(), x.dtype, x.device, x.data_ptr() % 16) for x in tensors]


def current_scope() -> Scope:
    """What is in force where this is called."""
    return requested_backend(), launch.pins()


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
    optional = (alibi_slopes, cu_seqlens_q, cu_seqlens_k, seqused_k, leftpad_k, block_table)
    numbers = (dropout_p, softmax_scale, causal, window_size_left, window_size_right, softcap)
    options = (*numbers, max_seqlen_q, max_seqlen_k)
    scope = current_scope()
    key = (*_traits((q, k, v, *optional, sinks)), options, scope)
    plan = _plans.get(key)
    if plan is None:
        copies = contiguous_last(q), contiguous_last(k), contiguous_last(v)
        contiguous = _same(copies, (q, k, v))
        q_copy, k_copy, v_copy = copies
        words = dict(sinks=sinks, max_seqlen_q=max_seqlen_q, max_seqlen_k=max_seqlen_k)
        description = describe(q_copy, k_copy, v_copy, *numbers, *optional, **words)  # type: ignore[arg-type]
        plan = _keep(key, Plan(description, options, contiguous, q.device, scope, choose_backend))
    if not plan.contiguous:
        q, k, v = contiguous_last(q), contiguous_last(k), contiguous_last(v)
    if sinks is not None:
        sinks = sinks.contiguous()
    rng_state = None
    if dropout_p > 0.0:
        # drawn on the device by the default generator: no synchronisation, captured and advanced by CUDA graphs
        rng_state = torch.empty(2, dtype=torch.int64, device=q.device).random_(generator=generator)
    operands = Operands(q, k, v, *plan.numbers, *optional, rng_state, zero_tensors, plan.memo, sinks)
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
    scope: Scope | None = None,
) -> Tensor:
    """Writes dq, dk, dv; returns delta = rowsum(dout * out) - dlse, fp32, shaped like softmax_lse."""
    tensors = (q, k, v, out, softmax_lse, rng_state, alibi_slopes, cu_seqlens_q, cu_seqlens_k, block_table)
    numbers = (dropout_p, softmax_scale, causal, window_size_left, window_size_right, softcap)
    options = (*numbers, max_seqlen_q, max_seqlen_k)
    scope = scope or current_scope()
    key = (*_traits((*tensors, dout, dlse, dq, dk, dv)), options, deterministic, scope)
    plan = _plans.get(key)
    if plan is None:
        plan = _keep(key, _backward_plan(tensors, dout, dlse, Gradients(dq, dk, dv), options, deterministic, scope))
    return _run_backward(plan, tensors, dout, dlse, Gradients(dq, dk, dv))


def differentiate(
    forward_plan: Plan,
    saved: Saved,
    dout: Tensor,
    dlse: Tensor | None,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    deterministic: bool,
) -> Tensor:
    """`backward` of a forward whose plan is at hand: it stands for the shapes, dtypes and options of what autograd saved."""
    q, k, v, out, softmax_lse, *_ = saved
    # what saved-tensor hooks, dout and the gradients can change between two backward passes of one forward plan
    tensors = (q, k, v, out, softmax_lse, dout, dq, dk, dv)
    key = (deterministic, dlse is None, *[x.stride() for x in tensors], *[x.data_ptr() % 16 for x in tensors])
    plan = forward_plan.backward_plans.get(key)
    gradients = Gradients(dq, dk, dv)
    if plan is None:
        plan = _backward_plan(saved, dout, dlse, gradients, forward_plan.options, deterministic, forward_plan.scope)
        forward_plan.backward_plans[key] = plan
    return _run_backward(plan, saved, dout, dlse, gradients)


def _backward_plan(
    saved: Saved,
    dout: Tensor,
    dlse: Tensor | None,
    gradients: Gradients,
    options: tuple[Any, ...],
    deterministic: bool,
    scope: Scope,
) -> Plan:
    """Checks a backward and chooses who computes it."""
    copies, dout_copy = _copied_backward(saved, dout)
    q, k, v, out, softmax_lse, rng_state, slopes, cu_seqlens_q, cu_seqlens_k, block_table = copies
    dropout_p, softmax_scale, causal, left, right, softcap, max_seqlen_q, max_seqlen_k = options
    numbers = (dropout_p, softmax_scale, causal, left, right, softcap)
    optional = (slopes, cu_seqlens_q, cu_seqlens_k, None, None, block_table)
    words = dict(
        max_seqlen_q=max_seqlen_q, max_seqlen_k=max_seqlen_k, deterministic=deterministic, direction="backward"
    )
    problem, seqlen_q, seqlen_k = describe(q, k, v, *numbers, *optional, **words)
    check_gradients(q, k, v, dout_copy, out, softmax_lse, *gradients, dlse)
    if block_table is not None:
        raise UnsupportedProblem("block_table is forward only: a paged cache has no gradient")
    if dropout_p > 0.0:
        check_rng_state(rng_state, q.device)
    contiguous = dout_copy is dout and _same(copies, saved)
    description = problem._replace(lse_gradient=dlse is not None), seqlen_q, seqlen_k
    return Plan(description, options, contiguous, q.device, scope, choose_backward_backend)


def _run_backward(plan: Plan, saved: Saved, dout: Tensor, dlse: Tensor | None, gradients: Gradients) -> Tensor:
    if not plan.contiguous:
        saved, dout = _copied_backward(saved, dout)
    q, k, v, out, softmax_lse, rng_state, slopes, cu_seqlens_q, cu_seqlens_k, block_table = saved
    if not plan.problem.dropout:
        rng_state = None
    optional = (slopes, cu_seqlens_q, cu_seqlens_k, None, None, block_table, rng_state)
    dlse = None if dlse is None else dlse.contiguous()
    operands = Operands(q, k, v, *plan.numbers, *optional, False, plan.memo, dlse=dlse)
    pins = plan.scope[1]
    if not pins:
        return plan.backend.backward(plan.problem, operands, dout, out, softmax_lse, gradients)
    with launch.pinned(**dict(pins)):
        return plan.backend.backward(plan.problem, operands, dout, out, softmax_lse, gradients)


def _copied_backward(saved: Saved, dout: Tensor) -> tuple[Saved, Tensor]:
    """The tensors of a backward, copied where their last dimension is not contiguous."""
    q, k, v, out, softmax_lse, *rest = saved
    tensors = contiguous_last(q), contiguous_last(k), contiguous_last(v), contiguous_last(out), softmax_lse.contiguous()
    return (*tensors, *rest), contiguous_last(dout)


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
    options = (0.0, *numbers, rotary_interleaved, int_seqlens is None)
    scope = current_scope()
    key = (*_traits((q, k_cache, v_cache, *tensors)), options, scope)
    plan = _plans.get(key)
    if plan is None:
        q_copy, copies = contiguous_last(q), _contiguous(tensors)
        given = int_seqlens is not None
        description = describe_cache(q_copy, k_cache, v_cache, copies, *numbers, given_seqlens=given)
        contiguous = q_copy is q and _same(copies, tensors)
        plan = _keep(key, Plan(description, options, contiguous, q.device, scope, choose_backend))
    if not plan.contiguous:
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
        *plan.numbers,
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


def _same(copies: Sequence[Any], tensors: Sequence[Any]) -> bool:
    """Whether none of the tensors was copied."""
    return all(copy is x for copy, x in zip(copies, tensors, strict=True))


def contiguous_last(x: Tensor) -> Tensor:
    """x, copied only if its last dimension is not contiguous."""
    return x if x.stride(-1) == 1 else x.contiguous()


def empty_gradient(like: Tensor) -> Tensor:
    """Memory for the gradient of an operand, with a contiguous last dimension."""
    if like.stride(-1) == 1:
        return torch.empty_like(like)
    return torch.empty_like(like, memory_format=torch.contiguous_format)
