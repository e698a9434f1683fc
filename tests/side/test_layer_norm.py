"""The fused normalisations against the same formulas in float64."""

import inspect
import itertools

import pytest
import torch

from flash_attn.ops.triton.layer_norm import (
    RMSNorm,
    layer_norm_fn,
    layer_norm_linear_fn,
    layer_norm_ref,
    rms_norm_fn,
    rms_norm_ref,
)

SHAPE = (3, 5, 24)
EPS = 1e-5


def formula(x, weight, bias, rms):
    x = x - (0 if rms else x.mean(-1, keepdim=True))
    y = x / (x.square().mean(-1, keepdim=True) + EPS).sqrt() * weight
    return y if bias is None else y + bias


def tensors(seed, dtype, residual_dtype=None, weight_dtype=torch.float32):
    torch.manual_seed(seed)
    made = dict(
        x=torch.randn(SHAPE).to(dtype),
        x1=torch.randn(SHAPE).to(dtype),
        residual=torch.randn(SHAPE).to(residual_dtype or dtype),
        weight=torch.randn(24).to(weight_dtype),
        bias=torch.randn(24).to(weight_dtype),
        weight1=torch.randn(24).to(weight_dtype),
        bias1=torch.randn(24).to(weight_dtype),
    )
    return {name: x.requires_grad_() for name, x in made.items()}


def check(actual, truth, dtype, factor=4):
    eps = max(torch.finfo(dtype).eps, torch.finfo(actual.dtype).eps)
    scale = max(1.0, truth.abs().max().item())
    torch.testing.assert_close(actual.double(), truth, rtol=factor * eps, atol=factor * eps * scale)


