"""Losses of one logit each: several labels of a sample, or a student with one logit.

Every logit is a yes or no of its own: p = sigmoid(teacher / T), q = sigmoid(student / T), and the
loss of a logit is a divergence of two Bernoulli distributions. The options that all of them share
(`**elements`, keyword-only):

    labels            [...] floats from 0 to 1, bool or integers 0 and 1, in the student's shape;
                      logits whose label is ignore_index or NaN are left out: never read, gradient
                      exactly 0, whatever they hold
    ignore_index      -100, or several integers
    weight            floats that broadcast to the student's shape, a factor per logit
    reduction         "mean": sum of weight * loss over the sum of the kept logits' weights, 0 where
                      that is 0; "sum"; "none": [...] with 0 where a logit is left out
    normalizer        number or 0-d tensor in place of the denominator of "mean"

Loss and gradient are one pass, in C++ on the CPU and in Triton on a GPU, where no number is read
and labels out of range become NaN. With `use_backend("reference")` the loss takes one pass over the
operands in torch's operations and its gradient another; nothing of their size is kept. Under
torch.compile and torch.func they are plain torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, TypedDict

from torch import Tensor
from typing_extensions import Unpack

from fastkd.bernoulli import Bernoulli, entry
from fastkd.divergence import Divergence, divergences
from fastkd.engine import validate
from fastkd.engine.elementwise import loss


class MixedElements(TypedDict, total=False):
    """The options that all losses of logits share but labels; see the module's docstring."""

    ignore_index: int | Sequence[int]
    weight: Tensor | None
    reduction: Literal["mean", "sum", "none"]
    normalizer: float | Tensor | None


class Elements(MixedElements, total=False):
    """The options that all losses of logits share; see the module's docstring."""

    labels: Tensor | None


OPTIONS = ("labels", *MixedElements.__annotations__)


def binary_kl_div(
    student: Tensor, teacher: Tensor, *, temperature: float = 1.0, **elements: Unpack[Elements]
) -> Tensor:
    """Forward KL divergence of each logit's Bernoulli distribution, reduced.

        p log(p / q) + (1 - p) log((1 - p) / (1 - q))

    p = sigmoid(teacher / T), q = sigmoid(student / T). No factor T^2. It is `kl_div` of the logits
    (x, 0) of two classes.

    Args:
        student: logits [...] of any shape, float32, bfloat16, float16 or float64.
        teacher: logits [...] of any of these dtypes.
        temperature: T > 0, finite.
        **elements: labels, ignore_index, weight, reduction, normalizer as in `fastkd.binary`.

    Returns:
        0-d float32 (float64 where an operand is), [...] with reduction="none". Differentiable in
        both operands; gradients come in the operand's dtype.

    Raises:
        TypeError, ValueError: an argument of the wrong kind or value.

    Hinton et al. 2015, arXiv 1503.02531, of two classes.
    """
    return _bare("binary_kl_div", student, teacher, divergences.kl, temperature, elements)


def binary_reverse_kl_div(
    student: Tensor, teacher: Tensor, *, temperature: float = 1.0, **elements: Unpack[Elements]
) -> Tensor:
    """Reverse KL divergence of each logit's Bernoulli distribution, reduced.

        q log(q / p) + (1 - q) log((1 - q) / (1 - p))

    p = sigmoid(teacher / T), q = sigmoid(student / T). No factor T^2.

    Args:
        student: logits [...] of any shape, float32, bfloat16, float16 or float64.
        teacher: logits [...] of any of these dtypes.
        temperature: T > 0, finite.
        **elements: as described in `fastkd.binary`.

    Returns:
        0-d float32 (float64 where an operand is), [...] with reduction="none".

    Raises:
        TypeError, ValueError: an argument of the wrong kind or value.

    Gu et al. 2023 (MiniLLM), arXiv 2306.08543, of two classes.
    """
    entry = divergences.reverse_kl
    return _bare("binary_reverse_kl_div", student, teacher, entry, temperature, elements)


