"""Few cases of a product of axes: each value of an axis with each value of every other axis.

A fault of the kernels shows for one value of an axis or for a pair of them (a dtype's tail at a
width, a divergence at an input), so a test does not need all the triples. `FASTKD_TEST_ALL=1` runs
them.
"""

from __future__ import annotations

import itertools
import os
import zlib
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any, NamedTuple, TypeVar

import pytest
from common import FORMS, runs_in_its_form

Test = TypeVar("Test", bound=Callable[..., None])
LINEAR = {name for name, sides in FORMS.items() if any(sides)}
ALL = os.environ.get("FASTKD_TEST_ALL") == "1"


class Value(NamedTuple):
    """One value of an axis: its id, the arguments that it stands for and its marks."""

    id: str
    arguments: tuple[Any, ...]
    marks: tuple[Any, ...]


def pairwise(test: Test) -> Test:
    """Put this above the stacked `parametrize` of a test: it runs a selection of their product.

    The selection is the same in every run. It differs between tests, so that together they cross
    more than pairs.
    """
    marks = list(getattr(test, "pytestmark", ()))
    axes = [mark for mark in marks if mark.name == "parametrize"]
    names = [_names(mark) for mark in axes]
    rows = [
        row
        for row in itertools.product(*map(_values, axes))
        if runs_in_its_form(
            dict(zip(itertools.chain(*names), _arguments(row), strict=True)), not ALL
        )
    ]
    if not ALL:
        # apart: a pair that only a linear form ran would be no pair of dense operands
        by_form: dict[bool, list[tuple[Value, ...]]] = {False: [], True: []}
        for row in rows:
            by_form[any(value.id in LINEAR for value in row)].append(row)
        rows = [row for some in by_form.values() for row in selected(some, test.__qualname__)]
    combined = pytest.mark.parametrize(
        list(itertools.chain(*names)),
        [
            pytest.param(
                *_arguments(row),
                id="-".join(value.id for value in row),
                marks=[mark for value in row for mark in value.marks],
            )
            for row in rows
        ],
    )
    rest = [mark for mark in marks if mark.name != "parametrize"]
    test.pytestmark = rest  # type: ignore[attr-defined]
    return combined(test)


def selected(rows: list[tuple[Value, ...]], salt: str) -> list[tuple[Value, ...]]:
    return [rows[i] for i in cover([[value.id for value in row] for row in rows], salt)]


def cover(rows: Sequence[Sequence[str]], salt: str = "", last: Collection[int] = ()) -> list[int]:
    """Which of the rows to take, in order: they hold every pair of values that the rows hold.

    salt: another one gives another selection. last: rows to take only where no other one brings
    as much.
    """
    pairs = [set(_pairs(row)) for row in rows]
    order = sorted(
        range(len(rows)),
        key=lambda i: (i in last, zlib.crc32("-".join((salt, *rows[i])).encode())),
    )
    missing: set[Any] = set().union(*pairs)
    taken = []
    for news in range(max(map(len, pairs), default=0), 0, -1):  # those first that bring the most
        for i in order:
            if len(pairs[i] & missing) >= news:
                taken.append(i)
                missing -= pairs[i]
    return sorted(taken)


def _pairs(row: Sequence[str]) -> Iterator[tuple[Any, ...]]:
    return itertools.combinations(enumerate(row), min(2, len(row)))


def _names(mark: Any) -> list[str]:
    names = mark.args[0]
    return [n.strip() for n in names.split(",")] if isinstance(names, str) else list(names)


def _values(mark: Any) -> list[Value]:
    ids, single = mark.kwargs.get("ids"), len(_names(mark)) == 1
    ids = ids if ids is None or callable(ids) else list(ids)
    values = []
    for number, given in enumerate(mark.args[1]):
        set_ = given if hasattr(given, "marks") and hasattr(given, "values") else None
        if set_ is not None:
            arguments, marks, id_ = tuple(set_.values), tuple(set_.marks), set_.id
        else:
            arguments, marks, id_ = ((given,) if single else tuple(given)), (), None
        if id_ is None and ids is not None:
            id_ = "-".join(map(str, map(ids, arguments))) if callable(ids) else ids[number]
        values.append(
            Value("-".join(map(str, arguments)) if id_ is None else id_, arguments, marks)
        )
    return values


def _arguments(row: Sequence[Value]) -> list[Any]:
    return [argument for value in row for argument in value.arguments]
