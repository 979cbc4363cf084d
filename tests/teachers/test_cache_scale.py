"""Many ranks write one cache, on any number of ranks again after a death, and read their own."""

from __future__ import annotations

import hashlib
import itertools
import json
import multiprocessing
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import ranks
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import fastkd
from bench.__main__ import main as bench_main
from bench.families import store_scale
from fastkd import distill
from fastkd.__main__ import main
from fastkd.teachers import store
from fastkd.teachers.store import CacheError, format
from fastkd.teachers.store import reader as reader_file
from fastkd.teachers.store.index import Places, Table

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
    assert reader.complete and len(reader) == total and reader.covers(total)
    assert reader.numbers.tolist() == list(range(total))
    inputs = data(total).dataset[:][0]
    expected = fastkd.topk_from_logits(teacher(inputs), K)
    got = reader.batch(range(total))
    assert torch.equal(got.indices, expected.indices.int())
    within = store.logprob_bound("uint8", K, expected.logprobs.double())
    assert ((got.logprobs.double() - expected.logprobs.double()).abs() <= within).all()
    return reader


def write_all(folder: Path, total: int, world_size: int) -> None:
    for rank in range(world_size):
        captured(folder, total, rank=rank, world_size=world_size)


# ---- writing


def _rank(folder: str, total: int, rank: int, world_size: int) -> None:
    torch.set_num_threads(1)
    captured(folder, total, rank=rank, world_size=world_size)


