"""All shards of a cache in columns, and which of them has a sample.

What a shard's index says takes 89 bytes here, and nothing grows with the samples: those of a shard
are first, first + step, ... and the shard of a number is found by binary search among the shards of
one step, ordered by (first mod step, first). Only shards whose samples follow no step (a `Writer`
given numbers of its user's own) are looked at one number at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .format import Part, Shard, shard_name

PIECE = 2**20  # numbers looked up at a time


@dataclass(frozen=True)
class Table:
    """Columns of S shards, ordered by rank and number: int64 [S] but where said."""

    rank: Tensor  # int32
    number: Tensor  # int32: of its rank
    folder: Tensor  # uint8: in a folder of its rank
    first: Tensor
    last: Tensor
    step: Tensor
    samples: Tensor
    tokens: Tensor
    bytes: Tensor
    sha256: Tensor  # uint8 [S, 32]

    @staticmethod
    def of(part: Part) -> Table:
        shards = part.shards
        count = len(shards)
        nested = ["/" in shard.file for shard in shards]
        digest = bytearray(b"".join(bytes.fromhex(shard.sha256) for shard in shards))
        return Table(
            rank=torch.full((count,), part.rank, dtype=torch.int32),
            number=torch.arange(count, dtype=torch.int32),
            folder=torch.tensor(nested, dtype=torch.uint8),
            **{
                name: torch.tensor([getattr(shard, name) for shard in shards], dtype=torch.int64)
                for name in ("first", "last", "step", "samples", "tokens", "bytes")
            },
            sha256=torch.tensor(digest, dtype=torch.uint8).view(count, 32),
        )

    @staticmethod
    def join(tables: Sequence[Table]) -> Table:
        columns = [table.columns() for table in tables]
        return Table(**{name: torch.cat([x[name] for x in columns]) for name in columns[0]})

    def columns(self) -> dict[str, Tensor]:
        return {field.name: getattr(self, field.name) for field in fields(self)}

    def of_rank(self, rank: int) -> Table:
        """The shards of one rank."""
        ends = torch.searchsorted(self.rank, torch.tensor([rank, rank + 1], dtype=torch.int32))
        start, stop = ends.tolist()
        return Table(*(column[start:stop] for column in self.columns().values()))

    def __len__(self) -> int:
        return len(self.rank)

    def file(self, at: int) -> str:
        folder = bool(self.folder[at])
        return shard_name(int(self.rank[at]), int(self.number[at]), folder=folder)

    def shard(self, at: int) -> Shard:
        numbers = ("samples", "tokens", "bytes", "first", "last", "step")
        whole: dict[str, Any] = {name: int(getattr(self, name)[at]) for name in numbers}
        digest = bytes(self.sha256[at].tolist()).hex()
        return Shard(file=self.file(at), sha256=digest, **whole)


class _Run(NamedTuple):
    """The shards of one step, in the order of their keys."""

    step: int
    span: int  # keys of one residue
    most: int
    keys: Tensor
    at: Tensor
    first: Tensor
    last: Tensor
    samples: int


class Places:
    """Which shard has a sample.

    Args:
        table: the shards.
        listed: at -> the numbers of a shard that has no step.
    """

    def __init__(self, table: Table, listed: Callable[[int], Tensor]) -> None:
        self.table = table
        self._runs = [self._run(step) for step in table.step.unique().tolist() if step]
        self._runs.sort(key=lambda run: -run.samples)
        strays = (table.step == 0).nonzero().flatten().tolist()
        none = torch.empty(0, dtype=torch.int64)
        numbers = [listed(at) for at in strays]
        of = [torch.full_like(x, at) for at, x in zip(strays, numbers, strict=True)]
        self._numbers, order = torch.cat([none, *numbers]).sort(stable=True)
        self._of = torch.cat([none, *of])[order]

    def _run(self, step: int) -> _Run:
        at = (self.table.step == step).nonzero().flatten()
        first, last = self.table.first[at], self.table.last[at]
        most = int(last.max())
        span = most // step + 1
        keys, order = (first % step * span + first // step).sort(stable=True)
        samples = int(self.table.samples[at].sum())
        return _Run(step, span, most, keys, at[order], first[order], last[order], samples)

    def find(self, asked: Tensor) -> Tensor:
        """The shard of each number [N] int64, -1 where none has it."""
        found = torch.full_like(asked, -1)
        for run in self._runs:
            _look(run, asked, found)
        self._stray(asked, found)
        return found

    def _stray(self, asked: Tensor, found: Tensor) -> None:
        if len(self._numbers):
            place = torch.searchsorted(self._numbers, asked).clamp_max_(len(self._numbers) - 1)
            torch.where(self._numbers[place] == asked, self._of[place], found, out=found)

    def twice(self) -> tuple[int, int, int] | None:
        """A number that two shards have, and both; None: each is there once."""
        for run in self._runs:
            same = run.first[1:] % run.step == run.first[:-1] % run.step
            both = same & (run.first[1:] <= run.last[:-1])
            if again := _first(both, run.first[1:], run.at[:-1], run.at[1:]):
                return again
        of, numbers = self._of, self._numbers
        if again := _first(numbers[1:] == numbers[:-1], numbers[1:], of[:-1], of[1:]):
            return again
        for i, run in enumerate(self._runs):  # of other steps: the fewer looked up in the more
            for some, at in self._pieces(run) if i else ():
                if again := _within(self._runs[:i], some, at):
                    return again
        return _within(self._runs, numbers, of)

    def _pieces(self, run: _Run) -> Iterator[tuple[Tensor, Tensor]]:
        """The numbers of a run and their shards, some at a time."""
        counts = self.table.samples[run.at]
        starts = counts.cumsum(0) - counts
        begin = 0
        while begin < len(counts):
            end = int(torch.searchsorted(starts, starts[begin] + PIECE))
            within = counts[begin:end]
            of = torch.repeat_interleave(torch.arange(begin, end), within)
            place = torch.arange(int(within.sum())) - (starts[of] - starts[begin])
            yield run.first[of] + run.step * place, run.at[of]
            begin = end

    def numbers(self) -> Tensor:
        """All numbers, rising."""
        pieces = [numbers for run in self._runs for numbers, _ in self._pieces(run)]
        return torch.cat([self._numbers, *pieces]).sort().values

    def gaps(self, start: int, stop: int) -> Tensor:
        """The ranges [start, stop) of numbers that no shard has, rising, int64 [R, 2]."""
        plain = next((run for run in self._runs if run.step == 1), None)
        first = plain.first if plain else torch.empty(0, dtype=torch.int64)
        end = plain.last.cummax(0).values + 1 if plain else first
        begins = torch.cat([torch.tensor([start]), end.clamp(start, stop)])
        ends = torch.cat([first.clamp(start, stop), torch.tensor([stop])])
        ranges = torch.stack([begins, ends], 1)[ends > begins]
        if len(self._numbers) or any(run.step != 1 for run in self._runs):
            finer = [self._finer(*pair) for pair in ranges.tolist()]
            ranges = torch.cat([ranges[:0], *finer])
        return ranges

    def _finer(self, start: int, stop: int) -> Tensor:
        pieces = []
        for begin in range(start, stop, PIECE):
            numbers = torch.arange(begin, min(begin + PIECE, stop))
            pieces.append(numbers[self.find(numbers) < 0])
        missing = torch.cat(pieces)
        if not len(missing):
            return torch.empty(0, 2, dtype=torch.int64)
        cut = (missing.diff() > 1).nonzero().flatten()
        none = torch.tensor([], dtype=torch.int64)
        begins = missing[torch.cat([none.new_zeros(1), cut + 1])]
        ends = missing[torch.cat([cut, none.new_tensor([len(missing) - 1])])] + 1
        return torch.stack([begins, ends], 1)


def _look(run: _Run, asked: Tensor, found: Tensor) -> None:
    """Put the run's shards in where they have the numbers asked for."""
    residue = asked % run.step
    keys = residue * run.span + asked // run.step
    place = (torch.searchsorted(run.keys, keys, right=True) - 1).clamp_min_(0)
    first = run.first[place]
    there = (asked >= first) & (asked <= run.last[place]) & (first % run.step == residue)
    torch.where(there, run.at[place], found, out=found)


def _first(
    both: Tensor, numbers: Tensor, one: Tensor, other: Tensor
) -> tuple[int, int, int] | None:
    """The number and the two shards at the first place that is set."""
    if not bool(both.any()):
        return None
    i = int(both.nonzero()[0, 0])
    low, high = sorted((int(one[i]), int(other[i])))
    return int(numbers[i]), low, high


def _within(runs: list[_Run], numbers: Tensor, of: Tensor) -> tuple[int, int, int] | None:
    """A number of shards `of` that one of the runs has too."""
    found = torch.full_like(numbers, -1)
    for run in runs:
        _look(run, numbers, found)
    return _first(found >= 0, numbers, found, of)
