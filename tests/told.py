"""The oracle of `return_outputs=True`, in torch's own functions, and the rule for it."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from common import INF
from oracle import assert_values, formula, oracle
from torch import Tensor

from fastkd.divergence import Divergence

IGNORED = -100


def told(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor | None = None,
    *,
    divergence: Divergence,
    temperature: float = 1.0,
    label_smoothing: float = 0.0,
    vocab_size: int | None = None,
    ignore_index: int = IGNORED,
    hard: bool = True,
) -> dict[str, Tensor]:
    """`LossOutputs` in torch's own functions and the operands' dtype, 0 in ignored rows."""
    lead = student.shape[:-1]
    keep = torch.ones(lead, dtype=torch.bool, device=student.device)
    if labels is not None:
        keep = labels != ignore_index
    s, t = student[..., :vocab_size][keep], teacher[..., :vocab_size][keep]
    logq, logp = (F.log_softmax(x / temperature, -1) for x in (s, t))
    found = {
        "soft": formula(divergence)(logp, logq, divergence.param),
        "student_entropy": entropy(logq),
        "teacher_entropy": entropy(logp),
        "student_logsumexp": (s / temperature).logsumexp(-1),
        "teacher_logsumexp": (t / temperature).logsumexp(-1),
    }
    if labels is not None and hard:
        at = labels[keep].long()
        smooth = F.cross_entropy(s, at, reduction="none", label_smoothing=label_smoothing)
        found |= {"hard": smooth, "label_logprob": -F.cross_entropy(s, at, reduction="none")}
    return {name: x.new_zeros(lead).masked_scatter(keep, x) for name, x in found.items()}


def entropy(logp: Tensor) -> Tensor:
    return -torch.where(logp == -INF, 0.0, logp.exp() * logp).sum(-1)


def assert_told(outputs: Any, student: Tensor, teacher: Tensor, *args: Any, **options: Any) -> None:
    """The rule, for each output that is not None, and that the others are not expected."""
    torchs, exact = (
        told(s, t, *args, **options)
        for s, t in ((student, teacher), (oracle(student), oracle(teacher)))
    )
    for name, ours in outputs._asdict().items():
        assert (ours is None) == (name not in exact), name
        if ours is not None:
            wide = torch.float64 in (student.dtype, teacher.dtype)
            assert ours.dtype == (torch.float64 if wide else torch.float32)
            assert ours.shape == student.shape[:-1] and not ours.requires_grad
            assert_values(ours, torchs[name], exact[name])
