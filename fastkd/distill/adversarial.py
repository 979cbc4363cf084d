"""A discriminator between teacher and student, trained in the same step as the student."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from fastkd.arguments.messages import shown

from .batch import IGNORED, Batch, Outputs
from .terms import Term, Weight

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
        told = F.cross_entropy(discriminator(t.to(s.dtype)), real)
        caught = F.cross_entropy(discriminator(s.detach()), fake)
        return passing + (told + caught) / 2

    return Term(name, function, weight, mean="samples", module=discriminator)
