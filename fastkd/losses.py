"""The public losses.

The options that all of them share (`**rows`, keyword-only):

    labels            [...] integers; rows whose label is ignore_index are left out: never read,
                      gradient exactly 0, whatever they hold
    ignore_index      -100, or several integers, such as (-100, 255)
    weight            [...] floats, one factor per row. One below 0 (an advantage in RL) turns
                      the sign of its row's gradient; give reduction="sum" or a normalizer then, as
                      "mean" divides by the sum of the weights, which may be about 0 or below
    reduction         "mean": sum of weight * loss over the sum of the kept rows' weights, 0 where
                      that is 0; "batchmean": sum over student.size(0), as F.kl_div; "sum";
                      "none": [...] with 0 in ignored rows
    normalizer        number or 0-d tensor in place of the denominator of "mean"
    vocab_size        use the first n columns of both sides only; the rest has gradient 0
    class_dim         the dimension of the classes, -1; maps [N, C, H, W] have class_dim=1, their
                      labels, weight and loss per row are [N, H, W]. Logits are read where they lie
                      if the classes have stride 1 (channels_last), else from a copy; the gradient
                      has the student's own strides. For tensors of logits on both sides
    inplace           the gradient may overwrite the student's logits; with a LinearLogits it
                      changes nothing (what is overwritten is its own chunk, always)
    group             ProcessGroup or one-dimensional DeviceMesh over which the vocabulary is split:
                      the operands hold this rank's columns, in the order of the ranks (the teacher
                      may have all columns on every rank instead); labels, vocab_size and the
                      indices of a TopK are of the full vocabulary, as are loss and gradient.
                      NotImplementedError with torch.func, with double backward, and for a
                      gradient of a TopK or of a teacher whose divergence has no dual
    return_outputs    the loss comes as (loss, outputs), outputs a `fastkd.LossOutputs` of [...]
                      tensors for logs: soft and hard loss, entropies, log-sum-exps and the label's
                      log-probability of each row, from the same pass; neither value nor gradient
                      changes. NotImplementedError with `group` and DTensors

Where the student has some of the teacher's columns only, a `fastkd.MappedLogits` stands in for the
teacher's logits; a `TopK` with a bucket takes up the columns that the student does not have.

Operands, labels and weight may be DTensors, split on the vocabulary, on rows or on both; their mesh
takes the place of `group`, and the loss is that of all rows: "mean" divides by what all ranks
count (see `fastkd.parallel.dtensor`). Where rows are split without DTensors (data, sequence or
context parallel), each rank's loss is of its own rows, and
`normalizer=fastkd.token_count(labels, group)`, the tokens of all ranks, makes their sum
the loss of all rows.

Under torch.compile and torch.export a loss is one registered operator, without a graph break.
Inside transforms of torch.func, forward-mode AD and batched gradients it runs on the reference, in
plain torch: the same values, every derivative, the memory of plain torch; labels out of range then
make their rows NaN. Under autocast, logits are read in the dtype they come in and sums are float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, TypedDict

from torch import Tensor
from typing_extensions import Unpack

from fastkd.divergence import Divergence, divergences
from fastkd.engine import label_kinds, validate
from fastkd.engine.dispatch import loss
from fastkd.mapped import AnyTeacher as Teacher
from fastkd.operands import Operand

Reduction = Literal["mean", "batchmean", "sum", "none"]


class MixedOptions(TypedDict, total=False):
    """The options that all losses share but labels; see the module's docstring."""

    ignore_index: int | Sequence[int]
    weight: Tensor | None
    reduction: Reduction
    normalizer: float | Tensor | None
    vocab_size: int | None
    class_dim: int
    inplace: bool
    group: object
    return_outputs: bool


class RowOptions(MixedOptions, total=False):
    """The options that all losses share; see the module's docstring."""

    labels: Tensor | None


