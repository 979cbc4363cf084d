"""Damage, death and bad input: a clear error, and what was written before stays readable."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import random
import signal
import stat
import time
from pathlib import Path
from typing import Any

import pytest
import torch

import fastkd
from fastkd.teachers import store
from fastkd.teachers.store import CacheError

V, K = 40, 3


def topk(rows: int, seed: int) -> fastkd.TopK:
    x = torch.randn(rows, V, generator=torch.Generator().manual_seed(seed))
    return fastkd.topk_from_logits(x, K)


def small(folder: Path, samples: int = 2, **options: Any) -> store.Reader:
    with store.Writer(folder, vocab_size=V, k=K, tokenizer="t", **options) as writer:
        for i in range(samples):
            writer.add(topk(2, i))
    return store.Reader(folder)


def shard(folder: Path) -> Path:
    (file,) = folder.glob("teacher-*.arrow")
    return file


# ---- damage


@pytest.mark.parametrize(("encoding", "step"), [("uint8", 1), ("plain", 7)])
def test_every_byte_flipped_and_every_end_lost(tmp_path: Path, encoding: str, step: int) -> None:
    """By `verify`; without it a reader gives an error of the file, or numbers in range."""
    reader = small(tmp_path, encoding=encoding)
    good = [reader[0], reader[1]]
    chance, read = random.Random(0), 0
    for file in (shard(tmp_path), tmp_path / "state.json", tmp_path / "dataset_info.json"):
        whole = file.read_bytes()
        for place in range(0, len(whole), step):
            damaged = bytearray(whole)
            damaged[place] ^= chance.choice((0xFF, 0x80, 1 << chance.randrange(8)))
            file.write_bytes(damaged)
            with pytest.raises(CacheError, match=f"{file.name}|state.json or dataset"):
                store.Reader(tmp_path).verify()
            if file.suffix != ".arrow":
                continue
            if place % 3 == 0 and place < len(whole) - 8:  # all but the mark of the end
                file.write_bytes(whole[:place])
                with pytest.raises(CacheError, match=file.name):
                    store.Reader(tmp_path)[0]
                file.write_bytes(damaged)
            try:
                got = store.Reader(tmp_path)[0]
            except CacheError as error:
                assert file.name in str(error)
                continue
            read += 1
            assert got.indices.shape == good[0].indices.shape and got.indices.lt(V).all()
        file.write_bytes(whole)
    assert read
    store.Reader(tmp_path).verify()
    assert torch.equal(store.Reader(tmp_path)[1].logprobs, good[1].logprobs)


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    reader = small(tmp_path, 4, shard_bytes=1)
    files_ = [shard.file for shard in reader.shards]
    assert len(files_) == 4
    files_[2].unlink()
    assert f"{files_[2]}: cannot be read (No such file or directory)" in list(reader.faults())
    with pytest.raises(CacheError, match=f"{files_[2].name}: got no such file"):
        reader[2]
    assert reader[1].size(0) == 2
    with pytest.raises(IndexError, match="sample 2 is not in the cache"):
        store.Reader(tmp_path)[2]
    with pytest.raises(CacheError, match=f"{files_[2].name}: got no such file, which state.json"):
        store.Reader(tmp_path).verify()
    with pytest.raises(ValueError, match="expected 0 to 3"):
        store.Paired([0] * 4, store.Reader(tmp_path))


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"version": 9}, "version: got 9, expected 4"),
        ({"version": "3"}, "version: got '3', expected 4"),
        ({"teacher": {"k": 5}}, "got columns|altered"),
        ({"teacher": {"colour": "red"}}, "unexpected keyword argument 'colour'"),
        ({"teacher": {"vocab_size": 10**400}}, "vocab_size: got "),
        ({"teacher": {"k": 10**12}}, "k: got 1000000000000"),
        ({"teacher": {"tail": ["x"] * 10**5}}, "tail: got "),
        ({"teacher": 3}, "altered"),
    ],
)
def test_a_shard_of_something_else(tmp_path: Path, changes: dict[str, Any], match: str) -> None:
    pa = pytest.importorskip("pyarrow")
    small(tmp_path)
    file = shard(tmp_path)
    table = pa.ipc.open_stream(file.read_bytes()).read_all()
    facts = json.loads(table.schema.metadata[b"fastkd"])
    for name, value in changes.items():
        facts[name] = {**facts[name], **value} if isinstance(value, dict) else value
    with pa.ipc.new_stream(file, table.schema.with_metadata({"fastkd": json.dumps(facts)})) as out:
        out.write_table(table.replace_schema_metadata({"fastkd": json.dumps(facts)}))
    with pytest.raises(CacheError, match=match) as error:
        store.Reader(tmp_path)[0]
    assert len(str(error.value)) <= 500 + len(str(file))


def test_names_lead_nowhere_else(tmp_path: Path) -> None:
    reader = small(tmp_path)
    file = shard(tmp_path)
    for name in ("teacher-0-x-1-0.arrow", "teacher-0-1--2-0.arrow"):
        file.with_name(name).write_bytes(file.read_bytes())
        with pytest.raises(CacheError, match="got another name than a shard has"):
            store.Reader(tmp_path)
        file.with_name(name).unlink()
    file.rename(file.with_name(file.name.replace("0001-", "0002-")))
    with pytest.raises(CacheError, match="got other samples than its name says"):
        store.Reader(tmp_path)[0]
    assert reader.identity() == store.Reader(tmp_path).identity()


def test_a_cache_for_something_else_is_refused(tmp_path: Path) -> None:
    class Tokenizer:
        def __init__(self, *words: str) -> None:
            self.words = words

        def get_vocab(self) -> dict[str, int]:
            return {word: i for i, word in enumerate(self.words)}

    with store.Writer(
        tmp_path, vocab_size=V, k=K, tokenizer=Tokenizer("a", "b"), model="m", data="d"
    ) as w:
        w.add(topk(1, 0))
    store.Reader(tmp_path, vocab_size=V, tokenizer=Tokenizer("a", "b"), model="m", data="d")
    for asked, match in (
        ({"vocab_size": 50}, "made for vocab_size=40, expected 50"),
        ({"tokenizer": Tokenizer("b", "a")}, "made for tokenizer='sha256:"),
        ({"tokenizer": "gpt2"}, "expected 'gpt2'"),
        ({"model": "n"}, "made for model='m', expected 'n'"),
        ({"data": "e"}, "made for data='d', expected 'e'"),
    ):
        with pytest.raises(CacheError, match=match):
            store.Reader(tmp_path, **asked)
    with pytest.raises(TypeError, match="tokenizer: got 3"):
        store.Reader(tmp_path, tokenizer=3)
    for options, match in (
        ({"vocab_size": 50}, "vocab_size: got 50, expected 40"),
        ({"k": 5}, "k: got 5, expected 3"),
        ({"temperature": 2.0}, "temperature: got 2.0, expected 1.0"),
        ({"tail": "renormalize"}, "tail: got 'renormalize', expected 'bucket'"),
        ({"encoding": "plain"}, "encoding: got 'plain', expected 'uint8'"),
        ({"tokenizer": "t"}, "tokenizer: got 't'"),
    ):
        made: dict[str, Any] = {"vocab_size": V, "k": K, "tokenizer": Tokenizer("a", "b")}
        with pytest.raises(CacheError, match=match):
            store.Writer(tmp_path, **{**made, "model": "m", "data": "d", **options})
    assert len(store.Reader(tmp_path)) == 1


def test_shards_that_do_not_belong_together(tmp_path: Path) -> None:
    small(tmp_path / "a")
    with store.Writer(tmp_path / "b", vocab_size=V, k=K, encoding="plain", rank=1) as writer:
        writer.add(topk(2, 2), sample=2)
    file = shard(tmp_path / "b")
    file.rename(tmp_path / "a" / file.name)
    reader = store.Reader(tmp_path / "a")
    for call in (lambda: reader[2], reader.verify):
        with pytest.raises(CacheError, match=f"{file.name}: not of one cache.*tokenizer: got ''"):
            call()
    with pytest.raises(FileNotFoundError, match="no teacher cache there"):
        store.Reader(tmp_path / "b")


def test_the_same_sample_twice(tmp_path: Path) -> None:
    with store.Writer(tmp_path, vocab_size=V, k=K) as writer:
        writer.add(topk(1, 0), sample=7)
    with pytest.raises(CacheError, match=r"sample 7 is in teacher-00000.* and teacher-00001"):
        with store.Writer(tmp_path, vocab_size=V, k=K, rank=1) as writer:
            writer.add(topk(1, 0), sample=7)
    with pytest.raises(CacheError, match=r"sample 7 is in teacher-00000.* and teacher-00001"):
        store.Reader(tmp_path)


# ---- a full disk


class Full:
    """A disk with room for so many files."""

    def __init__(self, room: int) -> None:
        self.room, self.sync = room, os.fsync

    def __call__(self, file: int) -> None:
        if stat.S_ISREG(os.fstat(file).st_mode):
            if self.room == 0:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            self.room -= 1
        self.sync(file)


@pytest.mark.parametrize("room", [0, 1, 3])
def test_a_full_disk_loses_nothing(
    tmp_path: Path, room: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    small(tmp_path, 2, shard_bytes=1)
    before = sorted(file.name for file in tmp_path.glob("[st]*"))
    with store.Writer(tmp_path, vocab_size=V, k=K, tokenizer="t", shard_bytes=1) as writer:
        with monkeypatch.context() as patch:
            patch.setattr("fastkd.distill.serialization.os.fsync", Full(room))
            full = r"No space left.*files written before are whole"
            with pytest.raises(OSError, match=full) as e:
                for i in range(2, 9):
                    writer.add(topk(2, i))
            assert e.value.errno == errno.ENOSPC and str(tmp_path) in str(e.value.filename)
            assert not list(tmp_path.glob(".*.tmp"))
            assert set(before) <= {file.name for file in tmp_path.iterdir()}
            mid = store.Reader(tmp_path)
            mid.verify()
            there = len(mid)
        writer.flush()  # room again: what was added is still here
        assert writer.done == there + 1
        for i in range(there + 1, 9):
            writer.add(topk(2, i))
    whole(tmp_path, 9)


def whole(folder: Path, samples: int) -> None:
    """Samples 0, 1, ... each once, each as it was given, and nothing else in the folder."""
    reader = store.Reader(folder)
    reader.verify()
    assert reader.complete and reader.numbers.tolist() == list(range(samples))
    got = reader.__getitems__(range(samples))
    for i in range(samples):
        assert torch.equal(got[i].indices, topk(2, i).indices.int())
    assert {file.name for file in folder.glob("[!.]*")} == {
        *(shard.file.name for shard in reader.shards),
        *("state.json", "dataset_info.json"),
    }
    assert not list(folder.glob(".*.tmp"))


# ---- death


def _write_for_ever(folder: str, shard_bytes: int) -> None:
    torch.set_num_threads(1)
    writer = store.Writer(folder, vocab_size=V, k=K, shard_bytes=shard_bytes)
    while True:
        writer.add(topk(2, writer.done + len(writer._counts)))


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="no fork here")
def test_fifty_kills_lose_at_most_the_shard_in_hand(tmp_path: Path) -> None:
    chance, done, size = random.Random(5), 0, 1000  # bytes of a shard: some samples of 2 rows
    most = 0.06  # seconds of a life
    fork = multiprocessing.get_context("fork")
    for kill in range(500):  # fifty, and as many more as a busy machine takes to write something
        if kill >= 50 and done > 50:
            break
        if kill >= 50:  # longer lives, too
            most = min(1.1 * most, 2.0)
        child = fork.Process(target=_write_for_ever, args=(str(tmp_path), size))
        child.start()
        time.sleep(chance.random() ** 2 * most)
        assert child.pid is not None and child.exitcode is None
        os.kill(child.pid, signal.SIGKILL)
        child.join()
        if not list(tmp_path.glob("teacher-*")):
            continue
        reader = store.Reader(tmp_path)
        reader.verify()
        assert len(reader) >= done
        assert reader.numbers.tolist() == list(range(len(reader)))
        done = len(reader)
    assert done > 50
    with store.Writer(tmp_path, vocab_size=V, k=K, shard_bytes=size) as writer:
        assert writer.done == done
        writer.add(topk(2, done))
    whole(tmp_path, done + 1)


def _hold(folder: str, ready: Any, stop: Any) -> None:
    with store.Writer(folder, vocab_size=V, k=K):
        ready.set()
        stop.wait(60)


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="no fork here")
def test_two_writers_of_one_rank(tmp_path: Path) -> None:
    fork = multiprocessing.get_context("fork")
    ready, stop = fork.Event(), fork.Event()
    child = fork.Process(target=_hold, args=(str(tmp_path), ready, stop))
    child.start()
    try:
        assert ready.wait(60)
        with pytest.raises(BlockingIOError, match="another writer of this rank is at work"):
            store.Writer(tmp_path, vocab_size=V, k=K)
    finally:
        stop.set()
        child.join()
    with store.Writer(tmp_path, vocab_size=V, k=K) as writer:
        with pytest.raises(BlockingIOError, match="another writer of this rank"):
            store.Writer(tmp_path, vocab_size=V, k=K)
        writer.add(topk(1, 0))
    with pytest.raises(ValueError, match="the writer is closed"):
        writer.add(topk(1, 0))


def test_leftovers_of_a_dead_writer_go(tmp_path: Path) -> None:
    small(tmp_path, 2)
    (tmp_path / ".teacher-00000-000000000002-x.arrow.tmp").write_bytes(b"half")
    theirs = tmp_path / ".teacher-00001-000000000002-x.arrow.tmp"
    theirs.write_bytes(b"another rank's")
    with store.Writer(tmp_path, vocab_size=V, k=K, tokenizer="t") as writer:
        writer.add(topk(2, 2))
    assert theirs.read_bytes() == b"another rank's"
    theirs.unlink()
    whole(tmp_path, 3)


def test_no_pickle_is_read(tmp_path: Path) -> None:
    small(tmp_path)
    file = shard(tmp_path)
    torch.save({"indices": torch.zeros(1)}, file)
    with pytest.raises(CacheError, match=file.name):
        store.Reader(tmp_path)[0]
