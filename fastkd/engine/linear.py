"""Losses whose logits are never built: from checked operands to the driver's way of running them.

What has no kernel (the reference, a divergence without a dual for a teacher that wants its
gradient) builds the logits in plain torch.
"""

from __future__ import annotations

import math
from functools import partial

import torch
from torch import Tensor

from fastkd import topk
from fastkd.backends import reference
from fastkd.backends.base import Backend, LossSpec, Rows, TopKRows, acc_dtype
from fastkd.backends.choice import in_functorch, pick
from fastkd.engine import linear_autograd
from fastkd.engine.autograd import flat
from fastkd.engine.linear_autograd import Call, trip
from fastkd.engine.reduction import fold, mask, reduce, wants_grad
from fastkd.operands import Head, LinearLogits, Operand, Teacher, TopK
from fastkd.parallel.layout import no_teacher_gradient

MOST_BOOST = 2.0**10  # of float16 gradients: the largest are of size T, and 65504 is the end


def loss(
    student: Operand,
    teacher: Teacher,
    spec: LossSpec,
    labels: Tensor | None,
    ignore_index: int,
    weight: Tensor | None,
    reduction: str,
    normalizer: float | Tensor | None,
    split: Backend | None = None,
) -> Tensor:
    """The loss of checked operands, a LinearLogits on one side or both; split: over ranks."""
    acc = both = acc_dtype(student, teacher)
    nothing = no_part(teacher) if spec.soft == 0.0 else None
    other: Operand | None = None  # what the teacher adds to the tensors of a trip
    if nothing is not None:  # D(q, q) is exactly 0: the teacher is not read, whatever it holds
        acc = acc_dtype(student, student)
    elif not isinstance(teacher, TopK):
        other = teacher
    compiling = torch.compiler.is_compiling()
    backend: Backend = reference.BACKEND if compiling else pick(student.device)
    if split is not None:
        backend = split
    teacher_grad = nothing is None and teacher.requires_grad and torch.is_grad_enabled()
    no_dual = isinstance(teacher, TopK) or reference.entry(spec).exchanged() is None
    plain = (teacher_grad and no_dual) or (
        in_functorch() if compiling else backend is reference.BACKEND
    )
    if plain and split is not None:
        raise no_teacher_gradient()

    def stored(keep: Tensor | None) -> TopKRows | None:
        if nothing is not None or not isinstance(teacher, TopK):
            return None
        return topk.topk(teacher, spec.temperature, spec.classes, keep, acc, backend)

    if plain or compiling or reduction == "none" or wants_grad(weight, normalizer):
        keep, label, bad = mask(labels, ignore_index, spec.classes)
        run_rows = _plain_rows if plain else partial(_rows, backend)
        value = run_rows(student, other, spec, keep, label, stored(keep))
        value = reduce(value, reduction, keep, bad, weight, normalizer, student)
    else:
        vocab = spec.classes
        folded = fold(
            backend, reduction, labels, ignore_index, vocab, weight, normalizer, student, acc
        )
        boost = _boost(reduction, normalizer, student)
        sides = (student,) if other is None else (student, other)
        value = _total(_call(backend, sides, spec, folded, boost, stored(folded.keep)), sides)
    return value if nothing is None else value.to(both) + nothing.to(both)


def no_part(teacher: Teacher) -> Tensor:
    """0 in the accumulation's dtype, and for whatever the teacher is made of a gradient of 0."""
    given = teacher.tensors if isinstance(teacher, TopK) else _tensors(teacher)
    tensors = [x for x in given if x is not None]
    acc = torch.float64 if teacher.dtype == torch.float64 else torch.float32
    return torch.stack([x.reshape(-1)[:0].sum().to(acc) for x in tensors]).sum()


def _tensors(x: Operand) -> tuple[Tensor | None, ...]:
    # kernels read memory as it is, and a view may be one whose numbers are to be negated
    return x.tensors if isinstance(x, LinearLogits) else (x.resolve_neg(),)


def _head(x: Operand) -> Head | None:
    return x.head if isinstance(x, LinearLogits) else None


def _call(
    backend: Backend,
    sides: tuple[Operand, ...],
    spec: LossSpec,
    folded: Rows,
    boost: float,
    stored: TopKRows | None,
) -> Call:
    heads = (_head(sides[0]), _head(sides[1]) if len(sides) > 1 else None)
    pack = any(isinstance(x, LinearLogits) and x.pack for x in sides)
    return Call(backend, heads, spec, folded, _asked(sides), pack, boost, stored)


def _asked(sides: tuple[Operand, ...]) -> int | None:
    least: int | None = None  # not min() with a default, which torch.compile does not know
    for x in sides:
        size = x.chunk_size if isinstance(x, LinearLogits) else None
        if size is not None and (least is None or size < least):
            least = size
    return least


def _boost(reduction: str, normalizer: float | Tensor | None, student: Operand) -> float:
    """About what the reduction divides by, as a power of 2; see `Linear`."""
    by = 1.0
    if reduction == "batchmean":
        by = student.size(0)
    elif reduction == "mean":
        number = isinstance(normalizer, (int, float))
        by = float(normalizer) if number else student.numel() // student.size(-1)  # type: ignore
    return min(2.0 ** round(math.log2(by)), MOST_BOOST) if by > 1.0 else 1.0


def _total(call: Call, sides: tuple[Operand, ...]) -> Tensor:
    tensors = [x for side in sides for x in _tensors(side)]
    if torch.is_grad_enabled() and any(side.requires_grad for side in sides):
        return linear_autograd.Total.apply(call, *tensors)
    work = trip(call, tensors, [False] * len(tensors), wait=False)
    return call.backend.total(work.loss, work.scale, call.folded.factor)


def _plain_rows(
    student: Operand,
    teacher: Operand | None,
    spec: LossSpec,
    keep: Tensor | None,
    label: Tensor | None,
    stored: TopKRows | None,
) -> Tensor:
    sides = (student,) if teacher is None else (student, teacher)
    tensors = [x for side in sides for x in _tensors(side)]
    heads = (_head(student), None if teacher is None else _head(teacher))
    s, t = linear_autograd.logits(tensors, heads, spec.vocab, keep)
    return reference.row_loss(s, stored or t, spec, keep, label if spec.hard else None)


def _rows(
    backend: Backend,
    student: Operand,
    teacher: Operand | None,
    spec: LossSpec,
    keep: Tensor | None,
    label: Tensor | None,
    stored: TopKRows | None,
) -> Tensor:
    label = label if spec.hard else None
    sides = (student,) if teacher is None else (student, teacher)
    tensors = [x for side in sides for x in _tensors(side)]
    if torch.compiler.is_compiling():
        heads = (_head(student), None if teacher is None else _head(teacher))
        return linear_autograd.registered_rows(
            tensors, heads, spec, keep, label, _asked(sides), stored
        )
    folded = Rows(flat(keep), flat(label), None, 1.0)
    call = _call(backend, sides, spec, folded, 1.0, stored)
    if torch.is_grad_enabled() and any(side.requires_grad for side in sides):
        return linear_autograd.RowLoss.apply(call, student.shape[:-1], *tensors)
    return linear_autograd.row_values(call, tensors).view(student.shape[:-1])
