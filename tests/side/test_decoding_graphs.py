"""Decoding by CUDA graphs: on a GPU the real ones, elsewhere the same bookkeeping over steps that are run anew."""

from types import SimpleNamespace

import pytest
import torch

from flash_attn.utils import decoding_graphs
from flash_attn.utils.generation import DecodingCGCache, decode, decode_speculative, update_graph_cache
from tests.support.tiny_gpt import DIM, LAYERS, NHEADS, VOCAB, TinyGPT


@pytest.fixture
def recorded(monkeypatch):
    """Graphs replaced by what they do: all but the tokens and lengths_per_sample stays as it was when recorded."""
    made = []

    def capture(model, params, batch_size, max_seqlen, decoding_seqlen=1, mempool=None, n_warmups=2):
        made.append((batch_size, decoding_seqlen))

        def run(input_ids, position_ids, seqlen):
            assert input_ids.shape == position_ids.shape == (batch_size, decoding_seqlen)
            params.lengths_per_sample.fill_(seqlen)
            offset, params.seqlen_offset = params.seqlen_offset, max_seqlen - decoding_seqlen
            words = dict(position_ids=position_ids, inference_params=params, num_last_tokens=decoding_seqlen)
            logits = model(input_ids, **words).logits
            params.seqlen_offset = offset
            return logits

        return run

    monkeypatch.setattr(decoding_graphs, "capture_graph", capture)
    monkeypatch.setattr(decoding_graphs, "_require_gpu", lambda device: None)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", object)
    return made


def tokens(batch_size, seqlen, device="cpu"):
    return torch.randint(VOCAB, (batch_size, seqlen), device=device)


@pytest.mark.parametrize("rotary", [False, True])
def test_steps_over_lengths_on_the_device_are_the_plain_ones(seed, recorded, rotary):
    torch.manual_seed(seed)
    model = TinyGPT(rotary=rotary).double().eval()
    sizes = ((1, 4, 12), (3, 5, 20), (2, 7, 9), (3, 1, 15))  # growing, then shrinking, then what there was
    for batch_size, seqlen, max_length in sizes:
        prompt, teacher = tokens(batch_size, seqlen), tokens(batch_size, max_length)
        plain = decode(prompt, model, max_length, teacher_outputs=teacher)
        found = decode(prompt, model, max_length, teacher_outputs=teacher, cg=True)
        assert torch.equal(found.sequences, plain.sequences)
        torch.testing.assert_close(torch.stack(found.scores), torch.stack(plain.scores), rtol=1e-9, atol=1e-9)
    assert recorded == [(1, 1), (3, 1), (2, 1)]
    cache = model._decoding_cache
    assert (cache.max_batch_size, cache.max_seqlen) == (3, 20) and set(cache.callables) == {(3, 1), (2, 1)}
    assert cache.inference_params.key_value_memory_dict[0].shape == (3, 20, 2, NHEADS, DIM // NHEADS)


def test_speculative_steps(seed, recorded):
    torch.manual_seed(seed)
    model, draft = TinyGPT().double().eval(), TinyGPT().double().eval()
    prompt = tokens(1, 4)
    plain = decode(prompt, model, 20)
    found = decode_speculative(prompt, model, draft, 20, cg=True)
    assert torch.equal(found.sequences, plain.sequences)
    assert recorded == [(1, 1), (1, 2), (1, 3), (1, 4), (1, 1), (1, 2)]
    short = decode_speculative(prompt[:, :1], TinyGPT().double(), draft, 3, speculative_lookahead=5, cg=True)
    assert short.sequences.shape == (1, 3) and recorded[6:] == [(1, 1), (1, 2)]


def test_a_cache_is_kept_while_it_is_large_enough(recorded):
    model = TinyGPT().eval()
    cache = update_graph_cache(model, None, 2, 4, 16, decoding_seqlens=(1, 3))
    params = cache.inference_params
    assert params.lengths_per_sample.dtype == torch.int32 and params.lengths_per_sample.shape == (2,)
    assert params.seqlen_offset == 0 and cache.dtype == torch.float32
    assert update_graph_cache(model, cache, 1, 9, 12) is cache and cache.inference_params is params
    assert recorded == [(2, 1), (2, 3), (1, 1)]
    for batch_size, max_seqlen, dtype in ((3, 16, None), (2, 17, None), (1, 4, torch.float64)):
        previous = cache.inference_params
        update_graph_cache(model, cache, batch_size, 2, max_seqlen, dtype=dtype)
        assert cache.inference_params is not previous and set(cache.callables) == {(batch_size, 1)}
    assert cache.inference_params.key_value_memory_dict[1].dtype == torch.float64


def test_a_model_without_caches_of_its_own_is_known_by_its_config(recorded):
    config = SimpleNamespace(hidden_size=DIM, num_attention_heads=NHEADS, num_hidden_layers=LAYERS)
    model = torch.nn.Linear(2, 2)
    model.config = config
    for head_dim in (None, 8):
        if head_dim is not None:
            config.head_dim = head_dim
        caches = update_graph_cache(model, None, 2, 4, 16, tensor_parallel=2).inference_params.key_value_memory_dict
        assert list(caches) == list(range(LAYERS))
        assert all(x.shape == (2, 16, 2, 1, head_dim or DIM // NHEADS) for x in caches.values())


def test_what_it_needs_is_named():
    model = TinyGPT()
    for refused in (lambda: update_graph_cache(model, None, 1, 2, 8), lambda: decode(tokens(1, 2), model, 8, cg=True)):
        with pytest.raises(NotImplementedError, match="a model on a GPU, got one on cpu"):
            refused()
    with pytest.raises(ValueError, match="update_graph_cache"):
        DecodingCGCache().params  # noqa: B018


@pytest.mark.gpu
@pytest.mark.parametrize("rotary", [False, True])
def test_graphs_decode_as_the_model_does(seed, device, rotary):
    """Also for sizes that grow and shrink, and behind a long generation that makes rotary tables anew."""
    torch.manual_seed(seed)
    model = TinyGPT(rotary=rotary, max_length=256).to(device, torch.float16).eval()
    for batch_size, seqlen, max_length in ((1, 10, 40), (3, 30, 100), (2, 5, 30)):
        prompt, teacher = tokens(batch_size, seqlen, device), tokens(batch_size, max_length, device)
        plain = decode(prompt, model, max_length, teacher_outputs=teacher)
        for _ in range(2):
            found = decode(prompt, model, max_length, teacher_outputs=teacher, cg=True)
            assert torch.equal(found.sequences[:, :max_length], plain.sequences)
            torch.testing.assert_close(torch.stack(found.scores), torch.stack(plain.scores), rtol=4e-3, atol=4e-3)
            decode(prompt, model, 250)
    assert set(model._decoding_cache.callables) == {(3, 1), (2, 1)}


@pytest.mark.gpu
def test_graphs_decode_speculatively(seed, device):
    torch.manual_seed(seed)
    model, draft = (TinyGPT().to(device).eval() for _ in range(2))
    for parameter in model.parameters():
        parameter.data.mul_(3.0)
    prompt = tokens(1, 7, device)
    for _ in range(2):
        found = decode_speculative(prompt, model, draft, 40, cg=True)
        with torch.no_grad():
            logits = model(found.sequences).logits[:, 6:-1]
        torch.testing.assert_close(found.scores, logits, rtol=1e-3, atol=1e-3)
        assert torch.equal(found.sequences[:, 7:], found.scores.argmax(dim=-1))
    assert set(model._decoding_cache.callables) == {(1, 1), (1, 2), (1, 3), (1, 4)}
