"""Time launch configurations of the portable kernels on this GPU: the measurements behind flash_attn/launch.

    python -m benchmarks.tune --out DIR [--kernels forward dq dkdv] [--headdims 64 128 256] [--seqlens 1024 4096 16384]

Every candidate is compiled in a process pool first (Triton caches on disk), then timed on 16k tokens at hidden size 2048.
"""

import argparse
import concurrent.futures
import itertools
import json
import multiprocessing
import pathlib

import torch
from flash_attn import launch
from flash_attn.backends import portable
from flash_attn.backends.base import Operands
from flash_attn.launch.backward import BackwardConfig
from flash_attn.launch.forward import ForwardConfig
from flash_attn.problem import describe
from triton.testing import do_bench

TOKENS, HIDDEN = 16384, 2048
LOG2_E = 1.4426950408889634
SHAPES = {  # (block_m, block_n, warps, stages) and for dkdv whether dk and dv have launches of their own
    "forward": {
        64: [(64, 128, 4, 2), (64, 64, 4, 2), (64, 64, 4, 3), (128, 64, 4, 3), (128, 64, 8, 3), (128, 128, 8, 2)],
        128: [(64, 64, 4, 3), (128, 64, 4, 2), (128, 64, 8, 3), (64, 64, 4, 2), (64, 128, 4, 2), (128, 128, 8, 2)],
        256: [(128, 64, 8, 2), (128, 32, 8, 3), (64, 64, 4, 2), (64, 32, 4, 2)],
    },
    "dq": {
        64: [(128, 64, 4, 3), (64, 64, 4, 3), (64, 128, 4, 2), (64, 64, 4, 2), (128, 64, 4, 2)],
        128: [(128, 64, 8, 3), (64, 64, 4, 2), (128, 64, 8, 2), (64, 64, 4, 3)],
        256: [(64, 32, 4, 3), (64, 64, 4, 2), (128, 32, 8, 2), (64, 32, 4, 2)],
    },
    "dkdv": {
        64: [(32, 128, 4, 2), (64, 64, 4, 2), (32, 64, 4, 3), (64, 64, 4, 3), (64, 128, 8, 2), (32, 128, 4, 3), (32, 64, 4, 2), (64, 64, 4, 1)],
        128: [(64, 64, 4, 2), (64, 128, 8, 2), (32, 64, 4, 3), (32, 64, 4, 2), (32, 128, 8, 2), (64, 128, 8, 1)],
        256: [(64, 64, 8, 2), (64, 64, 4, 2, True), (64, 128, 8, 1, True), (64, 64, 8, 2, True), (32, 64, 4, 2, True),
              (32, 128, 8, 2, True), (64, 64, 4, 1, True)],
    },
}  # fmt: skip


def inputs(seqlen, headdim, dtype=torch.bfloat16):
    """q, k, v, dout of the main sweep."""
    shape = (TOKENS // seqlen, seqlen, HIDDEN // headdim, headdim)
    return [torch.randn(shape, device="cuda", dtype=torch.float32).to(dtype) for _ in range(4)]


def launcher(kernel, q, k, v, dout, causal):
    """A callable that runs one kernel with the pinned configuration."""
    problem, seqlen_q, seqlen_k = describe(
        q, k, v, dropout_p=0.0, softmax_scale=q.shape[-1] ** -0.5, causal=causal, window_size_left=-1,
        window_size_right=-1, softcap=0.0, alibi_slopes=None,
    )  # fmt: skip
    operands = Operands(q, k, v, q.shape[-1] ** -0.5, seqlen_q, seqlen_k, problem.window)
    if kernel == "forward":
        return lambda: portable.forward(problem, operands)
    out, lse, _ = portable.forward(problem, operands)
    statistics = portable.RowStatistics(torch.zeros_like(lse), lse * LOG2_E)
    gradient, other = torch.empty_like(q), torch.empty_like(q)
    if kernel == "dq":
        return lambda: portable.launch_dq(problem, operands, dout, out, lse, statistics, gradient)
    return lambda: portable.launch_dkdv(problem, operands, dout, statistics, gradient, other)


def config_of(kernel, shape, tma):
    """The configuration value of a candidate."""
    tile, split = shape[:4], shape[4:]
    return ForwardConfig(*tile, tma) if kernel == "forward" else BackwardConfig(*tile, tma, *split)


def compile_candidate(candidate):
    """Run one candidate once on a small problem, which leaves its binary in Triton's cache."""
    kernel, headdim, causal, shape, tma = candidate
    q, k, v, dout = (torch.randn(1, 512, 2, headdim, device="cuda").bfloat16() for _ in range(4))
    try:
        with launch.pinned(**{kernel: config_of(kernel, shape, tma)}):
            launcher(kernel, q, k, v, dout, causal)()
        torch.cuda.synchronize()
    except Exception as error:  # a candidate that does not fit the machine is simply no candidate
        return candidate, repr(error)[:120]
    return candidate, None


def pairs(seqlen, causal):
    """Visible (query, key) pairs of one head."""
    return seqlen * (seqlen + 1) // 2 if causal else seqlen * seqlen


PRODUCTS = {"forward": 2, "dq": 3, "dkdv": 4}


def measure(candidates, seqlens):
    """Rows of (kernel, headdim, causal, shape, tma, seqlen, milliseconds, TFLOP/s of the kernel's own products)."""
    rows = []
    for (kernel, headdim, causal), group in itertools.groupby(candidates, key=lambda c: c[:3]):
        group = list(group)
        for seqlen in seqlens:
            tensors = inputs(seqlen, headdim)
            run = launcher(kernel, *tensors, causal)
            flops = 2 * PRODUCTS[kernel] * headdim * pairs(seqlen, causal) * (TOKENS // seqlen) * (HIDDEN // headdim)
            for _, _, _, shape, tma in group:
                with launch.pinned(**{kernel: config_of(kernel, shape, tma)}):
                    milliseconds = do_bench(run, warmup=5, rep=25, return_mode="median")
                rows.append((kernel, headdim, causal, shape, tma, seqlen, milliseconds, flops / milliseconds * 1e-9))
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=pathlib.Path, required=True)
    parser.add_argument("--kernels", nargs="+", default=list(SHAPES))
    parser.add_argument("--headdims", nargs="+", type=int, default=[64, 128, 256])
    parser.add_argument("--seqlens", nargs="+", type=int, default=[1024, 4096, 16384])
    arguments = parser.parse_args()
    candidates = [
        (kernel, headdim, causal, shape, tma)
        for kernel in arguments.kernels
        for headdim in arguments.headdims
        for causal in (False, True)
        for shape in SHAPES[kernel][headdim]
        for tma in (False, True)
    ]
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(16, mp_context=context) as pool:
        outcomes = list(pool.map(compile_candidate, candidates))
    fitting = [candidate for candidate, error in outcomes if error is None]
    rows = measure(fitting, arguments.seqlens)
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "tune.json").write_text(json.dumps(rows))
    for key, group in itertools.groupby(rows, key=lambda row: row[:3]):
        print(*key)
        best = {}
        for _, _, _, shape, tma, seqlen, _, tflops in group:
            best.setdefault((shape, tma), {})[seqlen] = tflops
        for (shape, tma), rates in sorted(best.items(), key=lambda item: -sum(item[1].values()))[:6]:
            print(f"   {shape!s:20} tma={tma:d}", *(f"{seqlen}:{rate:6.0f}" for seqlen, rate in rates.items()))


if __name__ == "__main__":
    main()