@spawned
@pytest.mark.parametrize("world_size", [2, 4])
def test_processes_write_one_cache_at_once(tmp_path: Path, world_size: int) -> None:
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
    folders = {f"teacher-{rank:05d}" for rank in range(world_size)}
    assert {file.parent.name for file in tmp_path.rglob("*.safetensors")} == folders
    assert store.merge(tmp_path)
    assert whole(tmp_path, 53).identity() == before  # a checkpoint still knows its cache


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
    while len(list(tmp_path.rglob("0*.safetensors"))) < 6 and time.monotonic() < limit:
        time.sleep(0.005)
    with pytest.raises(BlockingIOError, match="writer of this rank is at work"):
        store.merge(tmp_path)
    for job in jobs:
        assert job.pid is not None and job.exitcode is None
        os.kill(job.pid, signal.SIGKILL)
        job.join()
    reader = store.Reader(tmp_path)
    reader.verify()
    for rank in (0, 1):
        mine = reader.numbers[reader.numbers // 1000 == rank]
        assert torch.equal(mine, 1000 * rank + torch.arange(len(mine)))  # whole up to its last
    assert store.merge(tmp_path) and len(store.Reader(tmp_path)) == len(reader)


@pytest.mark.parametrize("merged", [True, False])
@pytest.mark.parametrize("again", [1, 3, 7])
def test_what_is_missing_is_written_by_another_number_of_ranks(
    tmp_path: Path, again: int, merged: bool
) -> None:
    class Dies(nn.Module):
        asked = 0

        def forward(self, inputs: Tensor) -> Tensor:
            self.asked += 1
            if self.asked == 4:
                raise OSError("gone")
            return teacher(inputs)

    captured(tmp_path, 50, rank=0, world_size=4)
    with pytest.raises(OSError, match="gone"):  # in hand: lost
        store.capture(
            Dies(),
            data(50),
            tmp_path,
            **MADE,
            rank=2,
            world_size=4,
            progress=False,
            shard_bytes=200,
        )
    there = store.Reader(tmp_path)
    assert not there.complete
    if merged:
        assert store.merge(tmp_path)
    shares = [store.share(tmp_path, 50, rank=r, world_size=again) for r in range(again)]
    left = sorted(number for parts in shares for part in parts for number in part)
    assert left == sorted(set(range(50)) - set(there.numbers.tolist()))
    sizes = [sum(map(len, parts)) for parts in shares]
    assert not merged or max(sizes) - min(sizes) <= 1  # equal, whoever died
    files = {file: file.stat().st_mtime_ns for file in tmp_path.rglob("0*.safetensors")}
    write_all(tmp_path, 50, again)
    assert all(file.stat().st_mtime_ns == at for file, at in files.items())
    reader = whole(tmp_path, 50)
    assert reader.table.step.tolist() == [1] * len(reader.table)
    assert store.merge(tmp_path)
    whole(tmp_path, 50)
    asked = captured(tmp_path, 50, rank=0, world_size=2)  # nothing is left
    assert asked == int(reader.table.of_rank(0).samples.sum())


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
        with pytest.raises(ValueError, match="expected numbers of `share`"):
            writer.add(one)
        with pytest.raises(ValueError, match="below 20"):
            writer.add(one, sample=20)


def _in_group(folder: str, total: int) -> tuple[int, bool, str]:
    done = captured(folder, total, group=dist.group.WORLD)
    checked = store.Reader(folder).contents.checked
    dist.barrier()
    index = Path(folder) / "index-00001.json"
    if dist.get_rank() == 0:
        index.rename(Path(folder) / "away")
    try:
        captured(folder, total, group=dist.group.WORLD)
    except CacheError as error:  # the first rank's, on all of them
        return done, checked, str(error)
    finally:
        dist.barrier()
        if dist.get_rank() == 0:
            (Path(folder) / "away").rename(index)
    return done, checked, "nothing raised"


def test_a_process_group_shares_and_merges(tmp_path: Path) -> None:
    results = ranks.run(2, _in_group, str(tmp_path), 21)
    assert [result[:2] for result in results] == [(10, True), (11, True)]
    assert all("index-00001.json: got no such file" in error for *_, error in results), results
    whole(tmp_path, 21)


def _one_ends(folder: str, how: str) -> tuple[str, int, int]:
    """(error, batches) of this rank and what its part then holds; the second ends in its third."""
    batches, rank = itertools.count(), dist.get_rank()

    def of(inputs: Tensor) -> Tensor:
        if next(batches) == 2 and rank == 1:
            if how == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            raise KeyError("of the second rank")
        time.sleep(0 if rank else 0.05)
        return teacher(inputs)

    options = {**MADE, "shard_bytes": 400, "group": dist.group.WORLD, "progress": False}
    if how == "another":
        options["model"] = "m" if rank == 0 else "another"
    error = "nothing"
    try:
        store.capture(of, data(400), folder, **options)
    except Exception as found:
        error = f"{type(found).__name__}: {found}"
    (Path(folder) / f"said-{rank}").write_text(error)
    index = Path(folder) / f"index-{rank:05d}.json"
    return error, next(batches), format.load_part(index).samples


def _ends(folder: str) -> list[Any]:
    found = [_one_ends(folder, how) for how in ("raises", "another")]
    return [*found, captured(folder, 400, group=dist.group.WORLD)]


def test_all_ranks_end_with_the_error_of_one(tmp_path: Path) -> None:
    """Soon, with what they had stored; the next job begins there."""
    first, second = ranks.run(2, _ends, str(tmp_path))
    assert second[0][0] == "KeyError: 'of the second rank'"
    assert "group: rank 1 of 2 failed: KeyError: 'of the second rank'; this rank has" in first[0][0]
    assert [x[0][1] for x in (first, second)] == [first[0][2] // 3, 3] and first[0][1] < 67
    assert "CacheError" in second[1][0] and "another cache is there; model: got 'a" in second[1][0]
    assert "RuntimeError: group: rank 1 of 2 failed: CacheError: " in first[1][0]
    assert first[1][1] == 0  # before the first sample
    whole(tmp_path, 400)
    assert not list(tmp_path.glob(".job-*")) and not (tmp_path / ".failed").exists()


def test_all_ranks_end_where_one_is_killed(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match=r"\Arank 1: died\Z"):
        ranks.run(2, _one_ends, str(tmp_path), "killed")
    assert (tmp_path / ".failed").read_text() == "rank 1 of 2 died"
    said = (tmp_path / "said-0").read_text()
    assert said.startswith("RuntimeError: group: rank 1 of 2 died; this rank has stored what")
    captured(tmp_path, 400, rank=0, world_size=1)
    whole(tmp_path, 400)


# ---- merging


def test_a_merge_is_done_once_and_reads_what_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    captured(tmp_path, 30, rank=0, world_size=3)
    captured(tmp_path, 30, rank=1, world_size=3)
    assert main(["cache", "merge", str(tmp_path)]) == 0
    assert "20 samples of 30" in capsys.readouterr().out
    file = tmp_path / "index.safetensors"
    first, when = file.read_bytes(), file.stat().st_mtime_ns
    assert main(["cache", "merge", str(tmp_path)]) == 0
    assert "merged before" in capsys.readouterr().out
    assert file.stat().st_mtime_ns == when
    file.unlink()
    assert store.merge(tmp_path) and file.read_bytes() == first  # the same, whenever it is made

    read: list[str] = []
    load = format.load_part
    monkeypatch.setattr(
        "fastkd.teachers.store.merged_index.load_part",
        lambda path: read.append(path.name) or load(path),
    )
    assert not store.Reader(tmp_path).complete and read == []
    captured(tmp_path, 30, rank=2, samples=range(20, 30))
    read.clear()
    reader = whole(tmp_path, 30)  # a merged index that is behind hides nothing
    assert read == ["index-00002.json"] and not reader.facts()["merged"]
    for shard in tmp_path.rglob("0*.safetensors"):
        shard.unlink()  # nothing of these is read
    assert store.merge(tmp_path) and store.Reader(tmp_path).facts()["merged"]


def test_merging_an_empty_folder_or_one_rank(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no teacher cache there"):
        store.merge(tmp_path / "none")
    assert main(["cache", "merge", str(tmp_path)]) == 1
    with store.Writer(tmp_path, vocab_size=V):
        pass
    assert store.merge(tmp_path) and not store.merge(tmp_path)
    assert len(store.Reader(tmp_path)) == 0


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"model": "other"}, "model: got 'other', expected 'm'"),
        ({"vocab_size": V - 1}, f"vocab_size: got {V - 1}, expected {V}"),
        ({"k": K - 1}, f"k: got {K - 1}, expected {K}"),
        ({"temperature": 2.0}, "temperature: got 2.0, expected 1.0"),
        ({"tokenizer": "u"}, "tokenizer: got 'u', expected 't'"),
    ],
)
@pytest.mark.parametrize("first", [False, True])
def test_indexes_of_another_cache_are_refused(
    tmp_path: Path, options: dict[str, Any], match: str, first: bool
) -> None:
    captured(tmp_path / "a", 10, rank=0, world_size=2)
    captured(tmp_path / "b", 10, rank=1, world_size=2, **options)
    if first:
        store.merge(tmp_path / "a")
    (tmp_path / "b" / "index-00001.json").rename(tmp_path / "a" / "index-00001.json")
    with pytest.raises(CacheError, match=f"index-00001.json: not of one cache.*{match}"):
        store.merge(tmp_path / "a")


