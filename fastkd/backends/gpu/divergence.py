"""The divergences as Triton functions: one per entry of `fastkd.divergence`, under its name.

Each takes a tile of (log2 p, log2 q, p, q, q - p) and the parameter, and returns the value (in
nats) and the centred slope at every column: slope - centre * q, written so that it is exactly 0
where p = q. Logarithms come to base 2 because the hardware's exponential and logarithm are. A
column with p = 0 (underflow included) carries no weight of the teacher, and the same for q: a
weight of 0 times anything is 0 here, also times infinity and, where both logs are -inf, NaN.

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
    """log2 x, for x in (0, 1] that is no subnormal number."""
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


@triton.jit
def _mixture(logp, logq, a):
    """(log2 q - log2 p, smaller / larger, m / larger) with m = a * p + (1 - a) * q.

    By way of the smaller over the larger, which cannot overflow. At p = q the sum
    weight + (1 - weight) rounds to exactly 1.
    """
    delta = _most(logq, LOWEST) - _most(logp, LOWEST)
    weight = tl.where(delta > 0, 1.0 - a, a)
    less = tl.exp2(-tl.abs(delta))
    return delta, less, tl.fma(1.0 - weight, less, weight)


@triton.jit
def kl(logp, logq, p, q, gap, param):
    """p (log p - log q); slope -p, centred q - p."""
    return _weighted(p, (logp - logq) * LN2), gap


@triton.jit
def reverse_kl(logp, logq, p, q, gap, param):
    """q (log q - log p); slope value + q, centred: the value."""
    value = _weighted(q, (logq - logp) * LN2)
    return value, value


@triton.jit
def js(logp, logq, p, q, gap, beta):
    """beta p log(p / m) + (1 - beta) q log(q / m); the second term is the slope.

    An error in delta or m shifts both logarithms alike, and cancels to first order.
    """
    delta, _, m = _mixture(logp, logq, beta)
    larger = log2(m)
    slope = ((1.0 - beta) * LN2) * (q * (_least(delta, 0.0) - larger))
    return slope - (beta * LN2) * (p * (_most(delta, 0.0) + larger)), slope


@triton.jit
def skew_kl(logp, logq, p, q, gap, alpha):
    """p log(p / m); slope -(1 - alpha) q p / m, centred (1 - alpha)^2 q (q - p) / m."""
    delta, less, m = _mixture(logp, logq, alpha)
    apart = tl.where(delta > 0, 1.0 - less, less - 1.0)
    slope = ((1.0 - alpha) * (1.0 - alpha)) * (q * (apart * reciprocal(m)))
    # a loop for the gradient alone leaves the logarithm out
    log_m_p = (_most(delta, 0.0) + log2(m)) * LN2
    return -(p * log_m_p), slope


@triton.jit
def skew_reverse_kl(logp, logq, p, q, gap, alpha):
    """q log(q / m) with alpha on q; centred slope: value + alpha q (1 - q / m)."""
    delta, _, m = _mixture(logp, logq, 1.0 - alpha)
    log_q_m = _least(delta, 0.0) - log2(m)
    value = q * log_q_m * LN2
    return value, value + alpha * (q * (1.0 - tl.exp2(log_q_m)))


@triton.jit
def tv(logp, logq, p, q, gap, param):
    """|p - q| / 2; slope sign(q - p) q / 2, 0 at ties."""
    # the tie is `gap`, not 0: NaN compares like one and must stay NaN
    sign = tl.where(gap > 0, 0.5, tl.where(gap < 0, -0.5, gap))
    return 0.5 * tl.abs(gap), sign * q


@triton.jit
def acceptance(logp, logq, p, q, gap, param):
    """min(p, q); slope q where q < p, 0 elsewhere and at ties."""
    return _least(p, q), tl.where(gap < 0, q, tl.where(gap >= 0, 0.0, gap))


@triton.jit
def acceptance_of_sum(overlap, empty):
    """-log of the overlap: constant below 2^-100, 0 within rounding of 1."""
    rounding: tl.constexpr = 2.0**-40 if overlap.dtype == tl.float64 else 2.0**-19
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
