"""The row kernel of top-k teachers: K columns of a row (its support) and, with a tail, one more.

The tail is one outcome for all columns off the support. The rest loop sums these columns. The
indices come sorted, so that a tile is compared only with those that lie in it. The pairs of the
support follow, POINTS of them at a time. Then comes the gradient: off the support it is a column's
exponential times one factor of the row; the support is written last.
"""

import triton
import triton.language as tl

from fastkd.backends.gpu.arguments import Support, TopKSlopes
from fastkd.backends.gpu.divergence import value_and_slope
from fastkd.backends.gpu.outputs import NOTHING, leave_out, store_hard, topk_outputs
from fastkd.backends.gpu.rows import at_one, grad_factor, label_column, spec_of, zero_columns
from fastkd.backends.gpu.sums import LOG2E, initial_sums, merge_lanes, online_update
from fastkd.backends.gpu.tiles import columns, load, row_at, scalar, store
from fastkd.backends.gpu.topk_support import (
    scatter_support,
    support_gradient,
    support_sums,
    support_values,
)


@triton.jit
def rest_tile(
    x, start, vocab, top, total, sum_t1, sum_shifted, base, sorted_indices, position, next_index,
    exponent, const, MASKED: tl.constexpr,
):  # fmt: skip
    """Adds a tile without its support. position: columns of the support so far, in index order."""
    tile = load(x, start, 0, vocab, const, MASKED, "evict_last")
    at = columns(start, const)
    rest = tile
    while next_index < start + const.LANES * const.GROUP:
        rest = tl.where(at == next_index, -float("inf"), rest)
        position += 1
        next_index = tl.load(sorted_indices + position)
    new, total, rest, _, _ = online_update(rest, top, total, exponent)
    if const.HARD_T1:
        sum_t1 = sum_t1 * tl.exp2((top - new) * LOG2E) + tl.sum(tl.exp2(rest * LOG2E), 1)
    if const.SMOOTH:
        tile = tile - base
        if MASKED:
            tile = tl.where(at < vocab, tile, 0.0)
        sum_shifted += tl.sum(tile, 1)
    return new, total, sum_t1, sum_shifted, position, next_index


@triton.jit
def rest_loop(x, vocab, base, sorted_indices, exponent, const):
    """(max, sum, sum at T = 1) of the columns off the support, and the sum of x - base over all."""
    TILE: tl.constexpr = const.LANES * const.GROUP
    top, total = initial_sums(const)
    sum_t1, sum_shifted = total, total
    position = 0
    next_index = tl.load(sorted_indices)
    full = vocab // TILE * TILE
    for start in range(0, full, TILE):
        top, total, sum_t1, sum_shifted, position, next_index = rest_tile(
            x, start, vocab, top, total, sum_t1, sum_shifted, base, sorted_indices, position,
            next_index, exponent, const, False,
        )  # fmt: skip
    if full < vocab:
        top, total, sum_t1, sum_shifted, position, next_index = rest_tile(
            x, full, vocab, top, total, sum_t1, sum_shifted, base, sorted_indices, position,
            next_index, exponent, const, True,
        )  # fmt: skip
    highest, total, _ = merge_lanes(top, total, exponent)
    if const.HARD_T1:
        sum_t1 = sum_t1 * tl.exp2((top - highest) * LOG2E)
    return highest, total, tl.sum(sum_t1, 0), tl.sum(sum_shifted, 0)


@triton.jit
def topk_grad_tile(
    grad, x, start, vocab, softmax, exponent, slopes, const, MASKED: tl.constexpr
):  # fmt: skip
    tile = load(x, start, 0, vocab, const, MASKED, "evict_first")
    by = slopes.rest
    out = tl.zeros([const.LANES, const.GROUP], const.ACC) + tl.where(by != by, by, 0.0)
    if not const.RESTRICT:
        # q of a column is `share` times its exponential relative to m_rest
        out = tl.exp2((tile - softmax.m_rest) * exponent) * by
    if const.HARD:
        target = tl.where(columns(start, const) == slopes.column, slopes.target, slopes.eps_over_v)
        out += slopes.unit * tl.exp2((tile - softmax.m_row) * LOG2E) - target
    out = out.to(grad.dtype.element_ty)
    store(grad, out, start, 0, vocab, const, MASKED)


