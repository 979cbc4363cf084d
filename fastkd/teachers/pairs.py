"""A teacher's stored outputs beside the samples of a dataset: a training loop's batches of both.

Nothing here knows where the outputs are from: a reader has `covers(size)`, and a `TopK` or logits
(or `LinearLogits` that can be indexed) of each of the numbers in `__getitems__(numbers)`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

import fastkd
from fastkd.arguments.messages import MadeOf, shown
from fastkd.distill.batch import IGNORED, rows_at

from .views import check_views

TEACHER = "teacher"


class Paired(MadeOf, Dataset[Any]):
    """A dataset's samples with the teacher's outputs behind them: (inputs, labels, teacher).

    Samples that are dicts have them as one more column, "teacher".

    Args:
        dataset: map-style; sample i is (inputs, labels), inputs alone, or a dict of a model's
            arguments, as the teacher saw them.
        reader: a `store.Reader` that has sample i of it as number i.

    Raises:
        ValueError: samples without an output of the teacher, outputs without a sample, or random
            views other than those that the teacher saw (`views.py`).
    """

    def __init__(self, dataset: Any, reader: Any) -> None:
        if not hasattr(reader, "covers"):
            raise TypeError(f"reader: got {shown(reader)}, expected a store.Reader")
        if not reader.covers(size := len(dataset)):
            raise ValueError(
                f"reader: got {len(reader)} samples, the last number {int(reader.numbers[-1])}, in "
                f"{reader.path}, expected 0 to {size - 1}, the dataset's"
            )
        check_views(dataset, getattr(reader, "path", None))
        self._dataset, self._reader = dataset, reader

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, number: int) -> Any:
        return self.__getitems__([number])[0]

    def __getitems__(self, numbers: Sequence[int]) -> list[Any]:
        said = self._reader.__getitems__(numbers)
        fetch: Callable[[Any], Any] | None = getattr(self._dataset, "__getitems__", None)
        own = fetch(numbers) if fetch else [self._dataset[number] for number in numbers]
        return [_with(sample, teacher) for sample, teacher in zip(own, said, strict=True)]


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
    with rows of index -1 (log-probability -inf, tail 0), logits and hidden states with 0, rows that
    the losses never read where labels are ignored. A teacher may have fewer rows than its sample,
    whose last labels are ignored then.

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
    if (first := _columns_of(samples[0])) is not None:
        rows = [first, *(_columns_of(sample) or {} for sample in samples[1:])]
        if missing := [i for i, row in enumerate(rows) if TEACHER not in row]:
            raise ValueError(
                f"samples: got no 'teacher' in sample {missing[0]} of the batch, expected samples "
                "of `Paired`; a Trainer drops the column unless remove_unused_columns=False"
            )
        said = [row.pop(TEACHER) for row in rows]
        batch = dict(_padded(rows, pad, ignore_index) if collator is None else collator(rows))
        batch[TEACHER] = teachers(said)
        if said[0].dim() > 1:
            _place(batch, said, ignore_index)
        if labels is None:
            return batch
        teacher, own = batch.pop(TEACHER), batch.pop("labels", None)
        if own is not None and own.dim() == 2:
            own = torch.cat([own[:, 1:], torch.full_like(own[:, :1], ignore_index)], 1)
            check_taught(own, teacher, None, ignore_index)
        return {"inputs": batch, "labels": own, TEACHER: teacher}
    if not isinstance(samples[0], tuple):
        return teachers(list(samples))
    *columns, said_ = zip(*samples, strict=True)
    said, longest, counts = list(said_), 0, None
    own_ = [[torch.as_tensor(x) for x in column] for column in columns]
    if said[0].dim() > 1:
        counts = [of.size(0) for of in said]
        for row, count in zip(own_[-1], counts, strict=True):
            if row.dim() == 0 or count > row.size(0):
                raise ValueError(
                    f"samples: got a teacher of {count} rows for a sample of shape "
                    f"{list(row.shape)}, expected at most as many: is it of this sample?"
                )
        longest = max(row.size(0) for row in own_[-1])
    batches = [
        padded(column, fill) for column, fill in zip(own_, [pad, ignore_index], strict=False)
    ]
    taught = teachers(said, longest)
    if len(batches) > 1:
        check_taught(batches[1], taught, counts, ignore_index)
    return (*batches, taught)


def _columns_of(sample: Any) -> dict[str, Any] | None:
    """A sample as columns: a dict, or (dict, teacher), or (dict, labels, teacher); else None."""
    if isinstance(sample, Mapping):
        return dict(sample)
    if isinstance(sample, tuple) and sample and isinstance(sample[0], Mapping):
        more = {TEACHER: sample[-1]} if len(sample) > 1 else {}
        return {**sample[0], **({"labels": sample[1]} if len(sample) > 2 else {}), **more}
    return None


def _padded(rows: list[dict[str, Any]], pad: float, ignore_index: int) -> dict[str, Tensor]:
    fills = {"input_ids": pad, "labels": ignore_index}
    made: dict[str, Tensor] = {}
    ids = [row.get("input_ids", ()) for row in rows]
    if len({len(x) for x in ids}) > 1 and "attention_mask" not in rows[0]:
        made["attention_mask"] = padded([torch.ones(len(x), dtype=torch.int64) for x in ids], 0)
    for name in rows[0]:
        try:
            column = [torch.as_tensor(row[name]) for row in rows]
        except (TypeError, ValueError, RuntimeError, KeyError):
            got = type(rows[0][name]).__name__
            raise TypeError(
                f"samples: got {got} in column {name!r:.60}, expected numbers in each sample "
                "(dataset.remove_columns leaves others out; collator= makes tensors of them)"
            ) from None
        made[name] = padded(column, fills.get(name, 0))
    return made


def _place(batch: dict[str, Any], said: list[Any], ignore_index: int) -> None:
    """Put the teacher's rows beside the tokens that they are of, which may begin behind padding."""
    own, ids, mask = (batch.get(name) for name in ("labels", "input_ids", "attention_mask"))
    of = own if isinstance(own, Tensor) and own.dim() == 2 else ids
    if not isinstance(of, Tensor) or of.dim() < 2:
        raise ValueError(
            "samples: got teachers of sequences without input_ids or labels [B, L], expected one"
        )
    size, length = of.shape[:2]
    front = torch.zeros(size, dtype=torch.int64)
    if isinstance(mask, Tensor) and list(mask.shape) == [size, length]:
        front = (mask != 0).int().argmax(1)
    counts = torch.tensor([x.size(0) for x in said])
    for wrong in (front + counts > length).nonzero().flatten().tolist():
        raise ValueError(
            f"samples: got a teacher of {int(counts[wrong])} rows for sample {wrong} of the batch, "
            f"which has {length - int(front[wrong])} tokens, expected at most as many: is it of "
            "this sample?"
        )
    teacher, place = teachers(said, length), torch.arange(length)
    if bool(front.any()):
        teacher = rows_at(teacher, (place - front[:, None]).clamp_min(0))
        teacher = without(teacher, place < front[:, None])
        if of is own:  # the first token's label is of a row of padding, of which nothing is known
            behind = front.nonzero().flatten()
            batch["labels"] = own = own.clone()
            own[behind, front[behind]] = ignore_index
    batch[TEACHER] = teacher


