"""Reading a teacher's outputs: any sample, in any order, from any number of processes."""

from __future__ import annotations

import hashlib
import json
import os
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

import fastkd
from fastkd.distill.logging import progress_bar
from fastkd.distill.serialization import array

from .atomic_io import file_hash, needed
from .codec import decode, unpack
from .format import CacheError, Part, Shard, Spelled, index_name, load_part, tokenizer_name
from .index import Places
from .merged_index import contents, places
from .padding import teachers

OPEN_SHARDS = 64  # mapped at a time by a process


class Reader(Dataset[Any]):
    """A cache by sample number: `reader[i]` is a `TopK` [L, K] or [K], or logits [L, V] or [V].

    A map-style dataset for a DataLoader with any number of workers, forked or spawned; shards are
    mapped into memory where they are first asked for. It holds what was whole when it was opened.

    Args:
        path: a cache's folder.
        vocab_size, tokenizer, model, data: what the cache must have been made for; None: anything.
            tokenizer may be an object with get_vocab().

    Raises:
        FileNotFoundError: no cache there.
        CacheError: a cache of another version or for something else, an altered index, or indexes
            that do not belong together.

    `spec` tells what the cache holds: vocab_size, k, method, temperature, tail, encoding, ...
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        vocab_size: int | None = None,
        tokenizer: Any = None,
        model: str | None = None,
        data: str | None = None,
    ) -> None:
        self.path = Path(path)
        found = contents(self.path)
        spec = found.spec
        name = None if tokenizer is None else tokenizer_name(tokenizer)
        asked = {"vocab_size": vocab_size, "tokenizer": name, "model": model, "data": data}
        for key, wanted in asked.items():
            if wanted is not None and wanted != (got := getattr(spec, key)):
                raise CacheError(f"{self.path}: made for {key}={got!r}, expected {wanted!r}")
        self.spec, self.contents, self.table = spec, found, found.table
        self._open: OrderedDict[int, dict[str, Tensor]] = OrderedDict()
        self._places: Places | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": OrderedDict(), "_places": None}

    def __len__(self) -> int:
        return int(self.table.samples.sum())

    @property
    def tokens(self) -> int:
        """Rows of all samples."""
        return int(self.table.tokens.sum())

    @property
    def complete(self) -> bool:
        """Every rank has written all it had, or all ranks what they share."""
        return self.contents.complete

    @property
    def numbers(self) -> Tensor:
        """The samples' numbers, rising, [len(self)] int64; 0 to len - 1 in a complete cache."""
        return self.check().numbers()

    def __iter__(self) -> Iterator[Any]:
        for number in self.numbers.tolist():
            yield self[number]

    def __getitem__(self, number: int) -> Any:
        return self.__getitems__([number])[0]

    def __getitems__(self, numbers: Sequence[int]) -> list[Any]:
        """The samples of these numbers, decoded together: what a DataLoader asks for.

        Raises:
            IndexError: a number that is not there.
            CacheError: a damaged shard, as far as reading shows it; `verify` shows all.
        """
        if not len(numbers):
            return []
        output, lengths = self._rows(torch.as_tensor(list(numbers), dtype=torch.int64))
        if not self.spec.sequences:
            return [output[row] for row in range(len(lengths))]
        ends = lengths.cumsum(0).tolist()
        return [output[end - size : end] for end, size in zip(ends, lengths.tolist(), strict=True)]

    def batch(self, numbers: Sequence[int]) -> Any:
        """The samples of these numbers as one, padded: what `collate` makes of them."""
        return teachers(self.__getitems__(numbers))

    def identity(self) -> dict[str, Any]:
        """Which cache this is, in a checkpoint: what it is of, and a hash of its shards' hashes."""
        digests = bytes(array(self.table.sha256.flatten(), "a teacher cache"))
        shards = json.dumps([digests[i : i + 32].hex() for i in range(0, len(digests), 32)])
        made = {key: getattr(self.spec, key) for key in ("model", "tokenizer", "data")}
        return {**made, "shards": hashlib.sha256(shards.encode()).hexdigest()}

    def verify(self, *, progress: bool = False) -> None:
        """Read every byte and compare the shards' hashes with the indexes'.

        Raises:
            CacheError: names every file that is missing or altered.
        """
        faults = list(self.faults(progress=progress))
        if faults:
            raise CacheError("; ".join(faults))

    def faults(self, *, progress: bool = False) -> Iterator[str]:
        """As `verify`, a line for each file that is not as it was written."""
        for source in self.contents.sources:
            file = self.path / index_name(source.rank)
            try:  # it may have grown since; what it says of the shards below is in their hashes
                part = load_part(file)
                if part.size == source.size and part.sha256 != source.sha256:
                    yield f"{file}: altered after it was merged (its hash differs)"
            except (OSError, CacheError) as error:
                yield str(error)
        shown: dict[str, Any] = {
            "total": self._bytes,
            "unit": "B",
            "unit_scale": True,
        }
        with progress_bar(progress, desc="verify", **shown) as bar:
            for shard in map(self.table.shard, range(len(self.table))):
                file = self.path / shard.file
                try:
                    digest = file_hash(file, bar.update)
                except OSError as error:
                    yield f"{file}: cannot be read ({error.strerror})"
                    continue
                if digest != shard.sha256:
                    yield f"{file}: altered after it was written (its hash differs)"

    @property
    def _bytes(self) -> int:
        return int(self.table.bytes.sum())

    def facts(self) -> dict[str, Any]:
        """What is in the cache, JSON-ready."""
        size, sources = self._bytes, self.contents.sources
        document = Part(self.spec, sources[0].rank, []).document()
        return {
            "path": str(self.path),
            **{name: document[name] for name in ("format", "version", "bound")},
            "teacher": asdict(self.spec),
            "samples": len(self),
            "tokens": self.tokens,
            "bytes": size,
            "bytes_per_token": size / self.tokens if self.tokens else None,
            "shards": len(self.table),
            "complete": self.complete,
            "merged": self.contents.checked,
            "ranks_present": len(sources),
            "ranks_complete": sum(source.complete for source in sources),
        }

    # ---- where a sample is

    def check(self) -> Places:
        """Where each sample is; CacheError where one is there twice."""
        if self._places is None:
            listed = lambda at: self._tensors(at)["samples"]  # noqa: E731
            self._places = places(self.path, self.contents, listed)
        return self._places

    def covers(self, size: int) -> bool:
        """The samples are 0 to size - 1, each once."""
        self.check()
        whole = len(self) == size and (not size or int(self.table.last.max()) == size - 1)
        return whole and (not size or int(self.table.first.min()) == 0)

    def of_shard(self, at: int) -> Tensor:
        """The numbers of a shard's samples, rising."""
        table = self.table
        if step := int(table.step[at]):
            return int(table.first[at]) + step * torch.arange(int(table.samples[at]))
        return self._tensors(at)["samples"]

    def _tensors(self, at: int) -> dict[str, Tensor]:
        """A shard's tensors, mapped, not read."""
        if at in self._open:
            self._open.move_to_end(at)
            return self._open[at]
        shard = self.table.shard(at)
        tensors = _map(self.path / shard.file, shard, self.spec.shapes)
        self._open[at] = tensors
        while len(self._open) > OPEN_SHARDS:
            self._open.popitem(last=False)
        return tensors

    # ---- what it is

    def _rows(self, asked: Tensor) -> tuple[Any, Tensor]:
        """The rows of the samples asked for, one after the other, and how many each has."""
        of = self.check().find(asked)
        if bool((of < 0).any()):
            number = int(asked[of < 0][0])
            most = int(self.table.last.max()) if len(self.table) else -1
            there = f"{len(self)} samples with numbers up to {most}"
            raise IndexError(f"{self.path}: sample {number} is not in the cache of {there}")
        start, length = torch.empty_like(asked), torch.empty_like(asked)
        used = of.unique().tolist()
        for at in used:
            mine, tensors = of == at, self._tensors(at)
            step, first = int(self.table.step[at]), int(self.table.first[at])
            numbers = asked[mine]
            position = (
                (numbers - first) // step
                if step
                else torch.searchsorted(tensors["samples"], numbers)
            )
            ends = tensors["ends"]
            begins = torch.where(position > 0, ends[(position - 1).clamp_min_(0)], 0)
            start[mine], length[mine] = begins, ends[position] - begins
        total = int(length.sum())
        target = length.cumsum(0) - length
        stored: dict[str, Tensor] = {}
        for at in used:
            mine, tensors = of == at, self._tensors(at)
            source = _ranges(start[mine], length[mine])
            target_rows = _ranges(target[mine], length[mine])
            for name, x in tensors.items():
                if name in ("ends", "samples"):
                    continue
                rows = x.index_select(0, source)
                if len(used) == 1:
                    stored[name] = rows
                    continue
                if name not in stored:
                    stored[name] = x.new_zeros((total, *x.shape[1:]))
                stored[name].index_copy_(0, target_rows, rows)
        return self._decoded(stored, [self.table.shard(at) for at in used]), length

    def _decoded(self, stored: dict[str, Tensor], shards: list[Shard]) -> Any:
        spec = self.spec
        if spec.k is None:
            return stored["logits"]
        indices = unpack(stored["indices"], spec.k, spec.vocab_size)
        if indices.numel() and int(indices.max()) >= spec.vocab_size:
            files = " or ".join(str(self.path / shard.file) for shard in shards)
            raise CacheError(f"{files}: altered: got an index of {int(indices.max())}")
        tail = stored["tail_logprob"].float() if spec.measured else None
        return fastkd.TopK(
            decode(stored, spec.encoding),
            indices,
            tail_logprob=tail,
            temperature=spec.temperature,
            tail=spec.tail,  # type: ignore[arg-type]
        )


