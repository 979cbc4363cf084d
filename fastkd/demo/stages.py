"""The trainings: a teacher, and one student by each way to the same loss."""

from __future__ import annotations

import csv
import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader

import fastkd
from fastkd import distill
from fastkd.teachers import store

from .corpus import Corpus, Windows, in_order, random_windows
from .model import Language, build
from .presets import Net, Preset

TEACHER = "teacher"
HARD, EAGER, DENSE, LINEAR, CACHED = "hard labels", "eager", "dense", "linear", "cached"
CHECKPOINTS = 10  # of a training, at most so many are written
LOOKS = 5  # at held-out text, during a training


def hard_loss(student: Any, _: Any, labels: Any) -> Tensor:
    """CE(labels, s): at alpha = 1 the teacher's part is not computed."""
    return fastkd.distillation_loss(student, student, labels, alpha=1.0)


def eager_loss(student: Tensor, teacher: Tensor, _: Any = None) -> Tensor:
    """KL(p, q) as plain torch writes it."""
    s, t = student.flatten(0, -2), teacher.flatten(0, -2)
    return F.kl_div(F.log_softmax(s, -1), F.softmax(t, -1), reduction="batchmean")


def fused_loss(student: Any, teacher: Any, _: Any = None) -> Tensor:
    """The same of logits, of `LinearLogits`, and of a `TopK` teacher."""
    return fastkd.kl_div(student, teacher)


class Variant(NamedTuple):
    """How a student is trained: its loss, whether heads are left to it, where the teacher is."""

    loss: Callable[[Any, Any, Any], Tensor]
    linear: bool
    teacher: str  # "", "model" or "cached"
    about: str


VARIANTS = {
    HARD: Variant(hard_loss, True, "", "cross-entropy with the text itself, no teacher"),
    EAGER: Variant(
        eager_loss, False, "model", "F.kl_div(F.log_softmax(s), F.softmax(t)) in plain torch"
    ),
    DENSE: Variant(fused_loss, False, "model", "fastkd.kl_div of logits"),
    LINEAR: Variant(
        fused_loss, True, "model", "fastkd.kl_div of LinearLogits: no logits are built"
    ),
    CACHED: Variant(
        fused_loss, True, "cached", "as linear, with tokens drawn from the teacher, kept on disk"
    ),
}


