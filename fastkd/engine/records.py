"""The records that travel through the engine: what was requested, and what runs."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

from fastkd.backends.base import Backend, LossSpec, Rows, TopKRows
from fastkd.backends.products import autocast_off
from fastkd.operands import Head, Operand, Teacher


class Request(NamedTuple):
    """A loss as it was requested, once everything has been checked.

    group: the backend on which the ranks of a process group share the vocabulary, or None; the
    operands then are this rank's columns. columns: those of the teacher that are the student's,
    where it is normalised over more (see `fastkd.engine.mapped_rows`).
    """

    student: Operand
    teacher: Teacher
    spec: LossSpec
    labels: Tensor | None
    ignore_index: int
    weight: Tensor | None
    reduction: str
    normalizer: float | Tensor | None
    inplace: bool
    group: Backend | None
    return_outputs: bool = False
    columns: Tensor | None = None


class Products(NamedTuple):
    """What a loss with a `LinearLogits` needs besides tensors.

    heads: of both sides, None for logits that are given.
    chunk: rows of a chunk as requested, or None.
    pack: ignored rows are left out of the products.
    loss_scale: power of 2 by which float16 gradients are kept larger until the end.
    """

    heads: tuple[Head | None, Head | None]
    chunk: int | None
    pack: bool
    loss_scale: float


class Call(NamedTuple):
    """What a loss is made of besides the tensors that autograd knows.

    These stand in a row: the student's logits or its hidden states, weight and bias, then the
    teacher's; none of a teacher that has no part or is `topk`.
    """

    backend: Backend
    spec: LossSpec
    rows: Rows
    topk: TopKRows | None = None
    inplace: bool = False
    products: Products | None = None
    outputs: Tensor | None = None  # memory for those of all rows, as in `Rows`

    def times(self, upstream: float | Tensor, student: Tensor, skip: Tensor | None = None) -> Call:
        """The gradients times the upstream gradient of all rows; `Rows.skip` as given."""
        rows = self.rows.times(upstream, student.numel() // student.shape[-1])
        return self._replace(rows=rows._replace(skip=skip))

    def told(self) -> Call:
        """The call as backward makes it: the outputs have been told."""
        return self if self.outputs is None else self._replace(outputs=None)


class Work(NamedTuple):
    """A linear pass that has been made: the sides, which hold gradients, and its rows' loss [n].

    rest: what the gradients still lack of a factor that was expected, a power of 2; None for 1.
    """

    sides: list[Any]
    loss: Tensor
    scale: Tensor | None
    kept: Tensor | None
    rest: Tensor | None

    def gradients(self, by: Tensor | None) -> list[Tensor | None]:
        """Those of all tensors in a row, times `by`; None where they have their factor."""
        by = self.rest if by is None else by
        with autocast_off(self.loss.device)():
            return [grad for side in self.sides for grad in side.finish(by)]
