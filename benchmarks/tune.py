"""Time launch configurations of the portable kernels on this GPU: the measurements behind flash_attn/launch.

    python -m benchmarks.tune --out DIR [--kernels forward dq dkdv] [--headdims 64 128 256] [--seqlens 1024 4096 16384]
                           [--features plain softcap dropout]

Every candidate is compiled in a process pool first (Triton caches on disk), then timed on 16k tokens at hidden size 2048.
"""

import argparse
import concurrent.futures
import itertools
import json
import math
import multiprocessing
import pathlib

import torch
import triton
from triton.testing import do_bench

from flash_attn import launch
from flash_attn.backends import portable
from flash_attn.backends.base import Operands
from flash_attn.launch.backward import BackwardConfig
from flash_attn.launch.forward import ForwardConfig
from flash_attn.problem import describe

TOKENS, HIDDEN = 16384, 2048
FEATURES = {"plain": {}, "softcap": {"softcap": 30.0}, "dropout": {"dropout_p": 0.1}}
SHAPES = {  # (block_m, block_n, warps, stages)
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
        64: [(32, 128, 4, 2), (64, 64, 4, 2), (32, 64, 4, 3), (64, 128, 8, 2), (32, 128, 4, 3), (32, 64, 4, 2), (64, 64, 4, 1)],
        128: [(64, 64, 4, 2), (64, 128, 8, 2), (32, 64, 4, 3), (32, 64, 4, 2), (32, 128, 8, 2), (64, 128, 8, 1)],
        256: [(64, 64, 8, 2)],
    },
    "dk": {
        256: [(64, 64, 4, 2), (64, 128, 8, 1), (64, 64, 8, 2), (32, 64, 4, 2), (32, 128, 8, 2), (64, 64, 4, 1), (32, 64, 4, 3)],
    },
    "dv": {
        256: [(64, 64, 4, 2), (64, 128, 8, 1), (64, 64, 8, 2), (32, 64, 4, 2), (32, 128, 8, 2), (64, 64, 4, 1), (32, 64, 4, 3),
              (64, 128, 8, 2), (32, 64, 4, 4), (32, 128, 8, 3), (128, 64, 4, 1)],
    },
}  # fmt: skip


def inputs(seqlen, headdim, dtype=torch.bfloat16):
    """q, k, v, dout of the main sweep."""
    shape = (TOKENS // seqlen, seqlen, HIDDEN // headdim, headdim)
    return [torch.randn(shape, device="cuda", dtype=torch.float32).to(dtype) for _ in range(4)]


def launcher(kernel, feature, shape, tma, q, k, v, dout, causal):
    """A callable that runs one kernel with one configuration."""
    scale = q.shape[-1] ** -0.5
    options = {"softcap": 0.0, "dropout_p": 0.0} | FEATURES[feature]
    problem, seqlen_q, seqlen_k = describe(q, k, v, options["dropout_p"], scale, causal, -1, -1, options["softcap"])
    rng_state = torch.tensor([1, 2], device=q.device) if options["dropout_p"] else None
    operands = Operands(q, k, v, scale, seqlen_q, seqlen_k, problem.window, **options, rng_state=rng_state)
    out, lse = torch.empty_like(q), torch.zeros(q.shape[0], q.shape[2], q.shape[1], device=q.device)
    delta, lse_log2 = torch.zeros_like(lse), torch.full_like(lse, math.log2(seqlen_k))
    first, second = torch.empty_like(q), torch.empty_like(q)
    optional = (None, None, None, None, None, rng_state)
    config = (ForwardConfig if kernel == "forward" else BackwardConfig)(*shape, tma)
    if kernel == "forward":
        with launch.pinned(forward=config):
            run = portable.bind_forward(problem, operands, out)
        return lambda: run(q, k, v, out, lse, *optional, None, None)
    if kernel == "dq":
        with launch.pinned(dq=config):
            run = portable.bind_dq(problem, operands, dout, out, first)
        return lambda: run(q, k, v, out, dout, first, None, None, lse, delta, lse_log2, *optional, None)
    with launch.pinned(dkdv=config if kernel == "dkdv" else (config, config)):
        run = portable.bind_dkdv(problem, operands, dout, first, second)[-1 if kernel == "dv" else 0]
    return lambda: run(q, k, v, out, dout, None, first, second, lse, delta, lse_log2, *optional, None)


def compile_candidate(candidate):
    """Run one candidate once on a small problem, which leaves its binary in Triton's cache."""
    kernel, feature, headdim, causal, shape, tma = candidate
    q, k, v, dout = (torch.randn(16, 512, 64, headdim, device="cuda").bfloat16() for _ in range(4))
    try:
        launcher(kernel, feature, shape, tma, q, k, v, dout, causal)()
        torch.cuda.synchronize()
    except triton.runtime.errors.OutOfResources as error:
        return candidate, repr(error)[:120]
    return candidate, None


def pairs(seqlen, causal):
    """Visible (query, key) pairs of one head."""
    return seqlen * (seqlen + 1) // 2 if causal else seqlen * seqlen


PRODUCTS = {"forward": 2, "dq": 3, "dkdv": 4, "dk": 3, "dv": 2}


def measure(candidates, seqlens):
    """Rows of (kernel, feature, headdim, causal, shape, tma, seqlen, milliseconds, TFLOP/s of the kernel's own products)."""
    rows = []
    for (kernel, feature, headdim, causal), group in itertools.groupby(candidates, key=lambda c: c[:4]):
        group = list(group)
        for seqlen in seqlens:
            tensors = inputs(seqlen, headdim)
            flops = 2 * PRODUCTS[kernel] * headdim * pairs(seqlen, causal) * (TOKENS // seqlen) * (HIDDEN // headdim)
            for *_, shape, tma in group:
                run = launcher(kernel, feature, shape, tma, *tensors, causal)
                milliseconds = do_bench(run, warmup=5, rep=25, return_mode="median")
                rate = flops / milliseconds * 1e-9
                rows.append((kernel, feature, headdim, causal, shape, tma, seqlen, milliseconds, rate))
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=pathlib.Path, required=True)
    parser.add_argument("--kernels", nargs="+", default=list(SHAPES))
    parser.add_argument("--headdims", nargs="+", type=int, default=[64, 128, 256])
    parser.add_argument("--seqlens", nargs="+", type=int, default=[1024, 4096, 16384])
    parser.add_argument("--features", nargs="+", default=["plain"], choices=list(FEATURES))
    arguments = parser.parse_args()
    candidates = [
        (kernel, feature, headdim, causal, shape, tma)
        for kernel in arguments.kernels
        for feature in arguments.features
        for headdim in arguments.headdims
        for causal in (False, True)
        for shape in SHAPES[kernel].get(headdim, ())
        for tma in (False, True)
    ]
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(16, mp_context=context) as pool:
        outcomes = list(pool.map(compile_candidate, candidates))
    fitting = [candidate for candidate, error in outcomes if error is None]
    rows = measure(fitting, arguments.seqlens)
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "tune.json").write_text(json.dumps(rows))
    for key, group in itertools.groupby(rows, key=lambda row: row[:4]):
        print(*key)
        best = {}
        for *_, shape, tma, seqlen, _milliseconds, tflops in group:
            best.setdefault((shape, tma), {})[seqlen] = tflops
        for (shape, tma), rates in sorted(best.items(), key=lambda item: -sum(item[1].values()))[:6]:
            print(f"   {shape!s:20} tma={tma:d}", *(f"{seqlen}:{rate:6.0f}" for seqlen, rate in rates.items()))


if __name__ == "__main__":
    main()
