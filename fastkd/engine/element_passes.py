"""A loss of one logit each in one pass: the gradient in forward, where its factor is known.

As `autograd.py`: what backward will make of the loss is expected to be what it was at the last step
of the same lines; where that was wrong, the gradient is computed again. A loss for each logit has
its gradient in backward, whose upstream has as many numbers. On a GPU no number is read: sum,
denominator and factors are 0-d tensors there.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastkd.backends.base import Backend
from fastkd.backends.choice import in_functorch
from fastkd.bernoulli import Bernoulli, ElementFactor, Flat
from fastkd.engine.autograd import OnDevice, OnHost, save, saved, taken


class Elements(NamedTuple):
    """The operands: as they were given, or as blocks of rows [r, C]."""

    student: Tensor
    teacher: Tensor | None
    labels: Tensor | None
    weight: Tensor | None
    pos_weight: Tensor | None


class Run(NamedTuple):
    """What is asked of them."""

    what: Bernoulli
    ignored: tuple[int, ...]
    reduction: str
    normalizer: float | Tensor | None
    acc: torch.dtype
    read: bool = False  # whether labels have been looked at: else those out of range become NaN


class Order(NamedTuple):
    """How logits lie as [R, C], with their memory from first to last where it is dense."""

    dims: list[int]
    shape: list[int]  # of all dimensions, in this order
    columns: int

    def rows(self, x: Tensor | None) -> Tensor | None:
        """[R, C] of an operand; less of a factor that is the same for all rows."""
        if x is None or (x.dim() < 2 <= len(self.dims) and self.dims == sorted(self.dims)):
            return x
        like = [self.shape[self.dims.index(dim)] for dim in range(len(self.dims))]
        return x.expand(like).permute(self.dims).reshape(-1, self.columns)

    def flat(self, x: Tensor) -> Tensor:
        """[R * C] without gaps; a copy where its own memory lies otherwise."""
        x = x.detach().resolve_neg()
        # reshape alone may be a view with a stride
        return x.permute(self.dims).reshape(-1).contiguous() if self.dims else x.reshape(1)

    def factor(self, x: Tensor | None, acc: torch.dtype) -> ElementFactor | None:
        """What broadcasts to the logits; of it, only what differs is laid out."""
        if x is None:
            return None
        x = x.detach().resolve_neg().to(acc)
        own = x[(None,) * (len(self.dims) - x.dim())].permute(self.dims)
        used = [at for at, size in enumerate(own.shape) if size > 1]
        first, last = (used[0], used[-1] + 1) if used else (0, 0)
        if list(own.shape[first:last]) != self.shape[first:last]:
            return ElementFactor(own.expand(self.shape).reshape(-1).contiguous(), 1)
        repeat = math.prod(self.shape[last:]) if used else math.prod(self.shape)
        return ElementFactor(own.reshape(-1).contiguous(), repeat)

    def back(self, rows: Tensor) -> Tensor:
        """[R, C] as the logits were, strides and all."""
        inverse = sorted(range(len(self.dims)), key=self.dims.__getitem__)
        return rows.view(self.shape).permute(inverse)


def order_of(x: Tensor) -> Order:
    dims = list(range(x.dim()))
    if torch.ops.aten.is_non_overlapping_and_dense(x):
        strides = x.stride()
        dims.sort(key=lambda dim: (-strides[dim], dim))
    columns = x.size(dims[-1]) if len(dims) > 1 else 1
    return Order(dims, [x.size(dim) for dim in dims], columns)


def flat(run: Run, x: Elements, order: Order) -> Flat:
    """The operands as a backend's pass takes them."""
    labels = None if x.labels is None else order.flat(x.labels)
    ignored = run.ignored
    if labels is not None and labels.dtype == torch.bool:
        labels, ignored = labels.view(torch.uint8), ()
    teacher = None if x.teacher is None or not run.what.soft else order.flat(x.teacher)
    weight, pos_weight = (order.factor(y, run.acc) for y in (x.weight, x.pos_weight))
    return Flat(order.flat(x.student), teacher, labels, ignored, weight, pos_weight, run.acc)


def inverse(by: Tensor) -> Tensor:
    """1 / by, and 0 of 0."""
    return torch.where(by == 0, 0.0, 1.0 / torch.where(by == 0, 1.0, by))


def _count(backend: Backend, x: Flat) -> Any:
    """The sum of the weights of the logits that count; on the host -inf for a bad label."""
    if x.labels is not None:
        return backend.count_elements(x)
    n = x.student.numel()
    if x.weight is None:
        return float(n)
    total = x.weight.data.sum(dtype=torch.float64) * (n / x.weight.data.numel())
    return float(total) if backend.on_host else total


