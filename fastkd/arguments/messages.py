"""How an argument is quoted in a message: its type, its size and the first few values.

A message is read in a terminal or a log, where the repr of a whole argument would bury the sentence
that helps. Nothing here waits for a device, and nothing raises, whatever it is given.
"""

from __future__ import annotations

import difflib
import inspect
import os
import sys
import warnings
from collections.abc import Iterable
from itertools import islice
from typing import Any

from torch import Tensor

FEW = 3  # values of a container
LONGEST = 100  # characters of a quotation
DEEPEST = 2  # containers within one another
MOST_SIZES = 12  # of a shape


def describe(x: object) -> str:
    """What an argument is: type, shape or size and the first few values, in 200 characters."""
    name = _name(x)
    if isinstance(x, Tensor):
        try:
            if x.is_nested:
                return f"{name} (nested)"
            return f"a tensor {sizes(x.shape)} of {x.dtype} on {x.device}"
        except Exception:  # of a subclass: no message of ours is worth one of its errors
            return name
    try:
        if _is_array(x) and len(x.shape):  # type: ignore[attr-defined]
            return f"{name} {sizes(x.shape)} of {_cut(str(x.dtype), 20)} {shown(x)}"  # type: ignore[attr-defined]
    except Exception:
        return name
    return f"{name} {shown(x)}"


def shown(x: object) -> str:
    """As repr where that is short; else the beginning of it and the size."""
    return _cut(_shown(x, 0), LONGEST)


def sizes(shape: Iterable[int]) -> str:
    """A shape as a list; the first few sizes of one that has more dimensions than anybody reads."""
    shape = [*shape]
    if len(shape) <= MOST_SIZES:
        return str(shape)
    return f"{str(shape[:FEW])[:-1]}, ...] ({len(shape)} dimensions)"


def listed(names: Iterable[object], most: int = 12) -> str:
    """Names with commas between them, at most so many."""
    found = [_cut(str(x), 40) for x in islice(iter(names), most + 1)]
    return ", ".join(found[:most]) + (", ..." if len(found) > most else "")


def meant(name: str, known: Iterable[str]) -> str:
    """The end of a message on a name that is not known: that which looks most like it, if any."""
    near = difflib.get_close_matches(name[:80], [*known], 1)
    return f"; did you mean {near[0]!r}?" if near else ""


def unexpected(options: Iterable[str], known: Iterable[str]) -> str:
    """What is said of options that a function does not have."""
    few, known = sorted(options)[:FEW], [*known]
    return f"got unexpected options {shown(few)}, has {', '.join(known)}{meant(few[0], known)}"


def _name(x: object) -> str:
    return _cut(type(x).__name__, 60)


def _is_array(x: Any) -> bool:
    return not isinstance(x, type) and hasattr(x, "shape") and hasattr(x, "dtype")


def _cut(text: str, most: int) -> str:
    """One line of at most `most` characters."""
    short = text[: 4 * most].split()
    line = " ".join(short) if "\n" in text[: 4 * most] else text
    return line if len(line) <= most else f"{line[: most - 3]}..."


def _shown(x: Any, depth: int) -> str:
    try:
        if isinstance(x, Tensor):
            return f"tensor{sizes(x.shape)}"
        if isinstance(x, (str, bytes, bytearray)):
            most = 60 if depth == 0 else 20
            if len(x) <= most:
                return repr(x)
            return f"{x[: most // 2]!r}... ({len(x)} long)"
        if isinstance(x, (list, tuple, set, frozenset, dict)):
            return _container(x, depth)
        if _is_array(x) and len(x.shape):
            first = [*x.flat[:FEW].astype(object)]  # Python's own numbers, whose repr is short
            return _container(first, depth, int(x.size))
        return _cut(repr(x), 60)
    except Exception:  # a repr that raises, a size that is no number, 10**5000 ...
        return f"<{_name(x)}>"


def _container(x: Any, depth: int, size: int | None = None) -> str:
    size = len(x) if size is None else size
    left, right = "()" if isinstance(x, tuple) else "{}" if isinstance(x, (set, dict)) else "[]"
    if depth >= DEEPEST:
        return f"{left}...{right} ({size} long)" if size else left + right
    few = FEW if depth == 0 else 1
    first = islice(x.items() if isinstance(x, dict) else iter(x), few)
    if isinstance(x, dict):
        parts = [f"{_shown(k, depth + 1)}: {_shown(v, depth + 1)}" for k, v in first]
    else:
        parts = [_shown(v, depth + 1) for v in first]
    text = ", ".join(_cut(part, 28) for part in parts)
    if size > few:
        return f"{left}{text}, ...{right} ({size} long)"
    return f"{left}{text}{',' if isinstance(x, tuple) and size == 1 else ''}{right}"


class MadeOf:
    """A repr of an object: its constructor's arguments, of those that it keeps under their names.

    Those that are the default are left out; a model or a function is its name.
    """

    def __repr__(self) -> str:
        parts = []
        for name, option in inspect.signature(type(self).__init__).parameters.items():
            found = (getattr(self, x, None) for x in (name, f"_{name}"))
            value = next((x for x in found if x is not None and not inspect.ismethod(x)), None)
            if option.kind is inspect.Parameter.VAR_KEYWORD and isinstance(value, dict):
                parts += [f"{key}={_held(x)}" for key, x in value.items()]
            elif name != "self" and value is not option.default and value is not None:
                if isinstance(value, (str, int, float)) and value == option.default:
                    continue
                named = option.default is not option.empty or option.kind is option.KEYWORD_ONLY
                parts.append(f"{name}={_held(value)}" if named else _held(value))
        return f"{type(self).__name__}({', '.join(parts)})"


def _held(x: object) -> str:
    if isinstance(x, os.PathLike):
        x = os.fspath(x)
    if isinstance(x, MadeOf):
        return _cut(repr(x), LONGEST)
    plain = isinstance(x, (str, int, float, list, tuple, dict, Tensor)) and not callable(x)
    return shown(x) if plain else _cut(getattr(x, "__name__", type(x).__name__), 60)


_said: set[str] = set()
_said_under: object = None  # the filters then in force


def warn_once(text: str) -> None:
    """A UserWarning, once; again where the caller has set up other filters, as each test does."""
    global _said_under
    if _said_under is not warnings.filters:
        _said.clear()
        _said_under = warnings.filters
    if text in _said:
        return
    _said.add(text)
    frame, level = sys._getframe(1), 2
    inside = ("fastkd.", "torch.")  # a module's call goes through torch
    while frame.f_back is not None and str(frame.f_globals.get("__name__")).startswith(inside):
        frame, level = frame.f_back, level + 1
    warnings.warn(text, UserWarning, stacklevel=level)
