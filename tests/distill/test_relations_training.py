"""Relation losses: errors, and in the trainer."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from relation_losses import FUNCTIONS, samples
from torch import nn

from fastkd import distill
from fastkd.distill.losses import features, relations


@pytest.mark.parametrize(
    "call", [*FUNCTIONS.values(), relations.CRD(4, 4, negatives=8)], ids=[*FUNCTIONS, "crd"]
)
def test_shapes_that_cannot_be_compared_are_named(call: Any) -> None:
    x = torch.randn(3, 4)
    with pytest.raises(ValueError, match=r"\[3, 4\] of the student and \[2, 4\] of the teacher"):
        call(x, x[:2])
    with pytest.raises(TypeError, match="teacher: got tuple"):
        call(x, (x, x))


def test_arguments_out_of_range() -> None:
    s, t = samples(dtype=torch.float32)
    maps = torch.randn(5, 4, 2, 2)
    for call, message in (
        (lambda: relations.cc(s, t, gamma=0.0), "gamma=0.0"),
        (lambda: relations.cc(s, t, order=0), "order=0"),
        (lambda: relations.CRD(4, 6, negatives=0), "negatives: got 0"),
        (lambda: relations.CRD(4, 6, temperature=0.0), "temperature: got 0.0"),
        (lambda: relations.CRD(4, 5)(s, t), r"\[5, 6\].*4 and 5 features"),
        (lambda: relations.fsp((s, s), (t, t)), r"\[\[5, 4\], \[5, 4\]\].*\[\[5, 6\], \[5, 6\]\]"),
        (lambda: relations.fsp((s, maps), (s, maps)), r"\[5, 4\] and \[5, 4, 2, 2\]"),
        (lambda: relations.fsp((s, s[:2]), (s, s[:2])), r"\[5, 4\] and \[2, 4\]"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    with pytest.raises(TypeError, match="teacher: got one tensor"):
        relations.fsp((s, s), t)
    with pytest.raises(TypeError, match="student: got 3 features"):
        relations.fsp((s, s, s), (t, t))


def mlp(width: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(5, width), nn.Tanh(), nn.Linear(width, 3))


@pytest.mark.parametrize("name", [*FUNCTIONS, "fsp", "crd"])
def test_a_term_lowers_its_loss(name: str) -> None:
    teacher, student = mlp(8), mlp(6)
    if name == "fsp":
        projector = features.Each(nn.Linear(6, 8), nn.Identity())
        term = distill.feature(("1", "2"), ("1", "2"), relations.fsp, projector=projector)
    elif name == "crd":
        term = distill.feature("1", "1", relations.CRD(6, 8, negatives=32, dim=16))
    else:
        term = distill.feature("1", "1", FUNCTIONS[name])
    loader = [torch.randn(16, 5) for _ in range(4)]
    steps = distill.train(
        student, loader, term, teacher=teacher, epochs=25, lr=1e-2, progress=False
    )
    losses = [step.loss for step in steps]
    assert sum(losses[-4:]) < 0.8 * sum(losses[:4])


def test_contrast_is_in_the_checkpoint_and_resumes_exactly(tmp_path: Path) -> None:
    teacher, student = mlp(8), mlp(6)
    crd = relations.CRD(6, 8, negatives=40, dim=4)
    names = set(student.state_dict())
    parts = copy.deepcopy((student, crd))
    loader = [torch.randn(16, 5) for _ in range(3)]

    def run(student: nn.Module, crd: nn.Module, folder: str, epochs: int, resume: bool) -> None:
        distill.train(
            student,
            loader,
            distill.feature("1", "1", crd),
            teacher=teacher,
            epochs=epochs,
            checkpoint=distill.Checkpoints(tmp_path / folder, resume=resume),
            progress=False,
        )

    torch.manual_seed(1)
    run(student, crd, "whole", 4, False)
    again, other = copy.deepcopy(parts)
    torch.manual_seed(1)
    run(again, other, "halves", 2, False)
    torch.manual_seed(99)
    resumed, bank = mlp(6), relations.CRD(6, 8, negatives=40, dim=4)
    run(resumed, bank, "halves", 4, True)
    assert set(student.state_dict()) == names
    for a, b in ((student, resumed), (crd, bank)):
        assert all(torch.equal(x, b.state_dict()[k]) for k, x in a.state_dict().items())
    assert not torch.equal(crd.student.weight, parts[1].student.weight)
    assert int(bank.place) == 4 * 48 % 40
