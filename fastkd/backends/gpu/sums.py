"""The first tile loop over a row, [start, stop): maxima and sums of both sides (online softmax).

Running maxima and sums are kept per lane. Within the loop a lane reduces inside its own thread; the
lanes are merged once, at the end. x is taken relative to a maximum before it is scaled,
(x - max) * (log2(e) / T): the rounded product max * (log2(e) / T) would lose digits at logits of
1e4. `tiles.py` says what a tile is, and `pairs.py` what is computed from the sums.
"""

import triton
import triton.language as tl

from fastkd.backends.gpu.arguments import Sums
from fastkd.backends.gpu.tiles import OFFSET, columns, load, scalar, unmasked

LOG2E = tl.constexpr(1.4426950408889634)
# Running maxima start with a finite number, because -inf - -inf would be NaN.
LOWEST32 = tl.constexpr(-3.4028234663852886e38)
LOWEST64 = tl.constexpr(-1.7976931348623157e308)


@triton.jit
def initial_sums(const):
    """Running maximum and sum before the first tile."""
    lowest: tl.constexpr = LOWEST64 if const.ACC == tl.float64 else LOWEST32
    return tl.full([const.LANES], lowest, const.ACC), tl.zeros([const.LANES], const.ACC)


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
def columns_before(start, const):
    """How many of the columns before `start` would fall to each lane."""
    TILE: tl.constexpr = const.LANES * const.GROUP
    before = start // TILE * const.GROUP
    return before + tl.where(tl.arange(0, const.LANES) == 0, start % TILE, 0)


