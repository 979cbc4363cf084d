"""A discriminator as the only teacher's voice, beside labels and beside plain distillation."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastkd import distill

from .data import LABELLED, digits
from .recipe import Figures, Gain, Recipe
from .trained import drawn, fit, held_out, scaled, seen_labels, teacher
from .workflow_rows import TEMPERATURE, student

CLASSES, RATE = 10, 1e-2
SLOWER = 0.1  # the discriminator's learning rate, as a share of the student's
# Two players circle each other: at AdamW's usual momentum and a constant rate, seed 0 gained 0.5
# points at w = 0.5 (seeds 0 to 2: 0.5, 7.2, 4.8; with these two 6.9, 7.7, 6.0).
BETAS = (0.5, 0.999)


def compare(seed: int, size: float) -> Figures:
    data, steps = digits(seed), scaled(800, size)
    live = teacher(data, seed)
    few = data.images[:LABELLED], data.labels[:LABELLED]
    every = data.images, seen_labels(data)

    def trained(loss: Any, *columns: Tensor) -> float:
        batches = drawn(seed, steps, 100, *columns)
        return held_out(fit(student(seed), batches, loss, teacher=live), data)

    def settling(step: int) -> float:
        """1, then down to 0.02 over the second half."""
        return max(0.02, min(1.0, 2 * (1 - step / steps)))

    def judged(weight: float, *, conditional: bool = True) -> float:
        net = student(seed)  # draws the seed of the discriminator too
        term = distill.adversarial(weight, classes=CLASSES, conditional=conditional)
        assert term.module is not None
        groups: list[dict[str, Any]] = [
            {"params": list(net.parameters())},
            {"params": list(term.module.parameters()), "lr": SLOWER * RATE},
        ]
        optimizer = torch.optim.AdamW(groups, lr=RATE, betas=BETAS)
        batches, terms = drawn(seed, steps, 100, *every), [distill.hard(), term]
        options: dict[str, Any] = {"optimizer": optimizer, "schedule": settling}
        return held_out(fit(net, batches, terms, teacher=live, **options), data)

    kd = [distill.hard(0.1), distill.soft(0.9, temperature=TEMPERATURE)]
    return {
        "labels": trained(distill.hard(), *few),
        "conditional, w = 0.5": judged(0.5),
        "conditional, w = 1": judged(1.0),
        "real or not, w = 1": judged(1.0, conditional=False),
        "KD": trained(kd, *every),
    }


RECIPES = (
    Recipe(
        name="adversarial",
        about="labels and a discriminator of the teacher's and the student's logits",
        paper="Xu et al. 2017, arXiv 1709.00513",
        run=compare,
        gains=(
            Gain("conditional, w = 0.5", "labels", 4.0),
            Gain("conditional, w = 1", "labels", 4.0),
            Gain("real or not, w = 1", "labels", None),
            Gain("KD", "labels", None),
        ),
    ),
)
