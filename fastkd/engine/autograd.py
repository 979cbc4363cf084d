"""The reduced loss as an autograd function: loss and gradients in one pass in forward.

A gradient must be rounded once, with its final factor. Forward has the operands in the cache; only
backward knows what was made of the loss (`* T * T`, `/ steps`, a loss scaler). So each loss
remembers the upstream gradient of its last backward, and forward computes the gradient with it.
Where that was right, which in a training loop is at every step but the first, backward hands the
gradient out; else it computes it again. Nothing rounded is multiplied, so the bits never depend on
the guess.

A loss is known again by its kind, by the lines that call it, and by its place among the losses of
those whose backward is still to come. On a GPU nothing is read on the host: a place holds a 0-d
tensor at one address, so that a CUDA graph that is replayed reads and leaves what it should.

A gradient of the teacher is the student's gradient of the dual divergence with the sides exchanged.
A top-k teacher takes no part in autograd here. One loss per row: `per_row.py`.
"""

from __future__ import annotations

import math
import sys
import threading
from collections.abc import Hashable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastkd.backends import formulas
from fastkd.backends.base import LossSpec, Rows, TopKRows, rows_of
from fastkd.backends.choice import in_functorch
from fastkd.engine import linear
from fastkd.engine.rare_backward import in_place, reduced_graph
from fastkd.engine.records import Call

Tensors = Sequence["Tensor | None"]
Needs = Sequence[bool]


def wants_gradient(tensors: Tensors) -> bool:
    return torch.is_grad_enabled() and any([x is not None and x.requires_grad for x in tensors])


def dense_pass(
    call: Call,
    student: Tensor,
    other: Tensor | TopKRows,
    spec: LossSpec,
    grad: Tensor | None,
    outputs: Tensor | None = None,
) -> Tensor:
    """Loss [N] of each row; the gradient into `grad`."""
    into, rows, x = None if grad is None else rows_of(grad), call.rows, rows_of(student)
    if outputs is not None:
        rows = rows._replace(outputs=outputs)
    if isinstance(other, TopKRows):
        return call.backend.topk(x, other, spec, rows, into)
    return call.backend.fused(x, rows_of(other), spec, rows, into)


def _teacher_gradient(call: Call, student: Tensor, teacher: Tensor, grad: Tensor | None) -> Tensor:
    dual = formulas.dual(call.spec)
    assert dual is not None, "dispatch.py sends a divergence without a dual to the reference"
    grad = call.backend.empty_gradient(teacher) if grad is None else grad
    dense_pass(call, teacher, student, dual, grad)
    return grad


def _student_gradient(call: Call, student: Tensor) -> Tensor:
    """Memory for it."""
    return student.detach() if call.inplace else call.backend.empty_gradient(student)


def dense_gradients(
    call: Call, tensors: Tensors, needs: Needs, into: Tensors | None = None
) -> list[Tensor | None]:
    """The gradients without the loss; over earlier ones, or in memory of their own."""
    student, teacher = tensors[0], tensors[-1] if call.topk is None else call.topk
    assert student is not None and teacher is not None
    grads: list[Tensor | None] = [None] * len(tensors) if into is None else [*into]
    if call.topk is None and needs[1]:
        assert isinstance(teacher, Tensor)
        # first: an inplace student is gone after its own gradient
        grads[1] = _teacher_gradient(call, student, teacher, grads[1])
    if needs[0]:
        grad = _student_gradient(call, student) if grads[0] is None else grads[0]
        dense_pass(call, student, teacher, call.spec, grad)
        grads[0] = grad
    return grads


def _dense_total(
    call: Call, tensors: Tensors, needs: Needs, upstream: float | Tensor
) -> tuple[Tensor, list[Tensor | None]]:
    """factor * sum of scale * loss, and the gradients of upstream times that."""
    backend, spec, rows, topk = call[:4]
    student: Any = tensors[0]
    grads: list[Tensor | None] = [None] * len(tensors)
    if topk is None and needs[1]:  # first, as above
        teacher: Any = tensors[1]
        grads[1] = _teacher_gradient(call.times(upstream, student), student, teacher, None)
    grads[0] = grad = _student_gradient(call, student) if needs[0] else None
    other: Any = tensors[1] if topk is None else topk
    if topk is None:
        if call.outputs is not None:
            rows = Rows._make((*rows[:-1], call.outputs))  # half of what _replace costs
        return backend.fused_total(student, other, spec, rows, grad, upstream), grads
    by = call.times(upstream, student)
    loss = dense_pass(by, student, other, spec, grad, call.outputs)
    return backend.total(loss, rows.scale, rows.factor), grads


def save(ctx: Any, *operands: Tensor | None) -> None:
    """save_for_backward, which refuses tensors made in inference mode; a teacher may be one."""
    for x in operands:
        if x is not None and x.is_inference():
            break
    else:
        ctx.save_for_backward(*operands)
        return
    ctx.inference = [x if x is not None and x.is_inference() else None for x in operands]
    pairs = zip(operands, ctx.inference, strict=True)
    ctx.save_for_backward(*(x if kept is None else None for x, kept in pairs))