def _ranges(starts: Tensor, lengths: Tensor) -> Tensor:
    """starts[0], starts[0] + 1, ... lengths[0] of them, then those of the next."""
    before = lengths.cumsum(0) - lengths
    return torch.repeat_interleave(starts - before, lengths) + torch.arange(int(lengths.sum()))


def _map(file: Path, shard: Shard, shapes: Spelled) -> dict[str, Tensor]:
    """The tensors of a shard's file, checked against what the index says of them."""
    size = file.stat().st_size if file.exists() else None
    if size != shard.bytes:
        what = "no such file" if size is None else f"{size} bytes"
        raise CacheError(f"{file}: got {what}, expected the {shard.bytes} bytes written")
    try:
        with needed("safetensors").safe_open(file, framework="pt") as opened:
            got: Spelled = {}
            for name in opened.keys():
                of = opened.get_slice(name)
                got[name] = (of.get_dtype(), tuple(of.get_shape()))
            count = {"ends": shard.samples, "samples": shard.samples}
            wanted = {
                name: (dtype, (count.get(name, shard.tokens), *shape))
                for name, (dtype, shape) in shapes.items()
            }
            if got != wanted:
                raise CacheError(f"{file}: altered: got tensors {got}, expected {wanted}")
            tensors = {name: opened.get_tensor(name) for name in wanted}
    except (OSError, ImportError, CacheError):
        raise
    except Exception as error:  # safetensors has an error of its own, which is no other's
        raise CacheError(f"{file}: altered: no safetensors file ({error})") from None
    ends, samples = tensors["ends"], tensors["samples"]
    whole = int(ends[-1]) == shard.tokens and int(ends[0]) >= 0 and bool((ends.diff() >= 0).all())
    rising = bool((samples.diff() > 0).all())
    named = (int(samples[0]), int(samples[-1])) == (shard.first, shard.last)
    if not (whole and rising and named):
        raise CacheError(f"{file}: altered: samples or their ends are not as the index says")
    return tensors
