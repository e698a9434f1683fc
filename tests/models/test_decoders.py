"""Every family of decoders against transformers' own: logits, gradients, generation, names, files."""

from types import SimpleNamespace

import pytest
import torch

transformers = pytest.importorskip("transformers", minversion="5", reason="needs transformers 5 or newer")

from flash_attn.models import bigcode, falcon, gpt, gpt_neox, gptj, llama, opt  # noqa: E402
from flash_attn.models.gpt import GPTLMHeadModel, GPTModel  # noqa: E402
from flash_attn.utils.generation import InferenceParams  # noqa: E402
from tests.models.decoders import DECODERS, VOCABULARY, build, converted, gpt_config, remap  # noqa: E402

OPTIONS = {
    "plain": {},
    "kernels": dict(use_flash_attn=True, residual_in_fp32=True),
    "fused": dict(
        fused_mlp=True,
        fused_bias_fc=True,
        fused_dropout_add_ln=True,
        mlp_checkpoint_lvl=[1, 2],
        pad_vocab_size_multiple=8,
    ),
}
GREEDY = dict(max_new_tokens=6, do_sample=False, return_dict_in_generate=True, output_logits=True, pad_token_id=0)


def same(actual, truth):
    """Logits of order 1 after two layers in fp32, summed in two orders: 5e-6 apart at most in 15 * 15 runs (2026-11-22)."""
    torch.testing.assert_close(actual, truth, rtol=1e-4, atol=1e-4)


def tokens(seed, *shape):
    return torch.randint(3, VOCABULARY, shape, generator=torch.Generator().manual_seed(seed))


def clear_greedy(hf, seed):
    """A prompt and its continuation, in which rounding cannot decide which token is the largest."""
    for attempt in range(10):
        prompt = tokens(seed + attempt, 2, 5)
        truth = hf.generate(prompt, **GREEDY)
        first, second = torch.stack(truth.logits).topk(2).values.unbind(-1)
        if (first - second).min() > 1e-3:
            return prompt, truth
    raise AssertionError("no prompt has a clear continuation")


def options_for(decoder, hf, which):
    options = dict(OPTIONS[which])
    config = gpt_config(decoder, hf.config)
    if config.activation_function in ("gelu", "swiglu"):
        options.pop("fused_mlp", None)
    if not getattr(config, "prenorm", True):
        options.pop("residual_in_fp32", None)
    return options


@pytest.mark.parametrize("which", OPTIONS)
@pytest.mark.parametrize("name", DECODERS)
def test_logits_and_gradients_are_those_of_transformers(name, which, seed):
    hf = build(DECODERS[name], seed)
    ours = converted(DECODERS[name], hf, **options_for(DECODERS[name], hf, which))
    ids = tokens(seed, 3, 11)
    truth, logits = hf(ids).logits, ours(ids).logits
    assert truth.std() > 0.3
    same(logits[..., :VOCABULARY], truth)
    same(ours(ids, num_last_tokens=2).logits[..., :VOCABULARY], truth[:, -2:])
    weights = torch.randn(truth.shape, generator=torch.Generator().manual_seed(seed)) / truth.numel() ** 0.5
    (truth * weights).sum().backward()
    (logits[..., :VOCABULARY] * weights).sum().backward()
    if name == "bigcode":
        return  # its head of keys is repeated, and every copy has a gradient of its own
    tied = dict(hf.named_parameters(remove_duplicate=False))
    gradients = {key: parameter.grad for key, parameter in tied.items()}
    expected = remap(DECODERS[name], gradients, ours.config)
    actual = dict(ours.named_parameters(remove_duplicate=False))
    assert actual.keys() == expected.keys()
    for key, parameter in actual.items():
        same(parameter.grad, expected[key])


@pytest.mark.parametrize("which", ["plain", "kernels"])
@pytest.mark.parametrize("name", DECODERS)
def test_greedy_generation_is_that_of_transformers(name, which, seed):
    hf = build(DECODERS[name], seed)
    ours = converted(DECODERS[name], hf, **options_for(DECODERS[name], hf, which))
    prompt, truth = clear_greedy(hf, seed)
    output = ours.generate(
        prompt, 11, return_dict_in_generate=True, output_scores=True, teacher_outputs=truth.sequences
    )
    for scores, logits in zip(output.scores, truth.logits, strict=True):
        same(scores[:, :VOCABULARY], logits)
    assert torch.equal(ours.generate(prompt, 11, vocab_size=VOCABULARY), truth.sequences)


def test_caches_may_be_allocated_beforehand(seed):
    hf = build(DECODERS["llama"], seed)
    ours = converted(DECODERS["llama"], hf, use_flash_attn=True)
    ids = tokens(seed, 2, 7)
    params = InferenceParams(8, 3, key_value_memory_dict=ours.allocate_inference_cache(3, 8))
    assert [tuple(cache.shape) for cache in params.key_value_memory_dict.values()] == 2 * [(3, 8, 2, 2, 8)]
    cache = params.key_value_memory_dict[1]
    with torch.no_grad():
        first = ours(ids[:, :4], inference_params=params).logits
        params.seqlen_offset = 4
        rest = ours(ids[:, 4:], inference_params=params).logits
        same(torch.cat([first, rest], dim=1), hf(ids).logits)
    assert params.key_value_memory_dict[1] is cache and not cache[:2, :7].isnan().any()


