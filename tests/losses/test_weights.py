"""Weights of rows, the normalizer, and vocabularies that are padded."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from common import (
    Backend,
    each_dtype,
    each_form,
    each_name,
    each_reduction,
    logits,
    some_labels,
)
from oracle import assert_as_good_as_torch, differentiate
from pairwise import pairwise

import fastkd
from fastkd.divergence import Divergence

NAN = float("nan")
KL = fastkd.divergences.kl


# ---- weight and normalizer


@pairwise
@each_form
@each_name
@each_reduction
@each_dtype
def test_weight(
    form: str, backend: Backend, divergence: Divergence, reduction: str, dtype: torch.dtype
) -> None:
    student, teacher = logits(backend, 4, 13)
    weight = torch.rand(4, device=backend.device).to(dtype)
    weight[1] = 0
    labels = torch.tensor([1, 2, -100, 3], device=backend.device)
    options = {"alpha": 0.3, "weight": weight, "reduction": reduction}
    assert_as_good_as_torch(student, teacher, labels, divergence=divergence, **options, form=form)


@each_form
def test_weights_that_sum_to_zero(form: str, backend: Backend) -> None:
    student, teacher = logits(backend, 4, 13)
    weight = torch.zeros(4, device=backend.device)
    ours = differentiate(fastkd.kl_div, student, teacher, weight=weight, form=form)
    assert ours.value == 0 and not ours.student.any()


def test_gradient_of_weight(backend: Backend) -> None:
    student, teacher = logits(backend, 4, 13)
    weight = torch.rand(4, device=backend.device).requires_grad_()
    (grad,) = torch.autograd.grad(
        fastkd.kl_div(student, teacher, weight=weight, reduction="sum"), weight
    )
    torch.testing.assert_close(grad, fastkd.kl_div(student, teacher, reduction="none"))


def test_gradient_of_normalizer(backend: Backend) -> None:
    student, teacher = logits(backend, 4, 13)
    normalizer = torch.tensor(5.0, device=backend.device, requires_grad=True)
    loss = fastkd.kl_div(student, teacher, normalizer=normalizer)
    (grad,) = torch.autograd.grad(loss, normalizer)
    torch.testing.assert_close(grad, -loss.detach() / 5)


NORMALIZERS: dict[str, Callable[[torch.device], Any]] = {
    "int": lambda device: 7,
    "float": lambda device: 6.5,
    "tensor": lambda device: torch.tensor(6.5, device=device),
    "integer-tensor": lambda device: torch.tensor(7, device=device),
    "bfloat16-tensor": lambda device: torch.tensor(7.0, device=device, dtype=torch.bfloat16),
    "tensor-on-the-host": lambda device: torch.tensor(6.5),
    "zero": lambda device: 0,
    "zero-tensor": lambda device: torch.tensor(0.0, device=device),
}


@pairwise
@each_form
@pytest.mark.parametrize("make", NORMALIZERS.values(), ids=NORMALIZERS.keys())
def test_normalizer(form: str, backend: Backend, make: Callable[[torch.device], Any]) -> None:
    student, teacher = logits(backend, 4, 13)
    labels = torch.tensor([1, 2, -100, 3], device=backend.device)
    options = {"alpha": 0.3, "normalizer": make(backend.device)}
    assert_as_good_as_torch(student, teacher, labels, divergence=KL, **options, form=form)


@pairwise
@each_form
@pytest.mark.parametrize("as_tensor", [False, True], ids=["number", "tensor"])
def test_uneven_micro_batches_accumulate_to_the_full_batch(
    form: str, backend: Backend, as_tensor: bool
) -> None:
    student, teacher = logits(backend, 10, 13, (torch.float64, torch.float64))
    labels = some_labels(backend, 10, 13)
    labels[[0, 4, 8]] = -100
    kept = (labels >= 0).sum()
    full = differentiate(fastkd.distillation_loss, student, teacher, labels, form=form)
    parts = [
        differentiate(
            fastkd.distillation_loss,
            student[at],
            teacher[at],
            labels[at],
            normalizer=kept if as_tensor else kept.item(),
            form=form,
        )
        for at in (slice(0, 1), slice(1, 7), slice(7, 10))
    ]
    value = torch.stack([part.value for part in parts]).sum()
    torch.testing.assert_close(value, full.value, rtol=1e-13, atol=0)
    grad = torch.cat([part.student for part in parts])
    torch.testing.assert_close(grad, full.student, rtol=1e-13, atol=1e-17)


# ---- padded vocabularies


@pairwise
@each_name
@each_dtype
@pytest.mark.parametrize("alpha", [0.0, 0.5])
def test_vocab_size_with_different_paddings(
    backend: Backend, divergence: Divergence, dtype: torch.dtype, alpha: float
) -> None:
    """Columns beyond it may hold NaN; their gradient is exactly 0."""
    student, teacher = logits(backend, 3, 48, (dtype, dtype))
    teacher = teacher[:, :41].contiguous()
    student[:, 33:], teacher[:, 33:] = NAN, NAN
    ours = assert_as_good_as_torch(
        student,
        teacher,
        some_labels(backend, 3, 33),
        divergence=divergence,
        alpha=alpha,
        label_smoothing=0.1,
        vocab_size=33,
        reduction="none",
        wrt="both",
    )
    assert not ours.student[:, 33:].any() and not ours.teacher[:, 33:].any()


def test_vocab_size_in_a_padded_ignored_row(backend: Backend) -> None:
    student, teacher = (torch.full((2, 3000), NAN, device=backend.device) for _ in range(2))
    student[1, :2050], teacher[1, :2050] = 0.0, 1.0
    labels = torch.tensor([-100, 2049], device=backend.device)
    ours = differentiate(fastkd.kl_div, student, teacher, labels=labels, vocab_size=2050)
    assert ours.value.abs() < 1e-6 and ours.student.abs().max() < 1e-6