def binary_js_div(
    student: Tensor,
    teacher: Tensor,
    *,
    beta: float = 0.5,
    temperature: float = 1.0,
    **elements: Unpack[Elements],
) -> Tensor:
    """Generalised Jensen-Shannon divergence of each logit's Bernoulli distribution, reduced.

        beta KL(p || m) + (1 - beta) KL(q || m),   m = beta p + (1 - beta) q

    with KL that of `binary_kl_div`, p = sigmoid(teacher / T), q = sigmoid(student / T). No factor
    T^2.

    Args:
        student: logits [...] of any shape, float32, bfloat16, float16 or float64.
        teacher: logits [...] of any of these dtypes.
        beta: 0 < beta < 1.
        temperature: T > 0, finite.
        **elements: as described in `fastkd.binary`.

    Returns:
        0-d float32 (float64 where an operand is), [...] with reduction="none".

    Raises:
        TypeError, ValueError: an argument of the wrong kind or value.

    Agarwal et al. 2023 (GKD), arXiv 2306.13649, of two classes.
    """
    entry = divergences.js(beta=beta)
    return _bare("binary_js_div", student, teacher, entry, temperature, elements, "beta")


def binary_distillation_loss(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor | None = None,
    *,
    temperature: float = 2.0,
    alpha: float = 0.5,
    divergence: str | Divergence = "kl",
    t_squared: bool = True,
    pos_weight: Tensor | None = None,
    **elements: Unpack[MixedElements],
) -> Tensor:
    """Binary cross-entropy with labels, and a divergence from the teacher, of each logit.

        alpha BCE(labels, student) + (1 - alpha) T^2 D(p, q)
        BCE(y, s) = -(pos_weight y log sigmoid(s) + (1 - y) log sigmoid(-s))

    p = sigmoid(teacher / T), q = sigmoid(student / T). alpha weighs the HARD labels, whose
    cross-entropy is at T = 1. t_squared=False leaves T^2 out. For several labels of a sample,
    [N, C], and for a student with one logit, [N] or [N, 1].

    Args:
        student: logits [...] of any shape, float32, bfloat16, float16 or float64.
        teacher: logits [...] of any of these dtypes.
        labels: in the student's shape, as in `fastkd.binary`; what is left out is left out of both
            terms. May be None with alpha=0.
        temperature: T > 0, finite.
        alpha: weight of the hard term, 0 <= alpha <= 1.
        divergence: "kl", "reverse_kl" or "js", or their entries of `fastkd.divergences`.
        t_squared: keep the gradient's size independent of T by the factor T^2.
        pos_weight: floats that broadcast to the student's shape, such as [C]: the weight of a yes
            in the hard term alone, as in `F.binary_cross_entropy_with_logits`.
        **elements: as described in `fastkd.binary`. "mean" divides both terms by the same sum, in
            which pos_weight has no part.

    Returns:
        0-d float32 (float64 where an operand is), [...] with reduction="none".

    Raises:
        TypeError, ValueError: an argument of the wrong kind or value.

    Hinton et al. 2015, arXiv 1503.02531; of several labels: Yang et al. 2023, arXiv 2308.06453.
    """
    name = "binary_distillation_loss"
    alpha = validate.share("alpha", alpha)
    if labels is None and alpha != 0:
        raise ValueError(
            f"labels: got None with alpha={alpha}; alpha weighs the hard labels, so give labels "
            "or set alpha=0 for the soft divergence alone"
        )
    temperature = float(validate.temperature(temperature))
    soft = (1.0 - alpha) * (temperature * temperature if t_squared else 1.0)
    what = Bernoulli(entry(divergence), temperature, soft, float(alpha))
    own = ("temperature", "alpha", "divergence", "t_squared", "pos_weight")
    _known(name, elements, (*own, *OPTIONS[1:]))
    return loss(what, student, teacher, labels=labels, pos_weight=pos_weight, **elements)


def divergence(
    student: Tensor,
    teacher: Tensor,
    divergence: Divergence,
    temperature: float,
    **elements: Unpack[Elements],
) -> Tensor:
    """The loss of an entry of the table, as the functions that are named for one."""
    what = Bernoulli(divergence, float(validate.temperature(temperature)), 1.0, 0.0)
    return loss(what, student, teacher, **elements)


def _bare(
    name: str,
    student: Tensor,
    teacher: Tensor,
    entry: Divergence,
    temperature: float,
    elements: Elements,
    *own: str,
) -> Tensor:
    _known(name, elements, (*own, "temperature", *OPTIONS))
    return divergence(student, teacher, entry, temperature, **elements)


def _known(name: str, elements: MixedElements, known: Sequence[str]) -> None:
    for option in elements:
        if option not in known:
            validate.refuse_option(name, option, known)
