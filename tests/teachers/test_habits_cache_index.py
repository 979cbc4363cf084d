"""An index that names what cannot be: an error with its name, before anything is made of it."""

from __future__ import annotations

import hashlib
import json
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
import torch

import fastkd
from fastkd.teachers import store
from fastkd.teachers.store import format

V, K = 40, 3
ABSURD: list[Any] = [
    *(10**12, 10**18, 2**63, 2**64, 10**400, -1, -(10**12), 0, 1.5, 1e300, float("1e12")),
    *(True, False, None, "x", "9" * 10**5, [], [1], {}, {"a": 1}, [[[[]]]]),
]
TEACHER = [
    *("model", "tokenizer", "data", "vocab_size", "k", "method", "temperature", "tail"),
    *("encoding", "ranks", "sequences", "measured", "total"),
]
SHARD = ["file", "samples", "tokens", "bytes", "sha256", "first", "last", "step"]


def small(folder: Path) -> dict[str, Any]:
    with store.Writer(folder, vocab_size=V, k=K) as writer:
        for i in range(3):
            x = torch.randn(2, V, generator=torch.Generator().manual_seed(i))
            writer.add(fastkd.topk_from_logits(x, K))
    document = json.loads((folder / "index-00000.json").read_bytes())
    del document["sha256"]
    return dict(document)


def write(folder: Path, document: dict[str, Any]) -> None:
    text = (json.dumps(document, indent=1) + "\n").encode()
    digest = hashlib.sha256(text).hexdigest()
    signed = text.removesuffix(b"\n}\n") + f',\n "sha256": "{digest}"\n}}\n'.encode()
    (folder / format.index_name(0)).write_bytes(signed)


def read(folder: Path) -> None:
    """All that a user asks of a cache: an error of its own, or right rows."""
    try:
        reader = store.Reader(folder)
        reader.check()
        assert len(reader.numbers) == len(reader)
        for output in reader:
            assert output.shape == (2, K, V) or output.indices.shape == (2, K)
        reader.verify()
    except store.CacheError as error:
        assert len(str(error)) <= 500 + len(str(folder))


@pytest.mark.parametrize("field", [*TEACHER, *SHARD, "rank", "complete", "version", "format"])
def test_absurd_fields(tmp_path: Path, field: str) -> None:
    document = small(tmp_path)
    for value in ABSURD:
        changed = json.loads(json.dumps(document))
        if field in TEACHER:
            changed["teacher"][field] = value
        elif field in SHARD:
            changed["shards"][0][field] = value
        else:
            changed[field] = value
        write(tmp_path, changed)
        tracemalloc.start()
        try:
            read(tmp_path)
            assert tracemalloc.get_traced_memory()[1] < 2**25
        finally:
            tracemalloc.stop()


@pytest.mark.parametrize(
    "changes",
    [
        {"samples": 10**12, "last": 10**12 - 1, "bytes": 10**15},
        {"samples": 10**12, "last": 10**12 - 1},
        {"samples": 10**12, "last": 10**12 - 1, "bytes": 10**15, "step": 0},
        {"tokens": 10**12, "bytes": 10**15},
        {"samples": 1, "last": 0, "tokens": 0, "bytes": 0},
        {"first": 2**60, "last": 2**60 + 2},
        {"first": 5, "last": 2},
        {"step": 2**59, "last": 2**60},
    ],
)
def test_absurd_shards(tmp_path: Path, changes: dict[str, Any]) -> None:
    document = small(tmp_path)
    document["shards"][0].update(changes)
    write(tmp_path, document)
    with pytest.raises(store.CacheError):
        reader = store.Reader(tmp_path)
        assert len(reader.numbers) and reader[int(reader.numbers[0])]


def test_shards_that_overlap(tmp_path: Path) -> None:
    document = small(tmp_path)
    file = tmp_path / document["shards"][0]["file"]
    other = file.with_name(file.name.replace("000000", "000001"))
    other.write_bytes(file.read_bytes())
    document["shards"].append({**document["shards"][0], "file": other.name})
    write(tmp_path, document)
    with pytest.raises(store.CacheError, match="sample 0 is in"):
        store.Reader(tmp_path).check()


@pytest.mark.parametrize(
    "text",
    [
        b"[" * 10**6,
        b'{"a":' * 10**5,
        b"null",
        b"[]",
        b'"x"',
        b"1" * 10**5,
        b"{}",
        b'{"format": NaN, "version": 1}',
        b"\xff\xfe",
        b"",
    ],
)
def test_texts_that_are_no_index(tmp_path: Path, text: bytes) -> None:
    (tmp_path / format.index_name(0)).write_bytes(text)
    with pytest.raises(store.CacheError) as error:
        store.Reader(tmp_path)
    assert len(str(error.value)) <= 500
