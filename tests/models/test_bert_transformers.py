"""BERT against transformers' own: logits, losses, gradients, padding, names, files."""

import pytest
import torch

transformers = pytest.importorskip("transformers", minversion="5", reason="needs transformers 5 or newer")

from flash_attn.models.bert import BertForPreTraining, BertModel, inv_remap_state_dict, remap_state_dict  # noqa: E402
from tests.models.decoders import randomise  # noqa: E402

SIZES = dict(vocab_size=61, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=40)
WORDS = SIZES | dict(max_position_embeddings=16, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
OPTIONS = {
    "plain": {},
    "kernels": dict(use_flash_attn=True),
    "fused": dict(fused_mlp=True, fused_bias_fc=True, fused_dropout_add_ln=True, use_xentropy=True),
    "last layer": dict(use_flash_attn=True, dense_seq_output=True, last_layer_subset=True),
}


def build(seed, **words):
    config = transformers.BertConfig(**WORDS | words)
    model = transformers.BertForPreTraining._from_config(config, attn_implementation="eager").eval()
    randomise(model, seed)
    return model


def converted(hf, **options):
    config = type(hf.config)(**hf.config.to_dict() | options)
    model = BertForPreTraining(config).eval()
    model.load_state_dict(remap_state_dict(hf.state_dict(), config), strict=True)
    return model


def same(actual, truth):
    """As in test_decoders: fp32 in two orders, some 5e-6 apart."""
    torch.testing.assert_close(actual, truth, rtol=1e-4, atol=1e-4)


def batch(seed):
    generator = torch.Generator().manual_seed(seed)
    mask = (torch.arange(11) < torch.tensor([11, 6, 1])[:, None]).long()
    labels = torch.randint(1, 61, (3, 11), generator=generator)
    labels = labels * (torch.rand(labels.shape, generator=generator) < 0.4) * mask
    labels[0, 3] = 5
    inputs = dict(
        input_ids=torch.randint(1, 61, (3, 11), generator=generator),
        token_type_ids=torch.randint(2, (3, 11), generator=generator),
        attention_mask=mask,
    )
    return inputs, labels, torch.tensor([1, 0, 1])


@pytest.mark.parametrize("act", ["gelu", "gelu_new"])
@pytest.mark.parametrize("which", OPTIONS)
def test_logits_loss_and_gradients_are_those_of_transformers(which, act, seed):
    if which == "fused" and act == "gelu":
        act = "gelu_pytorch_tanh"
    hf = build(seed, hidden_act=act)
    ours = converted(hf, **OPTIONS[which])
    inputs, labels, following = batch(seed)
    truth = hf(**inputs, labels=labels.masked_fill(labels == 0, -100), next_sentence_label=following)
    output = ours(**inputs, labels=labels, next_sentence_label=following)
    rows = labels > 0 if which == "last layer" else inputs["attention_mask"].bool()
    logits = output.prediction_logits if which == "last layer" else output.prediction_logits[rows]
    assert truth.prediction_logits.std() > 0.3
    same(logits, truth.prediction_logits[rows])
    same(output.seq_relationship_logits, truth.seq_relationship_logits)
    same(output.loss, truth.loss)
    truth.loss.backward()
    output.loss.backward()
    gradients = {name: x.grad for name, x in hf.named_parameters(remove_duplicate=False)}
    expected = remap_state_dict(gradients, ours.config)
    actual = {name: x.grad for name, x in ours.named_parameters(remove_duplicate=False)}
    assert actual.keys() == expected.keys()
    for name in expected:
        same(actual[name], expected[name])


def test_hidden_states_and_pooler_are_those_of_transformers(seed):
    hf = build(seed)
    inputs, *_ = batch(seed)
    truth, output = hf.bert(**inputs), converted(hf).bert(**inputs)
    same(
        output.last_hidden_state[inputs["attention_mask"].bool()],
        truth.last_hidden_state[inputs["attention_mask"].bool()],
    )
    same(output.pooler_output, truth.pooler_output)


@pytest.mark.parametrize("subset", [False, True])
def test_the_inverse_gives_the_checkpoint_back_with_the_first_names_of_norms(subset, seed):
    hf = build(seed)
    config = type(hf.config)(**hf.config.to_dict() | dict(last_layer_subset=subset, pad_vocab_size_multiple=8))
    checkpoint = {
        key.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): tensor
        for key, tensor in hf.state_dict().items()
        if key != "cls.predictions.decoder.bias"  # the same as cls.predictions.bias
    }
    back = inv_remap_state_dict(remap_state_dict(checkpoint, config), config)
    assert back.keys() == checkpoint.keys()
    assert all(torch.equal(back[key], checkpoint[key]) for key in checkpoint)


def test_from_pretrained_loads_saved_models(seed, tmp_path):
    hf = build(seed)
    hf.save_pretrained(tmp_path)
    inputs, *_ = batch(seed)
    ours = BertForPreTraining.from_pretrained(str(tmp_path), hf.config).eval()
    same(ours(**inputs).seq_relationship_logits, hf(**inputs).seq_relationship_logits)
    base = BertModel.from_pretrained(str(tmp_path), hf.config).eval()
    same(base(**inputs).pooler_output, hf.bert(**inputs).pooler_output)


def test_configurations_of_other_models_are_refused():
    with pytest.raises(ValueError, match="instance of BertConfig, got RobertaConfig"):
        BertModel(transformers.RobertaConfig())
