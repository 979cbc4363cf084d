"""The driver of losses whose logits are never built, as autograd functions.

As with logits that are given (`fastkd.engine.autograd`), there are two ways to the same passes:

* `Total`, eager and reduced to a number: loss and gradients in one trip over the chunks, in
  forward. Backward hands the gradients out; a second one makes the trip again.
* `RowLoss`: one loss per row, the gradients by a trip in backward, which makes the logits again
  (two more products). It serves reduction="none", gradients of weight and normalizer and, as the
  registered operator `fastkd::linear_loss`, torch.compile.

Double backward builds the logits in plain torch.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastkd.backends import reference
from fastkd.backends.base import Backend, LossSpec, Rows, TopKRows, without_autocast
from fastkd.backends.choice import in_functorch, pick
from fastkd.engine.autograd import dual, flat, save_operands, saved_operands, whole
from fastkd.engine.chunks import Dense, Linear, Side, Stored, Tensors, Wants, run
from fastkd.engine.ops import PLAN, columns_contiguous
from fastkd.operands import Head, build


class Call(NamedTuple):
    """What a loss is made of besides tensors that autograd knows.

    heads: of both sides, None for logits that are given. An operand's tensors stand in a row with
    the other's: hidden, weight, bias or the logits; none at all for a teacher that has no part or
    is stored.
    """

    backend: Backend
    heads: tuple[Head | None, Head | None]
    spec: LossSpec
    folded: Rows
    asked: int | None
    pack: bool
    boost: float
    stored: TopKRows | None = None


# ---- one trip


class Work(NamedTuple):
    """A trip that has been made: sides that hold gradients, and the loss [n] of the rows in use."""

    sides: list[Side]
    loss: Tensor
    scale: Tensor | None
    kept: Tensor | None

    def gradients(self, by: Tensor | None) -> list[Tensor | None]:
        with without_autocast(self.loss.device):
            return [grad for side in self.sides for grad in side.finish(by)]


def trip(call: Call, tensors: Tensors, wants: Wants, wait: bool) -> Work:
    backend, heads, spec, folded, asked, pack, boost, stored = call
    keep, label, scale, factor = folded
    index = None
    if pack and keep is not None:
        index = keep.nonzero().squeeze(-1)
        keep, label, scale = (
            None,
            None if label is None else label[index],
            None if scale is None else scale[index],
        )
    cut = 1 if heads[0] is None else 3
    given: list[Linear | Dense] = []
    for at, head in ((slice(cut), heads[0]), (slice(cut, None), heads[1])):
        own, want = tensors[at], wants[at]
        if head is not None:
            given.append(Linear(own, head, spec.vocab, index, keep, want, boost, backend))
        elif own:
            assert own[0] is not None
            given.append(Dense(own[0], index, want[0], backend))
    first = tensors[0]
    assert first is not None
    n = first.numel() // first.size(-1) if index is None else index.numel()
    teacher: Side | None = given[1] if len(given) > 1 else None
    if stored is not None:
        teacher = Stored(stored, index)
    plans = spec, dual(spec) if teacher is not None and teacher.any else None
    folded = Rows(keep, label, scale, factor)
    with without_autocast(first.device):
        loss = run(backend, given[0], teacher, plans, n, folded, asked, wait)
    return Work([*given], loss, scale, index)


def logits(
    tensors: Tensors, heads: tuple[Head | None, Head | None], vocab: int, keep: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Both sides' logits in plain torch; the student's twice where the teacher has no part."""
    cut = 1 if heads[0] is None else 3
    built: list[Tensor] = []
    for at, head in ((slice(cut), heads[0]), (slice(cut, None), heads[1])):
        own = tensors[at]
        if head is not None:
            hidden, weight, bias = own
            assert hidden is not None and weight is not None
            with without_autocast(hidden.device):
                built.append(build(hidden, weight, bias, head, vocab, keep))
        elif own:
            assert own[0] is not None
            built.append(own[0])
    return built[0], built[1] if len(built) > 1 else built[0].detach()


