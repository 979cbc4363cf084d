"""A loss of DTensors: `dispatch.loss` of this rank's part, with the sizes of the whole."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from fastkd.engine import validate
from fastkd.parallel import dtensor


def loss(
    again: Callable[..., Tensor],
    sides: tuple[Any, ...],
    *,
    labels: Tensor | None,
    ignore_index: int,
    weight: Tensor | None,
    reduction: str,
    normalizer: Any,
    inplace: bool,
    group: object,
    **others: Any,
) -> Tensor:
    """The loss of this rank's part, by `again`, summed to that of all rows.

    others: the options that are the same for each part.
    """
    name, student, teacher, *numbers = sides
    validate.reduction(reduction)
    if dtensor.is_dtensor(normalizer):
        normalizer = normalizer.full_tensor()
    validate.normalizer(normalizer, reduction, student)
    part = dtensor.local(student, teacher, labels, weight, inplace, group)
    validate.rows(part.student, part.labels, part.weight)
    own, by = part.normalizer(reduction, normalizer, ignore_index)
    value = again(
        *(name, part.student, part.teacher, *numbers),
        labels=part.labels,
        ignore_index=ignore_index,
        weight=part.weight,
        reduction=own,
        normalizer=by,
        inplace=inplace,
        group=part.group,
        **others,
    )
    return part.full(value, own)
