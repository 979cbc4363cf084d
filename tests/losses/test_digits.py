"""The digits of a gradient where a formula's terms nearly cancel, in float32 beside float64."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from common import require
from torch import Tensor

import fastkd
from fastkd.divergence import Divergence

N, V = 3, 5000
D = fastkd.divergences


def away(divergence: Divergence, temperature: float, student: Tensor, teacher: Tensor) -> float:
    """The median error of the gradient's elements, each relative to itself."""

    def gradient(s: Tensor, t: Tensor) -> Tensor:
        leaf = s.clone().requires_grad_()
        loss = fastkd.distillation_loss(
            leaf, t, alpha=0.0, divergence=divergence, temperature=temperature, t_squared=False
        )
        return torch.autograd.grad(loss, leaf)[0].double()

    with fastkd.use_backend("reference"):
        true = gradient(student.double(), teacher.double())
    return float(((gradient(student, teacher) - true) / true).abs().median())


def logits() -> Tensor:
    return 3 * torch.randn(N, V)


def sure(column: int) -> Tensor:
    """A teacher that is sure of one column."""
    teacher = torch.full((N, V), -1e4)
    teacher[:, column] = 0.0
    return teacher


@pytest.fixture(autouse=True)
def kernels_of_the_cpu() -> Iterator[None]:
    require("cpu")
    with fastkd.use_backend("cpu"):
        yield


@pytest.mark.parametrize("temperature", [1.0, 10.0])
def test_score_differences_keep_the_students_digits(temperature: float) -> None:
    """At a difference of 1e4 a float32 has none left behind the comma."""
    assert away(D.reverse_kl, temperature, logits(), sure(7)) < 1e-6  # 7e-5, 1.5e-4 before


@pytest.mark.parametrize("name", ["js", "uneven js", "skew_kl", "skew_reverse_kl"])
def test_rates_keep_their_digits_where_p_is_near_q(name: str) -> None:
    divergence = D.js(beta=0.1) if name == "uneven js" else D[name]
    assert away(divergence, 100.0, logits(), logits()) < 5e-7  # 1e-6 before


@pytest.mark.parametrize("name", ["js", "skew_kl", "skew_reverse_kl", "tv"])
def test_flat_blocks_of_a_sure_teacher_keep_theirs(name: str) -> None:
    """Exponentials of both sides are about 1 there, and the teacher's probabilities 0."""
    assert away(D[name], 100.0, logits(), sure(3)) < 1e-6


def test_a_block_with_impossible_columns_and_one_outside_the_range() -> None:
    """Exponentials less 1 are kept of -inf, and not where one score is too far away."""
    student, teacher = logits(), logits()
    student[:, 5:40] = teacher[:, 20:60] = -torch.inf
    for far in (0.0, -300.0):
        student[:, 2100] += far
        with fastkd.use_backend("reference"):
            leaf = student.double().requires_grad_()
            fastkd.js_div(leaf, teacher.double(), temperature=100.0).backward()
        own = student.clone().requires_grad_()
        fastkd.js_div(own, teacher, temperature=100.0).backward()
        assert own.grad is not None and leaf.grad is not None
        largest = leaf.grad.abs().max()
        assert float(((own.grad.double() - leaf.grad) / largest).abs().max()) < 1e-6
        assert not own.grad[:, 5:40].any()


def test_values_of_few_columns_have_the_digits_of_their_logarithms() -> None:
    """Over many columns the errors of one logarithm would be lost among the others."""
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(64, 8, generator=generator) for _ in range(2))
    found = fastkd.js_div(student, teacher, reduction="none").double()
    with fastkd.use_backend("reference"):
        true = fastkd.js_div(student.double(), teacher.double(), reduction="none")
    assert float(((found - true) / true).abs().max()) < 1e-6  # 2e-7; 4e-6 by a wrong coefficient
