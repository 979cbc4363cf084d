"""Losses of one logit each in Triton: value and both gradients of a tile of logits in one pass.

p = sigmoid(a) is the teacher's probability, q = sigmoid(b) the student's. `fastkd/bernoulli.py` has
the formulas in torch, and says why the KL negates both logits where their sum is positive.

A logit needs no other: one program computes one tile, [BLOCK] logits that lie together, and writes
their sum where one is requested. `total_kernel` adds the tiles' sums in a fixed order.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastkd.backends.gpu import launch
from fastkd.backends.gpu.arguments import Weights
from fastkd.backends.gpu.divergence import reciprocal
from fastkd.backends.gpu.tiles import scalar
from fastkd.bernoulli import Bernoulli, ElementFactor, Flat

BLOCK = tl.constexpr(2048)
THREADS = 256
# HOW is a sum of them: there is a hard term; `out` and `by` hold a number for each logit
HARD, EACH = tl.constexpr(1), tl.constexpr(2)
NEVER = 1 << 40  # no integer label that a byte holds


# ---- the divergences: (value, slope in a, slope in b)


@triton.jit
def positive(x):
    """max(x, 0), and NaN of NaN."""
    return tl.where(x < 0, 0.0, x)


@triton.jit
def if_any(w, x):
    """w * x with 0 * anything = 0."""
    return tl.where(w == 0, 0.0, w * tl.where(w == 0, 0.0, x))


@triton.jit
def sigmoid(x):
    """(sigmoid(x), sigmoid(-x), log(1 + e^-|x|)); softplus(x) is max(x, 0) plus the last."""
    e = tl.exp(tl.where(x < 0, x, -x))
    above = e + 1.0
    if x.dtype == tl.float64:
        r = 1.0 / above
        low = tl.log(above) + (e - (above - 1.0)) * r  # with what the rounding of e + 1 has lost
    else:
        # log(1 + e) = 2 atanh(z), z = e / (2 + e) <= 1/3, by its series: exact for small e too
        both = reciprocal(above * (e + 2.0))
        r, z = both * (e + 2.0), both * above * e
        w = z * z
        low = tl.fma(w, 2.0 / 13.0, 2.0 / 11.0)
        low = tl.fma(w, low, 2.0 / 9.0)
        low = tl.fma(w, low, 2.0 / 7.0)
        low = tl.fma(w, low, 2.0 / 5.0)
        low = tl.fma(w, low, 2.0 / 3.0)
        low = tl.fma(w * z, low, 2.0 * z)
    less = e * r
    return tl.where(x < 0, less, r), tl.where(x < 0, r, less), low


@triton.jit
def kl(a, b, param):
    """p log(p / q) + (1 - p) log((1 - p) / (1 - q))."""
    flip = (a + b > 0) | (a == float("inf"))
    x, y = tl.where(flip, -a, a), tl.where(flip, -b, b)
    p, not_p, low_p = sigmoid(x)
    q, _, low_q = sigmoid(y)
    gap = tl.where(p == 0, 0.0, x - y)
    above = (positive(y) - positive(x)) + (low_q - low_p)
    by_a, by_b = p * not_p * gap, q - p
    return tl.fma(p, gap, above), tl.where(flip, -by_a, by_a), tl.where(flip, -by_b, by_b)


@triton.jit
def reverse_kl(a, b, param):
    """q log(q / p) + (1 - q) log((1 - q) / (1 - p))."""
    value, by_b, by_a = kl(b, a, param)
    return value, by_a, by_b


@triton.jit
def js(a, b, beta):
    """beta KL(p || m) + (1 - beta) KL(q || m); what the mixture's own change adds is 0."""
    p, not_p, low_p = sigmoid(a)
    q, not_q, low_q = sigmoid(b)
    other = 1.0 - beta
    log_yes, log_no = tl.log(p * beta + q * other), tl.log(not_p * beta + not_q * other)
    p_yes, p_no = -(positive(-a) + low_p) - log_yes, -(positive(a) + low_p) - log_no
    q_yes, q_no = -(positive(-b) + low_q) - log_yes, -(positive(b) + low_q) - log_no
    of_p = if_any(p, p_yes) + if_any(not_p, p_no)
    of_q = if_any(q, q_yes) + if_any(not_q, q_no)
    by_a = if_any(p * not_p, p_yes - p_no) * beta
    return of_p * beta + of_q * other, by_a, if_any(q * not_q, q_yes - q_no) * other


