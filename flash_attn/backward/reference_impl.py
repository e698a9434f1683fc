"""The gradients of attention written out in plain PyTorch, quadratic in memory. Imports torch only.

It shares nothing with flash_attn.reference, so that the two check each other.

    P  = exp(S - lse)                 recomputed from the saved logsumexp; 0 where masked
    dV = Z^T dO                       Z = dropout(P)
    dP = dropout(dO V^T)              delta = rowsum(dO * O) - dlse, where rowsum(dO * O) = rowsum(P * dP)
    dS = P * (dP - delta)             times 1 - (S / softcap)^2, the derivative of softcap * tanh
    dQ = softmax_scale dS K           dK = softmax_scale dS^T Q
"""

import torch
from torch import Tensor, einsum


def pytorch_flash_attention_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    softmax_lse: Tensor,
    causal: bool = False,
    softmax_scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    keep: Tensor | None = None,
    dropout_p: float = 0.0,
    compute_dtype: torch.dtype = torch.float64,
    round_to: torch.dtype | None = None,
    dlse: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of attention with respect to q, k and v.

    Rows that see no key contribute nothing, whatever their softmax_lse. The gradients of k and v are sums over the
    group of query heads that share them.

    Args:
        dout: (B, Sq, H, D), the gradient of out.
        q: (B, Sq, H, D).
        k: (B, Sk, Hk, D).
        v: like k.
        out: (B, Sq, H, D), of the forward.
        softmax_lse: (B, H, Sq), of the forward, natural log.
        causal: sets the right side of the window to 0.
        softmax_scale: default D**-0.5.
        window_size: (left, right) keys visible on each side, inclusive; -1 is unbounded; bottom-right aligned.
        softcap: 0 is off.
        alibi_slopes: (H,) or (B, H).
        keep: bool (B, H, Sq, Sk), False where the forward dropped the weight; None is no dropout.
        dropout_p: with keep, the forward scaled the kept weights by 1 / (1 - dropout_p).
        round_to: round dropout(P) and dS before the products, as a fused kernel does; compute_dtype is then float32.
        dlse: (B, H, Sq), the gradient of softmax_lse; None is 0.

    Returns:
        dq, dk, dv: like q, k, v, in their dtypes.

    Source: FlashAttention-2 (arXiv:2307.08691) algorithm 2, without the tiles.
    """
    batch_size, seqlen_q, nheads, headdim = q.shape
    seqlen_k, nheads_k = k.shape[1:3]
    heads = (nheads_k, nheads // nheads_k)
    softmax_scale = headdim**-0.5 if softmax_scale is None else softmax_scale
    dtypes = q.dtype, k.dtype, v.dtype

    # i: query, j: key, h: key head, g: query head within its group
    q, out, dout = (x.to(compute_dtype).unflatten(2, heads) for x in (q, out, dout))  # bihgd
    k, v = k.to(compute_dtype), v.to(compute_dtype)  # bjhd
    lse = softmax_lse.to(compute_dtype).unflatten(1, heads)[..., None]  # bhgi1

    s = einsum("bihgd,bjhd->bhgij", q, k) * softmax_scale
    cap_slope: Tensor | float = 1.0
    if softcap > 0.0:
        s = softcap * torch.tanh(s / softcap)
        cap_slope = 1 - (s / softcap) ** 2
    offset = _diagonal_offset(seqlen_q, seqlen_k, q.device)
    if alibi_slopes is not None:
        slopes = alibi_slopes.to(compute_dtype).expand(batch_size, nheads).unflatten(1, heads)
        s = s - slopes[..., None, None] * offset.abs()
    p = torch.exp(s - lse).masked_fill(_hidden(offset, causal, window_size), 0.0)

    dropout: Tensor | float = 1.0 if keep is None else keep.to(compute_dtype).unflatten(1, heads) / (1 - dropout_p)
    delta = einsum("bihgd,bihgd->bhgi", dout, out)[..., None]
    if dlse is not None:
        delta = delta - dlse.to(compute_dtype).unflatten(1, heads)[..., None].masked_fill(lse.isinf(), 0.0)
    dp = einsum("bihgd,bjhd->bhgij", dout, v) * dropout
    ds = p * (dp - delta) * cap_slope
    z = p * dropout
    if round_to is not None:
        z, ds = (x.to(round_to).to(compute_dtype) for x in (z, ds))

    dq = einsum("bhgij,bjhd->bihgd", ds, k).flatten(2, 3) * softmax_scale
    dk = einsum("bhgij,bihgd->bjhd", ds, q) * softmax_scale
    dv = einsum("bhgij,bihgd->bjhd", z, dout)
    return dq.to(dtypes[0]), dk.to(dtypes[1]), dv.to(dtypes[2])


def _diagonal_offset(seqlen_q: int, seqlen_k: int, device: torch.device) -> Tensor:
    """j - i - (Sk - Sq), (Sq, Sk): 0 on the diagonal that ends in the bottom right corner."""
    i = torch.arange(seqlen_q, device=device).unsqueeze(1)
    j = torch.arange(seqlen_k, device=device).unsqueeze(0)
    return j - i - (seqlen_k - seqlen_q)


def _hidden(offset: Tensor, causal: bool, window_size: tuple[int, int]) -> Tensor:
    """Which keys each row may not see, bool (Sq, Sk)."""
    left, right = (int(side) for side in window_size)
    right = 0 if causal else right
    hidden = torch.zeros_like(offset, dtype=torch.bool)
    if left >= 0:
        hidden |= offset < -left
    if right >= 0:
        hidden |= offset > right
    return hidden
