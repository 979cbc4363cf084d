"""The support of a top-k teacher's row: its K columns, POINTS of them at a time.

The student's logits are gathered. Padding has index -1 and counts for nothing.
"""

import triton
import triton.language as tl

from fastkd.backends.gpu.divergence import value_and_slope
from fastkd.backends.gpu.outputs import NOTHING
from fastkd.backends.gpu.sums import LOG2E
from fastkd.backends.gpu.tiles import scalar


@triton.jit
def support_logits(x, indices, start, count, ACC: tl.constexpr, POINTS: tl.constexpr):
    """(position, index, whether it is a column, logit) of POINTS columns of the support."""
    position = start + tl.arange(0, POINTS)
    index = tl.load(indices + position, mask=position < count, other=-1)
    there = index >= 0
    logit = tl.load(x + index, mask=there, other=-float("inf")).to(ACC)
    return position, index, there, logit


@triton.jit
def points(
    logit, top, log_total, exponent, logp, param, centre,
    DIVERGENCE: tl.constexpr, NO_TAIL: tl.constexpr,
):  # fmt: skip
    """Value, slope and q at columns of the support; without a tail the slope is not centred."""
    logp = logp * LOG2E
    logq = tl.fma(logit - top, exponent, -log_total)
    p, q = tl.exp2(logp), tl.exp2(logq)
    value, slope = value_and_slope(logp, logq, p, q, q - p, param, DIVERGENCE)
    if NO_TAIL:
        slope = slope + centre * q
    return value, slope, q


@triton.jit
def support_sums(
    student, indices, count, m_rest, d_rest, exponent,
    HARD: tl.constexpr, RESTRICT: tl.constexpr, ACC: tl.constexpr, POINTS: tl.constexpr,
):  # fmt: skip
    """(max of the softmax, max of the row, log2 of the softmax's sum, share, the support's sums).

    The softmax is over the row, or over the support alone (RESTRICT). share: what a unit of d_rest,
    the sum off the support, has of the softmax. The last result is the support's sum at T = 1.
    """
    tops, sums = tl.full([POINTS], NOTHING, ACC), tl.zeros([POINTS], ACC)
    for start in range(0, count, POINTS):
        _, _, _, logit = support_logits(student, indices, start, count, ACC, POINTS)
        tops = tl.maximum(tops, logit)
    m_support = tl.max(tops, 0)
    m_row = tl.maximum(m_support, m_rest)
    m_soft = m_support if RESTRICT else m_row
    m_soft = tl.where(m_soft == NOTHING, 0.0, m_soft)
    sums_t1 = sums
    for start in range(0, count, POINTS):
        _, _, _, logit = support_logits(student, indices, start, count, ACC, POINTS)
        sums += tl.exp2((logit - m_soft) * exponent)
        if HARD:
            sums_t1 += tl.exp2((logit - m_row) * LOG2E)
    total = tl.sum(sums, 0)
    share = scalar(0.0, ACC)
    if not RESTRICT:
        share = tl.exp2((m_rest - m_soft) * exponent)
        total += d_rest * share
    return m_soft, m_row, tl.log2(total), share / total, tl.sum(sums_t1, 0)


@triton.jit
def support_values(
    student, indices, logprobs, count, m_soft, log_total, exponent, param, centre,
    DIVERGENCE: tl.constexpr, NO_TAIL: tl.constexpr, ACC: tl.constexpr, POINTS: tl.constexpr,
):  # fmt: skip
    """Sums of values and slopes over the support, and how many log-probabilities are NaN."""
    values, slopes = tl.zeros([POINTS], ACC), tl.zeros([POINTS], ACC)
    invalid = tl.zeros([POINTS], ACC)
    for start in range(0, count, POINTS):
        position, _, _, logit = support_logits(student, indices, start, count, ACC, POINTS)
        logp = tl.load(logprobs + position, mask=position < count, other=NOTHING)
        value, slope, _ = points(
            logit, m_soft, log_total, exponent, logp, param, centre, DIVERGENCE, NO_TAIL
        )
        # an invalid index may stand in padding, and a weight of 0 must not hide it
        invalid += tl.where(logp != logp, 1.0, 0.0)
        dead = (position >= count) | ((logp == NOTHING) & (logit == NOTHING))
        values += tl.where(dead, 0.0, value)
        slopes += tl.where(dead, 0.0, slope)
    return tl.sum(values, 0), tl.sum(slopes, 0), tl.sum(invalid, 0)


@triton.jit
def support_gradient(
    support_grad, student, indices, logprobs, count, m_soft, m_row, log_total, slope_sum,
    exponent, param, centre, soft, hard, column, target, other,
    DIVERGENCE: tl.constexpr, NO_TAIL: tl.constexpr, HARD: tl.constexpr,
    ACC: tl.constexpr, POINTS: tl.constexpr,
):  # fmt: skip
    """Writes the gradient on the support to support_grad, while the logits are still there."""
    for start in range(0, count, POINTS):
        position, index, there, logit = support_logits(student, indices, start, count, ACC, POINTS)
        logp = tl.load(logprobs + position, mask=position < count, other=NOTHING)
        _, slope, q = points(
            logit, m_soft, log_total, exponent, logp, param, centre, DIVERGENCE, NO_TAIL
        )
        slope = tl.where((logp == NOTHING) & (logit == NOTHING), 0.0, slope)
        out = soft * (slope - q * slope_sum)
        if HARD:
            out += hard * tl.exp2((logit - m_row) * LOG2E)
            out -= tl.where(index == column, target, other)
        tl.store(support_grad + position, out, mask=there)


@triton.jit
def scatter_support(grad, support_grad, indices, count, POINTS: tl.constexpr):
    """Copies support_grad to the columns of the support."""
    for start in range(0, count, POINTS):
        position = start + tl.arange(0, POINTS)
        index = tl.load(indices + position, mask=position < count, other=-1)
        out = tl.load(support_grad + position, mask=index >= 0, other=0.0)
        tl.store(grad + index, out.to(grad.dtype.element_ty), mask=index >= 0)
