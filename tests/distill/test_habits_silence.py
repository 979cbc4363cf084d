"""What would be silent is said once, by name: unread teachers, zero losses, unshifted labels."""

from __future__ import annotations

import copy
import dataclasses
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastkd import distill

X, Y = torch.randn(8, 4, generator=torch.Generator().manual_seed(0)), torch.arange(8) % 3
STORED = torch.tensor([9.0, 0, 0]).expand(8, 3)


def linear(seed: int = 0, *sizes: int) -> nn.Linear:
    torch.manual_seed(seed)
    return nn.Linear(*(sizes or (4, 3)))


def said(student: nn.Module, loss: Any, batch: Any = (X, Y), **options: Any) -> list[str]:
    """The warnings of a run."""
    options = {"progress": False, "epochs": 2, **options}
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        distill.train(student, [batch] * options.pop("steps", 2), loss, **options)
    texts = [str(w.message) for w in found if w.category is UserWarning]
    assert all(len(text) <= 500 for text in texts)
    return texts


UNREAD: dict[str, Callable[[], Any]] = {
    "model": lambda: linear(1),
    "list": lambda: [linear(1), linear(2)],
    "function": lambda: lambda x: x[:, :3],
    "average": lambda: distill.EMATeacher(linear()),
}


@pytest.mark.parametrize("kind", UNREAD)
def test_a_teacher_that_no_term_reads(kind: str) -> None:
    (text,) = said(linear(), distill.hard(), teacher=UNREAD[kind]())
    assert text.startswith("teacher: got one") and "no term that reads it: ['hard']" in text
    assert not said(linear(), [distill.hard(), distill.soft()], teacher=UNREAD[kind]())


def test_a_stored_column_that_no_term_reads() -> None:
    for batch in (
        (X, Y, STORED),
        {"inputs": X, "labels": Y, "teacher": STORED},
        distill.Batch(X, Y, teacher=STORED),
    ):
        (text,) = said(linear(), distill.hard(), batch)
        assert "'teacher'" in text and "no term that reads it" in text
        assert not said(linear(), distill.soft(), batch)


def test_a_term_may_read_the_batchs_own_column() -> None:
    own = distill.Term("own", lambda s, _, b: F.mse_loss(s.logits, b.teacher))
    for batch in ((X, Y, STORED), {"inputs": X, "labels": Y, "teacher": STORED}):
        assert not said(linear(), own, batch)
        assert not said(linear(), own, batch, teacher=distill.CachedTeacher(), accumulate=2)

    @dataclasses.dataclass
    class Weighted(distill.Batch):
        sample_weight: Any = None

    def weighted(s: Any, _: Any, b: Any) -> Tensor:
        return ((s.logits - b.teacher).square().mean(-1) * b.sample_weight).mean()

    batch = Weighted(X, Y, teacher=STORED, sample_weight=torch.rand(8))
    assert not said(linear(), distill.Term("weighted", weighted), batch)
    blind = distill.Term("blind", lambda s, _, b: s.logits.square().mean() + 0 * b.samples)
    (text,) = said(linear(), blind, (X, Y, STORED))
    assert "no term that reads it: ['blind']" in text


def test_features_and_members_are_a_reading() -> None:
    hint = distill.feature("", "", F.mse_loss)
    assert not said(linear(), hint, teacher=linear(1))
    apart = distill.Term("apart", lambda s, t, _: F.mse_loss(s.logits, t.members[1].logits))
    assert not said(linear(), apart, teacher=[linear(1), linear(2)])


def test_a_step_without_labels_says_nothing_of_the_teacher() -> None:
    none = (X, torch.full((8,), -100))
    loss = [distill.hard(), distill.soft(rows="labelled")]
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        distill.train(linear(), [none, (X, Y)], loss, teacher=linear(1), progress=False)
    assert not [w for w in found if w.category is UserWarning]


def test_a_term_without_gradient_is_named_once() -> None:
    student = nn.Sequential(linear(0, 4, 5).requires_grad_(False), linear(1, 5, 3))
    hint = distill.feature("0", "0", F.mse_loss, name="hint")
    teacher = nn.Sequential(linear(2, 4, 5), linear(3, 5, 3))
    (text,) = said(student, [distill.hard(), hint], teacher=teacher)
    assert "term 'hint' that does not require grad" in text


def test_weights_in_the_teachers_place_are_refused() -> None:
    for weights in (torch.rand(8), torch.rand(8, 1)):
        for loss in (distill.hard(), distill.soft(), lambda s, _, y: F.cross_entropy(s, y)):
            with pytest.raises(ValueError, match=r"weights of samples go into a dict") as got:
                said(linear(), loss, (X, Y, weights))
            assert len(str(got.value)) <= 500


def test_rows_of_a_stored_teacher_beside_a_single_logit() -> None:
    batch = {"inputs": X, "labels": torch.rand(8), "teacher": torch.rand(8)}
    with pytest.raises(ValueError) as got:
        said(linear(0, 4, 1), distill.binary_soft(), batch)
    text = str(got.value)
    assert text.startswith("teacher: got [8] in the batch for the student's logits [8, 1], expect")
    assert ".view([8, 1])" in text and len(text) <= 500


def test_a_single_logit_is_named() -> None:
    for steps in (1, 2):
        (text,) = said(linear(0, 4, 1), distill.soft(), teacher=linear(1, 4, 1), steps=steps)
        assert "single logit" in text and "term 'soft'" in text
    plain = said(
        linear(0, 4, 1),
        lambda s, t, _: F.kl_div(s.log_softmax(-1), t.softmax(-1)),
        teacher=linear(1, 4, 1),
    )
    assert any("['loss']" in text and "single logit" in text for text in plain)


def test_a_teacher_that_is_the_student_is_named() -> None:
    student = linear()
    for steps in (1, 2):
        for teacher in (
            student.forward,
            distill.CallableTeacher(student),
            lambda x: student(x),
            [student.forward, distill.CallableTeacher(student)],
        ):
            (text,) = said(student, [distill.hard(), distill.soft()], teacher=teacher, steps=steps)
            assert "['soft']" in text and "the student itself" in text


def test_a_copy_that_moves_is_no_mistake() -> None:
    student = linear()
    both = [distill.hard(), distill.soft()]
    assert not said(student, both, teacher=copy.deepcopy(student))
    assert not said(student, both, teacher=copy.deepcopy(student), steps=1)
    assert not said(student, both, teacher=distill.EMATeacher(student))


class Words(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(9, 4), nn.Linear(4, 9)

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.head(self.embed(input_ids))


def test_labels_that_are_the_inputs() -> None:
    ids = torch.arange(8).view(2, 4) + 1
    masked = ids.clone()
    masked[:, :2] = -100
    shifted = torch.cat((ids[:, 1:], torch.full_like(ids[:, :1], -100)), 1)
    for inputs in (ids, {"input_ids": ids}):
        for labels in (ids, masked):
            (text,) = said(Words(), distill.hard(), distill.Batch(inputs, labels))
            assert "does not shift" in text and "ids[:, 1:]" in text
        assert not said(Words(), distill.hard(), distill.Batch(inputs, shifted))
        hidden = distill.Batch(inputs, torch.full_like(ids, -100).index_fill(1, torch.tensor(0), 8))
        assert not said(Words(), distill.hard(), hidden)
