"""A teacher of more columns than the student: the map, checked, and the passes of "all".

"mapped" is a teacher of fewer columns, and nothing that follows knows of it. With "all" the teacher
is normalised over columns that the student does not have too. The split passes take the stats of a
row from outside, as they do where ranks share a vocabulary. `Mapped` is a backend like any other.
"""

from __future__ import annotations

import copy
import math
from functools import lru_cache

import torch
from torch import Tensor

from fastkd.backends.base import Backend, LossSpec, Rows, Stats, acc_dtype
from fastkd.backends.choice import in_functorch
from fastkd.backends.formulas import of_sums, unmapped_price
from fastkd.engine.reduction import reads_values
from fastkd.mapped import MappedLogits
from fastkd.operands import Operand
from fastkd.parallel.at_one import entropy, finite, log_sum

# Elements of the teacher's columns that are taken at a time: on a host they stay in the caches, a
# device wants few launches
BLOCK, DEVICE_BLOCK = 2**20, 2**27


def mapped(teacher: MappedLogits) -> tuple[Operand, Tensor | None]:
    """The teacher's operand, and its columns if it is normalised over more than those.

    Raises:
        ValueError: a column out of range or named twice (on the CPU and inside
            `fastkd.checked()`; elsewhere one out of range spoils all rows).
    """
    width, columns, spoil = teacher.teacher.size(-1), teacher.columns.to(torch.int64), None
    bad = (columns < 0) | (columns >= width)
    if reads_values(columns):
        if bool(bad.any()):
            at = int(bad.nonzero()[0])
            hint = ", which EAGLE's d2t are not: they are offsets" if int(columns[at]) < 0 else ""
            raise ValueError(
                f"columns: got {int(columns[at])} in place {at}, expected columns of the teacher, "
                f"0 to {width - 1}{hint}"
            )
        seen = torch.bincount(columns, minlength=width)
        if bool((seen > 1).any()):
            twice = int(seen.argmax())
            places = (columns == twice).nonzero()
            raise ValueError(
                f"columns: got {twice} in places {int(places[0])} and {int(places[1])}, expected "
                "each column of the teacher once; of EAGLE's offsets, d2t + "
                "torch.arange(len(d2t)) are the columns"
            )
    else:
        spoil = torch.where(bad.any(), math.nan, 0.0)
        columns = torch.where(bad, 0, columns)
    if teacher.normalize == "mapped":
        return _taken(teacher.teacher, columns, spoil), None
    # what is no column spoils as a place past the end would: `Mapped` finds it by its sign
    return teacher.teacher, columns if spoil is None else torch.where(bad, -1, columns)


def _taken(x: Operand, columns: Tensor, spoil: Tensor | None) -> Operand:
    """The logits at some columns, differentiable, plus a 0-d tensor in each row."""
    if isinstance(x, Tensor):
        plain = x.requires_grad or torch.compiler.is_compiling() or in_functorch()
        picked = (_gathered if plain else _copied)(x.resolve_neg(), columns)
        return picked if spoil is None else _spoilt(picked, -1, spoil)
    twin = copy.copy(x)  # not made anew: its dtype is that of where the user made it
    weight = x.weight.index_select(0, columns)
    twin.weight = weight if spoil is None else _spoilt(weight, 0, spoil)
    twin.bias = None if x.bias is None else x.bias.index_select(0, columns)
    return twin


def _spoilt(x: Tensor, dim: int, by: Tensor) -> Tensor:
    """Adds to the first place of a dimension: one NaN in a row is enough."""
    x.narrow(dim, 0, 1).add_(by)
    return x


def _gathered(x: Tensor, columns: Tensor) -> Tensor:
    return x.gather(-1, columns.expand(*x.shape[:-1], -1))


def _copied(x: Tensor, columns: Tensor) -> Tensor:
    """As `_gathered`, without a gradient; torch moves 16-bit integers faster than floats."""
    if x.element_size() != 2:
        return _gathered(x, columns)
    return _gathered(x.view(torch.int16), columns).view(x.dtype)


