"""The acceptance loss at its ends: small overlaps, none, and all but everything."""

from __future__ import annotations

import math

import pytest
import torch
from common import DTYPES, INF, Backend, logits
from oracle import assert_as_good_as_torch, differentiate
from torch import Tensor

import fastkd

ACCEPTANCE = fastkd.divergences.acceptance


def _apart(backend: Backend, gap: float) -> tuple[Tensor, Tensor]:
    """Each side gives e^-gap of its mass to the other's columns."""
    student, teacher = logits(backend, 4, 40)
    student[:, :20] -= gap
    teacher[:, 20:] -= gap
    return student, teacher


@pytest.mark.parametrize("gap", [5.0, 15.0, 30.0, 60.0])
def test_gradient_keeps_its_digits_where_the_overlap_is_small(backend: Backend, gap: float) -> None:
    """1 - tv has none left there, and neither has a slope that is not 0 in most columns."""
    student, teacher = _apart(backend, gap)
    ours = differentiate(fastkd.acceptance_loss, student, teacher, wrt="both", reduction="none")
    exact = differentiate(
        fastkd.acceptance_loss, student.double(), teacher.double(), wrt="both", reduction="none"
    )
    assert (ours.value > gap / 2).all()
    torch.testing.assert_close(ours.value.double(), exact.value, rtol=2e-6, atol=0)
    for mine, true in ((ours.student, exact.student), (ours.teacher, exact.teacher)):
        assert mine is not None and true is not None
        torch.testing.assert_close(mine.double(), true, rtol=2e-5, atol=1e-7)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("gap", [200.0, INF])
def test_no_overlap_is_the_largest_loss(backend: Backend, gap: float, dtype: torch.dtype) -> None:
    student, teacher = _apart(backend, gap)
    ours = differentiate(
        fastkd.acceptance_loss, student.to(dtype), teacher.to(dtype), wrt="both", reduction="none"
    )
    assert ours.value.tolist() == pytest.approx([100 * math.log(2)] * 4, rel=1e-6)
    assert ours.student is not None and not ours.student.any()
    assert ours.teacher is not None and not ours.teacher.any()


@pytest.mark.parametrize(("vocab", "top", "temperature"), [(2044, -0.7, 1.0), (4096, 40.0, 4.0)])
def test_equal_sides_are_accepted_always(
    backend: Backend, vocab: int, top: float, temperature: float
) -> None:
    """However their equal terms are rounded, one after the other."""
    student = torch.full((1, vocab), -0.7, device=backend.device)
    student[0, vocab // 2] = top
    ours = differentiate(fastkd.acceptance_loss, student, student.clone(), temperature=temperature)
    assert ours.value == 0
    assert ours.student is not None and not ours.student.any()


def test_sides_that_are_close(backend: Backend) -> None:
    """Loss and gradient tend to those of tv."""
    student, _ = logits(backend, 5, 33)
    teacher = student + 1e-3 * torch.randn_like(student)
    ours = differentiate(fastkd.acceptance_loss, student, teacher)
    tv = differentiate(fastkd.tv_distance, student, teacher)
    torch.testing.assert_close(ours.value, tv.value, rtol=1e-2, atol=0)
    torch.testing.assert_close(ours.student, tv.student, rtol=1e-2, atol=1e-6)
    assert_as_good_as_torch(student, teacher, divergence=ACCEPTANCE, reduction="none")


def test_is_the_acceptance_rate_of_speculative_decoding(backend: Backend) -> None:
    """A token drawn from q is accepted with probability min(1, p / q)."""
    student, teacher = logits(backend, 6, 50)
    q, p = student.double().softmax(-1), teacher.double().softmax(-1)
    rate = (q * (p / q).clamp(max=1)).sum(-1)
    loss = fastkd.acceptance_loss(student, teacher, reduction="none")
    torch.testing.assert_close(loss.double().neg().exp(), rate, rtol=1e-5, atol=0)
