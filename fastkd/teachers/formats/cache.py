"""From another tool's files to a store and back: one function each way."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

import fastkd
from fastkd.arguments.messages import shown
from fastkd.teachers import store

from . import tables
from .records import Record, Report
from .table import read, write


def import_cache(
    format: str, source: Any, path: str | os.PathLike[str], *, vocab_size: int, **options: Any
) -> Report:
    """Write what another tool wrote to a store: sample i is the i-th, its row i for token i + 1.

    The source is read twice: once to check it and to find the widest row, once to write. A store
    that an interrupted import left goes on behind its last shard.

    Args:
        format, source, options: see `formats.read`; tokens may be a file with input_ids.
        path: the store's folder.
        vocab_size: V, the student's.

    Returns:
        The report of the whole source.

    Raises:
        TypeError, ValueError, CacheError: see `formats.read` and `store.Writer`.
    """

    def reading() -> Any:
        given = {**options, "tokens": _tokens(options.get("tokens"))}
        return read(format, source, vocab_size=vocab_size, **given)

    checked, kept = reading(), None
    for record in checked:
        kept = record.aligned()
    if kept is None:
        raise ValueError(f"source: got no sequence in {shown(source)}, expected at least one")
    k = checked.report.columns or 1
    name = Path(source).name if isinstance(source, (str, os.PathLike)) else "an answer"
    with store.Writer(
        path,
        vocab_size=vocab_size,
        k=k,
        temperature=kept.temperature,
        tail=kept.tail,
        data=f"{format}: {name}",
    ) as writer:
        done = writer.done
        for number, record in enumerate(reading()):
            if number >= done:
                writer.add(_widened(record.aligned(), k))
    report: Report = checked.report
    return report


def export_cache(
    path: str | os.PathLike[str], format: str, out: str | os.PathLike[str], *, tokens: Any = None
) -> int:
    """Write a store in another tool's format; returns the number of samples.

    Args:
        path: a store of `TopK` [L, K] samples, row i for token i + 1.
        format, out: see `formats.write`.
        tokens: the ids of each sample, or a file with input_ids; most formats hold them.

    Raises:
        ValueError, CacheError: see `formats.write` and `store.Reader`.
    """
    reader = store.Reader(path)
    write(format, _records(reader, tokens), out)
    return len(reader)


def _records(reader: store.Reader, tokens: Any) -> Iterator[Record]:
    ids = None if tokens is None else iter(_tokens(tokens))
    for number, said in enumerate(reader):
        if not isinstance(said, fastkd.TopK) or said.dim() != 2:
            got = f"{type(said).__name__} {list(said.shape)}"
            raise ValueError(f"{reader.path}: got {got}, expected samples of TopK [L, K]")
        own = None
        if ids is not None:
            own = torch.as_tensor(next(ids, []), dtype=torch.int64)
            if len(own) not in (said.size(0), said.size(0) + 1):
                got = f"{len(own)} ids for the {said.size(0)} rows of sample {number}"
                raise ValueError(f"tokens: got {got}, expected as many, or one more")
            said = said[: len(own) - 1]  # a row behind the last token has none to teach
        yield Record(own, said, torch.arange(1, said.size(0) + 1))


def _tokens(tokens: Any) -> Iterable[Any]:
    if isinstance(tokens, (str, os.PathLike)):
        return (tables.ids(row, "input_ids", where) for where, row in tables.rows(tokens))
    return tokens


def _widened(said: fastkd.TopK, k: int) -> fastkd.TopK:
    def wide(x: Tensor, fill: float) -> Tensor:
        return pad(x, (0, k - x.size(-1)), value=fill)

    return fastkd.TopK(
        wide(said.logprobs, -torch.inf),
        wide(said.indices, -1),
        tail_logprob=said.tail_logprob,
        temperature=said.temperature,
        tail=said.tail,
    )
