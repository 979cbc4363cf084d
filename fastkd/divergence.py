"""The table of divergences: name, parameter and its range, torch formula, paper.

p is the teacher's distribution and q the student's, everywhere. A divergence is a sum over the
vocabulary of a pointwise value l(log p, log q), or a function of that sum (`of_sum`), whose
derivative is one more factor of the row's gradient; the slope is dl / d(log q). The formulas below
are the plain torch ones: the reference differentiates them, and the C++ (`csrc/divergence.h`) and
Triton (`fastkd/backends/gpu/divergence.py`) backends hold the same names with value and slope
written out.

A kernel's slope is *centred*: slope - centre * q, where `centre` is the slope per unit of q at
p = q. Because sum(q) = 1, the gradient ( g_j - q_j * sum g ) / T is the same for both, but the
centred one vanishes where p = q instead of cancelling there. Sums over a part of the vocabulary
add centre * q back.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from fastkd.arguments.messages import describe, shown
from fastkd.arguments.numbers import WAITS, real


@dataclass(frozen=True)
class Divergence:
    """One entry of the table; calling it sets its parameter, as in `divergences.js(beta=0.1)`.

    Args:
        name: the key under which every backend knows it.
        value: the pointwise torch formula of (log p, log q, parameter).
        source: author, year and arXiv id.
        parameter: name of its parameter (open range 0 to 1), or None if it has none.
        default: the parameter's default.
        centre: slope per unit of q where p = q, a function of the parameter.
        dual: (name, parameter) of the same divergence with p and q exchanged, or None: the
            teacher's gradient then comes from the reference.
        of_sum: the loss of a row as a torch formula of the sum of its values; None for the sum.
        expectation: "teacher" or "student" if the value is an expectation of log p - log q (its
            sign turned for the student), which lets a kernel finish the loss in its first loop.
        given: the parameter as set by a call; None for the default.
    """

    name: str
    value: Callable[[Tensor, Tensor, float], Tensor]
    source: str
    parameter: str | None = None
    default: float = 0.0
    centre: Callable[[float], float] = lambda parameter: 0.0
    dual: Callable[[float], tuple[str, float]] | None = None
    of_sum: Callable[[Tensor], Tensor] | None = None
    expectation: Literal["teacher", "student"] | None = None
    given: float | None = None

    def __call__(self, **parameters: float) -> Divergence:
        """Returns the same divergence with its parameter set.

        Raises:
            TypeError: a parameter that this divergence does not have.
            ValueError: a parameter that is not a number strictly between 0 and 1.
        """
        for name, value in parameters.items():
            if name != self.parameter:
                expected = f"{self.parameter!r}" if self.parameter else "none"
                raise TypeError(
                    f"divergence {self.name!r} got parameter {shown(name)}, takes {expected}"
                )
            return replace(self, given=self.validated(value))
        return self

    def validated(self, value: float) -> float:
        """The value as this divergence's parameter; raises as a call does."""
        expected = "expected a number strictly between 0 and 1"
        number = real(value)
        if number is None:
            raise TypeError(f"{self.parameter}: got {describe(value)}, {expected}{WAITS}")
        if not 0.0 < number < 1.0:
            raise ValueError(f"{self.parameter}: got {shown(value)}, {expected}")
        return float(number)

    def __reduce__(self) -> tuple[Any, ...]:
        """By name: the table's functions do not pickle, and a copy is the same entry."""
        return _from_table, (self.name, self.given)

    @property
    def param(self) -> float:
        """The parameter in force; 0.0 for a divergence without one."""
        return self.default if self.given is None else self.given

    def row_loss(self, sums: Tensor) -> Tensor:
        """The loss of rows from the sums of their values."""
        return sums if self.of_sum is None else self.of_sum(sums)

    def exchanged(self) -> Divergence | None:
        """The divergence D'(q, p) = D(p, q), or None if the table has none."""
        if self.dual is None:
            return None
        name, parameter = self.dual(self.param)
        return replace(divergences[name], given=parameter)


