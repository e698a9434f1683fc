"""Launches kernels/portable: the whole feature set, on any hardware that Triton compiles for, and in its interpreter.

What a launch needs besides the tensors' contents follows from their shapes, strides and options alone; it is bound once, into
the operands' `memo`, and reused.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from flash_attn.backends.base import ForwardResult, Gradients, Operands
from flash_attn.backends.launcher import Launcher
from flash_attn.errors import UnsupportedProblem
from flash_attn.hardware import Hardware, device_guard
from flash_attn.hardware import of as hardware_of
from flash_attn.launch.backward import BackwardConfig, dkdv_config, dq_config
from flash_attn.launch.forward import ForwardConfig, forward_config, head_dim_pad
from flash_attn.problem import AttentionProblem

name = "portable"

SMALLEST_SCALE = 1e-30  # stands for softmax_scale 0, whose scores must still mask with -inf
DROPOUT_LEVELS = 65536  # 16 random bits decide about a weight


def unsupported(problem: AttentionProblem, hardware: Hardware) -> str | None:
    """Why Triton's kernels cannot run the problem, or None."""
    if not _triton_installed():
        return "Triton is not installed; `pip install triton` adds it"
    if problem.dtype == "float64":
        return "float64 is not a Triton kernel dtype here; the reference backend computes it"
    if hardware.kind == "cpu":
        if not _interpreting():
            return "Triton compiles for GPUs; on the CPU it runs only in its interpreter (TRITON_INTERPRET=1)"
        if problem.dtype == "bfloat16":
            return "Triton's interpreter multiplies bfloat16 wrongly; use float16 or float32 with it"
    if hardware.kind == "cuda" and int(hardware.arch.removeprefix("sm_")) < 80:
        return f"FlashAttention only supports Ampere GPUs or newer, this one is {hardware.arch}"
    return None


@functools.cache
def _triton_installed() -> bool:
    try:
        import triton  # noqa: F401
    except ImportError:
        return False
    return True


def _interpreting() -> bool:
    import triton

    return bool(triton.knobs.runtime.interpret)


def forward(problem: AttentionProblem, operands: Operands, return_scores: bool = False) -> ForwardResult:
    """One launch; a second one for the dropout scores when asked for."""
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
        launch(q, operands.k, operands.v, out, softmax_lse, *_optional_tensors(operands), operands.block_table)
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
    """Two launches: row statistics and dq per query block, then dk and dv per key block."""
    if operands.block_table is not None:
        raise UnsupportedProblem("block_table is forward only: a paged cache has no gradient")
    delta, lse_log2 = torch.empty_like(softmax_lse), torch.empty_like(softmax_lse)
    memo = {} if operands.memo is None else operands.memo
    bound = memo.get("backward")
    if bound is None:
        bound = memo["backward"] = (
            bind_dq(problem, operands, dout, out, softmax_lse, gradients.dq),
            bind_dkdv(problem, operands, dout, softmax_lse, gradients.dk, gradients.dv),
        )
    launch_dq, launch_dkdv = bound
    q, k, v = operands.q, operands.k, operands.v
    optional = _optional_tensors(operands)
    with device_guard(q.device):
        launch_dq(q, k, v, out, dout, gradients.dq, softmax_lse, delta, lse_log2, *optional)
        for launch in launch_dkdv:
            launch(q, k, v, dout, gradients.dk, gradients.dv, delta, lse_log2, *optional)
    return delta


def bind_forward(problem: AttentionProblem, operands: Operands, out: Tensor, softmax_lse: Tensor) -> Launcher:
    """The forward launch for tensors like these."""
    from flash_attn.kernels.portable.forward import attn_fwd_kernel

    q, k, v = operands.q, operands.k, operands.v
    hardware = hardware_of(q.device)
    config = forward_config(problem, hardware)
    tma = config.tma and _tma_allowed(problem, hardware, k, v)
    fixed = _Fixed(operands)
    q_strides, k_strides, v_strides, out_strides = (_strides(x) for x in (q, k, v, out))
    lse_strides = _statistic_strides(softmax_lse)
    pages = _page_numbers(operands)

    def build(p: Sequence[Any], t: Sequence[Any]) -> tuple[Any, ...]:
        return (
            fixed.tensor(p[0], *q_strides),
            fixed.tensor(p[1], *k_strides),
            fixed.tensor(p[2], *v_strides),
            fixed.tensor(p[3], *out_strides),
            fixed.tensor(p[4], *lse_strides),
            _descriptor(t[1], config.block_n) if tma else None,
            _descriptor(t[2], config.block_n) if tma else None,
            fixed.sequences(p[5], p[6], p[7], p[8]),
            fixed.pages(p[11], *pages),
            fixed.score(p[9]),
            fixed.dropout(p[10]),
            *fixed.lengths,
        )

    num_programs = math.ceil(operands.max_seqlen_q / config.block_m) * fixed.batch_size * q.shape[-2]
    return Launcher(attn_fwd_kernel, num_programs if q.numel() else 0, build, *_tile(problem, config))


