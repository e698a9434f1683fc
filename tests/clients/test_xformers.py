"""xformers' flash operators on this package, called by their own classes: every argument by position."""

import pytest
import torch

import flash_attn
from tests.support import tolerance
from tests.support.cases import BF16, FP16, Case
from tests.support.inputs import make_inputs

pytest.importorskip("xformers", reason="needs xformers")
from xformers.ops.fmha import attn_bias, flash
from xformers.ops.fmha.common import Inputs

PLACES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
LENGTHS = (17, 1, 40)


@pytest.fixture(autouse=True, scope="module")
def on_the_cpu_too():
    """Its operators are registered for CUDA alone; the functions behind them are not particular."""
    for operator in (flash._flash_fwd, flash._flash_bwd):
        operator.register_kernel("cpu")(operator._init_fn)


DENSE = {
    "full": (Case("full", BF16, 64, 4, 4, (33, 33), (65, 65)), lambda: None),
    "causal": (
        Case("causal", FP16, 40, 4, 4, (33, 33), (65, 65), causal=True),
        attn_bias.LowerTriangularFromBottomRightMask,
    ),
    "window": (
        Case("window", BF16, 64, 4, 4, (65, 65), (65, 65), window=(9, 4)),
        lambda: attn_bias.LocalAttentionFromBottomRightMask(window_left=9, window_right=4),
    ),
}


def test_it_accepts_the_version():
    assert flash_attn.__version__ == flash.FLASH_VERSION
    assert not flash._USE_PT_FLASH_ATTN


@pytest.mark.parametrize("device", PLACES)
@pytest.mark.parametrize("name", DENSE)
def test_dense(name, device, seed):
    case, bias = DENSE[name]
    inputs = make_inputs(case, device, seed)
    call = Inputs(inputs.q, inputs.k, inputs.v, attn_bias=bias())
    out, ctx = flash.FwOp.apply(call, needs_gradient=True)
    gradients = flash.BwOp.apply(ctx, call, inputs.dout)
    tolerance.expected(case, inputs).check(out=out, lse=ctx.lse, dq=gradients.dq, dk=gradients.dk, dv=gradients.dv)


@pytest.mark.parametrize("device", PLACES)
@pytest.mark.parametrize("causal", [False, True])
def test_block_diagonal(causal, device, seed):
    case = Case("blocks", BF16, 64, 4, 4, LENGTHS, LENGTHS, "varlen", causal=causal)
    inputs = make_inputs(case, device, seed)
    bias = attn_bias.BlockDiagonalMask.from_seqlens(LENGTHS, device=torch.device(device))
    q, k, v, dout = (x[None] for x in (inputs.q, inputs.k, inputs.v, inputs.dout))
    call = Inputs(q, k, v, attn_bias=bias.make_causal_from_bottomright() if causal else bias)
    out, ctx = flash.FwOp.apply(call, needs_gradient=True)
    gradients = flash.BwOp.apply(ctx, call, dout)
    results = dict(out=out, lse=ctx.lse, dq=gradients.dq, dk=gradients.dk, dv=gradients.dv)
    tolerance.expected(case, inputs).check(**{name: x[0] for name, x in results.items()})


@pytest.mark.parametrize("device", PLACES)
@pytest.mark.parametrize("paged", [False, True])
def test_padded_keys_with_grouped_heads(paged, device, seed):
    """Decoding: one query a sequence over a cache that is not full, 5-dimensional as xformers has grouped heads."""
    used, page, pages = (16, 3, 30), 16, 2
    case = Case("padded", BF16, 64, 4, 2, (1, 1, 1), used, "varlen")
    inputs = make_inputs(case, device, seed)
    caches = []
    for x in (inputs.k, inputs.v):
        cache = torch.full((len(used), page * pages, *x.shape[1:]), 7.0, dtype=x.dtype, device=device)
        for row, part in zip(cache, x.split(used), strict=True):
            row[: part.shape[0]] = part
        caches.append(cache.flatten(0, 1)[None, :, :, None].expand(-1, -1, -1, 2, -1))
    q = inputs.q.view(1, 3, 2, 2, 64)
    bias = attn_bias.BlockDiagonalCausalWithOffsetPaddedKeysMask.from_seqlens(
        q_seqlen=[1] * 3, kv_padding=page * pages, kv_seqlen=used, device=torch.device(device)
    )
    if paged:
        table = torch.arange(3 * pages, dtype=torch.int32, device=device).view(3, pages)
        bias = bias.make_paged(
            block_tables=table, page_size=page, paged_type=attn_bias.PagedBlockDiagonalCausalWithOffsetPaddedKeysMask
        )
    out, ctx = flash.FwOp.apply(Inputs(q, *caches, attn_bias=bias), needs_gradient=True)
    tolerance.expected(case, inputs).check(out=out.reshape(3, 4, 64), lse=ctx.lse.reshape(4, 3))
