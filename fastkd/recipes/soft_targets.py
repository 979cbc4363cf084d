"""Soft targets for a small student of the digits: where they help, and where they do not.

The student is an MLP of 16 units. Where it says "same inputs" the teacher speaks of the 100 images
whose labels the student has; "unlabelled" are all 1 000 of the pool, of 900 of which the student
has nothing but the teacher's word.
"""

from __future__ import annotations

from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastkd import distill

from .data import LABELLED, Digits, digits
from .recipe import Figures, Gain, Recipe
from .training import accuracy, fit, held_out, mlp, sample_batches, scaled, seen_labels
from .training import teacher as trained_teacher

STEPS, BATCH, LEARNING_RATE = 400, 100, 2e-2
MISSING = 3  # the class that the transfer set lacks
SHARE = 0.1  # of each class, known beforehand


def centred(data: Digits) -> Digits:
    """The pool's mean image is taken off: as they are, some of so few units never become active."""
    mean = data.images.mean(0)
    return data._replace(images=data.images - mean, held_out=data.held_out - mean)


class Bench:
    """A seed's data and teacher; students that differ in nothing but what they learn from."""

    students: tuple[int, ...] = (64, 16, 10)
    teachers: tuple[int, ...] = (64, 1200, 10)
    all_steps = STEPS

    def __init__(self, seed: int, size: float) -> None:
        self.seed, self.data = seed, centred(digits(seed))
        self.steps = scaled(self.all_steps, size)
        self.schedule = distill.lr_schedule(self.steps, warmup=self.steps // 10)

    @cached_property
    def teacher(self) -> nn.Sequential:
        return trained_teacher(self.data, self.seed, *self.teachers)

    def student(self, loss: object, *columns: Tensor, teacher: object = None) -> nn.Sequential:
        options = {"teacher": teacher or self.teacher, "schedule": self.schedule}
        torch.manual_seed(1000 + self.seed)  # after the teacher's own training
        batches = sample_batches(self.seed, self.steps, BATCH, *columns)
        return fit(mlp(*self.students), batches, loss, LEARNING_RATE, **options)

    def same(self, *loss: distill.Term) -> float:
        images, labels = self.data.images[:LABELLED], self.data.labels[:LABELLED]
        return held_out(self.student(loss, images, labels), self.data)

    def unlabelled(self, *loss: distill.Term) -> float:
        student = self.student(loss, self.data.images, seen_labels(self.data))
        return held_out(student, self.data)


def soft_targets(seed: int, size: float) -> Figures:
    bench = Bench(seed, size)
    return {
        "teacher": held_out(bench.teacher, bench.data),
        "hard labels": bench.same(distill.hard()),
        "soft, T = 4": bench.unlabelled(distill.hard(0.1), distill.soft(0.9, temperature=4.0)),
    }


def temperatures(seed: int, size: float) -> Figures:
    bench = Bench(seed, size)
    figures = {"hard labels": bench.same(distill.hard())}
    for T in (1.0, 4.0, 20.0):
        terms = distill.hard(0.1), distill.soft(0.9, temperature=T)
        figures[f"T = {T:g}"] = bench.same(*terms)
    return figures


def label_smoothing(seed: int, size: float) -> Figures:
    bench = Bench(seed, size)
    return {
        "hard labels": bench.same(distill.hard()),
        "smoothing": bench.same(distill.hard(label_smoothing=0.1)),
    }


def reverse_kl(seed: int, size: float) -> Figures:
    bench = Bench(seed, size)
    figures = {"hard labels": bench.same(distill.hard())}
    for divergence in ("kl", "reverse_kl"):
        terms = distill.hard(0.1), distill.soft(0.9, temperature=1.0, divergence=divergence)
        figures[divergence.replace("_", " ")] = bench.same(*terms)
    return figures


def squares(student: distill.Outputs, teacher: distill.Outputs, _: distill.Batch) -> Tensor:
    return F.mse_loss(student.logits, teacher.logits)


def logits(seed: int, size: float) -> Figures:
    bench, term = Bench(seed, size), distill.Term("logits", squares, mean="samples")
    return {
        "hard labels": bench.same(distill.hard()),
        "same inputs": bench.same(term),
        "unlabelled": bench.unlabelled(term),
    }


def missing_class(seed: int, size: float) -> Figures:
    """Accuracy among held-out images of the class that no student has seen, and among all."""
    bench = Bench(seed, size)
    data = bench.data
    kept = data.labels != MISSING
    student = bench.student(distill.soft(temperature=4.0), data.images[kept])
    hard = bench.student(distill.hard(), data.images[kept], data.labels[kept])
    figures = {"hard labels": of_missing(hard, data)}
    figures |= {"as trained": of_missing(student, data), "all, as trained": held_out(student, data)}
    raise_bias(student, data.images)
    figures |= {"corrected": of_missing(student, data), "all, corrected": held_out(student, data)}
    return figures


def of_missing(model: nn.Module, data: Digits) -> float:
    at = data.held_out_labels == MISSING
    return accuracy(model, data.held_out[at], data.held_out_labels[at])


@torch.no_grad()
def raise_bias(student: nn.Sequential, images: Tensor) -> None:
    """Raise the class's bias until its share of the images is what it should be; no label needed.

    (Hinton et al. chose it by the accuracy on the test set.)
    """
    logits = student(images)
    others = logits.clone()
    others[:, MISSING] = -torch.inf
    short = others.max(-1).values - logits[:, MISSING]  # by how much the class loses an image
    head = student[-1]
    assert isinstance(head, nn.Linear)
    head.bias[MISSING] += short.quantile(SHARE)


HINTON = "Hinton et al. 2015, arXiv 1503.02531"
RECIPES = (
    Recipe(
        name="soft-targets",
        about="soft targets at T = 4 on 900 images without a label, beside 100 hard labels",
        paper=HINTON,
        run=soft_targets,
        gains=(Gain("soft, T = 4", "hard labels", 6.0, seeds_improved=1.0),),
        seeds=10,
    ),
    Recipe(
        name="temperature",
        about="soft targets of the same 100 images that have labels: T = 1, 4 and 20",
        paper=HINTON,
        run=temperatures,
        gains=(
            Gain("T = 20", "hard labels", 1.5, seeds_improved=0.9),
            *(Gain(name, "hard labels", None) for name in ("T = 1", "T = 4")),
        ),
        seeds=10,
    ),
    Recipe(
        name="missing-class",
        about="a transfer set without 3s, then its bias raised until a tenth of the pool are 3s",
        paper=HINTON,
        run=missing_class,
        gains=(
            Gain("corrected", "hard labels", 60.0, seeds_improved=1.0),
            Gain("corrected", "as trained", None),
            Gain("all, corrected", "all, as trained", None),
        ),
    ),
    Recipe(
        name="logit-matching",
        about="mean squared difference of logits, on the same 100 images and on all unlabelled",
        paper="Ba and Caruana 2014, arXiv 1312.6184",
        run=logits,
        gains=(
            Gain("same inputs", "hard labels", 1.5),
            Gain("unlabelled", "hard labels", 6.0),
        ),
        seeds=10,
    ),
    Recipe(
        name="label-smoothing",
        about="no teacher: labels smoothed by 0.1, a control of all that soft targets claim",
        paper="Szegedy et al. 2016, arXiv 1512.00567",
        run=label_smoothing,
        gains=(Gain("smoothing", "hard labels", None),),
        seeds=10,
    ),
    Recipe(
        name="reverse-kl",
        about="KL(student, teacher) at T = 1 on the same 100 images, beside KL(teacher, student)",
        paper="Gu et al. 2023, arXiv 2306.08543",
        run=reverse_kl,
        gains=(Gain("reverse kl", "hard labels", 0.5), Gain("kl", "hard labels", None)),
        seeds=10,
    ),
)