def test_a_sample_of_two_ranks_is_named(tmp_path: Path) -> None:
    captured(tmp_path, 20, rank=0, samples=range(12), shard_bytes=10**6)
    with store.Writer(tmp_path, **MADE, total=20, rank=1) as writer:
        for number in (11, 12):
            writer.add(fastkd.topk_from_logits(torch.randn(LENGTH, V), K), sample=number)
    with pytest.raises(CacheError, match=r"sample 11 is in teacher-00000/.* and teacher-00001/"):
        store.merge(tmp_path)
    assert not (tmp_path / "index.safetensors").exists()


def test_damage_to_a_merged_index_is_found(tmp_path: Path) -> None:
    write_all(tmp_path, 12, 2)
    store.merge(tmp_path)
    file = tmp_path / "index.safetensors"
    good = file.read_bytes()
    expected = store.Reader(tmp_path)
    harmless = 0
    for place in range(0, len(good), 3):
        file.write_bytes(good[:place] + bytes([good[place] ^ 0x41]) + good[place + 1 :])
        try:
            reader = store.Reader(tmp_path)
        except CacheError as error:
            assert "index.safetensors" in str(error)
            continue
        harmless += 1  # white space between the header's words
        assert torch.equal(reader.numbers, expected.numbers)
        assert reader.identity() == expected.identity()
    assert harmless < len(good) // 100
    for size in range(0, len(good), 101):
        file.write_bytes(good[:size])
        with pytest.raises(CacheError, match=r"index\.safetensors"):
            store.Reader(tmp_path)
    file.write_bytes(good)
    index = tmp_path / "index-00001.json"
    index.write_bytes(index.read_bytes().replace(b'"complete": true', b'"complete":  true'[:16]))
    assert any("index-00001.json" in fault for fault in store.Reader(tmp_path).faults())
    index.unlink()
    with pytest.raises(CacheError, match=r"index-00001\.json: got no such file"):
        store.Reader(tmp_path)


