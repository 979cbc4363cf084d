"""Reading a teacher's outputs: any sample, in any order, from any number of processes."""

from __future__ import annotations

import hashlib
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

from .codec import ERRORS, decode, unpack
from .files import file_hash, needed
from .format import (
    SHARDS,
    STATE,
    VERSION,
    CacheError,
    batch_of,
    listed,
    merged,
    opened,
    tokenizer_name,
)
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
        CacheError: a cache of another version or for something else, a damaged one, or a sample in
            two shards.

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
        self.shards = listed(self.path)
        if not self.shards:
            raise FileNotFoundError(f"{self.path}: no teacher cache there: no {SHARDS}")
        self.spec = opened(self.shards[0].file)[0]
        name = None if tokenizer is None else tokenizer_name(tokenizer)
        asked = {"vocab_size": vocab_size, "tokenizer": name, "model": model, "data": data}
        for key, wanted in asked.items():
            if wanted is not None and wanted != (got := getattr(self.spec, key)):
                raise CacheError(f"{self.path}: made for {key}={got!r}, expected {wanted!r}")
        self._first = torch.tensor([shard.first for shard in self.shards])
        self._open: OrderedDict[int, Any] = OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": OrderedDict()}

    def __len__(self) -> int:
        return sum(shard.last + 1 - shard.first for shard in self.shards)

    @property
    def tokens(self) -> int:
        """Rows of all samples; opens all shards."""
        return sum(int(self._batch(at)["rows"].to_numpy().sum()) for at in range(len(self.shards)))

    @property
    def numbers(self) -> Tensor:
        """The samples' numbers, rising, [len(self)] int64; 0 to len - 1 in a complete cache."""
        return torch.cat([torch.arange(shard.first, shard.last + 1) for shard in self.shards])

    @property
    def complete(self) -> bool:
        """All samples are there; where nobody knew how many, the last writer came to its end."""
        return self.merged if self.spec.total is None else self.covers(self.spec.total)

    @property
    def merged(self) -> bool:
        """`state.json` names all shards."""
        return merged(self.path) == [shard.file.name for shard in self.shards]

    def covers(self, size: int) -> bool:
        """The samples are 0 to size - 1, each once."""
        return self.shards[0].first == 0 and self.shards[-1].last + 1 == len(self) == size

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
        pa, asked = needed("pyarrow"), torch.as_tensor(list(numbers))
        of = torch.searchsorted(self._first, asked, right=True) - 1
        parts, places = [], []
        for at in of.unique().tolist():
            mine = (of == at).nonzero().flatten()
            shard = self.shards[at]
            wrong = asked[mine][(asked[mine] > shard.last) | (of[mine] < 0)].tolist()
            if wrong:
                there = f"{len(self)} samples with numbers up to {self.shards[-1].last}"
                raise IndexError(f"{self.path}: sample {wrong[0]} is not in the cache of {there}")
            parts.append(self._batch(at).take(pa.array((asked[mine] - shard.first).numpy())))
            places.append(mine)
        table = pa.Table.from_batches(parts)
        if len(parts) > 1:
            table = table.combine_chunks().take(pa.array(torch.cat(places).argsort().numpy()))
        return self.decode(table)

    def batch(self, numbers: Sequence[int]) -> Any:
        """The samples of these numbers as one, padded: what `collate` makes of them."""
        return teachers(self.__getitems__(numbers))

    def decode(self, table: Any) -> list[Any]:
        """The samples in rows of this cache that another library read, shuffled or streamed.

        Args:
            table: a pyarrow Table with the cache's columns.

        Raises:
            CacheError: an index out of range: a shard is damaged.
        """
        np, spec = needed("numpy"), self.spec
        counts = table["rows"].to_pylist()
        stored: dict[str, Tensor] = {}
        for name, (kind, width) in spec.columns.items():
            column = table[name].combine_chunks()
            if kind == "binary":
                flat = np.frombuffer(bytearray(b"".join(column.to_pylist())), np.uint8)
            else:
                flat = np.array(column.flatten().to_numpy())
            stored[name] = torch.from_numpy(flat).view(sum(counts), width)
        if spec.k is None:
            wide = spec.encoding == "bfloat16"
            output: Any = stored["logits"].view(torch.bfloat16) if wide else stored["logits"]
        else:
            indices = stored["indices"]
            if spec.encoding != "plain":
                indices = unpack(indices, spec.k, spec.vocab_size)
            if indices.numel() and not -1 <= indices.min() <= indices.max() < spec.vocab_size:
                numbers = table["sample"].to_pylist()
                of = (x for x in self.shards if any(x.first <= i <= x.last for i in numbers))
                names = " or ".join(str(shard.file) for shard, _ in zip(of, range(3), strict=False))
                raise CacheError(f"{names}: altered: got an index of {int(indices.max())}")
            level, tail = (
                stored[name].float().squeeze(-1) if name in stored else None
                for name in ("level", "tail_logprob")
            )
            logprobs = decode(stored["logprobs"], level, spec.encoding)
            kind_: Any = {"temperature": spec.temperature, "tail": spec.tail}
            output = fastkd.TopK(logprobs, indices, tail_logprob=tail, **kind_)
        if not spec.sequences:
            return [output[row] for row in range(len(counts))]
        ends = torch.tensor(counts).cumsum(0).tolist()
        return [output[end - size : end] for end, size in zip(ends, counts, strict=True)]

    def _batch(self, at: int) -> Any:
        """A shard, mapped, not read."""
        if at not in self._open:
            self._open[at] = batch_of(self.shards[at], self.spec)
        self._open.move_to_end(at)
        while len(self._open) > OPEN_SHARDS:
            self._open.popitem(last=False)
        return self._open[at]

    def identity(self) -> dict[str, Any]:
        """Which cache this is, in a checkpoint: what it is of, and a hash of its shards' hashes."""
        made = {key: getattr(self.spec, key) for key in ("model", "tokenizer", "data")}
        digests = "".join(shard.sha256 for shard in self.shards)
        return {**made, "shards": hashlib.sha256(digests.encode()).hexdigest()}

    def verify(self, *, progress: bool = False) -> None:
        """Read every byte and compare the hashes with those that were written.

        Raises:
            CacheError: names every file that is missing or altered.
        """
        if faults := list(self.faults(progress=progress)):
            raise CacheError("; ".join(faults))

    def faults(self, *, progress: bool = False) -> Iterator[str]:
        """As `verify`, a line for each file that is not as it was written."""
        try:
            for name in set(merged(self.path)) - {shard.file.name for shard in self.shards}:
                yield f"{self.path / name}: got no such file, which {STATE} names"
        except CacheError as error:
            yield str(error)
        for shard in progress_bar(progress, self.shards, desc="verify", unit="shard"):
            try:
                if file_hash(shard.file) != shard.sha256:
                    yield f"{shard.file}: altered after it was written (its hash differs)"
                else:
                    batch_of(shard, self.spec)
            except OSError as error:
                yield f"{shard.file}: cannot be read ({error.strerror})"
            except CacheError as error:
                yield str(error)

    def facts(self) -> dict[str, Any]:
        """What is in the cache, JSON-ready; opens all shards."""
        size, tokens = sum(shard.file.stat().st_size for shard in self.shards), self.tokens
        return {
            **{"path": str(self.path), "version": VERSION, "teacher": asdict(self.spec)},
            **{"error": ERRORS[self.spec.encoding], "samples": len(self), "tokens": tokens},
            **{"bytes": size, "bytes_per_token": size / tokens if tokens else None},
            **{"shards": len(self.shards), "ranks": len({x.rank for x in self.shards})},
            **{"complete": self.complete, "merged": self.merged},
        }

    def to_parquet(self, folder: str | os.PathLike[str]) -> None:
        """Write each shard as a Parquet file of the same columns into an existing folder."""
        for shard in self.shards:
            table = opened(shard.file)[1].read_all()
            needed("pyarrow.parquet").write_table(
                table, Path(folder) / f"{shard.file.stem}.parquet"
            )
