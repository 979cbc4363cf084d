"""Class weights and one logit in terms, maps in evaluations."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastkd import distill
from fastkd.distill import Batch, Outputs


def trained(student: nn.Module, x: Tensor, y: Tensor, terms: Any, **options: Any) -> float:
    return distill.train(student, [(x, y)], terms, progress=False, **options)[0].loss


def test_hard_with_class_weights() -> None:
    torch.manual_seed(0)
    x, y, by = torch.randn(2, 3, 4, 4), torch.randint(5, (2, 4, 4)), torch.rand(5)
    y[0, 0] = -100
    student = nn.Conv2d(3, 5, 1)
    for smoothing in (0.0, 0.1):
        want = F.cross_entropy(student(x), y, weight=by, label_smoothing=smoothing).detach()
        term = distill.hard(class_weight=by, class_dim=1, label_smoothing=smoothing)
        assert trained(student, x, y, term, lr=0.0) == pytest.approx(float(want), rel=1e-5)
    with pytest.raises(ValueError, match=r"term 'hard': class_weight: got shape \[3\]"):
        trained(student, x, y, distill.hard(class_weight=by[:3], class_dim=1))
    with pytest.raises(TypeError, match=r"distill.hard\(class_weight=...\)"):
        distill.hard(by)  # type: ignore[arg-type]


def test_one_logit_with_a_label_for_each_row() -> None:
    torch.manual_seed(0)
    x, y = torch.randn(8, 4), torch.randint(2, (8,)).float()
    student, teacher = nn.Linear(4, 1), nn.Linear(4, 1)
    z = student(x).squeeze(-1).detach()
    want = F.binary_cross_entropy_with_logits(z, y), F.mse_loss(z, y)
    for term, value in zip(
        (distill.binary_hard(), distill.regression(alpha=1.0)), want, strict=True
    ):
        found = trained(student, x, y, term, teacher=teacher, lr=0.0)
        assert found == pytest.approx(float(value), rel=1e-5)


def test_evaluations_of_maps() -> None:
    torch.manual_seed(0)
    x, y = torch.randn(4, 3, 6, 6), torch.randint(5, (4, 6, 6))
    y[0, 0] = -100
    a, b = nn.Conv2d(3, 5, 1), nn.Conv2d(3, 5, 1)
    loader = [(x[:2], y[:2]), (x[2:], y[2:])]
    found = distill.evaluate(a, loader, class_dim=1)
    kept = y != -100
    assert found.rows == int(kept.sum())
    assert found.cross_entropy == pytest.approx(float(F.cross_entropy(a(x), y).detach()), rel=1e-5)
    right = (a(x).argmax(1) == y)[kept].float().mean()
    assert found.accuracy == pytest.approx(float(right))
    same = (a(x).argmax(1) == b(x).argmax(1))[kept].float().mean()
    assert distill.agreement(a, b, loader, class_dim=-3) == pytest.approx(float(same))
    with pytest.raises(ValueError, match="class_dim: got 4, expected a dimension"):
        distill.evaluate(a, loader, class_dim=4)
    y[1, 0] = 255
    with pytest.raises(
        ValueError, match="labels: got class numbers from 0 to 255, expected 0 to 4"
    ):
        distill.evaluate(a, loader, class_dim=1)


@pytest.mark.parametrize("weight", [0, 0.0, lambda step: 0.0])
@pytest.mark.parametrize(
    "make",
    [
        distill.hard,
        distill.binary_hard,
        lambda weight: distill.soft(weight, rows="labelled", return_outputs=True, name="own"),
        lambda weight: distill.response(distill.dkd, weight),
    ],
)
def test_a_term_without_weight_wants_no_labels(make: Any, weight: Any) -> None:
    torch.manual_seed(0)
    x, student, teacher = torch.randn(8, 4), nn.Linear(4, 3), nn.Linear(4, 3)
    loader: list[Tensor] = [x, x]
    wanted = distill.soft().function(Outputs(student(x)), Outputs(teacher(x)), Batch(x)).item()
    terms = [make(weight), distill.soft()]
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # that it was 0 in every step
        first, _ = distill.train(student, loader, terms, teacher=teacher, progress=False)
    assert first.loss == pytest.approx(wanted, rel=1e-6)
    assert first.terms[terms[0].name] == 0.0
    with pytest.raises(ValueError, match="got a batch without labels"):  # it has weight from 1 on
        terms = [make(lambda step: float(step)), distill.soft()]
        distill.train(student, loader, terms, teacher=teacher, progress=False)
