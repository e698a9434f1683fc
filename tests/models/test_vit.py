"""The Vision Transformer against its formula in plain PyTorch, under timm's names."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F

from flash_attn.errors import UnsupportedProblem
from flash_attn.models import vit
from flash_attn.models.vit import VisionTransformer, vit_base_patch16_224
from tests.models import plain

DIM, HEADS, DEPTH, INNER, CLASSES = 24, 4, 3, 48, 7
SIZES = dict(img_size=(8, 12), patch_size=4, in_chans=2, num_classes=CLASSES, embed_dim=DIM)
SIZES |= dict(depth=DEPTH, num_heads=HEADS, mlp_ratio=2.0)


def timm_checkpoint(seed, no_embed_class=False, qkv_bias=True):
    linears = {"attn.qkv": (3 * DIM, DIM), "attn.proj": (DIM, DIM), "mlp.fc1": (INNER, DIM), "mlp.fc2": (DIM, INNER)}
    shapes = {"cls_token": (1, 1, DIM), "pos_embed": (1, 6 if no_embed_class else 7, DIM)}
    shapes |= {"patch_embed.proj.weight": (DIM, 2, 4, 4), "patch_embed.proj.bias": (DIM,)}
    for index in range(DEPTH):
        for name, shape in linears.items():
            shapes[f"blocks.{index}.{name}.weight"] = shape
            if qkv_bias or name != "attn.qkv":
                shapes[f"blocks.{index}.{name}.bias"] = shape[:1]
        shapes |= {f"blocks.{index}.norm{which}.{name}": (DIM,) for which in (1, 2) for name in ("weight", "bias")}
    shapes |= {"norm.weight": (DIM,), "norm.bias": (DIM,), "head.weight": (CLASSES, DIM), "head.bias": (CLASSES,)}
    return plain.state_dict_like(shapes, seed)


def features(w, images, approximate="none", scales=(1.0,) * (2 * DEPTH)):
    """Attention of the first block, its MLP, attention of the second and so on, each times a scale."""

    def linear(x, name):
        return F.linear(x, w[name + ".weight"], w.get(name + ".bias"))

    def norm(x, name):
        return F.layer_norm(x, (DIM,), w[name + ".weight"], w[name + ".bias"], 1e-6)

    x = F.conv2d(images, w["patch_embed.proj.weight"], w["patch_embed.proj.bias"], stride=4).flatten(2).mT
    token = w["cls_token"].expand(len(x), 1, DIM)
    if w["pos_embed"].shape[1] == x.shape[1]:
        x = torch.cat([token, x + w["pos_embed"]], dim=1)
    else:
        x = torch.cat([token, x], dim=1) + w["pos_embed"]
    for index in range(DEPTH):
        at = f"blocks.{index}."
        qkv = linear(norm(x, at + "norm1"), at + "attn.qkv").unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        context = F.scaled_dot_product_attention(*qkv).transpose(1, 2).flatten(2)
        x = x + scales[2 * index] * linear(context, at + "attn.proj")
        hidden = F.gelu(linear(norm(x, at + "norm2"), at + "mlp.fc1"), approximate=approximate)
        x = x + scales[2 * index + 1] * linear(hidden, at + "mlp.fc2")
    return norm(x, "norm")


def images(seed, batch=3):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, 2, 8, 12, generator=generator, dtype=torch.float64)


def same(actual, truth):
    """Upstream keeps the residual in fp32: roundoffs of 6e-8 of numbers up to 20, through three blocks."""
    torch.testing.assert_close(actual.double(), truth, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shape", [{}, dict(no_embed_class=True), dict(qkv_bias=False)])
@pytest.mark.parametrize(
    "options", [{}, dict(use_flash_attn=True), dict(fused_dropout_add_ln=True, fused_bias_fc=True)]
)
def test_features_and_logits_are_those_of_the_formula(options, shape, seed):
    checkpoint = timm_checkpoint(seed, **shape)
    before = dict(checkpoint)
    model = plain.loaded(VisionTransformer(**SIZES, **shape, **options), checkpoint)
    assert checkpoint.keys() == before.keys() and all(checkpoint[key] is before[key] for key in before)
    x = images(seed).requires_grad_()
    truth_x = images(seed).requires_grad_()
    truth = features(checkpoint, truth_x)
    same(model.forward_features(x), truth)
    same(model.forward_features(x, all_tokens=False), truth[:, :1])
    same(model.forward_head(truth, pre_logits=True), truth[:, 0])
    logits = F.linear(truth[:, 0], checkpoint["head.weight"], checkpoint["head.bias"])
    same(model(x), logits)
    weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(seed)).double()
    (expected,) = torch.autograd.grad(logits, truth_x, weights)
    (gradient,) = torch.autograd.grad(model(x), x, weights)
    same(gradient, expected)


def test_fused_mlp_has_the_approximate_gelu(seed):
    checkpoint = timm_checkpoint(seed)
    model = plain.loaded(VisionTransformer(**SIZES, fused_mlp=True), checkpoint)
    same(model.forward_features(images(seed)), features(checkpoint, images(seed), approximate="tanh"))
    with pytest.raises(UnsupportedProblem, match=r"act_layer ReLU"):
        VisionTransformer(**SIZES, fused_mlp=True, act_layer=torch.nn.ReLU)


def test_its_own_names_are_loaded_too(seed):
    model = plain.loaded(VisionTransformer(**SIZES), timm_checkpoint(seed))
    other = plain.loaded(VisionTransformer(**SIZES), model.state_dict())
    assert torch.equal(other(images(seed)), model(images(seed)))
    assert "blocks.2.mixer.Wq.weight" in model.state_dict() and "blocks.1.mixer.Wqkv.weight" in model.state_dict()


def test_no_head_and_other_activation(seed):
    checkpoint = {key: x for key, x in timm_checkpoint(seed).items() if not key.startswith("head.")}
    tanh = partial(torch.nn.GELU, approximate="tanh")
    model = plain.loaded(VisionTransformer(**SIZES | dict(num_classes=0), act_layer=tanh), checkpoint)
    same(model(images(seed)), features(checkpoint, images(seed), approximate="tanh")[:, 0])


@pytest.mark.parametrize("fused", [False, True])
def test_dropped_paths_leave_out_whole_samples(fused, seed):
    torch.manual_seed(seed)
    model = VisionTransformer(**SIZES | dict(num_classes=0), drop_path_rate=1.0, fused_dropout_add_ln=fused)
    rates = [(block.drop_path1.p, block.drop_path2.p) for block in model.blocks]
    assert rates == [(0.0, 0.0), (0.0, 0.5), (0.5, 1.0)] and model.drop_path.p == 1.0
    checkpoint = {key: x for key, x in timm_checkpoint(seed).items() if not key.startswith("head.")}
    plain.loaded(model, checkpoint)
    same(model(images(seed)), features(checkpoint, images(seed))[:, 0])
    image = images(seed, batch=1)
    cases = [
        features(checkpoint, image, scales=(1.0, 1.0, attention, mlp, 0.0, 0.0))[:, 0]
        for attention in (0.0, 2.0)
        for mlp in (0.0, 2.0)
    ]
    model.train()
    distances = torch.cdist(model(image.expand(128, -1, -1, -1)).double(), torch.cat(cases))
    # that one of four equally likely cases misses is as likely as 4 * 0.75^128, 4e-16
    assert distances.min(dim=1).values.max() < 1e-3 and distances.argmin(dim=1).unique().numel() == 4


def test_dropout_acts_while_training_only(seed):
    torch.manual_seed(seed)
    for rates in (dict(drop_rate=0.5), dict(attn_drop_rate=0.5)):
        model = plain.loaded(VisionTransformer(**SIZES, **rates), timm_checkpoint(seed))
        assert torch.equal(model(images(seed)), model(images(seed)))
        model.train()
        assert not torch.equal(model(images(seed)), model(images(seed)))


def test_weights_begin_as_timms(seed):
    torch.manual_seed(seed)
    model = VisionTransformer(**SIZES | dict(embed_dim=128))
    # truncated at 100 deviations; of n numbers the deviation is off by 1 / sqrt(2 n), n = 49152
    assert model.blocks[0].mixer.Wqkv.weight.std().item() == pytest.approx(0.02, rel=0.03)
    assert model.blocks[0].mixer.Wqkv.bias.count_nonzero() == 0
    assert 0 < model.cls_token.abs().max() < 1e-5 and model.no_weight_decay() == {"pos_embed", "cls_token"}


def test_vit_base():
    with torch.device("meta"):
        model = vit_base_patch16_224(num_classes=5)
    assert sum(x.numel() for x in model.parameters()) == 85_798_656 + 5 * 769
    with pytest.raises(UnsupportedProblem, match="pretrained must be False, got True"):
        vit_base_patch16_224(pretrained=True)


@pytest.mark.parametrize(
    "words",
    [
        dict(global_pool="avg"),
        dict(class_token=False),
        dict(init_values=1e-5),
        dict(weight_init="jax"),
        dict(fc_norm=True),
        dict(pre_norm=True),
    ],
)
def test_what_upstream_does_not_do_is_named(words):
    (name,) = words
    with pytest.raises(UnsupportedProblem, match=f"{name} must be"):
        VisionTransformer(**SIZES, **words)


def test_parts_are_offered():
    mixer = vit.create_mixer_cls(4, True, 0.0, False, False, cross_attn=True)(DIM)
    assert mixer.cross_attn and hasattr(mixer, "Wq")
