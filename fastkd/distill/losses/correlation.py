"""How far two vectors point apart, and with it the correlation loss of responses."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastkd.arguments.numbers import coefficient, temperature_of
from fastkd.rows import classes_last, mask

from .chunked import (
    elements,
    in_functorch,
    operands,
    plainly,
    row_loss,
    wide,
)

INF = math.inf
ZERO = 1e-30  # squared norm up to which a vector is taken for 0: it has no direction


def dist(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor | None = None,
    *,
    beta: float = 1.0,
    gamma: float = 1.0,
    temperature: float = 1.0,
    ignore_index: int | Sequence[int] = -100,
    vocab_size: int | None = None,
    class_dim: int = -1,
) -> Tensor:
    """One minus the correlation of the probabilities, over the classes and over the batch.

        beta (1 - mean_i r(q_i., p_i.)) + gamma (1 - mean_v r(q_.v, p_.v)),   r Pearson's

    with p = softmax(teacher / T), q = softmax(student / T) [N, V], i the rows that count and v the
    classes; no factor T^2. What is constant on both sides (a batch of one row, one class) is in
    full agreement, r = 1; on one side alone r = 0. A class at -inf has probability 0.

    The second part depends on the whole batch: micro-batches are not the sum of their parts.

    Args:
        student: logits [..., V], float32, bfloat16, float16 or float64.
        teacher: logits [..., V] of any of these dtypes.
        labels: int [...], None for all rows; only says which rows are left out.
        beta, gamma: weights of the two parts, >= 0.
        temperature: T > 0, finite.
        ignore_index: label of the rows that are left out: not read, gradient exactly 0.
        vocab_size: use the first n columns of both sides only; the rest has gradient 0.
        class_dim: the dimension of the classes.

    Returns:
        0-d float32 (float64 where an operand is); 0 where no row counts.

    Raises:
        TypeError, ValueError: an argument of the wrong kind or value.

    Huang et al. 2022, arXiv 2205.10536.
    """
    T = float(temperature_of(temperature))
    beta = coefficient("beta", beta)
    gamma = coefficient("gamma", gamma)
    student, teacher = classes_last(student, teacher, class_dim)
    student, teacher = operands(student, teacher, vocab_size)

    s, t = (x.reshape(-1, x.size(-1)) for x in (student, teacher))
    keep = mask(student, labels, ignore_index)[0]

    def inter(s: Tensor, t: Tensor, _: Any) -> Tensor:
        # a correlation sees neither the softmax's denominator nor a shift by 1; expm1, because at
        # a high temperature all exponentials are close to 1
        x, y = ((z - top(z, -1)).mul_(1 / T).expm1_() for z in (s, t))
        return angle(x, y, -1, centred=True)

    loss = beta * row_loss(inter, student, teacher, labels, ignore_index=ignore_index)
    if plainly() or s.numel() <= elements(s):
        return loss + gamma * _intra(s, t, keep, T)
    return loss + gamma * _Intra.apply(s, t, keep, T)


def top(x: Tensor, dim: int) -> Tensor:
    """The largest one, a constant; 0 where that is -inf."""
    found = x.detach().amax(dim, keepdim=True)
    return torch.where(found == -INF, 0.0, found)


def angle(x: Tensor, y: Tensor, dim: int, *, centred: bool = False) -> Tensor:
    """1 - cosine; `centred`: 1 - correlation. 0 between two vectors of zeros, 1 beside one."""
    if in_functorch():
        return _directions(x, y, dim, centred)[0].squeeze(dim)
    return _Angle.apply(x, y, dim, centred)


def _directions(
    x: Tensor, y: Tensor, dim: int, centred: bool
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Loss, both directions, and one over both lengths."""
    directions, inverses = [], []
    for z in (x, y):
        z = z - z.mean(dim, keepdim=True) if centred else z
        square = z.square().sum(dim, keepdim=True)
        zero = square <= ZERO
        inverses.append(torch.where(zero, 0.0, torch.where(zero, 1.0, square).rsqrt()))
        directions.append(z * inverses[-1])
    # half the squared distance of the directions, which does not cancel
    far = (directions[0] - directions[1]).square().sum(dim, keepdim=True)
    single = (inverses[0] == 0) ^ (inverses[1] == 0)
    return 0.5 * (far + single), directions, inverses


