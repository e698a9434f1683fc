"""Images as sequences of patches: upstream's import path and meaning."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from flash_attn.errors import InvalidArgument
from flash_attn.ops.fused_dense import FusedDense


class PatchEmbed(nn.Module):
    """A linear layer of every patch of an image, which equals a convolution of the patch's size and stride.

    Args:
        img_size, patch_size: pixels, or (height, width).
        norm_layer: embed_dim -> module, applied to the result.
        flatten: (batch, patches, embed_dim) instead of (batch, rows, columns, embed_dim).
        fused_bias_fc: FusedDense for nn.Linear, which computes the same.

    Source: flash_attn 2.8.3, flash_attn/layers/patch_embed.py.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int | tuple[int, int] = 16,
        in_chans: int = 3,
        embed_dim: int = 768,
        norm_layer: Callable[[int], nn.Module] | None = None,
        flatten: bool = True,
        bias: bool = True,
        fused_bias_fc: bool = False,
    ) -> None:
        super().__init__()
        self.img_size = (img_size, img_size) if isinstance(img_size, int) else tuple(img_size)
        self.patch_size = (patch_size, patch_size) if isinstance(patch_size, int) else tuple(patch_size)
        self.grid_size = (self.img_size[0] // self.patch_size[0], self.img_size[1] // self.patch_size[1])
        self.num_patches = self.grid_size[0] * self.grid_size[1]
        self.flatten = flatten
        linear = FusedDense if fused_bias_fc else nn.Linear
        self.proj = linear(in_chans * self.patch_size[0] * self.patch_size[1], embed_dim, bias=bias)
        self.norm = nn.Identity() if norm_layer is None else norm_layer(embed_dim)

    def forward(self, x: Tensor) -> Tensor:
        """x (batch, in_chans, height, width), of img_size.

        Raises:
            InvalidArgument: another size, or one that patches do not divide.
        """
        size, (high, wide) = tuple(x.shape[-2:]), self.patch_size
        if size != self.img_size or size[0] % high or size[1] % wide:
            raise InvalidArgument(
                f"image size {size} must be that of the model, {self.img_size}, divisible by {self.patch_size}"
            )
        patches = x.unflatten(3, (-1, wide)).unflatten(2, (-1, high))  # b c rows high columns wide
        embedded = self.proj(torch.permute(patches, (0, 2, 4, 1, 3, 5)).flatten(3))
        return self.norm(embedded.flatten(1, 2) if self.flatten else embedded)