def saved(ctx: Any) -> list[Any]:
    saved = ctx.saved_tensors
    kept = getattr(ctx, "inference", None)
    if kept is None:
        return list(saved)
    return [x if y is None else y for x, y in zip(saved, kept, strict=True)]


# ---- the guess of the upstream gradient

MOST_PLACES = 64  # losses of a line that wait for their backward; further ones are not remembered
MOST_LINES = 4096  # that are known
MOST_FACTORS = 64  # whose successors are known
MOST_MISSES = 2  # in a row, after which forward leaves the gradient to backward
OWN_FRAMES = 6  # of the stack, which say nothing: the engine's, from `_line` on
FRAMES = 4  # that say where a loss stands: a public function's, its caller's, some that called it


class _Place:
    """What is remembered of one loss of a step: its upstream gradients.

    The next one is expected to be the last one, or what followed the last one before, whichever of
    the two was right when they differed: factors that take turns are known, too.
    """

    __slots__ = ("after", "busy", "last", "misses", "on_device", "repeated", "turns")

    def __init__(self) -> None:
        self.busy = False
        self.last = 1.0
        self.after: dict[float, float] = {}
        self.turns = False  # factors take turns
        self.misses = 0
        self.repeated = False  # the last guess was right
        self.on_device: Tensor | None = None

    def expected(self) -> float:
        return self.after.get(self.last, self.last) if self.turns else self.last

    def learn(self, factor: float) -> None:
        self.repeated = _same(factor, self.expected())
        self.misses = 0 if self.repeated else self.misses + 1
        again = _same(factor, self.last)
        if self.turns or not again:  # else nothing changes
            known = self.after.get(self.last)
            followed = known is not None and _same(factor, known)
            if again != followed:
                self.turns = followed
            if len(self.after) >= MOST_FACTORS:
                self.after.clear()
            self.after[self.last] = factor
        self.last = factor


class _Places(threading.local):
    """Of each thread: two of them may run the same losses at once."""

    def __init__(self) -> None:
        self.of: dict[Hashable, list[_Place]] = {}


_places = _Places()


class _Taken:
    """A place while its loss waits for a backward; given back with the graph if none comes."""

    __slots__ = ("place",)

    def __init__(self, place: _Place) -> None:
        self.place: _Place | None = place

    def __del__(self) -> None:
        if self.place is not None:
            self.place.busy = False


class OnHost(_Taken):
    """A place while its loss waits for a backward, where values can be read."""

    __slots__ = ("expected",)

    def __init__(self, kind: Hashable, inplace: bool) -> None:
        """In place, the operands are gone after a wrong guess: only what has repeated is one."""
        self.place = place = taken(kind)
        expected = place.expected() if place.turns else place.last
        self.expected: float | None = expected if place.misses < MOST_MISSES else None
        if inplace and not (place.repeated and place.last and math.isfinite(place.last)):
            self.expected = None

    def settle(self, factor: float) -> bool:
        """Whether the guess was right. Remembers the factor and gives the place back."""
        place = self.place
        if place is not None:  # else a second backward
            place.busy, self.place = False, None
            if factor == place.last != 0.0 and not place.turns:  # as in most steps
                place.misses, place.repeated = 0, True
            else:
                place.learn(factor)
        return self.expected is not None and _same(factor, self.expected)


