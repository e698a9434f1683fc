"""Small problems forward and backward, and over a cache, for `compute-sanitizer python -m tests.gpu.sanitizer_cases BACKEND`.

Few kernel variants, so that compilation stays short; PYTORCH_NO_CUDA_MEMORY_CACHING=1 gives every tensor an allocation of
its own, so that the sanitizer sees the first byte outside.
"""

import dataclasses
import sys

import torch

import flash_attn_2_cuda
from flash_attn import backends, flash_attn_varlen_func, flash_attn_with_kvcache, launch
from flash_attn.ops.triton.rotary import apply_rotary
from tests.support import calls
from tests.support.cases import BF16, FP16, Case
from tests.support.inputs import make_inputs
from tests.support.kvcache import CacheCase, make_cache_inputs

CASES = [
    # one variant: dense, causal, shared heads
    Case("causal", BF16, 64, 4, 2, (130, 130), (130, 130), causal=True),
    Case("causal-short-keys", BF16, 64, 4, 2, (200,), (70,), causal=True),
    Case("causal-short-queries", BF16, 64, 4, 2, (34,), (258,), causal=True),
    Case("tensor-descriptors", BF16, 128, 2, 2, (129,), (193,), causal=True),
    Case("odd-headdim", FP16, 59, 2, 1, (65,), (97,)),
    Case("varlen", BF16, 64, 4, 2, (65, 0, 1, 130), (65, 7, 129, 0), "varlen", causal=True, sink=BF16),
    Case("everything", FP16, 64, 2, 1, (65,), (129,), "dense", (40, 9), False, 3.0, "bh", 0.2, "transposed"),
]
# each compiles kernels of its own: the forms of every head-dim class, then what changes the loops
HOPPER_CASES = [
    Case("one-pass-64", BF16, 64, 4, 2, (300, 300), (300, 300), causal=True),
    Case("one-pass-128", BF16, 128, 2, 2, (129,), (193,)),
    Case("two-passes-256", BF16, 256, 4, 2, (200,), (70,), causal=True),
    Case("padded", FP16, 72, 2, 1, (97, 97), (161, 161), window=(40, 9), strides="transposed"),
    Case("scores", FP16, 64, 2, 1, (130,), (257,), softcap=3.0, alibi="bh", dropout_p=0.2),
    Case("dropout", BF16, 64, 4, 2, (200,), (330,), causal=True, dropout_p=0.1),
    Case("varlen-64", BF16, 64, 4, 2, (65, 0, 1, 330), (65, 7, 129, 0), "varlen", causal=True),
    Case("varlen-128", BF16, 128, 4, 2, (1, 200, 0, 130), (129, 200, 5, 64), "varlen", causal=True),
]
BAD_LENGTHS = ([0, 100000, -5, 160], [50, 10, 2**31 - 1, 192])
BAD_PAGES = [[0, -1, 12, 3], [2**31 - 1, 5, 6, 7], [8, 9, -2, 11]]


def solve(case: Case, device: torch.device) -> None:
    inputs = make_inputs(case, device, 0)
    exact = {name: getattr(inputs, name).clone() for name in ("q", "k", "v", "dout")}  # without the guards around them
    calls.forward_and_backward(case, dataclasses.replace(inputs, **exact), 0)


def packed_operands(device: torch.device) -> list[torch.Tensor]:
    shapes = [(160, 4, 64), (192, 2, 64), (192, 2, 64)]
    return [calls.randn(*s, dtype=BF16, device=device, seed=i) for i, s in enumerate(shapes)]


def solve_bad_lengths(device: torch.device, deterministic: bool = False) -> None:
    """cu_seqlens that decrease and leave the tensors, forward and backward."""
    q, k, v = packed_operands(device)
    cu_q, cu_k = (calls.int32(x, device) for x in BAD_LENGTHS)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    out = flash_attn_varlen_func(*leaves, cu_q, cu_k, 200, 200, causal=True, deterministic=deterministic)
    torch.autograd.grad(out, leaves, torch.ones_like(out))


