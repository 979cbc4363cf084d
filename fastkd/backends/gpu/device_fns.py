"""What a program does to its row: one sweep over columns [start, stop) per function.

A tile is [LANES, GROUP]: GROUP neighbouring columns are one 16-byte load and belong to one lane.
Running maxima and sums are kept per lane and reduced across lanes once, when the sweep ends; inside
the sweep a lane reduces within its own thread. start is a multiple of a tile, 0 where the program
has the row to itself, and only the last, partial tile is masked. x is always taken relative to a
maximum before it is scaled: (x - max) * (log2(e) / T), since a rounded product
max * (log2(e) / T) would cost digits at logits of 1e4.

SHIFTED: the row starts inside a group of columns, as those of an odd vocabulary do. Its pointer is
the 16-byte boundary below, start the columns in between, and the first tile is masked as well. Ends
are then read by whole groups and cut afterwards: a group with a column of the row in it lies in
memory that may be read, and a mask for each column would make eight loads of one.
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
# a finite start for running maxima: -inf - -inf would be NaN
LOWEST32 = tl.constexpr(-3.4028234663852886e38)
LOWEST64 = tl.constexpr(-1.7976931348623157e308)


@triton.jit
def scalar(x, ACC: tl.constexpr):
    """A float argument in the accumulator's dtype (the interpreter hands Python floats over)."""
    return tl.full((), x, ACC)