@triton.jit
def shifted_step(sum_shifted, x, top, new, at, start, stop, const, MASKED: tl.constexpr):
    """Updates sum_shifted, the sum of x - max; a lane has seen (at - start) / LANES columns."""
    if MASKED and const.UNALIGNED == OFFSET:
        here = columns(at, const)
        x = tl.where((here >= start) & (here < stop), x, 0.0)
    elif MASKED:
        x = tl.where(columns(at, const) < stop, x, 0.0)
    if const.UNALIGNED == OFFSET:
        seen = tl.where(at > start, at // const.LANES - columns_before(start, const), 0).to(x.dtype)
    else:
        seen = scalar((at - start) // const.LANES, x.dtype)
    return sum_shifted + tl.sum(x, 1) + seen * (top - new)


@triton.jit
def shifted_merge(sum_shifted, top, highest, start, stop, const):
    """The sum of x - highest over all columns."""
    full = stop // (const.LANES * const.GROUP) * (const.LANES * const.GROUP)
    tail = tl.sum((columns(full, const) < stop).to(tl.int32), 1)
    if const.UNALIGNED == OFFSET:
        seen = full // const.LANES + tail - columns_before(start, const)
    else:
        seen = (full - start) // const.LANES + tail
    return tl.sum(sum_shifted + seen.to(sum_shifted.dtype) * (top - highest), 0)


@triton.jit
def stats_tile(
    x, at, start, stop, top, total, sum_shifted, exponent, const, MASKED: tl.constexpr
):  # fmt: skip
    tile = load(x, at, start, stop, const, MASKED, "evict_first")
    new, total, tile, _, _ = online_update(tile, top, total, exponent)
    sum_shifted = shifted_step(sum_shifted, tile, top, new, at, start, stop, const, MASKED)
    return new, total, sum_shifted


@triton.jit
def stats_loop(x, start, stop, exponent, const):
    """(max, sum, sum of (x - max)) of one side."""
    TILE: tl.constexpr = const.LANES * const.GROUP
    top, total = initial_sums(const)
    sum_shifted = total
    first, full, head = unmasked(start, stop, const)
    if const.UNALIGNED == OFFSET:
        if head:
            # 1, not True: a function of its own, where Triton 3.3 finds addresses in fewer steps
            top, total, sum_shifted = stats_tile(
                x, first - TILE, start, stop, top, total, sum_shifted, exponent, const, 1
            )
    for at in range(first, full, TILE):
        top, total, sum_shifted = stats_tile(
            x, at, start, stop, top, total, sum_shifted, exponent, const, False
        )
    if full < stop:
        top, total, sum_shifted = stats_tile(
            x, full, start, stop, top, total, sum_shifted, exponent, const, True
        )
    highest, total, _ = merge_lanes(top, total, exponent)
    sum_shifted = shifted_merge(sum_shifted, top, highest, start, stop, const)
    return highest, total, sum_shifted


@triton.jit
def sum_tile(
    student, teacher, at, start, stop, sums, exponent, const,
    MASKED: tl.constexpr, OUT: tl.constexpr,
):  # fmt: skip
    """`Sums` with one more tile of both sides.

    cross: sum of e_w ((x_w - m_w) - (x_o - m_o)), where w is the side under which the expectation
    is taken (EXPECTATION), and o the other side. sum_t1: the student's sum at T = 1. sum_shifted:
    the student's sum of x - max. weighted: a side's sum of e (x - max) (OUT).
    """
    m_s, d_s, m_t, d_t, cross, sum_t1, sum_shifted, weighted_s, weighted_t = sums
    s = load(student, at, start, stop, const, MASKED, "evict_last")
    t = load(teacher, at, start, stop, const, MASKED, "evict_last")
    top_s, sum_s, s, e_s, carry_s = online_update(s, m_s, d_s, exponent)
    top_t, sum_t, t, e_t, carry_t = online_update(t, m_t, d_t, exponent)
    # both maxima have changed since the terms in `cross` were summed: d_w of them shift
    if const.EXPECTATION == "teacher":
        term = tl.where(e_t == 0, 0.0, e_t * (t - s))
        cross = carry_t * (cross + d_t * ((m_t - top_t) - (m_s - top_s))) + tl.sum(term, 1)
    if const.EXPECTATION == "student":
        term = tl.where(e_s == 0, 0.0, e_s * (s - t))
        cross = carry_s * (cross + d_s * ((m_s - top_s) - (m_t - top_t))) + tl.sum(term, 1)
    if const.HARD_T1:
        sum_t1 = sum_t1 * tl.exp2((m_s - top_s) * LOG2E) + tl.sum(tl.exp2(s * LOG2E), 1)
    if const.SMOOTH:
        sum_shifted = shifted_step(sum_shifted, s, m_s, top_s, at, start, stop, const, MASKED)
    if OUT:
        weighted_s = weighted_step(weighted_s, d_s, m_s - top_s, carry_s, s, e_s)
        weighted_t = weighted_step(weighted_t, d_t, m_t - top_t, carry_t, t, e_t)
    return Sums(top_s, sum_s, top_t, sum_t, cross, sum_t1, sum_shifted, weighted_s, weighted_t)


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
def merge_sides(m_s, d_s, m_t, d_t, cross, sum_t1, exponent, const):
    """Merges lanes, or splits of a row: (max, sum) of both sides, cross sum, sum at T = 1."""
    top_s, sum_s, w_s = merge_lanes(m_s, d_s, exponent)
    top_t, sum_t, w_t = merge_lanes(m_t, d_t, exponent)
    if const.EXPECTATION == "teacher":
        cross = cross + d_t * ((m_t - top_t) - (m_s - top_s))
        cross = tl.where(w_t == 0, 0.0, w_t * cross)
    if const.EXPECTATION == "student":
        cross = cross + d_s * ((m_s - top_s) - (m_t - top_t))
        cross = tl.where(w_s == 0, 0.0, w_s * cross)
    if const.HARD_T1:
        sum_t1 = sum_t1 * tl.exp2((m_s - top_s) * LOG2E)
    return top_s, sum_s, top_t, sum_t, tl.sum(cross, 0), tl.sum(sum_t1, 0)


@triton.jit
def sum_loop(student, teacher, start, stop, exponent, const, OUT: tl.constexpr):
    """`Sums` of columns [start, stop).

    cross, sum_t1 and sum_shifted are 0 where nothing asks for them, and weighted without OUT.
    """
    TILE: tl.constexpr = const.LANES * const.GROUP
    m_s, d_s = initial_sums(const)
    m_t, d_t = initial_sums(const)
    sums = Sums(m_s, d_s, m_t, d_t, d_s, d_s, d_s, d_s, d_s)
    first, full, head = unmasked(start, stop, const)
    if const.UNALIGNED == OFFSET:
        if head:
            sums = sum_tile(
                student, teacher, first - TILE, start, stop, sums, exponent, const, True, OUT
            )
    for at in range(first, full, TILE):
        sums = sum_tile(student, teacher, at, start, stop, sums, exponent, const, False, OUT)
    if full < stop:
        sums = sum_tile(student, teacher, full, start, stop, sums, exponent, const, True, OUT)
    m_s, d_s, m_t, d_t, cross, sum_t1, sum_shifted, weighted_s, weighted_t = sums
    top_s, sum_s, top_t, sum_t, all_cross, all_t1 = merge_sides(
        m_s, d_s, m_t, d_t, cross, sum_t1, exponent, const
    )
    all_shifted = scalar(0.0, const.ACC)
    if const.SMOOTH:
        all_shifted = shifted_merge(sum_shifted, m_s, top_s, start, stop, const)
    of_s, of_t = scalar(0.0, const.ACC), scalar(0.0, const.ACC)
    if OUT:
        of_s = weighted_merge(weighted_s, d_s, m_s, exponent)
        of_t = weighted_merge(weighted_t, d_t, m_t, exponent)
    return Sums(top_s, sum_s, top_t, sum_t, all_cross, all_t1, all_shifted, of_s, of_t)


@triton.jit
def safe_sums(d_s, d_t):
    """Both sums, but 1 where both sides are impossible (all -inf): then p = q = 0 everywhere."""
    dead = (d_s == 0) & (d_t == 0)
    return tl.where(dead, 1.0, d_s), tl.where(dead, 1.0, d_t)


@triton.jit
def quotient(a, b):
    """a / b, but exactly 1 where a = b: a GPU's division may be off in the last places."""
    return tl.where(a == b, 1.0, a / b)
