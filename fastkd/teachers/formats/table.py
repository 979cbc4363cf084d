"""The table of formats, and the one way to read and to write them."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastkd.arguments.messages import describe, listed, shown
from fastkd.arguments.numbers import integer

from . import axolotl, distillkit, few_fields, generated, openai, sglang, trl, vllm
from .records import Options, Record, Report, Rows
from .settle import ROUNDING, Counts, Rules, settle

TAILS = ("bucket", "renormalize", "restrict", "drop")


class Format(NamedTuple):
    """A row of the table.

    read(source, options) gives `Rows`; write(records, path), or None; kinds of its values, the
    first one unless the caller names another (None first: the caller must); tail of its `TopK`s;
    options that it takes.
    """

    read: Callable[[Any, Options], Iterator[Rows]]
    write: Callable[[Iterable[Record], Any], None] | None
    kinds: tuple[str | None, ...]
    tail: str
    text: str
    options: tuple[str, ...] = ()
    ordered: bool = True


LOGS = ("logprob", "logit")
BUCKET, NORM = "bucket", "renormalize"
formats: dict[str, Format] = {
    "vllm": Format(vllm.read, vllm.write, LOGS, BUCKET, "prompt_logprobs, served or offline"),
    "vllm-echo": Format(vllm.read_echo, None, LOGS, BUCKET, "completions, echo and logprobs"),
    "vllm-ids": Format(
        vllm.read_ids, None, LOGS, BUCKET, "scores of given ids", ("ids", "start"), False
    ),
    "sglang": Format(sglang.read, None, LOGS, BUCKET, "/generate: nested, flat, base64"),
    "trl": Format(trl.read, None, LOGS, BUCKET, "/get_sequence_logprobs/"),
    "openai": Format(openai.read, None, LOGS, BUCKET, "chat, tokens by bytes", ("tokenizer",)),
    "llama.cpp": Format(generated.read_llama_cpp, None, ("logprob", "prob"), BUCKET, "/completion"),
    "tgi": Format(generated.read_tgi, None, LOGS, BUCKET, "/generate, top_tokens"),
    "distillkit": Format(
        distillkit.read, distillkit.write, ("logprob",), NORM, "Parquet and YAML", ("config",)
    ),
    "distillkit-legacy": Format(
        distillkit.read_legacy, None, (None, *LOGS), NORM, "64-bit words", ("config",)
    ),
    "distillkit-raw": Format(distillkit.read_raw, None, (None, *LOGS), NORM, "top_values"),
    "axolotl-v1": Format(axolotl.read_v1, None, ("logprob",), NORM, "token_id:N in logprobs"),
    "axolotl-v2": Format(axolotl.read_v2, axolotl.write_v2, ("logprob",), NORM, "target_token_ids"),
    "llamakd": Format(
        few_fields.read_llamakd, few_fields.write_llamakd, LOGS, BUCKET, "targets", ("align",)
    ),
    "easydistill": Format(
        few_fields.read_easydistill, few_fields.write_easydistill, ("prob",), BUCKET, "JSON lines"
    ),
    "trl-rows": Format(trl.read_rows, trl.write_rows, LOGS, BUCKET, "teacher_topk_ids"),
    "verl": Format(few_fields.read_verl, few_fields.write_verl, LOGS, BUCKET, "teacher_ids"),
}
PICKLES = "holds pickles, and to read one is to run whatever code it holds"
REFUSED = {"maxtext": f".array_record {PICKLES}: convert it with MaxText's own reader"}


class Reading(Iterator[Record]):
    """An iterator of `Record`s; `report` tells what was read so far."""

    def __init__(self, name: str, rows: Iterator[Rows], rules: Rules, tokens: Any) -> None:
        self._rows, self._rules, self._counts = rows, rules, Counts(name)
        self._tokens = None if tokens is None else iter(_sequences(tokens))

    @property
    def report(self) -> Report:
        return self._counts.report

    def __repr__(self) -> str:
        return f"Reading({self.report.format!r}, {self.report.sequences} sequences so far)"

    def __next__(self) -> Record:
        rows = next(self._rows, None)
        if rows is None:
            if self._tokens is not None and next(self._tokens, None) is not None:
                got = f"more sequences than the {self.report.sequences} of the source"
                raise ValueError(f"tokens: got {got}, expected one for each")
            raise StopIteration
        if self._tokens is not None:
            rows = _placed(rows, next(self._tokens, None))
        else:
            _check_places(rows)
        return Record(rows.tokens, settle(rows, self._rules, self._counts), rows.teaches)


def read(
    format: str,
    source: Any,
    *,
    kind: str | None = None,
    vocab_size: int | None = None,
    temperature: float = 1.0,
    tail: str | None = None,
    dtype: str = "float32",
    tokens: Any = None,
    tokenizer: Any = None,
    ids: Any = None,
    start: int | None = None,
    align: str | None = None,
    config: Any = None,
) -> Reading:
    """Read what another tool wrote or a server answered.

    Args:
        format: a name of `formats.formats`; the README says what each holds, and its traps.
        source: a file or folder; an answer as json.loads gives it, or a list of them; rows of a
            dataset, as dicts.
        kind: "logprob", "prob" or "logit", where a format leaves that open. It is never guessed,
            and a value that contradicts it is an error. Logits are known up to their sum:
            tail="renormalize" or "restrict".
        vocab_size: V of the student; ids beyond give their mass to the tail, and are counted.
        temperature: T that the teacher's softmax had; what servers say of a prompt is T = 1.
        tail: of the `TopK`s; None: "bucket" with log(1 - sum p), or "renormalize" where a format
            does not say that its numbers are those of a full softmax.
        dtype: in which the values were rounded before they came; a mass above 1 by so much is
            renormalized, and refused above that.
        tokens: the ids of each sequence, prompt and all: a list of them, or one for one sequence.
        tokenizer: openai: {bytes: id}, or a tokenizer; see `openai.byte_ids`.
        ids, start: vllm-ids: the request's prompt_logprob_token_ids and prompt_logprob_start.
        align: llamakd: "next" (row i is for token i + 1) or "token" (for token i).
        config: distillkit: the compression's settings, a dict or a YAML file.

    Returns:
        An iterator of `Record`s, whose `report` tells what it has read.

    Raises:
        TypeError, ValueError: names the field, what came and what was expected.
        FileNotFoundError: a source, or a file of config, that is not there; at the call already.
        ImportError: a format that needs pyarrow, pyyaml or numpy, which are not there.
    """
    entry = _entry(format)
    for name, path in (("source", source), ("config", config)):
        _check_there(name, path)
    given = Options(tokenizer, ids, start, align, config)
    for name, got in given._asdict().items():
        if got is not None and name not in entry.options:
            raise TypeError(f"{name}: got {describe(got)}, expected none: {format} takes none")
    if vocab_size is not None and (integer(vocab_size) or 0) < 1:
        raise ValueError(f"vocab_size: got {shown(vocab_size)}, expected the student's, at least 1")
    known = [str(x) for x in entry.kinds if x]
    if kind not in (known if entry.kinds[0] is None else [None, *known]):
        raise ValueError(f"kind: got {shown(kind)} for {format}, expected {' or '.join(known)}")
    declared, kind = kind is not None, kind or str(entry.kinds[0])
    tail = tail or ("renormalize" if kind == "logit" else entry.tail)
    if tail not in TAILS or (kind == "logit" and tail in ("bucket", "drop")):
        known = list(TAILS[1:3] if kind == "logit" else TAILS)
        raise ValueError(f"tail: got {shown(tail)}, expected {' or '.join(known)}")
    if dtype not in ROUNDING:
        raise ValueError(f"dtype: got {shown(dtype)}, expected one of {listed(ROUNDING)}")
    rules = Rules(kind, declared, vocab_size, temperature, tail, dtype, entry.ordered)
    return Reading(format, entry.read(source, given), rules, tokens)


def write(format: str, records: Iterable[Record], path: str | os.PathLike[str]) -> None:
    """Write records in another tool's format.

    What a format has no place for is left out: the tail's mass, and ids where it holds none.

    Raises:
        ValueError: a format that is read only, a temperature other than 1, which no format
            records, or a record without the ids that it needs.
    """
    entry = _entry(format)
    if entry.write is None:
        able = listed(name for name, other in formats.items() if other.write)
        raise ValueError(f"format: got {format!r}, which is read only, expected one of {able}")
    entry.write(_cold(records, format), path)


def _cold(records: Iterable[Record], name: str) -> Iterator[Record]:
    for record in records:
        if record.topk.temperature != 1.0:
            got = f"temperature={record.topk.temperature:g}"
            raise ValueError(f"records: got {got}, expected 1: {name} has no place for another")
        yield record


def _entry(name: Any) -> Format:
    if isinstance(name, str) and name in formats:
        return formats[name]
    if isinstance(name, str) and name in REFUSED:
        raise ValueError(f"format: got {name!r}, which is not read: {REFUSED[name]}")
    raise ValueError(f"format: got {shown(name)}, expected one of {listed(formats, 30)}")


def _check_there(name: str, path: Any) -> None:
    """FileNotFoundError for a path that leads nowhere; JSON's text is no path."""
    if not isinstance(path, (str, os.PathLike)) or str(path).lstrip()[:1] in ("{", "["):
        return
    if not os.path.exists(path):
        expected = "an existing file or folder"
        raise FileNotFoundError(
            f"{name}: got {str(path)!r:.200}, which is not there, expected {expected}"
        )


