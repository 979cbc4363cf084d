"""How a loss is run: the one decision, for logits, `LinearLogits` and `TopK` alike.

`loss` is what every public function calls. It takes the shortest way where all arguments are the
ordinary ones, and else makes a `Request` of them, checked once, for `run` to decide upon.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import Parameter

from fastkd.arguments.numbers import COLDEST, HOTTEST
from fastkd.arguments.tensors import DTYPES
from fastkd.backends import choice, formulas, reference
from fastkd.backends.base import Backend, LossSpec, Rows, acc_dtype
from fastkd.divergence import Divergence
from fastkd.engine import autograd, class_axis, of_dtensors, ops, outputs, per_row, validate
from fastkd.engine import reduction as reductions
from fastkd.engine.mapped_rows import Mapped, mapped
from fastkd.engine.records import Call, Products, Request
from fastkd.engine.topk_rows import topk_rows
from fastkd.mapped import AnyTeacher as Teacher
from fastkd.mapped import MappedLogits
from fastkd.operands import LinearLogits, Operand, TopK
from fastkd.parallel import dtensor, layout

MOST_LOSS_SCALE = 2.0**10  # of float16 gradients: the largest are of size T, and 65504 is the end
_PLAIN = (Tensor, Parameter)
_ROWS = (Tensor, type(None))
_NUMBERS = (float, int, Tensor, type(None))
_NO_DTENSORS = (Tensor, Parameter, TopK, float, int, type(None))


def loss(
    name: str,
    student: Operand,
    teacher: Teacher,
    divergence: Divergence,
    temperature: float,
    param: float | None = None,  # the divergence's own
    soft: float = 1.0,
    hard: float = 0.0,
    smoothing: float = 0.0,
    z_loss: float = 0.0,
    /,
    *,
    labels: Tensor | None = None,
    ignore_index: int | Sequence[int] = -100,
    weight: Tensor | None = None,
    reduction: str = "mean",
    normalizer: float | Tensor | None = None,
    vocab_size: int | None = None,
    class_dim: int = -1,
    inplace: bool = False,
    group: object = None,
    return_outputs: bool = False,
    **unknown: object,
) -> Tensor:
    """The loss of a public function or module, by its name; a pair where outputs are requested."""
    if unknown:
        known = validate.known_options(name, divergence)
        validate.refuse_option(name, next(iter(unknown)), known)
    if type(class_dim) is not int or class_dim != class_axis.LAST:
        student, teacher = class_axis.classes_last(student, teacher, class_dim, group)
    if type(ignore_index) is not int or not -(2**63) <= ignore_index < 2**63:
        labels, ignore_index = class_axis.one_ignored(labels, ignore_index)
    if param is None:
        param = divergence.default if divergence.given is None else divergence.given
    usual = (
        vocab_size is None
        and (type(temperature) is float and COLDEST <= temperature <= HOTTEST)
        and (type(reduction) is str and reduction in validate.REDUCTIONS)
        and _alike(student, teacher)
    )
    backend = _kernels(student.device) if usual else None
    if backend is not None and group is None and not inplace and reduction != "none":
        without_dual = teacher.requires_grad and divergence.dual is None
        shape: Any = student.shape
        if not (shape[-1] == 1 or student is teacher or without_dual or soft == 0.0):
            numbers = param, temperature, soft, hard, smoothing, z_loss
            pair: Any = student, teacher
            call: Any = _bare_call(backend, divergence.name, numbers, reduction, shape)
            if labels is not None or weight is not None or normalizer is not None:
                others = labels, ignore_index, weight, reduction, normalizer
                call = _usual_call(call, student, teacher, others)
            if call is not None:
                tensors = pair[0].resolve_neg(), pair[1].resolve_neg()  # see _tensors
                if not return_outputs:
                    return autograd.reduced(call, *tensors)
                told = outputs.memory(student, acc_dtype(*tensors))
                value = autograd.reduced(Call._make((*call[:-1], told)), *tensors)
                return value, outputs.named(told, student, call.spec)  # type: ignore
    sides = name, student, teacher, divergence, temperature, param, soft, hard, smoothing, z_loss
    options: dict[str, Any] = dict(
        labels=labels, ignore_index=ignore_index, weight=weight, reduction=reduction,
        normalizer=normalizer, vocab_size=vocab_size, inplace=inplace, group=group,
        return_outputs=return_outputs,
    )  # fmt: skip
    ordinary = usual and labels is None and weight is None and normalizer is None
    compiling, dtensors = torch.compiler.is_compiling(), False
    if not (ordinary or _plain(student, teacher, labels, weight, normalizer)):
        source = teacher.teacher if isinstance(teacher, MappedLogits) else teacher
        dtensors = dtensor.any_dtensor(student, source, labels, weight, normalizer)
    if isinstance(teacher, MappedLogits) and (dtensors or group is not None):
        raise validate.no_map_of_parts()
    if return_outputs:
        outputs.refuse(group, dtensors)
    if compiling and (dtensors or group is not None):  # an exchange is no part of a graph
        from fastkd.engine.outside_graph import call as outside  # and a compiler, else not loaded

        return outside(_of_parts if dtensors else _again, sides, options)
    if dtensors:
        return _of_parts(sides, **options)
    return run(_request(ordinary, sides, **options))


def _alike(student: Any, teacher: Any) -> bool:
    """Whether these are two ordinary tensors of logits, alike in all that the checks look at.

    To find nothing step by step takes a tenth of the time that a small loss takes in plain torch.
    """
    if type(student) not in _PLAIN or type(teacher) not in _PLAIN:
        return False
    if student.is_nested or teacher.is_nested:  # some of which have no shape
        return False
    shape, dtype = student.shape, student.dtype
    if shape != teacher.shape or not shape or not shape[-1]:
        return False
    return (
        dtype is teacher.dtype
        and dtype in DTYPES
        and student.layout is teacher.layout is torch.strided
        and student.device == teacher.device
        and student.stride()[-1] == teacher.stride()[-1] == 1
    )


def _plain(*operands: Any) -> bool:
    """Whether no DTensor can be among them, by their types alone."""
    for x in operands:
        parts = x.tensors if isinstance(x, LinearLogits) else (x,)
        for part in parts:
            if type(part) not in _NO_DTENSORS:
                return False
    return True


_known: dict[tuple[str | None, torch.device], Backend] = {}


def _kernels(device: torch.device) -> Backend | None:
    """The device's kernels; None where they are not to be used, or something special is at work."""
    if (
        torch.compiler.is_compiling()
        or torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
        or torch._C._get_tracing_state() is not None
        or torch._C._len_torch_dispatch_stack()
    ):
        return None
    key = choice.chosen.get(), device
    backend = _known.get(key)
    if backend is None:
        backend = _known[key] = choice.pick(device)
    return None if backend is reference.BACKEND else backend


