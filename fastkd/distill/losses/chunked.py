"""A loss per row from its formula in torch: checks, ignored rows, and one pass over memory.

Written for a whole batch, a formula of ten operations fetches and writes [N, V] ten times. Here it
is run on a few rows at a time, value and gradient, while they are in the cache: beside the gradient
nothing of that size is made.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor
from typing_extensions import Unpack

from fastkd import rows as row_options
from fastkd.arguments.messages import shown, unexpected
from fastkd.arguments.tensors import check_dense
from fastkd.rows import IGNORED, RowOptions

# ([n, V] student, [n, V] teacher, [n] label) -> [n] loss; float32, float64 where an operand is
Formula = Callable[[Tensor, Tensor, Any], Tensor]

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# elements of one operand at a time: a formula's ten tensors of them are found in
# the cache again; an accelerator wants few launches
HOST_ELEMENTS, DEVICE_ELEMENTS = 2**18, 2**26


class Rows(RowOptions, total=False):
    """The options that all losses of rows share, as in `fastkd.losses`."""

    vocab_size: int | None
    class_dim: int


def row_loss(
    formula: Formula,
    student: Tensor,
    teacher: Tensor,
    labels: Tensor | None,
    **rows: Unpack[Rows],
) -> Tensor:
    """The formula's loss of each row that counts, reduced; its gradient in the operands' dtypes."""
    known_options(rows)
    weight, reduction = rows.get("weight"), rows.get("reduction", "mean")
    student, teacher = row_options.classes_last(student, teacher, rows.get("class_dim", -1))
    student, teacher = operands(student, teacher, rows.get("vocab_size"))
    row_options.check(rows, list(student.shape[:-1]))
    vocab, leading = student.size(-1), student.shape[:-1]
    keep, label, bad = row_options.mask(student, labels, rows.get("ignore_index", IGNORED))
    acc = wide(student, teacher)
    factor = torch.ones(student.numel() // vocab, dtype=acc, device=student.device)
    factor = factor if weight is None else weight.reshape(-1).to(acc)
    factor = row_options.factors(factor, keep, bad, student.size(0), rows)
    s, t = student.reshape(-1, vocab), teacher.reshape(-1, vocab)
    # a gradient of the factor needs the loss of each row
    single = reduction == "none" or factor.requires_grad
    if s.numel() == 0:
        loss = (s.to(acc) + t.to(acc)).sum(-1)
    elif plainly() or s.numel() <= elements(s):
        loss = _masked(formula, s, t, keep, label, acc)
    elif single:
        loss = _Chunked.apply(s, t, (formula, keep, label, acc), None)
    else:
        return _Chunked.apply(s, t, (formula, keep, label, acc), factor)
    loss = loss * factor
    return loss.view(leading) if reduction == "none" else loss.sum()


def in_functorch() -> bool:
    """Whether a transform of torch.func or forward-mode AD is active.

    Both differentiate torch's own operations, and know no gradient made by hand.
    """
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def plainly() -> bool:
    """Whether the formula has to run in one piece, by torch's own operations alone."""
    return torch.compiler.is_compiling() or in_functorch()


def known_options(rows: RowOptions, options: type = Rows) -> None:
    """TypeError for an option that no loss of rows has."""
    if unknown := rows.keys() - options.__annotations__.keys():
        known = sorted(("labels", *options.__annotations__))
        raise TypeError(unexpected(unknown, known))


def operands(
    student: Tensor, teacher: Tensor, vocab_size: int | None = None
) -> tuple[Tensor, Tensor]:
    """Both sides over the columns in use; TypeError, ValueError where they do not go together."""
    logits("student", student)
    logits("teacher", teacher)
    if student.device != teacher.device:
        raise ValueError(
            f"teacher: got a tensor on {teacher.device}, expected the student's {student.device}"
        )
    if vocab_size is not None:
        most = min(student.size(-1), teacher.size(-1))
        if isinstance(vocab_size, bool) or not isinstance(vocab_size, int):
            raise TypeError(f"vocab_size: got {shown(vocab_size)}, expected an integer")
        if not 1 <= vocab_size <= most:
            raise ValueError(f"vocab_size: got {vocab_size}, expected 1 <= vocab_size <= {most}")
        student, teacher = student[..., :vocab_size], teacher[..., :vocab_size]
    if student.shape != teacher.shape:
        padded = student.shape[:-1] == teacher.shape[:-1] and vocab_size is None
        hint = "; where padded differently, vocab_size=the number of columns in use"
        hint = hint if padded else ""
        raise ValueError(
            f"teacher: got shape {list(teacher.shape)}, expected the student's "
            f"{list(student.shape)}{hint}"
        )
    return student, teacher


def logits(name: str, x: Tensor) -> None:
    """TypeError, ValueError for what is no tensor of logits."""
    if not isinstance(x, Tensor):
        got = type(x).__name__
        raise TypeError(f"{name}: got {got}, expected a tensor of logits [..., V]")
    if x.dtype not in DTYPES:
        raise TypeError(
            f"{name}: got {x.dtype}, expected logits in float32, bfloat16, float16 or float64"
        )
    check_dense(name, x)
    if x.dim() == 0 or x.size(-1) == 0:
        raise ValueError(f"{name}: got shape {list(x.shape)}, expected [..., V] with V >= 1")


