"""Runs a training script under watch, up to some steps of distillation."""

from __future__ import annotations

import os
import runpy
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from .checks import judged
from .findings import Findings
from .source import Program
from .watch import Stop, Watch


class Examined(NamedTuple):
    """What was found, in how many steps, and the traceback of a script that failed."""

    findings: Findings
    steps: int
    error: str | None

    @property
    def status(self) -> int:
        """0: nothing found; 1: findings; 2: the script failed."""
        return 2 if self.error is not None else int(bool(self.findings))


def examine(script: str | Path, arguments: Sequence[str] = (), *, steps: int = 10) -> Examined:
    """Runs a script as `python script arguments` would, and says what is wrong with its losses.

    Args:
        script: a Python file; what it writes and prints, it writes and prints.
        arguments: of the script, as in `sys.argv[1:]`.
        steps: after so many optimizer steps with a distillation loss the script is stopped.

    Returns:
        Findings, the number of such steps, and the script's own traceback where it has failed.

    Raises:
        FileNotFoundError: there is no such script.
        ValueError: steps is below 1.
    """
    path = Path(script)
    if not path.is_file():
        raise FileNotFoundError(f"script: got {str(path)!r}, expected a Python file")
    if steps < 1:
        raise ValueError(f"steps: got {steps}, expected 1 or more")
    own = os.path.abspath(path)  # as Python names a script that it runs
    watch, error = Watch(Program(own), steps), None
    with _as_main(path, arguments):
        try:
            with watch.watching():
                runpy.run_path(own, run_name="__main__")
        except Stop:
            pass
        except SystemExit as ended:
            if ended.code not in (None, 0):
                error = f"the script ended with status {ended.code}"
        except Exception as failed:
            error = _traceback(failed, own)
    return Examined(judged(watch), watch.kd_steps, error)


def _traceback(failed: BaseException, script: str) -> str:
    """The script's own part of a traceback, without the doctor's frames."""
    frames = traceback.TracebackException.from_exception(failed)
    at = next((i for i, x in enumerate(frames.stack) if x.filename == script), 0)
    mine = os.path.dirname(__file__)
    kept = [x for x in frames.stack[at:] if not x.filename.startswith(mine)]
    frames.stack = traceback.StackSummary.from_list(kept)
    return "".join(frames.format())


@contextmanager
def _as_main(path: Path, arguments: Sequence[str]) -> Iterator[None]:
    """sys.argv and sys.path of a script that Python runs itself."""
    argv, search, main = sys.argv, list(sys.path), sys.modules.get("__main__")
    sys.argv = [str(path), *arguments]
    sys.path.insert(0, os.path.dirname(os.path.abspath(path)))
    try:
        yield
    finally:
        sys.argv, sys.path[:] = argv, search
        if main is not None:
            sys.modules["__main__"] = main
