"""The gradient in the student's own memory: the same bits, and who hears of it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from common import TABLE, Backend, each_dtype, each_name, logits, some_labels
from oracle import differentiate
from torch import Tensor

import fastkd
from fastkd.divergence import Divergence

# ---- inplace


def _inplace(student: Tensor, *args: Any, **options: Any) -> tuple[Tensor, Tensor, Tensor]:
    """(the model's logits, the loss, their gradient)."""
    leaf = student.detach().clone().requires_grad_()
    computed = leaf * 1
    loss = fastkd.distillation_loss(computed, *args, inplace=True, **options)
    (grad,) = torch.autograd.grad(loss, computed)
    return computed, loss.detach(), grad


@each_name
@each_dtype
def test_inplace_gives_the_same_bits_in_the_students_memory(
    kernels: Backend, divergence: Divergence, dtype: torch.dtype
) -> None:
    student, teacher = logits(kernels, 5, 37, (dtype, torch.float32))
    labels = some_labels(kernels, 5, 37, ignored=0.3)
    options = {"divergence": divergence, "label_smoothing": 0.1}
    usual = differentiate(fastkd.distillation_loss, student, teacher, labels, **options)
    computed, loss, grad = _inplace(student, teacher, labels, **options)
    assert grad.data_ptr() == computed.data_ptr()
    assert torch.equal(loss, usual.value) and torch.equal(grad, usual.student)


@pytest.mark.not_interpreted
def test_inplace_over_several_blocks(kernels: Backend) -> None:
    student, teacher = logits(kernels, 3, 5003)
    for divergence in TABLE:
        usual = differentiate(
            fastkd.distillation_loss, student, teacher, alpha=0.0, divergence=divergence
        )
        _, _, grad = _inplace(student, teacher, alpha=0.0, divergence=divergence)
        assert torch.equal(grad, usual.student), divergence.name


def test_inplace_with_both_gradients(kernels: Backend) -> None:
    student, teacher = logits(kernels, 5, 37)
    usual = differentiate(fastkd.kl_div, student, teacher, wrt="both")
    leaf, other = student.clone().requires_grad_(), teacher.clone().requires_grad_()
    loss = fastkd.kl_div(leaf * 1, other, inplace=True)
    grads = torch.autograd.grad(loss, (leaf, other))
    assert torch.equal(grads[0], usual.student) and torch.equal(grads[1], usual.teacher)


def test_inplace_writes_a_view_where_it_lies(kernels: Backend) -> None:
    """The gradient of x[:, :-1] goes into that view; the last position keeps its logits."""
    x = torch.randn(2, 4, 9, device=kernels.device)
    teacher = torch.randn(2, 3, 9, device=kernels.device)
    usual = differentiate(fastkd.kl_div, x[:, :-1], teacher)
    leaf = x.clone().requires_grad_()
    computed = leaf * 1
    fastkd.kl_div(computed[:, :-1], teacher, inplace=True).backward()
    assert torch.equal(leaf.grad[:, :-1], usual.student) and not leaf.grad[:, -1].any()
    assert torch.equal(computed[:, :-1], usual.student)
    assert torch.equal(computed[:, -1], x[:, -1])


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_inplace_is_heard_by_a_second_consumer(kernels: Backend, reduction: str) -> None:
    student, teacher = logits(kernels, 5, 37)
    computed = student.requires_grad_() * 1
    other = (computed * computed).sum()
    loss = fastkd.kl_div(computed, teacher, inplace=True, reduction=reduction)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        (loss + other).backward()


def test_inplace_hears_that_the_logits_were_modified(kernels: Backend) -> None:
    student, teacher = logits(kernels, 5, 37)
    computed = student.requires_grad_() * 1
    loss = fastkd.kl_div(computed, teacher, inplace=True)
    with torch.no_grad():
        computed.zero_()
    with pytest.raises(RuntimeError, match="inplace"):
        loss.backward()


def test_inplace_is_a_permission(backend: Backend) -> None:
    """Where nothing is gained by it (the reference, "none", no gradient) it changes nothing."""
    student, teacher = logits(backend, 5, 37)
    before = student.clone()
    fastkd.kl_div(student, teacher, inplace=True)
    computed = student.clone().requires_grad_() * 1
    with torch.no_grad():
        fastkd.kl_div(computed, teacher, inplace=True)
    assert torch.equal(student, before) and torch.equal(computed, before)
    loss = fastkd.kl_div(computed, teacher, inplace=True, reduction="none")
    (grad,) = torch.autograd.grad(loss.sum(), computed)
    usual = differentiate(fastkd.kl_div, student, teacher, reduction="sum")
    torch.testing.assert_close(grad, usual.student)


def test_inplace_with_one_tensor_on_both_sides(kernels: Backend) -> None:
    student, _ = logits(kernels, 5, 37)
    computed = student.requires_grad_() * 1
    (grad,) = torch.autograd.grad(
        fastkd.kl_div(computed, computed.detach(), inplace=True), computed
    )
    assert not grad.any()
