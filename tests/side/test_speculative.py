"""Speculative decoding: greedily what plain decoding says, by chance from the model's own distribution."""

import copy
import logging
from types import SimpleNamespace

import pytest
import torch

from flash_attn.utils.generation import decode, decode_speculative, sample, sample_speculative
from flash_attn.utils.sampling import token_probabilities
from tests.support.tiny_gpt import VOCAB, TinyGPT

OPTIONS = {
    "all": dict(top_k=0),
    "top 3": dict(top_k=3),
    "top 80 %": dict(top_k=0, top_p=0.8),
    "hot top 4 of 90 %": dict(top_k=4, top_p=0.9, temperature=1.7),
}


def models(seed, noise, **options):
    """(a model in fp64, whose multi-token and single-token evaluations agree; a draft that errs with the noise)."""
    torch.manual_seed(seed)
    model = TinyGPT(**options).double().eval()
    for parameter in model.parameters():  # logits far enough apart that tokens differ from step to step
        parameter.data.mul_(3.0)
    draft = copy.deepcopy(model)
    for parameter in draft.parameters():
        parameter.data.add_(noise * torch.randn_like(parameter) * parameter.std())
    return model, draft


def counted(model):
    calls = []
    model.register_forward_hook(lambda *_: calls.append(1))
    return calls


@pytest.mark.parametrize("noise", [0.0, 0.2, 2.0])
@pytest.mark.parametrize("flash, rotary", [(True, False), (True, True), (False, True)])
@pytest.mark.parametrize(
    "seqlen, max_length, lookahead", [(4, 30, 3), (1, 24, 1), (5, 16, 6), (7, 9, 4), (7, 8, 3), (7, 7, 3)]
)
def test_greedy_decoding_is_that_of_the_model_alone(seed, noise, flash, rotary, seqlen, max_length, lookahead):
    model, draft = models(seed, noise, use_flash_attn=flash, rotary=rotary)
    prompt = torch.randint(VOCAB, (1, seqlen))
    plain = decode(prompt, model, max_length)
    calls = counted(model)
    found = decode_speculative(prompt, model, draft, max_length, speculative_lookahead=lookahead)
    assert torch.equal(found.sequences, plain.sequences)
    assert found.scores.shape == (1, max(max_length - seqlen, 1), VOCAB)
    torch.testing.assert_close(found.scores, torch.stack(plain.scores, 1), rtol=1e-9, atol=1e-9)
    new = found.scores.shape[1]
    assert len(calls) == -(-new // (lookahead + 1)) if noise == 0.0 else len(calls) <= new


def test_vocabulary_and_end_of_sequence(seed):
    model, draft = models(seed, 0.2)
    prompt = torch.randint(VOCAB, (1, 4))
    plain = decode(prompt, model, 30, vocab_size=7)
    found = decode_speculative(prompt, model, draft, 30, vocab_size=7)
    assert torch.equal(found.sequences, plain.sequences) and found.scores.shape == (1, 26, 7)
    for token in plain.sequences[0, 4:].unique().tolist():
        plain = decode(prompt, model, 30, eos_token_id=token)
        found = decode_speculative(prompt, model, draft, 30, eos_token_id=token)
        assert torch.equal(found.sequences, plain.sequences)
        assert found.scores.shape[1] == len(plain.scores)


def agree(counts, probabilities):
    """Pearson's statistic below its quantile of 1 - 1e-9 (Wilson and Hilferty); nothing where the probability is 0."""
    assert not counts[probabilities == 0.0].any()
    possible = probabilities > 0.0
    expected = probabilities[possible] * counts.sum()
    statistic = ((counts[possible] - expected).square() / expected).sum()
    freedom = max(int(possible.sum()) - 1, 1)
    spread = 2 / (9 * freedom)
    assert statistic < freedom * (1 - spread + 6 * spread**0.5) ** 3, (counts, expected)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=list(OPTIONS))
def test_checked_tokens_have_the_models_distribution(seed, options):
    torch.manual_seed(seed)
    rows, seqlen, vocab_size = 40000, 3, 6
    logits = torch.randn(1, seqlen + 1, vocab_size).expand(rows, -1, -1)
    logits_draft = logits[:, :-1] + 0.5 * torch.randn(1, seqlen, vocab_size)
    drafted = torch.stack([sample(logits_draft[:, i], **options) for i in range(seqlen)], dim=1)
    tokens, generated = sample_speculative(logits, logits_draft, drafted, **options)
    assert tokens.shape == (rows, seqlen + 1) and generated.min() >= 1 and generated.max() <= seqlen + 1
    p = token_probabilities(logits[0], **{"top_k": 0, "top_p": 0.0, "temperature": 1.0, **options})
    for i in range(seqlen + 1):  # given that a position is reached, its token is independent of those before
        reached = tokens[generated > i, i]
        if len(reached) >= 1000:  # fewer say little, and none are left where two sets of candidates are disjoint
            agree(reached.bincount(minlength=vocab_size), p[i])
    kept = torch.arange(seqlen) < generated[:, None] - 1
    assert torch.equal(tokens[:, :-1][kept], drafted[kept])
    agree(sample(logits[:, 0], **options).bincount(minlength=vocab_size), p[0])


