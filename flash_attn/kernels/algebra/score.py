"""From a dot product to a score and back: scale, softcap, ALiBi.

A score tile is kept in units of one positive scalar: score = tile * unit. The exponent of the softmax is then one fused
multiply-add per element, exp2(tile * unit_log2 - pivot_log2).
"""

import triton
import triton.language as tl
from triton import knobs
from triton.language.target_info import current_target
from triton.runtime.jit import constexpr_function

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)


@constexpr_function
def speaks_ptx():
    """Whether inline PTX reaches the hardware: compiled for NVIDIA, not interpreted."""
    target = current_target()
    return target is not None and target.backend == "cuda" and not knobs.runtime.interpret


@constexpr_function
def _selection(comparison, otherwise):
    return f"{{ .reg .pred chosen; setp.{comparison} chosen, $2, $3; selp.f32 $0, $1, {otherwise}, chosen; }}"


@triton.jit
def select_in_ptx(tile, left, right, COMPARISON: tl.constexpr, OTHERWISE: tl.constexpr):
    """The tile where left compares with right, a constant elsewhere; in PTX, as from comparisons in Triton the compiler packs
    the bits of a tile into words first."""
    return tl.inline_asm_elementwise(
        _selection(COMPARISON, OTHERWISE), "=f,f,r,r", [tile, left, right], dtype=tl.float32, is_pure=True, pack=1
    )


@triton.jit
def tanh(x):
    """Hyperbolic tangent from one exp2 and one division; exact to fp32 rounding around 1."""
    return 1.0 - 2.0 / (1.0 + tl.math.exp2(x * (2.0 * LOG2_E)))


@triton.jit
def tanh_approximate(x):
    """Hyperbolic tangent to 11 bits, the precision of a half-precision score, in one instruction where there is one."""
    if speaks_ptx():
        t = tl.inline_asm_elementwise("tanh.approx.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)
    else:
        t = tanh(x)
    return t


@triton.jit
def soft_limit(qk, score):
    """tanh of a score over its cap: what a softcap multiplies by the cap."""
    x = qk * (score.softmax_scale / score.softcap)
    if score.exact is not None:
        t = tanh(x)
    else:
        t = tanh_approximate(x)
    return t


@triton.jit
def score_unit(score):
    """The natural-log score that one unit of a score tile stands for: the softcap, or the softmax scale; positive."""
    unit = score.softmax_scale
    if score.softcap is not None:
        unit = score.softcap
    return unit


@triton.jit
def unit_log2(score):
    """What a score tile of `score_forward` has to be multiplied by to give base-2 scores."""
    return score_unit(score) * LOG2_E


@triton.jit
def load_slope(score, batch, head):
    """ALiBi slope of one head, in units of a score tile; 0 without ALiBi."""
    slope = 0.0
    if score.alibi_slopes is not None:
        slope = tl.load(score.alibi_slopes + batch * score.stride_alibi_b + head) / score_unit(score)
    return slope


@triton.jit
def key_distance(rows, cols, span):
    """How far before a row's diagonal a key lies, as fp32; rows and cols broadcast to a tile."""
    return (rows + (span.seqlen_k - span.seqlen_q)).to(tl.float32) - cols.to(tl.float32)


@triton.jit
def score_forward(qk, distance, score, slope):
    """Scores of a tile of dot products, in units of `score_unit`; `distance` is `key_distance`."""
    if score.negative is not None:
        qk = -qk
    if score.softcap is not None:
        qk = soft_limit(qk, score)
    if score.alibi_slopes is not None:
        if score.one_sided is None:
            distance = tl.abs(distance)
        qk = qk - slope * distance
    return qk


@triton.jit
def score_backward(ds, tile, qk, score):
    """d(loss)/d(q . k) without the softmax scale, from d(loss)/d(score): the VJP of score_forward.

    `tile` holds the scores of qk, -inf where hidden; a finished ds is 0 there. As the VJP is linear, a kernel may apply it to
    a factor of ds instead. The factor `gradient_scale` is left out, so that it is applied once to a finished sum.
    """
    if score.softcap is not None:
        if score.alibi_slopes is None:
            t = tl.maximum(tile, -1.0)  # the tile is a tanh already
        else:
            if score.negative is not None:
                qk = -qk
            t = soft_limit(qk, score)
        ds = ds * (1.0 - t * t)
    return ds


@triton.jit
def gradient_scale(score):
    """The signed softmax scale that finishes dq and dk."""
    scale = score.softmax_scale
    if score.negative is not None:
        scale = -scale
    return scale
