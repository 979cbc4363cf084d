"""Stored teachers: what a TopK of a few columns and a tail costs, on every backend."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from common import KINKED, Backend, each_divergence, each_dtype, each_name
from pairwise import pairwise
from stored_teachers import (
    assert_as_good_as_torch,
    differentiated,
    each_size,
    each_tail,
    fused,
    random,
    stored,
)

import fastkd
from fastkd.divergence import Divergence


@pytest.mark.interpreted(4)
@pairwise
@each_size
@each_tail
@each_divergence
def test_definitions(
    backend: Backend, divergence: Divergence, tail: str, size: tuple[int, int, int]
) -> None:
    n, v, k = size
    student, teacher = random(backend, n, v)
    assert_as_good_as_torch(student, stored(teacher, k, tail), divergence=divergence)


@pairwise
@each_dtype
@each_tail
@each_name
def test_dtypes(backend: Backend, divergence: Divergence, tail: str, dtype: torch.dtype) -> None:
    student, teacher = random(backend, 4, 300, dtype)
    assert_as_good_as_torch(student, stored(teacher, 12, tail), divergence=divergence)


@pairwise
@each_tail
@each_name
@pytest.mark.parametrize("temperature", [0.05, 2.0, 100.0])
def test_temperatures(
    backend: Backend, divergence: Divergence, tail: str, temperature: float
) -> None:
    student, teacher = random(backend, 3, 50)
    kept = stored(teacher, 6, tail, temperature)
    assert_as_good_as_torch(student, kept, divergence=divergence, temperature=temperature)


@each_tail
@each_name
def test_hard_labels_beside_it(backend: Backend, divergence: Divergence, tail: str) -> None:
    student, teacher = random(backend, 5, 3000)
    kept = stored(teacher, 9, tail)
    labels = torch.randint(0, 3000, (5,), device=backend.device)
    labels[0], labels[1] = kept.indices[0].max(), -100  # a named column, and an ignored row
    options: dict[str, Any] = {"alpha": 0.3, "label_smoothing": 0.1, "divergence": divergence}
    ours = assert_as_good_as_torch(student, kept, labels, **options)
    assert ours.student is not None and not ours.student[1].any()


@each_tail
def test_all_columns_named_is_the_dense_loss(backend: Backend, tail: str) -> None:
    student, teacher = random(backend, 2, 40)
    kept = stored(teacher, 40, tail)
    for name in fastkd.divergences:
        dense = differentiated(fused, student, teacher, divergence=name)
        ours = differentiated(fused, student, kept, divergence=name)
        torch.testing.assert_close(ours.value, dense.value, rtol=2e-5, atol=2e-6)
        torch.testing.assert_close(ours.student, dense.student, rtol=1e-4, atol=2e-6)


@pytest.mark.parametrize("k", [3, 40])
def test_a_tail_that_was_not_measured(backend: Backend, k: int) -> None:
    """It is worked out of the others; a row that names every column has none."""
    student, teacher = random(backend, 2, 40)
    kept = stored(teacher, k, "bucket")
    bare = fastkd.TopK(kept.logprobs, kept.indices, temperature=kept.temperature)
    for name in fastkd.divergences:
        measured = fused(student, kept, divergence=name, reduction="none")
        worked_out = fused(student, bare, divergence=name, reduction="none")
        torch.testing.assert_close(worked_out, measured, rtol=1e-4, atol=1e-5)


@each_divergence
def test_bucket_is_at_most_the_full_divergence_and_zero_where_equal(
    backend: Backend, divergence: Divergence
) -> None:
    student, teacher = random(backend, 3, 200)
    kept = fastkd.topk_from_logits(teacher, 10)
    full = fused(student, teacher, divergence=divergence, reduction="none")
    bucket = fused(student, kept, divergence=divergence, reduction="none")
    assert bool((bucket <= full * (1 + 1e-5)).all()) and bool((bucket > 0).all())
    same = differentiated(fused, teacher, kept, divergence=divergence)
    assert abs(float(same.value)) < 1e-6
    assert same.student is not None
    if divergence.name not in KINKED:  # whose gradient is of size q however small the difference
        assert float(same.student.abs().max()) < 1e-6


@pytest.mark.parametrize("tail", [None, -9.0])
def test_a_row_of_all_columns_has_no_tail(backend: Backend, tail: float | None) -> None:
    """Whatever rounding has left of its mass: a tail of no columns would make the loss infinite."""
    student, teacher = random(backend, 3, 10)
    logprobs = teacher.log_softmax(-1) - 1e-4
    columns = torch.arange(10, device=backend.device).expand(3, 10)
    measured = None if tail is None else torch.full((3,), tail, device=backend.device)
    kept = fastkd.TopK(logprobs, columns, tail_logprob=measured)
    loss = fastkd.kl_div(student, kept)
    torch.testing.assert_close(loss, fastkd.kl_div(student, teacher), rtol=1e-3, atol=1e-3)


def test_drop_may_fall_below_zero(backend: Backend) -> None:
    teacher = torch.tensor([[2.0, 1.0, 0.0, 0.0]], device=backend.device)
    student = torch.tensor([[9.0, 0.0, 0.0, 0.0]], device=backend.device)
    kept = fastkd.topk_from_logits(teacher, 1, tail="drop")
    assert float(fastkd.kl_div(student, kept)) < 0 < float(fastkd.kl_div(student, teacher))


@each_name
def test_far_tail_of_a_certain_student(backend: Backend, divergence: Divergence) -> None:
    """The student's tail mass is e^-150 of its row: no difference of sums has a digit of it."""
    student, teacher = random(backend, 3, 5000)
    student = student.sub(150).index_fill(-1, torch.arange(4, device=backend.device), 10.0)
    kept = stored(teacher.index_fill(-1, torch.arange(4, device=backend.device), 9.0), 4)
    assert_as_good_as_torch(student, kept, divergence=divergence)


