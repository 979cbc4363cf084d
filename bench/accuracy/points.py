"""A point: one case, dtype, distribution, temperature and vocabulary; everyone's errors there.

The error of a loss is relative to the larger of the true loss and one nat, divided by T^2 where
T > 1 (the factor that distillation multiplies by) and weighed as the case weighs its terms.

The error of a gradient is relative to the largest true gradient of its row. A row whose gradients
all lie below the last place of the terms that they are differences of (two softmaxes that agree)
is measured by that last place.

Where a loss has a kink (tv at p = q), a column within a few last places of it has two right
gradients, and is left out; so are the columns of its row that move with it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from bench.accuracy.oracle import Exact, Sides, Truth, exact, rounded, sides, truth, ulp
from bench.families.loss_cases import KINKED, Case
from bench.families.loss_providers import PROVIDERS, Provider, eager
from bench.harness.gate import Unavailable, first_line

# THE FLOOR, in units in the last place of the result's own dtype: an error of half of one is the
# rounding of the result itself, and whoever has no more cannot be called worse than another.
FLOOR = 0.5
# What the correctly rounded gradients are to reach, of all elements of a case.
SHARE = {torch.bfloat16: 0.999}
# Last places of log p and log q within which a kink is undecided: as many as the tests allow a
# float32 for its exponential, logarithm and sum.
KINK = 16
# What ours is held against, and may not be worse than.
TORCH = ("eager", "compile")


# ---- inputs


def _normal(n: int, v: int, generator: torch.Generator) -> Tensor:
    return 3 * torch.randn((2, n, v), generator=generator, dtype=torch.float64)


def _peaked(n: int, v: int, generator: torch.Generator) -> Tensor:
    """Nearly all mass on one column: the same one on both sides in even rows, another in odd."""
    x, row = _normal(n, v, generator), torch.arange(n)
    x[0, row, row % v] += 40
    x[1, row, (row + row % 2) % v] += 40
    return x


def _one_hot(n: int, v: int, generator: torch.Generator) -> Tensor:
    """A teacher sure of one column. Not by -inf, of which plain torch's JS and skew make NaN."""
    x = _normal(n, v, generator)
    x[1] = 1e4 * (F.one_hot(torch.arange(n) % v, v).double() - 1)
    return x


def _ties(n: int, v: int, generator: torch.Generator) -> Tensor:
    """Five different values, each many times."""
    return torch.randint(-2, 3, (2, n, v), generator=generator).double()


def _wide(n: int, v: int, generator: torch.Generator) -> Tensor:
    return 2e4 * torch.rand((2, n, v), generator=generator, dtype=torch.float64) - 1e4


DISTRIBUTIONS: dict[str, Callable[[int, int, torch.Generator], Tensor]] = {
    "normal": _normal,
    "peaked": _peaked,
    "one-hot": _one_hot,
    "ties": _ties,
    "wide": _wide,
}


class Batch(NamedTuple):
    """Logits [N, V] and labels [N]: one call's input."""

    student: Tensor
    teacher: Tensor
    labels: Tensor


def batches(distribution: str, vocab: int, dtype: torch.dtype, device: torch.device) -> list[Batch]:
    """The inputs at one vocabulary; the same numbers for every dtype, before they are rounded.

    Several batches: one loss may be right by luck, the worst of several is not. At least two rows
    in each, so that the mean is exercised and one dynamic shape serves torch.compile.
    """
    count, rows = (8, 4) if vocab <= 5000 else (4, 2) if vocab <= 50_000 else (1, 2)
    generator = torch.Generator().manual_seed(vocab)
    student, teacher = DISTRIBUTIONS[distribution](count * rows, vocab, generator).to(dtype)
    labels = torch.randint(0, vocab, (count * rows,), generator=generator)
    parts = [x.to(device).split(rows) for x in (student, teacher, labels)]
    return [Batch(*part) for part in zip(*parts, strict=True)]


# ---- errors


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
    """One provider's worst errors at a point; a result that is not finite has an infinite error."""

    loss: float
    loss_ulp: float  # in last places of what it is relative to, in the result's dtype
    grad: float
    grad_ulp: float
    right: int  # counted elements that are the correctly rounded ones


def target(case: Case, dtype: torch.dtype, truths: Sequence[Truth], x: Sides) -> Target:
    """What a point's results are held against; `x` are the sides of all rows."""
    acc = torch.float64 if dtype == torch.float64 else torch.float32
    eps = np.longdouble(torch.finfo(acc).eps)
    hard = case.alpha or 0.0
    nat = hard + case.soft * min(1.0, case.temperature**-2)
    loss = np.stack([true.loss for true in truths])
    scale = np.maximum(abs(loss), nat)
    grad = np.concatenate([true.grad for true in truths])
    terms = (hard + case.soft / case.temperature) / len(truths[0].grad)  # at a probability of 1
    unit = np.maximum(abs(grad).max(-1, keepdims=True), eps * terms)
    decided = np.ones(grad.shape, dtype=bool)
    if case.divergence.name in KINKED:
        kink = abs(x.logp - x.logq) <= KINK * eps
        # its slope jumps by 1, and with the row's mean slope every gradient of the row moves
        jump = case.soft / case.temperature / len(truths[0].grad) * x.q
        if case.divergence.name == "acceptance":
            jump /= np.minimum(x.p, x.q).sum(-1, keepdims=True)
        moved = jump * (x.q * kink).sum(-1, keepdims=True)
        decided = ~kink & (moved <= FLOOR * ulp(unit, dtype))
    once = rounded(grad, dtype)
    # not counted: what is rounded to 0 or to a subnormal, where any noise will do, and what is lost
    # in float32 beside the largest gradient of the row as soon as the row is summed with weights
    large = abs(grad) >= torch.finfo(torch.float32).eps * unit
    counted = (abs(once) >= torch.finfo(dtype).tiny) & np.isfinite(once) & large & decided
    places = ulp(scale, acc), ulp(unit, dtype)
    return Target(loss, scale, grad, unit, decided, once, counted, *places)


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
        float((loss / true.loss_place).max()),
        float((worst / true.unit).max()),
        float((worst / true.grad_place).max()),
        int((right & true.counted).sum()),
    )