def _share(backend: Backend, run: Run, x: Flat, check: Any) -> Any:
    """What the reduction multiplies by: 1, or one over the denominator."""
    mean, by = run.reduction == "mean", run.normalizer
    counts = mean and by is None
    if counts or backend.on_host:  # there counting looks at the labels, too
        counted = _count(backend, x)
        if backend.on_host and counted == -math.inf:
            check()
        by = counted if counts else by
    if not mean or by is None:
        return 1.0
    if isinstance(by, Tensor) and not backend.on_host:
        return inverse(by.to(x.student.device)).to(run.acc)
    by = float(by)
    return 1.0 / by if by else 0.0


def fused(backend: Backend, run: Run, x: Elements, plain: Any, check: Any) -> Tensor:
    """The loss of all logits, reduced.

    Args:
        plain: the definition, (run, x) -> loss.
        check: looks at the labels, and raises for one that is none.
    """
    order = order_of(x.student)
    operands = flat(run, x, order)
    work = _Work(backend, run, order, plain, _share(backend, run, operands, check))
    found: Tensor = _Fused.apply(work, operands, *x)
    # outside of the function, whose views refuse `loss[mask] = 0`
    return order.back(found) if run.reduction == "none" else found


class _Work(NamedTuple):
    backend: Backend
    run: Run
    order: Order
    plain: Any
    by: Any  # of the reduction: a number, or a 0-d tensor on a device

    def gradients(
        self, x: Flat, needs: Any, factor: Any, each: Tensor | None, like: Tensor, *again: Any
    ) -> tuple[Any, tuple[Tensor | None, ...]]:
        """The sum of the losses, and the gradients [n] that are needed.

        Args:
            like: the teacher.
            again: (earlier gradients, a 0-d bool on the device: whether they are right already).
        """
        memory, earlier = (x.student, x.teacher), again[0] if again else (None, None)
        grads = [
            (self.backend.empty_gradient(y) if mine is None else mine)
            if need and y is not None
            else None
            for y, need, mine in zip(memory, needs, earlier, strict=True)
        ]
        run = self.backend.bernoulli
        total = run(self.run.what, x, factor, each, *grads, None, *again[1:])
        if needs[1] and x.teacher is None:  # no soft term
            grads[1] = torch.zeros_like(x.student, dtype=like.dtype)
        return total, tuple(grads)

    def guess(self, x: Flat, needs: Any) -> OnHost | OnDevice:
        """What is expected of the factor."""
        kind = "elements", self.run.what.divergence.name, x.student.dtype, needs
        if self.backend.on_host:
            return OnHost(kind, False)
        device = x.student.device
        return OnDevice(taken((*kind, device, self.run.acc)), device, self.run.acc)


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, work: _Work, x: Flat, *given: Any) -> Tensor:
        save(ctx, *given)
        ctx.work, ctx.found, ctx.guess, run = work, None, None, work.run
        if run.reduction == "none":
            values = torch.empty_like(x.student, dtype=run.acc)
            work.backend.bernoulli(run.what, x, 1.0, None, None, None, values)
            return values
        needs = ctx.needs_input_grad[2:4]
        if any(needs):
            ctx.guess = work.guess(x, needs)
        expected = None if ctx.guess is None else ctx.guess.expected
        if expected is None:
            total = work.backend.bernoulli(run.what, x, 1.0, None, None, None, None)
        else:
            total, ctx.found = work.gradients(x, needs, expected * work.by, None, given[1])
        return torch.as_tensor(total * work.by, dtype=run.acc, device=x.student.device)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        work, needs, given = ctx.work, ctx.needs_input_grad[2:4], saved(ctx)
        found, ctx.found = ctx.found, None  # given away once
        if torch.is_grad_enabled() or in_functorch(upstream):  # a gradient of the gradient, say
            each = upstream if ctx.guess is not None else work.order.back(upstream)
            grads = graph(work.run, Elements(*given), needs, each, work.plain)
            return (None, None, *grads, None, None, None)
        factor, each, right = 1.0, None, None
        if ctx.guess is None:
            each = upstream.resolve_neg().to(work.run.acc).contiguous()
        elif isinstance(ctx.guess, OnHost):
            factor = float(upstream)
            found = found if ctx.guess.settle(factor) else None
            factor *= work.by
        else:
            right, factor = ctx.guess.settle(upstream), upstream * work.by
        if found is None or right is not None:
            x = flat(work.run, Elements(*given), work.order)
            again = () if found is None else (found, right)
            _, found = work.gradients(x, needs, factor, each, given[1], *again)
        back = (None if part is None else work.order.back(part) for part in found)
        return (None, None, *back, None, None, None)


def graph(
    run: Run, x: Elements, needs: Any, upstream: Tensor, plain: Any
) -> tuple[Tensor | None, ...]:
    """The gradients of student and teacher in torch's own operations."""
    with torch.enable_grad():
        found = torch.autograd.grad(
            plain(run, x),
            [one for one, need in zip(x, needs, strict=False) if need and one is not None],
            upstream,
            create_graph=True,
            allow_unused=True,
        )
    some = iter(found)
    return tuple(next(some) if need else None for need in needs)
