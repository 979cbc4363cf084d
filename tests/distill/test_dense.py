"""Losses of maps, against their formulas written out."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from common import unreadable
from oracle import assert_gradients, assert_values, differentiate
from torch import Tensor, nn

from fastkd import distill

LOSSES = (distill.pixel_wise, distill.channel_wise)
each_loss = pytest.mark.parametrize("loss", LOSSES)


def maps(dtype: torch.dtype = torch.float64, size: tuple[int, ...] = (2, 3, 4, 5)) -> Any:
    s, t = (3 * torch.randn(size) for _ in range(2))
    return s.to(dtype), t.to(dtype)


def over(s: Tensor, t: Tensor, T: float) -> Tensor:
    """T^2 KL over the last dimension, as torch has it."""
    each = F.kl_div((s / T).log_softmax(-1), (t / T).softmax(-1), reduction="none")
    return T * T * each.sum(-1)


def plain(s: Tensor, t: Tensor, *, loss: Any, temperature: float) -> Tensor:
    if loss is distill.pixel_wise:
        return over(s.movedim(1, -1), t.movedim(1, -1), temperature)
    return over(s.flatten(2), t.flatten(2), temperature)


@each_loss
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels_last"])
def test_values_and_gradients(loss: Any, dtype: torch.dtype, last: bool) -> None:
    s, t = maps(dtype)
    if last:
        s, t = (x.to(memory_format=torch.channels_last) for x in (s, t))
    found = differentiate(loss, s, t, temperature=3.0, reduction="none")
    its, true = (
        differentiate(plain, *pair, loss=loss, temperature=3.0)
        for pair in ((s, t), (s.double(), t.double()))
    )
    assert_values(found.value, its.value, true.value, 8.0)
    assert found.student is not None and found.student.stride() == s.stride()
    assert_gradients(found.student, its.student, true.student)


def test_channel_wise_is_the_papers_sum() -> None:
    """T^2 / C times the sum over channels, in loops; and the mean over the maps of a batch."""
    s, t = maps(size=(2, 3, 2, 2))
    total = 0.0
    for n in range(2):
        for c in range(3):
            p, q = ([math.exp(float(x) / 4) for x in side[n, c].flatten()] for side in (t, s))
            p, q = ([x / sum(side) for x in side] for side in (p, q))
            total += sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
    assert float(distill.channel_wise(s, t)) == pytest.approx(16 / 3 * total / 2, rel=1e-9)


@each_loss
def test_positions_left_out(loss: Any) -> None:
    s, t = maps()
    labels = torch.randint(0, 3, (2, 4, 5))
    labels[0, 1], labels[0, 2, 3], labels[1] = 255, -100, 255
    out = (labels == 255) | (labels == -100)
    for x in (s, t):
        x.movedim(1, -1)[out] = math.nan
    found = differentiate(loss, s, t, labels, ignore_index=(-100, 255), temperature=2.0)
    a, b = (x[0][:, ~out[0]] for x in (s, t))
    a, b = (a.T, b.T) if loss is distill.pixel_wise else (a, b)
    torch.testing.assert_close(found.value, over(a, b, 2.0).mean())
    assert found.student is not None and not found.student.movedim(1, -1)[out].any()
    assert found.student[0][:, ~out[0]].abs().min() > 0
    assert loss(s, t, torch.full_like(labels, 255), ignore_index=255) == 0


@each_loss
@pytest.mark.parametrize("resize", ["bilinear", "area", "nearest"])
def test_other_sizes(loss: Any, resize: str) -> None:
    s, t = maps()[0], torch.randn(2, 3, 8, 7).double()
    options: Any = {"align_corners": False} if resize == "bilinear" else {}
    fitted = F.interpolate(t, (4, 5), mode=resize, **options)
    torch.testing.assert_close(loss(s, t, resize=resize), loss(s, fitted))
    torch.testing.assert_close(loss(s, fitted, resize=resize), loss(s, fitted))
    last = [x.movedim(1, -1) for x in (s, t)]
    torch.testing.assert_close(loss(*last, resize=resize, class_dim=-1), loss(s, fitted))


@each_loss
def test_sequences_and_volumes(loss: Any) -> None:
    for size, resize in (((2, 3, 6), "linear"), ((1, 3, 2, 3, 2), "trilinear")):
        s, t = maps(size=size)
        got = loss(s, t, temperature=1.0)
        torch.testing.assert_close(got, plain(s, t, loss=loss, temperature=1.0).mean())
        double = F.interpolate(t, scale_factor=2, mode="nearest")
        assert loss(s, double, resize=resize).isfinite()


@each_loss
@pytest.mark.parametrize("size", [(0, 3, 4, 4), (2, 3, 0, 4)])
def test_nothing_to_learn_from(loss: Any, size: tuple[int, ...]) -> None:
    s = torch.randn(size, requires_grad=True)
    value = loss(s, torch.randn(size), torch.zeros(size[0], *size[2:], dtype=torch.long))
    value.backward()
    assert value == 0 and s.grad is not None and s.grad.shape == s.shape


@each_loss
def test_options(loss: Any) -> None:
    s, t = maps()
    rows = plain(s, t, loss=loss, temperature=1.0)
    weight = torch.rand(rows.shape, dtype=torch.float64)
    got = loss(s, t, temperature=1.0, weight=weight)
    torch.testing.assert_close(got, (weight * rows).sum() / weight.sum())
    torch.testing.assert_close(loss(s, t, temperature=1.0, reduction="sum"), rows.sum())
    reverse = loss(s, t, temperature=1.0, divergence="reverse_kl")
    torch.testing.assert_close(reverse, plain(t, s, loss=loss, temperature=1.0).mean())


class Segmenter(nn.Module):
    """A backbone of some channels and a head of three classes."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.backbone = nn.Conv2d(1, channels, 3, padding=1)
        self.head = nn.Conv2d(channels, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.backbone(x).relu())


