"""What a classifier's logits are: one label of several, several labels at once, or numbers.

transformers calls that `config.problem_type`, and finds it from the labels where the config says
nothing. Each has a loss of its own:

    single_label_classification   alpha CE(y, s) + (1 - alpha) T^2 D(p, q), p and q softmaxes
    multi_label_classification    alpha BCE(y, s) + (1 - alpha) T^2 D(p, q), sigmoids of each logit
    regression                    alpha l(s, y) + (1 - alpha) l(s, t), l a distance of numbers

summed over what counts: rows, logits, numbers. A label of -100 does not count.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

import fastkd
from fastkd import distill
from fastkd.arguments.messages import meant
from fastkd.distill.heads import _name
from fastkd.integrations.convention import unwrapped
from fastkd.integrations.families import IGNORED, Family, is_classifier


class Problem(NamedTuple):
    """A problem type.

    Args:
        name: as `config.problem_type` has it.
        loss: (student, teacher, labels, normalizer, options) -> the loss.
        options: names that the loss takes here.
        labels: what they are, for a message.
        each: whether there is a label for each logit.
    """

    name: str
    loss: Callable[[Any, Any, Tensor, Any, dict[str, Any]], Any]
    options: tuple[str, ...]
    labels: str
    each: bool = True


def _one(student: Any, teacher: Any, labels: Tensor, normalizer: Any, options: Any) -> Any:
    if labels.is_floating_point() and normalizer is not None:  # of rows, whose classes were counted
        normalizer = normalizer / student.size(-1)
    return fastkd.distillation_loss(student, teacher, labels, normalizer=normalizer, **options)


def _several(student: Any, teacher: Any, labels: Tensor, normalizer: Any, options: Any) -> Any:
    if isinstance(pos_weight := options.get("pos_weight"), Tensor):
        options = {**options, "pos_weight": pos_weight.to(student.device)}
    return fastkd.binary_distillation_loss(
        student, teacher, labels, ignore_index=IGNORED, normalizer=normalizer, **options
    )


def _numbers(student: Any, teacher: Any, labels: Tensor, normalizer: Any, options: Any) -> Any:
    sides = (x.reshape(-1, 1) if isinstance(x, Tensor) else x for x in (student, teacher, labels))
    mask = labels.reshape(-1) != IGNORED
    return distill.regression_loss(*sides, mask=mask, normalizer=normalizer, **options)


def _named(function: Callable[..., Any], *more: str) -> tuple[str, ...]:
    kinds = inspect.signature(function).parameters.values()
    own = {x.name for x in kinds if x.kind is inspect.Parameter.KEYWORD_ONLY} - {"class_weight"}
    return (*sorted(own), *more)


ONE = Problem(
    "single_label_classification",
    _one,
    _named(fastkd.distillation_loss, "vocab_size", "return_outputs"),
    "integers [B]",
    each=False,
)
SEVERAL = Problem(
    "multi_label_classification",
    _several,
    _named(fastkd.binary_distillation_loss),
    "floats from 0 to 1 or integers 0 and 1, [B, C]",
)
NUMBERS = Problem(
    "regression",
    _numbers,
    _named(distill.regression_loss),
    "floats [B, C]; for a yes or no set config.problem_type='multi_label_classification'",
)
PROBLEMS = {problem.name: problem for problem in (ONE, SEVERAL, NUMBERS)}


def problems_of(model: Any, family: Family) -> list[Problem]:
    """What a student's logits may be: one, or, where its labels will say so, two."""
    if not is_classifier(family):
        return [ONE]
    config = unwrapped(model).config
    name, count = config.problem_type, config.num_labels
    if name is None and count != 1:
        return [ONE, SEVERAL]
    problem = PROBLEMS.get(name or "regression")
    if problem is None or (problem is ONE and count == 1):
        expected = "for a yes or no 'multi_label_classification', for a number 'regression'"
        if problem is None:
            expected = f"one of {', '.join(PROBLEMS)}"
        raise ValueError(
            f"student: got {_name(model)} with problem_type {name!r} and num_labels {count}, "
            f"expected {expected}"
        )
    return [problem]


def problem_by_labels(model: Any, labels: Tensor) -> Problem:
    """The problem of a student whose config says nothing; it does then, as after its own loss."""
    problem = SEVERAL if labels.is_floating_point() else ONE
    unwrapped(model).config.problem_type = problem.name
    return problem


def check_teacher(problem: Problem, teacher: Any) -> None:
    """Raise where the config of a teacher says that its logits are something else."""
    config = getattr(unwrapped(teacher), "config", None)
    other = getattr(config, "problem_type", None)
    if other not in (None, problem.name):
        raise ValueError(
            f"teacher: got {_name(teacher)} with problem_type {other!r}, expected the student's "
            f"{problem.name!r}"
        )


def fitting(
    problems: Collection[Problem],
    options: Mapping[str, Any],
    columns: Any,
    family: Family | None = None,
) -> Problem:
    """The first problem that has all these options; TypeError, ValueError where none takes them.

    Args:
        problems: what the student's logits may be.
        options: of the loss.
        columns: of the student's logits, where they are known.
        family: the student's; None while there is no student.
    """
    problem = next((x for x in problems if options.keys() <= {*x.options}), next(iter(problems)))
    whose, hint = "", ""
    if family is not None:
        whose = f" of {family.name}"
    if family is not None and is_classifier(family):
        whose += f" with problem_type {problem.name!r}"
    if problem is NUMBERS and columns in (None, 1):
        hint = "; of one yes or no it is 'multi_label_classification' in both configs"
    for name in options.keys() - {*problem.options}:
        others = {x for other in problems for x in other.options} - {name}
        if name in inspect.signature(fastkd.distillation_loss).parameters:
            hint = hint or "; fastkd.distillation_loss takes it, in a loop of your own"
        raise TypeError(
            f"{name}: got it in the loss{whose}, whose options are {', '.join(problem.options)}"
            f"{hint or meant(name, others)}"
        )
    sides = torch.zeros(1, columns or 2), torch.ones(1, columns or 2)
    labels = sides[0] if problem.each else torch.zeros(1, dtype=torch.long)
    known = {k: v for k, v in options.items() if k != "vocab_size"}
    if problem is not SEVERAL or columns or "pos_weight" not in known:
        problem.loss(*sides, labels, None, known)
    return problem


def labels_of_each(problem: Problem, labels: Tensor, student: Tensor) -> Tensor:
    """Labels in the shape of the logits [B, C]; of one logit they may be [B]."""
    if student.size(-1) == 1 and labels.shape == student.shape[:-1]:
        labels = labels.unsqueeze(-1)
    right = labels.is_floating_point() or problem is not NUMBERS
    if labels.shape != student.shape or not right:
        raise ValueError(
            f"labels: got {str(labels.dtype)[6:]} {list(labels.shape)} for logits "
            f"{list(student.shape)} of a {problem.name}, expected {problem.labels}"
        )
    return labels
