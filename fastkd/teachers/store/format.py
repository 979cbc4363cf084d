"""A cache's folder: Arrow IPC streams, whose names say what they have and their hash.

    teacher-RRRRR-FIRST-LAST-SHA256.arrow  of rank R: one record batch, a row for each sample
    head-SHA256.safetensors                of hidden states alone
    state.json, dataset_info.json          all of them, for `datasets.load_from_disk`
    .lock-RRRRR                            empty; locked while a writer of rank R lives

README.md names the columns, `CacheSpec.columns` their kinds. No file is ever changed.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
import os
import re
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastkd.arguments.messages import shown
from fastkd.arguments.numbers import integer
from fastkd.distill import serialization
from fastkd.teachers.files import CacheError, write_whole

from .codec import ENCODINGS, ERRORS, HIDDEN, LOGITS, MOST_DRAWS, hidden_step

VERSION, STATE, INFO, SHARDS = 4, "state.json", "dataset_info.json", "teacher-*.arrow"
TAILS = ("bucket", "renormalize", "restrict", "drop")
needed = functools.partial(serialization.needed, user="a teacher cache", extra="store")


@dataclass(frozen=True)
class CacheSpec:
    """What a cache holds: equal in all of its shards."""

    model: str
    tokenizer: str
    data: str
    vocab_size: int
    k: int | None  # None: all logits
    method: str
    temperature: float
    tail: str | None
    encoding: str  # of hidden states None before the first
    total: int | None  # samples of all ranks, where it is known
    sequences: bool | None = None  # a sample has rows [L, ...], not one; None before the first
    measured: bool | None = None  # with tail_logprob
    head: dict[str, Any] | None = None  # of hidden states, once; None before the first

    def other(self, spec: CacheSpec) -> str | None:
        """The first difference, as "name: got this, expected that"; what is None is not known."""
        for name in (field.name for field in fields(self)):
            got, wanted = getattr(spec, name), getattr(self, name)
            open_ = name in ("sequences", "measured", "head", "encoding") and None in (got, wanted)
            if got != wanted and not open_:
                return f"{name}: got {shown(got)}, expected {wanted!r}"
        return None

    @property
    def columns(self) -> dict[str, tuple[str, int]]:
        """Of each column the kind of its numbers, and how many a row has."""
        if self.k is None:
            size = self.vocab_size if self.head is None else self.head["hidden_size"]
            bytes_of = {"bfloat16": 2, "int8": 1}.get(self.encoding)  # Arrow has no bfloat16
            kind = ("binary", bytes_of * size) if bytes_of else (self.encoding, size)
            scales = {"row_scale": ("float32", 1)} if self.encoding == "int8" else {}
            return {"logits" if self.head is None else "hidden": kind, **scales}
        plain, size = self.encoding == "plain", -(-self.k * self.vocab_size.bit_length() // 8)
        made = {"indices": ("int32", self.k) if plain else ("binary", size)}
        made |= {"logprobs": ("float32" if plain else "binary", self.k)}
        made |= {"level": ("float32", 1)} if self.encoding == "uint8" else {}
        tail = {"tail_logprob": ("float32" if plain else "float16", 1)}
        return made | (tail if self.measured else {})

    @property
    def error(self) -> str:
        """|stored - given| is at most this; of hidden states that of a logit."""
        if self.head is None:
            return ERRORS[self.encoding]
        step, floor = hidden_step(self.encoding, self.head["dtype"])
        most = [f"{self.head['row_norm'] * x:.6g}" for x in (step, floor)]
        return f"{most[0]} * max |hidden| + {most[1]} of a logit" if step else "0 of a logit"

    def schema(self) -> Any:
        """The columns in Arrow's words."""
        pa = needed("pyarrow")
        of = {name: getattr(pa, kind)() for name, (kind, _) in self.columns.items()}
        made = [(x, kind if kind == pa.binary() else pa.list_(kind)) for x, kind in of.items()]
        return pa.schema([("sample", pa.int64()), ("rows", pa.int32()), *made])

    def checked(self) -> CacheSpec:
        """The same with its defaults; an error where a field is wrong or does not fit another."""
        heat, encoding, hidden = self.temperature, self.encoding, self.method == "hidden"
        whole: dict[str, Any] = {"vocab_size": (1, 2**31), "k": (1, 2**31), "total": (0, 2**40)}
        for name, (low, stop) in whole.items():
            given, whole[name] = getattr(self, name), (number := integer(getattr(self, name)))
            if given is not None or name == "vocab_size":
                if number is None or not low <= number < stop:
                    raise ValueError(f"{name}: got {shown(given)}, expected {low} to {stop - 1}")
        k = whole["k"]
        if not isinstance(heat, (int, float)) or not 1e-18 <= heat <= 1e18:
            raise ValueError(f"temperature: got {shown(heat)}, expected a positive finite number")
        if k is None and heat != 1.0:
            raise ValueError(f"k: got None with temperature={heat:g}; all logits have none")
        if hidden and k is not None:
            raise ValueError(f"k: got {k} with method='hidden', expected None: a head has them all")
        few = self.method == "sample" and k is not None and k <= MOST_DRAWS
        if encoding is None and not hidden:
            encoding = "float32" if k is None else "counts" if few else "uint8"
        encodings: Any = ENCODINGS[: 2 + few] if k else (None, *HIDDEN) if hidden else (*LOGITS,)
        for name, got, names in (
            ("method", self.method, ("top", "sample") if k else ("top", "logits", "hidden")),
            ("tail", self.tail, TAILS if k else (*TAILS, None)),
            ("encoding", encoding, encodings),
        ):
            if not isinstance(got, (str, type(None))) or got not in names:
                of = f"method={shown(self.method)}, k={k}"
                raise ValueError(f"{name}: got {shown(got)} with {of}, expected one of {names}")
        only: dict[str, Any] = {} if k else {"tail": None}
        only |= {} if k or hidden else {"method": "logits"}
        return replace(self, encoding=encoding, temperature=float(heat), **whole, **only)


