"""Models with several heads, and a new task learnt without the old one's data."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from fastkd.arguments.messages import shown

from ..batch import Batch, Outputs, forward
from ..logging import Step
from ..terms import Term, Weight, hard, soft
from ..trainer import train

Choice = str | int | Callable[[Any], Tensor]


class Head(nn.Module):
    """A model as one of its heads: inputs -> logits [..., V], to evaluate or to teach.

    Args:
        model: module that returns a dict, a tuple or an object of heads; shared, not copied.
        head: name or number among them, or a function of all that the model returns -> logits.
    """

    def __init__(self, model: nn.Module, head: Choice) -> None:
        super().__init__()
        self.model, self.head = model, head

    def forward(self, *inputs: Any, **named: Any) -> Tensor:
        return chosen(forward(self.model, named) if named else self.model(*inputs), self.head)


def with_head(term: Term, head: Choice) -> Term:
    """The same term, of one head: it finds that head's logits where it looks for logits.

    Args:
        term: any, such as `hard()` or `soft()`.
        head: of student and teacher alike, see `Head`.
    """

    def function(student: Outputs, teacher: Outputs, batch: Batch) -> Tensor:
        student_head, teacher_head = (
            Outputs(None if x.raw is None else chosen(x.raw, head), x.features, x.members, x.role)
            for x in (student, teacher)
        )
        return term.function(student_head, teacher_head, batch)

    return dataclasses.replace(term, function=function)


def lwf(
    model: nn.Module,
    loader: Iterable[Any],
    *,
    new: Choice,
    old: Choice | Sequence[Choice],
    weight: Weight = 1.0,
    temperature: float = 2.0,
    terms: Sequence[Term] = (),
    **options: Any,
) -> list[Step]:
    """Learn a new task in place while the model as it was teaches its old heads, on the new inputs.

        CE(labels, new head) + weight * sum over old heads, T^2 KL(before_T, now_T)

    The paper first trains the new head alone: call `train(model, loader, with_head(hard(), new))`
    within `freeze(model, [all other parts])` for it. The factor T^2 of `soft` is not in the paper:
    divide `weight` by it for the paper's. Where one head must tell old classes from new ones
    (class-incremental), this is not enough without samples of the old: the old outputs keep their
    order, and the new classes outbid them.

    Args:
        model: module with a head for each task, the new one's among them. A single head that has
            grown serves with functions: `new=lambda x: x, old=lambda x: x[..., :5]`.
        loader: of the new task, (inputs, labels int [...]); labels number the new head's classes.
        new: the head that the labels belong to, see `Head`.
        old: the head to keep, or several.
        weight: of each old head, or step -> weight.
        temperature: T, above 0.
        terms: further terms of the loss.
        options: as of `train`, but for `loss` and `teacher`.

    Returns:
        Every step, whose terms are "new" and "old", or "old:0" and so on.

    Raises:
        TypeError, ValueError: a head that the model does not return, no old head, or what `train`
            raises.

    Paper: Li and Hoiem 2016, arXiv 1606.09282.
    """
    if taken := [name for name in ("loss", "teacher") if name in options]:
        raise TypeError(f"options: got {taken}, which are made here; expected others of train()")
    kept = list(old) if isinstance(old, Sequence) and not isinstance(old, str) else [old]
    if not kept:
        raise ValueError("old: got no head, expected one or more")
    names = ["old"] if len(kept) == 1 else [f"old:{at}" for at in range(len(kept))]
    loss = [
        with_head(hard(name="new"), new),
        *(
            with_head(soft(weight, temperature=temperature, name=name), head)
            for name, head in zip(names, kept, strict=True)
        ),
        *terms,
    ]
    before = copy.deepcopy(model).requires_grad_(False)
    return train(model, loader, loss, teacher=before, **options)


def chosen(raw: Any, head: Choice) -> Tensor:
    """The logits of `head` in what a model returned."""
    if callable(head):
        return head(raw)
    if isinstance(raw, Mapping):
        known: Any = list(raw)
        found = raw.get(head)
    elif isinstance(head, str):
        known = [name for name, value in getattr(raw, "__dict__", {}).items() if value is not None]
        known += getattr(raw, "_fields", ())
        found = None if isinstance(raw, Tensor) else getattr(raw, head, None)
    else:
        several = isinstance(raw, Sequence)
        known = list(range(len(raw))) if several else []
        found = raw[head] if several and -len(raw) <= head < len(raw) else None
    if not isinstance(found, Tensor):
        got = f"{shown(head)} of a model that returns a {type(raw).__name__}"
        raise ValueError(f"head: got {got}, expected one of {known} or a function")
    return found
