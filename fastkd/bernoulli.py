"""Divergences of two Bernoulli distributions, by their logits: value and slopes in plain torch.

p = sigmoid(a) is the teacher's probability, q = sigmoid(b) the student's, of one logit each. A
divergence is the sum of two outcomes, yes and no. It does not change where both logits change their
sign: the KL negates both where their sum is positive, so that p and q are the smaller
probabilities, whose difference is exact where that of numbers close to 1 is rounded to 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastkd.arguments.messages import describe, shown
from fastkd.divergence import Divergence, divergences

# the value, and its slopes in a and in b: what is not called is not computed
Parts = tuple[Callable[[], Tensor], Callable[[], tuple[Tensor, Tensor]]]
Formula = Callable[[Tensor, Tensor, float], Parts]


class _Side(NamedTuple):
    """Probabilities of yes and no, and their logarithms."""

    yes: Tensor
    no: Tensor
    log_yes: Tensor
    log_no: Tensor


def _side(x: Tensor) -> _Side:
    return _Side(x.sigmoid(), (-x).sigmoid(), F.logsigmoid(x), F.logsigmoid(-x))


def _times(p: Tensor, x: Tensor) -> Tensor:
    """p * x with 0 * anything = 0."""
    zero = p == 0
    return torch.where(zero, 0.0, p * torch.where(zero, 0.0, x))


def _softplus(x: Tensor) -> Tensor:
    """log(1 + e^x)."""
    return F.softplus(x, threshold=50.0)  # beyond it the two are the same number in float64, too


def _kl(a: Tensor, b: Tensor, _: float) -> Parts:
    # p log(p / q) + (1 - p) log((1 - p) / (1 - q)), of which 0 is left where a = b, exactly
    sign = torch.where((a + b > 0) | (a == math.inf), -1.0, 1.0).to(a.dtype)
    a, b = sign * a, sign * b
    p = a.sigmoid()
    gap = torch.where(p == 0, 0.0, a - b)
    return (
        lambda: torch.addcmul(_softplus(b) - _softplus(a), p, gap),
        lambda: (sign * (p * (-a).sigmoid() * gap), sign * (b.sigmoid() - p)),
    )


def _reverse_kl(a: Tensor, b: Tensor, _: float) -> Parts:
    value, slopes = _kl(b, a, _)
    return value, lambda: slopes()[::-1]


def _js(a: Tensor, b: Tensor, beta: float) -> Parts:
    p, q = _side(a), _side(b)
    own, other = math.log(beta), math.log1p(-beta)
    log_yes, log_no = (
        torch.logaddexp(x + own, y + other)
        for x, y in ((p.log_yes, q.log_yes), (p.log_no, q.log_no))
    )
    of_p = p.log_yes - log_yes, p.log_no - log_no
    of_q = q.log_yes - log_yes, q.log_no - log_no

    def value() -> Tensor:
        of_teacher = _times(p.yes, of_p[0]) + _times(p.no, of_p[1])
        return beta * of_teacher + (1 - beta) * (_times(q.yes, of_q[0]) + _times(q.no, of_q[1]))

    def slopes() -> tuple[Tensor, Tensor]:
        # what the mixture's own change adds is 0
        slope_a = beta * _times(p.yes * p.no, of_p[0] - of_p[1])
        return slope_a, (1 - beta) * _times(q.yes * q.no, of_q[0] - of_q[1])

    return value, slopes


FORMULAS: dict[str, Formula] = {"kl": _kl, "reverse_kl": _reverse_kl, "js": _js}


def entry(divergence: str | Divergence) -> Divergence:
    """The table's entry; TypeError, ValueError for one that has no formula here."""
    found = divergences.entry(divergence)
    if found.name not in FORMULAS:
        raise ValueError(
            f"divergence: got {shown(found.name)}, expected one of {', '.join(FORMULAS)} for one "
            "logit a class"
        )
    return found


class Bernoulli(NamedTuple):
    """What is computed of a logit.

        hard * BCE(y, s) + soft * D(sigmoid(t / T), sigmoid(s / T))

    BCE(y, s) = -(pos_weight y log sigmoid(s) + (1 - y) log sigmoid(-s)).
    """

    divergence: Divergence
    temperature: float
    soft: float
    hard: float

    def __call__(
        self, s: Tensor, t: Tensor | None, y: Tensor | None, pos_weight: Tensor | None, slopes: bool
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """The value, or else the slopes in s and t, of operands in the accumulation's dtype."""
        value: Tensor | float = 0.0
        slope_s, slope_t = None, None
        if self.soft:
            assert t is not None
            a, b = t / self.temperature, s / self.temperature
            formula = FORMULAS[self.divergence.name]
            of_value, of_slopes = formula(a, b, self.divergence.param)
            if slopes:
                by = self.soft / self.temperature
                slope_t, slope_s = (by * x for x in of_slopes())
            else:
                value = of_value() if self.soft == 1.0 else self.soft * of_value()
        if self.hard:
            assert y is not None
            yes = y if pos_weight is None else y * pos_weight
            if slopes:
                slope = self.hard * ((1 - y) * s.sigmoid() - yes * (-s).sigmoid())
                slope_s = slope if slope_s is None else slope_s + slope
            else:
                low = _softplus(-s.abs())  # the part of both logarithms that is the same
                far = _times(yes, F.relu(-s)) + _times(1 - y, F.relu(s))
                value = value + self.hard * torch.addcmul(far, yes + (1 - y), low)
        return torch.zeros_like(s) if isinstance(value, float) else value, slope_s, slope_t


class ElementFactor(NamedTuple):
    """A factor of logits one by one: that of number i is data[(i // repeat) % len(data)]."""

    data: Tensor
    repeat: int


class Flat(NamedTuple):
    """Operands of a loss of one logit each, [n] without gaps, in one order.

    Args:
        student, teacher: of any float dtypes; no teacher where there is no soft term.
        labels: floats or integers; None for none.
        ignored: labels of what is left out; NaN is, too.
        weight, pos_weight: factors in acc.
        acc: float32 or float64.
    """

    student: Tensor
    teacher: Tensor | None
    labels: Tensor | None
    ignored: tuple[int, ...]
    weight: ElementFactor | None
    pos_weight: ElementFactor | None
    acc: torch.dtype


def describe_logits(name: str, x: object) -> str:
    """What a message says of an operand that is none."""
    return f"{name}: got {describe(x)}, expected a tensor of logits, one for each yes or no"
