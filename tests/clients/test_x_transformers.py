"""x-transformers: packed sequences."""

import pytest
import torch

from tests.clients.loading import load, parts_of
from tests.support import tolerance
from tests.support.cases import BF16, Case
from tests.support.inputs import make_inputs

LENGTHS = (5, 1, 15)


@pytest.mark.gpu
@pytest.mark.parametrize("causal", [False, True])
def test_packed_sequences_of_x_transformers(causal, seed):
    """It asks for a GPU itself."""
    with parts_of("x_transformers", ("x_transformers",)):
        attend = load("x_transformers.attend").Attend(causal=causal, flash=True, flash_pack_seq=True, heads=4)
    case = Case("packed", BF16, 64, 4, 4, LENGTHS, LENGTHS, "varlen", causal=causal)
    inputs = make_inputs(case, "cuda", seed)
    q, k, v = (x.detach().transpose(0, 1)[None].requires_grad_() for x in (inputs.q, inputs.k, inputs.v))
    names = "cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k"
    out, _ = attend(q, k, v, flash_pack_seq_kwargs={name: getattr(inputs, name) for name in names})
    gradients = torch.autograd.grad(out, (q, k, v), inputs.dout.transpose(0, 1)[None])
    out, dq, dk, dv = (x[0].detach().transpose(0, 1) for x in (out, *gradients))
    expected = tolerance.expected(case, inputs)
    expected.check(out=out, lse=expected.reference.lse.float(), dq=dq, dk=dk, dv=dv)
