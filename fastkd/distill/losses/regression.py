"""Losses of numbers: a student that predicts what a teacher predicts, and what is measured.

Vectors [..., D] of a row, such as the four numbers of a box; [..., 1] for one number. `**rows` are
weight, reduction and normalizer as in `fastkd.losses`, and mask, bool [...]: rows where it is False
are not read and get a gradient of exactly 0.

>>> import torch
>>> from fastkd import distill
>>> student, teacher = (torch.nn.Linear(6, 4) for _ in range(2))
>>> batch = torch.randn(5, 6), torch.randn(5, 4)
>>> term = distill.regression(alpha=0.5, kind="smooth_l1")
>>> len(distill.train(student, [batch], term, teacher=teacher, progress=False))
1
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from typing_extensions import Unpack

from fastkd import rows as row_options
from fastkd.arguments.messages import describe, shown, sizes, unexpected
from fastkd.arguments.numbers import coefficient, within
from fastkd.arguments.tensors import check_dense

from ..batch import Batch, Outputs
from ..targets import kept_rows, label_of_each, teacher_logits, try_options
from ..terms import Term, Weight
from .chunked import DTYPES

KINDS: dict[str, Callable[..., Tensor]] = {
    "l2": F.mse_loss,
    "l1": F.l1_loss,
    "smooth_l1": F.smooth_l1_loss,
}


class Rows(row_options.RowOptions, total=False):
    """The options that the losses of numbers share."""

    mask: Tensor | None


def regression_loss(
    student: Tensor,
    teacher: Tensor,
    targets: Tensor | None = None,
    *,
    alpha: float = 0.5,
    kind: str = "l2",
    **rows: Unpack[Rows],
) -> Tensor:
    """Distance of the student's numbers from what was measured and from the teacher's.

        alpha l(s, y) + (1 - alpha) l(s, t),   l the mean over D of a distance

    alpha weighs the HARD targets y. Distances are "l2" (s - y)^2, "l1" |s - y| and "smooth_l1",
    (s - y)^2 / 2 up to a distance of 1 and |s - y| - 1/2 beyond.

    Args:
        student: numbers [..., D], float32, bfloat16, float16 or float64.
        teacher: numbers [..., D] of any of these dtypes.
        targets: numbers [..., D], y. May be None with alpha=0.
        alpha: weight of the hard term, 0 <= alpha <= 1.
        kind: "l2", "l1" or "smooth_l1".
        **rows: see the module.

    Returns:
        0-d float32 (float64 where an operand is), [...] with reduction="none".

    Raises:
        TypeError, ValueError: an argument of the wrong kind or value.

    Romero et al. 2015 (FitNets), arXiv 1412.6550 (l2 to a teacher); Girshick 2015, arXiv
    1504.08083 (smooth_l1).
    """
    share = within("alpha", alpha, 0.0, 1.0, "a number from 0 to 1")
    if not isinstance(kind, str) or kind not in KINDS:
        raise ValueError(f"kind: got {shown(kind)}, expected one of {', '.join(KINDS)}")
    if targets is None and share:
        raise ValueError(
            f"targets: got None with alpha={share:g}; alpha weighs the targets, so give them or "
            "set alpha=0 for the teacher alone"
        )

    def formula(s: Tensor, t: Tensor, y: Tensor | None) -> Tensor:
        value = (1 - share) * KINDS[kind](s, t, reduction="none")
        if share:
            value = value + share * KINDS[kind](s, y, reduction="none")
        return value.mean(-1)

    return _rows(formula, student, teacher, targets, rows)


def bounded_regression_loss(
    student: Tensor,
    teacher: Tensor,
    targets: Tensor,
    *,
    margin: float = 0.0,
    **rows: Unpack[Rows],
) -> Tensor:
    """The student's squared error where it is not better than the teacher's by a margin.

        |s - y|^2   if |s - y|^2 + margin > |t - y|^2,   else 0;   |.|^2 the sum over D

    The teacher is a bound, not a target: its numbers may point away from the measured ones. There
    is no gradient of the teacher. The hard term (smooth L1 in the paper) stands beside this one,
    whose weight there is 0.5.

    Args:
        student: numbers s [..., D], float32, bfloat16, float16 or float64.
        teacher: numbers t [..., D] of any of these dtypes.
        targets: numbers y [..., D], what was measured.
        margin: a finite number of 0 or more, in units of the squared error.
        **rows: see the module.

    Returns:
        0-d float32 (float64 where an operand is), [...] with reduction="none".

    Raises:
        TypeError, ValueError: an argument of the wrong kind or value.

    Chen et al. 2017, Learning Efficient Object Detection Models with Knowledge Distillation (NIPS).
    """
    least = coefficient("margin", margin)
    if targets is None:
        raise TypeError("targets: got None, expected numbers [..., D], what was measured")

    def formula(s: Tensor, t: Tensor, y: Tensor | None) -> Tensor:
        assert y is not None
        own, bound = (s - y).square().sum(-1), (t.detach() - y).square().sum(-1)
        counts = own.detach() + least > bound
        counts = counts | own.isnan() | bound.isnan()  # NaN stays in its row
        return torch.where(counts, own + 0.0 * bound, 0.0)

    return _rows(formula, student, teacher, targets, rows)


def regression(
    function: Callable[..., Tensor] = regression_loss,
    weight: Weight = 1.0,
    *,
    mask: str | None = None,
    name: str | None = None,
    **options: Any,
) -> Term:
    """A term of a loss of numbers: function(student, teacher, labels of the batch, **options).

    Args:
        function: `regression_loss`, `bounded_regression_loss`, or one of your own.
        weight: factor, or step -> factor.
        mask: name of the batch's mask [...], not 0 where a row counts: see `feature`.
        name: None for the function's own.
        **options: of the function.
    """
    name = str(name or getattr(function, "__name__", "regression"))
    try_options(function, options, 2, 4)

    def call(student: Outputs, teacher: Outputs, batch: Batch) -> Tensor:
        target = teacher_logits(name, teacher)
        kept = kept_rows(name, batch, "all", mask)
        given = options if kept is None else {**options, "mask": kept}
        needs = options.get("alpha", 1.0) != 0
        targets = label_of_each(name, batch, student.logits) if needs else None
        return function(student.logits, target, targets, **given)

    return Term(name, call, weight, mean="samples")


def _rows(
    formula: Callable[[Tensor, Tensor, Tensor | None], Tensor],
    student: Tensor,
    teacher: Tensor,
    targets: Tensor | None,
    rows: Rows,
) -> Tensor:
    """The formula's loss of each row that counts, reduced."""
    known = ("weight", "reduction", "normalizer", "mask")
    if unknown := rows.keys() - set(known):
        raise TypeError(unexpected(unknown, known))
    for name, x in (("student", student), ("teacher", teacher), ("targets", targets)):
        if x is None and name == "targets":
            continue
        if not isinstance(x, Tensor) or x.dtype not in DTYPES:
            raise TypeError(f"{name}: got {describe(x)}, expected a tensor of floats [..., D]")
        check_dense(name, x)
        if x.shape != student.shape or not x.dim() or not x.size(-1):
            hint = "; of one number a row, [..., 1]" if name == "student" else ""
            if name != "student" and x.numel() == student.numel() > 0:
                hint = f"; {name}.view({sizes(student.shape)}) if the order is the same"
            like = "[..., D] with D >= 1" if name == "student" else sizes(student.shape)
            raise ValueError(f"{name}: got shape {sizes(x.shape)}, expected {like}{hint}")
        if x.device != student.device:
            raise ValueError(f"{name}: got a tensor on {x.device}, expected {student.device}")
    lead = list(student.shape[:-1])
    row_options.check(rows, lead)
    keep = rows.get("mask")
    if keep is not None and (not isinstance(keep, Tensor) or keep.dtype != torch.bool):
        raise TypeError(f"mask: got {describe(keep)}, expected bool {lead}")
    if keep is not None and list(keep.shape) != lead:
        raise ValueError(f"mask: got shape {sizes(keep.shape)}, expected {lead}")
    acc = torch.promote_types(torch.promote_types(student.dtype, teacher.dtype), torch.float32)
    parts = [None if x is None else x.to(acc) for x in (student, teacher, targets)]
    if keep is not None:
        at = keep.unsqueeze(-1)
        parts = [None if x is None else torch.where(at, x, 0.0) for x in parts]
    value = formula(*parts)  # type: ignore[arg-type]
    weight = rows.get("weight")
    factor = torch.ones_like(value) if weight is None else weight.to(value.dtype)
    of_rows = None if keep is None else keep.reshape(-1)
    batch = student.size(0) if lead else 1
    factor = row_options.factors(factor.reshape(-1), of_rows, None, batch, rows)
    value = torch.where(factor.view(lead) == 0, 0.0, value) * factor.view(lead)
    return value if rows.get("reduction") == "none" else value.sum()
