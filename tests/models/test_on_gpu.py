"""The models on a GPU, in bf16 through the kernels, no further from float64 than twice what plain attention in bf16 is."""

import pytest
import torch

from flash_attn.models.bert import BertForPreTraining, remap_state_dict
from flash_attn.models.gpt import GPTLMHeadModel
from flash_attn.models.vit import VisionTransformer
from tests.models import plain
from tests.models.test_bert import batch, bert_config, random_weights
from tests.models.test_vit import SIZES, timm_checkpoint

pytestmark = pytest.mark.gpu
EPS = torch.finfo(torch.bfloat16).eps

GPT = dict(hidden_size=128, num_attention_heads=4, n_inner=96, vocab_size=50)
LLAMA = GPT | dict(n_head_kv=2, activation_function="swiglu", rms_norm=True, rotary_emb_fraction=1.0)
DECODERS = {
    "gpt-2": GPT | dict(max_position_embeddings=300),
    "grouped heads, rotary": LLAMA,
    "side by side, fused, half rotary": GPT
    | dict(parallel_block=True, fused_mlp=True, fused_dropout_add_ln=True, rotary_emb_fraction=0.5),
}


def rms(x):
    return x.double().square().mean().sqrt().item()


def near(actual, matched, truth):
    """A rounding of the result itself comes on top, for where the matched run happens to be exact."""
    assert actual.dtype == matched.dtype == torch.bfloat16 and truth.dtype == torch.float64
    assert rms(actual - truth) <= 2 * rms(matched - truth) + EPS * rms(truth)


def three(build, state_dict, device):
    """(kernels in bf16, plain in bf16, plain in float64) of the same weights, rounded to bf16."""
    models = []
    for flash, dtype in ((True, torch.bfloat16), (False, torch.bfloat16), (False, torch.float64)):
        model = build(use_flash_attn=flash).eval()
        model.load_state_dict({name: x.bfloat16() for name, x in state_dict.items()})
        models.append(model.to(device, dtype))
    return models


def compare(models, run):
    """run(model) -> what is compared; its gradients of all parameters, together, too."""
    results, gradients = [], []
    for model in models:
        out = run(model)
        weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(0)).to(out)
        (out * weights).sum().backward()
        results.append(out.detach())
        gradients.append(torch.cat([x.grad.flatten() for x in model.parameters()]))
    near(*results)
    near(*gradients)


def decoder(fields, seed, device):
    shapes = {name: tuple(x.shape) for name, x in GPTLMHeadModel(plain.gpt_config(**fields)).state_dict().items()}
    state_dict = {name: x / 3 if x.dim() > 1 else x for name, x in plain.state_dict_like(shapes, seed).items()}
    state_dict["lm_head.weight"] = state_dict["transformer.embeddings.word_embeddings.weight"]
    return three(lambda **options: GPTLMHeadModel(plain.gpt_config(**fields, **options)), state_dict, device)


@pytest.mark.parametrize("name", DECODERS)
def test_decoders_train_and_generate(name, seed, device):
    models = decoder(DECODERS[name], seed, device)
    ids = torch.randint(50, (2, 260), generator=torch.Generator().manual_seed(seed)).to(device)
    compare(models, lambda model: model(ids).logits)

    scores = []
    for model in models:
        options = dict(teacher_outputs=ids, return_dict_in_generate=True, output_scores=True)
        scores.append(torch.stack(model.generate(ids[:, :250], 260, **options).scores))
    near(*scores)


@pytest.mark.parametrize("subset", [False, True])
def test_bert_trains_unpadded(subset, seed, device):
    weights = random_weights(bert_config(), seed)
    fields = dict(dense_seq_output=True, last_layer_subset=subset)

    def build(**options):
        return BertForPreTraining(bert_config(**fields, **options))

    models = three(build, remap_state_dict(weights, bert_config(**fields)), device)
    inputs, labels, following = batch(seed)
    inputs = {name: x.to(device) for name, x in inputs.items()}
    labels, following = labels.to(device), following.to(device)
    compare(models, lambda model: outputs(model, inputs, labels, following))


def outputs(model, inputs, labels, following):
    output = model(**inputs, labels=labels, next_sentence_label=following)
    return torch.cat([output.prediction_logits.flatten(), output.seq_relationship_logits.flatten()])


def test_vision_transformer_trains(seed, device):
    models = three(lambda **options: VisionTransformer(**SIZES, **options), as_own(seed), device)
    images = torch.randn(3, 2, 8, 12, generator=torch.Generator().manual_seed(seed)).to(device)
    compare(models, lambda model: model(images.to(model.head.weight.dtype)))


def as_own(seed):
    model = VisionTransformer(**SIZES)
    model.load_state_dict(timm_checkpoint(seed))
    return model.state_dict()
