"""Launches kernels/portable: the whole feature set, on any hardware that Triton compiles for, and in its interpreter."""

import functools
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flash_attn.backends.base import ForwardResult, Gradients, Operands
from flash_attn.errors import UnsupportedProblem
from flash_attn.hardware import Hardware
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
    from flash_attn.kernels.portable.forward import attn_fwd_kernel

    q, k, v = operands.q, operands.k, operands.v
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    softmax_lse = _empty_lse(q)
    if operands.zero_tensors or operands.max_seqlen_q == 0:
        out.zero_()
        softmax_lse.fill_(-math.inf)
    hardware = hardware_of(q.device)
    config = forward_config(problem, hardware)
    num_programs = math.ceil(operands.max_seqlen_q / config.block_m) * _batch_size(operands) * q.shape[-2]
    if num_programs > 0 and q.numel() > 0:
        tma = config.tma and _tma_allowed(problem, hardware, k, v)
        with _device_of(q):
            attn_fwd_kernel[(num_programs,)](
                _tensor(q),
                _tensor(k),
                _tensor(v),
                _tensor(out),
                _statistic(softmax_lse),
                _descriptor(k, config.block_n) if tma else None,
                _descriptor(v, config.block_n) if tma else None,
                _sequences(operands),
                _pages(operands),
                _score(operands),
                _dropout(operands),
                *_lengths(operands),
                **_tile(problem, config),
            )
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
    """Two launches: delta and dq per query block, then dk and dv per key block."""
    if operands.block_table is not None:
        raise UnsupportedProblem("block_table is forward only: a paged cache has no gradient")
    statistics = RowStatistics(torch.empty_like(softmax_lse), torch.empty_like(softmax_lse))
    with _device_of(operands.q):
        launch_dq(problem, operands, dout, out, softmax_lse, statistics, gradients.dq)
        launch_dkdv(problem, operands, dout, statistics, gradients.dk, gradients.dv)
    return statistics.delta


class RowStatistics(NamedTuple):
    """What the dq kernel leaves for the dkdv kernel; both shaped like softmax_lse, fp32."""

    delta: Tensor  # rowsum(dout * out)
    lse_log2: Tensor  # softmax_lse in base 2, +inf for a row without keys


def launch_dq(
    problem: AttentionProblem,
    operands: Operands,
    dout: Tensor,
    out: Tensor,
    softmax_lse: Tensor,
    statistics: RowStatistics,
    dq: Tensor,
) -> None:
    """Writes the row statistics and dq."""
    from flash_attn.kernels.portable.backward import attn_bwd_dq_kernel

    q, k, v = operands.q, operands.k, operands.v
    hardware = hardware_of(q.device)
    config = dq_config(problem, hardware)
    num_programs = math.ceil(operands.max_seqlen_q / config.block_m) * _batch_size(operands) * q.shape[-2]
    if num_programs == 0 or q.numel() == 0:
        return
    tma = config.tma and _tma_allowed(problem, hardware, k, v)
    attn_bwd_dq_kernel[(num_programs,)](
        _tensor(q),
        _tensor(k),
        _tensor(v),
        _tensor(out),
        _tensor(dout),
        _tensor(dq),
        _statistic(softmax_lse),
        _statistic(statistics.delta),
        _statistic(statistics.lse_log2),
        _descriptor(k, config.block_n) if tma else None,
        _descriptor(v, config.block_n) if tma else None,
        _sequences(operands),
        _score(operands),
        _dropout(operands),
        *_lengths(operands),
        **_tile(problem, config),
    )


def launch_dkdv(
    problem: AttentionProblem,
    operands: Operands,
    dout: Tensor,
    statistics: RowStatistics,
    dk: Tensor,
    dv: Tensor,
) -> None:
    """Writes dk and dv, in one launch or in one each."""
    from flash_attn.kernels.portable.backward import attn_bwd_dkdv_kernel

    q, k, v = operands.q, operands.k, operands.v
    hardware = hardware_of(q.device)
    config = dkdv_config(problem, hardware)
    num_programs = math.ceil(operands.max_seqlen_k / config.block_n) * _batch_size(operands) * k.shape[-2]
    if num_programs == 0 or k.numel() == 0:
        return
    tma = config.tma and _tma_allowed(problem, hardware, q, dout)
    outputs = ((dk, None), (None, dv)) if config.split else ((dk, dv),)
    for dk_out, dv_out in outputs:
        attn_bwd_dkdv_kernel[(num_programs,)](
            _tensor(q),
            _tensor(k),
            _tensor(v),
            _tensor(dout),
            None if dk_out is None else _tensor(dk_out),
            None if dv_out is None else _tensor(dv_out),
            _statistic(statistics.delta),
            _statistic(statistics.lse_log2),
            _descriptor(q, config.block_m) if tma else None,
            _descriptor(dout, config.block_m) if tma else None,
            _sequences(operands),
            _score(operands),
            _dropout(operands),
            *_lengths(operands),
            **_tile(problem, config),
        )


def dropout_scores(problem: AttentionProblem, operands: Operands) -> Tensor:
    """S_dmask: exp(score - row maximum), negative where dropped; (batch, nheads, round128(seqlen_q), round128(seqlen_k))."""
    from flash_attn.kernels.portable.scores import attn_scores_kernel

    q = operands.q
    batch_size, nheads = _batch_size(operands), q.shape[-2]
    shape = [math.ceil(length / 128) * 128 for length in (operands.max_seqlen_q, operands.max_seqlen_k)]
    scores = q.new_zeros(batch_size, nheads, *shape)
    block_m, block_n = (16, 16) if q.device.type == "cpu" else (64, 64)
    num_programs = math.ceil(operands.max_seqlen_q / block_m) * batch_size * nheads
    if num_programs > 0 and q.numel() > 0:
        with _device_of(q):
            attn_scores_kernel[(num_programs,)](
                _tensor(q),
                _tensor(operands.k),
                scores,
                *scores.stride()[:3],
                _sequences(operands),
                _pages(operands),
                _score(operands),
                _dropout(operands),
                *_lengths(operands),
                **_tile(problem, ForwardConfig(block_m, block_n, 4, 1)),
            )
    return scores


