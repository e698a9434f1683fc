"""fa_plus: attention for transformers through its own registry, on a GPU and on a CPU, in fp16, bf16 and fp32.

`register()` once, then `attn_implementation="fa_plus"`. A mask is never a matrix here: padding and packed sequences become
`cu_seqlens`, the rest is `causal` and a window. What has no such form raises `UnsupportedProblem`.
transformers (5 or newer) is imported inside functions only.

The name has no "flash" in it: transformers takes every such name for a package or a kernel of the hub that it has to load.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from flash_attn.bert_padding import index_first_axis, pad_input, unpad_input
from flash_attn.errors import InvalidArgument, UnsupportedProblem
from flash_attn.flash_attn_interface import flash_attn_func, flash_attn_varlen_func

NAME = "fa_plus"
PAGED_NAME = f"paged|{NAME}"  # what transformers' continuous batching looks for

ONE_SEQUENCE_A_ROW = (
    f"{NAME}, compiled: several packed rows need cu_seq_lens_q, cu_seq_lens_k, max_length_q, max_length_k"
)

SEQUENCE_NUMBERS = torch.int32  # dtype of a mask that numbers packed sequences; every other mask says which keys exist


def register() -> str:
    """Makes "fa_plus" known to transformers, for every model loaded before or after; returns that name.

    Raises:
        ImportError: transformers is absent, or older than version 5.
    """
    try:
        import transformers
        from transformers import AttentionInterface, AttentionMaskInterface
    except ImportError as error:
        raise ImportError(f'attn_implementation="{NAME}" needs transformers 5 or newer: {error}') from error
    if int(transformers.__version__.split(".")[0]) < 5:
        raise ImportError(
            f'attn_implementation="{NAME}" needs transformers 5 or newer, found {transformers.__version__}'
        )
    AttentionInterface.register(NAME, attention_forward)
    AttentionInterface.register(PAGED_NAME, paged_attention_forward)
    AttentionMaskInterface.register(NAME, make_mask)
    AttentionMaskInterface.register(PAGED_NAME, make_mask)
    return NAME


def make_mask(
    batch_size: int,
    q_length: int = 0,
    kv_length: int = 0,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] | None = None,
    attention_mask: Tensor | None = None,
    cache_position: Tensor | None = None,
    use_vmap: bool = False,
    local_size: int | None = None,
    device: torch.device | str | None = None,
    config: Any = None,
    **_: Any,
) -> Tensor | None:
    """The mask of a pass, (batch_size, keys): which keys exist, or (int32) to which packed sequence each belongs; or None.

    Keys past the end of the mask do not exist either: those of a static cache that is not full.

    Args:
        cache_position: (q_length,), what transformers before 5.1 gives instead of q_length and q_offset.
        use_vmap: whether a model added a mask function of its own.
        local_size: window or chunk of the mask function; a chunk is that of the config.
    """
    _refuse_unknown_patterns(mask_function, use_vmap, local_size, kv_offset + kv_length, config)
    if cache_position is not None:
        q_length, q_offset, device = cache_position.shape[0], cache_position[0], cache_position.device
    if attention_mask is not None:
        attention_mask = attention_mask[:, kv_offset : kv_offset + kv_length].bool()
        return None if attention_mask.shape[1] == kv_length and attention_mask.all() else attention_mask
    packed = _packed_sequences(mask_function)
    if packed is not None:
        return packed.to(SEQUENCE_NUMBERS)
    if q_length < kv_length and _maker(mask_function) != "bidirectional_mask_function":
        existing = int(q_offset) + q_length - kv_offset
        if existing < kv_length:
            return torch.ones(batch_size, existing, dtype=torch.bool, device=device)
    return None


def attention_forward(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    is_causal: bool | None = None,
    s_aux: Tensor | None = None,
    position_ids: Tensor | None = None,
    cu_seq_lens_q: Tensor | None = None,
    cu_seq_lens_k: Tensor | None = None,
    max_length_q: int | None = None,
    max_length_k: int | None = None,
    deterministic: bool | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """One layer's attention as transformers calls it: `flash_attn_func`, or `flash_attn_varlen_func` where a batch is ragged.

    Args:
        query: (batch_size, nheads, seqlen_q, headdim).
        key: (batch_size, nheads_k, seqlen_k, headdim).
        value: (batch_size, nheads_k, seqlen_k, headdim_v), headdim_v at most headdim.
        attention_mask: what `make_mask` returned.
        sliding_window: a query sees itself and sliding_window - 1 keys to either side, those after it only if not causal.
        s_aux: (nheads,), a sink: a further score in every row's softmax, without a value.
        position_ids: (1, seqlen); where they start again, another packed sequence begins.
        cu_seq_lens_q: (sequences + 1,), with the three arguments after it a packed batch as its loader describes it.

    Returns:
        (batch_size, seqlen_q, nheads, headdim_v), and None for the weights, which are never computed.
    """
    _refuse_unknown_arguments(attention_mask, others)
    headdim_v = value.shape[-1]
    dtype = _compute_dtype(module, query)
    q, k, v = (x.transpose(1, 2).to(dtype) for x in (query, key, value))
    v = F.pad(v, (0, q.shape[-1] - headdim_v))
    words: dict[str, Any] = dict(
        dropout_p=dropout,
        softmax_scale=scaling,
        causal=_is_causal(module) if is_causal is None else bool(is_causal),
        window_size=(-1, -1) if sliding_window is None else (sliding_window - 1, sliding_window - 1),
        softcap=softcap or 0.0,
        deterministic=bool(deterministic),
        s_aux=s_aux,
    )
    lengths = (cu_seq_lens_q, cu_seq_lens_k, max_length_q, max_length_k)
    given = all(x is not None for x in lengths)
    if attention_mask is None and not given:
        attention_mask = _numbered_by_positions(position_ids, q, k)
    if attention_mask is None:
        out = _attend_packed(q, k, v, lengths, words) if given else flash_attn_func(q, k, v, **words)
    elif attention_mask.dtype == SEQUENCE_NUMBERS:
        out = _attend_packed(q, k, v, _lengths_of(attention_mask), words)
    else:
        out = _attend_padded(q, k, v, attention_mask.bool(), words)
    return out[..., :headdim_v], None


def paged_attention_forward(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    cache: Any,
    cu_seq_lens_q: Tensor,
    cu_seq_lens_k: Tensor | dict[str, Tensor],
    max_seqlen_q: int,
    max_seqlen_k: int | dict[str, int],
    read_index: list[Tensor],
    write_index: list[Tensor],
    block_table: Tensor | None = None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """One layer's attention in transformers' continuous batching: its cache gathers the keys, the packed attention reads them.

    Args:
        query: (1, nheads, total_q, headdim); key and value likewise.
        attention_mask: unused; cu_seq_lens and the layer's window say the same.
        cache: transformers' PagedAttentionCache.
        cu_seq_lens_k: (sequences + 1,), or one for every type of layer, as is max_seqlen_k.
        block_table: None: transformers makes one for names with "flash" in them only.

    Returns:
        (1, total_q, nheads, headdim), and None.
    """
    if block_table is not None:
        raise UnsupportedProblem(f"{PAGED_NAME} reads the cache through its indices; got a block_table")
    _refuse_unknown_arguments(None, others)
    layer_type = "full_attention" if sliding_window is None else "sliding_attention"
    if isinstance(cu_seq_lens_k, dict):
        cu_seq_lens_k = cu_seq_lens_k[layer_type]
    if isinstance(max_seqlen_k, dict):
        max_seqlen_k = max_seqlen_k[layer_type]
    k, v = cache.update(
        key_states=key, value_states=value, layer_idx=module.layer_idx, read_index=read_index, write_index=write_index
    )
    headdim, headdim_v = query.shape[-1], v.shape[-1]
    out = flash_attn_varlen_func(
        query.squeeze(0).transpose(0, 1),
        k,
        F.pad(v, (0, headdim - headdim_v)),
        cu_seq_lens_q.to(torch.int32),
        cu_seq_lens_k.to(torch.int32),
        max_seqlen_q,
        max_seqlen_k,
        softmax_scale=scaling,
        causal=True,
        window_size=(-1, -1) if sliding_window is None else (sliding_window - 1, 0),
        softcap=softcap or 0.0,
        s_aux=s_aux,
    )
    return out[None, ..., :headdim_v], None


def _attend_packed(q: Tensor, k: Tensor, v: Tensor, lengths: tuple[Any, ...], words: dict[str, Any]) -> Tensor:
    """Attention inside each of the sequences that lie end to end in the rows of a batch."""
    cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k = lengths
    out = flash_attn_varlen_func(
        q.flatten(0, 1),
        k.flatten(0, 1),
        v.flatten(0, 1),
        cu_seqlens_q.to(torch.int32),
        cu_seqlens_k.to(torch.int32),
        max_seqlen_q,
        max_seqlen_k,
        **words,
    )
    return out.view_as(q)


def _attend_padded(q: Tensor, k: Tensor, v: Tensor, existing: Tensor, words: dict[str, Any]) -> Tensor:
    """Attention to the keys that exist. existing: (batch_size, seqlen_k), the last seqlen_q of which are the queries'.

    Where the diagonal matters, queries that do not exist are taken out as well, and their rows are 0. Otherwise all stay:
    the queries of cross attention are other tokens than its keys.
    """
    batch_size, seqlen_q = q.shape[:2]
    keys = existing.shape[1]
    k, indices, cu_seqlens_k, max_seqlen_k, _ = unpad_input(k[:, :keys], existing)
    v = index_first_axis(v[:, :keys].flatten(0, 1), indices)
    if seqlen_q == 1 or not (words["causal"] or words["window_size"] != (-1, -1)):
        cu_seqlens_q = torch.arange(0, q.shape[0] * seqlen_q + 1, seqlen_q, dtype=torch.int32, device=q.device)
        lengths = (cu_seqlens_q, cu_seqlens_k, seqlen_q, max_seqlen_k)
        return flash_attn_varlen_func(q.flatten(0, 1), k, v, *lengths, **words).view_as(q)
    if seqlen_q > keys:
        raise InvalidArgument(f"a mask of {keys} keys does not cover {seqlen_q} queries")
    rows, indices, cu_seqlens_q, max_seqlen_q, _ = unpad_input(q, existing[:, -seqlen_q:])
    lengths = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    return pad_input(flash_attn_varlen_func(rows, k, v, *lengths, **words), indices, batch_size, seqlen_q)


def _numbered_by_positions(position_ids: Tensor | None, q: Tensor, k: Tensor) -> Tensor | None:
    """The packed sequence of every token of a single row, None if there is but one: transformers' rule for flash attention."""
    if position_ids is None or position_ids.dim() != 2 or not 1 < q.shape[1] == k.shape[1]:
        return None
    if q.shape[0] > 1:
        if torch.compiler.is_compiling():  # `make_mask` has seen to it otherwise
            torch._assert_async((position_ids.diff(dim=-1) == 1).all(), ONE_SEQUENCE_A_ROW)
        return None
    numbers = (position_ids == position_ids.min()).cumsum(-1)
    return numbers.to(SEQUENCE_NUMBERS) if numbers[0, -1] > 1 else None


