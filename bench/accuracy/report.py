"""The points as compact Markdown tables, as JSON, and whether the statement holds."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from bench.accuracy.errors import FLOOR, FLOORS, KINK, SHARE
from bench.accuracy.oracle import WIDER_THAN_FLOAT64
from bench.accuracy.points import TORCH, Point, Violation
from bench.providers import PROVIDERS
from bench.report import machine_line, table

HALF = (torch.bfloat16, torch.float16)
LISTED = 24  # violations on the page; the JSON has all
FEW = 100  # counted elements of a point below which its share is no percentage worth showing

LEGEND = f"""\
Errors are against a truth in long double, of the loss relative to the larger of the loss and one
nat (over T^2 above T = 1), of the gradient the worst element relative to the largest gradient of
its row; a table shows medians over the points (distributions x temperatures x vocabularies). "above
torch" counts the points where ours is larger than eager's or the compiled one's by the worst
element or batch, and above {FLOOR:g} units in the last place of the result's dtype; "worst" is the
largest ratio of ours to what was allowed there. A gradient is rounded correctly if it is the true
one rounded once. Counted are elements that are then a normal number of the dtype and at least
2^-23 of the row's largest: for the rest any noise will do. Columns of tv within {KINK} last places
of p = q have two right gradients and are left out."""


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

    def median(self, provider: str, of: str) -> float | None:
        known = [getattr(p.found[provider], of) for p in self.points if provider in p.found]
        return statistics.median(known) if known else None

    def share(self, provider: str) -> float | None:
        """Of the counted elements of all points those that are correctly rounded."""
        known = [p for p in self.points if provider in p.found]
        counted = sum(p.counted for p in known)
        return sum(p.found[provider].right for p in known) / counted if counted else None

    def enough(self) -> bool:
        """Whether the share is what the statement says."""
        share = self.share(self.ours)
        return share is None or share >= SHARE.get(self.dtype, 0.0)


def groups(points: Sequence[Point]) -> Iterator[Group]:
    """By dtype, case and each of ours that has results there."""
    keys = dict.fromkeys((p.dtype, p.case) for p in points)
    for dtype, case in sorted(
        keys, key=lambda key: list(dict.fromkeys(d for d, _ in keys)).index(key[0])
    ):
        here = [p for p in points if (p.dtype, p.case) == (dtype, case)]
        for name in dict.fromkeys(name for p in here for name in (*p.found, *p.notes)):
            if PROVIDERS[name].ours:
                yield Group(dtype, case, name, here)


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
    judged = list(groups(points))
    return (
        not failures(points)
        and all(group.enough() for group in judged)
        and not any(True for point in points for _ in point.violations())
    )


def spelled(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# ---- Markdown


def markdown(points: Sequence[Point], facts: dict[str, Any]) -> str:
    """All tables, the worst violations and the verdict."""
    judged = list(groups(points))
    lines = ["### accuracy", "", machine_line(facts), ""]
    lines += [*table([_errors(group) for group in judged], left=("dtype", "case", "ours")), ""]
    if halves := [group for group in judged if group.dtype in HALF]:
        lines += ["Gradients that are the correctly rounded ones, of those counted:", ""]
        lines += [*table([_shares(g) for g in halves], left=("dtype", "case", "ours", "at")), ""]
    worst = sorted(_worst(judged), key=lambda v: -v.ratio)
    if worst:
        lines += ["Points above torch, if the floor were so many units in the last place:", ""]
        lines += [*table(_by_floor(judged), left=("dtype", "of")), ""]
        lines += [f"The worst of each dtype, case and result ({min(len(worst), LISTED)}):", ""]
        lines += [f"- {_line(v)}" for v in worst[:LISTED]] + [""]
    lines += _said_once(points)
    return "\n".join([*lines, LEGEND, "", verdict(points)])


def verdict(points: Sequence[Point]) -> str:
    """The statement as it stands here."""
    judged = list(groups(points))
    names = ", ".join(dict.fromkeys(group.ours for group in judged)) or "nobody"
    above = len({id(p) for p in points if any(True for _ in p.violations())})
    text = f"{names}: above torch in {above} of {len(points)} points"
    for dtype, least in SHARE.items():
        shares = {g.case: g.share(g.ours) for g in judged if g.dtype == dtype}
        known = {case: share for case, share in shares.items() if share is not None}
        if known:
            low = min(known, key=lambda case: known[case])
            missed = [case for case, share in known.items() if share < least]
            text += (
                f"; {spelled(dtype)} gradients correctly rounded in at least "
                f"{_percent(known[low])} ({low})"
            )
            text += f", below {_percent(least)} in {', '.join(missed)}" if missed else ""
    return text + (". The statement holds." if holds(points) else ". The statement does NOT hold.")


def _errors(group: Group) -> dict[str, str]:
    row = {"dtype": spelled(group.dtype), "case": group.case, "ours": group.ours}
    row["points"] = str(len(group.points))
    others = [name for name in TORCH if any(name in p.found for p in group.points)]
    for what in ("grad", "loss"):
        of = {"grad": "gradient"}.get(what, what)
        for at, name in enumerate((group.ours, *others)):
            row[f"{of} ours" if not at else f"{of[:4]} {name}"] = _short(group.median(name, what))
        found = group.violations(of)
        row[f"{of[:4]} above torch"] = str(group.above(of))
        row[f"{of[:4]} worst"] = f"{_ratio(max(v.ratio for v in found))}" if found else "-"
    return row


def _shares(group: Group) -> dict[str, str]:
    row = {"dtype": spelled(group.dtype), "case": group.case, "ours": group.ours}
    row["counted"] = f"{sum(p.counted for p in group.points):.3g}"
    others = [name for name in TORCH if any(name in p.found for p in group.points)]
    for name in (group.ours, *others):
        share = group.share(name)
        row["share" if name == group.ours else name] = "-" if share is None else _percent(share)
    if group.dtype in SHARE:
        row["enough"] = "yes" if group.enough() else "NO"
    known = [p for p in group.points if p.counted >= FEW and group.ours in p.found]
    if known:
        low = min(known, key=lambda p: p.found[group.ours].right / p.counted)
        row["lowest"] = _percent(low.found[group.ours].right / low.counted)
        row["at"] = low.where
    return row


def _by_floor(judged: Sequence[Group]) -> list[dict[str, str]]:
    rows = []
    for dtype in dict.fromkeys(group.dtype for group in judged):
        here = [group for group in judged if group.dtype == dtype]
        for of in ("gradient", "loss"):
            row = {"dtype": spelled(dtype), "of": of}
            for floor in FLOORS:
                row[f"{floor:g}"] = str(sum(group.above(of, floor) for group in here))
            row["points"] = str(sum(len(group.points) for group in here))
            rows.append(row)
    return rows


def _worst(judged: Sequence[Group]) -> Iterator[Violation]:
    for group in judged:
        for of in ("gradient", "loss"):
            found = group.violations(of)
            if found:
                yield max(found, key=lambda v: v.ratio)


def _line(v: Violation) -> str:
    p = v.point
    return (
        f"{p.case} {spelled(p.dtype)}, {p.where}: {v.of} {_short(v.error)} last places, "
        f"{v.torch} {_short(v.allowed)} ({_ratio(v.ratio)})"
    )


def _said_once(points: Sequence[Point]) -> list[str]:
    lines = dict.fromkeys(failures(points))
    for point in points:
        for name, note in point.notes.items():
            if not PROVIDERS[name].ours:
                lines[f"{name} SKIPPED: {point.case}, {spelled(point.dtype)}: {note}"] = None
    if any(p.dtype == torch.float64 for p in points) and not WIDER_THAN_FLOAT64:
        lines["float64 UNRELIABLE: long double is no wider here"] = None
    return [*(f"- {line}" for line in lines), ""] if lines else []


def _short(value: float | None) -> str:
    return "-" if value is None else f"{value:.1e}" if value and value < 0.01 else f"{value:.3g}"


def _ratio(value: float) -> str:
    return f"{value:.2f}x" if value < 100 else f"{value:.0e}x"


def _percent(share: float) -> str:
    """Rounded down: 99.9996 % is not all."""
    return f"{math.floor(share * 1e5) / 1e3:.3f} %"


# ---- JSON


def as_json(points: Sequence[Point], facts: dict[str, Any], settings: dict[str, Any]) -> Any:
    """Everything found, JSON-ready: machine, settings, verdict, violations, a record per point."""
    return {
        "machine": facts,
        "settings": {
            **settings,
            "floor_ulp": FLOOR,
            "share": {spelled(dtype): least for dtype, least in SHARE.items()},
            "oracle_bits": _oracle_bits(),
        },
        "holds": holds(points),
        "verdict": verdict(points),
        "groups": [_group(group) for group in groups(points)],
        "violations": [_violation(v) for point in points for v in point.violations()],
        "failures": failures(points),
        "results": [_record(point) for point in points],
    }


def _oracle_bits() -> int:
    import numpy as np

    return int(np.finfo(np.longdouble).nmant) + 1


def _group(group: Group) -> dict[str, Any]:
    return {
        "dtype": spelled(group.dtype),
        "case": group.case,
        "provider": group.ours,
        "points": len(group.points),
        "above_torch": {of: group.above(of) for of in ("gradient", "loss")},
        "correctly_rounded": group.share(group.ours),
        "enough": group.enough(),
    }


def _where(point: Point) -> dict[str, Any]:
    return {
        "case": point.case,
        "dtype": spelled(point.dtype),
        "distribution": point.distribution,
        "temperature": point.temperature,
        "vocab": point.vocab,
    }


def _violation(v: Violation) -> dict[str, Any]:
    return {
        **_where(v.point),
        "of": v.of,
        "provider": v.ours,
        "torch": v.torch,
        "error_ulp": _number(v.error),
        "torch_error_ulp": _number(v.allowed),
    }


def _record(point: Point) -> dict[str, Any]:
    return {
        **_where(point),
        "rows": point.rows,
        "true_loss": _number(point.loss),
        "elements": point.elements,
        "counted": point.counted,
        "errors": {
            name: {key: _number(value) for key, value in found._asdict().items()}
            for name, found in point.found.items()
        },
        "notes": point.notes,
    }


def _number(value: float) -> float | int | str:
    """Six digits; JSON has no infinity, so that becomes a word."""
    if isinstance(value, int):
        return value
    return float(f"{value:.6g}") if math.isfinite(value) else str(value)