@lru_cache(4096)
def _bare_call(
    backend: Backend, divergence: str, numbers: tuple[float, ...], reduction: str, shape: torch.Size
) -> Call:
    """The call of usual operands alone, which a loop of training makes at every step."""
    *some, z_loss = numbers
    spec = LossSpec._make((divergence, *some, shape[-1], shape[-1], z_loss))
    return Call(backend, spec, Rows(None, None, None, _factor(reduction, shape)))


def _usual_call(bare: Call, student: Any, teacher: Any, others: tuple[Any, ...]) -> Call | None:
    """The call with labels, weight and normalizer; None where that is for `run` to see."""
    labels, _, weight, reduction, normalizer = others
    if not (type(labels) in _ROWS and type(weight) in _ROWS and type(normalizer) in _NUMBERS):
        return None
    validate.rows(student, labels, weight)
    validate.normalizer(normalizer, reduction, student)
    r = Request._make((student, teacher, bare.spec, *others, False, None, False, None))
    if reductions.wants_grad(r):
        return None
    return bare._replace(rows=reductions.row_scale(bare.backend, r, acc_dtype(student, teacher)))


def _factor(reduction: str, shape: torch.Size) -> float:
    """What a sum over all rows is multiplied by."""
    if reduction == "mean":
        return 1.0 / (math.prod(shape[:-1]) or 1)
    return 1.0 / (shape[0] or 1) if reduction == "batchmean" else 1.0


def _again(sides: tuple[Any, ...], **options: Any) -> Tensor:
    return loss(*sides, **options)


def _of_parts(sides: tuple[Any, ...], **options: Any) -> Tensor:
    return of_dtensors.loss(loss, sides, **options)


