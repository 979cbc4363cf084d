"""The gradient as training code makes it: with a factor behind the loss, rounded once.

For each operand, dtype, divergence, reduction and factor (those of loss scalers, of accumulation
and of a schedule): the error of the gradient in the norm of all its elements, beside the error of
rounding the true gradient once. Measured is the third step, whose factor forward knew, and the
first, which computes its gradient anew; their bits must agree.

Where a linear head's products run in 16 bits, its operands' gradients are products of what was
rounded, whoever computes the loss between: there the bar is plain torch's error, written with the
same products.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import fastkd
from bench.families.loss_cases import KINKED, Case
from bench.families.loss_providers import eager
from bench.harness.family import spelled
from bench.harness.table import table
from fastkd.backends.products import multiplied_in

FACTORS = (2.0**-10, 0.3, 1.0, 2.0**16, 2.0**20)
REDUCTIONS = ("mean", "batchmean", "sum", "none")
OPERANDS = ("dense", "topk", "linear")
BAR = 1.1  # times the error of one rounding
STEPS = 3  # a new factor is met, met again, and known
TEMPERATURE = 2.0
ROWS, VOCAB, HIDDEN, K = 16, 1024, 32, 32


@dataclass(frozen=True)
class Rounding:
    """One kind of step; errors in units of one rounding's. eager: plain torch's, of products."""

    operand: str
    dtype: torch.dtype
    case: str
    reduction: str
    factor: float
    error: float
    eager: float | None
    repeats: bool  # the first step's bits are the third's

    @property
    def holds(self) -> bool:
        lost = self.eager is not None and not math.isfinite(self.eager)
        return self.repeats and (lost or self.error <= BAR * max(1.0, self.eager or 0.0))


def roundings(
    cases: Sequence[Case],
    dtypes: Sequence[torch.dtype],
    factors: Sequence[float],
    device: torch.device,
) -> Iterator[Rounding]:
    """All combinations; the 16-bit dtypes only, where a rounding can be seen."""
    for dtype in (x for x in dtypes if x.itemsize == 2):
        for operand in OPERANDS:
            leaves, teacher, labels = _operands(operand, dtype, device)
            for case in (case.at(TEMPERATURE) for case in cases):
                if operand == "linear" and case.divergence.name in KINKED:
                    continue  # a rounded logit decides which side of the kink is the right one
                for reduction in REDUCTIONS:
                    step = _Step(case, reduction, operand, teacher, labels)
                    for factor in factors:
                        if found := _rounding(step, leaves, dtype, factor):
                            yield found


def _operands(operand: str, dtype: torch.dtype, device: torch.device) -> tuple[Any, Any, Tensor]:
    """The student's leaves, the teacher and labels; logits of standard deviation 3."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        x = torch.randn(shape, generator=generator, dtype=torch.float64)
        return x.to(device=device, dtype=dtype)

    teacher: Any = 3 * normal(ROWS, VOCAB)
    leaves = [3 * normal(ROWS, VOCAB)]
    if operand == "topk":
        teacher = fastkd.topk_from_logits(teacher.float(), K, temperature=TEMPERATURE)
    elif operand == "linear":
        leaves = [normal(ROWS, HIDDEN), normal(VOCAB, HIDDEN) * 3 / HIDDEN**0.5]
    labels = torch.randint(0, VOCAB, (ROWS,), generator=generator).to(device)
    return leaves, teacher, labels


