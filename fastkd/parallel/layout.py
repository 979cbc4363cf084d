"""From the operands of a loss with `group` to this rank's columns of one vocabulary."""

from __future__ import annotations

import copy
import zlib
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from fastkd.arguments.messages import describe
from fastkd.backends.base import Backend, on_host
from fastkd.operands import LinearLogits, Operand, Teacher, TopK
from fastkd.parallel.collectives import gathered
from fastkd.parallel.vocab_parallel import Columns, VocabParallel


class Summed(torch.autograd.Function):
    """The sum over ranks. All of them go on with it alike, so each part has the sum's gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        ctx.group = group
        x = x.clone()
        dist.all_reduce(x, group=group)
        return x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return replicated(grad, ctx.group), None  # for a gradient of the gradient


class _SummedGradient(torch.autograd.Function):
    """x, which is the same on every rank; its gradient is the sum of what the ranks have."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        wide = grad.float() if grad.dtype in (torch.bfloat16, torch.float16) else grad
        return Summed.apply(wide, ctx.group).to(grad.dtype), None


def replicated(x: Tensor, group: Any) -> Tensor:
    """x, whose gradient is summed over the ranks if it has one."""
    if not x.requires_grad or not torch.is_grad_enabled() or dist.get_world_size(group) == 1:
        return x
    return _SummedGradient.apply(x, group)


def token_count(
    labels: Tensor, group: Any = None, ignore_index: int | Sequence[int] = -100
) -> Tensor:
    """The number of labels that are not `ignore_index`, over all ranks: a loss's `normalizer`.

        sum over ranks of |{i : labels_i != ignore_index}|

    With it the sum of the ranks' losses, and of their gradients, is that of one process that has
    all rows (data, sequence or context parallel). Where gradients are averaged over R ranks, as by
    DistributedDataParallel and `fully_shard`, divide it by R.

    Args:
        labels: this rank's labels, int [...].
        group: ProcessGroup or one-dimensional DeviceMesh whose ranks have different rows; None for
            all ranks, or for this process alone where torch.distributed is not initialised.
        ignore_index: label of rows that are left out, or several of them.

    Returns:
        0-d float64 on the labels' device, the same on every rank.
    """
    many = ignore_index if isinstance(ignore_index, Sequence) else (ignore_index,)
    kept = torch.ones_like(labels, dtype=torch.bool)
    for index in many:
        kept = kept & (labels.long() != index)  # as in reduction.mask
    count = kept.sum().double()
    if group is not None or (dist.is_available() and dist.is_initialized()):
        dist.all_reduce(count, group=None if group is None else process_group(group))
    return count


def no_teacher_gradient() -> NotImplementedError:
    """What has no kernel builds on full rows, which no rank has."""
    return NotImplementedError(
        "group: a gradient of this teacher (a TopK, or a divergence without a dual) is not "
        "supported over a split vocabulary; detach it, or gather the logits and leave group out"
    )


def process_group(group: Any) -> Any:
    """The group as torch.distributed takes it.

    Args:
        group: a ProcessGroup, or a DeviceMesh of one dimension.

    Raises:
        TypeError, ValueError, RuntimeError: something else; this process is not in it;
            torch.distributed is not there or not initialised.
    """
    if not dist.is_available():
        raise RuntimeError("group: this torch was built without torch.distributed")
    if not dist.is_initialized():
        raise RuntimeError("group: torch.distributed is not initialised; call init_process_group")
    if hasattr(group, "get_group") and hasattr(group, "ndim"):
        if group.ndim != 1:
            raise ValueError(
                f"group: got a DeviceMesh of {group.ndim} dimensions, expected one: "
                "the vocabulary's, as in mesh['tp']"
            )
        group = group.get_group()
    if group == dist.GroupMember.NON_GROUP_MEMBER:
        raise ValueError("group: this process is not in it")
    if not isinstance(group, dist.ProcessGroup):
        raise TypeError(f"group: got {describe(group)}, expected a ProcessGroup or a DeviceMesh")
    return group


_known: dict[tuple[Any, ...], list[list[int]]] = {}


