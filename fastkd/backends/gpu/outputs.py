"""What a row kernel tells of a row beside its loss: the columns of `base.OUTPUTS`."""

import triton
import triton.language as tl

from fastkd.backends.gpu.tiles import load, scalar

NOTHING = tl.constexpr(-float("inf"))  # the logarithm of 0


@triton.jit
def leave_out(rows, row, const):
    """0 for the loss and for the outputs of a row that is left out."""
    tl.store(rows.loss + row, scalar(0.0, const.ACC))
    if rows.outputs is not None:
        n = tl.arange(0, 8)
        zero = tl.zeros([8], rows.outputs.dtype.element_ty)
        tl.store(rows.outputs + row.to(tl.int64) * 7 + n, zero, mask=n < 7)


@triton.jit
def store_side(outputs, row, SIDE: tl.constexpr, top, total, weighted, inverse):
    """Entropy and log-sum-exp of a softmax, whose `weighted` is the sum of e (x - max)."""
    outputs = outputs + row.to(tl.int64) * 7 + SIDE
    log_sum = tl.log(total)
    entropy = log_sum - weighted / total * inverse
    tl.store(outputs + 2, tl.where(total == 0, 0.0, entropy))
    tl.store(outputs + 4, tl.where(total == 0, log_sum, top * inverse + log_sum))


@triton.jit
def store_soft(outputs, row, value, sums, inverse):
    """The divergence of a row, and what is told of both sides."""
    tl.store(outputs + row.to(tl.int64) * 7, value)
    store_side(outputs, row, 0, sums.m_s, sums.d_s, sums.weighted_s, inverse)
    store_side(outputs, row, 1, sums.m_t, sums.d_t, sums.weighted_t, inverse)


@triton.jit
def store_hard(outputs, row, loss, m_s, sum_t1, at_label, here):
    """The cross-entropy of a row, and its label's log-probability."""
    outputs = outputs + row.to(tl.int64) * 7
    tl.store(outputs + 1, tl.where(here, loss, float("nan")))
    tl.store(outputs + 6, tl.where(here, (at_label - m_s) - tl.log(sum_t1), float("nan")))


@triton.jit
def weighted_tile(x, start, vocab, top, exponent, const, MASKED: tl.constexpr):
    """e (x - max) of a tile, summed over groups."""
    tile = load(x, start, 0, vocab, const, MASKED, "evict_last") - top
    e = tl.exp2(tile * exponent)
    return tl.sum(tl.where(e == 0, 0.0, e * tile), 1)


@triton.jit
def weighted_loop(x, vocab, top, exponent, const):
    """The sum of e (x - max) over all columns."""
    TILE: tl.constexpr = const.LANES * const.GROUP
    sums = tl.zeros([const.LANES], const.ACC)
    full = vocab // TILE * TILE
    for start in range(0, full, TILE):
        sums += weighted_tile(x, start, vocab, top, exponent, const, False)
    if full < vocab:
        sums += weighted_tile(x, full, vocab, top, exponent, const, True)
    return tl.sum(sums, 0)


@triton.jit
def topk_outputs(
    outputs, row, student, support, tail, count, softmax, value, shape, spec, const
):  # fmt: skip
    """Outputs of the soft term; the student's softmax is read once more, from the cache."""
    top, exponent = softmax.m_soft, spec.exponent
    weighted, entropy = tl.zeros([const.POINTS], const.ACC), tl.zeros([const.POINTS], const.ACC)
    for start in range(0, count, const.POINTS):
        position = start + tl.arange(0, const.POINTS)
        if const.RESTRICT:
            index = tl.load(support.indices + position, mask=position < count, other=-1)
            logit = tl.load(student + index, mask=index >= 0, other=-float("inf")).to(const.ACC)
            e = tl.exp2((logit - top) * exponent)
            weighted += tl.where(e == 0, 0.0, e * (logit - top))
        logp = tl.load(support.logprobs + position, mask=position < count, other=NOTHING)
        entropy -= tl.where(logp == NOTHING, 0.0, tl.exp(logp) * logp)
    of_student, of_teacher = tl.sum(weighted, 0), tl.sum(entropy, 0)
    if not const.RESTRICT:
        of_student = weighted_loop(student, shape.vocab, top, exponent, const)
    if tail is not None:
        logp = tl.load(tail + row).to(const.ACC)
        of_teacher -= tl.where(logp == NOTHING, 0.0, tl.exp(logp) * logp)
    store_side(outputs, row, 0, top, tl.exp2(softmax.log_total), of_student, spec.inverse)
    outputs = outputs + row.to(tl.int64) * 7
    tl.store(outputs, value)
    tl.store(outputs + 3, of_teacher)