@pytest.mark.parametrize("name", DECODERS)
def test_names_padding_and_given_dictionary(name, seed):
    hf = build(DECODERS[name], seed)
    config = gpt_config(DECODERS[name], hf.config, pad_vocab_size_multiple=16)
    state_dict = hf.state_dict()
    before = dict(state_dict)
    remapped = remap(DECODERS[name], state_dict, config)
    assert state_dict.keys() == before.keys() and all(state_dict[key] is before[key] for key in before)
    words = remapped["transformer.embeddings.word_embeddings.weight"]
    assert words.shape[0] == 64 == remapped["lm_head.weight"].shape[0] and words[VOCABULARY:].count_nonzero() == 0
    assert (remapped["lm_head.weight"] is words) == getattr(config, "tie_word_embeddings", True)
    assert remapped.keys() == GPTLMHeadModel(config).state_dict().keys()


INVERSES = {
    "llama": llama.inv_remap_state_dict_hf_llama,
    "llama, one head of keys, another base, biases, tied": llama.inv_remap_state_dict_hf_llama,
    "bigcode": bigcode.inv_remap_state_dict_hf_bigcode,
}


@pytest.mark.parametrize("name", INVERSES)
def test_the_inverse_gives_the_checkpoint_back(name, seed):
    hf = build(DECODERS[name], seed)
    multiple = 8 if name == "bigcode" else 1  # Llama's keeps the padding
    config = gpt_config(DECODERS[name], hf.config, pad_vocab_size_multiple=multiple)
    back = INVERSES[name](remap(DECODERS[name], hf.state_dict(), config), config)
    assert back.keys() == hf.state_dict().keys()
    for key, tensor in hf.state_dict().items():
        assert torch.equal(back[key], tensor), key


def test_the_inverse_of_llama_keeps_the_padding(seed):
    hf = build(DECODERS["llama"], seed)
    config = gpt_config(DECODERS["llama"], hf.config, pad_vocab_size_multiple=8)
    back = llama.inv_remap_state_dict_hf_llama(remap(DECODERS["llama"], hf.state_dict(), config), config)
    assert back["model.embed_tokens.weight"].shape[0] == back["lm_head.weight"].shape[0] == 64