def _layout(
    group: Any,
    student: Operand,
    teacher: Teacher,
    vocab_size: int | None,
    call: str,
    stepwise: bool,
) -> list[list[int]]:
    """[student's columns, teacher's, rows, vocab_size, hash of the call, stepwise] of every rank.

    On the host it is exchanged in every call. Elsewhere that would wait for the device: there once
    for each group and own layout, so that all ranks must change their layout together.
    """
    own = [
        student.size(-1),
        -1 if isinstance(teacher, TopK) else teacher.size(-1),
        student.shape[:-1].numel(),
        -1 if vocab_size is None else vocab_size,
        zlib.crc32(call.encode()),
        stepwise,
    ]
    key = (group, student.device, *own)
    if key in _known and not on_host(student.device):
        return _known[key]
    mine = torch.tensor(own, dtype=torch.int64, device=student.device)
    layout: list[list[int]] = gathered(mine, group).tolist()
    if not on_host(student.device):
        _known[key] = layout
    return layout


def prepare(
    backend: Backend,
    group: Any,
    student: Operand,
    teacher: Teacher,
    vocab_size: int | None,
    call: str,
) -> tuple[VocabParallel, Operand, Teacher]:
    """The backend, and the operands as this rank's columns of one vocabulary.

    Args:
        vocab_size: columns in use of all ranks; None: all.
        call: what must be the same on every rank, in words.

    Raises:
        ValueError: ranks that differ in more than their columns, or columns of the teacher that are
            neither the student's nor all of them.
    """
    layout = _layout(group, student, teacher, vocab_size, call, backend.has_steps)
    rank = dist.get_rank(group)
    for other, said in enumerate(layout):
        for name, here, there in (
            ("rows", layout[rank][2], said[2]),
            ("vocab_size", layout[rank][3], said[3]),
            ("call", layout[rank][4], said[4]),
        ):
            if here != there:
                got = f"{call} here, another there" if name == "call" else f"{here} and {there}"
                raise ValueError(
                    f"group: ranks {rank} and {other} differ in {name} ({got}); expected the same "
                    "call on every rank"
                )
    widths = [said[0] for said in layout]
    others = [said[1] for said in layout]
    total = sum(widths)
    if vocab_size is not None:
        if vocab_size > total:
            raise ValueError(
                f"vocab_size: got {vocab_size}, expected at most {total}, the columns of all ranks"
            )
        total = vocab_size
    if total < 1:
        raise ValueError("student: got no column on any rank, expected one at least")
    starts = [sum(widths[:at]) for at in range(len(widths))]
    used = [max(0, min(width, total - start)) for width, start in zip(widths, starts, strict=True)]
    stepwise = all(said[5] for said in layout)
    columns = Columns(starts[rank], used[rank], total, max(used), stepwise)
    if not isinstance(teacher, TopK):
        same = [max(0, min(b, total - sum(others[:at]))) for at, b in enumerate(others)]
        if others != widths and min(others) >= total:
            teacher = _cut(teacher, columns, group)
        elif same != used:
            raise ValueError(
                f"teacher: got {others} columns on the ranks beside the student's {widths}"
                + (f" with vocab_size={vocab_size}" if vocab_size is not None else "")
                + f"; expected the same columns, or all {total} of them on every rank"
            )
    student = _of_rank(student, group)
    if not isinstance(teacher, TopK):
        teacher = _of_rank(teacher, group)
    return VocabParallel(backend, group, columns), student, teacher


def _cut(x: Operand, columns: Columns, group: Any) -> Operand:
    """This rank's columns of an operand that every rank has in full."""
    at = slice(columns.start, columns.start + columns.own)
    if not isinstance(x, LinearLogits):
        return replicated(x, group)[..., at]
    hidden, weight, bias = x.tensors
    own = replicated(weight, group)[at]
    return _like(x, hidden, own, None if bias is None else replicated(bias, group)[at])


def _of_rank(x: Operand, group: Any) -> Operand:
    """An operand of at least one column; hidden states, the same everywhere, sum their gradient."""
    if not isinstance(x, LinearLogits):
        return x if x.size(-1) else F.pad(x, (0, 1))
    hidden, weight, bias = x.tensors
    hidden = replicated(hidden, group)
    if not weight.size(0):
        weight = F.pad(weight, (0, 0, 0, 1))
        bias = None if bias is None else F.pad(bias, (0, 1))
    return _like(x, hidden, weight, bias)


def _like(x: LinearLogits, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> LinearLogits:
    twin = copy.copy(x)  # not made anew: its dtype is that of where the user made it
    twin.hidden, twin.weight, twin.bias = hidden, weight, bias
    return twin
