"""Losses of responses beside the divergences: logits compared as vectors, classes taken apart.

p is the teacher's distribution and q the student's. Logits are finite unless a function says
otherwise; `**rows` are ignore_index, weight, reduction, normalizer, vocab_size and class_dim, as
described in `fastkd.losses`: a row whose label is ignore_index is not read and gets a gradient of
exactly 0.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from typing_extensions import Unpack

import fastkd
from fastkd.arguments.messages import shown, unexpected
from fastkd.arguments.numbers import coefficient, temperature_of

from ..batch import Batch, Outputs
from ..targets import Classes, is_own_loss, labels_of, teacher_logits
from ..terms import Term, Weight
from .chunked import Rows, in_functorch, row_loss
from .correlation import ZERO, angle, top

INF = math.inf
CONSTANT = 1e-7  # standard deviation up to which `zscore` takes a row for constant


def logit_mse(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor | None = None,
    *,
    centred: bool = True,
    **rows: Unpack[Rows],
) -> Tensor:
    """Half the mean squared difference of the logits, each side less its mean over the classes.

        1/(2V) sum_v ((z_v - mean z) - (t_v - mean t))^2,   z the student's logits, t the teacher's

    It is what T^2 KL(p_T || q_T) becomes as T goes to infinity: a softmax does not see the mean.

    Args:
        student: logits [..., V], float32, bfloat16, float16 or float64.
        teacher: logits [..., V] of any of these dtypes.
        labels: int [...], None for all rows; only says which rows are left out.
        centred: False for the plain difference of the logits, 1/(2V) sum_v (z_v - t_v)^2.
        **rows: see the module.

    Returns:
        0-d float32 (float64 where an operand is), [...] with reduction="none".

    Raises:
        TypeError, ValueError: an argument of the wrong kind or value.

    Ba and Caruana 2013, arXiv 1312.6184; Hinton et al. 2015, arXiv 1503.02531 (the limit).
    """

    def formula(s: Tensor, t: Tensor, _: Any) -> Tensor:
        if not centred:
            return 0.5 * (s - t).square().mean(-1)
        # less the largest first, which is exact for logits far from 0
        d = (s - top(s, -1)).sub_(t - top(t, -1))
        return 0.5 * (d - d.mean(-1, keepdim=True)).square().mean(-1)

    return row_loss(formula, student, teacher, labels, **rows)


def dkd(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor | None,
    *,
    alpha: float = 1.0,
    beta: float = 8.0,
    temperature: float = 4.0,
    **rows: Unpack[Rows],
) -> Tensor:
    """Decoupled distillation: the label's class against the rest, and the rest among themselves.

        T^2 (alpha TCKD + beta NCKD)
        TCKD = p_y log(p_y / q_y) + (1 - p_y) log((1 - p_y) / (1 - q_y))
        NCKD = sum_{v != y} p^_v log(p^_v / q^_v),   p^ = p / (1 - p_y), q^ = q / (1 - q_y)

    with p = softmax(teacher / T), q = softmax(student / T); alpha = 1 and beta = 1 - p_y would be
    T^2 KL(p || q). A class at -inf on both sides costs nothing.

    Args:
        student: logits [..., V], float32, bfloat16, float16 or float64.
        teacher: logits [..., V] of any of these dtypes.
        labels: int [...], y.
        alpha, beta: weights of the two parts, >= 0.
        temperature: T > 0, finite.
        **rows: see the module.

    Returns:
        0-d float32 (float64 where an operand is), [...] with reduction="none".

    Raises:
        TypeError, ValueError: an argument of the wrong kind or value, no labels.

    Zhao et al. 2022, arXiv 2203.08679.
    """
    T = float(temperature_of(temperature))
    alpha = coefficient("alpha", alpha)
    beta = coefficient("beta", beta)
    _labelled(labels)

    def formula(s: Tensor, t: Tensor, label: Tensor) -> Tensor:
        # NCKD = (KL - TCKD) / (1 - p_y) would save a copy of these rows and lose all digits where
        # the teacher is sure; without the label's column it is exact, and the copy is in the cache
        (s_y, s), (t_y, t) = _apart(s, label), _apart(t, label)
        rest = fastkd.kl_div(s, t, temperature=T, reduction="none")
        return T * T * (alpha * _binary_kl(_odds(t_y, t, T), _odds(s_y, s, T)) + beta * rest)

    return row_loss(formula, student, teacher, labels, **rows)


def nkd(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor | None,
    *,
    gamma: float = 1.5,
    temperature: float = 1.0,
    **rows: Unpack[Rows],
) -> Tensor:
    """Normalised distillation: soft cross-entropy at the label, and among the rest, normalised.

        -p_y log q_y - gamma T^2 sum_{v != y} p^_v log q^_v

    with p_y and q_y at T = 1, and p^, q^ the softmax of teacher / T and student / T over the
    classes other than y. A cross-entropy: not 0 where student and teacher agree.

    Args:
        student: logits [..., V], float32, bfloat16, float16 or float64.
        teacher: logits [..., V] of any of these dtypes, a constant of the loss.
        labels: int [...], y.
        gamma: weight of the second part, >= 0.
        temperature: T > 0, finite.
        **rows: see the module.

    Returns:
        0-d float32 (float64 where an operand is), [...] with reduction="none".

    Raises:
        TypeError, ValueError: an argument of the wrong kind or value, no labels, a teacher that
            requires grad.

    Yang et al. 2023, arXiv 2303.13005.
    """
    T = float(temperature_of(temperature))
    gamma = coefficient("gamma", gamma)
    _labelled(labels)
    if isinstance(teacher, Tensor) and teacher.requires_grad and torch.is_grad_enabled():
        raise ValueError("teacher: got a tensor that requires grad, expected teacher.detach()")

    def formula(s: Tensor, t: Tensor, label: Tensor) -> Tensor:
        (s_y, s), (t_y, t) = _apart(s, label), _apart(t, label)
        p_y, log_q_y = _odds(t_y, t, 1.0).sigmoid(), F.logsigmoid(_odds(s_y, s, 1.0))
        # cross-entropy = KL + entropy: only the KL has a gradient
        rest = fastkd.kl_div(s, t, temperature=T, reduction="none") + _entropy(t, T)
        return gamma * T * T * rest - _product(p_y, log_q_y)

    return row_loss(formula, student, teacher, labels, **rows)


def zscore(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor | None = None,
    *,
    temperature: float = 2.0,
    **rows: Unpack[Rows],
) -> Tensor:
    """Forward KL of logits standardised per row, so that the student may have its own scale.

        T^2 KL(softmax(t~ / T) || softmax(z~ / T)),   z~ = (z - mean z) / std z, likewise t~

    with the unbiased standard deviation over the classes. A row whose standard deviation is at
    most 1e-7, or that has one class, is constant: z~ = 0 with gradient 0.

    Args:
        student: logits z [..., V], float32, bfloat16, float16 or float64.
        teacher: logits t [..., V] of any of these dtypes.
        labels: int [...], None for all rows; only says which rows are left out.
        temperature: T > 0, finite.
        **rows: see the module.

    Returns:
        0-d float32 (float64 where an operand is), [...] with reduction="none".

    Raises:
        TypeError, ValueError: an argument of the wrong kind or value.

    Sun et al. 2024, arXiv 2403.01427.
    """
    T = float(temperature_of(temperature))

    def formula(s: Tensor, t: Tensor, _: Any) -> Tensor:
        kl = fastkd.kl_div(_standardised(s), _standardised(t), temperature=T, reduction="none")
        return T * T * kl

    return row_loss(formula, student, teacher, labels, **rows)


def cosine(
    student: Tensor, teacher: Tensor, labels: Tensor | None = None, **rows: Unpack[Rows]
) -> Tensor:
    """One minus the cosine of the angle between the logits of each row.

        1 - <z, t> / (|z| |t|),   z the student's logits, t the teacher's

    A row of zeros has no angle: the loss is 0 where both sides are zero, 1 where one is, and the
    gradient of that side is 0.

    Args:
        student: logits [..., V], float32, bfloat16, float16 or float64.
        teacher: logits [..., V] of any of these dtypes.
        labels: int [...], None for all rows; only says which rows are left out.
        **rows: see the module.

    Returns:
        0-d float32 (float64 where an operand is), [...] with reduction="none".

    Raises:
        TypeError, ValueError: an argument of the wrong kind or value.

    As among the chunked losses of Liger Kernel (Hsu et al. 2024, arXiv 2410.10989).
    """

    def formula(s: Tensor, t: Tensor, _: Any) -> Tensor:
        return angle(s, t, -1)

    return row_loss(formula, student, teacher, labels, **rows)


def response(
    function: Callable[..., Tensor],
    weight: Weight = 1.0,
    *,
    rows: str | None = None,
    name: str | None = None,
    **options: Any,
) -> Term:
    """A term of a loss between the logits: function(student, teacher, labels, **options).

    Args:
        function: `logit_mse`, `dkd`, `nkd`, `zscore`, `cosine`, `dist`, `pixel_wise`,
            `channel_wise`, or one of your own.
        weight: factor, or step -> factor.
        rows: "labelled": rows whose label is -100 are left out, and every batch needs labels;
            "all": the function gets no labels. None: "labelled" where the function cannot do
            without, "all" otherwise.
        name: None for the function's own.
        **options: of the function; `temperature` may be step -> T.

    Raises:
        TypeError: an option that the function does not have.
        ValueError: `rows` is neither, or "all" for a function that needs labels.
    """
    name = str(name or getattr(function, "__name__", "response"))
    parameters = inspect.signature(function).parameters
    needs_labels = "labels" in parameters and parameters["labels"].default is inspect._empty
    if is_own_loss(function) and "labels" not in parameters:
        expected = "distill.ranking, embedding, regression or feature for it"
        raise TypeError(f"function: got {name}, a loss without labels, expected {expected}")
    rows = ("labelled" if needs_labels else "all") if rows is None else rows
    if rows not in ("all", "labelled") or (rows == "all" and needs_labels):
        expected = "'labelled'" if needs_labels else "'all' or 'labelled'"
        raise ValueError(f"rows: got {shown(rows)} for {name}, expected {expected}")
    known = [*parameters][3:]  # behind student, teacher and labels
    if "rows" in known:
        known = [*known[: known.index("rows")], *Rows.__annotations__]
    if unknown := options.keys() - {*known}:
        raise TypeError(f"{name}: {unexpected(unknown, known)}")
    if is_own_loss(function) and not callable(options.get("temperature", len)):
        temperature_of(options["temperature"])

    own_dim = getattr(parameters.get("class_dim"), "default", -1)  # 1 of the losses of maps
    look = Classes(name, options.get("class_dim", own_dim))
    # one of your own may lay out classes otherwise; plain differences see one logit, too
    softmax = is_own_loss(function) and not (
        function is logit_mse and options.get("centred") is False
    )

    def call(student: Outputs, teacher: Outputs, batch: Batch) -> Tensor:
        target = teacher_logits(name, teacher)
        if softmax:
            look(student.logits, batch)
        call_options = dict(options)
        if callable(call_options.get("temperature")):
            call_options["temperature"] = call_options["temperature"](batch.step)
        labels = labels_of(name, batch) if rows == "labelled" else None
        return function(student.logits, target, labels, **call_options)

    return Term(name, call, weight, mean="tokens" if rows == "labelled" else "samples")


def _labelled(labels: Tensor | None) -> None:
    if labels is None:
        raise ValueError("labels: got None, expected the class of each row, int [...]")


def _standardised(x: Tensor) -> Tensor:
    # less its mean first: a normalisation in one step loses the digits of logits far from 0
    x = x - x.detach().mean(-1, keepdim=True)
    classes = x.size(-1)
    z, _, inverse = torch.native_layer_norm(x, [classes], None, None, ZERO)
    constant = inverse.detach() * CONSTANT >= (1 - 1 / classes) ** 0.5
    return z * torch.full_like(inverse, (1 - 1 / classes) ** 0.5).masked_fill(constant, 0.0)


class _Apart(torch.autograd.Function):
    """[n] the label's logit, and [n, V] the others, -inf in its place; the gradient in one step."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
        at = label.unsqueeze(-1)
        ctx.save_for_backward(at)
        return x.gather(-1, at).squeeze(-1), x.scatter(-1, at, -INF)

    @staticmethod
    def backward(ctx: Any, one: Tensor, others: Tensor) -> tuple[Tensor, None]:
        (at,) = ctx.saved_tensors
        return others.scatter(-1, at, one.unsqueeze(-1)), None


