"""The row kernel of top-k teachers: K columns of a row (its support) and, with a tail, one more.

The tail is one outcome for all columns off the support. The rest loop sums these columns. The
indices come sorted, so that a tile is compared only with those that lie in it. The pairs of the
support follow, POINTS of them at a time. Then comes the gradient: off the support it is a column's
exponential times one factor of the row; the support is written last.
"""

import triton
import triton.language as tl

from fastkd.backends.gpu.divergence import value_and_slope
from fastkd.backends.gpu.outputs import NOTHING, leave_out, store_hard, topk_outputs
from fastkd.backends.gpu.rows import at_one, grad_factor, label_column, zero_columns
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
    exponent,
    HARD_T1: tl.constexpr, SUM_SHIFTED: tl.constexpr,
    MASKED: tl.constexpr, UNALIGNED: tl.constexpr,
    ACC: tl.constexpr, LANES: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Adds a tile without its support. position: columns of the support so far, in index order."""
    tile = load(x, start, vocab, MASKED, "evict_last", ACC, LANES, GROUP, 0, UNALIGNED)
    at = columns(start, LANES, GROUP)
    rest = tile
    while next_index < start + LANES * GROUP:
        rest = tl.where(at == next_index, -float("inf"), rest)
        position += 1
        next_index = tl.load(sorted_indices + position)
    new, total, rest, _, _ = online_update(rest, top, total, exponent)
    if HARD_T1:
        sum_t1 = sum_t1 * tl.exp2((top - new) * LOG2E) + tl.sum(tl.exp2(rest * LOG2E), 1)
    if SUM_SHIFTED:
        tile = tile - base
        if MASKED:
            tile = tl.where(at < vocab, tile, 0.0)
        sum_shifted += tl.sum(tile, 1)
    return new, total, sum_t1, sum_shifted, position, next_index


@triton.jit
def rest_loop(
    x, vocab, base, sorted_indices, exponent,
    HARD_T1: tl.constexpr, SUM_SHIFTED: tl.constexpr,
    UNALIGNED: tl.constexpr, ACC: tl.constexpr, LANES: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """(max, sum, sum at T = 1) of the columns off the support, and the sum of x - base over all."""
    top, total = initial_sums(ACC, LANES)
    sum_t1, sum_shifted = total, total
    position = 0
    next_index = tl.load(sorted_indices)
    full = vocab // (LANES * GROUP) * (LANES * GROUP)
    for start in range(0, full, LANES * GROUP):
        top, total, sum_t1, sum_shifted, position, next_index = rest_tile(
            x, start, vocab, top, total, sum_t1, sum_shifted, base, sorted_indices, position,
            next_index, exponent,
            HARD_T1, SUM_SHIFTED, False, UNALIGNED, ACC, LANES, GROUP,
        )  # fmt: skip
    if full < vocab:
        top, total, sum_t1, sum_shifted, position, next_index = rest_tile(
            x, full, vocab, top, total, sum_t1, sum_shifted, base, sorted_indices, position,
            next_index, exponent,
            HARD_T1, SUM_SHIFTED, True, UNALIGNED, ACC, LANES, GROUP,
        )  # fmt: skip
    highest, total, _ = merge_lanes(top, total, exponent)
    if HARD_T1:
        sum_t1 = sum_t1 * tl.exp2((top - highest) * LOG2E)
    return highest, total, tl.sum(sum_t1, 0), tl.sum(sum_shifted, 0)


@triton.jit
def topk_grad_tile(
    grad, x, start, vocab, top, top_t1, by, exponent, column, hard, target, other,
    HARD: tl.constexpr, HARD_T1: tl.constexpr, RESTRICT: tl.constexpr,
    MASKED: tl.constexpr, UNALIGNED: tl.constexpr,
    ACC: tl.constexpr, LANES: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    tile = load(x, start, vocab, MASKED, "evict_first", ACC, LANES, GROUP, 0, UNALIGNED)
    out = tl.zeros([LANES, GROUP], ACC) + tl.where(by != by, by, 0.0)
    if not RESTRICT:
        out = tl.exp2((tile - top) * exponent) * by
    at = columns(start, LANES, GROUP)
    if HARD:
        out += hard * tl.exp2((tile - top_t1) * LOG2E) - tl.where(at == column, target, other)
    out = out.to(grad.dtype.element_ty)
    store(grad, out, start, 0, vocab, MASKED, UNALIGNED, LANES, GROUP)


@triton.jit
def topk_grad_loop(
    grad, x, vocab, top, top_t1, by, exponent, column, hard, target, other,
    HARD: tl.constexpr, HARD_T1: tl.constexpr, RESTRICT: tl.constexpr, UNALIGNED: tl.constexpr,
    ACC: tl.constexpr, LANES: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Writes the gradient off the support, from the last whole tile to the first."""
    full = vocab // (LANES * GROUP) * (LANES * GROUP)
    for step in range(0, full, LANES * GROUP):
        topk_grad_tile(
            grad, x, full - LANES * GROUP - step, vocab, top, top_t1, by,
            exponent, column, hard, target, other,
            HARD, HARD_T1, RESTRICT, False, UNALIGNED, ACC, LANES, GROUP,
        )  # fmt: skip
    if vocab % (LANES * GROUP) != 0:
        topk_grad_tile(
            grad, x, full, vocab, top, top_t1, by,
            exponent, column, hard, target, other,
            HARD, HARD_T1, RESTRICT, True, UNALIGNED, ACC, LANES, GROUP,
        )  # fmt: skip


