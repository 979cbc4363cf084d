"""The row kernels: one program per row. The divergence is an argument (see `divergence.py`).

Nothing here waits for another program. Few rows leave part of a device idle: see `split_rows.py`.
"""

import triton
import triton.language as tl

from fastkd.backends.gpu.outputs import leave_out, store_hard, store_soft
from fastkd.backends.gpu.pairs import grad_loop, pair_loop
from fastkd.backends.gpu.sums import quotient, safe_sums, stats_loop, sum_loop
from fastkd.backends.gpu.tiles import OFFSET, before, columns, row_at, row_span, scalar, store

# The number of rows in a dimension changes from batch to batch: not worth a compilation.
_PER = ["per_s", "per_t", "per_g"]
_FUSED = ["align_offset", *_PER]


@triton.jit
def zero_columns(
    grad, start, stop, LANES: tl.constexpr, GROUP: tl.constexpr, UNALIGNED: tl.constexpr = 0
):
    """Writes 0 to columns [start, stop). Tiles stay aligned, hence the mask at both ends."""
    zero = tl.zeros([LANES, GROUP], grad.dtype.element_ty)
    for at in range(start // (LANES * GROUP) * (LANES * GROUP), stop, LANES * GROUP):
        if UNALIGNED == OFFSET:
            store(grad, zero, at, start, stop, True, OFFSET, LANES, GROUP)
        else:
            column = columns(at, LANES, GROUP)
            tl.store(grad + column, zero, mask=(column >= start) & before(column, stop, UNALIGNED))


@triton.jit
def expectation(d_s, d_t, cross, inverse, EXPECTATION: tl.constexpr):
    """The value of a divergence that is an expectation, from the sums of `sum_loop`.

    It may be wrongly infinite or NaN: an impossible column can have weight under a lane's early
    maximum, and none under the row's. Only `pair_loop`, which knows the row's maximum, can tell.
    """
    weight_sum = d_t if EXPECTATION == "teacher" else d_s
    other = d_s if EXPECTATION == "teacher" else d_t
    # one logarithm of the ratio, so that equal sides give exactly 0
    return cross / weight_sum * inverse + tl.log(quotient(other, weight_sum))


@triton.jit
def expectation_or_pairs(
    student, teacher, start, stop, m_s, d_s, m_t, d_t, cross, exponent, inverse, param,
    DIVERGENCE: tl.constexpr, EXPECTATION: tl.constexpr, UNALIGNED: tl.constexpr,
    ACC: tl.constexpr, LANES: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """`expectation`, or the sum of the pairs where that is not finite."""
    value = expectation(d_s, d_t, cross, inverse, EXPECTATION)
    if value * 0.0 != 0.0:
        value, _ = pair_loop(
            student, teacher, start, stop, m_s, d_s, m_t, d_t, exponent, param,
            DIVERGENCE, "evict_last", UNALIGNED, ACC, LANES, GROUP,
        )  # fmt: skip
    return value


@triton.jit
def at_one(m_s, sum_t1, hard, z, Z_LOSS: tl.constexpr):
    """(z * log-sum-exp^2, factor of q in the gradient) of a student's row at T = 1."""
    value, unit = scalar(0.0, hard.dtype), hard
    if Z_LOSS:
        log_sum = m_s + tl.log(sum_t1)
        value = tl.where(sum_t1 == 0, float("nan"), z * log_sum * log_sum)
        unit = hard + 2.0 * z * log_sum
    return value, unit


@triton.jit
def cross_entropy(
    m_s, sum_t1, sum_shifted, at_label, here, vocab, classes, one_minus_eps, eps_over_v,
    SMOOTH: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """log-sum-exp - (1 - eps) * s[label] - eps / V * sum(s) of a student's row at T = 1."""
    # All terms are relative to the maximum. The factor of the maximum itself is 0 where the row
    # holds its label and the whole vocabulary.
    rest = tl.where(here, eps_over_v * scalar(classes - vocab, ACC), 1.0 - eps_over_v * vocab)
    value = tl.log(sum_t1) + tl.where(here, one_minus_eps * (m_s - at_label), 0.0)
    value += tl.where(rest == 0, 0.0, rest * m_s)
    if SMOOTH:
        value -= eps_over_v * sum_shifted
    return value


@triton.jit
def hard_loss(
    outputs, row, m_s, sum_t1, sum_shifted, at_label, here, vocab, classes, one_minus_eps,
    eps_over_v, SMOOTH: tl.constexpr, ACC: tl.constexpr, split=0,
):  # fmt: skip
    """`cross_entropy`, which the outputs are told too, by the first split alone."""
    loss = cross_entropy(
        m_s, sum_t1, sum_shifted, at_label, here, vocab, classes, one_minus_eps, eps_over_v,
        SMOOTH, ACC,
    )  # fmt: skip
    if outputs is not None:
        if split == 0:
            store_hard(outputs, row, loss, m_s, sum_t1, at_label, here)
    return loss


@triton.jit
def row_value(
    student, teacher, start, stop, m_s, d_s, m_t, d_t, cross, exponent, inverse, param,
    DIVERGENCE: tl.constexpr, EXPECTATION: tl.constexpr, UNALIGNED: tl.constexpr,
    ACC: tl.constexpr, LANES: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """The divergence of a row and its sum of centred slopes, from the sums of `sum_loop`."""
    if EXPECTATION == "none":
        value, slopes = pair_loop(
            student, teacher, start, stop, m_s, d_s, m_t, d_t, exponent, param,
            DIVERGENCE, "evict_last", UNALIGNED, ACC, LANES, GROUP,
        )  # fmt: skip
    else:
        value = expectation_or_pairs(
            student, teacher, start, stop, m_s, d_s, m_t, d_t, cross, exponent, inverse, param,
            DIVERGENCE, EXPECTATION, UNALIGNED, ACC, LANES, GROUP,
        )  # fmt: skip
        # under the student's expectation the centred slopes are the values; under the teacher's
        # their sum is known to be 0, and nobody uses this
        slopes = value
    return value, slopes


@triton.jit
def label_column(label, row, start, vocab):
    """The column of a row's label, or -1 where the row has no such column; and whether it has."""
    index = tl.load(label + row)
    here = (index >= 0) & (index < vocab)
    return tl.where(here, index + start, -1).to(tl.int32), here


@triton.jit
def grad_factor(factor, scale, row, ACC: tl.constexpr):
    """The factor of a row's gradient: factor * scale[row]."""
    by = scalar(factor, ACC)
    if scale is not None:
        by = by * tl.load(scale + row)
    return by


@triton.jit(do_not_specialize=_FUSED)
def fused_kernel(
    # pointers: [rows, columns] x3, then one element per row each; None for what is not given
    student, teacher, grad, loss, outputs, keep, label, scale, skip,
    # shape
    vocab, classes, width,
    # rows: row r starts at (r // per) * outer + (r % per) * inner; where rows do not start on 16
    # bytes, align_offset columns later (None: they do, or differ in how they start)
    align_offset, per_s, outer_s, inner_s, per_t, outer_t, inner_t, per_g, outer_g, inner_g,
    # the loss spec: log2(e) / T, 1 / T, parameter, weights, 1 - eps, eps / V (label smoothing)
    exponent: tl.float64, inverse: tl.float64, param: tl.float64, soft: tl.float64,
    hard: tl.float64, one_minus_eps: tl.float64, eps_over_v: tl.float64, z: tl.float64,
    factor: tl.float64,
    # constants
    DIVERGENCE: tl.constexpr, OF_SUM: tl.constexpr, EXPECTATION: tl.constexpr,
    HARD_T1: tl.constexpr, SMOOTH: tl.constexpr, Z_LOSS: tl.constexpr,
    UNALIGNED: tl.constexpr, ACC: tl.constexpr, LANES: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """loss = soft sum_v l(log p, log q) + hard CE; grad = its gradient scale factor. One row."""
    if skip is not None:
        if tl.load(skip) != 0:
            return
    row = tl.program_id(0)
    start, stop = row_span(row, per_s, outer_s, inner_s, align_offset, vocab, GROUP)
    if grad is not None:
        grad = row_at(grad, row, per_g, outer_g, inner_g, align_offset, GROUP, UNALIGNED)
    if keep is not None:
        if tl.load(keep + row) == 0:
            leave_out(loss, outputs, row, ACC)
            if grad is not None:
                zero_columns(grad, start, start + width, LANES, GROUP, UNALIGNED)
            return
    student = row_at(student, row, per_s, outer_s, inner_s, align_offset, GROUP, UNALIGNED)
    teacher = row_at(teacher, row, per_t, outer_t, inner_t, align_offset, GROUP, UNALIGNED)
    exponent, inverse = scalar(exponent, ACC), scalar(inverse, ACC)
    param, soft, hard = scalar(param, ACC), scalar(soft, ACC), scalar(hard, ACC)
    one_minus_eps, eps_over_v = scalar(one_minus_eps, ACC), scalar(eps_over_v, ACC)

    column = -1
    if label is not None:
        # before the first loop: its reductions come before any store of an in-place gradient
        column, here = label_column(label, row, start, vocab)
        at_label = tl.load(student + column, mask=here, other=0.0).to(ACC)
    m_s, raw_s, m_t, raw_t, cross, sum_t1, sum_shifted, weighted_s, weighted_t = sum_loop(
        student, teacher, start, stop, exponent,
        EXPECTATION, HARD_T1, SMOOTH, outputs is not None, UNALIGNED, ACC, LANES, GROUP,
    )  # fmt: skip
    d_s, d_t = safe_sums(raw_s, raw_t)
    value, slopes = row_value(
        student, teacher, start, stop, m_s, d_s, m_t, d_t, cross, exponent, inverse, param,
        DIVERGENCE, EXPECTATION, UNALIGNED, ACC, LANES, GROUP,
    )  # fmt: skip
    value, of = OF_SUM(value, (raw_s == 0) & (raw_t == 0))
    if outputs is not None:
        store_soft(outputs, row, value, m_s, raw_s, weighted_s, m_t, raw_t, weighted_t, inverse)
    value = soft * value
    if not HARD_T1:
        sum_t1 = raw_s
    if label is not None:
        value += hard * hard_loss(
            outputs, row, m_s, sum_t1, sum_shifted, at_label, here, vocab, classes, one_minus_eps,
            eps_over_v, SMOOTH, ACC,
        )  # fmt: skip
    z_value, unit = at_one(m_s, sum_t1, hard, scalar(z, ACC), Z_LOSS)
    tl.store(loss + row, value + z_value)

    if grad is not None:
        by = grad_factor(factor, scale, row, ACC)
        grad_loop(
            grad, student, teacher, start, stop, m_s, d_s, m_t, d_t, slopes, sum_t1, column,
            exponent, param, soft * inverse, of, unit, hard, one_minus_eps, eps_over_v, by,
            DIVERGENCE, label is not None or Z_LOSS, HARD_T1,
            EXPECTATION != "none", UNALIGNED, ACC, LANES, GROUP,
        )  # fmt: skip
        zero_columns(grad, stop, start + width, LANES, GROUP, UNALIGNED)


@triton.jit(do_not_specialize=["align_offset", "per"])
def stats_kernel(
    x, stats, keep,
    vocab, align_offset, per, outer, inner,
    exponent: tl.float64,
    UNALIGNED: tl.constexpr, ACC: tl.constexpr, LANES: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """stats = (max x, sum exp((x - max) / T), sum (x - max)). One row."""
    row = tl.program_id(0)
    stats = stats + row.to(tl.int64) * 3
    if keep is not None:
        if tl.load(keep + row) == 0:
            tl.store(stats + tl.arange(0, 4), tl.zeros([4], ACC), mask=tl.arange(0, 4) < 3)
            return
    start, stop = row_span(row, per, outer, inner, align_offset, vocab, GROUP)
    highest, total, sum_shifted = stats_loop(
        row_at(x, row, per, outer, inner, align_offset, GROUP, UNALIGNED),
        start, stop, scalar(exponent, ACC),
        UNALIGNED, ACC, LANES, GROUP,
    )  # fmt: skip
    tl.store(stats, tl.where(total == 0, -float("inf"), highest))
    tl.store(stats + 1, total)
    tl.store(stats + 2, sum_shifted)


@triton.jit
def load_stats(stats, row, ACC: tl.constexpr):
    """(max, sum) of a row's stats, with 0 for the maximum of a row that is all -inf."""
    stats = stats + row.to(tl.int64) * 3
    top = tl.load(stats).to(ACC)
    return tl.where(top == -float("inf"), 0.0, top), tl.load(stats + 1).to(ACC)


@triton.jit(do_not_specialize=_FUSED)
def loss_kernel(
    student, teacher, stats_s, stats_t, loss, keep,
    vocab, align_offset,
    per_s, outer_s, inner_s, per_t, outer_t, inner_t,
    exponent: tl.float64, inverse: tl.float64, param: tl.float64,
    DIVERGENCE: tl.constexpr,
    UNALIGNED: tl.constexpr, ACC: tl.constexpr, LANES: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """loss = (sum_v l(log p, log q), sum_v (slope - centre q)), p and q by the stats. One row."""
    row = tl.program_id(0)
    loss = loss + row.to(tl.int64) * 2
    if keep is not None:
        if tl.load(keep + row) == 0:
            tl.store(loss + tl.arange(0, 2), tl.zeros([2], ACC))
            return
    m_s, d_s = load_stats(stats_s, row, ACC)
    m_t, d_t = load_stats(stats_t, row, ACC)
    d_s, d_t = safe_sums(d_s, d_t)
    start, stop = row_span(row, per_s, outer_s, inner_s, align_offset, vocab, GROUP)
    value, slopes = pair_loop(
        row_at(student, row, per_s, outer_s, inner_s, align_offset, GROUP, UNALIGNED),
        row_at(teacher, row, per_t, outer_t, inner_t, align_offset, GROUP, UNALIGNED),
        start, stop, m_s, d_s, m_t, d_t,
        scalar(exponent, ACC), scalar(param, ACC),
        DIVERGENCE, "evict_first", UNALIGNED, ACC, LANES, GROUP,
    )  # fmt: skip
    tl.store(loss, value)
    tl.store(loss + 1, slopes)


@triton.jit(do_not_specialize=_FUSED)
def grad_kernel(
    student, teacher, grad, stats_s, stats_t, stats_hard, pairs, keep, label, scale, skip,
    vocab, width, align_offset,
    per_s, outer_s, inner_s, per_t, outer_t, inner_t, per_g, outer_g, inner_g,
    exponent: tl.float64, inverse: tl.float64, param: tl.float64, soft: tl.float64,
    hard: tl.float64, one_minus_eps: tl.float64, eps_over_v: tl.float64, z: tl.float64,
    factor: tl.float64,
    DIVERGENCE: tl.constexpr, OF_SUM: tl.constexpr, HARD_T1: tl.constexpr,
    Z_LOSS: tl.constexpr, CENTRED: tl.constexpr,
    UNALIGNED: tl.constexpr, ACC: tl.constexpr, LANES: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """grad = scale factor (soft (slope_v - q_v sum slope) / T + hard (q - target)). One row.

    CENTRED: see `grad_tile`.
    """
    if skip is not None:
        if tl.load(skip) != 0:
            return
    row = tl.program_id(0)
    start, stop = row_span(row, per_s, outer_s, inner_s, align_offset, vocab, GROUP)
    grad = row_at(grad, row, per_g, outer_g, inner_g, align_offset, GROUP, UNALIGNED)
    if keep is not None:
        if tl.load(keep + row) == 0:
            zero_columns(grad, start, start + width, LANES, GROUP, UNALIGNED)
            return
    m_s, d_s = load_stats(stats_s, row, ACC)
    m_t, d_t = load_stats(stats_t, row, ACC)
    sum_t1 = d_s
    pairs = pairs + row.to(tl.int64) * 2
    _, of = OF_SUM(tl.load(pairs).to(ACC), (d_s == 0) & (d_t == 0))
    d_s, d_t = safe_sums(d_s, d_t)
    by = grad_factor(factor, scale, row, ACC)
    column = -1
    if label is not None or Z_LOSS:
        _, sum_t1 = load_stats(stats_hard, row, ACC)
    _, unit = at_one(m_s, sum_t1, scalar(hard, ACC), scalar(z, ACC), Z_LOSS)
    if label is not None:
        column, _ = label_column(label, row, start, vocab)
    inverse, eps_over_v = scalar(inverse, ACC), scalar(eps_over_v, ACC)
    grad_loop(
        grad,
        row_at(student, row, per_s, outer_s, inner_s, align_offset, GROUP, UNALIGNED),
        row_at(teacher, row, per_t, outer_t, inner_t, align_offset, GROUP, UNALIGNED),
        start, stop, m_s, d_s, m_t, d_t, tl.load(pairs + 1).to(ACC), sum_t1, column,
        scalar(exponent, ACC), scalar(param, ACC), scalar(soft, ACC) * inverse, of, unit,
        scalar(hard, ACC), scalar(one_minus_eps, ACC), eps_over_v, by,
        DIVERGENCE, label is not None or Z_LOSS, HARD_T1, False, UNALIGNED,
        ACC, LANES, GROUP, CENTRED,
    )  # fmt: skip
    zero_columns(grad, stop, start + width, LANES, GROUP, UNALIGNED)


@triton.jit
def total_kernel(loss, scale, out, n, factor: tl.float64, BLOCK: tl.constexpr):
    """out = factor * sum_r scale_r loss_r, in float64 and in one fixed order. A single program."""
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
    """grad *= by. One row. by is usually 1, and grad is then not touched."""
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