def _request(
    ordinary: bool,
    sides: tuple[Any, ...],
    *,
    labels: Tensor | None,
    ignore_index: int,
    weight: Tensor | None,
    reduction: str,
    normalizer: float | Tensor | None,
    vocab_size: int | None,
    inplace: bool,
    group: object,
    return_outputs: bool,
) -> Request:
    """The arguments of `loss` as a record, checked; ordinary ones have nothing to find."""
    name, student, teacher, divergence, temperature, param, soft, hard, smoothing, z_loss = sides
    shared: Any = None
    if group is not None:
        backend = _kernels(student.device) if ordinary else None
        if backend is None and choice.in_functorch():
            raise NotImplementedError(
                "group: torch.func and forward-mode AD over a split vocabulary are not supported; "
                "gather the logits and leave group out"
            )
        if not ordinary:
            vocab_size = validate.shards(student, teacher, vocab_size)
        group = layout.process_group(group)
    elif ordinary or (vocab_size is None and _alike(student, teacher)):
        vocab = classes = student.shape[-1]
    else:
        vocab = classes = validate.operands(student, teacher, vocab_size)
    columns = None
    if isinstance(teacher, MappedLogits):
        teacher, columns = mapped(teacher)
    if not ordinary:
        temperature = float(validate.temperature(temperature))
        validate.reduction(reduction)
        validate.rows(student, labels, weight)
        normalizer = validate.normalizer(normalizer, reduction, student)
    if group is not None:
        call = f"{name}, {divergence.name} {param:g}, T={temperature:g}, {soft:g}, {hard:g}"
        call += f", {smoothing:g}, {z_loss:g}, {reduction}" + ("" if labels is None else ", labels")
        if teacher.requires_grad and torch.is_grad_enabled():
            call += ", a gradient of the teacher"
        own = backend or choice.pick(student.device)
        shared, student, teacher = layout.prepare(own, group, student, teacher, vocab_size, call)
        vocab, classes = shared.columns.own, shared.columns.total
    compiling = torch.compiler.is_compiling()
    silent = (classes == 1 and z_loss == 0.0) or (student is teacher and soft != 0.0)
    if silent and not compiling:
        validate.silence(name, student, teacher, classes)
    sizes = vocab, classes
    spec = LossSpec(divergence.name, param, temperature, soft, hard, smoothing, *sizes, z_loss)
    linear = isinstance(student, LinearLogits) or isinstance(teacher, LinearLogits)
    inplace = inplace and not (linear or compiling or choice.in_functorch())  # there, ignored
    if inplace:
        validate.inplace(student, teacher)
    others = labels, ignore_index, weight, reduction, normalizer, inplace
    return Request(student, teacher, spec, *others, shared, return_outputs, columns)


def run(r: Request) -> Tensor:
    """The one decision: whose autograd, whose passes, and whether rows are reduced on the way."""
    spec, tell, compiling = r.spec, r.return_outputs, torch.compiler.is_compiling()
    backend = r.group or _kernels(r.student.device)
    if backend is None:
        backend = reference.BACKEND if compiling else choice.pick(r.student.device)
    teacher_grad = spec.soft != 0.0 and r.teacher.requires_grad and torch.is_grad_enabled()
    # torch's own autograd: what is chosen by hand, or has no kernel, or no dual for the teacher
    in_torch = choice.in_functorch() if compiling else backend is reference.BACKEND
    if teacher_grad and not in_torch:
        no_dual = formulas.dual(spec) is None
        in_torch = no_dual or isinstance(r.teacher, TopK) or r.columns is not None
    if r.columns is not None and spec.soft != 0.0:
        outputs.refuse_map(tell)
        in_torch = in_torch or compiling
        backend = Mapped(backend, r.columns)
    if in_torch and r.group is not None:
        raise layout.no_teacher_gradient()
    others = r.labels is not None or r.weight is not None or r.normalizer is not None
    by_row = in_torch or compiling or r.reduction == "none"
    by_row = by_row or (others and reductions.wants_grad(r))
    tensors, products, acc = _operands(r, 1.0 if by_row else _loss_scale(r))
    told = outputs.memory(r.student, acc) if tell and not (in_torch or compiling) else None

    def call(rows: Rows) -> Call:
        if not isinstance(r.teacher, TopK) or spec.soft == 0.0:
            return Call(backend, spec, rows, None, r.inplace, products, told)
        topk = topk_rows(r.teacher, spec.temperature, spec.classes, rows.keep, acc, backend)
        return Call(backend, spec, rows, topk, r.inplace, products, told)

    if by_row:
        keep, label, bad = reductions.mask(r.labels, r.ignore_index, spec.classes)
        label, lead = label if spec.hard else None, r.student.shape[:-1]
        if in_torch:
            value, told = _in_torch(call(Rows(keep, label)), tell, *tensors)
        elif compiling and tell:
            value, told = ops.row_outputs(call(Rows(keep, label)), *tensors)
        elif compiling:
            value = ops.row_loss(call(Rows(keep, label)), *tensors)
        else:
            rows = Rows(reductions.flat(keep), reductions.flat(label))
            value = per_row.per_row(call(rows), lead, *tensors)
        value = reductions.reduce(value, r, keep, bad)
    elif others:
        value = autograd.reduced(call(reductions.row_scale(backend, r, acc)), *tensors)
    else:
        rows = Rows(None, None, None, _factor(r.reduction, r.student.shape))
        value = autograd.reduced(call(rows), *tensors)
    if spec.soft == 0.0:
        nothing = _no_part(r.teacher)
        wide = torch.float64 in (r.student.dtype, nothing.dtype)
        value = value.to(torch.float64 if wide else torch.float32) + nothing
    if told is None:
        return value
    topk = isinstance(r.teacher, TopK)
    return value, outputs.named(told, r.student, spec, topk)  # type: ignore[return-value]


