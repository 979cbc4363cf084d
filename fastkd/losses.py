"""The public functions: check, flatten, mask, call, reduce.

The options that all of them share (`**rows`, keyword-only):

    labels            [...] integers; rows whose label is ignore_index are left out: never read,
                      gradient exactly 0, whatever they hold
    ignore_index      -100
    weight            [...] floats, one factor per row
    reduction         "mean": sum of weight * loss over the sum of the kept rows' weights, 0 where
                      that is 0; "batchmean": sum over student.size(0), as F.kl_div; "sum";
                      "none": [...] with 0 in ignored rows
    normalizer        number or 0-d tensor in place of the denominator of "mean"
    vocab_size        use the first n columns of both sides only; the rest has gradient 0
    inplace           the gradient may overwrite the student's logits; with a LinearLogits it
                      changes nothing (what is overwritten is its own chunk, always)
    group             ProcessGroup or one-dimensional DeviceMesh over which the vocabulary is split:
                      the operands hold this rank's columns, in the order of the ranks (the teacher
                      may be whole on every rank instead); labels, vocab_size and the indices of a
                      TopK are of the whole vocabulary. Loss and gradient are those of the whole

Operands, labels and weight may be DTensors, split on the vocabulary, on rows or on both; their mesh
takes the place of `group`, and the loss is that of the whole: "mean" divides by what all ranks
count (see `fastkd.parallel.dtensor`). Where rows are split without DTensors (data, sequence or
context parallel), each rank's loss is of its own rows, and
`normalizer=fastkd.token_count(labels, group)`, the tokens of all ranks, makes their sum
the loss of the whole.

Under torch.compile and torch.export a loss is one registered operator, without a graph break.
Inside transforms of torch.func, forward-mode AD and batched gradients it runs on the reference, in
plain torch: the same values, every derivative, the memory of plain torch; labels out of range then
make their rows NaN. Under autocast, logits are read in the dtype they come in and sums are float32.
"""

from __future__ import annotations

import inspect
from functools import partial
from typing import Any, Literal, TypedDict

import torch
from torch import Tensor
from typing_extensions import Unpack

from fastkd import topk
from fastkd.arguments.messages import kind
from fastkd.backends import reference
from fastkd.backends.base import Backend, LossSpec, TopKRows, acc_dtype
from fastkd.backends.choice import in_functorch, pick
from fastkd.divergence import Divergence, divergences
from fastkd.engine import autograd, linear, ops, validate
from fastkd.engine.reduction import fold, mask, reduce, wants_grad
from fastkd.operands import LinearLogits, Operand, Teacher, TopK
from fastkd.parallel import dtensor, layout, vocab_parallel

Reduction = Literal["mean", "batchmean", "sum", "none"]


class MixedOptions(TypedDict, total=False):
    """The options that all losses share but labels; see the module's docstring."""

    ignore_index: int
    weight: Tensor | None
    reduction: Reduction
    normalizer: float | Tensor | None
    vocab_size: int | None
    inplace: bool
    group: object


class RowOptions(MixedOptions, total=False):
    """The options that all losses share; see the module's docstring."""

    labels: Tensor | None


_OPTIONS = RowOptions.__annotations__
_ROWS = (Tensor, type(None))
_OPTIONS_IN_ORDER = (
    *("labels", "ignore_index", "weight", "reduction"),
    *("normalizer", "vocab_size", "inplace", "group"),
)


def kl_div(
    student: Operand, teacher: Teacher, *, temperature: float = 1.0, **rows: Unpack[RowOptions]
) -> Tensor:
    """Forward Kullback-Leibler divergence KL(p || q) of each row, reduced.

        sum_v p_v (log p_v - log q_v),   p = softmax(teacher / T), q = softmax(student / T)

    No factor T^2: this is the mathematics. Replaces
    `F.kl_div(F.log_softmax(student / T, -1), F.softmax(teacher / T, -1), reduction=...)`.

    Args:
        student: logits [..., V], float32, bfloat16, float16 or float64, or a `LinearLogits`.
        teacher: logits [..., V] of any of these dtypes, a `LinearLogits` or a `TopK`.
        temperature: T > 0, finite.
        **rows: labels, ignore_index, weight, reduction, normalizer, vocab_size, inplace, group
            as described in `fastkd.losses`.

    Returns:
        0-d float32 (float64 where an operand is), [...] with reduction="none". Differentiable in
        both operands; gradients come in the operand's dtype.

    Raises:
        TypeError, ValueError: an argument of the wrong kind or value; nothing has been written.

    Hinton et al. 2015, arXiv 1503.02531.
    """
    return _loss("kl_div", student, teacher, divergences.kl, temperature, **rows)


