"""Launches kernels/hopper: the forward of fp16 and bf16 attention on Hopper, warp-specialised and persistent."""

import functools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from flash_attn import hardware as devices
from flash_attn.backends import tensor_maps
from flash_attn.backends.base import ForwardResult, Operands, statistic_strides
from flash_attn.backends.launcher import Launcher
from flash_attn.hardware import Hardware, device_guard
from flash_attn.launch.hopper import CONSUMER_ROWS, head_dim_pad, hopper_forward_config
from flash_attn.problem import AttentionProblem

name = "hopper"
forward_only = "its backward kernels are those of the portable backend"

WORTHWHILE = 1 << 31  # queries * keys * heads * head dim * batch below which the host's time decides


def unsupported(problem: AttentionProblem, hardware: Hardware) -> str | None:
    """Why the Hopper kernels cannot run the problem, or None."""
    if hardware.kind != "cuda" or hardware.arch != "sm_90":
        return f"written for Hopper (sm_90) with its TMA and wgmma; this is {hardware.arch or hardware.kind}"
    if problem.dtype not in ("float16", "bfloat16"):
        return f"computes fp16 and bf16, not {problem.dtype}"
    if problem.layout == "paged":
        return "reads keys through tensor maps, which cannot follow a block table"
    if problem.dropout:
        return "has no dropout"
    if not problem.aligned:
        return (
            "reads operands through tensor maps: addresses and strides must be multiples of 16 bytes, without repeated "
            "elements, and the head dim a multiple of 8"
        )
    return _unknown_release()


@functools.cache
def _unknown_release() -> str | None:
    """Why the installed Triton's Gluon cannot be used, or None."""
    try:
        import triton
    except ImportError:
        return "Triton is not installed; `pip install triton` adds it"
    release = tuple(int(part) for part in triton.__version__.split("+")[0].split(".")[:2])
    if not OLDEST_GLUON <= release <= NEWEST_GLUON:
        known = " to ".join(".".join(map(str, bound)) for bound in (OLDEST_GLUON, NEWEST_GLUON))
        return f"written for the Gluon of Triton {known}; this is {triton.__version__}"
    return None


OLDEST_GLUON, NEWEST_GLUON = (3, 6), (3, 9)


def worthwhile(problem: AttentionProblem) -> bool:
    """Whether the problem is large enough that a faster kernel pays for tensor maps, which cost the host 20 us."""
    work = problem.batch_size * problem.nheads * problem.seqlen_q * problem.seqlen_k * problem.headdim
    return work >= WORTHWHILE


def forward(problem: AttentionProblem, operands: Operands, return_scores: bool = False) -> ForwardResult:
    """One launch."""
    q = operands.q
    out = torch.empty_like(q)
    shape = (q.shape[1], q.shape[0]) if q.dim() == 3 else (q.shape[0], q.shape[2], q.shape[1])
    softmax_lse = torch.empty(shape, dtype=torch.float32, device=q.device)
    if operands.zero_tensors or operands.max_seqlen_q == 0:
        out.zero_()
        softmax_lse.fill_(-math.inf)
    memo = {} if operands.memo is None else operands.memo
    launch = memo.get("forward")
    if launch is None:
        launch = memo["forward"] = bind_forward(problem, operands, out, softmax_lse)
    with device_guard(q.device):
        launch(
            q,
            operands.k,
            operands.v,
            out,
            softmax_lse,
            operands.cu_seqlens_q,
            operands.cu_seqlens_k,
            operands.seqused_k,
            operands.leftpad_k,
            operands.alibi_slopes,
            tile_counter(q.device),
        )
    return ForwardResult(out, softmax_lse, None)


def backward(*_: Any) -> Tensor:
    raise NotImplementedError(forward_only)


_counters: dict[tuple[torch.device, int], Tensor] = {}