@triton.jit
def topk_grad_loop(grad, x, vocab, softmax, exponent, slopes, const):
    """Writes the gradient off the support, from the last whole tile to the first."""
    TILE: tl.constexpr = const.LANES * const.GROUP
    full = vocab // TILE * TILE
    for step in range(0, full, TILE):
        start = full - TILE - step
        topk_grad_tile(grad, x, start, vocab, softmax, exponent, slopes, const, False)
    if vocab % TILE != 0:
        topk_grad_tile(grad, x, full, vocab, softmax, exponent, slopes, const, True)


@triton.jit
def tail_pair(tail_logp, softmax, spec, const):
    """Value and slope of the tail, one outcome for all columns off the support."""
    d_rest = softmax.d_rest
    tail_logq = (softmax.m_rest - softmax.m_soft) * spec.exponent
    tail_logq = tail_logq + (tl.log2(d_rest) - softmax.log_total)
    tail_p, tail_q = tl.exp2(tail_logp), d_rest * softmax.share
    value, slope = value_and_slope(
        tail_logp, tail_logq, tail_p, tail_q, tail_q - tail_p, spec.param, const.DIVERGENCE
    )
    dead = (d_rest == 0) & (tail_logp == NOTHING)
    return tl.where(dead, 0.0, value), tl.where(dead, 0.0, slope)


@triton.jit
def topk_value(student, support, tail, row, count, softmax, centre, spec, const):
    """(soft * divergence, its factor, sum of slopes, the tail's per unit of d_rest) of a row."""
    value, slope_sum, invalid = support_values(
        student, support, count, softmax, centre, spec, const
    )
    of_rest = scalar(0.0, const.ACC)
    if tail is not None:
        tail_logp = tl.load(tail + row).to(const.ACC) * LOG2E
        invalid += tl.where(tail_logp != tail_logp, 1.0, 0.0)
        tail_value, tail_slope = tail_pair(tail_logp, softmax, spec, const)
        value += tail_value
        slope_sum += tail_slope
        of_rest = tl.where(softmax.d_rest == 0, 0.0, tail_slope / softmax.d_rest)
    empty = softmax.log_total == NOTHING
    value, of = const.OF_SUM(value, empty)
    value = tl.where(empty | (invalid > 0), float("nan"), spec.soft * value)
    return value, of, tl.where(invalid > 0, float("nan"), slope_sum), of_rest


@triton.jit
def topk_gradient(
    grad, memory, student, support, shape, count, softmax, value, total, of_rest, sum_t1, soft,
    unit, hard, column, centre, spec, const,
):  # fmt: skip
    """The gradient of a row; the support's waits in `memory` until the rest is written."""
    target, other = hard * (spec.one_minus_eps + spec.eps_over_v), hard * spec.eps_over_v
    unit = tl.where(sum_t1 == 0, float("nan"), unit / sum_t1)
    rest = soft * (of_rest - softmax.share * total)
    rest = tl.where(value != value, float("nan"), rest)
    slopes = TopKSlopes(soft, total, rest, unit, target, other, column)
    support_gradient(memory, student, support, count, softmax, slopes, centre, spec, const)
    topk_grad_loop(grad, student, shape.vocab, softmax, spec.exponent, slopes, const)
    zero_columns(grad, shape.vocab, shape.width, const)
    # other threads have written the columns of the support, too
    tl.debug_barrier()
    scatter_support(grad, memory, support.indices, count, const)


@triton.jit
def sum_at_one(t1_rest, softmax, const):
    """The sum of a whole row at T = 1, relative to its maximum; 1 where nothing asks for it."""
    total = scalar(1.0, const.ACC)
    if const.HARD:
        if not const.HARD_T1:
            t1_rest = softmax.d_rest
        total = softmax.sum_t1 + t1_rest * tl.exp2((softmax.m_rest - softmax.m_row) * LOG2E)
    return total


