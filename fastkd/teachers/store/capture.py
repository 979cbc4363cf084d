"""From a teacher and its data to a cache."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from itertools import repeat
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, SequentialSampler

import fastkd
from fastkd.distill.batch import Batch, Outputs, device_of, forward, in_eval, to
from fastkd.distill.logging import progress_bar
from fastkd.distill.sample_order import check_order, watched

from .format import listed
from .reader import Reader
from .teacher_inputs import SAMPLES, check_labels, check_same, part, teacher_inputs, trimmed
from .writer import Writer


@torch.no_grad()
def capture(
    teacher: Callable[[Any], Any],
    loader: Iterable[Any],
    path: str | os.PathLike[str],
    *,
    labels: str | None = None,
    order: str | None = "dataset",
    generator: torch.Generator | None = None,
    progress: bool = True,
    rank: int = 0,
    world_size: int | None = None,
    samples: range | None = None,
    **options: Any,
) -> int:
    """Run a teacher over its data and write what it says to a cache; goes on where one ended.

    Sample i of the cache is sample i of the loader and must be sample i of its dataset, by which
    `Paired` reads it: a loader that shuffles is refused, and so is one whose first samples are
    others when they are read a second time. Row i of a sample is stored where its label counts;
    other rows are not stored where they end a sample, and elsewhere as rows of padding. Without
    labels an attention_mask says which rows count; padding in front of a sample is left out.

    Where a cache is there already, the first samples stored are asked for again, and outputs that
    encoding and rounding do not explain are refused. Many ranks share one dataset with
    `world_size`: each is given the loader of all of it, and captures what is missing of its share.

    Args:
        teacher: inputs -> logits [B, L, V] or [B, V], a `LinearLogits`, or an object with logits; a
            module runs in eval mode, on its own device.
        loader: gives inputs, (inputs, labels [B, L] or [B]), or one dict of the teacher's arguments
            and labels. Its first samples are read twice, but of an iterator.
        path: the cache's folder.
        labels: "shifted": row i counts where label i is not -100, as the losses here read it.
            "input_ids": where label i + 1 is not, transformers' own. None: "shifted", and labels
            that equal the inputs are refused.
        order: "dataset": as above. "loader": another order that stays: read the cache by the
            loader's own count. None: nothing is checked.
        generator: for the draws of method="sample". A resumed capture makes new draws.
        progress: show a tqdm bar with tokens per second.
        rank, world_size: this rank among how many that share the loader's samples.
        samples: the numbers this rank has, in place of an equal share.
        options: of `Writer`: vocab_size, k, method, temperature, tail, encoding, model, tokenizer,
            data, shard_bytes; k=None stores all logits.

    Returns:
        Number of samples in this rank's part of the cache.

    Raises:
        TypeError, ValueError: a loader, samples or a teacher that are not as above, or an argument
            of `Writer` or `fastkd.topk_from_logits` out of range.
        CacheError, OSError: see `Writer`.
    """
    if labels not in ("shifted", "input_ids", None):
        raise ValueError(f"labels: got {labels!r:.60}, expected 'shifted', 'input_ids' or None")
    check_order(loader, order)
    numbers: Iterable[list[int] | None] = repeat(None)
    shared = world_size is not None or samples is not None
    again: tuple[Any, list[int]] | None = None  # a batch that is stored, and its samples
    if shared:
        options["total"] = total = size_of(loader)
        left = share(path, total, rank=rank, world_size=world_size or rank + 1, samples=samples)
        if order is not None and (known := listed(Path(path))):
            first = range(known[0].first, known[0].last + 1)[:SAMPLES]
            again = loader.collate_fn([loader.dataset[i] for i in first]), list(first)  # type: ignore
        loader, numbers = _only(loader, left)
    with (
        Writer(path, rank=rank, **options) as writer,
        progress_bar(progress, desc="capture", unit="sample") as bar,
        in_eval(teacher) if isinstance(teacher, nn.Module) else nullcontext(),
    ):
        ask = _Ask(teacher, writer, labels, generator)
        start, seen, tokens, begun = 0 if shared else writer.done, 0, 0, time.monotonic()
        if again:
            ask.again(path, teacher_inputs(again[0]), again[1])
        for item, named in zip(watched(loader, order), numbers, strict=False):
            batch = teacher_inputs(item)
            check_labels(batch, labels)
            known_ = min(max(start - seen, 0), batch.samples)
            if known_ and not seen and order is not None:
                ask.again(path, batch, range(known_))
            if known_ < batch.samples:
                output, lengths = ask(part(batch, known_))
                first_ = None if shared else list(range(seen + known_, seen + batch.samples))
                writer.add_batch(output, lengths=lengths, samples=named or first_)
                tokens += output.shape[:-1].numel() if lengths is None else int(lengths.sum())
                rate = tokens / max(time.monotonic() - begun, 1e-9)
                bar.set_postfix_str(f"{rate:.0f} tokens/s", refresh=False)
            seen += batch.samples
            bar.update(batch.samples)
        if seen < start:
            got = f"got {seen} samples, expected the {start} stored, and more"
            raise ValueError(f"loader: {got}")
    return writer.done


class _Ask:
    """A teacher's outputs as they are stored."""

    def __init__(self, teacher: Any, writer: Writer, labels: str | None, generator: Any) -> None:
        self._teacher, self._spec, self._labels = teacher, writer.spec, labels
        self._draws = {"method": writer.spec.method, "generator": generator}
        self._device = device_of(teacher) if isinstance(teacher, nn.Module) else None

    def __call__(self, batch: Batch, **other: Any) -> tuple[Any, Tensor | None]:
        """Outputs of a batch, and how many rows each sample has."""
        spec, own = self._spec, batch.labels
        inputs = batch.inputs if self._device is None else to(batch.inputs, self._device)
        logits = Outputs(forward(self._teacher, inputs), role="teacher").logits
        kinds: Any = (Tensor, fastkd.LinearLogits) if spec.k else Tensor
        if not isinstance(logits, kinds):
            expected = "a tensor of logits" + (" or LinearLogits" if spec.k else ", as k is None")
            raise TypeError(f"teacher: got {type(logits).__name__}, expected {expected}")
        lead = list(logits.shape[:-1])
        good = len(lead) in (1, 2) and lead[0] == batch.samples
        if not (good if own is None else lead == list(own.shape)):
            wanted = f"[{batch.samples}, ..., V]" if own is None else f"{[*own.shape]} and V"
            raise ValueError(f"teacher: got logits {list(logits.shape)}, expected {wanted}")
        self.dtype = logits.dtype
        if spec.k is None:
            return trimmed(logits[..., : spec.vocab_size], batch, self._labels)
        made: dict[str, Any] = {"temperature": spec.temperature, "tail": spec.tail, **self._draws}
        made |= {"vocab_size": spec.vocab_size, **other}
        return trimmed(fastkd.topk_from_logits(logits, spec.k, **made), batch, self._labels)

    def again(self, path: Any, batch: Batch, numbers: Sequence[int]) -> None:
        """Ask for some samples that are stored, and compare."""
        numbers, spec = list(numbers)[:SAMPLES], self._spec
        if spec.k is not None and spec.k > spec.vocab_size:
            return  # more draws than there are columns to compare them with
        output, lengths = self(part(batch, 0, len(numbers)), method="top")
        reader = Reader(path)
        stored = reader.__getitems__(numbers)
        if lengths is not None and (got := [x.size(0) for x in stored]) != lengths.tolist():
            raise ValueError(
                f"loader: got samples of {lengths.tolist()} rows, expected the {got} stored in "
                f"{str(path)[:150]}: other data or labels"
            )
        said = [output[i] for i in range(len(numbers))]
        check_same(path, reader.spec, stored, said, self.dtype)


