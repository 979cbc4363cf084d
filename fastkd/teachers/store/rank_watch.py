"""The ranks of a group that capture together: all of them end where one does.

    .job-RRRRR   there and locked: rank R is at work; not locked: it died; not there: it has ended
    .failed      which rank failed, and by what; of the last job, if it failed

They meet in the cache's folder and not in collectives, in which the others would wait for a slow
rank, or for one that is not there any more, until the group's timeout.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from types import TracebackType
from typing import Any

import torch.distributed as dist

from .assignment import together
from .atomic_io import Lock, died, write_whole

EVERY = 1.0  # seconds between two looks at the others while there is work


class RankWatch:
    """A context manager around this rank's part, from the first merge to the last.

    Every rank looks whether another has failed, and whether the next one in a ring is alive.
    """

    def __init__(self, group: Any, path: str | os.PathLike[str]) -> None:
        self.group, self.folder = group, Path(path)
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        self._lock: Lock | None = None
        self._begun, self._looked = False, 0.0

    def _mark(self, rank: int) -> Path:
        return self.folder.resolve() / f".job-{rank:05d}"

    @property
    def _failed(self) -> Path:
        return self.folder / ".failed"

    def __enter__(self) -> RankWatch:
        together(self.group, self.folder)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            if self.rank == 0:
                self._failed.unlink(missing_ok=True)
            self._lock = Lock(self._mark(self.rank))
        except BaseException as error:
            self._leave(error)
            raise
        return self

    def begin(self) -> None:
        """All are ready to write; to be called before the first sample.

        Raises:
            RuntimeError: another rank is not, and why.
        """
        self._begun = True
        self._agree(None)

    def _agree(self, error: BaseException | None) -> None:
        found: list[Any] = [None] * self.size
        mine = None if error is None else _words(error)
        dist.all_gather_object(found, mine, group=self.group)
        for rank, words in enumerate(found):
            if error is None and words is not None:
                raise _ended(self._of(rank, words))

    def _of(self, rank: int, words: str) -> str:
        return f"rank {rank} of {self.size} {words}"

    def look(self, *, now: bool = False) -> None:
        """Are the others still there? TeacherInputs again and again.

        Raises:
            RuntimeError: one is not; names it, and its error.
        """
        if not now and time.monotonic() - self._looked < EVERY:
            return
        self._looked = time.monotonic()
        if self._failed.exists():
            raise _ended(self._failed.read_text())
        beside = (self.rank + 1) % self.size
        if beside != self.rank and died(self._mark(beside)):
            if not self._failed.exists():  # it may have said why
                write_whole(self._failed, self._of(beside, "died").encode())
            raise _ended(self._failed.read_text())

    def _wait(self) -> None:
        pause = 0.01
        for rank in range(self.size):
            while self._mark(rank).exists():
                self.look(now=True)
                time.sleep(pause)
                pause = min(1.5 * pause, EVERY)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is not None:
            self._leave(error)
            return
        assert self._lock is not None
        self._lock.remove()
        self._wait()
        together(self.group, self.folder)

    def _leave(self, error: BaseException) -> None:
        """Tell the others, who shall hear of the first that failed and not of who heard of it."""
        try:
            if not self._begun:
                self._agree(error)
            elif not self._failed.exists():
                write_whole(self._failed, self._of(self.rank, _words(error)).encode())
        finally:
            if self._lock is not None:
                self._lock.release()


def _words(error: BaseException) -> str:
    return f"failed: {type(error).__name__}: {error}"


def _ended(what: str) -> RuntimeError:
    return RuntimeError(
        f"group: {what}; this rank has stored what it captured, and another job goes on with what "
        "is missing"
    )