@triton.jit
def tail_pair(
    tail_logp, d_rest, share, m_rest, m_soft, log_total, exponent, param, DIVERGENCE: tl.constexpr
):
    """Value and slope of the tail, one outcome for all columns off the support."""
    tail_logq = (m_rest - m_soft) * exponent + (tl.log2(d_rest) - log_total)
    tail_p, tail_q = tl.exp2(tail_logp), d_rest * share
    value, slope = value_and_slope(
        tail_logp, tail_logq, tail_p, tail_q, tail_q - tail_p, param, DIVERGENCE
    )
    dead = (d_rest == 0) & (tail_logp == NOTHING)
    return tl.where(dead, 0.0, value), tl.where(dead, 0.0, slope)


@triton.jit
def topk_value(
    student, indices, logprobs, tail, row, count, m_rest, d_rest, m_soft, log_total, share,
    exponent, param, centre, soft,
    DIVERGENCE: tl.constexpr, OF_SUM: tl.constexpr, NO_TAIL: tl.constexpr, ACC: tl.constexpr,
    POINTS: tl.constexpr,
):  # fmt: skip
    """(soft * divergence, its factor, sum of slopes, the tail's per unit of d_rest) of a row."""
    value, slope_sum, invalid = support_values(
        student, indices, logprobs, count, m_soft, log_total, exponent, param, centre,
        DIVERGENCE, NO_TAIL, ACC, POINTS,
    )  # fmt: skip
    of_rest = scalar(0.0, ACC)
    if tail is not None:
        tail_logp = tl.load(tail + row).to(ACC) * LOG2E
        invalid += tl.where(tail_logp != tail_logp, 1.0, 0.0)
        tail_value, tail_slope = tail_pair(
            tail_logp, d_rest, share, m_rest, m_soft, log_total, exponent, param, DIVERGENCE
        )
        value += tail_value
        slope_sum += tail_slope
        of_rest = tl.where(d_rest == 0, 0.0, tail_slope / d_rest)
    value, of = OF_SUM(value, log_total == NOTHING)
    value = tl.where((log_total == NOTHING) | (invalid > 0), float("nan"), soft * value)
    return value, of, tl.where(invalid > 0, float("nan"), slope_sum), of_rest


