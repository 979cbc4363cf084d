"""Leading dimensions, strides, and shapes of no rows or one column."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from common import Backend, each_dtype, each_form, each_name, each_reduction, logits
from oracle import (
    Result,
    assert_as_good_as_torch,
    assert_gradients,
    assert_values,
    differentiate,
    plain,
)
from pairwise import pairwise
from torch import Tensor

import fastkd
from fastkd.backends.base import rows_of as rows
from fastkd.divergence import Divergence

KL = fastkd.divergences.kl


# ---- leading dimensions and strides


@pairwise
@each_form
@pytest.mark.parametrize("lead", [(), (5,), (2, 3), (2, 1, 3), (2, 1, 2, 2)], ids=str)
@each_reduction
def test_leading_dimensions(
    form: str, backend: Backend, lead: tuple[int, ...], reduction: str
) -> None:
    student, teacher = (torch.randn(*lead, 11, device=backend.device) for _ in range(2))
    labels = torch.randint(11, lead, device=backend.device)
    weight = torch.rand(lead, device=backend.device)
    options: dict[str, Any] = {"alpha": 0.5, "weight": weight, "reduction": reduction}
    ours = assert_as_good_as_torch(student, teacher, labels, divergence=KL, **options, form=form)
    assert ours.value.shape == (lead if reduction == "none" else ())


VIEWS: dict[str, Callable[[Tensor], Tensor]] = {
    "padded-rows": lambda x: x.view(6, 32)[:, :21],
    "padded-rows-of-two-dimensions": lambda x: x.view(2, 3, 32)[..., :21],
    "from-an-odd-column": lambda x: x.view(6, 32)[:, 3:24],
    "every-other-row": lambda x: x.view(6, 32)[::2, :21],
    "without-the-last-position": lambda x: x.view(2, 3, 32)[:, :-1, :21],
    "without-the-first-position": lambda x: x.view(2, 3, 32)[:, 1:, :21],
    "transposed": lambda x: x.view(2, 3, 32)[..., :21].transpose(0, 1),
    "three-strides": lambda x: x.view(2, 3, 1, 32)[..., :21].expand(2, 3, 2, 21).transpose(0, 1),
    "expanded-rows": lambda x: x.view(6, 32)[:1, :21].expand(5, 21),
    "expanded-outer": lambda x: x.view(2, 3, 32)[:1, :, :21].expand(3, 3, 21),
    "expanded-inner": lambda x: x.view(2, 3, 32)[:, :1, :21].expand(2, 3, 21),
}
each_view = pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS.keys())


def _check_against_copies(
    function: Callable[..., Result], student: Tensor, teacher: Tensor
) -> None:
    for reduction in ("mean", "none"):
        strided = function(student, teacher, reduction=reduction)
        copied = function(student.contiguous(), teacher.contiguous(), reduction=reduction)
        for one, other in zip(strided, copied, strict=True):
            assert torch.equal(one, other)


def _both(student: Tensor, teacher: Tensor, reduction: str) -> Result:
    return differentiate(fastkd.js_div, student, teacher, beta=0.3, wrt="both", reduction=reduction)


@each_view
@pytest.mark.interpreted(1)
def test_strides_of_the_teacher(backend: Backend, view: Callable[[Tensor], Tensor]) -> None:
    teacher = view(torch.randn(192, device=backend.device))
    _check_against_copies(_both, torch.randn_like(teacher).contiguous(), teacher)


@each_view
@pytest.mark.interpreted(1)
def test_strides_of_the_student(backend: Backend, view: Callable[[Tensor], Tensor]) -> None:
    student = view(torch.randn(192, device=backend.device))
    _check_against_copies(_both, student, torch.randn_like(student).contiguous())


@each_dtype
@pytest.mark.parametrize("start", [1, 2, 3])
def test_unaligned_rows_of_every_dtype(backend: Backend, dtype: torch.dtype, start: int) -> None:
    """Rows that start anywhere, at an odd distance from each other."""
    student, teacher = (torch.randn(2, 39, device=backend.device).to(dtype) for _ in range(2))
    stop = start + 35
    _check_against_copies(_both, student[:, start:stop], teacher[:, start - 1 : stop - 1])


@pytest.mark.parametrize(
    "view",
    [VIEWS[name] for name in VIEWS if name != "three-strides"],
    ids=[name for name in VIEWS if name != "three-strides"],
)
def test_views_are_read_where_they_lie(view: Callable[[Tensor], Tensor]) -> None:
    x = view(torch.randn(192))
    seen = rows(x)
    assert seen.data_ptr() == x.data_ptr() and seen.dim() == 3
    assert torch.equal(seen.reshape(-1, 21), x.reshape(-1, 21))


@pairwise
@each_form
@each_reduction
def test_no_rows(form: str, backend: Backend, reduction: str) -> None:
    for shape in ((0, 7), (2, 0, 7)):
        student, teacher = (torch.empty(shape, device=backend.device) for _ in range(2))
        labels = torch.empty(shape[:-1], dtype=torch.int64, device=backend.device)
        for options in ({"alpha": 0.0}, {"labels": labels}):
            ours = differentiate(
                fastkd.distillation_loss,
                student,
                teacher,
                reduction=reduction,
                **options,
                form=form,
            )
            assert ours.value.shape == (shape[:-1] if reduction == "none" else ())
            assert not ours.value.any() and ours.student.shape == shape


@pairwise
@each_form
@each_name
def test_one_column(form: str, backend: Backend, divergence: Divergence) -> None:
    """One outcome is certain on both sides: gradient exactly 0, loss 0 within rounding."""
    student, teacher = logits(backend, 5, 1)
    labels = torch.zeros(5, dtype=torch.int64, device=backend.device)
    ours = differentiate(
        fastkd.distillation_loss,
        student,
        teacher,
        labels,
        divergence=divergence,
        wrt="both",
        form=form,
    )
    assert ours.value.abs() < 1e-7 and not ours.student.any() and not ours.teacher.any()


def test_one_column_of_any_stride(backend: Backend) -> None:
    """The stride of a dimension of size 1 says nothing."""
    student, teacher = (torch.randn(1, 5, device=backend.device).t() for _ in range(2))
    assert fastkd.kl_div(student, teacher) == 0


def test_many_rows_of_few_columns(backend: Backend) -> None:
    n = 40 if backend.name == "gpu" and backend.device.type == "cpu" else 5000
    student, teacher = logits(backend, n, 3)
    ours = differentiate(fastkd.kl_div, student, teacher)
    exact, torchs = (
        differentiate(plain, student.to(dtype), teacher.to(dtype), divergence=KL)
        for dtype in (torch.float64, torch.float32)
    )
    assert_values(ours.value, torchs.value, exact.value)
    assert_gradients(ours.student, torchs.student, exact.student)
