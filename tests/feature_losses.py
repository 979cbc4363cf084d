"""Feature losses and the pairs that their tests share."""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fastkd.distill.losses import features

Loss = Callable[[Tensor, Tensor], Tensor]


FUNCTIONS: dict[str, Loss] = {
    "l2": features.hint,
    "l1": functools.partial(features.hint, kind="l1"),
    "cosine": functools.partial(features.hint, kind="cosine"),
    "nst-polynomial": features.nst,
    "nst-cubic": functools.partial(features.nst, degree=3, offset=0.5),
    "nst-linear": functools.partial(features.nst, kernel="linear"),
    "nst-gaussian": functools.partial(features.nst, kernel="gaussian", bandwidth=0.7),
    "second-moment": features.second_moment,
}


SHAPES = {"vectors": (5, 6), "sequence": (3, 4, 6), "maps": (2, 6, 3, 4)}


shapes = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)


def pair(shape: tuple[int, ...], dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    return torch.randn(shape).to(dtype), torch.randn(shape).to(dtype)


def vectors(x: Tensor) -> list[Tensor]:
    """Every vector of channels there is in the features."""
    return list(x.movedim(1, -1).reshape(-1, x.size(1)) if x.dim() == 4 else x.flatten(0, -2))


def assert_low_precision_only_at_the_ends(
    loss: Loss, s: Tensor, t: Tensor, floors: float, absolute: float = 1e-12
) -> None:
    """Beside the same numbers in float64, only float32's rounding; also where autocast is on."""
    dtype = s.dtype
    s, t = (x.requires_grad_() for x in (s, t))
    exact_s, exact_t = (x.detach().double().requires_grad_() for x in (s, t))
    exact = loss(exact_s, exact_t)
    with torch.autocast("cpu", torch.bfloat16):
        value = loss(s, t)
    assert value.dtype == torch.float32
    assert float(value.detach()) == pytest.approx(float(exact.detach()), rel=1e-5, abs=absolute)
    value.backward()
    exact.backward()
    assert s.grad is not None and exact_s.grad is not None and s.grad.dtype == dtype
    error = (s.grad.double() - exact_s.grad).abs().max()
    assert error <= floors * exact_s.grad.abs().max() + torch.finfo(dtype).smallest_normal


def mean(values: list[float]) -> float:
    return sum(values) / len(values)
