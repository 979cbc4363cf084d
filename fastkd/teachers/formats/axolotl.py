"""axolotl's datasets of log-probabilities: rows are of a sequence's last tokens."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from . import tables
from .records import Options, Record, Rows, ragged
from .wire import id_of, value


def read_v1(source: Any, _: Options) -> Iterator[Rows]:
    """logprobs [[{"token": "token_id:N", "logprob": x}]]."""
    for where, row in tables.rows(source):
        at = f"{where}.logprobs"
        said = tables.plain(tables.column(row, "logprobs", where))
        entries: list[list[tuple[int, float]] | None] = [
            [(id_of(x.get("token"), at, digits=False), value(x, at)) for x in entry or ()]
            for entry in said
        ]
        ids, values = ragged(entries)
        tokens = tables.optional_ids(row, "input_ids", where)
        yield _last(tokens, ids, values, at)


def read_v2(source: Any, _: Options) -> Iterator[Rows]:
    """logprobs [[x]] and target_token_ids [[N]]."""
    for where, row in tables.rows(source):
        ids, values = tables.pair(row, "target_token_ids", "logprobs", where)
        tokens = tables.optional_ids(row, "input_ids", where)
        yield _last(tokens, ids, values, f"{where}.logprobs")


def _last(tokens: Tensor | None, ids: Tensor, values: Tensor, where: str) -> Rows:
    """Rows of the last of all tokens; an empty one for the first, which nobody predicts, goes."""
    size = 0 if tokens is None else len(tokens)
    if 0 < len(ids) == size and bool(((ids[0] == -1) | (values[0] == -torch.inf)).all()):
        ids, values = ids[1:], values[1:]
    places = torch.arange(-len(ids), 0)
    return Rows(tokens, ids, values, places + size if len(ids) <= size else places, where)


def write_v2(records: Iterable[Record], path: str | os.PathLike[str]) -> None:
    """logprobs and target_token_ids of the last tokens, [] where there is no teacher; input_ids."""
    tables.write(path, map(_row, records), "axolotl-v2")


def _row(record: Record) -> dict[str, Any]:
    made: dict[str, Any] = {}
    if record.tokens is not None:
        made["input_ids"] = record.tokens.tolist()
        ids, logs = tables.grids(record, len(record.tokens), first=1)
    else:
        ids, logs = record.topk.indices, record.topk.logprobs
        if record.teaches.tolist() != [*range(-len(ids), 0)]:
            raise ValueError("records: got rows of other than the last tokens, expected tokens too")
    named = (ids >= 0).tolist()
    for name, column in (("logprobs", logs), ("target_token_ids", ids)):
        made[name] = [
            [x for x, there in zip(row, keep, strict=True) if there]
            for row, keep in zip(column.tolist(), named, strict=True)
        ]
    return made
