"""nn.Module twins of the losses; `repr` prints the active formula."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypedDict

from torch import Tensor
from typing_extensions import Unpack

from fastkd import losses
from fastkd.binary_modules import BinaryDistillationLoss as BinaryDistillationLoss
from fastkd.binary_modules import BinaryDivergence as BinaryDivergence
from fastkd.binary_modules import LossModule, named
from fastkd.divergence import Divergence, divergences
from fastkd.engine import class_axis, dispatch, validate
from fastkd.losses import MixedOptions, Reduction
from fastkd.mapped import AnyTeacher as Teacher
from fastkd.operands import Operand

# the parameters' names are those of the functions, whose docstrings say what they mean


class Options(TypedDict, total=False):
    """The options of every module; those that are tensors are arguments of forward."""

    temperature: float
    ignore_index: int | Sequence[int]
    reduction: Reduction
    vocab_size: int | None
    class_dim: int
    inplace: bool
    return_outputs: bool


class _Loss(LossModule):
    def __init__(
        self,
        temperature: float = 1.0,
        ignore_index: int | Sequence[int] = -100,
        reduction: Reduction = "mean",
        vocab_size: int | None = None,
        class_dim: int = -1,
        inplace: bool = False,
        return_outputs: bool = False,
    ) -> None:
        validate.reduction(reduction)
        super().__init__(temperature, ignore_index, reduction)
        self.class_dim = class_axis.dimension(class_dim)
        self.vocab_size = None if vocab_size is None else validate.columns(vocab_size, least=1)
        self.inplace, self.return_outputs = inplace, return_outputs

    def _rows(self, weight: Tensor | None, normalizer: float | Tensor | None) -> MixedOptions:
        elements: MixedOptions = self._elements(weight, normalizer)
        return {
            **elements,
            "vocab_size": self.vocab_size,
            "class_dim": self.class_dim,
            "inplace": self.inplace,
            "return_outputs": self.return_outputs,
        }

    def extra_repr(self) -> str:
        options = super().extra_repr()
        if self.vocab_size is not None:
            options += f", vocab_size={self.vocab_size}"
        if self.class_dim != -1:
            options += f", class_dim={self.class_dim}"
        if self.inplace:
            options += ", inplace=True"
        return options + (", return_outputs=True" if self.return_outputs else "")


class _Divergence(_Loss):
    divergence: Divergence

    def __init__(self, **options: Unpack[Options]) -> None:
        for option in options:
            if option not in Options.__annotations__:
                name = self.divergence.parameter  # taken by the class's own constructor
                known = [*([name] if name else []), *Options.__annotations__]
                validate.refuse_option(type(self).__name__, option, known)
        super().__init__(**options)

    def forward(
        self,
        student: Operand,
        teacher: Teacher,
        labels: Tensor | None = None,
        *,
        weight: Tensor | None = None,
        normalizer: float | Tensor | None = None,
    ) -> Tensor:
        """The loss; arguments as in the function of the same name."""
        return dispatch.loss(
            type(self).__name__,
            student,
            teacher,
            self.divergence,
            self.temperature,
            labels=labels,
            **self._rows(weight, normalizer),
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


def _parameter(name: str) -> property:
    """The divergence's parameter under its own name, which a schedule may set."""

    def get(module: _Divergence) -> float:
        return module.divergence.param

    def put(module: _Divergence, value: float) -> None:
        module.divergence = module.divergence(**{name: value})

    return property(get, put)


class JSDiv(_Divergence):
    """Module of `fastkd.js_div`."""

    divergence = divergences.js
    beta = _parameter("beta")

    def __init__(self, *, beta: float = 0.5, **options: Unpack[Options]) -> None:
        super().__init__(**options)
        self.beta = beta

    def formula(self) -> str:
        b = self.divergence.param
        return f"{b:g} KL(p || m) + {1 - b:g} KL(q || m), m = {b:g} p + {1 - b:g} q"


class SkewKLDiv(_Divergence):
    """Module of `fastkd.skew_kl_div`."""

    divergence = divergences.skew_kl
    alpha = _parameter("alpha")

    def __init__(self, *, alpha: float = 0.1, **options: Unpack[Options]) -> None:
        super().__init__(**options)
        self.alpha = alpha

    def formula(self) -> str:
        a = self.divergence.param
        return f"KL(p || {a:g} p + {1 - a:g} q)"


class SkewReverseKLDiv(_Divergence):
    """Module of `fastkd.skew_reverse_kl_div`."""

    divergence = divergences.skew_reverse_kl
    alpha = _parameter("alpha")

    def __init__(self, *, alpha: float = 0.1, **options: Unpack[Options]) -> None:
        super().__init__(**options)
        self.alpha = alpha

    def formula(self) -> str:
        a = self.divergence.param
        return f"KL(q || {1 - a:g} p + {a:g} q)"


class TVDistance(_Divergence):
    """Module of `fastkd.tv_distance`."""

    divergence = divergences.tv

    def formula(self) -> str:
        return "1/2 sum |p - q|"


class AcceptanceLoss(_Divergence):
    """Module of `fastkd.acceptance_loss`."""

    divergence = divergences.acceptance

    def formula(self) -> str:
        return "-log sum min(p, q)"


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
        z_loss: float = 0.0,
        class_weight: Tensor | None = None,
        ignore_index: int | Sequence[int] = -100,
        reduction: Reduction = "mean",
        vocab_size: int | None = None,
        class_dim: int = -1,
        inplace: bool = False,
        return_outputs: bool = False,
    ) -> None:
        rows = reduction, vocab_size, class_dim, inplace, return_outputs
        super().__init__(temperature, ignore_index, *rows)
        self.alpha = validate.share("alpha", alpha)
        self.divergence = divergences.entry(divergence)
        self.label_smoothing = validate.share("label_smoothing", label_smoothing)
        self.t_squared = t_squared
        self.z_loss = validate.z_loss(z_loss)
        self.class_weight: Tensor | None
        self.register_buffer("class_weight", class_weight, persistent=False)

    def forward(
        self,
        student: Operand,
        teacher: Teacher,
        labels: Tensor | None = None,
        *,
        weight: Tensor | None = None,
        normalizer: float | Tensor | None = None,
    ) -> Tensor:
        """The loss; arguments as in `fastkd.distillation_loss`."""
        return losses.distillation_loss(
            student,
            teacher,
            labels,
            temperature=self.temperature,
            alpha=self.alpha,
            divergence=self.divergence,
            label_smoothing=self.label_smoothing,
            t_squared=self.t_squared,
            z_loss=self.z_loss,
            class_weight=self.class_weight,
            **self._rows(weight, normalizer),
        )

    def formula(self) -> str:
        square = " T^2" if self.t_squared else ""
        of = f"label_smoothing={self.label_smoothing:g}" if self.label_smoothing else ""
        if self.class_weight is not None:
            of += f"{', ' if of else ''}class_weight={list(self.class_weight.shape)}"
        hard = f"{self.alpha:g} CE" + (f"({of})" if of else "")
        z = f" + {self.z_loss:g} lse^2" if self.z_loss else ""
        return f"{hard} + {1 - self.alpha:g}{square} {named(self.divergence)}(p, q){z}"
