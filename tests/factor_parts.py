"""Losses of each operand with a factor behind them, which forget what they have expected."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from common import Backend
from torch import Tensor

import fastkd
from fastkd.divergence import Divergence
from fastkd.engine import autograd as upstreams

N, V = 5, 300  # rows: each is a program, which Triton's interpreter runs one after another
T = 2.0
each_operand = pytest.mark.parametrize("operand", ["logits", "topk", "linear"])
Loss = Callable[..., Tensor]
CPU = Backend("cpu", torch.device("cpu"))


@pytest.fixture(autouse=True)
def nothing_remembered() -> Iterator[None]:
    upstreams._places.of.clear()
    yield
    upstreams._places.of.clear()


def inputs(backend: Backend, dtype: torch.dtype, operand: str) -> tuple[Any, Any, Tensor]:
    """Student, teacher, and the leaf whose gradient is looked at."""
    s, t = (3 * torch.randn(N, V, device=backend.device) for _ in "st")
    leaf = s.to(dtype).requires_grad_()
    if operand == "topk":
        return leaf, fastkd.topk_from_logits(t, 8, temperature=T), leaf
    if operand == "linear":
        leaf = (torch.randint(-4, 5, (N, 8), device=backend.device) / 4).to(dtype).requires_grad_()
        weight = (torch.randint(-4, 5, (V, 8), device=backend.device) / 4).to(dtype)
        return fastkd.LinearLogits(leaf, weight), t.to(dtype), leaf
    return leaf, t.to(dtype), leaf


def loss_of(divergence: Divergence, reduction: str = "mean", **options: Any) -> Loss:
    def loss(student: Any, teacher: Any) -> Tensor:
        value = fastkd.distillation_loss(
            student, teacher, alpha=0.0, temperature=T, divergence=divergence, t_squared=False,
            reduction=reduction, **options,
        )  # fmt: skip
        return value.sum() if reduction == "none" else value

    return loss
