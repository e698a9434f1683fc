"""transformers' own models and code paths on this package: against exact attention, with eager attention as the measure.

Two names: "flash_attention_2", behind transformers' gates, and "fa_plus", which `register()` adds.
"""

import inspect
from importlib import metadata

import pytest
import torch

import flash_attn
from flash_attn.errors import InvalidArgument, UnsupportedProblem

transformers = pytest.importorskip("transformers", minversion="5", reason="needs transformers 5 or newer")
from flash_attn.integrations import transformers as integration  # noqa: E402 - only where transformers is
from tests.clients import tiny_models as tiny  # noqa: E402 - imports transformers

FA2, PLUS = "flash_attention_2", "fa_plus"
LENGTH = 17
LENGTHS = {"plain": (17, 17, 17), "left": (13, 8, 17), "right": (17, 5, 12)}
PACKED = (6, 1, 10)
DECODERS = [name for name, model in tiny.MODELS.items() if model.decoder]


@pytest.fixture(autouse=True, scope="module")
def registered():
    assert integration.register() == PLUS
    tiny.register_exact()


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def place(request):
    """(device, dtype)."""
    return torch.device(request.param), torch.float32 if request.param == "cpu" else torch.bfloat16


def needs_the_distribution():
    if "flash_attn" not in metadata.packages_distributions():
        pytest.skip("flash-attn is not installed; `make setup` does it")


@pytest.fixture
def open_gate(monkeypatch):
    """transformers believes in a GPU; what it asks of the package stays."""
    needs_the_distribution()
    check = transformers.utils.import_utils.is_flash_attn_2_available
    matrix = getattr(transformers.modeling_flash_attention_utils, "FLASH_ATTENTION_COMPATIBILITY_MATRIX", None)
    if matrix is None:
        pytest.skip(f"transformers {transformers.__version__} keeps its checks elsewhere")
    monkeypatch.setattr(transformers.utils.import_utils, "is_torch_cuda_available", lambda: True)
    monkeypatch.setitem(matrix[2], "supported_devices", ((lambda: True, "cuda"),))
    check.cache_clear()
    yield
    check.cache_clear()


@pytest.fixture(params=[PLUS, FA2])
def implementation(request):
    """A name that models accept; flash_attention_2 on a machine without a GPU too."""
    if request.param == FA2:
        needs_the_distribution()
    if request.param == FA2 and not torch.cuda.is_available():
        request.getfixturevalue("open_gate")
    return request.param


def build(name, seed, device="cpu", **words):
    torch.manual_seed(seed)
    return tiny.build(tiny.MODELS[name], **words).to(device)


