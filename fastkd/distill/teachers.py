"""Teacher sources behind one protocol: a model, its moving average, a function, cached outputs."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from fastkd.arguments.messages import MadeOf, shown

from .batch import (
    Batch,
    Outputs,
    bare_state,
    forward,
    in_eval,
    load_bare_state,
    mapped,
    tensors,
    to,
    unwrap,
)
from .distributed import class_name, full_tensor, is_dtensor, matching_shards, reshard
from .hooks import Hooks
from .serialization import array


class Teacher(MadeOf):
    """The interface between the trainer and a teacher. Override `__call__`; the rest has a default.

    Attributes:
        models: modules moved to the device, given their modes back, and kept out of the student's
            optimizer.
        student_layers: names of student modules whose outputs `follow` needs.
        reads_batch: whether `Batch.teacher` reaches it; where not, a batch with one is refused.
        ahead_by: batches that it is told of before their step; None: it is told of none.
    """

    models: Sequence[nn.Module] = ()
    student_layers: tuple[str, ...] = ()
    reads_batch: bool = True
    ahead_by: int | None = None

    def __call__(self, batch: Batch) -> Outputs:
        """The teacher's outputs on a micro-batch, without gradient; called once for each."""
        raise NotImplementedError

    @contextmanager
    def hooked(self, names: tuple[str, ...]) -> Iterator[None]:
        """A context in which outputs hold the features of the named modules."""
        if names:
            raise ValueError(
                f"layer: got {list(names)} of {type(self).__name__}, which has no modules"
            )
        yield

    def bind(self, student: nn.Module) -> None:
        """Called before a run is set up, with its student, of which a teacher may be made."""

    def beside(self, student: nn.Module) -> None:
        """Called at the start of a run; the student may share modules with the teacher."""

    def expect(self, batch: Batch) -> None:
        """Called with a batch that will come, by `ahead`; returns at once."""

    def ahead(self, batches: Iterator[Any], most: int | None = None) -> Iterator[Any]:
        """An epoch's batches; one that is asked over a network is told of `most` before their step.

        None: as many as it was made for.
        """
        most = self.ahead_by if most is None else most
        return batches if self.ahead_by is None else expected(batches, self.expect, most or 0)

    def begin(self) -> None:
        """Called at the start of an epoch."""

    def follow(self, student: Outputs, batch: Batch) -> None:
        """Called after the student's backward on a micro-batch: detach outputs that you use."""

    def step(self, student: nn.Module) -> None:
        """Called after the student's optimizer step."""

    def state_dict(self) -> dict[str, Any]:
        """The state that changes during training, for a resumed run."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` gave."""

    def identity(self) -> Any:
        """JSON value that says which teacher this is; a resumed run must have the same."""
        return type(self).__name__


def expected(batches: Iterator[Any], expect: Callable[[Any], None], most: int) -> Iterator[Any]:
    """The same batches, each told to `expect` up to `most` of them before it comes."""
    waiting: list[Any] = []
    for batch in batches:
        expect(batch)
        waiting.append(batch)
        if len(waiting) > most:
            yield waiting.pop(0)
    yield from waiting


class ModelTeacher(Teacher):
    """A frozen model: eval mode in each of its forwards, in every module, and no gradient.

    Modules that it shares with the student have the student's mode in the student's forward.
    Floating-point inputs are cast to float16 or bfloat16 where all its weights are of that.
    """

    reads_batch = False

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.models = [model]
        self._hooks = Hooks(model, ())
        self._student_modules: set[int] = set()  # modules of the student, by id
        self._sort_modules()

    def _sort_modules(self) -> None:
        parts = list(self.model.modules())
        self._own_modules = [part for part in parts if id(part) not in self._student_modules]
        self._shared_modules = [part for part in parts if id(part) in self._student_modules]
        dtypes = {p.dtype for p in self.model.parameters() if p.is_floating_point()}
        half = len(dtypes) == 1 and dtypes <= {torch.float16, torch.bfloat16}
        self._half_dtype = dtypes.pop() if half else None

    def beside(self, student: nn.Module) -> None:
        self._student_modules = {id(part) for part in student.modules()}

    def begin(self) -> None:
        self.model.eval()
        for name, part in self.model.named_modules():
            if part.training:
                raise ValueError(f"teacher: got {name or 'a model'} in train mode after eval()")
        self._sort_modules()

    def __call__(self, batch: Batch) -> Outputs:
        inputs = batch.inputs if batch.teacher_inputs is None else batch.teacher_inputs
        for part in self._own_modules:
            if part.training:  # whoever else holds it may have switched it
                part.training = False
        with torch.no_grad(), in_eval(self._shared_modules):
            raw = forward(self.model, self._cast(inputs))
        reshard(self.model)
        return Outputs(raw, self._hooks.take(), role="teacher")

    def _cast(self, inputs: Any) -> Any:
        dtype, first = self._half_dtype, next(tensors(inputs), None)
        if dtype is None or first is None or torch.is_autocast_enabled(first.device.type):
            return inputs
        return mapped(inputs, lambda x: x.to(dtype) if x.is_floating_point() else x)

    @contextmanager
    def hooked(self, names: tuple[str, ...]) -> Iterator[None]:
        with Hooks(self.model, names) as self._hooks:
            yield
        self._hooks = Hooks(self.model, ())

    def identity(self) -> Any:
        return [class_name(unwrap(self.model)), fingerprint(self.model)]


