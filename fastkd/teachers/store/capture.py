"""From a teacher and its data to a cache."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from itertools import repeat
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

import fastkd
from fastkd.distill.batch import to
from fastkd.distill.logging import progress_bar
from fastkd.distill.sample_order import check_order, watched

from .assignment import only, share, size_of
from .format import INDEXES
from .rank_watch import RankWatch
from .reader import Reader
from .same_teacher import SAMPLES, check_same
from .teacher_inputs import LABELS, TeacherInputs, answer, check_labels, teacher_inputs, trimmed
from .writer import Writer


def capture(
    teacher: Callable[[Any], Any],
    loader: Iterable[Any],
    path: str | os.PathLike[str],
    *,
    vocab_size: int,
    k: int | None = None,
    method: str = "top",
    temperature: float = 1.0,
    tail: str = "bucket",
    generator: torch.Generator | None = None,
    progress: bool = True,
    rank: int | None = None,
    world_size: int | None = None,
    samples: range | None = None,
    group: Any = None,
    order: str | None = "dataset",
    labels: str | None = None,
    **options: Any,
) -> int:
    """Run a teacher over its data and write what it says to a cache; goes on where one ended.

    Sample i of the cache is sample i of the loader (of rank r among n: number r + n * i), and that
    must be sample i of its dataset, by which `Paired` reads it: a loader that shuffles, by whatever
    sampler or wrapper, is refused, and so is one whose first samples are others when they are read
    a second time (random transforms).

    Row i of a sample is stored where label i is not -100: labels are those that the losses here
    read in row i, the next token's for a language model. With labels="input_ids" they are
    transformers' own, shifted by nobody yet, and row i is stored where label i + 1 is not -100.
    Other rows are not stored where they end a sample, and elsewhere as rows of padding; without
    labels an attention_mask says which rows count, and padding in front of a sample is left out.

    A cache that is there already is added to by the teacher that it is of: the first samples
    stored are asked for again, and outputs that encoding and rounding do not explain are refused.

    Many ranks capture one dataset with `world_size`, `samples` or `group`: each is given the loader
    of all of it, runs the teacher over its share alone, writes files of its own, and, where a job
    died, the next goes on with what is missing, on any number of ranks (see `share`). `merge` then
    makes one index of theirs; with `group` that is done here, before and after.

    Args:
        teacher: inputs -> logits [B, L, V] or [B, V], a `LinearLogits`, or an object with logits; a
            module runs in eval mode, on its own device, and without gradient.
        loader: gives (inputs, labels [B, L] or [B]), or inputs alone, in its dataset's order;
            inputs may be a dict of the teacher's arguments, and one dict may hold these and
            labels, as transformers' collators give it. Its first samples are read twice, but of
            an iterator, which lasts one pass.
        order: "dataset": as above. "loader": another order that stays (a sampler of fixed indices,
            batches by length): read the cache by the loader's own count. None: nothing is checked.
        labels: "shifted" or "input_ids", see above; None: "shifted", and labels that equal the
            inputs are refused.
        path, vocab_size, k, method, temperature, tail: see `Writer`; k=None stores all logits.
        generator: for the draws of method="sample". A resumed capture makes new draws.
        progress: show a tqdm bar with tokens per second and bytes per token.
        rank, world_size: this rank among how many that share the loader's samples.
        samples: the numbers this rank has, in place of an equal share.
        group: a process group, all ranks of which are here: its rank and size. Where one of them
            fails or dies, the others stop, with what they captured stored.
        options: of `Writer`: model, tokenizer, data, encoding, ranks (each rank has a loader of its
            own samples), shard_bytes.

    Returns:
        Number of samples in this rank's part of the cache.

    Raises:
        TypeError, ValueError: a shuffled loader, samples that change from one reading to the next,
            another order than the dataset's, outputs of other sizes than the batch, or an
            argument of `Writer` or `fastkd.topk_from_logits` out of range.
        CacheError, OSError: see `Writer`.
        RuntimeError: another rank of `group` failed or died; names it, and its error.
    """
    if labels not in LABELS:
        raise ValueError(f"labels: got {labels!r:.60}, expected 'shifted', 'input_ids' or None")
    check_order(loader, order, rank=rank or 0, ranks=options.get("ranks", 1))
    chosen: dict[str, Any] = {"method": method, "temperature": temperature, "tail": tail}
    numbers: Iterable[list[int] | None] = repeat(None)
    job: RankWatch | None = None
    if group is not None:
        rank, world_size = dist.get_rank(group), dist.get_world_size(group)
        job = RankWatch(group, path)
    with job or nullcontext():
        if shared := world_size is not None or samples is not None:
            total = size_of(loader)
            mine = {"rank": rank or 0, "world_size": world_size or (rank or 0) + 1}
            left = share(path, total, samples=samples, **mine)
            data, (loader, numbers) = loader, only(loader, left)  # type: ignore[arg-type]
            options["total"] = total
        with (
            Writer(path, vocab_size=vocab_size, k=k, rank=rank or 0, **chosen, **options) as writer,
            progress_bar(progress, desc="capture", unit="sample") as bar,
            _modes(teacher) as device,
        ):
            if job:
                job.begin()
            teach = _Teach(teacher, device, vocab_size, k, labels, chosen)
            start, seen, tokens, begun = 0 if shared else writer.done, 0, 0, time.monotonic()
            if shared and order is not None:
                teach.probe_dataset(path, data)
            for batch, named in zip(watched(loader, order), numbers, strict=False):
                if job:
                    job.look()
                whole = teacher_inputs(batch)
                check_labels(whole, labels)
                size = len(whole)
                known, seen = min(max(start - seen, 0), size), seen + size
                if known and seen == size and order is not None:
                    numbered = [(rank or 0) + options.get("ranks", 1) * i for i in range(known)]
                    teach.probe(path, whole.part(0, known), numbered)
                if known < size:
                    output, lengths = teach(whole.part(known), generator)
                    writer.add_batch(output, lengths=lengths, samples=named)
                    rows = output.shape[:-1].numel() if lengths is None else int(lengths.sum())
                    tokens += rows
                    rate = tokens / max(time.monotonic() - begun, 1e-9)
                    text = f"{rate:.0f} tokens/s, {writer.bytes_per_token:.0f} bytes/token"
                    bar.set_postfix_str(text, refresh=False)
                bar.update(size)
            if seen < start:
                got = f"got {seen} samples, expected the {start} stored, and more"
                raise ValueError(f"loader: {got}")
    return writer.done


class _Teach:
    """A teacher's outputs as they are stored."""

    def __init__(
        self,
        teacher: Any,
        device: torch.device | None,
        vocab_size: int,
        k: int | None,
        labels: str | None,
        chosen: dict[str, Any],
    ) -> None:
        self._teacher, self._device, self._vocab, self._k = teacher, device, vocab_size, k
        self._labels, self._chosen = labels, chosen

    def __call__(
        self, given: TeacherInputs, generator: torch.Generator | None = None, **other: Any
    ) -> tuple[Any, Tensor | None]:
        """Outputs of a batch, and how many rows each sample has."""
        inputs = given.inputs if self._device is None else to(given.inputs, self._device)
        logits = answer(self._teacher, inputs)
        _of_batch(logits, given, self._k)
        self.dtype = logits.dtype
        output: Any
        if self._k is None:
            output = logits[..., : self._vocab]
        else:
            made: dict[str, Any] = {**self._chosen, **other}
            output = fastkd.topk_from_logits(
                logits, self._k, vocab_size=self._vocab, generator=generator, **made
            )
        return trimmed(output, given, self._labels)

    def probe(self, path: Any, given: TeacherInputs, numbers: Sequence[int]) -> None:
        """Ask for some samples that are stored, and compare."""
        reader = Reader(path)
        numbers, given = numbers[:SAMPLES], given.part(0, min(len(numbers), SAMPLES))
        if not bool((reader.check().find(torch.tensor(numbers)) >= 0).all()):
            return  # a writer gave them numbers of its own
        there = self._k is None or self._k <= self._vocab
        if there:
            output, lengths = self(given, method="top")
            stored = reader.__getitems__(numbers)
            said = [output[i] for i in range(len(numbers))]
            if lengths is not None and [x.size(0) for x in stored] != lengths.tolist():
                raise ValueError(
                    f"loader: got samples of {lengths.tolist()} rows, expected the "
                    f"{[x.size(0) for x in stored]} stored in {str(path)[:150]}: other data or "
                    "labels"
                )
            check_same(path, reader.spec, stored, said, self.dtype)

    def probe_dataset(self, path: Any, loader: Any) -> None:
        """The same of a shared cache's first samples, from the dataset itself."""
        if next(Path(path).glob(INDEXES), None) is None:
            return
        reader = Reader(path)
        if len(reader):
            shard = int(reader.table.first.argmin())
            numbers = reader.of_shard(shard)[:SAMPLES].tolist()
            batch = loader.collate_fn([loader.dataset[number] for number in numbers])
            self.probe(path, teacher_inputs(batch), numbers)


