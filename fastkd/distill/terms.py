"""Terms of a loss: the labels', the teacher's, and those between features of two layers."""

from __future__ import annotations

import dataclasses
import inspect
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastkd
from fastkd.arguments.messages import shown
from fastkd.arguments.numbers import real
from fastkd.rows import classes_last

from .batch import IGNORED, Batch, Outputs, mapped, tensors
from .distributed import is_dtensor
from .losses.features import nst
from .losses.relations import OF_SAMPLES, fsp
from .targets import (
    Classes,
    bare_function,
    class_numbers,
    in_use,
    kept_rows,
    labels_of,
    only,
    teacher_logits,
    try_options,
    without,
)

Weight = float | Callable[[int], float]
MEANS = ("tokens", "samples", "step")
METRICS = ("soft", "student_entropy", "teacher_entropy")  # of `fastkd.LossOutputs`


@dataclasses.dataclass(frozen=True)
class Term:
    """One term of a loss: weight * function(student outputs, teacher outputs, batch).

        loss of a step = sum over terms, weight * sum over micro-batches, share * function(...)

    Args:
        name: how logs and errors call it; unique within a loss.
        function: (Outputs of the student, Outputs of the teacher, Batch) -> 0-d tensor. Without a
            teacher the second one's `logits` is None.
        weight: factor, or step (of the run, from 0) -> factor. At 0 a term of this package that
            wants labels takes a batch without, and is 0.
        mean: what the function's mean runs over, hence a micro-batch's share of the step:
            "tokens" (labels that are not -100): share = tokens / tokens of the step; with no such
            label the function is not called and the term is 0, connected to the graph;
            "samples": share = samples / samples of the step;
            "step": the function has divided a sum by `batch.normalizer` itself: share = 1.
        student_layers, teacher_layers: names of modules whose outputs the function finds in
            `Outputs.features`.
        module: what the term learns (a projector, a discriminator, a scale); trained and
            checkpointed with the student, never in its state dict.
        metrics: names of further means over the same rows, for logs. The function then returns
            (0-d tensor, {name: 0-d tensor}); logs get each as "term/NAME/METRIC".
    """

    name: str
    function: Callable[[Outputs, Outputs, Batch], Any]
    weight: Weight = 1.0
    mean: str = "tokens"
    student_layers: tuple[str, ...] = ()
    teacher_layers: tuple[str, ...] = ()
    module: nn.Module | None = None
    metrics: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not callable(self.function):
            raise TypeError(f"function: got {shown(self.function)}, expected a callable")
        number = isinstance(self.weight, (int, float)) or getattr(self.weight, "ndim", 1) == 0
        if not callable(self.weight) and not number:
            got = f"{type(self.weight).__name__} {list(getattr(self.weight, 'shape', []))}"
            raise TypeError(
                f"weight: got {got}, expected a number or step -> number; class weights are "
                "distill.hard(class_weight=...)"
            )
        if self.mean not in MEANS:
            raise ValueError(f"mean: got {shown(self.mean)}, expected one of {MEANS}")
        for layers in (self.student_layers, self.teacher_layers):
            if isinstance(layers, str):
                raise TypeError(
                    f"layers: got the string {shown(layers)}, expected a tuple of names"
                )


def hard(
    weight: Weight = 1.0,
    *,
    label_smoothing: float = 0.0,
    class_weight: Tensor | None = None,
    vocab_size: int | None = None,
    class_dim: int = -1,
    name: str = "hard",
) -> Term:
    """Cross-entropy with the labels, mean over the labelled rows of the step: CE(labels, s).

    Labels are class numbers, or probabilities in the logits' shape (mixup, cutmix).

    Args:
        weight: factor, or step -> factor.
        label_smoothing: in [0, 1].
        class_weight: [V] floats, a factor of each class; the mean of a batch is over their sum, as
            in `F.cross_entropy(weight=)`.
        vocab_size: use the first n columns only (a padded vocabulary).
        class_dim: the dimension of the classes: 1 for maps [N, C, H, W] with labels [N, H, W].
        name: of the term.

    Raises:
        ValueError: label_smoothing outside [0, 1].
        TypeError, ValueError: in training: no labels, labels that are neither class numbers nor
            probabilities of the classes, classes that are not along class_dim.
    """
    look, smoothing = Classes(name, class_dim), real(label_smoothing)
    if smoothing is None or not 0.0 <= smoothing <= 1.0:
        raise ValueError(f"label_smoothing: got {shown(label_smoothing)}, expected 0 to 1")

    def function(student: Outputs, _: Outputs, batch: Batch) -> Tensor:
        labels, logits = labels_of(name, batch), student.logits
        look(logits, batch)
        of_classes = isinstance(labels, Tensor) and labels.is_floating_point()
        own = class_weight is not None or (of_classes and labels.shape == logits.shape)
        if is_dtensor(logits) or own:
            by = class_weight
            with _naming(name):
                return fastkd.distillation_loss(
                    logits, logits.detach(), labels, alpha=1.0,
                    class_weight=by.to(logits.device) if isinstance(by, Tensor) else by,
                    label_smoothing=label_smoothing, vocab_size=vocab_size, class_dim=class_dim,
                )  # fmt: skip
        if isinstance(logits, Tensor):
            logits = classes_last(logits, logits, class_dim)[0]
            logits = in_use(f"term {name!r}", logits, vocab_size)
            labels = class_numbers(name, logits, labels, f"term {name!r}: ")
        try:
            return F.cross_entropy(
                logits.flatten(0, -2),
                labels.flatten(),
                ignore_index=IGNORED,
                label_smoothing=label_smoothing,
            )
        except IndexError as error:  # on the CPU; it names one label, and not what it is for
            kept = labels[labels != IGNORED]
            raise IndexError(
                f"term {name!r}: labels: got class numbers from {int(kept.min())} to "
                f"{int(kept.max())}, expected 0 to {logits.size(-1) - 1}, the student's logits "
                f"{list(logits.shape)}, or {IGNORED} for a row without a label"
            ) from error

    return Term(name, function, weight)


