"""Exact probes: inputs whose attention is known without a reference and almost without a tolerance.

`attend(q, k, v, causal=..., window_size=...)` returns (out, softmax_lse) of a dense batch. A case supplies the shapes,
the dtype and the mask; its softcap, ALiBi and dropout are not used.
"""

import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from tests.support.cases import Case

Attend = Callable[..., tuple[Tensor, Tensor]]

NEEDLE_SCORE = 200.0  # exp(-200) is 0 in float32, and the operands still fit float16


def check_zero_query(attend: Attend, case: Case, device: torch.device | str, seed: int = 0) -> None:
    """q = 0 weighs all visible keys alike: exp(lse) is their number and out their mean.

    v holds small integers, so the sum is exact in float32 and only the division rounds.
    """
    mask = _visible(case, device)  # (Sq, Sk)
    count = mask.sum(-1).double()
    q, k, v = _tensors(case, device, seed)
    v = (3 * v).round().clamp(-8, 8)
    out, lse = attend(torch.zeros_like(q), k, v, causal=case.causal, window_size=case.window)

    found = lse.double().exp()  # (B, H, Sq)
    wrong = (found - count).abs() > 0.01
    assert not wrong.any(), (
        f"visible keys: {_first(found, wrong)} instead of {_first(count.expand_as(found), wrong)} "
        f"in {int(wrong.sum())} of {wrong.numel()} rows, first at {_where(wrong)}"
    )
    mean = torch.einsum("ij,bjhd->bihd", mask.double(), _expand(v, case).double()) / count.clamp_min(1)[:, None, None]
    _assert_rounded(out, mean, "mean of the visible values")


def check_one_hot_values(attend: Attend, case: Case, device: torch.device | str, seed: int = 0) -> Tensor:
    """v = one-hot makes the output P itself: each row sums to 1 (0 without keys), hidden keys weigh 0.

    Returns:
        P: (B, H, Sq, Sk), float64, as rounded by the attention under test; one call per headdim keys.
    """
    mask = _visible(case, device)
    q, k, v = _tensors(case, device, seed)
    columns = []
    for begin in range(0, k.shape[1], case.headdim):
        width = min(case.headdim, k.shape[1] - begin)
        one_hot = torch.zeros_like(v)
        one_hot[:, begin : begin + width, :, :width] = torch.eye(width, dtype=v.dtype, device=device)[:, None]
        out, _ = attend(q, k, one_hot, causal=case.causal, window_size=case.window)
        columns.append(out[..., :width].transpose(1, 2).double())
    p = torch.cat(columns, dim=-1)
    assert (p >= 0).all(), f"negative weight {p.min().item()}"
    hidden = (p != 0) & ~mask
    assert not hidden.any(), f"{int(hidden.sum())} hidden keys have weight, first at {_where(hidden)}"
    row_sum = p.sum(-1)
    eps = torch.finfo(case.dtype).eps + 1e-5
    wrong = (row_sum - mask.any(-1).double()).abs() > eps
    assert not wrong.any(), f"row sum {_first(row_sum, wrong)} instead of 0 or 1, first at {_where(wrong)}"
    return p


def check_needle(
    attend: Attend, case: Case, device: torch.device | str, seed: int = 0, positions: Iterable[int] | None = None
) -> None:
    """One key with a huge score is the output of every row that sees it, exactly.

    Args:
        positions: where to hide it; default the first, middle and last key and both sides of each 64th.
    """
    seqlen_k = case.seqlens_k[0]
    if positions is None:
        steps = range(64, seqlen_k, 64)
        positions = sorted({0, seqlen_k // 2, seqlen_k - 1, *steps, *(n - 1 for n in steps)})
    mask = _visible(case, device)
    q, k, v = _tensors(case, device, seed)
    ones = torch.ones_like(q)
    for position in positions:
        k = torch.zeros_like(k)
        k[:, position] = NEEDLE_SCORE / math.sqrt(case.headdim)
        out, _ = attend(ones, k, v, causal=case.causal, window_size=case.window)
        rows = mask[:, position]
        needle = _expand(v, case)[:, position, None].expand_as(out)
        # fp32 shows the last bit of (p v) (1 / p), which half types round away
        room = 4 * torch.finfo(case.dtype).eps if case.dtype == torch.float32 else 0.0
        wrong = ((out - needle).abs() > room * needle.abs())[:, rows]
        assert not wrong.any(), f"needle at key {position} missed by {int(wrong.any(-1).sum())} rows that see it"


def _tensors(case: Case, device: torch.device | str, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    assert case.layout == "dense", f"{case.name}: probes are dense"
    generator = torch.Generator().manual_seed(seed)
    q_shape = (case.batch_size, case.seqlens_q[0], case.nheads, case.headdim)
    k_shape = (case.batch_size, case.seqlens_k[0], case.nheads_k, case.headdim)
    q, k, v = (torch.randn(shape, generator=generator).to(device, case.dtype) for shape in (q_shape, k_shape, k_shape))
    return q, k, v


def _visible(case: Case, device: torch.device | str) -> Tensor:
    """(Sq, Sk), written without flash_attn.reference so that the reference can be probed too."""
    seqlen_q, seqlen_k = case.seqlens_q[0], case.seqlens_k[0]
    left, right = case.interval
    mask = torch.zeros(seqlen_q, seqlen_k, dtype=torch.bool)
    for i in range(seqlen_q):
        diagonal = i + seqlen_k - seqlen_q
        begin = 0 if left is None else max(0, diagonal - left)
        end = seqlen_k if right is None else max(0, diagonal + right + 1)
        mask[i, begin:end] = True
    return mask.to(device)


def _expand(v: Tensor, case: Case) -> Tensor:
    return v.repeat_interleave(case.nheads // case.nheads_k, dim=2)


def _assert_rounded(actual: Tensor, exact: Tensor, what: str) -> None:
    wrong = (actual.double() - exact).abs() > torch.finfo(actual.dtype).eps * exact.abs() + 1e-5
    assert not wrong.any(), (
        f"{what}: {_first(actual, wrong)} instead of {_first(exact, wrong)} "
        f"at {int(wrong.sum())} of {wrong.numel()}, first at {_where(wrong)}"
    )


def _where(wrong: Tensor) -> tuple[int, ...]:
    return tuple(wrong.nonzero()[0].tolist())


def _first(values: Tensor, wrong: Tensor) -> float:
    return values[_where(wrong)].item()
