"""Terms of models with one logit for each yes or no: several labels of a sample, or one.

>>> import torch
>>> from fastkd import distill
>>> student, teacher = (torch.nn.Linear(6, 4) for _ in range(2))
>>> batch = torch.randn(5, 6), torch.randint(2, (5, 4))
>>> terms = [distill.binary_hard(0.5), distill.binary_soft(0.5)]
>>> len(distill.train(student, [batch], terms, teacher=teacher, progress=False))
1
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

import fastkd
from fastkd.arguments.messages import shown

from ..batch import IGNORED, Batch, Outputs
from ..targets import label_of_each, teacher_logits, try_options
from ..terms import Term, Weight


def binary_hard(
    weight: Weight = 1.0, *, pos_weight: Tensor | None = None, name: str = "binary_hard"
) -> Term:
    """Binary cross-entropy with the labels, mean over the labelled logits of the step.

        -(pos_weight y log sigmoid(s) + (1 - y) log sigmoid(-s))

    Args:
        weight: factor, or step -> factor.
        pos_weight: floats that broadcast to the logits, such as [C]: the weight of a yes.
        name: of the term.

    Labels are in the logits' shape, [B] for one logit [B, 1], floats from 0 to 1 or integers 0 and
    1; -100 is left out.

    Raises:
        TypeError: pos_weight is no tensor.
        TypeError, ValueError: in training: no labels, or labels of another shape or value.
    """
    if pos_weight is not None and not isinstance(pos_weight, Tensor):
        expected = f"a tensor such as torch.tensor({shown(pos_weight)})"
        raise TypeError(f"pos_weight: got {shown(pos_weight)}, expected {expected}")

    def function(student: Outputs, _: Outputs, batch: Batch) -> Tensor:
        logits = student.logits
        return fastkd.binary_distillation_loss(
            logits, logits, label_of_each(name, batch, logits),
            alpha=1.0, pos_weight=pos_weight, ignore_index=IGNORED,
        )  # fmt: skip

    return Term(name, function, weight)


def binary_soft(
    weight: Weight = 1.0,
    *,
    temperature: float | Callable[[int], float] = 2.0,
    divergence: Any = "kl",
    name: str = "binary_soft",
) -> Term:
    """The teacher's part of `fastkd.binary_distillation_loss`: T^2 D(p, q) of each logit.

    Args:
        weight: factor, or step -> factor.
        temperature: T, or step -> T.
        divergence: "kl", "reverse_kl" or "js", or their entries of `fastkd.divergences`.
        name: of the term.
    """
    options = dict(temperature=temperature, divergence=divergence)
    try_options(fastkd.binary_distillation_loss, {**options, "alpha": 0.0}, 2, 1)

    def function(student: Outputs, teacher: Outputs, batch: Batch) -> Tensor:
        T = temperature(batch.step) if callable(temperature) else temperature
        return fastkd.binary_distillation_loss(
            student.logits, teacher_logits(name, teacher),
            alpha=0.0, temperature=T, divergence=divergence,
        )  # fmt: skip

    return Term(name, function, weight, mean="samples")
