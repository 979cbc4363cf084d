"""The loops over a row whose sums are known: value and slope of its pairs, and the gradient.

Each goes over the tiles of columns [start, stop). `sums.py` says where the maxima and sums of both
sides come from, and `tiles.py` what a tile is.
"""

import triton
import triton.language as tl

from fastkd.backends.gpu.arguments import Logs, Slopes
from fastkd.backends.gpu.sums import LOG2E
from fastkd.backends.gpu.tiles import OFFSET, columns, load, store, unmasked


@triton.jit
def pair(s, t, logs, exponent, param, soft, shift, const, WHAT: tl.constexpr):
    """What a tile is to a divergence, given `Logs`; q with a gradient.

    Identical sides must cancel to exactly 0, even if the compiler contracts a product and a sum:
    ptxas 12.9 does so with packed pairs (sm_100), whatever its options. Hence the explicit tl.fma,
    and probabilities that are plain exponentials.
    """
    logp = tl.fma(t - logs.m_t, exponent, -logs.log_t)
    logq = tl.fma(s - logs.m_s, exponent, -logs.log_s)
    p, q = tl.exp2(logp), tl.exp2(logq)
    if WHAT == "sums":  # a pair already: `(a, b), c = f()` fails up to Triton 3.7
        return const.DIVERGENCE(logp, logq, p, q, q - p, param, soft, shift, WHAT)
    else:
        return const.DIVERGENCE(logp, logq, p, q, q - p, param, soft, shift, WHAT), q


@triton.jit
def pair_tile(
    student, teacher, at, start, stop, logs, exponent, param, const,
    MASKED: tl.constexpr, POLICY: tl.constexpr,
):  # fmt: skip
    """Sums of value and slope of a tile's groups."""
    s = load(student, at, start, stop, const, MASKED, POLICY)
    t = load(teacher, at, start, stop, const, MASKED, POLICY)
    value, slope = pair(s, t, logs, exponent, param, 0.0, 0.0, const, "sums")
    return tl.sum(value, 1), tl.sum(slope, 1)


@triton.jit
def pair_loop(student, teacher, start, stop, sides, exponent, param, const, POLICY: tl.constexpr):
    """Sums of value and centred slope, from the last column to the first."""
    TILE: tl.constexpr = const.LANES * const.GROUP
    logs = Logs(sides.m_s, tl.log2(sides.d_s), sides.m_t, tl.log2(sides.d_t))
    values = tl.zeros([const.LANES], const.ACC)
    slopes = tl.zeros([const.LANES], const.ACC)
    first, full, head = unmasked(start, stop, const)
    if full < stop:
        # columns past the end are -inf on both sides, which is worth 0 to every divergence
        value, slope = pair_tile(
            student, teacher, full, start, stop, logs, exponent, param, const, True, POLICY
        )
        values += value
        slopes += slope
    for back in range(0, full - first, TILE):
        at = full - TILE - back
        value, slope = pair_tile(
            student, teacher, at, start, stop, logs, exponent, param, const, False, POLICY
        )
        values += value
        slopes += slope
    if const.UNALIGNED == OFFSET:
        if head:
            at = first - TILE
            value, slope = pair_tile(
                student, teacher, at, start, stop, logs, exponent, param, const, True, POLICY
            )
            values += value
            slopes += slope
    value, slope = tl.sum(values, 0), tl.sum(slopes, 0)
    return const.DIVERGENCE(
        value, slope, sides.m_t, sides.m_s, sides.m_s, param, 0.0, 0.0, "finish"
    )


@triton.jit
def grad_tile(
    grad, student, teacher, at, start, stop, logs, exponent, param, slopes, const,
    MASKED: tl.constexpr,
):  # fmt: skip
    """CENTRED: the slopes are those of kl, which leaves out their sum: 0, but for a part of p."""
    s = load(student, at, start, stop, const, MASKED, "evict_first")
    t = load(teacher, at, start, stop, const, MASKED, "evict_first")
    out, q = pair(s, t, logs, exponent, param, slopes.soft, slopes.shift, const, "gradient")
    if const.CENTRED:
        out = tl.fma(-slopes.shift, q, out)
    if const.HARD:
        if const.HARD_T1:
            q = tl.exp2((s - logs.m_s) * LOG2E)
        target = tl.where(columns(at, const) == slopes.column, slopes.target, slopes.eps_over_v)
        out = tl.fma(q, slopes.unit, out) - target
    out = out.to(grad.dtype.element_ty)
    store(grad, out, at, start, stop, const, MASKED)


@triton.jit
def grad_loop(
    grad, student, teacher, start, stop, sides, slopes, sum_t1, column, of, unit, by, spec, const,
    REVERSE: tl.constexpr,
):  # fmt: skip
    """by * (soft / T * of * (slope - q * slopes) + unit * q_1 - hard * (eps / V)).

    The column of the label has 1 - eps more. of: the derivative that `OF_SUM` gives. HARD_T1: T is
    not 1, so that q_1, q at T = 1, needs an exponential of its own. A tile is written after it is
    read: `grad` may be the student's memory.
    """
    TILE: tl.constexpr = const.LANES * const.GROUP
    soft, unit, hard = spec.soft * spec.inverse * by * of, unit * by, spec.hard * by
    target = spec.one_minus_eps + spec.eps_over_v
    logs = Logs(sides.m_s, tl.log2(sides.d_s), sides.m_t, tl.log2(sides.d_t))
    target, eps_over_v, shift = hard * target, hard * spec.eps_over_v, soft * slopes
    if const.HARD_T1:
        unit = unit / sum_t1
    # `safe_sums` makes q 0 for an impossible student, but such a row has no cross-entropy
    unit = tl.where(sum_t1 == 0, float("nan"), unit)
    factors = Slopes(soft, shift, unit, target, eps_over_v, column)
    exponent, param = spec.exponent, spec.param
    first, full, head = unmasked(start, stop, const)
    for step in range(0, full - first, TILE):
        at = full - TILE - step if REVERSE else first + step
        grad_tile(
            grad, student, teacher, at, start, stop, logs, exponent, param, factors, const, False
        )
    if stop % TILE != 0:  # computed again: cheaper than a register kept through the loop
        grad_tile(
            grad, student, teacher, full, start, stop, logs, exponent, param, factors, const, True
        )
    if const.UNALIGNED == OFFSET:
        if head:
            at = first - TILE
            grad_tile(
                grad, student, teacher, at, start, stop, logs, exponent, param, factors, const,
                True,
            )  # fmt: skip
