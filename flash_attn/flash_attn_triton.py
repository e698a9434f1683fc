"""Attention with an additive bias, on PyTorch's scaled_dot_product_attention: upstream's import path and meaning.

The causal mask of this module is aligned to the top left corner, row i sees keys 0 to i, unlike that of
`flash_attn.flash_attn_func`, whose corner is the bottom right one.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from flash_attn.errors import InvalidArgument


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None = None,
    causal: bool = False,
    softmax_scale: float | None = None,
) -> Tensor:
    """softmax(softmax_scale q k^T + bias) v, differentiable, also in bias.

    Args:
        q: (batch_size, seqlen_q, nheads, headdim).
        k, v: (batch_size, seqlen_k, nheads, headdim).
        bias: (1 or batch_size, 1 or nheads, 1 or seqlen_q, seqlen_k), of the dtype of q or fp32. An fp32 bias of narrower q
            is added in fp32, which costs speed but none of its digits.
        causal: row i sees keys 0 to i.
        softmax_scale: default headdim^-0.5.

    Returns:
        like q.

    Raises:
        InvalidArgument: shapes or dtypes disagree; the message names both.

    Source: flash_attn 2.8.3, flash_attn/flash_attn_triton.py.
    """
    _check(q, k, v, bias)
    dtype = q.dtype
    if bias is not None and bias.dtype != dtype:
        q, k, v = q.to(bias.dtype), k.to(bias.dtype), v.to(bias.dtype)
    mask, is_causal = bias, causal and bias is None
    if bias is not None and causal:
        visible = torch.ones(q.shape[1], k.shape[1], dtype=torch.bool, device=q.device).tril()
        mask = bias.masked_fill(~visible, -torch.inf)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=is_causal, scale=softmax_scale)
    return out.transpose(1, 2).to(dtype)


def flash_attn_qkvpacked_func(
    qkv: Tensor, bias: Tensor | None = None, causal: bool = False, softmax_scale: float | None = None
) -> Tensor:
    """`flash_attn_func` of qkv (batch_size, seqlen, 3, nheads, headdim)."""
    _check_packed("qkv", qkv, 3)
    q, k, v = qkv.unbind(dim=2)
    return flash_attn_func(q, k, v, bias, causal, softmax_scale)


def flash_attn_kvpacked_func(
    q: Tensor, kv: Tensor, bias: Tensor | None = None, causal: bool = False, softmax_scale: float | None = None
) -> Tensor:
    """`flash_attn_func` of kv (batch_size, seqlen_k, 2, nheads, headdim)."""
    _check_packed("kv", kv, 2)
    k, v = kv.unbind(dim=2)
    return flash_attn_func(q, k, v, bias, causal, softmax_scale)


class FlashAttnFunc:
    """`flash_attn_func` under upstream's name of its autograd function; autograd follows the parts instead.

    Source: flash_attn 2.8.3, flash_attn/flash_attn_triton.py.
    """

    apply = staticmethod(flash_attn_func)


class FlashAttnQKVPackedFunc:
    """`flash_attn_qkvpacked_func` under upstream's name of its autograd function; autograd follows the parts instead.

    Source: flash_attn 2.8.3, flash_attn/flash_attn_triton.py.
    """

    apply = staticmethod(flash_attn_qkvpacked_func)


class FlashAttnKVPackedFunc:
    """`flash_attn_kvpacked_func` under upstream's name of its autograd function; autograd follows the parts instead.

    Source: flash_attn 2.8.3, flash_attn/flash_attn_triton.py.
    """

    apply = staticmethod(flash_attn_kvpacked_func)


def _check(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> None:
    if q.dim() != 4 or k.dim() != 4 or (k.shape[0], *k.shape[2:]) != (q.shape[0], *q.shape[2:]):
        raise InvalidArgument(f"q and k differ in more than their lengths: {tuple(q.shape)} and {tuple(k.shape)}")
    if v.shape != k.shape:
        raise InvalidArgument(f"v must have the shape of k, {tuple(k.shape)}, got {tuple(v.shape)}")
    if not q.dtype == k.dtype == v.dtype:
        raise InvalidArgument(f"q, k and v must have the same dtype, got {q.dtype}, {k.dtype} and {v.dtype}")
    if k.shape[1] == 0:
        raise InvalidArgument("seqlen_k must be positive, got 0")
    if bias is None:
        return
    if bias.dtype not in (q.dtype, torch.float32):
        raise InvalidArgument(f"bias must have dtype {q.dtype} or torch.float32, got {bias.dtype}")
    full = (q.shape[0], q.shape[2], q.shape[1], k.shape[1])
    fits = bias.dim() == 4 and bias.shape[3] == full[3]
    if not fits or any(size not in (1, whole) for size, whole in zip(bias.shape, full, strict=True)):
        raise InvalidArgument(
            "Last 2 dimensions of bias must be (1, seqlen_k) or (seqlen_q, seqlen_k), and all of it must broadcast to "
            f"{full}, got {tuple(bias.shape)}"
        )


def _check_packed(name: str, x: Tensor, count: int) -> None:
    if x.dim() != 5 or x.shape[2] != count:
        raise InvalidArgument(
            f"{name} must have shape (batch_size, seqlen, {count}, nheads, headdim), got {tuple(x.shape)}"
        )
