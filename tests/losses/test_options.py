"""The options that all losses share, and those of the hard labels."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
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


# ---- reductions


@pytest.mark.parametrize("reduction", ["batchmean", "sum"])
def test_reductions_of_kl_div_in_torch(backend: Backend, reduction: str) -> None:
    student, teacher = logits(backend, 5, 31, (torch.float64, torch.float64))
    ours = fastkd.kl_div(student, teacher, reduction=reduction)
    theirs = F.kl_div(student.log_softmax(-1), teacher.softmax(-1), reduction=reduction)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=0)


def test_mean_is_over_rows_not_over_elements(backend: Backend) -> None:
    student, teacher = logits(backend, 5, 31, (torch.float64, torch.float64))
    ours = fastkd.kl_div(student, teacher)
    theirs = F.kl_div(student.log_softmax(-1), teacher.softmax(-1), reduction="none")
    torch.testing.assert_close(ours, theirs.sum(-1).mean(), rtol=1e-12, atol=0)


def test_batchmean_divides_by_the_first_dimension(backend: Backend) -> None:
    student, teacher = logits(backend, 12, 7, (torch.float64, torch.float64))
    ours = fastkd.kl_div(student.view(3, 4, 7), teacher.view(3, 4, 7), reduction="batchmean")
    assert ours.item() == pytest.approx(fastkd.kl_div(student, teacher).item() * 4, rel=1e-12)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
def test_hard_labels_alone_are_cross_entropy(
    backend: Backend, reduction: str, smoothing: float
) -> None:
    student, teacher = logits(backend, 9, 31, (torch.float64, torch.float64))
    labels = some_labels(backend, 9, 31, ignored=0.3)
    labels[0] = 3
    ours = fastkd.distillation_loss(
        student, teacher, labels, alpha=1.0, label_smoothing=smoothing, reduction=reduction
    )
    theirs = F.cross_entropy(student, labels, label_smoothing=smoothing, reduction=reduction)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-14)


@pairwise
@each_form
@each_name
@each_reduction
def test_reductions(form: str, backend: Backend, divergence: Divergence, reduction: str) -> None:
    student, teacher = logits(backend, 7, 29)
    labels = some_labels(backend, 7, 29, ignored=0.3)
    labels[0] = 3
    assert_as_good_as_torch(
        student, teacher, labels, divergence=divergence, alpha=0.3, reduction=reduction, form=form
    )


# ---- hard labels and soft divergence


@pairwise
@each_form
@each_name
@each_dtype
@pytest.mark.parametrize("alpha", [0.0, 0.25, 1.0])
def test_alpha(
    form: str, backend: Backend, divergence: Divergence, dtype: torch.dtype, alpha: float
) -> None:
    student, teacher = logits(backend, 3, 37, (dtype, dtype))
    labels = some_labels(backend, 3, 37)
    options = {"alpha": alpha, "temperature": 2.0, "t_squared": True, "reduction": "none"}
    assert_as_good_as_torch(student, teacher, labels, divergence=divergence, **options, form=form)


@pairwise
@each_form
@each_dtype
@pytest.mark.parametrize("smoothing", [0.1, 1.0])
def test_label_smoothing(form: str, backend: Backend, dtype: torch.dtype, smoothing: float) -> None:
    student, teacher = logits(backend, 5, 37, (dtype, dtype))
    assert_as_good_as_torch(
        student,
        teacher,
        some_labels(backend, 5, 37),
        divergence=KL,
        alpha=0.5,
        label_smoothing=smoothing,
        reduction="none",
        form=form,
    )


@pytest.mark.not_interpreted
@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_hard_labels_in_every_block(backend: Backend, temperature: float) -> None:
    student, teacher = logits(backend, 6, 5003)
    labels = torch.tensor([0, 1023, 1024, 2048, 4999, 5002], device=backend.device)
    options = {"alpha": 0.5, "label_smoothing": 0.1, "temperature": temperature}
    assert_as_good_as_torch(student, teacher, labels, divergence=KL, reduction="none", **options)


def test_defaults_of_distillation_loss(backend: Backend) -> None:
    """Half hard, half T^2 = 4 times the KL at T = 2."""
    student, teacher = logits(backend, 5, 31, (torch.float64, torch.float64))
    labels = some_labels(backend, 5, 31)
    ours = fastkd.distillation_loss(student, teacher, labels)
    soft = F.kl_div((student / 2).log_softmax(-1), (teacher / 2).softmax(-1), reduction="batchmean")
    expected = 0.5 * F.cross_entropy(student, labels) + 0.5 * 4 * soft
    torch.testing.assert_close(ours, expected, rtol=1e-12, atol=0)


def test_t_squared_is_a_factor_of_the_soft_term(backend: Backend) -> None:
    student, teacher = logits(backend, 5, 31, (torch.float64, torch.float64))
    with_it, without = (
        fastkd.distillation_loss(student, teacher, alpha=0.0, temperature=3.0, t_squared=square)
        for square in (True, False)
    )
    torch.testing.assert_close(with_it, 9 * without, rtol=1e-14, atol=0)


def test_divergence_is_a_name_or_an_entry(backend: Backend) -> None:
    student, teacher = logits(backend, 5, 31)
    by_name = fastkd.distillation_loss(student, teacher, alpha=0.0, divergence="js")
    by_entry = fastkd.distillation_loss(
        student, teacher, alpha=0.0, divergence=fastkd.divergences.js(beta=0.5)
    )
    assert torch.equal(by_name, by_entry)


@each_form
def test_teacher_is_not_read_where_only_labels_count(form: str, backend: Backend) -> None:
    student, teacher = logits(backend, 5, 31)
    labels = some_labels(backend, 5, 31)
    nothing = torch.full_like(teacher, NAN)
    run = [
        differentiate(fastkd.distillation_loss, student, t, labels, alpha=1.0, form=form)
        for t in (teacher, nothing)
    ]
    assert torch.equal(run[0].value, run[1].value)
    assert torch.equal(run[0].student, run[1].student)


# ---- ignored rows


@pairwise
@each_form
@each_name
@each_reduction
@pytest.mark.parametrize("alpha", [0.0, 0.4])
def test_ignored_rows_are_never_read(
    form: str, backend: Backend, divergence: Divergence, reduction: str, alpha: float
) -> None:
    student, teacher = logits(backend, 6, 33, (torch.float32, torch.bfloat16))
    labels = some_labels(backend, 6, 33)
    ignored = torch.tensor([0, 1, 0, 0, 1, 1], dtype=torch.bool, device=backend.device)
    labels[ignored] = -100
    student[ignored], teacher[ignored] = NAN, NAN
    ours = assert_as_good_as_torch(
        student,
        teacher,
        labels,
        divergence=divergence,
        alpha=alpha,
        reduction=reduction,
        wrt="both",
        form=form,
    )
    assert not ours.student[ignored].any() and not ours.teacher[ignored].any()
    if reduction == "none":
        assert not ours.value[ignored].any()


@pairwise
@each_form
@each_reduction
@pytest.mark.parametrize("alpha", [0.0, 0.4])
def test_all_rows_ignored(form: str, backend: Backend, reduction: str, alpha: float) -> None:
    """The loss is 0 and hangs on the graph: backward runs and gives 0."""
    student, teacher = (torch.full((4, 9), NAN, device=backend.device) for _ in range(2))
    labels = torch.full((4,), -100, device=backend.device)
    ours = differentiate(
        fastkd.distillation_loss,
        student,
        teacher,
        labels,
        alpha=alpha,
        reduction=reduction,
        wrt="both",
        form=form,
    )
    assert not ours.value.any() and not ours.student.any() and not ours.teacher.any()


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.int16, torch.int8])
@pytest.mark.parametrize("ignore_index", [-100, -1, 7])
def test_ignore_index_and_integer_types(
    backend: Backend, dtype: torch.dtype, ignore_index: int
) -> None:
    student, teacher = logits(backend, 6, 21)
    labels = torch.tensor([1, ignore_index, 2, 20, 0, ignore_index], device=backend.device)
    assert_as_good_as_torch(
        student,
        teacher,
        labels.to(dtype),
        divergence=KL,
        alpha=0.5,
        ignore_index=ignore_index,
    )


def test_labels_only_select_in_the_bare_divergences(backend: Backend) -> None:
    student, teacher = logits(backend, 6, 21)
    labels = torch.tensor([1, -100, 2, 20, 0, -100], device=backend.device)
    ours = fastkd.kl_div(student, teacher, labels=labels)
    kept = fastkd.kl_div(student[labels >= 0].contiguous(), teacher[labels >= 0].contiguous())
    torch.testing.assert_close(ours, kept, rtol=1e-6, atol=0)


@pytest.mark.filterwarnings("ignore:reduction")
@pytest.mark.parametrize("reduction", ["sum", "mean", "none", "batchmean"])
def test_the_reductions_of_torch_s_kl_div(reduction: str) -> None:
    """Its "mean" is over rows and columns, its "none" has a column for each of V."""
    s, t = torch.randn(2, 3, 4, 9, dtype=torch.float64)
    log_q, p = s.log_softmax(-1), t.softmax(-1)
    theirs = F.kl_div(log_q, p, reduction=reduction)
    theirs = theirs.sum(-1) if reduction == "none" else theirs
    ours = fastkd.kl_div(s, t, reduction=reduction)
    ours = ours / 9 if reduction == "mean" else ours
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=0)