@contextmanager
def _modes(teacher: Any) -> Iterator[torch.device | None]:
    """A module's device, with it in eval mode; no gradient."""
    modules = list(teacher.modules()) if isinstance(teacher, nn.Module) else []
    modes = [(module, module.training) for module in modules]
    device = None
    if isinstance(teacher, nn.Module):
        device = next((p.device for p in teacher.parameters()), torch.device("cpu"))
        teacher.eval()
    try:
        with torch.no_grad():
            yield device
    finally:
        for module, training in modes:
            module.training = training


def _of_batch(logits: Any, given: TeacherInputs, k: int | None) -> None:
    """Does each sample have its logits?"""
    if not isinstance(logits, (Tensor, fastkd.LinearLogits) if k else Tensor):
        expected = "a tensor of logits" + (" or LinearLogits" if k else ", as k is None")
        raise TypeError(f"teacher: got {type(logits).__name__}, expected {expected}")
    lead, labels, size = list(logits.shape[:-1]), given.labels, len(given)
    of_inputs = labels is None and len(lead) in (1, 2) and lead[0] == size
    if not of_inputs and (labels is None or lead != list(labels.shape)):
        wanted = f"[{size}, ..., V]" if labels is None else f"{[*labels.shape]} and V"
        raise ValueError(f"teacher: got logits {list(logits.shape)}, expected {wanted}")
