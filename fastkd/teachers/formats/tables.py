"""Rows of Parquet, Arrow and JSON-lines files, and the columns of numbers in them."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastkd.arguments.messages import describe, listed
from fastkd.distill.serialization import needed

from .records import Record, parsed

PICKLED = {".array_record", ".pkl", ".pickle", ".pt", ".pth", ".bin", ".npy"}
BATCH = 64  # rows decoded, or written, at a time


def rows(source: Any) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """(where, {column: value}) of a file, a folder's files in order, dicts, or a table.

    A table is a Table, RecordBatch or Dataset of pyarrow, or a DataFrame of pandas.
    """
    if hasattr(source, "iterrows"):
        source = needed("pyarrow", "a DataFrame", "formats").Table.from_pandas(source)
    if hasattr(source, "to_batches"):
        source = (row for batch in source.to_batches() for row in _rows(batch))
    elif hasattr(source, "num_rows") and hasattr(source, "schema"):
        source = _rows(source)
    if not isinstance(source, (str, os.PathLike)):
        for number, row in enumerate([source] if isinstance(source, Mapping) else source):
            yield f"row {number}", row
        return
    for path in files(Path(source)):
        for number, row in enumerate(_file(path)):
            yield f"{path}, row {number}", row


def files(path: Path) -> list[Path]:
    """The files of a folder by their numbers (data_2 before data_10), or the file itself."""
    if not path.is_dir():
        return [path]
    for suffix in (".parquet", ".arrow", ".jsonl"):
        found = [x for x in path.glob(f"*{suffix}") if not x.name.startswith(("cache-", "."))]
        kinds = {re.sub(r"\d+", "N", x.name) for x in found}
        if len(kinds) > 1:
            got = f"files of {listed(sorted(kinds))}"
            raise ValueError(f"{path}: got {got}, expected one split's: give a file, or move them")
        if found:
            return sorted(found, key=lambda x: [int(n) for n in re.findall(r"\d+", x.name)])
    names = listed(sorted(x.name for x in path.iterdir()))
    raise ValueError(f"{path}: got a folder of {names}, expected .parquet, .arrow or .jsonl files")


def _file(path: Path) -> Iterator[Any]:
    if path.suffix in PICKLED:
        raise ValueError(
            f"{path}: got a {path.suffix} file, which may hold pickles: to read one is to run "
            "whatever code it holds. Expected .parquet, .arrow or .jsonl"
        )
    if path.suffix == ".jsonl":
        with open(path, encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    yield parsed(line, f"{path}, line {number}")
        return
    if path.suffix == ".parquet":
        parquet = needed("pyarrow.parquet", str(path), "formats")
        with parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(BATCH):
                yield from _rows(batch)
        return
    if path.suffix == ".arrow":  # of datasets.save_to_disk
        pa = needed("pyarrow", str(path), "formats")
        with pa.memory_map(str(path)) as memory, pa.ipc.open_stream(memory) as stream:
            for batch in stream:
                yield from _rows(batch)
        return
    raise ValueError(f"{path}: got a {path.suffix!r} file, expected .parquet, .arrow or .jsonl")


def _rows(batch: Any) -> Iterator[dict[str, Any]]:
    names = batch.schema.names
    for number in range(batch.num_rows):
        yield {name: batch.column(place)[number] for place, name in enumerate(names)}


def column(row: Any, name: str, where: str) -> Any:
    """A row's column, as lists or as Arrow's own scalar; an error that lists the columns there."""
    if not isinstance(row, Mapping):
        raise ValueError(f"{where}: got {describe(row)}, expected columns, {name!r} among them")
    found = row.get(name)
    if found is None or (hasattr(found, "as_py") and not found.is_valid):
        null = " (null)" if name in row else ""
        raise ValueError(f"{where}: got the columns {listed(row)}, expected {name!r}{null}")
    return found


def plain(found: Any) -> Any:
    """A column as Python's lists and dicts."""
    return found.as_py() if hasattr(found, "as_py") else found


def ids(row: Any, name: str, where: str) -> Tensor:
    """A column of integers [L], int64."""
    return torch.as_tensor(plain(column(row, name, where)), dtype=torch.int64)


def optional_ids(row: Any, name: str, where: str) -> Tensor | None:
    present = isinstance(row, Mapping) and plain(row.get(name)) is not None
    return ids(row, name, where) if present else None


