"""Universal logit distillation: student and teacher of different vocabularies, compared by rank."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from typing_extensions import Unpack

import fastkd
from fastkd import rows as row_options
from fastkd.arguments.messages import shown
from fastkd.arguments.numbers import temperature_of
from fastkd.rows import RowOptions

from ..batch import IGNORED, Batch, Outputs
from ..targets import teacher_logits
from ..terms import Term, Weight
from .chunked import (
    known_options,
    logits,
    plainly,
)
from .sorted_probabilities import Call, Distance, TeacherRows, formula
from .token_alignment import Alignment, first_positions

INF = math.inf
MOST_MASS = 1.001  # what storage in 16 or 8 bits may add to 1


def uld_loss(
    student: Tensor,
    teacher: Tensor | fastkd.TopK,
    labels: Tensor | None = None,
    *,
    temperature: float = 1.0,
    top: int | None = None,
    alignment: Alignment | str | None = None,
    vocab_size: int | tuple[int | None, int | None] | None = None,
    **rows: Unpack[RowOptions],
) -> Tensor:
    """Distance of the probabilities by rank, which needs no common vocabulary.

        sum_i |q_(i) - p_(i)|,   q_(1) >= q_(2) >= ..., p_(1) >= p_(2) >= ...

    with p = softmax(teacher / T), q = softmax(student / T), the shorter one filled up with zeros.
    The gradient goes to the column that has the rank, 0 where the two are equal; among equal logits
    of the student it is one choice of several. No factor T^2, and no hard labels: the paper's loss
    is `hard()` plus 1.5 times this one, as `uld` makes a term of it.

    It compares the rows that `alignment` puts beside each other, each of them where both have read
    the same text. Row i of the logits and of the labels is what follows position i.

    With `top` = k the k largest of either side are compared one by one and the rest as one more
    outcome, which takes no sort. That is at most the distance, and short of it by at most
    2 min(P, Q), P and Q what is left on either side.

    The same probabilities in another order give exactly 0, loss and gradient (with `top` in float64
    they may differ by rounding, whose sign the gradient follows).

    Args:
        student: logits [..., V], float32, bfloat16, float16 or float64.
        teacher: logits [..., W] of any of these dtypes, a constant of the loss; or a `TopK` of them
            with tail "bucket" or "renormalize".
        labels: int [...] of the student's rows, None for all; only says which rows are left out.
        temperature: T > 0, finite; that of a TopK, unless it is renormalised.
        top: k >= 1, None for all ranks; of a TopK at most its K, which are all it tells apart.
        alignment: which rows stand beside each other: what `align` or `align_labelled` returns;
            "truncate": the first positions of [N, L, V] and [N, M, W], min(L, M) of each; None:
            every row beside its own, of the same leading dimensions. Rows that stand alone do not
            count; a row may stand beside several.
        vocab_size: columns in use, of both sides or (student's, teacher's).
        **rows: ignore_index, weight, reduction, normalizer as described in `fastkd.losses`; a row
            that does not count is not read and gets a gradient of exactly 0.

    Returns:
        0-d float32 (float64 where an operand is), [...] of the student's rows with
        reduction="none"; 0 where no row counts.

    Raises:
        TypeError, ValueError: an argument of the wrong kind or value, a teacher that requires
            grad, shapes that need an alignment.

    Boizard et al. 2024, arXiv 2402.12030.
    """
    T = float(temperature_of(temperature))
    known_options(rows, RowOptions)
    if top is not None and (isinstance(top, bool) or not isinstance(top, int) or top < 1):
        raise ValueError(f"top: got {shown(top)}, expected a number of ranks, at least 1")
    teachers = teacher.tensors if isinstance(teacher, fastkd.TopK) else (teacher,)
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in teachers):
        raise ValueError("teacher: got a tensor that requires grad, expected teacher.detach()")
    v_s, v_t = vocab_size if isinstance(vocab_size, tuple) else (vocab_size, vocab_size)
    student = _columns("student", student, v_s)
    if not isinstance(teacher, fastkd.TopK):
        teacher = _columns("teacher", teacher, v_t)
    if student.device != teacher.device:
        raise ValueError(
            f"teacher: got a tensor on {teacher.device}, expected the student's {student.device}"
        )
    row_options.check(rows, leading := list(student.shape[:-1]))
    pairs = _pairs(student, teacher, alignment)
    keep, _, bad = row_options.mask(student, labels, rows.get("ignore_index", IGNORED))
    s = student.reshape(-1, student.size(-1))
    acc = torch.promote_types(student.dtype, torch.float32)
    weight = rows.get("weight")
    factor = s.new_ones(s.size(0), dtype=acc) if weight is None else weight.reshape(-1)
    acc = torch.promote_types(acc, teacher.dtype)
    # on the host only the pairs that count are taken; on a device counting them would be a wait
    if keep is not None and keep.device.type == "cpu" and not plainly():
        if pairs is None:
            kept = keep.nonzero().squeeze(-1)
            pairs = (kept, kept) if kept.size(0) < keep.size(0) else None
        else:
            kept = keep[pairs[0]]
            pairs = (pairs[0][kept], pairs[1][kept])
        keep = None
    if pairs is not None:
        factor = factor[pairs[0]]
        keep, bad = (x if x is None else x[pairs[0]] for x in (keep, bad))
    if isinstance(teacher, fastkd.TopK):
        p, rest = _stored(teacher, T, acc, None if pairs is None else pairs[1])
        top = p.size(1) if top is None else min(top, p.size(1))
        teacher_rows: TeacherRows = (p[:, :top], rest + p[:, top:].sum(-1))
    else:
        teacher_rows = (teacher.reshape(-1, teacher.size(-1)), None)
    factor = row_options.factors(factor.to(acc), keep, bad, student.size(0), rows)
    call = Call(T, top, acc, pairs, keep)
    single = rows.get("reduction", "mean") == "none"
    if plainly():
        loss = formula(s, *teacher_rows, call) * factor
    elif single or factor.requires_grad:  # whose gradient needs the loss of each row
        loss = Distance.apply(s, teacher_rows, call, None) * factor
    else:
        return Distance.apply(s, teacher_rows, call, factor)
    if not single:
        return loss.sum()
    if pairs is not None:
        loss = loss.new_zeros(s.size(0)).index_add(0, pairs[0], loss)
    return loss.view(leading)


def uld(weight: Weight = 1.5, *, name: str = "uld", **options: Any) -> Term:
    """A term of `uld_loss`: its sum over the pairs of labelled rows, over the labels of the step.

    Args:
        weight: factor, or step -> factor; the paper's is 1.5.
        **options: of the loss. Without `alignment` the batch's own is taken, where its loader gives
            one: {"inputs": ..., "labels": ..., "teacher_inputs": ..., "alignment": align(...)}.
    """

    def function(student: Outputs, teacher: Outputs, batch: Batch) -> Tensor:
        target = teacher_logits(name, teacher)
        call_options = {"alignment": batch.extra.get("alignment"), **options}
        call_options["normalizer"] = batch.normalizer
        return uld_loss(student.logits, target, batch.labels, **call_options)

    return Term(name, function, weight, mean="step")


def _columns(name: str, x: Tensor, used: int | None) -> Tensor:
    logits(name, x)
    if used is None:
        return x
    if isinstance(used, bool) or not isinstance(used, int):
        raise TypeError(f"vocab_size: got {shown(used)}, expected an integer")
    if not 1 <= used <= x.size(-1):
        raise ValueError(
            f"vocab_size: got {used} for the {name}, expected 1 <= vocab_size <= {x.size(-1)}; "
            "where the two differ, give both, (student's, teacher's)"
        )
    return x[..., :used]


def _pairs(
    student: Tensor, teacher: Tensor | fastkd.TopK, alignment: Alignment | str | None
) -> tuple[Tensor, Tensor] | None:
    student_rows, teacher_row_shape = student.shape[:-1], teacher.shape[:-1]
    if alignment is None:
        if student_rows != teacher_row_shape:
            raise ValueError(
                f"teacher: got rows {list(teacher_row_shape)}, expected the student's "
                f"{list(student_rows)}; where the "
                "tokenizers cut the text in different places, give alignment=distill.align(...)"
            )
        return None
    if isinstance(alignment, str):
        if alignment != "truncate":
            raise ValueError(
                f"alignment: got {shown(alignment)}, expected 'truncate', None or "
                "distill.align(...)"
            )
        if (
            len(student_rows) != 2
            or len(teacher_row_shape) != 2
            or student_rows[0] != teacher_row_shape[0]
        ):
            raise ValueError(
                f"teacher: got rows {list(teacher_row_shape)} beside the student's "
                f"{list(student_rows)}, expected as "
                "many sequences, [N, L] and [N, M], for alignment='truncate'"
            )
        first, second = first_positions(student_rows[0], student_rows[1], teacher_row_shape[1])
        return first.to(student.device), second.to(student.device)
    if not isinstance(alignment, Alignment):
        raise TypeError(
            f"alignment: got {type(alignment).__name__}, expected what distill.align returns"
        )
    for name, alignment_shape, shape in (
        ("student", alignment.student_shape, student_rows),
        ("teacher", alignment.teacher_shape, teacher_row_shape),
    ):
        if tuple(alignment_shape) != tuple(shape):
            raise ValueError(
                f"alignment: got one of {name} positions {list(alignment_shape)}, expected "
                f"{list(shape)}, "
                f"the rows of the {name}"
            )
    return alignment.student.to(student.device), alignment.teacher.to(student.device)


def _stored(
    teacher: fastkd.TopK, T: float, acc: torch.dtype, used: Tensor | None
) -> tuple[Tensor, Tensor]:
    """[N, K] probabilities in descending order, and [N] what is left."""
    if teacher.tail not in ("bucket", "renormalize"):
        raise ValueError(
            f"teacher: got a TopK with tail={teacher.tail!r}, expected 'bucket' or 'renormalize': "
            "its columns mean nothing in another vocabulary"
        )
    ratio = teacher.temperature / T
    if ratio != 1.0 and teacher.tail == "bucket":
        raise ValueError(
            f"temperature: got {T:g} with a teacher stored at {teacher.temperature:g} and "
            f"tail='bucket', expected temperature={teacher.temperature:g}"
        )
    log = teacher.logprobs.reshape(-1, teacher.size(-1)).to(acc)
    log = log.masked_fill(teacher.indices.reshape(log.shape) < 0, -INF)
    if teacher.tail == "renormalize":
        p = (log * ratio).softmax(-1)
        rest = p.new_zeros(p.size(0))
    else:
        p = log.exp()
        _admit(p, used)
        if teacher.tail_logprob is None:
            rest = (1 - p.sum(-1, dtype=torch.float64)).clamp_min(0).to(acc)
        else:
            rest = teacher.tail_logprob.reshape(-1).to(acc).exp()
    return p.sort(-1, descending=True).values, rest


def _admit(p: Tensor, used: Tensor | None) -> None:
    """On the host; elsewhere it would wait for the device."""
    if p.device.type != "cpu" or plainly():
        return
    mass = p.detach().sum(-1)
    wrong = mass > MOST_MASS
    if used is not None:
        wrong &= torch.zeros_like(wrong).index_fill_(0, used, True)
    if bool(wrong.any()):
        row = int(wrong.nonzero()[0, 0])
        raise ValueError(
            f"teacher.logprobs: got a mass of {float(mass[row]):g} in row {row}, expected at most "
            f"{MOST_MASS}"
        )