@triton.jit
def topk_hard_loss(
    outputs, row, sum_t1, m_row, at_label, here, near, sum_shifted, shape, spec, const
):  # fmt: skip
    """As `rows.hard_loss`, where sum_shifted is the sum of x - near."""
    outside = spec.eps_over_v * scalar(shape.classes - shape.vocab, const.ACC)
    rest = tl.where(here, outside, 1.0 - spec.eps_over_v * shape.vocab)
    value = tl.log(sum_t1) + tl.where(here, spec.one_minus_eps * (m_row - at_label), 0.0)
    value += tl.where(rest == 0, 0.0, rest * m_row)
    if const.SMOOTH:
        value -= spec.eps_over_v * (sum_shifted + shape.vocab * (near - m_row))
    if outputs is not None:
        store_hard(outputs, row, value, m_row, sum_t1, at_label, here)
    return value


@triton.jit(do_not_specialize=["per_s", "per_g", "count"])
def topk_kernel(
    # places of the rows, where grad may be None; `Stored`, `PerRow`, `Shape`
    student, grad, teacher, rows, shape, count, per_s, per_g,
    # the loss spec, as in `rows.fused_kernel`
    exponent: tl.float64, inverse: tl.float64, param: tl.float64, soft: tl.float64,
    hard: tl.float64, one_minus_eps: tl.float64, eps_over_v: tl.float64, z: tl.float64,
    factor: tl.float64, centre: tl.float64,
    const,
):  # fmt: skip
    """loss = soft D + hard CE against K columns; grad = its gradient * scale * factor. One row.

    sorted_indices: the support in rising order, then a number above every column. teacher.grad:
    memory for the gradient on the support, which the loop over all columns would overwrite.
    """
    if rows.skip is not None:
        if tl.load(rows.skip) != 0:
            return
    row = tl.program_id(0)
    if grad is not None:
        grad = row_at(grad, per_g, row, None, const)
    if rows.keep is not None:
        if tl.load(rows.keep + row) == 0:
            leave_out(rows, row, const)
            if grad is not None:
                zero_columns(grad, 0, shape.width, const)
            return
    student = row_at(student, per_s, row, None, const)
    base = row.to(tl.int64) * count
    support = Support(teacher.logprobs + base, teacher.indices + base)
    sorted_indices = teacher.sorted_indices + row.to(tl.int64) * (count + 1)
    spec = spec_of(exponent, inverse, param, soft, hard, one_minus_eps, eps_over_v, const)
    centre = scalar(centre, const.ACC)
    column, near = -1, scalar(0.0, const.ACC)
    if rows.label is not None:
        column, here = label_column(rows.label, row, 0, shape.vocab)
        at_label = tl.load(student + column, mask=here, other=0.0).to(const.ACC)
        near = tl.where(at_label - at_label == 0, at_label, 0.0)  # a number near the scores
    m_rest, d_rest, t1_rest, sum_shifted = rest_loop(
        student, shape.vocab, near, sorted_indices, spec.exponent, const
    )
    softmax = support_sums(student, support.indices, count, m_rest, d_rest, spec.exponent, const)
    value, of, slope_sum, of_rest = topk_value(
        student, support, teacher.tail, row, count, softmax, centre, spec, const
    )
    if rows.outputs is not None:
        topk_outputs(
            rows.outputs, row, student, support, teacher.tail, count, softmax, value / spec.soft,
            shape, spec, const,
        )  # fmt: skip
    sum_t1 = sum_at_one(t1_rest, softmax, const)
    if rows.label is not None:
        value += spec.hard * topk_hard_loss(
            rows.outputs, row, sum_t1, softmax.m_row, at_label, here, near, sum_shifted, shape,
            spec, const,
        )  # fmt: skip
    z_value, unit = at_one(softmax.m_row, sum_t1, spec.hard, scalar(z, const.ACC), const.Z_LOSS)
    tl.store(rows.loss + row, value + z_value)

    if grad is not None:
        by = grad_factor(factor, rows.scale, row, const)
        topk_gradient(
            grad, teacher.grad + base, student, support, shape, count, softmax, value, slope_sum,
            of_rest, sum_t1, spec.soft * spec.inverse * by * of, unit * by, spec.hard * by, column,
            centre, spec, const,
        )  # fmt: skip
