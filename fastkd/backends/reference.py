"""The passes in plain torch: the fallback on every device and the oracle of the tests.

`row_loss` is the definition of what fastkd computes, differentiable as often as torch is. The
passes of a `fastkd.backends.base.Backend` are made of it by autograd, so that no gradient is
written here.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from fastkd.backends.base import (
    Backend,
    LossSpec,
    Rows,
    Stats,
    TopKRows,
    acc_dtype,
    without_autocast,
)
from fastkd.divergence import Divergence, divergences
from fastkd.operands import Head, build

INF = float("inf")


def entry(spec: LossSpec) -> Divergence:
    """The table's entry with the spec's parameter."""
    divergence = divergences[spec.divergence]
    return divergence(**{divergence.parameter: spec.param}) if divergence.parameter else divergence


def dual(spec: LossSpec) -> LossSpec | None:
    """The spec whose student's gradient is the teacher's gradient of `spec`; no hard term.

    None where the table has no divergence with the sides exchanged.
    """
    exchanged = entry(spec).exchanged()
    if exchanged is None:
        return None
    return spec._replace(divergence=exchanged.name, param=exchanged.param, hard=0.0, smoothing=0.0)


def pointwise(divergence: Divergence, logp: Tensor, logq: Tensor) -> Tensor:
    """The value at each column; a column that is impossible on both sides costs nothing."""
    dead = (logp == -INF) & (logq == -INF)
    value = divergence.value(
        torch.where(dead, 0.0, logp), torch.where(dead, 0.0, logq), divergence.param
    )
    return torch.where(dead, 0.0, value)


def logits(
    tensors: Sequence[Tensor | None],
    heads: tuple[Head | None, Head | None],
    vocab: int,
    keep: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Both sides' logits in full, differentiable; the student's twice without a teacher.

    Args:
        tensors: in a row, the student's logits or its hidden states, weight and bias, then the
            teacher's, if it has any.
        heads: of both sides, None for logits that are given.
        vocab, keep: as in `operands.build`.
    """
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


def row_loss(
    student: Tensor,
    teacher: Tensor | TopKRows,
    spec: LossSpec,
    keep: Tensor | None,
    label: Tensor | None,
) -> Tensor:
    """soft * D(p, q) + hard * CE of each row.

    Args:
        student, teacher: [..., >= vocab] logits, any float dtypes; the teacher may be a TopKRows.
        spec: what is computed.
        keep, label: [...] as in `Rows`.

    Returns:
        [...] float32 (float64 where an operand is): differentiable in both operands.
    """
    if isinstance(teacher, TopKRows) and student.dim() != 2:
        keep, label = (None if x is None else x.reshape(-1) for x in (keep, label))
        flat = student.reshape(-1, student.size(-1))
        return row_loss(flat, teacher, spec, keep, label).view(student.shape[:-1])
    acc = acc_dtype(student, teacher)
    s = student[..., : spec.vocab].to(acc)
    if keep is not None:
        # where, not a product: what an ignored row holds (NaN) must not reach value or gradient
        s = torch.where(keep.unsqueeze(-1), s, 0.0)
    if isinstance(teacher, TopKRows):
        loss = _topk_divergence(s, teacher, spec, keep)
    else:
        t = teacher[..., : spec.vocab].to(acc)
        if keep is not None:
            t = torch.where(keep.unsqueeze(-1), t, 0.0)
        loss = _divergence(s, t, spec)
    if spec.soft != 1.0:
        loss = spec.soft * loss
    if spec.hard != 0.0:
        assert label is not None
        loss = loss + spec.hard * _cross_entropy(s, label, spec)
    return loss if keep is None else torch.where(keep, loss, 0.0)


def _divergence(s: Tensor, t: Tensor, spec: LossSpec) -> Tensor:
    # a row that is impossible everywhere on both sides is dead in every column: loss 0
    empty = ((s == -INF) & (t == -INF)).all(-1, keepdim=True)
    logq = _log_softmax(torch.where(empty, 0.0, s), spec.temperature)
    logp = _log_softmax(torch.where(empty, 0.0, t), spec.temperature)
    loss = pointwise(entry(spec), logp, logq).sum(-1)
    return torch.where(empty.squeeze(-1), 0.0, loss)


