"""A teacher that runs beside a Trainer's student: a model, one for each sample, the student."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from fastkd import distill
from fastkd.arguments.messages import shown
from fastkd.distill.batch import rows_at, to
from fastkd.distill.heads import (
    Head,
    head_of,
    linear_logits,
    output_embeddings,
    uncached,
)
from fastkd.distill.self_teachers import without_adapter
from fastkd.distill.teacher_routes import routes
from fastkd.integrations.convention import check_convention, unwrapped
from fastkd.integrations.families import check_columns, check_pair, check_sizes, family_of
from fastkd.integrations.hooks import answering, shared

Autocast = tuple[str, torch.dtype, bool]
# the teacher's output for some samples of a batch; None: for all of them
Part = tuple[Tensor | None, Any]


class Live:
    """A frozen model, in eval mode in each of its forwards."""

    columns: tuple[str, ...] = ()  # of the batch, which the student does not get
    ahead_by: int | None = None  # batches that it is told of before their step

    def __init__(self, model: Any) -> None:
        self.model, self.linear = model, True
        self.head: Head | None = None
        self._student: Any = None
        self._uncached: dict[str, Any] = {}
        self._frozen: set[int] = set()  # parameters of it that were not, by id
        self._trained: list[nn.Module] = []  # modules of it that were in train mode
        if model is not None:
            self._freeze(model)

    def _freeze(self, model: Any) -> None:
        family_of(model, "teacher")
        self._uncached = uncached(model)
        self._frozen = {id(p) for p in model.parameters() if p.requires_grad}
        model.requires_grad_(False)
        self._trained = [module for module in model.modules() if module.training]
        model.eval()

    def check(self, student: Any) -> None:
        """Refuse a teacher that is the student or would freeze a part of it."""
        if self.model is student:
            raise ValueError("teacher: got the student itself, expected a model of its own")
        common = [name for name, p in student.named_parameters() if id(p) in self._frozen]
        if common:
            raise ValueError(
                f"teacher: got {len(common)} parameters of the student ({common[0]!r} is one), "
                "which would be frozen with it, expected a model of its own (copy.deepcopy)"
            )
        for module in shared(self._trained, student):
            module.training = True
        self._trained = []

    def prepare(self, student: Any, linear: bool, vocab_size: int | None) -> None:
        """Look at the teacher before the first step, and read its head."""
        if family_of(self.model).shift:
            check_convention(self.model, "teacher", loss=False)
        check_pair(student, self.model, vocab_size)
        check_columns([student, self.model], vocab_size)
        self.linear, self._student = linear, student
        self.head = head_of(self.model) if linear else None

    def replaced(self) -> bool:
        """Whether its head is not the one that was read (resize_token_embeddings)."""
        head = self.head
        return head is not None and head.module is not output_embeddings(self.model)

    def parts(
        self,
        inputs: dict[str, Any],
        labels: Tensor,
        extra: Mapping[str, Any],
        autocast: Autocast | None,
        device: torch.device,
    ) -> Iterator[Part]:
        """The teacher's output for all samples of a batch, or for some of them at a time.

        Args:
            inputs: the student's, by name.
            labels: [B, L], of the token behind each position.
            extra: the batch's columns that the student does not get.
        """
        model = self.model
        if getattr(model, "hf_device_map", None) is None and model.device != device:
            model.to(device)
        _check_embeddings(inputs.get("inputs_embeds"), model)
        as_student: Any = nullcontext()
        if autocast is not None:
            as_student = torch.autocast(autocast[0], dtype=autocast[1], enabled=autocast[2])
        with torch.no_grad(), as_student, answering(model, self._student), self._as_it_was():
            named = inputs | self._uncached
            if self.linear:
                said = linear_logits(model, named, self.head)[0]
            else:
                said = getattr(model(**named), family_of(model).logits)
        yield None, said  # outside of all that

    def expect(self, inputs: Any, labels: Tensor, extra: Mapping[str, Any]) -> None:
        """Called with a batch that will come, as `parts` gets it; returns at once."""

    def _as_it_was(self) -> AbstractContextManager[None]:
        return nullcontext()

    @property
    def averages(self) -> list[distill.EMATeacher]:
        """Those that follow the student's steps."""
        return []


