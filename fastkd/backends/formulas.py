"""The definition of every loss of a row in plain torch, differentiable in both operands."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from fastkd.backends.base import LossSpec, TopKRows, acc_dtype
from fastkd.divergence import Divergence, divergences

INF = float("inf")


def entry(spec: LossSpec) -> Divergence:
    """The table's entry with the spec's parameter."""
    divergence = divergences[spec.divergence]
    return divergence(**{divergence.parameter: spec.param}) if divergence.parameter else divergence


def dual(spec: LossSpec) -> LossSpec | None:
    """The spec whose student's gradient is the teacher's gradient of `spec`; nothing at T = 1.

    None where the table has no divergence with the sides exchanged.
    """
    exchanged = entry(spec).exchanged()
    if exchanged is None:
        return None
    alone = spec._replace(divergence=exchanged.name, param=exchanged.param)
    return alone._replace(hard=0.0, smoothing=0.0, z_loss=0.0)


def pointwise(divergence: Divergence, logp: Tensor, logq: Tensor) -> Tensor:
    """The value at each column; a column that is impossible on both sides costs nothing."""
    dead = (logp == -INF) & (logq == -INF)
    value = divergence.value(
        torch.where(dead, 0.0, logp), torch.where(dead, 0.0, logq), divergence.param
    )
    return torch.where(dead, 0.0, value)


def unmapped_price(spec: LossSpec) -> Tensor:
    """What a unit of the teacher's mass costs where the student has none; 0 where it is infinite.

    A divergence of the two numbers p and 0 is p times this.
    """
    one, none = torch.zeros((), dtype=torch.float64), torch.full((), -INF, dtype=torch.float64)
    price = pointwise(entry(spec), one, none)
    return torch.where(price < INF, price, 0.0)


def _mapped_rows(
    teacher: Tensor, columns: Tensor, spec: LossSpec, keep: Tensor | None, acc: torch.dtype
) -> tuple[TopKRows, Tensor]:
    """A teacher [..., V] at the student's columns, and what its mass off them costs [N]."""
    columns = columns[: spec.vocab]
    t = teacher.reshape(-1, teacher.size(-1)).to(acc)
    if keep is not None:
        t = torch.where(keep.reshape(-1, 1), t, 0.0)
    t = t + torch.where((columns < 0).any(), math.nan, 0.0)
    logp, at = _log_softmax(t, spec.temperature), columns.clamp_min(0)
    named, rest = logp.index_select(-1, at), logp.index_fill(-1, at, -INF).logsumexp(-1).exp()
    places = torch.arange(spec.vocab, device=t.device).expand(named.shape)
    return TopKRows(named, places, None, False), rest * unmapped_price(spec).to(acc)


def row_loss(
    student: Tensor,
    teacher: Tensor | TopKRows,
    spec: LossSpec,
    keep: Tensor | None,
    label: Tensor | None,
    columns: Tensor | None = None,
    more: Tensor | None = None,
) -> Tensor:
    """soft * D(p, q) + hard * CE + z_loss * lse^2 of each row.

    Args:
        student, teacher: [..., >= vocab] logits, any float dtypes; the teacher may be a TopKRows.
        spec: what is computed.
        keep, label: [...] as in `Rows`.
        columns: as in `Backend`.
        more: [N] what outcomes add that the student does not have, of a teacher that is TopKRows.

    Returns:
        [...] float32 (float64 where an operand is): differentiable in both operands.
    """
    if columns is not None and isinstance(teacher, Tensor):
        acc = acc_dtype(student, teacher)
        rows, more = _mapped_rows(teacher, columns, spec, keep, acc)
        return row_loss(student, rows, spec, keep, label, more=more)
    if isinstance(teacher, TopKRows) and student.dim() != 2:
        keep, label = (None if x is None else x.reshape(-1) for x in (keep, label))
        flat = student.reshape(-1, student.size(-1))
        return row_loss(flat, teacher, spec, keep, label, more=more).view(student.shape[:-1])
    acc = acc_dtype(student, teacher)
    s = student[..., : spec.vocab].to(acc)
    if keep is not None:
        # where, not a product: what an ignored row holds (NaN) must not reach value or gradient
        s = torch.where(keep.unsqueeze(-1), s, 0.0)
    if isinstance(teacher, TopKRows):
        loss = _topk_divergence(s, teacher, spec, keep, more)
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
    if spec.z_loss != 0.0:
        log_sum = s.logsumexp(-1)
        # an impossible row has no distribution
        loss = loss + spec.z_loss * torch.where(log_sum == -INF, math.nan, log_sum) ** 2
    return loss if keep is None else torch.where(keep, loss, 0.0)


