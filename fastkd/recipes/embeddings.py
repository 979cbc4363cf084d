"""A small encoder that learns which images its teacher's embeddings hold for alike.

The teacher has an embedding of 64 numbers, the student of 8. The student sees no label: all it has
are 1000 images and its teacher. The control learns from 100 labels, its embedding under a head.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastkd import distill

from .data import LABELLED, Digits, digits
from .recipe import Figures, Gain, Recipe
from .training import fit, mlp, sample_batches, scaled

STEPS, BATCH = 300, 100
WIDE, NARROW = 64, 8  # numbers of an embedding
NEAREST = 10


def precision(encoder: nn.Module, data: Digits) -> float:
    """Of the ten nearest training images of a held-out one, the share of its class, in percent."""
    with torch.no_grad():
        queries, gallery = (
            nn.functional.normalize(encoder(x)) for x in (data.held_out, data.images)
        )
    nearest = (queries @ gallery.T).topk(NEAREST).indices
    return 100 * float((data.labels[nearest] == data.held_out_labels[:, None]).double().mean())


def run(seed: int, size: float) -> Figures:
    data, steps = digits(seed), scaled(STEPS, size)
    torch.manual_seed(seed)
    teacher = mlp(64, 1200, WIDE, 10)
    taught = sample_batches(seed, scaled(150, size), BATCH, data.images, data.labels)
    wide = fit(teacher, taught, distill.hard(), lr=1e-3)[:-1]

    def student(*loss: distill.Term) -> float:
        torch.manual_seed(1000 + seed)
        encoder = mlp(64, 32, NARROW)
        batches = sample_batches(seed, steps, BATCH, data.images)
        return precision(fit(encoder, batches, loss, teacher=wide), data)

    def labelled(images: Tensor, labels: Tensor) -> float:
        torch.manual_seed(1000 + seed)
        encoder = mlp(64, 32, NARROW)
        model = nn.Sequential(encoder, nn.Linear(NARROW, 10))
        fit(model, sample_batches(seed, steps, BATCH, images, labels), distill.hard())
        return precision(encoder, data)

    torch.manual_seed(seed)  # of what terms learn
    projector = nn.Linear(NARROW, WIDE)
    return {
        "teacher": precision(wide, data),
        "pixels": precision(nn.Identity(), data),
        "hard labels": labelled(data.images[:LABELLED], data.labels[:LABELLED]),
        "projected": student(distill.embedding(projector=projector)),
        "similarities": student(distill.embedding(distill.in_batch_similarity, temperature=0.1)),
    }


RECIPES = (
    Recipe(
        name="embeddings",
        about="an encoder of 8 numbers from one of 64, judged by the ten nearest of 1000 images",
        paper="Fang et al. 2021, arXiv 2101.04731; Reimers and Gurevych 2020, arXiv 2004.09813",
        run=run,
        gains=(
            Gain("similarities", "hard labels", 5.0, seeds_improved=1.0),
            Gain("projected", "hard labels", 2.0),
            Gain("similarities", "projected", 1.0),
            Gain("similarities", "pixels", None),
        ),
    ),
)