def test_a_cache_of_version_1_is_read_and_merged(tmp_path: Path) -> None:
    for rank in range(2):
        with store.Writer(tmp_path, **MADE, rank=rank, ranks=2, shard_bytes=80) as writer:
            for i in range(5):
                inputs = torch.arange(rank + 2 * i, rank + 2 * i + LENGTH)
                writer.add(fastkd.topk_from_logits(teacher(inputs), K))
        index = tmp_path / f"index-{rank:05d}.json"
        document = json.loads(index.read_bytes())
        del document["sha256"], document["teacher"]["total"]
        document["version"] = 1
        for shard in document["shards"]:
            flat = shard["file"].replace("/", "-")
            (tmp_path / shard["file"]).rename(tmp_path / flat)
            shard["file"] = flat
        digest = hashlib.sha256(format._text(document)).hexdigest()
        index.write_bytes(format._text({**document, "sha256": digest}))
    assert len(list(tmp_path.glob("teacher-*-*.safetensors"))) > 4
    identity = whole(tmp_path, 10).identity()
    assert store.merge(tmp_path) and whole(tmp_path, 10).identity() == identity
    with store.Writer(tmp_path, **MADE, rank=1, ranks=2) as writer:
        writer.add(fastkd.topk_from_logits(teacher(torch.arange(11, 13)), K))
    assert store.Reader(tmp_path).numbers.tolist() == [*range(10), 11]


# ---- where a sample is


def table_of(shards: list[list[int]]) -> Table:
    """Shards of these numbers, as a writer describes them."""
    made = []
    for at, numbers in enumerate(shards):
        steps = {b - a for a, b in itertools.pairwise(numbers)} or {1}
        step = steps.pop() if len(steps) == 1 else 0
        name = format.shard_name(0, at, folder=True)
        made.append(
            format.Shard(name, len(numbers), 0, 0, "00" * 32, numbers[0], numbers[-1], step)
        )
    return Table.of(format.Part(store_scale.plan_of(OPTIONS, 0), 0, made))


class OPTIONS:
    vocab, k = V, K


@given(
    owners=st.lists(st.integers(-1, 4), min_size=1, max_size=60),
    strides=st.lists(st.sampled_from([1, 2, 3, 5]), min_size=1, max_size=4),
    twice=st.booleans(),
)
@settings(max_examples=200, deadline=None)
def test_places_are_those_of_a_search_of_all(
    owners: list[int], strides: list[int], twice: bool
) -> None:
    shards: list[list[int]] = []
    taken: set[int] = set()
    for start, stride in enumerate(strides):  # runs of a step each
        mine = [n for n in range(start, 40, stride) if n not in taken][:7]
        shards += [mine] if mine else []
        taken |= set(mine)
    for owner in sorted(set(owners) - {-1}):  # and what follows no step
        mine = [40 + i for i, of in enumerate(owners) if of == owner]
        shards.append(mine)
    if twice and shards:
        shards.append([shards[0][-1]])  # no step: one alone
    if not shards:
        return
    found = Places(table_of(shards), lambda at: torch.tensor(shards[at]))
    counts: dict[int, list[int]] = {}
    for at, numbers in enumerate(shards):
        for number in numbers:
            counts.setdefault(number, []).append(at)
    double = {number for number, of in counts.items() if len(of) > 1}
    again = found.twice()
    if double:
        assert again is not None
        assert again[0] in double and list(again[1:]) == counts[again[0]]
        return
    assert again is None
    asked = torch.arange(-3, 110)
    assert found.find(asked).tolist() == [counts.get(n, [-1])[0] for n in asked.tolist()]
    assert found.numbers().tolist() == sorted(counts)
    gaps = [n for start, stop in found.gaps(5, 90).tolist() for n in range(start, stop)]
    assert gaps == [n for n in range(5, 90) if n not in counts]