def kl_div(
    student: Operand, teacher: Teacher, *, temperature: float = 1.0, **rows: Unpack[RowOptions]
) -> Tensor:
    """Forward Kullback-Leibler divergence KL(p || q) of each row, reduced.

        sum_v p_v (log p_v - log q_v),   p = softmax(teacher / T), q = softmax(student / T)

    No factor T^2: this is the mathematics. Replaces
    `F.kl_div(F.log_softmax(student / T, -1), F.softmax(teacher / T, -1), reduction=...)`.

    Args:
        student: logits [..., V], float32, bfloat16, float16 or float64, or a `LinearLogits`.
        teacher: logits [..., V] of any of these dtypes, a `LinearLogits`, `TopK` or `MappedLogits`.
        temperature: T > 0, finite.
        **rows: labels, ignore_index, weight, reduction, normalizer, vocab_size, class_dim, inplace,
            group, return_outputs as described in `fastkd.losses`.

    Returns:
        0-d float32 (float64 where an operand is), [...] with reduction="none". Differentiable in
        both operands; gradients come in the operand's dtype.

    Raises:
        TypeError, ValueError: an argument of the wrong kind or value; nothing has been written.

    Hinton et al. 2015, arXiv 1503.02531.
    """
    return loss("kl_div", student, teacher, divergences.kl, temperature, **rows)


def reverse_kl_div(
    student: Operand, teacher: Teacher, *, temperature: float = 1.0, **rows: Unpack[RowOptions]
) -> Tensor:
    """Reverse Kullback-Leibler divergence KL(q || p) of each row, reduced.

        sum_v q_v (log q_v - log p_v),   p = softmax(teacher / T), q = softmax(student / T)

    No factor T^2. +inf where the teacher gives 0 to what the student does not.

    Args:
        student: logits [..., V], float32, bfloat16, float16 or float64, or a `LinearLogits`.
        teacher: logits [..., V] of any of these dtypes, a `LinearLogits`, `TopK` or `MappedLogits`.
        temperature: T > 0, finite.
        **rows: as described in `fastkd.losses`.

    Returns:
        0-d float32 (float64 where an operand is), [...] with reduction="none".

    Raises:
        TypeError, ValueError: an argument of the wrong kind or value; nothing has been written.

    Gu et al. 2023 (MiniLLM), arXiv 2306.08543.
    """
    return loss("reverse_kl_div", student, teacher, divergences.reverse_kl, temperature, **rows)


def js_div(
    student: Operand,
    teacher: Teacher,
    *,
    beta: float = 0.5,
    temperature: float = 1.0,
    **rows: Unpack[RowOptions],
) -> Tensor:
    """Generalised Jensen-Shannon divergence of each row, reduced.

        beta KL(p || m) + (1 - beta) KL(q || m),   m = beta p + (1 - beta) q

    p = softmax(teacher / T), q = softmax(student / T); no factor T^2. beta weighs the teacher, as
    in GKD; at beta -> 0 and 1 it tends to 0, not to the two KL divergences.

    Args:
        student: logits [..., V], float32, bfloat16, float16 or float64, or a `LinearLogits`.
        teacher: logits [..., V] of any of these dtypes, a `LinearLogits`, `TopK` or `MappedLogits`.
        beta: 0 < beta < 1.
        temperature: T > 0, finite.
        **rows: as described in `fastkd.losses`.

    Returns:
        0-d float32 (float64 where an operand is), [...] with reduction="none".

    Raises:
        TypeError, ValueError: an argument of the wrong kind or value; nothing has been written.

    Agarwal et al. 2023 (GKD), arXiv 2306.13649.
    """
    entry, beta = divergences.js, divergences.js.validated(beta)
    return loss("js_div", student, teacher, entry, temperature, beta, **rows)


