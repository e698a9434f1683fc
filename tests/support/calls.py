"""Where tests run, and how they call attention: `running_on` a tier's device and backend, cases through every entry.

@pytest.fixture(params=places("cpu", "gpu"))
def device(request):
    with running_on(request.param) as device:
        yield device
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from flash_attn import backends, flash_attn_func, flash_attn_varlen_func, hardware, random_bits
from flash_attn.problem import AttentionProblem
from tests.support.cases import Case
from tests.support.inputs import Inputs

MARKS = {
    "cpu": (),
    "gpu": (pytest.mark.gpu,),
    "hopper": (pytest.mark.gpu,),
    "interpreter": (pytest.mark.interpreter,),
    "interpreted hopper": (),
}
BACKENDS = {
    "cpu": "cpu",
    "gpu": "portable",
    "hopper": "hopper",
    "interpreter": "portable",
    "interpreted hopper": "hopper",
}
INTERPRETED_PROGRAMS = 3  # of a launch: few, so that each takes several tiles in turn


def places(*names: str) -> list[Any]:
    """Parameters for an indirect `device` fixture, each with its tier's marker."""
    return [pytest.param(name, marks=MARKS[name]) for name in names]


def placed(cases: dict[str, list[Case]]) -> list[Any]:
    """(case, place) parameters from the cases of each place."""
    return [pytest.param(case, name, marks=MARKS[name], id=f"{name}-{case}") for name in cases for case in cases[name]]


@contextlib.contextmanager
def running_on(place: str, seed: int = 0) -> Iterator[torch.device]:
    """The device of a place, with the place's backend in use: "cpu", "gpu", "hopper", "interpreter", or "interpreted hopper",
    whose partitions take turns that the seed decides."""
    if place == "interpreter":
        skip_unless_interpreting()
    if place == "hopper":
        skip_unless_hopper()
    with backends.use(BACKENDS[place]), interpreted_hopper(place, seed):
        yield torch.device("cuda" if place in ("gpu", "hopper") else "cpu")


def interpreted_hopper(place: str, seed: int) -> Any:
    """What makes the Hopper backend run on the CPU, where the place wants that."""
    if place != "interpreted hopper":
        return contextlib.nullcontext()
    pytest.importorskip("triton.experimental.gluon")
    from tests.support.gluon_interpreter import interpreted

    return interpreted(INTERPRETED_PROGRAMS, seed)


def skip_unless_interpreting() -> None:
    triton = pytest.importorskip("triton")
    if not triton.knobs.runtime.interpret:
        pytest.skip("needs TRITON_INTERPRET=1")


def skip_unless_hopper() -> None:
    simplest = AttentionProblem("dense", "float16", 1, 1, 1, 1, 1, 64, aligned=True)
    refused = backends.load("hopper").unsupported(simplest, hardware.of(torch.device("cuda")))
    if refused:
        pytest.skip(f"the hopper backend: {refused}")


def words(case: Case, inputs: Inputs) -> dict[str, Any]:
    """The options of a case as the public functions take them."""
    return dict(
        dropout_p=case.dropout_p,
        causal=case.causal,
        window_size=case.window,
        softcap=case.softcap,
        alibi_slopes=inputs.alibi_slopes,
    )


def lengths(case: Case, inputs: Inputs) -> tuple[Any, ...]:
    """cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k of a packed batch, nothing of a dense one."""
    if case.layout == "dense":
        return ()
    return inputs.cu_seqlens_q, inputs.cu_seqlens_k, inputs.max_seqlen_q, inputs.max_seqlen_k


def numbers(case: Case, inputs: Inputs) -> tuple[Any, ...]:
    """dropout_p to alibi_slopes, in the order of the private operators."""
    return case.dropout_p, case.headdim**-0.5, case.causal, *case.window, case.softcap, inputs.alibi_slopes


def public(case: Case, inputs: Inputs, q: Tensor, k: Tensor, v: Tensor, **extra: Any) -> Any:
    """flash_attn_func or flash_attn_varlen_func of a case."""
    function = flash_attn_func if case.layout == "dense" else flash_attn_varlen_func
    if case.sink is not None:
        extra = dict(s_aux=inputs.sinks) | extra
    return function(q, k, v, *lengths(case, inputs), **words(case, inputs), **extra)


def private(case: Case, inputs: Inputs, return_softmax: bool = False) -> tuple[Tensor, ...]:
    """(out, softmax_lse, S_dmask, rng_state) of the operator."""
    ops = torch.ops.flash_attn
    function = ops._flash_attn_forward if case.layout == "dense" else ops._flash_attn_varlen_forward
    tensors = (inputs.q, inputs.k, inputs.v, *lengths(case, inputs))
    return function(*tensors, *numbers(case, inputs), return_softmax)