class Chain(torch.nn.Module):
    """The next token depends on the last alone, through a table of logits."""

    def __init__(self, table):
        super().__init__()
        self.table = torch.nn.Parameter(table)

    def forward(self, input_ids, position_ids=None, inference_params=None, num_last_tokens=1):
        return SimpleNamespace(logits=self.table[input_ids[:, -num_last_tokens:]])


@pytest.mark.parametrize("lookahead", [1, 3])
def test_sampled_sequences_have_the_models_distribution(seed, lookahead):
    torch.manual_seed(seed)
    tables = torch.rand(2, 3, 3) * 2  # no probability below 0.06
    model, draft = Chain(tables[0]), Chain(tables[1])
    prompt, places = torch.tensor([[1]]), torch.tensor([9, 3, 1])
    counts = torch.zeros(27)
    for _ in range(2500):
        found = decode_speculative(prompt, model, draft, 4, speculative_lookahead=lookahead, top_k=0)
        counts[int((found.sequences[0, 1:] * places).sum())] += 1
    p = tables[0].softmax(-1)
    agree(counts, (p[1][:, None, None] * p[:, :, None] * p[None]).flatten())


def test_a_rejection_that_leaves_nothing_of_the_difference(seed, monkeypatch):
    """Where p and q differ by roundings alone, a token of p is drawn; here they are equal and the number is as none can be."""
    torch.manual_seed(seed)
    logits = torch.randn(1, 2, 5).expand(20000, -1, -1)
    drafted = sample(logits[:, 0], top_k=0)[:, None].int()
    monkeypatch.setattr(torch, "rand_like", torch.ones_like)
    tokens, generated = sample_speculative(logits, logits[:, :1], drafted, top_k=0)
    assert (generated == 1).all() and tokens.dtype == torch.int32
    agree(tokens[:, 0].bincount(minlength=5), logits[0, 0].softmax(-1))


def test_greedy_check_keeps_what_is_largest():
    logits = torch.tensor([[[0.0, 2, 1], [3, 2, 1], [0, 0, 5]], [[9.0, 2, 1], [3, 2, 1], [0, 7, 5]]])
    drafted = torch.tensor([[1, 2], [0, 0]])
    tokens, generated = sample_speculative(logits, torch.zeros(2, 2, 3), drafted)
    assert generated.tolist() == [2, 3]
    assert tokens[0, :2].tolist() == [1, 0] and tokens[1].tolist() == [0, 0, 1]


def test_what_is_logged(seed, caplog, capsys):
    model, draft = models(seed, 0.0)
    prompt = torch.randint(VOCAB, (1, 4))
    with caplog.at_level(logging.DEBUG, logger="flash_attn"):
        decode_speculative(prompt, model, draft, 12, speculative_lookahead=3, enable_timing=True, debug=True)
    lines = [record.getMessage() for record in caplog.records]
    assert sum(line.startswith("drafted [[") for line in lines) == 2
    assert any("decoding time" in line for line in lines)
    assert "Number of calls to main model: 2, acceptance rate: 100.00%" in lines
    assert capsys.readouterr() == ("", "")


def test_bad_input_is_named(seed):
    model, draft = models(seed, 0.0)
    prompt = torch.randint(VOCAB, (2, 4))
    with pytest.raises(NotImplementedError, match="batch_size=1, got 2"):
        decode_speculative(prompt, model, draft, 8)
    with pytest.raises(ValueError, match="got 0"):
        decode_speculative(prompt[:1], model, draft, 8, speculative_lookahead=0)
    with pytest.raises(NotImplementedError, match="GPU, got one on cpu"):
        decode_speculative(prompt[:1], model, draft, 8, cg=True)
    with pytest.raises(ValueError, match="one model as both"):
        decode_speculative(prompt[:1], model, model, 8, cg=True)
    smaller = Chain(torch.rand(VOCAB, VOCAB - 1))
    with pytest.raises(ValueError, match=r"\(1, 3, 13\) for logits \(1, 4, 13\), got \(1, 3, 12\)"):
        decode_speculative(prompt[:1], model, smaller, 8)
    logits, logits_draft, drafted = torch.zeros(2, 3, 5), torch.zeros(2, 2, 5), torch.zeros(2, 2, dtype=torch.long)
    for change, words in (
        (dict(logits_draft=logits), r"logits_draft must have shape \(2, 2, 5\)"),
        (dict(tokens_draft=drafted[:1]), r"tokens_draft must have shape \(2, 2\)"),
        (dict(tokens_draft=drafted.float()), "float32"),
        (dict(top_p=1.5, top_k=0), r"got 1\.5"),
    ):
        with pytest.raises(ValueError, match=words):
            sample_speculative(**dict(logits=logits, logits_draft=logits_draft, tokens_draft=drafted) | change)