def grid(found: Any, fill: float, where: str) -> Tensor:
    """Lists of lists of numbers [rows, K], int64 where fill is an int; `fill` for what is null."""
    if hasattr(found, "as_py"):
        square = _square(found)
        if square is not None:
            return square
        found = found.as_py()
    if isinstance(found, Tensor) or hasattr(found, "dtype"):
        found = torch.as_tensor(found).tolist()
    try:
        filled = [row if row is not None else [] for row in found]
        k = max([1, *map(len, filled)])
        made = [[fill if x is None else x for x in row] + [fill] * (k - len(row)) for row in filled]
        whole = isinstance(fill, int)
        return torch.tensor(made, dtype=torch.int64 if whole else torch.float64).view(-1, k)
    except (TypeError, ValueError):
        raise ValueError(f"{where}: got {describe(found)}, expected lists of numbers") from None


def _square(scalar: Any) -> Tensor | None:
    """An Arrow list of lists of one length, without Python objects; None for others."""
    outer = scalar.values
    if not hasattr(outer, "value_lengths") or outer.null_count or not len(outer):
        return None
    sizes = outer.value_lengths().unique().to_pylist()
    flat = outer.flatten()
    if len(sizes) != 1 or not sizes[0] or flat.null_count or hasattr(flat, "value_lengths"):
        return None
    if not str(flat.type).startswith(("int", "uint", "float", "double", "halffloat")):
        return None
    array = flat.to_numpy(zero_copy_only=False)
    array = array.astype("float64" if array.dtype.kind == "f" else "int64")  # uint64 wraps
    return torch.from_numpy(array).view(len(outer), sizes[0])


def pair(row: Any, of_ids: str, of_values: str, where: str) -> tuple[Tensor, Tensor]:
    """Two columns [rows, K] of one shape: ids, -1 where short, and values, -inf where short."""
    left = grid(ids := column(row, of_ids, where), -1, f"{where}.{of_ids}")
    values = column(row, of_values, where)
    right = grid(values, -torch.inf, f"{where}.{of_values}")
    if left.shape != right.shape:
        got = f"{list(left.shape)} ids and {list(right.shape)} of {of_values!r}"
        raise ValueError(f"{where}.{of_ids}: got {got}, expected as many")
    if bool(((left == -1) | (right == -torch.inf)).any()):  # rows may have other lengths
        for number, (one, other) in enumerate(zip(plain(ids), plain(values), strict=True)):
            if (sizes := (len(_or(one)), len(_or(other))))[0] != sizes[1]:
                got = f"{sizes[0]} ids and {sizes[1]} of {of_values!r} in row {number}"
                raise ValueError(f"{where}.{of_ids}: got {got}, expected as many")
    return left, right.double()


def _or(row: Any) -> Any:
    return () if row is None else row


def tokens_of(record: Record, name: str) -> list[int]:
    if record.tokens is None:
        raise ValueError(
            f"records: got one without tokens, expected them: {name} holds the ids (tokens=, or "
            "--tokens FILE with input_ids)"
        )
    return record.tokens.tolist()


def grids(record: Record, length: int, first: int = 0) -> tuple[Tensor, Tensor]:
    """ids and log-probabilities [length - first, K] with a row for each token from `first` on.

    Absent entries are -1 and -inf.
    """
    said = record.aligned()
    ids = torch.full((length, said.size(-1)), -1, dtype=torch.int64)
    logs = torch.full((length, said.size(-1)), -torch.inf)
    ids[1 : said.size(0) + 1], logs[1 : said.size(0) + 1] = said.indices.long(), said.logprobs
    logs = logs.masked_fill(ids < 0, -torch.inf)
    return ids.masked_fill(logs == -torch.inf, -1)[first:], logs[first:]


def write(path: str | os.PathLike[str], made: Iterable[Any], user: str, types: Any = None) -> None:
    """Rows to a .parquet or .jsonl file; types(pyarrow): [(column, type)], or as Arrow finds."""
    path = Path(path)
    if path.suffix == ".jsonl":
        with open(path, "w", encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in made)
        return
    if path.suffix != ".parquet":
        raise ValueError(f"{path}: got {path.suffix!r}, expected .parquet or .jsonl")
    pa, parquet = needed("pyarrow", user, "formats"), needed("pyarrow.parquet", user, "formats")
    schema, writer, source = pa.schema(types(pa)) if types else None, None, iter(made)
    try:
        while batch := [*islice(source, BATCH)]:
            table = pa.Table.from_pylist(batch, schema=schema)
            schema = table.schema
            writer = writer or parquet.ParquetWriter(path, schema)
            writer.write_table(table)
    finally:
        if writer is not None:
            writer.close()
    if writer is None:
        raise ValueError(f"records: got none, expected at least one for {path}")