def reverse_kl_div(
    student: Operand, teacher: Teacher, *, temperature: float = 1.0, **rows: Unpack[RowOptions]
) -> Tensor:
    """Reverse Kullback-Leibler divergence KL(q || p) of each row, reduced.

        sum_v q_v (log q_v - log p_v),   p = softmax(teacher / T), q = softmax(student / T)

    No factor T^2. +inf where the teacher gives 0 to what the student does not.

    Args:
        student: logits [..., V], float32, bfloat16, float16 or float64, or a `LinearLogits`.
        teacher: logits [..., V] of any of these dtypes, a `LinearLogits` or a `TopK`.
        temperature: T > 0, finite.
        **rows: as described in `fastkd.losses`.

    Returns:
        0-d float32 (float64 where an operand is), [...] with reduction="none".

    Raises:
        TypeError, ValueError: an argument of the wrong kind or value; nothing has been written.

    Gu et al. 2023 (MiniLLM), arXiv 2306.08543.
    """
    return _loss("reverse_kl_div", student, teacher, divergences.reverse_kl, temperature, **rows)


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
        teacher: logits [..., V] of any of these dtypes, a `LinearLogits` or a `TopK`.
        beta: 0 < beta < 1.
        temperature: T > 0, finite.
        **rows: as described in `fastkd.losses`.

    Returns:
        0-d float32 (float64 where an operand is), [...] with reduction="none".

    Raises:
        TypeError, ValueError: an argument of the wrong kind or value; nothing has been written.

    Agarwal et al. 2023 (GKD), arXiv 2306.13649.
    """
    entry, beta = divergences.js, divergences.js.admit(beta)
    return _loss("js_div", student, teacher, entry, temperature, beta, **rows)


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
        teacher: logits [..., V] of any of these dtypes, a `LinearLogits` or a `TopK`.
        alpha: share of p in the mixture, 0 < alpha < 1.
        temperature: T > 0, finite.
        **rows: as described in `fastkd.losses`.

    Returns:
        0-d float32 (float64 where an operand is), [...] with reduction="none".

    Raises:
        TypeError, ValueError: an argument of the wrong kind or value; nothing has been written.

    Ko et al. 2024 (DistiLLM), arXiv 2402.03898.
    """
    entry, alpha = divergences.skew_kl, divergences.skew_kl.admit(alpha)
    return _loss("skew_kl_div", student, teacher, entry, temperature, alpha, **rows)


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
        teacher: logits [..., V] of any of these dtypes, a `LinearLogits` or a `TopK`.
        alpha: share of q in the mixture, 0 < alpha < 1.
        temperature: T > 0, finite.
        **rows: as described in `fastkd.losses`.

    Returns:
        0-d float32 (float64 where an operand is), [...] with reduction="none".

    Raises:
        TypeError, ValueError: an argument of the wrong kind or value; nothing has been written.

    Ko et al. 2024 (DistiLLM), arXiv 2402.03898.
    """
    entry, alpha = divergences.skew_reverse_kl, divergences.skew_reverse_kl.admit(alpha)
    return _loss("skew_reverse_kl_div", student, teacher, entry, temperature, alpha, **rows)


def tv_distance(
    student: Operand, teacher: Teacher, *, temperature: float = 1.0, **rows: Unpack[RowOptions]
) -> Tensor:
    """Total variation distance of each row, reduced; subgradient 0 where p = q.

        1/2 sum_v |p_v - q_v|,   p = softmax(teacher / T), q = softmax(student / T)

    No factor T^2.

    Args:
        student: logits [..., V], float32, bfloat16, float16 or float64, or a `LinearLogits`.
        teacher: logits [..., V] of any of these dtypes, a `LinearLogits` or a `TopK`.
        temperature: T > 0, finite.
        **rows: as described in `fastkd.losses`.

    Returns:
        0-d float32 (float64 where an operand is), [...] with reduction="none".

    Raises:
        TypeError, ValueError: an argument of the wrong kind or value; nothing has been written.

    Wen et al. 2023 (f-DISTILL), arXiv 2307.15190.
    """
    return _loss("tv_distance", student, teacher, divergences.tv, temperature, **rows)


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
    **rows: Unpack[MixedOptions],
) -> Tensor:
    """Hard cross-entropy and soft divergence in one trip over the student's logits.

        alpha CE(labels, softmax(student)) + (1 - alpha) T^2 D(p, q)

    p = softmax(teacher / T), q = softmax(student / T). alpha weighs the HARD labels, whose
    cross-entropy is at T = 1. t_squared=False leaves T^2 out.

    Args:
        student: logits [..., V], float32, bfloat16, float16 or float64, or a `LinearLogits`.
        teacher: logits [..., V] of any of these dtypes, a `LinearLogits` or a `TopK`.
        labels: [...] integers, the hard labels; rows at ignore_index are left out of both terms.
            May be None with alpha=0.
        temperature: T > 0, finite.
        alpha: weight of the hard term, 0 <= alpha <= 1.
        divergence: a name of `fastkd.divergences`, or an entry such as
            `fastkd.divergences.js(beta=0.1)`.
        label_smoothing: as in `F.cross_entropy`, 0 <= label_smoothing <= 1.
        t_squared: keep the gradient's size independent of T by the factor T^2.
        **rows: as described in `fastkd.losses`.

    Returns:
        0-d float32 (float64 where an operand is), [...] with reduction="none".

    Raises:
        TypeError, ValueError: an argument of the wrong kind or value; nothing has been written.

    Hinton et al. 2015, arXiv 1503.02531.
    """
    divergence = _entry(divergence)
    alpha = validate.share("alpha", alpha)
    label_smoothing = validate.share("label_smoothing", label_smoothing)
    if labels is None and alpha != 0:
        raise ValueError(
            f"labels: got None with alpha={alpha}; alpha weighs the hard labels, so give labels "
            "or set alpha=0 for the soft divergence alone"
        )
    temperature = validate.temperature(temperature)
    soft = (1.0 - alpha) * (temperature * temperature if t_squared else 1.0)
    return _loss(
        "distillation_loss",
        student,
        teacher,
        divergence,
        temperature,
        None,
        soft,
        float(alpha),
        float(label_smoothing),
        labels=labels,
        **rows,
    )


def _placed(given: tuple[Any, ...], options: dict[str, Any]) -> Tensor:
    """`_loss` where something is a DTensor: of this rank's part, made whole."""
    if torch.compiler.is_compiling():
        from fastkd.engine.eagerly import call

        return call(_placed, given, options)
    name, student, teacher, *rest = given
    known = {k: v for k, v in options.items() if k != "vocab_size"}
    part = dtensor.local(student, teacher, **known)
    mine = {k: v for k, v in part._asdict().items() if k in options}
    return part.whole(_loss(name, part.student, part.teacher, *rest, **{**options, **mine}))


