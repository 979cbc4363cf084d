"""What every format becomes: a `Record` a sequence, and a `Report` of what was read."""

from __future__ import annotations

import json
from typing import Any, NamedTuple

import torch
from torch import Tensor

import fastkd

IGNORED = -100  # torch's own label for a row that does not count


class Record(NamedTuple):
    """A sequence, and what a teacher says of some of its tokens.

    tokens: int64 [L], the sequence's ids; None where the source has none.
    topk: `TopK` [rows, K]. A row without a column is a token of which the source says nothing.
    teaches: int64 [rows], the place in the sequence of the token that each row predicts, so that
        the student's logits for it are `logits[teaches - 1]`. Negative places count from the end,
        where a source knows the last tokens only.
    """

    tokens: Tensor | None
    topk: fastkd.TopK
    teaches: Tensor

    @property
    def taught(self) -> Tensor:
        """bool [rows]: the row has a column."""
        return (self.topk.indices >= 0).any(-1)

    def labels(self, ignore_index: int = IGNORED) -> Tensor:
        """int64 [rows]: the token that each row teaches, ignore_index where it says nothing."""
        if self.tokens is None:
            raise ValueError("tokens: got none in this format, expected read(..., tokens=ids)")
        return torch.where(self.taught, self.tokens[self.teaches], ignore_index)

    def aligned(self) -> fastkd.TopK:
        """`TopK` [n, K] with row i for token i + 1, as a store's samples are; gaps say nothing."""
        if bool((self.teaches < 1).any()):
            raise ValueError(
                "tokens: got rows that count from the end of a sequence without ids, expected "
                "read(..., tokens=ids)"
            )
        size = int(self.teaches.max()) if len(self.teaches) else 0
        place, source, k = self.teaches - 1, self.topk, self.topk.size(-1)
        tail = None
        if source.tail_logprob is not None:
            tail = torch.zeros(size).index_copy(0, place, source.tail_logprob)
        return fastkd.TopK(
            torch.full((size, k), -torch.inf).index_copy(0, place, source.logprobs),
            torch.full((size, k), -1, dtype=torch.int32).index_copy(0, place, source.indices),
            tail_logprob=tail,
            temperature=source.temperature,
            tail=source.tail,
        )


class Rows(NamedTuple):
    """A sequence as a format's file or answer has it: what a family's reader gives."""

    tokens: Tensor | None  # int64 [L]
    ids: Tensor  # int64 [rows, K], -1 absent
    values: Tensor  # float64 [rows, K] of the kind
    teaches: Tensor  # int64 [rows]
    where: str  # for messages
    kind: str | None = None  # where the answer's own field says it


class Options(NamedTuple):
    """What a caller may tell some readers besides the source; see `read`."""

    tokenizer: Any = None
    ids: Any = None
    start: int | None = None
    align: str | None = None
    config: Any = None


class Report(NamedTuple):
    """What was read so far.

    rows and, of them, absent_rows (the source says nothing); columns of the widest row; mean_mass
    and least_mass, the probability that the columns of a row have (None for logits, which have
    none); beyond_vocab, ids >= vocab_size, whose mass is the tail's; renormalized, rows whose mass
    was above 1 by rounding.
    """

    format: str
    sequences: int = 0
    rows: int = 0
    absent_rows: int = 0
    columns: int = 0
    mean_mass: float | None = None
    least_mass: float | None = None
    beyond_vocab: int = 0
    renormalized: int = 0

    def json(self) -> str:
        return json.dumps(self._asdict())

    def __str__(self) -> str:
        text = f"{self.format}: {self.sequences} sequences, {self.rows} rows"
        text += f" ({self.absent_rows} without a teacher), at most {self.columns} columns"
        if self.mean_mass is not None:
            text += f"; mass kept {self.mean_mass:.4f} in the mean, {self.least_mass:.4f} at least"
        if self.beyond_vocab:
            text += f"; {self.beyond_vocab} ids beyond the vocabulary, their mass in the tail"
        if self.renormalized:
            text += f"; {self.renormalized} rows of a mass above 1, renormalized"
        return text


def as_ids(found: Any) -> Tensor | None:
    """int64 [L] of a sequence's ids, None where there are none."""
    return None if found is None else torch.as_tensor(found, dtype=torch.int64)


def ragged(rows: list[list[tuple[int, float]] | None]) -> tuple[Tensor, Tensor]:
    """Rows of (id, value), or None, as ids [rows, K] and values [rows, K]; -1 and -inf pad."""
    filled = [row or [] for row in rows]
    k = max([1, *map(len, filled)])
    pad: list[Any] = [(-1, -torch.inf)]
    square = [row + pad * (k - len(row)) for row in filled]
    ids = torch.tensor([[i for i, _ in row] for row in square], dtype=torch.int64)
    values = torch.tensor([[x for _, x in row] for row in square], dtype=torch.float64)
    return ids.view(-1, k), values.view(-1, k)


def parsed(text: str, where: str) -> Any:
    """JSON of a file or a line; ValueError names it."""
    try:
        return json.loads(text)
    except ValueError as error:
        raise ValueError(f"{where}: got no JSON ({error!s:.80}), expected it") from None
