"""Rows of a batch, some of them for the teacher alone, and tokens of one meaning on both sides."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any


def check_tokenizers(student: Any, teacher: Any, columns: int | None) -> None:
    """Raise where an id is one token here and another there: widths that agree do not tell."""
    student_tokens, teacher_tokens = (
        {i: token for token, i in getattr(x, "tokenizer", x).get_vocab().items()}
        for x in (student, teacher)
    )
    common = sorted(
        i for i in student_tokens.keys() & teacher_tokens.keys() if columns is None or i < columns
    )
    other = [i for i in common if student_tokens[i] != teacher_tokens[i]]
    if other:
        i = other[0]
        raise ValueError(
            f"teacher_tokenizer: got other tokens than processing_class at {len(other)} of "
            f"{len(common)} ids (id {i} is {teacher_tokens[i]!r:.40} here and "
            f"{student_tokens[i]!r:.40} there), "
            "expected the same; vocab_size= leaves out those behind it, distill.uld compares "
            "models of other tokenizers"
        )


class Collate:
    """A Trainer's collator, and a word on a stored teacher that it cannot stack."""

    def __init__(
        self,
        collator: Any,
        columns: Sequence[str] = (),
        expect: Callable[[Any], None] = lambda batch: None,
    ) -> None:
        self.collator, self.columns, self.expect = collator, columns, expect

    def __call__(self, rows: Any) -> Any:
        columns = [name for name in self.columns if rows and name in rows[0]]
        apart = {name: [row[name] for row in rows] for name in columns}  # names, lists of ids
        if apart:
            rows = [{k: x for k, x in row.items() if k not in apart} for row in rows]
        made = {**self._batch(rows), **apart} if apart else self._batch(rows)
        self.expect(made)
        return made

    def _batch(self, rows: Any) -> Any:
        try:
            return self.collator(rows)
        except (ValueError, TypeError, RuntimeError) as error:
            if not (rows and isinstance(rows[0], Mapping) and "teacher" in rows[0]):
                raise
            raise ValueError(
                "teacher: got a stored column that the data collator cannot stack (rows of other "
                "lengths?), expected a data_collator= that pads it and makes batch['teacher'] "
                f"of it, logits [B, L, V] or a TopK ({type(error).__name__}: {error!s:.120})"
            ) from error
