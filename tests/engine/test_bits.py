"""The same bits for any number of threads, twice, and whatever a row's neighbours are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from common import Backend, each_form, logits, require
from oracle import differentiate
from torch import Tensor

import fastkd


def _loss(labels: Tensor | None = None, **options: Any) -> Callable[[Tensor, Tensor], Tensor]:
    def loss(student: Tensor, teacher: Tensor) -> Tensor:
        return fastkd.distillation_loss(student, teacher, labels, **options)

    return loss


def _interpreted(backend: Backend) -> bool:
    return backend.name == "gpu" and backend.device.type == "cpu"


@pytest.mark.parametrize("reduction", ["mean", "sum", "batchmean", "none"])
def test_the_same_bits_for_any_number_of_threads(reduction: str) -> None:
    require("cpu")
    student, teacher = torch.randn(37, 5003), torch.randn(37, 5003).bfloat16()
    labels, weight = torch.randint(5003, (37,)), torch.rand(37)
    labels[5] = -100
    results = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(
                differentiate(
                    _loss(labels, weight=weight, reduction=reduction, divergence="js"),
                    student,
                    teacher,
                    wrt="both",
                )
            )
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        for one, two in zip(results[0], other, strict=True):
            assert torch.equal(one, two)


@each_form
def test_the_same_bits_twice(form: str, backend: Backend) -> None:
    student, teacher = logits(backend, 7, 130)
    first, second = (
        differentiate(fastkd.skew_kl_div, student, teacher, form=form) for _ in range(2)
    )
    assert torch.equal(first.value, second.value) and torch.equal(first.student, second.student)


@pytest.mark.parametrize("n", [1, 5, 40])
def test_a_rows_bits_do_not_depend_on_its_neighbours(kernels: Backend, n: int) -> None:
    n = min(n, 8) if _interpreted(kernels) else n
    student, teacher = logits(kernels, n, 1100)
    together = differentiate(fastkd.js_div, student, teacher, reduction="none")
    for row in {0, n // 2, n - 1}:
        at = slice(row, row + 1)
        alone = differentiate(fastkd.js_div, student[at], teacher[at], reduction="none")
        assert torch.equal(alone.value, together.value[at])
        assert torch.equal(alone.student, together.student[at])
