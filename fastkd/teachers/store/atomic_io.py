"""Files that appear whole or not at all, their hashes, and a lock that dies with its process."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor

from fastkd.distill import serialization

try:
    import fcntl
except ImportError:  # no such locks there: a writer in another process is not noticed
    fcntl = None  # type: ignore[assignment]

CHUNK = 2**22  # bytes hashed at a time
_held: set[Path] = set()  # by this process: the system would give it the same lock twice


def write_whole(path: Path, data: bytes) -> None:
    """Write a file that appears complete or not at all, and stays if the power goes.

    Raises:
        OSError: with the file's name; nothing of it is left.
    """
    part = path.with_name(f".{path.name}.tmp")
    try:
        file = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
        try:
            rest = memoryview(data)
            while rest:
                rest = rest[os.write(file, rest) :]
            os.fsync(file)
        finally:
            os.close(file)
        os.replace(part, path)
        _sync_folder(path.parent)
    except OSError as error:
        part.unlink(missing_ok=True)
        why = f"{error.strerror}: {len(data)} bytes not written; files written before are whole"
        raise OSError(error.errno, why, str(path)) from error


def _sync_folder(path: Path) -> None:
    if hasattr(os, "O_DIRECTORY"):  # elsewhere a folder cannot be opened
        file = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(file)
        finally:
            os.close(file)


def shard_bytes(tensors: dict[str, Tensor]) -> bytes:
    """A shard's file."""
    return bytes(needed("safetensors.torch").save(tensors, metadata={"format": "pt"}))


def file_hash(path: Path, seen: Callable[[int], object] = lambda count: None) -> str:
    """sha256 of a file; `seen` is told the number of bytes of each piece read."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(CHUNK):
            digest.update(piece)
            seen(len(piece))
    return digest.hexdigest()


def needed(module: str) -> Any:
    """A module of the extra `train`, by name."""
    return serialization.needed(module, "a teacher cache")


class Lock:
    """A file that one writer at a time holds; the system takes it back when the process dies."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: int | None = None
        if path in _held:
            raise BlockingIOError(_busy(path))
        self._file = _locked(path, os.O_RDWR | os.O_CREAT)
        _held.add(path)

    @property
    def held(self) -> bool:
        return self._file is not None

    def release(self) -> None:
        if self._file is not None:
            os.close(self._file)
            self._file = None
            _held.discard(self._path)

    def remove(self) -> None:
        """`release`, and no such file is left; nobody sees it there and not held."""
        if fcntl is not None:
            self._path.unlink()
        self.release()
        self._path.unlink(missing_ok=True)  # an open file cannot be removed everywhere


def probe(path: Path) -> None:
    """BlockingIOError where a lock is held; where there is no such file, nobody holds it."""
    if path in _held:  # closing the file would give back what this process holds
        raise BlockingIOError(_busy(path))
    if path.exists():
        os.close(_locked(path, os.O_RDWR))


def died(path: Path) -> bool:
    """Whether a lock's file was left by a process that is no more; False where nobody can tell."""
    if fcntl is None:
        return False
    try:
        os.close(_locked(path, os.O_RDWR))
    except (BlockingIOError, FileNotFoundError):
        return False
    return True


def _locked(path: Path, how: int) -> int:
    file = os.open(path, how, 0o666)
    try:
        if fcntl is not None:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(file)
        raise BlockingIOError(_busy(path)) from None
    return file


def _busy(path: Path) -> str:
    return f"{path}: another writer of this rank is at work; each rank has one writer"
