"""Files that appear whole or not at all, and a lock that dies with its process."""

from __future__ import annotations

import hashlib
import os
import secrets
from pathlib import Path
from typing import Any

from fastkd.distill import serialization

try:
    import fcntl
except ImportError:  # no such locks there: a writer in another process is not noticed
    fcntl = None  # type: ignore[assignment]

_held: set[Path] = set()  # by this process: the system would give it the same lock twice


def needed(module: str) -> Any:
    """A module of the extra `store`, by name."""
    return serialization.needed(module, "a teacher cache", "store")


def file_hash(path: Path) -> str:
    """sha256 of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(2**22):
            digest.update(piece)
    return digest.hexdigest()


def write_whole(path: Path, data: bytes) -> None:
    """Write a file that appears complete or not at all, and stays if the power goes.

    Raises:
        OSError: with the file's name; nothing of it is left.
    """
    part = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with open(part, "wb", buffering=0) as file:
            rest = memoryview(data)
            while rest:
                rest = rest[os.write(file.fileno(), rest) :]
            os.fsync(file.fileno())
        os.replace(part, path)
        if hasattr(os, "O_DIRECTORY"):  # elsewhere a folder cannot be opened
            folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)
    except OSError as error:
        part.unlink(missing_ok=True)
        why = f"{error.strerror}: {len(data)} bytes not written; files written before are whole"
        raise OSError(error.errno, why, str(path)) from error


class Lock:
    """A file that one writer at a time holds; the system takes it back when the process dies."""

    def __init__(self, path: Path) -> None:
        busy = f"{path}: another writer of this rank is at work; each rank has one writer"
        if path in _held:  # closing the file would give back what this process holds
            raise BlockingIOError(busy)
        self._path, self._file = path, os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        self.held = True
        _held.add(path)
        try:
            if fcntl is not None:
                fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self.release()
            raise BlockingIOError(busy) from None

    def release(self) -> None:
        if self.held:
            os.close(self._file)
            _held.discard(self._path)
            self.held = False