def _entry(divergence: str | Divergence) -> Divergence:
    if isinstance(divergence, str):
        return divergences[divergence]
    if not isinstance(divergence, Divergence):
        raise TypeError(
            f"divergence: got {kind(divergence)}, expected a name or an entry of fastkd.divergences"
        )
    return divergence


def _loss(
    name: str,
    student: Operand,
    teacher: Teacher,
    divergence: Divergence,
    temperature: float,
    param: float | None = None,  # the divergence's own
    soft: float = 1.0,
    hard: float = 0.0,
    smoothing: float = 0.0,
    /,
    *,
    labels: Tensor | None = None,
    ignore_index: int = -100,
    weight: Tensor | None = None,
    reduction: Reduction = "mean",
    normalizer: float | Tensor | None = None,
    vocab_size: int | None = None,
    inplace: bool = False,
    group: object = None,
    **unknown: object,
) -> Tensor:
    for option in unknown:
        public = inspect.signature(globals()[name]).parameters.values()
        named_here = [p.name for p in public if p.kind is p.KEYWORD_ONLY]
        validate.refuse_option(name, option, dict.fromkeys([*named_here, *_OPTIONS]))
    tensors = type(student) is Tensor and type(teacher) is Tensor  # as a rule: asked no further
    if not (tensors and type(labels) in _ROWS and type(weight) in _ROWS):
        if dtensor.any_placed(student, teacher, labels, weight, normalizer):
            rows = (labels, ignore_index, weight, reduction, normalizer, vocab_size, inplace, group)
            numbers = (temperature, param, soft, hard, smoothing)
            placed = (name, student, teacher, divergence, *numbers)
            return _placed(placed, dict(zip(_OPTIONS_IN_ORDER, rows, strict=True)))
    if group is not None and torch.compiler.is_compiling():  # an exchange is no part of a graph
        rows = (labels, ignore_index, weight, reduction, normalizer, vocab_size, inplace, group)
        given = (temperature, param, soft, hard, smoothing)
        from fastkd.engine.eagerly import call  # and with it a compiler, which others need not load

        named = dict(zip(_OPTIONS_IN_ORDER, rows, strict=True))
        return call(_loss, name, student, teacher, divergence, *given, **named)
    if group is not None and in_functorch():
        raise NotImplementedError(
            "group: torch.func and forward-mode AD over a split vocabulary are not supported; "
            "gather the logits and leave group out"
        )
    if group is None:
        vocab = classes = validate.operands(student, teacher, vocab_size)
    else:
        vocab_size = validate.shards(student, teacher, vocab_size)
        group = layout.process_group(group)
    temperature = validate.temperature(temperature)
    validate.reduction(reduction)
    ignore_index = validate.rows(student, labels, ignore_index, weight)
    normalizer = validate.normalizer(normalizer, reduction, student)
    param = divergence.param if param is None else param
    ranks: vocab_parallel.VocabParallel | None = None
    if group is not None:
        call = f"{name}, {divergence.name} {param:g}, T={temperature:g}, {soft:g}, {hard:g}"
        call += f", {smoothing:g}, {reduction}" + ("" if labels is None else ", labels")
        if teacher.requires_grad and torch.is_grad_enabled():
            call += ", a gradient of the teacher"
        own = pick(student.device)
        ranks, student, teacher = layout.prepare(own, group, student, teacher, vocab_size, call)
        vocab, classes = ranks.columns.own, ranks.columns.whole
    same = student is teacher and soft != 0.0
    if (same or classes == 1) and not torch.compiler.is_compiling():
        validate.silence(name, student, teacher, classes)
    spec = LossSpec(
        divergence.name, param, float(temperature), soft, hard, smoothing, vocab, classes
    )
    if isinstance(student, LinearLogits) or isinstance(teacher, LinearLogits):
        return linear.loss(
            student, teacher, spec, labels, ignore_index, weight, reduction, normalizer, ranks
        )
    if inplace and not torch.compiler.is_compiling() and not in_functorch():  # where it is ignored
        validate.inplace(student, teacher)
    # kernels read memory as it is, and a view may be one whose numbers are to be negated
    student = student.resolve_neg()
    other: Tensor | TopK = teacher if isinstance(teacher, TopK) else teacher.resolve_neg()
    acc, nothing = acc_dtype(student, other), None
    if soft == 0.0:
        # D(q, q) is exactly 0 with gradient exactly 0: the teacher is not read, whatever it holds
        nothing = linear.no_part(other)
        other = student.detach() if acc != torch.float64 else student.detach().to(acc)
    compiling = torch.compiler.is_compiling()
    passes: Backend = reference.BACKEND if compiling else pick(student.device)
    if ranks is not None:
        passes = ranks
    # torch's own autograd: what is chosen by hand, or has no kernel, or no dual for the teacher
    no_dual = isinstance(other, TopK) or divergence.dual is None
    teacher_grad = other.requires_grad and torch.is_grad_enabled()
    plain = (teacher_grad and no_dual) or (
        in_functorch() if compiling else passes is reference.BACKEND
    )
    if plain and ranks is not None:
        raise layout.no_teacher_gradient()

    def side(keep: Tensor | None) -> Tensor | TopKRows:
        if not isinstance(other, TopK):
            return other
        return topk.topk(other, spec.temperature, classes, keep, acc, passes)

    if plain or compiling or reduction == "none" or wants_grad(weight, normalizer):
        keep, label, bad = mask(labels, ignore_index, classes)
        run = reference.row_loss if plain else partial(autograd.row_loss, passes)
        run = ops.row_loss if compiling and not plain else run
        loss = run(student, side(keep), spec, keep, label if hard else None)
        loss = reduce(loss, reduction, keep, bad, weight, normalizer, student)
    else:
        folded = fold(
            passes, reduction, labels, ignore_index, classes, weight, normalizer, student, acc
        )
        loss = autograd.fused_total(passes, student, side(folded.keep), spec, folded, inplace)
    return loss if nothing is None else loss + nothing.to(loss.dtype)
