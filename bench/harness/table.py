"""Markdown tables, and how a number is written in them."""

from __future__ import annotations

from collections.abc import Sequence

from bench.harness.result import Group, Result
from bench.harness.timing import Summary

# Share of the cores that others may use before the table says that it is not to be trusted.
BUSY = 0.1


def table(rows: Sequence[dict[str, str]], words: Sequence[str]) -> list[str]:
    """The lines of a Markdown table with all columns that occur; those in `words` hold words."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    width = {name: max(len(name), *(len(row.get(name, "-")) for row in rows)) for name in names}

    def line(cells: dict[str, str]) -> str:
        texts = []
        for name in names:
            text = cells.get(name, "-")
            texts.append(text.ljust(width[name]) if name in words else text.rjust(width[name]))
        return "| " + " | ".join(texts) + " |"

    rule = "|".join(
        "-" * (width[name] + 2) if name in words else "-" * (width[name] + 1) + ":"
        for name in names
    )
    return [line(dict(zip(names, names, strict=True))), f"|{rule}|", *map(line, rows)]


def notes(groups: Sequence[Group], available: int) -> list[str]:
    """Why a provider has no number, and which inputs' times are unreliable."""
    bad = [result for group in groups for result in group if result.status != "ok"]
    # a reason that does not depend on the input is said once
    texts = dict.fromkeys(_complaint(result) for result in bad)
    for last in (group[-1] for group in groups if group):
        others = last.others_cores
        if others is not None and others > BUSY * available:
            # plain torch's threads wait for each other by spinning and suffer most
            text = (
                f"UNRELIABLE at {last.input}: others used {others:.1f} of the {available} "
                "cores meanwhile; no comparison of these times is fair"
            )
            texts[text] = None
    return ["", *(f"- {text}" for text in texts)] if texts else []


def _complaint(result: Result) -> str:
    where = "" if result.status == "skipped" else f" at {result.input}"
    return f"{result.provider} {result.status.upper()}{where}: {result.note}"


def ms(summary: Summary | None) -> str:
    return "-" if summary is None else digits(summary.median)


def spread(summary: Summary | None) -> str:
    return "-" if summary is None else f"{digits(summary.p20)} - {digits(summary.p80)}"


def digits(value: float) -> str:
    """Four digits that say something, from microseconds to seconds."""
    decimals = 4 if value < 1 else 3 if value < 10 else 2 if value < 100 else 1
    return f"{value:.{decimals}f}"


def number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}" if value < 10 else f"{value:.1f}"


def times(value: float | None) -> str:
    return "-" if value is None else f"{number(value)}x"


def percent(value: float | None, decimals: int = 0) -> str:
    return "-" if value is None else f"{100 * value:.{decimals}f} %"


def megabytes(count: int | None) -> str:
    if count is None:
        return "-"
    return f"{count / 1e6:.1f} MB" if count >= 1e5 else f"{count / 1e3:.1f} kB"