@triton.jit
def row_at(x, row, per, outer, inner, skew=None, GROUP: tl.constexpr = 1):
    """The start of row [row // per, row % per]; 64 bits, since rows * columns passes 2^31.

    skew: where the first row starts after x, which is a boundary; the boundary below is returned.
    """
    offset = (row // per).to(tl.int64) * outer + (row % per).to(tl.int64) * inner
    if skew is not None:
        offset = (offset + skew) // GROUP * GROUP
    return x + offset


@triton.jit
def row_span(row, per, outer, inner, skew, vocab, GROUP: tl.constexpr):
    """Columns [start, stop) of a row, seen from where `row_at` says that it is."""
    start = 0
    if skew is not None:
        offset = (row // per).to(tl.int64) * outer + (row % per).to(tl.int64) * inner
        start = ((offset + skew) % GROUP).to(tl.int32)
    return start, start + vocab


@triton.jit
def columns(start, LANES: tl.constexpr, GROUP: tl.constexpr):
    return start + (tl.arange(0, LANES)[:, None] * GROUP + tl.arange(0, GROUP)[None, :])


@triton.jit
def load(
    x,
    at,
    stop,
    MASKED: tl.constexpr,
    POLICY: tl.constexpr,
    ACC: tl.constexpr,
    LANES: tl.constexpr,
    GROUP: tl.constexpr,
    start=0,
    SHIFTED: tl.constexpr = False,
):
    here = columns(at, LANES, GROUP)
    if MASKED and SHIFTED:
        group = at + tl.arange(0, LANES)[:, None] * GROUP
        some = (group + GROUP > start) & (group < stop)
        tile = tl.load(x + here, mask=some, other=-float("inf"), eviction_policy=POLICY)
        tile = tl.where((here >= start) & (here < stop), tile.to(ACC), -float("inf"))
    elif MASKED:
        tile = tl.load(x + here, mask=here < stop, other=-float("inf"), eviction_policy=POLICY)
    else:
        tile = tl.load(x + here, eviction_policy=POLICY)
    return tile.to(ACC)


@triton.jit
def store(
    x, tile, at, start, stop,
    MASKED: tl.constexpr, SHIFTED: tl.constexpr, LANES: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    here = columns(at, LANES, GROUP)
    if MASKED and SHIFTED:
        group = at + tl.arange(0, LANES)[:, None] * GROUP
        whole = (group >= start) & (group + GROUP <= stop)
        tl.store(x + here, tile, mask=whole, eviction_policy="evict_first")
        # the groups that a neighbour shares, column by column
        cut = (here >= start) & (here < stop) & (whole == 0)
        tl.store(x + here, tile, mask=cut, eviction_policy="evict_first")
    elif MASKED:
        tl.store(x + here, tile, mask=here < stop, eviction_policy="evict_first")
    else:
        tl.store(x + here, tile, eviction_policy="evict_first")


@triton.jit
def unmasked(start, stop, SHIFTED: tl.constexpr, LANES: tl.constexpr, GROUP: tl.constexpr):
    """Columns [first, full) of whole tiles, and whether there is a partial tile before them."""
    full = stop // (LANES * GROUP) * (LANES * GROUP)
    first = start
    head = False
    if SHIFTED:
        first = tl.cdiv(start, LANES * GROUP) * (LANES * GROUP)
        # a row within one tile is all tail
        head = (start < first) & (first <= full)
    return first, full, head


@triton.jit
def empty(ACC: tl.constexpr, LANES: tl.constexpr):
    """Running maximum and sum of lanes that have seen nothing."""
    lowest: tl.constexpr = LOWEST64 if ACC == tl.float64 else LOWEST32
    return tl.full([LANES], lowest, ACC), tl.zeros([LANES], ACC)


@triton.jit
def fold(x, top, total, exponent):
    """A tile into running maxima and sums; also x - max, its exponential, and the sums' carry."""
    new = tl.maximum(top, tl.max(x, 1))
    x = x - new[:, None]
    e = tl.exp2(x * exponent)
    carry = tl.exp2((top - new) * exponent)
    return new, tl.fma(total, carry, tl.sum(e, 1)), x, e, carry


@triton.jit
def merge(top, total, exponent):
    """Lanes into the row: (max, sum, weight of each lane)."""
    highest = tl.max(top, 0)
    weight = tl.exp2((top - highest) * exponent)
    # The where keeps a contraction out of the sum, see `pair`. It asks for the product: a maximum
    # passes over NaN, so that the lane of one may have weight 0, and 0 * NaN is still NaN.
    scaled = total * weight
    return highest, tl.sum(tl.where(scaled == 0, 0.0, scaled), 0), weight


@triton.jit
def missing(start, LANES: tl.constexpr, GROUP: tl.constexpr):
    """What a lane lacks of start's tile and of all tiles before, to count from column 0."""
    before = start // (LANES * GROUP) * GROUP
    return before + tl.where(tl.arange(0, LANES) == 0, start % (LANES * GROUP), 0)


@triton.jit
def drift_step(
    drift, x, top, new, at, start, stop,
    MASKED: tl.constexpr, SHIFTED: tl.constexpr, LANES: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Sum of (x - max) under a changing max; a lane has seen (at - start) / LANES."""
    if MASKED and SHIFTED:
        here = columns(at, LANES, GROUP)
        x = tl.where((here >= start) & (here < stop), x, 0.0)
    elif MASKED:
        x = tl.where(columns(at, LANES, GROUP) < stop, x, 0.0)
    if SHIFTED:
        seen = tl.where(at > start, at // LANES - missing(start, LANES, GROUP), 0).to(x.dtype)
    else:
        seen = scalar((at - start) // LANES, x.dtype)
    return drift + tl.sum(x, 1) + seen * (top - new)


@triton.jit
def drift_merge(
    drift, top, highest, start, stop,
    SHIFTED: tl.constexpr, LANES: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Sum over the columns of (x - highest)."""
    full = stop // (LANES * GROUP) * (LANES * GROUP)
    tail = tl.sum((columns(full, LANES, GROUP) < stop).to(tl.int32), 1)
    if SHIFTED:
        seen = full // LANES + tail - missing(start, LANES, GROUP)
    else:
        seen = (full - start) // LANES + tail
    return tl.sum(drift + seen.to(drift.dtype) * (top - highest), 0)


@triton.jit
def stats_tile(
    x, at, start, stop, top, total, drift, exponent,
    MASKED: tl.constexpr, SHIFTED: tl.constexpr,
    ACC: tl.constexpr, LANES: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    tile = load(x, at, stop, MASKED, "evict_first", ACC, LANES, GROUP, start, SHIFTED)
    new, total, tile, _, _ = fold(tile, top, total, exponent)
    drift = drift_step(drift, tile, top, new, at, start, stop, MASKED, SHIFTED, LANES, GROUP)
    return new, total, drift


@triton.jit
def stats_sweep(
    x, start, stop, exponent,
    SHIFTED: tl.constexpr, ACC: tl.constexpr, LANES: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """(max, sum, sum of (x - max)) of one side."""
    top, total = empty(ACC, LANES)
    drift = total
    first, full, head = unmasked(start, stop, SHIFTED, LANES, GROUP)
    if SHIFTED:
        if head:
            top, total, drift = stats_tile(
                x, first - LANES * GROUP, start, stop, top, total, drift, exponent,
                True, True, ACC, LANES, GROUP,
            )  # fmt: skip
    for at in range(first, full, LANES * GROUP):
        top, total, drift = stats_tile(
            x, at, start, stop, top, total, drift, exponent, False, SHIFTED, ACC, LANES, GROUP
        )
    if full < stop:
        top, total, drift = stats_tile(
            x, full, start, stop, top, total, drift, exponent, True, SHIFTED, ACC, LANES, GROUP
        )
    highest, total, _ = merge(top, total, exponent)
    drift = drift_merge(drift, top, highest, start, stop, SHIFTED, LANES, GROUP)
    return highest, total, drift


@triton.jit
def first_tile(
    student, teacher, at, start, stop, m_s, d_s, m_t, d_t, cross, unit, drift, exponent,
    EXPECTATION: tl.constexpr, UNIT: tl.constexpr, DRIFT: tl.constexpr,
    MASKED: tl.constexpr, SHIFTED: tl.constexpr,
    ACC: tl.constexpr, LANES: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """One tile of both sides into the running sums; cross is sum e_w ((x_w - m_w) - (x_o - m_o)).

    w is the side that weighs (EXPECTATION), o the other one. `unit` is the student's sum at T = 1,
    `drift` its sum of (x - max).
    """
    s = load(student, at, stop, MASKED, "evict_last", ACC, LANES, GROUP, start, SHIFTED)
    t = load(teacher, at, stop, MASKED, "evict_last", ACC, LANES, GROUP, start, SHIFTED)
    top_s, sum_s, s, e_s, carry_s = fold(s, m_s, d_s, exponent)
    top_t, sum_t, t, e_t, carry_t = fold(t, m_t, d_t, exponent)
    # both maxima move under the terms already summed, hence the shift of d_w columns' worth
    if EXPECTATION == "teacher":
        term = tl.where(e_t == 0, 0.0, e_t * (t - s))
        cross = carry_t * (cross + d_t * ((m_t - top_t) - (m_s - top_s))) + tl.sum(term, 1)
    if EXPECTATION == "student":
        term = tl.where(e_s == 0, 0.0, e_s * (s - t))
        cross = carry_s * (cross + d_s * ((m_s - top_s) - (m_t - top_t))) + tl.sum(term, 1)
    if UNIT:
        unit = unit * tl.exp2((m_s - top_s) * LOG2E) + tl.sum(tl.exp2(s * LOG2E), 1)
    if DRIFT:
        drift = drift_step(drift, s, m_s, top_s, at, start, stop, MASKED, SHIFTED, LANES, GROUP)
    return top_s, sum_s, top_t, sum_t, cross, unit, drift


@triton.jit
def merge_sides(
    m_s, d_s, m_t, d_t, cross, unit, exponent, EXPECTATION: tl.constexpr, UNIT: tl.constexpr
):
    """Lanes, or the parts of a row, into one: (max, sum) of both sides, cross sum, sum at T = 1."""
    top_s, sum_s, w_s = merge(m_s, d_s, exponent)
    top_t, sum_t, w_t = merge(m_t, d_t, exponent)
    if EXPECTATION == "teacher":
        cross = cross + d_t * ((m_t - top_t) - (m_s - top_s))
        cross = tl.where(w_t == 0, 0.0, w_t * cross)
    if EXPECTATION == "student":
        cross = cross + d_s * ((m_s - top_s) - (m_t - top_t))
        cross = tl.where(w_s == 0, 0.0, w_s * cross)
    if UNIT:
        unit = unit * tl.exp2((m_s - top_s) * LOG2E)
    return top_s, sum_s, top_t, sum_t, tl.sum(cross, 0), tl.sum(unit, 0)


@triton.jit
def first_sweep(
    student, teacher, start, stop, exponent,
    EXPECTATION: tl.constexpr, UNIT: tl.constexpr, DRIFT: tl.constexpr,
    SHIFTED: tl.constexpr, ACC: tl.constexpr, LANES: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """(max, sum) of both sides, and of the student: cross sum, sum at T = 1, sum of (x - max)."""
    m_s, d_s = empty(ACC, LANES)
    m_t, d_t = empty(ACC, LANES)
    cross, unit, drift = d_s, d_s, d_s
    first, full, head = unmasked(start, stop, SHIFTED, LANES, GROUP)
    if SHIFTED:
        if head:
            m_s, d_s, m_t, d_t, cross, unit, drift = first_tile(
                student, teacher, first - LANES * GROUP, start, stop,
                m_s, d_s, m_t, d_t, cross, unit, drift, exponent,
                EXPECTATION, UNIT, DRIFT, True, True, ACC, LANES, GROUP,
            )  # fmt: skip
    for at in range(first, full, LANES * GROUP):
        m_s, d_s, m_t, d_t, cross, unit, drift = first_tile(
            student, teacher, at, start, stop, m_s, d_s, m_t, d_t, cross, unit, drift, exponent,
            EXPECTATION, UNIT, DRIFT, False, SHIFTED, ACC, LANES, GROUP,
        )  # fmt: skip
    if full < stop:
        m_s, d_s, m_t, d_t, cross, unit, drift = first_tile(
            student, teacher, full, start, stop, m_s, d_s, m_t, d_t, cross, unit, drift, exponent,
            EXPECTATION, UNIT, DRIFT, True, SHIFTED, ACC, LANES, GROUP,
        )  # fmt: skip
    top_s, sum_s, top_t, sum_t, all_cross, all_unit = merge_sides(
        m_s, d_s, m_t, d_t, cross, unit, exponent, EXPECTATION, UNIT
    )
    all_drift = scalar(0.0, ACC)
    if DRIFT:
        all_drift = drift_merge(drift, m_s, top_s, start, stop, SHIFTED, LANES, GROUP)
    return top_s, sum_s, top_t, sum_t, all_cross, all_unit, all_drift


@triton.jit
def norms(d_s, d_t):
    """Both sums, 1 where the row is impossible on both sides: every column is then p = q = 0."""
    dead = (d_s == 0) & (d_t == 0)
    return tl.where(dead, 1.0, d_s), tl.where(dead, 1.0, d_t)


@triton.jit
def quotient(a, b):
    """a / b, exactly 1 for equals: a GPU's own division is some units in the last place off."""
    return tl.where(a == b, 1.0, a / b)


@triton.jit
def pair(s, t, m_s, log_s, m_t, log_t, exponent, param, DIVERGENCE: tl.constexpr):
    """Value and centred slope at a tile of logits, and q; (max, log2 sum) of each side.

    Identical sides must cancel to exactly 0 also where a product is contracted with the sum it goes
    into: ptxas 12.9 does so to packed pairs (sm_100), whatever it is told. Hence the plain tl.fma,
    and probabilities that are exponentials, with no product of their own.
    """
    logp = tl.fma(t - m_t, exponent, -log_t)
    logq = tl.fma(s - m_s, exponent, -log_s)
    p, q = tl.exp2(logp), tl.exp2(logq)
    value, slope = DIVERGENCE(logp, logq, p, q, q - p, param)
    return value, slope, q


@triton.jit
def pair_sweep(
    student, teacher, start, stop, m_s, d_s, m_t, d_t, exponent, param,
    DIVERGENCE: tl.constexpr, POLICY: tl.constexpr, SHIFTED: tl.constexpr,
    ACC: tl.constexpr, LANES: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Sums of value and centred slope, from the last column to the first."""
    log_s, log_t = tl.log2(d_s), tl.log2(d_t)
    values = tl.zeros([LANES], ACC)
    slopes = tl.zeros([LANES], ACC)
    first, full, head = unmasked(start, stop, SHIFTED, LANES, GROUP)
    if full < stop:
        # columns past the end are -inf on both sides, which is worth 0 to every divergence
        s = load(student, full, stop, True, POLICY, ACC, LANES, GROUP, start, SHIFTED)
        t = load(teacher, full, stop, True, POLICY, ACC, LANES, GROUP, start, SHIFTED)
        value, slope, _ = pair(s, t, m_s, log_s, m_t, log_t, exponent, param, DIVERGENCE)
        values += tl.sum(value, 1)
        slopes += tl.sum(slope, 1)
    for back in range(0, full - first, LANES * GROUP):
        at = full - LANES * GROUP - back
        s = load(student, at, stop, False, POLICY, ACC, LANES, GROUP)
        t = load(teacher, at, stop, False, POLICY, ACC, LANES, GROUP)
        value, slope, _ = pair(s, t, m_s, log_s, m_t, log_t, exponent, param, DIVERGENCE)
        values += tl.sum(value, 1)
        slopes += tl.sum(slope, 1)
    if SHIFTED:
        if head:
            at = first - LANES * GROUP
            s = load(student, at, stop, True, POLICY, ACC, LANES, GROUP, start, True)
            t = load(teacher, at, stop, True, POLICY, ACC, LANES, GROUP, start, True)
            value, slope, _ = pair(
                s, t, m_s, log_s, m_t, log_t, exponent, param, DIVERGENCE,
            )  # fmt: skip
            values += tl.sum(value, 1)
            slopes += tl.sum(slope, 1)
    return tl.sum(values, 0), tl.sum(slopes, 0)


@triton.jit
def gradient_tile(
    grad, student, teacher, at, start, stop, m_s, log_s, m_t, log_t,
    slopes, column, exponent, param, soft, hard, target, spread,
    DIVERGENCE: tl.constexpr, CENTRED: tl.constexpr, HARD: tl.constexpr, UNIT: tl.constexpr,
    MASKED: tl.constexpr, SHIFTED: tl.constexpr,
    ACC: tl.constexpr, LANES: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    s = load(student, at, stop, MASKED, "evict_first", ACC, LANES, GROUP, start, SHIFTED)
    t = load(teacher, at, stop, MASKED, "evict_first", ACC, LANES, GROUP, start, SHIFTED)
    _, out, q = pair(s, t, m_s, log_s, m_t, log_t, exponent, param, DIVERGENCE)
    if not CENTRED:
        out = out - q * slopes
    out = out * soft
    if HARD:
        if UNIT:
            q = tl.exp2((s - m_s) * LOG2E)
        here = columns(at, LANES, GROUP)
        out += hard * q - tl.where(here == column, target, spread)
    out = out.to(grad.dtype.element_ty)
    store(grad, out, at, start, stop, MASKED, SHIFTED, LANES, GROUP)


@triton.jit
def gradient_sweep(
    grad, student, teacher, start, stop, m_s, d_s, m_t, d_t, slopes, unit,
    column, exponent, param, soft, hard, target, spread,
    DIVERGENCE: tl.constexpr, CENTRED: tl.constexpr, HARD: tl.constexpr, UNIT: tl.constexpr,
    REVERSE: tl.constexpr, SHIFTED: tl.constexpr,
    ACC: tl.constexpr, LANES: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """soft * (slope - q * slopes) + hard * (q at T = 1 - target at `column`, - spread elsewhere).

    CENTRED: the slopes are known to sum to 0. UNIT: T is not 1, and q at T = 1 takes another
    exponential. A tile is written after it is read: `grad` may be the student's memory.
    """
    log_s, log_t = tl.log2(d_s), tl.log2(d_t)
    target, spread = hard * target, hard * spread
    if UNIT:
        hard = hard / unit
    # q of a student that is impossible everywhere is 0 by `norms`, but has no cross-entropy
    hard = tl.where(unit == 0, float("nan"), hard)
    first, full, head = unmasked(start, stop, SHIFTED, LANES, GROUP)
    for step in range(0, full - first, LANES * GROUP):
        at = full - LANES * GROUP - step if REVERSE else first + step
        gradient_tile(
            grad, student, teacher, at, start, stop, m_s, log_s, m_t, log_t,
            slopes, column, exponent, param, soft, hard, target, spread,
            DIVERGENCE, CENTRED, HARD, UNIT, False, SHIFTED, ACC, LANES, GROUP,
        )  # fmt: skip
    if stop % (LANES * GROUP) != 0:  # asked again: cheaper than kept through the loop
        gradient_tile(
            grad, student, teacher, full, start, stop, m_s, log_s, m_t, log_t,
            slopes, column, exponent, param, soft, hard, target, spread,
            DIVERGENCE, CENTRED, HARD, UNIT, True, SHIFTED, ACC, LANES, GROUP,
        )  # fmt: skip
    if SHIFTED:
        if head:
            gradient_tile(
                grad, student, teacher, first - LANES * GROUP, start, stop,
                m_s, log_s, m_t, log_t, slopes, column,
                exponent, param, soft, hard, target, spread,
                DIVERGENCE, CENTRED, HARD, UNIT, True, True, ACC, LANES, GROUP,
            )  # fmt: skip
