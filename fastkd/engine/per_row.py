"""One loss per row: the gradients are computed in backward, and nothing of size N x V is kept.

It serves reduction="none" and gradients of weight and normalizer. `fastkd.engine.ops` is the same
as a registered operator, for torch.compile.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastkd.backends.choice import in_functorch
from fastkd.engine import linear
from fastkd.engine.autograd import (
    Needs,
    Tensors,
    dense_gradients,
    dense_pass,
    save,
    saved,
    wants_gradient,
)
from fastkd.engine.rare_backward import graph
from fastkd.engine.records import Call


def row_values(call: Call, tensors: Tensors) -> Tensor:
    """Loss [N] of each row."""
    if call.products is not None:
        return _linear_values(call, tensors)
    student, teacher = tensors[0], tensors[-1] if call.topk is None else call.topk
    assert student is not None and teacher is not None
    return dense_pass(call, student, teacher, call.spec, None, call.outputs)


def row_gradients(
    call: Call, tensors: Tensors, needs: Needs, upstream: Tensor
) -> list[Tensor | None]:
    """The gradients of sum(upstream * loss of each row)."""
    wide = any(x is not None and x.dtype == torch.float64 for x in tensors)
    acc = torch.float64 if wide else torch.float32
    acc = acc if call.topk is None else call.topk.logprobs.dtype
    # the passes read it as acc: whoever calls the operator may give another dtype
    scale = upstream.resolve_neg().reshape(-1).to(acc).contiguous()
    if call.products is not None:
        return _linear_gradients(call, tensors, needs, scale)
    return dense_gradients(call._replace(rows=call.rows._replace(scale=scale)), tensors, needs)


def _linear_values(call: Call, tensors: Tensors) -> Tensor:
    """Loss [N] of each row."""
    done = linear.work(call, tensors, [False] * len(tensors), wait=False)
    if done.kept is None:
        return done.loss
    assert call.rows.keep is not None
    return done.loss.new_zeros(call.rows.keep.numel()).index_copy_(0, done.kept, done.loss)


def _linear_gradients(
    call: Call, tensors: Tensors, needs: Needs, scale: Tensor
) -> list[Tensor | None]:
    """The gradients of sum(scale * loss of each row)."""
    back = None
    if linear.has_float16(call, scale.device):  # the products keep to the range of 16 bits
        top = scale.abs().amax() if scale.numel() else scale.new_ones(())
        power = torch.where(top.isfinite() & (top > 0.0), top, 1.0).log2().floor().exp2()
        scale, back = scale / power, power
    call = call._replace(rows=call.rows._replace(scale=scale))
    return linear.work(call, tensors, needs, wait=False).gradients(back)


class _PerRow(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, call: Call, *tensors: Tensor | None) -> Tensor:
        # keep and label are the call's: saved so that whoever changes the labels hears of it
        save(ctx, *tensors, call.rows.keep, call.rows.label)
        ctx.call = call.told()
        return row_values(call, tensors)  # no view: those refuse `loss[mask] = 0`

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        *tensors, _, _ = saved(ctx)
        call, needs = ctx.call, ctx.needs_input_grad[1:]
        if torch.is_grad_enabled() or in_functorch(upstream):
            return (None, *graph(call, tensors, needs, upstream.reshape(-1)))
        return (None, *row_gradients(call, tensors, needs, upstream))


def per_row(call: Call, lead: torch.Size, *tensors: Tensor | None) -> Tensor:
    """Loss of each row, in the leading shape; the gradients wait for backward."""
    if wants_gradient(tensors):
        # a registered operator costs some 10 us a call more than this, as much as a small loss
        values: Tensor = _PerRow.apply(call, *tensors)
        return values.view(lead)
    return row_values(call, tensors).view(lead)
