"""The row kernel of stored teachers: K columns of a row and, with a tail, one outcome more.

The sweep sums the columns that are not named, by themselves: their indices come sorted, so that a
tile is compared with the few that lie in it. The points follow, POINTS of them at a time, then the
gradient: every column by its exponential and one factor of the row, the named ones last.
"""

import triton
import triton.language as tl

from fastkd.backends.gpu.device_fns import LOG2E, columns, empty, fold, load, merge, row_at, scalar
from fastkd.backends.gpu.rows import zero_columns


@triton.jit
def rest_tile(
    x, start, vocab, top, total, unit, drift, base, order, place, coming, exponent,
    UNIT: tl.constexpr, DRIFT: tl.constexpr,
    MASKED: tl.constexpr, ACC: tl.constexpr, LANES: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """A tile without its named columns; place: how many have been met, coming: the next one."""
    tile = load(x, start, vocab, MASKED, "evict_last", ACC, LANES, GROUP)
    at = columns(start, LANES, GROUP)
    rest = tile
    while coming < start + LANES * GROUP:
        rest = tl.where(at == coming, -float("inf"), rest)
        place += 1
        coming = tl.load(order + place)
    new, total, rest, _, _ = fold(rest, top, total, exponent)
    if UNIT:
        unit = unit * tl.exp2((top - new) * LOG2E) + tl.sum(tl.exp2(rest * LOG2E), 1)
    if DRIFT:
        tile = tile - base
        if MASKED:
            tile = tl.where(at < vocab, tile, 0.0)
        drift += tl.sum(tile, 1)
    return new, total, unit, drift, place, coming


@triton.jit
def rest_sweep(
    x, vocab, base, order, exponent,
    UNIT: tl.constexpr, DRIFT: tl.constexpr,
    ACC: tl.constexpr, LANES: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """(max, sum, sum at T = 1) of the columns not named, and the sum of x - base over all."""
    top, total = empty(ACC, LANES)
    unit, drift = total, total
    place = 0
    coming = tl.load(order)
    full = vocab // (LANES * GROUP) * (LANES * GROUP)
    for start in range(0, full, LANES * GROUP):
        top, total, unit, drift, place, coming = rest_tile(
            x, start, vocab, top, total, unit, drift, base, order, place, coming, exponent,
            UNIT, DRIFT, False, ACC, LANES, GROUP,
        )  # fmt: skip
    if full < vocab:
        top, total, unit, drift, place, coming = rest_tile(
            x, full, vocab, top, total, unit, drift, base, order, place, coming, exponent,
            UNIT, DRIFT, True, ACC, LANES, GROUP,
        )  # fmt: skip
    highest, total, _ = merge(top, total, exponent)
    if UNIT:
        unit = unit * tl.exp2((top - highest) * LOG2E)
    return highest, total, tl.sum(unit, 0), tl.sum(drift, 0)


@triton.jit
def named_logits(x, indices, start, count, ACC: tl.constexpr, POINTS: tl.constexpr):
    """(place, index, which are columns, their logits) of POINTS of the named columns."""
    place = start + tl.arange(0, POINTS)
    index = tl.load(indices + place, mask=place < count, other=-1)
    there = index >= 0
    logit = tl.load(x + index, mask=there, other=-float("inf")).to(ACC)
    return place, index, there, logit


@triton.jit
def points(
    logit, top, log_total, exponent, logp, param, centre,
    DIVERGENCE: tl.constexpr, ALONE: tl.constexpr,
):  # fmt: skip
    """Value and slope at named columns, and q; without a tail the slope itself, not centred."""
    logp = logp * LOG2E
    logq = tl.fma(logit - top, exponent, -log_total)
    p, q = tl.exp2(logp), tl.exp2(logq)
    value, slope = DIVERGENCE(logp, logq, p, q, q - p, param)
    if ALONE:
        slope = slope + centre * q
    return value, slope, q


@triton.jit
def factor_tile(
    grad, x, start, vocab, top, top_unit, by, exponent, column, hard, target, spread,
    HARD: tl.constexpr, UNIT: tl.constexpr, RESTRICT: tl.constexpr,
    MASKED: tl.constexpr, ACC: tl.constexpr, LANES: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    tile = load(x, start, vocab, MASKED, "evict_first", ACC, LANES, GROUP)
    out = tl.zeros([LANES, GROUP], ACC) + tl.where(by != by, by, 0.0)
    if not RESTRICT:
        out = tl.exp2((tile - top) * exponent) * by
    at = columns(start, LANES, GROUP)
    if HARD:
        out += hard * tl.exp2((tile - top_unit) * LOG2E) - tl.where(at == column, target, spread)
    out = out.to(grad.dtype.element_ty)
    if MASKED:
        tl.store(grad + at, out, mask=at < vocab, eviction_policy="evict_first")
    else:
        tl.store(grad + at, out, eviction_policy="evict_first")


@triton.jit(do_not_specialize=["per_s", "per_g", "count"])
def topk_kernel(
    # pointers: the student [rows, columns], [rows, count] x3 with order [rows, count + 1], then one
    # element per row each; None where there is none
    student, grad, logprobs, indices, order, named, tail, loss, keep, label, scale,
    # shapes and strides
    vocab, classes, width, count,
    per_s, outer_s, inner_s, per_g, outer_g, inner_g,
    # the spec
    exponent: tl.float64, inverse: tl.float64, param: tl.float64, soft: tl.float64,
    hard: tl.float64, sure: tl.float64, spread: tl.float64, factor: tl.float64, centre: tl.float64,
    # constants
    DIVERGENCE: tl.constexpr, RESTRICT: tl.constexpr, UNIT: tl.constexpr, SMOOTH: tl.constexpr,
    POINTS: tl.constexpr, ACC: tl.constexpr, LANES: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """loss = soft D + hard CE against K named columns; grad = its gradient scale factor. One row.

    order: the named columns by rising index, then a number above every column. named: [rows, K]
    for the gradients at the named columns, which the sweep's stores would overwrite.
    """
    row = tl.program_id(0)
    if grad is not None:
        grad = row_at(grad, row, per_g, outer_g, inner_g)
    if keep is not None:
        if tl.load(keep + row) == 0:
            tl.store(loss + row, scalar(0.0, ACC))
            if grad is not None:
                zero_columns(grad, 0, width, LANES, GROUP)
            return
    student = row_at(student, row, per_s, outer_s, inner_s)
    base = row.to(tl.int64) * count
    logprobs, indices = logprobs + base, indices + base
    order = order + row.to(tl.int64) * (count + 1)
    exponent = scalar(exponent, ACC)
    param, soft, hard = scalar(param, ACC), scalar(soft, ACC), scalar(hard, ACC)
    sure, spread, centre = scalar(sure, ACC), scalar(spread, ACC), scalar(centre, ACC)
    nothing: tl.constexpr = -float("inf")

    column, near = -1, scalar(0.0, ACC)
    if label is not None:
        wanted = tl.load(label + row)
        here = (wanted >= 0) & (wanted < vocab)
        column = tl.where(here, wanted, -1).to(tl.int32)
        at_label = tl.load(student + column, mask=here, other=0.0).to(ACC)
        near = tl.where(at_label - at_label == 0, at_label, 0.0)  # what the scores lie around
    m_rest, d_rest, u_rest, drift = rest_sweep(
        student, vocab, near, order, exponent, UNIT, SMOOTH, ACC, LANES, GROUP
    )

    # the maximum and the sums of the named columns, and with the rest of the row
    tops, sums = tl.full([POINTS], nothing, ACC), tl.zeros([POINTS], ACC)
    for start in range(0, count, POINTS):
        _, _, _, logit = named_logits(student, indices, start, count, ACC, POINTS)
        tops = tl.maximum(tops, logit)
    m_named = tl.max(tops, 0)
    m_row = tl.maximum(m_named, m_rest)
    m_soft = m_named if RESTRICT else m_row
    m_soft = tl.where(m_soft == nothing, 0.0, m_soft)
    units = sums
    for start in range(0, count, POINTS):
        _, _, _, logit = named_logits(student, indices, start, count, ACC, POINTS)
        sums += tl.exp2((logit - m_soft) * exponent)
        if label is not None:
            units += tl.exp2((logit - m_row) * LOG2E)
    total = tl.sum(sums, 0)
    share = scalar(0.0, ACC)  # of the row's sum, a unit of d_rest
    if not RESTRICT:
        share = tl.exp2((m_rest - m_soft) * exponent)
        total += d_rest * share
    log_total = tl.log2(total)
    share = share / total

    values, slopes = tl.zeros([POINTS], ACC), tl.zeros([POINTS], ACC)
    wrong = tl.zeros([POINTS], ACC)
    for start in range(0, count, POINTS):
        place, _, there, logit = named_logits(student, indices, start, count, ACC, POINTS)
        logp = tl.load(logprobs + place, mask=place < count, other=nothing)
        value, slope, _ = points(
            logit, m_soft, log_total, exponent, logp, param, centre,
            DIVERGENCE, tail is None and not RESTRICT,
        )  # fmt: skip
        # of a bad index, in padding: a weight of 0 must not hide it
        wrong += tl.where(logp != logp, 1.0, 0.0)
        dead = (place >= count) | ((logp == nothing) & (logit == nothing))
        values += tl.where(dead, 0.0, value)
        slopes += tl.where(dead, 0.0, slope)
    value, slope_sum = tl.sum(values, 0), tl.sum(slopes, 0)
    of_rest = scalar(0.0, ACC)
    spoilt = tl.sum(wrong, 0)
    if tail is not None:
        tail_p = tl.load(tail + row).to(ACC) * LOG2E
        spoilt += tl.where(tail_p != tail_p, 1.0, 0.0)
        tail_q = (m_rest - m_soft) * exponent + (tl.log2(d_rest) - log_total)
        p_tail, q_tail = tl.exp2(tail_p), d_rest * share
        at_tail, tail_slope = DIVERGENCE(tail_p, tail_q, p_tail, q_tail, q_tail - p_tail, param)
        none = (d_rest == 0) & (tail_p == nothing)
        value += tl.where(none, 0.0, at_tail)
        tail_slope = tl.where(none, 0.0, tail_slope)
        slope_sum += tail_slope
        of_rest = tl.where(d_rest == 0, 0.0, tail_slope / d_rest)
    value = tl.where((log_total == nothing) | (spoilt > 0), float("nan"), soft * value)
    slope_sum = tl.where(spoilt > 0, float("nan"), slope_sum)

    unit = scalar(1.0, ACC)
    if label is not None:
        if not UNIT:
            u_rest = d_rest
        unit = tl.sum(units, 0) + u_rest * tl.exp2((m_rest - m_row) * LOG2E)
        rest = tl.where(here, spread * scalar(classes - vocab, ACC), 1.0 - spread * vocab)
        entropy = tl.log(unit) + tl.where(here, sure * (m_row - at_label), 0.0)
        entropy += tl.where(rest == 0, 0.0, rest * m_row)
        if SMOOTH:
            entropy -= spread * (drift + vocab * (near - m_row))
        value += hard * entropy
    tl.store(loss + row, value)

    if grad is not None:
        by = scalar(factor, ACC)
        if scale is not None:
            by = by * tl.load(scale + row)
        soft = soft * scalar(inverse, ACC) * by
        hard = hard * by
        target, spread = hard * (sure + spread), hard * spread
        hard = tl.where(unit == 0, float("nan"), hard / unit)
        named = named + base
        for start in range(0, count, POINTS):
            place, index, there, logit = named_logits(student, indices, start, count, ACC, POINTS)
            logp = tl.load(logprobs + place, mask=place < count, other=nothing)
            _, slope, q = points(
                logit, m_soft, log_total, exponent, logp, param, centre,
                DIVERGENCE, tail is None and not RESTRICT,
            )  # fmt: skip
            slope = tl.where((logp == nothing) & (logit == nothing), 0.0, slope)
            out = soft * (slope - q * slope_sum)
            if label is not None:
                out += hard * tl.exp2((logit - m_row) * LOG2E)
                out -= tl.where(index == column, target, spread)
            tl.store(named + place, out, mask=there)
        # q of a column is share times its exponential under the rest's own maximum
        by_rest = soft * (of_rest - share * slope_sum)
        by_rest = tl.where(value != value, float("nan"), by_rest)
        full = vocab // (LANES * GROUP) * (LANES * GROUP)
        for step in range(0, full, LANES * GROUP):
            factor_tile(
                grad, student, full - LANES * GROUP - step, vocab, m_rest, m_row, by_rest,
                exponent, column, hard, target, spread,
                label is not None, UNIT, RESTRICT, False, ACC, LANES, GROUP,
            )  # fmt: skip
        if vocab % (LANES * GROUP) != 0:
            factor_tile(
                grad, student, full, vocab, m_rest, m_row, by_rest,
                exponent, column, hard, target, spread,
                label is not None, UNIT, RESTRICT, True, ACC, LANES, GROUP,
            )  # fmt: skip
        zero_columns(grad, vocab, width, LANES, GROUP)
        # other threads have written these columns, too
        tl.debug_barrier()
        for start in range(0, count, POINTS):
            place = start + tl.arange(0, POINTS)
            index = tl.load(indices + place, mask=place < count, other=-1)
            out = tl.load(named + place, mask=index >= 0, other=0.0)
            tl.store(grad + index, out.to(grad.dtype.element_ty), mask=index >= 0)