@pytest.mark.parametrize("offset", [-1e4, 1e4, 3e37])
def test_logits_far_from_zero(backend: Backend, offset: float) -> None:
    student, teacher = random(backend, 3, 300)
    if abs(offset) > 1e30:
        student = student * 1e37
    else:
        student = student + offset
    assert_as_good_as_torch(student, stored(teacher, 7), divergence=fastkd.divergences.tv)


def test_measured_tail_is_used(backend: Backend) -> None:
    """1 - sum of p, of float16 probabilities, is off; the tail measured at capture is not."""
    teacher = torch.full((1, 1000), -20.0, device=backend.device)
    teacher[0, :3] = torch.tensor([3.0, 2.0, 1.0])
    student = teacher.clone()
    student[0, 3:] += 5
    kept = fastkd.topk_from_logits(teacher, 3)
    assert kept.tail_logprob is not None
    assert float(kept.tail_logprob) == pytest.approx(-16.5, abs=0.2)
    coarse = fastkd.TopK(kept.logprobs, kept.indices)
    exact = fastkd.reverse_kl_div(student.double(), teacher.double())
    measured = fastkd.reverse_kl_div(student, kept)
    assert float(measured) == pytest.approx(float(exact), rel=5e-3)
    assert float(fastkd.reverse_kl_div(student, coarse)) != pytest.approx(float(exact), rel=5e-3)


@pairwise
@each_tail
@each_name
@pytest.mark.parametrize("bias", [False, True])
def test_linear_student(backend: Backend, divergence: Divergence, tail: str, bias: bool) -> None:
    n, v, h = 7, 90, 12
    hidden = torch.randn(n, h, device=backend.device, requires_grad=True)
    weight = torch.randn(v, h, device=backend.device, requires_grad=True)
    b = torch.randn(v, device=backend.device, requires_grad=True) if bias else None
    kept = stored(3 * torch.randn(n, v, device=backend.device), 6, tail)
    labels = torch.randint(0, v, (n,), device=backend.device)
    labels[2] = -100
    inputs = [x for x in (hidden, weight, b) if x is not None]
    losses, grads = [], []
    for student in (
        fastkd.LinearLogits(hidden, weight, b, softcap=20.0, chunk_size=3),
        torch.tanh(F.linear(hidden, weight, b) / 20.0) * 20.0,
    ):
        loss = fastkd.distillation_loss(
            student, kept, labels, alpha=0.2, temperature=1.0, divergence=divergence
        )
        losses.append(loss.detach())
        if bool(loss.isfinite()):
            grads.append(torch.autograd.grad(loss, inputs))
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-5, atol=1e-6)
    for ours, dense in zip(*grads, strict=True) if grads else ():
        torch.testing.assert_close(ours, dense, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("reduction", ["mean", "batchmean", "sum", "none"])
@each_tail
def test_reductions_weights_and_ignored_rows(backend: Backend, tail: str, reduction: str) -> None:
    student, teacher = random(backend, 6, 70)
    kept = stored(teacher, 5, tail)
    labels = torch.tensor([1, -100, 2, 3, -100, 4], device=backend.device)
    weight = torch.rand(6, device=backend.device) + 0.5
    student[1] = kept.logprobs[4] = torch.nan  # rows that nobody may read
    kept.indices[1] = 10**6
    rows = fastkd.kl_div(student, kept, labels=labels, reduction="none")
    assert rows.shape == (6,) and rows[1] == 0 == rows[4]
    whole = fastkd.kl_div(student, kept, labels=labels, weight=weight, reduction=reduction)
    scaled = rows * weight
    by = {"mean": weight[labels >= 0].sum(), "batchmean": 6.0, "sum": 1.0, "none": 1.0}[reduction]
    expected = (scaled if reduction == "none" else scaled.sum()) / by
    torch.testing.assert_close(whole, expected, rtol=1e-5, atol=1e-7)


def test_memory_of_one_gradient_and_leading_dimensions(backend: Backend) -> None:
    student, teacher = random(backend, 6, 30)
    kept = stored(teacher, 4)
    flat = differentiated(fused, student, kept)
    assert flat.student is not None
    shaped = fastkd.TopK(
        kept.logprobs.view(2, 3, -1),
        kept.indices.view(2, 3, -1),
        tail_logprob=None if kept.tail_logprob is None else kept.tail_logprob.view(2, 3),
    )
    whole = differentiated(fused, student.view(2, 3, 30), shaped)
    assert whole.student is not None
    assert torch.equal(whole.student.view(6, 30), flat.student)
    assert torch.equal(whole.value, flat.value)


@pytest.mark.parametrize("hard", [0.0, 0.5])
def test_only_labels_count(backend: Backend, hard: float) -> None:
    """alpha = 1: the teacher is not read, whatever it holds."""
    student, teacher = random(backend, 3, 20)
    labels = torch.tensor([1, 2, 3], device=backend.device)
    broken = stored(teacher, 4)
    broken.logprobs.fill_(torch.nan)
    loss = fastkd.distillation_loss(student, broken, labels, alpha=1.0, temperature=1.0)
    torch.testing.assert_close(loss, F.cross_entropy(student, labels))
