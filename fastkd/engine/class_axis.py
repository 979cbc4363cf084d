"""Classes along another dimension than the last, and several labels that leave a row out.

Both are settled before a loss begins: what runs has its classes last and one ignore_index.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastkd.arguments.messages import describe, shown, sizes
from fastkd.arguments.numbers import integer
from fastkd.arguments.tensors import DTYPES, INT_DTYPES
from fastkd.backends.choice import in_functorch, pick, valueless

LAST = -1


def dimension(class_dim: int) -> int:
    """class_dim as an int."""
    number = integer(class_dim)
    if number is None:
        raise TypeError(f"class_dim: got {describe(class_dim)}, expected an integer")
    return number


def classes_last(student: Any, teacher: Any, class_dim: int, group: object = None) -> Any:
    """(student, teacher) with the classes of both last.

    They are read where they lie if the classes then have stride 1, as in channels_last maps; else a
    copy is made of them. The student's gradient has the student's own strides.

    Raises:
        TypeError, ValueError: no integer, no dimension of the student, operands whose classes are
            last by their nature.
        NotImplementedError: DTensors, a process group.
    """
    at = dimension(class_dim)
    dims = student.dim() if isinstance(student, Tensor) else 1
    if at == LAST or (at == dims - 1 and isinstance(student, Tensor)):
        return student, teacher
    for name, x in (("student", student), ("teacher", teacher)):
        if hasattr(x, "placements") or group is not None:
            raise NotImplementedError(
                f"class_dim: got {at} with a group or DTensors, which are not supported; give "
                f"{name}.movedim({at}, -1) of each rank"
            )
        if hasattr(x, "head") or hasattr(x, "columns") or hasattr(x, "logprobs"):
            raise TypeError(
                f"class_dim: got {at} with {describe(x)[:120]} as {name}, whose classes are last, "
                f"expected tensors of logits on both sides; give logits.movedim({at}, -1) and "
                "leave class_dim out"
            )
    if not _dense(student) or not _dense(teacher) or not dims:
        return student, teacher  # for the loss's own checks to refuse
    if not -dims <= at < dims:
        raise ValueError(
            f"class_dim: got {shown(class_dim)}, expected {-dims} to {dims - 1}, a dimension of "
            f"the student's {sizes(student.shape)}"
        )
    if teacher.dim() != dims:
        raise ValueError(
            f"teacher: got shape {sizes(teacher.shape)}, expected the {dims} dimensions of the "
            f"student's {sizes(student.shape)}, with classes in dimension {at}"
        )
    return moved(student, at), moved(teacher, at)


def moved(x: Tensor, class_dim: int) -> Tensor:
    """x with dimension class_dim last; a copy where its stride is not 1."""
    rows = x.movedim(class_dim, -1)
    if rows.stride(-1) == 1 or rows.size(-1) <= 1:
        return rows
    if valueless(x):
        return rows.clone(memory_format=torch.contiguous_format)
    if not (x.requires_grad and torch.is_grad_enabled()):
        return _copy(x, class_dim)
    return _Copied.apply(x, class_dim)


def _copy(x: Tensor, dim: int, to: int = -1) -> Tensor:
    """x with a dimension moved, to the last place or from it, laid out."""
    dim, to = dim % x.dim(), to % x.dim()
    shape = x.movedim(dim, to).shape
    plain = x.is_contiguous() and not x.is_neg() and x.numel()
    if not plain or x.dtype not in DTYPES:  # for the loss's own checks to refuse
        # contiguous() leaves an empty one
        return x.movedim(dim, to).clone(memory_format=torch.contiguous_format)
    first = min(dim, to)
    rows = x.size(first) if dim < to else math.prod(x.shape[first:-1])
    whole = x.detach().view(math.prod(x.shape[:first]), rows, -1)
    return pick(x.device).transposed(whole).view(shape)


class _Copied(torch.autograd.Function):
    """The copy, whose gradient has the strides of the tensor it was made of."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, class_dim: int) -> Tensor:
        ctx.class_dim, ctx.strides = class_dim, x.stride()
        # a permutation of memory without gaps; else any layout is as good
        ctx.dense = torch.ops.aten.is_non_overlapping_and_dense(x)
        ctx.contiguous = x.is_contiguous()
        return _copy(x, class_dim)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None]:
        grad = upstream.movedim(-1, ctx.class_dim)
        if torch.is_grad_enabled() or not ctx.dense or in_functorch(upstream):
            return grad.contiguous(), None
        if ctx.contiguous:
            return _copy(upstream, -1, ctx.class_dim), None
        own = torch.empty_strided(grad.shape, ctx.strides, dtype=grad.dtype, device=grad.device)
        return own.copy_(grad), None


def _dense(x: object) -> bool:
    return isinstance(x, Tensor) and x.layout is torch.strided and not x.is_nested


def several(ignore_index: Any) -> tuple[int, ...]:
    """ignore_index as ints, one or more."""
    many = ignore_index if isinstance(ignore_index, Sequence) else (ignore_index,)
    if isinstance(ignore_index, (str, bytes, bytearray)):
        many = (ignore_index,)
    if not many:
        raise ValueError("ignore_index: got none, expected an integer or several of them")
    return tuple(_ignored(x) for x in many)


def _ignored(ignore_index: object) -> int:
    number = ignore_index if type(ignore_index) is int else integer(ignore_index)
    if number is None:
        raise TypeError(
            f"ignore_index: got {describe(ignore_index)}, expected an integer, or several such as "
            "(-100, 255)"
        )
    if not -(2**63) <= number < 2**63:
        raise ValueError(f"ignore_index: got {shown(ignore_index)}, expected a 64-bit integer")
    return number


def one_ignored(labels: Any, ignore_index: Any) -> tuple[Any, int]:
    """(labels, ignore_index) with the first index in place of all of them."""
    first, *others = several(ignore_index)
    if others and isinstance(labels, Tensor) and labels.dtype in INT_DTYPES:
        labels = labels.to(torch.int64)  # a label that is out of the range of a narrower dtype
        out = labels == others[0]
        for index in others[1:]:
            out = out | (labels == index)
        labels = labels.masked_fill(out, first)
    return labels, first