def _graph(
    call: Call, tensors: Tensors, wants: Wants, by: Tensor | None, upstream: Tensor
) -> list[Tensor | None]:
    """The gradients as a graph (create_graph=True), by the reference, the logits in full.

    by: [N] scales of the rows, upstream included; None for `upstream` and folded's.
    """
    whole(call.backend)
    keep, label, scale, factor = call.folded
    first = tensors[0]
    assert first is not None
    lead = first.shape[:-1]
    with torch.enable_grad():
        mask = None if keep is None else keep.view(lead)
        s, t = logits(tensors, call.heads, call.spec.vocab, mask)
        s, t = (x.reshape(-1, x.size(-1)) for x in (s, t))
        value = reference.row_loss(s, call.stored or t, call.spec, keep, label)
        if by is None:
            by = upstream * factor
            by = by.expand(value.numel()) if scale is None else by * scale
        inputs = [x for x, want in zip(tensors, wants, strict=True) if want and x is not None]
        grads = list(torch.autograd.grad(value, inputs, by, create_graph=True))
    return [grads.pop(0) if want else None for want in wants]


# ---- reduced: gradients in forward


class Total(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, call: Call, *tensors: Tensor | None) -> Tensor:
        work = trip(call, tensors, ctx.needs_input_grad[1:], wait=True)
        save_operands(ctx, *tensors)
        ctx.call, ctx.work = call, work
        return call.backend.total(work.loss, work.scale, call.folded.factor)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        call, wants = ctx.call, ctx.needs_input_grad[1:]
        if torch.is_grad_enabled() or in_functorch(upstream):
            return (None, *_graph(call, saved_operands(ctx), wants, None, upstream))
        work, ctx.work = ctx.work, None
        if work is None:  # given away by an earlier backward
            work = trip(call, saved_operands(ctx), wants, wait=True)
        return (None, *work.gradients(upstream))


# ---- one loss per row: gradients in backward


def row_values(call: Call, tensors: Tensors) -> Tensor:
    work = trip(call, tensors, [False] * len(tensors), wait=False)
    if work.kept is None:
        return work.loss
    assert call.folded.keep is not None
    return work.loss.new_zeros(call.folded.keep.numel()).index_copy_(0, work.kept, work.loss)


def _row_gradients(
    call: Call, tensors: Tensors, wants: Wants, upstream: Tensor
) -> list[Tensor | None]:
    scale = upstream.resolve_neg().reshape(-1).contiguous()
    call = call._replace(folded=call.folded._replace(scale=scale))
    return trip(call, tensors, wants, wait=False).gradients(None)


class RowLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, call: Call, lead: torch.Size, *tensors: Tensor | None) -> Tensor:
        save_operands(ctx, *tensors)
        ctx.call = call
        return row_values(call, tensors).view(lead)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        tensors, wants = saved_operands(ctx), ctx.needs_input_grad[2:]
        if torch.is_grad_enabled() or in_functorch(upstream):
            by = upstream.reshape(-1)
            return (None, None, *_graph(ctx.call, tensors, wants, by, upstream))
        return (None, None, *_row_gradients(ctx.call, tensors, wants, upstream))


# ---- the same as a registered operator, for torch.compile

_SIDES = "".join(
    f"Tensor? {side}, Tensor? weight_{side}, Tensor? bias_{side}, float scale_{side}, "
    f"float softcap_{side}, ScalarType dtype_{side}, "
    for side in ("student", "teacher")
)
_INPUTS = (
    f"{_SIDES}Tensor? keep, Tensor? label, Tensor? logprobs, Tensor? indices, Tensor? tail, "
    f"bool restrict, SymInt chunk, {PLAN}"
)
_TENSORS = (0, 1, 2, 6, 7, 8)  # of the inputs, those that may have a gradient
_OTHERS = (12, 13, 14, 15, 16)  # further tensors


