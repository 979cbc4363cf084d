"""The table, its JSON and its plots."""

from __future__ import annotations

import math
import os
import platform
import statistics
from pathlib import Path
from typing import Any

import torch

import fastkd
from fastkd.distill.serialization import needed

from .stages import CACHED, DENSE, EAGER, HARD, LINEAR, TEACHER, VARIANTS, Stages

THRESHOLDS = {  # what the default size is to reach
    "gain": ("held-out nats below hard labels, linear (mean over the seeds)", 0.15),
    "loss": ("the dense loss beside the eager one", 8.0),
    "step": ("the whole step beside the eager one", 1.3),
    "peak": ("eager's peak memory beside LinearLogits'", 3.0),
}


TERMS = {  # of the table
    "steps": "updates of the weights",
    "nats/token": "mean cross-entropy of held-out text, which no model was trained on; less is "
    "better",
    "perplexity": "e to that: as unsure as a choice among so many equally likely tokens",
    "agreement": "how often the model's likeliest next token is the teacher's",
    "loss": "time of the loss alone, forward and backward",
    "step": "time of a whole training step: the models that it runs, loss, backward, optimizer",
    "peak": "memory that a step takes beyond what was there before it",
    "(2.0x)": "eager's time or memory divided by this row's; above 1 is better than plain torch",
}


def result(
    stages: Stages,
    figures: dict[str, dict[str, float]],
    scores: dict[str, dict[str, float]],
    facts: dict[str, Any],
) -> dict[str, Any]:
    """Everything in one JSON value."""
    rows = []
    for name in (TEACHER, *VARIANTS):
        row: dict[str, Any] = {"name": name, **scores[name], **figures.get(name, {})}
        row["perplexity"] = math.exp(min(row["nats"], 700.0))
        row["steps"] = stages.curve(name)[-1][0]
        row["curve"] = stages.curve(name)
        rows.append(row)
    by = {row["name"]: row for row in rows}
    reached = {
        "gain": statistics.fmean(facts["gains"].values()),
        "loss": by[EAGER]["loss_s"] / by[DENSE]["loss_s"],
        "step": by[EAGER]["step_s"] / by[DENSE]["step_s"],
        "peak": by[EAGER]["peak_bytes"] / by[LINEAR]["peak_bytes"],
    }
    return {
        "preset": stages.preset.as_dict(),
        "seed": stages.seed,
        "text": stages.corpus.facts,
        "machine": machine(stages.device),
        **facts,
        "rows": rows,
        "thresholds": {
            name: {"about": about, "threshold": least, "reached": reached[name]}
            for name, (about, least) in THRESHOLDS.items()
        },
    }


def machine(device: torch.device) -> dict[str, Any]:
    info = fastkd.info()
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "fastkd": fastkd.__version__,
        "isa": (info["cpu"] or {}).get("isa"),
    }


def _processor() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            lines = [line for line in file if line.startswith("model name")]
        return lines[0].partition(":")[2].strip()
    except (OSError, IndexError):
        return platform.processor() or platform.machine()


def cells(found: dict[str, Any]) -> list[list[str]]:
    """Models side by side, the head first; times and memory are of a student's step."""
    lines = [["model", "steps", "nats/token", "perplexity", "agreement", "loss", "step", "peak"]]
    eager = next(row for row in found["rows"] if row["name"] == EAGER)
    shown = (("loss_s", 1e3, "ms"), ("step_s", 1e3, "ms"), ("peak_bytes", 2.0**-20, "MiB"))
    for row in found["rows"]:
        agreement = "" if row["name"] == TEACHER else f"{digits(100 * row['agreement'])} %"
        figures = [_beside(row.get(key), eager[key], factor, unit) for key, factor, unit in shown]
        judged = [f"{row['nats']:.3f}", f"{row['perplexity']:.1f}", agreement]
        lines.append([row["name"], str(row["steps"]), *judged, *figures])
    return lines


def table(found: dict[str, Any]) -> str:
    lines = cells(found)
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    )


def _beside(value: float | None, eager: float, factor: float, unit: str) -> str:
    if value is None:
        return ""
    ratio = "" if value == eager else f" ({digits(eager / value)}x)"
    return f"{digits(value * factor)} {unit}{ratio}"


def digits(value: float) -> str:
    """Three digits, and all of those before the point: nothing but 0 is written as 0."""
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:#.3g}".rstrip(".")


