"""The order in which a rank reads its part of a cache: shuffled, and near what it has open."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.utils.data import Sampler

from .reader import Reader


class ShardSampler(Sampler[int]):
    """A DataLoader's `sampler` that gives each rank samples of a few shards: it opens no others.

    Each epoch puts the shards in a new order, lays their samples end to end and cuts that into
    equal parts, one for each rank; what is left over, fewer than `world_size` samples, waits for
    another epoch. A rank so opens its 1/world_size of the shards and the two at its ends; it draws
    its samples from `window` shards at a time, in random order.

    Epochs differ by `generator`, from which each iteration draws: a checkpoint of `fastkd.distill`
    stores it, and a run resumed within an epoch gets the same order again. `set_epoch` chooses an
    epoch by its number, for loops that call it.

    Args:
        reader: of the cache; only its index is looked at.
        rank, world_size: this rank among how many.
        seed: of the generator; the same on all ranks.
        shuffle: False: the cache's own order of shards, each from its start.
        window: shards mixed at a time; with more of them a batch is of more places, and more files
            are open.

    Raises:
        ValueError: rank, world_size or window out of range, or fewer samples than ranks.
    """

    def __init__(
        self,
        reader: Reader,
        *,
        rank: int = 0,
        world_size: int = 1,
        seed: int = 0,
        shuffle: bool = True,
        window: int = 8,
    ) -> None:
        if not 0 <= rank < world_size:
            last = world_size - 1
            raise ValueError(f"rank: got {rank} of {world_size} ranks, expected 0 to {last}")
        if window < 1:
            raise ValueError(f"window: got {window}, expected at least 1")
        if len(reader) < world_size:
            raise ValueError(f"reader: got {len(reader)} samples for {world_size} ranks")
        self.reader, self.rank, self.world_size = reader, rank, world_size
        self.seed, self.shuffle, self.window = seed, shuffle, window
        self.generator = torch.Generator().manual_seed(seed)

    def __len__(self) -> int:
        return len(self.reader) // self.world_size

    def set_epoch(self, epoch: int) -> None:
        """The next iteration is that of epoch `epoch`, whatever came before."""
        self.generator.manual_seed(self.seed)
        for _ in range(epoch if self.shuffle else 0):
            self._draw()

    def _draw(self) -> int:
        return int(torch.randint(2**62, (), generator=self.generator))

    def __iter__(self) -> Iterator[int]:
        chance = None
        shards = torch.arange(len(self.reader.table))
        if self.shuffle:
            chance = torch.Generator().manual_seed(self._draw())
            shards = torch.randperm(len(shards), generator=chance)
        parts = self._parts(shards)
        if chance is not None:  # all ranks have drawn the same up to here
            chance.manual_seed(int(torch.randint(2**62, (), generator=chance)) ^ self.rank)
        for start in range(0, len(parts), self.window):
            some = parts[start : start + self.window]
            numbers = torch.cat([self.reader.of_shard(at)[low:high] for at, low, high in some])
            if chance is not None:
                numbers = numbers[torch.randperm(len(numbers), generator=chance)]
            yield from numbers.tolist()

    def _parts(self, shards: Tensor) -> list[tuple[int, int, int]]:
        """This rank's shards, and from where to where in each."""
        ends = self.reader.table.samples[shards].cumsum(0)
        begin, end = self.rank * len(self), (self.rank + 1) * len(self)
        first = int(torch.searchsorted(ends, begin, right=True))
        last = int(torch.searchsorted(ends, end))
        parts = []
        for i in range(first, last + 1):
            start = int(ends[i - 1]) if i else 0
            size = int(ends[i]) - start
            parts.append((int(shards[i]), max(begin - start, 0), min(end - start, size)))
        return parts
