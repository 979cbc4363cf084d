"""The demonstration from start to end, each stage kept on disk."""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from fastkd.distill.serialization import in_lines, needed

from . import corpus, estimate, held_out, measure, page, report
from .model import USER, export, parameters
from .presets import DEFAULT, PRESETS, Preset
from .stages import CACHED, DENSE, EAGER, HARD, LINEAR, TEACHER, VARIANTS, Stages

RESULT, SETTINGS, SECONDS = "result.json", "demo.json", "seconds.json"
PLOT, PAGE, STUDENT = "demo.png", "demo.html", "student"
VERSION = 2  # of what is kept in the folder
KEPT = (
    *(SETTINGS, RESULT, SECONDS, PLOT, PAGE, STUDENT, "tokenizer.json", "tokens.safetensors"),
    *("checkpoints", "cache", "cache.json", "measured.json", "scores.json", "samples.json"),
    *("seeds", "estimates.json"),
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
    seeds: int = 1,
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
        out: folder of all results: demo.html, demo.png, result.json, student/ (for transformers),
            and what a resumed run needs.
        seed: of weights, batches and draws.
        seeds: of so many the gain is measured, from `seed` on. The teacher is the same for all.
        fresh: forget what `out` holds.
        device: None for a GPU if there is one.
        progress: print stages and show bars, on stderr.

    Returns:
        The result as in result.json: "rows" of teacher and students, "gains" by seed, "thresholds",
        "samples", ...

    Raises:
        ImportError: transformers, tokenizers, safetensors, numpy or matplotlib is missing.
        FileNotFoundError, ValueError: no text there, one too small, an `out` of other settings,
            seeds below 1.
    """
    if seeds < 1:
        raise ValueError(f"seeds: got {seeds}, expected 1 or more")
    sizes = PRESETS[preset] if isinstance(preset, str) else preset
    for module in ("transformers", "tokenizers", "safetensors", "numpy", "matplotlib"):
        needed(module, USER, corpus.EXTRA)
    where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    folder = Path(out)
    if path is not None and not path.exists():
        raise FileNotFoundError(f"path: got {str(path)!r}, which is not there")
    _settle(folder, sizes, path, seed, fresh)
    clock = Clock(folder / SECONDS, progress)
    with clock.stage("text", "it is read, a BPE is trained, a tenth held out; a few seconds"):
        text = corpus.load(path, folder, sizes.vocab, sizes.characters, sizes.context + 1)
    if progress and text.vocab < sizes.vocab:
        print(f"a vocabulary of {text.vocab}: the text has no {sizes.vocab}", file=sys.stderr)
    stages = Stages(sizes, text, folder, seed, where, progress)
    with quiet():
        with clock.stage("estimate", "one step of every model is timed; a few seconds"):
            seconds = _kept(folder / "estimates.json", lambda: estimate.seconds(stages))
        clock.expect(seconds, seeds)
        models = _models(stages, clock)
        with clock.stage("held-out text", "every model reads it"):
            scores = _kept(folder / "scores.json", lambda: held_out.evaluate(stages, models))
        with clock.stage("measurements", "time and memory of a student's step, in turns"):
            figures = _kept(
                folder / "measured.json",
                lambda: measure.measured(stages, stages.model(LINEAR), models[TEACHER]),
            )
        samples = _kept(folder / "samples.json", lambda: held_out.samples(stages, models))
        gains = {seed: scores[HARD]["nats"] - scores[LINEAR]["nats"]}
        for other in range(seed + 1, seed + seeds):
            gains[other] = _gain(stages, other, models[TEACHER], clock)
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
        "gains": gains,
    }
    found = json.loads(json.dumps(report.result(stages, figures, scores, facts)))
    _write(folder / RESULT, found)
    report.plot(found, folder / PLOT)
    page.write(found, folder / PLOT, folder / PAGE)
    return dict(found)


def _models(stages: Stages, clock: Clock) -> dict[str, Any]:
    net = stages.preset.teacher
    with clock.stage(TEACHER, f"{net.steps} steps on the text itself"):
        teacher = stages.trained(TEACHER).requires_grad_(False)
    clock.say(_reached(stages, TEACHER))
    models = {TEACHER: teacher}
    for name in (HARD, LINEAR, DENSE, CACHED, EAGER):
        share = stages.preset.eager_share if name == EAGER else 1.0
        if name == CACHED:
            about = "the teacher's outputs on the student's batches go to disk"
            with clock.stage("capture", about):
                stages.reader(teacher)
        steps = stages.steps(name, share)
        with clock.stage(f"student, {name}", f"{steps} steps: {VARIANTS[name].about}"):
            models[name] = stages.trained(name, teacher, share)
        clock.say(_reached(stages, name))
    return models


def _gain(stages: Stages, seed: int, teacher: Any, clock: Clock) -> float:
    """Held-out nats between two students of another seed: hard labels, and the same teacher."""
    folder = stages.folder / "seeds" / str(seed)
    folder.mkdir(parents=True, exist_ok=True)
    other = Stages(
        stages.preset, stages.corpus, folder, seed, stages.device, progress=stages.progress
    )
    with clock.stage(f"seed {seed}", f"{HARD} and {LINEAR} from other weights and batches"):
        models = {name: other.trained(name, teacher) for name in (HARD, LINEAR)}
        models[TEACHER] = teacher
        scores = _kept(folder / "scores.json", lambda: held_out.evaluate(other, models))
    gain = float(scores[HARD]["nats"] - scores[LINEAR]["nats"])
    clock.say(f"gain {gain:.3f} nats a token")
    return gain


def _reached(stages: Stages, name: str) -> str:
    at, nats = stages.curve(name)[-1]
    return f"after {at} steps {nats:.3f} nats a token on a part of the held-out text"


class Clock:
    """Says which stage begins and what it will take; remembers over interruptions what it took."""

    def __init__(self, path: Path, progress: bool) -> None:
        self.path, self.progress = path, progress
        kept = json.loads(path.read_text()) if path.exists() else {}
        self.seconds: dict[str, float] = kept.get("seconds", {})
        self.finished: list[str] = kept.get("finished", [])
        self.expected: dict[str, float] = {}

    @property
    def total(self) -> float:
        return sum(self.seconds.values())

    def expect(self, expected: Mapping[str, float], seeds: int = 1) -> None:
        """Seconds of each stage that is to come, and in all."""
        self.expected = dict(expected)
        whole = estimate.whole(expected, seeds)
        self.say(f"by these steps {estimate.words(whole)} in all, on this machine as busy as it is")

    def left(self, name: str) -> float | None:
        """Seconds that a stage still takes, as the finished ones were faster or slower."""
        if (expected := self.expected.get(name.split(" ")[0], self.expected.get(name))) is None:
            return None
        known = [key for key in self.finished if key in self.expected]
        said = sum(self.expected[key] for key in known)
        speed = sum(self.seconds[key] for key in known) / said if said else 1.0
        return max(0.0, expected * speed - self.seconds.get(name, 0.0))

    def say(self, text: str) -> None:
        if self.progress:
            print(f"         {text}", file=sys.stderr, flush=True)

    @contextmanager
    def stage(self, name: str, about: str) -> Iterator[None]:
        if self.progress:
            left = self.left(name)
            said = about if left is None else f"{about}; {estimate.words(left)}"
            if name in self.finished:
                said = "there from before"
            print(f"[{self.total:4.0f} s] {name}: {said}", file=sys.stderr, flush=True)
        begun = time.monotonic()
        try:
            yield
            if name not in self.finished:
                self.finished.append(name)
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.monotonic() - begun
            _write(self.path, {"seconds": self.seconds, "finished": self.finished})


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
    part.write_text(in_lines(value), encoding="utf-8")
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