class _Step:
    """One loss as it is written, down to the leaves' gradients."""

    def __init__(
        self, case: Case, reduction: str, operand: str, teacher: Any, labels: Tensor
    ) -> None:
        self.case, self.reduction, self.linear = case, reduction, operand == "linear"
        self.teacher, self.labels = teacher, labels if case.alpha is not None else None

    def __call__(self, leaves: Sequence[Tensor], factor: float, how: str = "") -> list[Tensor]:
        """how: "true" in float64 by the definitions, "eager" in plain torch, else fastkd."""
        dtype = torch.float64 if how == "true" else leaves[0].dtype
        own = [x.to(dtype).clone().requires_grad_() for x in leaves]
        teacher = self.teacher
        if isinstance(teacher, Tensor):
            teacher = teacher.to(dtype)
        if how == "eager":
            call = eager(self.case, own[0].device)
            loss = call(F.linear(*own), teacher, self.labels)
        else:
            loss = self._fastkd(own, teacher, "reference" if how else None)
        if loss.dim():  # rows whose factors differ, as a user's own mask makes them
            loss = (loss * torch.linspace(0.5, 1.5, len(loss), dtype=loss.dtype)).mean()
        return list(torch.autograd.grad(loss * factor, own))

    def _fastkd(self, own: Sequence[Tensor], teacher: Any, backend: str | None) -> Tensor:
        student: Any = fastkd.LinearLogits(*own) if self.linear else own[0]
        operands = (student, teacher) if self.labels is None else (student, teacher, self.labels)
        options = {**self.case.options, "reduction": self.reduction}
        if backend is None:
            return self.case.function(*operands, **options)
        with fastkd.use_backend(backend):
            return self.case.function(*operands, **options)


def _rounding(
    step: _Step, leaves: Sequence[Tensor], dtype: torch.dtype, factor: float
) -> Rounding | None:
    """None where the dtype's range does not hold the gradient, or holds nothing of it."""
    true = step(leaves, factor, "true")
    once = [x.to(dtype) for x in true]
    if not all(bool(x.isfinite().all()) and bool(x.any()) for x in once):
        return None
    runs = [step(leaves, factor) for _ in range(STEPS)]
    repeats = all(torch.equal(a, b) for a, b in zip(runs[0], runs[-1], strict=True))
    of_eager = None
    if step.linear and multiplied_in(dtype, leaves[0].device) == dtype:
        if step.reduction not in ("mean", "batchmean"):  # plain torch's loss is a mean over rows
            return None
        of_eager = _worst(step(leaves, factor, "eager"), once, true)
    at = (dtype, step.case.name, step.reduction, factor)
    operand = "linear" if step.linear else "dense" if isinstance(step.teacher, Tensor) else "topk"
    return Rounding(operand, *at, _worst(runs[-1], once, true), of_eager, repeats)


def _worst(got: Sequence[Tensor], once: Sequence[Tensor], true: Sequence[Tensor]) -> float:
    """The largest error of the leaves' gradients, as a multiple of one rounding's."""
    errors = []
    for a, b, c in zip(got, once, true, strict=True):
        least = float((b.double() - c).norm()) or float(c.norm()) * torch.finfo(b.dtype).eps
        error = float((a.double() - c).norm()) / least
        errors.append(math.inf if math.isnan(error) else error)
    return max(errors)


def markdown(found: Sequence[Rounding]) -> str:
    """The worst of each dtype, operand and case over reductions and factors."""
    groups: dict[tuple[torch.dtype, str, str], list[Rounding]] = {}
    for one in found:
        groups.setdefault((one.dtype, one.operand, one.case), []).append(one)
    rows = []
    for (dtype, operand, case), ones in groups.items():
        worst = max(ones, key=lambda one: one.error)
        row = {"dtype": spelled(dtype), "operand": operand, "case": case}
        row |= {"steps": str(len(ones)), "error": f"{worst.error:.3f}"}
        row["at"] = f"{worst.reduction} x {worst.factor:g}"
        if worst.eager is not None:
            row["eager"] = f"{worst.eager:.3f}"
        row["same bits"] = "yes" if all(one.repeats for one in ones) else "NO"
        rows.append(row)
    missed = [one for one in found if not one.holds]
    text = f"{len(found) - len(missed)} of {len(found)} steps within {BAR} times one rounding"
    text += " (a linear head's products in 16 bits: plain torch's error, where that is larger)."
    lines = ["### gradients behind a factor", "", *table(rows, ("dtype", "operand", "case", "at"))]
    return "\n".join([*lines, "", text, ""])


def as_json(found: Sequence[Rounding]) -> list[dict[str, Any]]:
    """A record a step; JSON has no infinity, so that becomes a word."""
    records = []
    for one in found:
        record = {**vars(one), "dtype": spelled(one.dtype), "holds": one.holds}
        for name in ("error", "eager"):
            if record[name] is not None and not math.isfinite(record[name]):
                record[name] = str(record[name])
        records.append(record)
    return records
