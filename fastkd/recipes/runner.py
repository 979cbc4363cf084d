"""Running recipes: seeds over processes, gains over seeds, a table, JSON and a plot."""

from __future__ import annotations

import importlib
import multiprocessing
import os
import platform
import statistics
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any, NamedTuple

import torch

from fastkd.arguments.messages import shown
from fastkd.distill.logging import progress_bar
from fastkd.distill.serialization import in_lines, needed

from .recipe import Figures, Gain, Recipe

MODULES = (  # each with its RECIPES
    *("soft_targets", "responses", "features", "relations", "attention_maps", "online"),
    *("self_taught", "cross_modal", "graph", "lifelong", "quantization", "adversarial"),
    *("data_free", "architecture", "pseudo_labels", "workflow", "cached", "cross_tokenizer"),
    *("embeddings", "segmentation", "detection"),
)


def known() -> dict[str, Recipe]:
    """Every recipe by its name, in the table's order."""
    modules = [importlib.import_module(f"fastkd.recipes.{name}") for name in MODULES]
    recipes = [recipe for module in modules for recipe in module.RECIPES]
    return {recipe.name: recipe for recipe in recipes}


class Row(NamedTuple):
    """One claim over seeds; figures and gain are means, in the recipe's unit."""

    recipe: str
    method: str
    control: str
    figure: float
    baseline: float | None
    gain: float
    low: float
    high: float
    deviation: float | None  # of the gain over seeds
    seeds_improved: int
    seeds: int
    threshold: float | None
    met: bool | None  # None where nothing is claimed, or too little was run to say
    unit: str


def verdicts(recipe: Recipe, figures: Sequence[Figures], size: float) -> list[Row]:
    """The recipe's claims, of the figures of some seeds."""
    complete = size == 1 and len(figures) >= recipe.seeds
    rows = []
    for claim in recipe.gains:
        method_figures = [of[claim.method] for of in figures]
        control_figures = [of[claim.control] if claim.control else 0.0 for of in figures]
        gains = [a - b for a, b in zip(method_figures, control_figures, strict=True)]
        seeds_improved, mean = sum(gain > 0 for gain in gains), statistics.fmean(gains)
        rows.append(
            Row(
                recipe=recipe.name,
                method=claim.method,
                control=claim.control,
                figure=statistics.fmean(method_figures),
                baseline=statistics.fmean(control_figures) if claim.control else None,
                gain=mean,
                low=min(gains),
                high=max(gains),
                deviation=statistics.stdev(gains) if len(gains) > 1 else None,
                seeds_improved=seeds_improved,
                seeds=len(gains),
                threshold=claim.threshold,
                met=_met(claim, mean, seeds_improved / len(gains)) if complete else None,
                unit=recipe.unit,
            )
        )
    return rows


def _met(claim: Gain, mean: float, share: float) -> bool | None:
    if claim.threshold is None:
        return None
    return mean >= claim.threshold and share >= claim.seeds_improved


