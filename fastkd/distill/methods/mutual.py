"""Schemes of several models over the trainer: peers that teach each other, chains of teachers."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import nn

from ..checkpoint import Checkpoints
from ..logging import Step
from ..objective import Objective
from ..schedules import Rates
from ..teacher_ensembles import EnsembleTeacher, PeerTeacher
from ..teachers import as_teacher
from ..terms import Term, Weight, hard, soft
from ..trainer import train

MakeOptimizer = Callable[[nn.Module], torch.optim.Optimizer]


def mutual(
    models: Sequence[nn.Module],
    loader: Iterable[Any],
    loss: Term | Sequence[Term] | None = None,
    *,
    weight: Weight = 1.0,
    temperature: float = 1.0,
    optimizer: MakeOptimizer | None = None,
    lr: float = 1e-3,
    schedule: Callable[[int], float] | None = None,
    **options: Any,
) -> list[Step]:
    """Train models in place that learn from labels and from each other, step by step.

        loss of model k = loss + weight * T^2 KL(mean over l != k of softmax(z_l / T), p_k)

    Its gradient is that of the mean over l of KL(p_l, p_k), the paper's; the values differ by what
    the others disagree. All models move at once, each from the others' outputs of before the step.

    Args:
        models: two or more modules, inputs -> logits [..., V]; may differ in kind.
        loader: as the trainer's.
        loss: terms of each model, none of which learns something of its own; None: `hard()`.
        weight: of the others' part; factor, or step -> factor.
        temperature: T, above 0; 1 in the paper.
        optimizer: model -> its optimizer; None makes AdamW at `lr`.
        lr: learning rate of the AdamW made here.
        schedule: step -> factor on every model's learning rates, undone on return.
        options: of `train`; `clip_norm`, `ema`, `validate` and the steps are the first model's.

    Returns:
        Every step of the first model.

    Raises:
        ValueError: fewer than two models, one of them twice, a term that learns, or what `train`
            raises.

    Paper: Zhang et al. 2018, arXiv 1706.00384.
    """
    models = distinct("models", models, least=2)
    terms = plain_terms(loss)
    terms.append(soft(weight, temperature=temperature, name="mutual"))
    make = optimizer or (lambda model: torch.optim.AdamW(model.parameters(), lr=lr))
    optimizers = [make(model) for model in models]
    pairs = list(zip(models, optimizers, strict=True))
    peers = [PeerTeacher(model, terms, optimizer=own) for model, own in pairs[1:]]
    rates = Rates(optimizers[1:], schedule)

    def everywhere(step: int) -> float:
        assert schedule is not None
        rates.at(step)
        return schedule(step)

    teacher = peers[0] if len(peers) == 1 else EnsembleTeacher(peers, temperature=temperature)
    with rates:
        return train(
            models[0],
            loader,
            terms,
            teacher=teacher,
            optimizer=optimizers[0],
            schedule=everywhere if schedule else None,
            **options,
        )


def assistant_chain(
    teacher: Any,
    models: Sequence[nn.Module],
    loader: Iterable[Any],
    loss: Term | Sequence[Term] | None = None,
    *,
    weight: Weight = 1.0,
    temperature: float | Callable[[int], float] = 4.0,
    vocab_size: int | None = None,
    optimizer: MakeOptimizer | None = None,
    checkpoint: Checkpoints | str | os.PathLike[str] | None = None,
    **options: Any,
) -> list[list[Step]]:
    """Train assistants and then the student in place, each from the one before it.

        loss of model i = loss + weight * T^2 KL(softmax(t / T), p_T),   t of model i - 1

    Args:
        teacher: of the first one, as the trainer's; it, and each model once trained, is frozen.
        models: assistants from the largest to the smallest, the student last.
        loader: as the trainer's; iterated epochs times for each model.
        loss: terms of each model, none of which learns something of its own; None: `hard()`.
        weight: of the teacher's part; factor, or step -> factor.
        temperature: T, or step -> T.
        vocab_size: as in `soft`, where the models' vocabularies are padded differently.
        optimizer: model -> its optimizer; None makes AdamW at the `lr` of the options.
        checkpoint: a `Checkpoints` or a folder, with a folder within it for each model; a resumed
            chain goes on where it was.
        options: of `train`, the same for each model.

    Returns:
        Every step of each model, in their order.

    Raises:
        ValueError: no models, one of them twice or the teacher among them, a term that learns, or
            what `train` raises.

    Paper: Mirzadeh et al. 2019, arXiv 1902.03393.
    """
    above = as_teacher(teacher)  # before anything is trained
    models = distinct("models", models)
    if any(model is other for model in models for other in above.models):
        raise ValueError("models: got the teacher among them, expected others")
    terms = plain_terms(loss)
    terms.append(soft(weight, temperature=temperature, vocab_size=vocab_size))
    steps = []
    for at, model in enumerate(models):
        steps.append(
            train(
                model,
                loader,
                terms,
                teacher=above if at == 0 else models[at - 1],
                optimizer=optimizer(model) if optimizer else None,
                checkpoint=within(checkpoint, f"model-{at}"),
                **options,
            )
        )
    return steps


def distinct(argument: str, models: Sequence[nn.Module], least: int = 1) -> list[nn.Module]:
    """`models` as a list; ValueError where there are fewer than `least`, or one is there twice."""
    models = list(models)
    if len(models) < least:
        raise ValueError(f"{argument}: got {len(models)}, expected {least} or more")
    owners: dict[int, int] = {}
    for at, model in enumerate(models):
        for p in model.parameters():
            if owners.setdefault(id(p), at) != at:
                raise ValueError(
                    f"{argument}: got parameters that numbers {owners[id(p)]} and {at} share, "
                    "expected models of their own"
                )
    return models


def plain_terms(loss: Term | Sequence[Term] | None) -> list[Term]:
    """The terms of `loss`, which several models may use: none has a module of its own."""
    objective = Objective(hard() if loss is None else loss)
    if objective.plain is not None:
        raise TypeError("loss: got a plain function, expected a Term or several")
    if learns := [term.name for term in objective.terms if term.module is not None]:
        raise ValueError(f"loss: got terms {learns} that learn, expected terms without a module")
    return list(objective.terms)


def within(
    checkpoint: Checkpoints | str | os.PathLike[str] | None, name: str
) -> Checkpoints | None:
    """Checkpoints of one of several runs, in a folder of that name within the one given."""
    if checkpoint is None or isinstance(checkpoint, Checkpoints):
        of = checkpoint
    else:
        of = Checkpoints(checkpoint)
    return of and Checkpoints(of.folder / name, every=of.every, keep=of.keep, resume=of.resume)
