"""Linear losses as a picture: time and peak memory against rows, and against the vocabulary."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench.plot import COLOURS, DPI
from bench.report import machine_line

if TYPE_CHECKING:
    from bench.linear import Result

EXTRA = {"products": "#1e8e3e", "fastkd-dense": "#8ab4f8"}


def draw(results: Sequence[Result], facts: dict[str, Any], path: Path) -> None:
    """Writes the figure of the first case and dtype; the file's ending chooses the format.

    Against the rows at the vocabulary that has most of them, and the other way round.

    Raises:
        ImportError: matplotlib is not installed.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    first = results[0]
    shown = [r for r in results if r.time and (r.case, r.dtype) == (first.case, first.dtype)]
    figure, axes = plt.subplots(2, 2, figsize=(9.0, 6.2), squeeze=False, layout="constrained")
    for column, (along, fixed) in enumerate((("rows", "vocab"), ("vocab", "rows"))):
        values = [_at(result, fixed) for result in shown]
        most = max(values, key=partial(_spread, shown, along, fixed))
        chosen = [result for result in shown if _at(result, fixed) == most]
        for line, (axis, unit) in enumerate(zip(axes[:, column], ("ms", "MB"), strict=True)):
            _lines(axis, chosen, along, memory=line == 1)
            axis.set_ylabel(("time, " if line == 0 else "peak extra memory, ") + unit, fontsize=8)
            axis.set_xlabel(f"{along} ({fixed} {most})", fontsize=8)
    axes[0][0].legend(fontsize=7.5, frameon=False)
    axes[0][0].set_title(f"{first.case}  {first.dtype}", fontsize=9.5, loc="left", weight="bold")
    text = textwrap.fill(machine_line(facts).replace("$", ""), width=140)
    figure.supxlabel(text, fontsize=6.5, color="#5f6368", x=0.01, ha="left")
    figure.savefig(path, dpi=DPI)
    plt.close(figure)


def _at(result: Result, name: str) -> int:
    return int(getattr(result.shape, name))


def _spread(shown: Sequence[Result], along: str, fixed: str, value: int) -> int:
    """How many points a line has at a fixed value."""
    return len({_at(result, along) for result in shown if _at(result, fixed) == value})


def _lines(axis: Any, chosen: Sequence[Result], along: str, memory: bool) -> None:
    for provider in dict.fromkeys(result.provider for result in chosen):
        points = []
        for result in chosen:
            assert result.time is not None
            y = result.time.median if not memory else (result.peak_bytes or 0) / 1e6
            if result.provider == provider and y > 0:
                points.append((_at(result, along), y))
        if points:
            xs, ys = zip(*sorted(points), strict=True)
            colour = COLOURS.get(provider, EXTRA.get(provider, "#888888"))
            axis.plot(xs, ys, marker="o", markersize=3.5, label=provider, color=colour)
    axis.set_ylim(bottom=0)
    axis.tick_params(labelsize=7.5, colors="#5f6368")
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(color="#eceff1", linewidth=0.8)
    axis.set_axisbelow(True)
