"""What a backend is, and the records that pass through it. Imports torch only for types."""

from typing import Any, NamedTuple, Protocol

from torch import Tensor

from flash_attn.hardware import Hardware
from flash_attn.problem import AttentionProblem


class Operands(NamedTuple):
    """One call's tensors and run-time numbers, already validated by `problem.describe`."""

    q: Tensor  # dense or over a cache (batch, seqlen_q, nheads, headdim); varlen (total_q, nheads, headdim)
    k: Tensor  # as q with nheads_k; paged (num_pages, page_block_size, nheads_k, headdim)
    v: Tensor  # as k
    softmax_scale: float
    max_seqlen_q: int
    max_seqlen_k: int
    window: tuple[int | None, int | None] = (None, None)  # keys left, right of the diagonal; causal is (None, 0)
    softcap: float = 0.0
    dropout_p: float = 0.0
    alibi_slopes: Tensor | None = None  # (nheads,) or (batch, nheads), fp32
    cu_seqlens_q: Tensor | None = None  # (batch + 1,), int32
    cu_seqlens_k: Tensor | None = None
    seqused_k: Tensor | None = None  # (batch,), int32
    leftpad_k: Tensor | None = None  # (batch,), int32
    block_table: Tensor | None = None  # (batch, max_pages), int32
    rng_state: Tensor | None = None  # (2,), int64: seed, offset; given when dropout_p > 0
    zero_tensors: bool = False  # rows outside every sequence of a packed batch get out 0 and softmax_lse -inf
    memo: dict[str, Any] | None = (
        None  # what a backend derived before, for calls equal in all but the tensors' contents
    )
    sinks: Tensor | None = None  # (nheads,), contiguous, any floating dtype; of a forward
    dlse: Tensor | None = None  # gradient of softmax_lse, of its shape and dtype, contiguous; of a backward
    appended: int = 0  # keys behind the first seqused_k of every sequence, which take part, too


class Append(NamedTuple):
    """New tokens of a cache, and the rotary angles of new keys and of queries; validated by `problem_kvcache`."""

    k: Tensor  # (batch, seqlen_new, nheads_k, headdim)
    v: Tensor  # as k
    rotary_cos: Tensor | None = None  # (positions, pairs of features), contiguous along the pairs
    rotary_sin: Tensor | None = None
    interleaved: bool = True  # pairs of neighbours; otherwise feature i with feature i + pairs
    advance: bool = True  # query i has the angle of its own position, otherwise all have that of the first


class ForwardResult(NamedTuple):
    """What a forward returns."""

    out: Tensor  # like q
    softmax_lse: Tensor  # dense (batch, nheads, seqlen_q); varlen (nheads, total_q); fp32, natural log
    dropout_scores: Tensor | None = None  # S_dmask, when asked for


class Gradients(NamedTuple):
    """Where a backward writes; every tensor has the shape of its operand and a contiguous last dimension."""

    dq: Tensor
    dk: Tensor
    dv: Tensor


class Backend(Protocol):
    """Five members; a backend says no in a sentence.

    One that computes no gradients has a sixth, `forward_only: str`, which says why; one that leaves some problems to others has
    `left_to_others(problem, hardware) -> str | None`, the reason why the automatic choice passes it over.
    """

    name: str

    def unsupported(self, problem: AttentionProblem, hardware: Hardware) -> str | None:
        """Why this backend cannot run the problem, or None when it can."""

    def forward(self, problem: AttentionProblem, operands: Operands, return_scores: bool) -> ForwardResult:
        """out, softmax_lse and, when `return_scores`, the dropout scores."""

    def backward(
        self,
        problem: AttentionProblem,
        operands: Operands,
        dout: Tensor,
        out: Tensor,
        softmax_lse: Tensor,
        gradients: Gradients,
    ) -> Tensor:
        """Writes the gradients; returns delta = rowsum(dout * out) - dlse, fp32, shaped like softmax_lse.

        Rows whose softmax_lse is infinite see no key, and their dlse counts as 0.
        """

    def attend_cache(
        self, problem: AttentionProblem, operands: Operands, append: Append | None, num_splits: int
    ) -> ForwardResult:
        """Writes the new tokens into the caches (operands.k and v), then out and softmax_lse of the queries over them.

        Every sequence has `seqused_k` tokens before; without it the caches are full. `num_splits` 0 leaves the choice.
        """
