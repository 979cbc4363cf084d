"""Many ranks write one cache, on any number of ranks again after a death, and read their own."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset, TensorDataset

import fastkd
from bench.__main__ import main as bench_main
from fastkd import distill
from fastkd.__main__ import main
from fastkd.teachers import store
from fastkd.teachers.store import CacheError

V, K, LENGTH = 40, 3, 2
MADE: dict[str, Any] = {"vocab_size": V, "k": K, "tokenizer": "t", "model": "m"}

spawned = pytest.mark.skipif(
    "fork" not in multiprocessing.get_all_start_methods(), reason="no fork here"
)


def data(total: int) -> DataLoader[Any]:
    """Sample i is LENGTH tokens i, i + 1, ... of the teacher's table."""
    inputs = torch.arange(total)[:, None] + torch.arange(LENGTH)
    return DataLoader(TensorDataset(inputs, torch.zeros_like(inputs)), batch_size=3)


def teacher(inputs: Tensor) -> Tensor:
    table = torch.randn(500, V, generator=torch.Generator().manual_seed(0))
    return table[inputs]


def captured(folder: Path | str, total: int, **options: Any) -> int:
    made = {**MADE, "shard_bytes": 400, **options}
    return store.capture(teacher, data(total), folder, progress=False, **made)


def whole(folder: Path, total: int) -> store.Reader:
    """Every sample once, each as the teacher said it."""
    reader = store.Reader(folder, vocab_size=V, tokenizer="t", model="m")
    reader.verify()
    assert reader.complete and reader.merged and len(reader) == total and reader.covers(total)
    assert reader.numbers.tolist() == list(range(total))
    expected = fastkd.topk_from_logits(teacher(data(total).dataset[:][0]), K)
    got = reader.batch(range(total))
    assert torch.equal(got.indices, expected.indices.int())
    within = store.logprob_bound("uint8", K, expected.logprobs.double())
    assert ((got.logprobs.double() - expected.logprobs.double()).abs() <= within).all()
    return reader


def _rank(folder: str, total: int, rank: int, world_size: int) -> None:
    torch.set_num_threads(1)
    captured(folder, total, rank=rank, world_size=world_size)


@spawned
@pytest.mark.parametrize("world_size", [2, 4])
def test_processes_write_one_cache_at_once(tmp_path: Path, world_size: int) -> None:
    """The last one to end has named the shards of all."""
    fork = multiprocessing.get_context("fork")
    jobs = [
        fork.Process(target=_rank, args=(str(tmp_path), 53, rank, world_size))
        for rank in range(world_size)
    ]
    for job in jobs:
        job.start()
    for job in jobs:
        job.join()
        assert job.exitcode == 0
    before = whole(tmp_path, 53).identity()
    ranks = {shard.rank for shard in store.Reader(tmp_path).shards}
    assert ranks == set(range(world_size))
    assert not store.merge(tmp_path)
    (tmp_path / "state.json").write_bytes(b"damaged")
    assert main(["cache", "verify", str(tmp_path)]) == 1
    assert main(["cache", "merge", str(tmp_path)]) == 0
    assert whole(tmp_path, 53).identity() == before  # a checkpoint still knows its cache
    datasets = pytest.importorskip("datasets")
    assert datasets.load_from_disk(str(tmp_path))["sample"][:] == list(range(53))


def _write_for_ever(folder: str, rank: int) -> None:
    torch.set_num_threads(1)
    writer = store.Writer(folder, **MADE, total=10**6, rank=rank, shard_bytes=300)
    for number in range(1000 * rank, 10**6):
        inputs = torch.arange(number, number + LENGTH) % 500
        writer.add(fastkd.topk_from_logits(teacher(inputs), K), sample=number)


