"""The losses of rows as registered operators, for torch.compile (see `fastkd.engine.per_row`).

One operator serves all operands: `fastkd::row_loss`, and `fastkd::row_grads` for its backward. Each
side is six arguments in a row: logits, or hidden states with a weight, a bias and the head's
numbers. The student always has the first one; a teacher that is `TopKRows`, or has no part, has
none.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastkd.backends.base import OUTPUTS, LossSpec, Rows, TopKRows
from fastkd.backends.choice import pick
from fastkd.engine.per_row import row_gradients, row_values
from fastkd.engine.rare_backward import graph
from fastkd.engine.records import Call, Products
from fastkd.engine.reduction import flat
from fastkd.operands import Head

_SIDES = ", ".join(
    f"{first} {side}, Tensor? weight_{side}, Tensor? bias_{side}, float scale_{side}, "
    f"float softcap_{side}, ScalarType dtype_{side}"
    for side, first in (("student", "Tensor"), ("teacher", "Tensor?"))
)
_SPEC = (
    "str divergence, float param, float temperature, float soft, float hard, float smoothing, "
    "SymInt vocab, SymInt classes, float z_loss"
)
_INPUTS = (
    f"{_SIDES}, Tensor? keep, Tensor? label, Tensor? logprobs, Tensor? indices, Tensor? tail, "
    f"bool restrict, SymInt chunk, {_SPEC}"
)
_TENSORS = (0, 1, 2, 6, 7, 8)  # of the inputs, those that may have a gradient
_OTHERS = (12, 13, 14, 15, 16)  # further tensors
_DTYPES = (5, 11)  # of the sides, which tell the accumulation's


def row_loss(call: Call, *tensors: Tensor | None) -> Tensor:
    """Loss of each row, in the leading shape of the student; the gradient waits for backward.

    keep and label of `call` are in the leading shape too; its backend is chosen inside.
    """
    return loss_of_rows(*_inputs(call, tensors))


def row_outputs(call: Call, *tensors: Tensor | None) -> tuple[Tensor, Tensor]:
    """As `row_loss`, and the outputs [N, 7] of the same pass."""
    return loss_and_outputs(*_inputs(call, tensors))


def _inputs(call: Call, tensors: tuple[Tensor | None, ...]) -> tuple[Any, ...]:
    heads = (None, None) if call.products is None else call.products.heads
    cut = 1 if heads[0] is None else 3
    sides: list[Any] = []
    for own, head in ((tensors[:cut], heads[0]), (tensors[cut:], heads[1])):
        if head is not None:
            sides += (*own, head.scale, head.softcap or 0.0, head.dtype)
        else:
            x = own[0] if own else None if call.topk is None else call.topk.logprobs
            dtype = torch.float32 if x is None else x.dtype
            sides += (own[0] if own else None, None, None, 1.0, 0.0, dtype)
    chunk = 0 if call.products is None else call.products.chunk or 0
    topk = call.topk or (None, None, None, False)
    return (*sides, call.rows.keep, call.rows.label, *topk, chunk, *call.spec)


def _columns_contiguous(x: Tensor) -> Tensor:
    # the public functions refuse such an operand, but a compiler may choose a layout of its own
    return x if x.stride(-1) == 1 or x.size(-1) == 1 else x.contiguous()


def _parsed(inputs: tuple[Any, ...]) -> tuple[Call, list[Tensor | None], list[int]]:
    """A call, its tensors in a row, and where they stand among the inputs."""
    keep, label, logprobs, indices, tail, restrict, chunk, *spec = inputs[12:]
    topk = None
    if logprobs is not None:
        tail = None if tail is None else tail.contiguous()
        topk = TopKRows(logprobs.contiguous(), indices.contiguous(), tail, restrict)
    tensors: list[Tensor | None] = []
    heads: list[Head | None] = []
    places: list[int] = []
    for start in (0, 6):
        x, weight, bias, scale, softcap, dtype = inputs[start : start + 6]
        heads.append(None if weight is None else Head(scale, softcap or None, dtype))
        if weight is not None:
            tensors += (x, weight, bias)
            places += (start, start + 1, start + 2)
        elif x is not None:
            tensors.append(_columns_contiguous(x))
            places.append(start)
    products = None
    if heads != [None, None] or (len(tensors) == 1 and topk is None):
        products = Products((heads[0], heads[1]), chunk or None, False, 1.0)
    rows = Rows(flat(keep), flat(label))
    call = Call(pick(inputs[0].device), LossSpec(*spec), rows, topk, False, products)
    return call, tensors, places


@torch.library.custom_op("fastkd::row_loss", mutates_args=(), schema=f"({_INPUTS}) -> Tensor")
def loss_of_rows(*inputs: Any) -> Tensor:
    """Loss of each row, in the leading shape of the student."""
    call, tensors, _ = _parsed(inputs)
    return row_values(call, tensors).view(inputs[0].shape[:-1])


@torch.library.custom_op(
    "fastkd::row_outputs", mutates_args=(), schema=f"({_INPUTS}) -> (Tensor, Tensor)"
)
def loss_and_outputs(*inputs: Any) -> tuple[Tensor, Tensor]:
    """`loss_of_rows` with [N, 7] outputs, which have no gradient."""
    call, tensors, _ = _parsed(inputs)
    told = inputs[0].new_empty(inputs[0].shape[:-1].numel(), len(OUTPUTS), dtype=_acc(inputs))
    loss = row_values(call._replace(outputs=told), tensors)
    return loss.view(inputs[0].shape[:-1]), told


def _acc(inputs: tuple[Any, ...]) -> torch.dtype:
    wide = torch.float64 in [inputs[place] for place in _DTYPES]
    return torch.float64 if wide else torch.float32


@torch.library.custom_op(
    "fastkd::row_grads",
    mutates_args=(),
    schema=f"({_INPUTS}, Tensor scale, bool[] needs) -> Tensor[]",
)
def grads_of_rows(*inputs: Any) -> list[Tensor]:
    """Gradients of sum(scale * row_loss) for those of the six tensors that need one."""
    *first, scale, needs = inputs
    call, tensors, places = _parsed(tuple(first))
    needed = [needs[_TENSORS.index(place)] for place in places]
    grads = row_gradients(call, tensors, needed, scale)
    return [grad for grad in grads if grad is not None]


@loss_of_rows.register_fake
def _(*inputs: Any) -> Tensor:
    return inputs[0].new_empty(inputs[0].shape[:-1], dtype=_acc(inputs))


@loss_and_outputs.register_fake
def _(*inputs: Any) -> tuple[Tensor, Tensor]:
    loss = inputs[0].new_empty(inputs[0].shape[:-1], dtype=_acc(inputs))
    return loss, loss.new_empty(loss.numel(), len(OUTPUTS))


@grads_of_rows.register_fake
def _(*inputs: Any) -> list[Tensor]:
    tensors = [inputs[place] for place in _TENSORS]
    return [
        torch.empty_like(x, memory_format=torch.contiguous_format)
        for x, need in zip(tensors, inputs[-1], strict=True)
        if need
    ]


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*(inputs[place] for place in (*_TENSORS, *_OTHERS)))
    ctx.others = [None if isinstance(x, Tensor) else x for x in inputs]


def _backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
    inputs = list(ctx.others)
    for place, x in zip((*_TENSORS, *_OTHERS), ctx.saved_tensors, strict=True):
        inputs[place] = x
    out: list[Tensor | None] = [None] * len(inputs)
    needs = [ctx.needs_input_grad[place] for place in _TENSORS]
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        call, tensors, places = _parsed(tuple(inputs))
        needed = [ctx.needs_input_grad[place] for place in places]
        grads = graph(call, tensors, needed, upstream.reshape(-1))
        for place, grad in zip(places, grads, strict=True):
            out[place] = grad
        return tuple(out)
    found = grads_of_rows(*inputs, upstream, needs)
    for place, need in zip(_TENSORS, needs, strict=True):
        out[place] = found.pop(0) if need else None
    return tuple(out)


def _backward_of_loss(ctx: Any, upstream: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    return _backward(ctx, upstream)


loss_of_rows.register_autograd(_backward, setup_context=_save)
loss_and_outputs.register_autograd(_backward_of_loss, setup_context=_save)
