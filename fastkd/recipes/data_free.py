"""A student from a teacher alone: its inputs made from the teacher, beside noise and real ones."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastkd import distill

from .data import digits
from .recipe import Figures, Gain, Recipe
from .trained import drawn, fit, held_out, scaled
from .workflow_rows import TEMPERATURE, student

WIDTH, CLASSES, MADE, LATENT = 256, 10, 1000, 32
RANGE = (0.0, 1.0)  # of a pixel: what a user of a teacher knows


def normed() -> nn.Sequential:
    """An MLP with batch norms."""
    parts: list[nn.Module] = []
    for i in (64, WIDTH):
        parts += [nn.Linear(i, WIDTH), nn.BatchNorm1d(WIDTH), nn.ReLU()]
    return nn.Sequential(*parts, nn.Linear(WIDTH, CLASSES))


def generator() -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(LATENT, 128),
        nn.BatchNorm1d(128),
        nn.LeakyReLU(0.2),
        nn.Linear(128, 64),
        nn.Sigmoid(),
    )


def compare(seed: int, size: float) -> Figures:
    data, steps = digits(seed), scaled(800, size)
    torch.manual_seed(seed)
    live = normed()
    fit(live, drawn(seed, 150, 100, data.images, data.labels), distill.hard(), lr=2e-3)
    labels = torch.arange(CLASSES).repeat(MADE // CLASSES)

    def inverted(prior: float) -> Tensor:
        torch.manual_seed(seed)
        count = scaled(300, size)
        return distill.invert(live, labels, (64,), steps=count, lr=0.05, prior=prior, bounds=RANGE)

    def generated() -> Tensor:
        torch.manual_seed(seed)
        made = generator()
        distill.train_generator(
            made, live, lambda: torch.randn(200, LATENT), steps=scaled(400, size)
        )
        with torch.no_grad():
            return made.eval()(torch.randn(MADE, LATENT))

    def trained(images: Tensor) -> float:
        term = distill.soft(temperature=TEMPERATURE)
        batches = drawn(seed, steps, 100, images)
        return held_out(fit(student(seed), batches, term, teacher=live), data)

    noise = torch.rand(MADE, 64, generator=torch.Generator().manual_seed(seed))
    return {
        "teacher": held_out(live, data),
        "inverted": trained(inverted(1.0)),
        "inverted, classes alone": trained(inverted(0.0)),
        "generator": trained(generated()),
        "noise": trained(noise),
        "real": trained(data.images),
    }


RECIPES = (
    Recipe(
        name="data-free",
        about="inputs inverted from the teacher's batch norms, no image seen",
        paper="Yin et al. 2020, arXiv 1912.08795; Chen et al. 2019, arXiv 1904.01186",
        run=compare,
        gains=(
            Gain("inverted", "", 90.0),
            Gain("inverted", "noise", 20.0),
            Gain("inverted", "inverted, classes alone", None),
            Gain("inverted", "real", None),
            Gain("generator", "noise", None),
        ),
    ),
)
