"""The parts of a GPT's layers, chosen by its configuration, and how their weights begin."""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flash_attn.errors import InvalidArgument, UnsupportedProblem
from flash_attn.models.config import head_dim_of
from flash_attn.modules.block import Block, ParallelBlock
from flash_attn.modules.mha import MHA, ParallelMHA
from flash_attn.modules.mlp import FusedMLP, GatedMlp, Mlp, ParallelFusedMLP, ParallelGatedMlp, ParallelMLP
from flash_attn.ops.activations import sqrelu_fwd
from flash_attn.ops.triton.layer_norm import RMSNorm
from flash_attn.ops.triton.mlp import FusedDenseSqreluDense

TANH_GELU = ("gelu_new", "gelu_fast", "gelu_approx", "gelu_pytorch_tanh")
PLAIN: dict[str, Callable[..., Tensor]] = {
    "gelu": F.gelu,
    **dict.fromkeys(TANH_GELU, partial(F.gelu, approximate="tanh")),
    "relu": F.relu,
    "sqrelu": sqrelu_fwd,
}
GATES: dict[str, Callable[..., Tensor]] = {"glu": F.sigmoid, "swiglu": F.silu, "geglu": F.gelu}
FUSED = {**dict.fromkeys(TANH_GELU, "gelu_approx"), "relu": "relu", "sqrelu": "sqrelu"}


def create_mixer_cls(
    config: Any,
    layer_idx: int | None = None,
    process_group: Any = None,
    device: Any = None,
    dtype: torch.dtype | None = None,
) -> Callable[[int], nn.Module]:
    """dim -> the attention of a layer.

    Source: flash_attn 2.8.3, flash_attn/models/gpt.py, also for the fields of the configuration.
    """
    head_dim = head_dim_of(config)
    if process_group is None:
        mixer_cls: Any = partial(
            MHA, fused_bias_fc=getattr(config, "fused_bias_fc", False), dwconv=getattr(config, "attn_dwconv", False)
        )
    else:
        if getattr(config, "attn_dwconv", False):
            raise UnsupportedProblem("heads split over ranks support no attn_dwconv, got True")
        mixer_cls = partial(ParallelMHA, **parallel_options(config, process_group))
    return partial(
        mixer_cls,
        num_heads=config.num_attention_heads,
        num_heads_kv=getattr(config, "n_head_kv", None),
        qkv_proj_bias=getattr(config, "qkv_proj_bias", True),
        out_proj_bias=getattr(config, "out_proj_bias", True),
        dropout=config.attn_pdrop,
        softmax_scale=_softmax_scale(config, head_dim, layer_idx),
        causal=True,
        layer_idx=layer_idx,
        # a fraction that is a quotient may give just less than the whole number it stands for
        rotary_emb_dim=int(getattr(config, "rotary_emb_fraction", 0.0) * head_dim + 1e-6),
        rotary_emb_base=getattr(config, "rotary_emb_base", 10000.0),
        rotary_emb_scale_base=getattr(config, "rotary_emb_scale_base", None),
        rotary_emb_interleaved=getattr(config, "rotary_emb_interleaved", False),
        use_alibi=getattr(config, "use_alibi", False),
        window_size=getattr(config, "window_size", (-1, -1)),
        use_flash_attn=getattr(config, "use_flash_attn", False),
        device=device,
        dtype=dtype,
    )


def create_mlp_cls(
    config: Any,
    layer_idx: int | None = None,
    process_group: Any = None,
    device: Any = None,
    dtype: torch.dtype | None = None,
) -> Callable[[int], nn.Module]:
    """dim -> the MLP of a layer: plain, gated, or with fused_mlp or fused_dense_sqrelu_dense recomputed as they ask.

    Source: flash_attn 2.8.3, flash_attn/models/gpt.py, also for the fields of the configuration.
    """
    activation = config.activation_function
    fused, fused_sqrelu = (getattr(config, name, False) for name in ("fused_mlp", "fused_dense_sqrelu_dense"))
    options: dict[str, Any] = dict(
        hidden_features=config.n_inner,
        bias1=getattr(config, "mlp_fc1_bias", True),
        bias2=getattr(config, "mlp_fc2_bias", True),
        device=device,
        dtype=dtype,
    )
    if process_group is not None:
        options |= parallel_options(config, process_group)
    if fused and fused_sqrelu:
        raise InvalidArgument("fused_mlp and fused_dense_sqrelu_dense exclude each other, got True and True")
    if fused:
        _require_activation(activation, FUSED, "fused_mlp")
        mlp_cls: Any = FusedMLP if process_group is None else ParallelFusedMLP
        level = mlp_checkpoint_lvl(config, layer_idx)
        return partial(mlp_cls, activation=FUSED[activation], checkpoint_lvl=level, **options)
    if fused_sqrelu:
        _require_activation(activation, ("sqrelu",), "fused_dense_sqrelu_dense")
        if process_group is not None:
            raise UnsupportedProblem("fused_dense_sqrelu_dense is not implemented for a process_group; use fused_mlp")
        return partial(FusedDenseSqreluDense, checkpoint_lvl=mlp_checkpoint_lvl(config, layer_idx), **options)
    if activation in GATES:
        mlp_cls = GatedMlp if process_group is None else ParallelGatedMlp
        multiple_of = getattr(config, "mlp_multiple_of", 128)
        return partial(mlp_cls, activation=GATES[activation], multiple_of=multiple_of, **options)
    require_activation(activation)
    return partial(Mlp if process_group is None else ParallelMLP, activation=PLAIN[activation], **options)


