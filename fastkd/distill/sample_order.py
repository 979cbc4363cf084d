"""Does a loader give the same samples, in the same order, each time it is read?

What is stored by number is read by number: a loader of another order gives each student another
sample's teacher, and nothing shows it. So what a loader draws from is looked at (its samplers, the
indices they give), and its first samples are read twice.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import chain, islice, zip_longest
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    IterableDataset,
    RandomSampler,
    Sampler,
    SequentialSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

from .batch import tensors
from .rng_state import random_state, set_random_state

ORDERS = ("dataset", "loader", None)
SAMPLES, BATCHES = 32, 8  # read twice: batches until they have so many samples, at most so many
INDICES = 2**24  # of an order that is not the dataset's, compared at most
RANDOM = (RandomSampler, SubsetRandomSampler, WeightedRandomSampler)
DEPTH = 8
HINT = (
    "expected the same samples in the same order each time: shuffle=False and no random transform "
    "here (fastkd.teachers.store.Views seeds one; shuffle where the student reads)"
)


def check_order(
    loader: Any, order: str | None = "dataset", *, rank: int = 0, ranks: int = 1
) -> None:
    """Refuse a loader whose samplers are random, or give another order than is asked for.

    Args:
        loader: anything that gives batches.
        order: "dataset": sample i is dataset[i] (of rank r among n: r + n * i, or its own i);
            "loader": any order that is the same each time; None: nothing is looked at.
        rank, ranks: whose loader it is.

    Raises:
        ValueError: names the sampler, or the first place that differs.
    """
    if order not in ORDERS:
        raise ValueError(f"order: got {order!r:.60}, expected 'dataset', 'loader' or None")
    if order is None:
        return
    with _unchanged(loader):
        for part in _parts(loader):
            shuffles = not isinstance(part, DataLoader) and getattr(part, "shuffle", None) is True
            if isinstance(part, RANDOM) or shuffles:
                name = type(part).__name__
                raise ValueError(f"loader: got one with {name} (shuffle=True), {HINT}")
        for part in _parts(loader):
            if isinstance(part, DataLoader) and not isinstance(part.dataset, IterableDataset):
                _check_indices(part, order, rank, ranks)


def _parts(loader: Any) -> list[Any]:
    """The loader, and the loaders and samplers that it wraps, by whatever names."""
    found: list[Any] = []
    seen: set[int] = set()
    waiting = [(loader, 0)]
    while waiting:
        part, depth = waiting.pop()
        if id(part) in seen or depth > DEPTH:
            continue
        seen.add(id(part))
        found.append(part)
        held = getattr(part, "__dict__", None) or {}
        if isinstance(part, DataLoader):
            own = [part.batch_sampler, part.sampler]
        else:
            own = [
                value
                for values in held.values()
                for value in (values if isinstance(values, (list, tuple)) else [values])[:64]
            ]
            # DistributedSampler makes a dataset of the sampler that a wrapper gave it
            named = [held.get(name) for name in ("dataset", "data_source")]
            own += [v for x in named for v in (getattr(x, "__dict__", None) or {}).values()]
        waiting += [(x, depth + 1) for x in own if _is_source(x)]
    return found


def _is_source(value: Any) -> bool:
    if isinstance(value, (Sampler, DataLoader)):
        return True
    name = type(value).__name__.lower()
    return hasattr(value, "__iter__") and ("sampler" in name or "dataloader" in name)


def _check_indices(loader: DataLoader[Any], order: str, rank: int, ranks: int) -> None:
    source: Any = loader.sampler if loader.batch_sampler is None else loader.batch_sampler
    if type(source) is BatchSampler:
        source = source.sampler
    if type(source) is SequentialSampler:
        return
    with suppress(Exception):  # whatever a user's sampler raises
        source = copy.copy(source)  # whose own count of its epochs goes on
    first = iter(source)
    if first is source:
        return  # it can be read once only
    if order == "dataset":
        starts = ((0, 1),) if ranks == 1 else ((0, 1), (rank, ranks))
        wrong = [_first_wrong(iter(source), *start) for start in starts]
        if None not in wrong:
            place, got = max(filter(None, wrong), key=lambda at: at[0])
            raise ValueError(
                f"loader: got sample {got!r:.60} of the dataset as number {place} "
                f"({type(source).__name__}), expected the dataset's own order (shuffle=False), by "
                "which the stored teacher is read; order='loader' stores another that stays"
            )
        return
    pairs = zip_longest(_flat(first), _flat(iter(source)))
    for place, (one, two) in enumerate(islice(pairs, INDICES)):
        if one != two:
            got = f"{one!r:.60} and then {two!r:.60} as number {place}"
            raise ValueError(f"loader: got sample {got} ({type(source).__name__}), {HINT}")


def _flat(source: Iterator[Any]) -> Iterator[Any]:
    return chain.from_iterable(x if isinstance(x, (list, tuple)) else (x,) for x in source)


def _first_wrong(source: Iterator[Any], start: int, step: int) -> tuple[int, Any] | None:
    for place, got in enumerate(_flat(source)):
        if got != start + step * place:
            return place, got
    return None


def watched(loader: Any, order: str | None) -> Iterator[Any]:
    """A loader's batches; its first samples are read twice.

    A DataLoader of a map-style dataset is read before the first batch is given, anything else after
    the last: it may be a stream, which gives nothing a second time and is let pass.

    Args:
        loader: anything that gives batches, or functions without arguments that do.
        order: as of `check_order`; None: it is read once.

    Raises:
        ValueError: the samples differ, or their order.
    """
    reread = isinstance(loader, DataLoader) and not isinstance(loader.dataset, IterableDataset)
    late = order is not None and not reread
    if order is not None and reread and not _once(loader):
        with _unchanged(loader):
            first = _start(iter(loader))
            _compare(first, _start(iter(loader)), "a random transform")
    kept: list[list[Tensor]] = []
    for item in loader:
        batch = item() if callable(item) else item
        if late and _wanted(kept):
            kept.append([x.clone() for x in tensors(batch)])
        yield batch
    if late and kept:
        with _unchanged(loader):
            again = iter(loader)
            if again is not loader and (second := _start(again)):
                _compare(kept, second, "another order or a random transform")


@contextmanager
def _unchanged(loader: Any) -> Iterator[None]:
    """All random numbers come as if nothing had been drawn."""
    host = torch.device("cpu")
    state = random_state(loader, host)
    try:
        yield
    finally:
        set_random_state(state, loader, host)


def _once(loader: DataLoader[Any]) -> bool:
    """Are its indices an iterator, which is used up by reading it?"""
    sources = (loader.batch_sampler, loader.sampler)
    return any(isinstance(getattr(x, "sampler", x), Iterator) for x in sources)


def _wanted(kept: list[list[Tensor]]) -> bool:
    count = sum(batch[0].size(0) if batch[0].dim() else 1 for batch in kept if batch)
    return count < SAMPLES and len(kept) < BATCHES


def _start(batches: Iterator[Any]) -> list[list[Tensor]]:
    kept: list[list[Tensor]] = []
    while _wanted(kept):
        try:
            item = next(batches)
        except StopIteration:
            break
        kept.append([x.clone() for x in tensors(item() if callable(item) else item)])
    return kept


def _compare(first: list[list[Tensor]], again: list[list[Tensor]], what: str) -> None:
    one: list[Tensor]
    two: list[Tensor]
    for number, (one, two) in enumerate(zip_longest(first, again, fillvalue=[])):
        if len(one) != len(two) or not all(map(_same, one, two)):
            raise ValueError(
                f"loader: got other samples in batch {number} when it was read a second time: "
                f"{what}, which no stored teacher can follow; {HINT}; order=None stores them as "
                "they come"
            )


def _same(one: Tensor, two: Tensor) -> bool:
    if one.shape != two.shape or one.dtype != two.dtype:
        return False
    same = (one == two) | ((one != one) & (two != two))  # NaN is what it was
    return bool(same.all())
