"""A loss of one logit each: checks, what is left out, the reduction and the gradient.

A backend with kernels for it has one pass (`element_passes.py`). Else forward reads the operands
once and keeps nothing of their size; backward reads them once more and writes the gradient with its
final factor, rounded once, in torch's operations; on the CPU over blocks that stay in the cache.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from fastkd.arguments.messages import describe, shown, sizes
from fastkd.arguments.tensors import DTYPES, INT_DTYPES, check_dense, layout
from fastkd.backends.base import on_host
from fastkd.backends.choice import in_functorch, pick, valueless
from fastkd.bernoulli import Bernoulli, describe_logits
from fastkd.engine import class_axis, validate
from fastkd.engine.autograd import save, saved
from fastkd.engine.element_passes import Elements, Order, Run, fused, graph, inverse, order_of
from fastkd.engine.reduction import check_class_weights, reads_values

REDUCTIONS = ("mean", "sum", "none")
BLOCK = 2**15  # elements; some ten tensors of them stay in the second level of the cache


def loss(
    what: Bernoulli,
    student: Tensor,
    teacher: Tensor,
    *,
    labels: Tensor | None = None,
    ignore_index: Any = -100,
    weight: Tensor | None = None,
    pos_weight: Tensor | None = None,
    reduction: str = "mean",
    normalizer: float | Tensor | None = None,
) -> Tensor:
    """The loss of all logits, reduced; the options are those of `fastkd.binary`."""
    ignored = class_axis.several(ignore_index)
    _check(student, teacher, reduction)
    normalizer = validate.normalizer(normalizer, reduction, student)
    _check_labels(labels, student)
    for name, x in (("weight", weight), ("pos_weight", pos_weight)):
        if x is not None:
            _check_factor(name, x, student)
    wide = torch.float64 in (student.dtype, teacher.dtype)
    acc = torch.float64 if wide else torch.float32
    operands = Elements(student, teacher, labels, weight, pos_weight)
    run = Run(what, ignored, reduction, normalizer, acc)
    others = labels, weight, pos_weight, normalizer
    learnt = any(isinstance(y, Tensor) and y.requires_grad for y in others)
    plain = learnt or valueless(student) or not student.numel()
    reads = labels is not None and reads_values(labels)
    backend = None if plain else pick(student.device)
    passes = backend if backend is not None and backend.bernoulli is not None else None
    if passes is not None and passes.on_host and (reads or labels is None):
        run = run._replace(read=True)
        return fused(passes, run, operands, _plain, lambda: _check_values(labels, ignored))
    if reads:
        _check_values(labels, ignored)
        run = run._replace(read=True)
    if passes is not None and not passes.on_host:
        return fused(passes, run, operands, _plain, None)
    if plain:
        return _plain(run, operands)
    found: Tensor = _Elementwise.apply(run, *operands)
    return order_of(student).back(found) if reduction == "none" else found


# ---- checks


def _check(student: Any, teacher: Any, reduction: str) -> None:
    for name, x in (("student", student), ("teacher", teacher)):
        if not isinstance(x, Tensor):
            raise TypeError(describe_logits(name, x))
        if x.layout is not torch.strided or x.is_nested or hasattr(x, "placements"):
            raise TypeError(f"{name}: got {layout(x)}, expected a dense tensor")
        if x.dtype not in DTYPES:
            raise TypeError(f"{describe_logits(name, x)}, in float32, bfloat16, float16 or float64")
    if student.shape != teacher.shape:
        raise ValueError(
            f"teacher: got shape {sizes(teacher.shape)}, expected the student's "
            f"{sizes(student.shape)}"
        )
    if student.device != teacher.device:
        raise ValueError(f"teacher: got a tensor on {teacher.device}, expected {student.device}")
    reduction_of(reduction)


def reduction_of(reduction: Any) -> Any:
    """The reduction; ValueError for what is none."""
    if not isinstance(reduction, str) or reduction not in REDUCTIONS:
        raise ValueError(
            f"reduction: got {shown(reduction)}, expected one of {', '.join(REDUCTIONS)}"
        )
    return reduction


def _check_labels(labels: Any, student: Tensor) -> None:
    if labels is None:
        return
    expected = f"a tensor {sizes(student.shape)} of floats from 0 to 1, bool or integers 0 and 1"
    if not isinstance(labels, Tensor):
        raise TypeError(f"labels: got {describe(labels)}, expected {expected}")
    check_dense("labels", labels)
    if labels.dtype not in (*DTYPES, *INT_DTYPES, torch.bool):
        raise TypeError(f"labels: got {describe(labels)}, expected {expected}")
    if labels.shape != student.shape:
        hint = ""
        if labels.numel() == student.numel():
            hint = f"; labels.view({sizes(student.shape)}) if the order is the same"
        elif labels.shape == student.shape[:-1]:
            hint = "; of one class among several it is fastkd.distillation_loss"
        raise ValueError(f"labels: got shape {sizes(labels.shape)}, expected {expected}{hint}")
    if labels.device != student.device:
        raise ValueError(f"labels: got a tensor on {labels.device}, expected {student.device}")


def _check_values(labels: Any, ignored: tuple[int, ...]) -> None:
    bad = _kept(labels, ignored) & ~((labels >= 0) & (labels <= 1))
    if bool(bad.any()):
        value = float(labels.reshape(-1)[int(bad.reshape(-1).int().argmax())])
        raise ValueError(
            f"labels: got {value:g}, expected 0 to 1, NaN or ignore_index={shown(ignored)}"
        )


def _check_factor(name: str, x: Any, student: Tensor) -> None:
    shape = sizes(student.shape)
    if not isinstance(x, Tensor) or not x.is_floating_point():
        raise TypeError(f"{name}: got {describe(x)}, expected floats that broadcast to {shape}")
    check_dense(name, x)
    try:
        fits = torch.broadcast_shapes(x.shape, student.shape) == student.shape
    except RuntimeError:
        fits = False
    if not fits:
        raise ValueError(
            f"{name}: got shape {sizes(x.shape)}, expected one that broadcasts to {shape}"
        )
    if x.device != student.device:
        raise ValueError(f"{name}: got a tensor on {x.device}, expected {student.device}")
    if name == "pos_weight":
        check_class_weights(name, x)


def _kept(labels: Tensor, ignored: tuple[int, ...]) -> Tensor:
    """Which logits count."""
    keep = ~labels.isnan() if labels.is_floating_point() else torch.ones_like(labels).bool()
    if labels.dtype != torch.bool:
        wide = labels if labels.is_floating_point() else labels.to(torch.int64)
        for index in ignored:
            keep = keep & (wide != index)
    return keep


# ---- one block


def _block(run: Run, x: Elements, slopes: bool) -> tuple[Tensor, Tensor, Any, Any]:
    """Of some logits: loss times weight, weights (or their sum); else slopes of the former."""
    s, t, y, weight, pos_weight = (
        None if part is None else part.to(run.acc) if part.is_floating_point() else part
        for part in x
    )
    assert s is not None
    keep = None if y is None else _kept(y, run.ignored)
    factor = None if weight is None else weight.expand_as(s)
    if y is not None and keep is not None:
        # where, not a product: what is left out may hold anything
        y = torch.where(keep, y.to(run.acc), 0.0)
        s = torch.where(keep, s, 0.0)
        t = None if t is None else torch.where(keep, t, 0.0)
        factor = keep.to(run.acc) if factor is None else torch.where(keep, factor, 0.0)
    value, slope_s, slope_t = run.what(s, t, y, pos_weight, slopes)
    if y is not None and not run.read:
        bad = torch.where((y >= 0) & (y <= 1), 0.0, math.nan)
        value = value + bad
        slope_s = None if slope_s is None else slope_s + bad
    found: list[Any] = [value, slope_s, slope_t]
    if factor is not None:
        found = [None if x is None else factor * x for x in found]
    counted = s.new_full((), s.numel()) if factor is None else factor
    return found[0], counted, found[1], found[2]


def _denominator(run: Run, counted: Tensor) -> Tensor:
    if run.reduction != "mean":
        return torch.ones_like(counted)
    if run.normalizer is None:
        return counted
    return torch.as_tensor(run.normalizer, dtype=counted.dtype, device=counted.device)


def _plain(run: Run, x: Elements) -> Tensor:
    """The definition, which torch differentiates as often as it is asked to."""
    value, factor, *_ = _block(run, x, slopes=False)
    if run.reduction == "none":
        return value
    return value.sum() * inverse(_denominator(run, factor.sum()))


# ---- all of them


def _blocks(run: Run, x: Elements, order: Order) -> Iterator[tuple[slice, Elements]]:
    """Blocks of rows; all of them at once where the device has no cache to keep them in."""
    x = x if run.what.soft else x._replace(teacher=None)
    parts = [order.rows(part) for part in x]
    assert parts[0] is not None
    rows = parts[0].size(0)
    step = max(1, BLOCK // order.columns) if on_host(x.student.device) else rows
    for start in range(0, rows, step):
        at = slice(start, start + step)
        yield at, Elements(*(y if y is None or y.dim() < 2 else y[at] for y in parts))  # type: ignore


class _Elementwise(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, run: Run, *given: Any) -> Tensor:
        save(ctx, *given)
        student = given[0]
        ctx.run, order = run, order_of(student)
        blocks = _blocks(run, Elements(*given), order)
        if run.reduction == "none":
            values = [_block(run, block, slopes=False)[0] for _, block in blocks]
            return torch.cat(values)
        total, counted = torch.zeros(2, dtype=torch.float64, device=student.device)
        for _, block in blocks:
            value, factor, *_ = _block(run, block, slopes=False)
            total = total + value.sum(dtype=torch.float64)
            counted = counted + factor.sum(dtype=torch.float64)
        ctx.by = inverse(_denominator(run, counted))
        return (total * ctx.by).to(run.acc)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        run, needs = ctx.run, ctx.needs_input_grad[1:3]
        x = Elements(*saved(ctx))
        if torch.is_grad_enabled() or in_functorch(upstream):  # a gradient of the gradient, say
            of_logits = order_of(x.student).back(upstream) if upstream.dim() else upstream
            return None, *graph(run, x, needs, of_logits, _plain), None, None, None
        order, each = order_of(x.student), run.reduction == "none"
        by: Any = upstream if each else (upstream * ctx.by).to(run.acc)
        parts: list[list[Tensor]] = [[], []]
        for at, block in _blocks(run, x, order):
            factor = by[at] if each else by
            for part, one, need, slope in zip(
                parts, (x.student, x.teacher), needs, _block(run, block, slopes=True)[2:],
                strict=True,
            ):  # fmt: skip
                if need:
                    assert one is not None
                    slope = torch.zeros_like(block.student) if slope is None else slope * factor
                    part.append(slope.to(one.dtype))
        grads = (order.back(torch.cat(part)) if part else None for part in parts)
        return None, *grads, None, None, None
