"""The registered operators under torch.library.opcheck, and in the layouts of a compiler."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from common import Backend, each_name, logits
from linear_parts import parts_in_a_row

import fastkd
from fastkd.backends.base import LossSpec
from fastkd.divergence import Divergence


def _spec(divergence: Divergence, vocab: int, hard: float = 0.0) -> LossSpec:
    return LossSpec(divergence.name, divergence.param, 2.0, 0.7, hard, hard / 2, vocab, vocab)


def _arguments(backend: Backend, case: str) -> list[Any]:
    """student, teacher, keep, label of an operator."""
    student, teacher = logits(backend, 2, 9)
    keep = label = None
    if case in ("labels", "everything"):
        keep = torch.tensor([True, False], device=backend.device)
        label = torch.tensor([8, -100], device=backend.device)
    if case in ("strided", "everything"):
        student = torch.randn(2, 12, device=backend.device)[:, 1:10]
        teacher = torch.randn(1, 9, device=backend.device).expand(2, 9)
    if case == "leading":
        student, teacher = student.view(2, 1, 9), teacher.view(2, 1, 9)
    if case == "mixed":
        student, teacher = student.bfloat16(), teacher.double()
    return [student, teacher, keep, label]


def _inputs(student: Any, teacher: Any, *rest: Any) -> tuple[Any, ...]:
    """The operator's inputs for logits on both sides; rest: keep, label and a spec."""
    keep, label, *spec = rest
    sides = [(x, None, None, 1.0, 0.0, x.dtype) for x in (student, teacher)]
    return (*sides[0], *sides[1], keep, label, None, None, None, False, 0, *spec)


CASES = ["plain", "labels", "strided", "leading", "mixed", "everything"]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.interpreted(1)
def test_opcheck_of_the_loss_of_logits(backend: Backend, case: str) -> None:
    student, teacher, keep, label = _arguments(backend, case)
    student, teacher = student.requires_grad_(), teacher.detach().requires_grad_()
    spec = _spec(fastkd.divergences.js, 9, hard=0.0 if label is None else 0.3)
    inputs = _inputs(student, teacher, keep, label, *spec)
    torch.library.opcheck(torch.ops.fastkd.row_loss, inputs)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.interpreted(1)
def test_opcheck_of_the_gradients_of_logits(backend: Backend, case: str) -> None:
    student, teacher, keep, label = _arguments(backend, case)
    spec = _spec(fastkd.divergences.kl, 9, hard=0.0 if label is None else 0.3)
    scale = torch.rand(student.shape[:-1], device=backend.device)
    needs = [True, False, False, True, False, False]
    inputs = (*_inputs(student, teacher, keep, label, *spec), scale, needs)
    torch.library.opcheck(torch.ops.fastkd.row_grads, inputs)


@each_name
@pytest.mark.interpreted(1)
def test_opcheck_of_every_divergence(backend: Backend, divergence: Divergence) -> None:
    student, teacher = (x.requires_grad_() for x in logits(backend, 2, 5))
    spec = _spec(divergence, 5)
    torch.library.opcheck(
        torch.ops.fastkd.row_loss,
        _inputs(student, teacher, None, None, *spec),
        test_utils=("test_schema", "test_autograd_registration", "test_faketensor"),
    )


def test_operators_take_any_layout_of_a_compiler(backend: Backend) -> None:
    """A compiler may hand over columns that are not contiguous."""
    student, teacher = logits(backend, 4, 9)
    spec = _spec(fastkd.divergences.kl, 9)
    usual = torch.ops.fastkd.row_loss(*_inputs(student, teacher, None, None, *spec))
    turned = student.t().contiguous().t()
    assert turned.stride() == (1, 4)
    inputs = _inputs(turned, teacher, None, None, *spec)
    assert torch.equal(torch.ops.fastkd.row_loss(*inputs), usual)


@pytest.mark.parametrize("dense", ["student", "teacher", "neither"])
@pytest.mark.interpreted(1)
def test_opcheck_of_linear_loss(backend: Backend, dense: str) -> None:
    parts = parts_in_a_row(backend)
    given = torch.randn(4, 9, device=backend.device).requires_grad_()
    none = (None, None, 1.0, 0.0, torch.float32)
    student = (given, *none) if dense == "student" else (*parts[:3], 0.5, 3.0, torch.float32)
    teacher = (given, *none) if dense == "teacher" else (*parts[3:], 1.0, 0.0, torch.float32)
    keep = torch.tensor([True, False, True, True], device=backend.device)
    label = torch.tensor([1, -100, 0, 8], device=backend.device)
    rest = (keep, label, None, None, None, False, 2, *_spec(fastkd.divergences.kl, 9, hard=0.3))
    torch.library.opcheck(torch.ops.fastkd.row_loss, (*student, *teacher, *rest))


def test_opcheck_of_linear_grads(backend: Backend) -> None:
    parts = [x.detach() for x in parts_in_a_row(backend)]
    sides = (*parts[:3], 0.5, 3.0, torch.float32, *parts[3:], 1.0, 0.0, torch.float32)
    topk = (None, None, None, False)
    rest = (
        None,
        None,
        *topk,
        0,
        *_spec(fastkd.divergences.kl, 9),
        torch.rand(4, device=backend.device),
    )
    needs = [True, True, False, False, True, True]
    torch.library.opcheck(torch.ops.fastkd.row_grads, (*sides, *rest, needs))
