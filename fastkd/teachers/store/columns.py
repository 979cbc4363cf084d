"""Samples that are dicts of a model's arguments, with the teacher's output as one more column."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

import fastkd

from .padding import padded, teachers
from .teacher_inputs import rows_at, without

TEACHER = "teacher"


def columns_of(sample: Any) -> dict[str, Any] | None:
    """A sample as columns: a dict, or (dict, teacher), or (dict, labels, teacher); else None."""
    if isinstance(sample, Mapping):
        return dict(sample)
    if isinstance(sample, tuple) and sample and isinstance(sample[0], Mapping):
        more = {TEACHER: sample[-1]} if len(sample) > 1 else {}
        return {**sample[0], **({"labels": sample[1]} if len(sample) > 2 else {}), **more}
    return None


def collate_columns(
    rows: Sequence[dict[str, Any]],
    *,
    pad: float,
    ignore_index: int,
    labels: str | None,
    collator: Callable[[list[dict[str, Any]]], Any] | None,
) -> dict[str, Any]:
    """See `collate`."""
    if missing := [i for i, row in enumerate(rows) if TEACHER not in row]:
        raise ValueError(
            f"samples: got no 'teacher' in sample {missing[0]} of the batch, expected samples of "
            "`Paired`; a Trainer drops the column unless remove_unused_columns=False"
        )
    rows = [dict(row) for row in rows]
    said = [row.pop(TEACHER) for row in rows]
    batch = dict(_padded(rows, pad, ignore_index) if collator is None else collator(rows))
    if said[0].dim() == 1:
        batch[TEACHER] = teachers(said)
    else:
        _place(batch, said, ignore_index)
    if labels is None:
        return batch
    teacher, own = batch.pop(TEACHER), batch.pop("labels", None)
    if own is not None and own.dim() == 2:
        own = torch.cat([own[:, 1:], torch.full_like(own[:, :1], ignore_index)], 1)
        check_taught(own, teacher, None, ignore_index)
    return {"inputs": batch, "labels": own, TEACHER: teacher}


def _padded(rows: list[dict[str, Any]], pad: float, ignore_index: int) -> dict[str, Tensor]:
    fills = {"input_ids": pad, "labels": ignore_index}
    made: dict[str, Tensor] = {}
    ragged = False
    for name in rows[0]:
        try:
            column = [torch.as_tensor(row[name]) for row in rows]
        except (TypeError, ValueError, RuntimeError, KeyError):
            got = type(rows[0][name]).__name__
            raise TypeError(
                f"samples: got {got} in column {name!r:.60}, expected numbers in each sample "
                "(dataset.remove_columns leaves others out; collator= makes tensors of them)"
            ) from None
        ragged |= name == "input_ids" and len({x.shape for x in column}) > 1
        made[name] = padded(column, fills.get(name, 0))
    if ragged and "attention_mask" not in made:
        ones = [torch.ones(len(row["input_ids"]), dtype=torch.int64) for row in rows]
        made["attention_mask"] = padded(ones, 0)
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
    if bool((front + counts > length).any()):
        wrong = int((front + counts > length).nonzero()[0, 0])
        raise ValueError(
            f"samples: got a teacher of {int(counts[wrong])} rows for sample {wrong} of the batch, "
            f"which has {length - int(front[wrong])} tokens, expected at most as many: is it of "
            "this sample?"
        )
    teacher = teachers(said, length)
    if bool(front.any()):
        place = torch.arange(length)
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
    if counts is not None and labels.dim() == 2:
        bare = bare | (torch.arange(labels.size(1)) >= torch.tensor(counts)[:, None])
    bare = bare & (labels != ignore_index)
    if bool(bare.any()):
        at = bare.nonzero()[0].tolist()
        where = f"sample {at[0]} of the batch" + (f", row {at[1]}" if len(at) > 1 else "")
        raise ValueError(
            f"samples: got label {int(labels[tuple(at)])} in {where}, where the cache has nothing, "
            f"expected {ignore_index} there, or a cache captured with these labels (capture's "
            "labels= says whether they are shifted)"
        )
