"""Errors against the truth, what may be called worse, and which gradients are correctly rounded.

The error of a loss is relative to the larger of the true loss and one nat, divided by T^2 where
T > 1 (the factor that distillation multiplies by) and weighed as the case weighs its terms.

The error of a gradient is relative to the largest true gradient of its row. A row whose gradients
all lie below the last place of the terms that they are differences of (two softmaxes that agree)
is measured by that last place.

Where a loss has a kink (tv at p = q), a column within a few last places of it has two right
gradients, and is left out.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from bench.accuracy.oracle import Exact, Sides, Truth, rounded, ulp
from bench.cases import Case

# THE FLOOR, in units in the last place of the result's own dtype: an error of half of one is the
# rounding of the result itself, and whoever has no more cannot be called worse than another.
FLOOR = 0.5
# Further floors that violations are counted at, for their size.
FLOORS = (FLOOR, 1.0, 2.0, 4.0, 8.0, 64.0)

# What the correctly rounded gradients are to reach, of all elements of a case.
SHARE = {torch.bfloat16: 0.999}

# Last places of log p and log q within which a kink is undecided: as many as the tests allow a
# float32 for its exponential, logarithm and sum.
KINK = 16
KINKED = {"tv"}


def accumulation(dtype: torch.dtype) -> torch.dtype:
    """The dtype that fastkd computes in, and that its loss comes in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


class Target(NamedTuple):
    """The truth of a point, made ready: rows of all batches below one another."""

    loss: Exact  # [batches]
    scale: Exact  # [batches], what the error of a loss is relative to
    grad: Exact  # [rows, V]
    unit: Exact  # [rows, 1], what the error of a gradient is relative to
    decided: NDArray[np.bool_]  # [rows, V], False at a kink
    rounded: Exact  # the gradient rounded once to the dtype
    counted: NDArray[np.bool_]  # [rows, V], where being rounded correctly is no triviality
    loss_place: Exact  # [batches], [rows, 1]: the last place of `scale` and of `unit`
    grad_place: Exact


class Errors(NamedTuple):
    """One provider's errors at a point; a result that is not finite has an infinite error."""

    loss: float  # the worst batch's
    loss_mean: float
    loss_ulp: float  # the worst, in last places of what it is relative to, in the result's dtype
    grad: float  # the worst element's
    grad_mean: float
    grad_ulp: float
    right: int  # counted elements that are the correctly rounded ones
    right_of_all: int


def target(case: Case, dtype: torch.dtype, truths: Sequence[Truth], x: Sides) -> Target:
    """What a point's results are held against; `x` are the sides of all rows."""
    acc = accumulation(dtype)
    eps = np.longdouble(torch.finfo(acc).eps)
    hard = case.alpha or 0.0
    nat = hard + case.soft * min(1.0, case.temperature**-2)
    loss = np.stack([true.loss for true in truths])
    scale = np.maximum(abs(loss), nat)
    grad = np.concatenate([true.grad for true in truths])
    rows = len(truths[0].grad)
    terms = (hard + case.soft / case.temperature) / rows  # where a probability is 1
    unit = np.maximum(abs(grad).max(-1, keepdims=True), eps * terms)
    decided = np.ones(grad.shape, dtype=bool)
    if case.divergence.name in KINKED:
        decided = abs(x.logp - x.logq) > KINK * eps
    once = rounded(grad, dtype)
    # not counted: what is rounded to 0 or to a subnormal, where any noise will do, and what is lost
    # in float32 beside the largest gradient of the row as soon as the row is summed with weights
    large = abs(grad) >= torch.finfo(torch.float32).eps * unit
    counted = (abs(once) >= torch.finfo(dtype).tiny) & np.isfinite(once) & large & decided
    return Target(
        loss,
        scale,
        grad,
        unit,
        decided,
        once,
        counted,
        ulp(scale, acc),
        ulp(unit, dtype),
    )


def compare(losses: Sequence[Exact], grads: Sequence[Exact], true: Target) -> Errors:
    """A provider's errors; losses and gradients [rows, V] of the batches, in their order."""
    loss = _lost(abs(np.stack(losses) - true.loss))
    got = np.concatenate(grads)
    if got.shape != true.grad.shape:
        raise ValueError(f"gradient: got shape {got.shape}, expected {true.grad.shape}")
    right = got == true.rounded
    grad = _lost(abs(got - true.grad))
    # beyond the dtype's range infinity is what there is to get
    grad[right & np.isinf(true.rounded) | ~true.decided] = 0
    worst = grad.max(-1, keepdims=True)
    return Errors(
        float((loss / true.scale).max()),
        float((loss / true.scale).mean()),
        float((loss / true.loss_place).max()),
        float((worst / true.unit).max()),
        float((grad.mean(-1, keepdims=True) / true.unit).mean()),
        float((worst / true.grad_place).max()),
        int((right & true.counted).sum()),
        int((right | ~true.decided).sum()),
    )


def _lost(error: Exact) -> Exact:
    """NaN as the infinite error that it is."""
    return np.where(np.isnan(error), np.inf, error)


def above(ours: float, its: float, floor: float = FLOOR) -> bool:
    """Whether an error in last places is larger than another one and than the floor, or is lost."""
    return (math.isinf(ours) and not math.isinf(its)) or ours > max(its, floor)