def bind_dq(
    problem: AttentionProblem, operands: Operands, dout: Tensor, out: Tensor, softmax_lse: Tensor, dq: Tensor
) -> Launcher:
    """The launch that writes delta, lse_log2 and dq, for tensors like these."""
    from flash_attn.kernels.portable.backward import attn_bwd_dq_kernel

    q, k, v = operands.q, operands.k, operands.v
    hardware = hardware_of(q.device)
    config = dq_config(problem, hardware)
    tma = config.tma and _tma_allowed(problem, hardware, k, v)
    fixed = _Fixed(operands)
    strides = [_strides(x) for x in (q, k, v, out, dout, dq)] + [_statistic_strides(softmax_lse)] * 3

    def build(p: Sequence[Any], t: Sequence[Any]) -> tuple[Any, ...]:
        return (
            *(fixed.tensor(pointer, *stride) for pointer, stride in zip(p, strides, strict=False)),
            _descriptor(t[1], config.block_n) if tma else None,
            _descriptor(t[2], config.block_n) if tma else None,
            fixed.sequences(p[9], p[10], p[11], p[12]),
            fixed.score(p[13]),
            fixed.dropout(p[14]),
            *fixed.lengths,
        )

    num_programs = math.ceil(operands.max_seqlen_q / config.block_m) * fixed.batch_size * q.shape[-2]
    return Launcher(attn_bwd_dq_kernel, num_programs if q.numel() else 0, build, *_tile(problem, config))


def bind_dkdv(
    problem: AttentionProblem, operands: Operands, dout: Tensor, softmax_lse: Tensor, dk: Tensor, dv: Tensor
) -> tuple[Launcher, ...]:
    """The launch that writes dk and dv, or the two that write one each, for tensors like these."""
    from flash_attn.kernels.portable.backward import attn_bwd_dkdv_kernel

    q, k, v = operands.q, operands.k, operands.v
    hardware = hardware_of(q.device)
    tma_allowed = _tma_allowed(problem, hardware, q, dout)
    fixed = _Fixed(operands)
    strides = [_strides(x) for x in (q, k, v, dout, dk, dv)] + [_statistic_strides(softmax_lse)] * 2

    def launcher(config: BackwardConfig, with_dk: bool, with_dv: bool) -> Launcher:
        tma = config.tma and tma_allowed

        def build(p: Sequence[Any], t: Sequence[Any]) -> tuple[Any, ...]:
            tensors = [fixed.tensor(pointer, *stride) for pointer, stride in zip(p, strides, strict=False)]
            return (
                *tensors[:4],
                tensors[4] if with_dk else None,
                tensors[5] if with_dv else None,
                *tensors[6:],
                _descriptor(t[0], config.block_m) if tma else None,
                _descriptor(t[3], config.block_m) if tma else None,
                fixed.sequences(p[8], p[9], p[10], p[11]),
                fixed.score(p[12]),
                fixed.dropout(p[13]),
                *fixed.lengths,
            )

        num_programs = math.ceil(operands.max_seqlen_k / config.block_n) * fixed.batch_size * k.shape[-2]
        return Launcher(attn_bwd_dkdv_kernel, num_programs if k.numel() else 0, build, *_tile(problem, config))

    configs = dkdv_config(problem, hardware)
    if isinstance(configs, BackwardConfig):
        return (launcher(configs, True, True),)
    dk_config, dv_config = configs
    return launcher(dk_config, True, False), launcher(dv_config, False, True)


def dropout_scores(problem: AttentionProblem, operands: Operands) -> Tensor:
    """S_dmask: exp(score - row maximum), negative where dropped; (batch, nheads, round128(seqlen_q), round128(seqlen_k))."""
    from flash_attn.kernels.portable.scores import attn_scores_kernel

    q, k = operands.q, operands.k
    fixed = _Fixed(operands)
    padded = [math.ceil(length / 128) * 128 for length in (operands.max_seqlen_q, operands.max_seqlen_k)]
    scores = q.new_zeros(fixed.batch_size, q.shape[-2], *padded)
    block = 16 if q.device.type == "cpu" else 64
    q_strides, k_strides, score_strides, pages = _strides(q), _strides(k), scores.stride()[:3], _page_numbers(operands)

    def build(p: Sequence[Any], t: Sequence[Any]) -> tuple[Any, ...]:
        return (
            fixed.tensor(p[0], *q_strides),
            fixed.tensor(p[1], *k_strides),
            p[2],
            *score_strides,
            fixed.sequences(p[3], p[4], p[5], p[6]),
            fixed.pages(p[9], *pages),
            fixed.score(p[7]),
            fixed.dropout(p[8]),
            *fixed.lengths,
        )

    num_programs = math.ceil(operands.max_seqlen_q / block) * fixed.batch_size * q.shape[-2]
    config = ForwardConfig(block, block, 4, 1)
    launch = Launcher(attn_scores_kernel, num_programs if q.numel() else 0, build, *_tile(problem, config))
    launch(q, k, scores, *_optional_tensors(operands), operands.block_table)
    return scores


