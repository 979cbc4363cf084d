"""The loss of a run: the weighted sum of its terms, exact over gradient accumulation."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .batch import Batch, Outputs, tensors
from .targets import NoLabels
from .terms import Term


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
        self.metrics = [f"{term.name}/{metric}" for term in self.terms for metric in term.metrics]
        if len(set(self.names)) < len(self.names):
            raise ValueError(f"loss: got terms named {self.names}, expected different names")
        self.modules = nn.ModuleDict()
        for at, term in enumerate(self.terms):  # by number: a name may hold dots
            if term.module is not None:
                self.modules[str(at)] = term.module
        self.student_layers = _union(term.student_layers for term in self.terms)
        self.teacher_layers = _union(term.teacher_layers for term in self.terms)
        self.connects = False  # all outputs to the loss, as DistributedDataParallel wants them
        self._loose: list[int] | None = None  # those that no term leads back to
        self._ungraded: set[str] = set()
        self.unlabelled: set[str] = set()  # terms of weight 0 that went without their labels

    def __call__(
        self, student: Outputs, teacher: Outputs, batch: Batch
    ) -> tuple[Tensor, list[Tensor]]:
        """This micro-batch's part of the step's loss, of terms before their weight, of metrics."""
        values: list[Tensor] = []
        metrics: list[Tensor] = []
        if self.plain is not None:
            value = self.plain(student.logits, teacher.logits, batch.labels)
            total = _shared(value, 1.0 if batch.is_whole_step else _plain_share(batch), "")
        else:
            parts = []
            for term in self.terms:
                weight = term.weight(batch.step) if callable(term.weight) else term.weight
                try:
                    value, told = _value(term, student, teacher, batch)
                except NoLabels:
                    if weight != 0:
                        raise
                    self.unlabelled.add(term.name)
                    value, told = _left_out(term, student)
                metrics += told
                if not value.requires_grad and weight and term.name not in self._ungraded:
                    self._ungraded.add(term.name)
                    warnings.warn(
                        f"loss: got a value of term {term.name!r} that does not require grad: "
                        "nothing is learnt from it (a frozen student part, detach() or no_grad?)",
                        stacklevel=4,
                    )
                values.append(value.detach())
                parts.append(value if weight == 1.0 else weight * value)
            total = functools.reduce(torch.add, parts)
        if not total.requires_grad:
            got = "a value that does not require grad"
            raise ValueError(f"loss: got {got}, expected a 0-d tensor that requires grad")
        values += metrics
        return (self._connected(total, student, batch) if self.connects else total), values

    def _connected(self, total: Tensor, student: Outputs, batch: Batch) -> Tensor:
        """`total` + 0 * the outputs that it does not depend on; they are found once."""
        found = [x for x in tensors(student.raw) if x.requires_grad]
        loose = self._loose
        if loose is None:
            reached = _reached(total)
            loose = [at for at, x in enumerate(found) if x.grad_fn not in reached]
            if not _is_zero(batch.tokens):  # else terms were left out
                self._loose = loose
        for at in loose:
            total = total + found[at].flatten()[:0].sum()
        return total


def _value(
    term: Term, student: Outputs, teacher: Outputs, batch: Batch
) -> tuple[Tensor, list[Tensor]]:
    """A term's part of the step, and that of each of its metrics."""
    if term.mean != "samples" and _is_zero(batch.tokens):
        return _left_out(term, student)
    share: Any = 1.0
    if term.mean != "step" and not batch.is_whole_step:
        share = _sample_share(batch) if term.mean == "samples" else _token_share(batch)
    try:
        value = term.function(student, teacher, batch)
    except Exception as error:
        _name(error, f"term {term.name!r}: ")
        raise
    where = f" from term {term.name!r}"
    if not term.metrics:
        return _shared(value, share, where), []
    if not isinstance(value, tuple) or set(value[1]) != set(term.metrics):
        got = sorted(value[1]) if isinstance(value, tuple) else type(value).__name__
        raise ValueError(
            f"term {term.name!r}: got {got} from its function, expected (loss, a dict of its "
            f"metrics {list(term.metrics)})"
        )
    value, found = value
    told = [_shared(found[name], share, where).detach() for name in term.metrics]
    return _shared(value, share, where), told


def _left_out(term: Term, student: Outputs) -> tuple[Tensor, list[Tensor]]:
    value = nothing(student)
    return value, [torch.zeros_like(value.detach()) for _ in term.metrics]


def _name(error: Exception, prefix: str) -> None:
    """Say in an error's own message which term it comes from."""
    first = error.args[0] if error.args else ""
    if isinstance(first, str) and "term '" not in first[:8]:
        error.args = (prefix + first, *error.args[1:])


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


def _reached(value: Tensor) -> set[Any]:
    """Every node of autograd's graph below it."""
    found, waiting = set(), [value.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is not None and node not in found:
            found.add(node)
            waiting.extend(below for below, _ in node.next_functions)
    return found


def _is_zero(count: Any) -> bool:
    return not isinstance(count, Tensor) and count == 0


def _union(groups: Any) -> tuple[str, ...]:
    return tuple(dict.fromkeys(name for group in groups for name in group))
