"""The truth: loss and gradient in numpy's long double, and what a dtype can hold of them.

Float64 is not enough: it is one of the dtypes judged, and of two softmaxes that agree to 1e-17 it
keeps no difference. On x86 a long double has 64 bits of significand and on Linux's aarch64 113;
where it is no more than a float64 (Windows, macOS on ARM) the other dtypes are judged against that
and float64 is left out.

Values and slopes are written out anew, in the form of the definition and not in that of any
kernel: this is the one place that may not share a mistake with what it judges. The tests hold it
against the table's formulas in float64.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bench.families.loss_cases import Case

Exact = NDArray[np.longdouble]

WIDER_THAN_FLOAT64 = bool(np.finfo(np.longdouble).nmant > np.finfo(np.float64).nmant)


class Sides(NamedTuple):
    """Both softmaxes [N, V] at one temperature and their logarithms, finite by construction."""

    logp: Exact
    logq: Exact
    p: Exact
    q: Exact


class Truth(NamedTuple):
    """The mean loss over rows, and its gradient [N, V]."""

    loss: np.longdouble
    grad: Exact


def exact(x: Tensor) -> Exact:
    """A tensor's numbers as they are."""
    return x.detach().cpu().double().numpy().astype(np.longdouble)


def _log_softmax(x: Exact, temperature: float) -> Exact:
    scaled = (x - x.max(-1, keepdims=True)) / np.longdouble(temperature)
    return scaled - np.log(np.exp(scaled).sum(-1, keepdims=True))


def sides(student: Tensor, teacher: Tensor, temperature: float) -> Sides:
    """The softmaxes of finite logits; the most expensive part, shared by all divergences."""
    logp = _log_softmax(exact(teacher), temperature)
    logq = _log_softmax(exact(student), temperature)
    return Sides(logp, logq, np.exp(logp), np.exp(logq))


# ---- value and slope d value / d log q of each divergence, by name


class Pair(NamedTuple):
    value: Exact
    slope: Exact


def _kl(x: Sides, _: np.longdouble) -> Pair:
    return Pair(x.p * (x.logp - x.logq), -x.p)


def _reverse_kl(x: Sides, _: np.longdouble) -> Pair:
    value = x.q * (x.logq - x.logp)
    return Pair(value, value + x.q)


def _log_mixture(loga: Exact, logb: Exact, a: np.longdouble) -> Exact:
    return np.logaddexp(loga + np.log(a), logb + np.log1p(-a))


def _js(x: Sides, beta: np.longdouble) -> Pair:
    logm = _log_mixture(x.logp, x.logq, beta)
    of_q = (1 - beta) * x.q * (x.logq - logm)
    return Pair(beta * x.p * (x.logp - logm) + of_q, of_q)


def _skew_kl(x: Sides, alpha: np.longdouble) -> Pair:
    logm = _log_mixture(x.logp, x.logq, alpha)
    return Pair(x.p * (x.logp - logm), -(1 - alpha) * x.p * np.exp(x.logq - logm))


def _skew_reverse_kl(x: Sides, alpha: np.longdouble) -> Pair:
    logm = _log_mixture(x.logq, x.logp, alpha)
    value = x.q * (x.logq - logm)
    return Pair(value, value + x.q * (1 - alpha * np.exp(x.logq - logm)))


def _tv(x: Sides, _: np.longdouble) -> Pair:
    gap, half = x.q - x.p, np.longdouble(0.5)
    return Pair(half * abs(gap), half * np.sign(gap) * x.q)


def _acceptance(x: Sides, _: np.longdouble) -> Pair:
    return Pair(np.minimum(x.p, x.q), np.where(x.q < x.p, x.q, 0))


PAIRS: dict[str, Callable[[Sides, np.longdouble], Pair]] = {
    "kl": _kl,
    "reverse_kl": _reverse_kl,
    "js": _js,
    "skew_kl": _skew_kl,
    "skew_reverse_kl": _skew_reverse_kl,
    "tv": _tv,
    "acceptance": _acceptance,
}


def truth(case: Case, student: Tensor, labels: Tensor | None, x: Sides) -> Truth:
    """The case's loss and gradient; `x` are the sides at the case's temperature."""
    rows = student.size(0)
    pair = PAIRS[case.divergence.name](x, np.longdouble(case.divergence.param))
    loss = pair.value.sum(-1)
    grad = pair.slope - x.q * pair.slope.sum(-1, keepdims=True)
    if case.divergence.name == "acceptance":  # a function of the sum, constant below 2^-100
        overlap = np.maximum(loss, np.longdouble(2.0) ** -100)
        grad *= np.where(loss < overlap, 0, -1 / overlap)[..., None]
        loss = -np.log(overlap)
    grad *= case.soft / np.longdouble(case.temperature)
    loss = loss * np.longdouble(case.soft)
    if case.alpha is not None and labels is not None:
        at = (np.arange(rows), labels.cpu().numpy())
        logq = _log_softmax(exact(student), 1.0)
        loss = loss - case.alpha * logq[at]
        hard = np.exp(logq)
        hard[at] -= 1
        grad += case.alpha * hard
    return Truth(loss.sum() / rows, grad / rows)


# ---- what a dtype can hold


def ulp(x: Any, dtype: torch.dtype) -> Any:
    """Unit in the last place of a number rounded to the dtype; for 0 the smallest number."""
    info = torch.finfo(dtype)
    _, exponent = np.frexp(x)  # |x| = m * 2^exponent, 1/2 <= m < 1
    _, of_eps = np.frexp(info.eps)
    _, of_tiny = np.frexp(info.tiny)
    exponent = np.where(x == 0, of_tiny, np.maximum(exponent, of_tiny))
    return np.ldexp(np.longdouble(1), exponent + of_eps - 2)


def rounded(x: Exact, dtype: torch.dtype) -> Exact:
    """x rounded once to the dtype, to nearest, ties to even; infinite beyond its range."""
    unit = ulp(x, dtype)
    once = np.rint(x / unit) * unit
    beyond = abs(once) > torch.finfo(dtype).max
    return np.where(beyond, np.copysign(np.longdouble(np.inf), x), once)