class LiveBase(Live):
    """The student without its adapter."""

    def __init__(self) -> None:
        super().__init__(None)

    def check(self, student: Any) -> None:
        with without_adapter(student):
            pass
        self.model, self._uncached = student, uncached(student)

    def prepare(self, student: Any, linear: bool, vocab_size: int | None) -> None:
        self.linear, self._student = linear, student
        self.head = head_of(student) if linear else None

    @contextmanager
    def _as_it_was(self) -> Iterator[None]:
        with without_adapter(self.model):
            yield


class LiveEMA(Live):
    """The student's moving average."""

    def __init__(self, average: distill.EMATeacher) -> None:
        super().__init__(None)
        self.average = average

    def check(self, student: Any) -> None:
        self.average.bind(student)
        self.model = self.average.model
        self._freeze(self.model)

    @property
    def averages(self) -> list[distill.EMATeacher]:
        return [self.average]


class LivePrompted(Live):
    """Another one that reads another prompt."""

    def __init__(self, prompted: distill.PromptedTeacher) -> None:
        super().__init__(None)
        self.prompted, self.within = prompted, live(prompted.teacher)
        own = (prompted.prompt,) if isinstance(prompted.prompt, str) else ()
        self.columns, self.ahead_by = (*own, *self.within.columns), self.within.ahead_by

    def check(self, student: Any) -> None:
        self.within.check(student)

    def prepare(self, student: Any, linear: bool, vocab_size: int | None) -> None:
        self.within.prepare(student, linear, vocab_size)

    def replaced(self) -> bool:
        return self.within.replaced()

    def expect(self, inputs: Any, labels: Tensor, extra: Any) -> None:
        inputs, labels, _ = self.prompted.inputs(inputs, labels, extra)
        self.within.expect(inputs, labels, extra)

    def parts(self, inputs: Any, labels: Tensor, extra: Any, *how: Any) -> Iterator[Part]:
        inputs, labels, at = self.prompted.inputs(inputs, labels, extra)
        for rows, said in self.within.parts(inputs, labels, extra, *how):
            yield rows, rows_at(said, at if rows is None else at[rows])

    @property
    def averages(self) -> list[distill.EMATeacher]:
        return self.within.averages


class LiveRouted(Live):
    """One of several for each sample; each runs on its own samples alone."""

    def __init__(self, teachers: Mapping[Any, Any], by: str) -> None:
        super().__init__(None)
        if not teachers:
            raise ValueError("teacher: got an empty dict, expected {name: model}")
        self.members, self.by = {name: live(x) for name, x in teachers.items()}, by
        self.columns = (by, *(c for member in self.members.values() for c in member.columns))
        counts = [x.ahead_by for x in self.members.values() if x.ahead_by is not None]
        self.ahead_by = max(counts, default=None)

    def check(self, student: Any) -> None:
        for member in self.members.values():
            member.check(student)

    def prepare(self, student: Any, linear: bool, vocab_size: int | None) -> None:
        for member in self.members.values():
            member.prepare(student, linear, vocab_size)

    def replaced(self) -> bool:
        return any(member.replaced() for member in self.members.values())

    def _routed(self, inputs: Any, labels: Tensor, extra: Any) -> Iterator[tuple[Any, ...]]:
        """Of each member that has samples of a batch their places, and its part of the batch."""
        size = labels.size(0)
        of = routes(extra.get(self.by), list(self.members), size, self.by)

        def cut(x: Any, own: list[int]) -> Any:
            if isinstance(x, Tensor):
                return x[own] if x.dim() and x.size(0) == size else x
            return [x[place] for place in own] if type(x) is list and len(x) == size else x

        for name, member in self.members.items():
            if not (own := [place for place, other in enumerate(of) if other == name]):
                continue
            mine, more = ({k: cut(x, own) for k, x in y.items()} for y in (inputs, extra))
            at = torch.tensor(own, device=labels.device)
            yield member, at, (mine, labels[at], more)

    def expect(self, *batch: Any) -> None:
        for member, _, mine in self._routed(*batch):
            member.expect(*mine)

    def parts(self, inputs: Any, labels: Tensor, extra: Any, *how: Any) -> Iterator[Part]:
        for member, at, mine in self._routed(inputs, labels, extra):
            for rows, said in member.parts(*mine, *how):
                yield (at if rows is None else at[rows]), said

    @property
    def averages(self) -> list[distill.EMATeacher]:
        return [average for member in self.members.values() for average in member.averages]


