"""Checks of the logits and labels of a term; their errors say what to write instead.

Classes lie along the last dimension, or that which the term names, and a label is the number of
one. What looks otherwise (maps
[B, C, H, W], probabilities, several labels of a sample, numbers) would run and mean something else,
so it is refused here.
"""

from __future__ import annotations

import functools
import inspect
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

import fastkd
from fastkd.arguments.messages import describe, shown
from fastkd.arguments.numbers import integer

from .batch import IGNORED, Batch, Outputs, tensors

WRITE = "distill.Term({name!r}, lambda s, t, b: {call}, mean='samples')"


class NoLabels(ValueError):
    """A term's batch has no labels; one of weight 0 does without."""


def labels_of(name: str, batch: Batch) -> Any:
    """The batch's labels; NoLabels that names the term where there are none."""
    if batch.labels is None:
        raise NoLabels(
            f"term {name!r}: got a batch without labels, expected (inputs, labels) or a dict with "
            "'inputs' and 'labels'"
        )
    return batch.labels


def label_of_each(name: str, batch: Batch, logits: Tensor) -> Any:
    """The batch's labels for logits [..., C]; of one logit they may be [...]."""
    labels = labels_of(name, batch)
    if isinstance(labels, Tensor) and [*labels.shape, 1] == list(logits.shape):
        return labels.unsqueeze(-1)
    return labels


def teacher_logits(name: str, teacher: Outputs) -> Any:
    """The teacher's logits; ValueError that names the term where there is no teacher."""
    if (found := teacher.logits) is None:
        raise ValueError(f"term {name!r}: got no teacher, expected train(..., teacher=...)")
    return found


def in_use(name: str, logits: Tensor, vocab_size: int | None) -> Tensor:
    """The first vocab_size columns; TypeError, ValueError that name the term or the model."""
    if vocab_size is None:
        return logits
    number = integer(vocab_size)
    if number is None:
        raise TypeError(f"{name}: vocab_size: got {describe(vocab_size)}, expected an integer")
    if not 1 <= number <= logits.size(-1):
        raise ValueError(
            f"{name}: vocab_size: got {shown(vocab_size)}, expected 1 <= vocab_size <= "
            f"{logits.size(-1)}"
        )
    return logits[..., :number]


class Classes:
    """Looks at the student's logits of a term before a softmax over their last dimension."""

    def __init__(self, name: str, class_dim: int = -1) -> None:
        self.name, self.class_dim, self._warned = name, class_dim, False

    def __call__(self, logits: Any, batch: Batch) -> None:
        """ValueError for classes along another dimension; one warning for a single class."""
        if not isinstance(logits, Tensor) or logits.dim() == 0 or self.class_dim != -1:
            return
        classes_last(f"term {self.name!r}: ", logits, batch.labels, batch.inputs)
        if logits.size(-1) == 1 and not self._warned:
            self._warned = True
            warnings.warn(
                f"term {self.name!r}: got a single logit {list(logits.shape)}, whose softmax is 1 "
                "whatever it is: nothing is learnt from it; use distill.binary_hard and "
                "binary_soft, or distill.regression for a number",
                stacklevel=2,
            )


def classes_last(where: str, logits: Tensor, labels: Any, inputs: Any = None) -> None:
    """ValueError where classes lie along dimension 1, as labels or images show."""
    shape = list(logits.shape)
    if len(shape) < 3:
        return
    spatial = isinstance(labels, Tensor) and list(labels.shape) == [shape[0], *shape[2:]]
    spatial = spatial and labels.shape != logits.shape[:-1]
    if spatial or (len(shape) in (4, 5) and _spatial(shape, inputs)):
        seen = f"labels {list(labels.shape)}" if spatial else "images as inputs"
        raise ValueError(
            f"{where}student: got logits {shape} for {seen}, expected classes last, "
            f"{[shape[0], *shape[2:], shape[1]]}; give the term class_dim=1, or wrap each model in "
            "a module that returns its logits.movedim(1, -1)"
        )


def _spatial(shape: list[int], inputs: Any) -> bool:
    """Whether logits [B, C, H, W] lie as the images [B, channels, H, W] do, or a pooled copy."""
    same = (x for x in tensors(inputs) if x.dim() == len(shape) and x.is_floating_point())
    image = next(same, None)
    if image is None:
        return False
    size = list(image.shape[2:])
    return _pooled(size, shape[2:]) and not _pooled(size, shape[1:-1])


