"""A student of some of its teacher's columns: operands, definitions in torch, and the rule."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from common import Backend
from oracle import FLOORS, Result, assert_gradients, assert_values, formula, oracle
from torch import Tensor

import fastkd
from fastkd.divergence import Divergence

each_normalize = pytest.mark.parametrize("normalize", ["mapped", "all"])
V_S, V_T = 21, 70


def operands(
    backend: Backend,
    lead: tuple[int, ...] = (5,),
    widths: tuple[int, int] = (V_S, V_T),
    dtypes: tuple[torch.dtype, torch.dtype] = (torch.float32, torch.float32),
) -> tuple[Tensor, Tensor, Tensor]:
    """Student, teacher and a map in no order."""
    student, teacher = (3 * torch.randn(*lead, width) for width in widths)
    columns = torch.randperm(widths[1])[: widths[0]]
    sides = (
        x.to(backend.device, dtype) for x, dtype in zip((student, teacher), dtypes, strict=True)
    )
    return (*sides, columns.to(backend.device))  # type: ignore[return-value]


def plain(
    student: Tensor,
    teacher: Tensor,
    columns: Tensor,
    normalize: str,
    labels: Tensor | None = None,
    *,
    divergence: Divergence,
    temperature: float = 1.0,
    alpha: float = 0.0,
    label_smoothing: float = 0.0,
) -> Tensor:
    """The definitions, in the operands' dtype: the mean over rows."""
    loss_of = formula(divergence)
    logq = (student / temperature).log_softmax(-1)
    if normalize == "mapped":
        loss = loss_of(
            (teacher[..., columns] / temperature).log_softmax(-1), logq, divergence.param
        )
    else:
        logp = (teacher / temperature).log_softmax(-1)
        rest = logp.index_fill(-1, columns, -1e30).logsumexp(-1, keepdim=True)
        logp = logp[..., columns]
        if divergence.name != "kl":  # one more outcome, which the student does not have
            logp, logq = torch.cat((logp, rest), -1), F.pad(logq, (0, 1), value=-1e30)
        loss = loss_of(logp, logq, divergence.param)
    if alpha and labels is not None:
        hard = F.cross_entropy(
            student.flatten(0, -2),
            labels.flatten(),
            reduction="none",
            label_smoothing=label_smoothing,
        )
        loss = (1 - alpha) * loss + alpha * hard.view_as(loss)
    if labels is None:
        return loss.mean()
    keep = labels != -100
    return loss[keep].mean()


def ours(
    student: Any, teacher: Any, columns: Tensor, normalize: str, *args: Any, **options: Any
) -> Tensor:
    mapped = fastkd.MappedLogits(teacher, columns, normalize=normalize)  # type: ignore[arg-type]
    given = {"alpha": 0.0, "temperature": 1.0, "t_squared": False, **options}
    return fastkd.distillation_loss(student, mapped, *args, **given)


def differentiated(
    function: Callable[..., Tensor], student: Tensor, *args: Any, **options: Any
) -> Result:
    s = student.detach().requires_grad_(True)
    value = function(s, *args, **options)
    (grad,) = torch.autograd.grad(value, s)
    return Result(value.detach(), grad, None)


def assert_as_good_as_torch(
    student: Tensor,
    teacher: Tensor,
    columns: Tensor,
    normalize: str,
    labels: Tensor | None = None,
    function: Callable[..., Tensor] = ours,
    **options: Any,
) -> Result:
    """The one rule, against the definitions in float64."""
    mine = differentiated(function, student, teacher, columns, normalize, labels, **options)
    wide = torch.float64 if torch.float64 in (student.dtype, teacher.dtype) else torch.float32
    torchs, exact = (
        differentiated(plain, s, t, columns, normalize, labels, **options)
        for s, t in ((student.to(wide), teacher.to(wide)), (oracle(student), oracle(teacher)))
    )
    assert mine.value.dtype == wide
    assert_values(mine.value, torchs.value, exact.value)
    assert mine.student is not None and torchs.student is not None and exact.student is not None
    assert mine.student.dtype == student.dtype
    rounding = FLOORS[wide] / options.get("temperature", 1.0) * (1.0 + float(exact.value.abs()))
    assert_gradients(mine.student, torchs.student, exact.student, rounding)
    return mine
