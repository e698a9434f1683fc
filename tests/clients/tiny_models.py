"""Tiny transformers models with random weights, one for each kind of attention a model can ask for."""

import copy
import statistics
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
import transformers
import transformers.masking_utils

from tests.support.tolerance import NOISE_ROUNDOFFS

VOCABULARY = 61
PAD, BOS, EOS = 0, 1, 2
FIRST_TOKEN = 3
WINDOW = 5

NOISE = NOISE_ROUNDOFFS * torch.finfo(torch.float32).eps
# A router's gradient is what large sums leave of each other. One run of eager attention may be lucky with it: fp32 gradients
# are compared to 1e-5, where a wrong kernel is off by 1e-3.
GRADIENT_NOISE = 100 * torch.finfo(torch.float32).eps
MOST_ROUNDOFFS = 1000  # of the dtype, that eager attention may be from the truth, relative to the typical value
FEW_NUMBERS = 16

SIZES = dict(
    vocab_size=VOCABULARY,
    hidden_size=32,
    intermediate_size=40,
    num_hidden_layers=2,
    num_attention_heads=4,
    max_position_embeddings=64,
    initializer_range=0.3,
    pad_token_id=PAD,
    bos_token_id=BOS,
    eos_token_id=EOS,
)
GROUPED = SIZES | dict(num_key_value_heads=2)


class Tiny(NamedTuple):
    """A model by the names of its classes, with the words of its configuration.

    packs: whether transformers' eager attention separates the packed sequences of a row for it.
    """

    config: str
    model: str
    words: dict[str, Any]
    packs: bool = True
    decoder: bool = True
    sinks: bool = False


MODELS: dict[str, Tiny] = {
    "llama, grouped heads": Tiny("LlamaConfig", "LlamaForCausalLM", GROUPED),
    "qwen3, norms of q and k": Tiny("Qwen3Config", "Qwen3ForCausalLM", GROUPED | dict(head_dim=16)),
    "mistral, window": Tiny("MistralConfig", "MistralForCausalLM", GROUPED | dict(sliding_window=WINDOW)),
    "gemma2, softcap and window in turn": Tiny(
        "Gemma2Config",
        "Gemma2ForCausalLM",
        GROUPED | dict(head_dim=8, attn_logit_softcapping=2.0, sliding_window=WINDOW, query_pre_attn_scalar=7),
    ),
    "gpt-neox, partial rotary": Tiny("GPTNeoXConfig", "GPTNeoXForCausalLM", SIZES),
    "phi3": Tiny("Phi3Config", "Phi3ForCausalLM", GROUPED | dict(tie_word_embeddings=False)),
    "gpt2": Tiny("GPT2Config", "GPT2LMHeadModel", SIZES | dict(n_inner=40, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0)),
    "opt": Tiny(  # not with ReLU, at whose kink a roundoff turns a gradient on or off
        "OPTConfig",
        "OPTForCausalLM",
        SIZES | dict(ffn_dim=40, word_embed_proj_dim=32, dropout=0.0, activation_function="gelu"),
        packs=False,
    ),
    "starcoder2, one key head": Tiny("Starcoder2Config", "Starcoder2ForCausalLM", SIZES | dict(num_key_value_heads=1)),
    "deepseek-v3, values narrower than keys": Tiny(
        "DeepseekV3Config",
        "DeepseekV3ForCausalLM",
        SIZES
        | dict(q_lora_rank=12, kv_lora_rank=8, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=12)
        | dict(first_k_dense_replace=2, num_key_value_heads=4),
    ),
    "bert": Tiny(
        "BertConfig",
        "BertForMaskedLM",
        SIZES | dict(hidden_dropout_prob=0, attention_probs_dropout_prob=0),
        False,
        False,
    ),
    "modernbert, window on both sides": Tiny(
        "ModernBertConfig",
        "ModernBertForMaskedLM",
        SIZES | dict(local_attention=6, global_attn_every_n_layers=2),
        False,
        False,
    ),
    "gpt-oss, sinks and window": Tiny(
        "GptOssConfig",
        "GptOssForCausalLM",
        GROUPED | dict(head_dim=8, sliding_window=WINDOW, num_local_experts=2, num_experts_per_tok=2),
        packs=False,
        sinks=True,
    ),
}


def build(tiny: Tiny, **words: Any) -> torch.nn.Module:
    """The model in fp32, its weights and sinks random."""
    config = getattr(transformers, tiny.config)(**(tiny.words | words))
    model = getattr(transformers, tiny.model)._from_config(
        config, attn_implementation="eager", **({"experts_implementation": "eager"} if tiny.sinks else {})
    )
    return model.eval()


def exact_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Attention in the dtype of its operands throughout, with transformers' own mask; eager's softmax is always fp32."""
    assert attention_mask is not None or not module.is_causal
    group = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(group, dim=1) for x in (key, value))
    scores = query @ key.transpose(-1, -2) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    if attention_mask is not None:
        scores = scores.masked_fill(~attention_mask[..., : key.shape[2]], -torch.inf)
    if s_aux is not None:
        scores = torch.cat([scores, s_aux.view(1, -1, 1, 1).expand(*scores.shape[:3], 1).to(scores.dtype)], dim=-1)
    weights = scores.softmax(-1).nan_to_num()[..., : key.shape[2]]
    return (weights @ value).transpose(1, 2), None


def exact_mask(**words: Any) -> torch.Tensor:
    """transformers' mask as (batch_size, 1, queries, keys) of bools, never left out."""
    return transformers.masking_utils.sdpa_mask(
        **(words | dict(allow_is_causal_skip=False, allow_is_bidirectional_skip=False))
    )


