"""The losses' cases: their inputs and shapes, and the traffic that none of them can avoid.

A case is data. Whether the gradient is new or written over the student's logits is not a case but
a provider (`fastkd` and `fastkd-inplace`): so both are timed in the same rounds, against the same
run of plain torch, which has no such choice.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import fastkd
from bench.harness.family import Shape
from fastkd.divergence import Divergence

# One pass over N x V logits in memory is a stream. These are the floor: no way of computing the
# loss can do with less, and a fused kernel that holds a row in cache does no more.
FORWARD_STREAMS = ("read student", "read teacher")
TRAINING_STREAMS = ("read student", "read teacher", "write gradient")

# Distillation is done at T > 1; at T = 1 plain torch could leave out its two divisions.
TEMPERATURE = 2.0

LABEL_BYTES = 8  # int64


class Inputs(NamedTuple):
    """Logits [N, V] of both sides or a stored teacher, and labels [N] where the case has them."""

    student: Tensor
    teacher: Any
    labels: Tensor | None


@dataclass(frozen=True)
class Case:
    """A public function with its options; `--list` prints it.

    Args:
        name: the public function's name; the divergence's own where it has no function.
        divergence: the entry of the table, its parameter set.
        options: keyword arguments of the call.
        alpha: weight of the hard labels; None where there are none.
    """

    name: str
    divergence: Divergence
    options: dict[str, Any] = field(default_factory=dict)
    alpha: float | None = None
    temperature: float = TEMPERATURE

    @property
    def function_name(self) -> str:
        return self.name if hasattr(fastkd, self.name) else "distillation_loss"

    @property
    def function(self) -> Callable[..., Tensor]:
        return getattr(fastkd, self.function_name)

    @property
    def call(self) -> str:
        """The measured call as a user writes it."""
        operands = "student, teacher" + (", labels" if self.alpha is not None else "")
        options = "".join(f", {name}={value!r}" for name, value in self.options.items())
        return f"fastkd.{self.function_name}({operands}{options})"

    def at(self, temperature: float) -> Case:
        """The same case at another temperature."""
        options = {**self.options, "temperature": temperature}
        return replace(self, options=options, temperature=temperature)

    def outcomes(self, student: Tensor, teacher: Any) -> tuple[Tensor, Tensor]:
        """(log p, log q) of the outcomes over which the divergence is a sum, in plain torch."""
        logp, logq = (F.log_softmax(x / self.temperature, -1) for x in (teacher, student))
        return logp, logq

    @property
    def soft(self) -> float:
        """Factor of the divergence: Hinton's (1 - alpha) T^2 where there is a hard term."""
        return 1.0 if self.alpha is None else (1.0 - self.alpha) * self.temperature**2

    def make_inputs(
        self, shape: Shape, dtype: torch.dtype, device: torch.device, seed: int
    ) -> Inputs:
        """Normal logits of standard deviation 3, both sides independent.

        No row is ignored: the floor counts every row, and what is skipped would flatter fastkd.
        """
        generator = torch.Generator(device).manual_seed(seed)

        def logits() -> Tensor:
            size = (shape.rows, shape.vocab)
            return torch.randn(size, generator=generator, dtype=dtype, device=device).mul_(3)

        student, teacher = logits(), logits()
        if self.alpha is None:
            return Inputs(student, teacher, None)
        size = (shape.rows,)
        labels = torch.randint(0, shape.vocab, size, generator=generator, device=device)
        return Inputs(student, teacher, labels)

    def floor_bytes(self, shape: Shape, dtype: torch.dtype, gradient: bool) -> int:
        """Bytes that have to move: 3 streams of logits with the gradient, 2 without, and labels.

        In place or new, the gradient is written once: in place saves room, not traffic.
        """
        streams = TRAINING_STREAMS if gradient else FORWARD_STREAMS
        labels = 0 if self.alpha is None else shape.rows * LABEL_BYTES
        return len(streams) * logits_bytes(shape, dtype) + labels


@dataclass(frozen=True)
class TopKCase(Case):
    """A divergence against a teacher that was stored as its k best columns and one bucket."""

    k: int = 64

    @property
    def function_name(self) -> str:
        return FUNCTIONS[self.divergence.name]

    @property
    def call(self) -> str:
        kept = f"fastkd.topk_from_logits(teacher, {self.k}, temperature={self.temperature:g})"
        return f"fastkd.{self.function_name}(student, {kept}, temperature={self.temperature:g})"

    def make_inputs(
        self, shape: Shape, dtype: torch.dtype, device: torch.device, seed: int
    ) -> Inputs:
        student, teacher, labels = super().make_inputs(shape, dtype, device, seed)
        k = min(self.k, shape.vocab)
        kept = fastkd.topk_from_logits(teacher, k, temperature=self.temperature)
        return Inputs(student, kept, labels)

    def outcomes(self, student: Tensor, teacher: Any) -> tuple[Tensor, Tensor]:
        logq = F.log_softmax(student / self.temperature, -1).gather(-1, teacher.indices.long())
        rest = torch.log1p(-logq.exp().sum(-1).clamp(max=1 - torch.finfo(logq.dtype).eps))
        logp = torch.cat((teacher.logprobs, teacher.tail_logprob.unsqueeze(-1)), -1)
        return logp.to(logq.dtype), torch.cat((logq, rest.unsqueeze(-1)), -1)

    def floor_bytes(self, shape: Shape, dtype: torch.dtype, gradient: bool) -> int:
        """Bytes that have to move: the student's logits and their gradient, and what is stored."""
        stored = shape.rows * (min(self.k, shape.vocab) * (4 + 4) + 4)
        return (2 if gradient else 1) * logits_bytes(shape, dtype) + stored