@spawned
def test_a_killed_rank_loses_its_unfinished_shard_alone(tmp_path: Path) -> None:
    fork = multiprocessing.get_context("fork")
    jobs = [fork.Process(target=_write_for_ever, args=(str(tmp_path), rank)) for rank in (0, 1)]
    for job in jobs:
        job.start()
    limit = time.monotonic() + 60
    while len(list(tmp_path.glob("teacher-*"))) < 6 and time.monotonic() < limit:
        time.sleep(0.005)
    for job in jobs:
        assert job.pid is not None and job.exitcode is None
        os.kill(job.pid, signal.SIGKILL)
        job.join()
    reader = store.Reader(tmp_path)
    reader.verify()
    assert not reader.complete and not reader.merged
    for rank in (0, 1):
        mine = reader.numbers[reader.numbers // 1000 == rank]
        assert torch.equal(mine, 1000 * rank + torch.arange(len(mine)))  # whole up to its last
    assert store.merge(tmp_path) and len(store.Reader(tmp_path)) == len(reader)


@pytest.mark.parametrize("again", [1, 3, 7])
def test_what_is_missing_is_written_by_another_number_of_ranks(tmp_path: Path, again: int) -> None:
    class Dies(nn.Module):
        asked = 0

        def forward(self, inputs: Tensor) -> Tensor:
            self.asked += 1
            if self.asked == 4:
                raise OSError("gone")
            return teacher(inputs)

    captured(tmp_path, 50, rank=0, world_size=4)
    options: dict[str, Any] = {**MADE, "shard_bytes": 200, "progress": False}
    with pytest.raises(OSError, match="gone"):  # in hand: lost
        store.capture(Dies(), data(50), tmp_path, rank=2, world_size=4, **options)
    there = store.Reader(tmp_path)
    assert not there.complete
    shares = [store.share(tmp_path, 50, rank=r, world_size=again) for r in range(again)]
    left = sorted(number for parts in shares for part in parts for number in part)
    assert left == sorted(set(range(50)) - set(there.numbers.tolist()))
    files = {shard.file: shard.file.stat().st_mtime_ns for shard in there.shards}
    for rank in range(again):
        captured(tmp_path, 50, rank=rank, world_size=again)
    assert all(file.stat().st_mtime_ns == at for file, at in files.items())
    reader = whole(tmp_path, 50)
    mine = sum(shard.last + 1 - shard.first for shard in reader.shards if shard.rank == 0)
    assert captured(tmp_path, 50, rank=0, world_size=2) == mine  # nothing is left
    assert whole(tmp_path, 50).identity() == reader.identity()


def test_a_rank_may_name_its_own_range(tmp_path: Path) -> None:
    captured(tmp_path, 20, rank=5, samples=range(11, 20))
    captured(tmp_path, 20, rank=0, samples=range(11))
    whole(tmp_path, 20)
    for wrong in (range(0, 21), range(0, 8, 2)):
        with pytest.raises(ValueError, match="expected a range of step 1"):
            captured(tmp_path, 20, rank=1, samples=wrong)
    with pytest.raises(ValueError, match="rank: got 3 of 3 ranks"):
        captured(tmp_path, 20, rank=3, world_size=3)
    with pytest.raises(ValueError, match="loader: got one that ranks cannot share"):
        store.capture(teacher, list(data(6)), tmp_path, **MADE, rank=0, world_size=2)
    with pytest.raises(CacheError, match="total: got 21, expected 20"):
        captured(tmp_path, 21, rank=0, world_size=2)
    with store.Writer(tmp_path, **MADE, total=20, rank=0) as writer:
        one = fastkd.topk_from_logits(torch.randn(LENGTH, V), K)
        with pytest.raises(ValueError, match="which this rank has"):
            writer.add(one, sample=10)
        with pytest.raises(ValueError, match="below 20"):
            writer.add(one, sample=20)


def test_merging_an_empty_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(FileNotFoundError, match="no teacher cache there"):
        store.merge(tmp_path / "none")
    assert main(["cache", "merge", str(tmp_path)]) == 1
    assert "no teacher cache there" in capsys.readouterr().err
    captured(tmp_path, 9, rank=1, world_size=2)
    assert main(["cache", "merge", str(tmp_path)]) == 0
    assert "5 samples of 9 in 1 shards, merged before" in capsys.readouterr().out


# ---- reading by rank, with torch's own means


def run_of(folder: Path, rank: int, stop: int | None, checkpoint: Path | None) -> nn.Module:
    """A student taught by a rank's part of a cache; stopped after some steps where asked."""
    torch.manual_seed(0)
    student = nn.Embedding(500, V)
    reader = store.Reader(folder)
    pairs = store.Paired(data(60).dataset, reader)
    part = Subset(pairs, range(rank * 30, rank * 30 + 30))
    shuffle = torch.Generator().manual_seed(rank)
    loader = DataLoader(part, 4, shuffle=True, generator=shuffle, collate_fn=store.collate)

    def on_step(epoch: int, step: int, loss: Any) -> None:
        if step + 1 == stop:
            raise KeyboardInterrupt

    kept = checkpoint and distill.Checkpoints(checkpoint, every=1, resume=True)
    options: dict[str, Any] = {"epochs": 2, "teacher": reader, "progress": False, "lr": 0.1}
    distill.train(
        student, loader, distill.soft(temperature=1.0), checkpoint=kept, on_step=on_step, **options
    )
    assert {reader.shards[at].rank for at in reader._open} <= {rank}
    return student


def test_the_trainer_resumes_within_a_rank_s_epoch(tmp_path: Path) -> None:
    """And opens the shards of its own part alone."""
    for rank in range(2):
        captured(tmp_path / "c", 60, rank=rank, world_size=2)
    for rank in range(2):
        expected = run_of(tmp_path / "c", rank, None, None)
        folder = tmp_path / f"run-{rank}"
        for stop in (3, 11):
            with pytest.raises(KeyboardInterrupt):
                run_of(tmp_path / "c", rank, stop, folder)
        got = run_of(tmp_path / "c", rank, None, folder)
        assert torch.equal(got.weight, expected.weight)


def test_the_benchmark_at_toy_size(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "scale.json"
    toy = ["--toy", "--folder", str(tmp_path), "--json", str(path)]
    assert bench_main(["store-scale", *toy]) == 0
    assert "shards" in capsys.readouterr().out and list(tmp_path.iterdir()) == [path]
