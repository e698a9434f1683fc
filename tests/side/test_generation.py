"""Decoding with a tiny model, and the choice of tokens."""

import logging
from types import SimpleNamespace

import pytest
import torch

from flash_attn.utils import generation
from flash_attn.utils.generation import InferenceParams, decode, sample
from tests.support.tiny_gpt import VOCAB, TinyGPT


@pytest.fixture
def model(seed):
    torch.manual_seed(seed)
    return TinyGPT().eval()


@pytest.fixture
def prompt(seed):
    torch.manual_seed(seed)
    return torch.randint(VOCAB, (3, 4))


def test_greedy_decoding_is_argmax_of_the_whole_sequence(model, prompt):
    output = model.generate(prompt, 10, return_dict_in_generate=True, output_scores=True)
    assert output.sequences.shape == (3, 10) and len(output.scores) == 6
    with torch.no_grad():
        logits = model(output.sequences).logits[:, 3:-1]
    torch.testing.assert_close(torch.stack(output.scores, 1), logits, rtol=1e-4, atol=1e-4)
    assert torch.equal(output.sequences[:, 4:], torch.stack(output.scores, 1).argmax(-1))
    assert torch.equal(model.generate(prompt, 10), output.sequences)


def test_teacher_vocabulary_and_streamer(model, prompt):
    teacher = torch.cat([prompt, torch.tensor([[1, 2], [3, 4], [5, 6]])], dim=1)
    seen = []
    streamer = SimpleNamespace(put=seen.append, end=lambda: seen.append("end"))
    output = decode(prompt, model, 9, teacher_outputs=teacher, vocab_size=7, streamer=streamer)
    assert torch.equal(output.sequences[:, :6], teacher)
    assert output.sequences[:, 6:].max() < 7 and output.scores[0].shape == (3, 7)
    assert torch.equal(seen[0], prompt) and seen[-1] == "end" and len(seen) == 2 + 5


def test_decoding_stops_where_all_sequences_end(model, prompt):
    model.head.bias.data[5] += 100
    assert decode(prompt, model, 10, eos_token_id=5).sequences.shape == (3, 5)


def test_sampling_draws_from_the_softmax(seed):
    torch.manual_seed(seed)
    logits = torch.tensor([0.0, 1.0, 2.0, 3.0]).repeat(20000, 1)
    kept_two = torch.tensor([0.0, 0.0, 1.0, 2.718281828])
    for arguments, weights in (
        (dict(top_k=0), logits[0].exp()),
        (dict(top_k=0, temperature=2.0), (logits[0] / 2).exp()),
        (dict(top_k=2), kept_two),
        (dict(top_k=0, top_p=0.8), kept_two),
        (dict(top_k=3, top_p=0.5), torch.tensor([0.0, 0.0, 0.0, 1.0])),
    ):
        before = logits.clone()
        counts = sample(logits, **arguments).bincount(minlength=4) / 20000
        assert torch.equal(logits, before)
        torch.testing.assert_close(counts, weights / weights.sum(), rtol=0, atol=6 * 0.5 / 20000**0.5)
    assert torch.equal(sample(logits[:3]), torch.tensor([3, 3, 3]))


def test_filters_work_in_place():
    logits = torch.tensor([[0.0, 3.0, 1.0, 2.0]])
    generation.modify_logits_for_top_k_filtering(logits, 2)
    assert logits.isinf().tolist() == [[True, False, True, False]]
    generation.modify_logits_for_top_p_filtering(logits, 0.5)
    assert logits.isinf().tolist() == [[True, False, True, True]]


def test_reset_keeps_the_memory():
    params = InferenceParams(4, 2, 3, key_value_memory_dict={0: 1}, lengths_per_sample=torch.ones(2))
    params.reset(8, 1)
    assert (params.max_seqlen, params.max_batch_size, params.seqlen_offset) == (8, 1, 0)
    assert params.key_value_memory_dict == {0: 1} and params.lengths_per_sample.count_nonzero() == 0


def test_what_decoding_does_not_do_is_named(model, prompt):
    with pytest.raises(ValueError, match=r"got 1\.5"):
        sample(torch.zeros(1, 4), top_k=0, top_p=1.5)
    with pytest.raises(NotImplementedError, match="GenerationMixin"):
        generation.GenerationMixin().allocate_inference_cache(1, 2)


@pytest.mark.parametrize("enabled", [False, True])
def test_time_is_logged_and_never_printed(model, prompt, caplog, capsys, enabled):
    with caplog.at_level(logging.INFO, logger="flash_attn"):
        decode(prompt, model, 6, enable_timing=enabled)
    lines = [record.getMessage() for record in caplog.records if "decoding time" in record.getMessage()]
    assert len(lines) == enabled and all(line.endswith(" ms") for line in lines)
    assert capsys.readouterr() == ("", "")


def test_caches_for_a_number_of_layers_or_for_named_ones():
    caches = generation.allocate_inference_cache(2, 5, 3, 8, 2, "cpu", torch.float32)
    assert list(caches) == [0, 1] and all(x.shape == (2, 5, 2, 3, 8) for x in caches.values())
    assert list(generation.allocate_inference_cache(2, 5, 3, 8, [4, 7], "cpu")) == [4, 7]
    assert caches[0].dtype == torch.float32
    with pytest.raises(ValueError, match="int32"):
        generation.allocate_inference_cache(2, 5, 3, 8, 2, "cpu", torch.int32)