def _lengths_of(numbers: Tensor) -> tuple[Tensor, Tensor, int, int]:
    """cu_seqlens and the longest sequence, for queries and keys, where every change of number begins a sequence."""
    starts = F.pad(numbers.diff(dim=-1) != 0, (1, 0), value=True).flatten().nonzero().flatten()
    cu_seqlens = F.pad(starts, (0, 1), value=numbers.numel()).to(torch.int32)
    longest = int(cu_seqlens.diff().max())
    return cu_seqlens, cu_seqlens, longest, longest


def _is_causal(module: torch.nn.Module) -> bool:
    if not hasattr(module, "is_causal"):
        raise InvalidArgument(f"{type(module).__name__} has no is_causal and passes none: its mask cannot be known")
    return bool(module.is_causal)


def _compute_dtype(module: torch.nn.Module, query: Tensor) -> torch.dtype:
    """The query's dtype; a query in fp32 takes that of autocast or of the layer's weights, which will multiply the result."""
    if query.dtype != torch.float32:
        return query.dtype
    if torch.is_autocast_enabled(query.device.type):
        return torch.get_autocast_dtype(query.device.type)
    return next((x.dtype for x in module.parameters() if x.is_floating_point()), query.dtype)


def _refuse_unknown_arguments(attention_mask: Tensor | None, others: dict[str, Any]) -> None:
    if attention_mask is not None and attention_mask.dim() != 2:
        raise UnsupportedProblem(
            f"{NAME} takes a mask of (batch_size, keys), got one of {tuple(attention_mask.shape)}: "
            "scores cannot be masked or biased one by one"
        )
    for name in ("position_bias", "indices", "block_indices", "head_mask"):
        if others.get(name) is not None:
            raise UnsupportedProblem(f"{NAME} has no {name}, which this model adds to its attention")
    if others.get("output_attentions"):
        raise UnsupportedProblem(f"{NAME} never computes the weights that output_attentions=True asks for")