def _tensor(x: Tensor) -> tuple[Any, ...]:
    """A kernel's Tensor argument; packed batches have no batch stride."""
    from flash_attn.kernels.algebra.arguments import Tensor as Argument

    if x.dim() == 3:
        stride_s, stride_h, _ = x.stride()
        return Argument(x, 0, stride_s, stride_h)
    stride_b, stride_s, stride_h, _ = x.stride()
    return Argument(x, stride_b, stride_s, stride_h)


def _statistic(x: Tensor) -> tuple[Any, ...]:
    """softmax_lse or delta: (batch, nheads, seqlen_q) or (nheads, total_q), contiguous along the sequence."""
    from flash_attn.kernels.algebra.arguments import Tensor as Argument

    if x.dim() == 2:
        return Argument(x, 0, 1, x.stride(0))
    return Argument(x, x.stride(0), 1, x.stride(1))


def _empty_lse(q: Tensor) -> Tensor:
    if q.dim() == 3:
        return torch.empty((q.shape[1], q.shape[0]), dtype=torch.float32, device=q.device)
    return torch.empty((q.shape[0], q.shape[2], q.shape[1]), dtype=torch.float32, device=q.device)


def _batch_size(operands: Operands) -> int:
    return operands.q.shape[0] if operands.cu_seqlens_q is None else operands.cu_seqlens_q.shape[0] - 1


def _sequences(operands: Operands) -> tuple[Any, ...]:
    from flash_attn.kernels.algebra.arguments import Sequences

    return Sequences(operands.cu_seqlens_q, operands.cu_seqlens_k, operands.seqused_k, operands.leftpad_k)


def _pages(operands: Operands) -> tuple[Any, ...]:
    from flash_attn.kernels.algebra.arguments import Pages

    table = operands.block_table
    if table is None:
        return Pages()
    return Pages(table, table.stride(0), table.shape[1], operands.k.shape[1], operands.k.shape[0])


def _score(operands: Operands) -> tuple[Any, ...]:
    from flash_attn.kernels.algebra.arguments import Score

    slopes = operands.alibi_slopes
    return Score(
        max(abs(operands.softmax_scale), SMALLEST_SCALE),
        operands.softcap if operands.softcap > 0.0 else None,
        slopes,
        None if slopes is None else (slopes.stride(0) if slopes.dim() == 2 else 0),
        1 if operands.softmax_scale < 0.0 else None,
    )


def _dropout(operands: Operands) -> tuple[Any, ...]:
    from flash_attn.kernels.algebra.arguments import Dropout

    if operands.dropout_p == 0.0:
        return Dropout()
    keep_below = round((1.0 - operands.dropout_p) * DROPOUT_LEVELS)
    return Dropout(operands.rng_state, keep_below, 1.0 / (1.0 - operands.dropout_p))


def _lengths(operands: Operands) -> tuple[int | None, ...]:
    """seqlen_q, seqlen_k, total_q, total_k, window_left, window_right, nheads, group."""
    q, k = operands.q, operands.k
    nheads = q.shape[-2]
    total_k = k.shape[0] if k.dim() == 3 else k.shape[1]
    if operands.block_table is not None:
        total_k = operands.block_table.shape[1] * k.shape[1]
    total_q = q.shape[0] if q.dim() == 3 else q.shape[1]
    return (
        operands.max_seqlen_q,
        operands.max_seqlen_k,
        total_q,
        total_k,
        *operands.window,
        nheads,
        nheads // k.shape[-2],
    )


def _tile(problem: AttentionProblem, config: ForwardConfig | BackwardConfig) -> dict[str, Any]:
    return {
        "HEAD_DIM": problem.headdim,
        "HEAD_DIM_PAD": head_dim_pad(problem.headdim),
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "PRECISION": "ieee",
        "STAGES": config.num_stages,
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
    }


def _tma_allowed(problem: AttentionProblem, hardware: Hardware, *looped: Tensor) -> bool:
    """Whether tensor descriptors can read these operands: dense, on Hopper or newer, 16-byte aligned."""
    if problem.layout != "dense" or hardware.kind != "cuda" or int(hardware.arch.removeprefix("sm_")) < 90:
        return False
    return all(_aligned(x) for x in looped)


def _aligned(x: Tensor) -> bool:
    strides = x.stride()[:-1]
    return (
        x.numel() > 0
        and x.data_ptr() % 16 == 0
        and all(stride > 0 and stride * x.element_size() % 16 == 0 for stride in strides)
    )


def _descriptor(x: Tensor, block: int) -> Any:
    """A 4-D tensor descriptor of (1, block, 1, head dim) tiles; reads past a sequence give zeros."""
    from triton.tools.tensor_descriptor import TensorDescriptor

    return TensorDescriptor(x, list(x.shape), list(x.stride()), [1, block, 1, head_dim_pad(x.shape[-1])])


def _device_of(x: Tensor) -> Any:
    return torch.cuda.device(x.device) if x.device.type == "cuda" else _nothing


class _Nothing:
    def __enter__(self) -> None: ...

    def __exit__(self, *error: object) -> None: ...


_nothing = _Nothing()