def skew_kl_div(
    student: Operand,
    teacher: Teacher,
    *,
    alpha: float = 0.1,
    temperature: float = 1.0,
    **rows: Unpack[RowOptions],
) -> Tensor:
    """Skewed forward KL divergence of each row, reduced.

        KL(p || alpha p + (1 - alpha) q)

    p = softmax(teacher / T), q = softmax(student / T); no factor T^2.

    Args:
        student: logits [..., V], float32, bfloat16, float16 or float64, or a `LinearLogits`.
        teacher: logits [..., V] of any of these dtypes, a `LinearLogits`, `TopK` or `MappedLogits`.
        alpha: share of p in the mixture, 0 < alpha < 1.
        temperature: T > 0, finite.
        **rows: as described in `fastkd.losses`.

    Returns:
        0-d float32 (float64 where an operand is), [...] with reduction="none".

    Raises:
        TypeError, ValueError: an argument of the wrong kind or value; nothing has been written.

    Ko et al. 2024 (DistiLLM), arXiv 2402.03898.
    """
    entry, alpha = divergences.skew_kl, divergences.skew_kl.validated(alpha)
    return loss("skew_kl_div", student, teacher, entry, temperature, alpha, **rows)


def skew_reverse_kl_div(
    student: Operand,
    teacher: Teacher,
    *,
    alpha: float = 0.1,
    temperature: float = 1.0,
    **rows: Unpack[RowOptions],
) -> Tensor:
    """Skewed reverse KL divergence of each row, reduced.

        KL(q || (1 - alpha) p + alpha q)

    p = softmax(teacher / T), q = softmax(student / T); no factor T^2.

    Args:
        student: logits [..., V], float32, bfloat16, float16 or float64, or a `LinearLogits`.
        teacher: logits [..., V] of any of these dtypes, a `LinearLogits`, `TopK` or `MappedLogits`.
        alpha: share of q in the mixture, 0 < alpha < 1.
        temperature: T > 0, finite.
        **rows: as described in `fastkd.losses`.

    Returns:
        0-d float32 (float64 where an operand is), [...] with reduction="none".

    Raises:
        TypeError, ValueError: an argument of the wrong kind or value; nothing has been written.

    Ko et al. 2024 (DistiLLM), arXiv 2402.03898.
    """
    entry, alpha = divergences.skew_reverse_kl, divergences.skew_reverse_kl.validated(alpha)
    return loss("skew_reverse_kl_div", student, teacher, entry, temperature, alpha, **rows)


def tv_distance(
    student: Operand, teacher: Teacher, *, temperature: float = 1.0, **rows: Unpack[RowOptions]
) -> Tensor:
    """Total variation distance of each row, reduced; subgradient 0 where p = q.

        1/2 sum_v |p_v - q_v|,   p = softmax(teacher / T), q = softmax(student / T)

    No factor T^2.

    Args:
        student: logits [..., V], float32, bfloat16, float16 or float64, or a `LinearLogits`.
        teacher: logits [..., V] of any of these dtypes, a `LinearLogits`, `TopK` or `MappedLogits`.
        temperature: T > 0, finite.
        **rows: as described in `fastkd.losses`.

    Returns:
        0-d float32 (float64 where an operand is), [...] with reduction="none".

    Raises:
        TypeError, ValueError: an argument of the wrong kind or value; nothing has been written.

    Wen et al. 2023 (f-DISTILL), arXiv 2307.15190.
    """
    return loss("tv_distance", student, teacher, divergences.tv, temperature, **rows)


def acceptance_loss(
    student: Operand, teacher: Teacher, *, temperature: float = 1.0, **rows: Unpack[RowOptions]
) -> Tensor:
    """Negative log-probability that speculative decoding accepts the student's token, reduced.

        -log sum_v min(p_v, q_v) = -log(1 - 1/2 sum_v |p_v - q_v|)

    p = softmax(teacher / T), q = softmax(student / T); no factor T^2. The student is the draft
    model, the teacher the target. A column where p = q has subgradient 0. An overlap below 2^-100
    counts as 2^-100: the loss is at most 69.3, and there its gradient is 0. An overlap within
    2^-16 of 1 (2^-40 in float64) counts as 1: the loss is 0.

    Args:
        student: logits [..., V], float32, bfloat16, float16 or float64, or a `LinearLogits`.
        teacher: logits [..., V] of any of these dtypes, a `LinearLogits`, `TopK` or `MappedLogits`.
        temperature: T > 0, finite.
        **rows: as described in `fastkd.losses`.

    Returns:
        0-d float32 (float64 where an operand is), [...] with reduction="none".

    Raises:
        TypeError, ValueError: an argument of the wrong kind or value; nothing has been written.

    Leviathan et al. 2023, arXiv 2211.17192; DistillSpec, arXiv 2310.08461.
    """
    return loss("acceptance_loss", student, teacher, divergences.acceptance, temperature, **rows)