class EMATeacher(ModelTeacher):
    """An exponential moving average of the student: as a teacher, or beside one (`ema=`).

        w <- decay * w + (1 - decay) * w_student   after every step; buffers are copied

    With decay=0 and `every` it is an older self, the student as it was up to `every` steps ago.

    Args:
        student: copied as it is now; None: when the run begins, by `train(teacher=)`, where "ema"
            is short for `EMATeacher()`.
        decay: in [0, 1).
        every: steps between two of these updates.

    The average is `self.model`.
    Paper: Tarvainen and Valpola 2017, arXiv 1703.01780.
    """

    def __init__(
        self, student: nn.Module | None = None, decay: float = 0.999, *, every: int = 1
    ) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"decay: got {shown(decay)}, expected a number in [0, 1)")
        if type(every) is not int or every < 1:
            raise ValueError(f"every: got {shown(every)}, expected an integer >= 1")
        self.decay, self.every, self.steps = decay, every, 0
        self.models, self._copied = [], False
        if student is not None:
            self.bind(student)

    def bind(self, student: nn.Module) -> None:
        if self._copied:
            return
        if any(is_dtensor(p) for p in student.parameters()):
            raise ValueError(
                "student: got one in shards, which cannot be copied; make the EMATeacher before "
                "fully_shard(student), and fully_shard(average.model) too, or leave it whole"
            )
        super().__init__(copy.deepcopy(unwrap(student)).requires_grad_(False))
        self._copied = True

    @torch.no_grad()
    def step(self, student: nn.Module) -> None:
        self.steps += 1
        if self.steps % self.every:
            return
        bare = unwrap(student)
        reshard(self.model)  # who has called it may have left it whole
        pairs = list(zip(self.model.parameters(), bare.parameters(), strict=True))
        shards = [matching_shards(a, b) for a, b in pairs]
        average, current = zip(*shards, strict=True) if shards else ((), ())
        torch._foreach_lerp_(average, current, 1 - self.decay)
        for a, b in zip(self.model.buffers(), bare.buffers(), strict=True):
            a.copy_(b)

    def state_dict(self) -> dict[str, Any]:
        state = bare_state(self.model)
        return state if self.every == 1 else {"model": state, "steps": self.steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.steps = 0 if self.every == 1 else state["steps"]
        load_bare_state(self.model, state if self.every == 1 else state["model"])

    def identity(self) -> Any:
        return ["EMATeacher", self.decay, *([self.every] if self.every > 1 else [])]


class CallableTeacher(Teacher):
    """Any function of the inputs, run without gradient: a client of a server, a formula."""

    reads_batch = False

    def __init__(self, function: Callable[[Any], Any]) -> None:
        self.function = function

    def __call__(self, batch: Batch) -> Outputs:
        inputs = batch.inputs if batch.teacher_inputs is None else batch.teacher_inputs
        with torch.no_grad():
            return Outputs(self.function(inputs), role="teacher").detach()

    def identity(self) -> Any:
        function = self.function
        return ["CallableTeacher", getattr(function, "__qualname__", type(function).__name__)]


class CachedTeacher(Teacher):
    """Outputs made beforehand: those that came with the batch, or a lookup by sample.

    A loader brings them as `Batch.teacher` (the last of (inputs, labels, teacher), the entry
    "teacher" of a dict); else the samples' numbers, `batch.extra["index"]` int [B], choose rows of
    `reader`.

    Args:
        reader: a `fastkd.teachers.store.Reader`, or map-style: number -> logits [..., V] or a
            `TopK` of one sample (of a store's hidden states `LinearLogits`). Its `identity`, an
            attribute or a method, goes into checkpoints, also where batches bring what was read.
            None where nobody knows where that is from.
    """

    def __init__(self, reader: Any = None) -> None:
        self.reader = reader

    def __call__(self, batch: Batch) -> Outputs:
        if batch.teacher is not None:
            return Outputs(batch.teacher, role="teacher")
        if self.reader is None or "index" not in batch.extra:
            raise ValueError(
                "teacher: got a batch without 'teacher' and without 'index', expected one of them "
                "for stored outputs"
            )
        numbers = batch.extra["index"].tolist()
        many = getattr(self.reader, "batch", None)
        outputs = many(numbers) if many else stacked([self.reader[i] for i in numbers])
        return Outputs(to(outputs, next(tensors(batch.inputs)).device), role="teacher")

    def identity(self) -> Any:
        value = getattr(self.reader, "identity", None)
        return ["CachedTeacher", value() if callable(value) else value]


class BatchTeacher(Teacher):
    """No teacher of its own: the outputs that batches may bring."""

    def __call__(self, batch: Batch) -> Outputs:
        return Outputs(batch.teacher)

    @contextmanager
    def hooked(self, names: tuple[str, ...]) -> Iterator[None]:
        if names:
            raise ValueError(f"teacher: got none, expected one with the layers {list(names)}")
        yield

    def identity(self) -> Any:
        return None


# what a user may give, and what makes a `Teacher` of it; modules of further teachers add theirs
MADE_OF: dict[type, Callable[[Any], Teacher]] = {
    type(None): lambda nothing: BatchTeacher(),
    nn.Module: ModelTeacher,
    Dataset: CachedTeacher,
}
OF_STUDENT: dict[str, Callable[[], Teacher]] = {"ema": EMATeacher}  # by name


def as_teacher(teacher: Any) -> Teacher:
    """A `Teacher` of what a user may give: a module, several, a function, a cache, or None."""
    if isinstance(teacher, Teacher):
        return teacher
    if isinstance(teacher, str):
        if teacher not in OF_STUDENT:
            raise ValueError(f"teacher: got {shown(teacher)}, expected one of {sorted(OF_STUDENT)}")
        return OF_STUDENT[teacher]()
    for kind, make in MADE_OF.items():
        if isinstance(teacher, kind):
            return make(teacher)
    if callable(teacher):
        return CallableTeacher(teacher)
    got = type(teacher).__name__
    raise TypeError(
        f"teacher: got {got}, expected a module, a list or a dict of them, 'base', 'ema', a "
        "function, a cache's Reader or a Teacher"
    )


def check_device(outputs: Outputs, device: torch.device) -> Outputs:
    """`outputs`, or ValueError where the logits are on another device than the student."""
    if outputs.raw is not None:
        outputs.role = outputs.role or "teacher"
    found = getattr(Outputs(outputs.raw).logits, "device", device)  # terms may do without logits
    if found != device and (found.type != device.type or device.index is not None):
        raise ValueError(f"teacher: got outputs on {found}, expected {device}")
    return outputs


def check_one_source(teacher: Teacher, batch: Batch) -> None:
    """ValueError where a batch brings outputs that `teacher` would drop."""
    if batch.teacher is not None and not teacher.reads_batch:
        got = type(teacher).__name__
        raise ValueError(
            f"teacher: got a model or a function ({got}) and also a batch with its outputs, "
            "expected one of them: leave out train(teacher=...), or the batch's third entry (key "
            "'teacher'); sample weights go into a dict, under a key of their own"
        )


def stacked(rows: Sequence[Any]) -> Any:
    """Samples of one kind (tensors, or operands made of tensors) as one with a batch dimension."""
    parts = [list(tensors(row)) for row in rows]
    columns = iter([torch.stack(column) for column in zip(*parts, strict=True)])
    return mapped(rows[0], lambda _: next(columns))


def fingerprint(model: nn.Module) -> str:
    """SHA-256 over bare names, shapes, dtypes and bytes of a model's state, in hexadecimal."""
    digest = hashlib.sha256()
    for name, value in sorted(bare_state(model).items()):
        digest.update(json.dumps([name, str(getattr(value, "dtype", "")), None]).encode())
        if isinstance(value, Tensor):
            flat = full_tensor(value.detach()).cpu().contiguous().view(-1)
            digest.update(json.dumps(list(value.shape)).encode())
            digest.update(bytes(array(flat.view(torch.uint8), "a hash of a teacher")))
    return digest.hexdigest()
