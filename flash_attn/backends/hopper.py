"""Launches kernels/hopper: fp16 and bf16 attention on Hopper, warp-specialised and persistent."""

import functools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from flash_attn import hardware as devices
from flash_attn.backends import tensor_maps
from flash_attn.backends.base import Append, ForwardResult, Gradients, Operands
from flash_attn.backends.dropout_scores import dropout_scores
from flash_attn.backends.fixed_arguments import (
    empty_results,
    fixed_arguments,
    optional_tensors,
    page_numbers,
)
from flash_attn.backends.launcher import Launcher, compile_together
from flash_attn.hardware import Hardware, device_guard
from flash_attn.launch.decode import few_queries, keys_per_split
from flash_attn.launch.forward import work
from flash_attn.launch.hopper import (
    CONSUMER_ROWS,
    copy_columns,
    copy_rows,
    head_dim_pad,
    hopper_forward_config,
    product_width,
)
from flash_attn.problem import AttentionProblem

name = "hopper"

CACHED = ("cache", "paged_cache", "paged")  # layouts that serving has, without gradients
FEWEST_ROWS = 16  # keys of one copy
WORTHWHILE = 1 << 31  # multiplications of a product below which the host's time decides


def unsupported(problem: AttentionProblem, hardware: Hardware) -> str | None:
    """Why the Hopper kernels cannot run the problem, or None."""
    if hardware.kind != "cuda" or hardware.arch != "sm_90":
        return f"written for Hopper (sm_90) with its TMA and wgmma; this is {hardware.arch or hardware.kind}"
    if problem.dtype not in ("float16", "bfloat16"):
        return f"computes fp16 and bf16, not {problem.dtype}"
    if not problem.aligned:
        return (
            "reads operands through tensor maps: addresses and strides must be multiples of 16 bytes, without repeated "
            "elements, the head dim a multiple of 8, and the tokens of a cache or of pages evenly spaced"
        )
    return _copies_across_pages(problem) or _unknown_release()


def _copies_across_pages(problem: AttentionProblem) -> str | None:
    """Why copies of keys would not lie in one page each, or None."""
    if problem.page_size == 0:
        return None
    if problem.leftpad_k:
        return "copies keys from one page at a time, where a left padding shifts blocks against pages"
    if problem.page_size % FEWEST_ROWS:
        return f"copies {FEWEST_ROWS} keys of a page at once or more, of which pages of {problem.page_size} are no multiple"
    return None


def left_to_others(problem: AttentionProblem, hardware: Hardware) -> str | None:
    """Why the automatic choice passes the backend over for a problem that it can run, or None."""
    if _release() != GLUON_RELEASES[0]:
        return f"has run on a GPU with Triton {GLUON_RELEASES[0]} only; this is {_release()}"
    if few_queries(problem, hardware):
        return "splits no keys, which so few queries need"
    if problem.layout in CACHED and _mostly_empty(problem):
        return f"has tiles of {2 * CONSUMER_ROWS} queries at least, of which so few would leave most of each empty"
    too_small = work(problem) < WORTHWHILE
    return "tensor maps cost the host 20 us, too much for a problem so small" if too_small else None


def _mostly_empty(problem: AttentionProblem) -> bool:
    """Whether the queries would fill no more than half of a tile, and the portable kernel's tiles are as fast then: at head dim
    256 they are not (H200, 2026-12-01)."""
    return problem.seqlen_q <= CONSUMER_ROWS and head_dim_pad(problem.headdim) < 256


def _unknown_release() -> str | None:
    """Why the installed Triton's Gluon cannot be used, or None."""
    try:
        release = _release()
    except ImportError:
        return "Triton is not installed; `pip install triton` adds it"
    if release not in GLUON_RELEASES:
        return f"written for the Gluon of Triton {', '.join(GLUON_RELEASES)}; this is {release}"
    return None


@functools.cache
def _release() -> str:
    """Major and minor version of Triton."""
    import triton

    return ".".join(triton.__version__.split("+")[0].split(".")[:2])


# The kernels compile with these (`make test-triton`, 2026-11-22) and have run on a GPU with the first.
GLUON_RELEASES = ("3.6", "3.7", "3.8", "3.9")


def forward(problem: AttentionProblem, operands: Operands, return_scores: bool = False) -> ForwardResult:
    """One launch; a second one for the dropout scores when asked for.

    Over caches and pages the portable one where batch invariance was asked for: the size of a batch decides which backend runs.
    """
    if problem.layout in CACHED and keys_per_split() is not None:
        from flash_attn.backends import portable

        return portable.launch_forward(problem, operands, return_scores)
    q = operands.q
    memo = {} if operands.memo is None else operands.memo
    out, softmax_lse = empty_results(operands, memo)
    launch = memo.get("forward")
    if launch is None:
        launch = memo["forward"] = bind_forward(problem, operands, out)
    with device_guard(q.device):
        optional, counter = optional_tensors(operands), tile_counter(q.device)
        launch(q, operands.k, operands.v, out, softmax_lse, *optional, counter, operands.sinks, operands.block_table)
        scores = dropout_scores(problem, operands) if return_scores else None
    return ForwardResult(out, softmax_lse, scores)


