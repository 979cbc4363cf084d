"""Gradients as autograd sees them: checked by differences, repeated, doubled, scaled, refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from common import Backend, each_divergence, each_form, each_name, each_pair, logits
from oracle import assert_as_good_as_torch, differentiate
from pairwise import pairwise
from torch import Tensor

import fastkd
from fastkd.divergence import Divergence

DOUBLE = (torch.float64, torch.float64)
WAYS = ["mean", "none"]  # fused with its gradient in forward; by row, gradient in backward
each_way = pytest.mark.parametrize("reduction", WAYS)


def _loss(labels: Tensor | None = None, **options: Any) -> Callable[[Tensor, Tensor], Tensor]:
    def loss(student: Tensor, teacher: Tensor) -> Tensor:
        return fastkd.distillation_loss(student, teacher, labels, **options)

    return loss


# ---- by finite differences


def _interpreted(backend: Backend) -> bool:
    """There, a difference along one direction at random, and not along each."""
    return backend.name == "gpu" and backend.device.type == "cpu"


@each_divergence
@each_way
@pytest.mark.interpreted(1)
def test_gradcheck(backend: Backend, divergence: Divergence, reduction: str) -> None:
    student, teacher = (x.requires_grad_() for x in logits(backend, 2, 4, DOUBLE))
    loss = _loss(alpha=0.0, divergence=divergence, reduction=reduction)
    fast = _interpreted(backend)
    assert torch.autograd.gradcheck(loss, (student, teacher), fast_mode=fast)


@each_way
@pytest.mark.interpreted(1)
def test_gradcheck_of_the_whole_loss(backend: Backend, reduction: str) -> None:
    student, teacher = (x.requires_grad_() for x in logits(backend, 3, 4, DOUBLE))
    labels = torch.tensor([2, -100, 0], device=backend.device)
    weight = torch.tensor([0.5, 1.0, 2.0], device=backend.device)
    loss = _loss(labels, label_smoothing=0.1, weight=weight, reduction=reduction)
    fast = _interpreted(backend)
    assert torch.autograd.gradcheck(loss, (student, teacher), fast_mode=fast)


@each_name
@each_way
@pytest.mark.interpreted(1)
def test_gradgradcheck(backend: Backend, divergence: Divergence, reduction: str) -> None:
    student, teacher = (x.requires_grad_() for x in logits(backend, 2, 3, DOUBLE))
    labels = torch.tensor([2, 0], device=backend.device)
    loss = _loss(labels, alpha=0.3, divergence=divergence, reduction=reduction)
    fast = _interpreted(backend)
    assert torch.autograd.gradgradcheck(loss, (student, teacher), fast_mode=fast)


def test_hessian_vector_product(backend: Backend) -> None:
    student, teacher = logits(backend, 3, 5, DOUBLE)
    vector = torch.randn_like(student)
    products = []
    for loss in (fastkd.kl_div, _in_torch):
        s = student.clone().requires_grad_()
        (grad,) = torch.autograd.grad(loss(s, teacher), s, create_graph=True)
        (product,) = torch.autograd.grad((grad * vector).sum(), s)
        products.append(product)
    torch.testing.assert_close(products[0], products[1], rtol=1e-10, atol=1e-14)


def _in_torch(student: Tensor, teacher: Tensor) -> Tensor:
    p = teacher.log_softmax(-1)
    return torch.nn.functional.kl_div(
        student.log_softmax(-1), p, log_target=True, reduction="batchmean"
    )


# ---- the teacher's gradient


@pairwise
@each_form
@each_divergence
@each_pair
@each_way
@pytest.mark.interpreted(12)
def test_gradient_of_the_teacher(
    form: str,
    backend: Backend,
    divergence: Divergence,
    pair: tuple[torch.dtype, torch.dtype],
    reduction: str,
) -> None:
    student, teacher = logits(backend, 2, 37, pair)
    assert_as_good_as_torch(
        student, teacher, divergence=divergence, reduction=reduction, wrt="teacher", form=form
    )


@pairwise
@each_form
@each_divergence
@each_way
def test_both_gradients_at_once(
    form: str, backend: Backend, divergence: Divergence, reduction: str
) -> None:
    student, teacher = logits(backend, 4, 37, (torch.bfloat16, torch.float32))
    labels = torch.tensor([1, 36, -100, 2], device=backend.device)
    options = {"alpha": 0.4, "temperature": 2.0, "t_squared": True, "reduction": reduction}
    assert_as_good_as_torch(
        student, teacher, labels, divergence=divergence, wrt="both", **options, form=form
    )


@each_form
def test_teachers_gradient_does_not_know_the_hard_labels(form: str, backend: Backend) -> None:
    student, teacher = logits(backend, 4, 37)
    labels = torch.tensor([1, 36, 5, 2], device=backend.device)
    grads = [
        differentiate(_loss(at, alpha=alpha), student, teacher, wrt="teacher", form=form).teacher
        for at, alpha in ((labels, 0.5), (None, 0.0))
    ]
    torch.testing.assert_close(grads[0], 0.5 * grads[1])


@each_way
def test_teacher_gets_a_gradient_where_only_labels_count(backend: Backend, reduction: str) -> None:
    """Exactly 0, never None: what requires a gradient is not silently dropped."""
    student, teacher = (x.requires_grad_() for x in logits(backend, 4, 37))
    labels = torch.tensor([1, 36, 5, 2], device=backend.device)
    _loss(labels, alpha=1.0, reduction=reduction)(student, teacher).sum().backward()
    assert student.grad.any()
    assert teacher.grad is not None and not teacher.grad.any()


def test_one_tensor_as_both_operands(backend: Backend) -> None:
    """Self-distillation against oneself: the two gradients meet and vanish."""
    student = logits(backend, 3, 7, DOUBLE)[0].requires_grad_()
    (grad,) = torch.autograd.grad(fastkd.js_div(student, student), student)
    assert grad.abs().max() < 1e-15


# ---- again, scaled, in place


@pairwise
@each_name
@each_way
@pytest.mark.parametrize("wrt", ["student", "both"])
def test_second_backward_gives_the_same_bits(
    backend: Backend, divergence: Divergence, reduction: str, wrt: str
) -> None:
    """Also after the first gradient was modified in place by whoever received it."""
    student, teacher = logits(backend, 3, 21)
    s = student.requires_grad_()
    t = teacher.requires_grad_(wrt == "both")
    loss = _loss(alpha=0.0, divergence=divergence, reduction=reduction)(s, t).sum()
    inputs = (s, t) if wrt == "both" else (s,)
    first = torch.autograd.grad(loss, inputs, retain_graph=True)
    kept = [grad.clone() for grad in first]
    for grad in first:
        grad.mul_(float("nan"))
    for _ in range(2):
        again = torch.autograd.grad(loss, inputs, retain_graph=True)
        for one, other in zip(again, kept, strict=True):
            assert torch.equal(one, other)


@pytest.mark.parametrize("upstream", [1.0, 0.3, -2.0])
def test_second_backward_scales_as_the_first(backend: Backend, upstream: float) -> None:
    student, teacher = logits(backend, 3, 21)
    s = student.requires_grad_()
    loss = fastkd.js_div(s, teacher)
    by = torch.full_like(loss, upstream)
    grads = [torch.autograd.grad(loss, s, by, retain_graph=True)[0] for _ in range(3)]
    assert torch.equal(grads[0], grads[1]) and torch.equal(grads[0], grads[2])


@pytest.mark.parametrize("upstreams", [(1.0, 1.0), (1.0, 2.0), (0.5, 1.0)], ids=str)
def test_second_backward_in_place(backend: Backend, upstreams: tuple[float, float]) -> None:
    student, teacher = logits(backend, 3, 21)
    computed = student.clone().requires_grad_() * 1
    loss = fastkd.kl_div(computed, teacher, inplace=True)
    grads = [
        torch.autograd.grad(loss, computed, torch.full_like(loss, by), retain_graph=True)[0].clone()
        for by in upstreams
    ]
    usual = differentiate(fastkd.kl_div, student, teacher).student
    for grad, by in zip(grads, upstreams, strict=True):
        torch.testing.assert_close(grad, by * usual, rtol=1e-6, atol=0)


def test_second_backward_in_place_hears_of_a_modified_gradient(kernels: Backend) -> None:
    student, teacher = logits(kernels, 3, 21)
    computed = student.requires_grad_() * 1
    loss = fastkd.kl_div(computed, teacher, inplace=True)
    (grad,) = torch.autograd.grad(loss, computed, retain_graph=True)
    grad.mul_(2)
    with pytest.raises(RuntimeError, match="inplace"):
        torch.autograd.grad(loss, computed, retain_graph=True)


@pytest.mark.parametrize("refused", ["teacher", "create_graph"])
def test_inplace_says_what_it_cannot_do(kernels: Backend, refused: str) -> None:
    """What needs the overwritten logits once more is a clear error, never a wrong gradient."""
    student, teacher = logits(kernels, 3, 21)
    computed = student.requires_grad_() * 1
    loss = fastkd.kl_div(computed, teacher.requires_grad_(), inplace=True)
    if refused == "teacher":
        torch.autograd.grad(loss, (computed, teacher), retain_graph=True)
    with pytest.raises(RuntimeError, match="inplace"):
        torch.autograd.grad(
            loss, (computed, teacher), retain_graph=True, create_graph=refused == "create_graph"
        )


@pairwise
@each_form
@each_name
@each_way
def test_upstream_gradient(
    form: str, backend: Backend, divergence: Divergence, reduction: str
) -> None:
    student, teacher = logits(backend, 4, 37, (torch.float32, torch.bfloat16))
    shape = (4,) if reduction == "none" else ()
    upstream = 3 * torch.randn(shape, device=backend.device)
    assert_as_good_as_torch(
        student,
        teacher,
        divergence=divergence,
        reduction=reduction,
        upstream=upstream,
        wrt="both",
        form=form,
    )


def test_two_losses_over_one_student(backend: Backend) -> None:
    student, teacher = logits(backend, 4, 37)
    s = student.requires_grad_()
    (both,) = torch.autograd.grad(fastkd.kl_div(s, teacher) + fastkd.tv_distance(s, teacher), s)
    each = [
        differentiate(loss, student, teacher).student
        for loss in (fastkd.kl_div, fastkd.tv_distance)
    ]
    torch.testing.assert_close(both, each[0] + each[1])


def test_gradient_accumulates_in_a_leaf(backend: Backend) -> None:
    student, teacher = logits(backend, 4, 37)
    s = student.requires_grad_()
    for _ in range(2):
        fastkd.kl_div(s, teacher).backward()
    once = differentiate(fastkd.kl_div, student, teacher).student
    assert torch.equal(s.grad, 2 * once)


# ---- no gradient


@each_way
def test_no_grad_calls(backend: Backend, reduction: str) -> None:
    student, teacher = logits(backend, 4, 37)
    usual = fastkd.kl_div(student.clone().requires_grad_(), teacher, reduction=reduction)
    assert usual.requires_grad
    plain = fastkd.kl_div(student, teacher, reduction=reduction)
    with torch.no_grad():
        without = fastkd.kl_div(student.requires_grad_(), teacher, reduction=reduction)
    with torch.inference_mode():
        inference = fastkd.kl_div(student, teacher, reduction=reduction)
    for loss in (plain, without, inference):
        assert not loss.requires_grad and torch.equal(loss, usual.detach())


def test_operands_are_never_written(backend: Backend) -> None:
    student, teacher = logits(backend, 4, 37)
    before = student.clone(), teacher.clone()
    differentiate(_loss(torch.tensor([1, 2, -100, 3], device=backend.device)), student, teacher)
    assert torch.equal(student, before[0]) and torch.equal(teacher, before[1])


@pairwise
@each_form
@each_pair
@each_way
def test_gradient_comes_in_the_operands_dtype(
    form: str, backend: Backend, pair: tuple[torch.dtype, torch.dtype], reduction: str
) -> None:
    student, teacher = logits(backend, 2, 5, pair)
    ours = differentiate(
        fastkd.kl_div,
        student,
        teacher,
        wrt="both",
        reduction=reduction,
        upstream=torch.ones((2,) if reduction == "none" else (), device=backend.device),
        form=form,
    )
    assert (ours.student.dtype, ours.teacher.dtype) == pair
    wide = torch.float64 in pair
    assert ours.value.dtype == (torch.float64 if wide else torch.float32)


# ---- autocast, hooks, threads


@each_way
def test_autocast(backend: Backend, reduction: str) -> None:
    """bfloat16 logits out of an autocast model; the loss is float32, weights get gradients."""
    layer = torch.nn.Linear(8, 31, device=backend.device)
    x, teacher = torch.randn(4, 8, device=backend.device), torch.randn(4, 31, device=backend.device)
    with torch.autocast(backend.device.type, dtype=torch.bfloat16):
        student = layer(x)
        loss = fastkd.kl_div(student, teacher, reduction=reduction)
    assert student.dtype == torch.bfloat16 and loss.dtype == torch.float32
    loss.sum().backward()
    outside = differentiate(fastkd.kl_div, student.detach(), teacher, reduction=reduction)
    torch.testing.assert_close(loss.detach(), outside.value)
    expected = outside.student.float().sum(0)
    torch.testing.assert_close(layer.bias.grad, expected, rtol=2e-2, atol=2e-3)


def test_autocast_leaves_float64_alone(backend: Backend) -> None:
    student, teacher = logits(backend, 4, 31, DOUBLE)
    with torch.autocast(backend.device.type, dtype=torch.bfloat16):
        inside = fastkd.kl_div(student, teacher)
    torch.testing.assert_close(inside, fastkd.kl_div(student, teacher), rtol=1e-14, atol=0)


def test_activation_checkpointing(backend: Backend) -> None:
    student, teacher = logits(backend, 4, 31)
    s = student.requires_grad_()
    loss = torch.utils.checkpoint.checkpoint(fastkd.kl_div, s, teacher, use_reentrant=False)
    (grad,) = torch.autograd.grad(loss, s)
    assert torch.equal(grad, differentiate(fastkd.kl_div, student, teacher).student)
