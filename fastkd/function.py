"""The drivers as autograd functions: the order of the passes, and what backward keeps.

Two ways to the same passes:

* `fused_total`, eager and reduced to a number: loss and gradient in one trip in forward. Backward
  hands the gradient out. It is given away once; a second backward computes it again.
* `row_loss`, the registered operator `fastkd::dense_loss`: one loss per row, the gradient computed
  in backward, nothing of size N x V kept. It serves reduction="none" and torch.compile.

The teacher's gradient is the student's gradient of the dual divergence with the sides exchanged.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastkd import reference
from fastkd.backend import Passes, Plan, acc_dtype, pick, rows


def _dual(plan: Plan) -> Plan:
    """The plan whose student's gradient is the teacher's gradient of `plan`; no hard term."""
    dual = reference.entry(plan).exchanged()
    assert dual is not None, "losses.py sends a divergence without a dual to the reference"
    return plan._replace(divergence=dual.name, param=dual.param, hard=0.0, smoothing=0.0)


def _gradient(
    passes: Passes,
    student: Tensor,
    teacher: Tensor,
    plan: Plan,
    keep: Tensor | None,
    label: Tensor | None,
    scale: Tensor | None,
    factor: float,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(loss [N], gradient in the student's shape); into `out` where it is given."""
    grad = torch.empty_like(student, memory_format=torch.contiguous_format) if out is None else out
    loss = passes.fused(
        rows(student), rows(teacher), plan, keep, label, scale, factor, rows(grad)
    )
    return loss, grad


def _differentiable(
    student: Tensor,
    teacher: Tensor,
    plan: Plan,
    keep: Tensor | None,
    label: Tensor | None,
    upstream: Tensor,
    needs: tuple[bool, bool],
) -> list[Tensor | None]:
    """The gradients as a graph (create_graph=True), by the reference."""
    with torch.enable_grad():
        flat_s, flat_t = (x.reshape(-1, x.size(-1)) for x in (student, teacher))
        loss = reference.row_loss(flat_s, flat_t, plan, keep, label)
        inputs = [x for x, need in zip((student, teacher), needs, strict=True) if need]
        grads = list(torch.autograd.grad(loss, inputs, upstream, create_graph=True))
    return [grads.pop(0) if need else None for need in needs]


class _FusedTotal(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        student: Tensor,
        teacher: Tensor,
        passes: Passes,
        plan: Plan,
        keep: Tensor | None,
        label: Tensor | None,
        scale: Tensor | None,
        factor: float,
        inplace: bool,
    ) -> Tensor:
        need_s, need_t, *_ = ctx.needs_input_grad
        grad_s = grad_t = None
        if need_t:  # first: an inplace student is gone after its own gradient
            plan_t = _dual(plan)
            _, grad_t = _gradient(passes, teacher, student, plan_t, keep, None, scale, factor)
        if need_s:
            out = student.detach() if inplace else None
            loss, grad_s = _gradient(
                passes, student, teacher, plan, keep, label, scale, factor, out
            )
        else:
            loss = passes.fused(
                rows(student), rows(teacher), plan, keep, label, scale, factor, None
            )
        if need_s and inplace:
            # whoever saved these logits for a backward of his own must hear that they changed
            torch.autograd.graph.increment_version(student)
            ctx.save_for_backward(teacher)
        else:
            ctx.save_for_backward(student, teacher)
        ctx.grads = (grad_s, grad_t)
        ctx.rest = (passes, plan, keep, label, scale, factor, inplace)
        ctx.first = None
        ctx.version = student._version
        return passes.total(loss, scale, factor)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        if torch.is_grad_enabled():
            grads = _FusedTotal._graph(ctx, upstream)
        elif ctx.first is None:
            grads = _FusedTotal._first(ctx, upstream)
        else:
            grads = _FusedTotal._again(ctx, upstream)
        return (*grads, None, None, None, None, None, None, None)

    @staticmethod
    def _first(ctx: Any, upstream: Tensor) -> list[Tensor | None]:
        passes, inplace = ctx.rest[0], ctx.rest[-1]
        grads = list(ctx.grads)
        if inplace:
            _FusedTotal._check_untouched(ctx)
        for grad in grads:
            if grad is not None:
                passes.multiply(grad, upstream)
        ctx.first = upstream
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
        passes, plan, keep, label, scale, factor, inplace = ctx.rest
        need_s, need_t = ctx.needs_input_grad[:2]
        if inplace and need_s:
            grad = ctx.grads[0]
            _FusedTotal._check_untouched(ctx)
            if need_t:
                raise RuntimeError(
                    "inplace=True has overwritten the student's logits, which the teacher's "
                    "gradient of a second backward needs; use inplace=False with retain_graph"
                )
            return [grad * torch.where(ctx.first == upstream, 1.0, upstream / ctx.first), None]
        student, teacher = ctx.saved_tensors
        grads: list[Tensor | None] = [None, None]
        if need_s:
            _, grads[0] = _gradient(passes, student, teacher, plan, keep, label, scale, factor)
        if need_t:
            _, grads[1] = _gradient(
                passes, teacher, student, _dual(plan), keep, None, scale, factor
            )
        for grad in grads:
            if grad is not None:
                passes.multiply(grad, upstream)
        return grads

    @staticmethod
    def _graph(ctx: Any, upstream: Tensor) -> list[Tensor | None]:
        _, plan, keep, label, scale, factor, inplace = ctx.rest
        need_s, need_t = ctx.needs_input_grad[:2]
        if inplace and need_s:
            raise RuntimeError(
                "inplace=True has overwritten the student's logits, which create_graph=True "
                "(double backward) needs; use inplace=False"
            )
        student, teacher = ctx.saved_tensors
        n = student.numel() // max(student.size(-1), 1)
        by = upstream * factor if scale is None else upstream * factor * scale
        return _differentiable(
            student, teacher, plan, keep, label, by.expand(n), (need_s, need_t)
        )


