"""The demonstration from start to end, each stage kept on disk."""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from fastkd.distill.serialization import needed

from . import corpus, held_out, measure, report
from .model import USER, export, parameters
from .presets import DEFAULT, PRESETS, Preset
from .stages import CACHED, DENSE, EAGER, HARD, LINEAR, TEACHER, Stages

RESULT, SETTINGS, SECONDS = "result.json", "demo.json", "seconds.json"
PLOT, STUDENT = "demo.png", "student"
VERSION = 1  # of what is kept in the folder
KEPT = (
    *(SETTINGS, RESULT, SECONDS, PLOT, STUDENT, "tokenizer.json", "tokens.safetensors"),
    *("checkpoints", "cache", "cache.json", "measured.json", "scores.json", "samples.json"),
    *(
        f"{name}.{end}"
        for name in ("teacher", "hard-labels", "eager", "dense", "linear", "cached")
        for end in ("csv", "safetensors")
    ),
)


def run(
    path: Path | None = None,
    *,
    preset: str | Preset = DEFAULT,
    out: str | os.PathLike[str] = "demo",
    seed: int = 0,
    fresh: bool = False,
    device: torch.device | str | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Train a teacher and students on a text, and compare the ways to the students.

    What was done in `out` before is taken from there: an interrupted run goes on where it was, on
    the CPU to the bits of one that was not interrupted.

    Args:
        path: a text file or a folder of them; None for Python's own standard library.
        preset: a name among `PRESETS`, or sizes.
        out: folder of all results: result.json, demo.png, student/ (for transformers), and what
            a resumed run needs.
        seed: of weights, batches and draws.
        fresh: forget what `out` holds.
        device: None for a GPU if there is one.
        progress: print stages and show bars, on stderr.

    Returns:
        The result as in result.json: "rows" of teacher and students, "thresholds", "samples", ...

    Raises:
        ImportError: transformers, tokenizers, safetensors, numpy or matplotlib is missing.
        FileNotFoundError, ValueError: no text there, one too small, an `out` of other settings.
    """
    sizes = PRESETS[preset] if isinstance(preset, str) else preset
    for module in ("transformers", "tokenizers", "safetensors", "numpy", "matplotlib"):
        needed(module, USER, corpus.EXTRA)
    where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    folder = Path(out)
    if path is not None and not path.exists():
        raise FileNotFoundError(f"path: got {str(path)!r}, which is not there")
    _settle(folder, sizes, path, seed, fresh)
    clock = Clock(folder / SECONDS, progress)
    with clock.stage("text: reading, BPE, tokens"):
        text = corpus.load(path, folder, sizes.vocab, sizes.characters, sizes.context + 1)
    if progress and text.vocab < sizes.vocab:
        print(f"a vocabulary of {text.vocab}: the text has no {sizes.vocab}", file=sys.stderr)
    stages = Stages(sizes, text, folder, seed, where, progress)
    with quiet():
        models = _models(stages, clock)
        with clock.stage("held-out text"):
            scores = _kept(folder / "scores.json", lambda: held_out.evaluate(stages, models))
        with clock.stage("time and memory of a step, in turns"):
            figures = _kept(
                folder / "measured.json",
                lambda: measure.measured(stages, stages.model(LINEAR), models[TEACHER]),
            )
        with clock.stage("samples"):
            samples = _kept(folder / "samples.json", lambda: held_out.samples(stages, models))
        if not (folder / STUDENT).exists():
            export(models[LINEAR], text.tokenizer, folder / STUDENT)
    cache = json.loads((folder / "cache.json").read_text(encoding="utf-8"))
    net = sizes.student
    facts = {
        "default": sizes == PRESETS[DEFAULT] and path is None,
        "parameters": {
            TEACHER: parameters(models[TEACHER]),
            "student": parameters(models[LINEAR]),
        },
        "cache": {**cache, "tokens": net.steps * net.batch * sizes.context},
        "seconds": clock.total,
        "stages": clock.seconds,
        "samples": samples,
    }
    found = report.result(stages, figures, scores, facts)
    _write(folder / RESULT, found)
    report.plot(found, folder / PLOT)
    return json.loads(json.dumps(found))


def _models(stages: Stages, clock: Clock) -> dict[str, Any]:
    with clock.stage("teacher, on hard labels"):
        teacher = stages.trained(TEACHER).requires_grad_(False)
    models = {TEACHER: teacher}
    for name in (HARD, LINEAR, DENSE, CACHED, EAGER):
        share = stages.preset.eager_share if name == EAGER else 1.0
        if name == CACHED:
            with clock.stage("the teacher's outputs to disk"):
                stages.reader(teacher)
        with clock.stage(f"student, {name}"):
            models[name] = stages.trained(name, teacher, share)
    return models


class Clock:
    """Says which stage begins, and remembers over interruptions how long each took."""

    def __init__(self, path: Path, progress: bool) -> None:
        self.path, self.progress = path, progress
        known = path.exists()
        self.seconds: dict[str, float] = json.loads(path.read_text()) if known else {}

    @property
    def total(self) -> float:
        return sum(self.seconds.values())

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        if self.progress:
            print(f"[{self.total:4.0f} s] {name}", file=sys.stderr, flush=True)
        begun = time.monotonic()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.monotonic() - begun
            _write(self.path, self.seconds)


def _settle(folder: Path, sizes: Preset, path: Path | None, seed: int, fresh: bool) -> None:
    """ValueError where the folder holds a run of other settings."""
    text = "the standard library" if path is None else str(path.resolve())
    requested = {"version": VERSION, "text": text, "seed": seed, **sizes.as_dict()}
    file = folder / SETTINGS
    if fresh:
        for name in KEPT:
            kept = folder / name
            shutil.rmtree(kept) if kept.is_dir() else kept.unlink(missing_ok=True)
    if file.exists():
        written = json.loads(file.read_text(encoding="utf-8"))
        if other := [key for key, value in requested.items() if written.get(key) != value]:
            key = other[0]
            raise ValueError(
                f"out: got {str(folder)!r} with a run of {key} {written.get(key)!r}, expected "
                f"{requested[key]!r}: give another --out, or --fresh to begin anew"
            )
        return
    folder.mkdir(parents=True, exist_ok=True)
    _write(file, requested)


def _kept(file: Path, make: Callable[[], Any]) -> Any:
    """The content of `file`, made now if the file is not there."""
    if not file.exists():
        _write(file, make())
    return json.loads(file.read_text(encoding="utf-8"))


def _write(file: Path, value: Any) -> None:
    part = file.with_name(f".{file.name}.tmp")
    part.write_text(json.dumps(value, indent=1), encoding="utf-8")
    os.replace(part, file)


@contextmanager
def quiet() -> Iterator[None]:
    """Without transformers' warnings of models made from scratch, and its bars."""
    logs = needed("transformers", USER, corpus.EXTRA).utils.logging
    level, bars = (
        logs.get_verbosity(),
        logs.is_progress_bar_enabled(),
    )
    logs.set_verbosity_error()
    logs.disable_progress_bar()
    try:
        yield
    finally:
        logs.set_verbosity(level)
        if bars:
            logs.enable_progress_bar()
