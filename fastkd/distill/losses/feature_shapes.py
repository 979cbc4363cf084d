"""Helpers of the losses between features: precision, unit vectors, maps of one size, checks."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, ParamSpec

import torch
import torch.nn.functional as F
from torch import Tensor

from ..batch import mapped, tensors

P = ParamSpec("P")


def full_precision(function: Callable[P, Tensor]) -> Callable[P, Tensor]:
    """`function` with its floating-point tensors in float32 (float64 where one is), autocast off.

    A trainer's autocast would take the matrix products back to 8 bits of mantissa.
    """

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> Tensor:
        found = [x for x in tensors((args, kwargs)) if x.is_floating_point()]
        if not found:
            got = ", ".join(type(x).__name__ for x in args)
            raise TypeError(f"{function.__name__}: got ({got}), expected floating-point tensors")
        dtype = functools.reduce(torch.promote_types, (x.dtype for x in found), torch.float32)

        def wide(x: Tensor) -> Tensor:
            return x.to(dtype) if x.is_floating_point() else x

        with torch.autocast(found[0].device.type, enabled=False):
            return function(*mapped(args, wide), **mapped(kwargs, wide))

    return call


def unit(x: Tensor) -> Tensor:
    """x / |x| along the last dimension; 0, with gradient 0, where |x|^2 is 0 in its dtype."""
    square = x.square().sum(-1, keepdim=True)
    found = square > 0
    return x * torch.where(found, square, 1.0).rsqrt().where(found, 0.0)


def channels_last(x: Tensor) -> Tensor:
    """[N, C, H, W] as [N, H, W, C]; features [..., D] as they are."""
    return x.movedim(1, -1) if x.dim() == 4 else x


def pooled(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Maps [N, C, H, W], the larger one averaged down to the height and width of the smaller."""
    if a.dim() != 4 or b.dim() != 4 or a.shape[2:] == b.shape[2:]:
        return a, b
    size = min(a.size(2), b.size(2)), min(a.size(3), b.size(3))
    a, b = (x if x.shape[2:] == size else F.adaptive_avg_pool2d(x, size) for x in (a, b))
    return a, b


def maps(x: Tensor) -> Tensor:
    """One row per channel, [N, C, positions], of [N, C, H, W] or [N, L, C]."""
    return x.flatten(2) if x.dim() == 4 else x.transpose(1, 2)


def expect(fits: bool, student: Any, teacher: Any, expected: str) -> None:
    """TypeError where a feature is no tensor, ValueError with both shapes where not `good`."""
    for name, x in (("student", student), ("teacher", teacher)):
        if not isinstance(x, Tensor):
            raise TypeError(f"{name}: got {type(x).__name__}, expected a tensor of features")
    if not fits:
        raise ValueError(
            f"features: got {list(student.shape)} of the student and {list(teacher.shape)} of the "
            f"teacher, expected {expected}"
        )


def check_same_shape(student: Any, teacher: Any) -> None:
    """Both of one shape."""
    same = getattr(student, "shape", None) == getattr(teacher, "shape", None)
    expect(same, student, teacher, "equal shapes; a projector makes them so")


def same_batch(student: Any, teacher: Any, dims: tuple[int, ...] = ()) -> None:
    """As many samples on both sides, in tensors of `dims` dimensions (of at least one for ())."""
    sizes: list[Any] = [getattr(x, "shape", ()) for x in (student, teacher)]
    fit = all(len(size) in dims if dims else len(size) >= 1 for size in sizes)
    among = f" of {' or '.join(map(str, dims))} dimensions" if dims else ""
    fits = fit and sizes[0][0] == sizes[1][0]
    expect(fits, student, teacher, f"tensors{among} [N, ...] with the same number of samples N")
