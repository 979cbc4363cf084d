"""Attention losses in the trainer."""

from __future__ import annotations

import functools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from attention_scores import SCORES, mask_of
from torch import Tensor, nn

from fastkd import distill
from fastkd.distill.losses import attention, features


class Attending(nn.Module):
    """One layer of attention, whose parts hooks can reach."""

    def __init__(self, d: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v = (nn.Linear(4, d) for _ in range(3))
        self.scores, self.hidden, self.head = nn.Identity(), nn.Identity(), nn.Linear(d, 3)

    def forward(self, inputs: Tensor) -> Tensor:
        projected = (f(inputs) for f in (self.q, self.k, self.v))
        q, k, v = (x.unflatten(2, (self.heads, -1)).transpose(1, 2) for x in projected)
        scores = self.scores(q @ k.transpose(2, 3) / math.sqrt(q.size(3)))
        mixed = (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)
        return self.head(self.hidden(mixed).mean(1))


@pytest.mark.parametrize("name", ["kl", "tinybert", "minilm", "hidden"])
def test_a_term_lowers_its_loss(name: str) -> None:
    teacher, student = Attending(12, 2), Attending(8, 2)
    loader = [
        distill.Batch(torch.randn(8, 5, 4), extra={"mask": mask_of("padding", 8, 5)})
        for _ in range(4)
    ]
    layers: Any = {"minilm": ("q", "k", "v"), "hidden": "hidden"}.get(name, "scores")
    function: Any = {
        **SCORES,
        "minilm": functools.partial(attention.minilm, heads=4),
        "hidden": attention.tinybert_hidden,
    }[name]
    projector = nn.Linear(8, 12) if name == "hidden" else None

    def masked(s: distill.Outputs, t: distill.Outputs, batch: distill.Batch) -> Tensor:
        mine, theirs = (
            x.features[layers]
            if isinstance(layers, str)
            else [x.features[layer] for layer in layers]
            for x in (s, t)
        )
        mine = mine if projector is None else projector(mine)
        return function(mine, theirs, mask=batch.extra["mask"])

    names = (layers,) if isinstance(layers, str) else layers
    term = distill.Term("masked", masked, 1.0, "samples", names, names, projector)
    plain = distill.feature(layers, layers, function, 0.5, projector=projector)
    for terms in ([term], [plain]):
        steps = distill.train(
            student, loader, terms, teacher=teacher, epochs=20, lr=1e-2, progress=False
        )
        losses = [step.loss for step in steps]
        assert sum(losses[-4:]) < 0.8 * sum(losses[:4])


def test_maps_are_transferred_in_training() -> None:
    def convolutional(width: int) -> nn.Sequential:
        return nn.Sequential(
            nn.Conv2d(1, width, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.LazyLinear(3)
        )

    teacher, student = convolutional(8), convolutional(4)
    loader = [torch.randn(8, 1, 6, 6) for _ in range(4)]
    for model in (teacher, student):
        model(loader[0])
    term = distill.feature("1", "1", attention.at, 1000.0)
    steps = distill.train(
        student, loader, term, teacher=teacher, epochs=20, lr=1e-2, progress=False
    )
    losses = [step.loss for step in steps]
    assert sum(losses[-4:]) < 0.8 * sum(losses[:4])


def test_one_projector_for_several_layers_is_checkpointed(tmp_path: Path) -> None:
    """TinyBERT's hidden states share theirs."""
    teacher = nn.Sequential(*(nn.Linear(4, 4) for _ in range(4)))
    student = nn.Sequential(*(nn.Linear(4, 4) for _ in range(2)))
    shared = nn.Linear(4, 4)
    projector = features.Each(shared, shared)

    def run(projector: nn.Module, epochs: int, resume: bool) -> None:
        term = distill.feature(
            ("0", "1"), ("0", "1", "2", "3"), attention.tinybert_hidden, projector=projector
        )
        distill.train(
            student,
            [torch.randn(2, 3, 4)],
            term,
            teacher=teacher,
            epochs=epochs,
            checkpoint=distill.Checkpoints(tmp_path, resume=resume),
            progress=False,
        )

    before, names = shared.weight.detach().clone(), set(student.state_dict())
    run(projector, 2, False)
    assert not torch.equal(before, shared.weight) and set(student.state_dict()) == names
    other = nn.Linear(4, 4)
    run(features.Each(other, other), 2, True)  # nothing left to do but to load
    assert torch.equal(other.weight, shared.weight)
