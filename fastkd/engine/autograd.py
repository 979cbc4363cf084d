"""The drivers as autograd functions: the order of the passes, and what backward keeps.

Two ways to the same passes:

* `fused_total`, eager and reduced to a number: loss and gradient in one trip in forward. Backward
  hands the gradient out. It is given away once; a second backward computes it again.
* `row_loss`: one loss per row, the gradient computed in backward, nothing of size N x V kept. It
  serves reduction="none" and, as the registered operators of `fastkd.engine.ops`, torch.compile.

The teacher is a tensor of logits, or a `TopKRows`, which takes no part in autograd. A gradient of
the teacher is the student's gradient of the dual divergence with the sides exchanged.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fastkd.backends import reference
from fastkd.backends.base import (
    Backend,
    LossSpec,
    Rows,
    TopKRows,
    acc_dtype,
    rows_of,
)
from fastkd.backends.choice import in_functorch


def dual(spec: LossSpec) -> LossSpec:
    """The spec whose student's gradient is the teacher's gradient of `spec`; no hard term."""
    exchanged = reference.dual(spec)
    assert exchanged is not None, "losses.py sends a divergence without a dual to the reference"
    return exchanged


def _loss(
    backend: Backend,
    student: Tensor,
    teacher: Tensor | TopKRows,
    spec: LossSpec,
    folded: Rows,
    grad: Tensor | None = None,
) -> Tensor:
    into = None if grad is None else rows_of(grad)
    if isinstance(teacher, TopKRows):
        return backend.topk(rows_of(student), teacher, spec, folded, into)
    return backend.fused(rows_of(student), rows_of(teacher), spec, folded, into)


def _total(
    backend: Backend,
    student: Tensor,
    teacher: Tensor | TopKRows,
    spec: LossSpec,
    folded: Rows,
    grad: Tensor | None,
) -> Tensor:
    """factor * sum of scale * loss, a 0-d tensor in acc dtype; the gradient into `grad`."""
    if not isinstance(teacher, TopKRows):
        return backend.fused_total(student, teacher, spec, folded, grad)
    loss = _loss(backend, student, teacher, spec, folded, grad)
    return backend.total(loss, folded.scale, folded.factor)


def _gradient(
    backend: Backend,
    student: Tensor,
    teacher: Tensor | TopKRows,
    spec: LossSpec,
    folded: Rows,
) -> Tensor:
    """The gradient in the student's shape."""
    grad = backend.empty_gradient(student)
    _loss(backend, student, teacher, spec, folded, grad)
    return grad


def whole(backend: Backend) -> None:
    """Refuse a gradient of a gradient over a split vocabulary."""
    if backend.group is not None:
        raise NotImplementedError(
            "group: create_graph=True (double backward) and batched gradients over a split "
            "vocabulary are not supported; gather the logits and leave group out"
        )


def differentiable(
    student: Tensor,
    teacher: Tensor | TopKRows,
    spec: LossSpec,
    keep: Tensor | None,
    label: Tensor | None,
    upstream: Tensor,
    needs: tuple[bool, bool],
) -> list[Tensor | None]:
    """The gradients as a graph (create_graph=True), by the reference."""
    with torch.enable_grad():
        flat_s = student.reshape(-1, student.size(-1))
        flat_t = teacher
        if isinstance(flat_t, Tensor):
            flat_t = flat_t.reshape(-1, flat_t.size(-1))
        loss = reference.row_loss(flat_s, flat_t, spec, keep, label)
        inputs: list[Any] = [x for x, need in zip((student, teacher), needs, strict=True) if need]
        grads = list(torch.autograd.grad(loss, inputs, upstream, create_graph=True))
    return [grads.pop(0) if need else None for need in needs]


def save_operands(ctx: Any, *operands: Tensor | None) -> None:
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


def saved_operands(ctx: Any) -> list[Any]:
    saved = ctx.saved_tensors
    kept = getattr(ctx, "inference", [None] * len(saved))  # the registered operator saves its own
    return [x if y is None else y for x, y in zip(saved, kept, strict=True)]