class _Angle(torch.autograd.Function):
    """The gradient in three operations where torch's own takes ten."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, dim: int, centred: bool) -> Tensor:
        loss, directions, inverses = _directions(x, y, dim, centred)
        ctx.save_for_backward(x, y, loss, *directions, *inverses)
        ctx.dim, ctx.centred = dim, centred
        return loss.squeeze(dim)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        x, y, loss, a, b, of_x, of_y = ctx.saved_tensors
        needs = ctx.needs_input_grad[:2]
        by = upstream.unsqueeze(ctx.dim)
        if torch.is_grad_enabled():  # a gradient of the gradient is wanted: torch's own graph
            inputs = [z for z, need in zip((x, y), needs, strict=True) if need]
            again = _directions(x, y, ctx.dim, ctx.centred)[0]
            found = iter(torch.autograd.grad(again, inputs, by, create_graph=True))
            return (*(next(found) if need else None for need in needs), None, None)
        # -(b - a cos) / |x|: with loss = 1 - cos, a - b does not cancel twice
        grads: list[Tensor | None] = [
            torch.addcmul(one - other, one, loss, value=-1).mul_(by * inverse) if need else None
            for one, other, inverse, need in ((a, b, of_x, needs[0]), (b, a, of_y, needs[1]))
        ]
        return (*grads, None, None)


def _intra(s: Tensor, t: Tensor, keep: Tensor | None, T: float) -> Tensor:
    """1 - Pearson's correlation over the rows that count, mean over the classes."""
    acc = wide(s, t)
    if s.numel() == 0:
        return (s.to(acc) + t.to(acc)).sum()
    sides = []
    for x in (s.to(acc), t.to(acc)):
        x = x if keep is None else torch.where(keep.unsqueeze(-1), x, 0.0)
        sides.append(_log_prob(x, _level(x, T), T))
    return _apart(sides[0], sides[1], keep).mean()


def _level(x: Tensor, T: float) -> tuple[Tensor, Tensor]:
    """[n, 1] the largest logit and log(mean exp)."""
    highest = top(x, -1)
    d = (x - highest) / T
    # at a high temperature the mean is close to 1, and its rounding would be all that is left
    above = torch.expm1(d).mean(-1, keepdim=True)
    near = above > -0.5
    far = d.exp().mean(-1, keepdim=True)
    return highest, torch.where(near, torch.where(near, above, 0.0).log1p(), far.log())


def _log_prob(x: Tensor, level: Sequence[Tensor], T: float) -> Tensor:
    """log p + log V: a correlation does not see the second."""
    highest, mean = level
    return (x - highest) / T - mean


def _apart(logq: Tensor, logp: Tensor, keep: Tensor | None) -> Tensor:
    """[c] 1 - correlation of each class's probabilities over the rows that count."""
    # relative to the class's largest probability: those of 1e-30 have a correlation too
    if keep is None:
        x, y = (torch.expm1(z - top(z, 0)) for z in (logq, logp))
        return angle(x, y, 0, centred=True)
    kept, sides = keep.unsqueeze(-1), []
    for z in (logq, logp):
        w = torch.expm1(z - top(torch.where(kept, z, -INF), 0))
        mean = torch.where(kept, w, 0.0).sum(0, keepdim=True) / keep.sum().clamp_min(1)
        sides.append(torch.where(kept, w - mean, 0.0))
    return angle(sides[0], sides[1], 0)