class OnDevice(_Taken):
    """The same where values stay on a device."""

    __slots__ = ("expected",)

    def __init__(self, place: _Place, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__(place)
        if place.on_device is None:
            place.on_device = torch.ones((), dtype=dtype, device=device)
        self.expected = place.on_device.clone()

    def settle(self, factor: Tensor) -> Tensor:
        """As `OnHost.settle`; a 0-d bool tensor."""
        place = self.place
        if place is not None:
            assert place.on_device is not None
            # a gradient in place must be divided by it if it was wrong
            usable = factor.isfinite() & (factor != 0.0)
            place.on_device.copy_(torch.where(usable, factor, place.on_device))
            place.busy, self.place = False, None
        a, b = factor, self.expected
        return ((a == b) & ((a != 0.0) | (a.signbit() == b.signbit()))) | (a.isnan() & b.isnan())


def _line() -> int:
    """The lines that lead to this call, as a number."""
    frame: Any = sys._getframe(OWN_FRAMES)
    lines: list[int] = []
    for _ in range(FRAMES):
        if frame is None:
            break
        lines += (id(frame.f_code), frame.f_lasti)
        frame = frame.f_back
    return hash(tuple(lines))


def taken(kind: Hashable) -> _Place:
    key = kind, _line()
    places = _places.of.get(key)
    if places is None:
        if len(_places.of) >= MOST_LINES:
            _places.of.clear()
        places = _places.of[key] = []
    for place in places:
        if not place.busy:
            break
    else:
        place = _Place()
        if len(places) < MOST_PLACES:
            places.append(place)
    place.busy = True
    return place


def _same(a: float, b: float) -> bool:
    """Whether two factors give the same gradients, bit by bit."""
    if a == b:
        return a != 0.0 or math.copysign(1.0, a) == math.copysign(1.0, b)
    return a != a and b != b


# ---- reduced: gradients in forward


class _Reduced(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, call: Call, *tensors: Tensor | None) -> Tensor:
        needs = ctx.needs_input_grad[1:]
        ctx.call, ctx.work, ctx.overwritten = call, None, None
        ctx.guess = guess = _guess(call, tensors)
        expected: Any = None if guess is None else guess.expected
        if call.products is not None and (guess is None or expected is not None):
            # without a guess, the factor goes into sums that are not rounded yet
            work = ctx.work = linear.work(call, tensors, needs, wait=True, upstream=expected)
            total = call.backend.total(work.loss, work.scale, call.rows.factor)
        elif expected is not None:
            total, ctx.work = _dense_total(call, tensors, needs, expected)
        else:  # the gradients are left to backward
            total = _total(call, tensors)
        if call.inplace and ctx.work is not None and needs[0]:
            _Reduced._overwrite(ctx, tensors[0], expected)
            save(ctx, None, *tensors[1:])
        else:
            save(ctx, *tensors)
        return total

    @staticmethod
    def _overwrite(ctx: Any, student: Any, factor: Any) -> None:
        # whoever saved these logits for a backward of his own must hear that they changed
        torch.autograd.graph.increment_version(student)
        ctx.overwritten, ctx.version, ctx.factor = student.detach(), student._version, factor

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        call, needs, over = ctx.call, ctx.needs_input_grad[1:], ctx.overwritten
        if torch.is_grad_enabled() or in_functorch(upstream):  # a vmap over upstream, say
            if over is not None:
                raise RuntimeError(
                    "inplace=True has overwritten the student's logits, which create_graph=True "
                    "(double backward) and batched gradients need; use inplace=False"
                )
            return (None, *reduced_graph(call, saved(ctx), needs, upstream))
        if over is not None and over._version != ctx.version:
            raise RuntimeError(
                "inplace=True keeps the gradient in the student's logits until backward, and they "
                "were modified in between; use inplace=False"
            )
        work, ctx.work = ctx.work, None  # given away once
        by: Any = upstream
        right: Any = None
        if isinstance(ctx.guess, OnHost):
            by = float(upstream)
            right = call.backend.agreed(ctx.guess.settle(by))
        elif ctx.guess is not None:
            right = ctx.guess.settle(upstream)
        if over is not None:
            return (None, *in_place(ctx, work, upstream, needs))
        if call.products is not None:
            if work is None or right is False:
                expected = None if ctx.guess is None else by
                work = linear.work(call.told(), saved(ctx), needs, wait=True, upstream=expected)
            return (None, *work.gradients(upstream if ctx.guess is None else None))
        if work is None or right is not True:
            tensors = saved(ctx)
            again = call.times(by, tensors[0], None if work is None else right)
            work = dense_gradients(again, tensors, needs, work)
            if call.inplace and needs[0]:
                _Reduced._overwrite(ctx, tensors[0], by)
        return (None, *work)


# Function.apply, in Python, prepares for torch.func, which takes a tenth of a small loss; what
# outlived one of its transforms is unwrapped by resolve_neg in dispatch.py
_apply: Any = super(torch.autograd.Function, _Reduced).apply


def _guess(call: Call, tensors: Tensors) -> OnHost | OnDevice | None:
    """What is expected of a loss; None where the factor can go in later."""
    how, products, student = call.backend.guesses, call.products, tensors[0]
    if not how or (how == "device" and products is not None) or student is None:
        return None
    operands = call.topk is None, products is None, call.backend.group
    kind = call.spec.divergence, student.dtype, student.device, *operands
    if how == "host":
        return OnHost(kind, call.inplace)
    wide = any(x is not None and x.dtype == torch.float64 for x in tensors)
    return OnDevice(taken(kind), student.device, torch.float64 if wide else torch.float32)


def _total(call: Call, tensors: Tensors) -> Tensor:
    """factor * sum of scale * loss, without gradients."""
    needs = [False] * len(tensors)
    if call.products is None:
        return _dense_total(call, tensors, needs, 1.0)[0]
    work = linear.work(call, tensors, needs, wait=False)
    return call.backend.total(work.loss, work.scale, call.rows.factor)


def reduced(call: Call, *tensors: Tensor | None) -> Tensor:
    """factor * sum of scale * (loss of each row), a 0-d tensor in acc dtype."""
    if wants_gradient(tensors):
        if call.inplace:
            student = tensors[0]
            assert student is not None
            if rows_of(student).data_ptr() != student.data_ptr():
                # strides that no view of rows has: read from a copy, so written anew
                call = call._replace(inplace=False)
        in_transform = torch._C._are_functorch_transforms_active()
        return (_Reduced.apply if in_transform else _apply)(call, *tensors)
    return _total(call, tensors)