def backward(
    problem: AttentionProblem,
    operands: Operands,
    dout: Tensor,
    out: Tensor,
    softmax_lse: Tensor,
    gradients: Gradients,
) -> Tensor:
    """One pass, with dq reduced in fp32 between a launch that clears it and one that converts it; or two passes."""
    delta = torch.empty_like(softmax_lse)
    memo = {} if operands.memo is None else operands.memo
    device = operands.q.device
    with device_guard(device):
        tensors = operands, dout, out, softmax_lse, delta, gradients, tile_counter(device)
        launch = memo.get("backward")
        if launch is None:
            from flash_attn.backends.hopper_backward import bind_backward

            launch = memo["backward"] = bind_backward(problem, operands, dout, out, gradients)
            compile_together((name, problem, device), lambda: launch(*tensors))
        launch(*tensors)
    return delta


def attend_cache(
    problem: AttentionProblem, operands: Operands, append: Append | None, num_splits: int
) -> ForwardResult:
    """As `portable.attend_cache`, with the forward kernel of this backend."""
    from flash_attn.backends import portable_cache

    kernel = portable_cache.ForwardKernel(forward, num_tiles)
    return portable_cache.attend_cache(problem, operands, append, num_splits, kernel)


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


def num_tiles(problem: AttentionProblem, operands: Operands) -> int:
    """Of a forward whose sequences are all as long as the longest."""
    rows = hopper_forward_config(problem).consumers * CONSUMER_ROWS
    return math.ceil(operands.max_seqlen_q / rows) * fixed_arguments(operands).batch_size * operands.q.shape[-2]


def bind_forward(problem: AttentionProblem, operands: Operands, out: Tensor) -> Launcher:
    """The forward launch for tensors like these."""
    from flash_attn.kernels.algebra import arguments
    from flash_attn.kernels.hopper.forward import attn_fwd_kernel

    q, k, v = operands.q, operands.k, operands.v
    config = hopper_forward_config(problem)
    pad = head_dim_pad(problem.headdim)
    fixed = fixed_arguments(operands)
    heads, tiles = fixed.batch_size * q.shape[-2], num_tiles(problem, operands)
    num_m = tiles // max(1, heads)
    packed = problem.layout != "dense"
    one_page = operands.block_table is None or operands.block_table.shape[1] == 1
    key_rows = config.block_n if one_page else copy_rows(k.shape[1], config.block_n)
    q_map, out_map, k_map, v_map = (
        tensor_maps.hopper(x.flatten(0, -3) if packed else x, rows, copy_columns(problem.headdim, parts))
        for x, rows, parts in (
            (q, CONSUMER_ROWS, False),
            (out, CONSUMER_ROWS, False),
            (k, key_rows, key_rows < config.block_n),
            (v, key_rows, key_rows < config.block_n),
        )
    )
    pages, appended = page_numbers(operands), operands.appended or None

    def build(p: Sequence[Any]) -> tuple[Any, ...]:
        return (
            q_map(p[0]),
            k_map(p[1]),
            v_map(p[2]),
            out_map(p[3]),
            p[4],
            (p[5], p[6], p[7], p[8], appended),
            (p[13], *pages),
            (fixed.scale, fixed.softcap, p[9], *fixed.forward_score, p[12]),
            (p[10], *fixed.dropout),
            p[11],
            tiles,
            num_m,
            min(heads, max(1, config.tiles_together // max(1, num_m))),
            *fixed.lengths,
        )

    constants = {
        "HEAD_DIM_PAD": pad,
        "WIDTH": product_width(problem.headdim),
        "BLOCK_N": config.block_n,
        "CONSUMERS": config.consumers,
        "STAGES": config.num_stages,
        "OVERLAP": config.overlap,
        "PING_PONG": config.ping_pong,
        "DRAW_AHEAD": config.draw_ahead,
        "REGISTERS": config.registers,
        "Q_IN_REGISTERS": config.q_in_registers,
    }
    num_programs = min(tiles, devices.of(q.device).num_sms) if q.numel() else 0
    kinds = (*[None] * 5, arguments.Sequences, arguments.Pages, arguments.Score, arguments.Dropout)
    return Launcher(attn_fwd_kernel, num_programs, build, kinds, constants, {"num_warps": 4})
