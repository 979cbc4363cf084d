"""What a loss tells of its rows beside its value: `return_outputs=True`."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastkd.backends.base import OUTPUTS, LossSpec
from fastkd.operands import Operand


class LossOutputs(NamedTuple):
    """What a loss knows of each row, from the pass that computed it; for logs and schedules.

    Each is [...], detached, float32 (float64 where an operand is), 0 in ignored rows, and without
    weight, alpha and T^2. With p = softmax(teacher / T) and q = softmax(student / T):

        soft                 the divergence D(p, q)
        hard                 cross-entropy with the label at T = 1, label smoothing included
        student_entropy      - sum_v q_v log q_v
        teacher_entropy      - sum_v p_v log p_v
        student_logsumexp    log sum_v exp(student_v / T)
        teacher_logsumexp    log sum_v exp(teacher_v / T)
        label_logprob        log softmax(student)[label] at T = 1

    None stands for what the loss has not computed: `hard` and `label_logprob` of a loss without a
    hard term (a divergence, alpha=0), whatever its labels; `soft` and the teacher's at alpha=1,
    where the teacher is not read; `teacher_logsumexp` of a `TopK`.
    The entropy of a `TopK` is that of the columns it names (and of the bucket, with that tail);
    with tail="restrict" the student's softmax is one over these columns, too.
    """

    soft: Tensor | None
    hard: Tensor | None
    student_entropy: Tensor
    teacher_entropy: Tensor | None
    student_logsumexp: Tensor
    teacher_logsumexp: Tensor | None
    label_logprob: Tensor | None


assert LossOutputs._fields == OUTPUTS


def named(found: Tensor, student: Operand, spec: LossSpec, topk: bool = False) -> LossOutputs:
    """The outputs [N, 7] of a pass in the student's leading shape, None for what is unknown."""
    lead, found = student.shape[:-1], found.detach() if found.requires_grad else found
    found = found if len(lead) == 1 else found.reshape(*lead, len(OUTPUTS))
    known: list[Any] = [*found.unbind(-1)]  # by their places: a small loss counts what this costs
    if spec.hard == 0.0:
        known[1] = known[6] = None  # hard, label_logprob
    if spec.soft == 0.0:
        known[0] = known[3] = None  # soft, teacher_entropy
    if spec.soft == 0.0 or topk:
        known[5] = None  # teacher_logsumexp
    return LossOutputs(*known)


def memory(student: Operand, acc: torch.dtype) -> Tensor:
    """[N, 7], not initialised."""
    n = student.numel() // student.shape[-1]
    return torch.empty(n, len(OUTPUTS), dtype=acc, device=student.device)


def refuse(group: object, dtensors: bool) -> None:
    """Raises NotImplementedError where outputs are not supported."""
    if group is not None or dtensors:
        raise NotImplementedError(
            "return_outputs: got True with a vocabulary that ranks share (group, DTensors), whose "
            "outputs no rank has; leave return_outputs out, or gather the logits (full_tensor()) "
            "and leave group out"
        )


def refuse_map(requested: bool) -> None:
    """Raises NotImplementedError: the passes over a mapped teacher do not tell outputs."""
    if requested:
        raise NotImplementedError(
            "return_outputs: got True with MappedLogits(normalize='all'), expected logits of the "
            "student's own columns or normalize='mapped'; leave return_outputs out"
        )