def batch(kind, seed, device="cpu", rows=3):
    """Tokens and what says which of them belong together."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(tiny.FIRST_TOKEN, tiny.VOCABULARY, (rows, LENGTH), generator=generator).to(device)
    if kind == "packed":
        positions = torch.cat([torch.arange(length) for length in PACKED]).to(device)
        return dict(input_ids=ids, position_ids=positions.expand(rows, -1), use_cache=False)
    columns, lengths = torch.arange(LENGTH), torch.tensor(LENGTHS[kind])[:, None]
    mask = columns >= LENGTH - lengths if kind == "left" else columns < lengths
    return dict(input_ids=ids, attention_mask=mask.long().to(device))


def other_text(inputs, shift):
    """Other tokens at the same places."""
    first, count = tiny.FIRST_TOKEN, tiny.VOCABULARY - tiny.FIRST_TOKEN
    return {
        name: (x - first + shift) % count + first if name.endswith("input_ids") else x for name, x in inputs.items()
    }


def compare(model, implementation, dtype, seed, inputs):
    """Logits and gradients of weights that the dtype holds exactly."""
    model = model.to(dtype)

    def run(implementation, dtype, inputs):
        sound = {name: x.to(dtype) for name, x in inputs.items() if name == "input_features"}
        return tiny.run(model, implementation, dtype, seed, **inputs | sound)

    def eager_and_truth(inputs):
        return run("eager", dtype, inputs), run("exact", torch.float64, inputs)

    shifts = range(1, 4) if dtype == torch.bfloat16 else ()
    others = (eager_and_truth(other_text(inputs, shift)) for shift in shifts)
    tiny.check(run(implementation, dtype, inputs), *eager_and_truth(inputs), dtype, others)


KEYS = "model.layers.0.self_attn.k_proj.weight"


@pytest.mark.parametrize("part", ["logits", "one row of logits", "a gradient", "a NaN"])
def test_what_is_wrong_is_noticed(part, seed):
    """However many texts eager attention is measured on."""
    model, inputs = build("llama, grouped heads", seed).bfloat16(), batch("plain", seed)
    truth = tiny.run(model, "exact", torch.float64, seed, **inputs)
    matched = tiny.run(model, "eager", torch.bfloat16, seed, **inputs)
    logits, gradients = matched.logits.clone(), dict(matched.gradients)
    if part == "a gradient":
        gradients[KEYS] = -gradients[KEYS]
    elif part == "a NaN":
        gradients[KEYS] = gradients[KEYS].clone().index_fill_(0, torch.tensor(0), torch.nan)
    else:
        logits[0 if "row" in part else slice(None)] *= 0.7
    wrong = tiny.Pass(logits, gradients, matched.terms)
    with pytest.raises(AssertionError, match="allowed"):
        tiny.check(wrong, matched, truth, torch.bfloat16, [(matched, truth)] * 3)


def test_the_gates_find_the_package(open_gate):
    utils = transformers.utils
    assert utils.is_flash_attn_2_available()
    assert utils.import_utils.is_flash_attn_greater_or_equal("2.8.0")
    assert not utils.import_utils._is_package_available("flash_attn_interface")[0]
    model = tiny.build(tiny.MODELS["llama, grouped heads"])
    model.set_attn_implementation(FA2)
    assert model.config._attn_implementation == FA2
    functions, _ = transformers.modeling_flash_attention_utils.lazy_import_flash_attention(FA2)
    assert functions[:2] == (flash_attn.flash_attn_func, flash_attn.flash_attn_varlen_func)
    assert inspect.unwrap(functions[2]) is flash_attn.flash_attn_with_kvcache


@pytest.mark.parametrize("kind", [*LENGTHS, "packed"])
@pytest.mark.parametrize("name", tiny.MODELS)
def test_logits_and_gradients(name, kind, implementation, place, seed):
    device, dtype = place
    model = build(name, seed, device)
    if kind == "packed" and not tiny.MODELS[name].packs:
        pytest.skip("eager attention does not separate this model's packed sequences")
    if implementation == FA2 and tiny.MODELS[name].sinks:
        pytest.skip("transformers gives this model other kernels than flash_attention_2")
    if implementation == FA2 and name == "gpt2" and dtype == torch.float32:
        pytest.skip("transformers' own integration finds no dtype for a layer without nn.Linear")
    rows = 1 if implementation == FA2 and kind == "packed" else 3  # flash_attention_2 packs a single row
    compare(model, implementation, dtype, seed, batch(kind, seed, device, rows))


@pytest.mark.parametrize("name", [name for name in DECODERS if tiny.MODELS[name].packs])
def test_packed_sequences_do_not_see_each_other(name, seed):
    model, inputs = build(name, seed), batch("packed", seed)

    def apart(implementation, dtype):
        other = tiny.with_attention(model, implementation, dtype)
        return torch.cat([other(ids).logits for ids in inputs["input_ids"].split(PACKED, dim=1)], dim=1)

    with torch.no_grad():
        together = tiny.with_attention(model, PLUS, torch.float32)(**inputs).logits
        tiny.check_logits(together, apart("eager", torch.float32), apart("exact", torch.float64), torch.float32)


@pytest.mark.parametrize("kind", LENGTHS)
@pytest.mark.parametrize("lengths", [(9, 17), (17, 17), (17, 9)], ids=str)
def test_cross_attention_keeps_every_query(lengths, kind, place, seed):
    """BART over padded texts; flash_attention_2 takes the mask of the keys for that of the queries there."""
    device, dtype = place
    seqlen_q, seqlen_k = lengths
    torch.manual_seed(seed)
    config = transformers.BartConfig(
        vocab_size=tiny.VOCABULARY, d_model=32, encoder_layers=1, decoder_layers=2, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=40, decoder_ffn_dim=40, max_position_embeddings=64, init_std=0.3,
        dropout=0.0,
    )  # fmt: skip
    model = (
        transformers.BartForConditionalGeneration._from_config(config, attn_implementation="eager").eval().to(device)
    )
    source, target = batch(kind, seed, device), batch("plain", seed + 1, device)
    columns = slice(-seqlen_k, None) if kind == "left" else slice(seqlen_k)
    inputs = dict(
        input_ids=source["input_ids"][:, columns],
        attention_mask=source["attention_mask"][:, columns],
        decoder_input_ids=target["input_ids"][:, :seqlen_q],
        decoder_attention_mask=target["attention_mask"][:, :seqlen_q],
    )
    compare(model, PLUS, dtype, seed, inputs)


def whisper(seed):
    torch.manual_seed(seed)
    config = transformers.WhisperConfig(
        vocab_size=tiny.VOCABULARY, num_mel_bins=8, d_model=32, encoder_layers=1, decoder_layers=2, init_std=0.3,
        encoder_attention_heads=4, decoder_attention_heads=4, encoder_ffn_dim=40, decoder_ffn_dim=40, dropout=0.0,
        max_source_positions=19, max_target_positions=40, pad_token_id=tiny.PAD, bos_token_id=tiny.BOS,
        eos_token_id=tiny.EOS, decoder_start_token_id=tiny.BOS,
    )  # fmt: skip
    return transformers.WhisperForConditionalGeneration._from_config(config, attn_implementation="eager").eval()


def test_whisper(implementation, place, seed):
    device, dtype = place
    sound = torch.randn(3, 8, 38, generator=torch.Generator().manual_seed(seed)).to(device, dtype)
    inputs = dict(input_features=sound, decoder_input_ids=batch("plain", seed, device)["input_ids"])
    compare(whisper(seed).to(device), implementation, dtype, seed, inputs)


def generate(model, implementation, inputs, **words):
    model.set_attn_implementation(implementation)
    words = dict(max_new_tokens=20, min_new_tokens=20, do_sample=False) | words
    return model.generate(**inputs, **words)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("name", DECODERS)
def test_generate_gives_the_tokens_of_eager_attention(name, cache, seed):
    """In fp32 on the CPU, over prompts padded on the left; windows pass their length on the way."""
    model, prompts = build(name, seed), batch("left", seed)
    expected = generate(model, "eager", prompts)
    assert torch.equal(generate(model, PLUS, prompts, cache_implementation=cache), expected)


@pytest.mark.parametrize("name", ["llama, grouped heads", "gemma2, softcap and window in turn"])
def test_generate_through_flash_attention_2(name, seed, open_gate):
    model, prompts = build(name, seed), batch("left", seed)
    assert torch.equal(generate(model, FA2, prompts), generate(model, "eager", prompts))


def test_beams_and_whisper_generate(seed):
    model, prompts = build("llama, grouped heads", seed), batch("left", seed)
    expected = generate(model, "eager", prompts, num_beams=3)
    assert torch.equal(generate(model, PLUS, prompts, num_beams=3), expected)
    model = whisper(seed)
    sound = dict(input_features=torch.randn(2, 8, 38, generator=torch.Generator().manual_seed(seed)))
    results = [generate(model, name, sound, max_new_tokens=9, min_new_tokens=9) for name in ("eager", PLUS)]
    assert torch.equal(*results)


@pytest.mark.gpu
@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("name", ["llama, grouped heads", "gemma2, softcap and window in turn"])
def test_generate_on_a_gpu_gives_the_tokens_of_eager_attention(name, cache, seed):
    """In fp32, which fa_plus computes exactly; transformers compiles the model for a static cache."""
    model, prompts = build(name, seed, "cuda"), batch("left", seed, "cuda")
    expected = generate(model, "eager", prompts)
    assert torch.equal(generate(model, PLUS, prompts, cache_implementation=cache), expected)


def in_one_batch(model, implementation, prompts):
    """Continuous batching over a paged cache; every prompt's new tokens."""
    model.set_attn_implementation(implementation)
    results = model.generate_batch(
        prompts,
        generation_config=transformers.GenerationConfig(
            max_new_tokens=12, do_sample=False, eos_token_id=-1, pad_token_id=tiny.PAD
        ),
        continuous_batching_config=transformers.ContinuousBatchingConfig(
            block_size=8 if model.device.type == "cpu" else 256, num_blocks=32, max_batch_tokens=16
        ),
        progress_bar=False,
    )
    return [results[name].generated_tokens for name in sorted(results)]


