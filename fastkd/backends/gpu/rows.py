"""The row kernels: one program per row. The divergence is an argument (see `divergence.py`).

Nothing here waits for another program. Few rows leave part of a device idle: see `split_rows.py`.
"""

import triton
import triton.language as tl

from fastkd.backends.gpu.arguments import Sides, Spec
from fastkd.backends.gpu.outputs import leave_out, store_hard, store_soft
from fastkd.backends.gpu.pairs import grad_loop, pair_loop
from fastkd.backends.gpu.sums import quotient, safe_sums, stats_loop, sum_loop
from fastkd.backends.gpu.tiles import OFFSET, before, columns, row_at, row_span, scalar, store

# The number of rows in a dimension changes from batch to batch: not worth a compilation.
_PER = ["per_s", "per_t", "per_g"]
_FUSED = ["align_offset", *_PER]


@triton.jit
def zero_columns(grad, start, stop, const):
    """Writes 0 to columns [start, stop). Tiles stay aligned, hence the mask at both ends."""
    TILE: tl.constexpr = const.LANES * const.GROUP
    zero = tl.zeros([const.LANES, const.GROUP], grad.dtype.element_ty)
    for at in range(start // TILE * TILE, stop, TILE):
        if const.UNALIGNED == OFFSET:
            store(grad, zero, at, start, stop, const, True)
        else:
            column = columns(at, const)
            tl.store(grad + column, zero, mask=(column >= start) & before(column, stop, const))


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
def expectation_or_pairs(student, teacher, start, stop, sides, cross, spec, const):
    """`expectation`, or the sum of the pairs where that is not finite."""
    value = expectation(sides.d_s, sides.d_t, cross, spec.inverse, const.EXPECTATION)
    if value * 0.0 != 0.0:
        value, _ = pair_loop(
            student, teacher, start, stop, sides, spec.exponent, spec.param, const, "evict_last"
        )
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
def cross_entropy(m_s, sum_t1, sum_shifted, at_label, here, shape, spec, const):
    """log-sum-exp - (1 - eps) * s[label] - eps / V * sum(s) of a student's row at T = 1."""
    # All terms are relative to the maximum. The factor of the maximum itself is 0 where the row
    # holds its label and the whole vocabulary.
    outside = spec.eps_over_v * scalar(shape.classes - shape.vocab, const.ACC)
    rest = tl.where(here, outside, 1.0 - spec.eps_over_v * shape.vocab)
    value = tl.log(sum_t1) + tl.where(here, spec.one_minus_eps * (m_s - at_label), 0.0)
    value += tl.where(rest == 0, 0.0, rest * m_s)
    if const.SMOOTH:
        value -= spec.eps_over_v * sum_shifted
    return value


@triton.jit
def hard_loss(
    outputs, row, m_s, sum_t1, sum_shifted, at_label, here, shape, spec, const, split=0
):  # fmt: skip
    """`cross_entropy`, which the outputs are told too, by the first split alone."""
    loss = cross_entropy(m_s, sum_t1, sum_shifted, at_label, here, shape, spec, const)
    if outputs is not None:
        if split == 0:
            store_hard(outputs, row, loss, m_s, sum_t1, at_label, here)
    return loss


@triton.jit
def row_value(student, teacher, start, stop, sides, cross, spec, const):
    """The divergence of a row and its sum of centred slopes, from the sums of `sum_loop`."""
    if const.EXPECTATION == "none":
        value, slopes = pair_loop(
            student, teacher, start, stop, sides, spec.exponent, spec.param, const, "evict_last"
        )
    else:
        value = expectation_or_pairs(student, teacher, start, stop, sides, cross, spec, const)
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
def grad_factor(factor, scale, row, const):
    """The factor of a row's gradient: factor * scale[row]."""
    by = scalar(factor, const.ACC)
    if scale is not None:
        by = by * tl.load(scale + row)
    return by


@triton.jit
def spec_of(exponent, inverse, param, soft, hard, one_minus_eps, eps_over_v, const):
    """The floats of a loss spec in the accumulation dtype."""
    return Spec(
        scalar(exponent, const.ACC), scalar(inverse, const.ACC), scalar(param, const.ACC),
        scalar(soft, const.ACC), scalar(hard, const.ACC),
        scalar(one_minus_eps, const.ACC), scalar(eps_over_v, const.ACC),
    )  # fmt: skip


@triton.jit(do_not_specialize=_FUSED)
def fused_kernel(
    # places of the rows, where grad may be None; `PerRow`, `Shape`
    student, teacher, grad, rows, shape,
    # rows in a dimension of a place; where rows do not start on 16 bytes, the columns from a
    # boundary to the first (None: they do, or differ in how they start)
    align_offset, per_s, per_t, per_g,
    # the loss spec: log2(e) / T, 1 / T, parameter, weights, 1 - eps, eps / V (label smoothing)
    exponent: tl.float64, inverse: tl.float64, param: tl.float64, soft: tl.float64,
    hard: tl.float64, one_minus_eps: tl.float64, eps_over_v: tl.float64, z: tl.float64,
    factor: tl.float64,
    const,
):  # fmt: skip
    """loss = soft sum_v l(log p, log q) + hard CE; grad = its gradient scale factor. One row."""
    if rows.skip is not None:
        if tl.load(rows.skip) != 0:
            return
    row = tl.program_id(0)
    start, stop = row_span(student, per_s, row, align_offset, shape.vocab, const)
    if grad is not None:
        grad = row_at(grad, per_g, row, align_offset, const)
    if rows.keep is not None:
        if tl.load(rows.keep + row) == 0:
            leave_out(rows, row, const)
            if grad is not None:
                zero_columns(grad, start, start + shape.width, const)
            return
    student = row_at(student, per_s, row, align_offset, const)
    teacher = row_at(teacher, per_t, row, align_offset, const)
    spec = spec_of(exponent, inverse, param, soft, hard, one_minus_eps, eps_over_v, const)

    column = -1
    if rows.label is not None:
        # before the first loop: its reductions come before any store of an in-place gradient
        column, here = label_column(rows.label, row, start, shape.vocab)
        at_label = tl.load(student + column, mask=here, other=0.0).to(const.ACC)
    sums = sum_loop(
        student, teacher, start, stop, spec.exponent, const, rows.outputs is not None
    )  # fmt: skip
    d_s, d_t = safe_sums(sums.d_s, sums.d_t)
    sides = Sides(sums.m_s, d_s, sums.m_t, d_t)
    value, slopes = row_value(student, teacher, start, stop, sides, sums.cross, spec, const)
    value, of = const.OF_SUM(value, (sums.d_s == 0) & (sums.d_t == 0))
    if rows.outputs is not None:
        store_soft(rows.outputs, row, value, sums, spec.inverse)
    value = spec.soft * value
    sum_t1 = sums.sum_t1 if const.HARD_T1 else sums.d_s
    if rows.label is not None:
        value += spec.hard * hard_loss(
            rows.outputs, row, sums.m_s, sum_t1, sums.sum_shifted, at_label, here, shape, spec,
            const,
        )  # fmt: skip
    z_value, unit = at_one(sums.m_s, sum_t1, spec.hard, scalar(z, const.ACC), const.Z_LOSS)
    tl.store(rows.loss + row, value + z_value)

    if grad is not None:
        by = grad_factor(factor, rows.scale, row, const)
        grad_loop(
            grad, student, teacher, start, stop, sides, slopes, sum_t1, column, of, unit, by,
            spec, const, const.EXPECTATION != "none",
        )  # fmt: skip
        zero_columns(grad, stop, start + shape.width, const)


@triton.jit(do_not_specialize=["align_offset", "per"])
def stats_kernel(x, stats, keep, vocab, align_offset, per, exponent: tl.float64, const):
    """stats = (max x, sum exp((x - max) / T), sum (x - max)). One row."""
    row = tl.program_id(0)
    stats = stats + row.to(tl.int64) * 3
    if keep is not None:
        if tl.load(keep + row) == 0:
            zero = tl.zeros([4], const.ACC)
            tl.store(stats + tl.arange(0, 4), zero, mask=tl.arange(0, 4) < 3)
            return
    start, stop = row_span(x, per, row, align_offset, vocab, const)
    x = row_at(x, per, row, align_offset, const)
    highest, total, sum_shifted = stats_loop(x, start, stop, scalar(exponent, const.ACC), const)
    tl.store(stats, tl.where(total == 0, -float("inf"), highest))
    tl.store(stats + 1, total)
    tl.store(stats + 2, sum_shifted)


@triton.jit
def load_stats(stats, row, const):
    """(max, sum) of a row's stats, with 0 for the maximum of a row that is all -inf."""
    stats = stats + row.to(tl.int64) * 3
    top = tl.load(stats).to(const.ACC)
    return tl.where(top == -float("inf"), 0.0, top), tl.load(stats + 1).to(const.ACC)


@triton.jit(do_not_specialize=_FUSED)
def loss_kernel(
    student, teacher, known, loss, keep, vocab, align_offset, per_s, per_t,
    exponent: tl.float64, param: tl.float64, const,
):  # fmt: skip
    """loss = (sum_v l(log p, log q), sum_v (slope - centre q)), p and q by the stats. One row."""
    row = tl.program_id(0)
    loss = loss + row.to(tl.int64) * 2
    if keep is not None:
        if tl.load(keep + row) == 0:
            tl.store(loss + tl.arange(0, 2), tl.zeros([2], const.ACC))
            return
    m_s, d_s = load_stats(known.student, row, const)
    m_t, d_t = load_stats(known.teacher, row, const)
    d_s, d_t = safe_sums(d_s, d_t)
    start, stop = row_span(student, per_s, row, align_offset, vocab, const)
    value, slopes = pair_loop(
        row_at(student, per_s, row, align_offset, const),
        row_at(teacher, per_t, row, align_offset, const),
        start, stop, Sides(m_s, d_s, m_t, d_t),
        scalar(exponent, const.ACC), scalar(param, const.ACC), const, "evict_first",
    )  # fmt: skip
    tl.store(loss, value)
    tl.store(loss + 1, slopes)


@triton.jit(do_not_specialize=_FUSED)
def grad_kernel(
    student, teacher, grad, known, rows, shape, align_offset, per_s, per_t, per_g,
    exponent: tl.float64, inverse: tl.float64, param: tl.float64, soft: tl.float64,
    hard: tl.float64, one_minus_eps: tl.float64, eps_over_v: tl.float64, z: tl.float64,
    factor: tl.float64,
    const,
):  # fmt: skip
    """grad = scale factor (soft (slope_v - q_v sum slope) / T + hard (q - target)). One row.

    CENTRED: see `grad_tile`.
    """
    if rows.skip is not None:
        if tl.load(rows.skip) != 0:
            return
    row = tl.program_id(0)
    start, stop = row_span(student, per_s, row, align_offset, shape.vocab, const)
    grad = row_at(grad, per_g, row, align_offset, const)
    if rows.keep is not None:
        if tl.load(rows.keep + row) == 0:
            zero_columns(grad, start, start + shape.width, const)
            return
    m_s, d_s = load_stats(known.student, row, const)
    m_t, d_t = load_stats(known.teacher, row, const)
    sum_t1 = d_s
    pairs = known.pairs + row.to(tl.int64) * 2
    _, of = const.OF_SUM(tl.load(pairs).to(const.ACC), (d_s == 0) & (d_t == 0))
    d_s, d_t = safe_sums(d_s, d_t)
    by = grad_factor(factor, rows.scale, row, const)
    column = -1
    if const.HARD:
        _, sum_t1 = load_stats(known.hard, row, const)
    spec = spec_of(exponent, inverse, param, soft, hard, one_minus_eps, eps_over_v, const)
    _, unit = at_one(m_s, sum_t1, spec.hard, scalar(z, const.ACC), const.Z_LOSS)
    if rows.label is not None:
        column, _ = label_column(rows.label, row, start, shape.vocab)
    grad_loop(
        grad,
        row_at(student, per_s, row, align_offset, const),
        row_at(teacher, per_t, row, align_offset, const),
        start, stop, Sides(m_s, d_s, m_t, d_t), tl.load(pairs + 1).to(const.ACC), sum_t1, column,
        of, unit, by, spec, const, False,
    )  # fmt: skip
    zero_columns(grad, stop, start + shape.width, const)


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
def multiply_tile(grad, factor, start, width, const, MASKED: tl.constexpr):
    at = columns(start, const)
    if MASKED:
        tile = tl.load(grad + at, mask=at < width).to(factor.dtype) * factor
        tl.store(grad + at, tile.to(grad.dtype.element_ty), mask=at < width)
    else:
        tile = tl.load(grad + at).to(factor.dtype) * factor
        tl.store(grad + at, tile.to(grad.dtype.element_ty))


@triton.jit(do_not_specialize=["per"])
def multiply_kernel(grad, by, width, per, const):
    """grad *= by. One row. by is usually 1, and grad is then not touched."""
    factor = tl.load(by)
    if factor == 1.0:
        return
    TILE: tl.constexpr = const.LANES * const.GROUP
    row = tl.program_id(0)
    grad = row_at(grad, per, row, None, const)
    for start in range(0, width // TILE * TILE, TILE):
        multiply_tile(grad, factor, start, width, const, False)
    if width % TILE != 0:
        multiply_tile(grad, factor, width // TILE * TILE, width, const, True)
