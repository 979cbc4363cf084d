"""nn.Module twins of the losses; `repr` prints the active formula."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastkd import losses
from fastkd.divergence import Divergence, divergences
from fastkd.losses import Reduction

# the parameters' names are those of the functions, whose docstrings say what they mean


class _Loss(torch.nn.Module):
    def __init__(
        self,
        *,
        temperature: float = 1.0,
        ignore_index: int = -100,
        reduction: Reduction = "mean",
        vocab_size: int | None = None,
        inplace: bool = False,
    ) -> None:
        super().__init__()
        losses._check_temperature(temperature)
        if reduction not in losses.REDUCTIONS:
            raise ValueError(
                f"reduction: got {reduction!r}, expected one of {', '.join(losses.REDUCTIONS)}"
            )
        self.temperature = temperature
        self.ignore_index = ignore_index
        self.reduction: Reduction = reduction
        self.vocab_size = vocab_size
        self.inplace = inplace

    if TYPE_CHECKING:

        def __call__(
            self,
            student: Tensor,
            teacher: Tensor,
            labels: Tensor | None = None,
            *,
            weight: Tensor | None = None,
            normalizer: float | Tensor | None = None,
        ) -> Tensor: ...

    def _rows(
        self, labels: Tensor | None, weight: Tensor | None, normalizer: float | Tensor | None
    ) -> losses.RowOptions:
        return {
            "labels": labels,
            "ignore_index": self.ignore_index,
            "weight": weight,
            "reduction": self.reduction,
            "normalizer": normalizer,
            "vocab_size": self.vocab_size,
            "inplace": self.inplace,
        }

    def formula(self) -> str:
        raise NotImplementedError

    def extra_repr(self) -> str:
        options = f"T={self.temperature:g}, reduction={self.reduction!r}"
        if self.ignore_index != -100:
            options += f", ignore_index={self.ignore_index}"
        if self.vocab_size is not None:
            options += f", vocab_size={self.vocab_size}"
        if self.inplace:
            options += ", inplace=True"
        return f"{self.formula()}, {options}"


class _Divergence(_Loss):
    divergence: Divergence

    def forward(
        self,
        student: Tensor,
        teacher: Tensor,
        labels: Tensor | None = None,
        *,
        weight: Tensor | None = None,
        normalizer: float | Tensor | None = None,
    ) -> Tensor:
        return losses._loss(
            type(self).__name__,
            student,
            teacher,
            self.divergence,
            self.temperature,
            self._rows(labels, weight, normalizer),
        )


class KLDiv(_Divergence):
    """Module of `fastkd.kl_div`; forward(student, teacher, labels=None, *, weight, normalizer)."""

    divergence = divergences.kl

    def formula(self) -> str:
        return "KL(p || q)"


class ReverseKLDiv(_Divergence):
    """Module of `fastkd.reverse_kl_div`."""

    divergence = divergences.reverse_kl

    def formula(self) -> str:
        return "KL(q || p)"


class JSDiv(_Divergence):
    """Module of `fastkd.js_div`."""

    def __init__(
        self,
        *,
        beta: float = 0.5,
        temperature: float = 1.0,
        ignore_index: int = -100,
        reduction: Reduction = "mean",
        vocab_size: int | None = None,
        inplace: bool = False,
    ) -> None:
        super().__init__(
            temperature=temperature,
            ignore_index=ignore_index,
            reduction=reduction,
            vocab_size=vocab_size,
            inplace=inplace,
        )
        self.divergence = divergences.js(beta=beta)

    def formula(self) -> str:
        b = self.divergence.param
        return f"{b:g} KL(p || m) + {1 - b:g} KL(q || m), m = {b:g} p + {1 - b:g} q"


class _Skew(_Divergence):
    def __init__(
        self,
        *,
        alpha: float = 0.1,
        temperature: float = 1.0,
        ignore_index: int = -100,
        reduction: Reduction = "mean",
        vocab_size: int | None = None,
        inplace: bool = False,
    ) -> None:
        super().__init__(
            temperature=temperature,
            ignore_index=ignore_index,
            reduction=reduction,
            vocab_size=vocab_size,
            inplace=inplace,
        )
        self.divergence = type(self).divergence(alpha=alpha)


class SkewKLDiv(_Skew):
    """Module of `fastkd.skew_kl_div`."""

    divergence = divergences.skew_kl

    def formula(self) -> str:
        a = self.divergence.param
        return f"KL(p || {a:g} p + {1 - a:g} q)"


class SkewReverseKLDiv(_Skew):
    """Module of `fastkd.skew_reverse_kl_div`."""

    divergence = divergences.skew_reverse_kl

    def formula(self) -> str:
        a = self.divergence.param
        return f"KL(q || {1 - a:g} p + {a:g} q)"


class TVDistance(_Divergence):
    """Module of `fastkd.tv_distance`."""

    divergence = divergences.tv

    def formula(self) -> str:
        return "1/2 sum |p - q|"


class DistillationLoss(_Loss):
    """Module of `fastkd.distillation_loss`; alpha weighs the HARD labels."""

    def __init__(
        self,
        *,
        temperature: float = 2.0,
        alpha: float = 0.5,
        divergence: str | Divergence = "kl",
        label_smoothing: float = 0.0,
        t_squared: bool = True,
        ignore_index: int = -100,
        reduction: Reduction = "mean",
        vocab_size: int | None = None,
        inplace: bool = False,
    ) -> None:
        super().__init__(
            temperature=temperature,
            ignore_index=ignore_index,
            reduction=reduction,
            vocab_size=vocab_size,
            inplace=inplace,
        )
        losses._check_share("alpha", alpha)
        losses._check_share("label_smoothing", label_smoothing)
        self.alpha = alpha
        self.divergence = divergences[divergence] if isinstance(divergence, str) else divergence
        self.label_smoothing = label_smoothing
        self.t_squared = t_squared

    def forward(
        self,
        student: Tensor,
        teacher: Tensor,
        labels: Tensor | None = None,
        *,
        weight: Tensor | None = None,
        normalizer: float | Tensor | None = None,
    ) -> Tensor:
        rows = self._rows(labels, weight, normalizer)
        rows.pop("labels")
        return losses.distillation_loss(
            student,
            teacher,
            labels,
            temperature=self.temperature,
            alpha=self.alpha,
            divergence=self.divergence,
            label_smoothing=self.label_smoothing,
            t_squared=self.t_squared,
            **rows,
        )

    def formula(self) -> str:
        d = self.divergence
        name = f"{d.name}({d.parameter}={d.param:g})" if d.parameter else d.name
        square = " T^2" if self.t_squared else ""
        hard = f"{self.alpha:g} CE" + (
            f"(label_smoothing={self.label_smoothing:g})" if self.label_smoothing else ""
        )
        return f"{hard} + {1 - self.alpha:g}{square} {name}(p, q)"
