"""How long the stages will take, by one step of every model on the machine as it is."""

from __future__ import annotations

from collections.abc import Mapping

import torch

import fastkd

from .corpus import in_order
from .measure import Step, batch, seconds_of
from .model import Language
from .stages import CACHED, DENSE, EAGER, HARD, LINEAR, LOOKS, TEACHER, VARIANTS, Stages

SEED = "seed"  # a further one: two students and the held-out text


def seconds(stages: Stages) -> dict[str, float]:
    """stage -> seconds, of steps of untrained models; the first step of each is not counted."""
    preset = stages.preset
    teacher, student = stages.model(TEACHER).requires_grad_(False), stages.model(LINEAR)
    own = Step(stages, HARD, stages.model(TEACHER), teacher, *batch(stages, TEACHER))
    tokens, labels = batch(stages)
    steps = {
        name: Step(stages, name, student, teacher, tokens, labels)
        for name in VARIANTS
        if name != CACHED
    }
    hidden = Language(teacher, linear=True).eval()
    generator = torch.Generator(stages.device)

    def capture() -> None:
        with torch.no_grad():
            outputs = hidden(tokens)
            fastkd.topk_from_logits(outputs, preset.k, method="sample", generator=generator)

    def one(name: str) -> float:
        steps[name]()
        return seconds_of(steps[name], stages.device)

    own()
    step = {name: one(name) for name in steps}
    step[CACHED] = step[HARD]  # its teacher is read from disk
    capture()
    read = seconds_of(capture, stages.device)
    count = len(in_order(stages.corpus.held_out, preset.context, preset.held_out))
    # a pass over held-out text: the losses and best columns of the teacher and of five students
    look = count / preset.student.batch * (read + len(VARIANTS) * step[HARD] / 2)
    net = preset.student.steps
    # looks during a training: a step without its backward is about half of it
    looks = LOOKS * len(stages.look) / 2
    looked = looks / preset.student.batch * step[HARD]
    of_teacher = seconds_of(own, stages.device)
    found = {
        TEACHER: (preset.teacher.steps + looks / preset.teacher.batch) * of_teacher,
        "capture": net * read,
        "held-out": look,
        "measurements": (preset.repeats + 3) * sum(step.values())
        + preset.repeats * (step[EAGER] + step[DENSE]),
        SEED: net * (step[HARD] + step[LINEAR]) + 2 * looked + look / 2,
    }
    for name in VARIANTS:
        share = preset.eager_share if name == EAGER else 1.0
        found[f"student, {name}"] = stages.steps(name, share) * step[name] + share * looked
    return found


def whole(expected: Mapping[str, float], seeds: int) -> float:
    """Seconds of all stages, with `seeds - 1` further seeds."""
    return sum(expected.values()) + (seeds - 2) * expected[SEED]


def words(value: float) -> str:
    """The time as people say it."""
    if value < 90:
        return f"about {max(1, round(value))} s"
    return f"about {value / 60:.0f} min {round(value % 60, -1) % 60:.0f} s".replace(" 0 s", "")
