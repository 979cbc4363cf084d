"""The plain torch formulas, which in float64 are the oracle, and the one tolerance rule.

The formulas and the reductions stand here once more on purpose: an oracle that used the package's
own would agree with its mistakes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from common import INF, in_form
from torch import Tensor

import fastkd
from fastkd.divergence import Divergence

# -inf as the limit of a very negative logit; a sum that contains it is infinite
ALMOST_MINUS_INF = -1e60
INFINITE = 1e20


# ---- plain torch: the formula that users write, and in float64 the oracle


def _log_target(logp: Tensor, logq: Tensor) -> Tensor:
    return F.kl_div(logq, logp, reduction="none", log_target=True).sum(-1)


def _log_mixture(loga: Tensor, logb: Tensor, a: float) -> Tensor:
    return torch.logsumexp(torch.stack((loga + math.log(a), logb + math.log(1 - a))), 0)


def _plain_js(logp: Tensor, logq: Tensor, beta: float) -> Tensor:
    m = _log_mixture(logp, logq, beta)
    return beta * _log_target(logp, m) + (1 - beta) * _log_target(logq, m)


def _overlap(logp: Tensor, logq: Tensor) -> Tensor:
    p, q = logp.exp(), logq.exp()  # not torch.minimum: its gradient is halved at ties
    return torch.where(q < p, q, p.where(p < q, p.detach() + 0 * q.detach())).sum(-1)


PLAIN: dict[str, Callable[[Tensor, Tensor, float], Tensor]] = {
    "kl": lambda logp, logq, _: _log_target(logp, logq),
    "reverse_kl": lambda logp, logq, _: _log_target(logq, logp),
    "js": _plain_js,
    "skew_kl": lambda logp, logq, a: _log_target(logp, _log_mixture(logp, logq, a)),
    "skew_reverse_kl": lambda logp, logq, a: _log_target(logq, _log_mixture(logq, logp, a)),
    "tv": lambda logp, logq, _: 0.5 * (logp.exp() - logq.exp()).abs().sum(-1),
    "acceptance": lambda logp, logq, _: -_overlap(logp, logq).clamp(min=2.0**-100).log(),
}


def plain(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor | None = None,
    *,
    divergence: Divergence,
    temperature: float = 1.0,
    alpha: float = 0.0,
    label_smoothing: float = 0.0,
    t_squared: bool = False,
    z_loss: float = 0.0,
    ignore_index: int = -100,
    weight: Tensor | None = None,
    reduction: str = "mean",
    normalizer: float | Tensor | None = None,
    vocab_size: int | None = None,
) -> Tensor:
    """What `fastkd.distillation_loss` computes, in torch's own functions and the operands' dtype.

    A divergence without a formula here is taken from the table, so that adding one needs no edit.
    """
    keep, factor = row_factor(
        student, labels, ignore_index, weight, reduction=reduction, normalizer=normalizer
    )
    s, t = student[..., :vocab_size][keep], teacher[..., :vocab_size][keep]
    logq, logp = (F.log_softmax(x / temperature, -1) for x in (s, t))
    soft = (1 - alpha) * (temperature**2 if t_squared else 1.0)
    kept = soft * formula(divergence)(logp, logq, divergence.param)
    if alpha and labels is not None:
        at = labels[keep].long()
        hard = F.cross_entropy(s, at, reduction="none", label_smoothing=label_smoothing)
        kept = kept + alpha * hard
    if z_loss:
        kept = kept + z_loss * torch.logsumexp(s, -1).square()
    rows = kept.new_zeros(keep.shape).masked_scatter(keep, kept) * factor.to(kept.dtype)
    return rows if reduction == "none" else rows.sum()


def row_factor(
    student: Tensor,
    labels: Tensor | None,
    ignore_index: int = -100,
    weight: Tensor | None = None,
    *,
    reduction: str,
    normalizer: float | Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(keep, factor) of each row: every reduction is a sum of factor * loss, or that product."""
    keep = torch.ones(student.shape[:-1], dtype=torch.bool, device=student.device)
    if labels is not None:
        keep = labels != ignore_index
    factor = keep.double() if weight is None else torch.where(keep, weight.double(), 0.0)
    if reduction == "batchmean":
        factor = factor / student.size(0)
    elif reduction == "mean":
        by = factor.sum() if normalizer is None else torch.as_tensor(normalizer)
        factor = factor / by.where(by != 0, INF)
    return keep, factor


