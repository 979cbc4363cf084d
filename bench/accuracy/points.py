"""A point: one case, dtype, distribution, temperature and vocabulary; everyone's errors there."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bench.accuracy.errors import FLOOR, Errors, above, compare, target
from bench.accuracy.inputs import Batch, batches
from bench.accuracy.oracle import Sides, exact, sides, truth
from bench.cases import Case
from bench.providers import PROVIDERS, Provider, Unavailable, eager, first_line

# What ours is held against, and may not be worse than.
TORCH = ("eager", "compile")
DEFAULT_PROVIDERS = (*TORCH, "fastkd")
QUICK_PROVIDERS = ("eager", "fastkd")

Run = Callable[[Tensor, Tensor, Tensor, float], Tensor]  # student, teacher, labels, T


@dataclass
class Point:
    """Everyone's errors by provider; `notes` says why one has none."""

    case: str
    dtype: torch.dtype
    distribution: str
    temperature: float
    vocab: int
    rows: int
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
        for name, mine in self.found.items():
            if not PROVIDERS[name].ours:
                continue
            for torchs in TORCH:
                its = self.found.get(torchs)
                if its is None:
                    continue
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
        if provider.name != "compile":

            def run(s: Tensor, t: Tensor, labels: Tensor, temperature: float) -> Tensor:
                return provider.build(case.at(temperature), self.device)(s, t, labels)

            return run
        if case.name not in self._compiled:

            def plain(s: Tensor, t: Tensor, labels: Tensor, temperature: float) -> Tensor:
                return eager(case.at(temperature), self.device)(s, t, labels)

            self._compiled[case.name] = torch.compile(plain, dynamic=True, fullgraph=True)
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
        for case in cases:
            yield _point(case.at(temperature), dtype, distribution, given, parts, whole, runs)


def _point(
    case: Case,
    dtype: torch.dtype,
    distribution: str,
    given: Sequence[Batch],
    parts: Sequence[Sides],
    whole: Sides,
    runs: Runs,
) -> Point:
    truths = [
        truth(case, batch.student, batch.labels, part)
        for batch, part in zip(given, parts, strict=True)
    ]
    true = target(case, dtype, truths, whole)
    rows, vocab = true.grad.shape
    point = Point(
        case.name,
        dtype,
        distribution,
        case.temperature,
        vocab,
        rows,
        float(truths[0].loss),
        int(true.counted.sum()),
        true.grad.size,
    )
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
    return point


def _run(run: Run, batch: Batch, temperature: float) -> tuple[Any, Any]:
    student = batch.student.clone().requires_grad_()
    loss = run(student, batch.teacher, batch.labels, temperature)
    (grad,) = torch.autograd.grad(loss, student)
    if grad.dtype != student.dtype:
        raise TypeError(f"gradient in {grad.dtype}, expected {student.dtype}")
    return exact(loss), exact(grad)