@dataclass(frozen=True)
class WrittenCase(Case):
    """A divergence as training code writes it: with a factor, or a cross-entropy beside it.

    Args:
        factor: of the divergence in the whole, as `factored` spells it.
    """

    factor: float = 1.0
    factored: str = ""

    @property
    def bare(self) -> Callable[..., Tensor]:
        """The loss alone, which all that is written behind it should not cost."""
        return getattr(fastkd, FUNCTIONS[self.divergence.name])

    @property
    def function(self) -> Callable[..., Tensor]:
        return self._written

    def _written(
        self, student: Tensor, teacher: Tensor, labels: Tensor | None = None, **options: Any
    ) -> Tensor:
        value = self.factor * self.bare(student, teacher, **options)
        if labels is None:
            return value
        return value + (self.alpha or 0.0) * F.cross_entropy(student, labels)

    @property
    def call(self) -> str:
        name = FUNCTIONS[self.divergence.name]
        written = f"fastkd.{name}(student, teacher, temperature={self.temperature:g})"
        hard = f"{self.alpha} * F.cross_entropy(student, labels) + " if self.alpha else ""
        return hard + written + self.factored

    @property
    def soft(self) -> float:
        return self.factor


def logits_bytes(shape: Shape, dtype: torch.dtype) -> int:
    """Bytes of one side's logits."""
    return shape.rows * shape.vocab * dtype.itemsize


# The public function of a divergence's own.
FUNCTIONS = {
    name: public
    for name in fastkd.divergences
    for public in fastkd.__all__
    if re.fullmatch(f"{name}_(div|distance|loss)", public)
}
# Divergences whose gradient jumps where p = q.
KINKED = ("tv", "acceptance")


def bare(entry: Divergence) -> Case:
    """A divergence by itself; one that is new in the table goes through distillation_loss."""
    options: dict[str, Any] = {"temperature": TEMPERATURE}
    if entry.name not in FUNCTIONS:
        options |= {"divergence": entry.name, "alpha": 0.0, "t_squared": False}
        return Case(entry.name, entry, options)
    if entry.parameter:
        options[entry.parameter] = entry.param
    return Case(FUNCTIONS[entry.name], entry, options)


T = TEMPERATURE
STEPS, LOSS_SCALE = 8, 65536.0  # of gradient accumulation; of a loss scaler's start

CASES: dict[str, Case] = {
    case.name: case
    for case in (
        *(
            WrittenCase(
                *(f"kl_div, {name}", fastkd.divergences.kl, {"temperature": T}, alpha),
                factor=factor,
                factored=factored,
            )
            for name, alpha, factor, factored in (
                ("T^2", None, T * T, " * T * T"),
                ("mixed", 0.5, 0.5 * T * T, " * T * T * 0.5"),
                ("accumulated", None, T * T / STEPS, f" * T * T / {STEPS}"),
                ("scaled", None, T * T * LOSS_SCALE, f" * T * T * {LOSS_SCALE:.0f}"),
            )
        ),
        *(bare(fastkd.divergences[name]) for name in fastkd.divergences),
        Case(
            "distillation_loss",
            fastkd.divergences.kl,
            {"temperature": TEMPERATURE, "alpha": 0.5},
            alpha=0.5,
        ),
        TopKCase("kl_div_top64", fastkd.divergences.kl, {"temperature": TEMPERATURE}),
    )
}

DENSE = {
    name: case for name, case in CASES.items() if not isinstance(case, (TopKCase, WrittenCase))
}

SMALL_SHAPES = (
    Shape(1, 10, "one row of ten classes: the cost of the call itself"),
    Shape(64, 10, "a classifier's batch"),
    Shape(128, 100, "a classifier with 100 classes"),
    Shape(128, 1000, "ImageNet's classes"),
)
CPU_SHAPES = (
    Shape(512, 32_000, "the vocabulary of Llama 2; larger than a core's own caches"),
    Shape(256, 128_256, "the vocabulary of Llama 3"),
)
_GPU_VOCABS = {
    32_000: "Llama 2",
    50_257: "GPT-2, divisible by no vector width",
    128_256: "Llama 3",
    151_936: "Qwen 2",
    256_000: "Gemma",
}
_GPU_ROWS = {
    64: "fewer rows than multiprocessors",
    512: "a few rows for each multiprocessor",
    4096: "one sequence of 4096 tokens",
    8192: "a training batch",
}
GPU_SHAPES = tuple(
    Shape(rows, vocab, f"{of}; {why}")
    for vocab, of in _GPU_VOCABS.items()
    for rows, why in _GPU_ROWS.items()
)
TOY_SHAPE = Shape(3, 37, "tiny and divisible by nothing: does it run at all")

SHAPE_SETS: dict[str, tuple[Shape, ...]] = {
    "small": SMALL_SHAPES,
    "cpu": CPU_SHAPES,
    "gpu": GPU_SHAPES,
    "toy": (TOY_SHAPE,),
}
