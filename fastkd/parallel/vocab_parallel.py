"""Vocabulary parallelism: the passes of a backend with an exchange of sums between them.

Each rank holds the columns [start, start + width) of the student's logits and, of the teacher's,
the same ones or all. Two exchanges complete a row, a few numbers a row and never a column:

    stats of the own columns   ->  (max, sum) of both sides, the label's logit  ->  the row's stats
    loss over the own columns  ->  (sum of values, sum of centred slopes)       ->  the row's loss
    grad of the own columns

That is the general form. A backend with `stepwise`, its fused pass cut into steps, sends the sums
of both sides and of the value at once, some rows at a time while the next ones are under way.

An exchange is an all-gather whose parts every rank merges in the order of the ranks, so that all of
them hold the same bits by construction. `VocabParallel` is a backend like any other: the drivers
run on it as they are. A top-k teacher names columns of the full vocabulary and is the same on
every rank; what its points need of the student goes through the same exchange.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastkd.backends import formulas
from fastkd.backends.base import Backend, LossSpec, Rows, Stats, TopKRows, acc_dtype
from fastkd.parallel import collectives
from fastkd.parallel.at_one import entropy, finite, hard_gradient, log_sum

INF = float("inf")
BLOCK = 2**22  # elements of a copy of some rows, for a top-k teacher


class Columns(NamedTuple):
    """What a rank holds of a vocabulary of `total` columns: [start, start + own), own >= 0.

    widest: the most that any rank holds. stepwise: every rank's backend has_steps.
    """

    start: int
    own: int
    total: int
    widest: int
    stepwise: bool


class VocabParallel(Backend):
    """This rank's columns on a backend; spec.vocab is their number, spec.classes that of all."""

    def __init__(self, backend: Backend, group: Any, columns: Columns) -> None:
        self.backend, self.group, self.columns = backend, group, columns
        self.widest = columns.widest
        # on a GPU the gradient waits for its factor, which no rank may read
        self.guesses = "host" if columns.stepwise else ""

    def total(self, loss: Tensor, scale: Tensor | None, factor: float) -> Tensor:
        return self.backend.total(loss, scale, factor)

    def empty_gradient(self, like: Tensor) -> Tensor:
        return self.backend.empty_gradient(like)

    def multiply(self, grad: Tensor, by: Tensor) -> None:
        self.backend.multiply(grad, by)

    def agreed(self, right: bool) -> bool:
        return bool(self.gathered(torch.tensor([right])).all())

    def gathered(self, x: Tensor) -> Tensor:
        """[R, ...]: what every rank has, in the order of the ranks."""
        return collectives.gathered(x, self.group)

    def fused(
        self, student: Tensor, teacher: Tensor, spec: LossSpec, rows: Rows, grad: Tensor | None
    ) -> Tensor:
        label = rows.label if spec.hard != 0.0 else None
        stepwise = None
        if self.columns.stepwise:
            own = rows._replace(label=self._label(label, spec))
            ranks = collectives.size(self.group), collectives.rank(self.group)
            stepwise = self.backend.stepwise(
                student, teacher, spec, own, grad, *ranks, self.columns.widest
            )
        if not stepwise:
            return self._in_passes(student, teacher, spec, rows, grad)
        loss, redo, passes, waiting = stepwise
        collectives.pipelined(passes, waiting, self.group)
        again = redo.nonzero().squeeze(-1)
        if again.numel():
            at = again // student.size(1), again % student.size(1)
            into = None if grad is None else grad[at].unsqueeze(0)
            some = Rows(
                None,
                None if label is None else label[again],
                None if rows.scale is None else rows.scale[again],
                rows.factor,
            )
            s, t = student[at].unsqueeze(0), teacher[at].unsqueeze(0)
            loss[again] = self._in_passes(s, t, spec, some, into)
            if grad is not None and into is not None:
                grad[at] = into[0]
        return loss

    def _in_passes(
        self, student: Tensor, teacher: Tensor, spec: LossSpec, rows: Rows, grad: Tensor | None
    ) -> Tensor:
        """The general form: any backend, dtype and row."""
        acc, keep = acc_dtype(student, teacher), rows.keep
        label = rows.label if spec.hard != 0.0 else None
        mine = self._label(label, spec)
        stats_s, stats_t, hard, at_one = self._stats(student, teacher, spec, keep, label, mine, acc)
        stats = Stats(stats_s, stats_t, hard)
        own = stats_s.new_zeros((stats_s.size(0), 2))
        if spec.vocab:
            own = self.backend.loss(student, teacher, stats, spec, rows).to(acc)
        pairs = self.gathered(own).sum(0)
        value = formulas.of_sums(spec, pairs[:, 0])[0]
        if formulas.entry(spec).of_sum is not None:  # nothing has mass on either side: no loss
            value = torch.where((stats_s[:, 1] == 0) & (stats_t[:, 1] == 0), 0.0, value)
        loss = spec.soft * value
        if at_one is not None:
            loss = loss + at_one
        if keep is not None:
            loss = torch.where(keep, loss, 0.0)
        if grad is not None and spec.vocab:
            mine_only = rows._replace(label=mine)
            self.backend.grad(student, teacher, stats, pairs.contiguous(), spec, mine_only, grad)
        elif grad is not None:
            grad.zero_()
        return loss

    def _label(self, label: Tensor | None, spec: LossSpec) -> Tensor | None:
        """The label's place among the own columns, -1 where it stands on another rank."""
        if label is None:
            return None
        own = label - self.columns.start
        return torch.where((own >= 0) & (own < spec.vocab), own, -1)

    def _stats(
        self,
        student: Tensor,
        teacher: Tensor | None,
        spec: LossSpec,
        keep: Tensor | None,
        label: Tensor | None,
        mine: Tensor | None,
        acc: torch.dtype,
        more: Tensor | None = None,
    ) -> tuple[Tensor, Any, Tensor | None, Tensor | None]:
        """The rows' stats of both sides, the student's at T = 1, and the loss at T = 1.

        Without a teacher, in its place what the ranks' `more` [N, C] have gathered: [R, N, C].
        """
        warm = spec.temperature != 1.0
        sent = self._own_stats(student, spec.temperature, spec, keep, acc)
        parts = [sent[:, :2]]
        if teacher is not None:
            parts.append(self._own_stats(teacher, spec.temperature, spec, keep, acc)[:, :2])
        if spec.at_one:
            unit = self._own_stats(student, 1.0, spec, keep, acc) if warm else sent
            width = torch.full_like(unit[:, 0], spec.vocab)
            nothing = torch.zeros_like(width)
            at_label = nothing if mine is None else self._at(student, mine, acc)
            parts += [at_label.unsqueeze(-1), unit[:, 1:], width.unsqueeze(-1)]
        if more is not None:
            parts.append(more)
        got = self.gathered(torch.cat(parts, -1))
        stats_s = _merged(got[..., :2], spec.temperature)
        at = 2 if teacher is None else 4
        other = None if teacher is None else _merged(got[..., 2:4], spec.temperature)
        hard = at_one = None
        if spec.at_one:
            top = got[..., 0]
            unit = _merged(torch.stack((top, got[..., at + 1]), -1), 1.0)
            low, total = finite(unit[:, 0]), unit[:, 1]
            # of each column's distance to the row's maximum, of which a rank knew its own
            moved = torch.where(top == -INF, top, top - low)
            widths = got[..., at + 3]
            drift = torch.where(widths > 0, got[..., at + 2] + widths * moved, 0.0).sum(0)
            at_one = torch.zeros_like(low)
            if spec.z_loss != 0.0:
                at_one += spec.z_loss * log_sum(unit) ** 2
            if label is not None:
                at_one += spec.hard * entropy(low, total, got[..., at].sum(0), drift, spec)
            hard = unit
        rest = got[..., at + (4 if spec.at_one else 0) :]
        return stats_s, other if teacher is not None else rest, hard, at_one

    def _own_stats(
        self, x: Tensor, temperature: float, spec: LossSpec, keep: Tensor | None, acc: torch.dtype
    ) -> Tensor:
        if spec.vocab:
            x = x.to(acc) if acc == torch.float64 else x  # stats are as wide as what they are of
            return self.backend.stats(x, temperature, spec.vocab, keep)
        nothing = x.new_zeros((x.size(0) * x.size(1), 3), dtype=acc)
        nothing[:, 0] = -INF if keep is None else torch.where(keep, -INF, 0.0)
        return nothing

    @staticmethod
    def _at(student: Tensor, place: Tensor, acc: torch.dtype) -> Tensor:
        """[N, ...]: the student's logits at places [N, ...], 0 at -1."""
        if not student.size(-1):
            return torch.zeros(place.shape, dtype=acc, device=place.device)
        flat = place.view(*student.shape[:2], -1)
        found = student.gather(-1, flat.clamp_min(0)).to(acc)
        return torch.where(flat >= 0, found, 0.0).view(place.shape)

    def topk(
        self, student: Tensor, teacher: TopKRows, spec: LossSpec, rows: Rows, grad: Tensor | None
    ) -> Tensor:
        keep, label, scale, factor = rows[:4]
        acc, count = teacher.logprobs.dtype, teacher.logprobs.size(1)
        label = label if spec.hard != 0.0 else None
        mine = self._label(label, spec)
        logp, columns, tail, restrict = teacher
        if keep is not None:
            kept = keep.unsqueeze(-1)
            logp = torch.where(kept, logp, -INF)
            columns = torch.where(kept, columns, -1)
            tail = None if tail is None else torch.where(keep, tail, 0.0)
        place = columns - self.columns.start
        place = torch.where((columns >= 0) & (place >= 0) & (place < spec.vocab), place, -1)
        at = self._at(student, place, acc)
        named = columns >= 0
        if keep is not None:
            at = torch.where(keep.unsqueeze(-1), at, 0.0)
        more = [at]
        if tail is not None:
            more.append(self._unnamed(student, place, spec, keep, acc))
        stats, got, hard, at_one = self._stats(
            student, None, spec, keep, label, mine, acc, torch.cat(more, -1)
        )
        x = torch.where(named, got[..., :count].sum(0), -INF)
        points = _Points(
            logp,
            x,
            stats if not restrict else _of_points(x, spec.temperature),
            None
            if tail is None
            else (tail, _merged(got[..., count : count + 2], spec.temperature)),
        )
        value, slope, tail_slope = points.evaluate(spec)
        spoilt = logp.isnan().any(-1) if tail is None else logp.isnan().any(-1) | tail.isnan()
        value = torch.where(spoilt, torch.nan, value)
        loss = spec.soft * value
        if at_one is not None:
            loss = loss + at_one
        if keep is not None:
            loss = torch.where(keep, loss, 0.0)
        if grad is None:
            return loss
        by = torch.full_like(loss, factor) if scale is None else scale.to(acc) * factor
        pull = slope.sum(-1) if tail_slope is None else slope.sum(-1) + tail_slope
        pull = torch.where(spoilt, torch.nan, pull)
        flat = student.flatten(0, 1)
        out = grad[0] if grad.size(0) == 1 else torch.empty_like(grad.flatten(0, 1))
        step = max(1, BLOCK // max(spec.vocab, 1))
        for start in range(0, loss.numel(), step):
            some = slice(start, start + step)
            soft = self._soft_gradient(
                flat[some], place[some], points, slope, tail_slope, pull, restrict, spec, some
            )
            if hard is not None:
                own = None if mine is None else mine[some]
                x = flat[some, : spec.vocab].to(acc)
                soft = soft + hard_gradient(x, hard[some], own, spec)
            soft = soft * by[some].unsqueeze(-1)
            if keep is not None:
                soft = torch.where(keep[some].unsqueeze(-1), soft, 0.0)
            out[some, : spec.vocab] = soft.to(out.dtype)
            out[some, spec.vocab :] = 0
        if grad.size(0) != 1:
            grad.copy_(out.view(grad.shape))
        return loss

    def _unnamed(
        self, student: Tensor, place: Tensor, spec: LossSpec, keep: Tensor | None, acc: torch.dtype
    ) -> Tensor:
        """[N, 2]: (max, sum) over the own columns that are not named, summed by themselves."""
        n = place.size(0)
        out = torch.zeros((n, 2), dtype=acc, device=place.device)
        out[:, 0] = -INF
        if not spec.vocab:
            return out
        flat, step = student.flatten(0, 1), max(1, BLOCK // spec.vocab)
        for start in range(0, n, step):
            rows = slice(start, start + step)
            x = F.pad(flat[rows, : spec.vocab], (0, 1))  # one more column for what is not here
            at = torch.where(place[rows] >= 0, place[rows], spec.vocab)
            x = x.scatter(-1, at, -INF)[:, : spec.vocab].contiguous()
            kept = None if keep is None else keep[rows].contiguous()
            found = self.backend.stats(x.unsqueeze(0), spec.temperature, spec.vocab, kept)
            out[rows] = found[:, :2].to(acc)
        return out

    def _soft_gradient(
        self,
        x: Tensor,
        place: Tensor,
        points: _Points,
        slope: Tensor,
        tail_slope: Tensor | None,
        pull: Tensor,
        restrict: bool,
        spec: LossSpec,
        rows: slice,
    ) -> Tensor:
        """soft dD / ds over the own columns of some rows: slope - q * (sum of slopes)."""
        acc = slope.dtype
        logq = points.logq[rows]
        at_points = slope[rows] - torch.where(logq == -INF, 0.0, logq.exp() * pull[rows, None])
        if restrict:
            every = torch.where(pull[rows, None].isnan(), torch.nan, x.new_zeros((), dtype=acc))
            every = every.repeat(1, spec.vocab + 1)
        else:
            top, total = finite(points.stats[rows, 0]), points.stats[rows, 1]
            logs = (x[:, : spec.vocab].to(acc) - top[:, None]) / spec.temperature
            logs = logs - total.log()[:, None]
            every = -logs.exp() * pull[rows, None]
            if tail_slope is not None:
                assert points.log_tail is not None
                share = (logs - points.log_tail[rows, None]).exp()  # of what is not named
                share = torch.where(tail_slope[rows, None] == 0, 0.0, share)
                every = every + share * tail_slope[rows, None]
            every = F.pad(every, (0, 1))
        at = torch.where(place >= 0, place, spec.vocab)
        every = every.scatter(-1, at, at_points)[:, : spec.vocab]
        return every * (spec.soft / spec.temperature)


class _Points:
    """The teacher's columns of each row, on both sides, and the rest."""

    def __init__(
        self, logp: Tensor, x: Tensor, stats: Tensor, tail: tuple[Tensor, Tensor] | None
    ) -> None:
        self.logp, self.x, self.stats, self.tail = logp, x, stats, tail
        self.log_tail: Tensor | None = None

    def evaluate(self, spec: LossSpec) -> tuple[Tensor, Tensor, Tensor | None]:
        """(value [N], dl/dlog q [N, K], and of the rest [N])."""
        top, total = finite(self.stats[:, 0]), self.stats[:, 1]
        log_total = total.log()
        self.logq = (self.x - top[:, None]) / spec.temperature - log_total[:, None]
        leaves, logps = [self.logq], [self.logp]
        if self.tail is not None:
            tail, unnamed = self.tail
            moved = (unnamed[:, 0] - top) / spec.temperature + unnamed[:, 1].log() - log_total
            self.log_tail = torch.where(unnamed[:, 1] == 0, -INF, moved)
            leaves.append(self.log_tail)
            logps.append(tail)
        entry = formulas.entry(spec)
        with torch.enable_grad():
            leaves = [x.detach().requires_grad_() for x in leaves]
            values = [formulas.pointwise(entry, a, b) for a, b in zip(logps, leaves, strict=True)]
            value = values[0].sum(-1)
            if len(values) > 1:
                value = value + values[1]
            value = entry.row_loss(value)
            slopes = torch.autograd.grad(value.sum(), leaves)
        slopes = tuple(
            torch.where(x == -INF, torch.where(g.isnan(), g, 0.0), g)
            for x, g in zip(leaves, slopes, strict=True)
        )
        return value.detach(), slopes[0], slopes[1] if len(slopes) > 1 else None


def _of_points(x: Tensor, temperature: float) -> Tensor:
    """(max, sum, 0) over the teacher's columns alone."""
    top = x.amax(-1)
    total = ((x - finite(top)[:, None]) / temperature).exp().sum(-1)
    return torch.stack((top, total, torch.zeros_like(top)), -1)


def _merged(parts: Tensor, temperature: float) -> Tensor:
    """[N, 3] stats of a row from (max, sum) of its parts [R, N, 2]; the drift is not."""
    tops, totals = parts.unbind(-1)
    top = tops.amax(0)
    weight = ((tops - finite(top)) / temperature).exp()
    total = torch.where(totals == 0, 0.0, totals * weight).sum(0)
    # a part that is NaN makes the row so, also where its own sum is 0
    total = torch.where(tops.isnan().any(0), torch.nan, total)
    return torch.stack((top, total, torch.zeros_like(top)), -1)
