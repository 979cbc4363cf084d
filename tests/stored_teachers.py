"""Stored teachers of a few columns, their definitions in torch, and the rule for them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from common import INF, Backend
from oracle import FLOORS, Result, assert_gradients, assert_values, formula, oracle
from torch import Tensor

import fastkd
from fastkd.divergence import Divergence
from fastkd.operands import TAILS

each_tail = pytest.mark.parametrize("tail", TAILS)
# rows, columns, named columns
SIZES = [(3, 5, 2), (4, 10, 10), (3, 100, 8), (2, 2049, 40), (2, 8_300, 64)]
each_size = pytest.mark.parametrize(
    "size",
    [
        pytest.param(
            size,
            id="x".join(map(str, size)),
            marks=pytest.mark.not_interpreted if size[1] > 2048 else (),
        )
        for size in SIZES
    ],
)


def stored(
    logits: Tensor, k: int, tail: str = "bucket", temperature: float = 1.0, **options: Any
) -> fastkd.TopK:
    """A teacher whose columns come in no order, a few of its places empty."""
    top = fastkd.topk_from_logits(logits.double(), k, temperature=temperature)
    order = torch.rand(top.shape, device=logits.device).argsort(-1)
    values, at = (x.gather(-1, order) for x in (top.logprobs, top.indices))
    pad = F.pad(at, (1, 2), value=-1)
    return fastkd.TopK(
        F.pad(values, (1, 2), value=7.0).to(torch.float32),
        pad.to(options.pop("index", torch.int32)),
        tail_logprob=None if top.tail_logprob is None else top.tail_logprob.float(),
        temperature=temperature,
        tail=tail,
        **options,
    )


def plain(
    student: Tensor,
    teacher: fastkd.TopK,
    labels: Tensor | None = None,
    *,
    divergence: Divergence,
    temperature: float = 1.0,
    alpha: float = 0.0,
    label_smoothing: float = 0.0,
) -> Tensor:
    """The definitions, one row after the other, in the student's dtype: the mean over rows."""
    loss_of = formula(divergence)
    losses = []
    for row in range(student.size(0)):
        if labels is not None and labels[row] == -100:
            continue
        x = student[row]
        logq = F.log_softmax(x / temperature, -1)
        named = teacher.indices[row] >= 0
        at = teacher.indices[row][named].long()
        logp = teacher.logprobs[row][named].to(x.dtype)
        off = torch.ones_like(x, dtype=torch.bool)
        off[at] = False
        if teacher.tail in ("renormalize", "restrict"):
            logp = F.log_softmax(logp * (teacher.temperature / temperature), -1)
        if teacher.tail == "restrict":
            p, q = logp, F.log_softmax(x[at] / temperature, -1)
        elif teacher.tail == "drop":
            p, q = logp, logq[at]
        elif teacher.tail == "renormalize":
            p = torch.full_like(logq, -1e30).index_put((at,), logp)
            q = logq
        else:
            p, q = logp, logq[at]
            if bool(off.any()):
                tail = teacher.tail_logprob
                rest = torch.log1p(-logp.exp().sum()) if tail is None else tail[row].to(x.dtype)
                p = torch.cat((logp, rest[None].clamp(min=-1e30)))
                q = torch.cat((q, logq[off].logsumexp(-1, keepdim=True)))
        loss = loss_of(p[None], q[None], divergence.param)[0]
        if alpha and labels is not None:
            hard = F.cross_entropy(x, labels[row], label_smoothing=label_smoothing)
            loss = (1 - alpha) * loss + alpha * hard
        losses.append(loss)
    return torch.stack(losses).mean()


def differentiated(
    function: Callable[..., Tensor],
    student: Tensor,
    teacher: fastkd.TopK,
    *args: Any,
    **options: Any,
) -> Result:
    s = student.detach().requires_grad_(True)
    value = function(s, teacher, *args, **options)
    (grad,) = torch.autograd.grad(value, s)
    return Result(value.detach(), grad, None)


def fused(student: Tensor, teacher: fastkd.TopK, *args: Any, **options: Any) -> Tensor:
    return fastkd.distillation_loss(
        student, teacher, *args, **{"alpha": 0.0, "temperature": 1.0, "t_squared": False, **options}
    )


def assert_as_good_as_torch(
    student: Tensor, teacher: fastkd.TopK, labels: Tensor | None = None, **options: Any
) -> Result:
    """The one rule, against the definitions in float64."""
    ours = differentiated(fused, student, teacher, labels, **options)
    torchs = differentiated(plain, student.float(), teacher, labels, **options)
    exact = differentiated(plain, oracle(student), teacher, labels, **options)
    if exact.value > 1e20:  # reverse_kl against a column that the teacher excludes
        assert ours.value == INF
        return ours
    assert_values(ours.value, torchs.value, exact.value)
    assert ours.student is not None and exact.student is not None and torchs.student is not None
    assert ours.student.dtype == student.dtype
    steepness = 1.0 / options.get("temperature", 1.0)
    rounding = FLOORS[ours.value.dtype] * steepness * (1.0 + float(exact.value.abs()))
    assert_gradients(ours.student, torchs.student, exact.student, rounding)
    return ours


def random(backend: Backend, n: int, v: int, dtype: torch.dtype = torch.float32) -> Any:
    student, teacher = 3 * torch.randn(n, v), 3 * torch.randn(n, v)
    return student.to(backend.device, dtype), teacher.to(backend.device)


def kept_of(**changes: Any) -> fastkd.TopK:
    given = {"logprobs": [[-1.0, -2.0], [-1.0, -2.0]], "indices": [[0, 3], [4, 1]], **changes}
    tensors = {k: torch.tensor(v) if isinstance(v, list) else v for k, v in given.items()}
    return fastkd.TopK(tensors.pop("logprobs"), tensors.pop("indices"), **tensors)