def _apart(x: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
    if in_functorch():
        at = label.unsqueeze(-1)
        return x.gather(-1, at).squeeze(-1), x.scatter(-1, at, -INF)
    return _Apart.apply(x, label)


def _odds(x_y: Tensor, others: Tensor, T: float) -> Tensor:
    """log(p_y / (1 - p_y)) from the logits, where p_y itself would be 0 or 1; inf without others.

    Of it, sigmoid and logsigmoid make p_y, 1 - p_y and their logarithms, all finite.
    """
    highest = top(others, -1)
    total = (others - highest).mul_(1 / T).exp_().sum(-1)
    alone = total == 0
    odds = (x_y - highest.squeeze(-1)) / T - torch.where(alone, 1.0, total).log()
    return torch.where(alone, INF, odds)


def _binary_kl(a: Tensor, b: Tensor) -> Tensor:
    """KL of two outcomes by their log odds, teacher's and student's."""
    yes = _product(a.sigmoid(), F.logsigmoid(a) - F.logsigmoid(b))
    return yes + _product((-a).sigmoid(), F.logsigmoid(-a) - F.logsigmoid(-b))


def _product(p: Tensor, log: Tensor) -> Tensor:
    """p * log with 0 log 0 = 0."""
    return p * torch.where(p == 0, 0.0, log)


def _entropy(x: Tensor, T: float) -> Tensor:
    d = (x - top(x, -1)).mul_(1 / T)
    e = d.exp()
    total = e.sum(-1)
    total = torch.where(total == 0, 1.0, total)
    # 0 * -inf counts 0
    return total.log() - (e * d.clamp_min(torch.finfo(d.dtype).min)).sum(-1) / total
