"""Teacher sources behind one protocol: live models, several, a peer, an average, stored outputs."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .batch import Batch, Outputs, forward, mapped, tensors, to, unwrap
from .taps import Taps
from .terms import Objective


class Teacher:
    """What the trainer asks of a teacher. Override `__call__`; the rest has a default.

    Attributes:
        models: modules moved to the device, given their modes back, and kept out of the student's
            optimizer.
        student_taps: names of student modules whose outputs `follow` needs.
    """

    models: Sequence[nn.Module] = ()
    student_taps: tuple[str, ...] = ()

    def __call__(self, batch: Batch) -> Outputs:
        """What the teacher says of a micro-batch, without gradient; called once for each."""
        raise NotImplementedError

    @contextmanager
    def tapped(self, names: tuple[str, ...]) -> Iterator[None]:
        """A context in which outputs hold the features of the named modules."""
        if names:
            raise ValueError(
                f"tap: got {list(names)} of {type(self).__name__}, which has no modules"
            )
        yield

    def begin(self) -> None:
        """At the start of an epoch."""

    def follow(self, student: Outputs, batch: Batch) -> None:
        """After the student's backward on a micro-batch: detach what is used of its outputs."""

    def step(self, student: nn.Module) -> None:
        """After the student's optimizer step."""

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs, of what changes during training."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take `state_dict` back."""

    def identity(self) -> Any:
        """JSON value that says which teacher this is; a resumed run must have the same."""
        return type(self).__name__


