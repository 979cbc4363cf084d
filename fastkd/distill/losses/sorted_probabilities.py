"""Probabilities by rank, and their distance with its gradient, a chunk of rows at a time.

Rows are in ascending order, so that those of a smaller vocabulary are filled up in front; the sum
of a row's exponentials is taken over the sorted row, so that it does not depend on the columns'
order: the same distribution over permuted columns is the same, bit for bit.

Sorting takes most of the time. NumPy's sort of 4- and 8-byte numbers is vectorised where that of
torch is not: on the host a logit and its column are sorted as one integer.
"""

from __future__ import annotations

import functools
import math
import os
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .chunked import elements

INF = math.inf
ALONE = 2**15  # elements up to which another thread is not worth waking


# the teacher's logits, or its largest probabilities and the rest
TeacherRows = tuple[Tensor, Tensor | None]


class Call(NamedTuple):
    """The options that stay the same over the chunks.

    top: ranks that are told apart, the others being one bucket; None for all.
    rows: [n] of student and teacher that stand beside each other; None for all, in order.
    keep: [n] bool, what is read; None for all.
    """

    temperature: float
    top: int | None
    acc: torch.dtype
    rows: tuple[Tensor, Tensor] | None
    keep: Tensor | None


@functools.cache
def _numpy() -> Any:
    try:
        import numpy
    except ImportError:
        return None
    return numpy