def create_block(
    config: Any,
    layer_idx: int | None = None,
    process_group: Any = None,
    device: Any = None,
    dtype: torch.dtype | None = None,
) -> Block | ParallelBlock:
    """A layer: attention and MLP one after the other, or with parallel_block side by side.

    Source: flash_attn 2.8.3, flash_attn/models/gpt.py, also for the fields of the configuration.
    """
    factory: dict[str, Any] = dict(device=device, dtype=dtype)
    prenorm = getattr(config, "prenorm", True)
    options: dict[str, Any] = dict(
        mixer_cls=create_mixer_cls(config, layer_idx, process_group, **factory),
        mlp_cls=create_mlp_cls(config, layer_idx, process_group, **factory),
        norm_cls=norm_cls(config, **factory),
        resid_dropout1=config.embd_pdrop if layer_idx == 0 else config.resid_pdrop,
        resid_dropout2=config.resid_pdrop,
        fused_dropout_add_ln=getattr(config, "fused_dropout_add_ln", False),
        residual_in_fp32=getattr(config, "residual_in_fp32", False),
        sequence_parallel=process_group is not None and getattr(config, "sequence_parallel", True),
        mark_shared_params=process_group is not None,
    )
    if getattr(config, "parallel_block", False):
        if not prenorm:
            raise InvalidArgument("parallel_block needs prenorm=True, got False")
        tied_norm = getattr(config, "parallel_block_tied_norm", False)
        block: Any = ParallelBlock(config.hidden_size, tied_norm=tied_norm, **options)
    else:
        block = Block(config.hidden_size, prenorm=prenorm, **options)
    block.layer_idx = layer_idx
    return block


def norm_cls(config: Any, **factory: Any) -> Callable[[int], Any]:
    """dim -> the norm of the model."""
    return partial(
        RMSNorm if getattr(config, "rms_norm", False) else nn.LayerNorm, eps=config.layer_norm_epsilon, **factory
    )


def parallel_options(config: Any, process_group: Any) -> dict[str, Any]:
    """What every layer split over ranks is told."""
    return dict(process_group=process_group, sequence_parallel=getattr(config, "sequence_parallel", True))


def mlp_checkpoint_lvl(config: Any, layer_idx: int | None) -> int:
    """The level of a layer; the configuration may name one for all or a sequence."""
    level = getattr(config, "mlp_checkpoint_lvl", 0)
    if not isinstance(level, Sequence):
        return level
    if layer_idx is None:
        raise InvalidArgument(f"mlp_checkpoint_lvl {level} needs layer_idx, got None")
    return level[layer_idx]


def require_activation(activation: str) -> None:
    """Refuse a function that no GPT of this package has."""
    _require_activation(activation, (*PLAIN, *GATES), "a GPT")


def init_weights(
    module: nn.Module,
    n_layer: int,
    initializer_range: float = 0.02,
    mup_width_scale: float = 1.0,
    rescale_prenorm_residual: bool = True,
) -> None:
    """Begin with normal weights and no bias; those that end a residual branch are smaller by sqrt(2 n_layer).

    Args:
        mup_width_scale: of μP: variances of matrices shrink by it, their weights say so to an optimizer in `_optim`.

    Source: Radford et al., Language models are unsupervised multitask learners, 2019; flash_attn 2.8.3,
    flash_attn/models/gpt.py.
    """
    std = initializer_range * math.sqrt(mup_width_scale)
    if isinstance(module, nn.Linear):
        nn.init.normal_(module.weight, std=std)
        module.weight._optim = {**getattr(module.weight, "_optim", {}), "lr_multiplier": mup_width_scale}  # type: ignore[attr-defined]
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.Embedding):
        nn.init.normal_(module.weight, std=initializer_range)
    if rescale_prenorm_residual:
        for name, parameter in module.named_parameters():
            if name in ("out_proj.weight", "fc2.weight"):
                nn.init.normal_(parameter, std=std / math.sqrt(2 * n_layer))


def _softmax_scale(config: Any, head_dim: int, layer_idx: int | None) -> float:
    scale = getattr(config, "mup_attn_multiplier", 1.0)
    if config.scale_attn_weights:
        scale *= head_dim ** (-1.0 if getattr(config, "mup_scale_qk_dot_by_d", False) else -0.5)
    if config.scale_attn_by_inverse_layer_idx:
        if layer_idx is None:
            raise InvalidArgument("scale_attn_by_inverse_layer_idx needs layer_idx, got None")
        scale /= layer_idx + 1
    return scale


def _require_activation(activation: str, known: Any, what: str) -> None:
    if activation not in known:
        raise InvalidArgument(f"activation_function of {what} must be one of {list(known)}, got {activation!r}")
