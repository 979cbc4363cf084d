"""The loops over a row whose sums are known: value and slope of its pairs, and the gradient.

Each goes over the tiles of columns [start, stop). `sums.py` says where the maxima and sums of both
sides come from, and `tiles.py` what a tile is.
"""

import triton
import triton.language as tl

from fastkd.backends.gpu.sums import LOG2E
from fastkd.backends.gpu.tiles import OFFSET, columns, load, store, unmasked


@triton.jit
def pair(
    s, t, m_s, log_s, m_t, log_t, exponent, param, soft, shift,
    DIVERGENCE: tl.constexpr, WHAT: tl.constexpr,
):  # fmt: skip
    """What a tile is to a divergence, given (max, log2 of the sum) of each side; q with a gradient.

    Identical sides must cancel to exactly 0, even if the compiler contracts a product and a sum:
    ptxas 12.9 does so with packed pairs (sm_100), whatever its options. Hence the explicit tl.fma,
    and probabilities that are plain exponentials.
    """
    logp = tl.fma(t - m_t, exponent, -log_t)
    logq = tl.fma(s - m_s, exponent, -log_s)
    p, q = tl.exp2(logp), tl.exp2(logq)
    if WHAT == "sums":  # a pair already: Triton 3.2 has no tuple inside a tuple
        return DIVERGENCE(logp, logq, p, q, q - p, param, soft, shift, WHAT)
    else:
        return DIVERGENCE(logp, logq, p, q, q - p, param, soft, shift, WHAT), q


