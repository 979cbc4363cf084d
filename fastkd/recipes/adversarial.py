"""A discriminator as the only teacher's voice, beside labels and beside plain distillation."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from fastkd import distill
from fastkd.arguments.messages import shown
from fastkd.distill.batch import IGNORED, Batch, Outputs
from fastkd.distill.terms import Term, Weight

from .data import LABELLED, digits
from .recipe import Figures, Gain, Recipe
from .training import fit, held_out, sample_batches, scaled, seen_labels, teacher
from .workflow import TEMPERATURE, student

SLOPE = 0.2  # of the discriminator's leaky ReLU


def adversarial(
    weight: Weight = 1.0,
    *,
    classes: int,
    discriminator: nn.Module | None = None,
    conditional: bool = True,
    name: str = "adversarial",
) -> Term:
    """The student's logits are to pass for the teacher's, before a discriminator D that learns too.

        student  CE(y, D(s)), D held fixed
        D        (CE(y, D(t)) + CE(V, D(s))) / 2, s held fixed

    y is the row's label, or the teacher's first choice where it has none, and V the extra class
    "said by a student". Where not conditional, y is 0 in every row and the student's class 1. Both
    are one value of one backward pass: D is the term's module, in a group of the student's
    optimizer (an own one of `train(optimizer=)` gives D its own learning rate, by a group of
    `term.module.parameters()`). Two learners of one loss circle each other, and a run may end far
    from where its neighbours do: look at several seeds. The recipe `adversarial` steadies it by
    AdamW's first beta at 0.5, D at a tenth of the student's rate, and rates that fall to a fiftieth
    over the second half.

    Args:
        weight: factor of both parts, or step -> factor.
        classes: V, the number of logits.
        discriminator: module, [N, V] -> [N, V + 1] ([N, 2] where not conditional); None makes an
            MLP with one hidden layer of 64.
        conditional: whether D has to name the class as well.

    Returns:
        The term; its value is the sum of the three cross-entropies as weighed above.

    Raises:
        ValueError: `classes` below 2; in training: no teacher, other numbers of logits.
        TypeError: in training, a teacher that keeps some of its logits only.

    Paper: Xu, Hsu and Huang 2017, arXiv 1709.00513.
    """
    if classes < 2:
        raise ValueError(f"classes: got {shown(classes)}, expected an integer >= 2")
    outcomes = classes + 1 if conditional else 2
    if discriminator is None:
        layers = nn.Linear(classes, 64), nn.LeakyReLU(SLOPE), nn.Linear(64, outcomes)
        discriminator = nn.Sequential(*layers)

    def function(student: Outputs, teacher: Outputs, batch: Batch) -> Tensor:
        if teacher.logits is None:
            raise ValueError(f"term {name!r}: got no teacher, expected train(..., teacher=...)")
        if not isinstance(teacher.logits, Tensor):
            got = type(teacher.logits).__name__
            raise TypeError(f"term {name!r}: got {got} of the teacher, expected all its logits")
        s, t = student.logits.flatten(0, -2), teacher.logits.flatten(0, -2)
        if s.size(-1) != classes or t.size(-1) != classes:
            got = f"{t.size(-1)} logits of the teacher and {s.size(-1)} of the student"
            raise ValueError(f"term {name!r}: got {got}, expected classes={classes} of both")
        real = t.argmax(-1) if conditional else torch.zeros_like(t[:, 0], dtype=torch.long)
        if conditional and batch.labels is not None:
            labels = batch.labels.flatten()
            real = torch.where(labels == IGNORED, real, labels)
        fake = torch.full_like(real, outcomes - 1)
        fixed = {key: p.detach() for key, p in discriminator.named_parameters()}
        passing = F.cross_entropy(functional_call(discriminator, fixed, s), real)
        recognised = F.cross_entropy(discriminator(t.to(s.dtype)), real)
        caught = F.cross_entropy(discriminator(s.detach()), fake)
        return passing + (recognised + caught) / 2

    return Term(name, function, weight, mean="samples", module=discriminator)


# ---- the recipe

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
        batches = sample_batches(seed, steps, 100, *columns)
        return held_out(fit(student(seed), batches, loss, teacher=live), data)

    def settling(step: int) -> float:
        """1, then down to 0.02 over the second half."""
        return max(0.02, min(1.0, 2 * (1 - step / steps)))

    def trained_against(weight: float, *, conditional: bool = True) -> float:
        net = student(seed)  # draws the seed of the discriminator too
        term = adversarial(weight, classes=CLASSES, conditional=conditional)
        assert term.module is not None
        groups: list[dict[str, Any]] = [
            {"params": list(net.parameters())},
            {"params": list(term.module.parameters()), "lr": SLOWER * RATE},
        ]
        optimizer = torch.optim.AdamW(groups, lr=RATE, betas=BETAS)
        batches, terms = sample_batches(seed, steps, 100, *every), [distill.hard(), term]
        options: dict[str, Any] = {"optimizer": optimizer, "schedule": settling}
        return held_out(fit(net, batches, terms, teacher=live, **options), data)

    kd = [distill.hard(0.1), distill.soft(0.9, temperature=TEMPERATURE)]
    return {
        "labels": trained(distill.hard(), *few),
        "conditional, w = 0.5": trained_against(0.5),
        "conditional, w = 1": trained_against(1.0),
        "real or not, w = 1": trained_against(1.0, conditional=False),
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
