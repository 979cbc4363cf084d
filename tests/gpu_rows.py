"""Operands of the Triton passes and the rule for them, against the reference in float64."""

from __future__ import annotations

import math
import os
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read by triton when it is imported: no import before

from oracle import FLOORS

import fastkd
from fastkd.backends import base
from fastkd.backends.base import LossSpec, acc_dtype
from fastkd.backends.reference import BACKEND as reference

pytest.importorskip("triton")
from fastkd.backends.gpu import BACKEND as gpu

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
INF, NAN = math.inf, math.nan
NAMES = list(fastkd.divergences)

each_name = pytest.mark.parametrize("name", NAMES)


class Rows(NamedTuple):
    """Operands [A, B, V] and what goes with each row."""

    student: Tensor
    teacher: Tensor
    keep: Tensor | None
    label: Tensor | None
    scale: Tensor | None


def spec_of(name: str, vocab: int, **changes: Any) -> LossSpec:
    param = 0.3 if fastkd.divergences[name].parameter else 0.0
    return LossSpec(name, param, 2.0, 0.7, 0.0, 0.0, vocab, vocab)._replace(**changes)


def make(a: int, b: int, vocab: int, pair: Any = (torch.float32,) * 2, spread: float = 3.0) -> Rows:
    student, teacher = ((spread * torch.randn(a, b, vocab)).to(DEVICE, dtype) for dtype in pair)
    n, acc = a * b, acc_dtype(student, teacher)
    keep = torch.arange(n, device=DEVICE) % 3 != 1
    label = torch.randint(0, vocab, (n,)).to(DEVICE)
    scale = torch.rand(n).to(DEVICE, acc)
    return Rows(student, teacher, keep, label, scale)


def fused(passes: Any, x: Rows, spec: LossSpec, grad: Tensor, factor: float = 0.5) -> Tensor:
    label = x.label if spec.hard else None
    options = base.Rows(x.keep, label, x.scale, factor)
    return passes.fused(x.student, x.teacher, spec, options, grad)


def assert_like_reference(
    x: Rows, spec: LossSpec, grad: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The rule of `oracle`: at most twice the error of plain torch, plus the floor."""
    grad = torch.full_like(x.student, NAN) if grad is None else grad
    exact = x._replace(student=x.student.double(), teacher=x.teacher.double())
    shape = (*grad.shape[:2], x.student.size(2))
    true_grad = torch.zeros(shape, dtype=torch.float64, device=DEVICE)
    torchs_grad = torch.zeros(shape, dtype=x.student.dtype, device=DEVICE)
    torchs, true = fused(reference, x, spec, torchs_grad), fused(reference, exact, spec, true_grad)
    ours = fused(gpu, x, spec, grad)
    assert ours.dtype == acc_dtype(x.student, x.teacher)
    floor = FLOORS[ours.dtype]
    bound = 2 * (torchs - true).abs() + floor * true.abs().clamp_min(1.0)
    assert ((ours - true).abs() <= bound).all(), (ours - true).abs() / bound
    wide, width = grad[..., : spec.vocab].double(), spec.vocab
    largest = true_grad.abs().max()
    error = (torchs_grad[..., :width].double() - true_grad[..., :width]).abs().max()
    # the accumulator's floor is relative to the slopes, whose sum it is that cancels (`oracle`)
    terms = (true.abs() * x.scale).max() + x.scale.max()
    stored = 2 * error + FLOORS[grad.dtype] * largest + floor * terms
    assert ((wide - true_grad[..., :width]).abs() <= stored).all()
    assert not grad[..., spec.vocab :].any(), "columns past vocab are written 0"
    return ours, grad
