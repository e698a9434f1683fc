"""Rotary embedding for tests: the truth in complex numbers, and how far one rounding may be from it."""

import torch
from torch import Tensor


def tables(
    seqlen_ro: int, half: int, dtype: torch.dtype, device: torch.device, generator: torch.Generator
) -> list[Tensor]:
    """cos and sin of random angles, and of random size, as XPos has them; (seqlen_ro, half)."""
    angle = 6.3 * torch.rand(seqlen_ro, half, generator=generator)
    growth = 0.5 + torch.rand(seqlen_ro, half, generator=generator)
    return [(growth * table).to(device, dtype) for table in (angle.cos(), angle.sin())]


def rotated(
    x: Tensor, cos: Tensor, sin: Tensor, position: Tensor, interleaved: bool = False, conjugate: bool = False
) -> Tensor:
    """The truth in fp64. position: x.shape[:-2], its row of cos for every token; -1 leaves the token as it is."""
    half = cos.shape[1]
    x, turn = x.double(), torch.complex(cos.double(), -sin.double() if conjugate else sin.double())
    turn = torch.cat((turn, turn.new_ones(1, half)))[position][..., None, :]  # row -1 is the last one
    pairs = x[..., : 2 * half]
    first, second = pairs.unflatten(-1, (half, 2)).unbind(-1) if interleaved else pairs.chunk(2, -1)
    pairs = torch.view_as_real(torch.complex(first, second) * turn)
    pairs = pairs if interleaved else pairs.transpose(-1, -2)
    return torch.cat((pairs.flatten(-2), x[..., 2 * half :]), dim=-1)


def assert_rounded_once(actual: Tensor, truth: Tensor, largest: float) -> None:
    """|error| <= half a unit in the last place of the result + the fp32 rounding of two products and their sum.

    largest: a bound of |first cos| + |second sin|.
    """
    assert actual.shape == truth.shape
    assert bool(actual.isfinite().all()), "not finite"
    kind, arithmetic = torch.finfo(actual.dtype), torch.finfo(torch.promote_types(actual.dtype, torch.float32))
    roundoff = 3 * arithmetic.eps / 2 * largest
    budget = (truth.abs() + roundoff) * kind.eps / 2 + kind.smallest_normal * kind.eps / 2 + roundoff
    error = (actual.double() - truth).abs()
    bad = error > budget
    assert not bool(bad.any()), (
        f"{int(bad.sum())} of {bad.numel()} wrong, worst {float((error / budget).max()):.3g} budgets"
    )


def bound(x: Tensor, cos: Tensor, sin: Tensor) -> float:
    """Of |first cos| + |second sin|."""
    if min(x.numel(), cos.numel()) == 0:
        return 0.0
    return (x.abs().max().double() * (cos.abs().max().double() + sin.abs().max().double())).item()
