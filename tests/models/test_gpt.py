"""GPTLMHeadModel by itself: options, other formats, and its weights cut for ranks and put together again."""

import pytest
import torch

from flash_attn.errors import InvalidArgument, UnsupportedProblem
from flash_attn.models import gpt, gpt_block
from flash_attn.models.gpt import GPTLMHeadModel, GPTModel, combine_state_dicts_tp, shard_state_dict_tp
from flash_attn.models.state_dict import join, pad_vocabulary, rename
from flash_attn.ops.triton.mlp import FusedDenseSqreluDense
from tests.models import plain
from tests.models.plain import DIM, VOCABULARY, gpt_config

SHARED_OUT = {
    "gpt-2": dict(max_position_embeddings=12),
    "groups of heads, gates": dict(
        n_head_kv=2, activation_function="swiglu", tie_word_embeddings=False, lm_head_bias=True
    ),
    "uneven groups, gates and features": dict(
        num_attention_heads=6, n_head_kv=3, activation_function="glu", n_inner=11
    ),
    "one MLP of default size, no biases": dict(n_inner=None, qkv_proj_bias=False, mlp_fc2_bias=False),
}


def model_of(seed, **fields):
    config = gpt_config(**fields)
    model = GPTLMHeadModel(config)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    state_dict = plain.state_dict_like(shapes, seed)
    if getattr(config, "tie_word_embeddings", True):
        state_dict["lm_head.weight"] = state_dict["transformer.embeddings.word_embeddings.weight"]
    return plain.loaded(model, state_dict), state_dict


