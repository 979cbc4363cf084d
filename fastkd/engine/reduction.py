"""From labels, weight, reduction and normalizer to what the passes take: a keep mask and a scale.

A reduction is a linear function of the losses per row, so that it is known before the pass:
`row_scale` makes it a factor per row, which the passes put into the gradient as they write it.
`reduce` is the same thing after the fact, in torch, for losses that come one per row.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import NamedTuple

import torch
from torch import Tensor

from fastkd.backends.base import Backend, Rows, on_host
from fastkd.backends.choice import valueless
from fastkd.engine.records import Request

_checked: ContextVar[bool] = ContextVar(
    "fastkd_checked", default=os.environ.get("FASTKD_CHECK") == "1"
)


@contextmanager
def checked() -> Iterator[None]:
    """Runs the checks that read values (labels in range) on a GPU too, at a synchronisation each.

    On the CPU they always run. FASTKD_CHECK=1, set before fastkd is imported, does the same for a
    whole process.
    """
    token = _checked.set(True)
    try:
        yield
    finally:
        _checked.reset(token)


def reads_values(x: Tensor) -> bool:
    """Whether checks that must read values of x run: it costs nothing there, or was requested."""
    return (on_host(x.device) or _checked.get()) and not valueless(x)


def check_class_weights(name: str, x: Tensor) -> None:
    """ValueError for a class of weight below 0, where values are read.

    Its labels would be unlearnt, and the logarithm of a smoothed label of it is NaN.
    """
    if reads_values(x) and bool((x < 0).any()):
        raise ValueError(f"{name}: got {float(x.min()):g} for a class, expected 0 or more for each")


class Mask(NamedTuple):
    """keep and label in the leading shape; bad marks labels out of range that nobody may read."""

    keep: Tensor | None
    label: Tensor | None
    bad: Tensor | None


def row_scale(backend: Backend, r: Request, acc: torch.dtype) -> Rows:
    """The reduction as a factor per row; raises ValueError for a label out of range (see mask)."""
    labels, weight, normalizer, vocab = r.labels, r.weight, r.normalizer, r.spec.classes
    n = r.student.numel() // r.student.shape[-1]
    factor = 1.0
    if r.reduction == "batchmean":
        factor = 1.0 / max(r.student.size(0), 1)
    elif r.reduction == "mean" and normalizer is None and labels is None and weight is None:
        factor = 1.0 / (n or 1)
    elif isinstance(normalizer, (int, float)):
        factor = 1.0 / normalizer if normalizer else 0.0
    if labels is None and weight is None and not isinstance(normalizer, Tensor):
        return Rows(None, None, None, factor)
    mean = r.reduction == "mean" and normalizer is None
    keep = label = scale = None
    if backend.on_host:
        kept = n
        if labels is not None:
            keep, label, kept, wrong = backend.count(labels, r.ignore_index, vocab)
            if wrong >= 0:
                raise _label_error(label, wrong, r.ignore_index, vocab)
        if weight is not None:
            scale = backend.weigh(keep, weight, mean, acc)
        elif mean:
            factor = 1.0 / kept if kept else 0.0
    else:
        keep, label, bad = mask(labels, r.ignore_index, vocab)
        scale = _row_weight(keep, bad, weight, acc)
        if mean and scale is not None:
            plain = scale if bad is None else _row_weight(keep, None, weight, acc)
            assert plain is not None
            scale = scale * _inverse(plain.sum())
        keep, label, scale = flat(keep), flat(label), flat(scale)
    if isinstance(normalizer, Tensor):
        by = _inverse(normalizer.to(device=r.student.device, dtype=acc))
        scale = by.expand(n) if scale is None else scale * by
    return Rows(keep, label, None if scale is None else scale.contiguous(), factor)


def flat(x: Tensor | None) -> Tensor | None:
    """[N]"""
    return None if x is None else x.reshape(-1).contiguous()


def mask(labels: Tensor | None, ignore_index: int, vocab: int) -> Mask:
    """keep and label as tensors.

    Labels are compared as int64: torch would wrap ignore_index to a narrower dtype of theirs, and
    -100 is 156 as uint8, a label that may count.

    Labels out of range raise a ValueError where reading them costs nothing (CPU) or was requested;
    elsewhere `bad` marks them, and their rows become NaN.
    """
    if labels is None:
        return Mask(None, None, None)
    label = labels.to(torch.int64)
    keep = label != ignore_index
    bad = keep & ((label < 0) | (label >= vocab))
    if not reads_values(labels):
        return Mask(keep, label, bad)
    if bool(bad.any()):
        raise _label_error(label, int(bad.reshape(-1).nonzero()[0, 0]), ignore_index, vocab)
    return Mask(keep, label, None)


def _label_error(label: Tensor, row: int, ignore_index: int, vocab: int) -> ValueError:
    return ValueError(
        f"labels: got {int(label.reshape(-1)[row])} in row {row}, expected 0 <= label < {vocab} "
        f"or ignore_index={ignore_index}"
    )


def reduce(loss: Tensor, r: Request, keep: Tensor | None, bad: Tensor | None) -> Tensor:
    """The reduction in torch, differentiable in weight and normalizer too."""
    weight, normalizer = r.weight, r.normalizer
    factor = _row_weight(keep, bad, weight, loss.dtype)
    if factor is not None:
        loss = loss * factor
    if r.reduction == "none":
        return loss
    total = loss.sum()
    if r.reduction == "sum":
        return total
    if r.reduction == "batchmean":
        return total / max(r.student.size(0), 1)
    if normalizer is None:
        plain = _row_weight(keep, None, weight, loss.dtype)
        normalizer = max(loss.numel(), 1) if plain is None else plain.sum()
    if isinstance(normalizer, Tensor):
        return total * _inverse(normalizer.to(device=loss.device, dtype=loss.dtype))
    return total / normalizer if normalizer else total * 0.0


def _row_weight(
    keep: Tensor | None, bad: Tensor | None, weight: Tensor | None, acc: torch.dtype
) -> Tensor | None:
    """weight * keep in the leading shape, NaN in rows whose label is out of range."""
    if weight is None:
        factor = None if keep is None else keep.to(acc)
    else:
        weight = weight.to(acc)
        factor = weight if keep is None else torch.where(keep, weight, 0.0)
    if bad is not None and factor is not None:
        factor = torch.where(bad, math.nan, factor)
    return factor


def _inverse(normalizer: Tensor) -> Tensor:
    """1 / normalizer, 0 where it is 0."""
    zero = normalizer == 0
    return torch.where(zero, 0.0, 1.0 / torch.where(zero, 1.0, normalizer))


def wants_grad(r: Request) -> bool:
    """Whether weight or normalizer has a gradient to get."""
    wants = r.weight is not None and r.weight.requires_grad
    wants = wants or (isinstance(r.normalizer, Tensor) and r.normalizer.requires_grad)
    return wants and torch.is_grad_enabled()
