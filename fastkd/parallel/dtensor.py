"""Operands that are DTensors: this rank's part of them, and what makes the result whole again.

A DTensor means here what it means everywhere in PyTorch, the whole tensor: the loss is that of the
whole, a plain tensor with the same value on every rank, and so are the gradients, each a DTensor
placed as its operand. What splits the vocabulary becomes `group`; what splits rows (batch or
sequence) leaves each rank its own, and the sums of the reduction run over the ranks. A plain tensor
beside a DTensor is this rank's part: its rows, and the columns of the vocabulary's shard or all.

torch.distributed.tensor is never imported here: who has a DTensor has imported it.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import Parameter

from fastkd.engine import validate
from fastkd.operands import LinearLogits, Operand, Teacher, TopK
from fastkd.parallel import layout

_PLAIN = (Tensor, Parameter)


def is_placed(x: object) -> bool:
    """Whether it is a DTensor."""
    if type(x) in _PLAIN or x is None:
        return False
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(x, module.DTensor)


def any_placed(*given: object) -> bool:
    """Whether one of them is a DTensor, or an operand made of one."""
    for x in given:
        if isinstance(x, LinearLogits):
            if any(is_placed(part) for part in x.tensors):
                return True
        elif is_placed(x):
            return True
    return False


class Local(NamedTuple):
    """A call of a loss on this rank's part; its value is summed over `rows`."""

    student: Operand
    teacher: Teacher
    labels: Tensor | None
    weight: Tensor | None
    reduction: str
    normalizer: Any
    group: Any
    rows: list[Any]  # groups over which rows are split

    def whole(self, loss: Tensor) -> Tensor:
        """The loss of all rows; reduction="none" keeps this rank's."""
        if self.reduction != "none":
            for group in self.rows:
                loss = layout.Summed.apply(loss, group)
        return loss


def local(
    student: Operand,
    teacher: Teacher,
    labels: Tensor | None,
    weight: Tensor | None,
    *,
    ignore_index: int,
    reduction: str,
    normalizer: Any,
    inplace: bool,
    group: object,
) -> Local:
    """This rank's part of a call in which something is a DTensor.

    Raises:
        ValueError: `group` beside a DTensor, DTensors of several meshes, or placements that do not
            fit: each names the redistribution that would.
    """
    if group is not None:
        raise ValueError("group: got one beside a DTensor, whose mesh says it; expected None")
    validate.reduction(reduction)
    if is_placed(normalizer):
        normalizer = normalizer.full_tensor()
    validate.normalizer(normalizer, reduction, student)
    if inplace and isinstance(student, Tensor) and student.is_leaf and student.requires_grad:
        raise ValueError(
            "inplace: the student is a leaf that requires grad, whose values its own gradient "
            "would overwrite; expected logits computed by a model"
        )
    sides = _Sides(student, teacher, labels, weight)
    spec = sides.spec()
    vocab = [at for at, split in enumerate(spec) if split == sides.columns]
    rows = [at for at, split in enumerate(spec) if split is not None and split != sides.columns]
    mesh = sides.mesh
    groups = [mesh.get_group(at) for at in rows]
    mine_s = sides.part("student", student, spec, groups)
    mine_t = sides.part("teacher", teacher, spec, groups)
    labels = sides.rows("labels", labels, spec)
    weight = sides.rows("weight", weight, spec)
    if rows and reduction in ("mean", "batchmean"):
        validate.rows(mine_s, labels, ignore_index, weight)
        if reduction == "batchmean":
            normalizer = max(sides.size[0], 1)
        elif normalizer is None and labels is None and weight is None:
            normalizer = max(sides.size.numel(), 1)
        elif normalizer is None:
            normalizer = _denominator(labels, weight, ignore_index, groups)
        reduction = "mean"
    over = mesh.get_group(vocab[0]) if vocab else None
    return Local(mine_s, mine_t, labels, weight, reduction, normalizer, over, groups)


def _denominator(
    labels: Tensor | None, weight: Tensor | None, ignore_index: int, groups: Sequence[Any]
) -> Tensor:
    """The sum of the kept rows' weights over all ranks."""
    keep = None if labels is None else labels.long() != ignore_index  # as in reduction.mask
    if weight is None:
        assert keep is not None
        total = keep.sum().double()
    else:
        wide = weight.double()
        total = (wide if keep is None else torch.where(keep, wide, 0.0)).sum()
    for group in groups:  # each rank's loss has a part in the gradient of the sum
        total = layout.replicated(layout.Summed.apply(total, group), group)
    return total


