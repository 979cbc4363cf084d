"""Who captures which samples, on any number of ranks and after any of them died.

The samples that the merged index lacks are dealt in equal ranges: rank r among n has the r-th n-th
of them. Every rank of a job sees the same merged index, which no writer touches, so their shares
are apart whenever they start; from its own a rank leaves out what has been written since, by
whatever rank of whatever job. `merge` between two jobs makes the shares of the next one equal.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, SequentialSampler

from .format import INDEXES
from .index import Places
from .merged_index import load_merged, merge
from .reader import Reader


def share(
    path: str | os.PathLike[str],
    total: int,
    *,
    rank: int,
    world_size: int,
    samples: range | None = None,
) -> list[range]:
    """The samples left to a rank, in ranges that rise.

    Args:
        path: a shared cache's folder; none is there yet where nothing is written.
        total: samples of the whole cache.
        rank, world_size: of this job; another may have had others.
        samples: those of this rank, in place of its share; those of other ranks must lie elsewhere.

    Raises:
        ValueError: an argument out of range.
        CacheError: what is there is damaged or not one cache.
    """
    if not 0 <= rank < world_size:
        raise ValueError(f"rank: got {rank} of {world_size} ranks, expected 0 to {world_size - 1}")
    if samples is not None and (samples.step != 1 or samples.start < 0 or samples.stop > total):
        raise ValueError(f"samples: got {samples}, expected a range of step 1 in {range(total)}")
    folder = Path(path)
    there = next(folder.glob(INDEXES), None) is not None
    mine = [samples] if samples is not None else _dealt(folder, there, total, rank, world_size)
    if not there:
        return [part for part in mine if part]
    now = Reader(folder).check()
    return [left for part in mine for left in _ranges(now.gaps(part.start, part.stop))]


def _dealt(folder: Path, there: bool, total: int, rank: int, world_size: int) -> list[range]:
    """The rank's part of what the merged index lacks."""
    merged = load_merged(folder) if there else None
    missing = torch.tensor([[0, total]])
    if merged is not None:  # its shards that have no step, as a rule none, count as not there
        missing = Places(merged.table, lambda _: missing.new_empty(0)).gaps(0, total)
    ends = (missing[:, 1] - missing[:, 0]).cumsum(0)
    count = int(ends[-1]) if len(ends) else 0
    low, high = rank * count // world_size, (rank + 1) * count // world_size
    begins = missing[:, 0] + (low - ends + missing[:, 1] - missing[:, 0]).clamp_min(0)
    stops = missing[:, 1] - (ends - high).clamp_min(0)
    return _ranges(torch.stack([begins, stops], 1))


def _ranges(pairs: Tensor) -> list[range]:
    return [range(start, stop) for start, stop in pairs.tolist() if start < stop]


class _Batches:
    """Batches of sample numbers; none spans two ranges."""

    def __init__(self, ranges: list[range], size: int) -> None:
        self.ranges, self.size = ranges, size

    def __iter__(self) -> Iterator[list[int]]:
        for part in self.ranges:
            for start in range(0, len(part), self.size):
                yield list(part[start : start + self.size])

    def __len__(self) -> int:
        return sum(-(-len(part) // self.size) for part in self.ranges)


def size_of(loader: Any) -> int:
    """Samples of a loader that ranks can share."""
    whole = isinstance(loader, DataLoader) and isinstance(loader.sampler, SequentialSampler)
    if not whole or loader.batch_size is None or not hasattr(loader.dataset, "__len__"):
        raise ValueError(
            "loader: got one that ranks cannot share, expected a DataLoader of a map-style dataset "
            "in its own order, all of it, with batch_size; or ranks=, and each rank's own loader"
        )
    return len(loader.dataset)


def only(loader: DataLoader[Any], ranges: list[range]) -> tuple[DataLoader[Any], _Batches]:
    """The same loader for these samples alone, and the numbers of its batches."""
    numbers = _Batches(ranges, loader.batch_size or 1)
    dataset: Dataset[Any] = loader.dataset
    workers: dict[str, Any] = {}
    if loader.num_workers:
        workers = {
            "prefetch_factor": loader.prefetch_factor,
            "multiprocessing_context": loader.multiprocessing_context,
        }
    made: DataLoader[Any] = DataLoader(
        dataset,
        batch_sampler=numbers,
        num_workers=loader.num_workers,
        collate_fn=loader.collate_fn,
        pin_memory=loader.pin_memory,
        timeout=loader.timeout,
        worker_init_fn=loader.worker_init_fn,
        generator=loader.generator,
        **workers,
    )
    return made, numbers


def together(group: Any, path: str | os.PathLike[str]) -> None:
    """Merge on the group's first rank when all are here; what it raises is raised on all."""
    failed: list[Any] = [None]
    dist.barrier(group)  # no writer is at work
    if dist.get_rank(group) == 0 and next(Path(path).glob(INDEXES), None) is not None:
        try:
            merge(path)
        except (OSError, ValueError) as error:
            failed = [error]
    dist.broadcast_object_list(failed, group=group, group_src=0)
    if failed[0] is not None:
        raise failed[0]