def share(
    path: str | os.PathLike[str],
    total: int,
    *,
    rank: int,
    world_size: int,
    samples: range | None = None,
) -> list[range]:
    """The samples left to a rank, in ranges: of its n-th of all, or of `samples`, those that
    nobody has written yet to the folder `path`."""
    if not 0 <= rank < world_size:
        raise ValueError(f"rank: got {rank} of {world_size} ranks, expected 0 to {world_size - 1}")
    mine = samples or range(rank * total // world_size, (rank + 1) * total // world_size)
    if mine.step != 1 or mine.start < 0 or mine.stop > total:
        raise ValueError(f"samples: got {samples}, expected a range of step 1 in {range(total)}")
    left, at = [], mine.start
    for shard in listed(Path(path)):
        left.append(range(at, min(shard.first, mine.stop)))
        at = max(at, shard.last + 1)
    return [gap for gap in (*left, range(at, mine.stop)) if gap]


def size_of(loader: Any) -> int:
    """Samples of a loader that ranks can share."""
    whole = isinstance(loader, DataLoader) and isinstance(loader.sampler, SequentialSampler)
    if not whole or loader.batch_size is None:
        raise ValueError(
            "loader: got one that ranks cannot share, expected a DataLoader of a map-style dataset "
            "in its own order, all of it, with batch_size"
        )
    return len(loader.dataset)


def _only(loader: Any, ranges: list[range]) -> tuple[DataLoader[Any], list[list[int]]]:
    """The same loader for these samples alone, and their numbers by batches within a range."""
    size = loader.batch_size
    numbers = [list(of[i : i + size]) for of in ranges for i in range(0, len(of), size)]
    names = ("collate_fn", "num_workers", "prefetch_factor", "multiprocessing_context", "timeout")
    kept = {name: getattr(loader, name) for name in (*names, "pin_memory", "worker_init_fn")}
    return DataLoader(loader.dataset, batch_sampler=numbers, **kept), numbers