def test_terms() -> None:
    torch.manual_seed(0)
    x, labels = torch.randn(2, 1, 4, 4), torch.randint(0, 3, (2, 4, 4))
    labels[0, 0] = -100
    student, teacher, projector = Segmenter(2), Segmenter(4), nn.Conv2d(2, 4, 1)
    s, t = (m(x).detach() for m in (student, teacher))
    want = distill.pixel_wise(s, t, labels) + 3 * distill.channel_wise(s, t)
    want = want + distill.channel_wise(projector(student.backbone(x)), teacher.backbone(x))
    terms = [
        distill.response(distill.pixel_wise, rows="labelled"),
        distill.response(distill.channel_wise, 3.0, name="logits"),
        distill.feature("backbone", "backbone", distill.channel_wise, projector=projector),
    ]
    seen: list[float] = []
    distill.train(
        student, [(x, labels)], terms, teacher=teacher, epochs=1, progress=False,
        on_step=lambda _, __, loss: seen.append(float(loss)),
    )  # fmt: skip
    assert seen == pytest.approx([float(want.detach())], rel=1e-5)


@each_loss
def test_no_value_is_read(loss: Any) -> None:
    with unreadable():
        s = torch.randn(2, 3, 4, 4, requires_grad=True)
        labels = torch.zeros(2, 4, 4, dtype=torch.long)
        loss(s, torch.randn(2, 3, 8, 8), labels, resize="bilinear").backward()
        assert s.grad is not None


X = torch.randn(2, 3, 4, 4)


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        (dict(student=[1.0]), TypeError, "student: got list"),
        (dict(teacher=X.long()), TypeError, "teacher: got torch.int64"),
        (dict(student=X[0, 0]), ValueError, r"student: got shape \[4, 4\], expected maps"),
        (dict(teacher=X[:, :2]), ValueError, r"teacher: got maps \[2, 2, 4, 4\].*channels"),
        (dict(teacher=X[..., :2]), ValueError, r"\[2, 3, 4, 2\].*resize='bilinear' interpolates"),
        (dict(resize="cubic"), ValueError, "resize: got 'cubic', expected None or one of bilinear"),
        (dict(resize=[3]), ValueError, "resize: got"),
        (dict(resize="linear"), ValueError, "resize: got 'linear'"),
        (dict(class_dim=4), ValueError, "class_dim: got 4"),
        (dict(class_dim=0), ValueError, "class_dim: got 0"),
        (dict(labels=torch.zeros(2, 4)), TypeError, "labels: got"),
        (dict(labels=torch.ones(2, 4, 4) > 0), TypeError, "labels: got .*bool"),
        (dict(labels=torch.zeros(2, 4).long()), ValueError, r"labels: got shape \[2, 4\]"),
        (dict(temperature=-1), ValueError, "temperature: got -1"),
        (dict(weights=X), TypeError, "unexpected options.*weights"),
        (dict(weight=torch.ones(2)), ValueError, r"weight: got shape \[2\]"),
    ],
)
@each_loss
def test_bad_input(loss: Any, options: dict[str, Any], error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        loss(**{"student": X, "teacher": X, **options})
