"""Files that appear whole, are as they were written, and have one writer at a time."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from pathlib import Path

from fastkd.distill.serialization import appearing

try:
    import fcntl
except ImportError:  # no such locks there: a writer in another process is not noticed
    fcntl = None  # type: ignore[assignment]

_held: set[Path] = set()  # by this process, which the system would give the same lock twice


class CacheError(ValueError):
    """A cache that is damaged, of another version, or made for something else; names the file."""


def write_whole(path: Path, data: bytes) -> None:
    """Write a file that appears complete or not at all, and stays if the power goes."""
    try:
        with appearing(path) as part:
            part.write_bytes(data)
    except OSError as error:
        why = f"{error.strerror}: {len(data)} bytes not written; files written before are whole"
        raise OSError(error.errno, why, str(path)) from error


def fault(file: Path, sha256: str) -> str | None:
    """What is wrong with a file of that hash; reads every byte."""
    digest = hashlib.sha256()
    try:
        with file.open("rb") as source:
            while piece := source.read(2**22):
                digest.update(piece)
    except OSError as error:
        return f"{file}: cannot be read ({error.strerror})"
    same = digest.hexdigest() == sha256
    return None if same else f"{file}: altered after it was written (its hash differs)"


def locked(path: Path) -> Callable[[], None]:
    """Lock a file that one writer at a time has; returns what releases it, as a death does."""
    busy = BlockingIOError(f"{path}: another writer of this rank is at work")
    if path in _held:
        raise busy
    file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        if fcntl is not None:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(file)
        raise busy from None
    _held.add(path)

    def release() -> None:
        os.close(file)
        _held.discard(path)

    return release