@pytest.mark.parametrize("rms", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("weight_dtype", [torch.float32, None])
@pytest.mark.parametrize("features", list(itertools.product([False, True], repeat=3)))
def test_outputs_and_gradients_match_float64(seed, rms, dtype, weight_dtype, features):
    has_residual, has_x1, has_weight1 = features
    given = tensors(seed, dtype, torch.float32 if has_x1 else dtype, weight_dtype or dtype)
    if not has_residual:
        given.pop("residual")
    if not has_x1:
        given.pop("x1")
    if not has_weight1:
        given.pop("weight1"), given.pop("bias1")
    results = layer_norm_fn(**given, eps=EPS, prenorm=True, is_rms_norm=rms)
    assert len(results) == 3 if has_weight1 else 2

    wide = {name: x.detach().double().requires_grad_() for name, x in given.items()}
    z = wide["x"] + wide.get("x1", 0) + wide.get("residual", 0)
    truths = [formula(z, wide["weight"], wide["bias"], rms)]
    if has_weight1:
        truths.append(formula(z, wide["weight1"], wide["bias1"], rms))
    truths.append(z)
    douts = [torch.randn_like(t) for t in truths]
    for result, truth in zip(results[:-1], truths, strict=False):
        assert result.dtype == dtype
        check(result, truth, dtype)
    assert results[-1].dtype == (given["residual"].dtype if has_residual else dtype)
    check(results[-1], truths[-1], results[-1].dtype)
    douts = [dout.to(result.dtype) for dout, result in zip(douts, results, strict=True)]
    got = torch.autograd.grad(results, list(given.values()), douts)
    expected = torch.autograd.grad(truths, list(wide.values()), [d.double() for d in douts])
    for name, gradient, truth in zip(given, got, expected, strict=True):
        assert gradient.dtype == given[name].dtype
        check(gradient, truth, dtype, factor=16)


@pytest.mark.parametrize("rms", [False, True])
@pytest.mark.parametrize("zero_centered", [False, True])
def test_dropout_uses_the_masks_it_returns(seed, rms, zero_centered):
    given = tensors(seed, torch.float32)
    names = dict(dropout_p=0.3, prenorm=True, zero_centered_weight=zero_centered, eps=EPS)
    fn, ref = (rms_norm_fn, rms_norm_ref) if rms else (layer_norm_fn, layer_norm_ref)
    *results, mask, mask1 = fn(**given, **names, return_dropout_mask=True)
    assert mask.dtype == mask1.dtype == torch.bool and mask.shape == mask1.shape == SHAPE
    assert not torch.equal(mask, mask1)
    expected = ref(**given, **names, dropout_mask=mask, dropout_mask1=mask1, upcast=True)
    for result, truth in zip(results, expected, strict=True):
        torch.testing.assert_close(result, truth, rtol=1e-5, atol=1e-5)
    gradients, truths = (
        torch.autograd.grad(sum((i + 1) * r.square().sum() for i, r in enumerate(rs)), list(given.values()))
        for rs in (results, expected)
    )
    for gradient, truth in zip(gradients, truths, strict=True):
        torch.testing.assert_close(gradient, truth, rtol=1e-4, atol=1e-4 * truth.abs().max().item())


def test_dropout_drops_the_asked_share(seed):
    torch.manual_seed(seed)
    x, weight = torch.ones(400, 500), torch.ones(500)
    _, z, mask, mask1 = layer_norm_fn(x, weight, None, dropout_p=0.2, prenorm=True, return_dropout_mask=True)
    assert mask1 is None
    share = 1 - mask.double().mean().item()
    assert abs(share - 0.2) < 6 * (0.2 * 0.8 / x.numel()) ** 0.5
    assert torch.equal(z, mask / 0.8)


def test_rowscale_multiplies_rows(seed):
    given = tensors(seed, torch.float32)
    rowscale = torch.randn(SHAPE[:-1])
    out, z = layer_norm_fn(
        given["x"], given["weight"], given["bias"], given["residual"], rowscale=rowscale, prenorm=True, eps=EPS
    )
    truth = given["x"] * rowscale[..., None] + given["residual"]
    torch.testing.assert_close(z, truth)
    torch.testing.assert_close(out, formula(truth, given["weight"], given["bias"], False), rtol=1e-5, atol=1e-5)


def test_return_tuples_are_upstreams(seed):
    given = tensors(seed, torch.float32)
    x, weight, weight1 = given["x"], given["weight"], given["weight1"]
    assert isinstance(layer_norm_fn(x, weight, None), torch.Tensor)
    for prenorm, two, masks in itertools.product([False, True], repeat=3):
        results = layer_norm_fn(
            x, weight, None, weight1=weight1 if two else None, prenorm=prenorm, return_dropout_mask=masks
        )
        count = len(results) if isinstance(results, tuple) else 1
        assert count == 1 + two + prenorm + 2 * masks
        if masks:
            assert results[-2:] == (None, None)


def test_residual_dtypes(seed):
    given = tensors(seed, torch.bfloat16)
    x, weight = given["x"], given["weight"]
    assert layer_norm_fn(x, weight, None, prenorm=True)[1] is x
    assert layer_norm_fn(x, weight, None, prenorm=True, residual_in_fp32=True)[1].dtype == torch.float32
    kept = layer_norm_fn(x, weight, None, given["residual"], prenorm=True, residual_in_fp32=True)[1]
    assert kept.dtype == torch.bfloat16
    assert layer_norm_fn(x, weight, None, out_dtype=torch.float32).dtype == torch.float32


def test_out_and_residual_out_are_written(seed):
    given = tensors(seed, torch.float32)
    x, weight, residual = given["x"], given["weight"], given["residual"]
    out, residual_out = torch.full(SHAPE, torch.nan), torch.full(SHAPE, torch.nan)
    got, z = rms_norm_fn(x, weight, None, residual, prenorm=True, out=out, residual_out=residual_out)
    assert got.data_ptr() == out.data_ptr() and z.data_ptr() == residual_out.data_ptr()
    expected = rms_norm_fn(x, weight, None, residual, prenorm=True)
    assert torch.equal(out, expected[0]) and torch.equal(residual_out, expected[1])
    (dx,) = torch.autograd.grad(got.square().sum() + z.sum(), x)
    (truth,) = torch.autograd.grad(expected[0].square().sum() + expected[1].sum(), x)
    torch.testing.assert_close(dx, truth)


@pytest.mark.parametrize("prenorm", [False, True])
@pytest.mark.parametrize("rms", [False, True])
def test_linear_after_norm(seed, prenorm, rms):
    given = tensors(seed, torch.float32)
    linear, shift = torch.randn(7, 24), torch.randn(7)
    arguments = (given["x"], given["weight"], given["bias"], linear, shift, given["residual"])
    result = layer_norm_linear_fn(*arguments, eps=EPS, prenorm=prenorm, is_rms_norm=rms)
    z = given["x"] + given["residual"]
    truth = formula(z, given["weight"], given["bias"], rms) @ linear.T + shift
    out = result[0] if prenorm else result
    torch.testing.assert_close(out, truth, rtol=1e-5, atol=1e-4)
    if prenorm:
        torch.testing.assert_close(result[1], z)
    with torch.autocast("cpu", torch.bfloat16):
        cast = layer_norm_linear_fn(*arguments, eps=EPS, is_rms_norm=rms)
    assert cast.dtype == torch.bfloat16


@pytest.mark.parametrize("zero_centered", [False, True])
def test_rms_norm_module(seed, zero_centered):
    torch.manual_seed(seed)
    module = RMSNorm(24, eps=EPS, dropout_p=0.5, zero_centered_weight=zero_centered)
    assert [name for name, _ in module.named_parameters()] == ["weight"] and module.bias is None
    x = torch.randn(SHAPE)
    truth = formula(x, torch.ones(24), None, True)
    torch.testing.assert_close(module.eval()(x), truth, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(module.train()(x), truth)


def test_signatures_are_upstreams():
    names = list(inspect.signature(layer_norm_fn).parameters)
    assert names[:13] == [
        *("x", "weight", "bias", "residual", "x1", "weight1", "bias1", "eps", "dropout_p", "rowscale"),
        *("prenorm", "residual_in_fp32", "zero_centered_weight"),
    ]
    assert names[13:] == ["is_rms_norm", "return_dropout_mask", "out_dtype", "out", "residual_out"]
    assert list(inspect.signature(rms_norm_fn).parameters) == [n for n in names if n != "is_rms_norm"]


@pytest.mark.parametrize(
    "change, words",
    [
        (dict(weight=torch.ones(5)), r"weight must have shape \(4,\), got \(5,\)"),
        (dict(residual=torch.ones(3, 4)), r"residual must have the shape of x, \(2, 4\), got \(3, 4\)"),
        (dict(bias1=torch.ones(4)), "bias1 needs weight1"),
        (dict(dropout_p=1.0), "got 1.0"),
        (dict(rowscale=torch.ones(2), x1=torch.ones(2, 4)), "not supported with parallel LayerNorm"),
        (dict(rowscale=torch.ones(3)), r"\(2,\), got \(3,\)"),
        (dict(out=torch.ones(2, 4), out_dtype=torch.float16), "float16"),
    ],
)
def test_bad_input_is_named(change, words):
    arguments = dict(x=torch.ones(2, 4), weight=torch.ones(4), bias=None) | change
    with pytest.raises(ValueError, match=words):
        layer_norm_fn(**arguments)
