"""From a cache's samples to a training loop's batches."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.utils.data import Dataset

from .columns import TEACHER, check_taught, collate_columns, columns_of
from .padding import padded, teachers
from .reader import Reader

IGNORED = -100  # torch's own label for a row that does not count


class Paired(Dataset[Any]):
    """A dataset's samples with the teacher's outputs behind them: (inputs, labels, teacher).

    Samples that are dicts have them as one more column, "teacher".

    Args:
        dataset: map-style; sample i is (inputs, labels), inputs alone, or a dict of a model's
            arguments, as the teacher saw them.
        reader: the cache that has sample i of it as number i.

    Raises:
        ValueError: samples without an output of the teacher, or outputs without a sample.
    """

    def __init__(self, dataset: Any, reader: Reader) -> None:
        size = len(dataset)
        if not reader.covers(size):
            most = int(reader.table.last.max()) if len(reader) else None
            raise ValueError(
                f"reader: got {len(reader)} samples, the last number {most}, in {reader.path}, "
                f"expected 0 to {size - 1}, the dataset's"
            )
        self._dataset, self._reader = dataset, reader

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, number: int) -> tuple[Any, ...]:
        return self.__getitems__([number])[0]

    def __getitems__(self, numbers: Sequence[int]) -> list[tuple[Any, ...]]:
        teachers = self._reader.__getitems__(numbers)
        fetch: Callable[[Any], Any] | None = getattr(self._dataset, "__getitems__", None)
        own = fetch(numbers) if fetch else [self._dataset[number] for number in numbers]
        return [_with(sample, teacher) for sample, teacher in zip(own, teachers, strict=True)]


def _with(sample: Any, teacher: Any) -> Any:
    if isinstance(sample, Mapping):
        if TEACHER in sample:
            raise ValueError("dataset: got a column 'teacher' already, expected none")
        return {**sample, TEACHER: teacher}
    return (*(sample if isinstance(sample, (tuple, list)) else [sample]), teacher)


def collate(
    samples: Sequence[Any],
    *,
    pad: float = 0,
    ignore_index: int = IGNORED,
    labels: str | None = None,
    collator: Callable[[list[dict[str, Any]]], Any] | None = None,
) -> Any:
    """A DataLoader's `collate_fn` for samples of a `Reader` or of a `Paired` dataset.

    Sequences are padded behind their ends: inputs with `pad`, labels with `ignore_index`, a `TopK`
    with rows of index -1 (log-probability -inf, tail 0) and logits with 0, rows that the losses
    never read where labels are ignored. A teacher may have fewer rows than its sample, whose last
    labels are ignored then.

    Dicts of columns (input_ids, attention_mask, labels, ..., teacher) become a dict of batches with
    the key "teacher", as transformers' Trainer takes it: labels are those of the dataset, row i of
    the teacher is for the token behind position i. With labels="shifted" they become {"inputs",
    "labels", "teacher"} for `distill.train`, the labels moved to the rows that predict them.

    Args:
        samples: teacher's outputs, (inputs, teacher)s or (inputs, labels, teacher)s: `TopK` [L, K]
            or [K], logits [L, V] or [V], labels [L] or a number, inputs [L, ...] or any one shape;
            or dicts with "teacher".
        pad: of inputs, or input_ids (a tokenizer's pad_token_id).
        labels: of dicts: None or "shifted", see above.
        collator: of dicts: makes a batch of the other columns (DataCollatorForSeq2Seq, ...); None:
            they are padded here.

    Returns:
        The same with a batch's dimension in front.

    Raises:
        TypeError: a column that is no numbers.
        ValueError: a sample whose teacher has more rows than labels (it is of another sample), or
            has nothing in a row whose label counts.
    """
    if labels not in (None, "shifted"):
        raise ValueError(f"labels: got {labels!r:.60}, expected 'shifted' or None")
    if (first := columns_of(samples[0])) is not None:
        rows = [first, *(columns_of(sample) or {} for sample in samples[1:])]
        return collate_columns(
            rows, pad=pad, ignore_index=ignore_index, labels=labels, collator=collator
        )
    if not isinstance(samples[0], tuple):
        return teachers(list(samples))
    columns = list(zip(*samples, strict=True))
    said, longest = list(columns[-1]), 0
    own = [[torch.as_tensor(x) for x in column] for column in columns[:-1]]
    if said[0].dim() > 1:
        for row, of in zip(own[-1], said, strict=True):
            if row.dim() == 0 or of.size(0) > row.size(0):
                raise ValueError(
                    f"samples: got a teacher of {of.size(0)} rows for a sample of shape "
                    f"{list(row.shape)}, expected at most as many: is it of this sample?"
                )
        longest = max(row.size(0) for row in own[-1])
    fills = [pad, ignore_index]
    batches = [padded(column, fill) for column, fill in zip(own, fills, strict=False)]
    taught = teachers(said, longest)
    if len(batches) > 1:
        counts = [x.size(0) for x in said] if said[0].dim() > 1 else None
        check_taught(batches[1], taught, counts, ignore_index)
    return (*batches, taught)
