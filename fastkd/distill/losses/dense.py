"""Losses of dense prediction: maps [N, C, H, W] of a segmenter, a detector or a depth model.

    distill.response(distill.pixel_wise, ignore_index=255, rows="labelled")
    distill.response(distill.channel_wise, 3.0)
    distill.feature("backbone", "backbone", distill.channel_wise, projector=nn.Conv2d(64, 256, 1))

Both carry T^2, as `fastkd.distillation_loss` does. Sequences [N, C, L] and volumes [N, C, D, H, W]
are maps, too.

>>> import torch
>>> from fastkd import distill
>>> student, teacher = (torch.nn.Conv2d(3, 4, 1) for _ in range(2))
>>> batch = torch.randn(2, 3, 8, 8), torch.randint(4, (2, 8, 8))
>>> terms = [distill.hard(class_dim=1), distill.response(distill.channel_wise, 3.0)]
>>> len(distill.train(student, [batch], terms, teacher=teacher, progress=False))
1
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from typing_extensions import Unpack

import fastkd
from fastkd.arguments.messages import describe, shown, sizes, unexpected
from fastkd.arguments.numbers import integer
from fastkd.arguments.tensors import INT_DTYPES

from .chunked import logits as check_maps
from .ranking import Rows, divergence_over

# as F.interpolate names them, and how many dimensions maps then have
RESIZES = {"linear": 3, "bilinear": 4, "trilinear": 5, "nearest": 0, "area": 0}


def pixel_wise(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor | None = None,
    *,
    temperature: float = 1.0,
    divergence: Any = "kl",
    ignore_index: int | Sequence[int] = -100,
    resize: str | None = None,
    class_dim: int = 1,
    **rows: Unpack[Rows],
) -> Tensor:
    """Divergence of the classes at each position: soft targets of a map.

        T^2 D(p, q) at each position,   p = softmax_c(teacher / T), q = softmax_c(student / T)

    It is `fastkd.distillation_loss(..., alpha=0, class_dim=1)`, which reads channels_last maps
    where they lie.

    Args:
        student: logits [N, C, H, W], float32, bfloat16, float16 or float64.
        teacher: logits of as many classes, of any of these dtypes.
        labels: int [N, H, W], None for all positions; only says which are left out.
        temperature: T > 0, finite.
        divergence: as in `fastkd.distillation_loss`.
        ignore_index: label of the positions that are left out, or several, such as (-100, 255).
        resize: how the teacher's maps are brought to the student's height and width where they
            differ: "bilinear", "area" or "nearest" ("linear", "trilinear" for other maps). None
            refuses them. For the other way round interpolate the student's in its model.
        class_dim: the dimension of the classes.
        **rows: weight [N, H, W], reduction and normalizer, as in `fastkd.losses`.

    Returns:
        0-d float32 (float64 where an operand is), [N, H, W] with reduction="none".

    Raises:
        TypeError, ValueError: an argument of the wrong kind or value.

    Hinton et al. 2015, arXiv 1503.02531; Liu et al. 2019, arXiv 1903.04197 (pixel-wise).
    """
    _options(rows)
    student, teacher = _one_size(student, teacher, resize, class_dim)
    return fastkd.distillation_loss(
        student, teacher, labels, alpha=0.0, temperature=temperature, divergence=divergence,
        ignore_index=ignore_index, class_dim=1, **rows,
    )  # fmt: skip


def channel_wise(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor | None = None,
    *,
    temperature: float = 4.0,
    divergence: Any = "kl",
    ignore_index: int | Sequence[int] = -100,
    resize: str | None = None,
    class_dim: int = 1,
    **rows: Unpack[Rows],
) -> Tensor:
    """Divergence of where a channel is active: a softmax over the positions of each channel.

        T^2 / C sum_c D(p_c, q_c),   p_c = softmax over H W of teacher_c / T, q_c of student_c / T

    of each map, and the mean over maps: the rows are channels, and "mean" divides by N C. Of
    channels_last maps a copy is made, in which a channel's positions lie together.

    Args:
        student: logits or features [N, C, H, W], float32, bfloat16, float16 or float64.
        teacher: maps of as many channels, of any of these dtypes; a projector makes them so.
        labels: int [N, H, W], None for all positions; only says which are left out of the
            softmax. A map of fewer than two positions is left out.
        temperature: T > 0, finite.
        divergence: as in `fastkd.distillation_loss`.
        ignore_index: label of the positions that are left out, or several, such as (-100, 255).
        resize: as in `pixel_wise`.
        class_dim: the dimension of the channels.
        **rows: weight [N, C], reduction and normalizer, as in `fastkd.losses`.

    Returns:
        0-d float32 (float64 where an operand is), [N, C] with reduction="none".

    Raises:
        TypeError, ValueError: an argument of the wrong kind or value.

    Shu et al. 2021, arXiv 2011.13256.
    """
    _options(rows)
    student, teacher = _one_size(student, teacher, resize, class_dim)
    places = [student.size(0), *student.shape[2:]]
    if 0 in places[1:]:  # no position: two at 0 on both sides, whose loss is 0
        student, teacher = (F.pad(x.flatten(2), (0, 2)) for x in (student, teacher))
        labels = None
    # [N, positions, C] with positions as the classes: copied only where they lie apart
    s, t = (x.flatten(2).transpose(1, 2) for x in (student, teacher))
    options: Any = {"temperature": temperature, "divergence": divergence, "class_dim": 1, **rows}
    if labels is None:
        return fastkd.distillation_loss(s, t, alpha=0.0, **options)
    kept = _kept(labels, places, ignore_index).flatten(1).unsqueeze(-1).expand(s.shape)
    return divergence_over(s, t, kept, **options)


def _options(rows: Rows) -> None:
    if unknown := rows.keys() - Rows.__annotations__.keys():
        raise TypeError(unexpected(unknown, Rows.__annotations__))


def _one_size(
    student: Tensor, teacher: Tensor, resize: str | None, class_dim: int
) -> tuple[Tensor, Tensor]:
    """Maps with the channels in dimension 1, the teacher's of the student's height and width."""
    for name, x in (("student", student), ("teacher", teacher)):
        check_maps(name, x)
        if x.dim() < 3:
            raise ValueError(f"{name}: got shape {sizes(x.shape)}, expected maps [N, C, H, W]")
    at = integer(class_dim)
    if at is None or not -student.dim() <= at < student.dim() or at % student.dim() == 0:
        expected = "the dimension of the classes, 1 for [N, C, H, W]"
        raise ValueError(f"class_dim: got {shown(class_dim)}, expected {expected}")
    dims = RESIZES.get(resize, -1) if isinstance(resize, str) else -1
    if resize is not None and dims not in (0, student.dim()):
        names = [name for name, of in RESIZES.items() if of in (0, student.dim())]
        expected = f"None or one of {', '.join(names)} for maps {sizes(student.shape)}"
        raise ValueError(f"resize: got {shown(resize)}, expected {expected}")
    s, t = ([x.size(0), x.size(at)] for x in (student, teacher))
    if s != t or student.dim() != teacher.dim():
        raise ValueError(
            f"teacher: got maps {sizes(teacher.shape)}, expected the student's "
            f"{sizes(student.shape)} in samples and channels; of features a projector makes it so"
        )
    if student.shape != teacher.shape and resize is None:
        raise ValueError(
            f"teacher: got maps {sizes(teacher.shape)}, expected the student's "
            f"{sizes(student.shape)}; resize='bilinear' interpolates the teacher's"
        )
    student, teacher = student.movedim(at, 1), teacher.movedim(at, 1)
    if student.shape == teacher.shape or resize is None:
        return student, teacher
    options: Any = {} if resize in ("nearest", "area") else {"align_corners": False}
    return student, F.interpolate(teacher, list(student.shape[2:]), mode=resize, **options)


def _kept(labels: Any, places: list[int], ignore_index: int | Sequence[int]) -> Tensor:
    """Which positions count, bool [N, H, W]."""
    if not isinstance(labels, Tensor) or labels.dtype not in INT_DTYPES:
        raise TypeError(f"labels: got {describe(labels)}, expected integers {places}")
    if list(labels.shape) != places:
        raise ValueError(f"labels: got shape {sizes(labels.shape)}, expected {places}")
    several = isinstance(ignore_index, Sequence) and not isinstance(ignore_index, str)
    ignored = list(ignore_index) if several else [ignore_index]  # type: ignore[arg-type]
    kept = torch.ones_like(labels, dtype=torch.bool)
    for one in ignored:
        if integer(one) is None:
            raise TypeError(f"ignore_index: got {shown(ignore_index)}, expected integers")
        kept &= labels != one
    return kept
