"""Steps of the workflow, each beside its control: noise, search, transfer, layers.

Unless said, students are MLPs with 16 hidden units that have 100 labels, and of another 900 inputs
at most the teacher's outputs.
"""

from __future__ import annotations

import statistics
from typing import Any

import torch
from torch import Tensor, nn

from fastkd import distill
from fastkd.distill.serialization import needed

from .data import LABELLED, POOL, digits
from .recipe import Figures, Gain, Recipe
from .training import accuracy, fit, held_out, mlp, sample_batches, scaled, seen_labels, teacher

STUDENT = (64, 16, 10)


def student(seed: int, *sizes: int) -> nn.Sequential:
    torch.manual_seed(1000 + seed)
    return mlp(*(sizes or STUDENT))


TEMPERATURE = 4.0


# ---- noise

INPUT_NOISE, FEW = 0.3, 50  # of inputs in [0, 1]; how many inputs there are


def noise(seed: int, size: float) -> Figures:
    """A teacher answers for inputs near the 50, which labels cannot."""
    data, steps = digits(seed), scaled(300, size)
    live = teacher(data, seed)
    few = data.images[:FEW], data.labels[:FEW]

    def kd(temperature: float) -> list[distill.Term]:
        return [distill.hard(0.1), distill.soft(0.9, temperature=temperature)]

    def trained(loss: Any, std: float, model: nn.Module | None) -> float:
        torch.manual_seed(seed)
        net, batches = student(seed), sample_batches(seed, steps, 100, *few)
        transform = distill.input_noise(std, teacher="noisy") if std else None
        return held_out(fit(net, batches, loss, teacher=model, transform=transform), data)

    return {
        "hard labels": trained(distill.hard(), 0.0, None),
        "noise + hard labels": trained(distill.hard(), INPUT_NOISE, None),
        "KD": trained(kd(1.0), 0.0, live),
        "noise + KD": trained(kd(1.0), INPUT_NOISE, live),
        "KD, T = 4": trained(kd(4.0), 0.0, live),
        "noise + KD, T = 4": trained(kd(4.0), INPUT_NOISE, live),
    }


# ---- automatic hyper-parameters

TRIALS, TRAINING = 20, 800  # the other 200 of the pool choose among the trials
DEFAULT = {"alpha": 0.5, "temperature": 3.0, "lr": 1e-3}


def tuned(seed: int, size: float) -> Figures:
    """20 trials of weight, temperature and learning rate; validation images choose one."""
    optuna = needed("optuna", "the recipe 'automatic'", "tune")
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    data, steps = digits(seed), scaled(500, size)
    live = teacher(data, seed)
    seen, validation = seen_labels(data), slice(TRAINING, POOL)
    batches = sample_batches(seed, steps, 100, data.images[:TRAINING], seen[:TRAINING])

    def trained(alpha: float, temperature: float, lr: float) -> nn.Module:
        terms = [distill.hard(alpha), distill.soft(1 - alpha, temperature=temperature)]
        return fit(student(seed), batches, terms, lr=lr, teacher=live)

    models: list[nn.Module] = []

    def value(trial: Any) -> float:
        model = trained(
            trial.suggest_float("alpha", 0.0, 1.0),
            trial.suggest_float("temperature", 1.0, 20.0),
            trial.suggest_float("lr", 3e-4, 3e-2, log=True),
        )
        models.append(model)
        return accuracy(model, data.images[validation], data.labels[validation])

    sampler = optuna.samplers.RandomSampler(seed=seed)
    study = optuna.create_study(direction="maximize", sampler=sampler)
    study.optimize(value, n_trials=TRIALS)
    return {
        "search": held_out(models[study.best_trial.number], data),
        "default": held_out(trained(**DEFAULT), data),
        "random draw": statistics.fmean(held_out(model, data) for model in models),
    }


# ---- transfer

TARGET_LABELS = 30


