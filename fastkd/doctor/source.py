"""The user's own lines: where a call came from, and what the text there says."""

from __future__ import annotations

import ast
import linecache
import os
import sys
import sysconfig
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import nn

from fastkd.scan.rules import MEANT, SAID

from .flow import Site

PACKAGE = str(Path(__file__).parents[1]) + os.sep
INNER = (os.path.dirname(torch.__file__) + os.sep, str(Path(__file__).parent) + os.sep)
LIBRARY = (sysconfig.get_paths()["stdlib"] + os.sep, sysconfig.get_paths()["platstdlib"] + os.sep)


class Program:
    """Which files are the user's: those beside the script, or all that are no library."""

    def __init__(self, script: str | None = None) -> None:
        self.script = script
        self.root = os.path.dirname(os.path.abspath(script)) + os.sep if script else None
        self.known: dict[str, bool] = {}

    def owns(self, file: str) -> bool:
        found = self.known.get(file)
        if found is None:
            found = self.known[file] = self._owns(file)
        return found

    def _owns(self, file: str) -> bool:
        if file == self.script:
            return True
        if file.startswith("<") or "site-packages" in file or "dist-packages" in file:
            return False
        full = os.path.abspath(file)
        if full.startswith(PACKAGE):
            return False
        if self.root is not None and full.startswith(self.root):
            return True
        return self.root is None and not full.startswith(LIBRARY)

    def frames(self) -> Iterator[FrameType]:
        """The user's frames, the innermost first."""
        frame: FrameType | None = sys._getframe(1)
        while frame is not None:
            if self.owns(frame.f_code.co_filename):
                yield frame
            frame = frame.f_back

    def site(self) -> Site:
        frame = next(self.frames(), None)
        return Site(frame.f_code.co_filename, frame.f_lineno) if frame else Site("", 0)

    def place(self) -> Site:
        """The innermost line that is neither torch's nor the doctor's, a library's too."""
        frame: FrameType | None = sys._getframe(1)
        while frame is not None:
            file = frame.f_code.co_filename
            if not file.startswith(INNER) and not file.startswith("<"):
                return Site(file, frame.f_lineno)
            frame = frame.f_back
        return Site("", 0)

    def beyond(self, file: str) -> Site | None:
        """The line that has called into torch or the doctor, for a warning at a line of theirs."""
        frame: FrameType | None = sys._getframe(1) if file.startswith(INNER) else None
        while frame is not None and frame.f_code.co_filename != file:
            frame = frame.f_back
        while frame is not None and (
            frame.f_code.co_filename.startswith((*INNER, "<"))
            or frame.f_globals.get("__name__") in ("warnings", "_py_warnings")
        ):
            frame = frame.f_back
        return Site(frame.f_code.co_filename, frame.f_lineno) if frame is not None else None

    def means_reverse(self) -> bool:
        """Whether names or comments near the call say that the direction is meant."""
        for depth, frame in enumerate(self.frames()):
            if depth == 0 and SAID.search(text_of(frame.f_code.co_filename)):
                return True
            if MEANT.search(around(frame)) or MEANT.search(frame.f_code.co_name):
                return True
        return False

    def named(self, value: Any) -> str:
        """The name that a program has for an object, as `student.proj`; its class's otherwise."""
        for frame in self.frames():
            for names in (frame.f_locals, frame.f_globals):
                for name, held in list(names.items()):
                    if held is value and not name.startswith("_"):
                        return name
                for name, held in list(names.items()):
                    if isinstance(held, nn.Module) and not isinstance(value, (int, float)):
                        for path, module in held.named_modules():
                            if module is value and path:
                                return f"{name}.{path}"
        return type(value).__name__


@lru_cache(maxsize=256)
def text_of(file: str) -> str:
    return "".join(linecache.getlines(file))


@lru_cache(maxsize=256)
def tree_of(file: str) -> ast.Module | None:
    try:
        return ast.parse(text_of(file))
    except (SyntaxError, ValueError):
        return None


@lru_cache(maxsize=4096)
def statement(file: str, line: int) -> ast.stmt | None:
    """The innermost statement that a line belongs to."""
    tree = tree_of(file)
    found: ast.stmt | None = None
    for node in ast.walk(tree) if tree is not None else ():
        if isinstance(node, ast.stmt) and node.lineno <= line <= (node.end_lineno or node.lineno):
            if found is None or node.lineno >= found.lineno:
                found = node
    return found


