"""The processes (ranks) that share a run, and what they exchange.

A student in DistributedDataParallel, or one whose parameters are DTensors (`fully_shard`, tensor
parallel), is trained by several. Each of them normalises its loss by the mean over ranks of their
tokens, so that the mean of their gradients, which the wrapper takes, is that of one process with
the whole batch. Means also hold where ranks of a tensor-parallel group have the same batch.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fastkd.arguments.messages import shown

from .batch import Batch

PLAINLY = contextlib.nullcontext()  # one for all: it is entered in every micro-batch


def is_dtensor(x: Any) -> bool:
    """Whether it is a DTensor; nothing is imported for it: a DTensor has imported its module."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(x, module.DTensor)


def full_tensor(x: Any) -> Any:
    """A DTensor as the tensor that it stands for, on every rank; anything else as it is."""
    return x.full_tensor() if is_dtensor(x) else x


def local(x: Any) -> Any:
    """This rank's part of a DTensor; anything else as it is."""
    return x.to_local() if is_dtensor(x) else x


def matching_shards(x: Any, other: Any) -> tuple[Tensor, Tensor]:
    """The local tensor of x, and the part of `other` at the same places."""
    if is_dtensor(x) and is_dtensor(other):
        other = other.redistribute(x.device_mesh, x.placements)
    elif is_dtensor(x):
        raise ValueError("average: got one in shards of a student that is not, expected both alike")
    return local(x), local(other) if is_dtensor(x) else full_tensor(other)


def _sharded_module() -> Any:
    """The class that `fully_shard` puts into a module's; nothing where nobody called it."""
    return getattr(sys.modules.get("torch.distributed.fsdp"), "FSDPModule", ())


def reshard(model: nn.Module) -> None:
    """Free what `fully_shard` gathered for a forward without a backward."""
    if isinstance(model, _sharded_module()):
        model.reshard()


def class_name(model: nn.Module) -> str:
    """The name of its class, without the one that `fully_shard` puts in front."""
    sharded = _sharded_module()
    return next(
        c for c in type(model).__mro__ if not sharded or not issubclass(c, sharded)
    ).__name__


