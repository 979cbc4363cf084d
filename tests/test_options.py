"""The options that all losses share, and those of the hard labels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from common import (
    TABLE,
    Backend,
    Result,
    assert_as_good_as_torch,
    assert_gradients,
    assert_values,
    differentiate,
    each_dtype,
    each_form,
    each_name,
    logits,
    plain,
)
from pairwise import pairwise
from torch import Tensor

import fastkd
from fastkd.backends.base import rows_of as rows
from fastkd.divergence import Divergence

NAN = float("nan")
KL = fastkd.divergences.kl
REDUCTIONS = ["mean", "batchmean", "sum", "none"]
each_reduction = pytest.mark.parametrize("reduction", REDUCTIONS)


def _labels(backend: Backend, n: int, v: int, ignored: float = 0.0) -> Tensor:
    labels = torch.randint(v, (n,), device=backend.device)
    return labels.masked_fill(torch.rand(n, device=backend.device) < ignored, -100)


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
    labels = _labels(backend, 9, 31, ignored=0.3)
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
    labels = _labels(backend, 7, 29, ignored=0.3)
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
    labels = _labels(backend, 3, 37)
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
        _labels(backend, 5, 37),
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
    labels = _labels(backend, 5, 31)
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
    labels = _labels(backend, 5, 31)
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
    labels = _labels(backend, 6, 33)
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
    labels = _labels(backend, 10, 13)
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
        _labels(backend, 3, 33),
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
    labels = _labels(kernels, 5, 37, ignored=0.3)
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
def test_strides_of_the_teacher(backend: Backend, view: Callable[[Tensor], Tensor]) -> None:
    teacher = view(torch.randn(192, device=backend.device))
    _check_against_copies(_both, torch.randn_like(teacher).contiguous(), teacher)


@each_view
def test_strides_of_the_student(backend: Backend, view: Callable[[Tensor], Tensor]) -> None:
    student = view(torch.randn(192, device=backend.device))
    _check_against_copies(_both, student, torch.randn_like(student).contiguous())


@each_dtype
@pytest.mark.parametrize("start", [1, 2, 3])
def test_unaligned_rows_of_every_dtype(backend: Backend, dtype: torch.dtype, start: int) -> None:
    """Rows that start anywhere, at an odd distance from each other."""
    student, teacher = (torch.randn(3, 39, device=backend.device).to(dtype) for _ in range(2))
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
    n = 100 if backend.name == "gpu" and backend.device.type == "cpu" else 5000
    student, teacher = logits(backend, n, 3)
    ours = differentiate(fastkd.kl_div, student, teacher)
    exact, torchs = (
        differentiate(plain, student.to(dtype), teacher.to(dtype), divergence=KL)
        for dtype in (torch.float64, torch.float32)
    )
    assert_values(ours.value, torchs.value, exact.value)
    assert_gradients(ours.student, torchs.student, exact.student)
