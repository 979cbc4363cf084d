"""How samples, or two layers, of a teacher relate, as the target of a student's hidden layer.

The control has a projector and sees the same images, but its term weighs 0.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from fastkd import distill
from fastkd.distill.losses import features, relations

from .features import FIRST, LAST, WIDE, Inside, hint
from .recipe import Figures, Gain, Recipe


class Flow(Inside):
    """The second hidden layer is as wide in the teacher as in the student."""

    teachers = (64, WIDE, 16, 10)


def rkd(student: Tensor, teacher: Tensor) -> Tensor:
    distance = relations.rkd_distance(student, teacher)
    return 25 * distance + 50 * relations.rkd_angle(student, teacher)


def run(seed: int, size: float) -> Figures:
    torch.manual_seed(seed)  # of what terms learn
    term = partial(distill.feature, LAST, LAST)
    terms = {
        "control": hint("l2", 0.0),
        "RKD": term(rkd, 1.0),
        "SP": term(relations.sp, 3e4),
        "PKT": term(relations.pkt, 1e3),
        "CC": term(relations.cc, 1e3),
        "CRD": term(relations.CRD(16, WIDE, negatives=400), 0.1),
    }
    layers = (FIRST, LAST), (FIRST, LAST)
    # a flow of two projections would leave it open which of them has to follow the teacher
    projector = features.Each(nn.Linear(16, WIDE), nn.Identity())
    flow = {"FSP": distill.feature(*layers, relations.fsp, 10.0, projector=projector)}
    return Inside(seed, size).figures(terms) | Flow(seed, size).figures(flow)


RECIPES = (
    Recipe(
        name="relations",
        about="distances, angles and similarities of the samples of a batch, or of two layers",
        paper="Park et al. 2019, arXiv 1904.05068; Tung and Mori 2019, arXiv 1907.09682; Passalis "
        "and Tefas 2018, arXiv 1803.10837; Peng et al. 2019, arXiv 1904.01802; Yim et al. 2017; "
        "Tian et al. 2019, arXiv 1910.10699",
        run=run,
        gains=(
            *(
                Gain(name, "control", 4.0, seeds_improved=1.0)
                for name in ("RKD", "SP", "PKT", "CC", "FSP")
            ),
            Gain("CRD", "control", None),
        ),
    ),
)
