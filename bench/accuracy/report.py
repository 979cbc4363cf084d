"""The points as compact Markdown tables, as JSON, and whether the statement holds."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from bench.accuracy.oracle import WIDER_THAN_FLOAT64
from bench.accuracy.points import FLOOR, KINK, SHARE, TORCH, Point, Violation
from bench.families.loss_providers import PROVIDERS
from bench.harness.family import spelled
from bench.harness.machine import machine_line
from bench.harness.table import table

FLOORS = (FLOOR, 1.0, 2.0, 4.0, 8.0, 64.0)  # violations are counted at each, for their size
LISTED = 24  # violations on the page; the JSON has all

LEGEND = f"""\
Errors are against a truth in long double, of the loss relative to the larger of the loss and one
nat (over T^2 above T = 1), of the gradient the worst element relative to the largest gradient of
its row; a table shows medians over the points (distributions x temperatures x vocabularies). "above
torch" counts the points where ours is larger than eager's or the compiled one's by the worst
element or batch, and above {FLOOR:g} units in the last place of the result's dtype; "worst" is the
largest ratio of ours to what was allowed there. A gradient is rounded correctly if it is the true
one rounded once. Counted are elements that are then a normal number of the dtype and at least
2^-23 of the row's largest: for the rest any noise will do. Columns of tv and of acceptance within
{KINK} last places of p = q have two right gradients and are left out, as are those that move with
them."""


@dataclass(frozen=True)
class Group:
    """The points of one dtype and case, judged for one of ours."""

    dtype: torch.dtype
    case: str
    ours: str
    points: list[Point]

    def violations(self, of: str, floor: float = FLOOR) -> list[Violation]:
        found = (v for point in self.points for v in point.violations(floor))
        return [v for v in found if v.ours == self.ours and v.of == of]

    def above(self, of: str, floor: float = FLOOR) -> int:
        """Points, however many torches there are."""
        return len({id(v.point) for v in self.violations(of, floor)})

    def median(self, provider: str, of: str) -> float:
        return statistics.median(getattr(p.found[provider], of) for p in self._with(provider))

    def share(self, provider: str) -> float | None:
        """Of the counted elements of all points those that are correctly rounded."""
        known = self._with(provider)
        counted = sum(p.counted for p in known)
        return sum(p.found[provider].right for p in known) / counted if counted else None

    def enough(self) -> bool:
        """Whether the share is what the statement says."""
        share = self.share(self.ours)
        return share is None or share >= SHARE.get(self.dtype, 0.0)

    def names(self) -> list[str]:
        """Ours and those that it is held against, as far as they have results."""
        return [name for name in (self.ours, *TORCH) if self._with(name)]

    def _with(self, provider: str) -> list[Point]:
        return [p for p in self.points if provider in p.found]


def groups(points: Sequence[Point]) -> list[Group]:
    """By dtype, case and each of ours that has results there."""
    found: dict[tuple[torch.dtype, str, str], list[Point]] = {}
    for point in points:
        for name in (*point.found, *point.notes):
            if PROVIDERS[name].ours:
                found.setdefault((point.dtype, point.case, name), []).append(point)
    dtypes = list(dict.fromkeys(p.dtype for p in points))
    return [Group(*key, found[key]) for key in sorted(found, key=lambda k: dtypes.index(k[0]))]


def failures(points: Sequence[Point]) -> list[str]:
    """Ours that raised, in a line each."""
    return [
        f"{name} FAILED: {p.case}, {spelled(p.dtype)}, {p.where}: {note}"
        for p in points
        for name, note in p.notes.items()
        if PROVIDERS[name].ours
    ]


def holds(points: Sequence[Point]) -> bool:
    """The statement: never above torch, and the share of correctly rounded gradients."""
    good = not failures(points) and all(group.enough() for group in groups(points))
    return good and not any(True for point in points for _ in point.violations())


# ---- Markdown


def markdown(points: Sequence[Point], facts: dict[str, Any]) -> str:
    """All tables, the worst violations and the verdict."""
    judged = groups(points)
    words = ("dtype", "case", "ours", "of")
    lines = ["### accuracy", "", machine_line(facts), ""]
    lines += [*table([_errors(group) for group in judged], words), ""]
    found = [group.violations(of) for group in judged for of in ("gradient", "loss")]
    worst = [max(every, key=lambda v: v.ratio) for every in found if every]
    worst.sort(key=lambda v: -v.ratio)
    if worst:
        lines += ["Points above torch, if the floor were so many units in the last place:", ""]
        lines += [*table(_by_floor(judged), words), ""]
        lines += [f"The worst of each dtype, case and result ({min(len(worst), LISTED)}):", ""]
        lines += [f"- {_line(v)}" for v in worst[:LISTED]] + [""]
    return "\n".join([*lines, *_notes(points), LEGEND, "", verdict(points)])


def verdict(points: Sequence[Point]) -> str:
    """The statement as it stands here."""
    judged = groups(points)
    names = ", ".join(dict.fromkeys(group.ours for group in judged)) or "nobody"
    above = len({id(p) for p in points if any(True for _ in p.violations())})
    text = f"{names}: above torch in {above} of {len(points)} points"
    for dtype, least in SHARE.items():
        shares = {g.case: g.share(g.ours) for g in judged if g.dtype == dtype}
        known = {case: share for case, share in shares.items() if share is not None}
        if known:
            low = min(known, key=lambda case: known[case])
            missed = [case for case, share in known.items() if share < least]
            text += f"; {spelled(dtype)} gradients correctly rounded in at least "
            text += f"{_percent(known[low])} ({low})"
            text += f", below {_percent(least)} in {', '.join(missed)}" if missed else ""
    return text + (". The statement holds." if holds(points) else ". The statement does NOT hold.")


def _errors(group: Group) -> dict[str, str]:
    row = {"dtype": spelled(group.dtype), "case": group.case, "ours": group.ours}
    row["points"] = str(len(group.points))
    for what, of in (("grad", "gradient"), ("loss", "loss")):
        for name in group.names():
            row[f"{what} {name}"] = _short(group.median(name, what))
        found = group.violations(of)
        row[f"{what} above torch"] = str(group.above(of))
        row[f"{what} worst"] = _ratio(max(v.ratio for v in found)) if found else "-"
    if group.dtype in (torch.bfloat16, torch.float16):
        for name in group.names():
            share = group.share(name)
            row[f"rounded {name}"] = "-" if share is None else _percent(share)
    return row


def _by_floor(judged: Sequence[Group]) -> list[dict[str, str]]:
    rows = []
    for dtype in dict.fromkeys(group.dtype for group in judged):
        here = [group for group in judged if group.dtype == dtype]
        for of in ("gradient", "loss"):
            row = {"dtype": spelled(dtype), "of": of}
            for floor in FLOORS:
                row[f"{floor:g}"] = str(sum(group.above(of, floor) for group in here))
            rows.append({**row, "points": str(sum(len(group.points) for group in here))})
    return rows


def _line(v: Violation) -> str:
    p = v.point
    return (
        f"{p.case} {spelled(p.dtype)}, {p.where}: {v.of} {_short(v.error)} last places, "
        f"{v.torch} {_short(v.allowed)} ({_ratio(v.ratio)})"
    )


def _notes(points: Sequence[Point]) -> list[str]:
    lines = dict.fromkeys(failures(points))
    for point in points:
        for name, note in point.notes.items():
            if not PROVIDERS[name].ours:
                lines[f"{name} SKIPPED: {point.case}, {spelled(point.dtype)}: {note}"] = None
    if any(p.dtype == torch.float64 for p in points) and not WIDER_THAN_FLOAT64:
        lines["float64 UNRELIABLE: long double is no wider here"] = None
    return [*(f"- {line}" for line in lines), ""] if lines else []


def _short(value: float) -> str:
    return f"{value:.1e}" if value and value < 0.01 else f"{value:.3g}"


def _ratio(value: float) -> str:
    return f"{value:.2f}x" if value < 100 else f"{value:.0e}x"


def _percent(share: float) -> str:
    """Rounded down: 99.9996 % is not all."""
    return f"{math.floor(share * 1e5) / 1e3:.3f} %"


# ---- JSON


def as_json(points: Sequence[Point], facts: dict[str, Any], settings: dict[str, Any]) -> Any:
    """Everything found, JSON-ready: machine, settings, verdict, violations, a record per point."""
    settings |= {"floor_ulp": FLOOR, "oracle_bits": int(np.finfo(np.longdouble).nmant) + 1}
    settings["share"] = {spelled(dtype): least for dtype, least in SHARE.items()}
    violations = [
        {**_where(v.point), "of": v.of, "provider": v.ours, "torch": v.torch}
        | {"error_ulp": _number(v.error), "torch_error_ulp": _number(v.allowed)}
        for point in points
        for v in point.violations()
    ]
    document: dict[str, Any] = {"machine": facts, "settings": settings, "violations": violations}
    document |= {"holds": holds(points), "verdict": verdict(points), "failures": failures(points)}
    return document | {"results": [_record(point) for point in points]}


def _where(point: Point) -> dict[str, Any]:
    names = ("case", "distribution", "temperature", "vocab")
    return {"dtype": spelled(point.dtype), **{name: getattr(point, name) for name in names}}


def _record(point: Point) -> dict[str, Any]:
    errors = {
        name: {key: _number(value) for key, value in found._asdict().items()}
        for name, found in point.found.items()
    }
    counts = {"elements": point.elements, "counted": point.counted, "notes": point.notes}
    return _where(point) | counts | {"true_loss": _number(point.loss), "errors": errors}


def _number(value: float) -> float | int | str:
    """Six digits; JSON has no infinity, so that becomes a word."""
    if isinstance(value, int):
        return value
    return float(f"{value:.6g}") if math.isfinite(value) else str(value)
