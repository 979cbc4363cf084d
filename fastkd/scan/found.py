"""What was found in a source, and what to write in its place."""

from __future__ import annotations

from typing import NamedTuple


class Found(NamedTuple):
    """One loss: where, what stands there, what to write, and what to mind.

    `line` is the line of the file, of a notebook that of its cell; cells count from 1.
    """

    file: str
    line: int
    code: str
    replacement: str | None
    note: str
    cell: int | None = None
    span: tuple[int, int, int, int] | None = None  # first line, byte, last line, byte of the code
    faults: tuple[str, ...] = ()  # names of fastkd.scan.rules.FAULTS, as the doctor has them
