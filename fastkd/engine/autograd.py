"""The drivers as autograd functions: the order of the passes, and what backward keeps.

Two ways to the same passes, for logits that are given, `LinearLogits` and top-k teachers alike:

* `reduced`, eager and reduced to a number: loss and gradients in one pass in forward. Backward
  hands the gradients out. They are given away once; a second backward computes them again.
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
from fastkd.backends.base import Backend, LossSpec, TopKRows, rows_of
from fastkd.backends.choice import in_functorch
from fastkd.engine import linear
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


def _teacher_gradient(call: Call, student: Tensor, teacher: Tensor) -> Tensor:
    dual = reference.dual(call.spec)
    assert dual is not None, "dispatch.py sends a divergence without a dual to the reference"
    grad = call.backend.empty_gradient(teacher)
    _dense_pass(call, teacher, student, dual, grad)
    return grad


def _dense_gradients(call: Call, tensors: Tensors, needs: Needs) -> list[Tensor | None]:
    student, teacher = tensors[0], tensors[-1] if call.topk is None else call.topk
    assert student is not None and teacher is not None
    grads: list[Tensor | None] = [None] * len(tensors)
    if needs[0]:
        grads[0] = grad = call.backend.empty_gradient(student)
        _dense_pass(call, student, teacher, call.spec, grad)
    if call.topk is None and needs[1]:
        assert isinstance(teacher, Tensor)
        grads[1] = _teacher_gradient(call, student, teacher)
    return grads


def _dense_total(call: Call, tensors: Tensors, needs: Needs) -> tuple[Tensor, list[Tensor | None]]:
    """(factor * sum of scale * loss, gradients)."""
    backend, spec, rows, topk, inplace, _ = call
    student: Any = tensors[0]
    grads: list[Tensor | None] = [None] * len(tensors)
    if topk is None and needs[1]:
        # first: an inplace student is gone after its own gradient
        grads[1] = _teacher_gradient(call, student, tensors[1])  # type: ignore[arg-type]
    grad = None
    if needs[0]:
        grads[0] = grad = student.detach() if inplace else backend.empty_gradient(student)
    if topk is None:
        other: Any = tensors[1]
        return backend.fused_total(student, other, spec, rows, grad), grads
    loss = _dense_pass(call, student, topk, spec, grad)
    return backend.total(loss, rows.scale, rows.factor), grads


def _multiplied(backend: Backend, grads: list[Tensor | None], by: Tensor) -> list[Tensor | None]:
    for grad in grads:
        if grad is not None:
            backend.multiply(grad, by)
    return grads


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
    keep, label, _, _ = call.rows
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
        ctx.call = call
        if call.products is not None:
            ctx.work = linear.work(call, tensors, needs, wait=True)
            _save(ctx, *tensors)
            return call.backend.total(ctx.work.loss, ctx.work.scale, call.rows.factor)
        total, ctx.work = _dense_total(call, tensors, needs)
        if call.inplace and needs[0]:
            student = tensors[0]
            assert student is not None
            # whoever saved these logits for a backward of his own must hear that they changed
            torch.autograd.graph.increment_version(student)
            _save(ctx, None, *tensors[1:])
            ctx.overwritten, ctx.version = ctx.work[0], student._version
        else:
            _save(ctx, *tensors)
        return total

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        call, needs = ctx.call, ctx.needs_input_grad[1:]
        over = call.inplace and needs[0]  # the gradient stands where the student's logits stood
        if torch.is_grad_enabled() or in_functorch(upstream):  # a vmap over upstream, say
            if over:
                raise RuntimeError(
                    "inplace=True has overwritten the student's logits, which create_graph=True "
                    "(double backward) and batched gradients need; use inplace=False"
                )
            return (None, *_Reduced._graph(call, _saved(ctx), needs, upstream))
        if over and ctx.overwritten._version != ctx.version:
            raise RuntimeError(
                "inplace=True keeps the gradient in the student's logits until backward, and they "
                "were modified in between; use inplace=False"
            )
        work, ctx.work = ctx.work, None  # given away once
        if over and work is None:
            return (None, *_Reduced._overwritten_again(ctx, upstream, needs))
        if over:
            ctx.first = upstream.clone()
        if call.products is not None:
            work = work or linear.work(call, _saved(ctx), needs, wait=True)
            return (None, *work.gradients(upstream))
        work = work or _dense_gradients(call, _saved(ctx), needs)
        return (None, *_multiplied(call.backend, work, upstream))

    @staticmethod
    def _graph(call: Call, tensors: Tensors, needs: Needs, upstream: Tensor) -> list[Tensor | None]:
        by, scale = upstream * call.rows.factor, call.rows.scale
        first = tensors[0]
        assert first is not None
        n = first.numel() // first.size(-1)
        return graph(call, tensors, needs, by.expand(n) if scale is None else by * scale)

    @staticmethod
    def _overwritten_again(ctx: Any, upstream: Tensor, needs: Needs) -> list[Tensor | None]:
        """The gradients of a second backward, of the first one's."""
        if any(needs[1:]):
            raise RuntimeError(
                "inplace=True has overwritten the student's logits, which the teacher's "
                "gradient of a second backward needs; use inplace=False with retain_graph"
            )
        if float(ctx.first) == 0.0:
            raise RuntimeError(
                "inplace=True keeps the gradient in the student's logits, and the first "
                "backward has multiplied it by 0; use inplace=False with retain_graph"
            )
        ratio = torch.where(ctx.first == upstream, 1.0, upstream / ctx.first)
        return [ctx.overwritten * ratio, *(None for _ in needs[1:])]


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
    needs = [False] * len(tensors)
    if call.products is None:
        return _dense_total(call, tensors, needs)[0]
    work = linear.work(call, tensors, needs, wait=False)
    return call.backend.total(work.loss, work.scale, call.rows.factor)


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
    call = call._replace(rows=call.rows._replace(scale=scale))
    if call.products is not None:
        return linear.work(call, tensors, needs, wait=False).gradients(None)
    return _dense_gradients(call, tensors, needs)


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
