"""Warnings, given once in a run, of what would otherwise be silent."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from .batch import IGNORED, Batch, Outputs, unwrap
from .logging import Step
from .objective import Objective
from .teachers import BatchTeacher, CachedTeacher, CallableTeacher, Teacher

READ = frozenset(("raw", "logits", "features", "members"))


class _Watched(Outputs):
    """Outputs that note whether anybody reads them."""

    __slots__ = ("noted",)

    def __getattribute__(self, name: str) -> Any:
        if name in READ:
            object.__setattr__(self, "noted", True)
        return object.__getattribute__(self, name)


@functools.cache
def _watched_class(batch_class: type[Any]) -> Any:
    """A subclass of a class of batches that notes whether anybody reads the teacher's output."""

    def look(self: Any, name: str) -> Any:
        if name == "teacher":
            object.__setattr__(self, "noted", True)
        return object.__getattribute__(self, name)

    members = {"__slots__": ("noted",), "__getattribute__": look}
    return type(batch_class.__name__, (batch_class,), members)


def _watched_batch(batch: Batch) -> Batch:
    if batch.teacher is None:
        return batch
    batch_class: Any = type(batch)
    twin: Any = object.__new__(_watched_class(batch_class))
    names = [field.name for field in dataclasses.fields(batch)]
    for name in dict.fromkeys((*names, *getattr(batch, "__dict__", ()))):
        setattr(twin, name, getattr(batch, name))
    return twin


class RunWarnings:
    """Looks at the first step, and at the losses of the first epoch; later it costs nothing.

    Args:
        student, teacher, objective: of the run.
    """

    def __init__(self, student: nn.Module, teacher: Teacher, objective: Objective) -> None:
        self.student, self.teacher, self.objective = student, teacher, objective
        self._watching, self._first, self._first_epoch = True, True, True
        self._width = 0

    def watch(self, student: Outputs, teacher: Outputs, batch: Batch) -> tuple[Outputs, Batch]:
        """The teacher's outputs and the batch for the terms.

        ValueError for weights, or rows of another shape, in a teacher's place.
        """
        # without a role: a student without logits, of several heads, is the terms' business
        logits = Outputs(student.raw).logits
        _no_weights(logits, batch.teacher)
        if not self._watching:
            return teacher, batch
        if self._first:
            self._first = False
            shape: tuple[int, ...] = getattr(logits, "shape", ())
            self._width = shape[-1] if len(shape) else 0
            _copies(logits, batch)
        if self.objective.plain is not None:
            self._watching = False  # a function is given everything, whatever it reads
            return teacher, batch
        outputs = _Watched(teacher.raw, teacher.features, teacher.members, teacher.role)
        return outputs, _watched_batch(batch)

    def read(self, teacher: Outputs, batch: Batch) -> None:
        """After the terms had both, as `watch` gave them."""
        if not isinstance(teacher, _Watched):
            return
        tokens = batch.tokens
        if not isinstance(tokens, Tensor) and not tokens:
            return  # terms have been left out
        self._watching = False
        noted = getattr(teacher, "noted", False) or getattr(batch, "noted", False)
        if noted or _learns(self.teacher):
            return
        is_stored = isinstance(self.teacher, (BatchTeacher, CachedTeacher))
        if is_stored and batch.teacher is not None:
            got = "loader: got batches with a teacher's outputs ('teacher')"
        elif isinstance(self.teacher, BatchTeacher):
            return
        else:
            got = f"teacher: got one ({type(self.teacher).__name__}), which runs in every step"
        text = f"{got}, and no term that reads it: {self.objective.names}; expected e.g. soft()"
        _warn(text, stacklevel=5)

    def epoch(self, steps: Sequence[Step]) -> None:
        """After each epoch; of the first: what was exactly 0 in all of its steps."""
        first, self._first_epoch = self._first_epoch, False
        if not steps or not first:
            return
        values = [step.terms or {"loss": step.loss} for step in steps]
        known = values[0].keys() - self.objective.unlabelled
        silent = [x for x in values[0] if x in known and all(found[x] == 0.0 for found in values)]
        if not silent:
            return
        if self._width == 1 and self.objective.plain is None:
            return  # its terms have warned already
        if self._width == 1:
            why = (
                "the student has a single logit, and a softmax over one logit is 1 whatever it is; "
                "two classes, a sigmoid or a squared error would learn"
            )
        elif _reaches(self.teacher, self.student):
            why = "the teacher is the student itself, which agrees with itself; give another model"
        elif len(steps) > 1:
            why = "student and teacher say the same (are they one?), or no row has a label"
        else:
            return  # a student may begin as its teacher's copy
        _warn(f"loss: got exactly 0 of {silent} in every step of an epoch: {why}", stacklevel=4)


