"""Teachers made of others: several as one, peers that learn, and whatever a user may give."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .batch import (
    Batch,
    Outputs,
    bare_state,
    forward,
    load_bare_state,
    unwrap,
)
from .distributed import Ranks
from .hooks import Hooks
from .objective import Objective
from .optimizers import check_optimizer
from .teachers import MADE_OF, Teacher, as_teacher


class PeerTeacher(Teacher):
    """A model that learns while it teaches: its loss has the student as its teacher.

    Its gradients are not scaled: with amp, bfloat16 suits it and float16 does not. Where several
    ranks train the student, they train the peer too, which must begin alike on all of them.

    Args:
        model: module; trains in train mode.
        loss: as the trainer's, with the peer as student and the student as teacher.
        optimizer: over the peer's parameters; None makes AdamW at `lr`.
        lr: learning rate of the AdamW made here.

    Paper: Zhang et al. 2018, deep mutual learning, arXiv 1706.00384.
    """

    reads_batch = False

    def __init__(
        self,
        model: nn.Module,
        loss: Any,
        *,
        optimizer: torch.optim.Optimizer | None = None,
        lr: float = 1e-3,
    ) -> None:
        self.model, self.objective = model, Objective(loss)
        self.models = [model, self.objective.modules]
        self.student_layers = self.objective.teacher_layers
        learnt = [p for m in self.models for p in m.parameters() if p.requires_grad]
        if optimizer is not None:
            check_optimizer(optimizer, learnt)
        self.optimizer = torch.optim.AdamW(learnt, lr=lr) if optimizer is None else optimizer
        self._hooks = Hooks(model, ())
        self._outputs: Outputs | None = None

    def begin(self) -> None:
        self.model.train()
        self.optimizer.zero_grad(set_to_none=True)

    @contextmanager
    def hooked(self, names: tuple[str, ...]) -> Iterator[None]:
        with Hooks(self.model, (*names, *self.objective.student_layers)) as self._hooks:
            yield
        self._hooks = Hooks(self.model, ())

    def __call__(self, batch: Batch) -> Outputs:
        inputs = batch.inputs if batch.teacher_inputs is None else batch.teacher_inputs
        self._outputs = Outputs(forward(self.model, inputs), self._hooks.take(), role="teacher")
        return self._outputs.detach()

    def follow(self, student: Outputs, batch: Batch) -> None:
        assert self._outputs is not None
        value, _ = self.objective(self._outputs, student.detach(), batch)
        with torch.autocast(value.device.type, enabled=False):  # backward has its own dtypes
            value.backward()
        self._outputs = None

    def step(self, student: nn.Module) -> None:
        ranks = Ranks(student)
        for model in self.models:
            if Ranks(model).size == 1:  # else its own wrapper has done it
                ranks.average_gradients(model)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def state_dict(self) -> dict[str, Any]:
        return {
            "model": bare_state(self.model),
            "modules": bare_state(self.objective.modules),
            "optimizer": self.optimizer.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        load_bare_state(self.model, state["model"])
        load_bare_state(self.objective.modules, state["modules"])
        self.optimizer.load_state_dict(state["optimizer"])

    def identity(self) -> Any:
        return ["PeerTeacher", type(unwrap(self.model)).__name__]


class EnsembleTeacher(Teacher):
    """Several teachers as one: the weighted mean of their logits, or of their probabilities.

        logits = sum_i w_i t_i                               (temperature None)
        logits = T log sum_i w_i softmax(t_i / T)            (softmax(logits / T) is the mean)

    Each one's own outputs are in `Outputs.members`. A `PeerTeacher` among them
    learns from the mean over the student and the other members. Layers are named "0.layer" for the
    first one's "layer".

    Args:
        teachers: modules or sources.
        weights: one non-negative number each, scaled to sum to 1; None for equal ones.
        temperature: of the mean of probabilities; None for the mean of logits.

    Paper: You et al. 2017, learning from multiple teacher networks.
    """

    def __init__(
        self,
        teachers: Sequence[Any],
        weights: Sequence[float] | None = None,
        *,
        temperature: float | None = None,
    ) -> None:
        if not teachers:
            raise ValueError("teachers: got none, expected one or more")
        self.members = self._teachers = [as_teacher(teacher) for teacher in teachers]
        weights = [1.0] * len(teachers) if weights is None else list(weights)
        if len(weights) != len(teachers) or min(weights) < 0 or sum(weights) <= 0:
            raise ValueError(
                f"weights: got {weights}, expected {len(teachers)} numbers >= 0, not all 0"
            )
        self.weights = [w / sum(weights) for w in weights]
        self.temperature = temperature
        self.models = [model for member in self.members for model in member.models]
        self.student_layers = tuple(
            layer for member in self.members for layer in member.student_layers
        )
        self.reads_batch = any(member.reads_batch for member in self.members)
        self._member_outputs: list[Outputs] = []

    @property
    def ahead_by(self) -> int | None:  # type: ignore[override]
        counts = [x.ahead_by for x in self.members if x.ahead_by is not None]
        return max(counts, default=None)

    def expect(self, batch: Batch) -> None:
        for member in self.members:
            member.expect(batch)

    def bind(self, student: nn.Module) -> None:
        for member in self.members:
            member.bind(student)
        self.models = [model for member in self.members for model in member.models]

    def beside(self, student: nn.Module) -> None:
        peers = [
            m for member in self.members if isinstance(member, PeerTeacher) for m in member.models
        ]
        for member in self.members:
            member.beside(nn.ModuleList([student, *peers]))

    def begin(self) -> None:  # what a frozen one shares with a peer is in the peer's mode
        for member in sorted(self.members, key=lambda member: isinstance(member, PeerTeacher)):
            member.begin()

    @contextmanager
    def hooked(self, names: tuple[str, ...]) -> Iterator[None]:
        places = [name.partition(".") for name in names]
        known = [str(at) for at in range(len(self.members))]
        if wrong := [head + dot + rest for head, dot, rest in places if head not in known]:
            raise ValueError(
                f"layer: got {wrong} of {len(known)} teachers, expected a number in front: "
                "'0.layer'"
            )
        with ExitStack() as stack:
            for at, member in enumerate(self.members):
                member_layers = tuple(rest for head, _, rest in places if head == str(at))
                stack.enter_context(member.hooked(member_layers))
            yield

    def __call__(self, batch: Batch) -> Outputs:
        self._member_outputs = [member(batch) for member in self.members]
        return self._mean(self._member_outputs, self.weights)

    def follow(self, student: Outputs, batch: Batch) -> None:
        for at, member in enumerate(self.members):
            if type(member).follow is Teacher.follow:
                continue  # does not learn: a student of several heads has no logits to average
            others = [student.detach(), *(o for i, o in enumerate(self._member_outputs) if i != at)]
            member.follow(self._mean(others, [1 / len(others)] * len(others)), batch)

    def step(self, student: nn.Module) -> None:
        for member in self.members:
            member.step(student)

    def state_dict(self) -> dict[str, Any]:
        return {str(at): member.state_dict() for at, member in enumerate(self.members)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for at, member in enumerate(self.members):
            member.load_state_dict(state[str(at)])

    def identity(self) -> Any:
        pairs = zip(self.members, self.weights, strict=True)
        return [self.temperature, [[member.identity(), w] for member, w in pairs]]

    def _mean(self, outputs: list[Outputs], weights: list[float]) -> Outputs:
        T, logits = self.temperature, [each.logits for each in outputs]
        if other := [type(x).__name__ for x in logits if not isinstance(x, Tensor)]:
            raise TypeError(
                f"teachers: got {other[0]} of {len(other)} of {len(logits)} teachers, expected "
                "tensors of logits: the mean of columns that one names and another does not is not "
                "known; {name: teacher} chooses one for each sample, and takes them"
            )
        shapes = [list(x.shape) for x in logits if isinstance(x, Tensor)]
        if any(shape != shapes[0] for shape in shapes):
            raise ValueError(
                f"teachers: got logits {shapes}, expected equal shapes: the same classes in "
                "the same order"
            )
        if T is None:
            mean = sum(w * x for w, x in zip(weights, logits, strict=True))
        else:
            log_p = torch.stack([F.log_softmax(x.float() / T, -1) for x in logits])
            log_w = torch.tensor(weights, device=log_p.device).log()
            mean = T * (log_p + log_w.view(-1, *[1] * (log_p.dim() - 1))).logsumexp(0)
        features = {f"{i}.{k}": v for i, o in enumerate(outputs) for k, v in o.features.items()}
        return Outputs(mean, features, tuple(outputs))


MADE_OF[list] = MADE_OF[tuple] = EnsembleTeacher
