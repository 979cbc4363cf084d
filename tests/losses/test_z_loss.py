"""The weight on the squared log-sum-exp of the student's logits at T = 1."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from common import DTYPES, INF, Backend, each_dtype, each_form, in_form, logits
from mapped_teachers import each_normalize, operands
from oracle import assert_as_good_as_torch, differentiate
from pairwise import pairwise
from torch import Tensor

import fastkd
from fastkd.operands import TAILS

SOME = [fastkd.divergences[name] for name in ("kl", "reverse_kl", "js", "acceptance")]


def _z(student: Tensor, weight: float) -> tuple[Tensor, Tensor]:
    """The term and its gradient, in float64."""
    x = student.detach().double().requires_grad_()
    term = weight * x.logsumexp(-1).square()
    (grad,) = torch.autograd.grad(term.sum(), x)
    return term.detach(), grad


@pairwise
@each_form
@each_dtype
@pytest.mark.parametrize("divergence", SOME, ids=lambda entry: entry.name)
@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("alpha", [None, 0.0, 0.4, 1.0])
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.interpreted(8)
def test_against_torch(
    form: str,
    backend: Backend,
    dtype: torch.dtype,
    divergence: Any,
    temperature: float,
    alpha: float | None,
    reduction: str,
) -> None:
    """With labels and without, some of them ignored; the log-sum-exp far from 0."""
    student, teacher = logits(backend, 6, 37, (dtype, dtype))
    student = (student + 7).contiguous()
    labels = torch.tensor([1, -100, 20, 0, 36, -100], device=backend.device)
    options: dict[str, Any] = {"alpha": alpha or 0.0, "temperature": temperature, "z_loss": 0.03}
    options |= {"divergence": divergence, "reduction": reduction, "form": form}
    if alpha:
        options["label_smoothing"] = 0.1
    ours = assert_as_good_as_torch(student, teacher, None if alpha is None else labels, **options)
    if alpha is not None:
        assert ours.student is not None and not ours.student[labels == -100].any()


def _assert_added(student: Tensor, teacher: Any, labels: Tensor | None, **options: Any) -> None:
    """What the weight adds to loss and gradient is the term's."""
    found = []
    for weight in (0.0, 0.03):
        x = student.clone().requires_grad_()
        loss = fastkd.distillation_loss(
            x, teacher, labels, z_loss=weight, reduction="none", **options
        )
        found.append((loss.detach().double(), torch.autograd.grad(loss.sum(), x)[0].double()))
    for without, with_it, exact in zip(*found, _z(student, 0.03), strict=True):
        torch.testing.assert_close(with_it - without, exact, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("alpha", [0.0, 0.3])
@pytest.mark.parametrize("tail", TAILS)
def test_beside_a_topk_teacher(
    backend: Backend, tail: str, alpha: float, temperature: float
) -> None:
    student, teacher = logits(backend, 4, 300)
    kept = fastkd.topk_from_logits(teacher, 8, temperature=temperature, tail=tail)
    labels = torch.tensor([1, 299, 20, 0], device=backend.device) if alpha else None
    _assert_added(student, kept, labels, alpha=alpha, temperature=temperature)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
@each_normalize
@pytest.mark.interpreted(4)
def test_beside_a_mapped_teacher(
    backend: Backend, normalize: Any, alpha: float, temperature: float
) -> None:
    student, teacher, columns = operands(backend)
    mapped = fastkd.MappedLogits(teacher, columns, normalize=normalize)
    labels = torch.tensor([1, 20, 7, 0, 3], device=backend.device) if alpha else None
    for divergence in ("kl", "acceptance"):
        options = {"alpha": alpha, "temperature": temperature, "divergence": divergence}
        _assert_added(student, mapped, labels, **options)


@pairwise
@pytest.mark.parametrize("columns", [300, 5000])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("form", ["dense", "linear", "topk", "restrict"])
@pytest.mark.interpreted(4)
def test_outputs_are_as_without(
    kernels: Backend, form: str, alpha: float, temperature: float, columns: int
) -> None:
    """No output holds a share of the term."""
    student, teacher = logits(kernels, 4, columns)
    labels = torch.tensor([1, -100, 20, 0], device=kernels.device)
    if form in ("dense", "linear"):
        sides = in_form(student, teacher, form)
    else:
        tail: Any = "restrict" if form == "restrict" else "bucket"
        kept = fastkd.topk_from_logits(teacher, 8, temperature=temperature, tail=tail)
        sides = student, kept
    options: dict[str, Any] = {"alpha": alpha, "temperature": temperature, "label_smoothing": 0.1}
    for divergence in ("kl", "js"):
        without, with_it = (
            fastkd.distillation_loss(
                *sides, labels, z_loss=weight, divergence=divergence, return_outputs=True, **options
            )[1]
            for weight in (0.0, 0.03)
        )
        for name, told, again in zip(without._fields, without, with_it, strict=True):
            assert (told is None) == (again is None), name
            assert told is None or torch.equal(told, again), name


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_identical_logits_leave_the_term_alone(backend: Backend, dtype: torch.dtype) -> None:
    """t_squared and T do not reach it."""
    student = (logits(backend, 3, 50)[0] + 2).to(dtype)
    ours = differentiate(
        fastkd.distillation_loss, student, student.clone(), alpha=0.0, temperature=3.0,
        z_loss=0.5, reduction="none",
    )  # fmt: skip
    value, grad = _z(student, 0.5)
    torch.testing.assert_close(ours.value.double(), value, rtol=2e-5, atol=1e-5)
    assert ours.student is not None
    unit = 8 * torch.finfo(ours.student.dtype).eps
    assert (ours.student.double() - grad).abs().max() <= unit * grad.abs().max() + 2e-5


def test_a_row_without_a_distribution_is_nan(backend: Backend) -> None:
    student, teacher = logits(backend, 3, 20)
    student[1] = teacher[1] = -INF
    ours = differentiate(
        fastkd.distillation_loss, student, teacher, alpha=0.0, z_loss=0.1, reduction="none"
    )
    assert ours.value.isnan().tolist() == [False, True, False]
    assert ours.student is not None and ours.student[[0, 2]].isfinite().all()


def test_second_derivative(backend: Backend) -> None:
    student, teacher = logits(backend, 2, 5, (torch.float64, torch.float64))
    student.requires_grad_()

    def loss(x: Tensor) -> Tensor:
        return fastkd.distillation_loss(x, teacher, alpha=0.0, z_loss=0.2)

    assert torch.autograd.gradgradcheck(loss, student)
