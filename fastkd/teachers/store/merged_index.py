"""The indexes of all ranks as one file of columns, and what a cache holds by either.

`index.safetensors` has what the JSON indexes say of every shard (89 bytes each, mapped, not parsed)
and, of each index, its rank, its size and its hash. An index grows with every shard, so its size
tells whether the merged file still speaks for it: where it does not, that one index is read. Shards
themselves are never opened, but for the numbers of those whose samples follow no step.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastkd.distill.serialization import array

from .atomic_io import needed, probe, write_whole
from .format import (
    FORMAT,
    INDEXES,
    VERSION,
    CacheError,
    CacheSpec,
    check_parts,
    index_name,
    load_part,
    lock_name,
)
from .index import Places, Table
from .limits import LEAST_BYTES, LOOKED_UP

MERGED = "index.safetensors"
_DTYPES = {"rank": torch.int32, "number": torch.int32, "folder": torch.uint8, "sha256": torch.uint8}


@dataclass(frozen=True)
class Source:
    """An index among others: its rank, whether that is complete, the file's size and its hash."""

    rank: int
    complete: bool
    size: int
    sha256: str


@dataclass(frozen=True)
class Contents:
    """What all indexes of a cache say."""

    spec: CacheSpec
    sources: list[Source]
    table: Table
    checked: bool = False  # merged as it is: no sample is there twice

    @property
    def complete(self) -> bool:
        """All samples are there, as far as their number tells."""
        if self.spec.total is not None:
            last = int(self.table.last.max()) if len(self.table) else -1
            return int(self.table.samples.sum()) == self.spec.total > last
        return len(self.sources) == self.spec.ranks and all(s.complete for s in self.sources)


def contents(folder: Path) -> Contents:
    """What is in a cache: the merged index where it still speaks for all, or else the others.

    Raises:
        FileNotFoundError: no cache there.
        CacheError: an altered index, one of another version, or indexes of several caches.
    """
    names = [file.name for file in folder.glob(INDEXES)]
    if not names:
        raise FileNotFoundError(f"{folder}: no teacher cache there: no {INDEXES}")
    merged = load_merged(folder)
    known = {index_name(source.rank): source for source in merged.sources} if merged else {}
    for name in known:
        if name not in names:
            raise CacheError(f"{folder / name}: got no such file, expected what {MERGED} has of it")
    fresh = [
        name
        for name in sorted(names)
        if name not in known or (folder / name).stat().st_size != known[name].size
    ]
    if merged is not None and not fresh:
        return merged
    parts = [load_part(folder / name) for name in fresh]
    # what is not known before a first sample is known to a rank that has one
    spec = next((part.spec for part in parts if part.shards), parts[0].spec)
    if merged is not None and len(merged.table):
        spec = merged.spec
    for name, part in zip(fresh, parts, strict=True):
        if difference := spec.other(part.spec):
            raise CacheError(f"{folder / name}: not of one cache with its neighbours; {difference}")
    new = {part.rank: part for part in parts}
    old = {source.rank: source for source in merged.sources} if merged else {}
    sources, tables = [], []
    for rank in sorted(new.keys() | old.keys()):
        if rank in new:
            part = new[rank]
            sources.append(Source(rank, part.complete, part.size, part.sha256))
            tables.append(Table.of(part))
        elif merged is not None:
            sources.append(old[rank])
            tables.append(merged.table.of_rank(rank))
    return Contents(spec, sources, Table.join(tables))


def places(folder: Path, of: Contents, listed: Callable[[int], Tensor]) -> Places:
    """Where each sample is.

    Raises:
        CacheError: a sample that is there twice; names it, and both shards.
    """
    found = Places(of.table, listed)
    if not of.checked and (again := found.twice()):
        number, *both = again
        files = " and ".join(of.table.file(at) for at in both)
        raise CacheError(f"{folder}: sample {number} is in {files}")
    return found


def merge(path: str | os.PathLike[str]) -> bool:
    """Write the indexes of all ranks as one, that readers open in place of them.

    Reads indexes only; those that an earlier merge has and that did not change are not read again.
    The file appears whole or not at all, and a second merge of the same indexes changes nothing.

    Args:
        path: a cache's folder, in which no writer is at work.

    Returns:
        Whether there was anything to do.

    Raises:
        FileNotFoundError: no cache there.
        BlockingIOError: a writer is at work.
        CacheError: indexes that are altered or not of one cache (says which field differs), or a
            sample in two shards (names them).
    """
    from .reader import Reader  # which reads what is merged

    folder = Path(path)
    reader = Reader(folder)
    found = reader.contents
    for source in found.sources:
        probe(folder.resolve() / lock_name(source.rank))
    if found.checked:
        return False
    reader.check()
    write_whole(folder / MERGED, _bytes(found))
    return True


def _bytes(of: Contents) -> bytes:
    facts = {
        "format": FORMAT,
        "version": VERSION,
        "teacher": asdict(of.spec),
        "sources": [asdict(source) for source in of.sources],
    }
    columns = {name: x.contiguous() for name, x in of.table.columns().items()}
    digest = _digest(facts, columns)
    made = {"index": json.dumps({**facts, "sha256": digest})}  # one: several have no order
    return bytes(needed("safetensors.torch").save(columns, metadata=made))


def _digest(facts: dict[str, Any], columns: dict[str, Tensor]) -> str:
    digest = hashlib.sha256(json.dumps(facts).encode())
    for name in sorted(columns):
        digest.update(name.encode())
        digest.update(array(columns[name], "a teacher cache").data)
    return digest.hexdigest()


def load_merged(folder: Path) -> Contents | None:
    """The merged index, mapped; None where there is none.

    Raises:
        CacheError: of another version, or altered.
    """
    file = folder / MERGED
    if not file.exists():
        return None
    try:
        with needed("safetensors").safe_open(file, framework="pt") as opened:
            facts = json.loads(opened.metadata()["index"])
            columns = {name: opened.get_tensor(name) for name in opened.keys()}
        digest = facts.pop("sha256")
        sound = digest == _digest(facts, columns)
        version = facts["version"] if facts["format"] == FORMAT else None
    except (OSError, ImportError):
        raise
    except Exception as error:  # safetensors has an error of its own, which is no other's
        raise CacheError(f"{file}: altered: got no merged index ({error})") from None
    if not sound:
        raise CacheError(f"{file}: altered after it was written (its hash differs); merge again")
    if version != VERSION:
        raise CacheError(f"{file}: got a cache of version {version!r}, expected {VERSION}")
    shapes = {name: (x.dtype, x.shape[1:]) for name, x in columns.items()}
    wanted = {
        name: (_DTYPES.get(name, torch.int64), torch.Size([32] if name == "sha256" else []))
        for name in Table.__dataclass_fields__
    }
    if shapes != wanted or len({len(x) for x in columns.values()}) > 1:
        raise CacheError(f"{file}: altered: got columns {shapes}, expected {wanted}")
    try:
        sources = [Source(**source) for source in facts["sources"]]
        spec = CacheSpec(**facts["teacher"])
    except (KeyError, TypeError) as error:
        raise CacheError(f"{file}: altered: got other fields ({str(error)[:100]})") from None
    table = Table(**columns)
    low = torch.stack([table.tokens, table.first, table.last, table.step]).amin(0) < 0
    none, much = table.samples < 1, table.samples > table.bytes // LEAST_BYTES
    odd = low | none | much | (table.samples > LOOKED_UP)  # the others can be no trouble
    check_parts(file, spec, map(table.shard, odd.nonzero().flatten().tolist()))
    return Contents(spec, sources, table, checked=True)