def row_outputs(
    student: Tensor,
    teacher: Tensor | TopKRows,
    spec: LossSpec,
    keep: Tensor | None,
    label: Tensor | None,
) -> Tensor:
    """[..., 7] acc: `base.OUTPUTS` of each row, of operands as in `row_loss`; no gradient."""
    if isinstance(teacher, TopKRows) and student.dim() != 2:
        keep, label = (None if x is None else x.reshape(-1) for x in (keep, label))
        flat = student.reshape(-1, student.size(-1))
        return row_outputs(flat, teacher, spec, keep, label).view(*student.shape[:-1], -1)
    acc, bare = acc_dtype(student, teacher), spec._replace(soft=1.0, hard=0.0, z_loss=0.0)
    soft = row_loss(student, teacher, bare, keep, None).detach()
    s = student.detach()[..., : spec.vocab].to(acc)
    s = s if keep is None else torch.where(keep.unsqueeze(-1), s, 0.0)
    log_sum_s, log_sum_t = _log_sum(s, spec.temperature), torch.full_like(soft, math.nan)
    logq = s
    if isinstance(teacher, TopKRows):
        logp, at, tail, restrict = teacher
        if restrict:
            logq = torch.where(at >= 0, s.gather(-1, at.clamp_min(0)), -INF)
            log_sum_s = _log_sum(logq, spec.temperature)
        logp = (logp if tail is None else torch.cat((logp, tail.unsqueeze(-1)), -1)).detach()
    else:
        t = teacher.detach()[..., : spec.vocab].to(acc)
        t = t if keep is None else torch.where(keep.unsqueeze(-1), t, 0.0)
        logp, log_sum_t = _possible(t, spec.temperature), _log_sum(t, spec.temperature)
    entropies = _entropy(_possible(logq, spec.temperature)), _entropy(logp)
    hard = logprob = torch.full_like(soft, math.nan)
    if spec.hard != 0.0:
        assert label is not None
        here = (label >= 0) & (label < spec.vocab)
        column = torch.where(here, label, 0).unsqueeze(-1)
        logprob = torch.where(here, s.log_softmax(-1).gather(-1, column).squeeze(-1), math.nan)
        hard = torch.where(here, _cross_entropy(s, label, spec), math.nan)
    out = torch.stack((soft, hard, *entropies, log_sum_s, log_sum_t, logprob), -1)
    return out if keep is None else torch.where(keep.unsqueeze(-1), out, 0.0)


def _log_sum(x: Tensor, temperature: float) -> Tensor:
    """log sum exp(x / T)"""
    top = x.amax(-1, keepdim=True)
    top = torch.where(top == -INF, 0.0, top)
    return (top / temperature).squeeze(-1) + ((x - top) / temperature).logsumexp(-1)


def _possible(x: Tensor, temperature: float) -> Tensor:
    """log softmax(x / T), -inf of a side that is impossible everywhere."""
    empty = (x == -INF).all(-1, keepdim=True)
    return torch.where(empty, -INF, _log_softmax(x, temperature))


def _entropy(logp: Tensor) -> Tensor:
    """- sum p log p with 0 log 0 = 0."""
    return -torch.where(logp == -INF, 0.0, logp.exp() * logp).sum(-1)


def _divergence(s: Tensor, t: Tensor, spec: LossSpec) -> Tensor:
    # a row that is impossible everywhere on both sides is dead in every column: loss 0
    empty = ((s == -INF) & (t == -INF)).all(-1, keepdim=True)
    logq = _log_softmax(torch.where(empty, 0.0, s), spec.temperature)
    logp = _log_softmax(torch.where(empty, 0.0, t), spec.temperature)
    divergence = entry(spec)
    loss = divergence.row_loss(pointwise(divergence, logp, logq).sum(-1))
    return torch.where(empty.squeeze(-1), 0.0, loss)


def _topk_divergence(
    s: Tensor, teacher: TopKRows, spec: LossSpec, keep: Tensor | None, more: Tensor | None
) -> Tensor:
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
    loss = loss if more is None else loss + more
    # a NaN makes its row one, also where a weight of 0 would hide it, and all of its gradient
    spoilt = logp.isnan().any(-1) if tail is None else logp.isnan().any(-1) | tail.isnan()
    if tail is None:
        return _spoil(divergence.row_loss(loss), spoilt, s)
    # the columns not named, summed by themselves: 1 - sum(q) of the others would cancel
    hits = torch.zeros_like(s).scatter_add_(-1, at, named.to(s.dtype))
    other = hits == 0
    some = (other & (full != -INF)).any(-1)
    rest = torch.where(other | ~some.unsqueeze(-1), full, -INF).logsumexp(-1)
    loss = loss + pointwise(divergence, tail, torch.where(some, rest, -INF))
    return _spoil(divergence.row_loss(loss), spoilt, s)


def of_sums(spec: LossSpec, sums: Tensor) -> tuple[Tensor, Tensor]:
    """The divergence of rows and its derivative, by the sums [N] of their values."""
    divergence = entry(spec)
    if divergence.of_sum is None:
        return sums, torch.ones_like(sums)
    with recorded():
        sums = sums.detach().requires_grad_(True)
        loss = divergence.of_sum(sums)
        (by,) = torch.autograd.grad(loss.sum(), sums)
    return loss.detach(), by


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
def recorded() -> Iterator[None]:
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