@triton.jit
def cross_entropy(s, y, pos_weight):
    """-(pos_weight y log sigmoid(s) + (1 - y) log sigmoid(-s)), and its slope in s."""
    yes, no = y * pos_weight, 1.0 - y
    q, not_q, low = sigmoid(s)
    far = if_any(yes, positive(-s)) + if_any(no, positive(s))
    return tl.fma(yes + no, low, far), no * q - yes * not_q


# ---- a tile


@triton.jit
def read(x, start, n, MASKED: tl.constexpr):
    inside = tl.arange(0, BLOCK)
    if MASKED:
        tile = tl.load(
            x + start + inside, mask=inside < n - start, other=0, eviction_policy="evict_first"
        )
    else:
        tile = tl.load(x + start + inside, eviction_policy="evict_first")
    return tile


@triton.jit
def write(x, tile, start, n, MASKED: tl.constexpr):
    inside = tl.arange(0, BLOCK)
    tile = tile.to(x.dtype.element_ty)
    if MASKED:
        mask = inside < n - start
        tl.store(x + start + inside, tile, mask=mask, eviction_policy="evict_first")
    else:
        tl.store(x + start + inside, tile, eviction_policy="evict_first")


@triton.jit
def over(start, inside, by):
    """(start % by + inside, by), in 32 bits where `by` has no more: 64 take ten times as long."""
    number: tl.constexpr = tl.uint32 if by.dtype == tl.int32 else tl.int64
    return (start % by).to(number) + inside.to(number), by.to(number)


@triton.jit
def factor_of(data, start, n, repeat, count, MASKED: tl.constexpr):
    """That of element i is data[(i // repeat) % count]; None: no repeats, no end."""
    inside = tl.arange(0, BLOCK)
    at, first = inside, start
    if repeat is not None:
        at, by = over(start, inside, repeat)
        at, first = at // by, start // repeat
    if count is not None:
        at, by = over(first, at, count)
        at, first = at % by, 0
    if MASKED:
        factor = tl.load(data + first + at, mask=inside < n - start, other=0.0)
    else:
        factor = tl.load(data + first + at)
    return factor


@triton.jit
def labels_of(labels, start, n, ignored, MASKED: tl.constexpr):
    """The labels of a tile as floats, and which of them count."""
    y = read(labels, start, n, MASKED)
    if y.dtype.is_floating():
        if y.dtype != tl.float64:
            y = y.to(tl.float32)
        keep = (y == y) & (y != ignored.to(y.dtype))
    else:
        keep = y.to(tl.int64) != ignored
    return y, keep


