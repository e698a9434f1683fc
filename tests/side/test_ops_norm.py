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


SUBSETS = {False: layer_norm.dropout_add_layer_norm_subset, True: rms_norm.dropout_add_rms_norm_subset}
OPTIONS = [
    dict(zip(("rms", "with_residual", "scaled", "dropped"), options, strict=True))
    for options in itertools.product([False, True], repeat=4)
]


def places(present):
    return (present.cumsum(0) * present).to(torch.int32)


@pytest.mark.parametrize(
    "options", OPTIONS, ids=lambda options: "-".join(k for k, on in options.items() if on) or "plain"
)
def test_subsets_of_rows(seed, options):
    """Against the norm of all rows, of which the missing ones are 0 and the unwanted ones dropped: values and gradients."""
    torch.manual_seed(seed)
    batch_size, seqlen, hidden = 7, 3, 16
    there, wanted = torch.rand(2, batch_size) < 0.6
    there[0] = wanted[1] = True
    x0 = torch.randn(int(there.sum()), seqlen, hidden, dtype=torch.float64, requires_grad=True)
    residual = torch.randn(batch_size, seqlen, hidden, dtype=torch.float64) if options["with_residual"] else None
    weight, bias, layerscale = torch.randn(3, hidden, dtype=torch.float64)
    bias, layerscale = (None if options["rms"] else bias), (layerscale if options["scaled"] else None)
    scale, p = (1.7 if options["scaled"] else 1.0), (0.4 if options["dropped"] else 0.0)
    leaves = [each.requires_grad_() for each in (x0, residual, weight, bias, layerscale) if each is not None]
    rows = [each.repeat_interleave(seqlen) for each in (there, wanted)]
    out, z, mask = SUBSETS[options["rms"]](
        x0,
        residual,
        weight,
        bias,
        p,
        EPS,
        layerscale,
        places(rows[0]).view(batch_size, seqlen),
        places(rows[1]).view(batch_size, seqlen),
        scale,
        int(rows[1].sum()),
        prenorm=True,
        return_dropout_mask=True,
    )
    assert mask.shape == x0.shape and mask.all() == (p == 0.0)
    kept = x0 * mask / (1 - p) * scale * (1 if layerscale is None else layerscale)
    truth = torch.zeros(batch_size, seqlen, hidden, dtype=torch.float64).index_copy(0, there.nonzero()[:, 0], kept)
    truth = truth if residual is None else truth + residual
    same(z, truth)
    expected = formula(truth, weight, 0 if bias is None else bias, options["rms"])[wanted]
    same(out, expected)
    g, gz = torch.randn_like(out), torch.randn_like(z)
    gradients = torch.autograd.grad((out, z), leaves, (g, gz))
    for got, right in zip(gradients, torch.autograd.grad((expected, truth), leaves, (g, gz)), strict=True):
        same(got, right)


@pytest.mark.parametrize("rms", [False, True])
def test_subsets_keep_dtypes_and_stay_inside(seed, rms):
    torch.manual_seed(seed)
    x0, weight = torch.randn(2, 8).bfloat16(), torch.ones(8)
    x0_subset, out_subset = torch.tensor([1, 0, 3, -1]), torch.tensor([2, 9, 0, 3])
    arguments = dict(x0_subset=x0_subset, out_subset=out_subset, out_numrows=4, prenorm=True)
    out, z = SUBSETS[rms](x0, None, weight, None, 0.0, EPS, residual_in_fp32=True, **arguments)
    assert out.dtype == torch.bfloat16 and z.dtype == torch.float32 and out.shape == z.shape == (4, 8)
    assert torch.equal(z, torch.cat([x0[:1].float(), torch.zeros(3, 8)]))
    torch.testing.assert_close(out[1], formula(z[0], 1.0, None, rms).bfloat16())
    assert not out[[0, 2, 3]].any()
    residual = torch.randn(4, 8).bfloat16()
    out, z = SUBSETS[rms](x0, residual, weight, None, 0.0, EPS, rowscale_const=3.0, **arguments)
    truth = residual[0].float() + 3.0 * x0[0].float()
    assert out.dtype == z.dtype == torch.bfloat16 and torch.equal(z[0], truth.bfloat16())
    torch.testing.assert_close(out[1], formula(truth, 1.0, None, rms).bfloat16())
    nothing = SUBSETS[rms](x0[:0], None, weight, None, 0.0, EPS, x0_subset=0 * x0_subset, out_subset=0 * out_subset)
    assert nothing.shape == (0, 8)


def test_subsets_of_nothing_are_the_whole(seed):
    torch.manual_seed(seed)
    x0, residual = torch.randn(2, *SHAPE)
    weight, bias, layerscale = torch.randn(3, 16)
    for rms, subset in SUBSETS.items():
        truth = FUNCTIONS[rms][0](x0, residual, weight, bias, 0.0, EPS, layerscale=layerscale, prenorm=True)
        for got, right in zip(
            subset(x0, residual, weight, bias, 0.0, EPS, layerscale, prenorm=True), truth, strict=True
        ):
            assert torch.equal(got, right)


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


