"""The points as a picture: the error of ours against plain torch's, for each dtype."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.accuracy.errors import FLOOR
from bench.accuracy.points import TORCH, Point
from bench.accuracy.report import spelled
from bench.providers import PROVIDERS
from bench.report import machine_line

# beyond, an error is as good as none (below) or as good as any (above)
LEAST, MOST = 2.0**-6, 2.0**26
DPI = 130
GREY = "#5f6368"


def draw(points: Sequence[Point], facts: dict[str, Any], path: Path) -> None:
    """Writes the figure; the file's ending chooses the format.

    Raises:
        ImportError: matplotlib is not installed.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    dtypes = list(dict.fromkeys(point.dtype for point in points))
    names = list(dict.fromkeys(point.case for point in points))
    colours = dict(zip(names, plt.get_cmap("Dark2").colors, strict=False))
    figure, axes = plt.subplots(
        2,
        max(1, len(dtypes)),
        figsize=(3.4 * max(1, len(dtypes)) + 1.6, 7.6),
        squeeze=False,
        layout="constrained",
    )
    for column, dtype in enumerate(dtypes):
        here = [point for point in points if point.dtype == dtype]
        for axis, of in zip(axes[:, column], ("gradient", "loss"), strict=True):
            _draw(axis, here, of, colours)
            axis.set_title(f"{of}, {spelled(dtype)}", fontsize=9.5, loc="left", weight="bold")
            axis.set_xlabel("error of eager torch, last places", fontsize=7.5)
        axes[0, 0].set_ylabel("error of fastkd, last places", fontsize=7.5)
        axes[1, 0].set_ylabel("error of fastkd, last places", fontsize=7.5)
    marks = [
        plt.Line2D([], [], color=colours.get(n, GREY), marker="o", ls="", ms=4, label=n)
        for n in names
    ]
    figure.legend(handles=marks, loc="outside right upper", fontsize=7.5, frameon=False)
    # a "$" would start a formula
    text = textwrap.fill(machine_line(facts).replace("$", ""), width=60 + 45 * len(dtypes))
    figure.supxlabel(text, fontsize=6.5, color=GREY, x=0.01, ha="left")
    figure.savefig(path, dpi=DPI)
    plt.close(figure)


def _draw(axis: Any, points: Sequence[Point], of: str, colours: dict[str, Any]) -> None:
    """One dot per point; above the line ours is worse, in the grey corner neither says anything."""
    axis.plot([LEAST, MOST], [LEAST, MOST], color="#202124", lw=0.8)
    axis.fill_between([LEAST, MOST], [LEAST, LEAST], [FLOOR, FLOOR], color="#eceff1", lw=0)
    key = {"gradient": "grad_ulp"}.get(of, "loss_ulp")
    for point in points:
        ours = [name for name in point.found if PROVIDERS[name].ours]
        if not ours or TORCH[0] not in point.found:
            continue
        x, y = (_inside(getattr(point.found[name], key)) for name in (TORCH[0], ours[0]))
        axis.plot(x, y, "o", ms=2.4, alpha=0.6, mew=0, color=colours.get(point.case, GREY))
    axis.set_xscale("log", base=2)
    axis.set_yscale("log", base=2)
    axis.set_xlim(LEAST, MOST)
    axis.set_ylim(LEAST, MOST)
    axis.set_aspect("equal")
    axis.tick_params(labelsize=7, colors=GREY)
    axis.spines[["top", "right"]].set_visible(False)
    axis.text(MOST / 4, FLOOR, "floor", fontsize=6.5, color=GREY, va="top", ha="right")
    axis.text(LEAST * 4, MOST / 8, "fastkd worse", fontsize=7, color=GREY, va="top")
    axis.text(MOST / 4, LEAST * 4, "torch worse", fontsize=7, color=GREY, ha="right")


def _inside(error: float) -> float:
    return MOST if math.isinf(error) else min(max(error, LEAST), MOST)