def _topk_divergence(s: Tensor, teacher: TopKRows, spec: LossSpec, keep: Tensor | None) -> Tensor:
    logp, at, tail, restrict = teacher
    if keep is not None:
        kept = keep.unsqueeze(-1)
        logp, at = torch.where(kept, logp, -INF), torch.where(kept, at, -1)
        tail = None if tail is None else torch.where(keep, tail, 0.0)
    named, at = at >= 0, at.clamp_min(0)
    if restrict:
        x = torch.where(named, s.gather(-1, at), -INF)
        logq = _log_softmax(x, spec.temperature)
    else:
        full = _log_softmax(s, spec.temperature)
        logq = torch.where(named, full.gather(-1, at), -INF)
    divergence = entry(spec)
    loss = pointwise(divergence, logp, logq).sum(-1)
    # a NaN makes its row one, also where a weight of 0 would hide it, and all of its gradient
    spoilt = logp.isnan().any(-1) if tail is None else logp.isnan().any(-1) | tail.isnan()
    if tail is None:
        return _spoil(loss, spoilt, s)
    # the columns not named, summed by themselves: 1 - sum(q) of the others would cancel
    hits = torch.zeros_like(s).scatter_add_(-1, at, named.to(s.dtype))
    other = hits == 0
    some = (other & (full != -INF)).any(-1)
    rest = torch.where(other | ~some.unsqueeze(-1), full, -INF).logsumexp(-1)
    return _spoil(loss + pointwise(divergence, tail, torch.where(some, rest, -INF)), spoilt, s)


def _spoil(loss: Tensor, spoilt: Tensor, s: Tensor) -> Tensor:
    every = torch.where(spoilt.unsqueeze(-1), s, 0.0).sum(-1)
    return torch.where(spoilt, every * math.nan, loss)


def _log_softmax(x: Tensor, temperature: float) -> Tensor:
    """log softmax(x / T), shifted before the division: x / T of -1e4 / 0.01 has lost its digits."""
    top = x.detach().amax(-1, keepdim=True)
    return ((x - torch.where(top == -INF, 0.0, top)) / temperature).log_softmax(-1)


def _cross_entropy(s: Tensor, label: Tensor, spec: LossSpec) -> Tensor:
    here = (label >= 0) & (label < spec.vocab)
    logq = s.log_softmax(-1)  # not logsumexp(s) - s: that loses the digits of large logits
    at_label = logq.gather(-1, torch.where(here, label, 0).unsqueeze(-1)).squeeze(-1)
    loss = (spec.smoothing - 1.0) * torch.where(here, at_label, -s.logsumexp(-1))
    if spec.smoothing != 0.0:
        loss = loss - spec.smoothing * logq.mean(-1)
    return loss


@contextmanager
def _autograd() -> Iterator[None]:
    """Gradients are recorded inside, also inside a registered operator.

    There torch has taken autograd out of the dispatcher for this thread, and `enable_grad` alone
    does not bring it back.
    """
    keys = (torch._C.DispatchKey.AutogradFunctionality, torch._C.DispatchKey.AutogradOther)
    excluded = [torch._C._dispatch_tls_is_dispatch_key_excluded(key) for key in keys]
    for key in keys:
        torch._C._dispatch_tls_set_dispatch_key_excluded(key, False)
    try:
        with torch.enable_grad():
            yield
    finally:
        for key, was in zip(keys, excluded, strict=True):
            torch._C._dispatch_tls_set_dispatch_key_excluded(key, was)


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
    with _autograd():
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
        keep, label, scale, factor, _ = rows
        s = student.detach().reshape(-1, student.size(-1))
        t = teacher
        if isinstance(t, Tensor):
            t = t.detach().reshape(-1, t.size(-1))
        if grad is None:
            with torch.no_grad():
                return row_loss(s, t, spec, keep, label)
        with _autograd():
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
        slope: Tensor,
        spec: LossSpec,
        rows: Rows,
        grad: Tensor,
    ) -> None:
        keep, label, scale, factor, _ = rows
        _, at, q = _value_and_slope(student, teacher, stats, spec, keep)
        out = spec.soft * (at - q * slope.unsqueeze(-1)) / spec.temperature
        if spec.hard != 0.0:
            assert label is not None and stats.hard is not None
            unit = spec._replace(temperature=1.0)
            hard = _log_prob(student, stats.hard, unit, out.dtype).exp()
            hard = hard - spec.smoothing / spec.classes
            here = (label >= 0) & (label < spec.vocab)
            column = torch.where(here, label, 0).unsqueeze(-1)
            sure = here.to(hard.dtype) * (spec.smoothing - 1.0)
            hard.scatter_add_(-1, column, sure.unsqueeze(-1))
            out = out + spec.hard * hard
        out = out * factor if scale is None else out * (scale * factor).unsqueeze(-1)
        if keep is not None:
            out = torch.where(keep.unsqueeze(-1), out, 0.0)
        grad[..., : spec.vocab].copy_(out.view(*grad.shape[:-1], -1))
        grad[..., spec.vocab :].zero_()

    def total(self, loss: Tensor, scale: Tensor | None, factor: float) -> Tensor:
        wide = loss.double() if scale is None else loss.double() * scale
        return (wide.sum() * factor).to(loss.dtype)


BACKEND = Reference()