class Mapped(Backend):
    """A teacher of which each row's `columns` are compared, normalised over all of its own."""

    def __init__(self, backend: Backend, columns: Tensor) -> None:
        self.backend, self.on_host = backend, backend.on_host
        # on a GPU the gradient waits for its factor
        self.guesses = "host" if backend.guesses == "host" else ""
        self.teacher_columns: Tensor = columns

    def fused(
        self, student: Tensor, teacher: Tensor, spec: LossSpec, rows: Rows, grad: Tensor | None
    ) -> Tensor:
        n, block = student.size(0) * student.size(1), BLOCK if self.on_host else DEVICE_BLOCK
        step = max(1, block // spec.vocab)
        there = [x for x in (student, teacher, grad) if x is not None]
        if n <= step or any(x.size(0) != 1 for x in there):
            return self._block(student, teacher, spec, rows, grad)
        loss = torch.empty(n, dtype=acc_dtype(student, teacher), device=student.device)
        for start in range(0, n, step):
            at = slice(start, start + step)
            keep, label, scale = (None if x is None else x[at] for x in rows[:3])
            own = rows._replace(keep=keep, label=label, scale=scale)
            into = None if grad is None else grad[:, at]
            loss[at] = self._block(student[:, at], teacher[:, at], spec, own, into)
        return loss

    def _block(
        self, student: Tensor, teacher: Tensor, spec: LossSpec, rows: Rows, grad: Tensor | None
    ) -> Tensor:
        acc, keep = acc_dtype(student, teacher), rows.keep
        columns = self.teacher_columns[: spec.vocab]
        label = rows.label if spec.hard != 0.0 else None
        named = _copied(teacher, columns.clamp_min(0))

        def stats(x: Tensor, temperature: float, width: int) -> Tensor:
            x = x.to(acc) if acc == torch.float64 else x  # stats are as wide as what they are of
            return self.backend.stats(x, temperature, width, keep).to(acc)

        own = stats(student, spec.temperature, spec.vocab)
        every = stats(teacher, spec.temperature, teacher.size(-1))
        every = torch.where((columns < 0).any(), math.nan, every)
        hard = None
        if spec.at_one:
            hard = own if spec.temperature == 1.0 else stats(student, 1.0, spec.vocab)
        found = Stats(own, every, hard)
        pairs = self.backend.loss(student, named, found, spec, rows).to(acc)
        if price := _price(spec):
            part = stats(named, spec.temperature, spec.vocab)
            off = (1.0 - _share(part, every, spec.temperature)).clamp_min(0.0)
            pairs = torch.stack((pairs[:, 0] + price * off, pairs[:, 1]), -1)
        loss = spec.soft * of_sums(spec, pairs[:, 0])[0]
        if hard is not None and spec.z_loss != 0.0:
            loss = loss + spec.z_loss * log_sum(hard) ** 2
        if hard is not None and label is not None:
            place = label.clamp(0, spec.vocab - 1).view(*student.shape[:-1], 1)
            at_label = student.gather(-1, place).to(acc).view(-1)
            low, total, drift = finite(hard[:, 0]), hard[:, 1], hard[:, 2]
            loss = loss + spec.hard * entropy(low, total, at_label, drift, spec)
        if keep is not None:
            loss = torch.where(keep, loss, 0.0)
        if grad is not None:
            self.backend.grad(student, named, found, pairs.contiguous(), spec, rows, grad)
        return loss

    def total(self, loss: Tensor, scale: Tensor | None, factor: float) -> Tensor:
        return self.backend.total(loss, scale, factor)

    def empty_gradient(self, like: Tensor) -> Tensor:
        return self.backend.empty_gradient(like)

    def multiply(self, grad: Tensor, by: Tensor) -> None:
        self.backend.multiply(grad, by)

    def count(
        self, labels: Tensor, ignore_index: int, vocab: int
    ) -> tuple[Tensor | None, Tensor, int, int]:
        return self.backend.count(labels, ignore_index, vocab)

    def weigh(self, keep: Tensor | None, weight: Tensor, mean: bool, acc: torch.dtype) -> Tensor:
        return self.backend.weigh(keep, weight, mean, acc)


@lru_cache(64)
def _price(spec: LossSpec) -> float:
    return float(unmapped_price(spec))


def _share(part: Tensor, every: Tensor, temperature: float) -> Tensor:
    """What a part of the columns has of the row's sum, by the stats of both."""
    moved = torch.where(part[:, 1] == 0, -math.inf, (part[:, 0] - every[:, 0]) / temperature)
    return part[:, 1] * moved.exp() / every[:, 1]