def solve_pages(device: torch.device, table: list[list[int]], **arrays: list[int]) -> None:
    """Forward over pages of 16 keys."""
    q, k, v = packed_operands(device)
    k, v = (x.unflatten(0, (-1, 16)) for x in (k, v))
    cu_q, cu_k = (calls.int32(x, device) for x in ([0, 40, 100, 160], [0, 64, 128, 192]))
    used, leftpad = (calls.int32(arrays[n], device) if n in arrays else None for n in ("seqused_k", "leftpad_k"))
    optional = (None, cu_q, cu_k, used, leftpad, calls.int32(table, device), None)
    flash_attn_2_cuda.varlen_fwd(q, k, v, *optional, 200, 200, 0.0, 0.125, False, True, -1, -1, 0.0, False, None)


def solve_rotary(device: torch.device) -> None:
    """Positions before and past the tables, and sequences that leave the tensor."""
    _, k, _ = packed_operands(device)
    cos, sin = (calls.randn(9, 32, dtype=BF16, device=device, seed=i) for i in range(2))
    offsets = calls.int32([-3, 2**31 - 1, 7], device)
    for interleaved in (False, True):
        for inplace in (False, True):
            apply_rotary(k, cos, sin, offsets, calls.int32(BAD_LENGTHS[1], device), 9, interleaved, inplace)


CACHE_CASES = [
    CacheCase("rows", BF16, 64, 8, 2, 1, (130, 17), 1, "halves", 64, causal=True, num_splits=2),
    CacheCase(
        "pages", BF16, 64, 8, 2, 1, (130, 17), 1, "halves", 64, page=16, causal=True, num_splits=2, sink=BF16, spare=0
    ),
]


def solve_cache(case: CacheCase, device: torch.device, **wrong: list[int] | list[list[int]]) -> None:
    """One call over caches without guards around them, as it is and with wrong numbers."""
    arguments = make_cache_inputs(case, device, 0).arguments
    arguments |= {name: arguments[name].clone() for name in ("k_cache", "v_cache")}
    flash_attn_with_kvcache(**arguments | {name: calls.int32(numbers, device) for name, numbers in wrong.items()})


def solve_on_portable(device: torch.device) -> int:
    for case in CASES:
        solve(case, device)
    solve_bad_lengths(device)
    with launch.pinned(one_launch=False):  # as larger problems are solved
        solve(CASES[0], device)
        solve(CASES[-1], device)
        solve_bad_lengths(device)
    solve_rotary(device)
    solve_pages(device, [[11, 3, 7, 0], [4, 5, 1, 2], [8, 9, 10, 6]])
    solve_pages(device, BAD_PAGES, seqused_k=[1000, -3, 2**31 - 1], leftpad_k=[-1, 2**31 - 1, 5])
    for case in CACHE_CASES:
        solve_cache(case, device)
        solve_cache(case, device, cache_seqlens=[2**31 - 1, -5])
    solve_cache(CACHE_CASES[1], device, block_table=[[-1] * 9, [2**31 - 1] * 9])
    solve_cache(CACHE_CASES[0], device, cache_batch_idx=[-1, 2])
    return len(CASES) + 3 + 4 + 6


def solve_on_hopper(device: torch.device) -> int:
    for case in HOPPER_CASES:
        solve(case, device)
    solve_bad_lengths(device)
    solve_bad_lengths(device, deterministic=True)
    return len(HOPPER_CASES) + 2


SOLVE = {"portable": solve_on_portable, "hopper": solve_on_hopper}


def main(backend: str) -> int:
    device = torch.device("cuda")
    with backends.use(backend):
        count = SOLVE[backend](device)
    torch.cuda.synchronize()
    sys.stdout.write(f"solved {count}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
