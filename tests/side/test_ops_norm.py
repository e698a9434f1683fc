"""ops.layer_norm and ops.rms_norm against the fused functions' own formulas."""

import itertools

import pytest
import torch

from flash_attn.ops import layer_norm, rms_norm

SHAPE, EPS = (3, 5, 16), 1e-5


def formula(x, weight, bias, rms):
    x = x - (0 if rms else x.mean(-1, keepdim=True))
    y = x / (x.square().mean(-1, keepdim=True) + EPS).sqrt() * weight
    return y if bias is None else y + bias


def same(actual, truth):
    torch.testing.assert_close(actual, truth, rtol=1e-5, atol=1e-5)


FUNCTIONS = {
    False: (layer_norm.dropout_add_layer_norm, layer_norm.dropout_add_layer_norm_parallel_residual),
    True: (rms_norm.dropout_add_rms_norm, rms_norm.dropout_add_rms_norm_parallel_residual),
}


@pytest.mark.parametrize("rms, prenorm, masks", list(itertools.product([False, True], repeat=3)))
def test_one_norm(seed, rms, prenorm, masks):
    torch.manual_seed(seed)
    x, residual = torch.randn(2, *SHAPE)
    weight, bias, layerscale = torch.randn(3, 16)
    rowscale = torch.randn(SHAPE[:-1])
    arguments = dict(rowscale=rowscale, layerscale=layerscale, prenorm=prenorm)
    for p in (0.0, 0.4) if masks else (0.0,):
        results = FUNCTIONS[rms][0](x, residual, weight, bias, p, EPS, return_dropout_mask=masks, **arguments)
        results = results if isinstance(results, tuple) else (results,)
        assert len(results) == 1 + prenorm + masks
        mask = results[-1] if masks else torch.ones(SHAPE, dtype=torch.bool)
        assert mask.all() == (p == 0.0)
        z = x * rowscale[..., None] * mask / (1 - p) * layerscale + residual
        same(results[0], formula(z, weight, bias, rms))
        if prenorm:
            same(results[1], z)


@pytest.mark.parametrize("rms, two, masks", list(itertools.product([False, True], repeat=3)))
def test_two_norms(seed, rms, two, masks):
    torch.manual_seed(seed)
    x0, x1, residual = torch.randn(3, *SHAPE)
    weight0, bias0, weight1, bias1 = torch.randn(4, 16)
    second = (weight1, bias1) if two else (None, None)
    p = 0.4 if masks else 0.0
    out0, out1, z, *rest = FUNCTIONS[rms][1](
        x0, x1, residual, weight0, bias0, *second, p, EPS, prenorm=True, return_dropout_mask=masks
    )
    mask0, mask1 = rest or (1, 1)
    truth = (x0 * mask0 + x1 * mask1) / (1 - p) + residual
    same(z, truth)
    same(out0, formula(truth, weight0, bias0, rms))
    assert (out1 is not None) == two
    if two:
        same(out1, formula(truth, weight1, bias1, rms))


@pytest.mark.parametrize("cls", [layer_norm.DropoutAddLayerNorm, rms_norm.DropoutAddRMSNorm])
def test_modules(seed, cls):
    torch.manual_seed(seed)
    x, residual = torch.randn(2, *SHAPE)
    module = cls(16, prenorm=True, p=0.5, eps=EPS, residual_in_fp32=True)
    rms = cls is rms_norm.DropoutAddRMSNorm
    assert not torch.equal(module(x, residual)[1], x + residual)
    out, z = module.eval()(x, residual)
    same(z, x + residual)
    same(out, formula(z, 1.0, None, rms))
    assert module(x.bfloat16())[1].dtype == torch.float32 and module(x.bfloat16())[0].dtype == torch.bfloat16


def test_plain_norms(seed):
    torch.manual_seed(seed)
    x, (weight, bias) = torch.randn(SHAPE), torch.randn(2, 16)
    same(layer_norm.layer_norm(x, weight, bias, EPS), formula(x, weight, bias, False))
    same(rms_norm.rms_norm(x, weight, EPS), formula(x, weight, None, True))
    same(rms_norm.RMSNorm(16, eps=EPS)(x), formula(x, 1.0, None, True))


def test_bad_input_is_named():
    x, weight = torch.ones(2, 4), torch.ones(4)
    with pytest.raises(ValueError, match=r"residual must have the shape of x0, \(2, 4\), got \(4,\)"):
        layer_norm.dropout_add_layer_norm(x, weight, weight, weight, 0.0, EPS)
    with pytest.raises(ValueError, match=r"got 1\.0"):
        rms_norm.dropout_add_rms_norm(x, None, weight, None, 1.0, EPS)
