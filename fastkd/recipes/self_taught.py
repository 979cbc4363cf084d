"""No teacher but itself: 40 % of the labels are wrong, and the model can learn them by heart.

A model's answer to an image is righter than such a label: an average of its weights, an earlier
generation, peers of its kind, or its own last layer say it. A model that learns slowly learns fewer
of them by heart: "plain, slow" has the learning rate that suits it best, and most of what schemes
gain over "plain" is not gained over that one.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fastkd import distill

from .data import POOL, digits
from .recipe import Figures, Gain, Recipe
from .soft_targets import BATCH, STEPS, centred
from .training import fit, held_out, mlp, sample_batches, scaled

WRONG, WIDTH, LEARNING_RATE = 0.4, 64, 7e-3
SLOW = 2e-3  # of 1, 2, 3 and 5e-3 the best learning rate of a model without a scheme
PEERS, GENERATIONS = 4, 3


class Noisy:
    """A seed's data with wrong labels, its batches and schedule."""

    def __init__(self, seed: int, size: float) -> None:
        self.seed, self.data = seed, centred(digits(seed))
        generator = torch.Generator().manual_seed(seed)
        others = (self.data.labels + torch.randint(1, 10, (POOL,), generator=generator)) % 10
        wrong = torch.rand(POOL, generator=generator) < WRONG
        self.labels: Tensor = torch.where(wrong, others, self.data.labels)
        steps = scaled(STEPS, size)
        self.batches = sample_batches(seed, steps, BATCH, self.data.images, self.labels)
        self.options: dict[str, Any] = {
            "lr": LEARNING_RATE,
            "schedule": distill.lr_schedule(steps, warmup=steps // 10),
        }
        self.ramp = steps // 4

    def model(self, number: int = 0, layers: int = 1) -> nn.Sequential:
        torch.manual_seed(1000 + 100 * number + self.seed)
        return mlp(64, *[WIDTH] * layers, 10)

    def plain(self, lr: float = LEARNING_RATE, layers: int = 1, **options: Any) -> nn.Module:
        options = {**self.options, **options, "lr": lr}
        return fit(self.model(layers=layers), self.batches, distill.hard(), **options)

    def score(self, model: nn.Module) -> float:
        return held_out(model, self.data)


def self_taught(seed: int, size: float) -> Figures:
    noisy = Noisy(seed, size)
    own = {**noisy.options, "progress": False}
    average = distill.EMATeacher(noisy.model(), 0.99)
    figures = {
        "plain": noisy.score(noisy.plain(ema=average)),
        "its average": noisy.score(average.model),
        "plain, slow": noisy.score(noisy.plain(SLOW)),
    }

    for name, lr in (("", LEARNING_RATE), (", slow", SLOW)):
        student, options = noisy.model(), {**own, "lr": lr, "ramp": noisy.ramp}
        mean, _ = distill.mean_teacher(student, noisy.batches, decay=0.99, weight=3.0, **options)
        figures["mean teacher" + name] = noisy.score(student)
        figures["its mean" + name] = noisy.score(mean)

    models = distill.born_again(noisy.model, noisy.batches, GENERATIONS, hard_weight=0.0, **own)
    figures |= {f"generation {at}": noisy.score(model) for at, model in enumerate(models)}

    peers = [noisy.model(number) for number in range(PEERS)]
    distill.mutual(peers, noisy.batches, weight=3.0, **own)
    figures["4 peers"] = noisy.score(peers[0])
    return figures


def exits(seed: int, size: float) -> Figures:
    """The last exit of a net of four layers, the others' heads beside it or not."""
    noisy = Noisy(seed, size)
    figures = {
        "plain": noisy.score(noisy.plain(layers=3)),
        "plain, slow": noisy.score(noisy.plain(SLOW, layers=3)),
    }
    for name, alpha in (("heads alone", 0.0), ("own teacher", 0.9)):
        model = noisy.model(layers=3)
        heads = {layer: nn.Linear(WIDTH, 10) for layer in ("1", "3")}
        terms = distill.self_distillation(heads, alpha=alpha, temperature=3.0)
        fit(model, noisy.batches, [distill.hard(), *terms], **noisy.options)
        figures[name] = noisy.score(model)
    return figures


RECIPES = (
    Recipe(
        name="self-taught",
        about="40 % wrong labels: the average of itself, generations, peers of its kind",
        paper="Tarvainen and Valpola 2017, arXiv 1703.01780; Furlanello et al. 2018, 1805.04770",
        run=self_taught,
        gains=(
            Gain("mean teacher", "plain", 1.0, seeds_improved=1.0),
            Gain("generation 3", "plain", 0.7, seeds_improved=5 / 6),
            Gain("4 peers", "plain", None),
            *(Gain(x, "plain, slow", None) for x in ("mean teacher", "generation 3", "4 peers")),
            Gain("mean teacher, slow", "plain, slow", None),
            Gain("its average", "plain", None),
            Gain("its mean", "its average", None),
        ),
        seeds=6,
    ),
    Recipe(
        name="own-teacher",
        about="40 % wrong labels: early exits learn from the last one, or from labels alone",
        paper="Zhang et al. 2019, arXiv 1905.08094",
        run=exits,
        gains=(
            Gain("own teacher", "heads alone", 2.0),
            Gain("own teacher", "plain", None),
            Gain("own teacher", "plain, slow", None),
            Gain("heads alone", "plain", None),
        ),
        seeds=6,
    ),
)