class Stages:
    """The trainings of one run, each kept in `folder` when it is done.

    Args:
        preset: sizes.
        corpus: the text.
        folder: of all results; what is there is not made again.
        seed: of weights, batches and draws.
        device: where to run.
        progress: show bars.
    """

    def __init__(
        self,
        preset: Preset,
        corpus: Corpus,
        folder: Path,
        seed: int,
        device: torch.device,
        progress: bool = True,
    ) -> None:
        self.preset, self.corpus, self.folder = preset, corpus, folder
        self.seed, self.device, self.progress = seed, device, progress
        self.amp = getattr(torch, preset.amp) if preset.amp else None
        self.look = in_order(corpus.held_out, preset.context, min(preset.held_out, 2048))

    def _net(self, name: str) -> Net:
        return self.preset.teacher if name == TEACHER else self.preset.student

    def model(self, name: str) -> Any:
        """As it is at the start: all students are the same."""
        net = self._net(name)
        seed = 2 * self.seed + (name == TEACHER)
        return build(net, self.corpus.vocab, self.preset.context, seed).to(self.device)

    def batches(self, name: str, steps: int | None = None) -> Windows:
        """A training's samples: those of all students are the same, in one order."""
        net = self._net(name)
        size, seed = net.batch, 2 * self.seed + (name == TEACHER)
        samples = random_windows(self.corpus.train, self.preset.context, net.steps * size, seed)
        samples.starts = samples.starts[: (steps or net.steps) * size]
        return samples

    def trained(self, name: str, teacher: Any = None, share: float = 1.0) -> Any:
        """The model of this name after `share` of its steps."""
        file = self.folder / f"{_file(name)}.safetensors"
        model = self.model(name)
        if file.exists():
            distill.load(model, file)
            return model
        variant = VARIANTS[HARD if name == TEACHER else name]
        self._train(name, model, self._net(name), variant, self.steps(name, share), teacher)
        distill.save(model, file)
        shutil.rmtree(self._checkpoints(name), ignore_errors=True)
        return model

    def steps(self, name: str, share: float = 1.0) -> int:
        """Of a training that takes `share` of them."""
        return max(1, round(self._net(name).steps * share))

    def _checkpoints(self, name: str) -> Path:
        return self.folder / "checkpoints" / _file(name)

    def _train(
        self, name: str, model: Any, net: Net, variant: Variant, steps: int, teacher: Any
    ) -> None:
        student = Language(model, variant.linear)
        samples: Any = self.batches(name, steps)
        source: Any = None
        if variant.teacher == "model":
            source = Language(teacher, variant.linear)
        collate = None
        if variant.teacher == "cached":
            source = self.reader(teacher)
            samples = store.Paired(self.batches(name), source)
            collate = store.collate
        loader = DataLoader(samples, batch_size=net.batch, collate_fn=collate)
        log = distill.CSVLogger(self.folder / f"{_file(name)}.csv")
        every = max(1, net.steps // LOOKS)

        def look(_: int, step: int, __: Tensor) -> None:
            if step % every == every - 1 or step == steps - 1:
                log({"held_out": cross_entropy(student, self.look)}, step)

        distill.train(
            student,
            loader,
            variant.loss,
            teacher=source,
            optimizer=torch.optim.AdamW(
                model.parameters(), lr=net.lr, betas=(0.9, 0.95), fused=True
            ),
            schedule=distill.lr_schedule(net.steps, warmup=max(1, net.steps // 20), floor=0.05),
            clip_norm=1.0,
            amp=self.amp,
            checkpoint=distill.Checkpoints(
                self._checkpoints(name), every=max(4, steps // CHECKPOINTS), keep=1, resume=True
            ),
            log=log,
            on_step=look,
            progress=self.progress,
        )

    def curve(self, name: str) -> list[tuple[int, float]]:
        """(steps made, held-out nats) of a training."""
        with (self.folder / f"{_file(name)}.csv").open(newline="", encoding="utf-8") as file:
            rows = [row for row in csv.DictReader(file) if row.get("held_out")]
        return [(int(row["step"]) + 1, float(row["held_out"])) for row in rows]

    def reader(self, teacher: Any) -> Any:
        """The teacher's outputs on the student's samples, made once and then read from disk."""
        path = self.folder / "cache"
        facts = self.folder / "cache.json"
        if not facts.exists():
            begun = time.monotonic()
            loader = DataLoader(self.batches(CACHED), batch_size=self.preset.student.batch)
            store.capture(
                Language(teacher, linear=True),
                loader,
                path,
                vocab_size=self.corpus.vocab,
                k=self.preset.k,
                method="sample",
                generator=torch.Generator(self.device).manual_seed(self.seed),
                progress=self.progress,
            )
            size = sum(file.stat().st_size for file in path.iterdir())
            seconds = time.monotonic() - begun
            facts.write_text(json.dumps({"bytes": size, "seconds": seconds}), encoding="utf-8")
        return store.Reader(path, vocab_size=self.corpus.vocab)


@torch.no_grad()
def cross_entropy(model: nn.Module, samples: Any, batch: int = 8) -> float:
    """Mean nats a token, with the head's logits a chunk at a time."""
    language: Any = model
    bare = Language(language.model, linear=True).eval()
    total = 0.0
    device = next(bare.parameters()).device
    for tokens, labels in DataLoader(samples, batch_size=batch):
        outputs = bare(tokens.to(device))
        total += hard_loss(outputs, None, labels.to(device)).item() * labels.numel()
    model.train()
    return total / (len(samples) * samples.context)


def _file(name: str) -> str:
    return name.replace(" ", "-")
