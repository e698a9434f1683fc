"""MLPs, blocks, embeddings, patches and fused operations against the same formulas in plain PyTorch."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from flash_attn.layers.patch_embed import PatchEmbed
from flash_attn.modules.block import Block, ParallelBlock, StochasticDepth
from flash_attn.modules.embedding import BertEmbeddings, GPT2Embeddings
from flash_attn.modules.mha import MHA
from flash_attn.modules.mlp import FusedMLP, GatedMlp, Mlp
from flash_attn.ops import activations
from flash_attn.ops.fused_dense import FusedDense, FusedDenseFunc, FusedMLPFunc, fused_mlp_func
from flash_attn.ops.triton import k_activations
from flash_attn.ops.triton.layer_norm import RMSNorm
from flash_attn.ops.triton.linear import triton_dgrad_act, triton_linear_act
from flash_attn.ops.triton.mlp import FusedDenseSqreluDense
from flash_attn.utils.generation import InferenceParams

DIM = 64


def same(actual, truth):
    torch.testing.assert_close(actual, truth, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["tanh", "cosh", "relu", "squared_relu", "leaky_relu", "gelu", "gelu_approx"])
def test_derivatives_are_those_of_their_functions(seed, name):
    torch.manual_seed(seed)
    x = torch.randn(200, dtype=torch.float64, requires_grad=True)
    y = getattr(k_activations, name)(x)
    (truth,) = torch.autograd.grad(y.sum(), x)
    if hasattr(k_activations, f"{name}_grad"):
        torch.testing.assert_close(getattr(k_activations, f"{name}_grad")(x.detach()), truth)
    else:
        torch.testing.assert_close(y, getattr(torch, name)(x))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_activation_pairs(seed, dtype):
    torch.manual_seed(seed)
    x, y, g = (torch.randn(7, 33, dtype=torch.float64).to(dtype) for _ in range(3))
    bias = torch.randn(33, dtype=torch.float64).to(dtype)

    def check(ours, formula, *inputs):
        inputs = [each.detach().requires_grad_() for each in inputs]
        wide = [each.detach().double().requires_grad_() for each in inputs]
        out, truth = ours(*inputs), formula(*wide)
        assert out.dtype == dtype
        tolerance = dict(rtol=8 * torch.finfo(dtype).eps, atol=16 * torch.finfo(dtype).eps)
        torch.testing.assert_close(out.double(), truth, **tolerance)
        got = torch.autograd.grad(out, inputs, g)
        for gradient, expected in zip(got, torch.autograd.grad(truth, wide, g.double()), strict=True):
            torch.testing.assert_close(gradient.double(), expected, **tolerance)

    gelu = partial(F.gelu, approximate="tanh")
    check(activations.swiglu, lambda x, y: F.silu(x) * y, x, y)
    check(activations.fast_gelu_impl, gelu, x)
    check(activations.bias_gelu_impl, lambda x, b: gelu(x + b), x, bias)
    check(activations.sqrelu_fwd, lambda x: F.relu(x) ** 2, x)
    assert torch.equal(activations.sqrelu_bwd(g, x), (2 * g * F.relu(x)).to(dtype))
    assert torch.equal(activations.relu_bwd(g, x), g * (x >= 0))


@pytest.mark.parametrize("activation", ["id", "gelu", "gelu_approx", "squared_relu"])
def test_linear_with_activation_and_its_gradient(seed, activation):
    torch.manual_seed(seed)
    x, weight, bias = torch.randn(2, 5, 6), torch.randn(7, 6), torch.randn(7)
    out, before = triton_linear_act(x, weight, bias, activation, save_act_input=True)
    before = before.detach().requires_grad_()
    function = (lambda t: t) if activation == "id" else getattr(k_activations, activation)
    same(out, function(F.linear(x, weight, bias)))
    assert torch.equal(triton_linear_act(x, weight, bias, activation), out)
    second, dout = torch.randn(3, 7), torch.randn(2, 5, 3)
    (truth,) = torch.autograd.grad(F.linear(function(before), second), before, dout)
    same(triton_dgrad_act(dout, second, activation, before.detach()), truth)


@pytest.mark.parametrize("activation", ["gelu_approx", "relu", "sqrelu"])
@pytest.mark.parametrize("level", [0, 1, 2])
def test_fused_mlp_keeps_its_gradients_at_every_checkpoint_level(seed, activation, level):
    torch.manual_seed(seed)
    mlp = FusedMLP(6, 10, 4, activation=activation, checkpoint_lvl=level, return_residual=True)
    x = torch.randn(3, 5, 6, requires_grad=True)
    function = {"gelu_approx": partial(F.gelu, approximate="tanh"), "relu": F.relu, "sqrelu": lambda t: F.relu(t) ** 2}
    truth = mlp.fc2(function[activation](mlp.fc1(x)))
    out, residual = mlp(x)
    assert residual is x
    same(out, truth)
    inputs = [x, *mlp.parameters()]
    dout = torch.randn_like(out)
    for ours, expected in zip(
        torch.autograd.grad(out, inputs, dout), torch.autograd.grad(truth, inputs, dout), strict=True
    ):
        same(ours, expected)


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("residual", [False, True])
def test_apply_takes_its_arguments_in_the_order_of_the_autograd_functions(seed, biased, residual):
    torch.manual_seed(seed)
    x, weight1, weight2 = torch.randn(3, 5, 6), torch.randn(10, 6), torch.randn(4, 10)
    bias1, bias2 = (torch.randn(10), torch.randn(4)) if biased else (None, None)
    leaves = [each.requires_grad_() for each in (x, weight1, bias1, weight2, bias2) if each is not None]

    def check(results, truth):
        out, kept = results if residual else (results, x)
        same(out, truth)
        ours, expected = out.square().mean() + kept.sin().mean(), truth.square().mean() + x.sin().mean()
        gradients = [
            torch.autograd.grad(each, leaves, retain_graph=True, materialize_grads=True) for each in (ours, expected)
        ]
        for got, right in zip(*gradients, strict=True):
            same(got, right)

    check(FusedDenseFunc.apply(x, weight1, bias1, residual, None, True), F.linear(x, weight1, bias1))
    truth = F.linear(F.relu(F.linear(x, weight1, bias1)).square(), weight2, bias2)
    for save_pre_act, level in ((True, 0), (True, 1), (False, 0)):
        results = FusedMLPFunc.apply(
            x, weight1, bias1, weight2, bias2, "sqrelu", save_pre_act, residual, level, -1, None, True
        )
        check(results, truth)


def test_fewer_activations_are_kept_at_a_higher_checkpoint_level():
    kept = []
    for level in (0, 1, 2):
        mlp, saved = FusedMLP(8, 64, checkpoint_lvl=level), []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, saved=saved: saved.append(t) or t, lambda t: t):
            mlp(torch.randn(16, 8, requires_grad=True))
        kept.append(sum(t.shape == (16, 64) for t in saved))
    assert kept == [2, 1, 0]


def test_mlps(seed):
    torch.manual_seed(seed)
    x = torch.randn(3, 30)
    mlp = Mlp(30)
    assert mlp.fc1.out_features == 120
    same(mlp(x), mlp.fc2(F.gelu(mlp.fc1(x))))
    for activation in (F.sigmoid, F.silu, F.gelu):
        gated = GatedMlp(30, activation=activation, multiple_of=16, return_residual=True)
        assert gated.fc2.in_features == 80
        y, gate = gated.fc1(x).chunk(2, dim=-1)
        out, residual = gated(x)
        assert residual is x
        same(out, gated.fc2(y * activation(gate)))
    dense = FusedDense(30, 4, return_residual=True)
    out, residual = dense(x)
    assert residual is x and torch.equal(out, F.linear(x, dense.weight, dense.bias))
    squared = FusedDenseSqreluDense(30)
    same(squared(x), squared.fc2(F.relu(squared.fc1(x)) ** 2))


def parts(cls, seed, norm_cls=nn.LayerNorm, **options):
    torch.manual_seed(seed)
    mixer = partial(MHA, num_heads=4, causal=True, layer_idx=0)
    return cls(DIM, mixer, partial(Mlp, hidden_features=32), norm_cls=norm_cls, **options)


@pytest.mark.parametrize("norm_cls", [nn.LayerNorm, RMSNorm])
@pytest.mark.parametrize("fused", [False, True])
def test_prenorm_block(seed, norm_cls, fused):
    block = parts(Block, seed, norm_cls, fused_dropout_add_ln=fused)
    x, residual = torch.randn(2, 5, DIM), torch.randn(2, 5, DIM)
    for before in (None, residual):
        out, after = block(x, before)
        first = x if before is None else x + before
        second = first + block.mixer(block.norm1(first))
        same(after, second)
        same(out, block.mlp(block.norm2(second)))
    assert block(x.to(torch.float32), mixer_subset=None)[1].dtype == torch.float32


@pytest.mark.parametrize("fused", [False, True])
def test_postnorm_block(seed, fused):
    block = parts(Block, seed, prenorm=False, fused_dropout_add_ln=fused)
    x = torch.randn(2, 5, DIM)
    first = block.norm1(block.mixer(x) + x)
    same(block(x), block.norm2(block.mlp(first) + first))


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("tied", [False, True])
def test_parallel_block(seed, fused, tied):
    block = parts(ParallelBlock, seed, fused_dropout_add_ln=fused, tied_norm=tied)
    x, second, before = torch.randn(3, 2, 5, DIM)
    norm2 = block.norm1 if tied else block.norm2
    for x2, residual in ((None, None), (second, before)):
        total = x if x2 is None else x + x2 + residual
        out1, out2, after = block(x, x2, residual)
        same(after, total)
        same(out1, block.mixer(block.norm1(total)))
        same(out2, block.mlp(norm2(total)))


@pytest.mark.parametrize("fused", [False, True])
def test_dropped_paths_and_elements_while_training(seed, fused):
    block = parts(Block, seed, fused_dropout_add_ln=fused, drop_path1=0.5, resid_dropout1=0.2)
    block.mixer, block.mlp = nn.Identity(), nn.Identity()
    torch.manual_seed(seed)
    x = torch.ones(400, 8, DIM)
    _, total = block(x)
    alive = total.flatten(1).any(dim=1)
    assert abs(alive.double().mean().item() - 0.5) < 6 * 0.5 / 400**0.5
    values = total[alive]
    same(values[values != 0], torch.full_like(values[values != 0], 1 / (0.5 * 0.8)))
    assert abs((values == 0).double().mean().item() - 0.2) < 0.01
    assert torch.equal(block.eval()(x)[1], x)


def test_stochastic_depth_needs_a_probability():
    with pytest.raises(ValueError, match=r"got 1\.5"):
        StochasticDepth(1.5)


def test_residual_in_fp32_and_marks(seed):
    block = parts(Block, seed, residual_in_fp32=True, sequence_parallel=True, mark_shared_params=True).bfloat16()
    assert block(torch.randn(2, 5, DIM).bfloat16())[1].dtype == torch.float32
    marked = {n for n, p in block.named_parameters() if getattr(p, "_sequence_parallel", False) and p._shared_params}
    assert marked == {"norm1.weight", "norm1.bias", "norm2.weight", "norm2.bias"}


def test_a_block_decodes(seed):
    block = parts(Block, seed).eval()
    x = torch.randn(2, 6, DIM)
    params = InferenceParams(6, 2, key_value_memory_dict={0: block.allocate_inference_cache(2, 6)})
    with torch.no_grad():
        whole = block(x)[0]
        first = block(x[:, :4], mixer_kwargs=dict(inference_params=params))[0]
        params.seqlen_offset = 4
        rest = block(x[:, 4:], mixer_kwargs=dict(inference_params=params))[0]
    same(torch.cat([first, rest], 1), whole)


@pytest.mark.parametrize(
    "cls, options, words",
    [
        (Block, dict(prenorm=False, residual_in_fp32=True), "prenorm=True"),
        (Block, dict(fused_dropout_add_ln=True, norm_cls=nn.Identity), "Identity"),
        (ParallelBlock, dict(fused_dropout_add_ln=True, resid_dropout1=0.1), r"resid_dropout1 0\.1"),
    ],
)
def test_contradictions_of_blocks_are_named(seed, cls, options, words):
    with pytest.raises(ValueError, match=words):
        parts(cls, seed, **{"norm_cls": nn.LayerNorm, **options})


def test_embeddings(seed):
    torch.manual_seed(seed)
    ids, positions, types = torch.randint(11, (2, 5)), torch.randint(7, (2, 5)), torch.randint(3, (2, 5))
    gpt = GPT2Embeddings(8, 11, 7, word_embed_proj_dim=4)
    words = gpt.project_in(gpt.word_embeddings(ids))
    same(gpt(ids), words + gpt.position_embeddings.weight[:5])
    same(gpt(ids, positions), words + gpt.position_embeddings(positions))
    unplaced = GPT2Embeddings(8, 11, 0)
    assert torch.equal(unplaced(ids), unplaced.word_embeddings(ids))
    bert = BertEmbeddings(8, 11, 7, 3)
    words = bert.word_embeddings(ids)
    same(bert(ids), words + bert.position_embeddings.weight[:5] + bert.token_type_embeddings.weight[0])
    truth = words + bert.position_embeddings(positions) + bert.token_type_embeddings(types)
    same(bert(ids, positions, types), truth)
    bare = BertEmbeddings(8, 11, 0, 0)
    assert torch.equal(bare(ids), bare.word_embeddings(ids))


@pytest.mark.parametrize("fused_bias_fc, bias", [(False, True), (True, False)])
def test_patch_embed_is_a_convolution(seed, fused_bias_fc, bias):
    torch.manual_seed(seed)
    embed = PatchEmbed((12, 8), (3, 4), 2, 5, bias=bias, fused_bias_fc=fused_bias_fc)
    image = torch.randn(3, 2, 12, 8)
    truth = F.conv2d(image, embed.proj.weight.view(5, 2, 3, 4), embed.proj.bias, stride=(3, 4))
    same(embed(image), truth.flatten(2).transpose(1, 2))
    assert embed.grid_size == (4, 2) and embed.num_patches == 8
    embed.flatten = False
    same(embed(image), truth.permute(0, 2, 3, 1))
    with pytest.raises(ValueError, match=r"\(8, 12\)"):
        embed(torch.randn(3, 2, 8, 12))


def test_bad_input_of_operations_is_named():
    x, weight = torch.ones(2, 3), torch.ones(4, 3)
    for call, words in (
        (lambda: triton_linear_act(x, weight, activation="swish"), "'swish'"),
        (lambda: triton_dgrad_act(torch.ones(2, 4), weight, "gelu"), "act_input is required"),
        (lambda: fused_mlp_func(x, weight, weight.T, activation="gelu"), "'gelu'"),
        (lambda: fused_mlp_func(x, weight, weight.T, checkpoint_lvl=3), "got 3"),
        (lambda: fused_mlp_func(x, weight, weight.T, heuristic=5), "got 5"),
    ):
        with pytest.raises(ValueError, match=words):
            call()
    with pytest.raises(NotImplementedError, match="both biases"):
        FusedDenseSqreluDense(4, bias2=False)
