"""vLLM: prompt_logprobs of a server or of `LLM`, echoed completions, and scores of given ids."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastkd.arguments.messages import describe
from fastkd.distill.serialization import needed

from . import tables
from .records import Options, Record, Rows, as_ids
from .wire import answers, decoded, field, generated_rows, id_of, prompt_rows, value


def read(source: Any, _: Options) -> Iterator[Rows]:
    """`prompt_logprobs`: null or {id: {logprob, rank}} a token; also of offline RequestOutputs."""
    for where, answer in answers(source):
        for at, choice in _choices(answer, where, "prompt_logprobs"):
            at += ".prompt_logprobs"
            said = field(choice, "prompt_logprobs", at[:-16], "the request's prompt_logprobs=k")
            tokens = _tokens(choice)
            rows = _flat(said) if hasattr(said, "start_indices") else [*said]
            yield prompt_rows([_row(row, at) for row in rows], tokens, at)


def read_echo(source: Any, _: Options) -> Iterator[Rows]:
    """`logprobs` of completions, by "token_id:N"; with echo from the first token on."""
    for where, answer in answers(source):
        for at, choice in _choices(answer, where, "logprobs"):
            said, at = field(choice, "logprobs", at, "the request's logprobs=k"), at + ".logprobs"
            top = field(said, "top_logprobs", at, "null or {token_id:N: logprob}")
            tokens = [id_of(x, f"{at}.tokens", digits=False) for x in field(said, "tokens", at)]
            own = field(said, "token_logprobs", at)
            if not len(top) == len(tokens) == len(own):
                got = f"{len(top)}, {len(tokens)} and {len(own)}"
                raise ValueError(f"{at}: got {got} entries of its three lists, expected as many")
            rows = [
                row and [*row, (token, value(x, at))]
                for row, token, x in zip(
                    (_row(row, at, digits=False) for row in top), tokens, own, strict=True
                )
            ]
            echoed = not rows or rows[0] is None
            yield (prompt_rows if echoed else generated_rows)(rows, tokens, at)


def read_ids(source: Any, options: Options) -> Iterator[Rows]:
    """`prompt_token_id_logprobs` [rows, K] of the ids asked for, row i for start + i + 1."""
    for where, answer in answers(source):
        at = f"{where}.prompt_token_id_logprobs"
        why = "scores (null where a prefix-cache hit left no logits to score)"
        values = _matrix(field(answer, "prompt_token_id_logprobs", where, why), at)
        if options.ids is None or options.start is None:
            raise ValueError(
                f"{at}: got ids={describe(options.ids)} and start={options.start}, expected the "
                "request's prompt_logprob_token_ids and prompt_logprob_start, which no answer tells"
            )
        ids = torch.as_tensor(options.ids, dtype=torch.int64)
        ids = ids.expand(len(values), -1) if ids.dim() == 1 else ids
        teaches = options.start + 1 + torch.arange(len(values))
        yield Rows(as_ids(_tokens(answer)), ids, values, teaches, at)


def write(records: Iterable[Record], path: str | os.PathLike[str]) -> None:
    """One answer of `/v1/completions` with a choice a record."""
    choices = []
    for number, record in enumerate(records):
        known = None if record.tokens is None else record.tokens.tolist()
        size = record.aligned().size(0) + 1 if known is None else len(known)
        said_ids, said_logs = tables.grids(record, size, first=1)
        rows: list[Any] = [None]
        for ids, logs in zip(said_ids.tolist(), said_logs.tolist(), strict=True):
            named = [(i, x) for i, x in zip(ids, logs, strict=True) if i >= 0]
            rows.append(
                {
                    str(i): {"logprob": x, "rank": rank, "decoded_token": None}
                    for rank, (i, x) in enumerate(named, 1)
                }
                or None
            )
        choices.append({"index": number, "prompt_logprobs": rows, "prompt_token_ids": known})
    Path(path).write_text(json.dumps({"choices": choices}), encoding="utf-8")


def _choices(answer: Any, where: str, name: str) -> Iterator[tuple[str, Any]]:
    """The choices of a server's answer; an offline output, or a bare choice, is its own."""
    if hasattr(answer, name) or (isinstance(answer, Mapping) and name in answer):
        yield where, answer
        return
    found = field(answer, "choices", where, f"a list of choices with {name!r}")
    for number, choice in sorted(enumerate(found), key=lambda x: x[1].get("index", x[0])):
        yield f"{where}.choices[{number}]", choice


def _tokens(choice: Any) -> Any:
    """prompt_token_ids where the answer has them (return_token_ids, or offline)."""
    if isinstance(choice, Mapping):
        return choice.get("prompt_token_ids")
    return getattr(choice, "prompt_token_ids", None)


def _flat(said: Any) -> list[Any]:
    """Rows of a FlatLogprobs: slots start .. end of three lists, which some versions make anew."""
    slots = [*zip(said.ranks, said.token_ids, said.logprobs, strict=True)]
    spans = zip(said.start_indices, said.end_indices, strict=True)
    return [slots[start:end] for start, end in spans]


def _row(row: Any, where: str, *, digits: bool = True) -> list[tuple[int, float]] | None:
    """(id, logprob) by rank; entries without one come last."""
    if not row:
        return None
    entries = row
    if isinstance(row, Mapping):
        entries = [
            (_rank(entry), id_of(key, where, digits=digits), value(entry, where))
            for key, entry in row.items()
        ]
    ranked = sorted(entries, key=lambda x: x[0] if x[0] is not None else float("inf"))
    return [(i, x) for _, i, x in ranked]


def _rank(entry: Any) -> Any:
    return entry.get("rank") if isinstance(entry, Mapping) else getattr(entry, "rank", None)


def _matrix(said: Any, where: str) -> Tensor:
    """[rows, K] of an array, lists, or base64 of .npy, which is read without pickle."""
    if isinstance(said, str):
        numpy = needed("numpy", "vllm-ids", "formats")
        data = io.BytesIO(decoded(said, where))
        try:
            said = numpy.load(data, allow_pickle=False)
        except (ValueError, EOFError) as error:
            raise ValueError(f"{where}: got what is no .npy of numbers ({error})") from None
    found = torch.as_tensor(said, dtype=torch.float64)
    if found.dim() != 2:
        raise ValueError(f"{where}: got shape {list(found.shape)}, expected [rows, K]")
    return found
