"""Rotary position embedding under upstream's import path: `apply_rotary`, on any device.

GPU tensors go through kernels/portable/rotary.py; CPU tensors, fp64 and machines without Triton through plain PyTorch.
`flash_attn.backends.use` and its environment variable choose as for attention: "portable" is the kernel, "cpu" and
"reference" are PyTorch. What shapes, strides and options decide is decided once and kept, as in `flash_attn.dispatch`.
"""

import logging
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flash_attn import hardware, torch_ops
from flash_attn.backends.launcher import Launcher
from flash_attn.dispatch import MAX_PLANS, contiguous_last, current_scope
from flash_attn.errors import InvalidArgument, UnsupportedProblem
from flash_attn.launch.rotary import power_of_two, rotary_config

MAX_HEADDIM = 256
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
INDEX_DTYPES = (torch.int32, torch.int64)

_log = logging.getLogger("flash_attn")


class Turn(NamedTuple):
    """What a rotation is told besides x, in the operators' order."""

    cos: Tensor
    sin: Tensor
    seqlen_offset: int = 0
    seqlen_offsets: Tensor | None = None
    cu_seqlens: Tensor | None = None
    max_seqlen: int | None = None
    interleaved: bool = False
    conjugate: bool = False
    nheads_rotated: int | None = None


def apply_rotary(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    seqlen_offsets: int | Tensor = 0,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
    interleaved: bool = False,
    inplace: bool = False,
    conjugate: bool = False,
) -> Tensor:
    """Rotate the first rotary_dim dimensions of every head by the angles of the token's position.

    first', second' = first cos - second sin, first sin + second cos
    for the pairs (i, i + rotary_dim / 2), or (2 i, 2 i + 1) if interleaved. Computed in fp32 (fp64 for fp64) and rounded once.
    Row r of sequence b stands at position r + seqlen_offsets[b]. Tokens whose position has no row in cos (which only offsets on
    the device can cause) and packed tokens of no sequence are left as they are. This function carries no gradient;
    `flash_attn.layers.rotary.apply_rotary_emb` does.

    Args:
        x: (batch, seqlen, nheads, headdim), or (total_seqlen, nheads, headdim) with cu_seqlens; headdim at most 256.
        cos, sin: (seqlen_ro, rotary_dim / 2), any floating dtype; rotary_dim <= headdim.
        seqlen_offsets: int, or (batch,) int32 or int64.
        cu_seqlens: (batch + 1,) int32 or int64.
        max_seqlen: no sequence of cu_seqlens is longer.
        inplace: write into x and return it.
        conjugate: rotate backwards, by cos and -sin.

    Returns:
        out: like x.

    Raises:
        InvalidArgument: shapes, dtypes, devices or lengths disagree; the message names both values.
        UnsupportedProblem: the backend that was asked for cannot rotate x.

    Source: flash_attn 2.8.3, flash_attn/ops/triton/rotary.py.
    """
    return rotate_heads(x, cos, sin, seqlen_offsets, cu_seqlens, max_seqlen, interleaved, inplace, conjugate)


def __getattr__(name: str) -> Any:
    """`rotary_kernel`, which upstream defines here; Triton loads with it, not with this module."""
    if name != "rotary_kernel":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from flash_attn.kernels.portable.rotary import rotary_kernel

    return rotary_kernel


def rotate_heads(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    seqlen_offsets: int | Tensor = 0,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
    interleaved: bool = False,
    inplace: bool = False,
    conjugate: bool = False,
    nheads_rotated: int | None = None,
) -> Tensor:
    """As `apply_rotary`, on the first `nheads_rotated` heads; the others are copied."""
    if isinstance(seqlen_offsets, Tensor):
        offset, offsets = 0, seqlen_offsets
    else:
        offset, offsets = seqlen_offsets, None
    turn = Turn(cos, sin, offset, offsets, cu_seqlens, max_seqlen, bool(interleaved), bool(conjugate), nheads_rotated)
    if not torch_ops.observed(x):
        return _rotate(x, turn, inplace)
    ops: Any = torch.ops.flash_attn
    if not inplace:
        return ops._apply_rotary(x.detach(), *turn)
    ops._apply_rotary_(x.detach(), *turn)
    return x