class _Fixed:
    """The kernel arguments that stay the same from call to call, and makers for those that carry a pointer."""

    def __init__(self, operands: Operands) -> None:
        from flash_attn.kernels.algebra import arguments

        q, k = operands.q, operands.k
        self.tensor = arguments.Tensor
        self.sequences = arguments.Sequences
        self.pages = arguments.Pages
        self.batch_size = q.shape[0] if operands.cu_seqlens_q is None else operands.cu_seqlens_q.shape[0] - 1
        nheads, slopes = q.shape[-2], operands.alibi_slopes
        total_k = k.shape[0] if k.dim() == 3 else k.shape[1]
        if operands.block_table is not None:
            total_k = operands.block_table.shape[1] * k.shape[1]
        self.lengths = (
            operands.max_seqlen_q,
            operands.max_seqlen_k,
            q.shape[0] if q.dim() == 3 else q.shape[1],
            total_k,
            *operands.window,
            nheads,
            nheads // k.shape[-2],
        )
        scale = max(abs(operands.softmax_scale), SMALLEST_SCALE)
        softcap = operands.softcap if operands.softcap > 0.0 else None
        slope_stride = None if slopes is None else (slopes.stride(0) if slopes.dim() == 2 else 0)
        negative = 1 if operands.softmax_scale < 0.0 else None
        keep_below = round((1.0 - operands.dropout_p) * DROPOUT_LEVELS)
        rescale = 1.0 / (1.0 - operands.dropout_p)
        no_dropout = arguments.Dropout()
        self.score = lambda slopes: arguments.Score(scale, softcap, slopes, slope_stride, negative)
        self.dropout = lambda rng_state: (
            no_dropout if rng_state is None else arguments.Dropout(rng_state, keep_below, rescale)
        )


def _optional_tensors(operands: Operands) -> tuple[Tensor | None, ...]:
    return (
        operands.cu_seqlens_q,
        operands.cu_seqlens_k,
        operands.seqused_k,
        operands.leftpad_k,
        operands.alibi_slopes,
        operands.rng_state,
    )


def _strides(x: Tensor) -> tuple[int, int, int]:
    """(batch, sequence, head) strides; packed batches have no batch stride."""
    if x.dim() == 3:
        stride_s, stride_h, _ = x.stride()
        return 0, stride_s, stride_h
    return x.stride()[:3]  # type: ignore[return-value]


def _statistic_strides(x: Tensor) -> tuple[int, int, int]:
    """(batch, sequence, head) strides of softmax_lse and its like, contiguous along the sequence."""
    return (0, 1, x.stride(0)) if x.dim() == 2 else (x.stride(0), 1, x.stride(1))


def _page_numbers(operands: Operands) -> tuple[int | None, ...]:
    """Stride of the block table, pages per sequence, tokens per page, pages in all."""
    table = operands.block_table
    if table is None:
        return (None,) * 4
    return table.stride(0), table.shape[1], operands.k.shape[1], operands.k.shape[0]


def _tile(problem: AttentionProblem, config: ForwardConfig | BackwardConfig) -> tuple[dict[str, Any], dict[str, Any]]:
    """(the kernel's constexprs, Triton's launch options)."""
    constants = {
        "HEAD_DIM": problem.headdim,
        "HEAD_DIM_PAD": head_dim_pad(problem.headdim),
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "PRECISION": "ieee",
        "STAGES": config.num_stages,
    }
    return constants, {"num_warps": config.num_warps, "num_stages": config.num_stages}


def _tma_allowed(problem: AttentionProblem, hardware: Hardware, *looped: Tensor) -> bool:
    """Whether tensor descriptors can read these operands: dense, on Hopper or newer, 16-byte aligned."""
    if problem.layout != "dense" or hardware.kind != "cuda" or int(hardware.arch.removeprefix("sm_")) < 90:
        return False
    return all(x.numel() > 0 and _aligned(x) for x in looped)


def _aligned(x: Tensor) -> bool:
    return x.data_ptr() % 16 == 0 and all(s > 0 and s * x.element_size() % 16 == 0 for s in x.stride()[:-1])


def _descriptor(x: Tensor, block: int) -> Any:
    """A 4-D tensor descriptor of (1, block, 1, head dim) tiles; reads past a sequence give zeros."""
    from triton.tools.tensor_descriptor import TensorDescriptor

    return TensorDescriptor(x, list(x.shape), list(x.stride()), [1, block, 1, head_dim_pad(x.shape[-1])])
