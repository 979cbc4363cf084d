"""Losses of numbers, against their formulas written out."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from oracle import assert_gradients, assert_values, differentiate
from torch import Tensor, nn

from fastkd import distill

KINDS = {"l2": F.mse_loss, "l1": F.l1_loss, "smooth_l1": F.smooth_l1_loss}


def numbers(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """Student, teacher and targets of 2 x 3 boxes."""
    s, t, y = (2 * torch.randn(2, 3, 4) for _ in range(3))
    return s.to(dtype), t.to(dtype), y.to(dtype)


def plain_bounded(s: Tensor, t: Tensor, y: Tensor, *, margin: float) -> Tensor:
    own, bound = (s - y).square().sum(-1), (t - y).square().sum(-1)
    return own * (own + margin > bound)


def plain_regression(s: Tensor, t: Tensor, y: Tensor, *, alpha: float, kind: str) -> Tensor:
    hard, soft = (KINDS[kind](s, x, reduction="none").mean(-1) for x in (y, t))
    return alpha * hard + (1 - alpha) * soft


CASES: list[Any] = [
    *((distill.bounded_regression_loss, plain_bounded, {"margin": m}) for m in (0.0, 5.0)),
    *(
        (distill.regression_loss, plain_regression, {"alpha": a, "kind": kind})
        for kind, a in (("l2", 0.5), ("l1", 0.0), ("smooth_l1", 1.0))
    ),
]


@pytest.mark.parametrize(("loss", "plain", "options"), CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_values_and_gradients(
    loss: Any, plain: Any, options: dict[str, Any], dtype: torch.dtype
) -> None:
    s, t, y = numbers(dtype)
    found = differentiate(loss, s, t, y, reduction="none", **options)
    its, true = (
        differentiate(plain, *(x.double() if wide else x for x in (s, t)),
                      y.double() if wide else y, **options)
        for wide in (False, True)
    )  # fmt: skip
    assert_values(found.value, its.value, true.value, 8.0)
    assert found.student is not None and found.student.dtype == dtype
    assert_gradients(found.student, its.student, true.student)


@pytest.mark.parametrize(("loss", "plain", "options"), CASES)
def test_rows(loss: Any, plain: Any, options: dict[str, Any]) -> None:
    s, t, y = numbers(torch.float64)
    each = plain(s, t, y, **options)
    mask, weight = torch.rand(2, 3) > 0.3, torch.rand(2, 3, dtype=torch.float64)
    mask[0, 0], mask[1, 1] = True, False
    part = each * mask * weight
    for x in (s, t, y):
        x[~mask] = float("nan")
    for reduction, want in (
        ("mean", part.sum() / (mask * weight).sum()),
        ("batchmean", part.sum() / 2),
        ("sum", part.sum()),
        ("none", part),
    ):
        found = differentiate(
            loss, s, t, y, mask=mask, weight=weight, reduction=reduction, **options
        )
        torch.testing.assert_close(found.value, want)
        assert found.student is not None and not found.student[~mask].any()
    got = loss(s, t, y, mask=mask, weight=weight, normalizer=3.0, **options)
    torch.testing.assert_close(got, part.sum() / 3)
    assert loss(s, t, y, mask=torch.zeros_like(mask), **options) == 0


def test_a_student_that_beats_its_teacher_by_the_margin_is_left_alone() -> None:
    y = torch.zeros(3, 2)
    s, t = torch.tensor([[1.0, 0.0], [1.0, 0.0], [3.0, 0.0]]), torch.full((3, 2), 1.0)
    t[1] = 4.0
    found = differentiate(distill.bounded_regression_loss, s, t, y, margin=1.0, reduction="none")
    assert found.value.tolist() == [0.0, 0.0, 9.0]  # 1 + 1 is not above 2
    found = differentiate(distill.bounded_regression_loss, s, t, y, margin=1.5, reduction="none")
    assert found.value.tolist() == [1.0, 0.0, 9.0]
    assert found.student is not None and found.student.tolist() == [[2, 0], [0, 0], [6, 0]]
    s[0, 0] = float("nan")
    assert distill.bounded_regression_loss(s, t, y, reduction="none")[0].isnan()


def test_terms() -> None:
    torch.manual_seed(0)
    x, y = torch.randn(6, 4), torch.randn(6, 2)
    student, teacher = nn.Linear(4, 2), nn.Linear(4, 2)
    s, t = student(x).detach(), teacher(x).detach()
    want = 0.7 * plain_regression(s, t, y, alpha=0.0, kind="l1").mean()
    want += 0.5 * plain_bounded(s, t, y, margin=0.1).mean()
    terms = [
        distill.regression(weight=0.7, alpha=0.0, kind="l1"),
        distill.regression(distill.bounded_regression_loss, 0.5, margin=0.1),
    ]
    seen: list[float] = []
    distill.train(
        student, [(x, y)], terms, teacher=teacher, epochs=1, progress=False,
        on_step=lambda _, __, loss: seen.append(float(loss)),
    )  # fmt: skip
    assert seen == pytest.approx([float(want)], rel=1e-5)


X = torch.randn(3, 2)


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        (dict(student=[1.0]), TypeError, "student: got list"),
        (dict(student=torch.tensor(1.0)), ValueError, r"student: got shape \[\].*\[\.\.\., 1\]"),
        (dict(teacher=X.long()), TypeError, "teacher: got .*int64"),
        (dict(teacher=X[:, :1]), ValueError, r"teacher: got shape \[3, 1\], expected \[3, 2\]"),
        (dict(targets=X[0]), ValueError, r"targets: got shape \[2\]"),
        (dict(targets=X.to("meta")), ValueError, "targets: got a tensor on meta"),
        (dict(mask=torch.ones(3)), TypeError, r"mask: got .*float32.*expected bool \[3\]"),
        (dict(mask=torch.ones(2).bool()), ValueError, r"mask: got shape \[2\], expected \[3\]"),
        (dict(weight=torch.ones(2)), ValueError, r"weight: got shape \[2\]"),
        (dict(reduction="avg"), ValueError, "reduction: got 'avg'"),
        (dict(ignore_index=2), TypeError, "unexpected options.*ignore_index"),
    ],
)
def test_bad_input(options: dict[str, Any], error: type[Exception], says: str) -> None:
    good = dict(student=X, teacher=X, targets=X)
    for loss in (distill.regression_loss, distill.bounded_regression_loss):
        with pytest.raises(error, match=says):
            loss(**{**good, **options})


def test_bad_parameters() -> None:
    with pytest.raises(ValueError, match="kind: got 'l3', expected one of l2, l1, smooth_l1"):
        distill.regression_loss(X, X, X, kind="l3")
    with pytest.raises(ValueError, match=r"alpha: got 1\.5"):
        distill.regression_loss(X, X, X, alpha=1.5)
    with pytest.raises(ValueError, match=r"targets: got None with alpha=0\.5"):
        distill.regression_loss(X, X)
    with pytest.raises(ValueError, match="margin: got -1"):
        distill.bounded_regression_loss(X, X, X, margin=-1)
    with pytest.raises(TypeError, match="targets: got None"):
        distill.bounded_regression_loss(X, X, None)  # type: ignore[arg-type]