def formula(divergence: Divergence) -> Callable[[Tensor, Tensor, float], Tensor]:
    """(log p, log q, parameter) to the loss of each row."""
    return PLAIN.get(
        divergence.name, lambda *at: divergence.row_loss(divergence.value(*at).sum(-1))
    )


# ---- the rule

# error(ours, oracle) <= 2 * error(plain torch, oracle) + floor. The floor is relative: for values
# to the larger of the value and one nat of what is summed; for gradients to the largest gradient,
# in the dtype it is stored in, and to the largest of the terms slope_j and q_j * (1 + sum of
# slopes) that it is the difference of (a slope is known up to a multiple of q), in the dtype it is
# computed in. That is float32, float64 where an operand is, and the dtype of every value.
FLOORS = {
    # the oracle is float64 too: this is its own rounding over a row of up to 1e5 columns
    torch.float64: 1e-12,
    # 16 units in the last place: exp2, log and the row's log-sum-exp, a few of them each
    torch.float32: 16 * 2.0**-23,
    # half a unit in the last place of 11 bits: the one rounding of a gradient that is stored
    torch.float16: 2.0**-11,
    # half a unit in the last place of 8 bits, likewise
    torch.bfloat16: 2.0**-8,
}


class Result(NamedTuple):
    """A loss and its gradients; None for an operand whose gradient was not asked for."""

    value: Tensor
    student: Tensor | None
    teacher: Tensor | None


def differentiate(
    function: Callable[..., Tensor],
    student: Tensor,
    teacher: Tensor,
    *args: Any,
    form: str = "dense",
    wrt: str = "student",
    upstream: Tensor | None = None,
    **options: Any,
) -> Result:
    """Calls the loss on the operands where they lie (no copies) and differentiates it.

    wrt: "student", "teacher" or "both".
    """
    s = student.detach().requires_grad_(wrt != "teacher")
    t = teacher.detach().requires_grad_(wrt != "student")
    operands = in_form(s, t, form)
    value = function(*operands, *args, **options)
    inputs = [x for x in (s, t) if x.requires_grad]
    by = torch.ones_like(value) if upstream is None else upstream.to(value.dtype)
    grads = list(torch.autograd.grad(value, inputs, by))
    grad_s = grads.pop(0) if s.requires_grad else None
    return Result(value.detach(), grad_s, grads.pop(0) if t.requires_grad else None)


def assert_as_good_as_torch(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor | None = None,
    *,
    divergence: Divergence,
    form: str = "dense",
    wrt: str = "student",
    upstream: Tensor | None = None,
    **options: Any,
) -> Result:
    """THE tolerance rule, for the loss and the gradients of `fastkd.distillation_loss`.

    Options are those of `plain`, whose defaults (the bare divergence, T = 1) hold here too.
    """
    call: dict[str, Any] = {"alpha": 0.0, "temperature": 1.0, "t_squared": False, **options}
    call["divergence"] = divergence
    way: dict[str, Any] = {"wrt": wrt, "upstream": upstream}
    ours = differentiate(
        fastkd.distillation_loss, student, teacher, labels, form=form, **way, **call
    )
    torchs, exact = (
        differentiate(plain, s, t, labels, **way, **call)
        for s, t in ((student, teacher), (oracle(student), oracle(teacher)))
    )
    wide = torch.float64 in (student.dtype, teacher.dtype)
    assert ours.value.dtype == (torch.float64 if wide else torch.float32)
    alpha, temperature = call["alpha"], call["temperature"]
    soft = (1 - alpha) * (temperature**2 if call["t_squared"] else 1.0)
    assert_values(ours.value, torchs.value, exact.value, alpha + soft)
    finite = exact.value < INFINITE  # an infinite loss has no gradient to compare
    if not finite.dim() and not finite:
        return ours
    accumulation = FLOORS[ours.value.dtype]
    for operand, mine, its, true in (
        (student, ours.student, torchs.student, exact.student),
        (teacher, ours.teacher, torchs.teacher, exact.teacher),
    ):
        if mine is not None and its is not None and true is not None:
            assert mine.shape == operand.shape and mine.dtype == operand.dtype
            of = "student" if operand is student else "teacher"
            terms = _largest_term(student, teacher, labels, of, upstream, call)
            if finite.dim():
                mine, its, true = mine[finite], its[finite], true[finite]
            assert_gradients(mine, its, true, accumulation * terms)
    return ours


