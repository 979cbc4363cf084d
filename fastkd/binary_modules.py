"""nn.Module twins of the losses of one logit each; `fastkd.nn` has them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from fastkd import bernoulli, binary
from fastkd.divergence import Divergence
from fastkd.engine import class_axis, elementwise, validate


def named(d: Divergence) -> str:
    """A divergence with its parameter, for a formula."""
    return f"{d.name}({d.parameter}={d.param:g})" if d.parameter else d.name


class LossModule(torch.nn.Module):
    """What all losses have: temperature, ignore_index, reduction, a formula in their `repr`."""

    where = ""  # what the formula's names are, where that is not in it

    def __init__(
        self, temperature: float, ignore_index: int | Sequence[int], reduction: Any
    ) -> None:
        super().__init__()
        self.temperature = validate.temperature(temperature)
        many = class_axis.several(ignore_index)
        self.ignore_index = many[0] if len(many) == 1 else many
        self.reduction = reduction

    def formula(self) -> str:
        """The formula with the parameters in force."""
        raise NotImplementedError

    def extra_repr(self) -> str:
        says = f"{self.formula()}{self.where}, T={self.temperature:g}, reduction={self.reduction!r}"
        return says if self.ignore_index == -100 else f"{says}, ignore_index={self.ignore_index}"

    def _elements(self, weight: Tensor | None, normalizer: Any) -> Any:
        return {
            "ignore_index": self.ignore_index,
            "weight": weight,
            "reduction": self.reduction,
            "normalizer": normalizer,
        }


class _Binary(LossModule):
    """A loss of one logit each; see `fastkd.binary`."""

    where = ", p = sigmoid(teacher / T)"

    def __init__(
        self, temperature: float, ignore_index: int | Sequence[int], reduction: Any
    ) -> None:
        super().__init__(temperature, ignore_index, elementwise.reduction_of(reduction))


class BinaryDivergence(_Binary):
    """Module of `fastkd.binary_kl_div`, `binary_reverse_kl_div` and `binary_js_div`, by name.

    divergence: "kl", "reverse_kl", "js", or an entry such as `fastkd.divergences.js(beta=0.1)`.
    """

    def __init__(
        self,
        divergence: str | Divergence = "kl",
        *,
        temperature: float = 1.0,
        ignore_index: int | Sequence[int] = -100,
        reduction: Literal["mean", "sum", "none"] = "mean",
    ) -> None:
        super().__init__(temperature, ignore_index, reduction)
        self.divergence = bernoulli.entry(divergence)

    def forward(
        self,
        student: Tensor,
        teacher: Tensor,
        labels: Tensor | None = None,
        *,
        weight: Tensor | None = None,
        normalizer: float | Tensor | None = None,
    ) -> Tensor:
        """The loss; arguments as in `fastkd.binary_kl_div`."""
        elements = self._elements(weight, normalizer)
        return binary.divergence(
            student, teacher, self.divergence, self.temperature, labels=labels, **elements
        )

    def formula(self) -> str:
        return f"{named(self.divergence)}(p, q)"


class BinaryDistillationLoss(_Binary):
    """Module of `fastkd.binary_distillation_loss`; alpha weighs the HARD labels."""

    def __init__(
        self,
        *,
        temperature: float = 2.0,
        alpha: float = 0.5,
        divergence: str | Divergence = "kl",
        t_squared: bool = True,
        pos_weight: Tensor | None = None,
        ignore_index: int | Sequence[int] = -100,
        reduction: Literal["mean", "sum", "none"] = "mean",
    ) -> None:
        super().__init__(temperature, ignore_index, reduction)
        self.alpha = validate.share("alpha", alpha)
        self.divergence = bernoulli.entry(divergence)
        self.t_squared = t_squared
        self.pos_weight: Tensor | None
        self.register_buffer("pos_weight", pos_weight, persistent=False)

    def forward(
        self,
        student: Tensor,
        teacher: Tensor,
        labels: Tensor | None = None,
        *,
        weight: Tensor | None = None,
        normalizer: float | Tensor | None = None,
    ) -> Tensor:
        """The loss; arguments as in `fastkd.binary_distillation_loss`."""
        return binary.binary_distillation_loss(
            student,
            teacher,
            labels,
            temperature=self.temperature,
            alpha=self.alpha,
            divergence=self.divergence,
            t_squared=self.t_squared,
            pos_weight=self.pos_weight,
            **self._elements(weight, normalizer),
        )

    def formula(self) -> str:
        pos = self.pos_weight
        of = "" if pos is None else f"(pos_weight={list(pos.shape)})"
        square = " T^2" if self.t_squared else ""
        return f"{self.alpha:g} BCE{of} + {1 - self.alpha:g}{square} {named(self.divergence)}(p, q)"