def distillation_loss(
    student: Operand,
    teacher: Teacher,
    labels: Tensor | None = None,
    *,
    temperature: float = 2.0,
    alpha: float = 0.5,
    divergence: str | Divergence = "kl",
    label_smoothing: float = 0.0,
    t_squared: bool = True,
    z_loss: float = 0.0,
    class_weight: Tensor | None = None,
    **rows: Unpack[MixedOptions],
) -> Tensor:
    """Hard cross-entropy and soft divergence in one pass over the student's logits.

        alpha CE(labels, softmax(student)) + (1 - alpha) T^2 D(p, q) + z_loss lse(student)^2

    p = softmax(teacher / T), q = softmax(student / T). alpha weighs the HARD labels, whose
    cross-entropy is at T = 1. t_squared=False leaves T^2 out. lse is the log-sum-exp at T = 1.

    Args:
        student: logits [..., V], float32, bfloat16, float16 or float64, or a `LinearLogits`.
        teacher: logits [..., V] of any of these dtypes, a `LinearLogits`, `TopK` or `MappedLogits`.
        labels: [...] integers, the hard labels; rows at ignore_index are left out of both terms.
            Or floats [..., V], probabilities of the classes (mixup, cutmix): the hard term is then
            -sum_v y_v log q_v, as `F.cross_entropy` has it, and no row is left out. May be None
            with alpha=0.
        temperature: T > 0, finite.
        alpha: weight of the hard term, 0 <= alpha <= 1.
        divergence: a name of `fastkd.divergences`, or an entry such as
            `fastkd.divergences.js(beta=0.1)`.
        label_smoothing: as in `F.cross_entropy`, 0 <= label_smoothing <= 1.
        t_squared: keep the gradient's size independent of T by the factor T^2.
        z_loss: weight of the squared log-sum-exp, which keeps logits from drifting: a finite
            number of 0 or more, 1e-4 in PaLM. Neither alpha nor T^2 multiplies it.
        class_weight: [V] floats from 0 on, a weight of each class in the hard term alone, as the
            `weight` of `F.cross_entropy`. Each term has a denominator of its own: "mean" divides
            the hard term by the sum of the kept labels' class weights (times `weight`); for
            probabilities, and the soft term always, by the sum of `weight`, the number of rows
            without one. A `normalizer` replaces both.
        **rows: as described in `fastkd.losses`.

    Probabilities and class_weight make the two terms two losses, each in a pass of its own: twice
    the time, and the student's gradient is a sum of two that have been rounded. Probabilities, or
    class_weight with label_smoothing, also cost one tensor of the size of the logits. Neither works
    over ranks that share the vocabulary. `outputs.hard` then has the classes' weights in it.

    Returns:
        0-d float32 (float64 where an operand is), [...] with reduction="none".

    Raises:
        TypeError, ValueError: an argument of the wrong kind or value; nothing has been written.

    Hinton et al. 2015, arXiv 1503.02531; z_loss: PaLM, arXiv 2204.02311; ST-MoE, arXiv 2202.08906.
    """
    divergence = divergences.entry(divergence)
    alpha = validate.share("alpha", alpha)
    label_smoothing = validate.share("label_smoothing", label_smoothing)
    if labels is None and alpha != 0:
        raise ValueError(
            f"labels: got None with alpha={alpha}; alpha weighs the hard labels, so give labels "
            "or set alpha=0 for the soft divergence alone"
        )
    temperature = validate.temperature(temperature)
    soft = (1.0 - alpha) * (temperature * temperature if t_squared else 1.0)
    numbers = temperature, None, soft, float(alpha), float(label_smoothing), validate.z_loss(z_loss)
    sides = "distillation_loss", student, teacher, divergence, *numbers
    if label_kinds.special(labels, class_weight):
        return label_kinds.loss(sides, class_weight, labels, {**rows})
    return loss(*sides, labels=labels, **rows)
