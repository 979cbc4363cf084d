"""The divergences as Triton functions: one per entry of `fastkd.divergence`, under its name.

Each takes a tile of (log2 p, log2 q, p, q, q - p) and the parameter, and returns the value (in
nats) and the centred slope at every column: slope - centre * q, written so that it is exactly 0
where p = q. Logarithms come to base 2 because the hardware's exponential and logarithm are. A
column with p = 0 (underflow included) carries no weight of the teacher, and the same for q: a
weight of 0 times anything is 0 here, also times infinity and, where both logs are -inf, NaN.

WHAT: a loop over columns wants less, and gets it in fewer operations.
    "sums"      two numbers, whose sums over the columns tell those of value and slope
    "finish"    value and slope of two such sums, which stand in the place of the logarithms
    "gradient"  soft * slope - q * shift, with shift = soft times the row's sum of slopes. As most
                slopes are q times something, one product with q does. NaN of the teacher may be
                lost here, but not in shift.

A row's loss is the sum of its values. A divergence whose loss is a function of the sum has that
function here too, as NAME_of_sum.
"""

import os
from typing import Any

import triton
import triton.language as tl

LN2 = tl.constexpr(0.6931471805599453)
# stands in for the logarithm of 0: 0 times it is 0, and differences of two of them are no NaN
LOWEST = tl.constexpr(-1e30)
NAN_STAYS = tl.constexpr(tl.PropagateNan.ALL)


def _special(instruction, other, x, semantic, builder):
    """One operation of the special-function unit; `other` where that is not to be had.

    What Triton makes of log2 and of a division is a routine around it for the sake of operands that
    do not occur here. semantic or builder: what Triton hands over, by version.
    """
    by = {"_builder": builder} if semantic is None else {"_semantic": semantic}
    options = (builder if semantic is None else semantic.builder).options
    if options.backend_name != "cuda" or x.dtype.scalar != tl.float32:
        return other(x, by)
    return tl.inline_asm_elementwise(
        f"{instruction} $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1, **by
    )


@tl.core.builtin
def log2(x, _semantic=None, _builder=None):
    """log2 x, for x above 0 that is no subnormal number."""
    other = lambda x, by: tl.log2(x, **by)  # noqa: E731
    return _special("lg2.approx.ftz.f32", other, x, _semantic, _builder)


@tl.core.builtin
def reciprocal(x, _semantic=None, _builder=None):
    """1 / x, for such an x."""
    other = lambda x, by: x.__rtruediv__(1.0, **by)  # noqa: E731
    return _special("rcp.approx.ftz.f32", other, x, _semantic, _builder)


if os.environ.get("TRITON_INTERPRET") == "1":  # which has no such operations

    @triton.jit
    def log2(x):
        return tl.log2(x)

    @triton.jit
    def reciprocal(x):
        return 1.0 / x


@triton.jit
def _weighted(w, x):
    return tl.where(w == 0, 0.0, w * x)


@triton.jit
def _least(x, y):
    return tl.minimum(x, y, propagate_nan=NAN_STAYS)


@triton.jit
def _most(x, y):
    return tl.maximum(x, y, propagate_nan=NAN_STAYS)


# log2 of a ratio beyond which the smaller number is lost in the sum of both, in float64, too
FAR = tl.constexpr(60.0)


@triton.jit
def _ratio(logp, logq, a):
    """(p / q, m / q) with m = a * p + (1 - a) * q, exactly 1 where p = q; p / q at most 2^120."""
    ratio = tl.exp2(tl.minimum(logp - logq, 2.0 * FAR))
    return ratio, tl.fma(ratio, a, 1.0 - a)


@triton.jit
def kl(logp, logq, p, q, gap, param, soft, shift, WHAT: tl.constexpr):
    """p (log p - log q); slope -p, centred q - p, which sums to 0 over a row."""
    if WHAT == "gradient":
        return soft * gap
    elif WHAT == "finish":
        return logp * LN2, logq
    else:
        return _weighted(p, logp - logq), gap


@triton.jit
def reverse_kl(logp, logq, p, q, gap, param, soft, shift, WHAT: tl.constexpr):
    """q (log q - log p); slope value + q, centred: the value."""
    if WHAT == "gradient":
        by = tl.fma(logq - logp, soft * LN2, -shift)
        # a row of NaN has NaN where q is 0, too
        return tl.where(q == 0, shift * 0.0, q * by)
    elif WHAT == "finish":
        return logp * LN2, logq * LN2
    else:
        value = _weighted(q, logq - logp)
        return value, value


@triton.jit
def js(logp, logq, p, q, gap, beta, soft, shift, WHAT: tl.constexpr):
    """beta p log(p / m) + (1 - beta) q log(q / m); the second term is the slope.

    An error in m shifts both logarithms alike, and cancels to first order.
    """
    if WHAT == "gradient":
        _, m = _ratio(logp, logq, beta)
        return q * tl.fma(log2(m), soft * ((beta - 1.0) * LN2), -shift)
    elif WHAT == "finish":
        value = beta * logp + (1.0 - 2.0 * beta) * logq
        return value * -LN2, logq * ((beta - 1.0) * LN2)
    else:
        # by the smaller over the larger, whose logarithms keep their digits however far apart
        larger = _most(logp, logq)
        # not NaN where both are 0; where one is NaN, so is the larger
        apart = tl.maximum(_least(logp, logq) - larger, -200.0)
        of_p = logp > logq
        weight = tl.where(of_p, beta, 1.0 - beta)
        ratio, most = tl.exp2(apart), tl.exp2(larger)
        log_m = log2(tl.fma(1.0 - weight, ratio, weight))
        more, less = most * log_m, (most * ratio) * (log_m - apart)
        return more + less, tl.where(of_p, less, more)