def transfer(seed: int, size: float) -> Figures:
    """A distilled student moves to images one pixel to the right, of which 30 have labels."""
    data, steps = digits(seed), scaled(400, size)
    live = teacher(data, seed)

    def moved(images: Tensor) -> Tensor:
        return images.view(-1, 8, 8).roll(1, 2).flatten(1)

    source, seen = data.images[:-TARGET_LABELS], seen_labels(data)[:-TARGET_LABELS]
    few = moved(data.images[-TARGET_LABELS:]), data.labels[-TARGET_LABELS:]
    target = moved(data.held_out), data.held_out_labels

    def tuned_to(model: nn.Module) -> float:
        batches = sample_batches(seed, scaled(300, size), TARGET_LABELS, *few)
        tuned, _ = distill.fine_tune(model, batches, distill.hard(), lr=1e-2, progress=False)
        return accuracy(tuned, *target)

    hard = sample_batches(seed, steps, 100, data.images[:LABELLED], data.labels[:LABELLED])
    both = sample_batches(seed, steps, 100, source, seen)
    terms = [distill.hard(0.1), distill.soft(0.9, temperature=TEMPERATURE)]
    scratch = fit(student(seed), sample_batches(seed, steps, TARGET_LABELS, *few), distill.hard())
    distilled = fit(student(seed), both, terms, teacher=live)
    return {
        "KD, fine-tuned": tuned_to(distilled),
        "KD, not tuned": accuracy(distilled, *target),
        "hard labels, fine-tuned": tuned_to(fit(student(seed), hard, distill.hard())),
        "scratch": accuracy(scratch, *target),
    }


# ---- layers of the teacher


def layer_init(seed: int, size: float) -> Figures:
    """The first layer of a teacher of three, under a student of two; then the 100 labels."""
    data, steps = digits(seed), scaled(200, size)
    live = teacher(data, seed, 64, 128, 64, 10)
    batches = sample_batches(seed, steps, 100, data.images[:LABELLED], data.labels[:LABELLED])
    fresh, copied = student(seed, 64, 128, 10), student(seed, 64, 128, 10)
    distill.copy_layers(copied, live, {"0": "0"})
    return {
        "teacher's first layer": held_out(fit(copied, batches, distill.hard(), lr=1e-3), data),
        "fresh": held_out(fit(fresh, batches, distill.hard(), lr=1e-3), data),
    }


def pruning(seed: int, size: float) -> Figures:
    """The 16 strongest of a teacher's 1200 units as a student to begin with."""
    data, steps = digits(seed), scaled(100, size)
    live = teacher(data, seed)
    cut = distill.prune(live, STUDENT[1] / 1200)
    batches = sample_batches(seed, steps, 100, data.images, seen_labels(data))
    terms = [distill.hard(0.1), distill.soft(0.9, temperature=TEMPERATURE)]
    before = held_out(cut, data)
    return {
        "teacher": held_out(live, data),
        "16 units, not trained": before,
        "16 units + KD": held_out(fit(cut, batches, terms, teacher=live), data),
        "fresh + KD": held_out(fit(student(seed), batches, terms, teacher=live), data),
    }


RECIPES = (
    Recipe(
        name="input-noise",
        about="50 inputs with noise, which a teacher answers for",
        paper="Xie et al. 2020, arXiv 1911.04252",
        run=noise,
        gains=(
            Gain("noise + KD", "KD", 3.5),
            Gain("noise + KD", "noise + hard labels", 1.0),
            Gain("KD", "hard labels", None),
            Gain("noise + KD, T = 4", "KD, T = 4", None),
        ),
    ),
    Recipe(
        name="automatic",
        about="weight, temperature and learning rate by 20 trials, chosen on 200 images",
        paper="Bergstra and Bengio 2012",
        run=tuned,
        gains=(
            Gain("search", "default", 3.0),
            Gain("search", "random draw", 0.001),
        ),
    ),
    Recipe(
        name="transfer",
        about="a distilled student fine-tuned to shifted images, of which 30 have labels",
        paper="",
        run=transfer,
        gains=(
            Gain("KD, fine-tuned", "scratch", 2.5),
            Gain("KD, fine-tuned", "hard labels, fine-tuned", 2.0),
            Gain("KD, fine-tuned", "KD, not tuned", None),
        ),
    ),
    Recipe(
        name="layer-init",
        about="a student that starts with the teacher's first layer, 100 labels",
        paper="Sanh et al. 2019, arXiv 1910.01108",
        run=layer_init,
        gains=(Gain("teacher's first layer", "fresh", 0.7, seeds_improved=0.75),),
    ),
    Recipe(
        name="pruning",
        about="a student of the teacher's 16 strongest units",
        paper="Li et al. 2017, arXiv 1608.08710",
        run=pruning,
        gains=(
            Gain("16 units + KD", "fresh + KD", None),
            Gain("16 units + KD", "16 units, not trained", None),
        ),
    ),
)