def check_taught(
    labels: Tensor, teacher: Any, counts: Sequence[int] | None, ignore_index: int
) -> None:
    """Refuse a label that counts in a row of which the cache has nothing.

    Args:
        labels: [B, L] or [B], row i read beside the teacher's.
        teacher: `TopK` or logits, [B, L, ...] or [B, ...].
        counts: rows of each sample that are not padding; None: all.
    """
    if teacher.shape[:-1] != labels.shape:
        return
    bare = torch.zeros_like(labels, dtype=torch.bool)
    if isinstance(teacher, fastkd.TopK):
        bare = (teacher.indices < 0).all(-1)
    elif isinstance(teacher, fastkd.LinearLogits):
        bare = (teacher.hidden == 0).all(-1)
    if counts is not None and labels.dim() == 2:
        bare = bare | (torch.arange(labels.size(1)) >= torch.tensor(counts)[:, None])
    for at in (bare & (labels != ignore_index)).nonzero().tolist():
        where = f"sample {at[0]} of the batch" + (f", row {at[1]}" if len(at) > 1 else "")
        raise ValueError(
            f"samples: got label {int(labels[tuple(at)])} in {where}, where the cache has nothing, "
            f"expected {ignore_index} there, or a cache captured with these labels (capture's "
            "labels= says whether they are shifted)"
        )


def joined(outputs: list[Any], join: Callable[[list[Tensor], float], Tensor]) -> Any:
    """Teachers' outputs as one; `join` has a part of each, and what fills it."""
    first = outputs[0]
    if isinstance(first, Tensor):
        return join(outputs, 0.0)
    if isinstance(first, fastkd.LinearLogits):
        return first.with_hidden(join([x.hidden for x in outputs], 0.0))
    tail = None
    if first.tail_logprob is not None:
        tail = join([x.tail_logprob for x in outputs], 0.0)
    return fastkd.TopK(
        join([x.logprobs for x in outputs], -torch.inf),
        join([x.indices for x in outputs], -1),
        tail_logprob=tail,
        temperature=first.temperature,
        tail=first.tail,
    )


def teachers(outputs: list[Any], longest: int = 0) -> Any:
    """Samples' outputs as a batch's, padded behind their ends to `longest` rows at least."""
    many = outputs[0].dim() > 1
    return joined(outputs, lambda parts, fill: padded(parts, fill, longest, rows=many))


def without(output: Any, ignored: Tensor) -> Any:
    """The same with nothing in the rows ignored, whatever they held."""

    def filled(parts: list[Tensor], fill: float) -> Tensor:
        (x,), rows = parts, ignored.to(output.device)
        return x.masked_fill(rows.unsqueeze(-1) if x.dim() > rows.dim() else rows, fill)

    return joined([output], filled)


def padded(
    samples: list[Tensor], fill: float, longest: int = 0, *, rows: bool | None = None
) -> Tensor:
    """Samples [L, ...] as [B, longest L, ...]; stacked where they are equally long."""
    first = samples[0]
    rows = first.dim() > 0 if rows is None else rows
    most = max(longest, *(x.size(0) for x in samples)) if rows else 0
    if all(x.shape == first.shape for x in samples) and (not rows or first.size(0) == most):
        return torch.stack(samples)
    out = first.new_full((len(samples), most, *first.shape[1:]), fill)
    for row, x in zip(out, samples, strict=True):
        row[: x.size(0)] = x
    return out
