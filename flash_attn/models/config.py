"""What the models read from a configuration, and how those of other models are made into one for them."""

from collections.abc import Iterable
from typing import Any

from flash_attn.errors import InvalidArgument, UnsupportedProblem


def gpt2_config(**fields: Any) -> Any:
    """transformers' GPT2Config, which keeps the fields that only `flash_attn.models.gpt` knows too."""
    from transformers import GPT2Config

    return GPT2Config(**fields)


def require_config(config: Any, name: str, fields: Iterable[str]) -> None:
    """Refuse a configuration that is neither transformers' class of that name nor an object of one's own with the fields.

    Raises:
        InvalidArgument: it belongs to another model, or lacks fields.
    """
    classes = [each.__name__ for each in type(config).__mro__]
    if name in classes:
        return
    if hasattr(config, "model_type"):
        raise InvalidArgument(f"config should be an instance of {name}, got {classes[0]}")
    missing = [field for field in fields if not hasattr(config, field)]
    if missing:
        raise InvalidArgument(f"config should be like {name}, got {classes[0]} without {missing}")


def padded_vocab_size(config: Any) -> int:
    """vocab_size rounded up to pad_vocab_size_multiple."""
    return round_up(config.vocab_size, vocab_multiple(config))


def vocab_multiple(config: Any) -> int:
    """What the padded vocabulary is a multiple of."""
    return getattr(config, "pad_vocab_size_multiple", 1)


def round_up(size: int, multiple: int) -> int:
    """The least multiple that is no less than size."""
    return -(-size // multiple) * multiple


def head_dim_of(config: Any) -> int:
    """Features of a head.

    Raises:
        UnsupportedProblem: the heads together have other than hidden_size features.
    """
    head_dim = config.hidden_size // config.num_attention_heads
    found = getattr(config, "head_dim", None)
    if found not in (None, head_dim):
        raise UnsupportedProblem(f"head_dim must be hidden_size / num_attention_heads = {head_dim}, got {found}")
    return head_dim


def rotary_base(config: Any) -> float:
    """Base of the rotation's angles, under any of the names that releases of transformers have given it.

    Raises:
        UnsupportedProblem: the angles are scaled, for which no field of `flash_attn.models.gpt` stands.
    """
    rope = rope_parameters(config)
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind != "default":
        raise UnsupportedProblem(f"rotary embeddings of type {kind!r} are not supported, only 'default'")
    for name in ("rotary_emb_base", "rope_theta"):
        if getattr(config, name, None) is not None:
            return getattr(config, name)
    return rope.get("rope_theta", 10000.0)


def rope_parameters(config: Any) -> dict[str, Any]:
    """transformers' own description of the rotation: rope_parameters, before release 5 rope_scaling."""
    return getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}


def require_default(config: Any, **expected: Any) -> None:
    """Refuse fields of another model's configuration that have no counterpart here, unless they are as expected.

    Raises:
        UnsupportedProblem: one differs.
    """
    for name, value in expected.items():
        found = getattr(config, name, value)
        if found != value:
            raise UnsupportedProblem(f"{type(config).__name__} with {name} {found!r} is not supported, only {value!r}")