@triton.jit
def bernoulli_tile(
    student, teacher, labels, weight, pos_weight, grad_s, grad_t, out, by,
    start, n, repeat, count, ignored, weights,
    PAIR: tl.constexpr, HOW: tl.constexpr, ACC: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    s = read(student, start, n, MASKED).to(ACC)
    value, by_s, by_t = tl.zeros([BLOCK], ACC), tl.zeros([BLOCK], ACC), tl.zeros([BLOCK], ACC)
    if teacher is not None:
        t = read(teacher, start, n, MASKED).to(ACC)
        value, by_t, by_s = PAIR(t * weights.inverse, s * weights.inverse, weights.param)
        soft = weights.soft * weights.inverse
        value, by_t, by_s = value * weights.soft, by_t * soft, by_s * soft
    keep = tl.full([BLOCK], True, tl.int1)
    if labels is not None:
        y, keep = labels_of(labels, start, n, ignored, MASKED)
        y = tl.where(keep, y.to(ACC), 0.0)
        if HOW % 2 == HARD:
            pos = 1.0
            if pos_weight is not None:
                pos = factor_of(pos_weight, start, n, repeat, count, MASKED)
            of_label, slope = cross_entropy(s, y, pos)
            value, by_s = value + weights.hard * of_label, by_s + weights.hard * slope
        # labels out of range, which the host may not have looked at
        right = (y >= 0) & (y <= 1)
        value, by_s = tl.where(right, value, float("nan")), tl.where(right, by_s, float("nan"))
    if MASKED:
        keep = keep & (tl.arange(0, BLOCK) < n - start)
    factor = scalar(1.0, ACC)
    if weight is not None:
        factor = factor_of(weight, start, n, repeat, count, MASKED)
    if out is not None:
        value = tl.where(keep, value * factor, 0.0)
        if HOW >= EACH:
            write(out, value, start, n, MASKED)
        else:
            tl.store(out + tl.program_id(0), tl.sum(value, 0))
    if by is not None:
        if HOW >= EACH:
            factor = factor * read(by, start, n, MASKED)
        else:
            factor = factor * tl.load(by).to(ACC)
        if grad_s is not None:
            write(grad_s, tl.where(keep, by_s * factor, 0.0), start, n, MASKED)
        if grad_t is not None:
            write(grad_t, tl.where(keep, by_t * factor, 0.0), start, n, MASKED)


@triton.jit(do_not_specialize=["repeat", "count", "ignored"])
def bernoulli_kernel(
    # pointers: [n] of each operand and its gradient, the two factors; None for what is not given
    student, teacher, labels, weight, pos_weight, grad_s, grad_t,
    # values [n] or sums of tiles; the gradients' factor, one or [n]; whether to do nothing
    out, by, skip,
    n, repeat, count, ignored,
    inverse: tl.float64, soft: tl.float64, hard: tl.float64, param: tl.float64,
    PAIR: tl.constexpr, HOW: tl.constexpr,
):  # fmt: skip
    """soft D(sigmoid(t / T), sigmoid(s / T)) + hard BCE(y, s), its factor; gradients. One tile."""
    if skip is not None:
        if tl.load(skip) != 0:
            return
    ACC: tl.constexpr = (by if out is None else out).dtype.element_ty
    start = tl.program_id(0).to(tl.int64) * BLOCK
    weights = Weights(
        scalar(inverse, ACC), scalar(soft, ACC), scalar(hard, ACC), scalar(param, ACC)
    )  # fmt: skip
    if start + BLOCK <= n:
        bernoulli_tile(
            student, teacher, labels, weight, pos_weight, grad_s, grad_t, out, by,
            start, n, repeat, count, ignored, weights, PAIR, HOW, ACC, False,
        )  # fmt: skip
    else:
        bernoulli_tile(
            student, teacher, labels, weight, pos_weight, grad_s, grad_t, out, by,
            start, n, repeat, count, ignored, weights, PAIR, HOW, ACC, True,
        )  # fmt: skip


@triton.jit(do_not_specialize=["repeat", "count", "ignored"])
def count_elements_kernel(labels, weight, out, n, repeat, count, ignored):
    """The sum of the weights of the labels that count. One tile."""
    start = tl.program_id(0).to(tl.int64) * BLOCK
    _, keep = labels_of(labels, start, n, ignored, True)
    keep = keep & (tl.arange(0, BLOCK) < n - start)
    factor = scalar(1.0, tl.float64)
    if weight is not None:
        factor = factor_of(weight, start, n, repeat, count, True).to(tl.float64)
    tl.store(out + tl.program_id(0), tl.sum(tl.where(keep, factor, 0.0), 0))


# ---- launches

PAIRS = {"kl": kl, "reverse_kl": reverse_kl, "js": js}


def _common(a: ElementFactor, b: ElementFactor, n: int) -> tuple[ElementFactor, ElementFactor]:
    """Both factors with one `repeat` and as many numbers. Of either, one product divides the
    other's: they are sizes of the last dimensions."""
    repeat = min(a.repeat, b.repeat)
    count = max(a.repeat * a.data.numel(), b.repeat * b.data.numel()) // repeat
    at = torch.arange(count, device=a.data.device) * repeat

    def as_other(x: ElementFactor) -> ElementFactor:
        if (x.repeat, x.data.numel()) == (repeat, count):
            return x
        return ElementFactor(x.data[at // x.repeat % x.data.numel()], repeat)

    return as_other(a), as_other(b)


def _shared_args(x: Flat, weight: ElementFactor | None, n: int) -> dict[str, Any]:
    """The labels, and where a factor lies."""
    labels, ignored = x.labels, x.ignored
    if labels is not None and len(ignored) > 1:  # rare: the others become the first
        wide = labels if labels.is_floating_point() else labels.to(torch.int64)
        for other in ignored[1:]:
            wide = torch.where(wide == other, ignored[0], wide)
        labels = wide
    repeat, count = None, None
    if weight is not None:
        own = weight.data.numel()
        repeat = None if weight.repeat == 1 or own == 1 else weight.repeat
        count = None if weight.repeat * own >= n and own > 1 else own
    return dict(
        labels=labels, n=n, repeat=repeat, count=count, ignored=ignored[0] if ignored else NEVER
    )


class ElementPasses:
    """`Backend.bernoulli` and `Backend.count_elements`, of which nothing waits for the device."""

    total: Any

    def bernoulli(
        self, what: Bernoulli, x: Flat, factor: Tensor | float, each: Tensor | None,
        grad_s: Tensor | None, grad_t: Tensor | None, values: Tensor | None,
        skip: Tensor | None = None,
    ) -> Tensor | None:  # fmt: skip
        """Writes what it is given memory for; the sum of weight * loss where nothing is of each.

        Args:
            factor: of the gradients, 0-d in acc; a number where `each` is given, or no memory.
            each: [n] in acc, the factor of each logit's gradients in its place.
            grad_s, grad_t: [n] in the operands' dtypes.
            values: [n] in acc.
            skip: 0-d bool: where it is true, nothing is written, and there is no sum.
        """
        n, weight, pos = x.student.numel(), x.weight, x.pos_weight
        pos = pos if what.hard else None
        if weight is not None and pos is not None:
            weight, pos = _common(weight, pos, n)
        by = each if isinstance(factor, float) else factor
        tiles = triton.cdiv(n, BLOCK.value)
        per_logit = values is not None or each is not None
        sums = None if per_logit or skip is not None else x.student.new_empty(tiles, dtype=x.acc)
        args = {
            **dict(student=x.student, teacher=x.teacher if what.soft else None),
            **dict(weight=weight and weight.data, pos_weight=pos and pos.data),
            **dict(grad_s=grad_s, grad_t=grad_t, skip=skip),
            **dict(out=values if sums is None else sums, by=by),
            **_shared_args(x, weight or pos, n),
            **dict(inverse=1.0 / what.temperature, soft=what.soft, hard=what.hard),
            **dict(param=what.divergence.param or 0.0, PAIR=PAIRS[what.divergence.name]),
            "HOW": HARD.value * bool(what.hard) + EACH.value * per_logit,
        }
        launch.launch(bernoulli_kernel, tiles, args, THREADS, x.student.device)
        return None if sums is None else self.total(sums, None, 1.0)

    def count_elements(self, x: Flat) -> Tensor:
        """0-d float64: the sum of the weights of the labels that count."""
        assert x.labels is not None
        n = x.labels.numel()
        tiles = triton.cdiv(n, BLOCK.value)
        sums = torch.empty(tiles, dtype=torch.float64, device=x.labels.device)
        args = dict(weight=x.weight and x.weight.data, out=sums, **_shared_args(x, x.weight, n))
        launch.launch(count_elements_kernel, tiles, args, THREADS, x.labels.device)
        return self.total(sums, None, 1.0)
