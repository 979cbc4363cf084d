"""A teacher's hidden layer as the target of the student's, on images without a label too.

The control has the projector and sees the same images, but its term weighs 0.
"""

from __future__ import annotations

from functools import cached_property, partial

import torch
from torch import Tensor, nn

from fastkd import distill
from fastkd.distill.losses import features

from .recipe import Figures, Gain, Recipe
from .soft_targets import BATCH, Bench
from .training import fit, mlp, sample_batches

FIRST, LAST = "1", "3"  # hidden layers, after their ReLU
HINTS = {"l2": 10.0, "l1": 10.0, "cosine": 30.0}
WIDE = 256


class Inside(Bench):
    """Students of 100 labels and of what a teacher's layers do on all images.

    The teacher is trained until its last hidden layer is of classes rather than of pixels.
    """

    students = (64, 16, 16, 10)
    teachers: tuple[int, ...] = (64, WIDE, WIDE, 10)
    all_steps = 600

    @cached_property
    def teacher(self) -> nn.Sequential:
        torch.manual_seed(self.seed)
        batches = sample_batches(self.seed, 300, BATCH, self.data.images, self.data.labels)
        return fit(mlp(*self.teachers), batches, distill.hard(), lr=5e-3)

    def figures(self, terms: dict[str, distill.Term]) -> Figures:
        """Accuracy by the name of the term that stands beside the hard labels."""
        return {name: self.unlabelled(distill.hard(), term) for name, term in terms.items()}


def hint(kind: str, weight: float) -> distill.Term:
    function = partial(features.hint, kind=kind)
    return distill.feature(LAST, LAST, function, weight, projector=nn.Linear(16, WIDE))


def hints(student: tuple[Tensor, Tensor], teacher: tuple[Tensor, Tensor]) -> Tensor:
    return features.hint(student[0], teacher[0]) + features.hint(student[1], teacher[1])


def run(seed: int, size: float) -> Figures:
    torch.manual_seed(seed)  # of what terms learn
    term = partial(distill.feature, LAST, LAST)
    projectors = features.Each(nn.Linear(16, WIDE), nn.Linear(16, WIDE))
    layers = (FIRST, LAST), (FIRST, LAST)
    moment = term(features.second_moment, 1e-4, projector=nn.Linear(16, WIDE))
    terms = {"control": hint("l2", 0.0)}
    terms |= {kind: hint(kind, weight) for kind, weight in HINTS.items()}
    terms |= {
        "two layers": distill.feature(*layers, hints, 10.0, projector=projectors),
        "NST": term(features.nst, 1000.0),
        "second moment": moment,
        "VID": term(features.VID(16, WIDE)),
        "MGD": term(features.MGD(16, WIDE, spatial=False), 10.0),
    }
    return Inside(seed, size).figures(terms)


RECIPES = (
    Recipe(
        name="features",
        about="a hidden layer of 256 units as the target of one of 16, 900 images without a label",
        paper="Romero et al. 2014, arXiv 1412.6550; Huang and Wang 2017, arXiv 1707.01219; Ahn et "
        "al. 2019, arXiv 1904.05835; Yang et al. 2022, arXiv 2205.01529",
        run=run,
        gains=(
            *(Gain(name, "control", 5.0, seeds_improved=1.0) for name in (*HINTS, "two layers")),
            Gain("NST", "control", 5.0),
            Gain("second moment", "control", 0.0),
            Gain("VID", "control", 4.0, seeds_improved=1.0),
            Gain("MGD", "control", None),
        ),
    ),
)