@pytest.mark.parametrize("name", ["llama, grouped heads", "mistral, window", "gemma2, softcap and window in turn"])
def test_continuous_batching_gives_the_tokens_of_one_prompt_at_a_time(name, implementation, place, seed):
    """Prompts of more tokens than a step takes, too. In fp32 everywhere."""
    if not hasattr(transformers, "ContinuousBatchingConfig"):
        pytest.skip(f"transformers {transformers.__version__} configures continuous batching otherwise")
    if implementation == FA2 and "llama" not in name:
        pytest.skip(
            "transformers' own paged path leaves out the softcap, and a window that is not the module's attribute"
        )
    model = build(name, seed, place[0])
    generator = torch.Generator().manual_seed(seed)
    prompts = [
        torch.randint(tiny.FIRST_TOKEN, tiny.VOCABULARY, (n,), generator=generator).tolist() for n in (5, 19, 3, 12)
    ]
    expected = []
    for prompt in prompts:
        ids = torch.tensor([prompt], device=place[0])
        words = dict(max_new_tokens=12, min_new_tokens=12, eos_token_id=None)
        tokens = generate(model, "eager", dict(input_ids=ids, attention_mask=torch.ones_like(ids)), **words)
        expected.append(tokens[0, len(prompt) :].tolist())
    try:
        found = in_one_batch(model, f"paged|{implementation}", prompts)
    except ValueError as error:
        if implementation == PLUS and "not supported for continuous batching" in str(error):
            pytest.skip(f"transformers {transformers.__version__} accepts its own names only")
        raise
    assert found == expected


