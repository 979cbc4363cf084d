"""The rows of a linear loss, a chunk at a time: products, the passes, and products back.

A side (`sides.py`) is one operand of the loss: it gives the logits of a chunk and takes their
gradient.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastkd.backends import base, formulas
from fastkd.backends.base import Rows, TopKRows
from fastkd.engine.records import Call
from fastkd.engine.sides import Dense, Linear, Needs, Side, Tensors, fixed_rows


class Work(NamedTuple):
    """A pass that has been made: sides that hold gradients, and the loss [n] of the rows in use.

    rest: what the gradients still lack of a factor that was expected, a power of 2; None for 1.
    """

    sides: list[Side]
    loss: Tensor
    scale: Tensor | None
    kept: Tensor | None
    rest: Tensor | None

    def gradients(self, by: Tensor | None) -> list[Tensor | None]:
        """Those of all tensors in a row, times `by`; None where they have their factor."""
        by = self.rest if by is None else by
        with base.autocast_off(self.loss.device)():
            return [grad for side in self.sides for grad in side.finish(by)]


def work(
    call: Call, tensors: Tensors, needs: Needs, wait: bool, upstream: float | None = None
) -> Work:
    """Losses of all rows, and the gradients that are needed, left in the sides.

    wait: the weight's product of an only chunk is left to backward.
    upstream: one more factor of the gradients; None where it comes later.
    """
    rest, expected = None, upstream is not None
    if upstream is not None:
        if has_float16(call):  # the products keep to the range of 16 bits, whatever its size
            upstream, power = math.frexp(upstream)
            rest = torch.tensor(2.0**power, dtype=torch.float64)
        call = call._replace(rows=call.rows.times(upstream, 0))
    assert call.products is not None
    heads, pack = call.products.heads, call.products.pack
    keep, label, scale = call.rows[:3]
    index, topk = None, call.topk
    if pack and keep is not None:
        index = keep.nonzero().squeeze(-1)
        label = None if label is None else label[index]
        scale = None if scale is None else scale[index]
        topk, keep = None if topk is None else topk.take(index), None
    cut, late = 1 if heads[0] is None else 3, wait and not expected
    sides: list[Side] = []
    for at, head in ((slice(cut), heads[0]), (slice(cut, None), heads[1])):
        own, need = tensors[at], needs[at]
        if head is not None:
            wide = bool(sides) and call.backend.teacher_columns is not None
            vocab = own[1].size(0) if wide and own[1] is not None else call.spec.vocab
            sides.append(Linear(call, own, head, need, index, keep, late, vocab))
        elif own:
            assert own[0] is not None
            sides.append(Dense(own[0], index, need[0], call.backend))
    first = tensors[0]
    assert first is not None
    n = first.numel() // first.size(-1) if index is None else index.numel()
    rows = call.rows._replace(keep=keep, label=label, scale=scale)
    outputs = found = call.outputs
    if index is not None and outputs is not None:
        found = outputs.new_empty(n, outputs.size(1))
    with base.autocast_off(first.device)():
        loss = _run(call._replace(rows=rows, topk=topk, outputs=found), sides, n, wait)
    if outputs is not None and found is not None and index is not None:
        outputs.zero_().index_copy_(0, index, found)
    return Work(sides, loss, scale, index, rest)


def has_float16(call: Call) -> bool:
    assert call.products is not None
    return any(head is not None and head.dtype == torch.float16 for head in call.products.heads)


def _run(call: Call, sides: list[Side], n: int, wait: bool) -> Tensor:
    """Loss [n] of each row; the sides hold their gradients afterwards.

    Without a teacher the soft term has no part, and the student stands in for it.
    """
    backend, spec, (keep, label, scale, factor, *_), topk = call[:4]
    row_pass: Any = backend.fused if topk is None else backend.topk
    student, teacher = sides[0], sides[1] if len(sides) > 1 else None
    of_teacher = teacher is not None and teacher.any
    dual = formulas.dual(spec) if of_teacher else None
    both = student.any and of_teacher
    row_bytes = sum(side.row_bytes(both and side is teacher) for side in sides)
    requested = call.products and call.products.chunk
    step = fixed_rows(backend, requested) or base.chunk_rows(
        n, row_bytes, student.device, requested
    )
    for side in sides:
        side.start(n, step, wait)
    dtypes = [side.dtype for side in sides] + ([] if topk is None else [topk.logprobs.dtype])
    acc = torch.float64 if torch.float64 in dtypes else torch.float32
    loss = torch.empty(n, dtype=acc, device=student.device)
    for start in range(0, n, step):
        at = slice(start, min(start + step, n))
        kept, labels, scales = (None if x is None else x[at] for x in (keep, label, scale))
        told = None if call.outputs is None else call.outputs[at]
        own = Rows(kept, labels, scales, outputs=told)
        s = student.logits(at)
        rows_s = s.unsqueeze(0)
        t = None if teacher is None else teacher.logits(at)
        other: Tensor | TopKRows = rows_s if t is None else t.unsqueeze(0)
        other = other if topk is None else topk.take(at)
        if not student.any:
            loss[at] = row_pass(rows_s, other, spec, own._replace(scale=None), None)
        to_t = None
        if of_teacher and teacher is not None and t is not None:
            to_t = teacher.target(at, t, last=not student.any)
            by = own._replace(label=None, factor=factor * teacher.factor, outputs=None)
            backend.fused(t.unsqueeze(0), rows_s, dual, by, to_t.unsqueeze(0))  # type: ignore
        if student.any:
            to_s = student.target(at, s, last=True).unsqueeze(0)
            by = own._replace(factor=factor * student.factor)
            loss[at] = row_pass(rows_s, other, spec, by, to_s)
            student.add(at, to_s[0])
        if to_t is not None and teacher is not None:
            teacher.add(at, to_t)
    for side in sides:
        if isinstance(side, Linear):
            side.rest()
    return loss
