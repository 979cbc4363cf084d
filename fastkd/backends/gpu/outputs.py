"""What a row kernel tells of a row beside its loss: the columns of `base.OUTPUTS`."""

import triton
import triton.language as tl

from fastkd.backends.gpu.tiles import load, scalar

NOTHING = tl.constexpr(-float("inf"))  # the logarithm of 0


@triton.jit
def leave_out(loss, outputs, row, ACC: tl.constexpr):
    """0 for the loss and for the outputs of a row that is left out."""
    tl.store(loss + row, scalar(0.0, ACC))
    if outputs is not None:
        n = tl.arange(0, 8)
        zero = tl.zeros([8], outputs.dtype.element_ty)
        tl.store(outputs + row.to(tl.int64) * 7 + n, zero, mask=n < 7)


@triton.jit
def store_side(outputs, row, SIDE: tl.constexpr, top, total, weighted, inverse):
    """Entropy and log-sum-exp of a softmax, whose `weighted` is the sum of e (x - max)."""
    outputs = outputs + row.to(tl.int64) * 7 + SIDE
    log_sum = tl.log(total)
    entropy = log_sum - weighted / total * inverse
    tl.store(outputs + 2, tl.where(total == 0, 0.0, entropy))
    tl.store(outputs + 4, tl.where(total == 0, log_sum, top * inverse + log_sum))


@triton.jit
def store_soft(outputs, row, value, m_s, sum_s, weighted_s, m_t, sum_t, weighted_t, inverse):
    """The divergence of a row, and what is told of both sides."""
    tl.store(outputs + row.to(tl.int64) * 7, value)
    store_side(outputs, row, 0, m_s, sum_s, weighted_s, inverse)
    store_side(outputs, row, 1, m_t, sum_t, weighted_t, inverse)


@triton.jit
def store_hard(outputs, row, loss, m_s, sum_t1, at_label, here):
    """The cross-entropy of a row, and its label's log-probability."""
    outputs = outputs + row.to(tl.int64) * 7
    tl.store(outputs + 1, tl.where(here, loss, float("nan")))
    tl.store(outputs + 6, tl.where(here, (at_label - m_s) - tl.log(sum_t1), float("nan")))


@triton.jit
def weighted_tile(
    x, start, vocab, top, exponent,
    MASKED: tl.constexpr, UNALIGNED: tl.constexpr,
    ACC: tl.constexpr, LANES: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """e (x - max) of a tile, summed over groups."""
    tile = load(x, start, vocab, MASKED, "evict_last", ACC, LANES, GROUP, 0, UNALIGNED) - top
    e = tl.exp2(tile * exponent)
    return tl.sum(tl.where(e == 0, 0.0, e * tile), 1)


@triton.jit
def weighted_loop(
    x, vocab, top, exponent, UNALIGNED: tl.constexpr,
    ACC: tl.constexpr, LANES: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """The sum of e (x - max) over all columns."""
    sums = tl.zeros([LANES], ACC)
    full = vocab // (LANES * GROUP) * (LANES * GROUP)
    for start in range(0, full, LANES * GROUP):
        sums += weighted_tile(x, start, vocab, top, exponent, False, UNALIGNED, ACC, LANES, GROUP)
    if full < vocab:
        sums += weighted_tile(x, full, vocab, top, exponent, True, UNALIGNED, ACC, LANES, GROUP)
    return tl.sum(sums, 0)


@triton.jit
def topk_outputs(
    outputs, student, indices, logprobs, tail, row, vocab, count, value, m_soft, log_total,
    exponent, inverse,
    RESTRICT: tl.constexpr, POINTS: tl.constexpr, UNALIGNED: tl.constexpr,
    ACC: tl.constexpr, LANES: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Outputs of the soft term; the student's softmax is read once more, from the cache."""
    weighted, entropy = tl.zeros([POINTS], ACC), tl.zeros([POINTS], ACC)
    for start in range(0, count, POINTS):
        position = start + tl.arange(0, POINTS)
        if RESTRICT:
            index = tl.load(indices + position, mask=position < count, other=-1)
            logit = tl.load(student + index, mask=index >= 0, other=-float("inf")).to(ACC)
            e = tl.exp2((logit - m_soft) * exponent)
            weighted += tl.where(e == 0, 0.0, e * (logit - m_soft))
        logp = tl.load(logprobs + position, mask=position < count, other=NOTHING)
        entropy -= tl.where(logp == NOTHING, 0.0, tl.exp(logp) * logp)
    of_student, of_teacher = tl.sum(weighted, 0), tl.sum(entropy, 0)
    if not RESTRICT:
        of_student = weighted_loop(student, vocab, m_soft, exponent, UNALIGNED, ACC, LANES, GROUP)
    if tail is not None:
        logp = tl.load(tail + row).to(ACC)
        of_teacher -= tl.where(logp == NOTHING, 0.0, tl.exp(logp) * logp)
    store_side(outputs, row, 0, m_soft, tl.exp2(log_total), of_student, inverse)
    outputs = outputs + row.to(tl.int64) * 7
    tl.store(outputs, value)
    tl.store(outputs + 3, of_teacher)