def test_a_compiled_model_has_no_graph_break(place, seed, unpoisoned):
    device, dtype = place
    model = tiny.with_attention(build("mistral, window", seed, device, num_hidden_layers=1), PLUS, dtype)
    ids = batch("plain", seed, device)["input_ids"]
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    results = []
    for call in (model, compiled):
        model.zero_grad()
        logits = call(ids, use_cache=False).logits
        logits.square().sum().backward()
        results.append((logits.detach(), model.model.layers[0].self_attn.q_proj.weight.grad.clone()))
    for actual, expected in zip(*reversed(results), strict=True):
        torch.testing.assert_close(actual, expected)
    packed = batch("packed", seed, device)
    if device.type == "cpu":  # the same check ends a GPU's process
        with pytest.raises(RuntimeError, match="several packed rows need cu_seq_lens_q"):
            compiled(**packed)


@pytest.mark.parametrize("filled", [0, 6])
def test_a_static_cache_without_a_mask_ends_where_its_tokens_do(filled, seed):
    model, ids = build("llama, grouped heads", seed), batch("plain", seed)["input_ids"]
    with torch.no_grad():
        truth, matched = (
            tiny.with_attention(model, *names)(ids, use_cache=False).logits[:, filled:]
            for names in (("exact", torch.float64), ("eager", torch.float32))
        )
        model.set_attn_implementation(PLUS)
        cache = transformers.StaticCache(config=model.config, max_cache_len=30)
        if filled:
            model(ids[:, :filled], past_key_values=cache)
        tiny.check_logits(model(ids[:, filled:], past_key_values=cache).logits, matched, truth, torch.float32)


@pytest.mark.parametrize("reentrant", [True, False])
def test_dropout_in_training_repeats_under_checkpointing(reentrant, seed):
    model = build("llama, grouped heads", seed, attention_dropout=0.4)
    model.set_attn_implementation(PLUS)
    inputs = batch("left", seed)

    def gradient():
        torch.manual_seed(seed)
        model.zero_grad()
        model(**inputs).logits[inputs["attention_mask"].bool()].square().sum().backward()
        return model.model.layers[0].self_attn.k_proj.weight.grad.clone()

    without = gradient()
    model.train()
    dropped = gradient()
    assert not torch.allclose(without, dropped, rtol=1e-2)
    model.gradient_checkpointing_enable(dict(use_reentrant=reentrant))
    if reentrant:
        model.enable_input_require_grads()
    assert torch.equal(gradient(), dropped)


def test_lengths_from_a_data_collator(seed):
    """What DataCollatorWithFlattening(return_flash_attn_kwargs=True) adds to a batch."""
    model = build("qwen3, norms of q and k", seed)
    model.set_attn_implementation(PLUS)
    inputs = batch("packed", seed, rows=1)
    cu_seqlens = torch.tensor([0, *torch.tensor(PACKED).cumsum(0).tolist()])  # int64
    words = dict(cu_seq_lens_q=cu_seqlens, cu_seq_lens_k=cu_seqlens, max_length_q=10, max_length_k=10)
    with torch.no_grad():
        assert torch.equal(model(**inputs, **words).logits, model(**inputs).logits)