@pytest.mark.parametrize(
    ("name", "folder"),
    [
        ("gpt2", "gpt2-tiny"),
        ("opt", "facebook/opt-tiny"),
        ("gpt-j", "EleutherAI/gpt-j-tiny"),
        ("gpt-neox", "EleutherAI/pythia-tiny"),
        ("falcon, newer", "tiiuae/falcon-tiny"),
        ("llama", "meta-llama/Llama-tiny"),
        ("bigcode", "bigcode/tiny"),
    ],
)
def test_from_pretrained_finds_the_format_by_the_name(name, folder, seed, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    hf = build(DECODERS[name], seed)
    hf.save_pretrained(folder)
    config = gpt_config(DECODERS[name], type(hf.config).from_pretrained(folder))
    ours = GPTLMHeadModel.from_pretrained(folder, config, dtype=torch.float32).eval()
    ids = tokens(seed, 2, 5)
    with torch.no_grad():
        same(ours(ids).logits, hf(ids).logits)
    with pytest.raises(NotImplementedError, match="model some/other is not supported"):
        GPTLMHeadModel.from_pretrained("some/other", config)


@pytest.mark.parametrize("name", ["llama", "gpt-neox", "gpt-j", "opt", "falcon, newer", "bigcode"])
def test_configurations_of_other_models_are_refused(name):
    config = getattr(transformers, DECODERS[name].config)(**DECODERS[name].words)
    with pytest.raises(ValueError, match=f"instance of GPT2Config, got {DECODERS[name].config}"):
        GPTModel(config)


@pytest.mark.parametrize(
    ("convert", "name", "words", "match"),
    [
        (llama.llama_config_to_gpt2_config, "LlamaConfig", dict(hidden_act="gelu"), "hidden_act 'gelu'"),
        (llama.llama_config_to_gpt2_config, "LlamaConfig", dict(head_dim=64), "head_dim must be"),
        (
            llama.llama_config_to_gpt2_config,
            "LlamaConfig",
            dict(rope_parameters=dict(rope_type="linear", rope_theta=1e4, factor=2.0)),
            "type 'linear'",
        ),
        (opt.opt_config_to_gpt2_config, "OPTConfig", dict(layerdrop=0.5), "layerdrop 0.5"),
        (falcon.falcon_config_to_gpt2_config, "FalconConfig", dict(alibi=True), "alibi True"),
        (gpt_neox.gpt_neox_config_to_gpt2_config, "GPTNeoXConfig", dict(attention_bias=False), "attention_bias False"),
    ],
)
def test_what_has_no_counterpart_is_named(convert, name, words, match):
    with pytest.raises(NotImplementedError, match=match):
        convert(getattr(transformers, name)(**words))


@pytest.mark.parametrize(
    ("name", "extra"),
    [
        ("gpt2", ["transformer.h.1.attn.bias", "transformer.h.1.attn.masked_bias"]),
        ("gpt-j", ["transformer.h.0.attn.bias", "transformer.h.0.attn.masked_bias"]),
        ("gpt-neox", [f"gpt_neox.layers.1.attention.{x}" for x in ("bias", "masked_bias", "rotary_emb.inv_freq")]),
        ("llama", ["model.layers.0.self_attn.rotary_emb.inv_freq"]),
        ("falcon, newer", ["transformer.h.0.self_attention.rotary_emb.inv_freq"]),
        ("bigcode", ["transformer.h.0.attn.bias"]),
    ],
)
def test_buffers_of_earlier_releases_are_left_out(name, extra, seed):
    hf = build(DECODERS[name], seed)
    config = gpt_config(DECODERS[name], hf.config)
    state_dict = hf.state_dict() | dict.fromkeys(extra, torch.ones(1))
    assert remap(DECODERS[name], state_dict, config).keys() == remap(DECODERS[name], hf.state_dict(), config).keys()


def without_head(state_dict, old="", new=""):
    return {key.replace(old, new, 1): x for key, x in state_dict.items() if key != "lm_head.weight"}


@pytest.mark.parametrize(
    ("name", "earlier"),
    [
        ("gpt2", lambda state_dict: without_head(state_dict, "transformer.")),
        ("opt", lambda state_dict: without_head(state_dict, "model.decoder.final_layer_norm", "decoder.layer_norm")),
        ("opt, norms behind, narrow words", lambda state_dict: without_head(state_dict, "model.decoder.", "decoder.")),
        ("bigcode", without_head),
        ("gpt-neox", lambda state_dict: {key.replace("lm_head", "embed_out"): x for key, x in state_dict.items()}),
    ],
)
def test_names_of_published_checkpoints_are_known(name, earlier, seed):
    hf = build(DECODERS[name], seed)
    config = gpt_config(DECODERS[name], hf.config)
    expected = remap(DECODERS[name], hf.state_dict(), config)
    actual = remap(DECODERS[name], earlier(hf.state_dict()), config)
    assert actual.keys() == expected.keys()
    assert all(torch.equal(actual[key], expected[key]) for key in expected)


def earlier_config(config, left_out, **fields):
    """A configuration as an earlier release wrote it."""
    words = {name: value for name, value in config.to_dict().items() if name not in left_out}
    return SimpleNamespace(**words | fields)


def test_configurations_of_earlier_releases_are_converted():
    config = earlier_config(transformers.GPTNeoXConfig(), ["rope_parameters"], rotary_pct=0.25, rotary_emb_base=9000)
    converted = gpt_neox.gpt_neox_config_to_gpt2_config(config)
    assert (converted.rotary_emb_fraction, converted.rotary_emb_base) == (0.25, 9000)

    config = earlier_config(
        transformers.LlamaConfig(), ["rope_parameters", "head_dim"], rope_theta=5e5, rope_scaling=None
    )
    assert llama.llama_config_to_gpt2_config(config).rotary_emb_base == 5e5
    config.rope_scaling = dict(type="dynamic", factor=2.0)
    with pytest.raises(NotImplementedError, match="type 'dynamic'"):
        llama.llama_config_to_gpt2_config(config)

    with pytest.raises(NotImplementedError, match=r"rotary_dim .*got None"):
        gptj.gptj_config_to_gpt2_config(earlier_config(transformers.GPTJConfig(), [], rotary_dim=None))


@pytest.mark.parametrize(
    ("fields", "nheads_k", "tied_norm"),
    [(dict(n_head_kv=8), 8, False), (dict(multi_query=True), 1, True), (dict(n_head_kv=1), 1, True)],
)
def test_falcons_own_configurations_are_converted(fields, nheads_k, tied_norm):
    left_out = ["multi_query", "new_decoder_architecture", "num_kv_heads", "num_ln_in_parallel_attn", "ffn_hidden_size"]
    left_out += ["rope_parameters", "activation"]
    sizes = dict(hidden_size=128, num_attention_heads=16)
    config = earlier_config(transformers.FalconConfig(**sizes), left_out, **fields)
    converted = falcon.falcon_config_to_gpt2_config(config)
    assert (converted.n_head_kv, converted.parallel_block_tied_norm) == (nheads_k, tied_norm)
    assert (converted.n_inner, converted.activation_function, converted.rotary_emb_base) == (512, "gelu", 10000.0)


def test_bigcode_needs_one_head_of_keys():
    config = bigcode.bigcode_config_to_gpt2_config(transformers.GPTBigCodeConfig(multi_query=False))
    for function in (bigcode.remap_state_dict_hf_bigcode, bigcode.inv_remap_state_dict_hf_bigcode):
        with pytest.raises(NotImplementedError, match="multi_query False"):
            function({}, config)


def test_gpt_offers_all_remappings():
    names = [name for name in dir(gpt) if name.startswith("remap_state_dict")]
    assert len(names) == 10