def registered_rows(
    tensors: Tensors,
    heads: tuple[Head | None, Head | None],
    spec: LossSpec,
    keep: Tensor | None,
    label: Tensor | None,
    asked: int | None,
    stored: TopKRows | None,
) -> Tensor:
    """As `RowLoss`, by `fastkd::linear_loss`."""
    cut = 1 if heads[0] is None else 3
    sides: list[Any] = []
    for own, head in ((tensors[:cut], heads[0]), (tensors[cut:], heads[1])):
        if head is not None:
            sides += (*own, head.scale, head.softcap or 0.0, head.dtype)
        else:
            x = own[0] if own else None
            like = x if stored is None else stored.logprobs
            sides += (x, None, None, 1.0, 0.0, torch.float32 if like is None else like.dtype)
    return linear_loss(
        *sides, keep, label, *(stored or (None, None, None, False)), asked or 0, *spec
    )


def _parsed(inputs: tuple[Any, ...]) -> tuple[Call, list[Tensor | None], list[int]]:
    """A call, its tensors, and where they stand among the inputs."""
    keep, label, logprobs, indices, tail, restrict, chunk, *spec = inputs[12:]
    stored = None if logprobs is None else TopKRows(logprobs, indices, tail, restrict)
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
            tensors.append(columns_contiguous(x))
            places.append(start)
    folded = Rows(flat(keep), flat(label), None, 1.0)
    backend = pick(inputs[0].device)
    call = Call(
        backend, (heads[0], heads[1]), LossSpec(*spec), folded, chunk or None, False, 1.0, stored
    )
    return call, tensors, places


@torch.library.custom_op("fastkd::linear_loss", mutates_args=(), schema=f"({_INPUTS}) -> Tensor")
def linear_loss(*inputs: Any) -> Tensor:
    """Loss of each row, in the leading shape of the student."""
    call, tensors, _ = _parsed(inputs)
    return row_values(call, tensors).view(inputs[0].shape[:-1])


@torch.library.custom_op(
    "fastkd::linear_grads",
    mutates_args=(),
    schema=f"({_INPUTS}, Tensor scale, bool[] wants) -> Tensor[]",
)
def linear_grads(*inputs: Any) -> list[Tensor]:
    """Gradients of sum(scale * linear_loss) for those of the six tensors that want one."""
    *given, scale, wants = inputs
    call, tensors, places = _parsed(tuple(given))
    wanted = [wants[_TENSORS.index(place)] for place in places]
    grads = _row_gradients(call, tensors, wanted, scale)
    return [grad for grad in grads if grad is not None]


@linear_loss.register_fake
def _(*inputs: Any) -> Tensor:
    wide = torch.float64 in (inputs[5], inputs[11])
    dtype = torch.float64 if wide else torch.float32
    return inputs[0].new_empty(inputs[0].shape[:-1], dtype=dtype)


@linear_grads.register_fake
def _(*inputs: Any) -> list[Tensor]:
    tensors = [inputs[place] for place in _TENSORS]
    return [
        torch.empty_like(x, memory_format=torch.contiguous_format)
        for x, want in zip(tensors, inputs[-1], strict=True)
        if want
    ]


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*(inputs[place] for place in (*_TENSORS, *_OTHERS)))
    ctx.others = [None if isinstance(x, Tensor) else x for x in inputs]


def _registered_backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
    inputs = list(ctx.others)
    for place, x in zip((*_TENSORS, *_OTHERS), ctx.saved_tensors, strict=True):
        inputs[place] = x
    out: list[Tensor | None] = [None] * len(inputs)
    wants = [ctx.needs_input_grad[place] for place in _TENSORS]
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        call, tensors, places = _parsed(tuple(inputs))
        wanted = [ctx.needs_input_grad[place] for place in places]
        grads = _graph(call, tensors, wanted, upstream.reshape(-1), upstream)
        for place, grad in zip(places, grads, strict=True):
            out[place] = grad
        return tuple(out)
    given = linear_grads(*inputs, upstream, wants)
    for place, want in zip(_TENSORS, wants, strict=True):
        out[place] = given.pop(0) if want else None
    return tuple(out)


linear_loss.register_autograd(_registered_backward, setup_context=_save)
