"""The losses of rows as registered operators, for torch.compile (see `fastkd.engine.autograd`)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastkd.backends.base import LossSpec, TopKRows, acc_dtype
from fastkd.backends.choice import pick
from fastkd.engine.autograd import differentiable, eager_grad, eager_loss, flat, row_gradients

PLAN = (
    "str divergence, float param, float temperature, float soft, float hard, float smoothing, "
    "SymInt vocab, SymInt classes"
)
_ROWS = f"Tensor? keep, Tensor? label, {PLAN}"
_ROWS_SCALED = f"Tensor? keep, Tensor? label, Tensor scale, {PLAN}"
_STORED = "Tensor logprobs, Tensor indices, Tensor? tail, bool restrict"


def row_loss(
    student: Tensor,
    teacher: Tensor | TopKRows,
    spec: LossSpec,
    keep: Tensor | None,
    label: Tensor | None,
) -> Tensor:
    """Loss of each row, in the leading shape of the student; the gradient waits for backward."""
    if isinstance(teacher, TopKRows):
        return topk_loss(student, *teacher, keep, label, *spec)
    return dense_loss(student, teacher, keep, label, *spec)


def columns_contiguous(x: Tensor) -> Tensor:
    # the public functions refuse such an operand, but a compiler may choose a layout of its own
    return x if x.stride(-1) == 1 or x.size(-1) == 1 else x.contiguous()


@torch.library.custom_op(
    "fastkd::dense_loss",
    mutates_args=(),
    schema=f"(Tensor student, Tensor teacher, {_ROWS}) -> Tensor",
)
def dense_loss(
    student: Tensor, teacher: Tensor, keep: Tensor | None, label: Tensor | None, *spec: Any
) -> Tensor:
    """Loss of each row, in the leading shape of the student; see `LossSpec`."""
    student, teacher = columns_contiguous(student), columns_contiguous(teacher)
    return eager_loss(pick(student.device), student, teacher, keep, label, LossSpec(*spec))


@torch.library.custom_op(
    "fastkd::dense_grad",
    mutates_args=(),
    schema=f"(Tensor student, Tensor teacher, {_ROWS_SCALED}) -> Tensor",
)
def dense_grad(
    student: Tensor,
    teacher: Tensor,
    keep: Tensor | None,
    label: Tensor | None,
    scale: Tensor,
    *spec: Any,
) -> Tensor:
    """Gradient of sum(scale * dense_loss) in the student's shape and dtype."""
    student, teacher = columns_contiguous(student), columns_contiguous(teacher)
    return eager_grad(pick(student.device), student, teacher, keep, label, scale, LossSpec(*spec))


@torch.library.custom_op(
    "fastkd::topk_loss",
    mutates_args=(),
    schema=f"(Tensor student, {_STORED}, {_ROWS}) -> Tensor",
)
def topk_loss(
    student: Tensor,
    logprobs: Tensor,
    indices: Tensor,
    tail: Tensor | None,
    restrict: bool,
    keep: Tensor | None,
    label: Tensor | None,
    *spec: Any,
) -> Tensor:
    """As `dense_loss`, against a `fastkd.backends.base.TopKRows`."""
    teacher = _stored(logprobs, indices, tail, restrict)
    return eager_loss(
        pick(student.device), columns_contiguous(student), teacher, keep, label, LossSpec(*spec)
    )


@torch.library.custom_op(
    "fastkd::topk_grad",
    mutates_args=(),
    schema=f"(Tensor student, {_STORED}, {_ROWS_SCALED}) -> Tensor",
)
def topk_grad(
    student: Tensor,
    logprobs: Tensor,
    indices: Tensor,
    tail: Tensor | None,
    restrict: bool,
    keep: Tensor | None,
    label: Tensor | None,
    scale: Tensor,
    *spec: Any,
) -> Tensor:
    """Gradient of sum(scale * topk_loss) in the student's shape and dtype."""
    teacher = _stored(logprobs, indices, tail, restrict)
    return eager_grad(
        pick(student.device),
        columns_contiguous(student),
        teacher,
        keep,
        label,
        scale,
        LossSpec(*spec),
    )


def _stored(logprobs: Tensor, indices: Tensor, tail: Tensor | None, restrict: bool) -> TopKRows:
    return TopKRows(
        logprobs.contiguous(),
        indices.contiguous(),
        None if tail is None else tail.contiguous(),
        restrict,
    )


@dense_loss.register_fake
@topk_loss.register_fake
def _(student: Tensor, teacher: Tensor, *_: Any) -> Tensor:
    return student.new_empty(student.shape[:-1], dtype=acc_dtype(student, teacher))


@dense_grad.register_fake
@topk_grad.register_fake
def _(student: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(student, memory_format=torch.contiguous_format)


def _save_dense(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    student, teacher, keep, label, *spec = inputs
    ctx.save_for_backward(student, teacher, keep, label)
    ctx.spec = LossSpec(*spec)


def _dense_backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
    student, teacher, keep, label = ctx.saved_tensors
    needs = ctx.needs_input_grad[:2]
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        by = upstream.reshape(-1)
        grads = differentiable(student, teacher, ctx.spec, flat(keep), flat(label), by, needs)
    else:

        def grad_of(
            s: Tensor, t: Tensor, keep: Any, label: Any, scale: Tensor, spec: LossSpec
        ) -> Tensor:
            return dense_grad(s, t, keep, label, scale, *spec)

        grads = row_gradients(student, teacher, keep, label, upstream, ctx.spec, needs, grad_of)
    return (*grads, *(None,) * (2 + len(ctx.spec)))


def _save_sparse(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    student, logprobs, indices, tail, ctx.restrict, keep, label, *spec = inputs
    ctx.save_for_backward(student, logprobs, indices, tail, keep, label)
    ctx.spec = LossSpec(*spec)


def _sparse_backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
    student, logprobs, indices, tail, keep, label = ctx.saved_tensors
    teacher = TopKRows(logprobs, indices, tail, ctx.restrict)
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        by = upstream.reshape(-1)
        (grad, _) = differentiable(
            student, teacher, ctx.spec, flat(keep), flat(label), by, (True, False)
        )
    else:
        grad = topk_grad(student, *teacher, keep, label, upstream, *ctx.spec)
    return (grad, *(None,) * (6 + len(ctx.spec)))


dense_loss.register_autograd(_dense_backward, setup_context=_save_dense)
topk_loss.register_autograd(_sparse_backward, setup_context=_save_sparse)
