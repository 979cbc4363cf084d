"""A loss as a weighted sum of terms, exact over gradient accumulation."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastkd
from fastkd.messages import shown

from .batch import IGNORED, Batch, Outputs, tensors
from .processes import is_placed

Weight = float | Callable[[int], float]
MEANS = ("tokens", "samples", "step")


@dataclasses.dataclass(frozen=True)
class Term:
    """One term of a loss: weight * function(student outputs, teacher outputs, batch).

        loss of a step = sum over terms, weight * sum over micro-batches, share * function(...)

    Args:
        name: how logs and errors call it; unique within a loss.
        function: (Outputs of the student, Outputs of the teacher, Batch) -> 0-d tensor. Without a
            teacher the second one's `logits` is None.
        weight: factor, or step (of the run, from 0) -> factor.
        mean: what the function's mean runs over, hence a micro-batch's share of the step:
            "tokens" (labels that are not -100): share = tokens / tokens of the step; with no such
            label the function is not called and the term is 0, connected to the graph;
            "samples": share = samples / samples of the step;
            "step": the function has divided a sum by `batch.normalizer` itself: share = 1.
        student_taps, teacher_taps: names of modules whose outputs the function finds in
            `Outputs.features`.
        module: what the term learns (a projector, a discriminator, a scale); trained and
            checkpointed with the student, never in its state dict.
    """

    name: str
    function: Callable[[Outputs, Outputs, Batch], Tensor]
    weight: Weight = 1.0
    mean: str = "tokens"
    student_taps: tuple[str, ...] = ()
    teacher_taps: tuple[str, ...] = ()
    module: nn.Module | None = None

    def __post_init__(self) -> None:
        if not callable(self.function):
            raise TypeError(f"function: got {shown(self.function)}, expected a callable")
        if self.mean not in MEANS:
            raise ValueError(f"mean: got {shown(self.mean)}, expected one of {MEANS}")
        for taps in (self.student_taps, self.teacher_taps):
            if isinstance(taps, str):
                raise TypeError(f"taps: got the string {shown(taps)}, expected a tuple of names")


def hard(weight: Weight = 1.0, *, label_smoothing: float = 0.0, name: str = "hard") -> Term:
    """Cross-entropy with the labels, mean over the labelled rows of the step: CE(labels, s)."""

    def function(student: Outputs, _: Outputs, batch: Batch) -> Tensor:
        if batch.labels is None:
            raise ValueError(
                f"term {name!r}: got a batch without labels, expected (inputs, labels)"
            )
        if is_placed(student.logits):
            return fastkd.distillation_loss(
                student.logits,
                student.logits.detach(),
                batch.labels,
                alpha=1.0,
                ignore_index=IGNORED,
                label_smoothing=label_smoothing,
            )
        return F.cross_entropy(
            student.logits.flatten(0, -2),
            batch.labels.flatten(),
            ignore_index=IGNORED,
            label_smoothing=label_smoothing,
        )

    return Term(name, function, weight)


def soft(
    weight: Weight = 1.0,
    *,
    temperature: float | Callable[[int], float] = 4.0,
    divergence: Any = "kl",
    rows: str = "all",
    name: str = "soft",
) -> Term:
    """The teacher's part of `fastkd.distillation_loss`: T^2 D(p_T, q_T).

    Args:
        weight: factor, or step -> factor.
        temperature: T, or step -> T.
        divergence: as in `fastkd.distillation_loss`.
        rows: "all" (a transfer set whose labels may be missing), or "labelled": rows whose label
            is -100 are left out (padding of a language model).

    Paper: Hinton, Vinyals and Dean 2015, arXiv 1503.02531.
    """
    if rows not in ("all", "labelled"):
        raise ValueError(f"rows: got {shown(rows)}, expected 'all' or 'labelled'")

    def function(student: Outputs, teacher: Outputs, batch: Batch) -> Tensor:
        if teacher.logits is None:
            raise ValueError(f"term {name!r}: got no teacher, expected train(..., teacher=...)")
        T = temperature(batch.step) if callable(temperature) else temperature
        # at alpha=0 labels only say which rows are left out
        labels = batch.labels if rows == "labelled" else None
        return fastkd.distillation_loss(
            student.logits,
            teacher.logits,
            labels,
            temperature=T,
            alpha=0.0,
            divergence=divergence,
        )

    return Term(name, function, weight, mean="tokens" if rows == "labelled" else "samples")


Tap = str | tuple[str, ...]


def feature(
    student_tap: Tap,
    teacher_tap: Tap,
    function: Callable[..., Tensor],
    weight: Weight = 1.0,
    *,
    projector: nn.Module | None = None,
    mean: str = "samples",
    name: str | None = None,
) -> Term:
    """A feature or relation loss between two taps: function(projector(f_student), f_teacher).

    Args:
        student_tap, teacher_tap: names of modules, as in `named_modules()`; a tuple of names gives
            the function (and the projector) a tuple of features.
        function: (student features, teacher features) -> 0-d tensor; see `features`, `relations`
            and `attention`. One that is a module with parameters or buffers is learnt too.
        weight: factor, or step -> factor.
        projector: learnt with the student (see `fastkd.distill.projector`); None for none.
        mean: see `Term`.
        name: None makes "feature:STUDENT_TAP-TEACHER_TAP".
    """

    def call(student: Outputs, teacher: Outputs, _: Batch) -> Tensor:
        mine, theirs = _tapped(student, student_tap), _tapped(teacher, teacher_tap)
        return function(mine if projector is None else projector(mine), theirs)

    name = name or f"feature:{'+'.join(_names(student_tap))}-{'+'.join(_names(teacher_tap))}"
    return Term(
        name,
        call,
        weight,
        mean,
        _names(student_tap),
        _names(teacher_tap),
        _owned(projector, function),
    )


def _owned(projector: nn.Module | None, function: Callable[..., Tensor]) -> nn.Module | None:
    """What a term learns: its projector, its function, or both."""
    if not isinstance(function, nn.Module) or not function.state_dict():
        return projector
    return function if projector is None else nn.ModuleList([projector, function])


def _names(tap: Tap) -> tuple[str, ...]:
    return (tap,) if isinstance(tap, str) else tuple(tap)


def _tapped(outputs: Outputs, tap: Tap) -> Any:
    if isinstance(tap, str):
        return outputs.features[tap]
    return tuple(outputs.features[name] for name in tap)


class Objective:
    """The sum of terms; a plain callable (student logits, teacher logits, labels) is one term."""

    def __init__(self, loss: Callable[..., Tensor] | Term | Sequence[Term]) -> None:
        self.plain = None if isinstance(loss, Term) or not callable(loss) else loss
        if isinstance(loss, Term):
            self.terms: tuple[Term, ...] = (loss,)
        elif callable(loss):
            self.terms = ()
        else:
            self.terms = tuple(loss)
            wrong = [term for term in self.terms if not isinstance(term, Term)]
            if wrong or not self.terms:
                got = f"{type(wrong[0]).__name__} in it" if wrong else "no term"
                raise TypeError(f"loss: got {got}, expected a callable, a Term or several")
        self.names = [term.name for term in self.terms]
        if len(set(self.names)) < len(self.names):
            raise ValueError(f"loss: got terms named {self.names}, expected different names")
        self.modules = nn.ModuleDict()
        for at, term in enumerate(self.terms):  # by number: a name may hold dots
            if term.module is not None:
                self.modules[str(at)] = term.module
        self.student_taps = _union(term.student_taps for term in self.terms)
        self.teacher_taps = _union(term.teacher_taps for term in self.terms)

    def __call__(
        self, student: Outputs, teacher: Outputs, batch: Batch
    ) -> tuple[Tensor, list[Tensor]]:
        """This micro-batch's part of the step's loss, and of each term before its weight."""
        values: list[Tensor] = []
        if self.plain is not None:
            value = self.plain(student.logits, teacher.logits, batch.labels)
            total = _shared(value, 1.0 if batch.whole else _plain_share(batch), "")
        else:
            parts = []
            for term in self.terms:
                value = _value(term, student, teacher, batch)
                weight = term.weight(batch.step) if callable(term.weight) else term.weight
                values.append(value.detach())
                parts.append(value if weight == 1.0 else weight * value)
            total = functools.reduce(torch.add, parts)
        if not total.requires_grad:
            got = "a value that does not require grad"
            raise ValueError(f"loss: got {got}, expected a 0-d tensor that requires grad")
        return total, values


def _value(term: Term, student: Outputs, teacher: Outputs, batch: Batch) -> Tensor:
    if term.mean != "samples" and _is_zero(batch.tokens):
        return nothing(student)
    share: Any = 1.0
    if term.mean != "step" and not batch.whole:
        share = _sample_share(batch) if term.mean == "samples" else _token_share(batch)
    return _shared(term.function(student, teacher, batch), share, f" from term {term.name!r}")


def _shared(value: Any, share: Any, where: str) -> Tensor:
    if not isinstance(value, Tensor) or value.dim():
        got = f"{type(value).__name__} of shape {tuple(getattr(value, 'shape', ()))}{where}"
        raise ValueError(f"loss: got {got}, expected a 0-d tensor that requires grad")
    if isinstance(share, Tensor):  # counted on the device: a share of 0 must win over NaN
        return torch.where(share > 0, value * share, 0.0)
    return value if share == 1.0 else value * share


def _sample_share(batch: Batch) -> float:
    return batch.samples / batch.sample_total


def _token_share(batch: Batch) -> Any:
    return 0.0 if _is_zero(batch.tokens) else batch.tokens / batch.normalizer


def _plain_share(batch: Batch) -> Any:
    """Where labels and samples give a micro-batch different shares, nobody knows which it takes."""
    share, samples = _token_share(batch), _sample_share(batch)
    if share != samples:
        raise ValueError(
            f"loss: got a plain function and micro-batches of which one has {share:.4g} of the "
            f"step's labels and {samples:.4g} of its samples; expected Terms, whose `mean` says "
            "which of the two counts"
        )
    return share


def nothing(outputs: Outputs) -> Tensor:
    """0, connected to the graph of `outputs`: every gradient is exactly 0, whatever they hold."""
    found = [x for x in tensors((outputs.raw, dict(outputs.features))) if x.requires_grad]
    if not found:
        raise ValueError(
            "loss: got student outputs without gradient, expected some that require it"
        )
    return found[0].flatten()[:0].sum()


def _is_zero(count: Any) -> bool:
    return not isinstance(count, Tensor) and count == 0


def _union(groups: Any) -> tuple[str, ...]:
    return tuple(dict.fromkeys(name for group in groups for name in group))
