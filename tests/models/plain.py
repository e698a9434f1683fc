"""Configurations that need no transformers, and the formulas of decoders in plain PyTorch."""

from types import SimpleNamespace

import torch
import torch.nn.functional as F

VOCABULARY, DIM, HEADS, LAYERS, INNER = 22, 24, 4, 2, 20


def gpt_config(**fields):
    """The fields of a GPT2Config that have no default, small, and others."""
    defaults = dict(
        vocab_size=VOCABULARY,
        hidden_size=DIM,
        max_position_embeddings=0,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        n_inner=INNER,
        activation_function="gelu_new",
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        layer_norm_epsilon=1e-5,
        initializer_range=0.02,
        scale_attn_weights=True,
        scale_attn_by_inverse_layer_idx=False,
        mlp_multiple_of=1,
    )
    return SimpleNamespace(**defaults | fields)


def attention(q, k, v, scale, slopes=None):
    """Causal attention of (batch, seqlen, nheads, headdim), ALiBi with slopes; groups of heads share keys."""
    k, v = (x.repeat_interleave(q.shape[2] // x.shape[2], dim=2) for x in (k, v))
    scores = scale * torch.einsum("bqhd,bkhd->bhqk", q, k)
    distance = torch.arange(q.shape[1])[:, None] - torch.arange(k.shape[1])
    if slopes is not None:
        scores = scores - slopes[:, None, None] * distance.abs()
    weights = scores.masked_fill(distance < 0, -torch.inf).softmax(-1)
    return torch.einsum("bhqk,bkhd->bqhd", weights, v).flatten(2)


def rotation(seqlen, head_dim, base):
    """(cos, sin) of each position and pair of features, computed in fp32 as these models do."""
    frequencies = 1.0 / base ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
    angle = torch.arange(seqlen, dtype=torch.float32)[:, None] * frequencies
    return angle.cos().double(), angle.sin().double()


def rotated_halves(x, base=10000.0):
    """Feature i of (batch, seqlen, nheads, headdim) with feature i + headdim / 2."""
    cos, sin = (table[:, None] for table in rotation(x.shape[1], x.shape[3], base))
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def rotated_pairs(x, base=10000.0):
    """Features 2 i and 2 i + 1 as a complex number."""
    turn = torch.complex(*rotation(x.shape[1], x.shape[3], base))[:, None]
    return torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (-1, 2))) * turn).flatten(-2)


def rms_norm(x, weight, eps):
    return x * (x.square().mean(-1, keepdim=True) + eps).rsqrt() * weight


def gated(x, gate, up, down):
    return (F.silu(x @ gate.T) * (x @ up.T)) @ down.T


def state_dict_like(shapes, seed):
    """Random tensors in fp64 under the names and with the shapes of a dictionary; vectors are near 1."""
    generator = torch.Generator().manual_seed(seed)
    state_dict = {}
    for name, shape in shapes.items():
        noise = 0.3 * torch.randn(shape, generator=generator, dtype=torch.float64)
        state_dict[name] = noise + float(len(shape) == 1)
    return state_dict


def loaded(model, state_dict):
    model = model.double().eval()
    model.load_state_dict(state_dict, strict=True)
    return model


def same(actual, truth):
    """All in fp64, the tables of a rotation in fp32 on both sides."""
    torch.testing.assert_close(actual, truth, rtol=1e-9, atol=1e-9)
