"""What the kernels owe at the edges: defined results, the same on every backend."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from common import (
    EXACT,
    INF,
    INPUTS,
    Backend,
    each_divergence,
    each_dtype,
    each_form,
    each_name,
    logits,
)
from oracle import assert_as_good_as_torch, differentiate
from pairwise import pairwise
from torch import Tensor

import fastkd
from fastkd.divergence import Divergence

NAN = float("nan")
BOUNDED = [
    fastkd.divergences[name] for name in ("js", "skew_kl", "skew_reverse_kl", "tv", "acceptance")
]
FAR = ["offset", "large"]
SIZES = [1, 2, 15, 16, 17, 31, 33, 100, 1000, 1023, 1025, 2049, 4096, 5000]

each_exact = pytest.mark.parametrize(
    "divergence", [fastkd.divergences[name] for name in EXACT], ids=EXACT
)
each_bounded = pytest.mark.parametrize("divergence", BOUNDED, ids=lambda entry: entry.name)


def _soft(divergence: Divergence) -> Callable[..., Tensor]:
    """The bare divergence, by row."""

    def loss(student: Tensor, teacher: Tensor, **options: object) -> Tensor:
        options = {"temperature": 1.0, "reduction": "none", **options}
        return fastkd.distillation_loss(
            student, teacher, alpha=0.0, divergence=divergence, t_squared=False, **options
        )

    return loss


# ---- identical logits


def _sizes(backend: Backend, form: str = "dense") -> list[int]:
    """A linear form multiplies by a square of this size."""
    if backend.name == "gpu" and backend.device.type == "cpu":
        return [17, 1025] if form == "dense" else [17, 257]
    return SIZES if form == "dense" else [size for size in SIZES if size <= 1025]


@pairwise
@each_form
@each_exact
@each_dtype
@pytest.mark.interpreted(4)
def test_identical_logits_give_exactly_nothing(
    form: str, kernels: Backend, divergence: Divergence, dtype: torch.dtype
) -> None:
    for vocab in _sizes(kernels, form):
        student = (5 * torch.randn(3, vocab)).to(kernels.device, dtype)
        for temperature in (1.0, 2.7):
            ours = differentiate(
                _soft(divergence),
                student,
                student.clone(),
                wrt="both",
                temperature=temperature,
                form=form,
            )
            assert not ours.value.any(), (vocab, temperature)
            assert not ours.student.any() and not ours.teacher.any(), (vocab, temperature)


@pairwise
@each_form
@each_exact
@pytest.mark.parametrize("make", [(1e4, 0), (1, 1e4), (1, -1e4), (0, 3)], ids=str)
def test_identical_logits_of_any_size_give_exactly_nothing(
    form: str, kernels: Backend, divergence: Divergence, make: tuple[float, float]
) -> None:
    spread, offset = make
    for vocab in _sizes(kernels, form):
        student = spread * torch.randn(3, vocab, device=kernels.device) + offset
        for temperature in (0.01, 1.0, 1000.0):
            ours = differentiate(
                _soft(divergence), student, student.clone(), temperature=temperature, form=form
            )
            assert not ours.value.any() and not ours.student.any(), (vocab, temperature)


@each_exact
def test_the_same_numbers_in_two_dtypes_give_exactly_nothing(
    kernels: Backend, divergence: Divergence
) -> None:
    for vocab in _sizes(kernels):
        student = torch.randn(3, vocab, device=kernels.device).bfloat16()
        for other in (torch.float32, torch.float64):
            for pair in ((student, student.to(other)), (student.to(other), student)):
                ours = differentiate(_soft(divergence), *pair)
                assert not ours.value.any() and not ours.student.any(), (vocab, other)


@pairwise
@each_form
@each_divergence
@each_dtype
def test_identical_logits_give_rounding_at_most(
    form: str, backend: Backend, divergence: Divergence, dtype: torch.dtype
) -> None:
    student = (5 * torch.randn(3, 1025)).to(backend.device, dtype)
    ours = differentiate(_soft(divergence), student, student.clone(), form=form)
    assert ours.value.abs().max() < 1e-6 and ours.student.abs().max() < 1e-6


# ---- impossible columns


@each_name
@each_dtype
@pytest.mark.interpreted(4)
def test_columns_impossible_on_both_sides_are_no_columns(
    backend: Backend, divergence: Divergence, dtype: torch.dtype
) -> None:
    """-inf in both: the same loss as without these columns, gradient exactly 0 there."""
    student, teacher = logits(backend, 3, 37, (dtype, dtype))
    dead = torch.rand(37, device=backend.device) < 0.4
    short = differentiate(
        _soft(divergence), student[:, ~dead].contiguous(), teacher[:, ~dead].contiguous()
    )
    student[:, dead], teacher[:, dead] = -INF, -INF
    full = differentiate(_soft(divergence), student, teacher, wrt="both")
    torch.testing.assert_close(full.value, short.value, rtol=1e-5, atol=1e-6)
    assert not full.student[:, dead].any() and not full.teacher[:, dead].any()


@each_dtype
def test_kl_is_infinite_where_the_student_excludes_the_teachers_token(
    backend: Backend, dtype: torch.dtype
) -> None:
    student, teacher = logits(backend, 4, 33, (dtype, dtype))
    student[1, 5] = -INF
    expected = fastkd.reverse_kl_div(teacher, student, reduction="none")
    loss = fastkd.kl_div(student, teacher, reduction="none")
    for value in (loss, expected):
        assert value[1] == INF and value[[0, 2, 3]].isfinite().all()


@each_name
@each_dtype
def test_one_hot_teacher(backend: Backend, divergence: Divergence, dtype: torch.dtype) -> None:
    """KL to a one-hot teacher is the cross-entropy of its column; the rest as defined."""
    student, teacher = logits(backend, 4, 33, (dtype, dtype))
    hot = torch.tensor([0, 32, 7, 16], device=backend.device)
    teacher = torch.full_like(teacher, -INF).scatter(1, hot.unsqueeze(1), 3.0)
    ours = assert_as_good_as_torch(student, teacher, divergence=divergence, reduction="none")
    if divergence.name == "reverse_kl":
        assert (ours.value == INF).all()
    if divergence.name == "kl":
        cross_entropy = torch.nn.functional.cross_entropy(student.double(), hot, reduction="none")
        torch.testing.assert_close(ours.value.double(), cross_entropy, rtol=1e-5, atol=1e-6)


@each_divergence
@pytest.mark.parametrize("one_sided", ["student", "teacher"])
def test_an_excluded_column_with_a_finite_loss_has_a_finite_gradient(
    backend: Backend, divergence: Divergence, one_sided: str
) -> None:
    student, teacher = logits(backend, 3, 21)
    (student if one_sided == "student" else teacher)[:, 3:9] = -INF
    assert_as_good_as_torch(student, teacher, divergence=divergence, reduction="none")


def _bound(divergence: Divergence) -> float:
    a = divergence.param
    if divergence.name == "tv":
        return 1.0
    if divergence.name == "acceptance":
        return 100 * math.log(2)
    if divergence.name == "js":
        return -a * math.log(a) - (1 - a) * math.log(1 - a)
    return -math.log(a)


@each_bounded
@each_dtype
def test_disjoint_supports_are_finite(
    backend: Backend, divergence: Divergence, dtype: torch.dtype
) -> None:
    """Every column is impossible on one side; the loss reaches the bound of the divergence."""
    student, teacher = logits(backend, 3, 33, (dtype, dtype))
    student[:, :16], teacher[:, 16:] = -INF, -INF
    ours = differentiate(_soft(divergence), student, teacher, wrt="both")
    expected = _bound(divergence)
    assert ours.value.tolist() == pytest.approx([expected] * 3, rel=4e-6)
    assert ours.student.isfinite().all() and ours.teacher.isfinite().all()


@each_name
@each_dtype
def test_a_row_impossible_on_both_sides(
    backend: Backend, divergence: Divergence, dtype: torch.dtype
) -> None:
    student, teacher = logits(backend, 3, 33, (dtype, dtype))
    alone = differentiate(_soft(divergence), student[:1], teacher[:1])
    student[1], teacher[1] = -INF, -INF
    ours = differentiate(_soft(divergence), student, teacher, wrt="both")
    assert ours.value[1] == 0 and not ours.student[1].any() and not ours.teacher[1].any()
    assert torch.equal(ours.student[:1], alone.student) and ours.value[0] == alone.value[0]


@each_name
@pytest.mark.parametrize("side", ["student", "teacher"])
def test_a_row_impossible_on_one_side_is_nan_and_stays_alone(
    backend: Backend, divergence: Divergence, side: str
) -> None:
    """No distribution: softmax of it is NaN, in torch too."""
    student, teacher = logits(backend, 3, 33)
    clean = differentiate(_soft(divergence), student, teacher)
    (student if side == "student" else teacher)[1] = -INF
    ours = differentiate(_soft(divergence), student, teacher)
    assert ours.value[1].isnan() and ours.student[1].isnan().any()
    for row in (0, 2):
        assert ours.value[row] == clean.value[row]
        assert torch.equal(ours.student[row], clean.student[row])


# ---- NaN and extremes


@pairwise
@each_form
@each_name
@each_dtype
@pytest.mark.parametrize("side", ["student", "teacher"])
@pytest.mark.parametrize("what", [NAN, INF], ids=str)
@pytest.mark.interpreted(6)
def test_nan_stays_in_its_row(
    form: str, backend: Backend, divergence: Divergence, dtype: torch.dtype, side: str, what: float
) -> None:
    student, teacher = logits(backend, 3, 33, (dtype, dtype))
    clean = differentiate(_soft(divergence), student, teacher, form=form)
    (student if side == "student" else teacher)[1, 20] = what
    ours = differentiate(_soft(divergence), student, teacher, form=form)
    assert ours.value[1].isnan() and ours.student[1].isnan().any()
    for row in (0, 2):
        assert ours.value[row] == clean.value[row]
        assert torch.equal(ours.student[row], clean.student[row])


@pytest.mark.not_interpreted
@each_name
@pytest.mark.parametrize("column", [0, 1023, 1024, 2500, 4999])
def test_nan_in_any_block(backend: Backend, divergence: Divergence, column: int) -> None:
    student, teacher = logits(backend, 2, 5000)
    student[1, column] = NAN
    loss = _soft(divergence)(student, teacher)
    assert loss[0].isfinite() and loss[1].isnan()


def test_nan_reaches_the_mean(backend: Backend) -> None:
    student, teacher = logits(backend, 3, 33)
    student[1, 4] = NAN
    assert fastkd.kl_div(student, teacher).isnan()


def test_nan_in_a_hard_term(backend: Backend) -> None:
    student, teacher = logits(backend, 3, 33)
    student[1, 4] = NAN
    labels = torch.tensor([1, 2, 3], device=backend.device)
    ours = differentiate(
        fastkd.distillation_loss, student, teacher, labels, alpha=1.0, reduction="none"
    )
    assert ours.value.isnan().tolist() == [False, True, False]
    assert ours.student[[0, 2]].isfinite().all()


@pairwise
@each_form
@each_divergence
@each_dtype
@pytest.mark.parametrize("temperature", [0.01, 1.0, 1000.0])
@pytest.mark.interpreted(6)
def test_large_logits_at_any_temperature(
    form: str, backend: Backend, divergence: Divergence, dtype: torch.dtype, temperature: float
) -> None:
    """Logits of +-1e4; only infinities of the definition itself may come out, and no NaN."""
    student, teacher = ((2e4 * torch.rand(3, 21) - 1e4).to(backend.device, dtype) for _ in range(2))
    ours = differentiate(_soft(divergence), student, teacher, temperature=temperature, form=form)
    assert ours.value.isfinite().all() and ours.student.isfinite().all()
    assert (ours.value > -1e-6).all()


@pairwise
@each_form
@each_name
@pytest.mark.parametrize("temperature", [0.01, 1000.0])
def test_extreme_temperatures_of_the_whole_loss(
    form: str, backend: Backend, divergence: Divergence, temperature: float
) -> None:
    student, teacher = logits(backend, 4, 21)
    labels = torch.tensor([1, -100, 20, 0], device=backend.device)
    assert_as_good_as_torch(
        student,
        teacher,
        labels,
        divergence=divergence,
        temperature=temperature,
        alpha=0.5,
        t_squared=True,
        reduction="none",
        form=form,
    )


@each_dtype
@pytest.mark.parametrize("make", [INPUTS[name] for name in FAR], ids=FAR)
def test_hard_labels_of_logits_far_from_zero(
    backend: Backend, dtype: torch.dtype, make: Callable[[int, int], tuple[Tensor, Tensor]]
) -> None:
    """A log-sum-exp of 1e4 has no digits left for the loss; the differences have."""
    student, teacher = logits(backend, 4, 21, (dtype, dtype), make)
    labels = torch.tensor([1, -100, 20, 0], device=backend.device)
    assert_as_good_as_torch(
        student,
        teacher,
        labels,
        divergence=fastkd.divergences.kl,
        alpha=0.5,
        label_smoothing=0.1,
        reduction="none",
    )


def test_label_on_an_impossible_column_is_infinite(backend: Backend) -> None:
    student, teacher = logits(backend, 3, 9)
    student[1, 4] = teacher[1, 4] = -INF
    labels = torch.tensor([1, 4, 3], device=backend.device)
    loss = fastkd.distillation_loss(student, teacher, labels, alpha=0.5, reduction="none")
    assert loss[1] == INF and loss[[0, 2]].isfinite().all()


def test_smallest_halves_are_read_and_written(backend: Backend) -> None:
    """Subnormal float16 logits and gradients keep their bits of meaning."""
    student = torch.tensor([[3e-7, 6e-8, -6e-8, 0.0]], device=backend.device).half()
    teacher = torch.zeros(1, 4, device=backend.device)
    ours = differentiate(fastkd.kl_div, student, teacher)
    exact = differentiate(fastkd.kl_div, student.double(), teacher.double())
    torch.testing.assert_close(ours.student.double(), exact.student, rtol=0, atol=2.0**-24 + 2e-8)
