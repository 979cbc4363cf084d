"""Results as a picture: bars of time and memory for each input, or lines against a size."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.harness.machine import machine_line
from bench.harness.result import Group, Result, named, speedup

# ours in one family of colour, the baselines in greys: the eye goes to what the picture is about
COLOURS = {
    "eager": "#9aa0a6",
    "compile": "#6b7178",
    "compile-max": "#4a4f55",
    "liger": "#c9a26d",
    "reference": "#a9c7e8",
    "fastkd": "#2f74c0",
    "fastkd-inplace": "#12457f",
    "fastkd-dense": "#8ab4f8",
    "products": "#1e8e3e",
}
OTHER, DARK, PALE = "#888888", "#202124", "#5f6368"
PAIRS_PER_LINE = 2
SINGLE_FILE = 3  # up to so many inputs, one below the other: readable at half a page's width
DPI = 130


def draw_bars(
    groups: Sequence[Group], facts: dict[str, Any], path: Path, what: str, bases: Sequence[str]
) -> None:
    """For each input, time on the left and peak memory on the right.

    Args:
        what: the time that is drawn; bases: who the factors refer to, if it was run.

    Raises:
        ImportError: matplotlib is not installed.
    """
    plt = _pyplot()
    shown = [timed for group in groups if (timed := [one for one in group if what in one.times])]
    columns = 1 if len(shown) <= SINGLE_FILE else PAIRS_PER_LINE
    lines = max(1, -(-len(shown) // columns))
    bars = max((len(group) for group in shown), default=1)
    figure, axes = plt.subplots(
        lines,
        2 * columns,
        figsize=(7.4 * columns, (0.34 * bars + 0.95) * lines + 0.75),
        squeeze=False,
        width_ratios=[1.7, 1.0] * columns,
        layout="constrained",
    )
    flat = axes.reshape(-1, 2)
    for (time, memory), group in zip(flat, shown, strict=False):
        _draw_time(time, group, what, next(filter(None, (named(group, b) for b in bases)), None))
        _draw_memory(memory, group)
    for pair in flat[len(shown) :]:
        for axis in pair:
            axis.set_axis_off()
    _finish(plt, figure, facts, path, 105 * columns)


def _draw_time(axis: Any, group: list[Result], what: str, base: Result | None) -> None:
    times = [result.times[what] for result in group]
    medians = [time.median for time in times]
    around = [[t.median - t.p20 for t in times], [t.p80 - t.median for t in times]]
    _bars(axis, group, medians)
    axis.errorbar(medians, range(len(group)), xerr=around, fmt="none", ecolor=DARK, capsize=2)
    for at, (result, time) in enumerate(zip(group, times, strict=True)):
        factor = speedup(result, base, what) if result is not base else None
        value = f"{time.median:.3g}" if time.median < 100 else f"{time.median:.0f}"
        text = f" {value} ms" + (f"  {factor:.1f}x" if factor else "")
        _say(axis, text, (time.p80, at))
    axis.set_xlim(0, 1.42 * max(time.p80 for time in times))  # room for the longest text
    axis.set_yticks(range(len(group)), [result.provider for result in group], fontsize=8.5)
    first = group[0]
    title = f"{first.case}  {first.input}  {first.dtype}"
    axis.set_title(title, fontsize=9.5, loc="left", weight="bold")
    against = "" if base is None else f"; x: times faster than {base.provider}"
    axis.set_xlabel(f"{what}, ms (20-80 %){against}", fontsize=7.5)


def _draw_memory(axis: Any, group: list[Result]) -> None:
    logits = group[0].figures.get("logits_bytes")
    sizes = [(result.peak_bytes or 0) / (logits or 1e6) for result in group]
    _bars(axis, group, sizes)
    for at, size in enumerate(sizes):
        _say(axis, f" {size:.3g}", (size, at))
    axis.set_xlim(0, 1.25 * max(sizes) or 1.0)
    axis.set_yticks(range(len(group)), [""] * len(group))
    unit = "x logits" if logits else "MB"
    axis.set_xlabel(f"peak extra memory, {unit}", fontsize=7.5)


def _say(axis: Any, text: str, at: tuple[float, float]) -> None:
    place = {"xytext": (3, 0), "textcoords": "offset points", "va": "center"}
    axis.annotate(text, at, **place, fontsize=8, color=DARK)


def _bars(axis: Any, group: list[Result], lengths: list[float]) -> None:
    colours = [COLOURS.get(result.provider, OTHER) for result in group]
    axis.barh(range(len(group)), lengths, color=colours, height=0.68)
    axis.invert_yaxis()
    axis.tick_params(axis="x", labelsize=7.5, colors=PALE)
    axis.tick_params(axis="y", length=0)
    axis.spines[["top", "right", "left"]].set_visible(False)
    axis.spines["bottom"].set_color("#dadce0")
    axis.grid(axis="x", color="#eceff1", linewidth=0.8)
    axis.set_axisbelow(True)


def draw_lines(
    groups: Sequence[Group], facts: dict[str, Any], path: Path, what: str, along: tuple[str, str]
) -> None:
    """Time and peak memory of the first case and dtype against each of two figures.

    Against one of them where the other has the value of the most points.

    Raises:
        ImportError: matplotlib is not installed.
    """
    plt = _pyplot()
    found = [result for group in groups for result in group if what in result.times]
    figure, axes = plt.subplots(2, 2, figsize=(9.0, 6.2), squeeze=False, layout="constrained")
    shown = [r for r in found if (r.case, r.dtype) == (found[0].case, found[0].dtype)]
    for column, (size, fixed) in enumerate((along, along[::-1])):
        points: dict[int, set[int]] = {}
        for one in shown:
            points.setdefault(one.figures[fixed], set()).add(one.figures[size])
        most = max(points, key=lambda value: len(points[value]), default=0)
        chosen = [one for one in shown if one.figures[fixed] == most]
        for axis, memory in zip(axes[:, column], (False, True), strict=True):
            _lines(axis, chosen, size, what, memory)
            axis.set_ylabel("peak extra memory, MB" if memory else "time, ms", fontsize=8)
            axis.set_xlabel(f"{size} ({fixed} {most})", fontsize=8)
    axes[0][0].legend(fontsize=7.5, frameon=False)
    title = f"{shown[0].case}  {shown[0].dtype}" if shown else ""
    axes[0][0].set_title(title, fontsize=9.5, loc="left", weight="bold")
    _finish(plt, figure, facts, path, 140)


def _lines(axis: Any, chosen: Sequence[Result], size: str, what: str, memory: bool) -> None:
    for provider in dict.fromkeys(result.provider for result in chosen):
        points = []
        for one in chosen:
            y = (one.peak_bytes or 0) / 1e6 if memory else one.times[what].median
            if one.provider == provider and y > 0:
                points.append((one.figures[size], y))
        if points:
            xs, ys = zip(*sorted(points), strict=True)
            colour = COLOURS.get(provider, OTHER)
            axis.plot(xs, ys, marker="o", markersize=3.5, label=provider, color=colour)
    axis.set_ylim(bottom=0)
    axis.tick_params(labelsize=7.5, colors=PALE)
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(color="#eceff1", linewidth=0.8)
    axis.set_axisbelow(True)


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def _finish(plt: Any, figure: Any, facts: dict[str, Any], path: Path, width: int) -> None:
    """Names the machine and writes the file; its ending chooses the format."""
    # a "$" would start a formula
    text = textwrap.fill(machine_line(facts).replace("$", ""), width=width)
    figure.supxlabel(text, fontsize=6.5, color=PALE, x=0.01, ha="left")
    figure.savefig(path, dpi=DPI)
    plt.close(figure)
