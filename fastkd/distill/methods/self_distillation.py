"""Schemes in which a model learns from itself: its average, its forebears, its deepest exit."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from fastkd.arguments.messages import shown

from ..batch import Batch, Outputs
from ..checkpoint import Checkpoints
from ..logging import Step
from ..teachers import EMATeacher
from ..terms import Term, Weight, hard, soft
from ..trainer import train
from .mutual import MakeOptimizer, distinct, plain_terms, within


def mean_teacher(
    student: nn.Module,
    loader: Iterable[Any],
    loss: Term | Sequence[Term] | None = None,
    *,
    decay: float = 0.999,
    weight: Weight = 1.0,
    ramp: int = 0,
    temperature: float | Callable[[int], float] = 1.0,
    **options: Any,
) -> tuple[nn.Module, list[Step]]:
    """Train a student in place that learns from labels and from the average of its own weights.

        loss = loss + r(step) weight * T^2 KL(softmax(z_average / T), p_T)
        r(step) = exp(-5 (1 - step / ramp)^2) before `ramp`, then 1

    (The paper takes squares of probabilities where this takes KL.)

    Args:
        student: module, inputs -> logits [..., V].
        loader: as the trainer's; rows without a label (-100) learn from the average alone.
        loss: terms beside the average; None: `hard()`.
        decay: of the average, in [0, 1): w <- decay w + (1 - decay) w_student after every step.
        weight: of the average's part; factor, or step -> factor.
        ramp: steps in which that weight grows, at least 0.
        temperature: T, or step -> T.
        options: of `train`; with `transform=input_noise(...)` the student alone sees the noise.

    Returns:
        The average (a module in eval mode, often the better one), and every step.

    Raises:
        ValueError: decay or ramp out of range, or what `train` raises.

    Paper: Tarvainen and Valpola 2017, arXiv 1703.01780.
    """
    if ramp < 0:
        raise ValueError(f"ramp: got {shown(ramp)}, expected a number of steps >= 0")

    def grown(step: int) -> float:
        base = weight(step) if callable(weight) else weight
        return base if step >= ramp else base * math.exp(-5 * (1 - step / ramp) ** 2)

    beside = [hard()] if loss is None else [loss] if isinstance(loss, Term) else list(loss)
    terms = [*beside, soft(grown, temperature=temperature, name="average")]
    average = EMATeacher(student, decay)
    steps = train(student, loader, terms, teacher=average, **options)
    return average.model.eval(), steps


def born_again(
    make: Callable[[int], nn.Module],
    loader: Iterable[Any],
    generations: int = 3,
    loss: Term | Sequence[Term] | None = None,
    *,
    hard_weight: float = 1.0,
    weight: Weight = 1.0,
    temperature: float | Callable[[int], float] = 1.0,
    optimizer: MakeOptimizer | None = None,
    checkpoint: Checkpoints | str | os.PathLike[str] | None = None,
    **options: Any,
) -> list[nn.Module]:
    """Train generations of one architecture, each afresh, from labels and from the one before.

        generation 0: loss
        generation g: hard_weight * loss + weight * T^2 KL(softmax(z_(g-1) / T), p_T)

    Args:
        make: generation, from 0 -> a new module, inputs -> logits [..., V].
        loader: as the trainer's; iterated epochs times for each generation.
        generations: how many learn from one before them, at least 1.
        loss: terms of each, none of which learns something of its own; None: `hard()`.
        hard_weight: of the loss in later generations, at least 0; at 0 they see no label.
        weight: of the part of the one before; factor, or step -> factor.
        temperature: T, or step -> T; 1 in the paper.
        optimizer: model -> its optimizer; None makes AdamW at the `lr` of the options.
        checkpoint: a `Checkpoints` or a folder, with a folder within it for each generation; a
            resumed run goes on where it was.
        options: of `train`, the same for each generation.

    Returns:
        generations + 1 trained modules, the one without a teacher first. `EnsembleTeacher` of them
        is the paper's ensemble.

    Raises:
        ValueError: generations below 1, hard_weight below 0, a module that is not new, a term that
            learns, or what `train` raises.

    Paper: Furlanello et al. 2018, arXiv 1805.04770.
    """
    if generations < 1:
        raise ValueError(f"generations: got {shown(generations)}, expected an integer >= 1")
    if not hard_weight >= 0:
        raise ValueError(f"hard_weight: got {shown(hard_weight)}, expected a number >= 0")
    first = plain_terms(loss)
    kept = [replace(term, weight=times(hard_weight, term.weight)) for term in first]
    later = [*(kept if hard_weight else ()), soft(weight, temperature=temperature)]
    models: list[nn.Module] = []
    for at in range(generations + 1):
        models = distinct("make", [*models, make(at)])
        train(
            models[at],
            loader,
            later if at else first,
            teacher=models[at - 1] if at else None,
            optimizer=optimizer(models[at]) if optimizer else None,
            checkpoint=within(checkpoint, f"generation-{at}"),
            **options,
        )
    return models


def self_distillation(
    heads: Mapping[str, nn.Module],
    *,
    weight: Weight = 1.0,
    alpha: float = 0.5,
    temperature: float = 3.0,
) -> list[Term]:
    """Terms by which early exits of a student learn from labels and from its last layer.

        exit i: weight * ((1 - alpha) CE(labels, h_i) + alpha T^2 KL(softmax(z / T), h_i,T))
        h_i = heads[i](output of module i);   z: the student's logits, without gradient

    They stand beside the loss of the last layer: train(student, loader, [hard(),
    *self_distillation({"2": nn.Linear(64, 10)})]).
    (The paper's hints between features are left out.)

    Args:
        heads: name of a student's module -> head, its output -> logits [..., V]; the heads learn
            with the student, outside of its state dict. The gradient reaches the layers below.
        weight: of all exits; factor, or step -> factor.
        alpha: share of the last layer's part, in [0, 1]; 0 is the control, heads alone.
        temperature: T, above 0.

    Returns:
        Two terms for each exit, "exit:NAME" of the labels and "own:NAME" of the last layer; those
        of weight 0 are left out.

    Raises:
        ValueError: no heads, alpha or temperature out of range.

    Paper: Zhang et al. 2019, be your own teacher, arXiv 1905.08094.
    """
    if not heads:
        raise ValueError("heads: got none, expected one or more")
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha: got {shown(alpha)}, expected a number in [0, 1]")
    if not temperature > 0:
        raise ValueError(f"temperature: got {shown(temperature)}, expected > 0")
    return [
        term
        for layer, head in heads.items()
        for term in _exit(layer, head, weight, alpha, temperature)
    ]


def _exit(layer: str, head: nn.Module, weight: Weight, alpha: float, T: float) -> list[Term]:
    def labelled(student: Outputs, teacher: Outputs, batch: Batch) -> Tensor:
        return hard().function(Outputs(head(student.features[layer])), teacher, batch)

    def distilled(student: Outputs, _: Outputs, batch: Batch) -> Tensor:
        exit_logits, last_logits = head(student.features[layer]), student.logits.detach()
        return soft(temperature=T).function(Outputs(exit_logits), Outputs(last_logits), batch)

    terms = []
    if alpha < 1:
        terms.append(
            Term(f"exit:{layer}", labelled, times(1 - alpha, weight), "tokens", (layer,), (), head)
        )
    if alpha > 0:
        learnt = None if terms else head  # once is enough
        terms.append(
            Term(f"own:{layer}", distilled, times(alpha, weight), "samples", (layer,), (), learnt)
        )
    return terms


def times(factor: float, weight: Weight) -> Weight:
    return (lambda step: factor * weight(step)) if callable(weight) else factor * weight
