"""Writes the replacements that scan found into the sources, and nothing else."""

from __future__ import annotations

import ast
import difflib
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from fastkd.scan.files import python_of
from fastkd.scan.found import Found
from fastkd.scan.hard import HEAD

FIRST = re.compile(r"#!|#.*coding[:=]|%%")  # lines that count at the top of a file or cell alone


class Rewritten(NamedTuple):
    """A file's text with its replacements, and how many they are."""

    file: str
    before: str
    after: str
    replaced: int

    def diff(self) -> str:
        """A unified diff."""
        before, after = (x.splitlines(keepends=True) for x in (self.before, self.after))
        return "".join(difflib.unified_diff(before, after, self.file, self.file))


def is_safe(found: Found) -> bool:
    """Whether a replacement has the value of its code whatever the shapes: no note to mind."""
    free = ("the factor ", HEAD)  # of what is beside the replacement
    notes = [x for x in found.note.split("; ") if x and not x.startswith(free)]
    return bool(found.replacement and found.span and not notes)


def rewritten(losses: Iterable[Found]) -> Iterator[Rewritten]:
    """The files in which safe replacements are made; formatting and comments stay.

    A replacement with a note (a value that differs by a constant, an axis that depends on the
    shape) is left to the reader, and so is code with a comment in its midst.

    Args:
        losses: what `fastkd.scan.scan` found.

    Yields:
        One `Rewritten` for each file that changes; nothing is written.
    """
    files: dict[str, list[Found]] = {}
    for found in losses:
        if is_safe(found):
            files.setdefault(found.file, []).append(found)
    for file, inside in files.items():
        before = Path(file).read_bytes().decode("utf-8")
        if file.endswith(".ipynb"):
            after, count = _notebook(before, inside)
        else:
            after, count = _source(before, inside)
            after = _imported(after) if count else after
        if count:
            yield Rewritten(file, before, after, count)


def _source(text: str, losses: list[Found]) -> tuple[str, int]:
    lines = [x.encode() for x in re.split(r"(?<=\n)", text)]
    count, above = 0, (1 << 30, 0)
    for found in sorted(losses, key=lambda x: x.span or (), reverse=True):
        first, start, last, end = found.span or (0, 0, 0, 0)
        code = b"".join([*lines[first - 1 : last - 1], lines[last - 1][:end]])[start:]
        if (last, end) > above or b"#" in code:
            continue
        new = lines[first - 1][:start] + str(found.replacement).encode() + lines[last - 1][end:]
        lines[first - 1 : last] = [new] + [b""] * (last - first)
        count, above = count + 1, (first, start)
    after = b"".join(lines).decode()
    return (after, count) if count else (text, 0)


def _imported(text: str) -> str:
    """The text with `import fastkd` behind its first imports, unless it is there."""
    tree = ast.parse(python_of(text))
    for node in tree.body:
        if isinstance(node, ast.Import) and any(
            x.name == "fastkd" and not x.asname for x in node.names
        ):
            return text
    at = 0
    for node in tree.body:
        text_alone = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        if not isinstance(node, (ast.Import, ast.ImportFrom)) and not text_alone:
            break
        at = node.end_lineno or node.lineno
    lines = re.split(r"(?<=\n)", text)
    at = at or next(i for i, line in enumerate([*lines, ""]) if not FIRST.match(line))
    end = "\r\n" if lines[0].endswith("\r\n") else "\n"
    return "".join([*lines[:at], f"import fastkd{end}", *lines[at:]])


def _notebook(text: str, losses: list[Found]) -> tuple[str, int]:
    document: Any = json.loads(text)
    total, first = 0, True
    for number, cell in enumerate(document["cells"], 1):
        inside = [x for x in losses if x.cell == number]
        if not inside:
            continue
        source = cell["source"]
        joined = "".join(source) if isinstance(source, list) else source
        after, count = _source(joined, inside)
        if not count:
            continue
        after, first, total = (_imported(after) if first else after), False, total + count
        cell["source"] = (
            re.split(r"(?<=\n)(?=[\s\S])", after) if isinstance(source, list) else after
        )
    indent = re.match(r"\{\r?\n( +)", text)
    ascii_alone = text.isascii() and "\\u" in text
    after = json.dumps(
        document, indent=len(indent[1]) if indent else None, ensure_ascii=ascii_alone
    )
    return after + ("\n" if text.endswith("\n") else ""), total