def register_exact() -> None:
    transformers.AttentionInterface.register("exact", exact_attention)
    transformers.AttentionMaskInterface.register("exact", exact_mask)


def with_attention(model: torch.nn.Module, implementation: str, dtype: torch.dtype) -> Any:
    """A copy of the model."""
    model = copy.deepcopy(model).to(dtype)
    model.set_attn_implementation(implementation)
    return model


class Pass(NamedTuple):
    """The logits at the tokens that exist, and the gradient of every parameter; what the gradients of biases add up."""

    logits: torch.Tensor
    gradients: dict[str, torch.Tensor]
    terms: dict[str, torch.Tensor]  # of a bias, whose gradient is a sum over tokens: the root of their squares' sum


def run(model: torch.nn.Module, implementation: str, dtype: torch.dtype, loss_seed: int, **inputs: Any) -> Pass:
    """Forward and backward of a copy of the model under a random linear loss."""
    model = with_attention(model, implementation, dtype)
    terms: dict[str, torch.Tensor] = {}

    def keep(name: str) -> Any:
        def hook(_module: torch.nn.Module, _inputs: Any, outputs: tuple[torch.Tensor, ...]) -> None:
            terms[name] = outputs[0].double().flatten(0, -2).square().sum(0).sqrt()

        return hook

    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and module.bias is not None:
            module.register_full_backward_hook(keep(f"{name}.bias"))
    logits = model(**inputs).logits
    exists = inputs.get("decoder_attention_mask" if "decoder_input_ids" in inputs else "attention_mask")
    logits = logits.flatten(0, 1) if exists is None else logits[exists.bool()]
    weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(loss_seed))
    (logits * weights.to(logits)).sum().backward()
    gradients = {name: x.grad.double() for name, x in model.named_parameters() if x.grad is not None}
    return Pass(logits.detach().double(), gradients, terms)


class Errors(NamedTuple):
    """Root mean squares relative to what they are errors of."""

    logits: float
    worst_row: float
    gradients: dict[str, float]

    def limits(self, dtype: torch.dtype) -> tuple[float, float, float]:
        """Twice these, and the noise of fp32; of all gradients the worst counts."""
        eps = torch.finfo(dtype).eps
        assert within(self, [MOST_ROUNDOFFS * eps] * 3), "eager attention disagrees with the truth"
        logits, worst_row = (2 * (error + eps) + NOISE for error in self[:2])
        return logits, worst_row, 2 * (max(self.gradients.values()) + eps) + GRADIENT_NOISE


def errors(result: Pass, truth: Pass) -> Errors:
    """A gradient's error is relative to the typical parameter's gradient where that is larger: some gradients are zero.

    That of the keys' bias is a sum over tokens whose terms cancel; its error is one of the terms. A mean over a router's two
    numbers is no estimate, so the gradients of a few numbers share one.
    """
    typical = statistics.median(rms(x) for x in truth.gradients.values())
    assert result.gradients.keys() == truth.gradients.keys()

    def relative(name: str) -> float:
        gradient = truth.gradients[name]
        size = max(typical, rms(gradient), rms(truth.terms.get(name, gradient)))
        return rms(result.gradients[name] - gradient) / size

    gradients = {name: relative(name) for name in truth.gradients}
    few = [name for name, x in truth.gradients.items() if x.numel() < FEW_NUMBERS]
    shared = rms(torch.tensor([gradients[name] for name in few]))
    return Errors(*logit_errors(result.logits, truth.logits), gradients | dict.fromkeys(few, shared))


def logit_errors(result: torch.Tensor, truth: torch.Tensor) -> tuple[float, float]:
    """Over all logits, and in the worst row."""
    assert result.shape == truth.shape
    typical, difference = rms(truth), result.double() - truth
    return rms(difference) / typical, difference.square().mean(-1).max().sqrt().item() / typical


def check(
    actual: Pass, matched: Pass, truth: Pass, dtype: torch.dtype, others: Iterable[tuple[Pass, Pass]] = ()
) -> None:
    """No further from the truth than twice the worst that eager attention in the same dtype is.

    In bf16 eager's own worst error changes twofold from text to text of one model, in the worst of ten models fivefold: that of
    one text is a poor estimate. Where it does not suffice, (eager's, the truth's) of `others` count, too.
    """
    found, limits = errors(actual, truth), errors(matched, truth).limits(dtype)
    for other in others:
        if within(found, limits):
            break
        limits = tuple(map(max, limits, errors(*other).limits(dtype)))
    assert within(found, limits), f"off by {found}, allowed {limits}"


def within(found: Errors, limits: Sequence[float]) -> bool:
    """Whether each error is, which NaN never is; max would pass over it."""
    logits, worst_row, gradient = limits
    gradients = all(error <= gradient for error in found.gradients.values())
    return found.logits <= logits and found.worst_row <= worst_row and gradients


def check_logits(actual: torch.Tensor, matched: torch.Tensor, truth: torch.Tensor, dtype: torch.dtype) -> None:
    """`check` of the logits alone."""
    limits = Errors(*logit_errors(matched, truth), {"": 0.0}).limits(dtype)[:2]
    found = logit_errors(actual, truth)
    assert all(error <= limit for error, limit in zip(found, limits, strict=True)), (found, limits)


def rms(x: torch.Tensor) -> float:
    return x.square().mean().sqrt().item()
