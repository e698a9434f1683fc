"""The Vision Transformer, with timm's names: upstream's import path and meaning."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from flash_attn.errors import UnsupportedProblem
from flash_attn.layers.patch_embed import PatchEmbed
from flash_attn.models.state_dict import StateDict, change, rename, split
from flash_attn.modules.block import Block, StochasticDepth
from flash_attn.modules.mha import MHA
from flash_attn.modules.mlp import FusedMLP, Mlp
from flash_attn.ops.triton.layer_norm import layer_norm_fn

NAMES = {"blocks.#.attn.qkv.": "blocks.#.mixer.Wqkv.", "blocks.#.attn.proj.": "blocks.#.mixer.out_proj."}
# arguments of which upstream, too, takes one value only
ONLY = dict(global_pool="token", class_token=True, init_values=None, weight_init="", fc_norm=None, pre_norm=False)
ONLY |= dict(mode="", pretrained=False)


def create_mixer_cls(
    num_heads: int,
    qkv_bias: bool,
    attn_drop: float,
    use_flash_attn: bool,
    fused_bias_fc: bool,
    cross_attn: bool = False,
) -> Callable[[int], nn.Module]:
    """dim -> the attention of a block."""
    return partial(
        MHA,
        num_heads=num_heads,
        cross_attn=cross_attn,
        qkv_proj_bias=qkv_bias,
        dropout=attn_drop,
        fused_bias_fc=fused_bias_fc,
        use_flash_attn=use_flash_attn,
    )


def create_mlp_cls(
    embed_dim: int, mlp_ratio: float, act_layer: Callable[[], nn.Module], fused_mlp: bool
) -> Callable[[int], nn.Module]:
    """dim -> the MLP of a block; fused_mlp has the approximate gelu for nn.GELU, as upstream, and no other activation.

    Raises:
        UnsupportedProblem: fused_mlp with another activation.
    """
    activation, hidden_features = act_layer(), int(embed_dim * mlp_ratio)
    if not fused_mlp:
        return partial(Mlp, hidden_features=hidden_features, activation=activation)
    if not isinstance(activation, nn.GELU):
        raise UnsupportedProblem(f"fused_mlp has only a gelu, got act_layer {activation}")
    return partial(FusedMLP, hidden_features=hidden_features)


def create_block(
    embed_dim: int,
    num_heads: int,
    mlp_ratio: float,
    qkv_bias: bool,
    drop_rate: float,
    attn_drop_rate: float,
    drop_path1: float,
    drop_path2: float,
    norm_layer: Callable[[int], nn.Module],
    act_layer: Callable[[], nn.Module],
    use_flash_attn: bool,
    fused_bias_fc: bool,
    fused_mlp: bool,
    fused_dropout_add_ln: bool,
    layer_idx: int | None = None,
    n_layer: int | None = None,
    last_layer_subset: bool = False,
) -> Block:
    """A block with its residual in fp32; with last_layer_subset the last one can have the class token as its only query."""
    cross_attn = last_layer_subset and n_layer is not None and layer_idx == n_layer - 1
    return Block(
        embed_dim,
        create_mixer_cls(num_heads, qkv_bias, attn_drop_rate, use_flash_attn, fused_bias_fc, cross_attn),
        create_mlp_cls(embed_dim, mlp_ratio, act_layer, fused_mlp),
        norm_cls=norm_layer,
        prenorm=True,
        resid_dropout1=drop_rate,
        resid_dropout2=drop_rate,
        drop_path1=drop_path1,
        drop_path2=drop_path2,
        fused_dropout_add_ln=fused_dropout_add_ln,
        residual_in_fp32=True,
    )


class VisionTransformer(nn.Module):
    """Classes of images from the class token behind a sequence of blocks.

    Args:
        img_size, patch_size: pixels, or (height, width).
        num_classes: 0 is no head: forward returns features.
        no_embed_class: the class token has no position.
        drop_rate, attn_drop_rate: of elements behind the branches, of attention weights.
        drop_path_rate: of whole samples, rising linearly from 0 in the first block.
        embed_layer: makes patches; fused_bias_fc is for PatchEmbed only.
        norm_layer: dim -> norm; default nn.LayerNorm with eps 1e-6.
        act_layer: () -> activation; default nn.GELU.
        global_pool, init_values, class_token, pre_norm, fc_norm, weight_init: timm's, at the defaults only.

    Raises:
        UnsupportedProblem: an argument of the last line differs from its default.

    Source: Dosovitskiy et al., An image is worth 16x16 words, 2020; flash_attn 2.8.3, flash_attn/models/vit.py.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int | tuple[int, int] = 16,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "token",
        embed_dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        init_values: float | None = None,
        class_token: bool = True,
        no_embed_class: bool = False,
        pre_norm: bool = False,
        fc_norm: bool | None = None,
        drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        weight_init: str = "",
        embed_layer: Any = PatchEmbed,
        norm_layer: Any = None,
        act_layer: Any = None,
        use_flash_attn: bool = False,
        fused_bias_fc: bool = False,
        fused_mlp: bool = False,
        fused_dropout_add_ln: bool = False,
    ) -> None:
        super().__init__()
        _require(global_pool=global_pool, class_token=class_token, init_values=init_values)
        _require(weight_init=weight_init, fc_norm=fc_norm, pre_norm=pre_norm)
        norm_layer = norm_layer or partial(nn.LayerNorm, eps=1e-6)
        self.num_classes = num_classes
        self.global_pool = global_pool
        self.num_features = self.embed_dim = embed_dim
        self.num_prefix_tokens = 1
        self.no_embed_class = no_embed_class
        self.fused_dropout_add_ln = fused_dropout_add_ln

        fused = {"fused_bias_fc": fused_bias_fc} if embed_layer is PatchEmbed else {}
        self.patch_embed = embed_layer(
            img_size=img_size, patch_size=patch_size, in_chans=in_chans, embed_dim=embed_dim, bias=True, **fused
        )
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        positions = self.patch_embed.num_patches + (0 if no_embed_class else self.num_prefix_tokens)
        # drawn, though init_weights draws anew, so that a seed gives upstream's weights
        self.pos_embed = nn.Parameter(0.02 * torch.randn(1, positions, embed_dim))
        drop_paths = [drop_path_rate * index / max(depth - 1, 1) for index in range(depth)]
        layers = dict(norm_layer=norm_layer, act_layer=act_layer or nn.GELU)
        options = dict(use_flash_attn=use_flash_attn, fused_mlp=fused_mlp, fused_dropout_add_ln=fused_dropout_add_ln)
        block = partial(create_block, embed_dim, num_heads, mlp_ratio, qkv_bias, drop_rate, attn_drop_rate)
        self.blocks = _blocks(partial(block, fused_bias_fc=fused_bias_fc, **layers, **options), drop_paths)
        self.dropout = nn.Dropout(drop_rate)
        self.drop_path = StochasticDepth(drop_paths[-1])
        self.norm = norm_layer(embed_dim)
        self.head = nn.Linear(embed_dim, num_classes) if num_classes > 0 else nn.Identity()
        self.init_weights(weight_init)

    def init_weights(self, mode: str = "") -> None:
        """Weights of timm's first scheme."""
        _require(mode=mode)
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        nn.init.normal_(self.cls_token, std=1e-6)
        for name, module in self.named_modules():
            if module is not self:
                init_weights_vit_timm(module, name)

    def _init_weights(self, m: nn.Module) -> None:
        init_weights_vit_timm(m)

    def no_weight_decay(self) -> set[str]:
        """Parameters that an optimizer leaves undecayed."""
        return {"pos_embed", "cls_token"}

    def forward_features(self, x: Tensor, all_tokens: bool = True) -> Tensor:
        """(batch, in_chans, height, width) -> (batch, 1 + patches, embed_dim); else (batch, 1, embed_dim), the class token."""
        hidden_states, residual = self._pos_embed(self.patch_embed(x)), None
        last = len(self.blocks) - 1
        for index, block in enumerate(self.blocks):
            subset = slice(0, 1) if index == last and not all_tokens else None
            hidden_states, residual = block(hidden_states, residual, mixer_subset=subset)
        norm: Any = self.norm
        if not self.fused_dropout_add_ln:
            total = self.drop_path(self.dropout(hidden_states)) + residual
            return norm(total.to(norm.weight.dtype))
        rowscale = None
        if self.drop_path.p > 0.0 and self.training:
            rowscale = self.drop_path(hidden_states.new_ones(hidden_states.shape[:-1]))
        return layer_norm_fn(
            hidden_states,
            norm.weight,
            norm.bias,
            residual=residual,
            eps=norm.eps,
            dropout_p=self.dropout.p if self.training else 0.0,
            rowscale=rowscale,
            prenorm=False,
        )

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Features of tokens, the class token first -> (batch, num_classes), with pre_logits (batch, embed_dim)."""
        return x[:, 0] if pre_logits else self.head(x[:, 0])

    def forward(self, x: Tensor) -> Tensor:
        """(batch, in_chans, height, width) -> (batch, num_classes)."""
        return self.forward_head(self.forward_features(x, all_tokens=False))

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """nn.Module's, which also takes timm's names, with a convolution that makes the patches."""
        renamed: StateDict = rename(state_dict, NAMES)
        change(renamed, "patch_embed.proj.weight", lambda weight: weight.flatten(1))
        # the last block has its queries apart
        mixer = f"blocks.{len(self.blocks) - 1}.mixer."
        dims = (self.embed_dim, 2 * self.embed_dim)
        split(renamed, mixer + "Wqkv.", (mixer + "Wq.", mixer + "Wkv."), dims)
        return super().load_state_dict(renamed, strict=strict, assign=assign)

    def _pos_embed(self, patches: Tensor) -> Tensor:
        """Positions added and the class token in front, in either order."""
        token = self.cls_token.expand(patches.shape[0], -1, -1)
        if self.no_embed_class:
            return torch.cat((token, patches + self.pos_embed), dim=1)
        return torch.cat((token, patches), dim=1) + self.pos_embed


def init_weights_vit_timm(module: nn.Module, name: str = "") -> None:
    """Truncated normal weights of a linear layer and no bias; a module that can do it by itself does."""
    own: Any = getattr(module, "init_weights", None)
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif own is not None:
        own()


def vit_base_patch16_224(pretrained: bool = False, **kwargs: Any) -> VisionTransformer:
    """ViT-B/16 for images of 224 pixels.

    Raises:
        UnsupportedProblem: pretrained, as upstream.
    """
    _require(pretrained=pretrained)
    return VisionTransformer(**dict(patch_size=16, embed_dim=768, depth=12, num_heads=12) | kwargs)


def _blocks(block: Callable[..., Block], drop_paths: list[float]) -> nn.ModuleList:
    """One block for each rate of dropped paths; it drops from what the one before it added, then from its own attention."""
    before = [0.0, *drop_paths]
    return nn.ModuleList(
        block(
            drop_path1=before[index],
            drop_path2=rate,
            layer_idx=index,
            n_layer=len(drop_paths),
            last_layer_subset=True,
        )
        for index, rate in enumerate(drop_paths)
    )


def _require(**values: Any) -> None:
    for name, value in values.items():
        if value != ONLY[name]:
            raise UnsupportedProblem(f"{name} must be {ONLY[name]!r}, got {value!r}")