@triton.jit
def pair_loop(
    student, teacher, start, stop, m_s, d_s, m_t, d_t, exponent, param,
    DIVERGENCE: tl.constexpr, POLICY: tl.constexpr, UNALIGNED: tl.constexpr,
    ACC: tl.constexpr, LANES: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Sums of value and centred slope, from the last column to the first."""
    log_s, log_t = tl.log2(d_s), tl.log2(d_t)
    values = tl.zeros([LANES], ACC)
    slopes = tl.zeros([LANES], ACC)
    first, full, head = unmasked(start, stop, UNALIGNED, LANES, GROUP)
    if full < stop:
        # columns past the end are -inf on both sides, which is worth 0 to every divergence
        s = load(student, full, stop, True, POLICY, ACC, LANES, GROUP, start, UNALIGNED)
        t = load(teacher, full, stop, True, POLICY, ACC, LANES, GROUP, start, UNALIGNED)
        value, slope = pair(
            s, t, m_s, log_s, m_t, log_t, exponent, param, 0.0, 0.0, DIVERGENCE, "sums"
        )
        values += tl.sum(value, 1)
        slopes += tl.sum(slope, 1)
    for back in range(0, full - first, LANES * GROUP):
        at = full - LANES * GROUP - back
        s = load(student, at, stop, False, POLICY, ACC, LANES, GROUP, start, UNALIGNED)
        t = load(teacher, at, stop, False, POLICY, ACC, LANES, GROUP, start, UNALIGNED)
        value, slope = pair(
            s, t, m_s, log_s, m_t, log_t, exponent, param, 0.0, 0.0, DIVERGENCE, "sums"
        )
        values += tl.sum(value, 1)
        slopes += tl.sum(slope, 1)
    if UNALIGNED == OFFSET:
        if head:
            at = first - LANES * GROUP
            s = load(student, at, stop, True, POLICY, ACC, LANES, GROUP, start, True)
            t = load(teacher, at, stop, True, POLICY, ACC, LANES, GROUP, start, True)
            value, slope = pair(
                s, t, m_s, log_s, m_t, log_t, exponent, param, 0.0, 0.0, DIVERGENCE, "sums"
            )
            values += tl.sum(value, 1)
            slopes += tl.sum(slope, 1)
    value, slope = tl.sum(values, 0), tl.sum(slopes, 0)
    return DIVERGENCE(value, slope, m_t, m_s, m_s, param, 0.0, 0.0, "finish")


@triton.jit
def grad_tile(
    grad, student, teacher, at, start, stop, m_s, log_s, m_t, log_t,
    column, exponent, param, soft, shift, unit, target, eps_over_v,
    DIVERGENCE: tl.constexpr, HARD: tl.constexpr, HARD_T1: tl.constexpr,
    MASKED: tl.constexpr, UNALIGNED: tl.constexpr,
    ACC: tl.constexpr, LANES: tl.constexpr, GROUP: tl.constexpr, CENTRED: tl.constexpr,
):  # fmt: skip
    """CENTRED: the slopes are those of kl, which leaves out their sum: 0, but for a part of p."""
    s = load(student, at, stop, MASKED, "evict_first", ACC, LANES, GROUP, start, UNALIGNED)
    t = load(teacher, at, stop, MASKED, "evict_first", ACC, LANES, GROUP, start, UNALIGNED)
    out, q = pair(
        s, t, m_s, log_s, m_t, log_t, exponent, param, soft, shift, DIVERGENCE, "gradient"
    )
    if CENTRED:
        out = tl.fma(-shift, q, out)
    if HARD:
        if HARD_T1:
            q = tl.exp2((s - m_s) * LOG2E)
        here = columns(at, LANES, GROUP)
        out = tl.fma(q, unit, out) - tl.where(here == column, target, eps_over_v)
    out = out.to(grad.dtype.element_ty)
    store(grad, out, at, start, stop, MASKED, UNALIGNED, LANES, GROUP)


@triton.jit
def grad_loop(
    grad, student, teacher, start, stop, m_s, d_s, m_t, d_t, slopes, sum_t1,
    column, exponent, param, soft, of, unit, hard, one_minus_eps, eps_over_v, by,
    DIVERGENCE: tl.constexpr, HARD: tl.constexpr, HARD_T1: tl.constexpr, REVERSE: tl.constexpr,
    UNALIGNED: tl.constexpr, ACC: tl.constexpr, LANES: tl.constexpr, GROUP: tl.constexpr,
    CENTRED: tl.constexpr = False,
):  # fmt: skip
    """by * (soft * of * (slope - q * slopes) + unit * q_1 - hard * (eps / V)).

    The column of the label has 1 - eps more. soft: with 1 / T in it. of: the derivative that
    `OF_SUM` gives. HARD_T1: T is not 1, so that q_1, q at T = 1, needs an exponential of its own.
    A tile is written after it is read: `grad` may be the student's memory.
    """
    soft, unit, hard = soft * by * of, unit * by, hard * by
    target = one_minus_eps + eps_over_v
    log_s, log_t = tl.log2(d_s), tl.log2(d_t)
    target, eps_over_v, shift = hard * target, hard * eps_over_v, soft * slopes
    if HARD_T1:
        unit = unit / sum_t1
    # `safe_sums` makes q 0 for an impossible student, but such a row has no cross-entropy
    unit = tl.where(sum_t1 == 0, float("nan"), unit)
    first, full, head = unmasked(start, stop, UNALIGNED, LANES, GROUP)
    for step in range(0, full - first, LANES * GROUP):
        at = full - LANES * GROUP - step if REVERSE else first + step
        grad_tile(
            grad, student, teacher, at, start, stop, m_s, log_s, m_t, log_t,
            column, exponent, param, soft, shift, unit, target, eps_over_v,
            DIVERGENCE, HARD, HARD_T1, False, UNALIGNED, ACC, LANES, GROUP, CENTRED,
        )  # fmt: skip
    if stop % (LANES * GROUP) != 0:  # computed again: cheaper than a register kept through the loop
        grad_tile(
            grad, student, teacher, full, start, stop, m_s, log_s, m_t, log_t,
            column, exponent, param, soft, shift, unit, target, eps_over_v,
            DIVERGENCE, HARD, HARD_T1, True, UNALIGNED, ACC, LANES, GROUP, CENTRED,
        )  # fmt: skip
    if UNALIGNED == OFFSET:
        if head:
            grad_tile(
                grad, student, teacher, first - LANES * GROUP, start, stop,
                m_s, log_s, m_t, log_t, column,
                exponent, param, soft, shift, unit, target, eps_over_v,
                DIVERGENCE, HARD, HARD_T1, True, True, ACC, LANES, GROUP, CENTRED,
            )  # fmt: skip
