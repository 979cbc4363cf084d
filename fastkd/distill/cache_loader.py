"""From a cache's samples to a training loop's batches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

import fastkd

from .cache_reader import Reader

IGNORED = -100  # torch's own label for a row that does not count


class Paired(Dataset[Any]):
    """A dataset's samples with the teacher's outputs behind them: (inputs, labels, teacher).

    Args:
        dataset: map-style; sample i is (inputs, labels), or inputs alone, as the teacher saw them.
        reader: the cache that has sample i of it as number i.

    Raises:
        ValueError: samples without an output of the teacher, or outputs without a sample.
    """

    def __init__(self, dataset: Any, reader: Reader) -> None:
        numbers, size = reader.numbers, len(dataset)
        if len(numbers) != size or (size and int(numbers[-1]) != size - 1):
            most = int(numbers[-1]) if len(numbers) else None
            raise ValueError(
                f"reader: got {len(numbers)} samples, the last number {most}, in {reader.path}, "
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
        return [
            (*(sample if isinstance(sample, (tuple, list)) else [sample]), teacher)
            for sample, teacher in zip(own, teachers, strict=True)
        ]


def collate(samples: Sequence[Any], *, pad: float = 0, ignore_index: int = IGNORED) -> Any:
    """A DataLoader's `collate_fn` for samples of a `Reader` or of a `Paired` dataset.

    Sequences are padded behind their ends: inputs with `pad`, labels with `ignore_index`, a `TopK`
    with rows of index -1 (log-probability -inf, tail 0) and logits with 0, rows that the losses
    never read where labels are ignored. A teacher may have fewer rows than its sample, whose last
    labels are ignored then.

    Args:
        samples: teacher's outputs, (inputs, teacher)s or (inputs, labels, teacher)s: `TopK` [L, K]
            or [K], logits [L, V] or [V], labels [L] or a number, inputs [L, ...] or any one shape.

    Returns:
        The same with a batch's dimension in front.

    Raises:
        ValueError: a sample whose teacher has more rows than labels: it is of another sample.
    """
    if not isinstance(samples[0], tuple):
        return _teachers(list(samples), 0)
    columns = list(zip(*samples, strict=True))
    teachers, longest = list(columns[-1]), 0
    own = [[torch.as_tensor(x) for x in column] for column in columns[:-1]]
    if teachers[0].dim() > 1:
        for row, of in zip(own[-1], teachers, strict=True):
            if row.dim() == 0 or of.size(0) > row.size(0):
                raise ValueError(
                    f"samples: got a teacher of {of.size(0)} rows for a sample of shape "
                    f"{list(row.shape)}, expected at most as many: is it of this sample?"
                )
        longest = max(row.size(0) for row in own[-1])
    fills = [pad, ignore_index]
    batches = [_padded(column, fill) for column, fill in zip(own, fills, strict=False)]
    return (*batches, _teachers(teachers, longest))


def _teachers(outputs: list[Any], longest: int) -> Any:
    if isinstance(outputs[0], Tensor):
        return _padded(outputs, 0.0, longest)
    first = outputs[0]
    tail = None
    if first.tail_logprob is not None:
        tail = _padded([x.tail_logprob for x in outputs], 0.0, longest, rows=first.dim() > 1)
    return fastkd.TopK(
        _padded([x.logprobs for x in outputs], -torch.inf, longest, rows=first.dim() > 1),
        _padded([x.indices for x in outputs], -1, longest, rows=first.dim() > 1),
        tail_logprob=tail,
        temperature=first.temperature,
        tail=first.tail,
    )


def _padded(
    samples: list[Tensor], fill: float, longest: int = 0, *, rows: bool | None = None
) -> Tensor:
    """Samples [L, ...] as [B, longest L, ...]; stacked where they are equally long."""
    first = samples[0]
    if rows is None:
        rows = first.dim() > 0
    most = max(longest, *(x.size(0) for x in samples)) if rows else 0
    if all(x.shape == first.shape for x in samples) and (not rows or first.size(0) == most):
        return torch.stack(samples)
    out = first.new_full((len(samples), most, *first.shape[1:]), fill)
    for row, x in zip(out, samples, strict=True):
        row[: x.size(0)] = x
    return out
