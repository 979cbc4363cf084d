"""More than one model: peers that teach each other, several teachers, assistants between two."""

from __future__ import annotations

import torch
from torch import nn

from fastkd import distill

from .data import LABELLED
from .recipe import Figures, Gain, Recipe
from .soft_targets import BATCH, LEARNING_RATE, Bench
from .training import fit, held_out, mlp, sample_batches, scaled, seen_labels

TEACHERS, EACH = 5, 200  # teachers, and the labels that each of them has


def cnn() -> nn.Sequential:
    return nn.Sequential(
        nn.Unflatten(1, (1, 8, 8)),
        nn.Conv2d(1, 16, 3, padding=1),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.Flatten(),
        nn.Dropout(0.5),
        nn.Linear(512, 10),
    )


def mutual(seed: int, size: float) -> Figures:
    """The same 100 labels for all; peers ask each other about images without a label too."""
    bench = Bench(seed, size)
    data, nobody = bench.data, torch.full((BATCH,), -100)
    labelled = sample_batches(
        seed, bench.steps, BATCH, data.images[:LABELLED], data.labels[:LABELLED]
    )
    both = [
        (torch.cat([x, images]), torch.cat([y, nobody]))
        for (x, y), (images,) in zip(
            labelled, sample_batches(seed, bench.steps, BATCH, data.images), strict=True
        )
    ]

    def pair() -> tuple[nn.Module, nn.Module]:
        torch.manual_seed(1000 + seed)
        return mlp(64, 16, 10), cnn()

    def adam(model: nn.Module) -> torch.optim.Optimizer:
        slower = any(isinstance(part, nn.Conv2d) for part in model.modules())
        return torch.optim.AdamW(
            model.parameters(), lr=LEARNING_RATE / 5 if slower else LEARNING_RATE
        )

    alone, peers = pair(), pair()
    for model in alone:
        fit(model, labelled, distill.hard(), optimizer=adam(model), schedule=bench.schedule)
    distill.mutual(
        peers, both, temperature=4.0, optimizer=adam, schedule=bench.schedule, progress=False
    )
    return {
        f"{what} {name}": held_out(model, data)
        for name, models in (("alone", alone), ("with a peer", peers))
        for what, model in zip(("MLP", "CNN"), models, strict=True)
    }


def several_teachers(seed: int, size: float) -> Figures:
    """Teachers that saw 200 labels each, no two the same; students that saw none."""
    bench = Bench(seed, size)
    parts = torch.arange(TEACHERS * EACH).split(EACH)
    teachers = []
    for at, rows in enumerate(parts):
        torch.manual_seed(10 * seed + at)
        batches = sample_batches(
            seed, scaled(150, size), BATCH, bench.data.images[rows], bench.data.labels[rows]
        )
        teachers.append(fit(mlp(64, 1200, 10), batches, distill.hard(), 1e-3))
    mean = distill.EnsembleTeacher(teachers, temperature=4.0)
    figures = {f"teacher {at}": held_out(one, bench.data) for at, one in enumerate(teachers)}
    for name, teacher in (("one teacher", teachers[0]), ("mean of five", mean)):
        figures[name] = held_out(
            bench.student(SOFT, bench.data.images, teacher=teacher), bench.data
        )
    return figures


def assistants(seed: int, size: float) -> Figures:
    """A student of 4 units, far from a teacher of 1200: straight, and by way of 64 and 16."""
    bench = Bench(seed, size)
    images, known = bench.data.images, seen_labels(bench.data)
    batches = sample_batches(seed, bench.steps, BATCH, images, known)

    def last(*widths: int) -> float:
        models = []
        for width in widths:
            torch.manual_seed(1000 * width + seed)
            models.append(mlp(64, width, 10))
        distill.assistant_chain(
            bench.teacher,
            models,
            batches,
            distill.hard(0.1),
            weight=0.9,
            lr=LEARNING_RATE,
            schedule=bench.schedule,
            progress=False,
        )
        return held_out(models[-1], bench.data)

    labelled = bench.data.images[:LABELLED], bench.data.labels[:LABELLED]
    few = sample_batches(seed, bench.steps, BATCH, *labelled)
    torch.manual_seed(4000 + seed)
    plain = fit(mlp(64, 4, 10), few, distill.hard(), LEARNING_RATE, schedule=bench.schedule)
    return {
        "hard labels": held_out(plain, bench.data),
        "straight": last(4),
        "by way of 16": last(16, 4),
        "by way of 64, 16": last(64, 16, 4),
    }


def warmth(seed: int, size: float) -> Figures:
    """Same inputs: a temperature that falls from 20 to 1, one that rises, and those between."""
    bench = Bench(seed, size)
    figures = {}
    for name, T in (
        ("T = 4", 4.0),
        ("T = 20", 20.0),
        ("20 to 1", distill.curriculum(20.0, 1.0, bench.steps)),
        ("1 to 20", distill.curriculum(1.0, 20.0, bench.steps)),
    ):
        figures[name] = bench.same(distill.hard(0.1), distill.soft(0.9, temperature=T))
    return figures


SOFT = distill.soft(temperature=4.0)
RECIPES = (
    Recipe(
        name="mutual",
        about="an MLP and a CNN that learn from 100 labels and from each other",
        paper="Zhang et al. 2018, arXiv 1706.00384",
        run=mutual,
        gains=(
            Gain("MLP with a peer", "MLP alone", 1.5, seeds_improved=7 / 8),
            Gain("CNN with a peer", "CNN alone", None),
        ),
    ),
    Recipe(
        name="multi-teacher",
        about="five teachers of 200 labels each as one, beside one of them",
        paper="You et al. 2017, learning from multiple teacher networks",
        run=several_teachers,
        gains=(Gain("mean of five", "one teacher", 1.3, seeds_improved=1.0),),
    ),
    Recipe(
        name="assistants",
        about="4 units learn from 1200 by way of 64 and 16, or straight",
        paper="Mirzadeh et al. 2019, arXiv 1902.03393",
        run=assistants,
        gains=(
            Gain("by way of 16", "straight", None),
            Gain("by way of 64, 16", "straight", None),
            Gain("straight", "hard labels", None),
        ),
    ),
    Recipe(
        name="curriculum",
        about="a temperature that falls from 20 to 1 beside one that stays, same 100 images",
        paper="Jafari et al. 2021, arXiv 2104.07163",
        run=warmth,
        gains=(
            Gain("20 to 1", "T = 4", None),
            Gain("20 to 1", "T = 20", None),
            Gain("1 to 20", "T = 4", None),
        ),
    ),
)