class Live(Teacher):
    """A frozen model: eval mode (asserted again and again), no gradient."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.models = [model]
        self._taps = Taps(model, ())

    def begin(self) -> None:
        self.model.eval()
        for name, part in self.model.named_modules():
            if part.training:
                raise ValueError(f"teacher: got {name or 'a model'} in train mode after eval()")

    def __call__(self, batch: Batch) -> Outputs:
        if self.model.training:  # whoever else holds it may have switched it
            self.model.eval()
        inputs = batch.inputs if batch.teacher_inputs is None else batch.teacher_inputs
        with torch.no_grad():
            raw = forward(self.model, inputs)
        return Outputs(raw, self._taps.take())

    @contextmanager
    def tapped(self, names: tuple[str, ...]) -> Iterator[None]:
        with Taps(self.model, names) as self._taps:
            yield
        self._taps = Taps(self.model, ())

    def identity(self) -> Any:
        return [type(unwrap(self.model)).__name__, fingerprint(self.model)]


class Average(Live):
    """An exponential moving average of the student: as a teacher, or beside one (`ema=`).

        w <- decay * w + (1 - decay) * w_student   after every step; buffers are copied

    Args:
        student: copied as it is now.
        decay: in [0, 1).

    The average is `self.model`.
    Paper: Tarvainen and Valpola 2017, arXiv 1703.01780.
    """

    def __init__(self, student: nn.Module, decay: float = 0.999) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"decay: got {decay!r}, expected a number in [0, 1)")
        super().__init__(copy.deepcopy(unwrap(student)).requires_grad_(False))
        self.decay = decay

    @torch.no_grad()
    def step(self, student: nn.Module) -> None:
        bare = unwrap(student)
        mine, theirs = tuple(self.model.parameters()), tuple(bare.parameters())
        torch._foreach_lerp_(mine, theirs, 1 - self.decay)
        for a, b in zip(self.model.buffers(), bare.buffers(), strict=True):
            a.copy_(b)

    def state_dict(self) -> dict[str, Any]:
        return self.model.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state)

    def identity(self) -> Any:
        return ["Average", self.decay]


class Peer(Teacher):
    """A model that learns while it teaches: its loss has the student as its teacher.

    Its gradients are not scaled: with amp, bfloat16 suits it and float16 does not.

    Args:
        model: module; trains in train mode.
        loss: as the trainer's, with the peer as student and the student as teacher.
        optimizer: over the peer's parameters; None makes AdamW at `lr`.
        lr: learning rate of the AdamW made here.

    Paper: Zhang et al. 2018, deep mutual learning, arXiv 1706.00384.
    """

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
        self.student_taps = self.objective.teacher_taps
        learnt = [p for m in self.models for p in m.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(learnt, lr=lr) if optimizer is None else optimizer
        self._taps = Taps(model, ())
        self._mine: Outputs | None = None

    def begin(self) -> None:
        self.model.train()
        self.optimizer.zero_grad(set_to_none=True)

    @contextmanager
    def tapped(self, names: tuple[str, ...]) -> Iterator[None]:
        with Taps(self.model, (*names, *self.objective.student_taps)) as self._taps:
            yield
        self._taps = Taps(self.model, ())

    def __call__(self, batch: Batch) -> Outputs:
        inputs = batch.inputs if batch.teacher_inputs is None else batch.teacher_inputs
        self._mine = Outputs(forward(self.model, inputs), self._taps.take())
        return self._mine.detach()

    def follow(self, student: Outputs, batch: Batch) -> None:
        assert self._mine is not None
        value, _ = self.objective(self._mine, student.detach(), batch)
        with torch.autocast(value.device.type, enabled=False):  # backward has its own dtypes
            value.backward()
        self._mine = None

    def step(self, student: nn.Module) -> None:
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def state_dict(self) -> dict[str, Any]:
        return {
            "model": unwrap(self.model).state_dict(),
            "modules": self.objective.modules.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        unwrap(self.model).load_state_dict(state["model"])
        self.objective.modules.load_state_dict(state["modules"])
        self.optimizer.load_state_dict(state["optimizer"])

    def identity(self) -> Any:
        return ["Peer", type(unwrap(self.model)).__name__]


class Several(Teacher):
    """Several teachers as one: the weighted mean of their logits, or of their probabilities.

        logits = sum_i w_i t_i                               (temperature None)
        logits = T log sum_i w_i softmax(t_i / T)            (softmax(logits / T) is the mean)

    Each one's own outputs are in `Outputs.members`. A `Peer` among them learns from the mean over
    the student and the other members. Taps are named "0.layer" for the first one's "layer".

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
        self.members = [source(teacher) for teacher in teachers]
        weights = [1.0] * len(teachers) if weights is None else list(weights)
        if len(weights) != len(teachers) or min(weights) < 0 or sum(weights) <= 0:
            raise ValueError(
                f"weights: got {weights}, expected {len(teachers)} numbers >= 0, not all 0"
            )
        self.weights = [w / sum(weights) for w in weights]
        self.temperature = temperature
        self.models = [model for member in self.members for model in member.models]
        self.student_taps = tuple(tap for member in self.members for tap in member.student_taps)
        self._said: list[Outputs] = []

    def begin(self) -> None:
        for member in self.members:
            member.begin()

    @contextmanager
    def tapped(self, names: tuple[str, ...]) -> Iterator[None]:
        places = [name.partition(".") for name in names]
        known = [str(at) for at in range(len(self.members))]
        if wrong := [head + dot + rest for head, dot, rest in places if head not in known]:
            raise ValueError(
                f"tap: got {wrong} of {len(known)} teachers, expected a number in front: '0.layer'"
            )
        with ExitStack() as stack:
            for at, member in enumerate(self.members):
                mine = tuple(rest for head, _, rest in places if head == str(at))
                stack.enter_context(member.tapped(mine))
            yield

    def __call__(self, batch: Batch) -> Outputs:
        self._said = [member(batch) for member in self.members]
        return self._mean(self._said, self.weights)

    def follow(self, student: Outputs, batch: Batch) -> None:
        for at, member in enumerate(self.members):
            others = [student.detach(), *(o for i, o in enumerate(self._said) if i != at)]
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

    def _mean(self, said: list[Outputs], weights: list[float]) -> Outputs:
        T, logits = self.temperature, [outputs.logits for outputs in said]
        if T is None:
            mean = sum(w * x for w, x in zip(weights, logits, strict=True))
        else:
            log_p = torch.stack([F.log_softmax(x.float() / T, -1) for x in logits])
            log_w = torch.tensor(weights, device=log_p.device).log()
            mean = T * (log_p + log_w.view(-1, *[1] * (log_p.dim() - 1))).logsumexp(0)
        features = {f"{i}.{k}": v for i, o in enumerate(said) for k, v in o.features.items()}
        return Outputs(mean, features, tuple(said))


