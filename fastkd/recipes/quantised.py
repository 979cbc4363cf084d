"""A network of the digits in 2-bit weights, where few labels are left to train it with.

The float network has been trained on 1 000 labels; whoever quantises it has 100 of them, and 900
images without. "PTQ" rounds and trains nothing. The others train through the rounding: with the
labels alone, or taught by the float network on the same images, or on all of them.
"""

from __future__ import annotations

import torch

from fastkd import distill

from .data import LABELLED, POOL, digits
from .recipe import Figures, Gain, Recipe
from .trained import drawn, fit, held_out, mlp, scaled, seen_labels

FLOAT_STEPS, STEPS, BATCH = 200, 600, 100
WIDTH, BITS = 32, 2


def quantised(seed: int, size: float) -> Figures:
    data, steps = digits(seed), scaled(STEPS, size)
    torch.manual_seed(seed)
    whole = drawn(seed, scaled(FLOAT_STEPS, size), BATCH, data.images, data.labels)
    plain = fit(mlp(64, WIDTH, 10), whole, distill.hard())
    labels = seen_labels(data)
    taught = distill.hard(0.1), distill.soft(0.9, temperature=2.0)

    def trained(rows: int, *loss: distill.Term) -> float:
        batches = drawn(seed, steps, BATCH, data.images[:rows], labels[:rows])
        net = distill.quantised(plain, BITS)
        fit(net, batches, loss, lr=3e-3, teacher=plain, schedule=distill.decay(steps))
        return held_out(distill.baked(net), data)

    return {
        "float": held_out(plain, data),
        "PTQ": held_out(distill.baked(distill.quantised(plain, BITS)), data),
        "QAT": trained(LABELLED, distill.hard()),
        "QAT, same inputs": trained(LABELLED, *taught),
        "QAT, unlabelled": trained(POOL, *taught),
    }


RECIPES = (
    Recipe(
        name="quantised",
        about="a network in 2-bit weights, trained through the rounding with and without a teacher",
        paper="Polino, Pascanu and Alistarh 2018, arXiv 1802.05668",
        run=quantised,
        gains=(
            Gain("QAT, unlabelled", "QAT", 1.8, wins=1.0),
            Gain("QAT, same inputs", "QAT", None),
            Gain("PTQ", "QAT", None),
        ),
    ),
)