@triton.jit
def skew_kl(logp, logq, p, q, gap, alpha, soft, shift, WHAT: tl.constexpr):
    """p log(p / m); slope -(1 - alpha) q p / m, centred (1 - alpha)^2 q (q - p) / m."""
    if WHAT == "gradient":
        ratio, m = _ratio(logp, logq, alpha)
        by = soft * ((1.0 - alpha) * (1.0 - alpha))
        return q * tl.fma((1.0 - ratio) * reciprocal(m), by, -shift)
    elif WHAT == "finish":
        return logp * -LN2, ((1.0 - alpha) * (1.0 - alpha)) * logq
    else:
        # By q / p. p is at least 2^-60 q here: what that adds is lost beside q, and q is their
        # product, which does not underflow where it matters.
        logp = _most(logp, logq - FAR)
        # not NaN where both are 0; where one is NaN, so is p
        ratio, p = tl.exp2(tl.maximum(logq - logp, -200.0)), tl.exp2(logp)
        m = tl.fma(ratio, 1.0 - alpha, alpha)
        return p * log2(m), (p * ratio - p) * (ratio * reciprocal(m))


@triton.jit
def skew_reverse_kl(logp, logq, p, q, gap, alpha, soft, shift, WHAT: tl.constexpr):
    """q log(q / m) with alpha on q; centred slope: value + alpha q (1 - q / m)."""
    if WHAT == "gradient":
        _, m = _ratio(logp, logq, 1.0 - alpha)
        by = tl.fma(reciprocal(m), -soft * alpha, soft * alpha - shift)
        return q * tl.fma(log2(m), -soft * LN2, by)
    elif WHAT == "finish":
        return logp * -LN2, logq * -LN2
    else:
        # NaN of the teacher stays, and is not made where both are 0
        apart = _least(logp - _most(logq, LOWEST), 2.0 * FAR)
        m = tl.fma(tl.exp2(apart), 1.0 - alpha, alpha)
        value = q * log2(m)
        return value, tl.fma(q * (1.0 - reciprocal(m)), -alpha / LN2, value)


@triton.jit
def _sign(gap):
    """-1, 0 or 1, and NaN of NaN; a fraction where p and q are below 2^-100, which is nothing."""
    return _most(_least(gap * 2.0**127, 1.0), -1.0)


@triton.jit
def tv(logp, logq, p, q, gap, param, soft, shift, WHAT: tl.constexpr):
    """|p - q| / 2; slope sign(q - p) q / 2, 0 at ties."""
    if WHAT == "gradient":
        return q * tl.fma(_sign(gap), 0.5 * soft, -shift)
    elif WHAT == "finish":
        return 0.5 * logp, 0.5 * logq
    else:
        sign = _sign(gap)
        return sign * gap, sign * q


@triton.jit
def acceptance(logp, logq, p, q, gap, param, soft, shift, WHAT: tl.constexpr):
    """min(p, q); slope q where q < p, 0 elsewhere and at ties."""
    if WHAT == "gradient":
        return q * tl.where(gap < 0, soft - shift, tl.where(gap >= 0, -shift, gap))
    elif WHAT == "finish":
        return logp, logq
    else:
        return _least(p, q), tl.where(gap < 0, q, tl.where(gap >= 0, 0.0, gap))


@triton.jit
def value_and_slope(logp, logq, p, q, gap, param, DIVERGENCE: tl.constexpr):
    """What a divergence is at points of its own, where nobody sums."""
    value, slope = DIVERGENCE(logp, logq, p, q, gap, param, 0.0, 0.0, "sums")
    return DIVERGENCE(value, slope, p, q, gap, param, 0.0, 0.0, "finish")


@triton.jit
def acceptance_of_sum(overlap, empty):
    """-log of the overlap: constant below 2^-100, 0 within rounding of 1."""
    rounding: tl.constexpr = 2.0**-40 if overlap.dtype == tl.float64 else 2.0**-16
    least: tl.constexpr = 2.0**-100
    overlap = tl.where(empty, 1.0, overlap)
    bounded = _most(overlap, least)
    loss = tl.where(overlap > 1.0 - rounding, 0.0, -tl.log(bounded))
    return loss, tl.where(overlap < least, 0.0, -1.0 / bounded)


@triton.jit
def the_sum(total, empty):
    """(loss, its derivative by the sum of values) of a row; empty: nothing has mass in it."""
    return total, 1.0


def of_sum(name: str) -> Any:
    """The function of a row's sum that belongs to a divergence."""
    return globals().get(f"{name}_of_sum", the_sum)