class Shard(NamedTuple):
    """What a file's name says of it."""

    first: int
    last: int
    rank: int
    sha256: str
    file: Path


def shard_name(rank: int, first: int, last: int, digest: str) -> str:
    return f"teacher-{rank:05d}-{first:012d}-{last:012d}-{digest}.arrow"


def listed(folder: Path) -> list[Shard]:
    """A folder's shards, by their first samples; CacheError: one is in two of them (names both)."""
    found = []
    for file in folder.glob(SHARDS):
        try:
            _, rank, first, last, digest = file.stem.split("-")
            found.append(Shard(int(first), int(last), int(rank), digest, file))
        except ValueError:
            raise CacheError(f"{file}: got another name than a shard has") from None
    found.sort()
    for one, other in itertools.pairwise(found):
        if one.last >= other.first:
            names = f"{one.file.name} and {other.file.name}"
            raise CacheError(f"{folder}: sample {other.first} is in {names}")
    return found


def shard_bytes(spec: CacheSpec, stored: dict[str, Tensor], first: int, counts: list[int]) -> bytes:
    """A shard's file: rows [R, width] or [R] of each column; how many of them each sample has."""
    pa, np = needed("pyarrow"), needed("numpy")
    ends = np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])
    columns = [pa.array(np.arange(first, first + len(counts))), pa.array(counts, pa.int32())]
    for name, (kind, width) in spec.columns.items():
        if ends[-1] * width >= 2**31:
            raise ValueError(f"{name}: got 2**31 numbers or more in a shard, expected fewer")
        x, offsets = stored[name].contiguous(), (ends * width).astype(np.int32)
        flat = (x.view(torch.uint8) if kind == "binary" else x).numpy().reshape(-1)
        if kind == "binary":
            parts = [None, pa.py_buffer(offsets), pa.py_buffer(flat)]
            columns.append(pa.Array.from_buffers(pa.binary(), len(counts), parts))
        else:
            columns.append(pa.ListArray.from_arrays(offsets, pa.array(flat)))
    facts = {"version": VERSION, "teacher": asdict(spec), "error": spec.error}
    schema = spec.schema().with_metadata({"fastkd": json.dumps(facts)})
    sink = pa.BufferOutputStream()
    with needed("pyarrow.ipc").new_stream(sink, schema) as writer:
        writer.write_batch(pa.record_batch(columns, schema=schema))
    return bytes(sink.getvalue())


