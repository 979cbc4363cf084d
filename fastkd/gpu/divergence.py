"""The divergences as Triton functions: one per entry of `fastkd.divergence`, under its name.

Each takes a tile of (log p, log q, p, q, q - p) and the parameter, and returns the value and the
centred slope at every column: slope - centre * q, written so that it is exactly 0 where p = q. The
difference is handed in, because one taken here could be contracted with the product that p is and
round one side only (`sweeps.pair`). A column with p = 0 (underflow included) carries no weight of
the teacher, and the same for q: a weight of 0 times anything is 0 here, also times infinity and,
where both logs are -inf, NaN.
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
TINY = tl.constexpr(1.2e-38)  # above the smallest normal float32


@triton.jit
def _weighted(w, x):
    return tl.where(w == 0, 0.0, w * x)


@triton.jit
def _exp(x):
    # tl.exp guards results too small to matter here, at four instructions more
    return tl.exp2(x * LOG2E)


@triton.jit
def _log_ratios(logp, logq, a):
    """(log(p / m), log(q / m)) with m = a * p + (1 - a) * q; both are 0 at p = q.

    By way of the smaller over the larger, which cannot overflow; an error in log q - log p then
    shifts both alike and cancels to first order in a mixture's divergence. At p = q the sum
    weight + (1 - weight) rounds to exactly 1.
    """
    delta = logq - logp
    weight = tl.where(delta > 0, 1.0 - a, a)
    larger = -tl.log(tl.fma(1.0 - weight, _exp(-tl.abs(delta)), weight))
    return larger - tl.maximum(delta, 0.0), larger + tl.minimum(delta, 0.0)


@triton.jit
def kl(logp, logq, p, q, gap, param):
    """p (log p - log q); slope -p, centred q - p."""
    return _weighted(p, logp - logq), gap


@triton.jit
def reverse_kl(logp, logq, p, q, gap, param):
    """q (log q - log p); slope value + q, centred: the value."""
    value = _weighted(q, logq - logp)
    return value, value


@triton.jit
def js(logp, logq, p, q, gap, beta):
    """beta p log(p / m) + (1 - beta) q log(q / m); the second term is the slope."""
    log_p_m, log_q_m = _log_ratios(logp, logq, beta)
    slope = (1.0 - beta) * _weighted(q, log_q_m)
    return beta * _weighted(p, log_p_m) + slope, slope


@triton.jit
def skew_kl(logp, logq, p, q, gap, alpha):
    """p log(p / m); slope -(1 - alpha) q p / m, centred (1 - alpha)^2 q (q - p) / m."""
    log_p_m, _ = _log_ratios(logp, logq, alpha)
    rest = 1.0 - alpha
    m = alpha * p + rest * q
    # free of the logarithm, which a sweep for the gradient alone then leaves out
    slope = rest * (gap * (rest * q / tl.maximum(m, TINY)))
    return _weighted(p, log_p_m), slope


@triton.jit
def skew_reverse_kl(logp, logq, p, q, gap, alpha):
    """q log(q / m) with alpha on q; centred slope: value + alpha q (1 - q / m)."""
    _, log_q_m = _log_ratios(logp, logq, 1.0 - alpha)
    value = _weighted(q, log_q_m)
    return value, value + alpha * _weighted(q, 1.0 - _exp(log_q_m))


@triton.jit
def tv(logp, logq, p, q, gap, param):
    """|p - q| / 2; slope sign(q - p) q / 2, 0 at ties."""
    # the tie is `gap`, not 0: NaN compares like one and must stay NaN
    sign = tl.where(gap > 0, 0.5, tl.where(gap < 0, -0.5, gap))
    return 0.5 * tl.abs(gap), sign * q
