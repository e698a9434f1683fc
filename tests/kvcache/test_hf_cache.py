"""PagedCache in transformers' generate: the same tokens as with its own cache."""

import pytest
import torch

from flash_attn.errors import InvalidArgument, OutOfPages, UnsupportedProblem

transformers = pytest.importorskip("transformers", minversion="5", reason="needs transformers 5 or newer")
from flash_attn.kvcache.hf_cache import PagedCache  # noqa: E402 - imports transformers

VOCABULARY = 97


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128, initializer_range=0.3,
        bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval()


@pytest.fixture
def prompts(seed):
    """Three prompts of 7, 11 and 4 tokens, padded on the left."""
    generator = torch.Generator().manual_seed(seed)
    ids, mask = torch.zeros(3, 11, dtype=torch.long), torch.zeros(3, 11, dtype=torch.long)
    for row, length in enumerate((7, 11, 4)):
        ids[row, -length:] = torch.randint(3, VOCABULARY, (length,), generator=generator)
        mask[row, -length:] = 1
    return dict(input_ids=ids, attention_mask=mask)


def generate(model, prompts, cache, **options):
    options = dict(max_new_tokens=12, do_sample=False) | options
    return model.generate(**prompts, past_key_values=cache, **options)


@pytest.mark.parametrize("page_size", [1, 4, 16])
@pytest.mark.parametrize(
    "options",
    [
        dict(),
        dict(num_beams=4),
        dict(num_beams=3, num_return_sequences=3, length_penalty=0.5),
        dict(do_sample=True, num_return_sequences=2),
    ],
    ids=["greedy", "beams", "three beams back", "sampled"],
)
def test_generate_gives_the_tokens_of_dynamic_cache(model, prompts, page_size, options, seed):
    paged = PagedCache(model.config, num_pages=1024 // page_size, page_size=page_size)
    torch.manual_seed(seed)
    expected = generate(model, prompts, transformers.DynamicCache(config=model.config), **options)
    torch.manual_seed(seed)
    assert torch.equal(generate(model, prompts, paged, **options), expected)
    assert paged.get_seq_length() == expected.shape[1] - 1


def test_beams_share_the_pages_of_their_prompt(model, prompts):
    paged = PagedCache(model.config, num_pages=200, page_size=1)
    generate(model, prompts, paged, num_beams=4)
    report = paged.pages.memory_report()
    assert report.pages_shared > 0
    assert report.pages_in_use < report.tokens_held == 12 * paged.get_seq_length()


def test_logits_equal_those_of_dynamic_cache_in_chunks(model, prompts):
    paged, dynamic = PagedCache(model.config, 64, 4, max_length=40), transformers.DynamicCache(config=model.config)
    ids = prompts["input_ids"]
    with torch.no_grad():
        for begin, end in ((0, 5), (5, 6), (6, 11)):
            chunk = ids[:, begin:end]
            actual, expected = (model(chunk, past_key_values=cache).logits for cache in (paged, dynamic))
            assert torch.equal(actual, expected)
    assert paged.get_max_length() == 40


def test_crop_select_and_repeat_follow_dynamic_cache(model, prompts):
    paged, dynamic = PagedCache(model.config, 64, 4), transformers.DynamicCache(config=model.config)
    ids = prompts["input_ids"]
    with torch.no_grad():
        for cache in (paged, dynamic):
            model(ids, past_key_values=cache)
            cache.crop(torch.tensor(-3))
            cache.batch_repeat_interleave(2)
            cache.batch_select_indices(torch.tensor([5, 0, 3, 3]))
            cache.reorder_cache(torch.tensor([1, 1, 0, 2]))
        assert paged.get_seq_length() == 8
        actual, expected = (model(ids[[0, 1, 2, 0], 8:], past_key_values=cache).logits for cache in (paged, dynamic))
    assert torch.equal(actual, expected)


def test_assisted_generation_crops_what_was_rejected(model, prompts):
    prompt = dict(input_ids=prompts["input_ids"][1:2], attention_mask=prompts["attention_mask"][1:2])
    expected = generate(model, prompt, None)
    paged = PagedCache(model.config, 64, 4)
    assert torch.equal(generate(model, prompt, paged, prompt_lookup_num_tokens=3), expected)


def test_reset_frees_every_page_even_after_a_failed_pass(model, prompts):
    paged = PagedCache(model.config, 64, 4)
    expected = generate(model, prompts, paged)
    paged.reset()
    assert paged.get_seq_length() == 0 and paged.pages.num_available == 64
    states = torch.zeros(3, 2, 1, 8)
    paged.update(states, states, 0)
    with pytest.raises(InvalidArgument, match="layer 0 is updated twice in one pass: it has 1 tokens"):
        paged.update(states, states, 0)
    with pytest.raises(InvalidArgument, match="not every layer"):
        paged.crop(-1)
    paged.reset()
    assert torch.equal(generate(model, prompts, paged), expected)


def test_what_does_not_fit_is_refused(model, prompts):
    with pytest.raises(OutOfPages, match="of 8 are free"):
        generate(model, prompts, PagedCache(model.config, 8, 4))
    with pytest.raises(InvalidArgument, match="got 5"):
        PagedCache(model.config, 8, 4).crop(5)
    mamba = transformers.LlamaConfig(num_hidden_layers=2)
    mamba.layer_types = ["full_attention", "linear_attention"]
    with pytest.raises(UnsupportedProblem, match="linear_attention"):
        PagedCache(mamba, 8, 4)
