"""The passes apart, with an exchange of sums between each two: stats, loss, grad."""

from __future__ import annotations

import torch
from torch import Tensor

from fastkd.backends.base import LossSpec, Rows, Stats
from fastkd.backends.gpu import launch
from fastkd.backends.gpu import rows as kernels
from fastkd.backends.gpu.bernoulli import ElementPasses
from fastkd.divergence import divergences


class GPU(ElementPasses, launch.FusedPasses):
    """The Triton kernels."""

    def stats(self, x: Tensor, temperature: float, vocab: int, keep: Tensor | None) -> Tensor:
        acc = launch.acc_of(x, x)
        n = x.size(0) * x.size(1)
        out = torch.empty(n, 3, dtype=acc, device=x.device)
        if n == 0:
            return out
        size, lanes, align_offset = launch.lay(vocab, x)
        args = {
            **dict(
                x=launch.aligned(x, align_offset),
                stats=out,
                keep=launch.contiguous(keep),
                vocab=vocab,
                align_offset=align_offset,
            ),
            **dict(per=x.size(1), outer=x.stride(0), inner=x.stride(1)),
            "exponent": launch.LOG2E / temperature,
            "ACC": launch._ACC[acc],
            **lanes,
        }
        launch.launch(kernels.stats_kernel, n, args, size.threads, x.device)
        return out

    def loss(
        self, student: Tensor, teacher: Tensor, stats: Stats, spec: LossSpec, rows: Rows
    ) -> Tensor:
        acc = launch.acc_of(student, teacher)
        n = student.size(0) * student.size(1)
        out = torch.empty(n, 2, dtype=acc, device=student.device)
        if n == 0:
            return out
        size, lanes, align_offset = launch.lay(spec.vocab, student, teacher)
        args = {
            **dict(
                student=launch.aligned(student, align_offset),
                teacher=launch.aligned(teacher, align_offset),
                align_offset=align_offset,
            ),
            **launch.stats_args(stats),
            **dict(loss=out, keep=launch.contiguous(rows.keep), vocab=spec.vocab),
            **launch.place_args("s", student),
            **launch.place_args("t", teacher),
            **launch.scale_args(spec),
            "DIVERGENCE": launch.divergence_of(spec),
            "ACC": launch._ACC[acc],
            **lanes,
        }
        launch.launch(kernels.loss_kernel, n, args, size.threads, student.device)
        return out

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
        n = student.size(0) * student.size(1)
        if n == 0:
            return
        if spec.hard == 0.0:
            rows = rows._replace(label=None)
        if not spec.at_one:
            stats = stats._replace(hard=None)
        size, lanes, align_offset = launch.lay(spec.vocab, student, teacher, grad)
        args = {
            **dict(
                student=launch.aligned(student, align_offset),
                teacher=launch.aligned(teacher, align_offset),
            ),
            **dict(grad=launch.aligned(grad, align_offset), align_offset=align_offset),
            **launch.stats_args(stats),
            **dict(stats_hard=launch.contiguous(stats.hard), pairs=pairs.contiguous()),
            **launch.common_args(
                spec, rows, launch.acc_of(student, teacher), grad, s=student, t=teacher, g=grad
            ),
            "CENTRED": divergences[spec.divergence].expectation == "teacher",
            **lanes,
        }
        launch.launch(kernels.grad_kernel, n, args, size.threads, student.device)


BACKEND = GPU()