def _in_torch(call: Call, tell: bool, *tensors: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Loss of each row by the reference, which torch differentiates as often as needed; outputs."""
    heads = (None, None) if call.products is None else call.products.heads
    keep, label = call.rows[:2]
    columns = call.backend.teacher_columns
    s, t = reference.logits(tensors, heads, call.spec.vocab, keep, columns)
    rows = s, call.topk or t, call.spec, keep, label
    return formulas.row_loss(*rows, columns), formulas.row_outputs(*rows) if tell else None


def _tensors(x: Any) -> tuple[Tensor | None, ...]:
    # kernels read memory as it is, and a view may be one whose numbers are to be negated
    return x.tensors if isinstance(x, LinearLogits) else (x.resolve_neg(),)


def _operands(
    r: Request, loss_scale: float
) -> tuple[list[Tensor | None], Products | None, torch.dtype]:
    """The tensors of both sides in a row, what goes with them in products, and acc."""
    student, teacher = r.student, r.teacher
    wide = torch.float64 in (student.dtype, teacher.dtype)
    acc = torch.float64 if wide else torch.float32
    tensors = [*_tensors(student)]
    sides: tuple[Operand, ...] = (student,)
    # D(q, q) is exactly 0 with gradient exactly 0: the teacher is not read, whatever it holds
    nothing = r.spec.soft == 0.0
    if not nothing and not isinstance(teacher, TopK):
        tensors += _tensors(teacher)
        sides = student, teacher
    if not isinstance(student, LinearLogits) and not isinstance(teacher, LinearLogits):
        if nothing:
            tensors.append(tensors[0].detach().to(acc if wide else student.dtype))  # type: ignore
        return tensors, None, acc
    if nothing:
        acc = torch.float64 if student.dtype is torch.float64 else torch.float32
    linear = [x if isinstance(x, LinearLogits) else None for x in sides]
    head_s, head_t = (None if x is None else x.head for x in (*linear, None)[:2])
    pack = any(x is not None and x.pack for x in linear)
    return tensors, Products((head_s, head_t), _chunk(linear), pack, loss_scale), acc


def _chunk(sides: Sequence[LinearLogits | None]) -> int | None:
    """The smaller of the chunks that both sides request, in rows."""
    least: int | None = None  # not min() with a default, which torch.compile does not know
    for x in sides:
        size = None if x is None else x.chunk_size
        if size is not None and (least is None or size < least):
            least = size
    return least


def _loss_scale(r: Request) -> float:
    """About what the reduction divides by, as a power of 2; see `linear.Linear`."""
    by = 1.0
    if r.reduction == "batchmean":
        by = r.student.size(0)
    elif r.reduction == "mean":
        number = isinstance(r.normalizer, (int, float))
        by = float(r.normalizer) if number else r.student.numel() // r.student.size(-1)  # type: ignore
    return min(2.0 ** round(math.log2(by)), MOST_LOSS_SCALE) if by > 1.0 else 1.0


def _no_part(teacher: Teacher) -> Tensor:
    """0 in the accumulation's dtype, and for whatever the teacher is made of a gradient of 0."""
    parts = teacher.tensors if isinstance(teacher, TopK) else _tensors(teacher)
    acc = torch.float64 if teacher.dtype == torch.float64 else torch.float32
    zeros = [x.reshape(-1)[:0].sum().to(acc) for x in parts if x is not None]
    return torch.stack(zeros).sum()
