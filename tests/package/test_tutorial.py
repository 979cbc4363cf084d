"""The classic example, as tutorials write it, and the one line of it that changes.

Two MLPs on images of 784 pixels, 784-1200-1200-10 and 784-400-10, a hand-written loss and a
hand-written loop. With fastkd the body of `distillation_loss` becomes one call; losses, gradients
and the trained student stay what they were.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastkd

Loss = Callable[[Tensor, Tensor, Tensor, float, float], Tensor]


def before(y: Tensor, teacher_scores: Tensor, student_scores: Tensor, T: float, a: float) -> Tensor:
    soft = F.kl_div(
        F.log_softmax(student_scores / T, dim=1),
        F.softmax(teacher_scores / T, dim=1),
        reduction="batchmean",
    )
    return a * F.cross_entropy(student_scores, y) + (1 - a) * T * T * soft


def after(y: Tensor, teacher_scores: Tensor, student_scores: Tensor, T: float, a: float) -> Tensor:
    return fastkd.distillation_loss(student_scores, teacher_scores, y, temperature=T, alpha=a)


def teacher_net() -> nn.Sequential:
    return nn.Sequential(
        *(nn.Linear(784, 1200), nn.ReLU(), nn.Dropout(0.2)),
        *(nn.Linear(1200, 1200), nn.ReLU(), nn.Dropout(0.2), nn.Linear(1200, 10)),
    )


def student_net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(784, 400), nn.ReLU(), nn.Linear(400, 10))


def train_student(
    student: nn.Module,
    teacher: nn.Module,
    batches: list[tuple[Tensor, Tensor]],
    loss_of: Loss,
    T: float,
    alpha: float,
) -> list[float]:
    optimizer = torch.optim.SGD(student.parameters(), lr=0.05, momentum=0.9)
    teacher.eval()
    student.train()
    losses = []
    for x, y in batches:
        with torch.no_grad():
            teacher_scores = teacher(x)
        loss = loss_of(y, teacher_scores, student(x), T, alpha)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize(("T", "alpha"), [(1.0, 0.5), (5.0, 0.1), (20.0, 0.7)])
def test_one_line_changes_and_the_numbers_stay(T: float, alpha: float) -> None:
    torch.manual_seed(0)
    teacher, first = teacher_net(), student_net()
    batches = [(torch.rand(64, 784), torch.randint(10, (64,))) for _ in range(30)]
    runs = []
    for loss_of in (before, after):
        student = copy.deepcopy(first)
        runs.append((train_student(student, teacher, batches, loss_of, T, alpha), student))
    (losses, a), (others, b) = runs
    assert losses == pytest.approx(others, rel=1e-5)
    for x, y in zip(a.parameters(), b.parameters(), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-6)


def test_at_a_high_temperature_distillation_is_logit_matching() -> None:
    """T -> infinity: T^2 KL(p, q) -> |(z - mean z) - (t - mean t)|^2 / 2V, not of raw logits."""
    torch.manual_seed(0)
    s, t = (3 * torch.randn(16, 10, dtype=torch.float64) for _ in range(2))
    s += 5.0  # an offset, which softmax does not see and raw logits do
    values, grads = [], []
    for loss_of in (
        lambda s: fastkd.distillation_loss(s, t, temperature=1000.0, alpha=0.0),
        lambda s: 0.5 * (s - s.mean(1, keepdim=True) - t + t.mean(1, keepdim=True)).pow(2).mean(),
        lambda s: 0.5 * (s - t).pow(2).mean(),
    ):
        leaf = s.clone().requires_grad_()
        loss = loss_of(leaf)
        loss.backward()
        values.append(float(loss.detach()))
        grads.append(leaf.grad)
    assert values[0] == pytest.approx(values[1], rel=1e-2)
    largest = float(grads[1].abs().max())
    torch.testing.assert_close(grads[0], grads[1], rtol=0.0, atol=1e-2 * largest)
    assert values[2] > 2 * values[1]  # against raw logits the claim is false