def opened(file: Path) -> tuple[CacheSpec, Any]:
    """What a shard's schema says, and its stream, mapped; CacheError: no shard, or another's."""
    pa = needed("pyarrow")
    try:
        stream = needed("pyarrow.ipc").open_stream(pa.memory_map(str(file)))
        facts = json.loads((stream.schema.metadata or {})[b"fastkd"])
        if facts["version"] != VERSION:
            raise ValueError(f"version: got {shown(facts['version'])}, expected {VERSION}")
        spec = CacheSpec(**facts["teacher"]).checked()
        if not stream.schema.remove_metadata().equals(spec.schema()):
            raise ValueError(f"got columns {shown(stream.schema.names)}")
    except FileNotFoundError:
        raise CacheError(f"{file}: got no such file") from None
    except (pa.ArrowException, OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise CacheError(f"{file}: altered: got no shard ({str(error)[:200]})") from None
    return spec, stream


def batch_of(shard: Shard, spec: CacheSpec) -> Any:
    """A shard's record batch, mapped; CacheError: not as its name and its schema say."""
    pa, pc, np = needed("pyarrow"), needed("pyarrow.compute"), needed("numpy")
    own, stream = opened(shard.file)
    if difference := spec.other(own):
        raise CacheError(f"{shard.file}: not of one cache with its neighbours; {difference}")
    try:
        batch = stream.read_next_batch()
        batch.validate(full=True)
        rows, numbers = batch["rows"], pa.array(np.arange(shard.first, shard.last + 1))
        good = batch["sample"].equals(numbers) and not rows.null_count
        for name, (kind, width) in spec.columns.items():  # every list ends where its sample does
            column, binary = batch[name], kind == "binary"
            sizes = (pc.binary_length if binary else pc.list_value_length)(column)
            good = good and sizes.equals(pc.multiply(rows, pa.scalar(width, pa.int32())))
            good = good and (binary or not column.values.null_count)
        if not good:
            raise ValueError("got other samples than its name says, or lists of other lengths")
    except (pa.ArrowException, OSError, ValueError, StopIteration) as error:
        raise CacheError(f"{shard.file}: altered: {str(error)[:200]}") from None
    return batch


def state(names: list[str]) -> dict[str, bytes]:
    """The files by which `datasets.load_from_disk` opens shards; of columns it asks the shards."""
    digest = hashlib.sha256("".join(names).encode()).hexdigest()[:16]
    document: dict[str, Any] = {"_data_files": [{"filename": name} for name in names]}
    document |= dict.fromkeys(("_format_columns", "_format_type", "_split"))
    document |= {"_fingerprint": digest, "_format_kwargs": {}, "_output_all_columns": False}
    return {INFO: b"{}\n", STATE: (json.dumps(document, indent=0) + "\n").encode()}


def stale(folder: Path, names: list[str]) -> dict[Path, bytes]:
    """Those of `state`'s files that are not there or hold something else."""
    files = {folder / name: data for name, data in state(names).items()}
    return {x: data for x, data in files.items() if not x.exists() or x.read_bytes() != data}


def merged(folder: Path) -> list[str]:
    """The shards that `state.json` names, none where there is no such file; CacheError: altered."""
    if not (folder / STATE).exists():
        return []
    names = re.findall(r"teacher-[-\w]+\.arrow", (folder / STATE).read_text(errors="replace"))
    for file in stale(folder, names):
        raise CacheError(f"{file}: altered after it was written; merge again")
    return names


def merge(path: str | os.PathLike[str]) -> bool:
    """Name all shards in `state.json`, for `datasets.load_from_disk`; `Writer.close` does so too.

    Of ranks that do so at once, the last one has seen the shards of all. Returns: did it change?
    """
    folder, changed = Path(path), False
    while names := [shard.file.name for shard in listed(folder)]:
        if not (files := stale(folder, names)):
            return changed
        for file, data in files.items():
            write_whole(file, data)
        changed = True
    raise FileNotFoundError(f"{folder}: no teacher cache there: no {SHARDS}")