class _Sides:
    """The DTensors of a call: their mesh, and how each of its dimensions splits the logits."""

    def __init__(self, student: Operand, teacher: Teacher, *rest: Tensor | None) -> None:
        self.student, self.teacher = student, teacher
        named = [*_parts("student", student), *_parts("teacher", teacher)]
        named += list(zip(("labels", "weight"), rest, strict=True))
        placed = [(name, x) for name, x in named if is_placed(x)]
        first, leader = placed[0]
        self.mesh: Any = leader.device_mesh
        for name, x in placed:
            if x.device_mesh != self.mesh:
                raise ValueError(
                    f"{name}: got a DTensor on {x.device_mesh}, expected the mesh of {first}, "
                    f"{self.mesh}"
                )
        if self.mesh.get_coordinate() is None:
            raise ValueError(f"{first}: got a DTensor on {self.mesh}, which this process is not in")
        self.columns = student.dim() - 1  # the dimension of the vocabulary
        self.named = placed
        self.size: torch.Size = student.shape[:-1]  # of the rows; those of the whole, if placed
        for name, x in placed:
            if not name.endswith((".weight", ".bias")):
                self.size = x.shape[: self.columns]

    def spec(self) -> list[int | None]:
        """For each dimension of the mesh, the dimension of the logits that it splits, or None."""
        spec: list[int | None] = []
        for at in range(self.mesh.ndim):
            found: dict[int, str] = {}
            if self.mesh.size(at) > 1:
                for name, x in self.named:
                    split = self._split(name, x, at)
                    if split is not None:
                        found.setdefault(split, name)
            if len(found) > 1:
                (one, a), (other, b), *_ = found.items()
                raise ValueError(
                    f"{b}: got dimension {other} of the logits split over mesh dimension {at}, "
                    f"where {a} has dimension {one} split; expected both alike: call "
                    f"{b}.redistribute(placements=...) with the placements of {a}"
                )
            spec.append(next(iter(found), None))
        if spec.count(self.columns) > 1:
            name, x = next(pair for pair in self.named if "labels" not in pair[0])
            first = spec.index(self.columns)
            wanted = [
                p if split != self.columns or at == first else "Replicate()"
                for at, (p, split) in enumerate(zip(x.placements, spec, strict=True))
            ]
            raise ValueError(
                f"{name}: got a vocabulary split over {spec.count(self.columns)} dimensions of "
                f"{self.mesh} ({x.placements}), expected one: call {_call(name, wanted)}"
            )
        return spec

    def _split(self, name: str, x: Any, at: int) -> int | None:
        """The dimension of the logits that x has split over dimension `at` of the mesh."""
        placement = x.placements[at]
        if placement.is_replicate():
            return None
        if _exactly_shard(placement):
            dim = placement.dim % x.dim()
            if name.endswith((".weight", ".bias")):
                if dim == 0:
                    return self.columns
            elif dim < self.columns or not name.endswith(".hidden"):
                return dim
        wanted: list[Any] = list(x.placements)
        wanted[at] = "Replicate()"
        what = "Replicate() or a Shard of "
        if name.endswith((".weight", ".bias")):
            what += "the vocabulary (dim=0)"
        elif name.endswith(".hidden"):
            what += "the rows"
        else:
            what += "rows" if name in ("labels", "weight") else "rows or vocabulary"
        raise ValueError(
            f"{name}: got a DTensor {list(x.shape)} placed as {x.placements}, expected {what} in "
            f"place of {placement!r}: call {_call(name, wanted)}"
        )

    def part(self, name: str, x: Any, spec: Sequence[int | None], groups: Sequence[Any]) -> Any:
        """This rank's part of an operand."""
        if isinstance(x, TopK):
            return x
        if not isinstance(x, LinearLogits):
            return self._own(x, spec)
        hidden, weight, bias = x.tensors
        rows = [None if split == self.columns else split for split in spec]
        head = [0 if split == self.columns else None for split in spec]
        twin = copy.copy(x)  # not made anew: its dtype is that of where the user made it
        twin.hidden = self._own(hidden, rows)
        for attribute, given in (("weight", weight), ("bias", bias)):
            own: Any = self._own(given, head)
            if is_placed(given):  # every rank's rows have a part in the gradient of the whole
                for group in groups:
                    own = layout.replicated(own, group)
            setattr(twin, attribute, own)
        return twin

    def rows(self, name: str, x: Tensor | None, spec: Sequence[int | None]) -> Tensor | None:
        """This rank's rows of labels or weight."""
        return None if x is None else self._own(x, [None if s == self.columns else s for s in spec])

    def _own(self, x: Any, spec: Sequence[int | None]) -> Any:
        """The local tensor of x, first cut where others are split and it is not."""
        if not is_placed(x):
            return x
        shard = sys.modules["torch.distributed.tensor"].Shard
        wanted = [
            p if split is None or p.is_shard() else shard(split)
            for p, split in zip(x.placements, spec, strict=True)
        ]
        if wanted != list(x.placements):
            x = x.redistribute(self.mesh, wanted)  # each rank has what it needs: nothing is sent
        own = x.to_local()
        return own if type(own) is Tensor else own.clone()  # one that is still on its way


def _parts(name: str, x: Any) -> list[tuple[str, Any]]:
    if isinstance(x, LinearLogits):
        return [(f"{name}.{n}", getattr(x, n)) for n in ("hidden", "weight", "bias")]
    return [(name, x)]


def _exactly_shard(placement: Any) -> bool:
    """Whether it is a Shard of contiguous parts in the order of the ranks, as its name says."""
    return type(placement) is sys.modules["torch.distributed.tensor"].Shard


def _call(name: str, wanted: Sequence[Any]) -> str:
    return f"{name}.redistribute(placements=[{', '.join(map(str, wanted))}])"