def forward(case: Case, inputs: Inputs, seed: int) -> tuple[dict[str, Tensor], Any]:
    """(out and lse by name, keep) through the public function, without gradients."""
    if case.dropout_p == 0.0:
        out, lse, _ = public(case, inputs, inputs.q, inputs.k, inputs.v, return_attn_probs=True)
        return dict(out=out, lse=lse), None
    torch.manual_seed(seed)
    out = public(case, inputs, inputs.q, inputs.k, inputs.v)
    lse, keep = lse_and_keep(case, inputs, out, seed)
    return dict(out=out, lse=lse), keep


def forward_and_backward(case: Case, inputs: Inputs, seed: int) -> tuple[dict[str, Tensor], Any]:
    """(out, lse, dq, dk, dv by name, keep) through the public function and autograd."""
    leaves = [x.detach().requires_grad_() for x in (inputs.q, inputs.k, inputs.v)]
    keep = None
    if case.dropout_p == 0.0:
        out, lse, _ = public(case, inputs, *leaves, return_attn_probs=True)
    else:
        torch.manual_seed(seed)
        out = public(case, inputs, *leaves)
        lse, keep = lse_and_keep(case, inputs, out, seed)
    dq, dk, dv = torch.autograd.grad(out, leaves, inputs.dout)
    return dict(out=out.detach(), lse=lse.detach(), dq=dq, dk=dk, dv=dv), keep


def lse_and_keep(case: Case, inputs: Inputs, out: Tensor, seed: int) -> tuple[Tensor, Any]:
    """The lse and dropout mask behind a public result, from the operator under the same seed; it takes no sinks."""
    torch.manual_seed(seed)
    if case.sink is None:
        again, lse, *_ = private(case, inputs)
    else:
        again, lse, _ = public(case, inputs, inputs.q, inputs.k, inputs.v, return_attn_probs=True)
    assert torch.equal(again, out), "two calls under one seed drop different weights"
    return lse, keep_under(case, inputs, seed)


def keep_under(case: Case, inputs: Inputs, seed: int) -> Tensor | list[Tensor] | None:
    """The dropout mask of the first call under a seed."""
    if case.dropout_p == 0.0:
        return None
    torch.manual_seed(seed)
    return keep_of(case, private(case, inputs)[3])


def keep_of(case: Case, rng_state: Tensor) -> Tensor | list[Tensor] | None:
    """The dropout mask of a case as `tolerance.expected` takes it."""
    if case.dropout_p == 0.0:
        return None
    masks = [
        random_bits.keep_mask(
            rng_state,
            case.dropout_p,
            torch.arange(batch * case.nheads, (batch + 1) * case.nheads, device=rng_state.device),
            torch.arange(seqlen_q, device=rng_state.device),
            torch.arange(seqlen_k, device=rng_state.device),
        )[None]
        for batch, (seqlen_q, seqlen_k) in enumerate(zip(case.seqlens_q, case.seqlens_k, strict=True))
    ]
    return masks if case.layout == "varlen" else torch.cat(masks)


def randn(*shape: int, dtype: torch.dtype, device: torch.device, seed: int) -> Tensor:
    """Standard normal numbers that do not depend on the device."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


def int32(values: list[Any], device: torch.device) -> Tensor:
    return torch.tensor(values, dtype=torch.int32, device=device)


def assert_equal(actual: Any, wanted: Any) -> None:
    """Bitwise, one tensor or several."""
    if isinstance(actual, Tensor):
        actual, wanted = [actual], [wanted]
    for number, (a, b) in enumerate(zip(actual, wanted, strict=True)):
        assert a.shape == b.shape and a.dtype == b.dtype
        assert torch.equal(a, b), f"result {number}: {int((a != b).sum())} of {a.numel()} differ"


def assert_near(actual: Any, wanted: Any, roundoffs: float = 4.0) -> None:
    """Within some roundoffs of the largest value: the same sums in another order. -inf must be in the same places."""
    if isinstance(actual, Tensor):
        actual, wanted = [actual], [wanted]
    for number, (a, b) in enumerate(zip(actual, wanted, strict=True)):
        assert a.shape == b.shape
        if a.numel() == 0:
            continue
        assert torch.equal(a.isfinite(), b.isfinite()), f"result {number}: not finite in different places"
        a, b = (x.double().nan_to_num(neginf=0.0) for x in (a, b))
        eps = torch.finfo(actual[number].dtype).eps
        budget = roundoffs * eps * b.abs().max().item() + 1e-30
        error = (a - b).abs().max().item()
        assert error <= budget, f"result {number}: differs by {error:.3e} > {budget:.3e}"