class Ranks:
    """The processes that train `student` together; one that is neither wrapped nor sharded: alone.

    Attributes:
        size: their number.
        first: whether this one speaks and writes for all.
        sharded: whether parameters are DTensors.
        wrapped: whether the student is in DistributedDataParallel.
    """

    def __init__(self, student: nn.Module) -> None:
        self.student: Any = student
        while isinstance(getattr(self.student, "_orig_mod", None), nn.Module):  # torch.compile's
            self.student = self.student._orig_mod
        self.wrapped = isinstance(self.student, nn.parallel.DistributedDataParallel)
        self._groups: list[Any] = []
        dtensors: list[Any] = [p for p in student.parameters() if is_dtensor(p)]
        meshes = [p.device_mesh for p in dtensors]
        self.sharded = bool(meshes)
        if self.wrapped:
            self._groups = [self.student.process_group]
        elif meshes:  # the widest: of tensor parallel within fully_shard some weights have but one
            self._groups = list(max(meshes, key=lambda mesh: mesh.size()).get_all_groups())
        self.size = 1
        for group in self._groups:
            self.size *= dist.get_world_size(group)
        self.first = all(dist.get_rank(group) == 0 for group in self._groups)

    def mean_(self, x: Tensor) -> Tensor:
        """x, overwritten by its mean over ranks."""
        for group in self._groups:
            dist.all_reduce(x, group=group)
        return x.div_(self.size) if self.size > 1 else x

    def means(self, values: list[Tensor]) -> list[Tensor]:
        """The means over ranks of 0-d tensors."""
        if self.size == 1:
            return values
        return list(self.mean_(torch.stack([x.float() for x in values])).unbind())

    def number(self, value: float, device: torch.device) -> float:
        """The mean over ranks of a number."""
        if self.size == 1:
            return value
        return float(self.mean_(torch.tensor(value, dtype=torch.float64, device=device)))

    def gathered(self, value: Any) -> list[Any]:
        """The `value` of every rank, in the order of the ranks; any object."""
        found = [value]
        for group in reversed(self._groups):
            parts: list[Any] = [None] * dist.get_world_size(group)
            dist.all_gather_object(parts, found, group=group)
            found = [x for part in parts for x in part]
        return found

    @property
    def rank(self) -> int:
        """The index of this process in the list that `gathered` returns."""
        place = 0
        for group in self._groups:
            place = place * dist.get_world_size(group) + dist.get_rank(group)
        return place

    def groups(
        self, batches: Iterator[Batch], accumulate: int, device: torch.device, *, plain: bool
    ) -> Iterator[list[Batch]]:
        """The micro-batches of each optimizer step, which know the step's tokens and samples."""
        while True:
            group = list(islice(batches, accumulate))
            if self.size > 1 or len(group) > 1:
                self._share(group, device)
            elif group and not plain:
                group[0].tokens  # noqa: B018  counted here, on the host: later it may be a device's
            if not group:
                return
            yield group

    def _share(self, group: Sequence[Batch], device: torch.device) -> None:
        tokens: Any = sum(batch.tokens for batch in group)
        samples: float = sum(batch.samples for batch in group)
        if self.size > 1:
            counts = (tokens, samples, float(bool(group)))
            shared = torch.stack([torch.as_tensor(x, dtype=torch.float64) for x in counts])
            tokens, samples, present = self.mean_(shared.to(device)).tolist()
            if 0 < present < 1:
                raise ValueError(
                    f"loader: got no more batches on {round((1 - present) * self.size)} of "
                    f"{self.size} ranks (here {'one' if group else 'none'}), expected the same "
                    "number of batches on all"
                )
        for batch in group:
            batch.normalizer, batch.sample_total = tokens, samples

    def no_sync(self, *, last: bool) -> contextlib.AbstractContextManager[None]:
        """Gradients of ranks are averaged once a step, after its last micro-batch.

        `fully_shard` sums its shards of each micro-batch: it has no room for whole gradients.
        """
        if last or not self.wrapped:
            return PLAINLY
        return self.student.no_sync()

    def share(self, modules: nn.Module) -> None:
        """Copy the first rank's `modules`, which the terms learn, to all ranks."""
        for group in self._groups:
            for x in (*modules.parameters(), *modules.buffers()):
                dist.broadcast(x.detach(), dist.get_global_rank(group, 0), group=group)

    def average_gradients(self, modules: nn.Module) -> None:
        """Average the gradients of `modules` over ranks, as the student's wrapper does for it."""
        if self.size == 1:
            return
        for p in modules.parameters():
            if p.requires_grad:
                # a rank without a label has none, and the others wait for it
                p.grad = torch.zeros_like(p) if p.grad is None else p.grad
                self.mean_(p.grad)

    def clip_(self, weights: Iterable[Tensor], norm: float) -> None:
        """Scale gradients so that the 2-norm of all of them, over all shards, is at most `norm`."""
        weights = list(weights)
        if not self.sharded:
            nn.utils.clip_grad_norm_(weights, norm)
            return
        by_mesh: dict[Any, list[Tensor]] = {}  # norms of different meshes are no tensors of one
        for p in weights:
            grad: Any = p.grad
            if grad is not None:
                by_mesh.setdefault(grad.device_mesh if is_dtensor(grad) else None, []).append(p)
        grads = [[p.grad for p in part if p.grad is not None] for part in by_mesh.values()]
        norms = [full_tensor(nn.utils.get_total_norm(part)) for part in grads]
        if norms:
            total = torch.stack(norms).norm()
            for part in by_mesh.values():
                nn.utils.clip_grads_with_norm_(part, norm, total)


def gathered_rows(name: str, x: Tensor, group: Any) -> tuple[Tensor, int]:
    """The rows [N, D] of all ranks, end to end, with their gradients, and where this rank's begin.

    Ranks may have other N. Raises TypeError, ValueError: no group, or other D, on every rank.
    """
    if not isinstance(group, dist.ProcessGroup):
        expected = "a process group, such as torch.distributed.group.WORLD"
        raise TypeError(f"group: got {shown(group)}, expected {expected}")
    mine = torch.tensor(x.shape, device=x.device)
    found = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
    dist.all_gather(found, mine, group=group)
    shapes = torch.stack(found).tolist()
    counts, lengths = ([shape[at] for shape in shapes] for at in (0, 1))
    if len(set(lengths)) > 1:
        raise ValueError(f"{name}: got rows of {lengths} on the ranks, expected one length")
    return _Gathered.apply(x, counts, group), sum(counts[: dist.get_rank(group)])


class _Gathered(torch.autograd.Function):
    """Each rank's rows on all of them; a row's gradient is the sum of those of all ranks."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, counts: list[int], group: Any) -> Tensor:
        ctx.counts, ctx.group = counts, group
        most = max(counts)
        mine = torch.cat([x, x.new_zeros(most - x.size(0), x.size(1))])
        found = [torch.empty_like(mine) for _ in counts]
        dist.all_gather(found, mine, group=group)
        return torch.cat([part[:count] for part, count in zip(found, counts, strict=True)])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        total = grad.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=ctx.group)
        return total.split(ctx.counts)[dist.get_rank(ctx.group)], None, None