@functools.cache
def _workers(count: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(count, "fastkd-ranks")


if hasattr(os, "register_at_fork"):  # a child process has none of the threads
    os.register_at_fork(after_in_child=_workers.cache_clear)


def _sort(x: Tensor) -> None:
    """Every row, in place; NumPy takes one core and lets go of the interpreter meanwhile."""
    rows, threads = x.numpy(), min(torch.get_num_threads(), x.size(0))
    if threads == 1 or x.numel() < ALONE:
        rows.sort(-1)
        return
    parts = _numpy().array_split(rows, threads)
    for _ in _workers(torch.get_num_threads()).map(lambda part: part.sort(-1), parts):
        pass


def _fast(x: Tensor) -> bool:
    return x.device.type == "cpu" and x.dtype == torch.float32 and _numpy() is not None


def _values(x: Tensor, width: int) -> Tensor:
    """[n, width] of [n, V]: in ascending order, after as many -inf as there are too few."""
    filled = x.new_full((x.size(0), width), -INF)
    filled[:, : x.size(1)] = x
    if _fast(x):
        _sort(filled)
        return filled
    return filled.sort(-1).values


def _order(x: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """As `_values`, and of each of the last V its column; among equals the first is the lowest."""
    n, vocab = x.shape
    filled = x.new_full((n, width), -INF)
    if not _fast(x):
        filled[:, width - vocab :], order = x.sort(dim=-1, stable=True)
        return filled, order
    # in two's complement negative floats stand in reverse; their other bits are turned round
    bits = (x + 0.0).view(torch.int32)
    key = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(torch.int64)
    key = (key << 32).add_(torch.arange(vocab))
    _sort(key)
    order = key & 0xFFFFFFFF
    torch.gather(x, 1, order, out=(taken := torch.empty_like(x)))
    filled[:, width - vocab :] = taken
    return filled, order


def _softmax(z: Tensor, T: float) -> Tensor:
    """Of sorted rows, in place; less the largest first, which is exact for logits far from 0."""
    return torch.softmax(z.sub_(z[:, -1:].clone()).mul_(1 / T), -1)


def _bucketed(x: Tensor, T: float, top: int, width: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """[n, width] the largest probabilities, [n] the others' sum, all [n, V], and the columns."""
    highest, at = x.topk(min(top, x.size(1)))
    largest = highest[:, :1]
    e = (x - largest).mul_(1 / T).exp_()
    first = (highest - largest).mul_(1 / T).exp_()
    # in float64 the order of the columns makes no difference that float32 could show
    rest = e.scatter(1, at, 0.0).sum(-1, dtype=torch.float64)
    total = rest + first.sum(-1, dtype=torch.float64)
    by = total.unsqueeze(-1)
    listed = torch.nn.functional.pad((first / by).to(x.dtype), (0, width - at.size(1)))
    return listed, (rest / total).to(x.dtype), e.div_(by.to(x.dtype)), at


def _chunk(
    s: Tensor, t: Tensor, rest: Tensor | None, call: Call, want: bool
) -> tuple[Tensor, Tensor | None]:
    """Loss [n] and its gradient [n, V]."""
    T, top = call.temperature, call.top
    if top is None:
        width = max(s.size(1), t.size(1))
        z, order = _order(s, width) if want else (_values(s, width), None)
        q = _softmax(z, T)
        far = q - _softmax(_values(t, width), T)
        loss = far.abs().sum(-1)
        if order is None:
            return loss, None
        h = far.sign_()
        mean = (q * h).sum(-1, keepdim=True) + 0 * loss.unsqueeze(-1)  # the sign of NaN is 0
        h.sub_(mean).mul_(q).mul_(1 / T)
        return loss, torch.empty_like(s).scatter_(1, order, h[:, width - s.size(1) :])
    width = min(top, max(s.size(1), t.size(1)))
    q, left, full, at = _bucketed(s, T, top, width)
    if rest is None:
        p, rest, _, _ = _bucketed(t, T, top, width)
    else:
        p = torch.nn.functional.pad(t, (0, width - t.size(1)))
    far, off = q - p, left - rest
    loss = far.abs().sum(-1) + off.abs()
    if not want:
        return loss, None
    h, off = far.sign_(), off.sign_().unsqueeze(-1)
    mean = (q * h).sum(-1, keepdim=True) + left.unsqueeze(-1) * off + 0 * loss.unsqueeze(-1)
    slope = off.expand_as(s).scatter(1, at, h[:, : at.size(1)])
    return loss, slope.sub_(mean).mul_(full).mul_(1 / T)


def formula(s: Tensor, t: Tensor, rest: Tensor | None, call: Call) -> Tensor:
    """The same loss [n] as torch differentiates it, as often as requested."""
    s, t, rest = _read(s, t, rest, call, slice(None))
    q = ((s - s.detach().amax(-1, keepdim=True)) / call.temperature).softmax(-1)
    p = t
    if rest is None:
        p = ((t - t.amax(-1, keepdim=True)) / call.temperature).softmax(-1)
    q, p = (x.sort(-1, descending=True).values for x in (q, p))
    off = q.new_zeros(())
    if (k := call.top) is not None:
        off = (q[:, k:].sum(-1) - (p[:, k:].sum(-1) if rest is None else rest)).abs()
        q, p = q[:, :k], p[:, :k]
    width = max(q.size(1), p.size(1))
    q, p = (torch.nn.functional.pad(x, (0, width - x.size(1))) for x in (q, p))
    loss = (q - p).abs().sum(-1) + off
    return loss if call.keep is None else torch.where(call.keep, loss, 0.0)


def _read(
    s: Tensor, t: Tensor, rest: Tensor | None, call: Call, at: slice
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The rows of a chunk in the dtype of the arithmetic; what is not kept reaches nothing."""
    if call.rows is None:
        s, t = s[at], t[at]
        rest = rest if rest is None else rest[at]
    else:
        student_rows, row_of_teacher = (x[at] for x in call.rows)
        s, t = s[student_rows], t[row_of_teacher]
        rest = rest if rest is None else rest[row_of_teacher]
    s, t = s.to(call.acc), t.to(call.acc)
    if call.keep is not None:
        keep = call.keep[at].unsqueeze(-1)
        s, t = torch.where(keep, s, 0.0), torch.where(keep, t, 0.0)
    return s, t, rest


def _run(
    s: Tensor, t: Tensor, rest: Tensor | None, call: Call, factor: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Loss [n] of every pair; with a factor the gradient [N, V] of sum(factor * loss)."""
    n = s.size(0) if call.rows is None else call.rows[0].size(0)
    loss = torch.empty(n, dtype=call.acc, device=s.device)
    grad = None
    if factor is not None:
        new = torch.empty_like if call.rows is None else torch.zeros_like
        grad = new(s, memory_format=torch.contiguous_format)
    # nobody sorts a row on two cores
    step = max(torch.get_num_threads(), elements(s) // max(s.size(1), t.size(1)), 1)
    for start in range(0, n, step):
        at = slice(start, start + step)
        found, slope = _chunk(*_read(s, t, rest, call, at), call, grad is not None)
        if call.keep is not None:
            found = torch.where(call.keep[at], found, 0.0)
        loss[at] = found
        if grad is None or slope is None or factor is None:
            continue
        slope.mul_(factor[at].unsqueeze(-1))
        if call.keep is not None:
            slope = torch.where(call.keep[at].unsqueeze(-1), slope, 0.0)
        if call.rows is None:
            grad[at] = slope
        else:  # a row may stand beside several
            grad.index_add_(0, call.rows[0][at], slope.to(grad.dtype))
    return loss, grad


class Distance(torch.autograd.Function):
    """sum of factor * loss with its gradient made in forward; without a factor the loss [n]."""

    @staticmethod
    def forward(
        ctx: Any, student: Tensor, teacher_rows: TeacherRows, call: Call, factor: Any
    ) -> Tensor:
        ctx.teacher_rows, ctx.call, ctx.factor, ctx.grad = teacher_rows, call, factor, None
        ctx.versions = [x._version for x in teacher_rows if x is not None and not x.is_inference()]
        ctx.save_for_backward(student)
        if factor is None:
            return _run(student, *teacher_rows, call, None)[0]
        needed_factor = factor if ctx.needs_input_grad[0] else None
        loss, ctx.grad = _run(student, *teacher_rows, call, needed_factor)
        return (loss.double() * factor).sum().to(factor.dtype)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        (student,) = ctx.saved_tensors
        t, rest = ctx.teacher_rows
        by = upstream if ctx.factor is None else ctx.factor * upstream
        grad, ctx.grad = ctx.grad, None  # given away: a second backward makes its own
        if grad is not None and not torch.is_grad_enabled():
            if upstream.device.type != "cpu" or upstream != 1:
                grad.mul_(upstream)
            return grad, None, None, None
        now = [x._version for x in ctx.teacher_rows if x is not None and not x.is_inference()]
        if now != ctx.versions:
            raise RuntimeError("teacher: changed in place since the loss, expected it as it was")
        if torch.is_grad_enabled():  # a gradient of the gradient is wanted: torch's own graph
            loss = formula(student, t, rest, ctx.call)
            (grad,) = torch.autograd.grad(loss, student, by, create_graph=True)
            return grad, None, None, None
        return _run(student, t, rest, ctx.call, by)[1], None, None, None
