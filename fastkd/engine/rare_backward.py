"""Backward where the usual one will not do: as a graph, and of logits that are gone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastkd.backends import formulas, reference
from fastkd.engine.records import Call

Tensors = Sequence["Tensor | None"]
Needs = Sequence[bool]


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
        columns = call.backend.teacher_columns
        s, t = reference.logits(tensors, heads, call.spec.vocab, mask, columns)
        s, t = (x.reshape(-1, x.size(-1)) for x in (s, t))
        value = formulas.row_loss(s, call.topk or t, call.spec, keep, label, columns)
        inputs = [x for x, need in zip(tensors, needs, strict=True) if need and x is not None]
        grads = list(torch.autograd.grad(value, inputs, by, create_graph=True))
    return [grads.pop(0) if need else None for need in needs]


def reduced_graph(
    call: Call, tensors: Tensors, needs: Needs, upstream: Tensor
) -> list[Tensor | None]:
    """`graph` of the reduced loss."""
    by, scale = upstream * call.rows.factor, call.rows.scale
    first = tensors[0]
    assert first is not None
    n = first.numel() // first.size(-1)
    return graph(call, tensors, needs, by.expand(n) if scale is None else by * scale)


def in_place(ctx: Any, work: Any, upstream: Tensor, needs: Needs) -> Any:
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
