"""The correctness gate: no number is printed for a provider that is wrong on that very input.

error(provider) <= 2 * error(plain torch in the same dtype) + a floor per dtype, both errors against
float64; for the loss relative to max(1, |loss|), for the gradient relative to its largest element.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

# Room for rounding where plain torch happens to be exact. float32: a few units in the last place
# of the largest element; half types: one rounding of the gradient, and of plain torch's loss.
FLOORS = {torch.float32: 1e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}

# Elements of float64 at a time: the truth is made in chunks of rows, so that checking needs less
# memory than plain torch itself.
CHUNK = 2**24


class Unavailable(Exception):
    """A provider cannot run this case here; the message says why."""


class Wrong(Exception):
    """A provider's result is out of bounds; the message says by how much."""

    def __init__(
        self, note: str, errors: Errors | None = None, bound: Errors | None = None
    ) -> None:
        super().__init__(note)
        self.errors, self.bound = errors, bound


class Truth(NamedTuple):
    """Loss and gradient [N, V] in float64."""

    loss: float
    grad: Tensor


class Errors(NamedTuple):
    """Of the loss relative to max(1, |loss|), of the gradient relative to its largest element."""

    loss: float
    grad: float

    def within(self, bound: Errors) -> bool:
        """False for NaN too."""
        return self.loss <= bound.loss and self.grad <= bound.grad


def check(found: Errors, allowed: Errors) -> None:
    """Lets a provider through.

    Raises:
        Wrong: an error is above what is allowed.
    """
    if not found.within(allowed):
        raise Wrong(
            f"error of the loss {found.loss:.2e} (allowed {allowed.loss:.2e}), "
            f"of the gradient {found.grad:.2e} (allowed {allowed.grad:.2e})",
            *(found, allowed),
        )


def _chunks(rows: int, vocab: int) -> list[slice]:
    step = max(1, CHUNK // max(vocab, 1))
    return [slice(start, min(start + step, rows)) for start in range(0, rows, step)]


def truth(case: Any, inputs: Any) -> Truth:
    """A case of the losses in float64 by the table's formula, a chunk of rows at a time."""
    rows, vocab = inputs.student.shape
    grad = torch.empty_like(inputs.student, dtype=torch.float64)
    total = 0.0
    for chunk in _chunks(rows, vocab):
        student = inputs.student[chunk].double().requires_grad_()
        teacher = inputs.teacher[chunk]
        if isinstance(teacher, Tensor):
            teacher = teacher.double()
        logp, logq = case.outcomes(student, teacher)
        values = case.divergence.value(logp, logq, case.divergence.param).sum(-1)
        loss = case.soft * case.divergence.row_loss(values).sum()
        if case.alpha is not None and inputs.labels is not None:
            hard = F.cross_entropy(student, inputs.labels[chunk], reduction="sum")
            loss = loss + case.alpha * hard
        loss = loss / rows
        (grad[chunk],) = torch.autograd.grad(loss, student)
        total += loss.item()
    return Truth(total, grad)


def errors(loss: Tensor, grad: Tensor, true: Truth) -> Errors:
    """How far a provider's loss and gradient are from the truth.

    Raises:
        ValueError: a gradient of another shape.
    """
    if grad.shape != true.grad.shape:
        got, expected = tuple(grad.shape), tuple(true.grad.shape)
        raise ValueError(f"gradient: got shape {got}, expected {expected}")
    worst = largest = 0.0
    for chunk in _chunks(*grad.shape):
        exact = true.grad[chunk]
        distance = (grad[chunk].double() - exact).abs().max().item()
        # max() would drop a NaN or keep it, depending on the order
        worst = math.nan if math.isnan(distance + worst) else max(worst, distance)
        largest = max(largest, exact.abs().max().item())
    of_loss = abs(loss.item() - true.loss) / max(1.0, abs(true.loss))
    return Errors(of_loss, worst / largest if largest else worst)


def bound(torchs: Errors | None, dtype: torch.dtype) -> Errors:
    """What is allowed; the floor alone where plain torch could not run."""
    floor = FLOORS[dtype]
    if torchs is None:
        return Errors(floor, floor)
    return Errors(2 * torchs.loss + floor, 2 * torchs.grad + floor)


def first_line(error: BaseException) -> str:
    """An error in one line."""
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0] if text else 'no message'}"


def out_of_memory(error: BaseException) -> bool:
    """Whether it says that memory is out, on any device."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