class Called(Teacher):
    """Any function of the inputs, run without gradient: a server's client, a formula."""

    def __init__(self, function: Callable[[Any], Any]) -> None:
        self.function = function

    def __call__(self, batch: Batch) -> Outputs:
        inputs = batch.inputs if batch.teacher_inputs is None else batch.teacher_inputs
        with torch.no_grad():
            return Outputs(self.function(inputs)).detach()

    def identity(self) -> Any:
        function = self.function
        return ["Called", getattr(function, "__qualname__", type(function).__name__)]


class Stored(Teacher):
    """Outputs made beforehand: those that came with the batch, or a lookup by sample.

    A loader brings them as `Batch.teacher` (the entry "teacher" of a dict); else the samples'
    numbers, `batch.extra["index"]` int [B], choose rows of `reader`.

    Args:
        reader: map-style, number -> logits [..., V] or an operand such as a top-k teacher of one
            sample; its `identity`, an attribute or a method, goes into checkpoints. None where
            every batch brings its own.
    """

    def __init__(self, reader: Any = None) -> None:
        self.reader = reader

    def __call__(self, batch: Batch) -> Outputs:
        if batch.teacher is not None:
            return Outputs(batch.teacher)
        if self.reader is None or "index" not in batch.extra:
            raise ValueError(
                "teacher: got a batch without 'teacher' and without 'index', expected one of them "
                "for stored outputs"
            )
        rows = [self.reader[i] for i in batch.extra["index"].tolist()]
        device = next(tensors(batch.inputs)).device
        return Outputs(to(stacked(rows), device))

    def identity(self) -> Any:
        value = getattr(self.reader, "identity", None)
        return ["Stored", value() if callable(value) else value]


def source(teacher: Any) -> Teacher:
    """A `Teacher` of what a user may give: a module, several, a function, None, or a source."""
    if isinstance(teacher, Teacher):
        return teacher
    if teacher is None:
        return _FromBatch()
    if isinstance(teacher, nn.Module):
        return Live(teacher)
    if isinstance(teacher, (list, tuple)):
        return Several(teacher)
    if callable(teacher):
        return Called(teacher)
    got = type(teacher).__name__
    raise TypeError(
        f"teacher: got {got}, expected a module, a list of them, a function or a Teacher"
    )


class _FromBatch(Teacher):
    """No teacher but what batches may bring."""

    def __call__(self, batch: Batch) -> Outputs:
        return Outputs(batch.teacher)

    @contextmanager
    def tapped(self, names: tuple[str, ...]) -> Iterator[None]:
        if names:
            raise ValueError(f"teacher: got none, expected one with the taps {list(names)}")
        yield

    def identity(self) -> Any:
        return None


def on_device(said: Outputs, device: torch.device) -> Outputs:
    """`said`, or ValueError where its logits are on another device than the student."""
    there = getattr(said.logits, "device", device)
    if there != device and (there.type != device.type or device.index is not None):
        raise ValueError(f"teacher: got outputs on {there}, expected {device}")
    return said


def stacked(rows: Sequence[Any]) -> Any:
    """Samples of one kind (tensors, or operands made of tensors) as one with a batch dimension."""
    parts = [list(tensors(row)) for row in rows]
    columns = iter([torch.stack(column) for column in zip(*parts, strict=True)])
    return mapped(rows[0], lambda _: next(columns))


def fingerprint(model: nn.Module) -> str:
    """SHA-256 over names, shapes, dtypes and bytes of a model's state, in hexadecimal."""
    digest = hashlib.sha256()
    for name, value in sorted(unwrap(model).state_dict().items()):
        digest.update(json.dumps([name, str(getattr(value, "dtype", "")), None]).encode())
        if isinstance(value, Tensor):
            flat = value.detach().cpu().contiguous().view(-1)
            digest.update(json.dumps(list(value.shape)).encode())
            digest.update(bytes(flat.view(torch.uint8).numpy()))
    return digest.hexdigest()
