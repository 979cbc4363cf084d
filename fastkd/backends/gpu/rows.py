"""The row kernels: one program per row, whatever the divergence (an argument, `divergence.py`).

Nothing here waits for the device. Few rows would leave part of it idle: `split.py`.
"""

import triton
import triton.language as tl

from fastkd.backends.gpu.device_fns import (
    columns,
    first_sweep,
    gradient_sweep,
    norms,
    pair_sweep,
    quotient,
    row_at,
    row_span,
    scalar,
    stats_sweep,
    store,
)

# how many rows a dimension holds changes from batch to batch, and is not worth a compilation
_PER = ["per_s", "per_t", "per_g"]
_FUSED = ["skew", *_PER]


@triton.jit
def zero_columns(
    grad, start, stop, LANES: tl.constexpr, GROUP: tl.constexpr, SHIFTED: tl.constexpr = False
):
    """Columns from start to stop of a row; tiles stay aligned, hence the mask at both ends."""
    zero = tl.zeros([LANES, GROUP], grad.dtype.element_ty)
    for at in range(start // (LANES * GROUP) * (LANES * GROUP), stop, LANES * GROUP):
        if SHIFTED:
            store(grad, zero, at, start, stop, True, True, LANES, GROUP)
        else:
            column = columns(at, LANES, GROUP)
            tl.store(grad + column, zero, mask=(column >= start) & (column < stop))


@triton.jit
def expectation(d_s, d_t, cross, inverse, EXPECTATION: tl.constexpr):
    """The divergence of a row that is an expectation, from the sums of its first sweep.

    Infinite or NaN: an impossible column under a lane's early maximum may yet underflow under the
    row's, and only the pair, with the row's maximum in hand, knows.
    """
    weigher = d_t if EXPECTATION == "teacher" else d_s
    other = d_s if EXPECTATION == "teacher" else d_t
    # one logarithm of the ratio: 0 exactly where both sides are the same
    return cross / weigher * inverse + tl.log(quotient(other, weigher))


@triton.jit
def expected(
    student, teacher, start, stop, m_s, d_s, m_t, d_t, cross, exponent, inverse, param,
    DIVERGENCE: tl.constexpr, EXPECTATION: tl.constexpr, SHIFTED: tl.constexpr,
    ACC: tl.constexpr, LANES: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """`expectation`, and the pairs' own sum where that is not finite."""
    value = expectation(d_s, d_t, cross, inverse, EXPECTATION)
    if value * 0.0 != 0.0:
        value, _ = pair_sweep(
            student, teacher, start, stop, m_s, d_s, m_t, d_t, exponent, param,
            DIVERGENCE, "evict_last", SHIFTED, ACC, LANES, GROUP,
        )  # fmt: skip
    return value


@triton.jit
def entropy(
    m_s, unit, drift, at_label, here, vocab, classes, sure, spread,
    SMOOTH: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """log-sum-exp - sure * s[label] - spread * sum(s) of a row of the student at T = 1."""
    # all relative to the maximum; what is left of the maximum itself is 0 where the row holds the
    # label and the whole vocabulary
    rest = tl.where(here, spread * scalar(classes - vocab, ACC), 1.0 - spread * vocab)
    value = tl.log(unit) + tl.where(here, sure * (m_s - at_label), 0.0)
    value += tl.where(rest == 0, 0.0, rest * m_s)
    if SMOOTH:
        value -= spread * drift
    return value


@triton.jit(do_not_specialize=_FUSED)
def fused_kernel(
    # pointers: [rows, columns] x3, then one element per row each; None where there is none
    student, teacher, grad, loss, keep, label, scale,
    # shapes and strides: row r starts at (r // per) * outer + (r % per) * inner, and `skew` columns
    # later where rows do not start on 16 bytes (None: they do, or not all in the same way)
    vocab, classes, width, skew,
    per_s, outer_s, inner_s, per_t, outer_t, inner_t, per_g, outer_g, inner_g,
    # the spec: log2(e) / T, 1 / T, parameter, weights, 1 - smoothing, smoothing / classes
    exponent: tl.float64, inverse: tl.float64, param: tl.float64, soft: tl.float64,
    hard: tl.float64, sure: tl.float64, spread: tl.float64, factor: tl.float64,
    # constants
    DIVERGENCE: tl.constexpr, EXPECTATION: tl.constexpr, UNIT: tl.constexpr, SMOOTH: tl.constexpr,
    ACC: tl.constexpr, LANES: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """loss = soft sum_v l(log p, log q) + hard CE; grad = its gradient scale factor. One row."""
    SHIFTED: tl.constexpr = skew is not None
    row = tl.program_id(0)
    start, stop = row_span(row, per_s, outer_s, inner_s, skew, vocab, GROUP)
    if grad is not None:
        grad = row_at(grad, row, per_g, outer_g, inner_g, skew, GROUP)
    if keep is not None:
        if tl.load(keep + row) == 0:
            tl.store(loss + row, scalar(0.0, ACC))
            if grad is not None:
                zero_columns(grad, start, start + width, LANES, GROUP, SHIFTED)
            return
    student = row_at(student, row, per_s, outer_s, inner_s, skew, GROUP)
    teacher = row_at(teacher, row, per_t, outer_t, inner_t, skew, GROUP)
    exponent, inverse = scalar(exponent, ACC), scalar(inverse, ACC)
    param, soft, hard = scalar(param, ACC), scalar(soft, ACC), scalar(hard, ACC)
    sure, spread = scalar(sure, ACC), scalar(spread, ACC)

    column = -1
    if label is not None:
        # read before the sweep, whose reductions order it before any store of an in-place gradient
        wanted = tl.load(label + row)
        here = (wanted >= 0) & (wanted < vocab)
        column = tl.where(here, wanted + start, -1).to(tl.int32)
        at_label = tl.load(student + column, mask=here, other=0.0).to(ACC)
    m_s, raw_s, m_t, raw_t, cross, unit, drift = first_sweep(
        student, teacher, start, stop, exponent,
        EXPECTATION, UNIT, SMOOTH, SHIFTED, ACC, LANES, GROUP,
    )  # fmt: skip
    d_s, d_t = norms(raw_s, raw_t)
    if EXPECTATION == "none":
        value, slopes = pair_sweep(
            student, teacher, start, stop, m_s, d_s, m_t, d_t, exponent, param,
            DIVERGENCE, "evict_last", SHIFTED, ACC, LANES, GROUP,
        )  # fmt: skip
    else:
        value = expected(
            student, teacher, start, stop, m_s, d_s, m_t, d_t, cross, exponent, inverse, param,
            DIVERGENCE, EXPECTATION, SHIFTED, ACC, LANES, GROUP,
        )  # fmt: skip
        # the centred slopes of the weigher's expectation: under q they are the value itself
        slopes = value
    value = soft * value

    if label is not None:
        if not UNIT:
            unit = raw_s
        value += hard * entropy(
            m_s, unit, drift, at_label, here, vocab, classes, sure, spread, SMOOTH, ACC
        )
    tl.store(loss + row, value)

    if grad is not None:
        by = scalar(factor, ACC)
        if scale is not None:
            by = by * tl.load(scale + row)
        gradient_sweep(
            grad, student, teacher, start, stop, m_s, d_s, m_t, d_t, slopes, unit,
            column, exponent, param, soft * inverse * by, hard * by, sure + spread, spread,
            DIVERGENCE, EXPECTATION == "teacher", label is not None, UNIT,
            EXPECTATION != "none", SHIFTED, ACC, LANES, GROUP,
        )  # fmt: skip
        zero_columns(grad, stop, start + width, LANES, GROUP, SHIFTED)


@triton.jit(do_not_specialize=["skew", "per"])
def stats_kernel(
    x, stats, keep,
    vocab, skew, per, outer, inner,
    exponent: tl.float64,
    ACC: tl.constexpr, LANES: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """stats = (max x, sum exp((x - max) / T), sum (x - max)). One row."""
    row = tl.program_id(0)
    stats = stats + row.to(tl.int64) * 3
    if keep is not None:
        if tl.load(keep + row) == 0:
            tl.store(stats + tl.arange(0, 4), tl.zeros([4], ACC), mask=tl.arange(0, 4) < 3)
            return
    start, stop = row_span(row, per, outer, inner, skew, vocab, GROUP)
    highest, total, drift = stats_sweep(
        row_at(x, row, per, outer, inner, skew, GROUP), start, stop, scalar(exponent, ACC),
        skew is not None, ACC, LANES, GROUP,
    )  # fmt: skip
    tl.store(stats, tl.where(total == 0, -float("inf"), highest))
    tl.store(stats + 1, total)
    tl.store(stats + 2, drift)


@triton.jit
def side(stats, row, ACC: tl.constexpr):
    """(max, sum) of a row's stats; a finite stand-in for the maximum of nothing."""
    stats = stats + row.to(tl.int64) * 3
    top = tl.load(stats).to(ACC)
    return tl.where(top == -float("inf"), 0.0, top), tl.load(stats + 1).to(ACC)


@triton.jit(do_not_specialize=_FUSED)
def loss_kernel(
    student, teacher, stats_s, stats_t, loss, keep,
    vocab, skew,
    per_s, outer_s, inner_s, per_t, outer_t, inner_t,
    exponent: tl.float64, inverse: tl.float64, param: tl.float64,
    DIVERGENCE: tl.constexpr,
    ACC: tl.constexpr, LANES: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """loss = (sum_v l(log p, log q), sum_v (slope - centre q)), p and q by the stats. One row."""
    row = tl.program_id(0)
    loss = loss + row.to(tl.int64) * 2
    if keep is not None:
        if tl.load(keep + row) == 0:
            tl.store(loss + tl.arange(0, 2), tl.zeros([2], ACC))
            return
    m_s, d_s = side(stats_s, row, ACC)
    m_t, d_t = side(stats_t, row, ACC)
    d_s, d_t = norms(d_s, d_t)
    start, stop = row_span(row, per_s, outer_s, inner_s, skew, vocab, GROUP)
    value, slopes = pair_sweep(
        row_at(student, row, per_s, outer_s, inner_s, skew, GROUP),
        row_at(teacher, row, per_t, outer_t, inner_t, skew, GROUP),
        start, stop, m_s, d_s, m_t, d_t,
        scalar(exponent, ACC), scalar(param, ACC),
        DIVERGENCE, "evict_first", skew is not None, ACC, LANES, GROUP,
    )  # fmt: skip
    tl.store(loss, value)
    tl.store(loss + 1, slopes)


@triton.jit(do_not_specialize=_FUSED)
def grad_kernel(
    student, teacher, grad, stats_s, stats_t, stats_hard, slope, keep, label, scale,
    vocab, width, skew,
    per_s, outer_s, inner_s, per_t, outer_t, inner_t, per_g, outer_g, inner_g,
    exponent: tl.float64, inverse: tl.float64, param: tl.float64, soft: tl.float64,
    hard: tl.float64, sure: tl.float64, spread: tl.float64, factor: tl.float64,
    DIVERGENCE: tl.constexpr, UNIT: tl.constexpr,
    ACC: tl.constexpr, LANES: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """grad = scale factor (soft (slope_v - q_v sum slope) / T + hard (q - target)). One row."""
    SHIFTED: tl.constexpr = skew is not None
    row = tl.program_id(0)
    start, stop = row_span(row, per_s, outer_s, inner_s, skew, vocab, GROUP)
    grad = row_at(grad, row, per_g, outer_g, inner_g, skew, GROUP)
    if keep is not None:
        if tl.load(keep + row) == 0:
            zero_columns(grad, start, start + width, LANES, GROUP, SHIFTED)
            return
    m_s, d_s = side(stats_s, row, ACC)
    m_t, d_t = side(stats_t, row, ACC)
    unit = d_s
    d_s, d_t = norms(d_s, d_t)
    by = scalar(factor, ACC)
    if scale is not None:
        by = by * tl.load(scale + row)
    column = -1
    if label is not None:
        _, unit = side(stats_hard, row, ACC)
        wanted = tl.load(label + row)
        here = (wanted >= 0) & (wanted < vocab)
        column = tl.where(here, wanted + start, -1).to(tl.int32)
    inverse, spread = scalar(inverse, ACC), scalar(spread, ACC)
    gradient_sweep(
        grad,
        row_at(student, row, per_s, outer_s, inner_s, skew, GROUP),
        row_at(teacher, row, per_t, outer_t, inner_t, skew, GROUP),
        start, stop, m_s, d_s, m_t, d_t, tl.load(slope + row).to(ACC), unit,
        column, scalar(exponent, ACC), scalar(param, ACC),
        scalar(soft, ACC) * inverse * by, scalar(hard, ACC) * by,
        scalar(sure, ACC) + spread, spread,
        DIVERGENCE, False, label is not None, UNIT, False, SHIFTED, ACC, LANES, GROUP,
    )  # fmt: skip
    zero_columns(grad, stop, start + width, LANES, GROUP, SHIFTED)


@triton.jit
def total_kernel(loss, scale, out, n, factor: tl.float64, BLOCK: tl.constexpr):
    """out = factor sum_r scale_r loss_r in float64 and one fixed order. One program in all."""
    sums = tl.zeros([BLOCK], tl.float64)
    for start in range(0, n, BLOCK):
        at = start + tl.arange(0, BLOCK)
        x = tl.load(loss + at, mask=at < n, other=0.0).to(tl.float64)
        if scale is not None:
            x = x * tl.load(scale + at, mask=at < n, other=0.0).to(tl.float64)
        sums += x
    result = tl.sum(sums, 0) * scalar(factor, tl.float64)
    tl.store(out, result.to(out.dtype.element_ty))


@triton.jit
def multiply_tile(
    grad, factor, start, width,
    MASKED: tl.constexpr, LANES: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    at = columns(start, LANES, GROUP)
    if MASKED:
        tile = tl.load(grad + at, mask=at < width).to(factor.dtype) * factor
        tl.store(grad + at, tile.to(grad.dtype.element_ty), mask=at < width)
    else:
        tile = tl.load(grad + at).to(factor.dtype) * factor
        tl.store(grad + at, tile.to(grad.dtype.element_ty))


@triton.jit(do_not_specialize=["per"])
def multiply_kernel(
    grad, by,
    width, per, outer, inner,
    LANES: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """grad *= by. One row, left at once where by is 1: the usual case, and grad is not touched."""
    factor = tl.load(by)
    if factor == 1.0:
        return
    row = tl.program_id(0)
    grad = row_at(grad, row, per, outer, inner)
    for start in range(0, width // (LANES * GROUP) * (LANES * GROUP), LANES * GROUP):
        multiply_tile(grad, factor, start, width, False, LANES, GROUP)
    if width % (LANES * GROUP) != 0:
        full = width // (LANES * GROUP) * (LANES * GROUP)
        multiply_tile(grad, factor, full, width, True, LANES, GROUP)