def notes(found: dict[str, Any]) -> str:
    """Notes to the table, and how far the thresholds were reached."""
    by = {row["name"]: row for row in found["rows"]}
    corpus, cache = found["text"], found["cache"]
    at, eager = by[EAGER]["curve"][-1]
    dense = dict(map(tuple, by[DENSE]["curve"])).get(at)
    lines = [
        f"text: {corpus['files']} files, {corpus['train_tokens']} tokens to train on, "
        f"{corpus['held_out_tokens']} held out, a vocabulary of {corpus['vocab']}",
        f"models: teacher {digits(found['parameters'][TEACHER] / 1e6)} M parameters, student "
        f"{digits(found['parameters']['student'] / 1e6)} M; {digits(found['seconds'])} s in all",
        f"{EAGER} is the same mathematics as {DENSE} and took {at} steps only, for time",
    ]
    if dense is not None:
        lines[-1] += f"; after them {eager:.4f} nats, {DENSE} {dense:.4f}"
    lines.append(
        f"{CACHED}: {digits(cache['bytes'] / 1e6)} MB on disk, "
        f"{digits(cache['bytes'] / cache['tokens'])} bytes a token, made once in "
        f"{digits(cache['seconds'])} s; its step runs without the teacher"
    )
    lines.append(gain(found["gains"]))
    if found["default"]:
        for each in found["thresholds"].values():
            reached, least = each["reached"], each["threshold"]
            met = "met" if reached >= least else "MISSED"
            lines.append(f"{met}: {each['about']} {reached:.2f}, expected {least:g}")
    return "\n".join(lines)


def gain(gains: dict[str, float]) -> str:
    """What the teacher is worth, and how much of that is luck."""
    values = list(gains.values())
    said = f"gain of {LINEAR} over {HARD}: {statistics.fmean(values):.3f} nats a token"
    if len(values) == 1:
        return f"{said}, one seed (--seeds 3 shows the spread)"
    return (
        f"{said}, mean of seeds {', '.join(gains)}: from {min(values):.3f} to {max(values):.3f}, "
        f"standard deviation {statistics.stdev(values):.3f}"
    )


def text(found: dict[str, Any], folder: Path) -> str:
    """All that is printed at the end."""
    parts = [f"--- {name}\n{piece}" for name, piece in found["samples"].items()]
    files = (
        f"in {folder}: demo.html (this as a page, with the plots), result.json, demo.png, student/ "
        "(AutoModelForCausalLM.from_pretrained and AutoTokenizer read it)"
    )
    width = max(map(len, TERMS))
    terms = "\n".join(f"{term:{width}}  {about}" for term, about in TERMS.items())
    return "\n\n".join(["\n".join(parts), table(found), terms, notes(found), files])


COLOURS = {
    TEACHER: "#6b7280",
    HARD: "#d97706",
    EAGER: "#dc2626",
    DENSE: "#2563eb",
    LINEAR: "#059669",
    CACHED: "#7c3aed",
}


# three curves are one but for rounding: each is seen beside the narrower one above it
WIDTHS = {EAGER: 8.0, DENSE: 4.0}


def plot(found: dict[str, Any], path: Path) -> None:
    """Held-out curves of the students, then time and peak memory of their steps."""
    figure = needed("matplotlib.figure", "plot").Figure(figsize=(14, 3.8), layout="constrained")
    axes = figure.subplots(1, 4, width_ratios=[2, 1, 1, 1])
    by = {row["name"]: row for row in found["rows"]}
    teacher_loss = by[TEACHER]["curve"][-1][
        1
    ]  # on the part of the held-out text that the curves see
    axes[0].axhline(teacher_loss, color=COLOURS[TEACHER], linestyle="--", label=TEACHER)
    for name in VARIANTS:
        steps, nats = zip(*by[name]["curve"], strict=True)
        width = WIDTHS.get(name, 1.4)
        style: dict[str, Any] = dict(color=COLOURS[name], label=name, linewidth=width)
        axes[0].plot(steps, nats, **style, marker="o", markersize=2.0 + width)
    axes[0].set(title="held-out text", xlabel="step", ylabel="nats a token")
    axes[0].legend(frameon=False, fontsize="small")
    for axis, key, factor, title in (
        (axes[1], "loss_s", 1e3, "loss alone, ms"),
        (axes[2], "step_s", 1e3, "whole step, ms"),
        (axes[3], "peak_bytes", 2.0**-20, "peak memory, MiB"),
    ):
        names = [name for name in VARIANTS if key in by[name]][::-1]
        values = [by[name][key] * factor for name in names]
        bars = axis.barh(names, values, color=[COLOURS[name] for name in names])
        axis.bar_label(bars, fmt="%.3g", padding=3, fontsize="small")
        axis.set(title=title, xlim=(0, 1.18 * max(values)))
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)