class LiveAsked(Live):
    """One that is asked and not run here, as `fastkd.teachers.Served`."""

    def __init__(self, source: distill.Teacher) -> None:
        super().__init__(None)
        self.source, self.ahead_by = source, source.ahead_by

    def check(self, student: Any) -> None:
        self.source.beside(unwrapped(student))

    def prepare(self, student: Any, linear: bool, vocab_size: int | None) -> None:
        self.linear, self._student = linear, student
        family, size = family_of(student), getattr(self.source, "vocab_size", None)
        if not family.shift:
            raise ValueError(
                f"teacher: got {type(self.source).__name__}, which says what comes behind each "
                f"token, for {family.name}, expected a model"
            )
        check_sizes(family.columns(unwrapped(student)), size, vocab_size, words=True)
        if vocab_size is not None and size is not None and size < vocab_size:
            raise ValueError(f"vocab_size: got {vocab_size}, expected at most the teacher's {size}")

    def expect(self, inputs: Any, labels: Tensor, extra: Any) -> None:
        self.source.expect(distill.Batch(inputs, labels))

    def parts(
        self, inputs: Any, labels: Tensor, extra: Any, autocast: Any, device: torch.device
    ) -> Iterator[Part]:
        yield None, to(self.source(distill.Batch(inputs, labels)).logits, device)


KINDS: dict[type, Callable[[Any], Live]] = {
    distill.BaseTeacher: lambda _: LiveBase(),
    distill.EMATeacher: LiveEMA,
    distill.ModelTeacher: lambda x: Live(x.model),
    distill.PromptedTeacher: LivePrompted,
    distill.RoutedTeacher: lambda x: LiveRouted(dict(zip(x.names, x.members, strict=True)), x.by),
}


def live(teacher: Any) -> Live:
    """What a Trainer's user may give as a teacher: a model, "base", "ema", a dict, `distill`'s."""
    if isinstance(teacher, str):
        if teacher not in ("base", "ema"):
            raise ValueError(f"teacher: got {shown(teacher)}, expected a model, 'base' or 'ema'")
        return LiveBase() if teacher == "base" else LiveEMA(distill.EMATeacher())
    if isinstance(teacher, Mapping):
        return LiveRouted(teacher, "teacher_id")
    if isinstance(teacher, distill.Teacher):
        if (kind := KINDS.get(type(teacher))) is None:
            return LiveAsked(teacher)
        return kind(teacher)
    return Live(teacher)


def _check_embeddings(embeddings: Any, teacher: Any) -> None:
    if embeddings is None:
        return
    table = getattr(teacher.get_input_embeddings(), "weight", None)
    if table is None or embeddings.size(-1) == table.size(-1):
        return
    raise ValueError(
        f"inputs_embeds: got vectors of {embeddings.size(-1)} for a teacher of {table.size(-1)}, "
        "expected input_ids, of which each model makes its own, or a batch with the teacher's "
        "outputs (key 'teacher')"
    )
