"""Results as a picture: for each input, time on the left and memory on the right."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.report import machine_line, speedup
from bench.result import COPY, Result

Group = Sequence[Result]

# ours in one family of colour, the baselines in greys: the eye goes to what the picture is about
COLOURS = {
    "eager": "#9aa0a6",
    "compile": "#6b7178",
    "compile-max": "#4a4f55",
    "liger": "#c9a26d",
    "reference": "#a9c7e8",
    "fastkd": "#2f74c0",
    "fastkd-inplace": "#12457f",
}
PAIRS_PER_LINE = 2
SINGLE_FILE = 3  # up to so many inputs, one below the other: readable at half a page's width
DPI = 130


def draw(groups: Sequence[Group], facts: dict[str, Any], path: Path) -> None:
    """Writes the figure; the file's ending chooses the format.

    Raises:
        ImportError: matplotlib is not installed.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    shown = [timed for group in groups if (timed := _timed(group))]
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
        _draw_time(time, group)
        _draw_memory(memory, group)
    for pair in flat[len(shown) :]:
        for axis in pair:
            axis.set_axis_off()
    # a "$" would start a formula
    text = textwrap.fill(machine_line(facts).replace("$", ""), width=105 * columns)
    figure.supxlabel(text, fontsize=6.5, color="#5f6368", x=0.01, ha="left")
    figure.savefig(path, dpi=DPI)
    plt.close(figure)


def _timed(group: Group) -> list[Result]:
    return [result for result in group if result.training and result.provider != COPY]


def _draw_time(axis: Any, group: list[Result]) -> None:
    first = group[0]
    base = next((result for result in group if result.provider == "eager"), None)
    medians = [result.training.median for result in group if result.training]
    below = [r.training.median - r.training.p20 for r in group if r.training]
    above = [r.training.p80 - r.training.median for r in group if r.training]
    _bars(axis, group, medians)
    axis.errorbar(
        medians, range(len(group)), xerr=[below, above], fmt="none", ecolor="#202124", capsize=2
    )
    for at, result in enumerate(group):
        assert result.training is not None
        times = speedup(result, base) if base is not None and result is not base else None
        text = f" {_short(result.training.median)} ms" + (f"  {times:.1f}x" if times else "")
        axis.annotate(
            text,
            (result.training.p80, at),
            xytext=(3, 0),
            textcoords="offset points",
            va="center",
            fontsize=8,
            color="#202124",
        )
    # room for the longest text, right of the longest bar
    axis.set_xlim(0, 1.42 * max(result.training.p80 for result in group if result.training))
    axis.set_yticks(range(len(group)), [result.provider for result in group], fontsize=8.5)
    axis.set_title(
        f"{first.case}  {first.shape.label}  {first.dtype}", fontsize=9.5, loc="left", weight="bold"
    )
    against = "" if base is None else "; x: times faster than eager"
    axis.set_xlabel(f"forward+backward, ms (20-80 %){against}", fontsize=7.5)


def _draw_memory(axis: Any, group: list[Result]) -> None:
    sizes = [(result.peak_bytes or 0) / max(result.logits_bytes, 1) for result in group]
    _bars(axis, group, sizes)
    for at, size in enumerate(sizes):
        axis.annotate(
            f" {size:.2f}",
            (size, at),
            xytext=(2, 0),
            textcoords="offset points",
            va="center",
            fontsize=8,
            color="#202124",
        )
    axis.set_xlim(0, 1.25 * max(1.0, *sizes))
    axis.set_yticks(range(len(group)), [""] * len(group))
    axis.set_xlabel("peak extra memory, x logits", fontsize=7.5)


def _bars(axis: Any, group: list[Result], lengths: list[float]) -> None:
    colours = [COLOURS.get(result.provider, "#888888") for result in group]
    axis.barh(range(len(group)), lengths, color=colours, height=0.68)
    axis.invert_yaxis()
    axis.tick_params(axis="x", labelsize=7.5, colors="#5f6368")
    axis.tick_params(axis="y", length=0)
    axis.spines[["top", "right", "left"]].set_visible(False)
    axis.spines["bottom"].set_color("#dadce0")
    axis.grid(axis="x", color="#eceff1", linewidth=0.8)
    axis.set_axisbelow(True)


def _short(value: float) -> str:
    return f"{value:.3g}" if value < 100 else f"{value:.0f}"
