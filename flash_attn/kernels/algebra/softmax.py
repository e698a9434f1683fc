"""Online softmax over score tiles in units of `unit_log2`, and the weights recomputed from softmax_lse.

State of a row: row_max (in tile units), row_sum of exp2(tile * unit - row_max * unit), and the weighted sum acc. Where scores
are bounded row_max stays 0, which saves the maximum, its exchange between lanes, and the rescaling of acc.
A row that saw no key has row_sum 0; it gives out 0 and softmax_lse -inf. A sink joins the finished state of a row.
"""

import triton
import triton.language as tl

from flash_attn.kernels.algebra.score import LN_2, LOG2_E


@triton.jit
def softmax_pivot(row_max, unit):
    """What the base-2 exponents of a row are taken against: its maximum, or 0 for a row that has seen no key yet."""
    return tl.where(row_max == float("-inf"), 0.0, row_max * unit)


@triton.jit
def softmax_rescale(row_max, unit, pivot_log2):
    """The factor on sums that were taken against an earlier row_max."""
    return tl.math.exp2(row_max * unit - pivot_log2)


@triton.jit
def softmax_step(row_max, row_sum, tile, unit):
    """Fold one tile of scores in; returns (weights, rescale of earlier sums, row_max, row_sum)."""
    new_max = tl.maximum(row_max, tl.max(tile, 1))
    pivot_log2 = softmax_pivot(new_max, unit)
    weights = softmax_weights(tile, unit, pivot_log2[:, None])
    rescale = softmax_rescale(row_max, unit, pivot_log2)
    return weights, rescale, new_max, row_sum * rescale + tl.sum(weights, 1)


@triton.jit
def lowest_max(score):
    """row_max of a row that has seen no key."""
    start = float("-inf")
    if score.bounded is not None:
        start = 0.0
    return start


@triton.jit
def softmax_step_bounded(row_sum, tile, unit):
    """`softmax_step` for scores whose exponentials neither overflow nor vanish as they are: (weights, row_sum)."""
    weights = softmax_weights(tile, unit, 0.0)
    return weights, row_sum + tl.sum(weights, 1)


@triton.jit
def softmax_sink(row_max, row_sum, unit, sink):
    """Fold in a natural-log score that has no value; returns (rescale of acc, row_max, row_sum). See `sink_gradient`."""
    sink = sink.to(tl.float32) * (LOG2_E / unit)
    new_max = tl.maximum(row_max, sink)
    pivot_log2 = softmax_pivot(new_max, unit)
    rescale = softmax_rescale(row_max, unit, pivot_log2)
    return rescale, new_max, row_sum * rescale + softmax_weights(sink, unit, pivot_log2)


@triton.jit
def softmax_finish(row_max, row_sum, unit, sinks, head):
    """(what finishes acc, softmax_lse in natural log): the reciprocal of row_sum; rows without a key or sink give (0, -inf)."""
    rescale = 1.0
    if sinks is not None:
        rescale, row_max, row_sum = softmax_sink(row_max, row_sum, unit, tl.load(sinks + head))
    empty = row_sum == 0.0
    total = tl.where(empty, 1.0, row_sum)
    lse = tl.where(empty, float("-inf"), (row_max * unit + tl.math.log2(total)) * LN_2)
    return tl.where(empty, 0.0, rescale / total), lse


@triton.jit
def lse_log2(softmax_lse):
    """softmax_lse in base 2, with +inf for rows without a key, so that their weights come out as exp2(-inf) = 0."""
    return tl.where(softmax_lse == float("-inf"), float("inf"), softmax_lse * LOG2_E)


@triton.jit
def softmax_weights(tile, unit, pivot_log2):
    """Weights of a tile of scores against a pivot that broadcasts to it: normalised when that is the finished lse_log2."""
    return tl.math.exp2(tile * unit - pivot_log2)


@triton.jit
def softmax_backward(weights, dweights, row_delta):
    """d(loss)/d(score) from d(loss)/d(weight): the VJP of the softmax, with delta of `softmax_delta`."""
    return weights * (dweights - row_delta)


@triton.jit
def softmax_delta(row_delta, row_dlse, row_lse_log2):
    """delta = rowsum(dout * out) less a gradient of softmax_lse, whose derivative by a score is the weight, too."""
    return row_delta - tl.where(row_lse_log2 == float("inf"), 0.0, row_dlse)
