"""The first tile loop over a row, [start, stop): maxima and sums of both sides (online softmax).

Running maxima and sums are kept per lane. Within the loop a lane reduces inside its own thread; the
lanes are merged once, at the end. x is taken relative to a maximum before it is scaled,
(x - max) * (log2(e) / T): the rounded product max * (log2(e) / T) would lose digits at logits of
1e4. `tiles.py` says what a tile is, and `pairs.py` what is computed from the sums.
"""

import triton
import triton.language as tl

from fastkd.backends.gpu.tiles import OFFSET, columns, load, scalar, unmasked

LOG2E = tl.constexpr(1.4426950408889634)
# Running maxima start with a finite number, because -inf - -inf would be NaN.
LOWEST32 = tl.constexpr(-3.4028234663852886e38)
LOWEST64 = tl.constexpr(-1.7976931348623157e308)


@triton.jit
def initial_sums(ACC: tl.constexpr, LANES: tl.constexpr):
    """Running maximum and sum before the first tile."""
    lowest: tl.constexpr = LOWEST64 if ACC == tl.float64 else LOWEST32
    return tl.full([LANES], lowest, ACC), tl.zeros([LANES], ACC)


@triton.jit
def online_update(x, top, total, exponent):
    """One step of the online softmax: (max, sum, x - max, its exponential, factor of old sums)."""
    new = tl.maximum(top, tl.max(x, 1))
    x = x - new[:, None]
    e = tl.exp2(x * exponent)
    carry = tl.exp2((top - new) * exponent)
    return new, tl.fma(total, carry, tl.sum(e, 1)), x, e, carry


@triton.jit
def merge_lanes(top, total, exponent):
    """Merges the lanes: (max, sum, weight of each lane)."""
    highest = tl.max(top, 0)
    weight = tl.exp2((top - highest) * exponent)
    # The where keeps a contraction out of the sum, see `pairs.pair`. It tests the product, not the
    # weight: a maximum ignores NaN, so a lane with a NaN may have weight 0, and 0 * NaN is NaN.
    scaled = total * weight
    return highest, tl.sum(tl.where(scaled == 0, 0.0, scaled), 0), weight


@triton.jit
def columns_before(start, LANES: tl.constexpr, GROUP: tl.constexpr):
    """How many of the columns before `start` would fall to each lane."""
    before = start // (LANES * GROUP) * GROUP
    return before + tl.where(tl.arange(0, LANES) == 0, start % (LANES * GROUP), 0)


