"""Forwards under FlagGems' name: each runs on the backend `flaggems`, or raises the reason why that cannot.

The backend itself is flash_attn/backends/flaggems.py; `FLASH_ATTENTION_BACKEND=flaggems` and `backends.use("flaggems")`
select it for every public function. Results are (out, softmax_lse, S_dmask, rng_state), as upstream's operators return
them; FlagGems' dropout is refused, so S_dmask is empty and rng_state zero.
"""

from torch import Tensor

from flash_attn.backends import use
from flash_attn.errors import InvalidArgument
from flash_attn.torch_ops import _flash_attn_forward
from flash_attn.torch_ops import _flash_attn_varlen_forward as _varlen_operator

Results = tuple[Tensor, Tensor, Tensor, Tensor]


def _flaggems_flash_attn_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size_left: int = -1,
    window_size_right: int = -1,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    return_softmax: bool = False,
) -> Results:
    """Dense attention by FlagGems.

    Args:
        q: (batch_size, seqlen_q, nheads, headdim), fp16 or bf16.
        k: (batch_size, seqlen_k, nheads_k, headdim).
        v: like k.
        softmax_scale: multiplies q k^T; default headdim**-0.5.
        causal: hide keys after the bottom right diagonal; overrides window_size_right.
        window_size_left: keys visible left of the diagonal; -1 is unbounded. So is window_size_right.
        softcap: scores become softcap * tanh(score / softcap); 0 is off.
        alibi_slopes: (nheads,) or (batch_size, nheads), fp32.

    Returns:
        out: like q. softmax_lse: (batch_size, nheads, seqlen_q), fp32, natural log. S_dmask, rng_state: see above.

    Raises:
        InvalidArgument: shapes, dtypes, devices or ranges disagree; the message names both values.
        UnsupportedProblem: FlagGems is absent or does not compute this problem correctly; the message says which.
    """
    scale = _default_scale(q) if softmax_scale is None else softmax_scale
    window = (window_size_left, window_size_right)
    with use("flaggems"):
        return _flash_attn_forward(q, k, v, dropout_p, scale, causal, *window, softcap, alibi_slopes, return_softmax)


def _flash_attn_qkvpacked_forward(
    qkv: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size_left: int = -1,
    window_size_right: int = -1,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    return_softmax: bool = False,
) -> Results:
    """As `_flaggems_flash_attn_forward`, of qkv (batch_size, seqlen, 3, nheads, headdim)."""
    words = (dropout_p, softmax_scale, causal, window_size_left, window_size_right, softcap)
    q, k, v = _parts("qkv", qkv, 3)
    return _flaggems_flash_attn_forward(q, k, v, *words, alibi_slopes, return_softmax)


def _flash_attn_kvpacked_forward(
    q: Tensor,
    kv: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size_left: int = -1,
    window_size_right: int = -1,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    return_softmax: bool = False,
) -> Results:
    """As `_flaggems_flash_attn_forward`, of kv (batch_size, seqlen_k, 2, nheads_k, headdim)."""
    words = (dropout_p, softmax_scale, causal, window_size_left, window_size_right, softcap)
    k, v = _parts("kv", kv, 2)
    return _flaggems_flash_attn_forward(q, k, v, *words, alibi_slopes, return_softmax)


def _flash_attn_varlen_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size_left: int = -1,
    window_size_right: int = -1,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    return_softmax: bool = False,
    block_table: Tensor | None = None,
    leftpad_k: Tensor | None = None,
    seqused_k: Tensor | None = None,
    zero_tensors: bool = False,
) -> Results:
    """Attention of a packed batch by FlagGems, computed packed; keys may lie in pages.

    Args:
        q: (total_q, nheads, headdim), fp16 or bf16.
        k: (total_k, nheads_k, headdim), or with block_table (num_pages, page_block_size, nheads_k, headdim).
        v: like k.
        cu_seqlens_q: (batch_size + 1,), int32: sequence b holds rows cu_seqlens_q[b] to cu_seqlens_q[b + 1].
        cu_seqlens_k: (batch_size + 1,), int32.
        max_seqlen_q: host int, at least the longest query sequence.
        max_seqlen_k: host int, at least the longest key sequence.
        block_table: (batch_size, max_num_blocks_per_seq), int32.
        seqused_k: (batch_size,), int32, with block_table: keys in use.
        zero_tensors: rows outside every sequence get out 0 and softmax_lse -inf.

    The other arguments and errors are those of `_flaggems_flash_attn_forward`.

    Returns:
        out: like q. softmax_lse: (nheads, total_q), fp32, natural log. S_dmask, rng_state: see above.
    """
    scale = _default_scale(q) if softmax_scale is None else softmax_scale
    lengths = (cu_seqlens_q, cu_seqlens_k, int(max_seqlen_q), int(max_seqlen_k))
    words = (dropout_p, scale, causal, window_size_left, window_size_right, softcap, alibi_slopes, return_softmax)
    with use("flaggems"):
        return _varlen_operator(q, k, v, *lengths, *words, block_table, leftpad_k, seqused_k, zero_tensors)


def _parts(name: str, packed: Tensor, number: int) -> tuple[Tensor, ...]:
    """q, k and v, or k and v, of a packed operand."""
    if packed.dim() != 5 or packed.shape[2] != number:
        raise InvalidArgument(
            f"{name} must have shape (batch_size, seqlen, {number}, num_heads, head_size), got {tuple(packed.shape)}"
        )
    return packed.unbind(2)


def _default_scale(q: Tensor) -> float:
    return q.shape[-1] ** -0.5 if q.shape[-1] > 0 else 1.0