def run(
    names: Sequence[str],
    *,
    seeds: int | None = None,
    first_seed: int = 0,
    size: float = 1.0,
    jobs: int | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Run recipes over seeds.

    Args:
        names: of `known()`.
        seeds: how many; None: as many as each recipe's claims are made over.
        first_seed: the first of them.
        size: share of the steps, in (0, 1]; claims are judged at 1.
        jobs: processes, each with one thread; None: as many as there are cores.
        progress: show a tqdm bar.

    Returns:
        {"rows": of the table, "figures": by recipe and seed, "seconds": by recipe, and what it was
        run on}, JSON-ready.

    Raises:
        ValueError: a name that is not known, or numbers out of range.
    """
    recipes = known()
    if unknown := [name for name in names if name not in recipes]:
        raise ValueError(f"recipes: got {unknown}, expected some of {', '.join(recipes)}")
    if not 0 < size <= 1:
        raise ValueError(f"size: got {shown(size)}, expected a number in (0, 1]")
    for what, count in (("seeds", seeds), ("jobs", jobs)):
        if count is not None and count < 1:
            raise ValueError(f"{what}: got {shown(count)}, expected at least 1")
    jobs = jobs or len(_cores())
    todo = [
        (name, seed, size)
        for name in dict.fromkeys(names)
        for seed in range(first_seed, first_seed + (seeds or recipes[name].seeds))
    ]
    figures: dict[str, dict[int, Figures]] = {name: {} for name in names}
    seconds = dict.fromkeys(names, 0.0)
    with progress_bar(progress, total=len(todo), unit="seed", desc="recipes") as bar:
        for name, seed, found, elapsed in _results(todo, min(jobs, len(todo))):
            figures[name][seed] = found
            seconds[name] += elapsed
            bar.set_postfix_str(name, refresh=False)
            bar.update()
    rows = []
    for name, of in figures.items():
        rows += verdicts(recipes[name], [of[seed] for seed in sorted(of)], size)
    return {
        "rows": [row._asdict() for row in rows],
        "figures": {
            name: {str(seed): of[seed] for seed in sorted(of)} for name, of in figures.items()
        },
        "seconds": seconds,
        "size": size,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": f"{platform.machine()}, {len(_cores())} cores",
    }


def _cores() -> set[int]:
    if hasattr(os, "sched_getaffinity"):
        return os.sched_getaffinity(0)
    return set(range(os.cpu_count() or 1))


Result = tuple[str, int, Figures, float]


def _results(todo: Sequence[tuple[str, int, float]], jobs: int) -> Iterator[Result]:
    if jobs == 1:
        threads = torch.get_num_threads()
        try:
            yield from map(_one, todo)
        finally:
            torch.set_num_threads(threads)
        return
    spawn = multiprocessing.get_context("spawn")  # torch's threads do not survive a fork
    with ProcessPoolExecutor(jobs, mp_context=spawn) as pool:
        waiting = [pool.submit(_one, each) for each in todo]
        try:
            for done in as_completed(waiting):
                yield done.result()
        finally:
            for each in waiting:
                each.cancel()


def _one(each: tuple[str, int, float]) -> Result:
    name, seed, size = each
    torch.set_num_threads(1)  # more gain little at these sizes, and lose much on shared cores
    start = time.perf_counter()
    with torch.random.fork_rng(devices=[]):
        found = known()[name].run(seed, size)
    return name, seed, found, time.perf_counter() - start


# ---- what is shown


def listing(recipes: Sequence[Recipe]) -> str:
    """Name, what it shows, paper, and threshold of each."""
    lines = []
    for recipe in recipes:
        paper = f" ({recipe.paper})" if recipe.paper else ""
        lines.append(f"{recipe.name:20} {recipe.about}{paper}")
        for claim in recipe.gains:
            if claim.threshold is not None:
                over = f" over {claim.control}" if claim.control else ""
                share = claim.seeds_improved
                improved = f", {share:.0%} of {recipe.seeds} seeds" if share else ""
                lines.append(
                    f"{'':20}   {claim.method}{over}: at least {claim.threshold:+g} "
                    f"{recipe.unit}{improved}"
                )
    return "\n".join(lines)


HEAD = ("recipe", "method", "against", "gain", "range", "seeds improved", "threshold", "")


def table(result: dict[str, Any]) -> list[tuple[str, ...]]:
    """Rows of text: figures as printed, a claim's verdict in the last column."""
    lines: list[tuple[str, ...]] = [HEAD]
    for row in (Row(**row) for row in result["rows"]):
        digits = 1 if row.unit == "points" else 3
        verdict = {None: "", True: "met", False: "MISSED"}[row.met]
        against = f"{row.control} {row.baseline:.{digits}f}" if row.control else "-"
        lines.append(
            (
                row.recipe,
                f"{row.method} {row.figure:.{digits}f}",
                against,
                f"{row.gain:+.{digits}f} {row.unit}",
                f"{row.low:+.{digits}f} .. {row.high:+.{digits}f}",
                f"{row.seeds_improved}/{row.seeds}",
                "-" if row.threshold is None else f"{row.threshold:+g}",
                verdict,
            )
        )
    return lines


def as_text(result: dict[str, Any]) -> str:
    """The table for a terminal."""
    lines = table(result)
    widths = [max(len(line[i]) for line in lines) for i in range(len(HEAD))]
    return "\n".join(
        "  ".join(f"{x:{w}}" for x, w in zip(line, widths, strict=True)).rstrip() for line in lines
    )


def missed(result: dict[str, Any]) -> list[str]:
    """The claims that do not hold, a line each."""
    return [
        f"{row['recipe']}: {row['method']} over {row['control'] or '0'} is {row['gain']:+.3g} "
        f"{row['unit']}, {row['seeds_improved']}/{row['seeds']} seeds; expected "
        f"{row['threshold']:+g}"
        for row in result["rows"]
        if row["met"] is False
    ]


def plot(result: dict[str, Any], path: Path) -> None:
    """Draw each claim's gain over seeds, with its threshold; one panel per unit."""
    figures = needed("matplotlib.figure", "--plot")
    rows = [Row(**row) for row in result["rows"]]
    units = list(dict.fromkeys(row.unit for row in rows))
    counts = [sum(row.unit == unit for row in rows) for unit in units]
    figure = figures.Figure(figsize=(9, 1.2 * len(units) + 0.34 * len(rows)), layout="constrained")
    panels = figure.subplots(len(units), 1, squeeze=False, height_ratios=counts)
    for axes, unit in zip(panels[:, 0], units, strict=True):
        unit_rows = [row for row in rows if row.unit == unit][::-1]
        for at, row in enumerate(unit_rows):
            color = {None: "#6b7280", True: "#1d4ed8", False: "#b91c1c"}[row.met]
            axes.plot([row.low, row.high], [at, at], color=color, linewidth=2, alpha=0.4)
            axes.plot([row.gain], [at], "o", color=color)
            if row.threshold is not None:
                axes.plot([row.threshold], [at], "|", color="black", markersize=11)
        names = [f"{row.recipe}: {row.method} - {row.control or '0'}" for row in unit_rows]
        axes.set_yticks(range(len(unit_rows)), names, fontsize="small")
        axes.axvline(0, color="#9ca3af", linewidth=0.8)
        axes.set_xlabel(f"gain in {unit} (dot: mean, line: range over seeds, |: threshold)")
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="x", color="#e5e7eb", linewidth=0.6)
    figure.savefig(path, dpi=130)


def write(result: dict[str, Any], path: Path) -> None:
    """The result as JSON."""
    path.write_text(in_lines(result) + "\n", encoding="utf-8")
