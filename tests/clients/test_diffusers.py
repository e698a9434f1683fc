"""diffusers' attention dispatcher on this package: its own checks, its keywords, its positional calls."""

import types
from importlib import metadata

import pytest
import torch

import flash_attn
from tests.support import tolerance
from tests.support.cases import BF16, FP16, Case
from tests.support.inputs import make_inputs

pytest.importorskip("diffusers", reason="needs diffusers")
from diffusers.models import attention_dispatch as diffusers

LENGTHS = (33, 33), (65, 65)
KEPT = (65, 41)  # keys of each row that its mask keeps
PLACES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
CASES = [
    Case("full", BF16, 40, 4, 4, *LENGTHS),
    Case("causal", FP16, 64, 4, 4, (65, 65), (65, 65), causal=True),
]


@pytest.fixture(autouse=True, scope="module")
def installed():
    if "flash_attn" not in metadata.packages_distributions():
        pytest.skip("flash-attn is not installed; `make setup` does it")


def leaves(inputs):
    return [x.detach().clone().requires_grad_() for x in (inputs.q, inputs.k, inputs.v)]


def check(expected, out, operands, dout, **extra):
    dq, dk, dv = torch.autograd.grad(out, operands, dout)
    expected.check(out=out.detach(), dq=dq, dk=dk, dv=dv, **extra)


def test_it_finds_the_package():
    assert diffusers._CAN_USE_FLASH_ATTN and not diffusers._CAN_USE_FLASH_ATTN_3
    assert diffusers.flash_attn_func is flash_attn.flash_attn_func


@pytest.mark.parametrize("device", PLACES)
@pytest.mark.parametrize("backend", ["flash", "flash_varlen"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_dispatch(case, backend, device, seed):
    inputs = make_inputs(case, device, seed)
    q, k, v = leaves(inputs)
    with diffusers.attention_backend(backend):
        out = diffusers.dispatch_attention_fn(q, k, v, is_causal=case.causal)
    check(tolerance.expected(case, inputs), out, (q, k, v), inputs.dout)


@pytest.mark.parametrize("device", PLACES)
def test_flash_varlen_leaves_out_masked_keys(device, seed):
    case = Case("masked", BF16, 40, 4, 4, LENGTHS[0], KEPT, "varlen")
    inputs = make_inputs(case, device, seed)
    q, dout = (x.unflatten(0, (2, -1)).detach() for x in (inputs.q, inputs.dout))
    k, v = (
        torch.nn.utils.rnn.pad_sequence(list(x.split(KEPT)), batch_first=True, padding_value=7.0)
        for x in (inputs.k, inputs.v)
    )
    mask = torch.arange(max(KEPT), device=device) < torch.tensor(KEPT, device=device)[:, None]
    for x in (q, k, v):
        x.requires_grad_()
    out = diffusers.dispatch_attention_fn(q, k, v, attn_mask=mask, backend="flash_varlen")
    dq, dk, dv = torch.autograd.grad(out, (q, k, v), dout)
    packed = dict(out=out.detach().flatten(0, 1), dq=dq.flatten(0, 1), dk=dk[mask], dv=dv[mask])
    tolerance.expected(case, inputs).check(**packed)


@pytest.mark.parametrize("device", PLACES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_operators_of_its_context_parallel_attention(case, device, seed):
    """Called by position; softmax_lse travels as (batch, seqlen, heads)."""
    inputs = make_inputs(case, device, seed)
    ctx = types.SimpleNamespace()
    ctx.save_for_backward = lambda *tensors: setattr(ctx, "saved_tensors", tensors)
    q, k, v = (x.contiguous() for x in (inputs.q, inputs.k, inputs.v))
    out, lse = diffusers._flash_attention_forward_op(ctx, q, k, v, is_causal=case.causal, return_lse=True)
    dq, dk, dv = diffusers._flash_attention_backward_op(ctx, inputs.dout)
    tolerance.expected(case, inputs).check(out=out, lse=lse.permute(0, 2, 1), dq=dq, dk=dk, dv=dv)