@pytest.mark.parametrize(
    "changes, words",
    [
        (dict(out_subset=None), "got no out_subset"),
        (dict(x0_subset=None), "got no x0_subset"),
        (dict(x0_subset=None, out_subset=None, out_numrows=0), r"rowscale_const \(2\.0\)"),
        (dict(x0_subset=None, out_subset=None, rowscale_const=1.0), r"out_numrows \(3\)"),
        (dict(x0_subset=torch.ones(5)), "x0_subset must be of an integer dtype, got torch.float32"),
        (dict(out_subset=torch.ones(4, dtype=torch.int32)), "'x0_subset': 5, 'out_subset': 4"),
        (dict(residual=torch.ones(6, 4)), "'residual': 6"),
        (dict(residual=torch.ones(5, 3)), "the 4 columns of x0, got 3"),
        (dict(out_numrows=-1), "got -1"),
        (dict(dropout_p=1.0), r"got 1\.0"),
    ],
)
def test_bad_subsets_are_named(changes, words):
    every = torch.ones(5, dtype=torch.int32)
    arguments = dict(residual=None, dropout_p=0.0, x0_subset=every, out_subset=every, rowscale_const=2.0, out_numrows=3)
    for subset in SUBSETS.values():
        with pytest.raises(ValueError, match=words):
            subset(torch.ones(2, 4), weight=torch.ones(4), bias=None, epsilon=EPS, **(arguments | changes))


FN, SUBSET_FN, TWO_FN = (
    layer_norm.DropoutAddLayerNormFn,
    layer_norm.DropoutAddLayerNormSubsetFn,
    layer_norm.DropoutAddLayerNormParallelResidualFn,
)


@pytest.mark.parametrize("rms", [False, True])
def test_the_autograd_functions_take_upstreams_order_of_arguments(seed, rms):
    torch.manual_seed(seed)
    x0, x1, residual = torch.randn(3, 4, 3, 16, dtype=torch.float64).unbind()
    gamma0, beta0, gamma1, beta1, colscale = torch.randn(5, 16, dtype=torch.float64).unbind()
    rowscale = torch.rand(4, 3, dtype=torch.float64)
    leaves = [each.requires_grad_() for each in (x0, x1, residual, gamma0, beta0, gamma1, beta1, colscale)]
    z = x0 * rowscale[..., None] * colscale + residual
    out, kept_z, mask = FN.apply(x0, residual, gamma0, beta0, rowscale, colscale, 0.0, EPS, False, True, rms, True)
    check((out, kept_z), (formula(z, gamma0, beta0, rms), z), leaves)
    assert mask.dtype == torch.uint8 and mask.shape == x0.shape and mask.all()

    rows = torch.tensor([1, 2, 0, 3]), torch.tensor([0, 1, 2, 0])
    some = (x0[:3, 0], residual[:, 0], gamma0, beta0, colscale, *rows)
    out, kept_z, mask = SUBSET_FN.apply(*some, 0.0, EPS, 1.5, 2, False, True, rms, True)
    z = torch.stack([x0[0, 0], x0[1, 0], 0 * x0[0, 0], x0[2, 0]]) * 1.5 * colscale + residual[:, 0]
    check((out, kept_z), (formula(z, gamma0, beta0, rms)[1:3], z), leaves)
    assert mask.dtype == torch.uint8 and mask.shape == (3, 16)

    out0, out1, kept_z, mask0, mask1 = TWO_FN.apply(
        x0, x1, residual, gamma0, beta0, gamma1, beta1, 0.0, EPS, False, True, rms, True
    )
    z = x0 + x1 + residual
    truth = formula(z, gamma0, beta0, rms), formula(z, gamma1, beta1, rms), z
    check((out0, out1, kept_z), truth, leaves)
    assert mask0.dtype == mask1.dtype == torch.uint8 and mask0.all() and mask1.all()


def check(results, truths, leaves):
    """Values, and gradients of a random functional of them."""
    cotangents = [torch.randn_like(truth) for truth in truths]
    for got, truth in zip(results, truths, strict=True):
        same(got, truth)
    gradients = [torch.autograd.grad(each, leaves, cotangents, allow_unused=True) for each in (results, truths)]
    for got, truth in zip(*gradients, strict=True):
        assert (got is None) == (truth is None)
        if truth is not None:
            same(got, truth)


def test_masks_are_bytes_and_there_is_one_for_a_missing_x1(seed):
    """As upstream's kernels return them: they index-assign into tensors of bytes, which refuse other dtypes."""
    torch.manual_seed(seed)
    x0, weight = torch.randn(64, 16), torch.ones(16)
    for function in (
        layer_norm.dropout_add_layer_norm_parallel_residual,
        rms_norm.dropout_add_rms_norm_parallel_residual,
    ):
        out0, out1, mask0, mask1 = function(
            x0, None, None, weight, None, None, None, 0.4, EPS, return_dropout_mask=True
        )
        assert out1 is None and mask0.dtype == mask1.dtype == torch.uint8
        assert mask1.shape == x0.shape and mask1.all() and 0 < mask0.sum() < mask0.numel()
        same(out0, formula(x0 * mask0 / 0.6, 1.0, None, function is FUNCTIONS[True][1]))