@triton.jit
def topk_gradient(
    grad, support_grad, student, indices, logprobs, vocab, width, count, m_rest, m_soft, m_row,
    log_total, share, value, slope_sum, of_rest, sum_t1, exponent, param, centre, soft, unit, hard,
    column, target, eps_over_v,
    DIVERGENCE: tl.constexpr, NO_TAIL: tl.constexpr, HARD: tl.constexpr, HARD_T1: tl.constexpr,
    RESTRICT: tl.constexpr, POINTS: tl.constexpr, UNALIGNED: tl.constexpr,
    ACC: tl.constexpr, LANES: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """The gradient of a row; the support's waits in support_grad until the rest is written."""
    target, other = hard * target, hard * eps_over_v
    unit = tl.where(sum_t1 == 0, float("nan"), unit / sum_t1)
    support_gradient(
        support_grad, student, indices, logprobs, count, m_soft, m_row, log_total, slope_sum,
        exponent, param, centre, soft, unit, column, target, other,
        DIVERGENCE, NO_TAIL, HARD, ACC, POINTS,
    )  # fmt: skip
    # q of a column is `share` times its exponential relative to m_rest
    by_rest = soft * (of_rest - share * slope_sum)
    by_rest = tl.where(value != value, float("nan"), by_rest)
    topk_grad_loop(
        grad, student, vocab, m_rest, m_row, by_rest, exponent, column, unit, target, other,
        HARD, HARD_T1, RESTRICT, UNALIGNED, ACC, LANES, GROUP,
    )  # fmt: skip
    zero_columns(grad, vocab, width, LANES, GROUP, UNALIGNED)
    # other threads have written the columns of the support, too
    tl.debug_barrier()
    scatter_support(grad, support_grad, indices, count, POINTS)


@triton.jit
def sum_at_one(
    d_rest, t1_rest, t1_support, m_rest, m_row,
    HARD: tl.constexpr, HARD_T1: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """The sum of a whole row at T = 1, relative to its maximum; 1 where nothing asks for it."""
    total = scalar(1.0, ACC)
    if HARD:
        if not HARD_T1:
            t1_rest = d_rest
        total = t1_support + t1_rest * tl.exp2((m_rest - m_row) * LOG2E)
    return total


@triton.jit
def topk_hard_loss(
    outputs, row, sum_t1, m_row, at_label, here, near, sum_shifted, vocab, classes, one_minus_eps,
    eps_over_v, SMOOTH: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """As `rows.hard_loss`, where sum_shifted is the sum of x - near."""
    rest = tl.where(here, eps_over_v * scalar(classes - vocab, ACC), 1.0 - eps_over_v * vocab)
    value = tl.log(sum_t1) + tl.where(here, one_minus_eps * (m_row - at_label), 0.0)
    value += tl.where(rest == 0, 0.0, rest * m_row)
    if SMOOTH:
        value -= eps_over_v * (sum_shifted + vocab * (near - m_row))
    if outputs is not None:
        store_hard(outputs, row, value, m_row, sum_t1, at_label, here)
    return value


@triton.jit(do_not_specialize=["per_s", "per_g", "count"])
def topk_kernel(
    # pointers: the student [rows, columns]; of the teacher [rows, count] x3, but sorted_indices
    # [rows, count + 1]; then one element per row each; None for what is not given
    student, grad, logprobs, indices, sorted_indices, support_grad, tail, loss, outputs, keep,
    label, scale, skip,
    # shape and rows
    vocab, classes, width, count, per_s, outer_s, inner_s, per_g, outer_g, inner_g,
    # the loss spec, as in `rows.fused_kernel`
    exponent: tl.float64, inverse: tl.float64, param: tl.float64, soft: tl.float64,
    hard: tl.float64, one_minus_eps: tl.float64, eps_over_v: tl.float64, z: tl.float64,
    factor: tl.float64, centre: tl.float64,
    # constants
    DIVERGENCE: tl.constexpr, OF_SUM: tl.constexpr, RESTRICT: tl.constexpr,
    HARD_T1: tl.constexpr, SMOOTH: tl.constexpr, Z_LOSS: tl.constexpr, POINTS: tl.constexpr,
    UNALIGNED: tl.constexpr, ACC: tl.constexpr, LANES: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """loss = soft D + hard CE against K columns; grad = its gradient * scale * factor. One row.

    sorted_indices: the support in rising order, then a number above every column. support_grad:
    memory for the gradient on the support, which the loop over all columns would overwrite.
    """
    if skip is not None:
        if tl.load(skip) != 0:
            return
    HARD: tl.constexpr = label is not None or Z_LOSS
    NO_TAIL: tl.constexpr = tail is None and not RESTRICT
    row = tl.program_id(0)
    if grad is not None:
        grad = row_at(grad, row, per_g, outer_g, inner_g, None, GROUP, UNALIGNED)
    if keep is not None:
        if tl.load(keep + row) == 0:
            leave_out(loss, outputs, row, ACC)
            if grad is not None:
                zero_columns(grad, 0, width, LANES, GROUP, UNALIGNED)
            return
    student = row_at(student, row, per_s, outer_s, inner_s, None, GROUP, UNALIGNED)
    base = row.to(tl.int64) * count
    logprobs, indices = logprobs + base, indices + base
    sorted_indices = sorted_indices + row.to(tl.int64) * (count + 1)
    exponent, param, centre = scalar(exponent, ACC), scalar(param, ACC), scalar(centre, ACC)
    soft, hard = scalar(soft, ACC), scalar(hard, ACC)
    one_minus_eps, eps_over_v = scalar(one_minus_eps, ACC), scalar(eps_over_v, ACC)
    column, near = -1, scalar(0.0, ACC)
    if label is not None:
        column, here = label_column(label, row, 0, vocab)
        at_label = tl.load(student + column, mask=here, other=0.0).to(ACC)
        near = tl.where(at_label - at_label == 0, at_label, 0.0)  # a number near the scores
    m_rest, d_rest, t1_rest, sum_shifted = rest_loop(
        student, vocab, near, sorted_indices, exponent, HARD_T1, SMOOTH, UNALIGNED,
        ACC, LANES, GROUP,
    )  # fmt: skip
    m_soft, m_row, log_total, share, t1_support = support_sums(
        student, indices, count, m_rest, d_rest, exponent, HARD, RESTRICT, ACC, POINTS
    )
    value, of, slope_sum, of_rest = topk_value(
        student, indices, logprobs, tail, row, count, m_rest, d_rest, m_soft, log_total, share,
        exponent, param, centre, soft, DIVERGENCE, OF_SUM, NO_TAIL, ACC, POINTS,
    )  # fmt: skip
    if outputs is not None:
        topk_outputs(
            outputs, student, indices, logprobs, tail, row, vocab, count, value / soft, m_soft,
            log_total, exponent, scalar(inverse, ACC),
            RESTRICT, POINTS, UNALIGNED, ACC, LANES, GROUP,
        )  # fmt: skip
    sum_t1 = sum_at_one(d_rest, t1_rest, t1_support, m_rest, m_row, HARD, HARD_T1, ACC)
    if label is not None:
        value += hard * topk_hard_loss(
            outputs, row, sum_t1, m_row, at_label, here, near, sum_shifted, vocab, classes,
            one_minus_eps, eps_over_v, SMOOTH, ACC,
        )  # fmt: skip
    z_value, unit = at_one(m_row, sum_t1, hard, scalar(z, ACC), Z_LOSS)
    tl.store(loss + row, value + z_value)

    if grad is not None:
        by = grad_factor(factor, scale, row, ACC)
        topk_gradient(
            grad, support_grad + base, student, indices, logprobs, vocab, width, count, m_rest,
            m_soft, m_row, log_total, share, value, slope_sum, of_rest, sum_t1, exponent, param,
            centre, soft * scalar(inverse, ACC) * by * of, unit * by, hard * by, column,
            one_minus_eps + eps_over_v, eps_over_v,
            DIVERGENCE, NO_TAIL, HARD, HARD_T1, RESTRICT, POINTS, UNALIGNED, ACC, LANES, GROUP,
        )  # fmt: skip
