"""Python sources and notebooks as syntax trees."""

from __future__ import annotations

import ast
import json
import os
import re
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

COMMAND = re.compile(r"^(\s*)([%!?].*|.*\?)$")  # of the notebook, not of Python
ASSIGNED = re.compile(r"^(\s*[\w, ]+=\s*)[%!].*$")
PYTHON_CELLS = {"time", "timeit", "capture", "prun"}  # %%words over cells of Python


class Unreadable(NamedTuple):
    """What could not be read, and why."""

    file: str
    why: str
    line: int = 0
    cell: int | None = None


class Parsed(NamedTuple):
    """One file's tree; of a notebook, that of all cells one below the other."""

    tree: ast.Module
    faults: list[Unreadable]
    cells: list[tuple[int, int]]  # (lines above it, number) of each cell

    def place(self, line: int) -> tuple[int | None, int]:
        """(cell, line within it) of a line of the tree."""
        above = [x for x in self.cells if x[0] < line]
        return (above[-1][1], line - above[-1][0]) if above else (None, line)


def files(paths: Iterable[Path]) -> Iterator[Path | Unreadable]:
    """The files of paths, folders walked in order."""
    for path in paths:
        if not path.is_dir():
            yield path
            continue
        faults: list[OSError] = []
        found = list[Path]()
        for folder, inner, names in os.walk(path, onerror=faults.append):
            inner[:] = [x for x in inner if x != ".ipynb_checkpoints"]
            found += [Path(folder, x) for x in names if x.endswith((".py", ".ipynb"))]
        yield from sorted(found)
        for fault in faults:
            yield Unreadable(str(fault.filename), str(fault.strerror))


def parse(file: Path) -> Parsed:
    """The tree of a file; what cannot be read is among its faults."""
    try:
        content = file.read_bytes()
        if file.suffix == ".ipynb":
            return _notebook(file, json.loads(content.decode("utf-8-sig")))
        return Parsed(_parsed(content), [], [])
    except (ValueError, OSError, RecursionError, MemoryError, SyntaxError) as error:
        return Parsed(ast.Module([], []), [_fault(file, error)], [])


def _fault(file: Path, error: Exception, cell: int | None = None) -> Unreadable:
    line = getattr(error, "lineno", None) or 0
    why = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return Unreadable(str(file), str(why), line, cell)


def _parsed(text: str | bytes) -> ast.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the source's own escapes
        return ast.parse(text)


def _notebook(file: Path, document: object) -> Parsed:
    cells = document.get("cells") if isinstance(document, dict) else None
    if not isinstance(cells, list):
        raise ValueError("got no list of cells, expected a notebook of version 4")
    parsed, above = Parsed(ast.Module([], []), [], []), 0
    for number, cell in enumerate(cells, 1):
        if not isinstance(cell, dict) or cell.get("cell_type") != "code":
            continue
        source = cell.get("source", "")
        text = "".join(map(str, source)) if isinstance(source, list) else str(source)
        try:
            tree = _parsed(python_of(text))
        except (ValueError, RecursionError, MemoryError, SyntaxError) as error:
            parsed.faults.append(_fault(file, error, number))
            continue
        parsed.cells.append((above, number))
        for node in tree.body:
            ast.increment_lineno(node, above)
        parsed.tree.body.extend(tree.body)
        above += text.count("\n") + 1
    return parsed


def python_of(text: str) -> str:
    """A cell's Python, line for line, without the notebook's own commands."""
    first = re.match(r"\s*%%(\w+)", text)
    if first and first[1] not in PYTHON_CELLS:
        return ""
    lines = text.split("\n")
    try:
        ast.parse(text)
    except (SyntaxError, ValueError):
        lines = [ASSIGNED.sub(r"\1None", COMMAND.sub(r"\1pass", x)) for x in lines]
    return "\n".join(lines)