@torch.library.custom_op("flash_attn::_apply_rotary", mutates_args=())
def _apply_rotary(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    seqlen_offset: int,
    seqlen_offsets: Tensor | None,
    cu_seqlens: Tensor | None,
    max_seqlen: int | None,
    interleaved: bool,
    conjugate: bool,
    nheads_rotated: int | None,
) -> Tensor:
    numbers = (max_seqlen, interleaved, conjugate, nheads_rotated)
    return _rotate(x, Turn(cos, sin, seqlen_offset, seqlen_offsets, cu_seqlens, *numbers), inplace=False)


@_apply_rotary.register_fake
def _apply_rotary_fake(x: Tensor, *_turn: Any) -> Tensor:
    return torch.empty_like(contiguous_last(x))


@torch.library.custom_op("flash_attn::_apply_rotary_", mutates_args=("x",))
def _apply_rotary_(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    seqlen_offset: int,
    seqlen_offsets: Tensor | None,
    cu_seqlens: Tensor | None,
    max_seqlen: int | None,
    interleaved: bool,
    conjugate: bool,
    nheads_rotated: int | None,
) -> None:
    numbers = (max_seqlen, interleaved, conjugate, nheads_rotated)
    _rotate(x, Turn(cos, sin, seqlen_offset, seqlen_offsets, cu_seqlens, *numbers), inplace=True)


class Plan(NamedTuple):
    """What the shapes, strides and options of a call decide."""

    launch: Launcher | None  # None: in PyTorch
    seqlen: int | None  # the longest sequence; None: the call's max_seqlen


_plans: dict[Any, Plan] = {}


def _rotate(x: Tensor, turn: Turn, inplace: bool) -> Tensor:
    """One rotation, the way its plan says."""
    cos, sin, offset, offsets, cu_seqlens, max_seqlen, *options = turn
    scope = current_scope()
    key = (*map(_traits, (x, offsets, cu_seqlens)), *map(_table_traits, (cos, sin)), *options, inplace, scope)
    plan = _plans.get(key)
    if plan is None:
        if len(_plans) >= MAX_PLANS:
            _plans.clear()
        plan = _plans[key] = _plan(x, turn, inplace, scope[0])
    _check_lengths(plan.seqlen if plan.seqlen is not None else max_seqlen, turn)
    source = contiguous_last(x)
    if plan.launch is None:
        out = source if inplace else source.detach().clone()
        _rotate_in_pytorch(out, turn)
    else:
        out = source if inplace else torch.empty_like(source)
        tensors = (contiguous_last(cos), contiguous_last(sin), _contiguous(offsets), _contiguous(cu_seqlens))
        with hardware.device_guard(x.device):
            plan.launch(source, out, *tensors, numbers=(offset, cos.shape[0]))
    if not inplace:
        return out
    if source is not x:
        with torch.no_grad():
            x.copy_(out)
    elif plan.launch is not None and not x.is_inference():
        torch.autograd.graph.increment_version(x)
    return x


def _traits(x: Tensor | None) -> Any:
    return None if x is None else (x.shape, x.stride(), x.dtype, x.device)


def _table_traits(x: Tensor) -> Any:
    """Without the number of rows, which changes from token to token where callers slice the table."""
    return x.shape[1:], x.stride(), x.dtype, x.device


