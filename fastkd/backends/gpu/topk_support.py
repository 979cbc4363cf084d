"""The support of a top-k teacher's row: its K columns, POINTS of them at a time.

The student's logits are gathered. Padding has index -1 and counts for nothing.
"""

import triton
import triton.language as tl

from fastkd.backends.gpu.arguments import Softmax
from fastkd.backends.gpu.divergence import value_and_slope
from fastkd.backends.gpu.outputs import NOTHING
from fastkd.backends.gpu.sums import LOG2E
from fastkd.backends.gpu.tiles import scalar


@triton.jit
def support_logits(x, indices, start, count, const):
    """(position, index, whether it is a column, logit) of POINTS columns of the support."""
    position = start + tl.arange(0, const.POINTS)
    index = tl.load(indices + position, mask=position < count, other=-1)
    there = index >= 0
    logit = tl.load(x + index, mask=there, other=-float("inf")).to(const.ACC)
    return position, index, there, logit


@triton.jit
def points(logit, softmax, logp, centre, spec, const):
    """Value, slope and q at columns of the support; without a tail the slope is not centred."""
    logp = logp * LOG2E
    logq = tl.fma(logit - softmax.m_soft, spec.exponent, -softmax.log_total)
    p, q = tl.exp2(logp), tl.exp2(logq)
    value, slope = value_and_slope(logp, logq, p, q, q - p, spec.param, const.DIVERGENCE)
    if const.NO_TAIL:
        slope = slope + centre * q
    return value, slope, q


@triton.jit
def support_sums(student, indices, count, m_rest, d_rest, exponent, const):
    """`Softmax` of a row, or of its support alone (RESTRICT)."""
    tops = tl.full([const.POINTS], NOTHING, const.ACC)
    sums = tl.zeros([const.POINTS], const.ACC)
    for start in range(0, count, const.POINTS):
        _, _, _, logit = support_logits(student, indices, start, count, const)
        tops = tl.maximum(tops, logit)
    m_support = tl.max(tops, 0)
    m_row = tl.maximum(m_support, m_rest)
    m_soft = m_support if const.RESTRICT else m_row
    m_soft = tl.where(m_soft == NOTHING, 0.0, m_soft)
    sums_t1 = sums
    for start in range(0, count, const.POINTS):
        _, _, _, logit = support_logits(student, indices, start, count, const)
        sums += tl.exp2((logit - m_soft) * exponent)
        if const.HARD:
            sums_t1 += tl.exp2((logit - m_row) * LOG2E)
    total = tl.sum(sums, 0)
    share = scalar(0.0, const.ACC)
    if not const.RESTRICT:
        share = tl.exp2((m_rest - m_soft) * exponent)
        total += d_rest * share
    return Softmax(
        m_rest, d_rest, m_row, m_soft, tl.log2(total), share / total, tl.sum(sums_t1, 0)
    )  # fmt: skip


@triton.jit
def support_values(student, support, count, softmax, centre, spec, const):
    """Sums of values and slopes over the support, and how many log-probabilities are NaN."""
    values, slopes = tl.zeros([const.POINTS], const.ACC), tl.zeros([const.POINTS], const.ACC)
    invalid = tl.zeros([const.POINTS], const.ACC)
    for start in range(0, count, const.POINTS):
        position, _, _, logit = support_logits(student, support.indices, start, count, const)
        logp = tl.load(support.logprobs + position, mask=position < count, other=NOTHING)
        value, slope, _ = points(logit, softmax, logp, centre, spec, const)
        # an invalid index may stand in padding, and a weight of 0 must not hide it
        invalid += tl.where(logp != logp, 1.0, 0.0)
        dead = (position >= count) | ((logp == NOTHING) & (logit == NOTHING))
        values += tl.where(dead, 0.0, value)
        slopes += tl.where(dead, 0.0, slope)
    return tl.sum(values, 0), tl.sum(slopes, 0), tl.sum(invalid, 0)


@triton.jit
def support_gradient(
    memory, student, support, count, softmax, slopes, centre, spec, const
):  # fmt: skip
    """Writes the gradient on the support to memory, while the logits are still there."""
    for start in range(0, count, const.POINTS):
        position, index, there, logit = support_logits(
            student, support.indices, start, count, const
        )
        logp = tl.load(support.logprobs + position, mask=position < count, other=NOTHING)
        _, slope, q = points(logit, softmax, logp, centre, spec, const)
        slope = tl.where((logp == NOTHING) & (logit == NOTHING), 0.0, slope)
        out = slopes.soft * (slope - q * slopes.total)
        if const.HARD:
            out += slopes.unit * tl.exp2((logit - softmax.m_row) * LOG2E)
            out -= tl.where(index == slopes.column, slopes.target, slopes.eps_over_v)
        tl.store(memory + position, out, mask=there)


@triton.jit
def scatter_support(grad, memory, indices, count, const):
    """Copies memory to the columns of the support."""
    for start in range(0, count, const.POINTS):
        position = start + tl.arange(0, const.POINTS)
        index = tl.load(indices + position, mask=position < count, other=-1)
        out = tl.load(memory + position, mask=index >= 0, other=0.0)
        tl.store(grad + index, out.to(grad.dtype.element_ty), mask=index >= 0)