# ---- reading by rank


@pytest.fixture
def opens(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the shards that are opened."""
    files: list[str] = []
    mapped = reader_file._map

    def counted(file: Path, *rest: Any) -> Any:
        files.append(str(file))
        return mapped(file, *rest)

    monkeypatch.setattr(reader_file, "_map", counted)
    return files


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_a_rank_opens_its_own_shards_alone(
    tmp_path: Path, opens: list[str], world_size: int
) -> None:
    total = 203
    write_all(tmp_path, total, 3)
    store.merge(tmp_path)
    shards = len(store.Reader(tmp_path).table)
    assert shards > 15
    for epoch in range(2):
        seen: list[int] = []
        for rank in range(world_size):
            reader = store.Reader(tmp_path)
            sampler = store.ShardSampler(reader, rank=rank, world_size=world_size, seed=3)
            sampler.set_epoch(epoch)
            opens.clear()
            mine = list(sampler)
            assert not opens  # the order is drawn from the index
            for number in mine:
                reader[number]
            assert len(mine) == len(sampler) == total // world_size
            assert len(opens) == len(set(opens)) <= shards / world_size + 2
            seen += mine
        assert len(set(seen)) == len(seen) == total // world_size * world_size


def test_epochs_differ_and_come_back(tmp_path: Path) -> None:
    write_all(tmp_path, 60, 2)
    reader = store.Reader(tmp_path)
    sampler = store.ShardSampler(reader, rank=1, world_size=2, seed=7)
    epochs = [list(sampler) for _ in range(3)]
    assert epochs[0] != epochs[1] != epochs[2] and sorted(epochs[0]) != sorted(epochs[1])
    for epoch in (2, 0, 1):
        sampler.set_epoch(epoch)
        assert list(sampler) == epochs[epoch]
    assert list(store.ShardSampler(reader, rank=1, world_size=2, seed=7)) == epochs[0]
    assert list(store.ShardSampler(reader, rank=1, world_size=2, seed=8)) != epochs[0]
    plain = store.ShardSampler(reader, rank=1, world_size=2, shuffle=False)
    assert list(plain) == list(plain) == list(range(30, 60))
    for wrong in ({"rank": 2, "world_size": 2}, {"window": 0}, {"rank": 60, "world_size": 61}):
        with pytest.raises(ValueError, match="got"):
            store.ShardSampler(reader, **wrong)


def run_of(folder: Path, rank: int, stop: int | None, checkpoint: Path | None) -> nn.Module:
    """A student taught by a rank's part of a cache; stopped after some steps where asked."""
    torch.manual_seed(0)
    student = nn.Embedding(500, V)
    reader = store.Reader(folder)
    inputs = data(60).dataset
    loader = DataLoader(
        store.Paired(inputs, reader),
        batch_size=4,
        sampler=store.ShardSampler(reader, rank=rank, world_size=2, seed=1),
        collate_fn=store.collate,
    )

    def on_step(epoch: int, step: int, loss: Any) -> None:
        if step + 1 == stop:
            raise KeyboardInterrupt

    kept = checkpoint and distill.Checkpoints(checkpoint, every=1, resume=True)
    options: dict[str, Any] = {"epochs": 2, "teacher": reader, "progress": False, "lr": 0.1}
    distill.train(
        student, loader, distill.soft(temperature=1.0), checkpoint=kept, on_step=on_step, **options
    )
    return student


def test_the_trainer_resumes_within_a_rank_s_epoch(tmp_path: Path) -> None:
    write_all(tmp_path / "c", 60, 2)
    for rank in range(2):
        expected = run_of(tmp_path / "c", rank, None, None)
        folder = tmp_path / f"run-{rank}"
        for stop in (3, 11):
            with pytest.raises(KeyboardInterrupt):
                run_of(tmp_path / "c", rank, stop, folder)
        got = run_of(tmp_path / "c", rank, None, folder)
        assert torch.equal(got.weight, expected.weight)


def _taught(folder: str) -> tuple[list[tuple[list[int], set[str], set[str]]], Any]:
    """Of each epoch of a student in DistributedDataParallel: the samples, the shards that have them
    and those that were opened; and its weights."""
    torch.manual_seed(0)
    student = nn.parallel.DistributedDataParallel(nn.Embedding(500, V))
    rank, world = dist.get_rank(), dist.get_world_size()
    mapped, opened, seen = reader_file._map, list[str](), list[int]()
    epochs: list[tuple[list[int], set[str], set[str]]] = []
    reader = store.Reader(folder)
    table = range(len(reader.table))
    files = [str(reader.path / reader.table.shard(at).file) for at in table]
    shards = {n: files[at] for at in table for n in reader.of_shard(at).tolist()}

    def end() -> None:
        if seen:
            epochs.append((seen[:], {shards[number] for number in seen}, set(opened)))
        seen.clear()
        opened.clear()
        reader._open.clear()  # the epoch before has left some open

    class Watched(store.ShardSampler):
        def __iter__(self) -> Any:
            end()
            for number in super().__iter__():
                seen.append(number)
                yield number

    def counted(file: Path, *rest: Any) -> Any:
        opened.append(str(file))
        return mapped(file, *rest)

    loader = DataLoader(
        store.Paired(data(203).dataset, reader),
        batch_size=4,
        sampler=Watched(reader, rank=rank, world_size=world, seed=1),
        collate_fn=store.collate,
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reader_file, "_map", counted)
        distill.train(
            student,
            loader,
            distill.soft(temperature=1.0),
            teacher=reader,
            epochs=2,
            lr=0.1,
            progress=False,
        )
        end()
    return epochs, student.module.weight.tolist()


def test_ranks_are_taught_each_by_its_own_shards(tmp_path: Path) -> None:
    write_all(tmp_path, 203, 3)
    store.merge(tmp_path)
    (first, mine), (second, its) = ranks.run(2, _taught, str(tmp_path))
    assert mine == its
    assert len(first) == len(second) == 2
    for (one, own, opened), (other, theirs, there) in zip(first, second, strict=True):
        assert len(one) == len(other) == 101 and len({*one, *other}) == 202  # each once, one waits
        assert opened == own and there == theirs
        assert len(own & theirs) <= 1 < len(own)  # the one that is cut between them
    assert first[0][0] != first[1][0]


# ---- the benchmark


def test_the_benchmark_at_toy_size(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "scale.json"
    toy = ["--toy", "--ranks", "4", "--tokens", "1000000", "--mib", "1", "2"]
    assert bench_main(["store-scale", *toy, "--folder", str(tmp_path), "--json", str(path)]) == 0
    results = json.loads(path.read_text())["results"]
    assert [row["shards"] for row in results] == [20, 20, 60, 60]
    assert "extrapolated, merged: " in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == [path]


def test_the_benchmark_s_bytes_are_those_of_files(tmp_path: Path) -> None:
    length, samples = 64, 40
    one = fastkd.topk_from_logits(torch.randn(length, V), K)
    with store.Writer(tmp_path, vocab_size=V, k=K, total=samples) as writer:
        for i in range(samples):
            writer.add(one, sample=i)
    table = store.Reader(tmp_path).table
    by_format = store_scale.row_bytes(store_scale.plan_of(OPTIONS, samples), length)
    header = 1024
    excess = int(table.bytes.sum()) - by_format * samples * length
    assert len(table) == 1 and 0 < excess < header