def test_position_ids_pack_one_row_beside_a_mask_of_ones(seed):
    """As flash_attention_2 does; eager attention does not."""
    model = build("llama, grouped heads", seed)
    model.set_attn_implementation(PLUS)
    inputs = batch("packed", seed, rows=1)
    with torch.no_grad():
        masked = model(**inputs, attention_mask=torch.ones(1, LENGTH)).logits
        assert torch.equal(masked, model(**inputs).logits)


def test_autocast_computes_in_its_dtype(seed, monkeypatch):
    seen = []
    attend = integration.flash_attn_func
    monkeypatch.setattr(integration, "flash_attn_func", lambda q, *x, **y: seen.append(q.dtype) or attend(q, *x, **y))
    model = build("qwen3, norms of q and k", seed)
    model.set_attn_implementation(PLUS)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model(batch("plain", seed)["input_ids"])
    assert seen == [torch.bfloat16] * 2


def test_what_attention_without_scores_cannot_do_is_refused(seed):
    ids = batch("plain", seed)["input_ids"]
    model = build("llama, grouped heads", seed)
    model.set_attn_implementation(PLUS)
    with pytest.raises(UnsupportedProblem, match=r"mask of \(batch_size, keys\), got one of \(3, 1, 17, 17\)"):
        model(ids, attention_mask=torch.ones(3, 1, LENGTH, LENGTH).tril() == 1)
    layer = model.model.layers[0].self_attn
    q = torch.randn(1, 4, 5, 8)
    with pytest.raises(UnsupportedProblem, match="output_attentions"):
        integration.attention_forward(layer, q, q, q, None, output_attentions=True)
    with pytest.raises(UnsupportedProblem, match="indices"):
        integration.attention_forward(layer, q, q, q, None, indices=torch.zeros(1))
    with pytest.raises(InvalidArgument, match="Linear has no is_causal"):
        integration.attention_forward(torch.nn.Linear(2, 2), q, q, q, None)
    with pytest.raises(InvalidArgument, match="mask of 3 keys does not cover 5 queries"):
        integration.attention_forward(layer, q, q, q, torch.ones(1, 3))


def test_position_biases_are_refused(seed):
    torch.manual_seed(seed)
    config = transformers.T5Config(
        vocab_size=tiny.VOCABULARY, d_model=32, d_kv=8, d_ff=40, num_layers=1, num_heads=4, decoder_start_token_id=0
    )
    model = transformers.T5EncoderModel._from_config(config, attn_implementation="eager")
    model.set_attn_implementation(PLUS)
    with pytest.raises(UnsupportedProblem, match="no position_bias"):
        model(batch("plain", seed)["input_ids"])


def test_mask_functions_of_other_kinds_are_refused(seed):
    config = tiny.build(tiny.MODELS["llama, grouped heads"]).config
    config._attn_implementation = PLUS
    config.sliding_window = 3
    packed = batch("packed", seed, rows=2)["position_ids"]
    masks = transformers.masking_utils
    embeds = torch.zeros(2, LENGTH, 32)
    words = dict(config=config, inputs_embeds=embeds, attention_mask=None, past_key_values=None)
    assert masks.create_causal_mask(**words) is None
    for create in (masks.create_causal_mask, masks.create_sliding_window_causal_mask):
        for extra in (
            dict(or_mask_function=lambda b, h, q, k: k < 3),
            dict(and_mask_function=lambda b, h, q, k: k < 3),
            dict(block_sequence_ids=torch.zeros(2, LENGTH, dtype=torch.long)),
            dict(block_sequence_ids=torch.zeros(2, LENGTH, dtype=torch.long), position_ids=packed),
        ):
            with pytest.raises(UnsupportedProblem, match="adds keys or takes others away"):
                create(**words, **extra)
    config.attention_chunk_size = LENGTH
    assert masks.create_chunked_causal_mask(**words) is None
    config.attention_chunk_size = 8
    with pytest.raises(UnsupportedProblem, match="17 keys, chunks of 8"):
        masks.create_chunked_causal_mask(**words)


def test_sinks_reach_the_functions(seed):
    layer = build("llama, grouped heads", seed).model.layers[0].self_attn
    q, sinks = torch.randn(1, 4, 5, 8), torch.randn(4)
    out, _ = integration.attention_forward(layer, q, q, q, None, s_aux=sinks)
    mask = torch.ones(5, 5, dtype=torch.bool).tril()[None, None]
    expected, _ = tiny.exact_attention(layer, *(x.double() for x in (q, q, q)), mask, s_aux=sinks)
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)