def wide(student: Tensor, teacher: Tensor) -> torch.dtype:
    """The dtype of the arithmetic: float32, float64 where an operand is."""
    return torch.promote_types(torch.promote_types(student.dtype, teacher.dtype), torch.float32)


def elements(x: Tensor) -> int:
    """How many of an operand to take at a time."""
    return HOST_ELEMENTS if x.device.type == "cpu" else DEVICE_ELEMENTS


def _masked(
    formula: Formula,
    s: Tensor,
    t: Tensor,
    keep: Tensor | None,
    label: Tensor | None,
    acc: torch.dtype,
) -> Tensor:
    """[n]; differentiable as often as torch is."""
    s, t = s.to(acc), t.to(acc)
    if keep is None:
        return formula(s, t, label)
    # where, not a product: what an ignored row holds (NaN) must not reach value or gradient
    kept = keep.unsqueeze(-1)
    loss = formula(torch.where(kept, s, 0.0), torch.where(kept, t, 0.0), label)
    return torch.where(keep, loss, 0.0)


class _Chunked(torch.autograd.Function):
    """sum of factor * loss with its gradient made in forward; without a factor the loss [N]."""

    @staticmethod
    def forward(
        ctx: Any, student: Tensor, teacher: Tensor, call: tuple[Any, ...], factor: Tensor | None
    ) -> Tensor:
        needs = ctx.needs_input_grad[:2]
        ctx.call, ctx.factor, ctx.inference = call, factor, None
        if teacher.is_inference():  # which save_for_backward refuses
            ctx.inference, teacher = teacher, student
        ctx.save_for_backward(student, teacher)
        teacher = teacher if ctx.inference is None else ctx.inference
        if factor is None:
            ctx.grads = None
            return _run(student, teacher, call, None, (False, False))[0]
        loss, ctx.grads = _run(student, teacher, call, factor, needs)
        return (loss.double() * factor).sum().to(factor.dtype)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        student, teacher = ctx.saved_tensors
        teacher = teacher if ctx.inference is None else ctx.inference
        needs = ctx.needs_input_grad[:2]
        by = upstream if ctx.factor is None else ctx.factor * upstream
        if torch.is_grad_enabled():  # a gradient of the gradient is wanted: torch's own graph
            inputs = [x for x, need in zip((student, teacher), needs, strict=True) if need]
            loss = _masked(ctx.call[0], student, teacher, *ctx.call[1:])
            found = iter(torch.autograd.grad(loss, inputs, by, create_graph=True))
            return (*(next(found) if need else None for need in needs), None, None)
        if ctx.grads is None:
            grads = _run(student, teacher, ctx.call, by, needs)[1]
        else:  # given away: a second backward makes its own
            grads, ctx.grads = ctx.grads, None
            if upstream.device.type != "cpu" or upstream != 1:
                for grad in grads:
                    if grad is not None:
                        grad.mul_(upstream)
        return (*grads, None, None)


def _run(
    student: Tensor,
    teacher: Tensor,
    call: tuple[Any, ...],
    factor: Tensor | None,
    needs: tuple[bool, ...],
) -> tuple[Tensor, list[Tensor | None]]:
    """Loss [N], and where there is a factor and a need the gradients of sum(factor * loss)."""
    formula, keep, label, acc = call
    needed = [need and factor is not None for need in needs]
    at_all, keep = _chunks(student, keep)
    # rows that are passed over are not written
    new = torch.empty_like if at_all and isinstance(at_all[0], slice) else torch.zeros_like
    loss = new(student[:, 0], dtype=acc, memory_format=torch.contiguous_format)
    grads = [
        new(x, memory_format=torch.contiguous_format) if want else None
        for x, want in zip((student, teacher), needed, strict=True)
    ]
    for at in at_all:
        mask, where = (None if x is None else x[at] for x in (keep, label))
        s, t = (
            x[at].detach().requires_grad_(want)
            for x, want in zip((student, teacher), needed, strict=True)
        )
        with torch.set_grad_enabled(any(needed)):
            part = _masked(formula, s, t, mask, where, acc)
        loss[at] = part.detach()
        if factor is not None and any(needed):
            inputs = [x for x in (s, t) if x.requires_grad]
            found = iter(torch.autograd.grad(part, inputs, factor[at].detach()))
            for grad in grads:
                if grad is not None:
                    grad[at] = next(found)
    return loss, grads


def _chunks(x: Tensor, keep: Tensor | None) -> tuple[list[Any], Tensor | None]:
    """Which rows to take at a time, and the mask that they still need.

    On the host only rows that count are taken; on a device counting them would be a wait.
    """
    step = max(1, elements(x) // x.size(-1))
    if keep is not None and keep.device.type == "cpu":
        kept = keep.nonzero().squeeze(-1)
        if kept.size(0) < keep.size(0):
            return list(kept.split(step)) if kept.size(0) else [], None
        keep = None
    return [slice(start, start + step) for start in range(0, x.size(0), step)], keep