def _save_sides(
    ctx: Any, student: Tensor | None, teacher: Tensor | TopKRows, *others: Tensor | None
) -> None:
    # a TopKRows is made for this one loss: nobody else can change it
    ctx.topk = teacher if isinstance(teacher, TopKRows) else None
    save_operands(ctx, student, None if isinstance(teacher, TopKRows) else teacher, *others)


def _saved_sides(ctx: Any) -> tuple[Any, ...]:
    student, teacher, *others = saved_operands(ctx)
    return student, teacher if ctx.topk is None else ctx.topk, *others


class _FusedTotal(torch.autograd.Function):
    @classmethod
    def apply(cls, *args: Any) -> Any:
        # Function's own, in Python, prepares for torch.func, which takes a tenth of a small loss;
        # what outlived one of its transforms is unwrapped by resolve_neg in losses.py
        if torch._C._are_functorch_transforms_active():
            return super().apply(*args)
        return super(torch.autograd.Function, cls).apply(*args)  # type: ignore[misc]

    @staticmethod
    def forward(
        ctx: Any,
        student: Tensor,
        teacher: Tensor | TopKRows,
        call: tuple[Backend, LossSpec, Rows, bool],
    ) -> Tensor:
        backend, spec, folded, inplace = call
        need_s, need_t, _ = ctx.needs_input_grad
        grad_s = grad_t = None
        if need_t and isinstance(teacher, Tensor):
            # first: an inplace student is gone after its own gradient
            grad_t = _gradient(backend, teacher, student, dual(spec), folded)
        if need_s:
            grad_s = student.detach() if inplace else backend.empty_gradient(student)
        total = _total(backend, student, teacher, spec, folded, grad_s)
        if need_s and inplace:
            # whoever saved these logits for a backward of his own must hear that they changed
            torch.autograd.graph.increment_version(student)
            _save_sides(ctx, None, teacher)
            ctx.version = student._version
        else:
            _save_sides(ctx, student, teacher)
        ctx.grads, ctx.call, ctx.first = (grad_s, grad_t), call, None
        return total

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled() or in_functorch(upstream):  # a vmap over upstream, say
            grads = _FusedTotal._graph(ctx, upstream)
        elif ctx.first is None:
            grads = _FusedTotal._first(ctx, upstream)
        else:
            grads = _FusedTotal._again(ctx, upstream)
        return (*grads, None)

    @staticmethod
    def _first(ctx: Any, upstream: Tensor) -> list[Tensor | None]:
        backend, _, _, inplace = ctx.call
        grads = list(ctx.grads)
        if inplace:
            _FusedTotal._check_untouched(ctx)
        for grad in grads:
            if grad is not None:
                backend.multiply(grad, upstream)
        ctx.first = upstream.clone() if inplace else upstream
        # an inplace gradient lives in the caller's logits, which a second backward has to find
        ctx.grads = (grads[0] if inplace else None, None)
        return grads

    @staticmethod
    def _check_untouched(ctx: Any) -> None:
        grad = ctx.grads[0]
        if grad is not None and grad._version != ctx.version:
            raise RuntimeError(
                "inplace=True keeps the gradient in the student's logits until backward, and they "
                "were modified in between; use inplace=False"
            )

    @staticmethod
    def _again(ctx: Any, upstream: Tensor) -> list[Tensor | None]:
        backend, spec, folded, inplace = ctx.call
        need_s, need_t, _ = ctx.needs_input_grad
        if inplace and need_s:
            _FusedTotal._check_untouched(ctx)
            if need_t:
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
            return [ctx.grads[0] * ratio, None]
        student, teacher = _saved_sides(ctx)
        grads: list[Tensor | None] = [None, None]
        if need_s:
            grads[0] = _gradient(backend, student, teacher, spec, folded)
        if need_t:
            grads[1] = _gradient(backend, teacher, student, dual(spec), folded)
        for grad in grads:
            if grad is not None:
                backend.multiply(grad, upstream)
        return grads

    @staticmethod
    def _graph(ctx: Any, upstream: Tensor) -> list[Tensor | None]:
        backend, spec, folded, inplace = ctx.call
        need_s, need_t, _ = ctx.needs_input_grad
        whole(backend)
        if inplace and need_s:
            raise RuntimeError(
                "inplace=True has overwritten the student's logits, which create_graph=True "
                "(double backward) and batched gradients need; use inplace=False"
            )
        student, teacher = _saved_sides(ctx)
        by = upstream * folded.factor
        by = (
            by.expand(student.numel() // student.size(-1))
            if folded.scale is None
            else (by * folded.scale)
        )
        return differentiable(
            student, teacher, spec, folded.keep, folded.label, by, (need_s, need_t)
        )


def _in_graph(student: Tensor, teacher: Tensor | TopKRows) -> bool:
    wants = student.requires_grad or (isinstance(teacher, Tensor) and teacher.requires_grad)
    return wants and torch.is_grad_enabled()


def fused_total(
    backend: Backend,
    student: Tensor,
    teacher: Tensor | TopKRows,
    spec: LossSpec,
    folded: Rows,
    inplace: bool,
) -> Tensor:
    """factor * sum of scale * (loss of each row), a 0-d tensor in acc dtype."""
    if _in_graph(student, teacher):
        if inplace and rows_of(student).data_ptr() != student.data_ptr():
            inplace = False  # strides that no view of rows has: read from a copy, so written anew
        return _FusedTotal.apply(student, teacher, (backend, spec, folded, inplace))
    return _total(backend, student, teacher, spec, folded, None)


class _RowLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        student: Tensor,
        teacher: Tensor | TopKRows,
        keep: Tensor | None,
        label: Tensor | None,
        call: tuple[Backend, LossSpec],
    ) -> Tensor:
        _save_sides(ctx, student, teacher, keep, label)
        ctx.call = call
        return eager_loss(call[0], student, teacher, keep, label, call[1])

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        student, teacher, keep, label = _saved_sides(ctx)
        needs, (backend, spec) = ctx.needs_input_grad[:2], ctx.call
        if torch.is_grad_enabled() or in_functorch(upstream):
            whole(backend)
            by = upstream.reshape(-1)
            grads = differentiable(student, teacher, spec, flat(keep), flat(label), by, needs)
        else:
            grad_of = partial(eager_grad, backend)
            grads = row_gradients(student, teacher, keep, label, upstream, spec, needs, grad_of)
        return (*grads, None, None, None)