def _pooled(size: list[int], to: list[int]) -> bool:
    """Whether maps of `size` divided by one whole number (rounded up) are of size `to`."""
    if not all(to) or any(a < b for a, b in zip(size, to, strict=True)):
        return False
    by = -(-size[0] // to[0])
    return all(-(-a // by) == b for a, b in zip(size, to, strict=True))


def class_numbers(name: str, logits: Tensor, labels: Any, where: str = "") -> Tensor:
    """Labels as int64 in the shape of the rows of the logits.

    Args:
        name: of the term that a message proposes.
        logits: [..., V].
        labels: int, one for each row.
        where: what a message begins with.

    Raises:
        TypeError, ValueError: labels of another kind or number; what to write instead.
    """
    rows = list(logits.shape[:-1])
    if not isinstance(labels, Tensor):
        raise TypeError(f"{where}labels: got {type(labels).__name__}, expected int {rows}")
    classes_last(where, logits, labels)
    got = f"{where}labels: got {str(labels.dtype)[6:]} {list(labels.shape)}"
    got = f"{got} for logits {list(logits.shape)}, expected class numbers, int {rows}"
    many = labels.shape == logits.shape and logits.size(-1) > 1
    if labels.is_floating_point() or labels.is_complex() or many:
        hint = (
            "probabilities (mixup, cutmix) are labels of distill.hard alone, several labels of a "
            "sample of distill.binary_hard"
        )
        if not many:
            call = "F.mse_loss(s.logits.squeeze(-1), b.labels)"
            hint = f"for numbers {WRITE.format(name=name, call=call)}, or distill.regression"
        raise (ValueError if many else TypeError)(f"{got}; {hint}")
    if labels.numel() != logits[..., 0].numel():
        raise ValueError(got)
    return labels.long().view(rows) if labels.is_contiguous() else labels.long().reshape(rows)


def kept_rows(name: str, batch: Batch, rows: str, mask: str | None) -> Tensor | None:
    """Which rows of features count, bool; None for all of them.

    Args:
        name: of the term.
        batch: whose labels ("labelled") or whose entry `mask` says so.
        rows: "all" or "labelled".
        mask: an entry of the batch's inputs, or of what else its loader's dict holds.
    """
    if rows == "labelled":
        return labels_of(name, batch) != IGNORED
    if mask is None:
        return None
    return entry_of(batch, "mask", mask) != 0


def entry_of(batch: Batch, argument: str, key: str) -> Tensor:
    """The tensor of that name in a batch's inputs or beside them; ValueError without one."""
    inputs = batch.inputs if hasattr(batch.inputs, "keys") else {}
    found = inputs[key] if key in inputs else batch.extra.get(key)
    if not isinstance(found, Tensor):
        known = [str(name)[:40] for name in (*inputs, *batch.extra)][:8]
        got = f"no tensor {key!r} among the entries {known} of the batch"
        raise ValueError(f"{argument}: got {got}, expected one in inputs or beside them")
    return found


def only(x: Tensor, kept: Tensor) -> Tensor:
    """The vectors of `x` [*kept.shape, ...] that are kept, [n, ...]."""
    return x[_fitting(x, kept)]


def without(x: Tensor, kept: Tensor) -> Tensor:
    """`x` with 0 where it is not kept; samples of which nothing is kept are left out."""
    room = (1,) * (x.dim() - kept.dim())
    x = x.masked_fill(~_fitting(x, kept).view(*kept.shape, *room), 0)
    return x[kept.flatten(1).any(1)]


def _fitting(x: Tensor, kept: Tensor) -> Tensor:
    if x.shape[: kept.dim()] != kept.shape:
        got = f"{list(kept.shape)} for features {list(x.shape)}"
        raise ValueError(f"mask: got {got}, expected the features' first dimensions")
    return kept


def bare_function(function: Callable[..., Any]) -> Any:
    """The function within a `functools.partial`; else the function itself."""
    while isinstance(function, functools.partial):
        function = function.func
    return function


def try_options(function: Callable[..., Any], options: Mapping[str, Any], *shape: int) -> None:
    """Runs a loss of this package once on small numbers: a wrong option is refused at once.

    Options that are tensors or groups belong to a batch, a function of the step is taken for 1.
    """
    if not is_own_loss(function):
        return
    given = {k: 1.0 if _scheduled(v) else v for k, v in options.items() if k != "group"}
    given = {k: v for k, v in given.items() if not isinstance(v, Tensor)}
    names = inspect.signature(bare_function(function)).parameters
    sides = [torch.zeros(shape, device="cpu"), torch.ones(shape, device="cpu")]
    targets = sides[:1] if "targets" in names else []
    with fastkd.use_backend("reference"), torch.no_grad():
        function(*sides, *targets, **given)


def _scheduled(option: Any) -> bool:
    """Whether it is a function of the step; an entry of `fastkd.divergences` is callable too."""
    return callable(option) and not isinstance(option, type(fastkd.divergences.kl))


def is_own_loss(function: Callable[..., Any]) -> bool:
    """Whether it is a loss of this package, which takes a softmax over the last dimension."""
    return str(getattr(bare_function(function), "__module__", "")).startswith("fastkd.")
