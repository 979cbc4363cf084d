"""What a teacher is asked, a loader's batch, and which rows of its answer are kept."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, SequentialSampler

from fastkd.arguments.messages import shown
from fastkd.distill.batch import IGNORED, Batch, as_batch, rows_at, tensors
from fastkd.distill.self_teachers import BaseTeacher
from fastkd.distill.teachers import EMATeacher

from .pairs import without

NOT_ASKED = ("labels", "teacher", "index")  # of a dict that holds the model's arguments themselves


def teacher_inputs(item: Any) -> Batch:
    """A loader's batch: inputs, (inputs, labels), {"inputs", "labels"}, a model's own arguments
    with "labels" among them, or a `Batch`."""
    if isinstance(item, Mapping) and "inputs" not in item:
        own = {name: x for name, x in item.items() if name not in NOT_ASKED}
        made = Batch(own, item.get("labels"))
    else:
        made = as_batch(item)
    first = next(tensors(made.inputs), None)
    if first is None or not first.dim() or not isinstance(made.labels, (Tensor, type(None))):
        raise TypeError(
            f"loader: got a batch ({type(item).__name__}), expected (inputs, labels), inputs, or "
            "one dict of the teacher's arguments and labels; all of tensors"
        )
    made.samples = first.size(0)
    return made


def asked(item: Any, labels: str | None) -> Batch:
    """A loader's batch, each label in the row that predicts it, as `distill.train` has it."""
    batch = teacher_inputs(item)
    check_labels(batch, labels)
    if labels == "input_ids" and batch.labels is not None and batch.labels.dim() > 1:
        shifted = nn.functional.pad(batch.labels[:, 1:], (0, 1), value=IGNORED)
        return replace(batch, labels=shifted)  # a loader may give its own one again
    return batch


def check_teacher(teacher: Any) -> None:
    """Refuse what cannot be asked before anything is made of it."""
    made_of = isinstance(teacher, (BaseTeacher, EMATeacher)) and not hasattr(teacher, "model")
    if made_of or not callable(teacher):
        got = f"{type(teacher).__name__} without its student" if made_of else shown(teacher)
        raise TypeError(
            f"teacher: got {got}, expected a module, a function of the inputs or a distill.Teacher "
            "(of several: EnsembleTeacher, RoutedTeacher)"
        )


def check_labels(batch: Batch, labels: str | None) -> None:
    """Refuse labels that are the inputs themselves, unless it was said what they are."""
    ids = batch.inputs.get("input_ids") if isinstance(batch.inputs, Mapping) else batch.inputs
    own = batch.labels
    if labels is not None or own is None or not isinstance(ids, Tensor):
        return
    if ids.is_floating_point() or ids.dim() != 2 or ids.shape != own.shape:
        return
    kept, ids = own != IGNORED, ids.to(own.device)
    same = bool(((own == ids) | ~kept).all()) and bool(kept[:, 1:].any())
    if same and not bool(((own[:, :-1] == ids[:, 1:]) | ~kept[:, :-1]).all()):
        raise ValueError(
            "labels: got input_ids themselves (-100 where a token does not count), which "
            "transformers shifts within its loss: labels='input_ids' keeps the rows that predict "
            "them; expected the label of row i in place i, or labels='shifted' if it is"
        )


def trimmed(output: Any, batch: Batch) -> tuple[Any, Tensor | None]:
    """A teacher's output with nothing in the rows that do not count, and rows of each sample.

    Padding in front of a sample, by its attention_mask, is left out: its row 0 is that of its
    first token.
    """
    lead, own = list(output.shape[:-1]), batch.labels
    if len(lead) == 1:
        return (output if own is None else without(output, own == IGNORED)), None
    mask = batch.inputs.get("attention_mask") if isinstance(batch.inputs, Mapping) else None
    mask = mask.cpu() != 0 if isinstance(mask, Tensor) and list(mask.shape) == lead else None
    if own is None and mask is None:
        return output, None
    kept = torch.ones(lead, dtype=torch.bool) if mask is None else mask
    if own is not None:
        kept = kept & (own != IGNORED).cpu()
    place = torch.arange(lead[1])
    if mask is not None and not bool(mask[:, 0].all()):
        at = place + mask.int().argmax(1, keepdim=True)
        inside, at = at < lead[1], at.clamp_max(lead[1] - 1)
        kept, output = kept.gather(1, at) & inside, rows_at(output, at)
    lengths = ((place + 1) * kept).amax(-1) if lead[1] else torch.zeros(lead[0], dtype=torch.int64)
    return without(output, ~kept), lengths


def left(total: int, there: Iterable[tuple[int, int]], mine: range) -> list[range]:
    """Of the samples `mine` of all, the ranges that are not in `there`, (first, last)s in order."""
    if mine.step != 1 or mine.start < 0 or mine.stop > total:
        raise ValueError(f"samples: got {mine}, expected a range of step 1 in {range(total)}")
    gaps, at = [], mine.start
    for first, last in there:
        gaps.append(range(at, min(first, mine.stop)))
        at = max(at, last + 1)
    return [gap for gap in (*gaps, range(at, mine.stop)) if gap]


def shareable(loader: Any) -> int:
    """How many samples a loader in order has; ValueError for another."""
    whole = isinstance(loader, DataLoader) and isinstance(loader.sampler, SequentialSampler)
    if not whole or loader.batch_size is None:
        expected = "a DataLoader of a map-style dataset in its own order, with batch_size"
        raise ValueError(f"loader: got one that ranks cannot share, expected {expected}")
    return len(loader.dataset)


def only(loader: Any, ranges: Iterable[range]) -> tuple[Any, list[list[int]]]:
    """A loader in order for the samples of some ranges alone, and their numbers by batches."""
    size = loader.batch_size
    numbers = [list(of[i : i + size]) for of in ranges for i in range(0, len(of), size)]
    names = ("collate_fn", "num_workers", "prefetch_factor", "multiprocessing_context", "timeout")
    kept = {name: getattr(loader, name) for name in (*names, "pin_memory", "worker_init_fn")}
    return DataLoader(loader.dataset, batch_sampler=numbers, **kept), numbers
