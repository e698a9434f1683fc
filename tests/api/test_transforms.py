"""What torch does with the public functions: compile and export them whole, differentiate them once."""

import pytest
import torch
from torch.export import Dim

import flash_attn
from tests.support import calls
from tests.support.cases import FP32

TOKENS, H, D = 34, 4, 16
CU_SEQLENS = (0, 13, TOKENS)


def packed(x):
    """A loss of all of the packed forms, dense and of a packed batch, of x (2, 17, 3, H, D)."""
    cu_seqlens = calls.int32(list(CU_SEQLENS), x.device)
    q, kv = x[:, :, 0], x[:, :, 1:]
    rows, keys = q.flatten(0, 1), kv.flatten(0, 1)
    lengths = (cu_seqlens, cu_seqlens, 21, 21)
    words = dict(causal=True, softcap=2.0)
    outs = (
        flash_attn.flash_attn_qkvpacked_func(x, **words),
        flash_attn.flash_attn_kvpacked_func(q, kv, window_size=(9, 3)),
        flash_attn.flash_attn_varlen_qkvpacked_func(x.flatten(0, 1), cu_seqlens, 21, **words),
        flash_attn.flash_attn_varlen_kvpacked_func(rows, keys, *lengths, **words),
    )
    weights = torch.arange(1.0, 5.0, device=x.device)
    return sum(w * out.square().sum() for w, out in zip(weights, outs, strict=True))


def leaf(seed, device="cpu"):
    return calls.randn(2, 17, 3, H, D, dtype=FP32, device=device, seed=seed).requires_grad_()


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_packed_forms_compile_whole(device, seed, unpoisoned):
    eager, compiled = leaf(seed, device), leaf(seed, device)
    expected = packed(eager)
    actual = torch.compile(packed, fullgraph=True, backend="aot_eager")(compiled)
    expected.backward()
    actual.backward()
    calls.assert_near(actual, expected, roundoffs=16.0)
    calls.assert_near(compiled.grad, eager.grad, roundoffs=16.0)


class Attention(torch.nn.Module):
    """One layer over a batch, and over the same tokens packed."""

    def __init__(self):
        super().__init__()
        self.project = torch.nn.Linear(H * D, 3 * H * D)

    def forward(self, x, cu_seqlens):
        qkv = self.project(x).unflatten(-1, (3, H, D))
        dense = flash_attn.flash_attn_func(*qkv.unbind(2), causal=True)
        together = flash_attn.flash_attn_varlen_qkvpacked_func(qkv.flatten(0, 1), cu_seqlens, 17, causal=True)
        return dense, together


@pytest.mark.parametrize("strict", [True, False])
def test_export_holds_the_operators_and_serves_other_lengths(strict, seed, unpoisoned):
    torch.manual_seed(seed)
    module = Attention()
    example = (torch.randn(2, 17, H * D), calls.int32([0, 17, 34], "cpu"))
    sizes = ({0: Dim("batch", min=2, max=9), 1: Dim("seqlen", min=2, max=64)}, {0: Dim("lengths", min=2, max=64)})
    program = torch.export.export(module, example, dynamic_shapes=sizes, strict=strict)
    graphs = [part.graph for part in program.graph_module.modules() if isinstance(part, torch.fx.GraphModule)]
    names = {str(node.target) for graph in graphs for node in graph.nodes}
    operators = {"flash_attn._flash_attn_forward.default", "flash_attn._flash_attn_varlen_forward.default"}
    assert operators <= names
    for batch_size, seqlen in ((2, 17), (3, 9)):
        lengths = calls.int32([i * seqlen for i in range(batch_size + 1)], "cpu")
        inputs = (torch.randn(batch_size, seqlen, H * D), lengths)
        calls.assert_near(program.module()(*inputs), module(*inputs))


class Decoder(torch.nn.Module):
    """A step over a cache, which it keeps."""

    def __init__(self):
        super().__init__()
        self.register_buffer("k_cache", torch.zeros(2, 20, H, D))
        self.register_buffer("v_cache", torch.zeros(2, 20, H, D))

    def forward(self, q, k, v, seqlens):
        return flash_attn.flash_attn_with_kvcache(
            q, self.k_cache, self.v_cache, k, v, cache_seqlens=seqlens, causal=True
        )


def test_an_exported_cache_is_written(seed, unpoisoned):
    q, k, v = (calls.randn(2, 1, H, D, dtype=FP32, device="cpu", seed=seed + i) for i in range(3))
    module = Decoder()
    program = torch.export.export(Decoder(), (q, k, v, calls.int32([0, 0], "cpu"))).module()
    for step in range(3):
        seqlens = calls.int32([step, 2 * step], "cpu")
        calls.assert_near(program(q, k + step, v, seqlens), module(q, k + step, v, seqlens))
        calls.assert_equal(program.k_cache, module.k_cache)
        calls.assert_equal(program.v_cache, module.v_cache)


def test_gradients_have_no_gradients(seed):
    """Kernels have no second derivative; a gradient penalty must not lose its term in silence."""
    x = leaf(seed)
    for attend in (
        lambda: flash_attn.flash_attn_func(*x.unbind(2), causal=True),
        lambda: flash_attn.flash_attn_varlen_qkvpacked_func(x.flatten(0, 1), calls.int32([0, 13, 34], "cpu"), 21),
    ):
        (gradient,) = torch.autograd.grad(attend().square().sum(), x, create_graph=True)
        penalty = gradient.square().sum() + x.square().sum()
        with pytest.raises(RuntimeError, match="once_differentiable"):
            penalty.backward()