def _lost(error: Exact) -> Exact:
    """NaN as the infinite error that it is."""
    return np.where(np.isnan(error), np.inf, error)


def above(ours: float, its: float, floor: float = FLOOR) -> bool:
    """Whether an error in last places is larger than another one and than the floor, or is lost."""
    return (math.isinf(ours) and not math.isinf(its)) or ours > max(its, floor)


# ---- points


@dataclass
class Point:
    """Everyone's errors by provider; `notes` says why one has none."""

    case: str
    dtype: torch.dtype
    distribution: str
    temperature: float
    vocab: int
    loss: float  # the true one of the first batch
    counted: int  # elements of the gradient that being rounded correctly is counted for
    elements: int
    found: dict[str, Errors] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)

    @property
    def where(self) -> str:
        return f"{self.distribution}, V {self.vocab}, T {self.temperature:g}"

    def violations(self, floor: float = FLOOR) -> Iterator[Violation]:
        """Where one of ours has a larger error than a torch."""
        pairs = [(a, b) for a in self.found if PROVIDERS[a].ours for b in TORCH if b in self.found]
        for name, torchs in pairs:
            mine, its = self.found[name], self.found[torchs]
            for of, x, y in (
                ("gradient", mine.grad_ulp, its.grad_ulp),
                ("loss", mine.loss_ulp, its.loss_ulp),
            ):
                if above(x, y, floor):
                    yield Violation(self, name, torchs, of, x, y)


@dataclass(frozen=True)
class Violation:
    """`ours` is above `torch` in `of` (loss or gradient), in last places of the result."""

    point: Point
    ours: str
    torch: str
    of: str
    error: float
    allowed: float

    @property
    def ratio(self) -> float:
        """How far above what was allowed."""
        return self.error / max(self.allowed, FLOOR)


Run = Callable[[Tensor, Tensor, Tensor, float], Tensor]  # student, teacher, labels, T


class Runs:
    """The providers' calls, those of torch.compile compiled once for all shapes and temperatures.

    In a run of `python -m bench` a compiled function has its shape and temperature fixed. Here
    both are its arguments, so that a point takes milliseconds and not ten seconds: the arithmetic
    of the generated loops is the same, and the temperature is a number it divides by.
    """

    def __init__(self, names: Sequence[str], device: torch.device) -> None:
        self.names, self.device = names, device
        self._compiled: dict[str, Run] = {}

    def __call__(self, provider: Provider, case: Case) -> Run:
        build = eager if provider.name == "compile" else provider.build

        def run(s: Tensor, t: Tensor, labels: Tensor, temperature: float) -> Tensor:
            return build(case.at(temperature), self.device)(s, t, labels)

        if provider.name != "compile":
            return run
        if case.name not in self._compiled:
            self._compiled[case.name] = torch.compile(run, dynamic=True, fullgraph=True)
        return self._compiled[case.name]


def points(
    cases: Sequence[Case],
    dtype: torch.dtype,
    distribution: str,
    temperatures: Sequence[float],
    vocab: int,
    runs: Runs,
) -> Iterator[Point]:
    """All cases at all temperatures on the same inputs, whose softmaxes are made once for all."""
    given = batches(distribution, vocab, dtype, runs.device)
    for temperature in temperatures:
        parts = [sides(x.student, x.teacher, temperature) for x in given]
        whole = Sides(*(np.concatenate(side) for side in zip(*parts, strict=True)))
        for case in (case.at(temperature) for case in cases):
            truths = [
                truth(case, batch.student, batch.labels, part)
                for batch, part in zip(given, parts, strict=True)
            ]
            true = target(case, dtype, truths, whole)
            figures = (float(truths[0].loss), int(true.counted.sum()), true.grad.size)
            point = Point(case.name, dtype, distribution, temperature, vocab, *figures)
            _judge(point, case, given, true, runs)
            yield point


def _judge(point: Point, case: Case, given: Sequence[Batch], true: Target, runs: Runs) -> None:
    """Adds everyone's errors, or why one has none."""
    for name in runs.names:
        try:
            run = runs(PROVIDERS[name], case)
            got = [_run(run, batch, case.temperature) for batch in given]
        except Unavailable as reason:
            point.notes[name] = str(reason)
        except Exception as error:  # whatever a provider raises is its result
            point.notes[name] = first_line(error)
        else:
            point.found[name] = compare([loss for loss, _ in got], [grad for _, grad in got], true)


def _run(run: Run, batch: Batch, temperature: float) -> tuple[Any, Any]:
    student = batch.student.clone().requires_grad_()
    loss = run(student, batch.teacher, batch.labels, temperature)
    (grad,) = torch.autograd.grad(loss, student)
    if grad.dtype != student.dtype:
        raise TypeError(f"gradient in {grad.dtype}, expected {student.dtype}")
    return exact(loss), exact(grad)
