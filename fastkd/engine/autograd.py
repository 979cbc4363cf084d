"""The drivers as autograd functions: the order of the passes, and what backward keeps.

Two ways to the same passes, for logits that are given, `LinearLogits` and top-k teachers alike:

* `reduced`, eager and reduced to a number: loss and gradients in one pass in forward, these times
  the upstream gradient that `fastkd.engine.upstream` expects. Backward hands them out if that was
  right, else it computes them again. They are given away once; a second backward computes again.
* `per_row`: one loss per row, the gradients computed in backward, nothing of size N x V kept. It
  serves reduction="none" and gradients of weight and normalizer; `fastkd.engine.ops` is the same
  as a registered operator, for torch.compile.

A gradient of the teacher is the student's gradient of the dual divergence with the sides exchanged.
A top-k teacher takes no part in autograd here. Double backward builds all logits in plain torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastkd.backends import reference
from fastkd.backends.base import LossSpec, TopKRows, rows_of
from fastkd.backends.choice import in_functorch
from fastkd.engine import linear
from fastkd.engine import upstream as upstreams
from fastkd.engine.records import Call

Tensors = Sequence["Tensor | None"]
Needs = Sequence[bool]


def _wants_gradient(tensors: Tensors) -> bool:
    if torch.is_grad_enabled():
        for x in tensors:
            if x is not None and x.requires_grad:
                return True
    return False


# ---- passes over logits that are given


def _dense_pass(
    call: Call, student: Tensor, other: Tensor | TopKRows, spec: LossSpec, grad: Tensor | None
) -> Tensor:
    """Loss [N] of each row; the gradient into `grad`."""
    into = None if grad is None else rows_of(grad)
    if isinstance(other, TopKRows):
        return call.backend.topk(rows_of(student), other, spec, call.rows, into)
    return call.backend.fused(rows_of(student), rows_of(other), spec, call.rows, into)


def _teacher_gradient(call: Call, student: Tensor, teacher: Tensor, grad: Tensor | None) -> Tensor:
    dual = reference.dual(call.spec)
    assert dual is not None, "dispatch.py sends a divergence without a dual to the reference"
    grad = call.backend.empty_gradient(teacher) if grad is None else grad
    _dense_pass(call, teacher, student, dual, grad)
    return grad


def _student_gradient(call: Call, student: Tensor) -> Tensor:
    """Memory for it."""
    return student.detach() if call.inplace else call.backend.empty_gradient(student)


def _dense_gradients(
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
        _dense_pass(call, student, teacher, call.spec, grad)
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
    if topk is None:
        other: Any = tensors[1]
        return backend.fused_total(student, other, spec, rows, grad, upstream), grads
    loss = _dense_pass(call.times(upstream, student), student, topk, spec, grad)
    return backend.total(loss, rows.scale, rows.factor), grads


# ---- what backward finds


def _save(ctx: Any, *operands: Tensor | None) -> None:
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


def _saved(ctx: Any) -> list[Any]:
    saved = ctx.saved_tensors
    kept = getattr(ctx, "inference", None)
    if kept is None:
        return list(saved)
    return [x if y is None else y for x, y in zip(saved, kept, strict=True)]


def graph(call: Call, tensors: Tensors, needs: Needs, by: Tensor) -> list[Tensor | None]:
    """The gradients as a graph (create_graph=True), by the reference, the logits in full.

    by: [N] scales of the rows, all factors included.
    """
    if call.backend.group is not None:
        raise NotImplementedError(
            "group: create_graph=True (double backward) and batched gradients over a split "
            "vocabulary are not supported; gather the logits and leave group out"
        )
    keep, label = call.rows[:2]
    first = tensors[0]
    assert first is not None
    heads = (None, None) if call.products is None else call.products.heads
    with torch.enable_grad():
        mask = None if keep is None else keep.view(first.shape[:-1])
        s, t = reference.logits(tensors, heads, call.spec.vocab, mask)
        s, t = (x.reshape(-1, x.size(-1)) for x in (s, t))
        value = reference.row_loss(s, call.topk or t, call.spec, keep, label)
        inputs = [x for x, need in zip(tensors, needs, strict=True) if need and x is not None]
        grads = list(torch.autograd.grad(value, inputs, by, create_graph=True))
    return [grads.pop(0) if need else None for need in needs]


# ---- reduced: gradients in forward


class _Reduced(torch.autograd.Function):
    @classmethod
    def apply(cls, *args: Any) -> Any:
        # Function's own, in Python, prepares for torch.func, which takes a tenth of a small loss;
        # what outlived one of its transforms is unwrapped by resolve_neg in dispatch.py
        if torch._C._are_functorch_transforms_active():
            return super().apply(*args)
        return super(torch.autograd.Function, cls).apply(*args)  # type: ignore[misc]

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
            _save(ctx, None, *tensors[1:])
        else:
            _save(ctx, *tensors)
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
            return (None, *_Reduced._graph(call, _saved(ctx), needs, upstream))
        if over is not None and over._version != ctx.version:
            raise RuntimeError(
                "inplace=True keeps the gradient in the student's logits until backward, and they "
                "were modified in between; use inplace=False"
            )
        work, ctx.work = ctx.work, None  # given away once
        by: Any = upstream
        right: Any = None
        if isinstance(ctx.guess, upstreams.OnHost):
            by = float(upstream)
            right = call.backend.agreed(ctx.guess.settle(by))
        elif ctx.guess is not None:
            right = ctx.guess.settle(upstream)
        if over is not None:
            return (None, *_Reduced._in_place(ctx, work, by, upstream, needs))
        if call.products is not None:
            if work is None or right is False:
                expected = None if ctx.guess is None else by
                work = linear.work(call, _saved(ctx), needs, wait=True, upstream=expected)
            return (None, *work.gradients(upstream if ctx.guess is None else None))
        if work is None or right is not True:
            tensors = _saved(ctx)
            again = call.times(by, tensors[0], None if work is None else right)
            work = _dense_gradients(again, tensors, needs, work)
            if call.inplace and needs[0]:
                _Reduced._overwrite(ctx, tensors[0], by)
        return (None, *work)

    @staticmethod
    def _graph(call: Call, tensors: Tensors, needs: Needs, upstream: Tensor) -> list[Tensor | None]:
        by, scale = upstream * call.rows.factor, call.rows.scale
        first = tensors[0]
        assert first is not None
        n = first.numel() // first.size(-1)
        return graph(call, tensors, needs, by.expand(n) if scale is None else by * scale)

    @staticmethod
    def _in_place(ctx: Any, work: Any, by: Any, upstream: Tensor, needs: Needs) -> Any:
        """Gradients of logits that are gone: earlier ones, multiplied."""
        before = torch.as_tensor(ctx.factor, dtype=upstream.dtype, device=upstream.device)
        ratio = torch.where(before == upstream, 1.0, upstream / before)
        if work is not None:
            for grad in work:
                if grad is not None:
                    ctx.call.backend.multiply(grad, ratio)
            ctx.version, ctx.factor = ctx.overwritten._version, upstream.clone()
            return work
        if any(needs[1:]):
            raise RuntimeError(
                "inplace=True has overwritten the student's logits, which the teacher's "
                "gradient of a second backward needs; use inplace=False with retain_graph"
            )
        if float(before) == 0.0:
            raise RuntimeError(
                "inplace=True keeps the gradient in the student's logits, and the first "
                "backward has multiplied it by 0; use inplace=False with retain_graph"
            )
        return [ctx.overwritten * ratio, *(None for _ in needs[1:])]


def _guess(call: Call, tensors: Tensors) -> upstreams.OnHost | upstreams.OnDevice | None:
    """What is expected of a loss; None where the factor can go in later."""
    how, products, student = call.backend.guesses, call.products, tensors[0]
    if not how or (how == "device" and products is not None) or student is None:
        return None
    operands = call.topk is None, products is None, call.backend.group
    kind = call.spec.divergence, student.dtype, student.device, operands
    if how == "host":
        return upstreams.OnHost(kind, call.inplace)
    wide = any(x is not None and x.dtype == torch.float64 for x in tensors)
    return upstreams.OnDevice(kind, student.device, torch.float64 if wide else torch.float32)


def _total(call: Call, tensors: Tensors) -> Tensor:
    """factor * sum of scale * loss, without gradients."""
    needs = [False] * len(tensors)
    if call.products is None:
        return _dense_total(call, tensors, needs, 1.0)[0]
    work = linear.work(call, tensors, needs, wait=False)
    return call.backend.total(work.loss, work.scale, call.rows.factor)


def reduced(call: Call, *tensors: Tensor | None) -> Tensor:
    """factor * sum of scale * (loss of each row), a 0-d tensor in acc dtype."""
    if _wants_gradient(tensors):
        if call.inplace:
            student = tensors[0]
            assert student is not None
            if rows_of(student).data_ptr() != student.data_ptr():
                # strides that no view of rows has: read from a copy, so written anew
                call = call._replace(inplace=False)
        return _Reduced.apply(call, *tensors)
    return _total(call, tensors)


# ---- one loss per row: gradients in backward


def row_values(call: Call, tensors: Tensors) -> Tensor:
    """Loss [N] of each row."""
    if call.products is not None:
        return linear.row_values(call, tensors)
    student, teacher = tensors[0], tensors[-1] if call.topk is None else call.topk
    assert student is not None and teacher is not None
    return _dense_pass(call, student, teacher, call.spec, None)


def row_gradients(
    call: Call, tensors: Tensors, needs: Needs, upstream: Tensor
) -> list[Tensor | None]:
    """The gradients of sum(upstream * loss of each row)."""
    scale = upstream.resolve_neg().reshape(-1).contiguous()
    if call.products is not None:
        return linear.row_gradients(call, tensors, needs, scale)
    return _dense_gradients(call._replace(rows=call.rows._replace(scale=scale)), tensors, needs)


class _PerRow(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, call: Call, lead: torch.Size, *tensors: Tensor | None) -> Tensor:
        # keep and label are the call's: saved so that whoever changes the labels hears of it
        _save(ctx, *tensors, call.rows.keep, call.rows.label)
        ctx.call = call
        return row_values(call, tensors).view(lead)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        *tensors, _, _ = _saved(ctx)
        call, needs = ctx.call, ctx.needs_input_grad[2:]
        if torch.is_grad_enabled() or in_functorch(upstream):
            return (None, None, *graph(call, tensors, needs, upstream.reshape(-1)))
        return (None, None, *row_gradients(call, tensors, needs, upstream))


def per_row(call: Call, lead: torch.Size, *tensors: Tensor | None) -> Tensor:
    """Loss of each row, in the leading shape; the gradients wait for backward."""
    if _wants_gradient(tensors):
        # a registered operator costs some 10 us a call more than this, as much as a small loss
        return _PerRow.apply(call, lead, *tensors)
    return row_values(call, tensors).view(lead)
