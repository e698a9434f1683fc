"""BERT by itself: the ways to compute fewer tokens against computing all, and what is refused."""

from types import SimpleNamespace

import pytest
import torch

from flash_attn.errors import InvalidArgument, UnsupportedProblem
from flash_attn.models import bert
from flash_attn.models.bert import BertEncoder, BertForPreTraining, BertModel, inv_remap_state_dict, remap_state_dict
from tests.models import plain

VOCABULARY, DIM = 21, 24


def bert_config(**fields):
    defaults = dict(
        vocab_size=VOCABULARY,
        hidden_size=DIM,
        max_position_embeddings=12,
        type_vocab_size=2,
        pad_token_id=0,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=20,
        hidden_act="gelu_new",
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        layer_norm_eps=1e-12,
        initializer_range=0.02,
    )
    return SimpleNamespace(**defaults | fields)


def random_weights(config, seed):
    """Of BertForPreTraining, in the format that has every projection on its own."""
    model = BertForPreTraining(config)
    state_dict = plain.state_dict_like({name: tuple(x.shape) for name, x in model.state_dict().items()}, seed)
    state_dict["cls.predictions.decoder.weight"] = state_dict["bert.embeddings.word_embeddings.weight"]
    return inv_remap_state_dict(state_dict, config)


def batch(seed):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, VOCABULARY, (3, 9), generator=generator)
    mask = torch.arange(9) < torch.tensor([9, 4, 1])[:, None]
    labels = torch.randint(1, VOCABULARY, (3, 9), generator=generator)
    labels = labels * (torch.rand((3, 9), generator=generator) < 0.4) * mask
    labels[0, 3] = 5
    types = torch.randint(2, (3, 9), generator=generator)
    return dict(input_ids=ids, attention_mask=mask.long(), token_type_ids=types), labels, torch.tensor([1, 0, -1])


FEWER = {
    "kernels": dict(use_flash_attn=True),
    "kernels, labelled logits": dict(use_flash_attn=True, dense_seq_output=True),
    "labelled logits": dict(dense_seq_output=True, use_xentropy=True),
    "last layer": dict(dense_seq_output=True, last_layer_subset=True),
    "kernels, last layer": dict(use_flash_attn=True, dense_seq_output=True, last_layer_subset=True, use_xentropy=True),
    "fused": dict(fused_mlp=True, fused_bias_fc=True, fused_dropout_add_ln=True, mlp_checkpoint_lvl=[0, 2]),
}


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("name", FEWER)
def test_losses_and_gradients_of_fewer_tokens_are_those_of_all(name, masked, seed):
    inputs, labels, following = batch(seed)
    if not masked:
        inputs.pop("attention_mask")
    weights = random_weights(bert_config(), seed)
    results = []
    for fields in ({}, FEWER[name]):
        config = bert_config(**fields)
        model = plain.loaded(BertForPreTraining(config), remap_state_dict(weights, config))
        output = model(**inputs, labels=labels, next_sentence_label=following)
        logits = output.prediction_logits.detach().clone()  # use_xentropy overwrites them
        output.loss.backward()
        gradients = {key: x.grad for key, x in model.named_parameters(remove_duplicate=False)}
        results.append((model, output, logits, inv_remap_state_dict(gradients, config)))
    (_, truth, all_logits, expected), (model, output, logits, gradients) = results
    dense = FEWER[name].get("dense_seq_output", False)
    rows = labels > 0 if dense else inputs.get("attention_mask", torch.ones_like(labels)).bool()
    plain.same(logits if dense else logits[rows], all_logits[rows])
    torch.testing.assert_close(output.loss, truth.loss, rtol=1e-5, atol=1e-5)  # of upstream's dtype, fp32
    assert gradients.keys() == expected.keys()
    for key in expected:
        torch.testing.assert_close(gradients[key], expected[key], rtol=1e-4, atol=1e-5)
    if not FEWER[name].get("use_xentropy"):
        plain.same(output.seq_relationship_logits, truth.seq_relationship_logits)
    plain.same(model(**inputs).seq_relationship_logits, truth.seq_relationship_logits)
    assert model(**inputs).loss is None and model(**inputs, labels=labels).loss is None


@pytest.mark.parametrize("flash", [False, True])
@pytest.mark.parametrize("subset_last", [False, True])
def test_encoder_returns_a_subset_of_what_is_kept(flash, subset_last, seed):
    torch.manual_seed(seed)
    config = bert_config(use_flash_attn=flash, last_layer_subset=subset_last)
    encoder = BertEncoder(config).double()
    x = torch.randn(3, 9, DIM, dtype=torch.float64)
    mask = torch.arange(9) < torch.tensor([9, 4, 1])[:, None]
    subset = torch.rand(3, 9) < 0.5
    whole = encoder(x, key_padding_mask=mask)
    plain.same(encoder(x, key_padding_mask=mask, subset_mask=subset), whole[subset & mask])
    plain.same(encoder(x, subset_mask=subset), encoder(x)[subset])
    if flash:
        assert whole[~mask].count_nonzero() == 0
    changed = x.masked_fill(~mask[..., None], 7.0)
    plain.same(encoder(changed, key_padding_mask=mask)[mask], whole[mask])


