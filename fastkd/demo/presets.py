"""Sizes of the demonstration."""

from __future__ import annotations

from typing import Any, NamedTuple


class Net(NamedTuple):
    """A Llama and its training: sizes, steps, samples of a step, AdamW's rate."""

    hidden: int
    layers: int
    heads: int
    steps: int
    batch: int
    lr: float


class Preset(NamedTuple):
    """All sizes of one run.

    Args:
        vocab: of the BPE, at most; a small text has fewer.
        context: tokens of a sample.
        teacher, student: the two models.
        eager_share: how much of the student's steps the eager variant takes.
        k: draws of the teacher that the cache keeps of a token.
        characters: of the text, at most.
        held_out: tokens of the final evaluation, at most.
        repeats: how often each variant's step is timed.
        amp: dtype of autocast's products, "" for none.
    """

    vocab: int
    context: int
    teacher: Net
    student: Net
    eager_share: float
    k: int
    characters: int
    held_out: int
    repeats: int
    amp: str = ""

    def as_dict(self) -> dict[str, Any]:
        nets = {"teacher": self.teacher._asdict(), "student": self.student._asdict()}
        return {**self._asdict(), **nets}


PRESETS = {
    "tiny": Preset(
        vocab=512,
        context=32,
        teacher=Net(32, 2, 2, steps=40, batch=8, lr=1e-2),
        student=Net(16, 1, 2, steps=12, batch=8, lr=1e-2),
        eager_share=0.5,
        k=16,
        characters=10**6,
        held_out=2048,
        repeats=3,
    ),
    "small": Preset(
        vocab=16_384,
        context=128,
        teacher=Net(128, 3, 2, steps=700, batch=4, lr=3e-3),
        student=Net(64, 2, 2, steps=100, batch=8, lr=5e-3),
        eager_share=0.2,
        k=64,
        characters=20 * 10**6,
        held_out=16_384,
        repeats=5,
    ),
    # a GPU in earnest: head and logits as large as those of the models people train
    "gpu": Preset(
        vocab=32_768,
        context=512,
        teacher=Net(1024, 12, 16, steps=3000, batch=32, lr=6e-4),
        student=Net(512, 6, 8, steps=1000, batch=32, lr=1e-3),
        eager_share=0.2,
        k=64,
        characters=200 * 10**6,
        held_out=262_144,
        repeats=20,
        amp="bfloat16",
    ),
}
DEFAULT = "small"
