"""The checks of the public functions: the argument, what came, what was expected.

They need shapes, dtypes and strides only, cost microseconds and run before anything is written.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import Parameter

from fastkd.arguments.messages import describe, meant, shown, sizes, warn_once
from fastkd.arguments.numbers import COLDEST, HOTTEST, integer, real, temperature_of, within
from fastkd.arguments.tensors import DTYPES, INT_DTYPES, answers_itself, layout
from fastkd.backends.choice import forced
from fastkd.divergence import Divergence
from fastkd.mapped import AnyTeacher as Teacher
from fastkd.mapped import MappedLogits
from fastkd.operands import LinearLogits, Operand, TopK

REDUCTIONS = ("mean", "batchmean", "sum", "none")
OPTIONS = (
    *("labels", "ignore_index", "weight", "reduction"),
    *("normalizer", "vocab_size", "class_dim", "inplace", "group", "return_outputs"),
)
_PLAIN = (Tensor, Parameter)


# of the losses with a hard term alone
OF_MIXED = ("alpha", "divergence", "label_smoothing", "t_squared", "z_loss", "class_weight")
OF_BINARY = ("alpha", "divergence", "t_squared")


def known_options(name: str, divergence: Divergence) -> list[str]:
    """The options of the public function of this name, its own first."""
    if name == "distillation_loss":
        own = ["temperature", *OF_MIXED]
    else:
        own = [divergence.parameter] if divergence.parameter else []
        own.append("temperature")
    return [*own, *OPTIONS]


def refuse_option(name: str, option: str, known: Sequence[str]) -> None:
    """Raise the TypeError for an option that a function or module of this name does not have."""
    hint = meant(option, known)
    if option in OF_MIXED:
        binary = name.lower().startswith("binary") and option in OF_BINARY
        hint = f"; it belongs to fastkd.{'binary_' if binary else ''}distillation_loss"
    raise TypeError(
        f"{name}() got an unexpected option {shown(option)}, has {', '.join(known)}{hint}"
    )


def temperature(value: float, name: str = "temperature") -> float:
    # what is usual needs no further look
    usual = type(value) is float and COLDEST <= value <= HOTTEST
    return value if usual else temperature_of(value, name)


def share(name: str, value: float) -> float:
    return within(name, value, 0.0, 1.0, "a number from 0 to 1")


def z_loss(value: float) -> float:
    # a float32 number
    return float(within("z_loss", value, 0.0, 1e18, "a finite number of 0 or more"))


def reduction(reduction: str) -> None:
    if not isinstance(reduction, str) or reduction not in REDUCTIONS:
        raise ValueError(
            f"reduction: got {shown(reduction)}, expected one of {', '.join(REDUCTIONS)}"
        )


def operands(student: Operand, teacher: Teacher, vocab_size: int | None) -> int:
    """The number of columns in use."""
    _sides(student, teacher, least=1)
    v_s = student.size(-1)
    v_t = v_s if isinstance(teacher, TopK) else teacher.size(-1)
    if vocab_size is None:
        if v_s != v_t and isinstance(teacher, MappedLogits):
            raise ValueError(
                f"columns: got {v_t} columns of the teacher, expected one for each of the "
                f"student's {v_s}; where the student's are padded, give vocab_size={v_t}"
            )
        if v_s != v_t:
            raise ValueError(
                f"teacher: got {v_t} columns, expected the student's {v_s}; where the vocabularies "
                "are padded differently, slice both to the n columns in use, logits[..., :n], or "
                "give vocab_size=n where the function takes it"
            )
        return v_s
    vocab_size = columns(vocab_size)
    if not 1 <= vocab_size <= min(v_s, v_t):
        raise ValueError(
            f"vocab_size: got {shown(vocab_size)}, expected 1 <= vocab_size <= {min(v_s, v_t)} "
            + (
                f"(student has {v_s} columns)"
                if isinstance(teacher, TopK)
                else f"(student has {v_s} columns, teacher {v_t})"
            )
        )
    return vocab_size


def no_map_of_parts() -> NotImplementedError:
    return NotImplementedError(
        "teacher: got a MappedLogits with a group or DTensors, which are not supported; give the "
        "teacher's logits at the map's columns, logits[..., columns], to the ranks that have them"
    )


def shards(student: Operand, teacher: Teacher, vocab_size: int | None) -> int | None:
    """As `operands`, for columns of a vocabulary that is split over ranks: there may be none."""
    _sides(student, teacher, least=0)
    if vocab_size is not None:
        vocab_size = columns(vocab_size, least=1)
    return vocab_size


def columns(vocab_size: int, least: int | None = None) -> int:
    """vocab_size as an int."""
    number = integer(vocab_size)
    if number is None:
        raise TypeError(f"vocab_size: got {describe(vocab_size)}, expected an integer")
    if least is not None and number < least:
        raise ValueError(f"vocab_size: got {shown(vocab_size)}, expected at least {least}")
    return number


def _sides(student: Operand, teacher: Teacher, least: int) -> None:
    for name, x in (("student", student), ("teacher", teacher)):
        if isinstance(x, MappedLogits) and x is teacher:
            _readable(name, x.columns)
            x = x.teacher
        if isinstance(x, (LinearLogits, TopK)):
            for part in (*x.tensors, x.indices) if isinstance(x, TopK) else x.tensors:
                _readable(name, part)
        else:
            _readable(name, x)
        if isinstance(x, LinearLogits) or (isinstance(x, TopK) and x is teacher):
            if isinstance(x, LinearLogits) and x.size(-1) < least:
                raise ValueError(f"{name}.weight: got {list(x.weight.shape)}, expected V >= 1")
            continue  # checked when it was made
        if not isinstance(x, Tensor):
            raise TypeError(
                f"{name}: got {describe(x)}, expected a tensor of logits [..., V] or a LinearLogits"
                + (", a TopK or MappedLogits" if name == "teacher" else "")
            )
        if x.dtype not in DTYPES:
            raise TypeError(
                f"{name}: got {describe(x)}, expected logits in float32, bfloat16, float16 or "
                "float64"
            )
        if x.layout is not torch.strided or x.is_nested:
            raise TypeError(f"{name}: got {layout(x)}, expected a dense tensor")
        if x.dim() == 0 or x.size(-1) < least:
            raise ValueError(f"{name}: got shape {sizes(x.shape)}, expected [..., V] with V >= 1")
        if x.stride(-1) != 1 and x.size(-1) > 1:
            if isinstance(student, (Tensor, LinearLogits)) and hasattr(teacher, "shape"):
                _same_rows(student, teacher)  # of a tensor without columns, say that
            raise ValueError(
                f"{name}: got stride {x.stride(-1)} in the vocabulary (last) dimension of shape "
                f"{sizes(x.shape)}, expected 1; call .contiguous() first"
            )
    if student.device != teacher.device:
        raise ValueError(
            f"teacher: got a tensor on {teacher.device}, expected the student's {student.device}"
        )
    _same_rows(student, teacher)


def _same_rows(student: Operand, teacher: Teacher) -> None:
    if student.shape[:-1] != teacher.shape[:-1]:
        raise ValueError(
            f"teacher: got shape {sizes(teacher.shape)}, expected the leading dimensions of the "
            f"student's {sizes(student.shape)}"
        )


def _readable(name: str, x: object) -> None:
    """Refuse what has no memory of its own, where a kernel would read it by its address."""
    if type(x) in _PLAIN or not isinstance(x, Tensor) or not answers_itself(x):
        return
    if hasattr(x, "placements"):
        raise TypeError(
            f"{name}: got a {type(x).__name__} placed as {x.placements}, expected a plain tensor: "
            "give this rank's part with .to_local() and group=, or the whole with .full_tensor()"
        )
    if x.layout is not torch.strided or torch.compiler.is_compiling() or forced() == "reference":
        return
    if hasattr(x, "fake_mode"):
        raise TypeError(
            f"{name}: got a {type(x).__name__}, whose values do not exist, expected a tensor; "
            "torch.compile and torch.export trace the losses, and use_backend('reference') needs "
            "no values"
        )
    raise TypeError(
        f"{name}: got a {type(x).__name__}, a subclass that does torch's operations its own way, "
        "expected a plain tensor: give what is within it, or try use_backend('reference')"
    )


def rows(student: Operand, labels: Tensor | None, weight: Tensor | None) -> None:
    if labels is not None:
        _per_row("labels", labels, "integers", student)
    if weight is not None:
        _per_row("weight", weight, "floats", student)


def _other_labels(labels: Tensor, student: Operand) -> str:
    """What to write instead, for labels that are not one column of each row."""
    if labels.shape == student.shape and labels.dtype.is_floating_point:
        return (
            "; probabilities are labels of fastkd.distillation_loss alone, multi-label targets of "
            "fastkd.binary_distillation_loss"
        )
    if labels.shape == student.shape:
        return (
            "; one-hot labels are labels.int().argmax(-1), multi-label targets are labels of "
            "fastkd.binary_distillation_loss"
        )
    if student.dim() > 2 and labels.shape == (student.shape[0], *student.shape[2:]):
        return "; if the classes are dimension 1, give class_dim=1"
    return ""


def _per_row(name: str, x: Tensor, what: str, student: Operand) -> None:
    leading = student.shape[:-1]
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: got {describe(x)}, expected a tensor {sizes(leading)} of {what}")
    if x.layout is not torch.strided or x.is_nested:
        got = layout(x) if x.is_nested else f"layout {x.layout}"
        raise TypeError(f"{name}: got {got}, expected a dense tensor of {what}")
    _readable(name, x)
    fits = x.dtype in INT_DTYPES if what == "integers" else x.dtype.is_floating_point
    if not fits:
        instead = _other_labels(x, student) if name == "labels" else ""
        raise TypeError(f"{name}: got {describe(x)}, expected {what} {sizes(leading)}{instead}")
    if x.shape != leading:
        instead = _other_labels(x, student) if name == "labels" else ""
        raise ValueError(
            f"{name}: got shape {sizes(x.shape)}, expected {sizes(leading)}, the leading "
            f"dimensions of the student's {sizes(student.shape)}{instead}"
        )
    if x.device != student.device:
        raise ValueError(
            f"{name}: got a tensor on {x.device}, expected the student's {student.device}"
        )


def normalizer(
    normalizer: float | Tensor | None, reduction: str, student: Operand
) -> float | Tensor | None:
    if normalizer is None:
        return None
    if reduction != "mean":
        raise ValueError(
            f"normalizer: got {describe(normalizer)} with reduction={reduction!r}; it replaces the "
            "denominator of reduction='mean'"
        )
    if isinstance(normalizer, Tensor):
        _readable("normalizer", normalizer)
        if normalizer.dtype.is_complex or normalizer.dtype == torch.bool:
            raise TypeError(f"normalizer: got {describe(normalizer)}, expected a real number")
        if normalizer.dim() != 0:
            raise ValueError(f"normalizer: got {describe(normalizer)}, expected a 0-d tensor")
        if normalizer.device.type != "cpu" and normalizer.device != student.device:
            raise ValueError(
                f"normalizer: got a tensor on {normalizer.device}, expected {student.device}"
            )
        return normalizer
    number = real(normalizer)
    if number is None:
        raise TypeError(
            f"normalizer: got {describe(normalizer)}, expected a number or a 0-d tensor"
        )
    if not 0 <= number <= 1e38:
        raise ValueError(f"normalizer: got {shown(normalizer)}, expected a finite number >= 0")
    return number


def silence(name: str, student: Operand, teacher: Teacher, columns: int) -> None:
    """Warn of a loss that is 0 whatever the model says."""
    if columns == 1:
        warn_once(
            f"{name}: a softmax over one column is constant, so that the loss is 0 and nothing is "
            "learnt; one logit under a sigmoid is for fastkd.binary_distillation_loss, a number "
            "for a regression loss"
        )
    elif student is teacher:
        warn_once(
            f"{name}: student and teacher are the same tensor, so that the loss is 0 and nothing "
            "is learnt"
        )


def inplace(student: Tensor, teacher: Tensor | TopK) -> None:
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
            f"inplace: the student's rows share memory (shape {sizes(student.shape)}, strides "
            f"{list(student.stride())}); expected rows of their own"
        )
    if isinstance(teacher, TopK):
        return  # read before anything is written
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