class Divergences:
    """The table: `divergences.js`, `divergences["js"]`, iteration over names."""

    def __init__(self, *entries: Divergence) -> None:
        self._entries = {entry.name: entry for entry in entries}
        self.__dict__.update(self._entries)

    def __getitem__(self, name: str) -> Divergence:
        try:
            return self._entries[name]
        except KeyError:
            raise ValueError(
                f"divergence: got {shown(name)}, expected one of {', '.join(self._entries)}"
            ) from None

    def entry(self, divergence: str | Divergence) -> Divergence:
        """The entry of a name, or an entry itself.

        Raises:
            TypeError, ValueError: neither of them, or a name that is not in the table.
        """
        if isinstance(divergence, str):
            return self[divergence]
        if not isinstance(divergence, Divergence):
            raise TypeError(
                f"divergence: got {describe(divergence)}, expected a name or an entry of "
                "fastkd.divergences"
            )
        return divergence

    def __getattr__(self, name: str) -> Divergence:
        if name.startswith("_"):  # looked up by copy and pickle before there are entries
            raise AttributeError(name)
        if name not in self._entries:
            raise AttributeError(f"no divergence {shown(name)}; there are {', '.join(self)}")
        return self._entries[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def __dir__(self) -> list[str]:
        return list(self._entries)


def _from_table(name: str, given: float | None) -> Divergence:
    return replace(divergences[name], given=given)


def _weighted(logw: Tensor, x: Tensor) -> Tensor:
    """w * x with 0 * anything = 0, in value and in gradient (both wheres are needed for that)."""
    w = logw.exp()
    zero = w == 0
    return torch.where(zero, 0.0, w * torch.where(zero, 0.0, x))


def _log_mixture(loga: Tensor, logb: Tensor, a: float) -> Tensor:
    """log(a * exp(loga) + (1 - a) * exp(logb))."""
    return torch.logaddexp(loga + math.log(a), logb + math.log1p(-a))


def _kl(logp: Tensor, logq: Tensor, _: float) -> Tensor:
    return _weighted(logp, logp - logq)


def _reverse_kl(logp: Tensor, logq: Tensor, _: float) -> Tensor:
    return _weighted(logq, logq - logp)


def _js(logp: Tensor, logq: Tensor, beta: float) -> Tensor:
    logm = _log_mixture(logp, logq, beta)
    return beta * _weighted(logp, logp - logm) + (1 - beta) * _weighted(logq, logq - logm)


def _skew_kl(logp: Tensor, logq: Tensor, alpha: float) -> Tensor:
    return _weighted(logp, logp - _log_mixture(logp, logq, alpha))


def _skew_reverse_kl(logp: Tensor, logq: Tensor, alpha: float) -> Tensor:
    return _weighted(logq, logq - _log_mixture(logq, logp, alpha))


def _tv(logp: Tensor, logq: Tensor, _: float) -> Tensor:
    gap = logp.exp() - logq.exp()
    # not abs(): its gradient at NaN is 0, while `gap`, in the last place here, is 0 or NaN
    sign = torch.where(gap > 0, 1.0, torch.where(gap < 0, -1.0, gap)).detach()
    return 0.5 * sign * gap


def _overlap(logp: Tensor, logq: Tensor, _: float) -> Tensor:
    p, q = logp.exp(), logq.exp()
    gap = (q - p).detach()
    # slopes 0 at ties, on either side; the last places are for NaN, as in `_tv`
    of_q = torch.where(gap < 0, 1.0, torch.where(gap >= 0, 0.0, gap))
    of_p = torch.where(gap > 0, 1.0, torch.where(gap <= 0, 0.0, gap))
    return of_q * q + of_p * p + torch.where(gap == 0, p, 0.0).detach()


# Below this an overlap of p and q is constant; above it the products of a gradient are no
# subnormal numbers in float32. The C++ and Triton functions have the same bounds.
LEAST_OVERLAP = 2.0**-100
# What rounding may take off an overlap of 1: 256 terms, one after the other, in both of the sums
# that it is made of. 2^-16 in float32.
_WHOLE = {torch.float64: 2.0**-40}


def _neg_log_overlap(overlap: Tensor) -> Tensor:
    loss = -torch.where(overlap < LEAST_OVERLAP, LEAST_OVERLAP, overlap).log()
    whole = overlap > 1.0 - _WHOLE.get(overlap.dtype, 2.0**-16)
    return torch.where(whole, loss - loss.detach(), loss)  # 0 with the gradient of the logarithm


divergences = Divergences(
    Divergence(
        "kl",
        _kl,
        "Hinton et al. 2015, arXiv 1503.02531",
        centre=lambda _: -1.0,
        dual=lambda _: ("reverse_kl", 0.0),
        expectation="teacher",
    ),
    Divergence(
        "reverse_kl",
        _reverse_kl,
        "Gu et al. 2023 (MiniLLM), arXiv 2306.08543",
        centre=lambda _: 1.0,
        dual=lambda _: ("kl", 0.0),
        expectation="student",
    ),
    Divergence(
        "js",
        _js,
        "Agarwal et al. 2023 (GKD), arXiv 2306.13649",
        parameter="beta",
        default=0.5,
        dual=lambda beta: ("js", 1.0 - beta),
    ),
    Divergence(
        "skew_kl",
        _skew_kl,
        "Ko et al. 2024 (DistiLLM), arXiv 2402.03898",
        parameter="alpha",
        default=0.1,
        centre=lambda alpha: alpha - 1.0,
        dual=lambda alpha: ("skew_reverse_kl", alpha),
    ),
    Divergence(
        "skew_reverse_kl",
        _skew_reverse_kl,
        "Ko et al. 2024 (DistiLLM), arXiv 2402.03898",
        parameter="alpha",
        default=0.1,
        centre=lambda alpha: 1.0 - alpha,
        dual=lambda alpha: ("skew_kl", alpha),
    ),
    Divergence(
        "tv",
        _tv,
        "Wen et al. 2023 (f-DISTILL), arXiv 2307.15190",
        dual=lambda _: ("tv", 0.0),
    ),
    Divergence(
        "acceptance",
        _overlap,
        "Leviathan et al. 2023, arXiv 2211.17192; DistillSpec, arXiv 2310.08461",
        dual=lambda _: ("acceptance", 0.0),
        of_sum=_neg_log_overlap,
    ),
)