def ids_of(seed, *shape):
    return torch.randint(VOCABULARY, shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("name", SHARED_OUT)
def test_shards_put_together_are_the_whole(name, world_size, seed):
    model, state_dict = model_of(seed, **SHARED_OUT[name])
    before = dict(state_dict)
    shards = [shard_state_dict_tp(state_dict, model.config, world_size, rank) for rank in range(world_size)]
    assert all(state_dict[key] is before[key] for key in before) and state_dict.keys() == before.keys()
    if world_size > 1:
        assert all(2 * shard["lm_head.weight"].shape[0] == VOCABULARY for shard in shards)
        assert "transformer.layers.0.mixer.out_proj.bias" not in shards[1]
    combined = combine_state_dicts_tp(shards, model.config)
    assert combined.keys() == state_dict.keys()
    for key, tensor in state_dict.items():
        assert torch.equal(combined[key], tensor), key


def test_shards_hold_whole_groups_of_heads():
    config = gpt_config(num_attention_heads=6, n_head_kv=3)
    key = "transformer.layers.0.mixer.Wqkv.bias"
    rows = {key: torch.arange(48)}  # 6 heads of q, 3 of k, 3 of v, of 4 features
    shards = [shard_state_dict_tp(rows, config, 2, rank)[key] for rank in range(2)]
    heads = [shard.view(-1, 4)[:, 0].div(4, rounding_mode="floor").tolist() for shard in shards]
    assert heads == [[0, 1, 2, 3, 6, 7, 9, 10], [4, 5, 8, 11]]


@pytest.mark.parametrize(
    ("world_size", "fields", "match"),
    [
        (4, {}, r"padded vocab_size \(22\) must be divisible by world_size \(4\)"),
        (5, dict(pad_vocab_size_multiple=5), r"hidden_size \(24\) must be divisible by world_size \(5\)"),
    ],
)
def test_shards_must_be_even_where_layers_need_it(world_size, fields, match):
    with pytest.raises(InvalidArgument, match=match):
        shard_state_dict_tp({}, gpt_config(**fields), world_size, 0)


def test_the_first_format_with_ln_0_is_loaded(seed):
    model, state_dict = model_of(seed, max_position_embeddings=12)
    names = {
        "transformer.layers.0.norm1.": "transformer.ln_0.",
        "transformer.layers.0.norm2.": "transformer.layers.0.norm1.",
        "transformer.layers.1.norm1.": "transformer.layers.0.norm2.",
        "transformer.layers.1.norm2.": "transformer.layers.1.norm1.",
        "transformer.ln_f.": "transformer.layers.1.norm2.",
    }
    old = rename(state_dict, names)
    assert old.keys() != state_dict.keys() and len(old) == len(state_dict)
    other = GPTLMHeadModel(model.config).double()
    other.load_state_dict(old)
    for key, tensor in other.state_dict().items():
        assert torch.equal(tensor, state_dict[key]), key


def test_megatron_stores_the_heads_of_q_k_and_v_in_turn(seed):
    model, state_dict = model_of(seed, max_position_embeddings=12, vocab_size=21, pad_vocab_size_multiple=2)
    names = {
        "transformer.ln_f.": "language_model.encoder.final_layernorm.",
        "transformer.embeddings.word_embeddings.": "language_model.embedding.word_embeddings.",
        "transformer.embeddings.position_embeddings.": "language_model.embedding.position_embeddings.",
    }
    for ours, theirs in {
        "norm1.": "input_layernorm.",
        "norm2.": "post_attention_layernorm.",
        "mlp.fc1.": "mlp.dense_h_to_4h.",
        "mlp.fc2.": "mlp.dense_4h_to_h.",
        "mixer.Wqkv.": "self_attention.query_key_value.",
        "mixer.out_proj.": "self_attention.dense.",
    }.items():
        names[f"transformer.layers.#.{ours}"] = f"language_model.encoder.layers.#.{theirs}"
    checkpoint = {}
    for key, tensor in rename(state_dict, names, ("lm_head.",)).items():
        if "query_key_value" in key:
            tensor = tensor.unflatten(0, (3, 4, DIM // 4)).transpose(0, 1).flatten(0, 2)
        checkpoint[key] = tensor[:21] if "word_embeddings" in key else tensor
    checkpoint["language_model.encoder.layers.0.self_attention.rotary_emb.inv_freq"] = torch.ones(3)
    remapped = gpt.remap_state_dict_megatron(checkpoint, model.config)
    assert remapped.keys() == state_dict.keys()
    for key, tensor in state_dict.items():
        expected = torch.cat([tensor[:21], torch.zeros(1, DIM)]) if tensor.shape[0] == 22 else tensor
        assert torch.equal(remapped[key], expected), key


VARIANTS = {
    "sequential": dict(activation_function="relu", max_position_embeddings=12),
    "squared": dict(activation_function="sqrelu", max_position_embeddings=12),
    "parallel": dict(parallel_block=True, rotary_emb_fraction=0.5),
    "parallel, one norm": dict(parallel_block=True, parallel_block_tied_norm=True, max_position_embeddings=12),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_fused_options_change_nothing(name, seed):
    model, state_dict = model_of(seed, **VARIANTS[name])
    ids = ids_of(seed, 2, 9)
    truth = model(ids).logits
    sqrelu = dict(fused_mlp=False, fused_dense_sqrelu_dense=True) if name == "squared" else {}
    fused = dict(fused_mlp=True, fused_bias_fc=True, fused_dropout_add_ln=True, mlp_checkpoint_lvl=1)
    for options in (dict(use_flash_attn=True), fused | sqrelu):
        other = plain.loaded(GPTLMHeadModel(gpt_config(**VARIANTS[name], **options)), state_dict)
        plain.same(other(ids).logits, truth)
    if sqrelu:
        assert isinstance(other.transformer.layers[0].mlp, FusedDenseSqreluDense)


def test_the_residual_may_be_in_fp32(seed):
    model, state_dict = model_of(seed)
    wide = GPTLMHeadModel(gpt_config(residual_in_fp32=True)).bfloat16()
    wide.load_state_dict(state_dict)
    seen = []
    wide.transformer.layers[1].register_forward_hook(lambda layer, inputs, outputs: seen.append(outputs[1].dtype))
    ids = ids_of(seed, 2, 5)
    assert wide(ids).logits.dtype == torch.bfloat16 and seen == [torch.float32]
    model.bfloat16().transformer.layers[1].register_forward_hook(
        lambda layer, inputs, outputs: seen.append(outputs[1].dtype)
    )
    model(ids)
    assert seen == [torch.float32, torch.bfloat16]


def test_positions_may_be_given(seed):
    model, _ = model_of(seed, max_position_embeddings=12)
    ids = ids_of(seed, 2, 5)
    plain.same(model(ids, position_ids=torch.arange(5)[None]).logits, model(ids).logits)
    assert not torch.allclose(model(ids, position_ids=torch.arange(3, 8)[None]).logits, model(ids).logits)


def test_dropout_acts_while_training_only(seed):
    torch.manual_seed(seed)
    model, _ = model_of(seed, resid_pdrop=0.5, embd_pdrop=0.5, attn_pdrop=0.5, fused_dropout_add_ln=True)
    ids = ids_of(seed, 2, 5)
    assert torch.equal(model(ids).logits, model(ids).logits)
    model.train()
    assert not torch.equal(model(ids).logits, model(ids).logits)


def test_weights_begin_small_and_smaller_behind_a_residual_branch(seed):
    torch.manual_seed(seed)
    config = gpt_config(hidden_size=128, n_inner=512, initializer_range=0.5, mup_width_scale=0.25, vocab_size=512)
    model = GPTLMHeadModel(config)
    layer = model.transformer.layers[1]
    for weight, std in (
        (layer.mixer.Wqkv.weight, 0.25),
        (layer.mlp.fc1.weight, 0.25),
        (layer.mixer.out_proj.weight, 0.25 / 2),  # sqrt(2 * 2 layers)
        (layer.mlp.fc2.weight, 0.25 / 2),
    ):
        # the deviation of n normal numbers is off by 1 / sqrt(2 n) of itself, n >= 16384
        assert weight.std().item() == pytest.approx(std, rel=0.04)
        assert weight._optim == {"lr_multiplier": 0.25}
    assert layer.mlp.fc1.bias.count_nonzero() == 0
    assert model.lm_head.weight is model.transformer.embeddings.word_embeddings.weight


def test_a_configuration_of_ones_own_needs_its_fields():
    config = gpt_config()
    del config.n_inner, config.resid_pdrop
    with pytest.raises(InvalidArgument, match=r"SimpleNamespace without \['n_inner', 'resid_pdrop'\]"):
        GPTModel(config)


@pytest.mark.parametrize(
    ("error", "fields", "match"),
    [
        (InvalidArgument, dict(activation_function="tanh"), "a GPT must be one of .*got 'tanh'"),
        (InvalidArgument, dict(activation_function="gelu", fused_mlp=True), "fused_mlp must be one of .*got 'gelu'"),
        (InvalidArgument, dict(fused_dense_sqrelu_dense=True), "fused_dense_sqrelu_dense must be .*got 'gelu_new'"),
        (InvalidArgument, dict(fused_dense_sqrelu_dense=True, fused_mlp=True), "exclude each other"),
        (InvalidArgument, dict(parallel_block=True, prenorm=False), "needs prenorm=True"),
        (InvalidArgument, dict(use_alibi=True), "need use_flash_attn=True"),
        (UnsupportedProblem, dict(head_dim=7), "num_attention_heads = 6, got 7"),
    ],
)
def test_options_that_contradict_are_named(error, fields, match):
    with pytest.raises(error, match=match):
        GPTModel(gpt_config(**fields))


def test_a_layer_without_a_number_has_no_options_of_its_own():
    for fields in (dict(mlp_checkpoint_lvl=[0, 1], fused_mlp=True), dict(scale_attn_by_inverse_layer_idx=True)):
        with pytest.raises(InvalidArgument, match="needs layer_idx"):
            gpt_block.create_block(gpt_config(**fields))


def test_input_ids_have_two_dimensions(seed):
    model, _ = model_of(seed)
    with pytest.raises(InvalidArgument, match=r"got \(3,\)"):
        model(torch.zeros(3, dtype=torch.long))


def test_incomplete_and_oversized_checkpoints_are_named():
    with pytest.raises(InvalidArgument, match=r"has a\.3\.q\.weight and lacks \['a\.3\.k\.weight'\]"):
        join({"a.3.q.weight": torch.ones(1)}, ("a.#.q.", "a.#.k."), "b.#.")
    words = {"transformer.embeddings.word_embeddings.weight": torch.ones(23, 2)}
    with pytest.raises(InvalidArgument, match="has 23 tokens, the padded vocab_size is 22"):
        pad_vocabulary(words, gpt_config(), tied=True)