def tile_counter(device: torch.device) -> Tensor:
    """(2,) int32 zeros that a launch on the current stream may count in; its last program leaves them zero.

    Launches of one stream follow each other and share one. A captured launch has its own, cleared in its graph, because the
    graph may be replayed on any stream.
    """
    if devices.is_capturing(device):
        return torch.zeros(2, dtype=torch.int32, device=device)
    key = device, devices.current_stream(device)
    counter = _counters.get(key)
    if counter is None:
        counter = _counters[key] = torch.zeros(2, dtype=torch.int32, device=device)
    return counter


def bind_forward(problem: AttentionProblem, operands: Operands, out: Tensor, softmax_lse: Tensor) -> Launcher:
    """The forward launch for tensors like these."""
    from flash_attn.kernels.algebra import arguments
    from flash_attn.kernels.hopper.forward import attn_fwd_kernel

    q, k, v, slopes = operands.q, operands.k, operands.v, operands.alibi_slopes
    config = hopper_forward_config(problem)
    pad = head_dim_pad(problem.headdim)
    nheads, group = q.shape[-2], q.shape[-2] // k.shape[-2]
    batch_size = q.shape[0] if operands.cu_seqlens_q is None else operands.cu_seqlens_q.shape[0] - 1
    num_m = math.ceil(operands.max_seqlen_q / (config.consumers * CONSUMER_ROWS))
    num_tiles = num_m * batch_size * nheads
    maps = [_map(x, rows, pad) for x, rows in ((q, CONSUMER_ROWS), (k, config.block_n), (v, config.block_n))]
    maps.append(_map(out, CONSUMER_ROWS, pad))
    lse_strides = statistic_strides(softmax_lse)
    scale = max(abs(operands.softmax_scale), SMALLEST_SCALE)
    softcap = operands.softcap if operands.softcap > 0.0 else None
    slope_stride = None if slopes is None else (slopes.stride(0) if slopes.dim() == 2 else 0)
    negative = 1 if operands.softmax_scale < 0.0 else None
    numbers = (
        num_tiles,
        num_m,
        math.gcd(config.heads_together, batch_size * nheads),
        nheads,
        group,
        operands.max_seqlen_q,
        operands.max_seqlen_k,
        q.shape[0] if q.dim() == 3 else q.shape[1],
        k.shape[0] if k.dim() == 3 else k.shape[1],
        *operands.window,
    )

    def build(p: Sequence[Any], t: Sequence[Any]) -> tuple[Any, ...]:
        return (
            *[describe(address) for describe, address in zip(maps, p, strict=False)],
            (p[4], *lse_strides),
            (p[5], p[6], p[7], p[8]),
            (scale, softcap, p[9], slope_stride, None, negative),
            p[10],
            *numbers,
        )

    constants = {
        "HEAD_DIM_PAD": pad,
        "BLOCK_N": config.block_n,
        "CONSUMERS": config.consumers,
        "STAGES": config.num_stages,
        "OVERLAP": config.overlap,
        "PING_PONG": config.ping_pong,
        "REGISTERS": config.registers,
    }
    num_programs = min(num_tiles, devices.of(q.device).num_sms) if q.numel() else 0
    kinds = (*[None] * 4, arguments.Tensor, arguments.Sequences, arguments.Score)
    return Launcher(attn_fwd_kernel, num_programs, build, kinds, constants, {"num_warps": 4})


SMALLEST_SCALE = 1e-30  # stands for softmax_scale 0, whose scores must still mask with -inf


def _map(x: Tensor, rows: int, pad: int) -> Any:
    """A function from a tensor like x, or its address, to the map of its (rows, pad) tiles."""
    shape, strides = tensor_maps.extent(x)
    block = [1] * (len(shape) - 3) + [rows, 1, pad]

    def describe(operand: Any) -> Any:
        if isinstance(operand, int):
            return tensor_maps.TensorMap(operand, shape, strides)
        return tensor_maps.gluon_descriptor(operand, block, shape, strides)

    return describe
