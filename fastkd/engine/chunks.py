"""The rows of a linear loss, a chunk at a time: products, the passes, and products back.

A side is one operand of the loss. `Linear` makes its logits in a buffer that all chunks share and
that the gradient overwrites; `Dense` has them. Both keep sums of gradients until `finish`.

Ignored rows have a gradient of exactly 0, but 0 * NaN is NaN in a product: where the hidden states
go into one for a gradient, those of ignored rows are 0.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastkd.backends.base import Backend, LossSpec, Rows, TopKRows, chunks, rows_of
from fastkd.engine.sums import Sum, buffer
from fastkd.operands import Head

Tensors = Sequence["Tensor | None"]
Wants = Sequence[bool]

MOST_CHUNKS = 8  # what a chunk costs beyond its products is paid so often, where memory allows it
ALIGN = 64  # columns: rows start at multiples of 128 bytes, whatever the vocabulary


def _asked() -> int | None:
    text = os.environ.get("FASTKD_CHUNK")
    if text is None:
        return None
    if not text.isdecimal() or int(text) == 0:
        raise ValueError(f"FASTKD_CHUNK: got {text!r}, expected a number of rows, at least 1")
    return int(text)


default_rows = _asked()


def chunk_rows(n: int, row_bytes: int, device: torch.device, asked: int | None) -> int:
    """Rows of a chunk; row_bytes of all buffers together."""
    asked = default_rows if asked is None else asked
    if asked is not None:
        return min(asked, max(n, 1))
    budget, (least, most) = chunks(device)
    size = budget // max(row_bytes, 1)
    size = max(size, min(2 * size, -(-n // MOST_CHUNKS)))
    size = min(max(size, least), most)
    even = -(-n // max(1, -(-n // size)))  # no short last chunk
    return max(1, min(size, -(-even // ALIGN) * ALIGN, n))


class Linear:
    """hidden, weight and bias as the logits of a chunk of rows.

    index: [n] the rows in use, or None for all. keep: [n] bool or None.
    boost: power of 2 by which float16 gradients are kept larger until `finish`.
    """

    def __init__(
        self,
        tensors: Tensors,
        head: Head,
        vocab: int,
        index: Tensor | None,
        keep: Tensor | None,
        wants: Wants,
        boost: float,
        backend: Backend,
    ) -> None:
        hidden, weight, bias = tensors
        assert hidden is not None and weight is not None
        self.given, self.head, self.vocab, self.backend = tensors, head, vocab, backend
        self.hidden = hidden.reshape(-1, hidden.size(-1))
        self.weight = weight[:vocab].to(head.dtype)
        self.bias = None if bias is None else bias[:vocab].to(head.dtype)
        # of all ranks, where they share a vocabulary: their chunks must be the same rows
        self.widest = vocab if backend.widest is None else backend.widest
        self.index, self.wants, self.any = index, wants, any(wants)
        self.keep = keep if self.any else None
        self.boost = boost if head.dtype == torch.float16 else 1.0
        self.factor = head.scale * self.boost
        self.grads: list[Sum | None] = [None, None]
        self.waiting: tuple[Tensor, Tensor] | None = None
        self.buffers: list[Tensor] = []
        self.h: Tensor | None = None
        self.y: Tensor | None = None
        self.dtype, self.device = head.dtype, hidden.device

    def row_bytes(self, spare: bool) -> int:
        """Of its buffers: logits, what the softcap's gradient needs, a spare one."""
        self.count = 1 + (self.head.softcap is not None and self.any) + spare
        width = -(-self.widest // ALIGN) * ALIGN
        return self.count * width * self.head.dtype.itemsize

    def start(self, n: int, step: int, wait: bool) -> None:
        """wait: the weight's product of the only chunk is left to `finish`."""
        shape, device = (step, -(-self.vocab // ALIGN) * ALIGN), self.device
        dtype, once = self.dtype, step >= n
        self.buffers = [buffer(self.backend, shape, dtype, device) for _ in range(self.count)]
        for memory in self.buffers:
            # torch 2.13's bfloat16 product on a CPU with AMX reads on behind a row's end, times 0
            memory[:, self.vocab :].zero_()
        self.wait = wait and once and dtype != torch.float16
        for at, x in enumerate(self.given[1:]):
            if self.wants[at + 1] and x is not None:
                self.grads[at] = Sum(x, dtype, self.vocab, once, self.backend)
        if self.wants[0]:
            self.grad = buffer(self.backend, self.hidden.shape, self.hidden.dtype, device)
            if self.index is not None or n == 0:
                self.grad.zero_()

    def _chunk(self, number: int, at: slice) -> Tensor:
        return self.buffers[number][: at.stop - at.start, : self.vocab]

    def logits(self, at: slice) -> Tensor:
        h = self.hidden[at] if self.index is None else self.hidden.index_select(0, self.index[at])
        if self.keep is not None:
            h = torch.where(self.keep[at].unsqueeze(-1), h, 0.0)
        self.h = h = h.to(self.dtype)
        z = self._chunk(0, at)
        cap = self.head.softcap
        gain = self.head.scale / (cap or 1.0)
        if self.bias is not None:
            torch.addmm(self.bias, h, self.weight.t(), beta=gain, alpha=gain, out=z)
        elif gain != 1.0:
            torch.addmm(z, h, self.weight.t(), beta=0, alpha=gain, out=z)
        else:
            torch.mm(h, self.weight.t(), out=z)
        if cap is not None:
            self.y = torch.tanh(z, out=self._chunk(1, at) if self.any else z)
            torch.mul(self.y, cap, out=z)
        return z

    def target(self, at: slice, logits: Tensor, last: bool) -> Tensor:
        """Where the gradient of the chunk goes: over the logits if nobody needs them any more."""
        return logits if last else self._chunk(self.count - 1, at)

    def add(self, at: slice, dz: Tensor) -> None:
        """Takes the gradient of the chunk's logits, and its memory."""
        assert self.h is not None
        if self.y is not None:
            torch.ops.aten.tanh_backward.grad_input(dz, self.y, grad_input=dz)
        if self.wants[0]:
            whole = self.index is None and self.grad.dtype == dz.dtype
            dh = torch.mm(dz, self.weight, out=self.grad[at] if whole else None)
            if self.index is not None:
                self.grad.index_copy_(0, self.index[at], dh.to(self.grad.dtype))
            elif not whole:
                self.grad[at].copy_(dh)
        of_weight, of_bias = self.grads
        if of_bias is not None:
            of_bias.add(torch.ones(1, dz.size(0), dtype=dz.dtype, device=dz.device), dz)
        if of_weight is not None and self.wait:
            # a copy: the caller may write over the hidden states before backward
            self.waiting = (dz, self.h.clone() if self.keep is None else self.h)
        elif of_weight is not None:
            of_weight.add(dz.t(), self.h)

    def rest(self) -> None:
        """Lets go of what no later step needs."""
        self.buffers, self.h, self.y = [], None, None
        del self.hidden, self.weight, self.bias  # under autocast, copies

    def finish(self, by: Tensor | None) -> list[Tensor | None]:
        """The gradients, times `by`, which goes into the smaller factor of what has waited."""
        by = by if by is None or self.boost == 1.0 else by / self.boost
        grads: list[Tensor | None] = [None] * len(self.given)
        if self.wants[0]:
            if by is not None:
                self.backend.multiply(self.grad, by)
            assert self.given[0] is not None
            grads[0] = self.grad.view(self.given[0].shape)
        for at, total in enumerate(self.grads):
            if total is None:
                continue
            if at == 0 and self.waiting is not None:
                dz, h = self.waiting
                total.add(dz.t(), h if by is None else h * by)
                self.waiting = None
                grads[1] = total.finish(None)
            else:
                grads[at + 1] = total.finish(by)
        return grads


class Dense:
    """Logits that are given, any strides, as chunks of rows."""

    boost = factor = 1.0
    row_bytes = staticmethod(lambda spare: 0)

    def __init__(self, x: Tensor, index: Tensor | None, want: bool, backend: Backend):
        self.given, self.x, self.backend = x, rows_of(x), backend
        self.index, self.any, self.dtype, self.device = index, want, x.dtype, x.device
        self.copied = index is not None or self.x.size(0) != 1

    def start(self, n: int, step: int, wait: bool) -> None:
        if self.any:
            self.full = self.backend.empty_gradient(self.given)
            self.grad = self.full.view(-1, self.full.size(-1))
            if self.index is not None:
                self.grad.zero_()

    def logits(self, at: slice) -> Tensor:
        if not self.copied:
            return self.x[0, at]
        every = torch.arange(at.start, at.stop, device=self.device)
        index = every if self.index is None else self.index[at]
        per = max(self.x.size(1), 1)
        return self.x[index // per, index % per]

    def target(self, at: slice, logits: Tensor, last: bool) -> Tensor:
        if self.index is None:
            return self.grad[at]
        return logits if last else torch.empty_like(logits)

    def add(self, at: slice, dz: Tensor) -> None:
        if self.index is not None:
            self.grad.index_copy_(0, self.index[at], dz)

    def rest(self) -> None:
        pass

    def finish(self, by: Tensor | None) -> list[Tensor | None]:
        if not self.any:
            return [None]
        if by is not None:
            self.backend.multiply(self.full, by)
        return [self.full]


class Stored:
    """The rows of a stored teacher; no gradient."""

    any, boost, factor = False, 1.0, 1.0
    row_bytes = staticmethod(lambda spare: 0)

    def __init__(self, teacher: TopKRows, index: Tensor | None):
        self.teacher = teacher if index is None else teacher.take(index)
        self.dtype = teacher.logprobs.dtype

    def start(self, n: int, step: int, wait: bool) -> None:
        pass

    def logits(self, at: slice) -> TopKRows:
        return self.teacher.take(at)

    def rest(self) -> None:
        pass

    def finish(self, by: Tensor | None) -> list[Tensor | None]:
        return []


Side = Linear | Dense | Stored


def run(
    backend: Backend,
    student: Linear | Dense,
    teacher: Side | None,
    plans: tuple[LossSpec, LossSpec | None],
    n: int,
    rows: Rows,
    asked: int | None,
    wait: bool,
) -> Tensor:
    """Loss [n] of each row; the sides hold their gradients afterwards.

    teacher: None where the soft term has no part; the student stands in for it.
    plans: the loss's, and that of the teacher's gradient (the sides exchanged).
    asked: rows of a chunk.
    """
    spec, exchanged = plans
    keep, label, scale, factor = rows
    row_pass: Any = backend.topk if isinstance(teacher, Stored) else backend.fused
    both = student.any and teacher is not None and teacher.any
    sides = [side for side in (student, teacher) if side is not None]
    row_bytes = sum(side.row_bytes(both and side is teacher) for side in sides)
    step = chunk_rows(n, row_bytes, student.device, asked)
    for side in sides:
        side.start(n, step, wait)
    wide = torch.float64 in [side.dtype for side in sides]
    acc = torch.float64 if wide else torch.float32
    loss = torch.empty(n, dtype=acc, device=student.device)
    for start in range(0, n, step):
        at = slice(start, min(start + step, n))
        kept, labels, scales = (None if x is None else x[at] for x in (keep, label, scale))
        unscaled = Rows(kept, labels, None, 1.0)
        s = student.logits(at)
        rows_s = s.unsqueeze(0)
        rows_t: Tensor | TopKRows = rows_s
        to_t = None
        if teacher is not None:
            t = teacher.logits(at)
            rows_t = t if isinstance(t, TopKRows) else t.unsqueeze(0)
            if teacher.any and not isinstance(teacher, Stored) and isinstance(t, Tensor):
                assert exchanged is not None
                if not student.any:
                    loss[at] = row_pass(rows_s, rows_t, spec, unscaled, None)
                to_t = teacher.target(at, t, last=not student.any)
                by = Rows(kept, None, scales, factor * teacher.factor)
                row_pass(t.unsqueeze(0), rows_s, exchanged, by, to_t.unsqueeze(0))
        if student.any:
            to_s = student.target(at, s, last=True).unsqueeze(0)
            by = Rows(kept, labels, scales, factor * student.factor)
            loss[at] = row_pass(rows_s, rows_t, spec, by, to_s)
            student.add(at, to_s[0])
        elif to_t is None:
            loss[at] = row_pass(rows_s, rows_t, spec, unscaled, None)
        if to_t is not None:
            assert not isinstance(teacher, Stored) and teacher is not None
            teacher.add(at, to_t)
    for side in sides:
        side.rest()
    return loss