def soft(
    weight: Weight = 1.0,
    *,
    temperature: float | Callable[[int], float] = 4.0,
    divergence: Any = "kl",
    rows: str = "all",
    vocab_size: int | None = None,
    class_dim: int = -1,
    return_outputs: bool = False,
    name: str = "soft",
) -> Term:
    """The teacher's part of `fastkd.distillation_loss`: T^2 D(p_T, q_T).

    Args:
        weight: factor, or step -> factor.
        temperature: T, or step -> T.
        divergence: as in `fastkd.distillation_loss`.
        rows: "all" (a transfer set whose labels may be missing), or "labelled": rows whose label
            is -100 are left out (padding of a language model); every batch needs labels then.
        vocab_size: use the first n columns of both sides only (vocabularies that are padded
            differently). Of a `TopK` with a bucket, further columns join the bucket.
        class_dim: the dimension of the classes: 1 for maps [N, C, H, W] with labels [N, H, W].
        return_outputs: log three means over these rows as well, from the same pass (see
            `fastkd.LossOutputs`): "term/soft/soft", the divergence without T^2, and
            "term/soft/student_entropy" and "term/soft/teacher_entropy", both at T.

    Paper: Hinton, Vinyals and Dean 2015, arXiv 1503.02531.
    """
    if rows not in ("all", "labelled"):
        raise ValueError(f"rows: got {shown(rows)}, expected 'all' or 'labelled'")
    constant = dict(temperature=temperature, divergence=divergence, alpha=0.0)
    try_options(fastkd.distillation_loss, constant, 2, 3)

    look = Classes(name, class_dim)

    def function(student: Outputs, teacher: Outputs, batch: Batch) -> Any:
        target = teacher_logits(name, teacher)
        look(student.logits, batch)
        T = temperature(batch.step) if callable(temperature) else temperature
        # at alpha=0 labels only say which rows are left out
        labels = labels_of(name, batch) if rows == "labelled" else None
        with _unless_warned(student.logits):
            found: Any = fastkd.distillation_loss(
                student.logits, target, labels,
                temperature=T, alpha=0.0, divergence=divergence, vocab_size=vocab_size,
                class_dim=class_dim, return_outputs=return_outputs,
            )  # fmt: skip
        return (found[0], _means(found[1], labels)) if return_outputs else found

    metrics = METRICS if return_outputs else ()
    mean = "tokens" if rows == "labelled" else "samples"
    return Term(name, function, weight, mean, metrics=metrics)


def _means(outputs: fastkd.LossOutputs, labels: Tensor | None) -> dict[str, Tensor]:
    """Means over the rows that count; the others hold 0."""
    found = {name: x for name in METRICS if (x := getattr(outputs, name)) is not None}
    if labels is None:
        return {name: x.mean() for name, x in found.items()}
    kept = (labels != IGNORED).sum().clamp(min=1)
    return {name: x.sum() / kept for name, x in found.items()}


@contextmanager
def _unless_warned(logits: Any) -> Iterator[None]:
    """Without the loss's own warning of a single logit: the term has named it."""
    if logits.shape[-1:] != (1,):
        yield
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@contextmanager
def _naming(name: str) -> Iterator[None]:
    """Errors with the term's name before them."""
    try:
        yield
    except (TypeError, ValueError) as error:
        raise type(error)(f"term {name!r}: {error}") from error


