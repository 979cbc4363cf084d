"""Time and peak memory of a student's step in each way, taken in turns on one machine."""

from __future__ import annotations

import copy
import os
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fastkd.distill.logging import progress_bar

from .memory import peak_extra
from .model import Language
from .stages import DENSE, EAGER, VARIANTS, Stages

Figures = dict[str, dict[str, float]]


def measured(stages: Stages, student: Any, teacher: Any) -> Figures:
    """way -> "step_s", "peak_bytes" and, where the loss is given logits, "loss_s".

    Medians of `repeats` rounds; in each round every way is timed once, and the first one changes
    from round to round. A step is the teacher's forward (or the reading from disk), the student's,
    loss, backward, clipping and AdamW.
    """
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # torch's profiler prints two lines a use
    tokens, labels = batch(stages)
    steps = {name: Step(stages, name, student, teacher, tokens, labels) for name in VARIANTS}
    losses = _losses(stages, student, teacher, tokens)
    figures: Figures = {name: {} for name in VARIANTS}
    block = 4 * tokens.numel() * stages.corpus.vocab
    rounds = stages.preset.repeats
    with progress_bar(stages.progress, total=len(VARIANTS) * (2 + rounds), unit="step") as bar:
        for name, step in steps.items():
            step()  # the optimizer's state is there from now on
            step.optimizer.zero_grad(set_to_none=True)
            figures[name]["peak_bytes"] = peak_extra(step, stages.device, block)
            bar.update(2)
        runs: dict[tuple[str, str], Callable[[], object]] = {
            **{(name, "step_s"): step for name, step in steps.items()},
            **{(name, "loss_s"): loss for name, loss in losses.items()},
        }
        seconds: dict[tuple[str, str], list[float]] = {key: [] for key in runs}
        for run in losses.values():
            run()
        order = list(runs)
        for _ in range(rounds):
            for key in order:
                seconds[key].append(seconds_of(runs[key], stages.device))
            order = [*order[1:], order[0]]
            bar.update(len(VARIANTS))
    for (name, what), found in seconds.items():
        figures[name][what] = statistics.median(found)
    return figures


class Step:
    """One way's whole training step, on a copy of the student."""

    def __init__(
        self, stages: Stages, name: str, student: Any, teacher: Any, tokens: Tensor, labels: Tensor
    ) -> None:
        self.variant, self.stages, self.tokens, self.labels = VARIANTS[name], stages, tokens, labels
        self.student = Language(copy.deepcopy(student), self.variant.linear).train()
        self.teacher = Language(teacher, self.variant.linear).eval()
        self.weights = list(self.student.parameters())
        self.optimizer = torch.optim.AdamW(self.weights, lr=1e-4, fused=True)
        self.reader = stages.reader(teacher) if self.variant.teacher == "cached" else None

    def __call__(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        teacher_outputs: Any = None
        with _autocast(self.stages):
            if self.reader is not None:
                teacher_outputs = self.reader.batch(range(len(self.tokens))).to(self.tokens.device)
            elif self.variant.teacher:
                with torch.no_grad():
                    teacher_outputs = self.teacher(self.tokens)
            loss = self.variant.loss(self.student(self.tokens), teacher_outputs, self.labels)
        loss.backward()
        nn.utils.clip_grad_norm_(self.weights, 1.0)
        self.optimizer.step()


def _losses(
    stages: Stages, student: Any, teacher: Any, tokens: Tensor
) -> dict[str, Callable[[], object]]:
    """Forward and backward of the loss alone, from logits that are there."""
    with torch.no_grad(), _autocast(stages):
        s, t = (Language(model, linear=False)(tokens) for model in (student, teacher))

    def run(name: str) -> Callable[[], object]:
        def loss() -> None:
            with _autocast(stages):
                value = VARIANTS[name].loss(s.detach().requires_grad_(), t, None)
            value.backward()

        return loss

    return {name: run(name) for name in (EAGER, DENSE)}


def _autocast(stages: Stages) -> Any:
    return torch.autocast(stages.device.type, stages.amp, enabled=stages.amp is not None)


def batch(stages: Stages, name: str = EAGER) -> tuple[Tensor, Tensor]:
    """The first one of a training."""
    samples = stages.batches(name, 1)
    rows = [samples[i] for i in range(len(samples))]
    tokens, labels = (torch.stack(column) for column in zip(*rows, strict=True))
    return tokens.to(stages.device), labels.to(stages.device)


def seconds_of(run: Callable[[], object], device: torch.device) -> float:
    _wait(device)
    begun = time.perf_counter()
    run()
    _wait(device)
    return time.perf_counter() - begun


def _wait(device: torch.device) -> None:
    if device.type != "cpu":
        torch.get_device_module(device).synchronize(device)