@pytest.mark.parametrize("flash", [False, True])
def test_masked_tokens_that_padding_hides_are_left_out(flash, seed):
    torch.manual_seed(seed)
    model = BertModel(bert_config(use_flash_attn=flash, last_layer_subset=True)).double()
    inputs, *_ = batch(seed)
    masked = torch.rand(3, 9) < 0.5
    masked[1, 8] = True
    output, whole = model(**inputs, masked_tokens_mask=masked), model(**inputs)
    plain.same(output.last_hidden_state, whole.last_hidden_state[masked & inputs["attention_mask"].bool()])
    plain.same(output.pooler_output, whole.pooler_output)


def test_rotary_embeddings_see_the_order(seed):
    """Without positions a sequence read backwards gives the same hidden states backwards; rotated, it does not."""
    ids = torch.randint(1, VOCABULARY, (2, 9), generator=torch.Generator().manual_seed(seed))
    for kind, alike in (("absolute", True), ("rotary", False)):
        config = bert_config(max_position_embeddings=0, position_embedding_type=kind)
        torch.manual_seed(seed)
        model = BertModel(config, add_pooling_layer=False).double()
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.5)
        forwards, backwards = (model(x).last_hidden_state for x in (ids, ids.flip(1)))
        assert torch.allclose(forwards, backwards.flip(1), atol=1e-9) == alike
        assert model(ids).pooler_output is None
        if kind == "rotary":
            assert model.encoder.layers[0].mixer.rotary_emb_dim == DIM // 4


def test_the_vocabulary_is_padded_with_tokens_that_never_come(seed):
    config = bert_config(pad_vocab_size_multiple=8)
    weights = random_weights(bert_config(), seed)
    model = plain.loaded(BertForPreTraining(config), remap_state_dict(weights, config))
    assert config.vocab_size == VOCABULARY
    inputs, labels, following = batch(seed)
    output = model(**inputs, labels=labels, next_sentence_label=following)
    plain_model = plain.loaded(BertForPreTraining(bert_config()), remap_state_dict(weights, bert_config()))
    truth = plain_model(**inputs, labels=labels, next_sentence_label=following)
    assert output.prediction_logits.shape[-1] == 24
    plain.same(output.prediction_logits[..., :VOCABULARY], truth.prediction_logits)
    torch.testing.assert_close(output.loss, truth.loss)
    back = inv_remap_state_dict(model.state_dict(), config)
    assert back.keys() == weights.keys() and all(torch.equal(back[key], weights[key]) for key in weights)


def test_weights_begin_small(seed):
    torch.manual_seed(seed)
    model = BertForPreTraining(bert_config(hidden_size=128, initializer_range=0.5))
    assert model.bert.embeddings.word_embeddings.weight[0].count_nonzero() == 0
    weight = model.bert.encoder.layers[1].mixer.Wqkv.weight
    assert weight.std().item() == pytest.approx(0.5, rel=0.04)  # 49152 numbers
    assert model.cls.predictions.decoder.weight is model.bert.embeddings.word_embeddings.weight


@pytest.mark.parametrize(
    ("error", "fields", "match"),
    [
        (InvalidArgument, dict(hidden_act="relu"), "got 'relu'"),
        (
            InvalidArgument,
            dict(hidden_act="gelu", fused_mlp=True),
            "fused_mlp needs an approximate gelu, got hidden_act 'gelu'",
        ),
        (InvalidArgument, dict(last_layer_subset=True), "needs dense_seq_output=True"),
        (UnsupportedProblem, dict(position_embedding_type="relative_key"), "got 'relative_key'"),
        (InvalidArgument, dict(model_type="roberta"), "instance of BertConfig, got SimpleNamespace"),
    ],
)
def test_what_is_refused_is_named(error, fields, match):
    with pytest.raises(error, match=match):
        BertForPreTraining(bert_config(**fields))


def test_from_pretrained_takes_what_has_a_place_and_names_the_rest(seed, tmp_path, caplog):
    weights = random_weights(bert_config(), seed)
    torch.save(weights, tmp_path / "pytorch_model.bin")
    model = BertForPreTraining.from_pretrained(str(tmp_path), bert_config())
    inputs, *_ = batch(seed)
    base = BertModel.from_pretrained(str(tmp_path), bert_config())
    assert "cls.predictions.transform.dense.weight" in caplog.text and "missing_keys=[]" in caplog.text
    truth = model.bert(**inputs).pooler_output
    torch.testing.assert_close(base(**inputs).pooler_output, truth)
    torch.save({"other": torch.ones(1)}, tmp_path / "pytorch_model.bin")
    with pytest.raises(InvalidArgument, match=r"no weight of BertModel, but \['other'\]"):
        BertModel.from_pretrained(str(tmp_path), bert_config())


def test_upstreams_parts_are_there():
    block = bert.create_block(bert_config(last_layer_subset=True), layer_idx=1)
    assert block.mixer.cross_attn and not block.prenorm and not block.return_residual