def row_gradients(
    student: Any,
    teacher: Any,
    keep: Tensor | None,
    label: Tensor | None,
    upstream: Tensor,
    spec: LossSpec,
    needs: tuple[bool, bool],
    grad_of: Callable[..., Tensor],
) -> list[Tensor | None]:
    """The gradients of both sides; grad_of(student, teacher, keep, label, scale, spec)."""
    grads: list[Tensor | None] = [None, None]
    if needs[0]:
        grads[0] = grad_of(student, teacher, keep, label, upstream, spec)
    if needs[1]:
        grads[1] = grad_of(teacher, student, keep, None, upstream, dual(spec))
    return grads


def row_loss(
    backend: Backend,
    student: Tensor,
    teacher: Tensor | TopKRows,
    spec: LossSpec,
    keep: Tensor | None,
    label: Tensor | None,
) -> Tensor:
    """Loss of each row, in the leading shape of the student; the gradient waits for backward."""
    if _in_graph(student, teacher):
        # a registered operator costs some 10 us a call more than this, as much as a small loss
        return _RowLoss.apply(student, teacher, keep, label, (backend, spec))
    return eager_loss(backend, student, teacher, keep, label, spec)


def eager_loss(
    backend: Backend,
    student: Tensor,
    teacher: Tensor | TopKRows,
    keep: Tensor | None,
    label: Tensor | None,
    spec: LossSpec,
) -> Tensor:
    folded = Rows(flat(keep), flat(label), None, 1.0)
    return _loss(backend, student, teacher, spec, folded).view(student.shape[:-1])


def eager_grad(
    backend: Backend,
    student: Tensor,
    teacher: Tensor | TopKRows,
    keep: Tensor | None,
    label: Tensor | None,
    scale: Tensor,
    spec: LossSpec,
) -> Tensor:
    """Gradient of sum(scale * loss of each row) in the student's shape and dtype."""
    scale = scale.resolve_neg().reshape(-1).to(acc_dtype(student, teacher)).contiguous()
    folded = Rows(flat(keep), flat(label), scale, 1.0)
    return _gradient(backend, student, teacher, spec, folded)


def flat(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.reshape(-1).contiguous()
