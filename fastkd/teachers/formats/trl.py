"""TRL: the answer of its server's `/get_sequence_logprobs/`, and rows of its async trainer."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from typing import Any

import torch

from . import tables
from .records import Options, Record, Rows
from .wire import answers, field, generated_rows, numbers, shaped, value


def read(source: Any, _: Options) -> Iterator[Rows]:
    """A row for each completion token: binary (padded by id 0 at -inf) or nested lists."""
    for where, answer in answers(source):
        if answer.get("logprobs_b64") is None:
            yield from _nested(answer, where)
            continue
        batch, longest, k = field(answer, "shape", where)
        lengths = field(answer, "completion_lengths", where)
        if len(lengths) != batch or max(lengths, default=0) > longest:
            got = f"{lengths} for the shape {[batch, longest, k]}"
            raise ValueError(f"{where}.completion_lengths: got {got}, expected {batch} that fit")
        top, top_ids, own, own_ids = (
            shaped(
                numbers(field(answer, name, where), dtype, name), [batch, longest, columns], name
            )
            for name, dtype, columns in (
                ("logprobs_b64", torch.float32, k),
                ("token_ids_b64", torch.int32, k),
                ("actual_logprobs_b64", torch.float32, 1),
                ("actual_token_ids_b64", torch.int32, 1),
            )
        )
        ids, values = torch.cat((top_ids, own_ids), -1).long(), torch.cat((top, own), -1).double()
        for number, size in enumerate(lengths):
            known = bool((own[number, :size] > -torch.inf).all())  # else its id is padding
            yield Rows(
                own_ids[number, :size, 0].long() if known else None,
                ids[number, :size],
                values[number, :size],
                torch.arange(-size, 0),
                f"{where}, sequence {number}",
            )


def _nested(answer: Any, where: str) -> Iterator[Rows]:
    logs = field(answer, "logprobs", where, "logprobs_b64, or lists")
    for number, (ids, values) in enumerate(
        zip(field(answer, "logprob_token_ids", where), logs, strict=True)
    ):
        at = f"{where}, sequence {number}"
        rows = [
            [
                (int(i), value(x, at) if x is not None else -torch.inf)
                for i, x in zip(a, b, strict=True)
            ]
            for a, b in zip(ids, values, strict=True)
        ]
        yield generated_rows(rows, None, at)


def read_rows(source: Any, _: Options) -> Iterator[Rows]:
    """teacher_topk_ids and _logprobs: row i is for token i of input_ids, -1 and -inf pad."""
    for where, row in tables.rows(source):
        tokens = tables.ids(row, "input_ids", where)
        ids, values = tables.pair(row, "teacher_topk_ids", "teacher_topk_logprobs", where)
        if len(ids) != len(tokens):
            got = f"{len(ids)} rows for {len(tokens)} tokens"
            raise ValueError(f"{where}.teacher_topk_ids: got {got}, expected one for each")
        yield Rows(tokens, ids[1:], values[1:], torch.arange(1, len(ids)), where)


def write_rows(records: Iterable[Record], path: str | os.PathLike[str]) -> None:
    """input_ids, completion_mask (1 where there is a teacher), teacher_topk_ids and _logprobs."""
    tables.write(path, map(_row, records), "trl-rows")


def _row(record: Record) -> dict[str, Any]:
    tokens = tables.tokens_of(record, "trl-rows")
    ids, logs = tables.grids(record, len(tokens))
    return {
        "input_ids": tokens,
        "completion_mask": (ids >= 0).any(-1).long().tolist(),
        "teacher_topk_ids": ids.tolist(),
        "teacher_topk_logprobs": logs.tolist(),
    }