def _largest_term(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor | None,
    of: str,
    upstream: Tensor | None,
    call: dict[str, Any],
) -> float:
    """max over rows and columns of what the gradient of one side is the difference of."""
    vocab, temperature = call.get("vocab_size"), call["temperature"]
    s, t = (oracle(x[..., :vocab].nan_to_num(0.0, INF, -INF)) for x in (student, teacher))
    logq, logp = ((x / temperature).log_softmax(-1).requires_grad_() for x in (s, t))
    at = logq if of == "student" else logp
    loss = formula(call["divergence"])(logp, logq, call["divergence"].param)
    (slope,) = torch.autograd.grad(loss.sum(), at)
    size = slope.abs() + at.detach().exp() * (1 + slope.abs().sum(-1, keepdim=True))
    size = torch.where((loss < INFINITE).unsqueeze(-1), size, 0.0).amax(-1)
    square = temperature**2 if call["t_squared"] else 1.0
    size = call["alpha"] + (1 - call["alpha"]) * square / temperature * size
    if of == "student":
        size = size + 2 * call.get("z_loss", 0.0) * s.logsumexp(-1).abs()
    names = ("ignore_index", "weight", "normalizer")
    options = {name: call[name] for name in names if name in call}
    reduction = call.get("reduction", "mean")
    _, share = row_factor(student, labels, reduction=reduction, **options)
    if upstream is not None:
        share = share * upstream
    return float((size * share.abs()).max()) if size.numel() else 0.0


def oracle(x: Tensor) -> Tensor:
    """The same numbers in float64, -inf as the limit it stands for."""
    return x.detach().double().clamp(min=ALMOST_MINUS_INF)


def assert_values(ours: Tensor, torchs: Tensor, exact: Tensor, nat: float = 1.0) -> None:
    """The rule, element by element; where plain torch is not finite, it excuses nothing."""
    infinite = exact > INFINITE
    assert ((ours == INF) | ~infinite).all(), f"expected inf in {infinite}, got {ours}"
    mine, its, true = (x.double()[~infinite] for x in (ours, torchs, exact))
    excuse = 2 * (its - true).abs()
    allowed = torch.where(excuse.isfinite(), excuse, 0.0)
    allowed = allowed + FLOORS[ours.dtype] * true.abs().clamp(min=nat)
    error = (mine - true).abs()
    worst = int((error - allowed).argmax()) if error.numel() else 0
    assert bool((error <= allowed).all()), (
        f"value: error {error.view(-1)[worst]:.3e}, allowed {allowed.view(-1)[worst]:.3e} "
        f"(got {mine.view(-1)[worst]:.9g}, torch {its.view(-1)[worst]:.9g}, "
        f"exact {true.view(-1)[worst]:.9g})"
    )


def assert_gradients(ours: Tensor, torchs: Tensor, exact: Tensor, rounding: float = 0.0) -> None:
    """The rule, in the largest error, relative to the largest gradient.

    rounding: error of the terms that the gradient is the difference of.
    """
    if exact.numel() == 0:
        return
    mine, its, true = ours.double(), torchs.double(), exact.double()
    excuse = 2 * (its - true).abs()
    allowed = excuse.where(excuse.isfinite(), 0.0).max() + rounding
    allowed = allowed + FLOORS[ours.dtype] * true.abs().max()
    stored = torch.finfo(ours.dtype)  # half of the smallest number, where the gradient is subnormal
    allowed = allowed + stored.smallest_normal * stored.eps / 2
    error = (mine - true).abs().max()
    assert bool(error <= allowed), (
        f"gradient: error {error:.3e}, allowed {allowed:.3e}, largest gradient "
        f"{true.abs().max():.3e}"
    )