def _contiguous(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


def _plan(x: Tensor, turn: Turn, inplace: bool, requested: str | None) -> Plan:
    _check(x, turn)
    if inplace:
        _require_distinct_elements(x)
    source = contiguous_last(x)
    seqlen = x.shape[1] if turn.cu_seqlens is None else None
    if not _runs_in_kernel(x, requested):
        return Plan(None, seqlen)
    return Plan(_bind(source, source if inplace else torch.empty_like(source), turn, inplace), seqlen)


def _runs_in_kernel(x: Tensor, requested: str | None) -> bool:
    """Whether Triton rotates x; PyTorch does what Triton cannot, unless the kernel was asked for by name."""
    if requested not in (None, "portable") or (requested is None and x.device.type == "cpu"):
        return False
    from flash_attn.backends import portable

    dtype = str(x.dtype).removeprefix("torch.")
    reason = portable.no_kernels(dtype, hardware.of(x.device))
    if reason is None:
        return True
    if requested is not None:
        message = f"backend {requested!r} cannot rotate {dtype} tensors on {x.device.type}"
        raise UnsupportedProblem(message, {requested: reason})
    _log.debug("rotary embedding in plain PyTorch: %s", reason)
    return False


def _bind(x: Tensor, out: Tensor, turn: Turn, inplace: bool) -> Launcher:
    """The launch for tensors like these, whose last dimensions are contiguous."""
    from flash_attn.kernels.algebra import arguments
    from flash_attn.kernels.portable.rotary import rotary_kernel

    half, headdim = turn.cos.shape[1], x.shape[-1]
    tail = 0 if inplace else headdim - 2 * half
    half_pad, tail_pad = power_of_two(half), power_of_two(tail)
    nheads_rotated = x.shape[-2] if turn.nheads_rotated is None else turn.nheads_rotated
    nheads = nheads_rotated if inplace else x.shape[-2]
    tokens = math.prod(x.shape[:-2])
    batch_size = x.shape[0] if turn.cu_seqlens is None else turn.cu_seqlens.shape[0] - 1
    seqlen = x.shape[1] if turn.cu_seqlens is None else tokens
    x_strides, out_strides = ((0, *t.stride())[-4:-1] for t in (x, out))
    cos_stride, sin_stride = (contiguous_last(table).stride(0) for table in (turn.cos, turn.sin))
    lengths = (seqlen, tokens, batch_size, nheads, nheads_rotated)

    def build(p: Sequence[Any]) -> tuple[Any, ...]:
        return (p[0], *x_strides), (p[1], *out_strides), p[2], p[3], cos_stride, sin_stride, p[4], p[5], *lengths

    config = rotary_config(max(2 * half_pad, tail_pad), tokens, nheads, hardware.of(x.device))
    constants = {
        "HALF": half,
        "HALF_PAD": half_pad,
        "TAIL": tail,
        "TAIL_PAD": tail_pad,
        "INTERLEAVED": turn.interleaved,
        "CONJUGATE": turn.conjugate,
        "BLOCK_M": config.block_m,
        "BLOCK_H": config.block_h,
    }
    writes = nheads > 0 and (half > 0 or tail > 0)
    num_programs = math.ceil(tokens / config.block_m) * math.ceil(nheads / config.block_h) if writes else 0
    kinds = (arguments.Tensor, arguments.Tensor)
    return Launcher(rotary_kernel, num_programs, build, kinds, constants, {"num_warps": config.num_warps})


@torch.no_grad()
def _rotate_in_pytorch(x: Tensor, turn: Turn) -> None:
    """The rotation of x in place."""
    half = turn.cos.shape[1]
    pairs = x[..., : turn.nheads_rotated, : 2 * half]
    if turn.interleaved:
        first, second = pairs[..., 0::2], pairs[..., 1::2]
    else:
        first, second = pairs[..., :half], pairs[..., half:]
    dtype = torch.promote_types(x.dtype, torch.float32)
    turned = None
    if turn.seqlen_offsets is None and turn.cu_seqlens is None:
        rows: Any = slice(turn.seqlen_offset, turn.seqlen_offset + x.shape[1])
    else:
        position, known = _positions(x, turn)
        turned = known & (position >= 0) & (position < turn.cos.shape[0])
        if turn.cos.shape[0] == 0:
            return
        rows = torch.where(turned, position, 0)
        turned = turned[..., None, None]
    cos, sin = (table[rows].to(dtype).unsqueeze(-2) for table in (turn.cos, turn.sin))
    if turn.conjugate:
        sin = -sin
    a, b = first.to(dtype), second.to(dtype)
    a, b = a * cos - b * sin, a * sin + b * cos
    first.copy_(a if turned is None else torch.where(turned, a, first))
    second.copy_(b if turned is None else torch.where(turned, b, second))


def _positions(x: Tensor, turn: Turn) -> tuple[Tensor, Tensor]:
    """(position, whether the token belongs to a sequence), (batch, seqlen), packed (total_seqlen,)."""
    if turn.cu_seqlens is None:
        row = torch.arange(x.shape[1], device=x.device).expand(x.shape[:2])
        sequence = torch.arange(x.shape[0], device=x.device)[:, None]
        known = torch.ones_like(row, dtype=torch.bool)
    else:
        token, cu_seqlens = torch.arange(x.shape[0], device=x.device), turn.cu_seqlens.long()
        sequence = torch.searchsorted(cu_seqlens[1:], token, right=True)
        known = sequence < cu_seqlens.shape[0] - 1
        sequence = torch.where(known, sequence, 0)
        row = token - cu_seqlens[sequence]
        known &= row >= 0
    if turn.seqlen_offsets is None:
        return row + turn.seqlen_offset, known
    if turn.seqlen_offsets.numel() == 0:
        return row, known
    return row + turn.seqlen_offsets.long()[sequence], known


def _check(x: Tensor, turn: Turn) -> None:
    """Everything about a call but the lengths that `_check_lengths` compares.

    Raises:
        InvalidArgument
    """
    cos, sin = turn.cos, turn.sin
    if turn.cu_seqlens is None:
        _require(x.dim() == 4, f"x must have shape (batch, seqlen, nheads, headdim), got {tuple(x.shape)}")
        batch_size = x.shape[0]
    else:
        _require(
            x.dim() == 3, f"x must have shape (total_seqlen, nheads, headdim) with cu_seqlens, got {tuple(x.shape)}"
        )
        shape = tuple(turn.cu_seqlens.shape)
        _require(len(shape) == 1 and shape[0] >= 1, f"cu_seqlens must have shape (batch + 1,), got {shape}")
        batch_size = shape[0] - 1
    nheads, headdim = x.shape[-2:]
    _require(x.dtype in DTYPES, f"x must be of a floating dtype among {DTYPES}, got {x.dtype}")
    _require(cos.dim() == 2, f"cos must have shape (seqlen_ro, rotary_dim / 2), got {tuple(cos.shape)}")
    _require(sin.dim() == 2, f"sin must have shape (seqlen_ro, rotary_dim / 2), got {tuple(sin.shape)}")
    _require(cos.is_floating_point(), f"cos and sin must be of a floating dtype, got {cos.dtype}")
    _require(cos.dtype == sin.dtype, f"cos and sin must have the same dtype, got {cos.dtype} and {sin.dtype}")
    rotary_dim = 2 * cos.shape[1]
    _require(rotary_dim <= headdim, f"rotary_dim must be <= headdim, got {rotary_dim} and {headdim}")
    _require(headdim <= MAX_HEADDIM, f"Only support headdim <= {MAX_HEADDIM}, got {headdim}")
    rotated = nheads if turn.nheads_rotated is None else turn.nheads_rotated
    _require(0 <= rotated <= nheads, f"{rotated} heads cannot rotate, x has {nheads}")
    if turn.seqlen_offsets is not None:
        shape = tuple(turn.seqlen_offsets.shape)
        _require(shape == (batch_size,), f"seqlen_offsets must have shape (batch,) = ({batch_size},), got {shape}")
    for name, lengths in (("seqlen_offsets", turn.seqlen_offsets), ("cu_seqlens", turn.cu_seqlens)):
        if lengths is not None:
            _require(lengths.dtype in INDEX_DTYPES, f"{name} must have dtype int32 or int64, got {lengths.dtype}")
            _require(lengths.device == x.device, f"{name} must be on the device of x, {x.device}, not {lengths.device}")
    for name, table in (("cos", cos), ("sin", sin)):
        _require(table.device == x.device, f"{name} must be on the device of x, {x.device}, not {table.device}")


def _check_lengths(seqlen: int | None, turn: Turn) -> None:
    """The comparisons that a new length or offset needs again."""
    if seqlen is None:
        raise InvalidArgument("If cu_seqlens is passed in, then max_seqlen must be passed, got max_seqlen None")
    shape = turn.cos.shape
    if turn.sin.shape != shape:
        raise InvalidArgument(f"sin must have the shape of cos, {tuple(shape)}, got {tuple(turn.sin.shape)}")
    if seqlen > shape[0]:
        raise InvalidArgument(f"seqlen_ro must be >= seqlen, got seqlen_ro {shape[0]} and seqlen {seqlen}")
    if not 0 <= turn.seqlen_offset <= shape[0] - seqlen:
        raise InvalidArgument(
            f"seqlen_offsets + seqlen must be <= seqlen_ro and seqlen_offsets >= 0, got seqlen_offsets {turn.seqlen_offset}, "
            f"seqlen {seqlen} and seqlen_ro {shape[0]}"
        )


def _require(holds: bool, message: str) -> None:
    if not holds:
        raise InvalidArgument(message)


def _require_distinct_elements(x: Tensor) -> None:
    if any(size > 1 and stride == 0 for size, stride in zip(x.shape, x.stride(), strict=True)):
        raise InvalidArgument(
            f"inplace: several elements of x share one memory location, shape {tuple(x.shape)} and strides {x.stride()}"
        )
