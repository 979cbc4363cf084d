"""SGLang's `/generate`: nested triples, flat lists or base64, by the fields that are there."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from .records import Options, Rows
from .wire import answers, field, id_of, numbers, prompt_rows, shaped, value

TOP = "input_top_logprobs"
DTYPES = {"val": torch.float32, "idx": torch.int32}


def read(source: Any, _: Options) -> Iterator[Rows]:
    """meta_info's rows of the input; the token itself joins its row, from input_token_logprobs.

    The sequence is what logprob_start_len left of the input; its first entry is null.
    """
    for where, answer in answers(source):
        meta, at = field(answer, "meta_info", where), f"{where}.meta_info"
        own = field(meta, "input_token_logprobs", at, "return_logprob and logprob_start_len=0")
        if own and own[0][0] is not None:
            raise ValueError(f"{at}.input_token_logprobs: got {own[0][0]} first, expected null")
        parts = [
            (name, [_triples(row, f"{at}.{name}") for row in meta[name]])
            for name in (TOP, "input_token_ids_logprobs")
            if meta.get(name) is not None
        ]
        if f"{TOP}_shape" in meta:
            parts.append((f"{TOP}_shape", _flat(meta, at)))
        if not parts:
            wanted = f"{TOP}, {TOP}_shape or input_token_ids_logprobs (top_logprobs_num=k)"
            raise ValueError(f"{at}: got none of the top columns, expected {wanted}")
        for name, more in parts:
            if len(more) != len(own):
                got = f"{len(more)} rows for {len(own)} tokens"
                raise ValueError(f"{at}.{name}: got {got}, expected one for each")
        rows: list[Any] = []
        for place, entry in enumerate(own):
            named = [x for _, more in parts for x in more[place]]
            rows.append(named and [*named, *_triples([entry], at)])
        yield prompt_rows(rows, [x[1] for x in own], at)


def _triples(row: Any, where: str) -> list[tuple[int, float]]:
    return [(id_of(x[1], where, digits=False), value(x[0], where)) for x in row or ()]


def _flat(meta: Any, where: str) -> list[list[tuple[int, float]]]:
    """Rows of two long arrays; shape counts the null rows in front in some versions."""
    count, k = (int(x) for x in meta[f"{TOP}_shape"])
    nulls = int(field(meta, f"{TOP}_null_prefix", where, "the number of null rows in front"))
    parts = []
    for name, dtype in DTYPES.items():
        at = f"{TOP}_{name}_flat"
        if (text := meta.get(f"{at}_b64")) is not None:
            at += "_b64"
            if f"torch.{meta.get(f'{at}_dtype')}" != str(dtype):
                got = f"{at}_dtype={meta.get(f'{at}_dtype')!r}"
                raise ValueError(f"{where}: got {got}, expected {str(dtype)[6:]!r}")
        found = numbers(text if text is not None else field(meta, at, where), dtype, at)
        rows = count - nulls if len(found) == (count - nulls) * k else count
        parts.append(shaped(found, [rows, k], f"{where}.{at}").tolist())
    values, ids = parts
    pairs = [[*zip(i, x, strict=True)] for i, x in zip(ids, values, strict=True)]
    return [[] for _ in range(nulls)] + pairs