def around(frame: FrameType) -> str:
    """A call's statement with the two lines above; at the head of a function, its first lines."""
    file, line = frame.f_code.co_filename, frame.f_lineno
    found = statement(file, line)
    first, last = (found.lineno, found.end_lineno or line) if found is not None else (line, line)
    if not isinstance(found, (ast.Assign, ast.AugAssign, ast.Return, ast.Expr, ast.AnnAssign)):
        last = first = line
    lines = linecache.getlines(file)
    text = "".join(lines[max(first - 3, 0) : last])
    if frame.f_code.co_name != "<module>":  # the docstring
        start = frame.f_code.co_firstlineno
        text += "".join(lines[start - 1 : start + 4])
    return text


def power(frame: FrameType, temperature: float) -> float:
    """How often the statement at a frame multiplies by the temperature, outside of calls."""
    found = statement(frame.f_code.co_filename, frame.f_lineno)
    value = getattr(found, "value", None)
    if value is None:
        return 0.0
    if isinstance(found, ast.AugAssign):
        sign = {ast.Mult: 1.0, ast.Div: -1.0}.get(type(found.op), 0.0)
        return sign * _power(value, frame, temperature)
    inner = [x for x in _outside(value) if isinstance(x, ast.BinOp)]
    powers = [_power(x, frame, temperature) for x in inner if not _divisor(x, inner)]
    return max(powers, default=0.0)


def _outside(node: ast.AST) -> Iterator[ast.AST]:
    """A node and what is in it, without the indices: their numbers multiply nothing."""
    yield node
    for child in ast.iter_child_nodes(node):
        if not (isinstance(node, ast.Subscript) and child is node.slice):
            yield from _outside(child)


def _divisor(node: ast.expr, others: list[ast.BinOp]) -> bool:
    """Whether an expression stands within a divisor or an exponent."""
    return any(
        any(x is node for x in ast.walk(other.right))
        for other in others
        if isinstance(other.op, (ast.Div, ast.Pow)) and other is not node
    )


def _power(node: ast.expr, frame: FrameType, temperature: float) -> float:
    if isinstance(node, ast.BinOp):
        left = _power(node.left, frame, temperature)
        if isinstance(node.op, ast.Pow):
            exponent = _value(node.right, frame)
            return left * exponent if exponent is not None else 0.0
        right = _power(node.right, frame, temperature)
        if isinstance(node.op, ast.Mult):
            return left + right
        if isinstance(node.op, ast.Div):
            return left - right
        return max(left, right) if isinstance(node.op, (ast.Add, ast.Sub)) else 0.0
    value = _value(node, frame)
    if value is None:
        if isinstance(node, ast.Call) and getattr(node.func, "attr", "") in ("pow", "square"):
            arguments = node.args
            exponent = _value(arguments[-1], frame) if arguments else 2.0
            base = node.func.value if len(arguments) < 2 else arguments[0]  # type: ignore[attr-defined]
            return _power(base, frame, temperature) * (exponent or 0.0)
        return 0.0
    for exponent in (1, 2, 4):
        if abs(value - temperature**exponent) <= 1e-6 * abs(value):
            return float(exponent)
    return 0.0


def _value(node: ast.expr, frame: FrameType) -> float | None:
    """The number that a name, an attribute, an item or a constant stands for."""
    held: Any = None
    if isinstance(node, ast.Constant):
        held = node.value
    elif isinstance(node, ast.Name):
        held = frame.f_locals.get(node.id, frame.f_globals.get(node.id))
    elif isinstance(node, (ast.Attribute, ast.Subscript)):
        base = _object(node.value, frame)
        try:
            if isinstance(node, ast.Attribute):
                held = vars(base).get(node.attr) if base is not None else None
                if held is None and base is not None and not isinstance(base, nn.Module):
                    held = vars(type(base)).get(node.attr)
            elif isinstance(base, dict) and isinstance(node.slice, ast.Constant):
                held = base.get(node.slice.value)
        except TypeError:
            held = None
    numbers = isinstance(held, (int, float)) and not isinstance(held, bool)
    return float(held) if numbers else None


def _object(node: ast.expr, frame: FrameType) -> Any:
    if isinstance(node, ast.Name):
        return frame.f_locals.get(node.id, frame.f_globals.get(node.id))
    if isinstance(node, ast.Attribute):
        base = _object(node.value, frame)
        try:
            return vars(base).get(node.attr) if base is not None else None
        except TypeError:
            return None
    return None


def step_calls(files: set[str]) -> set[Site]:
    """Every line of files that calls .step(...)."""
    found = set[Site]()
    for file in files:
        tree = tree_of(file)
        for node in ast.walk(tree) if tree is not None else ():
            named = isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)
            if named and node.func.attr == "step":  # type: ignore[attr-defined]
                end = node.end_lineno or node.lineno  # type: ignore[attr-defined]
                found.add(Site(file, end))
    return found
