"""Writing a teacher's outputs: checked, encoded, and put away a shard at a time."""

from __future__ import annotations

import bisect
import hashlib
import math
import os
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

import fastkd
from fastkd.arguments.messages import shown

from .atomic_io import Lock, shard_bytes, write_whole
from .format import (
    CacheError,
    CacheSpec,
    Part,
    Shard,
    index_name,
    load_part,
    lock_name,
    save_part,
    settled,
    shard_name,
    tokenizer_name,
)
from .rows import Where, logit_rows, row_counts, topk_rows


class Writer:
    """Writes a teacher's outputs to a folder, a shard at a time; a context manager.

    A shard appears whole or not at all, and so does the index that names it: a kill at any moment
    loses at most the samples since the last shard. A writer opened where one was before goes on
    behind its last shard: `done` is how many samples there are, and what to add comes after them.

    Samples have numbers, by which they are read: rank, rank + ranks, rank + 2 * ranks, ... unless
    `add` is given others. Each rank writes files of its own, so that any number write at once.

    Args:
        path: the cache's folder; made if it is not there.
        vocab_size: V, columns of the teacher's logits.
        k: columns or draws kept of each row, K of the `TopK`s to come; None: all logits.
        model, tokenizer, data: what a reader may ask for: names, or an object with get_vocab() as
            tokenizer, which is known by its vocabulary's hash.
        method: how the K were chosen, "top" or "sample".
        temperature, tail: those of the `TopK`s to come.
        encoding: of log-probabilities: "uint8", "float16", or "counts" for shares of k draws;
            of logits: "float32", "bfloat16", "float16". None: "uint8", "counts" for at most 255
            draws, "float32". The error of each stands in the index, and in `fastkd.teachers.store`.
        rank, ranks: this writer among how many.
        total: samples of a cache that any number of ranks share, one job after another: numbers are
            given to `add`, as `share` deals them, and `ranks` is not. None: as above.
        shard_bytes: a shard is put away when it has this many bytes.

    Raises:
        TypeError, ValueError: an argument of the wrong kind or value.
        CacheError: the folder's cache is damaged, or another one than this.
        BlockingIOError: another writer of this rank lives (not noticed where there are no POSIX
            locks, and the writer is of another process).
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        vocab_size: int,
        k: int | None = None,
        model: str = "",
        tokenizer: Any = "",
        data: str = "",
        method: str = "top",
        temperature: float = 1.0,
        tail: str = "bucket",
        encoding: str | None = None,
        rank: int = 0,
        ranks: int = 1,
        total: int | None = None,
        shard_bytes: int = 2**25,
    ) -> None:
        for name, number, low in (
            ("vocab_size", vocab_size, 1),
            ("k", 1 if k is None else k, 1),
            ("rank", rank, 0),
            ("ranks", ranks, 1),
            ("total", 0 if total is None else total, 0),
            ("shard_bytes", shard_bytes, 1),
        ):
            if isinstance(number, bool) or not isinstance(number, int):
                raise TypeError(f"{name}: got {shown(number)}, expected an integer")
            if number < low:
                raise ValueError(f"{name}: got {number}, expected at least {low}")
        if total is not None and ranks != 1:
            raise ValueError(f"ranks: got {ranks} with total={total}, expected none: they vary")
        if total is None and rank >= ranks:
            raise ValueError(f"rank: got {rank} of {ranks} ranks, expected 0 to {ranks - 1}")
        if vocab_size >= 2**31:
            raise ValueError(f"vocab_size: got {vocab_size}, expected less than 2**31")
        made = settled(k, method, float(temperature), tail, encoding)
        self._plan = CacheSpec(
            model=model,
            tokenizer=tokenizer_name(tokenizer),
            data=data,
            vocab_size=vocab_size,
            k=k,
            ranks=ranks if total is None else None,
            total=total,
            **made,
        )
        self._folder, self._shard_bytes = Path(path), shard_bytes
        self._folder.mkdir(parents=True, exist_ok=True)
        self._process = os.getpid()
        self._lock = Lock(self._folder.resolve() / lock_name(rank))
        try:
            self._part = self._resume(rank)
        except BaseException:
            self._lock.release()
            raise
        self._clear()

    def _resume(self, rank: int) -> Part:
        """This rank's index, or a new one; nothing else of it stays in the folder."""
        for of in dict.fromkeys((0, rank)):  # the first rank's says whether this is the same cache
            path = self._folder / index_name(of)
            if path.exists():
                part = load_part(path)
                if difference := part.spec.other(self._plan):
                    raise CacheError(f"{path}: another cache is there; {difference}")
                self._plan = replace(
                    self._plan, sequences=part.spec.sequences, measured=part.spec.measured
                )
        path = self._folder / index_name(rank)
        part = load_part(path) if path.exists() else Part(self._plan, rank, [])
        for shard in part.shards:
            file = self._folder / shard.file
            size = file.stat().st_size if file.exists() else None
            if size != shard.bytes:
                got = "no such file" if size is None else f"{size} bytes"
                raise CacheError(f"{file}: got {got}, expected the {shard.bytes} bytes written")
        kept = {self._folder / shard.file for shard in part.shards}
        shards = [shard_name(rank, "*", folder=folder) for folder in (True, False)]
        for name in (*shards, index_name(rank)):
            where, _, last = name.rpartition("/")
            for file in (self._folder / where).glob(f".{last}.tmp"):
                file.unlink()
            for file in (self._folder / where).glob(last) if name in shards else ():
                if file not in kept:  # written, but its index was not
                    file.unlink()
        self._taken = sorted((shard.first, shard.last) for shard in part.shards)
        return part

    def _clear(self) -> None:
        self._pieces: list[dict[str, Tensor]] = []
        self._samples: list[int] = []
        self._lengths: list[int] = []
        self._size = 0

    @property
    def done(self) -> int:
        """Samples of this rank in whole shards: where a writer that starts again goes on."""
        return self._part.samples

    @property
    def tokens(self) -> int:
        """Rows of this rank in whole shards."""
        return sum(shard.tokens for shard in self._part.shards)

    @property
    def bytes(self) -> int:
        """Bytes of this rank's whole shards."""
        return sum(shard.bytes for shard in self._part.shards)

    @property
    def bytes_per_token(self) -> float:
        """Of all that was added, in shards or not yet; 0 before the first row."""
        tokens = self.tokens + sum(self._lengths)
        return (self.bytes + self._size) / tokens if tokens else 0.0

    def add(self, output: Any, *, sample: int | None = None) -> None:
        """Add one sample: a `TopK` [L, K] or [K], or logits [L, V] or [V]; see `add_batch`."""
        if not isinstance(output, (Tensor, fastkd.TopK)):
            raise TypeError(f"output: got {type(output).__name__}, expected TopK or a tensor")
        many = output.dim() > 1
        one = output[None] if many else output[None, None]
        self._add(one, None, None if sample is None else [sample], sequences=many)

    def add_batch(
        self, outputs: Any, *, lengths: Any = None, samples: list[int] | None = None
    ) -> None:
        """Add samples of a batch; nothing of it is added if anything is wrong with it.

        Args:
            outputs: a `TopK` [B, L, K] or [B, K], or logits [B, L, V] or [B, V], on any device.
            lengths: B numbers of rows from 0 to L, those that a sample has; None: all L.
            samples: B numbers of samples, rising from one to the next; None: the next in turn.

        Raises:
            TypeError, ValueError: another kind, shape, temperature or tail than the cache's; NaN, a
                log-probability above 0, a row with a mass above 1.001, an index out of range or
                named twice, +inf or what the encoding does not hold. Names the sample and the row.
            OSError: the shard could not be written; what was added waits for `flush`.
        """
        if not isinstance(outputs, (Tensor, fastkd.TopK)):
            raise TypeError(f"outputs: got {type(outputs).__name__}, expected TopK or a tensor")
        if outputs.dim() not in (2, 3):
            got = list(outputs.shape)
            raise ValueError(f"outputs: got shape {got}, expected [B, L, ...] or [B, ...]")
        many = outputs.dim() == 3
        if not many and lengths is not None:
            raise ValueError("lengths: got some for samples of one row each, expected None")
        self._add(outputs if many else outputs[:, None], lengths, samples, sequences=many)

    def _add(
        self, outputs: Any, lengths: Any, samples: list[int] | None, *, sequences: bool
    ) -> None:
        """outputs [B, L, ...]; checks everything before it keeps anything."""
        self._alive()
        spec, size = self._plan, outputs.size(0)
        measured = None
        if isinstance(outputs, fastkd.TopK):
            measured = outputs.tail_logprob is not None
        known = replace(
            spec,
            sequences=spec.sequences if spec.sequences is not None else sequences,
            measured=spec.measured if spec.measured is not None else measured,
        )
        if sequences != known.sequences:
            shapes = ("[K] or [V]", "[L, K] or [L, V]")
            got, wanted = shapes[sequences], shapes[not sequences]
            raise ValueError(f"outputs: got a sample of shape {got}, expected {wanted} as before")
        numbers = self._numbers(samples, size)
        if self._plan.total is not None and self._samples and numbers:
            if numbers[0] != self._samples[-1] + 1:
                self.flush()  # what others have lies between: a shard's samples are a range
        counts = row_counts(lengths, size, outputs.size(1))
        keep = torch.arange(outputs.size(1)) < counts[:, None]
        where = Where(numbers, keep)
        rows = topk_rows(outputs, keep, known, where) if spec.k else None
        piece = rows if rows is not None else logit_rows(outputs, keep, known, where)
        self._plan = known
        self._pieces.append(piece)
        self._samples += numbers
        self._lengths += counts.tolist()
        self._size += sum(x.numel() * x.element_size() for x in piece.values()) + 16 * size
        if self._size >= self._shard_bytes:
            self.flush()

    def _numbers(self, samples: list[int] | None, size: int) -> list[int]:
        shared = self._plan.total is not None
        if shared and samples is None:
            raise ValueError("samples: got None in a shared cache, expected numbers of `share`")
        last = self._samples[-1] if self._samples else None
        if last is None and not shared:
            last = self._part.shards[-1].last if self._part.shards else -1
        if samples is None:
            at = self.done + len(self._samples)
            step = self._plan.ranks or 1
            numbers = [self._part.rank + step * i for i in range(at, at + size)]
        else:
            numbers = [int(sample) for sample in samples]
            if len(numbers) != size:
                raise ValueError(f"samples: got {len(numbers)} numbers, expected {size}")
        if shared and numbers:
            last = self._free(numbers[0], numbers[-1])
        for number in numbers:
            if last is not None and number <= last:
                raise ValueError(
                    f"samples: got {number} after {last}, expected a greater one: a rank's "
                    "samples rise, and none is there twice"
                )
            last = number
        return numbers

    def _free(self, first: int, last: int) -> int:
        """What lies before `first` in a shared cache, all of first .. last not yet written here."""
        total = self._plan.total or 0
        if not 0 <= first <= last < total:
            raise ValueError(f"samples: got {first} to {last}, expected rising ones below {total}")
        taken = [*self._taken]
        if self._samples:
            bisect.insort(taken, (self._samples[0], self._samples[-1]))
        at = bisect.bisect(taken, (last, math.inf)) - 1
        if at >= 0 and taken[at][1] >= first:
            raise ValueError(
                f"samples: got {first} to {last}, expected none of {taken[at][0]} to "
                f"{taken[at][1]}, which this rank has"
            )
        return first - 1

    def flush(self) -> None:
        """Put away what was added as a shard, however small; nothing if there is nothing.

        Raises:
            OSError: names the file; all shards before it can be read, and what was added is kept
                here for another `flush`.
        """
        self._alive()
        if not self._samples:
            return
        samples = torch.tensor(self._samples)
        steps = samples.diff()
        step = int(steps[0]) if len(steps) else 1
        tensors = {
            name: torch.cat([piece[name] for piece in self._pieces]) for name in self._pieces[0]
        }
        ends = torch.tensor(self._lengths).cumsum(0)
        data = shard_bytes({**tensors, "ends": ends, "samples": samples})
        shard = Shard(
            file=shard_name(self._part.rank, len(self._part.shards), folder=self._plan.ranks != 1),
            samples=len(samples),
            tokens=int(ends[-1]),
            bytes=len(data),
            sha256=hashlib.sha256(data).hexdigest(),
            first=self._samples[0],
            last=self._samples[-1],
            step=step if bool((steps == step).all()) else 0,
        )
        file = self._folder / shard.file
        file.parent.mkdir(exist_ok=True)
        write_whole(file, data)
        part = replace(self._part, spec=self._plan, shards=[*self._part.shards, shard])
        part.complete = False
        save_part(self._folder, part)
        self._part = part
        bisect.insort(self._taken, (shard.first, shard.last))
        self._clear()

    def close(self) -> None:
        """`flush`, say in the index that this rank is complete, and let others write to it."""
        if not self._lock.held:
            return
        try:
            self.flush()
            self._part = replace(self._part, spec=self._plan, complete=True)
            save_part(self._folder, self._part)
        finally:
            self._lock.release()

    def _alive(self) -> None:
        if os.getpid() != self._process:
            raise RuntimeError("got a Writer of another process, expected one made in this one")
        if not self._lock.held:
            raise ValueError(f"{self._folder}: the writer is closed")

    def __enter__(self) -> Writer:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is None:
            self.close()
            return
        try:
            if self._lock.held and not isinstance(error, OSError):
                self.flush()  # interrupted: what was added is sound
        finally:
            self._lock.release()
