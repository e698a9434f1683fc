"""Checkpoints whose own code transformers does not have, Baichuan, BTLM and Meta's Llama, against their formulas."""

import json
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from flash_attn.models import baichuan, btlm, llama
from flash_attn.models.gpt import GPTLMHeadModel, combine_state_dicts_tp
from tests.models import plain
from tests.models.plain import DIM, HEADS, INNER, LAYERS, VOCABULARY

HEADDIM = DIM // HEADS
SLOPES = torch.tensor([0.25, 0.0625, 0.015625, 0.00390625], dtype=torch.float64)
LLAMA_FIELDS = dict(
    activation_function="swiglu", rms_norm=True, tie_word_embeddings=False, rotary_emb_fraction=1.0
) | dict.fromkeys(("qkv_proj_bias", "out_proj_bias", "mlp_fc1_bias", "mlp_fc2_bias"), False)


def heads(x, nheads=HEADS):
    return x.unflatten(-1, (nheads, -1))


def layers(template, shapes):
    return {template.format(index) + name: shape for index in range(LAYERS) for name, shape in shapes.items()}


def baichuan_checkpoint(seed):
    shapes = {"model.embed_tokens.weight": (VOCABULARY, DIM), "model.norm.weight": (DIM,)}
    shapes |= layers(
        "model.layers.{}.",
        {
            "input_layernorm.weight": (DIM,),
            "post_attention_layernorm.weight": (DIM,),
            "self_attn.W_pack.weight": (3 * DIM, DIM),
            "self_attn.o_proj.weight": (DIM, DIM),
            "self_attn.rotary_emb.inv_freq": (HEADDIM // 2,),
            "mlp.gate_proj.weight": (INNER, DIM),
            "mlp.up_proj.weight": (INNER, DIM),
            "mlp.down_proj.weight": (DIM, INNER),
        },
    )
    return plain.state_dict_like(shapes | {"lm_head.weight": (VOCABULARY, DIM)}, seed)


def baichuan_logits(w, ids, alibi, norm_head):
    x = w["model.embed_tokens.weight"][ids]
    for index in range(LAYERS):
        at = f"model.layers.{index}."
        y = plain.rms_norm(x, w[at + "input_layernorm.weight"], 1e-5)
        q, k, v = (heads(each) for each in (y @ w[at + "self_attn.W_pack.weight"].T).chunk(3, -1))
        if not alibi:
            q, k = plain.rotated_halves(q), plain.rotated_halves(k)
        context = plain.attention(q, k, v, HEADDIM**-0.5, SLOPES if alibi else None)
        x = x + context @ w[at + "self_attn.o_proj.weight"].T
        y = plain.rms_norm(x, w[at + "post_attention_layernorm.weight"], 1e-5)
        x = x + plain.gated(y, *(w[f"{at}mlp.{name}_proj.weight"] for name in ("gate", "up", "down")))
    head = w["lm_head.weight"]
    head = head / head.norm(dim=1, keepdim=True) if norm_head else head
    return plain.rms_norm(x, w["model.norm.weight"], 1e-5) @ head.T


@pytest.mark.parametrize("norm_head", [False, True])
@pytest.mark.parametrize("alibi", [False, True])
def test_baichuan_computes_its_formula(alibi, norm_head, seed):
    checkpoint = baichuan_checkpoint(seed)
    config = plain.gpt_config(**LLAMA_FIELDS, norm_head=norm_head, use_alibi=alibi, use_flash_attn=alibi)
    config.rotary_emb_fraction = 0.0 if alibi else 1.0
    model = plain.loaded(GPTLMHeadModel(config), baichuan.remap_state_dict_hf_baichuan(checkpoint, config))
    ids = torch.randint(VOCABULARY, (2, 9), generator=torch.Generator().manual_seed(seed))
    plain.same(model(ids).logits, baichuan_logits(checkpoint, ids, alibi, norm_head))


def btlm_checkpoint(seed, positions):
    shapes = {"transformer.wte.weight": (VOCABULARY, DIM), "transformer.relative_pe.slopes": (HEADS,)}
    if positions:
        shapes["transformer.wpe.weight"] = (positions, DIM)
    linears = {"attn.c_attn": (DIM, 3 * DIM), "attn.c_proj": (DIM, DIM)}
    linears |= {"mlp.c_fc": (DIM, INNER), "mlp.c_fc2": (DIM, INNER), "mlp.c_proj": (INNER, DIM)}
    shapes |= layers("transformer.h.{}.", {f"{name}.weight": shape for name, shape in linears.items()})
    shapes |= layers("transformer.h.{}.", {f"{name}.bias": shape[1:] for name, shape in linears.items()})
    norms = {f"ln_{which}.{name}": (DIM,) for which in (1, 2) for name in ("weight", "bias")}
    shapes |= layers("transformer.h.{}.", norms)
    return plain.state_dict_like(shapes | {f"transformer.ln_f.{name}": (DIM,) for name in ("weight", "bias")}, seed)


def btlm_logits(w, ids, config):
    def linear(x, name):
        return x @ w[name + ".weight"] + w[name + ".bias"]

    def norm(x, name):
        return F.layer_norm(x, (DIM,), w[name + ".weight"], w[name + ".bias"], 1e-5)

    x = w["transformer.wte.weight"][ids]
    if "transformer.wpe.weight" in w:
        x = x + w["transformer.wpe.weight"][: ids.shape[1]]
    x = x * config.mup_embeddings_multiplier
    scale = HEADDIM ** (-1.0 if config.mup_scale_qk_dot_by_d else -0.5)
    for index in range(LAYERS):
        at = f"transformer.h.{index}."
        q, k, v = (heads(each) for each in linear(norm(x, at + "ln_1"), at + "attn.c_attn").chunk(3, -1))
        x = x + linear(plain.attention(q, k, v, scale, SLOPES if config.use_alibi else None), at + "attn.c_proj")
        y = norm(x, at + "ln_2")
        x = x + linear(linear(y, at + "mlp.c_fc") * F.silu(linear(y, at + "mlp.c_fc2")), at + "mlp.c_proj")
    logits = norm(x, "transformer.ln_f") @ w["transformer.wte.weight"].T
    return logits * config.mup_output_multiplier * config.mup_width_scale


@pytest.mark.parametrize("by_d", [False, True])
@pytest.mark.parametrize("alibi", [False, True])
def test_btlm_computes_its_formula(alibi, by_d, seed):
    positions = 0 if alibi else 12
    checkpoint = btlm_checkpoint(seed, positions)
    config = plain.gpt_config(
        activation_function="swiglu",
        max_position_embeddings=positions,
        use_alibi=alibi,
        use_flash_attn=alibi,
        mup_width_scale=0.5,
        mup_embeddings_multiplier=1.7,
        mup_output_multiplier=2.2,
        mup_scale_qk_dot_by_d=by_d,
    )
    model = plain.loaded(GPTLMHeadModel(config), btlm.remap_state_dict_hf_btlm(checkpoint, config))
    ids = torch.randint(VOCABULARY, (2, 9), generator=torch.Generator().manual_seed(seed))
    plain.same(model(ids).logits, btlm_logits(checkpoint, ids, config))


META_SHAPES = {"tok_embeddings.weight": (VOCABULARY, DIM), "norm.weight": (DIM,), "output.weight": (VOCABULARY, DIM)}
META_LAYER = {
    "attention_norm.weight": (DIM,),
    "ffn_norm.weight": (DIM,),
    "attention.wq.weight": (DIM, DIM),
    "attention.wk.weight": (DIM // 2, DIM),
    "attention.wv.weight": (DIM // 2, DIM),
    "attention.wo.weight": (DIM, DIM),
    "attention.inner_attention.rope.freqs": (HEADDIM // 2,),
    "feed_forward.w1.weight": (INNER, DIM),
    "feed_forward.w2.weight": (DIM, INNER),
    "feed_forward.w3.weight": (INNER, DIM),
}
SPLIT_ALONG_FEATURES = ("tok_embeddings", "attention.wo", "feed_forward.w2")


def meta_logits(w, ids, base):
    x = w["tok_embeddings.weight"][ids]
    for index in range(LAYERS):
        at = f"layers.{index}."
        y = plain.rms_norm(x, w[at + "attention_norm.weight"], 1e-5)
        q, k, v = (y @ w[f"{at}attention.w{name}.weight"].T for name in "qkv")
        q, k = plain.rotated_pairs(heads(q), base), plain.rotated_pairs(heads(k, 2), base)
        x = x + plain.attention(q, k, heads(v, 2), HEADDIM**-0.5) @ w[at + "attention.wo.weight"].T
        y = plain.rms_norm(x, w[at + "ffn_norm.weight"], 1e-5)
        x = x + plain.gated(y, *(w[f"{at}feed_forward.w{which}.weight"] for which in (1, 3, 2)))
    return plain.rms_norm(x, w["norm.weight"], 1e-5) @ w["output.weight"].T


def meta_shard(checkpoint, rank, world_size):
    shard = {}
    for name, tensor in checkpoint.items():
        dim = 1 if any(part in name for part in SPLIT_ALONG_FEATURES) else 0
        shard[name] = tensor if tensor.dim() == 1 else tensor.chunk(world_size, dim)[rank].clone()
    return shard


@pytest.mark.parametrize("world_size", [1, 2])
def test_meta_llama_computes_its_formula_whole_and_from_shards(world_size, seed, tmp_path):
    checkpoint = plain.state_dict_like(META_SHAPES | layers("layers.{}.", META_LAYER), seed)
    config = plain.gpt_config(
        **LLAMA_FIELDS, n_head_kv=2, rotary_emb_interleaved=True, rotary_emb_base=500.0, pad_vocab_size_multiple=1
    )
    for rank in range(world_size):
        torch.save(meta_shard(checkpoint, rank, world_size), tmp_path / f"consolidated.{rank:02d}.pth")
    shards = llama.state_dicts_from_checkpoint(tmp_path.parent, tmp_path.name)
    assert len(shards) == world_size
    remapped = [llama.remap_state_dict_meta_llama(shard, config) for shard in shards]
    model = plain.loaded(GPTLMHeadModel(config), combine_state_dicts_tp(remapped, config))
    ids = torch.randint(VOCABULARY, (2, 9), generator=torch.Generator().manual_seed(seed))
    plain.same(model(ids).logits, meta_logits(checkpoint, ids, 500.0))


@pytest.mark.parametrize(
    ("params", "intermediate_size", "vocab_size"),
    [
        (dict(dim=4096, n_heads=32, n_layers=32, norm_eps=1e-6, multiple_of=256, vocab_size=-1), 11008, 32000),
        (
            dict(dim=8192, n_heads=64, n_kv_heads=8, n_layers=80, norm_eps=1e-5, multiple_of=4096)
            | dict(ffn_dim_multiplier=1.3, rope_theta=5e5, vocab_size=128256),
            28672,
            128256,
        ),
    ],
)
def test_meta_params_become_a_configuration(params, intermediate_size, vocab_size, tmp_path):
    pytest.importorskip("transformers")
    (tmp_path / "params.json").write_text(json.dumps(params))
    config = llama.config_from_checkpoint(tmp_path.parent, tmp_path.name)
    converted = llama.llama_config_to_gpt2_config(config)
    assert converted.n_inner == config.intermediate_size == intermediate_size
    assert converted.vocab_size == vocab_size and converted.n_positions == 0
    assert converted.n_head_kv == params.get("n_kv_heads", params["n_heads"])
    assert converted.rotary_emb_base == params.get("rope_theta", 1e4)
    assert converted.layer_norm_epsilon == params["norm_eps"]


def test_hugging_face_checkpoint_becomes_a_configuration(tmp_path):
    transformers = pytest.importorskip("transformers")
    transformers.LlamaConfig(hidden_size=48, num_attention_heads=4).save_pretrained(tmp_path / "7B-hf")
    assert llama.config_from_checkpoint(tmp_path, "7B", checkpoint_format="hf").hidden_size == 48


@pytest.mark.parametrize(
    ("hidden_size", "vocab_size", "rotary", "norm_head"), [(4096, 64000, True, False), (5120, 125696, False, True)]
)
def test_baichuan_sizes_tell_its_kind(hidden_size, vocab_size, rotary, norm_head):
    pytest.importorskip("transformers")
    sizes = dict(hidden_size=hidden_size, vocab_size=vocab_size, num_hidden_layers=3, num_attention_heads=40)
    others = dict(intermediate_size=11008, rms_norm_eps=1e-6, initializer_range=0.02)
    ids = dict(bos_token_id=1, eos_token_id=2, pad_token_id=0)
    config = baichuan.baichuan_config_to_gpt2_config(SimpleNamespace(**sizes, **others, **ids))
    assert (config.rotary_emb_fraction > 0) == rotary == (not config.use_alibi) == (not config.use_flash_attn)
    assert config.norm_head == norm_head and not config.tie_word_embeddings and config.rms_norm


@pytest.mark.parametrize("kind", ["alibi", "learned"])
def test_btlm_configuration_is_converted(kind):
    pytest.importorskip("transformers")
    words = plain.gpt_config(activation_function="swiglu", bos_token_id=1, eos_token_id=2, n_positions=50)
    mup = dict(mup_width_scale=0.1, mup_embeddings_scale=14.6, mup_output_alpha=2.2, mup_scale_qk_dot_by_d=True)
    config = btlm.btlm_config_to_gpt2_config(SimpleNamespace(**vars(words), **mup, position_embedding_type=kind))
    assert config.use_alibi == config.use_flash_attn == (kind == "alibi")
    assert config.n_positions == (0 if kind == "alibi" else 50)
    scales = (config.mup_width_scale, config.mup_embeddings_multiplier, config.mup_output_multiplier)
    assert scales == (0.1, 14.6, 2.2) and config.mup_scale_qk_dot_by_d
    assert GPTLMHeadModel(config).output_scale == pytest.approx(0.22)