@triton.jit
def shifted_step(
    sum_shifted, x, top, new, at, start, stop,
    MASKED: tl.constexpr, UNALIGNED: tl.constexpr, LANES: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Updates sum_shifted, the sum of x - max; a lane has seen (at - start) / LANES columns."""
    if MASKED and UNALIGNED == OFFSET:
        here = columns(at, LANES, GROUP)
        x = tl.where((here >= start) & (here < stop), x, 0.0)
    elif MASKED:
        x = tl.where(columns(at, LANES, GROUP) < stop, x, 0.0)
    if UNALIGNED == OFFSET:
        seen = tl.where(at > start, at // LANES - columns_before(start, LANES, GROUP), 0).to(
            x.dtype
        )
    else:
        seen = scalar((at - start) // LANES, x.dtype)
    return sum_shifted + tl.sum(x, 1) + seen * (top - new)


@triton.jit
def shifted_merge(
    sum_shifted, top, highest, start, stop,
    UNALIGNED: tl.constexpr, LANES: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """The sum of x - highest over all columns."""
    full = stop // (LANES * GROUP) * (LANES * GROUP)
    tail = tl.sum((columns(full, LANES, GROUP) < stop).to(tl.int32), 1)
    if UNALIGNED == OFFSET:
        seen = full // LANES + tail - columns_before(start, LANES, GROUP)
    else:
        seen = (full - start) // LANES + tail
    return tl.sum(sum_shifted + seen.to(sum_shifted.dtype) * (top - highest), 0)


@triton.jit
def stats_tile(
    x, at, start, stop, top, total, sum_shifted, exponent,
    MASKED: tl.constexpr, UNALIGNED: tl.constexpr,
    ACC: tl.constexpr, LANES: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    tile = load(x, at, stop, MASKED, "evict_first", ACC, LANES, GROUP, start, UNALIGNED)
    new, total, tile, _, _ = online_update(tile, top, total, exponent)
    sum_shifted = shifted_step(
        sum_shifted, tile, top, new, at, start, stop, MASKED, UNALIGNED, LANES, GROUP
    )
    return new, total, sum_shifted


@triton.jit
def stats_loop(
    x, start, stop, exponent,
    UNALIGNED: tl.constexpr, ACC: tl.constexpr, LANES: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """(max, sum, sum of (x - max)) of one side."""
    top, total = initial_sums(ACC, LANES)
    sum_shifted = total
    first, full, head = unmasked(start, stop, UNALIGNED, LANES, GROUP)
    if UNALIGNED == OFFSET:
        if head:
            top, total, sum_shifted = stats_tile(
                x, first - LANES * GROUP, start, stop, top, total, sum_shifted, exponent,
                True, True, ACC, LANES, GROUP,
            )  # fmt: skip
    for at in range(first, full, LANES * GROUP):
        top, total, sum_shifted = stats_tile(
            x, at, start, stop, top, total, sum_shifted, exponent,
            False, UNALIGNED, ACC, LANES, GROUP,
        )  # fmt: skip
    if full < stop:
        top, total, sum_shifted = stats_tile(
            x, full, start, stop, top, total, sum_shifted, exponent,
            True, UNALIGNED, ACC, LANES, GROUP,
        )  # fmt: skip
    highest, total, _ = merge_lanes(top, total, exponent)
    sum_shifted = shifted_merge(sum_shifted, top, highest, start, stop, UNALIGNED, LANES, GROUP)
    return highest, total, sum_shifted


@triton.jit
def sum_tile(
    student, teacher, at, start, stop, m_s, d_s, m_t, d_t, cross, sum_t1, sum_shifted,
    weighted_s, weighted_t, exponent,
    EXPECTATION: tl.constexpr, HARD_T1: tl.constexpr, SUM_SHIFTED: tl.constexpr,
    OUT: tl.constexpr, MASKED: tl.constexpr, UNALIGNED: tl.constexpr,
    ACC: tl.constexpr, LANES: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Adds one tile of both sides to the running sums.

    cross: sum of e_w ((x_w - m_w) - (x_o - m_o)), where w is the side under which the expectation
    is taken (EXPECTATION), and o the other side. sum_t1: the student's sum at T = 1. sum_shifted:
    the student's sum of x - max. weighted: a side's sum of e (x - max) (OUT).
    """
    s = load(student, at, stop, MASKED, "evict_last", ACC, LANES, GROUP, start, UNALIGNED)
    t = load(teacher, at, stop, MASKED, "evict_last", ACC, LANES, GROUP, start, UNALIGNED)
    top_s, sum_s, s, e_s, carry_s = online_update(s, m_s, d_s, exponent)
    top_t, sum_t, t, e_t, carry_t = online_update(t, m_t, d_t, exponent)
    # both maxima have changed since the terms in `cross` were summed: d_w of them shift
    if EXPECTATION == "teacher":
        term = tl.where(e_t == 0, 0.0, e_t * (t - s))
        cross = carry_t * (cross + d_t * ((m_t - top_t) - (m_s - top_s))) + tl.sum(term, 1)
    if EXPECTATION == "student":
        term = tl.where(e_s == 0, 0.0, e_s * (s - t))
        cross = carry_s * (cross + d_s * ((m_s - top_s) - (m_t - top_t))) + tl.sum(term, 1)
    if HARD_T1:
        sum_t1 = sum_t1 * tl.exp2((m_s - top_s) * LOG2E) + tl.sum(tl.exp2(s * LOG2E), 1)
    if SUM_SHIFTED:
        sum_shifted = shifted_step(
            sum_shifted, s, m_s, top_s, at, start, stop, MASKED, UNALIGNED, LANES, GROUP
        )
    if OUT:
        weighted_s = weighted_step(weighted_s, d_s, m_s - top_s, carry_s, s, e_s)
        weighted_t = weighted_step(weighted_t, d_t, m_t - top_t, carry_t, t, e_t)
    return top_s, sum_s, top_t, sum_t, cross, sum_t1, sum_shifted, weighted_s, weighted_t


@triton.jit
def weighted_step(weighted, total, moved, carry, x, e):
    """Updates the sum of e (x - max), whose maximum has moved."""
    return carry * (weighted + total * moved) + tl.sum(tl.where(e == 0, 0.0, e * x), 1)


@triton.jit
def weighted_merge(weighted, total, top, exponent):
    """The sum of e (x - max) of lanes, or of splits of a row."""
    highest, _, weight = merge_lanes(top, total, exponent)
    scaled = weight * (weighted + total * (top - highest))
    return tl.sum(tl.where(weight == 0, 0.0, scaled), 0)


@triton.jit
def merge_sides(
    m_s, d_s, m_t, d_t, cross, sum_t1, exponent, EXPECTATION: tl.constexpr, HARD_T1: tl.constexpr
):
    """Merges lanes, or splits of a row: (max, sum) of both sides, cross sum, sum at T = 1."""
    top_s, sum_s, w_s = merge_lanes(m_s, d_s, exponent)
    top_t, sum_t, w_t = merge_lanes(m_t, d_t, exponent)
    if EXPECTATION == "teacher":
        cross = cross + d_t * ((m_t - top_t) - (m_s - top_s))
        cross = tl.where(w_t == 0, 0.0, w_t * cross)
    if EXPECTATION == "student":
        cross = cross + d_s * ((m_s - top_s) - (m_t - top_t))
        cross = tl.where(w_s == 0, 0.0, w_s * cross)
    if HARD_T1:
        sum_t1 = sum_t1 * tl.exp2((m_s - top_s) * LOG2E)
    return top_s, sum_s, top_t, sum_t, tl.sum(cross, 0), tl.sum(sum_t1, 0)


@triton.jit
def sum_loop(
    student, teacher, start, stop, exponent,
    EXPECTATION: tl.constexpr, HARD_T1: tl.constexpr, SUM_SHIFTED: tl.constexpr, OUT: tl.constexpr,
    UNALIGNED: tl.constexpr, ACC: tl.constexpr, LANES: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """(max, sum) of both sides, and of the student: cross sum, sum at T = 1, sum of (x - max).

    Then both sides' sums of e (x - max), 0 without OUT.
    """
    m_s, d_s = initial_sums(ACC, LANES)
    m_t, d_t = initial_sums(ACC, LANES)
    cross, sum_t1, sum_shifted, weighted_s, weighted_t = d_s, d_s, d_s, d_s, d_s
    first, full, head = unmasked(start, stop, UNALIGNED, LANES, GROUP)
    if UNALIGNED == OFFSET:
        if head:
            m_s, d_s, m_t, d_t, cross, sum_t1, sum_shifted, weighted_s, weighted_t = sum_tile(
                student, teacher, first - LANES * GROUP, start, stop,
                m_s, d_s, m_t, d_t, cross, sum_t1, sum_shifted, weighted_s, weighted_t, exponent,
                EXPECTATION, HARD_T1, SUM_SHIFTED, OUT, True, True, ACC, LANES, GROUP,
            )  # fmt: skip
    for at in range(first, full, LANES * GROUP):
        m_s, d_s, m_t, d_t, cross, sum_t1, sum_shifted, weighted_s, weighted_t = sum_tile(
            student, teacher, at, start, stop, m_s, d_s, m_t, d_t, cross, sum_t1, sum_shifted,
            weighted_s, weighted_t, exponent,
            EXPECTATION, HARD_T1, SUM_SHIFTED, OUT, False, UNALIGNED, ACC, LANES, GROUP,
        )  # fmt: skip
    if full < stop:
        m_s, d_s, m_t, d_t, cross, sum_t1, sum_shifted, weighted_s, weighted_t = sum_tile(
            student, teacher, full, start, stop, m_s, d_s, m_t, d_t, cross, sum_t1, sum_shifted,
            weighted_s, weighted_t, exponent,
            EXPECTATION, HARD_T1, SUM_SHIFTED, OUT, True, UNALIGNED, ACC, LANES, GROUP,
        )  # fmt: skip
    top_s, sum_s, top_t, sum_t, all_cross, all_t1 = merge_sides(
        m_s, d_s, m_t, d_t, cross, sum_t1, exponent, EXPECTATION, HARD_T1
    )
    all_shifted = scalar(0.0, ACC)
    if SUM_SHIFTED:
        all_shifted = shifted_merge(sum_shifted, m_s, top_s, start, stop, UNALIGNED, LANES, GROUP)
    of_s, of_t = scalar(0.0, ACC), scalar(0.0, ACC)
    if OUT:
        of_s = weighted_merge(weighted_s, d_s, m_s, exponent)
        of_t = weighted_merge(weighted_t, d_t, m_t, exponent)
    return top_s, sum_s, top_t, sum_t, all_cross, all_t1, all_shifted, of_s, of_t


@triton.jit
def safe_sums(d_s, d_t):
    """Both sums, but 1 where both sides are impossible (all -inf): then p = q = 0 everywhere."""
    dead = (d_s == 0) & (d_t == 0)
    return tl.where(dead, 1.0, d_s), tl.where(dead, 1.0, d_t)


@triton.jit
def quotient(a, b):
    """a / b, but exactly 1 where a = b: a GPU's division may be off in the last places."""
    return tl.where(a == b, 1.0, a / b)