def _sequences(tokens: Any) -> Iterable[Any]:
    if isinstance(tokens, Tensor) and tokens.dim() == 1:
        return [tokens]
    if isinstance(tokens, (list, tuple)) and tokens and isinstance(tokens[0], int):
        return [tokens]
    return tokens


def _placed(rows: Rows, tokens: Any) -> Rows:
    """The rows beside the whole sequence's ids, of which the source may have the last alone."""
    if tokens is None:
        raise ValueError("tokens: got fewer sequences than the source, expected one for each")
    whole = torch.as_tensor(tokens, dtype=torch.int64)
    teaches = rows.teaches
    if (own := rows.tokens) is not None:
        if len(own) > len(whole) or not torch.equal(whole[len(whole) - len(own) :], own):
            got = f"{describe(whole.tolist())} for {rows.where}"
            raise ValueError(f"tokens: got {got}, expected the end of them to be its {shown(own)}")
        teaches = torch.where(teaches < 0, teaches, teaches + len(whole) - len(own))
    teaches = torch.where(teaches < 0, teaches + len(whole), teaches)
    rows = rows._replace(tokens=whole, teaches=teaches)
    _check_places(rows)
    return rows


def _check_places(rows: Rows) -> None:
    """Each row's token must be there; nobody predicts a sequence's first."""
    if rows.tokens is None or not len(rows.teaches):
        return
    size, least, most = len(rows.tokens), int(rows.teaches.min()), int(rows.teaches.max())
    if most >= size or least < -size or least == 0:
        got = f"rows for the tokens {least} to {most} of a sequence of {size}"
        raise ValueError(f"{rows.where}: got {got}, expected 1 to {size - 1}: other tokens?")
