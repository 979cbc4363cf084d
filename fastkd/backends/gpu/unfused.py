"""The passes apart, with an exchange of sums between each two: stats, loss, grad."""

from __future__ import annotations

import torch
from torch import Tensor

from fastkd.backends.base import LossSpec, Rows, Stats
from fastkd.backends.gpu import launch
from fastkd.backends.gpu import rows as kernels
from fastkd.backends.gpu.arguments import Known, constants
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
            **dict(x=launch.place(x, align_offset), stats=out, keep=launch.contiguous(keep)),
            **dict(vocab=vocab, align_offset=align_offset, per=x.size(1)),
            "exponent": launch.LOG2E / temperature,
            "const": constants(ACC=launch._ACC[acc], **lanes),
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
                student=launch.place(student, align_offset),
                teacher=launch.place(teacher, align_offset),
                align_offset=align_offset,
            ),
            **dict(per_s=student.size(1), per_t=teacher.size(1)),
            **dict(known=Known(stats.student.contiguous(), stats.teacher.contiguous()), loss=out),
            **dict(keep=launch.contiguous(rows.keep), vocab=spec.vocab),
            **launch.scale_args(spec),
            "const": constants(
                DIVERGENCE=launch.divergence_of(spec), ACC=launch._ACC[acc], **lanes
            ),
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
        acc = launch.acc_of(student, teacher)
        args = {
            **dict(
                student=launch.place(student, align_offset),
                teacher=launch.place(teacher, align_offset),
                grad=launch.place(grad, align_offset),
                align_offset=align_offset,
            ),
            **dict(per_s=student.size(1), per_t=teacher.size(1), per_g=grad.size(1)),
            "known": Known(
                stats.student.contiguous(),
                stats.teacher.contiguous(),
                launch.contiguous(stats.hard),
                pairs.contiguous(),
            ),
            "shape": launch.shape_of(spec, grad),
            "rows": launch.per_row(rows._replace(outputs=None)),
            **launch.spec_args(spec, rows),
            "const": constants(
                **launch.constants_for(spec, rows, acc),
                CENTRED=divergences[spec.divergence].expectation == "teacher",
                **lanes,
            ),
        }
        launch.launch(kernels.grad_kernel, n, args, size.threads, student.device)


BACKEND = GPU()
