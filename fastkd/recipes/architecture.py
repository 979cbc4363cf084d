"""Successive halving over small students, its reward a teacher's: which shape for 1100 numbers.

The digits are moved by up to a pixel here: on those as they come, every shape does the same.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fastkd import distill

from .data import LABELLED, POOL, digits
from .recipe import Figures, Gain, Recipe
from .training import accuracy, fit, held_out, sample_batches, scaled, seen_labels

MOST = 1100  # parameters
TRAINING = (
    800  # the other 200 of the pool, without their labels, choose among the distilled candidates
)
ROUNDS = (40, 40, 80, 160)  # steps


class Rescaled(nn.Module):
    """Each image less its mean, over its deviation: no parameters."""

    def forward(self, x: Tensor) -> Tensor:
        return (x - x.mean(1, keepdim=True)) / (x.std(1, keepdim=True) + 1e-3)


ACTIVATIONS = {"relu": nn.ReLU, "tanh": nn.Tanh, "gelu": nn.GELU}


def dense(width: int, depth: int, activation: str, rescaled: bool) -> nn.Sequential:
    sizes = [64, *[width] * depth]
    layers: list[nn.Module] = [Rescaled()] if rescaled else []
    for i in range(depth):
        layers += [nn.Linear(sizes[i], sizes[i + 1]), ACTIVATIONS[activation]()]
    return nn.Sequential(*layers, nn.Linear(sizes[-1], 10))


def convolved(channels: int, second: int, activation: str, rescaled: bool) -> nn.Sequential:
    layers: list[nn.Module] = [Rescaled()] if rescaled else []
    act = ACTIVATIONS[activation]
    layers += [nn.Unflatten(1, (1, 8, 8)), nn.Conv2d(1, channels, 3, padding=1), act()]
    layers += [nn.MaxPool2d(2)]
    spots = 16 * channels
    if second:
        layers += [nn.Conv2d(channels, second, 3, padding=1), act(), nn.MaxPool2d(2)]
        spots = 4 * second
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(spots, 10))


Make = tuple[Any, ...]


def space() -> list[Make]:
    """(maker, *its arguments) of every student that is small enough."""
    shapes: list[Make] = [(dense, w, d) for w in (2, 4, 6, 8, 10, 12, 14) for d in (1, 2, 3)]
    shapes += [(convolved, c, s) for c in (2, 4, 6) for s in (0, 4, 8, 12)]
    every: list[Make] = [
        (*shape, a, r) for shape in shapes for a in ACTIVATIONS for r in (False, True)
    ]
    return [make for make in every if parameters(make[0](*make[1:])) <= MOST]


def parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


DEFAULT = (dense, 14, 1, "relu", False)
CANDIDATES = 16
VALIDATION = 30  # of the 100 labels, where labels choose
KD = [distill.hard(0.1), distill.soft(0.9, temperature=4.0)]


class Started:
    """A candidate that is trained in parts."""

    def __init__(self, make: Make, seed: int, batches: list[Any], loss: Any, live: Any) -> None:
        torch.manual_seed(1000 + seed)
        self.make, self.model = make, make[0](*make[1:])
        self.left, self.loss, self.live = iter(batches), loss, live

    def on(self, steps: int) -> nn.Module:
        batches = [next(self.left) for _ in range(steps)]
        model: nn.Module = fit(self.model, batches, self.loss, teacher=self.live)
        return model


def moved(images: Tensor, generator: torch.Generator) -> Tensor:
    """Each by -1, 0 or 1 pixel, down and across, around the edges."""
    far = torch.randint(-1, 2, (len(images), 2), generator=generator).tolist()
    rolled = [x.roll(by, (0, 1)) for x, by in zip(images.view(-1, 8, 8), far, strict=True)]
    return torch.stack(rolled).flatten(1)


def compare(seed: int, size: float) -> Figures:
    """Both searches choose among the same 16; what they choose is then distilled in full."""
    data, rounds = digits(seed), [scaled(steps, size) for steps in ROUNDS]
    where, steps = torch.Generator().manual_seed(seed), sum(rounds)
    data = data._replace(images=moved(data.images, where), held_out=moved(data.held_out, where))
    torch.manual_seed(seed)
    live = convolved(16, 64, "relu", False)
    fit(live, sample_batches(seed, 200, 100, data.images, data.labels), distill.hard(), lr=3e-3)
    every = space()
    order = torch.randperm(len(every), generator=torch.Generator().manual_seed(seed))
    makes = [every[at] for at in order[:CANDIDATES].tolist()]
    distilled = sample_batches(
        seed, steps, 100, data.images[:TRAINING], seen_labels(data)[:TRAINING]
    )
    few, validation = LABELLED - VALIDATION, slice(LABELLED - VALIDATION, LABELLED)
    labelled = sample_batches(seed, steps, few, data.images[:few], data.labels[:few])

    def agreed(model: nn.Module) -> float:
        return distill.agreement(model, live, [data.images[TRAINING:POOL]])

    def right(model: nn.Module) -> float:
        return accuracy(model, data.images[validation], data.labels[validation])

    def chosen(students: list[Started], value: Callable[[nn.Module], float]) -> Make:
        """Successive halving: the better half is trained on, round after round."""
        for steps in rounds:
            scores = {student: value(student.on(steps)) for student in students}
            ranked = sorted(students, key=scores.__getitem__, reverse=True)
            students = ranked[: max(1, len(students) // 2)]
        return students[0].make

    final = dict[Make, float]()
    for make in [*makes, DEFAULT]:
        final[make] = held_out(Started(make, seed, distilled, KD, live).on(steps), data)
    guided = [Started(make, seed, distilled, KD, live) for make in makes]
    unguided = [Started(make, seed, labelled, distill.hard(), None) for make in makes]
    return {
        "search by teacher": final[chosen(guided, agreed)],
        "search by labels": final[chosen(unguided, right)],
        "teacher": held_out(live, data),
        "default": final[DEFAULT],
        "space mean": statistics.fmean(final[make] for make in makes),
        "best of the space": max(final[make] for make in makes),
    }


RECIPES = (
    Recipe(
        name="architecture",
        about="the shape of a student of 1100 numbers, by halving 16 on agreement with a teacher",
        paper="Li et al. 2016, arXiv 1603.06560",
        run=compare,
        gains=(
            Gain("search by teacher", "default", 2.0, seeds_improved=1.0),
            Gain("search by teacher", "space mean", None),
            Gain("search by teacher", "search by labels", None),
            Gain("search by teacher", "best of the space", None),
        ),
        seeds=6,
    ),
)
