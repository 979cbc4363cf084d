"""Which rows of logits count, and how much: for a loss per row that is written elsewhere.

The losses of this package take `labels`, `ignore_index`, `weight`, `reduction` and `normalizer`. A
loss of your own that takes the same options checks them here, leaves out the rows that do not
count, and multiplies the loss of each row by its factor: every reduction is the sum of factor *
loss.

>>> import torch
>>> from fastkd import rows
>>> student, labels = torch.randn(4, 10), torch.tensor([1, -100, 3, 2])
>>> keep, label, bad = rows.mask(student, labels)
>>> rows.factors(torch.ones(4), keep, bad, student.size(0), {"reduction": "mean"})
tensor([0.3333, 0.0000, 0.3333, 0.3333])
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TypedDict

import torch
from torch import Tensor

from fastkd.arguments.messages import shown
from fastkd.arguments.numbers import coefficient
from fastkd.engine import class_axis
from fastkd.engine import reduction as engine

IGNORED = -100  # torch's own label for a row that does not count
REDUCTIONS = ("mean", "batchmean", "sum", "none")


class RowOptions(TypedDict, total=False):
    """Which rows count, and how much, as in `fastkd.losses`."""

    ignore_index: int | Sequence[int]
    weight: Tensor | None
    reduction: str
    normalizer: float | Tensor | None


def check(options: RowOptions, leading: list[int]) -> None:
    """TypeError, ValueError for a weight, reduction or normalizer that is none.

    Args:
        options: as a loss was given them.
        leading: shape of the rows, that of the logits without its last dimension.
    """
    weight, normalizer = options.get("weight"), options.get("normalizer")
    reduction = options.get("reduction", "mean")
    if reduction not in REDUCTIONS:
        raise ValueError(
            f"reduction: got {shown(reduction)}, expected one of {', '.join(REDUCTIONS)}"
        )
    if weight is not None:
        if not isinstance(weight, Tensor) or not weight.is_floating_point():
            got = weight.dtype if isinstance(weight, Tensor) else type(weight).__name__
            raise TypeError(f"weight: got {got}, expected floats {leading}")
        if list(weight.shape) != leading:
            raise ValueError(f"weight: got shape {list(weight.shape)}, expected {leading}")
    if normalizer is None:
        return
    if reduction != "mean":
        raise ValueError(
            f"normalizer: got one with reduction={shown(reduction)}; it replaces the denominator "
            "of reduction='mean'"
        )
    if isinstance(normalizer, Tensor):
        if normalizer.dim():
            raise ValueError(f"normalizer: got shape {list(normalizer.shape)}, expected 0-d")
    else:
        coefficient("normalizer", normalizer)


def classes_last(student: Tensor, teacher: Tensor, class_dim: int) -> tuple[Tensor, Tensor]:
    """Both sides with dimension `class_dim`, that of the classes, last: see `fastkd.losses`."""
    student, teacher = class_axis.classes_last(student, teacher, class_dim)
    return student, teacher


def mask(
    student: Tensor, labels: Tensor | None, ignore_index: int | Sequence[int] = IGNORED
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """keep [N] bool, label [N] (0 where a row has none) and bad [N]: labels that nobody may read.

    A label out of range is a ValueError where reading it costs nothing (see `fastkd.checked`);
    elsewhere `bad` marks its row, whose factor becomes NaN.

    Args:
        student: logits [..., V].
        labels: int [...], None for rows that all count.
        ignore_index: the label of a row that does not count, or several of them.
    """
    if labels is None:
        return None, None, None
    leading, vocab = list(student.shape[:-1]), student.size(-1)
    if not isinstance(labels, Tensor) or labels.is_floating_point() or labels.is_complex():
        got = labels.dtype if isinstance(labels, Tensor) else type(labels).__name__
        raise TypeError(f"labels: got {got}, expected integers {leading}")
    if list(labels.shape) != leading:
        raise ValueError(f"labels: got shape {list(labels.shape)}, expected {leading}")
    if labels.device != student.device:
        raise ValueError(
            f"labels: got a tensor on {labels.device}, expected the student's {student.device}"
        )
    labels, ignore_index = class_axis.one_ignored(labels, ignore_index)
    assert labels is not None
    keep, label, bad = engine.mask(labels.reshape(-1), ignore_index, vocab)
    assert keep is not None and label is not None
    return keep, torch.where(keep if bad is None else keep & ~bad, label, 0), bad


def factors(
    weight: Tensor, keep: Tensor | None, bad: Tensor | None, batch: int, options: RowOptions
) -> Tensor:
    """[n]: every reduction is a sum of factor * loss, and "none" is that product.

    Args:
        weight: [n], of each row.
        keep, bad: [n] bool or None, as from `mask`.
        batch: what "batchmean" divides by.
        options: which reduction, and its normalizer.
    """
    reduction, normalizer = options.get("reduction", "mean"), options.get("normalizer")
    factor = weight if keep is None else torch.where(keep, weight, 0.0)
    if reduction == "batchmean":
        factor = factor / max(batch, 1)
    elif reduction == "mean":
        if normalizer is not None and not isinstance(normalizer, Tensor):
            normalizer = torch.as_tensor(float(normalizer), dtype=factor.dtype)
        by = factor.sum() if normalizer is None else normalizer.to(factor)
        factor = factor * torch.where(by == 0, 0.0, 1.0 / torch.where(by == 0, 1.0, by))
    return factor if bad is None else torch.where(bad, math.nan, factor)
