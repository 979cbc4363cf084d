"""A second task learnt without the first one's data, with and without the old self as teacher.

The tasks are the digits 0 to 4 and then 5 to 9, each with a head of its own; whoever asks knows
of which task an image is. "All classes" is one head of ten, which must tell the tasks apart too.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from fastkd import distill

from .data import digits
from .recipe import Figures, Gain, Recipe
from .training import accuracy, fit, mlp, sample_batches, scaled

STEPS, BATCH, RATE = 200, 100, 1e-2
WIDTH, OLD = 64, 5  # hidden units, classes of the first task


class TwoHeads(nn.Module):
    """Images [B, 64] -> {"old", "new"}: logits [B, 5] each."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(64, WIDTH), nn.ReLU())
        self.old, self.new = nn.Linear(WIDTH, OLD), nn.Linear(WIDTH, 10 - OLD)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        features = self.body(images)
        return {"old": self.old(features), "new": self.new(features)}


def lifelong(seed: int, size: float) -> Figures:
    data, steps = digits(seed), scaled(STEPS, size)
    first, first_held_out = data.labels < OLD, data.held_out_labels < OLD

    def batches(rows: Tensor, shift: int = 0) -> list[tuple[Tensor, ...]]:
        return sample_batches(seed, steps, BATCH, data.images[rows], data.labels[rows] - shift)

    def learnt(net: nn.Module, rows: Tensor, shift: int, head: Any, old: Any = None) -> nn.Module:
        if old is None:
            return fit(net, batches(rows, shift), distill.with_head(distill.hard(), head), lr=RATE)
        distill.lwf(net, batches(rows, shift), new=head, old=old, lr=RATE, progress=False)
        return net

    def right(net: nn.Module, rows: Tensor, shift: int = 0) -> float:
        return accuracy(net, data.held_out[rows], data.held_out_labels[rows] - shift)

    figures: Figures = {}
    torch.manual_seed(1000 + seed)
    before = learnt(TwoHeads(), first, 0, "old")
    figures["old task before"] = right(distill.Head(before, "old"), first_held_out)
    for name, old in (("plain", None), ("LwF", "old")):
        net = learnt(copy.deepcopy(before), ~first, OLD, "new", old)
        figures[f"old task, {name}"] = right(distill.Head(net, "old"), first_held_out)
        figures[f"new task, {name}"] = right(distill.Head(net, "new"), ~first_held_out, OLD)

    everything, held_out = torch.ones_like(first), torch.ones_like(first_held_out)
    torch.manual_seed(1000 + seed)
    fresh = mlp(64, WIDTH, 10)
    before = learnt(copy.deepcopy(fresh), first, 0, _all)
    for name, kept in (("plain", None), ("LwF", _first)):
        net = learnt(copy.deepcopy(before), ~first, 0, _all, kept)
        figures[f"all classes, {name}"] = right(net, held_out)
    figures["all classes, both at once"] = right(learnt(fresh, everything, 0, _all), held_out)
    return figures


def _all(logits: Tensor) -> Tensor:
    return logits


def _first(logits: Tensor) -> Tensor:
    return logits[..., :OLD]


RECIPES = (
    Recipe(
        name="lifelong",
        about="a second task learnt without the first one's data: the old self as teacher",
        paper="Li and Hoiem 2016, arXiv 1606.09282",
        run=lifelong,
        gains=(
            Gain("old task, LwF", "old task, plain", 3.0, seeds_improved=1.0),
            Gain("new task, LwF", "new task, plain", -0.5),
            Gain("all classes, LwF", "all classes, plain", None),
            Gain("all classes, LwF", "all classes, both at once", None),
        ),
    ),
)