def _maker(mask_function: Callable[..., Any] | None) -> str:
    """The function of transformers.masking_utils that made a mask function, or that it is."""
    return getattr(mask_function, "__qualname__", "").split(".")[0]


def _packed_sequences(mask_function: Callable[..., Any] | None) -> Tensor | None:
    """The sequence of every token, (batch_size, seqlen), if the mask function keeps packed sequences apart.

    Not while compiling, when closures cannot be read: `_numbered_by_positions` does it there.
    """
    if torch.compiler.is_compiling():
        return None
    held = [cell.cell_contents for cell in getattr(mask_function, "__closure__", None) or ()]
    if _maker(mask_function) == "packed_sequence_mask_function":
        return next(x for x in held if isinstance(x, Tensor))
    parts = (part for x in held for part in (x if isinstance(x, tuple) else (x,)) if callable(part))
    return next((found for part in parts if (found := _packed_sequences(part)) is not None), None)


def _refuse_unknown_patterns(
    mask_function: Callable[..., Any] | None, use_vmap: bool, local_size: int | None, keys: int, config: Any
) -> None:
    chunk = getattr(config, "attention_chunk_size", None)
    if chunk is not None and chunk == local_size and keys > chunk:
        raise UnsupportedProblem(f"{NAME} has no chunks: {keys} keys, chunks of {chunk}")
    if use_vmap or _maker(mask_function) == "or_masks":
        raise UnsupportedProblem(
            f"{NAME} masks are causal, a window, padding or packed sequences; this model adds keys or takes others away"
        )
