"""Loaders that people give to `capture` and `pseudo_labels`: right, or refused by name."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    Sampler,
    SequentialSampler,
    TensorDataset,
)

from fastkd.recipes.pseudo_labels import pseudo_labels
from fastkd.teachers import store

N = 12
X = torch.randn(N, 6, generator=torch.Generator().manual_seed(0))
DATA = TensorDataset(X, torch.zeros(N, dtype=torch.long))


def net(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Linear(6, 4)


def captured(loader: Any, folder: Path, teacher: Any = None, **options: Any) -> store.Reader:
    store.capture(teacher or net(), loader, folder, vocab_size=4, progress=False, **options)
    return store.Reader(folder)


class Own(Sampler[int]):
    """A user's: shuffles by python's numbers, wraps another, or has an order that stays."""

    def __init__(self, inner: Any = None, fixed: list[int] | None = None) -> None:
        self.inner, self.fixed = inner, fixed

    def __iter__(self) -> Iterator[int]:
        order = list(range(N)) if self.inner is None else list(self.inner)
        if self.inner is None and self.fixed is None:
            random.shuffle(order)
        yield from self.fixed or order

    def __len__(self) -> int:
        return N


class Augmented(Dataset[Any]):
    def __len__(self) -> int:
        return N

    def __getitem__(self, i: int) -> Any:
        return X[i] + 0.1 * torch.randn(6), 0


class Stream(IterableDataset[Any]):
    def __init__(self, shuffled: bool) -> None:
        self.shuffled = shuffled

    def __iter__(self) -> Iterator[Any]:
        order = torch.randperm(N) if self.shuffled else torch.arange(N)
        yield from ((X[i], 0) for i in order.tolist())


class Wrapper:
    """A loader that is none of torch's, around one that is."""

    def __init__(self, loader: Any, shuffled: bool = False) -> None:
        self._dataloader, self.shuffled = loader, shuffled

    def __iter__(self) -> Iterator[Any]:
        batches = list(self._dataloader)
        yield from random.sample(batches, len(batches)) if self.shuffled else batches


class OnePass:
    """Its second reading gives nothing."""

    def __init__(self) -> None:
        self.batches = iter([(X[:5], None), (X[5:], None)])

    def __iter__(self) -> Iterator[Any]:
        for x, _ in self.batches:
            yield x


def _sampled(sampler: Any) -> DataLoader[Any]:
    return DataLoader(DATA, batch_size=4, sampler=sampler)


SHUFFLED: dict[str, Callable[[], Any]] = {
    "shuffle": lambda: DataLoader(DATA, 4, shuffle=True),
    "no batches": lambda: DataLoader(DATA, batch_size=None, sampler=RandomSampler(DATA)),
    "ranks": lambda: _sampled(DistributedSampler(DATA, 1, 0, shuffle=True)),
    "own": lambda: _sampled(Own()),
    "own around": lambda: _sampled(Own(RandomSampler(DATA))),
    "own in batches": lambda: DataLoader(DATA, batch_sampler=BatchSampler(Own(), 4, False)),
    "wrapper": lambda: Wrapper(DataLoader(DATA, 4, shuffle=True)),
    "shuffling wrapper": lambda: Wrapper(DataLoader(DATA, 2), shuffled=True),
    "stream": lambda: DataLoader(Stream(True), 4),
    "workers": lambda: DataLoader(Augmented(), 4, num_workers=1),
    "augmented": lambda: DataLoader(Augmented(), 4),
}


@pytest.mark.parametrize("order", ["dataset", "loader"])
@pytest.mark.parametrize("name", SHUFFLED)
def test_what_changes_is_refused(tmp_path: Path, name: str, order: str) -> None:
    random.seed(0)
    with pytest.raises(ValueError, match=r"loader: .*shuffle=False") as error:
        captured(SHUFFLED[name](), tmp_path, order=order)
    assert len(str(error.value)) <= 500
    if name in ("augmented", "workers"):
        assert "a random transform" in str(error.value)
    random.seed(0)
    with pytest.raises(ValueError, match=r"loader: .*shuffle=False"):
        pseudo_labels(net(), SHUFFLED[name](), 3, order=order)


@pytest.mark.parametrize(
    "sampler",
    [
        DistributedSampler(DATA, 2, 0, shuffle=False),
        Own(fixed=[*range(1, N), 0]),
        list(range(N))[::-1],
    ],
)
def test_an_order_that_is_not_the_datasets(tmp_path: Path, sampler: Any) -> None:
    with pytest.raises(ValueError, match=r"loader: got sample \d+ of the dataset as number \d+"):
        captured(_sampled(sampler), tmp_path / "a")
    reader = captured(_sampled(sampler), tmp_path / "b", order="loader")
    with torch.no_grad():
        expected = net()(X[list(sampler)])
    torch.testing.assert_close(torch.stack(list(reader)), expected)


IN_ORDER: dict[str, Callable[[], Any]] = {
    "plain": lambda: DataLoader(DATA, 5),
    "own": lambda: _sampled(Own(SequentialSampler(DATA))),
    "batches": lambda: DataLoader(DATA, batch_sampler=[list(range(7)), list(range(7, N))]),
    "an iterator of numbers": lambda: _sampled(iter(range(N))),
    "list": lambda: [(X[:3], torch.zeros(3)), (X[3:], torch.zeros(N - 3))],
    "functions": lambda: [lambda: X[:3], lambda: X[3:]],
    "generator": lambda: (X[i : i + 4] for i in range(0, N, 4)),
    "one pass": OnePass,
    "stream": lambda: DataLoader(Stream(False), 4),
    "wrapper": lambda: Wrapper(DataLoader(DATA, 4)),
    "workers": lambda: DataLoader(DATA, 4, num_workers=1),
}


@pytest.mark.parametrize("name", IN_ORDER)
def test_what_stays_is_stored(tmp_path: Path, name: str) -> None:
    teacher = net()
    states = []
    for order in (None, "dataset"):  # what is read twice draws nothing that can be seen
        torch.manual_seed(1)
        reader = captured(IN_ORDER[name](), tmp_path / str(order), teacher, order=order)
        states.append((torch.get_rng_state(), random.getstate()))
    assert torch.equal(states[0][0], states[1][0]) and states[0][1] == states[1][1]
    with torch.no_grad():
        torch.testing.assert_close(torch.stack(list(reader)), teacher(X))
    assert len(pseudo_labels(teacher, IN_ORDER[name](), 3).labels) == N


def test_augmented_samples_on_purpose(tmp_path: Path) -> None:
    assert len(captured(DataLoader(Augmented(), 4), tmp_path, order=None)) == N
    with pytest.raises(ValueError, match="order: got 'sorted', expected 'dataset', 'loader' or"):
        captured(DataLoader(DATA, 4), tmp_path, order="sorted")


def test_rows_that_another_library_read(tmp_path: Path) -> None:
    pq = pytest.importorskip("pyarrow.parquet")
    reader = captured(DataLoader(DATA, batch_size=5), tmp_path / "cache", k=2)
    reader.to_parquet(tmp_path / "new" / "folder")
    table = pq.read_table(tmp_path / "new" / "folder")
    for rows in (table, table.to_batches()[0]):
        for one, two in zip(reader.decode(rows), reader, strict=True):
            assert torch.equal(one.logprobs, two.logprobs)
            assert torch.equal(one.indices, two.indices)
    with pytest.raises(TypeError, match=r"table: got .*with_format\('arrow'\)"):
        reader.decode(table.to_pydict())
    with pytest.raises(ValueError, match=r"got the columns sample.*expected level too"):
        reader.decode(table.drop_columns(["level"]))
