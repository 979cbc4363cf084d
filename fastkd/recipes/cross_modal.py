"""A student that sees another modality than its teacher, taught over unlabelled pairs of the two.

The teacher sees images of digits; the student 16 numbers for each, a random projection of the image
that is fixed for a seed. Of 100 pairs it has the labels, of 900 the teacher's word alone.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastkd import distill

from .data import LABELLED, POOL, digits
from .recipe import Figures, Gain, Recipe
from .training import accuracy, held_out, mlp, sample_batches, scaled, seen_labels, teacher

STEPS, BATCH = 400, 100
SEEN, WIDTH = 16, 64  # numbers that the student sees, and its hidden units


def cross_modal(seed: int, size: float) -> Figures:
    data, steps = digits(seed), scaled(STEPS, size)
    torch.manual_seed(seed)
    projection = torch.randn(data.images.size(1), SEEN) / SEEN**0.5
    seen, seen_held_out = data.images @ projection, data.held_out @ projection
    sighted = teacher(data, seed)

    def student(rows: int, labels: Tensor, *loss: distill.Term) -> float:
        pairs = [
            distill.Batch(halves, classes, teacher_inputs=images)
            for halves, classes, images in sample_batches(
                seed, steps, BATCH, seen[:rows], labels[:rows], data.images[:rows]
            )
        ]
        torch.manual_seed(1000 + seed)
        net = mlp(SEEN, WIDTH, 10)
        distill.train(net, pairs, loss, teacher=sighted, lr=1e-2, progress=False)
        return accuracy(net, seen_held_out, data.held_out_labels)

    distilled = distill.hard(0.1), distill.soft(0.9, temperature=4.0)
    return {
        "teacher": held_out(sighted, data),
        "hard labels": student(LABELLED, data.labels, distill.hard()),
        "pairs": student(POOL, seen_labels(data), *distilled),
        "all labels": student(POOL, data.labels, distill.hard()),
    }


RECIPES = (
    Recipe(
        name="cross-modal",
        about="a student that sees a 16-number projection, taught by a teacher of the images",
        paper="Gupta, Hoffman and Malik 2016, arXiv 1507.00448",
        run=cross_modal,
        gains=(
            Gain("pairs", "hard labels", 6.0, seeds_improved=1.0),
            Gain("pairs", "all labels", None),
        ),
    ),
)