def fused_total(
    passes: Passes,
    student: Tensor,
    teacher: Tensor,
    plan: Plan,
    keep: Tensor | None,
    label: Tensor | None,
    scale: Tensor | None,
    factor: float,
    inplace: bool,
) -> Tensor:
    """factor * sum of scale * (loss of each row), a 0-d tensor in acc dtype."""
    if inplace and rows(student).data_ptr() != student.data_ptr():
        inplace = False  # strides that no view of rows has: read from a copy, so written anew
    if torch.is_grad_enabled() and (student.requires_grad or teacher.requires_grad):
        return _FusedTotal.apply(
            student, teacher, passes, plan, keep, label, scale, factor, inplace
        )
    loss = passes.fused(rows(student), rows(teacher), plan, keep, label, scale, factor, None)
    return passes.total(loss, scale, factor)


@torch.library.custom_op("fastkd::dense_loss", mutates_args=())
def row_loss(
    student: Tensor,
    teacher: Tensor,
    keep: Tensor | None,
    label: Tensor | None,
    divergence: str,
    param: float,
    temperature: float,
    soft: float,
    hard: float,
    smoothing: float,
    vocab: int,
    classes: int,
) -> Tensor:
    """Loss of each row, in the leading shape of the student; see `fastkd.backend.Plan`."""
    plan = Plan(divergence, param, temperature, soft, hard, smoothing, vocab, classes)
    student, teacher = _columns_contiguous(student), _columns_contiguous(teacher)
    loss = pick(student.device).fused(
        rows(student), rows(teacher), plan, _flat(keep), _flat(label), None, 1.0, None
    )
    return loss.view(student.shape[:-1])


@torch.library.custom_op("fastkd::dense_grad", mutates_args=())
def row_grad(
    student: Tensor,
    teacher: Tensor,
    keep: Tensor | None,
    label: Tensor | None,
    scale: Tensor,
    divergence: str,
    param: float,
    temperature: float,
    soft: float,
    hard: float,
    smoothing: float,
    vocab: int,
    classes: int,
) -> Tensor:
    """Gradient of sum(scale * dense_loss) in the student's shape and dtype."""
    plan = Plan(divergence, param, temperature, soft, hard, smoothing, vocab, classes)
    student, teacher = _columns_contiguous(student), _columns_contiguous(teacher)
    acc = acc_dtype(student, teacher)
    scale = scale.reshape(-1).to(acc).contiguous()
    _, grad = _gradient(
        pick(student.device), student, teacher, plan, _flat(keep), _flat(label), scale, 1.0
    )
    return grad


def _columns_contiguous(x: Tensor) -> Tensor:
    # the public functions refuse such an operand, but a compiler may choose a layout of its own
    return x if x.stride(-1) == 1 or x.size(-1) == 1 else x.contiguous()


def _flat(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.reshape(-1).contiguous()


@row_loss.register_fake
def _(student: Tensor, teacher: Tensor, *_: Any) -> Tensor:
    return student.new_empty(student.shape[:-1], dtype=acc_dtype(student, teacher))


@row_grad.register_fake
def _(student: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(student, memory_format=torch.contiguous_format)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    student, teacher, keep, label, *plan = inputs
    ctx.save_for_backward(student, teacher, keep, label)
    ctx.plan = Plan(*plan)


def _backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
    student, teacher, keep, label = ctx.saved_tensors
    plan, (need_s, need_t) = ctx.plan, ctx.needs_input_grad[:2]
    grads: list[Tensor | None] = [None, None]
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        grads = _differentiable(
            student,
            teacher,
            plan,
            _flat(keep),
            _flat(label),
            upstream.reshape(-1),
            (need_s, need_t),
        )
    else:
        if need_s:
            grads[0] = row_grad(student, teacher, keep, label, upstream, *plan)
        if need_t:
            grads[1] = row_grad(teacher, student, keep, None, upstream, *_dual(plan))
    return (*grads, *(None for _ in range(2 + len(plan))))


row_loss.register_autograd(_backward, setup_context=_save)