def _warn(text: str, *, stacklevel: int) -> None:
    """`stacklevel`: of the line that called train(), counted from here."""
    warnings.warn(text, stacklevel=stacklevel)


def _no_weights(logits: Any, teacher: Any) -> None:
    if not isinstance(teacher, Tensor):
        return
    shape, expected = tuple(teacher.shape), tuple(getattr(logits, "shape", ()))
    dims = len(shape) - (len(shape) == len(expected) and shape[-1:] == (1,))
    if shape != expected and dims < len(expected) and shape[:dims] == expected[:dims]:
        equal = math.prod(shape) == math.prod(expected)
        same = f" (.view({list(expected)}) of the same rows)" if equal else ""
        raise ValueError(
            f"teacher: got {list(shape)} in the batch for the student's logits {list(expected)}, "
            f"expected that shape{same}; weights of samples go into a dict, {{'inputs': ..., "
            "'labels': ..., 'weights': ...}, and a Term reads them from batch.extra['weights']"
        )


def _copies(logits: Any, batch: Batch) -> None:
    """Labels of a language model that are its inputs: nothing was shifted."""
    ids, labels = batch.inputs, batch.labels
    if isinstance(ids, Mapping):
        ids = ids.get("input_ids")
    if not isinstance(ids, Tensor) or not isinstance(labels, Tensor) or ids.dim() != 2:
        return
    are_ids = not ids.is_floating_point() and not labels.is_floating_point()
    logits_of_each = getattr(logits, "ndim", 0) == 3 and logits.shape[:2] == labels.shape
    if not are_ids or ids.shape != labels.shape or ids.size(1) < 2 or not logits_of_each:
        return
    kept = labels != IGNORED
    if bool(kept.any() & (ids[kept] == labels[kept]).all()):
        _warn(
            "loader: got labels that are the inputs, which teaches a language model to copy them: "
            "train() does not shift labels; write labels = torch.cat((ids[:, 1:], "
            "torch.full_like(ids[:, :1], -100)), 1)",
            stacklevel=6,
        )


def _learns(teacher: Teacher) -> bool:
    members = getattr(teacher, "members", None)
    if members:
        return any(map(_learns, members))
    return type(teacher).follow is not Teacher.follow


def _reaches(teacher: Teacher, student: nn.Module) -> bool:
    """Whether the teacher, or the function that it calls, is the student itself."""
    members = getattr(teacher, "members", None)
    if members:
        return all(_reaches(member, student) for member in members)
    bare = unwrap(student)
    if not isinstance(teacher, CallableTeacher):
        weights = set(bare.parameters())
        own = [p for model in teacher.models for p in model.parameters()]
        return bool(own) and weights == set(own)
    function = teacher.function
    if isinstance(function, functools.partial):
        function = function.func
    found: list[Any] = [function, getattr(function, "__self__", None)]
    if inspect.isfunction(function):
        seen = inspect.getclosurevars(function)
        found += [*seen.nonlocals.values(), *seen.globals.values()]
    return any(isinstance(x, nn.Module) and unwrap(x) is bare for x in found)
