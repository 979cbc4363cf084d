"""Formats of few fields: LlamaKD, EasyDistill and verl."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from fastkd.arguments.messages import describe, shown

from . import tables
from .records import Options, Record, Rows
from .wire import generated_rows, id_of, value

ALIGN = ("next", "token")


def read_llamakd(source: Any, options: Options) -> Iterator[Rows]:
    """inputs [L] and targets [L, 2, K]: log-probabilities, then ids as floats."""
    if options.align not in ALIGN:
        raise ValueError(
            f"align: got {shown(options.align)}, expected 'next' (row i is for token i + 1) or "
            "'token' (row i is for token i): the format does not say, its makers do"
        )
    for where, row in tables.rows(source):
        at = f"{where}.targets"
        tokens = tables.ids(row, "inputs", where)
        said = torch.tensor(tables.plain(tables.column(row, "targets", where)), dtype=torch.float64)
        if said.dim() != 3 or said.shape[:2] != (len(tokens), 2):
            raise ValueError(f"{at}: got {list(said.shape)}, expected [{len(tokens)}, 2, K]")
        values, ids = said.unbind(1)
        whole = torch.where(values == -torch.inf, -1.0, ids)
        if bool((whole != whole.round()).any()) or bool((whole.abs() >= 2**24).any()):
            raise ValueError(f"{at}: got ids that are no whole numbers below 2**24, expected ids")
        teaches = torch.arange(len(ids)) + (options.align == "next")
        kept = (teaches > 0) & (teaches < len(ids))
        yield Rows(tokens, whole.long()[kept], values[kept], teaches[kept], at)


def write_llamakd(records: Iterable[Record], path: str | os.PathLike[str]) -> None:
    """inputs, targets with align="next", line_number; an absent entry is id 0 at -inf."""

    def row(number: int, record: Record) -> dict[str, Any]:
        tokens = tables.tokens_of(record, "llamakd")
        ids, logs = tables.grids(record, len(tokens) + 1, first=1)
        targets = torch.stack((logs.double(), ids.clamp_min(0).double()), 1)
        return {"inputs": tokens, "targets": targets.tolist(), "line_number": number}

    made = (row(number, record) for number, record in enumerate(records))
    tables.write(path, made, "llamakd")


def read_easydistill(source: Any, _: Options) -> Iterator[Rows]:
    """A line a sample: a list of {id: prob}, of the generated tokens alone."""
    if not isinstance(source, (str, os.PathLike)):
        found = ((f"row {number}", line) for number, line in enumerate(source))
    else:
        found = tables.rows(source)  # type: ignore[assignment]
    for where, line in found:
        if not isinstance(line, list) or not all(isinstance(x or {}, Mapping) for x in line):
            raise ValueError(f"{where}: got {describe(line)}, expected a list of {{id: prob}}")
        rows = [
            [(id_of(i, where, digits=True), value(p, where)) for i, p in (x or {}).items()]
            for x in line
        ]
        yield generated_rows(rows, None, where)


def write_easydistill(records: Iterable[Record], path: str | os.PathLike[str]) -> None:
    """A line a record, of the rows that it has; {} where there is no teacher."""
    with open(Path(path), "w", encoding="utf-8") as file:
        for record in records:
            said = zip(
                record.topk.indices.tolist(), record.topk.logprobs.exp().tolist(), strict=True
            )
            line = [
                {str(i): p for i, p in zip(ids, probs, strict=True) if i >= 0}
                for ids, probs in said
            ]
            file.write(json.dumps(line) + "\n")


def read_verl(source: Any, _: Options) -> Iterator[Rows]:
    """teacher_ids and teacher_logprobs [S, K]: row i is for token i + 1; rows of 0.0 are padding.

    input_ids [S] where they are there; attention_mask [S] cuts off a padded sequence's ends.
    """
    for where, row in tables.rows(source):
        at = f"{where}.teacher_logprobs"
        ids, values = tables.pair(row, "teacher_ids", "teacher_logprobs", where)
        tokens = tables.optional_ids(row, "input_ids", where)
        mask = tables.optional_ids(row, "attention_mask", where)
        if tokens is not None and len(tokens) != len(ids):
            got = f"{len(ids)} rows for {len(tokens)} tokens"
            raise ValueError(f"{at}: got {got}, expected one for each")
        if mask is not None:
            kept = mask != 0
            ids, values = ids[kept], values[kept]
            tokens = tokens[kept] if tokens is not None else None
        padding = (values == 0.0).all(-1)
        if ids.size(-1) == 1 and bool(padding[:-1].any()):
            raise ValueError(
                f"{at}: got a row of one column at 0.0, expected K > 1: padding and probability 1 "
                "look alike there"
            )
        ids = ids.masked_fill(padding[:, None], -1)
        yield Rows(tokens, ids[:-1], values[:-1], torch.arange(1, max(1, len(ids))), at)


def write_verl(records: Iterable[Record], path: str | os.PathLike[str]) -> None:
    """input_ids, teacher_ids, teacher_logprobs; a row without a teacher is id 0 at 0.0."""

    def row(record: Record) -> dict[str, Any]:
        tokens = tables.tokens_of(record, "verl")
        ids, logs = tables.grids(record, len(tokens) + 1, first=1)
        empty = (ids < 0).all(-1, keepdim=True)
        return {
            "input_ids": tokens,
            "teacher_ids": ids.clamp_min(0).tolist(),
            "teacher_logprobs": logs.masked_fill(empty, 0.0).tolist(),
        }

    tables.write(path, map(row, records), "verl")
