"""A teacher for each sample, by a column of the batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastkd
from fastkd.arguments.messages import shown

from .batch import Batch, Outputs, in_rows, mapped, tensors
from .distributed import is_dtensor
from .teacher_ensembles import EnsembleTeacher, PeerTeacher
from .teachers import MADE_OF, Teacher


class RoutedTeacher(EnsembleTeacher):
    """One of several teachers for each sample, chosen by a column of the batch.

    A teacher runs once a batch, on its own samples alone, and not at all where it has none. Their
    rows become one batch's before the loss, whose means so run over all tokens of the step. A dict
    of teachers given to `train(teacher=)` is one of these.

    Args:
        teachers: {name: module or source}; names are str or int.
        by: the entry of the loader's dict that has each sample's name: a list, or int [B].

    Teachers that give logits have one width, those that give `TopK` one temperature and tail; a
    layer's name is one that all of them have.
    """

    def __init__(self, teachers: Mapping[Any, Any], by: str = "teacher_id") -> None:
        if not isinstance(teachers, Mapping):
            raise TypeError(f"teachers: got {shown(teachers)}, expected {{name: teacher}}")
        super().__init__(list(teachers.values()))
        self.names, self.by = list(teachers), by
        if any(isinstance(member, PeerTeacher) for member in self.members):
            raise TypeError("teachers: got a PeerTeacher, expected teachers that do not learn")

    def beside(self, student: nn.Module) -> None:
        super().beside(student)
        if any(is_dtensor(p) for model in self.models for p in model.parameters()):
            raise ValueError(
                "teachers: got one in shards, which all ranks have to run, expected whole ones: "
                "a rank's samples may have no row of it"
            )

    @contextmanager
    def hooked(self, names: tuple[str, ...]) -> Iterator[None]:
        with ExitStack() as stack:
            for member in self.members:
                stack.enter_context(member.hooked(names))
            yield

    def _routed(self, batch: Batch) -> Iterator[tuple[Teacher, list[int]]]:
        """Each teacher that has samples of the batch, and their places."""
        of = routes(batch.extra.get(self.by), self.names, batch.samples, self.by)
        for member, name in zip(self.members, self.names, strict=True):
            if own := [place for place, other in enumerate(of) if other == name]:
                yield member, own

    def expect(self, batch: Batch) -> None:
        for member, own in self._routed(batch):
            if member.ahead_by is not None:
                member.expect(samples(batch, own))

    def __call__(self, batch: Batch) -> Outputs:
        said, places = [], []
        for member, own in self._routed(batch):
            said.append(member(samples(batch, own)))
            places += own
        order = torch.tensor(places).argsort()
        logits = stacked_rows([each.logits for each in said], order)
        layers = said[0].features if said else {}
        features = {name: stacked_rows([x.features[name] for x in said], order) for name in layers}
        return Outputs(logits, features, role="teacher")

    def identity(self) -> Any:
        pairs = zip(self.names, self.members, strict=True)
        return ["RoutedTeacher", self.by, [[name, member.identity()] for name, member in pairs]]


def routes(column: Any, names: Sequence[Any], size: int, by: str) -> list[Any]:
    """The name of each sample's teacher; ValueError for one that is not known."""
    found = column.tolist() if isinstance(column, Tensor) else column
    if not isinstance(found, (list, tuple)) or len(found) != size:
        got = "none" if found is None else f"{type(found).__name__} {shown(found)}"
        raise ValueError(
            f"{by}: got {got} for {size} samples, expected an entry {by!r} of the batch with the "
            f"name of each sample's teacher, one of {names}"
        )
    for place, name in enumerate(found):
        if name not in names:
            got = f"{shown(name)} in sample {place} of the batch"
            raise ValueError(f"{by}: got {got}, expected one of {shown(names)}")
    return list(found)


def samples(batch: Batch, places: Sequence[int]) -> Batch:
    """Some samples of a batch."""
    size, at = batch.samples, list(places)

    def cut(value: Any) -> Any:
        if (
            isinstance(value, (list, tuple))
            and len(value) == size
            and not hasattr(value, "_fields")
        ):
            return [value[place] for place in at]
        if isinstance(value, Tensor):
            return value[at] if value.dim() and value.size(0) == size else value
        if isinstance(value, Mapping):
            return {name: cut(part) for name, part in value.items()}
        return value if value is None else in_rows(value, cut)

    fields = {name: cut(getattr(batch, name)) for name in ("inputs", "labels", "teacher_inputs")}
    taught, extra = cut(batch.teacher), cut(batch.extra)
    part = Batch(**fields, teacher=taught, extra=extra, epoch=batch.epoch, step=batch.step)
    part.samples = len(at)
    return part


def stacked_rows(parts: Sequence[Any], order: Tensor) -> Any:
    """Teachers' outputs, samples behind one another, then in this order."""
    if len(parts) == 1:
        return parts[0] if bool((order[1:] > order[:-1]).all()) else in_rows(parts[0], _at(order))
    kinds = {type(x).__name__ for x in parts}
    if len(kinds) > 1 or not isinstance(parts[0], (Tensor, fastkd.TopK)):
        raise TypeError(
            f"teachers: got {sorted(kinds)}, expected logits of all or TopK of all (a model's: "
            "lambda inputs: fastkd.topk_from_logits(model(inputs), k))"
        )
    if isinstance(parts[0], Tensor):
        shapes = [list(x.shape) for x in parts]
        if any(shape[1:] != shapes[0][1:] for shape in shapes):
            expected = "equal shapes but for the samples: one vocabulary"
            raise ValueError(f"teachers: got {shapes}, expected {expected}")
        return torch.cat(list(parts))[order.to(parts[0].device)]
    kinds_ = {(x.temperature, x.tail, x.tail_logprob is None) for x in parts}
    if len(kinds_) > 1:
        got = f"TopK of (temperature, tail, no tail_logprob) = {sorted(map(str, kinds_))}"
        raise ValueError(f"teachers: got {got}, expected one of them")
    most = max(x.size(-1) for x in parts)
    wide = [
        fastkd.TopK(
            F.pad(x.logprobs, (0, most - x.size(-1)), value=-torch.inf),
            F.pad(x.indices, (0, most - x.size(-1)), value=-1),
            tail_logprob=x.tail_logprob,
            temperature=x.temperature,
            tail=x.tail,
        )
        for x in parts
    ]
    columns = zip(*(list(tensors(x)) for x in wide), strict=True)
    joined = iter([torch.cat(column)[order.to(column[0].device)] for column in columns])
    return mapped(wide[0], lambda _: next(joined))


def _at(order: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda x: x[order.to(x.device)]


MADE_OF[Mapping] = RoutedTeacher
