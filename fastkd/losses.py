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
    inplace           the gradient may overwrite the student's logits
    group             not supported yet
"""

from __future__ import annotations

import difflib
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Literal, TypedDict

import torch
from torch import Tensor
from typing_extensions import Unpack

from fastkd import function, reference
from fastkd.backend import Plan, acc_dtype, pick, pick_name
from fastkd.divergence import Divergence, divergences

Reduction = Literal["mean", "batchmean", "sum", "none"]
REDUCTIONS = ("mean", "batchmean", "sum", "none")
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
INT_DTYPES = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


class RowOptions(TypedDict, total=False):
    """The options that all losses share; see the module's docstring."""

    labels: Tensor | None
    ignore_index: int
    weight: Tensor | None
    reduction: Reduction
    normalizer: float | Tensor | None
    vocab_size: int | None
    inplace: bool
    group: object


_checked: ContextVar[bool] = ContextVar("fastkd_checked", default=False)


@contextmanager
def checked() -> Iterator[None]:
    """Runs the checks that read values (labels in range) on a GPU too, at a synchronisation each.

    On the CPU they always run. FASTKD_CHECK=1 does the same for a whole process.
    """
    token = _checked.set(True)
    try:
        yield
    finally:
        _checked.reset(token)


def kl_div(
    student: Tensor, teacher: Tensor, *, temperature: float = 1.0, **rows: Unpack[RowOptions]
) -> Tensor:
    """Forward Kullback-Leibler divergence KL(p || q) of each row, reduced.

        sum_v p_v (log p_v - log q_v),   p = softmax(teacher / T), q = softmax(student / T)

    No factor T^2: this is the mathematics. Replaces
    `F.kl_div(F.log_softmax(student / T, -1), F.softmax(teacher / T, -1), reduction=...)`.

    Args:
        student: logits [..., V], float32, bfloat16, float16 or float64.
        teacher: logits [..., V] of any of these dtypes.
        temperature: T > 0, finite.
        **rows: labels, ignore_index, weight, reduction, normalizer, vocab_size, inplace, group
            as described in `fastkd.losses`.

    Returns:
        0-d float32 (float64 where an operand is), [...] with reduction="none". Differentiable in
        both operands; gradients come in the operand's dtype.

    Raises:
        TypeError, ValueError: an argument of the wrong kind or value; nothing has been written.
        NotImplementedError: group.

    Hinton et al. 2015, arXiv 1503.02531.
    """
    return _loss("kl_div", student, teacher, divergences.kl, temperature, rows)


def reverse_kl_div(
    student: Tensor, teacher: Tensor, *, temperature: float = 1.0, **rows: Unpack[RowOptions]
) -> Tensor:
    """Reverse Kullback-Leibler divergence KL(q || p) of each row, reduced.

        sum_v q_v (log q_v - log p_v),   p = softmax(teacher / T), q = softmax(student / T)

    No factor T^2. +inf where the teacher gives 0 to what the student does not.

    Args:
        student: logits [..., V], float32, bfloat16, float16 or float64.
        teacher: logits [..., V] of any of these dtypes.
        temperature: T > 0, finite.
        **rows: as described in `fastkd.losses`.

    Returns:
        0-d float32 (float64 where an operand is), [...] with reduction="none".

    Raises:
        TypeError, ValueError: an argument of the wrong kind or value; nothing has been written.
        NotImplementedError: group.

    Gu et al. 2023 (MiniLLM), arXiv 2306.08543.
    """
    return _loss("reverse_kl_div", student, teacher, divergences.reverse_kl, temperature, rows)