Layer = str | tuple[str, ...]


def feature(
    student_layer: Layer,
    teacher_layer: Layer,
    function: Callable[..., Tensor],
    weight: Weight = 1.0,
    *,
    projector: nn.Module | None = None,
    rows: str = "all",
    mask: str | None = None,
    mean: str | None = None,
    name: str | None = None,
) -> Term:
    """A feature or relation loss between two layers: function(projector(f_student), f_teacher).

    Args:
        student_layer, teacher_layer: names of modules, as in `named_modules()`; a tuple of
            names gives the function (and the projector) a tuple of features.
        function: (student features, teacher features) -> 0-d tensor; see `features`, `relations`
            and `attention`. One that is a module with parameters or buffers is learnt too.
        weight: factor, or step -> factor.
        projector: learnt with the student (see `fastkd.distill.projector`); None for none.
        rows: "all", or "labelled": positions whose label is -100 (padding) are left out.
        mask: name of the batch's mask, not 0 where a position counts, such as "attention_mask":
            an entry of its inputs, or of what else the loader's dict holds.
        mean: see `Term`; None: "tokens" with rows="labelled", else "samples".
        name: None makes "FUNCTION:STUDENT_LAYER-TEACHER_LAYER", such as "hint:layer1-layer3".

    With `rows` or `mask` a function that has an argument `mask` gets it. Another one gets the
    vectors that count, [n, D] of [N, L, D]; one that compares whole samples gets them with 0 for
    what does not count. So a padded batch has the value of one without padding.

    Raises:
        TypeError, ValueError: another `rows`, both `rows` and `mask`; in training: a batch without
            what they need, features of other first dimensions.
    """
    if rows not in ("all", "labelled"):
        raise ValueError(f"rows: got {rows!r}, expected 'all' or 'labelled'")
    if rows == "labelled" and mask is not None:
        raise ValueError(f"mask: got {mask!r} beside rows='labelled', expected one of them")
    bare = bare_function(function)
    label = getattr(bare, "__name__", type(bare).__name__)
    label = "feature" if label == "<lambda>" else label
    name = name or f"{label}:{'+'.join(_names(student_layer))}-{'+'.join(_names(teacher_layer))}"
    mean = mean or ("tokens" if rows == "labelled" else "samples")

    def call(student: Outputs, teacher: Outputs, batch: Batch) -> Tensor:
        student_features, teacher_features = (
            _features(student, student_layer),
            _features(teacher, teacher_layer),
        )
        student_features = student_features if projector is None else projector(student_features)
        kept = kept_rows(name, batch, rows, mask)
        return (
            function(student_features, teacher_features)
            if kept is None
            else _masked(function, student_features, teacher_features, kept)
        )

    return Term(
        name,
        call,
        weight,
        mean,
        _names(student_layer),
        _names(teacher_layer),
        _owned(projector, function),
    )


def _masked(
    function: Callable[..., Tensor], student_features: Any, teacher_features: Any, kept: Tensor
) -> Tensor:
    """function(student, teacher) over what is kept; 0, connected to the graph, where nothing is."""
    bare = bare_function(function)
    if "mask" in _parameters(bare):
        return function(student_features, teacher_features, mask=kept)
    of_samples = bare is nst or bare in OF_SAMPLES or type(bare) in OF_SAMPLES
    if bare is fsp and kept.dim() > 1:
        raise ValueError("mask: got one of positions for fsp, which has a mean over all of them")
    take = without if of_samples and kept.dim() > 1 else only
    student_features, teacher_features = (
        mapped(x, lambda part: take(part, kept)) for x in (student_features, teacher_features)
    )
    found = list(tensors(student_features))
    if any(x.size(0) == 0 for x in found):  # a mean over nothing
        return torch.stack([x.sum() for x in found]).sum()
    return function(student_features, teacher_features)


def _parameters(function: Any) -> Any:
    try:
        return inspect.signature(getattr(function, "forward", function)).parameters
    except (TypeError, ValueError):  # one written in C
        return ()


def _owned(projector: nn.Module | None, function: Callable[..., Tensor]) -> nn.Module | None:
    """The modules that a term learns: its projector, its function, or both."""
    if not isinstance(function, nn.Module) or not function.state_dict():
        return projector
    return function if projector is None else nn.ModuleList([projector, function])


def _names(layer: Layer) -> tuple[str, ...]:
    return (layer,) if isinstance(layer, str) else tuple(layer)


def _features(outputs: Outputs, layer: Layer) -> Any:
    if isinstance(layer, str):
        return outputs.features[layer]
    return tuple(outputs.features[name] for name in layer)
