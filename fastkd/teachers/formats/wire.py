"""What the answers of servers have in common: JSON files, fields by name, ids, base64 arrays."""

from __future__ import annotations

import base64
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastkd.arguments.messages import describe, listed, shown

from .records import Rows, as_ids, parsed, ragged

TOKEN_ID = "token_id:"


def answers(source: Any) -> Iterator[tuple[str, Any]]:
    """(where, answer) of an answer, a list of them, or a file of JSON or of a JSON line each."""
    if isinstance(source, (str, os.PathLike)):
        path = Path(source)
        if path.suffix not in (".json", ".jsonl"):
            if str(source).lstrip()[:1] in ("{", "["):
                got = f"the text {shown(source)}"
                raise ValueError(f"source: got {got}, expected json.loads of it, or a file's name")
            raise ValueError(f"{path}: got a {path.suffix!r} file, expected .json or .jsonl")
        if path.suffix == ".jsonl":
            with open(path, encoding="utf-8") as lines:
                for number, line in enumerate(lines, 1):
                    if line.strip():
                        yield f"{path}, line {number}", parsed(line, f"{path}, line {number}")
            return
        source, name = parsed(path.read_text(encoding="utf-8"), str(path)), str(path)
    else:
        name = "answer"
    many = isinstance(source, (list, tuple))
    for number, answer in enumerate(source if many else [source]):
        answer = answer.model_dump() if hasattr(answer, "model_dump") else answer  # a client's
        yield f"{name}[{number}]" if many else name, answer


def field(answer: Any, name: str, where: str, expected: str = "it") -> Any:
    """answer's field: an entry of a dict or an attribute; an error that lists what there is."""
    found = answer.get(name) if isinstance(answer, Mapping) else getattr(answer, name, None)
    if found is None:
        has = f"the fields {listed(answer)}" if isinstance(answer, Mapping) else describe(answer)
        null = " (null)" if isinstance(answer, Mapping) and name in answer else ""
        raise ValueError(f"{where}: got {has}, expected {expected} in {name!r}{null}")
    return found


def value(entry: Any, where: str, name: str = "logprob") -> float:
    """An entry's number; None, which JSON has for NaN, is absent."""
    if isinstance(entry, (int, float)) and not isinstance(entry, bool):
        return float(entry)
    if isinstance(entry, Mapping) and name not in entry:
        raise ValueError(f"{where}: got the fields {listed(entry)}, expected {name!r}")
    found = entry[name] if isinstance(entry, Mapping) else getattr(entry, name, None)
    try:
        return -torch.inf if found is None else float(found)
    except (TypeError, ValueError):
        raise ValueError(f"{where}: got {shown(found)} in {name!r}, expected a number") from None


def id_of(key: Any, where: str, *, digits: bool) -> int:
    """An id: an integer, "token_id:N" or, where keys are never text, "N"; text is refused."""
    if isinstance(key, int) and not isinstance(key, bool):
        return key
    if isinstance(key, str):
        number = key.removeprefix(TOKEN_ID)
        if (digits or number != key) and number.isascii() and number.isdigit() and len(number) < 19:
            return int(number)
    raise ValueError(
        f"{where}: got the token {shown(key)}, expected an id or 'token_id:N' (vLLM: "
        "return_tokens_as_token_ids); two ids may have one text"
    )


def prompt_rows(rows: list[Any], tokens: Any, where: str) -> Rows:
    """Rows of which entry i scores token i, the first null."""
    if not rows or rows[0]:
        got = "no rows" if not rows else "an entry for the first token"
        raise ValueError(f"{where}: got {got}, expected null for it and a row for each further one")
    ids, values = ragged(rows[1:])
    known = as_ids(tokens)
    if known is not None and len(known) != len(rows):
        got = f"{len(rows)} rows for {len(known)} tokens"
        raise ValueError(f"{where}: got {got}, expected one for each")
    return Rows(known, ids, values, torch.arange(1, len(rows)), where)


def generated_rows(rows: list[Any], tokens: Any, where: str) -> Rows:
    """Rows of which entry i scores the generated token i: the sequence's last ones."""
    return Rows(as_ids(tokens), *ragged(rows), torch.arange(-len(rows), 0), where)


def numbers(found: Any, dtype: torch.dtype, where: str) -> Tensor:
    """A list, or a base64 string of little-endian numbers, as a tensor [n]."""
    if not isinstance(found, str):
        return torch.as_tensor(found, dtype=dtype)
    data = bytearray(decoded(found, where))
    if len(data) % dtype.itemsize:
        raise ValueError(f"{where}: got {len(data)} bytes, expected numbers of {dtype}")
    return torch.frombuffer(data, dtype=dtype) if data else torch.empty(0, dtype=dtype)


def shaped(flat: Tensor, shape: list[int], where: str) -> Tensor:
    if len(flat) != math.prod(shape):
        raise ValueError(f"{where}: got {len(flat)} numbers, expected those of {shape}")
    return flat.view(shape)


def decoded(text: Any, where: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except (TypeError, ValueError):
        raise ValueError(f"{where}: got {shown(text)}, expected base64") from None