def js_div(
    student: Tensor,
    teacher: Tensor,
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
        student: logits [..., V], float32, bfloat16, float16 or float64.
        teacher: logits [..., V] of any of these dtypes.
        beta: 0 < beta < 1.
        temperature: T > 0, finite.
        **rows: as described in `fastkd.losses`.

    Returns:
        0-d float32 (float64 where an operand is), [...] with reduction="none".

    Raises:
        TypeError, ValueError: an argument of the wrong kind or value; nothing has been written.
        NotImplementedError: group.

    Agarwal et al. 2023 (GKD), arXiv 2306.13649.
    """
    return _loss("js_div", student, teacher, divergences.js(beta=beta), temperature, rows)


def skew_kl_div(
    student: Tensor,
    teacher: Tensor,
    *,
    alpha: float = 0.1,
    temperature: float = 1.0,
    **rows: Unpack[RowOptions],
) -> Tensor:
    """Skewed forward KL divergence of each row, reduced.

        KL(p || alpha p + (1 - alpha) q)

    p = softmax(teacher / T), q = softmax(student / T); no factor T^2.

    Args:
        student: logits [..., V], float32, bfloat16, float16 or float64.
        teacher: logits [..., V] of any of these dtypes.
        alpha: share of p in the mixture, 0 < alpha < 1.
        temperature: T > 0, finite.
        **rows: as described in `fastkd.losses`.

    Returns:
        0-d float32 (float64 where an operand is), [...] with reduction="none".

    Raises:
        TypeError, ValueError: an argument of the wrong kind or value; nothing has been written.
        NotImplementedError: group.

    Ko et al. 2024 (DistiLLM), arXiv 2402.03898.
    """
    return _loss(
        "skew_kl_div", student, teacher, divergences.skew_kl(alpha=alpha), temperature, rows
    )


def skew_reverse_kl_div(
    student: Tensor,
    teacher: Tensor,
    *,
    alpha: float = 0.1,
    temperature: float = 1.0,
    **rows: Unpack[RowOptions],
) -> Tensor:
    """Skewed reverse KL divergence of each row, reduced.

        KL(q || (1 - alpha) p + alpha q)

    p = softmax(teacher / T), q = softmax(student / T); no factor T^2.

    Args:
        student: logits [..., V], float32, bfloat16, float16 or float64.
        teacher: logits [..., V] of any of these dtypes.
        alpha: share of q in the mixture, 0 < alpha < 1.
        temperature: T > 0, finite.
        **rows: as described in `fastkd.losses`.

    Returns:
        0-d float32 (float64 where an operand is), [...] with reduction="none".

    Raises:
        TypeError, ValueError: an argument of the wrong kind or value; nothing has been written.
        NotImplementedError: group.

    Ko et al. 2024 (DistiLLM), arXiv 2402.03898.
    """
    divergence = divergences.skew_reverse_kl(alpha=alpha)
    return _loss("skew_reverse_kl_div", student, teacher, divergence, temperature, rows)


def tv_distance(
    student: Tensor, teacher: Tensor, *, temperature: float = 1.0, **rows: Unpack[RowOptions]
) -> Tensor:
    """Total variation distance of each row, reduced; subgradient 0 where p = q.

        1/2 sum_v |p_v - q_v|,   p = softmax(teacher / T), q = softmax(student / T)

    No factor T^2.

    Args:
        student: logits [..., V], float32, bfloat16, float16 or float64.
        teacher: logits [..., V] of any of these dtypes.
        temperature: T > 0, finite.
        **rows: as described in `fastkd.losses`.

    Returns:
        0-d float32 (float64 where an operand is), [...] with reduction="none".

    Raises:
        TypeError, ValueError: an argument of the wrong kind or value; nothing has been written.
        NotImplementedError: group.

    Wen et al. 2023 (f-DISTILL), arXiv 2307.15190.
    """
    return _loss("tv_distance", student, teacher, divergences.tv, temperature, rows)


def distillation_loss(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor | None = None,
    *,
    temperature: float = 2.0,
    alpha: float = 0.5,
    divergence: str | Divergence = "kl",
    label_smoothing: float = 0.0,
    t_squared: bool = True,
    **rows: Unpack[RowOptions],
) -> Tensor:
    """Hard cross-entropy and soft divergence in one trip over the student's logits.

        alpha CE(labels, softmax(student)) + (1 - alpha) T^2 D(p, q)

    p = softmax(teacher / T), q = softmax(student / T). alpha weighs the HARD labels, whose
    cross-entropy is at T = 1. t_squared=False leaves T^2 out.

    Args:
        student: logits [..., V], float32, bfloat16, float16 or float64.
        teacher: logits [..., V] of any of these dtypes.
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
        NotImplementedError: group.

    Hinton et al. 2015, arXiv 1503.02531.
    """
    if isinstance(divergence, str):
        divergence = divergences[divergence]
    elif not isinstance(divergence, Divergence):
        raise TypeError(
            f"divergence: got {_kind(divergence)}, expected a name or an entry of "
            "fastkd.divergences"
        )
    _check_share("alpha", alpha)
    _check_share("label_smoothing", label_smoothing)
    if labels is None and alpha != 0:
        raise ValueError(
            f"labels: got None with alpha={alpha}; alpha weighs the hard labels, so give labels "
            "or set alpha=0 for the soft divergence alone"
        )
    _check_temperature(temperature)
    soft = (1.0 - alpha) * (temperature * temperature if t_squared else 1.0)
    rows["labels"] = labels
    return _loss(
        "distillation_loss",
        student,
        teacher,
        divergence,
        temperature,
        rows,
        soft=soft,
        hard=float(alpha),
        smoothing=float(label_smoothing),
    )


def _loss(
    name: str,
    student: Tensor,
    teacher: Tensor,
    divergence: Divergence,
    temperature: float,
    rows: RowOptions,
    soft: float = 1.0,
    hard: float = 0.0,
    smoothing: float = 0.0,
) -> Tensor:
    if unknown := rows.keys() - RowOptions.__annotations__.keys():
        _refuse_option(name, sorted(unknown)[0])
    labels, weight = rows.get("labels"), rows.get("weight")
    reduction, normalizer = rows.get("reduction", "mean"), rows.get("normalizer")
    ignore_index, inplace = rows.get("ignore_index", -100), rows.get("inplace", False)
    if rows.get("group") is not None:
        raise NotImplementedError(
            "group: a vocabulary split over a process group is not supported yet; gather the "
            "logits and leave group out"
        )
    vocab = _check_operands(student, teacher, rows.get("vocab_size"))
    _check_temperature(temperature)
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction: got {reduction!r}, expected one of {', '.join(REDUCTIONS)}")
    _check_rows(student, labels, ignore_index, weight)
    _check_normalizer(normalizer, reduction, student)
    if inplace:
        _check_inplace(student, teacher)

    compiling = torch.compiler.is_compiling()
    acc = acc_dtype(student, teacher)
    keep, label, bad = _mask(labels, ignore_index, vocab, student.device, compiling)
    if soft == 0.0:
        # D(q, q) is exactly 0 with gradient exactly 0: the teacher is not read, whatever it holds
        teacher = student.detach()
    plan = Plan(
        divergence.name,
        divergence.param,
        float(temperature),
        float(soft),
        hard,
        smoothing,
        vocab,
        vocab,
    )
    teacher_grad = teacher.requires_grad and torch.is_grad_enabled()
    # torch's own autograd: what is chosen by hand, or has no kernel, or no dual for the teacher
    plain = (teacher_grad and divergence.dual is None) or (
        not compiling and pick_name(student.device) == "reference"
    )
    by_row = plain or compiling or reduction == "none" or _wants_grad(weight, normalizer)
    if by_row:
        if plain:
            loss = reference.row_loss(student, teacher, plan, keep, label)
        else:
            loss = function.row_loss(student, teacher, keep, label if hard else None, *plan)
        return _reduce(loss, reduction, keep, bad, weight, normalizer, student)
    scale, factor = _scale(reduction, keep, bad, weight, normalizer, student, acc)
    return function.fused_total(
        pick(student.device),
        student,
        teacher,
        plan,
        None if keep is None else keep.reshape(-1),
        label.reshape(-1) if hard and label is not None else None,
        scale,
        factor,
        inplace,
    )


def _reduce(
    loss: Tensor,
    reduction: str,
    keep: Tensor | None,
    bad: Tensor | None,
    weight: Tensor | None,
    normalizer: float | Tensor | None,
    student: Tensor,
) -> Tensor:
    """The reduction in torch, differentiable in weight and normalizer too."""
    factor = _row_weight(keep, bad, weight, loss.dtype)
    if factor is not None:
        loss = loss * factor
    if reduction == "none":
        return loss
    total = loss.sum()
    if reduction == "sum":
        return total
    if reduction == "batchmean":
        return total / max(student.size(0), 1)
    if normalizer is None:
        plain = _row_weight(keep, None, weight, loss.dtype)
        normalizer = max(loss.numel(), 1) if plain is None else plain.sum()
    return total * _inverse(normalizer, loss)


def _scale(
    reduction: str,
    keep: Tensor | None,
    bad: Tensor | None,
    weight: Tensor | None,
    normalizer: float | Tensor | None,
    student: Tensor,
    acc: torch.dtype,
) -> tuple[Tensor | None, float]:
    """(scale [N] or None, factor): the reduction folded into a factor per row, before the trip."""
    n = student.numel() // student.size(-1)
    factor = 1.0
    scale = _row_weight(keep, bad, weight, acc)
    if reduction == "batchmean":
        factor = 1.0 / max(student.size(0), 1)
    elif reduction == "mean":
        if normalizer is None and scale is None:
            factor = 1.0 / max(n, 1)
        elif normalizer is None or isinstance(normalizer, Tensor):
            if normalizer is None:
                plain = scale if bad is None else _row_weight(keep, None, weight, acc)
                assert plain is not None
                # float64 makes the order of this sum, which follows the threads, invisible
                normalizer = plain.sum(dtype=torch.float64).to(acc)
            inverse = _inverse(normalizer, student).to(device=student.device, dtype=acc)
            scale = inverse.expand(student.shape[:-1]) if scale is None else scale * inverse
        else:
            factor = float(_inverse(normalizer, student))
    return (None if scale is None else scale.reshape(-1).contiguous()), factor


def _row_weight(
    keep: Tensor | None, bad: Tensor | None, weight: Tensor | None, acc: torch.dtype
) -> Tensor | None:
    """weight * keep in the leading shape, NaN in rows whose label is out of range."""
    if weight is None:
        factor = None if keep is None else keep.to(acc)
    else:
        weight = weight.to(acc)
        factor = weight if keep is None else torch.where(keep, weight, 0.0)
    if bad is not None and factor is not None:
        factor = torch.where(bad, math.nan, factor)
    return factor


def _inverse(normalizer: float | Tensor, like: Tensor) -> Tensor | float:
    """1 / normalizer, 0 where it is 0."""
    if isinstance(normalizer, Tensor):
        normalizer = normalizer.to(like.device)
        zero = normalizer == 0
        return torch.where(zero, 0.0, 1.0 / torch.where(zero, 1.0, normalizer))
    return 1.0 / normalizer if normalizer else 0.0


def _wants_grad(weight: Tensor | None, normalizer: float | Tensor | None) -> bool:
    wants = weight is not None and weight.requires_grad
    wants = wants or (isinstance(normalizer, Tensor) and normalizer.requires_grad)
    return wants and torch.is_grad_enabled()


def _mask(
    labels: Tensor | None,
    ignore_index: int,
    vocab: int,
    device: torch.device,
    compiling: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """(keep, label int64, bad): bad marks labels out of range where they may not be read."""
    if labels is None:
        return None, None, None
    keep = labels != ignore_index
    label = labels.to(torch.int64)
    bad = keep & ((label < 0) | (label >= vocab))
    reads = device.type == "cpu" or _checked.get() or os.environ.get("FASTKD_CHECK") == "1"
    if compiling or not reads:
        return keep, label, bad
    if bool(bad.any()):
        row = int(bad.reshape(-1).nonzero()[0, 0])
        raise ValueError(
            f"labels: got {int(label.reshape(-1)[row])} in row {row}, expected "
            f"0 <= label < {vocab} or ignore_index={ignore_index}"
        )
    return keep, label, None


def _kind(x: object) -> str:
    if isinstance(x, Tensor):
        return f"a tensor {list(x.shape)} of {x.dtype} on {x.device}"
    return f"{type(x).__name__} {x!r}"


def _refuse_option(name: str, option: str) -> None:
    known = list(RowOptions.__annotations__)
    near = difflib.get_close_matches(option, known, 1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise TypeError(f"{name}() got an unexpected option {option!r}, has {', '.join(known)}{hint}")


def _check_share(name: str, value: float) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name}: got {_kind(value)}, expected a number from 0 to 1")
    if not 0.0 <= value <= 1.0:
        raise ValueError(f"{name}: got {value!r}, expected a number from 0 to 1")


def _check_temperature(temperature: float) -> None:
    if isinstance(temperature, bool) or not isinstance(temperature, (int, float)):
        raise TypeError(f"temperature: got {_kind(temperature)}, expected a positive number")
    if not (temperature > 0 and math.isfinite(temperature)):
        raise ValueError(f"temperature: got {temperature!r}, expected a positive finite number")


def _check_operands(student: Tensor, teacher: Tensor, vocab_size: int | None) -> int:
    """The number of columns in use."""
    for name, x in (("student", student), ("teacher", teacher)):
        if not isinstance(x, Tensor):
            raise TypeError(f"{name}: got {_kind(x)}, expected a tensor of logits [..., V]")
        if x.dtype not in DTYPES:
            raise TypeError(
                f"{name}: got {_kind(x)}, expected logits in float32, bfloat16, float16 or float64"
            )
        if x.layout != torch.strided or hasattr(x, "placements"):
            raise TypeError(f"{name}: got {type(x).__name__} ({x.layout}), expected a dense tensor")
        if x.dim() == 0 or x.size(-1) == 0:
            raise ValueError(f"{name}: got shape {list(x.shape)}, expected [..., V] with V >= 1")
        if x.stride(-1) != 1 and x.size(-1) > 1:
            raise ValueError(
                f"{name}: got stride {x.stride(-1)} in the vocabulary (last) dimension of shape "
                f"{list(x.shape)}, expected 1; call .contiguous() first"
            )
    if student.device != teacher.device:
        raise ValueError(
            f"teacher: got a tensor on {teacher.device}, expected the student's {student.device}"
        )
    if student.shape[:-1] != teacher.shape[:-1]:
        raise ValueError(
            f"teacher: got shape {list(teacher.shape)}, expected the leading dimensions of the "
            f"student's {list(student.shape)}"
        )
    v_s, v_t = student.size(-1), teacher.size(-1)
    if vocab_size is None:
        if v_s != v_t:
            raise ValueError(
                f"teacher: got {v_t} columns, expected the student's {v_s}; where the vocabularies "
                "are padded differently, give vocab_size=the number of columns in use"
            )
        return v_s
    if isinstance(vocab_size, bool) or not isinstance(vocab_size, int):
        raise TypeError(f"vocab_size: got {_kind(vocab_size)}, expected an integer")
    if not 1 <= vocab_size <= min(v_s, v_t):
        raise ValueError(
            f"vocab_size: got {vocab_size}, expected 1 <= vocab_size <= {min(v_s, v_t)} "
            f"(student has {v_s} columns, teacher {v_t})"
        )
    return vocab_size


def _check_rows(
    student: Tensor, labels: Tensor | None, ignore_index: int, weight: Tensor | None
) -> None:
    leading = list(student.shape[:-1])
    if isinstance(ignore_index, bool) or not isinstance(ignore_index, int):
        raise TypeError(f"ignore_index: got {_kind(ignore_index)}, expected an integer")
    for name, x, what in (("labels", labels, "integers"), ("weight", weight, "floats")):
        if x is None:
            continue
        if not isinstance(x, Tensor):
            raise TypeError(f"{name}: got {_kind(x)}, expected a tensor {leading} of {what}")
        fits = x.dtype in INT_DTYPES if name == "labels" else x.dtype.is_floating_point
        if not fits:
            raise TypeError(f"{name}: got {_kind(x)}, expected {what}")
        if list(x.shape) != leading:
            raise ValueError(
                f"{name}: got shape {list(x.shape)}, expected {leading}, the leading dimensions of "
                f"the student's {list(student.shape)}"
            )
        if x.device != student.device:
            raise ValueError(
                f"{name}: got a tensor on {x.device}, expected the student's {student.device}"
            )


def _check_normalizer(normalizer: float | Tensor | None, reduction: str, student: Tensor) -> None:
    if normalizer is None:
        return
    if reduction != "mean":
        raise ValueError(
            f"normalizer: got {_kind(normalizer)} with reduction={reduction!r}; it replaces the "
            "denominator of reduction='mean'"
        )
    if isinstance(normalizer, Tensor):
        if normalizer.dim() != 0:
            raise ValueError(f"normalizer: got {_kind(normalizer)}, expected a 0-d tensor")
        if normalizer.device.type != "cpu" and normalizer.device != student.device:
            raise ValueError(
                f"normalizer: got a tensor on {normalizer.device}, expected {student.device}"
            )
        return
    if isinstance(normalizer, bool) or not isinstance(normalizer, (int, float)):
        raise TypeError(f"normalizer: got {_kind(normalizer)}, expected a number or a 0-d tensor")
    if not (normalizer >= 0 and math.isfinite(normalizer)):
        raise ValueError(f"normalizer: got {normalizer!r}, expected a finite number >= 0")


def _check_inplace(student: Tensor, teacher: Tensor) -> None:
    base = student if student._base is None else student._base
    if student.requires_grad and (student.is_leaf or (base.is_leaf and base.requires_grad)):
        raise ValueError(
            "inplace: the student is (a view of) a leaf that requires grad, whose values its own "
            "gradient would overwrite; expected logits computed by a model"
        )
    rows = [
        (size, stride)
        for size, stride in zip(student.shape[:-1], student.stride()[:-1], strict=True)
        if size > 1
    ]
    if any(stride < student.size(-1) for _, stride in rows):
        raise ValueError(
            f"inplace: the student's rows share memory (shape {list(student.shape)}, strides "
            f"{list(student.stride())}); expected rows of their own"
        )
    shared = student.untyped_storage().data_ptr() == teacher.untyped_storage().data_ptr()
    same = (student.data_ptr(), student.stride()) == (teacher.data_ptr(), teacher.stride())
    if shared and not same and _overlap(student, teacher):
        raise ValueError(
            "inplace: student and teacher overlap in memory, and the gradient would overwrite "
            "logits of the teacher before they are read; use inplace=False"
        )


def _overlap(a: Tensor, b: Tensor) -> bool:
    """Whether the address ranges meet; interleaved rows count, which errs on the safe side."""

    def span(x: Tensor) -> tuple[int, int]:
        if x.numel() == 0:
            return 0, 0
        last = sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
        return x.data_ptr(), x.data_ptr() + (last + 1) * x.element_size()

    (a0, a1), (b0, b1) = span(a), span(b)
    return a0 < b1 and b0 < a1
