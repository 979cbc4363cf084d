"""Reading a teacher's outputs: any sample, in any order, from any number of processes."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

import fastkd
from fastkd.arguments.messages import MadeOf, listed, shown
from fastkd.arguments.numbers import integer
from fastkd.distill.logging import progress_bar
from fastkd.teachers.files import CacheError, fault
from fastkd.teachers.heads import StoredLogits, head_in
from fastkd.teachers.pairs import teachers
from fastkd.teachers.same import tokenizer_name

from . import format as fmt
from .codec import decode, decode_hidden, unpack

OPEN_SHARDS = 64  # mapped at a time by a process


class Reader(MadeOf, Dataset[Any]):
    """A cache by sample number: `reader[i]` is a `TopK` [L, K] or [K], or logits of either shape.

    A map-style dataset for any number of workers, which map a shard where it is first asked for;
    hidden states are `fastkd.LinearLogits`. `spec` tells what was there when it was opened.

    Args:
        path: a cache's folder.
        vocab_size, tokenizer, model, data: what the cache must be made for, as `Writer` takes it.

    Raises:
        FileNotFoundError: no cache there.
        CacheError: a cache that is damaged, of another version, or for something else.
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
        self.shards = fmt.listed(self.path)
        if not self.shards:
            raise FileNotFoundError(f"{self.path}: no teacher cache there: no {fmt.SHARDS}")
        self.spec = spec = fmt.opened(self.shards[0].file)[0]
        asked = {"vocab_size": vocab_size, "model": model, "data": data}
        asked["tokenizer"] = None if tokenizer is None else tokenizer_name(tokenizer)
        for key, wanted in asked.items():
            if wanted is not None and wanted != (got := getattr(spec, key)):
                raise CacheError(f"{self.path}: made for {key}={got!r}, expected {wanted!r}")
        self.head = head_in(self.path, spec.vocab_size, spec.head) if spec.head else None
        self._spans = torch.tensor([(shard.first, shard.last) for shard in self.shards])
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
        return fmt.merged(self.path) == [shard.file.name for shard in self.shards]

    def covers(self, size: int) -> bool:
        """The samples are 0 to size - 1, each once."""
        return self.shards[0].first == 0 and self.shards[-1].last + 1 == len(self) == size

    def __iter__(self) -> Iterator[Any]:
        yield from map(self.__getitem__, self.numbers.tolist())

    def __getitem__(self, number: int) -> Any:
        return self.__getitems__([number])[0]

    def __getitems__(self, numbers: Sequence[int]) -> list[Any]:
        """The samples of these numbers, decoded together; IndexError: one is not there."""
        if not len(numbers):
            return []
        given = [x.item() if isinstance(x, Tensor) else x for x in numbers]
        if wrong := [x for x in given if integer(x) is None]:
            raise TypeError(f"sample: got {shown(wrong[0])}, expected its number, an integer")
        pa, asked = fmt.needed("pyarrow"), torch.as_tensor([int(x) for x in given])
        of = torch.searchsorted(self._spans[:, 0].contiguous(), asked, right=True) - 1
        for number in asked[(of < 0) | (asked > self._spans[of, 1])].tolist():
            there = f"{len(self)} samples with numbers up to {self.shards[-1].last}"
            raise IndexError(f"{self.path}: sample {number} is not in the cache of {there}")
        places, parts = asked - self._spans[of, 0], []
        for at in of.unique().tolist():
            parts.append(self._batch(at).take(pa.array(places[of == at].numpy())))
        table = pa.Table.from_batches(parts)
        if len(parts) > 1:
            back = pa.array(of.argsort(stable=True).argsort().numpy())
            table = table.combine_chunks().take(back)
        return self.decode(table)

    def batch(self, numbers: Sequence[int]) -> Any:
        """The samples of these numbers as one, padded: what `collate` makes of them."""
        return teachers(self.__getitems__(numbers))

    def decode(self, table: Any) -> list[Any]:
        """The samples of a pyarrow Table (or RecordBatch) of this cache's rows, whoever read it."""
        np, pa, spec = fmt.needed("numpy"), fmt.needed("pyarrow"), self.spec
        table = pa.Table.from_batches([table]) if isinstance(table, pa.RecordBatch) else table
        if not isinstance(table, pa.Table):
            wanted = "a pyarrow Table: dataset.with_format('arrow')[:8] of a datasets.Dataset"
            raise TypeError(f"table: got {shown(table)}, expected {wanted}")
        if missing := {"sample", "rows", *spec.columns} - {*table.column_names}:
            got, wanted = listed(table.column_names), listed(sorted(missing))
            raise ValueError(f"table: got the columns {got}, expected {wanted} too")
        rows = table["rows"].to_pylist()
        stored: dict[str, Any] = {"level": None, "tail_logprob": None, "row_scale": None}
        for name, (kind, width) in spec.columns.items():
            column = table[name].combine_chunks()
            if kind == "binary":
                flat = np.frombuffer(bytearray(b"".join(column.to_pylist())), np.uint8)
            else:
                flat = np.array(column.flatten().to_numpy())
            flat = torch.from_numpy(flat)
            single = name in ("level", "tail_logprob", "row_scale")
            stored[name] = flat.float() if single else flat.view(sum(rows), width)
        output: Any
        if spec.k is None:
            output = stored["logits" if self.head is None else "hidden"]
            as_dtype = {"bfloat16": torch.bfloat16, "int8": torch.int8}.get(spec.encoding)
            output = output if as_dtype is None else output.view(as_dtype)
            if self.head is not None:
                hidden = decode_hidden(output, stored["row_scale"], self.head.facts["dtype"])
                output = StoredLogits(hidden, self.head)
        else:
            indices = stored["indices"]
            if spec.encoding != "plain":
                indices = unpack(indices, spec.k, spec.vocab_size)
            if indices.numel() and not -1 <= indices.min() <= indices.max() < spec.vocab_size:
                first = table["sample"][0].as_py()
                file = next(x.file for x in self.shards if x.first <= first <= x.last)
                raise CacheError(f"{file} or another: altered: got index {int(indices.max())}")
            logprobs = decode(stored["logprobs"], stored["level"], spec.encoding)
            of: dict[str, Any] = {"temperature": spec.temperature, "tail": spec.tail}
            output = fastkd.TopK(logprobs, indices, tail_logprob=stored["tail_logprob"], **of)
        if not spec.sequences:
            return [output[row] for row in range(len(rows))]
        ends = torch.tensor(rows).cumsum(0).tolist()
        return [output[end - size : end] for end, size in zip(ends, rows, strict=True)]

    def _batch(self, at: int) -> Any:
        """A shard, mapped, not read."""
        if at not in self._open:
            self._open[at] = fmt.batch_of(self.shards[at], self.spec)
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
        """Read every byte; CacheError names every file that is missing or not as it was written."""
        if faults := list(self.faults(progress=progress)):
            raise CacheError("; ".join(faults))

    def faults(self, *, progress: bool = False) -> Iterator[str]:
        """As `verify`, a line for each file."""
        try:
            for name in set(fmt.merged(self.path)) - {shard.file.name for shard in self.shards}:
                yield f"{self.path / name}: got no such file, which {fmt.STATE} names"
        except CacheError as error:
            yield str(error)
        if self.head is not None and (wrong := self.head.fault()):
            yield wrong
        for shard in progress_bar(progress, self.shards, desc="verify", unit="shard"):
            if wrong := fault(shard.file, shard.sha256):
                yield wrong
                continue
            try:
                fmt.batch_of(shard, self.spec)
            except CacheError as error:
                yield str(error)

    def facts(self) -> dict[str, Any]:
        """What is in the cache, JSON-ready; opens all shards."""
        size, tokens = sum(shard.file.stat().st_size for shard in self.shards), self.tokens
        spec = {name: x for name, x in asdict(self.spec).items() if name != "head" or x}
        made = {"path": str(self.path), "version": fmt.VERSION, "teacher": spec}
        made |= {"error": self.spec.error, "samples": len(self), "tokens": tokens, "bytes": size}
        made |= {"shards": len(self.shards), "complete": self.complete, "merged": self.merged}
        return {**made, "bytes_per_token": size / tokens if tokens else None}

    def to_parquet(self, folder: str | os.PathLike[str]) -> None:
        """Write each shard as a Parquet file, float16 as float32 (for Spark), and the head."""
        pa, write = fmt.needed("pyarrow"), fmt.needed("pyarrow.parquet").write_table
        Path(folder).mkdir(parents=True, exist_ok=True)
        half, single = pa.list_(pa.float16()), pa.list_(pa.float32())
        for shard in self.shards:
            stream = fmt.opened(shard.file)[1]
            fields = [x.with_type(single) if x.type == half else x for x in stream.schema]
            table = stream.read_all().cast(pa.schema(fields, stream.schema.metadata))
            write(table, Path(folder, f"{shard.file.stem}.parquet"))
        if self.head is not None:
            shutil.copy(self.head.file, folder)
