"""Partial attentions over disjoint keys, made one. Imports torch only.

lse = log(exp(lse_a) + exp(lse_b))        out = exp(lse_a - lse) out_a + exp(lse_b - lse) out_b
"""

import torch
from torch import Tensor

from flash_attn.errors import InvalidArgument


def merge_attention_states(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    """The attention over the keys of both parts, exactly, from each part's out and softmax_lse.

    Differentiable in all four arguments. A part in which a row sees no key (lse -inf) has no weight in that row; where both
    have none, so has the result: out 0, lse -inf, gradients 0. The order of the parts changes no bit. With an attention sink,
    one part alone is given the sink.

    Args:
        out_a: (batch_size, seqlen_q, nheads, headdim), or of a packed batch (total_q, nheads, headdim); any floating dtype.
        lse_a: (batch_size, nheads, seqlen_q), packed (nheads, total_q); fp32, natural log.
        out_b: like out_a.
        lse_b: like lse_a.

    Returns:
        out: like out_a. softmax_lse: like lse_a. The arithmetic is fp32, fp64 for fp64.

    Raises:
        InvalidArgument: shapes, dtypes or devices disagree; the message names both values.
    """
    _check_states(out_a, lse_a, out_b, lse_b)
    work = torch.promote_types(lse_a.dtype, torch.float32)
    lse_a, lse_b = lse_a.to(work), lse_b.to(work)
    # what the exponents are taken against cancels out of the results, and so out of their gradients
    pivot = torch.maximum(lse_a, lse_b).detach()
    empty = pivot == -torch.inf
    pivot = pivot.masked_fill(empty, 0.0)
    exp_a, exp_b = torch.exp(lse_a - pivot), torch.exp(lse_b - pivot)
    total = (exp_a + exp_b).masked_fill(empty, 1.0)
    weight_a, weight_b = ((x / total).transpose(-1, -2)[..., None] for x in (exp_a, exp_b))
    out = weight_a * out_a.to(work) + weight_b * out_b.to(work)
    return out.to(out_a.dtype), (pivot + torch.log(total)).masked_fill(empty, -torch.inf)


def _check_states(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> None:
    for what, a, b in (("out_a and out_b", out_a, out_b), ("lse_a and lse_b", lse_a, lse_b)):
        if a.shape != b.shape or a.dtype != b.dtype or a.device != b.device:
            raise InvalidArgument(
                f"{what} must have the same shape, dtype and device, got {tuple(a.shape)}, {a.dtype} on {a.device} and "
                f"{tuple(b.shape)}, {b.dtype} on {b.device}"
            )
    for name, x in (("out_a", out_a), ("lse_a", lse_a)):
        if not x.is_floating_point():
            raise InvalidArgument(f"{name} must have a floating dtype, got {x.dtype}")
    if out_a.dim() not in (3, 4):
        raise InvalidArgument(
            f"out_a must have shape (batch_size, seqlen_q, nheads, headdim) or (total_q, nheads, headdim), "
            f"got {tuple(out_a.shape)}"
        )
    expected = (*out_a.shape[:-3], out_a.shape[-2], out_a.shape[-3])
    if lse_a.shape != expected:
        raise InvalidArgument(
            f"lse_a must have shape {expected} beside out_a {tuple(out_a.shape)}, got {tuple(lse_a.shape)}"
        )
    if lse_a.device != out_a.device:
        raise InvalidArgument(f"out_a and lse_a must be on the same device, got {out_a.device} and {lse_a.device}")
