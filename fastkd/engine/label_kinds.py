"""The hard term of labels that no kernel knows: class probabilities, and classes with weights.

A kernel has one factor for the hard term of all rows and one label of a row. Here the two terms are
two losses of their own, each fused, and their sum is taken:

    soft loss + alpha * hard loss,   each term with a denominator of its own

With a target y' [V] of a row, the classes' weights and the smoothing in it, and W its sum:

    - sum_v y'_v log q_v = W (KL(y' / W || q) + H(y' / W))

which is the forward KL at T = 1 of a teacher whose logits are log y', and its entropy.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastkd.arguments.messages import describe, sizes
from fastkd.divergence import divergences
from fastkd.engine import class_axis, dispatch, reduction, validate

# what a row of probabilities may miss of 1: rows in bfloat16, each rounded by up to 2^-9 of itself
LEAST_SUM, MOST_SUM = 0.98, 1.02

of_rows: Any = dispatch.loss  # a pair where outputs are requested
# of the options that all losses share
DEFAULTS = {name: value for name, value in of_rows.__kwdefaults__.items() if name != "labels"}


def special(labels: Any, class_weight: Any) -> bool:
    """Whether the hard term is one of this file."""
    return class_weight is not None or (isinstance(labels, Tensor) and labels.is_floating_point())


def loss(
    sides: tuple[Any, ...],
    class_weight: Tensor | None,
    labels: Any,
    options: dict[str, Any],
) -> Any:
    """The two terms of `sides`, a loss's positional arguments, added.

    Args:
        sides: the arguments of `dispatch.loss` before the options.
        class_weight: [V] floats, or None.
        labels: as `distillation_loss` takes them.
        options: of the rows, but labels.
    """
    options = {**DEFAULTS, **options}
    name, student, teacher, divergence, temperature, param, soft, hard, smoothing, z_loss = sides
    student, teacher, labels = _classes_last(student, teacher, labels, options)
    probabilities = isinstance(labels, Tensor) and labels.is_floating_point()
    if probabilities and labels.dim() != student.dim():
        validate.rows(student, labels, None)  # says what integer labels would be
    labels, options["ignore_index"] = class_axis.one_ignored(labels, options["ignore_index"])
    if options.get("group") is not None or hasattr(student, "placements"):
        raise NotImplementedError(
            f"{'labels' if probabilities else 'class_weight'}: got {describe(labels)} with a group "
            "or DTensors; class weights and probabilities as labels are not supported over ranks"
        )
    vocab = validate.operands(student, teacher, options.get("vocab_size"))
    if class_weight is not None:
        _check_weight(class_weight, vocab, student)
    rows = None if probabilities else labels
    if probabilities:
        labels = _check_probabilities(labels, vocab, student)
    spec = divergence, temperature, param, soft, 0.0, 0.0, z_loss
    if hard:
        options["inplace"] = False  # the second term reads the logits, too
    value = of_rows(name, student, teacher, *spec, labels=rows, **options)
    if hard == 0.0:
        return value
    value, told = value if options["return_outputs"] else (value, None)
    parts = _Hard(name, student, teacher, class_weight, labels, smoothing, vocab)
    of_hard, of_rows_told = (_of_target if probabilities or smoothing else _of_classes)(
        parts, options
    )
    value = value + hard * of_hard
    if told is None:
        return value
    return value, told._replace(hard=of_rows_told[0], label_logprob=of_rows_told[1])


class _Hard(NamedTuple):
    """What the hard term is made of."""

    name: str
    student: Any
    teacher: Any
    class_weight: Tensor | None
    labels: Tensor
    smoothing: float
    vocab: int


def _classes_last(student: Any, teacher: Any, labels: Any, options: dict[str, Any]) -> Any:
    """The operands with their classes last, probabilities among them."""
    at, group = options.pop("class_dim"), options.get("group")
    of_classes = isinstance(labels, Tensor) and labels.is_floating_point()
    if of_classes and isinstance(student, Tensor) and labels.dim() == student.dim():
        labels = class_axis.classes_last(labels, labels, at)[0]
    return *class_axis.classes_last(student, teacher, at, group), labels


def _check_weight(class_weight: Any, vocab: int, student: Any) -> None:
    expected = f"floats [{vocab}], one for each class"
    if not isinstance(class_weight, Tensor) or not class_weight.is_floating_point():
        raise TypeError(f"class_weight: got {describe(class_weight)}, expected {expected}")
    if list(class_weight.shape) != [vocab]:
        raise ValueError(
            f"class_weight: got shape {sizes(class_weight.shape)}, expected {expected}"
        )
    if class_weight.device != student.device:
        raise ValueError(
            f"class_weight: got a tensor on {class_weight.device}, expected the student's "
            f"{student.device}"
        )
    _no_gradient("class_weight", class_weight)
    reduction.check_class_weights("class_weight", class_weight)


def _check_probabilities(labels: Tensor, vocab: int, student: Any) -> Tensor:
    """The columns in use; where reading costs nothing, what are no probabilities is refused."""
    lead = list(student.shape[:-1])
    if list(labels.shape[:-1]) != lead or labels.size(-1) not in (vocab, student.size(-1)):
        raise ValueError(
            f"labels: got shape {sizes(labels.shape)}, expected probabilities {[*lead, vocab]} or "
            f"integers {lead}"
        )
    if labels.device != student.device:
        raise ValueError(f"labels: got a tensor on {labels.device}, expected {student.device}")
    _no_gradient("labels", labels)
    labels = labels[..., :vocab]
    if labels.numel() and reduction.reads_values(labels):
        total = labels.sum(-1, dtype=torch.promote_types(labels.dtype, torch.float32))
        fits = (labels >= 0).all(-1) & (total > LEAST_SUM) & (total < MOST_SUM)
        if not bool((fits | total.isnan()).all()):
            row = int((~fits).reshape(-1).int().argmax())
            raise ValueError(
                f"labels: got probabilities that sum to {float(total.reshape(-1)[row]):.4g} in row "
                f"{row} (or one below 0), expected a sum of 1; for several labels of a sample see "
                "fastkd.binary_distillation_loss"
            )
    return labels


def _no_gradient(name: str, x: Tensor) -> None:
    if x.requires_grad and torch.is_grad_enabled():
        raise ValueError(f"{name}: got a tensor that requires grad, expected {name}.detach()")


def _of_classes(hard: _Hard, options: dict[str, Any]) -> tuple[Tensor, Any]:
    """Mean of w_y CE(y, q) over the sum of the w_y, as a loss of weighted rows."""
    by = _label_weight(hard, options)
    weight = by if options["weight"] is None else by * options["weight"]
    spec = divergences.kl, 1.0, None, 0.0, 1.0, 0.0, 0.0
    options = options | {"weight": weight, "labels": hard.labels}
    found = of_rows(hard.name, hard.student, hard.teacher, *spec, **options)
    if not options["return_outputs"]:
        return found, None
    return found[0], (found[1].hard * by, found[1].label_logprob)


def _of_target(hard: _Hard, options: dict[str, Any]) -> tuple[Tensor, Any]:
    """As `F.cross_entropy` with probabilities, by the identity of this file."""
    student, labels, vocab = hard.student, hard.labels, hard.vocab
    acc = torch.float64 if student.dtype == torch.float64 else torch.float32
    by, keep = torch.ones(student.shape[:-1], dtype=acc, device=student.device), None
    if labels.is_floating_point():
        target = labels.to(acc)
    else:
        by, keep = _label_weight(hard, options), _kept(labels, options)
        target = F.one_hot(_readable(labels, keep, vocab), vocab).to(acc)
    if hard.smoothing:
        target = target * (1.0 - hard.smoothing) + hard.smoothing / vocab
    if hard.class_weight is not None:
        target = target * hard.class_weight.to(acc)
    mass, given = target.sum(-1), options["weight"]
    weight = mass if given is None else mass * given
    if options["reduction"] == "mean" and options["normalizer"] is None:
        by = by if given is None else by * given
        options = options | {"normalizer": _of_kept(by, keep).sum()}
    # a row without any class has weight 0, and is not to be read: 0 times an infinite loss
    counts = mass != 0 if keep is None else keep & (mass != 0)
    rows = options | {"weight": weight, "return_outputs": True, "ignore_index": -1}
    rows["labels"] = torch.where(counts, 0, -1)
    teacher = target.log()
    spec = divergences.kl, 1.0, None, 1.0, 0.0, 0.0, 0.0
    value, told = of_rows(hard.name, student, teacher, *spec, **rows)
    value = value + _reduced(_of_kept(weight, keep) * told.teacher_entropy, options)
    return value, (mass.detach() * (told.soft + told.teacher_entropy), None)


def _reduced(rows: Tensor, options: dict[str, Any]) -> Tensor:
    """What the losses make of these values of rows, weighted already."""
    reduction, by = options["reduction"], options["normalizer"]
    if reduction == "none":
        return rows
    if reduction == "batchmean":
        return rows.sum() / max(rows.size(0), 1)
    if reduction == "sum":
        return rows.sum()
    by = torch.as_tensor(by, dtype=rows.dtype, device=rows.device)
    return rows.sum() * torch.where(by == 0, 0.0, 1.0 / torch.where(by == 0, 1.0, by))


def _kept(labels: Tensor, options: dict[str, Any]) -> Tensor:
    return labels.long() != options["ignore_index"]


def _of_kept(x: Tensor, keep: Tensor | None) -> Tensor:
    return x if keep is None else torch.where(keep, x, 0.0)


def _readable(labels: Tensor, keep: Tensor, vocab: int) -> Tensor:
    """Labels as indices, 0 where a row has none; a label out of range makes its row NaN before."""
    label = labels.long()
    return torch.where(keep & (label >= 0) & (label < vocab), label, 0)


def _label_weight(hard: _Hard, options: dict[str, Any]) -> Tensor:
    """[...] the weight of each row's class, in the dtype of sums; 1 in rows that do not count."""
    by, labels = hard.class_weight, hard.labels
    assert by is not None
    keep = _kept(labels, options)
    acc = torch.float64 if hard.student.dtype == torch.float64 else torch.float32
    by = by.to(torch.promote_types(by.dtype, acc))
    return torch.where(keep, by[_readable(labels, keep, by.size(0))], 1.0)
