"""The rows of a linear loss, a chunk at a time: products, the passes, and products back.

A side is one operand of the loss. `Linear` makes its logits in a buffer that all chunks share and
that the gradient overwrites; `Dense` has them. Both keep sums of gradients until `finish`.

Ignored rows have a gradient of exactly 0, but 0 * NaN is NaN in a product: where the hidden states
go into one for a gradient, those of ignored rows are 0.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from fastkd.backends import base, formulas, products
from fastkd.backends.base import ALIGN, Backend, Rows, TopKRows, rows_of
from fastkd.engine.linear_sums import Sum, buffer
from fastkd.engine.records import Call, Work
from fastkd.operands import Head

Tensors = Sequence["Tensor | None"]
Needs = Sequence[bool]

WEIGHT = 2**19  # elements of a weight that are converted at a time
FIXED_ROWS = 512  # of a product whose number of rows must not show in a row's bits


def fixed_rows(backend: Backend, requested: int | None) -> int | None:
    """Rows of every product where a row's bits depend on nothing else; None elsewhere."""
    rows = requested or base.default_rows or FIXED_ROWS
    return rows if base.batch_invariant() and not backend.on_host else None


class Linear:
    """hidden, weight and bias as the logits of a chunk of rows.

    index: [n] the rows in use, or None for all. keep: [n] bool or None. late: the gradients' factor
    is not known yet.
    """

    def __init__(
        self,
        call: Call,
        tensors: Tensors,
        head: Head,
        needs: Needs,
        index: Tensor | None,
        keep: Tensor | None,
        late: bool,
        vocab: int,
    ) -> None:
        hidden, weight, bias = tensors
        assert hidden is not None and weight is not None and call.products is not None
        backend = call.backend
        self.operands, self.head, self.vocab, self.backend = tensors, head, vocab, backend
        self.hidden = hidden.reshape(-1, hidden.size(-1))
        self.dtype, self.device = products.multiplied_in(head.dtype, hidden.device), hidden.device
        self.weight = weight[:vocab]
        if self.dtype == head.dtype:
            self.weight = self.weight.to(head.dtype)
        self.bias = None if bias is None else bias[:vocab].to(self.dtype)
        # of all ranks, where they share a vocabulary: their chunks must be the same rows
        self.widest = vocab if backend.widest is None else backend.widest
        self.index, self.needs, self.any = index, needs, any(needs)
        self.keep, self.late = keep if self.any else None, late
        self.loss_scale = call.products.loss_scale if self.dtype == torch.float16 else 1.0
        self.factor = head.scale * self.loss_scale
        self.grads: list[Sum | None] = [None, None]
        self.waiting: tuple[Tensor, Tensor] | None = None
        self.buffers: list[Tensor] = []
        self.h: Tensor | None = None
        self.y: Tensor | None = None
        self.rows = 0  # of every product, where their number must not show in a row's bits

    def row_bytes(self, spare: bool) -> int:
        """Of its buffers: logits, what the softcap's gradient needs, a spare one."""
        self.count = 1 + (self.head.softcap is not None and self.any) + spare
        width = -(-self.widest // ALIGN) * ALIGN
        # products of float32 are as fast in chunks of fewer rows, which take no more memory than
        # 16 bits would, with the weight's sum in float32 beside them
        wider = 4 if self.dtype != self.head.dtype else 1
        return wider * self.count * width * self.dtype.itemsize

    def start(self, n: int, step: int, wait: bool) -> None:
        """wait: the weight's product of the only chunk is left to `finish`."""
        shape, device = (step, -(-self.vocab // ALIGN) * ALIGN), self.device
        dtype, once = self.dtype, step >= n
        self.rows = 0 if fixed_rows(self.backend, None) is None else step
        self.buffers = [buffer(self.backend, shape, dtype, device) for _ in range(self.count)]
        for memory in self.buffers:
            # torch 2.13's bfloat16 product on a CPU with AMX reads on behind a row's end, times 0
            memory[:, self.vocab :].zero_()
        self.wait = wait and once and dtype != torch.float16
        for at, x in enumerate(self.operands[1:]):
            if self.needs[at + 1] and x is not None:
                self.grads[at] = Sum(x, dtype, self.vocab, once, self.backend)
        if self.needs[0]:
            # with a factor that is still to come, in no 16 bits
            own, sums_wide = self.hidden.dtype, dtype.itemsize >= 4 or products.adds_wide(device)
            kept = torch.float32 if self.late and sums_wide and own.itemsize < 4 else own
            self.grad = buffer(self.backend, self.hidden.shape, kept, device)
            if self.index is not None or n == 0:
                self.grad.zero_()

    def _chunk(self, number: int, at: slice) -> Tensor:
        return self.buffers[number][: at.stop - at.start, : self.vocab]

    def _whole(self, x: Tensor) -> Tensor:
        """The rows of a chunk's buffer at x, those behind it 0, as many as a product must have."""
        n = x.size(0)
        if n < self.rows:
            x = x.as_strided((self.rows, x.size(1)), x.stride(), x.storage_offset())
            x[n:].zero_()
        return x

    def _weights(self) -> Iterator[tuple[slice, Tensor]]:
        """(columns, their weight in the products' dtype), which the caches hold if it is made."""
        if self.weight.dtype == self.dtype:
            yield slice(0, self.vocab), self.weight
            return
        step = max(1, WEIGHT // max(self.weight.size(1), 1))
        memory = self.weight.new_empty(
            (min(step, self.vocab), self.weight.size(1)), dtype=self.dtype
        )
        for start in range(0, max(self.vocab, 1), step):  # a rank may have no column
            columns = slice(start, min(start + step, self.vocab))
            yield columns, memory[: columns.stop - start].copy_(self.weight[columns])

    def logits(self, at: slice) -> Tensor:
        h = self.hidden[at] if self.index is None else self.hidden.index_select(0, self.index[at])
        if self.keep is not None:
            h = torch.where(self.keep[at].unsqueeze(-1), h, 0.0)
        self.h = h = h.to(self.dtype)
        z = self._whole(self._chunk(0, at))
        if z.size(0) > h.size(0):
            h = torch.cat((h, h.new_zeros(z.size(0) - h.size(0), h.size(1))))
        cap = self.head.softcap
        gain = self.head.scale / (cap or 1.0)
        for columns, weight in self._weights():
            into = z[:, columns]
            if self.bias is not None:
                torch.addmm(self.bias[columns], h, weight.t(), beta=gain, alpha=gain, out=into)
            elif gain != 1.0:
                torch.addmm(into, h, weight.t(), beta=0, alpha=gain, out=into)
            else:
                torch.mm(h, weight.t(), out=into)
        z = z[: at.stop - at.start]
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
        if self.needs[0]:
            every = self._whole(dz)
            alone = self.index is None and every is dz
            wide = self.grad.dtype == torch.float32 != dz.dtype and products.adds_wide(self.device)
            direct = alone and (wide or self.grad.dtype == dz.dtype)
            dtype = torch.float32 if wide else dz.dtype
            shape = every.size(0), self.grad.size(1)
            dh = self.grad[at] if direct else self.grad.new_empty(shape, dtype=dtype)
            for columns, weight in self._weights():
                part, beta = every[:, columns], int(columns.start != 0)
                if wide:
                    product = torch.ops.aten.addmm.dtype_out
                    product(dh, part, weight, dtype, beta=beta, alpha=1, out=dh)
                elif beta:
                    dh.addmm_(part, weight)
                else:
                    torch.mm(part, weight, out=dh)
            dh = dh[: dz.size(0)]
            if self.index is not None:
                self.grad.index_copy_(0, self.index[at], dh.to(self.grad.dtype))
            elif not direct:
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
        by = by if by is None or self.loss_scale == 1.0 else by / self.loss_scale
        grads: list[Tensor | None] = [None] * len(self.operands)
        if self.needs[0]:
            if by is not None:
                self.backend.multiply(self.grad, by)
            hidden = self.operands[0]
            assert hidden is not None
            grads[0] = self.grad.to(hidden.dtype).view(hidden.shape)
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

    factor = 1.0
    row_bytes = staticmethod(lambda spare: 0)

    def __init__(self, x: Tensor, index: Tensor | None, need: bool, backend: Backend):
        self.operand, self.x, self.backend = x, rows_of(x), backend
        self.index, self.any, self.dtype, self.device = index, need, x.dtype, x.device
        self.copied = index is not None or self.x.size(0) != 1

    def start(self, n: int, step: int, wait: bool) -> None:
        if self.any:
            self.full = self.backend.empty_gradient(self.operand)
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

    def finish(self, by: Tensor | None) -> list[Tensor | None]:
        if not self.any:
            return [None]
        if by is not None:
            self.backend.multiply(self.full, by)
        return [self.full]


Side = Linear | Dense


def work(
    call: Call, tensors: Tensors, needs: Needs, wait: bool, upstream: float | None = None
) -> Work:
    """Losses of all rows, and the gradients that are needed, left in the sides.

    wait: the weight's product of an only chunk is left to backward.
    upstream: one more factor of the gradients; None where it comes later.
    """
    first = tensors[0]
    assert first is not None
    rest, expected = None, upstream is not None
    if upstream is not None:
        # the products keep to the range of 16 bits, whatever its size
        if has_float16(call, first.device):
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
    n = first.numel() // first.size(-1) if index is None else index.numel()
    rows = call.rows._replace(keep=keep, label=label, scale=scale)
    outputs = found = call.outputs
    if index is not None and outputs is not None:
        found = outputs.new_empty(n, outputs.size(1))
    with products.autocast_off(first.device)():
        loss = _run(call._replace(rows=rows, topk=topk, outputs=found), sides, n, wait)
    if outputs is not None and found is not None and index is not None:
        outputs.zero_().index_copy_(0, index, found)
    return Work(sides, loss, scale, index, rest)


def has_float16(call: Call, device: torch.device) -> bool:
    """Whether a product on the device runs in float16."""
    assert call.products is not None
    heads = [head for head in call.products.heads if head is not None]
    return torch.float16 in [products.multiplied_in(head.dtype, device) for head in heads]


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
