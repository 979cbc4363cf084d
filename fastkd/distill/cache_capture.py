"""From a teacher and its data to a cache."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from itertools import repeat
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import DataLoader, RandomSampler

import fastkd

from .cache_job import Job
from .cache_loader import IGNORED
from .cache_share import only, share, size_of
from .cache_writer import Writer
from .progress import progress_bar


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
    **options: Any,
) -> int:
    """Run a teacher over its data and write what it says to a cache; goes on where one ended.

    Sample i of the cache is sample i of the loader (of rank r among n: number r + n * i), so the
    loader must give the same samples in the same order each time. Rows whose label is -100 are not
    stored where they end a sample, and elsewhere as rows of padding.

    Many ranks capture one dataset with `world_size`, `samples` or `group`: each is given the loader
    of all of it, runs the teacher over its share alone, writes files of its own, and, where a job
    died, the next goes on with what is missing, on any number of ranks (see `share`). `merge` then
    makes one index of theirs; with `group` that is done here, before and after.

    Args:
        teacher: inputs -> logits [B, L, V] or [B, V], a `LinearLogits`, or an object with logits; a
            module runs in eval mode, on its own device, and without gradient.
        loader: gives (inputs, labels [B, L] or [B]), or inputs alone, in an order that stays.
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
        TypeError, ValueError: a shuffled loader, outputs of other sizes than the batch, or an
            argument of `Writer` or `fastkd.topk_from_logits` out of range.
        CacheError, OSError: see `Writer`.
        RuntimeError: another rank of `group` failed or died; names it, and its error.
    """
    if isinstance(loader, DataLoader) and isinstance(loader.sampler, RandomSampler):
        raise ValueError("loader: got one with shuffle=True, expected the same order each time")
    chosen: dict[str, Any] = {"method": method, "temperature": temperature, "tail": tail}
    numbers: Iterable[list[int] | None] = repeat(None)
    job: Job | None = None
    if group is not None:
        rank, world_size = dist.get_rank(group), dist.get_world_size(group)
        job = Job(group, path)
    with job or nullcontext():
        if shared := world_size is not None or samples is not None:
            total = size_of(loader)
            mine = {"rank": rank or 0, "world_size": world_size or (rank or 0) + 1}
            left = share(path, total, samples=samples, **mine)
            loader, numbers = only(loader, left)  # type: ignore[arg-type]
            options["total"] = total
        with (
            Writer(path, vocab_size=vocab_size, k=k, rank=rank or 0, **chosen, **options) as writer,
            progress_bar(progress, desc="capture", unit="sample") as bar,
            _asked(teacher) as device,
        ):
            if job:
                job.begin()
            start, seen, tokens, begun = 0 if shared else writer.done, 0, 0, time.monotonic()
            for batch, named in zip(loader, numbers, strict=False):
                if job:
                    job.look()
                inputs, labels = _parts(batch)
                size = len(inputs)
                known, seen = min(max(start - seen, 0), size), seen + size
                if known < size:
                    inputs = inputs[known:]
                    labels = None if labels is None else labels[known:]
                    logits = teacher(inputs if device is None else inputs.to(device))
                    logits = getattr(logits, "logits", logits)
                    _of_batch(logits, inputs, labels, k)
                    output: Any
                    if k is None:
                        output = logits[..., :vocab_size]
                    else:
                        output = fastkd.topk_from_logits(
                            logits, k, vocab_size=vocab_size, generator=generator, **chosen
                        )
                    tokens += _add(writer, output, labels, named)
                    rate = tokens / max(time.monotonic() - begun, 1e-9)
                    text = f"{rate:.0f} tokens/s, {writer.bytes_per_token:.0f} bytes/token"
                    bar.set_postfix_str(text, refresh=False)
                bar.update(size)
            if seen < start:
                got = f"got {seen} samples, expected the {start} stored, and more"
                raise ValueError(f"loader: {got}")
    return writer.done


def _add(writer: Writer, output: Any, labels: Tensor | None, samples: list[int] | None) -> int:
    """Rows added, those that have a label."""
    lengths = None
    if labels is not None:
        output = _without(output, labels == IGNORED)
        lengths = _lengths(labels != IGNORED) if labels.dim() == 2 else None
    writer.add_batch(output, lengths=lengths, samples=samples)
    return output.shape[:-1].numel() if lengths is None else int(lengths.sum())


@contextmanager
def _asked(teacher: Any) -> Iterator[torch.device | None]:
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


def _parts(batch: Any) -> tuple[Tensor, Tensor | None]:
    parts: list[Any] = list(batch) if isinstance(batch, (tuple, list)) else [batch]
    if len(parts) not in (1, 2) or not all(isinstance(part, Tensor) for part in parts):
        got = ", ".join(type(part).__name__ for part in parts)
        raise TypeError(f"loader: got a batch ({got}), expected (inputs, labels) or inputs")
    return parts[0], parts[1] if len(parts) == 2 else None


def _of_batch(logits: Any, inputs: Tensor, labels: Tensor | None, k: int | None) -> None:
    """Does each sample have its logits?"""
    if not isinstance(logits, (Tensor, fastkd.LinearLogits) if k else Tensor):
        expected = "a tensor of logits" + (" or LinearLogits" if k else ", as k is None")
        raise TypeError(f"teacher: got {type(logits).__name__}, expected {expected}")
    lead = list(logits.shape[:-1])
    of_inputs = labels is None and len(lead) in (1, 2) and lead[0] == len(inputs)
    if not of_inputs and (labels is None or lead != list(labels.shape)):
        wanted = f"[{len(inputs)}, ..., V]" if labels is None else f"{[*labels.shape]} and V"
        raise ValueError(f"teacher: got logits {list(logits.shape)}, expected {wanted}")


def _without(output: Any, ignored: Tensor) -> Any:
    """The same with nothing in the rows ignored, whatever they held."""
    ignored = ignored.to(output.device)
    if isinstance(output, Tensor):
        return output.masked_fill(ignored.unsqueeze(-1), 0.0)
    tail = output.tail_logprob
    return fastkd.TopK(
        output.logprobs.masked_fill(ignored.unsqueeze(-1), -torch.inf),
        output.indices.masked_fill(ignored.unsqueeze(-1), -1),
        tail_logprob=None if tail is None else tail.masked_fill(ignored, 0.0),
        temperature=output.temperature,
        tail=output.tail,
    )


def _lengths(kept: Tensor) -> Tensor:
    """Rows of each sample up to the last that is kept, of kept [B, L]."""
    place = torch.arange(1, kept.size(1) + 1, device=kept.device)
    return (place * kept).amax(-1) if kept.size(1) else place.new_zeros(kept.size(0))