class _Intra(torch.autograd.Function):
    """`_intra` on a few classes at a time, with its gradient made in forward."""

    @staticmethod
    def forward(ctx: Any, s: Tensor, t: Tensor, keep: Tensor | None, T: float) -> Tensor:
        ctx.keep, ctx.T, ctx.sides = keep, T, (s.detach(), t.detach())
        if not t.is_inference() and not s.is_inference():
            ctx.save_for_backward(s, t)
        value, ctx.grads = _run(s, t, keep, T, ctx.needs_input_grad[:2])
        return value

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        needs = ctx.needs_input_grad[:2]
        s, t = ctx.saved_tensors or ctx.sides
        if torch.is_grad_enabled():  # a gradient of the gradient is wanted: torch's own graph
            inputs = [x for x, need in zip((s, t), needs, strict=True) if need]
            value = _intra(s, t, ctx.keep, ctx.T)
            found = iter(torch.autograd.grad(value, inputs, upstream, create_graph=True))
            return (*(next(found) if need else None for need in needs), None, None)
        # given away: a second backward makes its own
        grads = ctx.grads or _run(s, t, ctx.keep, ctx.T, needs)[1]
        ctx.grads = None
        return (*(None if grad is None else grad.mul_(upstream) for grad in grads), None, None)


def _run(
    s: Tensor, t: Tensor, keep: Tensor | None, T: float, needs: tuple[bool, ...]
) -> tuple[Tensor, list[Tensor | None]]:
    """Value and gradients.

    With G = dL / dlog q, made a block of classes at a time, dL/dz = (G - q sum_v G_v) / T.
    """
    acc, vocab = wide(s, t), s.size(-1)
    rows: Any = slice(None)
    if keep is not None and keep.device.type == "cpu":  # elsewhere counting them would be a wait
        rows, keep = (slice(None) if bool(keep.all()) else keep.nonzero().squeeze(-1)), None
    own = [x.detach()[rows] for x in (s, t)]
    if own[0].size(0) == 0:
        return s.new_zeros((), dtype=acc), [torch.zeros_like(x) for x in (s, t)]
    by_row = own[0].split(max(1, elements(s) // vocab)), own[1].split(max(1, elements(s) // vocab))
    kept = [None] * len(by_row[0]) if keep is None else keep.split(by_row[0][0].size(0))
    levels = []
    for parts in by_row:
        found = [_level(_clean(x, k, acc), T) for x, k in zip(parts, kept, strict=True)]
        levels.append([torch.cat(each) for each in zip(*found, strict=True)])
    slopes = [
        torch.empty_like(x, dtype=acc) if need else None for x, need in zip(own, needs, strict=True)
    ]
    totals = [torch.zeros_like(own[0][:, :1], dtype=acc) for _ in own]
    value = torch.zeros((), dtype=torch.float64, device=s.device)
    width = max(1, elements(s) // own[0].size(0))
    for start in range(0, vocab, width):
        block = (slice(None), slice(start, start + width))
        logs = [
            _log_prob(_clean(x[block], keep, acc), level, T).requires_grad_(need)
            for x, level, need in zip(own, levels, needs, strict=True)
        ]
        with torch.enable_grad():
            part = _apart(logs[0], logs[1], keep).sum() / vocab
        value += part.detach()
        inputs = [x for x in logs if x.requires_grad]
        parts = iter(torch.autograd.grad(part, inputs) if inputs else ())
        for slope, total in zip(slopes, totals, strict=True):
            if slope is not None:
                slope[block] = next(parts)
                total += slope[block].sum(-1, keepdim=True)
    grads: list[Tensor | None] = []
    for x, side, level, slope, total in zip((s, t), own, levels, slopes, totals, strict=True):
        if slope is None:
            grads.append(None)
            continue
        for start in range(0, side.size(0), step := by_row[0][0].size(0)):
            at = slice(start, start + step)
            mask = None if keep is None else keep[at]
            q = _log_prob(_clean(side[at], mask, acc), [z[at] for z in level], T).exp_()
            slope[at].addcmul_(q, total[at], value=-1 / vocab).div_(T)
        if isinstance(rows, slice):
            grads.append(slope.to(x.dtype))
        else:
            grads.append(torch.zeros_like(x).index_copy_(0, rows, slope.to(x.dtype)))
    return value.to(acc), grads


def _clean(x: Tensor, keep: Tensor | None, acc: torch.dtype) -> Tensor:
    """x with ignored rows at 0: their content must not reach the loss."""
    x = x.to(acc)
    return x if keep is None else torch.where(keep.unsqueeze(-1), x, 0.0)
