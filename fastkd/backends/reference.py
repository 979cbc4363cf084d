"""The passes in plain torch: the fallback on every device and the oracle of the tests.

`formulas.row_loss` is the definition of what fastkd computes, differentiable as often as torch is.
The passes of a `fastkd.backends.base.Backend` are made of it by autograd, so that no gradient is
written here.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastkd.backends.base import (
    Backend,
    LossSpec,
    Rows,
    Stats,
    TopKRows,
    acc_dtype,
)
from fastkd.backends.formulas import (
    entry,
    of_sums,
    pointwise,
    recorded,
    row_loss,
    row_outputs,
)
from fastkd.backends.products import autocast_off
from fastkd.operands import Head, build

INF = float("inf")


def logits(
    tensors: Sequence[Tensor | None],
    heads: tuple[Head | None, Head | None],
    vocab: int,
    keep: Tensor | None,
    columns: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Both sides' logits in full, differentiable; the student's twice without a teacher.

    Args:
        tensors: in a row, the student's logits or its hidden states, weight and bias, then the
            teacher's, if it has any.
        heads: of both sides, None for logits that are given.
        vocab, keep: as in `operands.build`.
        columns: as in `Backend`; given, the teacher has all of its columns.
    """
    cut = 1 if heads[0] is None else 3
    built: list[Tensor] = []
    for at, head in ((slice(cut), heads[0]), (slice(cut, None), heads[1])):
        own = tensors[at]
        if head is not None:
            hidden, weight, bias = own
            assert hidden is not None and weight is not None
            width = vocab if columns is None or not built else weight.size(0)
            with autocast_off(hidden.device)():
                built.append(build(hidden, weight, bias, head, width, keep))
        elif own:
            assert own[0] is not None
            built.append(own[0])
    return built[0], built[1] if len(built) > 1 else built[0].detach()


def _log_prob(x: Tensor, stats: Tensor, spec: LossSpec, acc: torch.dtype) -> Tensor:
    top, total, _ = stats.to(acc).unbind(-1)
    top = torch.where(top == -INF, 0.0, top)
    x = x[..., : spec.vocab].reshape(-1, spec.vocab).to(acc)
    return (x - top.unsqueeze(-1)) / spec.temperature - total.log().unsqueeze(-1)


def _value_and_slope(
    student: Tensor, teacher: Tensor, stats: Stats, spec: LossSpec, keep: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """[N, V] value, centred slope and q."""
    acc = acc_dtype(student, teacher)
    logq = _log_prob(student, stats.student, spec, acc)
    logp = _log_prob(teacher, stats.teacher, spec, acc)
    # total = 0 marks a side that is impossible everywhere: dead if both are, else NaN
    both = ((stats.student[:, 1] == 0) & (stats.teacher[:, 1] == 0)).unsqueeze(-1)
    logq, logp = (torch.where(both, -INF, x) for x in (logq, logp))
    if keep is not None:
        logq, logp = (torch.where(keep.unsqueeze(-1), x, 0.0) for x in (logq, logp))
    divergence = entry(spec)
    with recorded():
        logq = logq.detach().requires_grad_(True)
        value = pointwise(divergence, logp.detach(), logq)
        (slope,) = torch.autograd.grad(value.sum(), logq)
    q = logq.detach().exp()
    return value.detach(), slope - divergence.centre(divergence.param) * q, q


class Reference(Backend):
    """Plain torch on any device."""

    def fused(
        self,
        student: Tensor,
        teacher: Tensor | TopKRows,
        spec: LossSpec,
        rows: Rows,
        grad: Tensor | None,
    ) -> Tensor:
        keep, label, scale, factor = rows[:4]
        s = student.detach().reshape(-1, student.size(-1))
        t = teacher
        if isinstance(t, Tensor):
            t = t.detach().reshape(-1, t.size(-1))
        if rows.outputs is not None:
            rows.outputs.copy_(row_outputs(s, t, spec, keep, label))
        if grad is None:
            with torch.no_grad():
                return row_loss(s, t, spec, keep, label)
        with recorded():
            s.requires_grad_(True)
            loss = row_loss(s, t, spec, keep, label)
            upstream = torch.full_like(loss, factor) if scale is None else scale * factor
            (slope,) = torch.autograd.grad(loss, s, upstream)
        if keep is not None:
            slope = torch.where(keep.unsqueeze(-1), slope, 0.0)
        grad[..., : slope.size(-1)].copy_(slope.view(*grad.shape[:-1], -1))
        return loss.detach()

    topk = fused

    def stats(self, x: Tensor, temperature: float, vocab: int, keep: Tensor | None) -> Tensor:
        acc = torch.float64 if x.dtype == torch.float64 else torch.float32
        x = x[..., :vocab].reshape(-1, vocab).to(acc)
        if keep is not None:
            x = torch.where(keep.unsqueeze(-1), x, 0.0)
        top = x.amax(-1)
        shifted = x - torch.where(top == -INF, 0.0, top).unsqueeze(-1)
        out = torch.stack((top, (shifted / temperature).exp().sum(-1), shifted.sum(-1)), -1)
        return out if keep is None else torch.where(keep.unsqueeze(-1), out, 0.0)

    def loss(
        self, student: Tensor, teacher: Tensor, stats: Stats, spec: LossSpec, rows: Rows
    ) -> Tensor:
        keep = rows.keep
        value, slope, _ = _value_and_slope(student, teacher, stats, spec, keep)
        out = torch.stack((value.sum(-1), slope.sum(-1)), -1)
        return out if keep is None else torch.where(keep.unsqueeze(-1), out, 0.0)

    def grad(
        self,
        student: Tensor,
        teacher: Tensor,
        stats: Stats,
        pairs: Tensor,
        spec: LossSpec,
        rows: Rows,
        grad: Tensor,
    ) -> None:
        keep, label, scale, factor = rows[:4]
        _, at, q = _value_and_slope(student, teacher, stats, spec, keep)
        out = spec.soft * (at - q * pairs[:, 1:]) / spec.temperature
        if entry(spec).of_sum is not None:
            out = out * of_sums(spec, pairs[:, 0])[1].unsqueeze(-1)
        if spec.at_one:
            assert stats.hard is not None
            unit = spec._replace(temperature=1.0)
            hard = _log_prob(student, stats.hard, unit, out.dtype).exp()
            of_q = torch.full_like(stats.hard[:, 0], spec.hard)
            if spec.z_loss != 0.0:
                of_q += 2.0 * spec.z_loss * (stats.hard[:, 0] + stats.hard[:, 1].log())
            hard = hard * of_q.unsqueeze(-1)
            if spec.hard != 0.0:
                assert label is not None
                hard = hard - spec.hard * spec.smoothing / spec.classes
                here = (label >= 0) & (label < spec.vocab)
                column = torch.where(here, label, 0).unsqueeze(-1)
                sure = here.to(hard.dtype) * (spec.hard * (spec.smoothing - 1.0))
                hard.scatter_add_(-1, column, sure.unsqueeze(-1))
            out = out + hard
        out = out * factor if scale is None else out * (scale * factor).unsqueeze(-1)
        if keep is not None:
            out = torch.where(keep.unsqueeze(-1), out, 0.0)
        grad[..., : spec.vocab].copy_(out.view(*grad.shape[:-1], -1))
        grad[..., spec.vocab :].zero_()

    def total(self, loss: Tensor, scale: Tensor | None, factor: float) -> Tensor:
        wide = loss.double() if scale is None else loss.double() * scale
        return (wide.sum() * factor).to(loss.dtype)


BACKEND = Reference()
