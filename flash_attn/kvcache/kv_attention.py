"""`flash_attn_with_kvcache` above the backends: append, rotate, attend.

While something listens to operators (torch.compile, a dispatch mode), a call goes through the registered operator, which
mutates the caches; otherwise straight to its implementation, which saves the dispatcher's host time.
"""

import contextlib
import operator
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import is_functorch_wrapped_tensor
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack

from flash_attn import dispatch, launch
from flash_attn.errors import InvalidArgument, UnsupportedProblem
from flash_attn.kvcache.operator import _wrapped_flash_attn_with_kvcache
from flash_attn.problem import parse_window
from flash_attn.problem_kvcache import CacheTensors
from flash_attn.torch_ops import observed

KEYS_PER_SPLIT = 512


def attend_with_cache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    rotary_cos: Tensor | None,
    rotary_sin: Tensor | None,
    cache_seqlens: int | Tensor | None,
    cache_batch_idx: Tensor | None,
    cache_leftpad: Tensor | None,
    block_table: Tensor | None,
    softmax_scale: float | None,
    causal: bool,
    window_size: Sequence[int],
    softcap: float,
    rotary_interleaved: bool,
    alibi_slopes: Tensor | None,
    num_splits: int,
    sinks: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(out, softmax_lse) of `flash_attn_with_kvcache`; an int `cache_seqlens` means every sequence."""
    if softmax_scale is None:
        softmax_scale = q.shape[-1] ** -0.5 if q.shape[-1] > 0 else 1.0
    left, right = parse_window(window_size)
    numbers = (float(softmax_scale), bool(causal), left, right, float(softcap), bool(rotary_interleaved))
    listens = observed(q)
    int_seqlens = None
    if cache_seqlens is not None and not isinstance(cache_seqlens, Tensor):
        if listens:
            cache_seqlens = torch.full((q.shape[0],), cache_seqlens, dtype=torch.int32, device=q.device)
        else:
            int_seqlens = operator.index(cache_seqlens)
            cache_seqlens = None
    tensors = CacheTensors(
        k, v, rotary_cos, rotary_sin, cache_seqlens, cache_batch_idx, cache_leftpad, block_table, alibi_slopes, sinks
    )
    if not listens:
        if torch._C._are_functorch_transforms_active():
            with _outside_transforms((q, k_cache, v_cache, *tensors)):
                return dispatch.attend_cache(q, k_cache, v_cache, tensors, *numbers, num_splits, int_seqlens)
        return dispatch.attend_cache(q, k_cache, v_cache, tensors, *numbers, num_splits, int_seqlens)
    # forward only, as upstream: the operator must not meet tensors that want a gradient
    q, k_cache, v_cache = q.detach(), k_cache.detach(), v_cache.detach()
    *arrays, slopes, sinks = (None if x is None else x.detach() for x in tensors)
    return _wrapped_flash_attn_with_kvcache(q, k_cache, v_cache, *arrays, *numbers, slopes, num_splits, sinks)


def _outside_transforms(tensors: tuple[Tensor | None, ...]) -> contextlib.AbstractContextManager[Any]:
    """Where torch.func does not wrap what is allocated: tensors that it has wrapped have no memory of their own."""
    if any(x is not None and is_functorch_wrapped_tensor(x) for x in tensors):
        raise UnsupportedProblem(
            "flash_attn_with_kvcache under torch.func: it writes into its caches and has no gradient; flash_attn_func has one"
        )
    return temporarily_clear_interpreter_stack()


@contextlib.contextmanager
def batch_invariant(keys_per_split: int = KEYS_PER_SPLIT) -> Iterator[None]:
    """Inside, a sequence's results are the same bits whatever else is in the batch, and however large the cache is.

    Splits then hold a fixed number of keys (rounded up to a block of the kernel) instead of following from the number of
    programs, which costs speed where one sequence has to fill a GPU; the `num_splits` of a call then has no say.
    """
    if keys_per_split < 1:
        raise InvalidArgument(f"keys_per_split must be at least 1, got {keys_per_split}")
    with launch.pinned(keys_per_split=keys_per_split):
        yield
