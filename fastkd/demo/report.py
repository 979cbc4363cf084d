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
        agreement = "" if row["name"] == TEACHER else f"{100 * row['agreement']:.1f} %"
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
    ratio = "" if value == eager else f" ({eager / value:.1f}x)"
    return f"{value * factor:.0f} {unit}{ratio}"


def notes(found: dict[str, Any]) -> str:
    """Notes to the table, and how far the thresholds were reached."""
    by = {row["name"]: row for row in found["rows"]}
    corpus, cache = found["text"], found["cache"]
    at, eager = by[EAGER]["curve"][-1]
    dense = dict(map(tuple, by[DENSE]["curve"])).get(at)
    lines = [
        f"text: {corpus['files']} files, {corpus['train_tokens']} tokens to train on, "
        f"{corpus['held_out_tokens']} held out, a vocabulary of {corpus['vocab']}",
        f"models: teacher {found['parameters'][TEACHER] / 1e6:.1f} M parameters, student "
        f"{found['parameters']['student'] / 1e6:.1f} M; {found['seconds']:.0f} s in all",
        f"x: eager's divided by its own. {EAGER} is the same mathematics and took {at} steps "
        "only, for time",
    ]
    if dense is not None:
        lines[-1] += f"; after them {eager:.4f} nats, {DENSE} {dense:.4f}"
    lines.append(
        f"{CACHED}: {cache['bytes'] / 1e6:.1f} MB on disk, "
        f"{cache['bytes'] / cache['tokens']:.0f} bytes a token, made once in "
        f"{cache['seconds']:.0f} s; its step runs without the teacher"
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
    return "\n\n".join(["\n".join(parts), table(found), notes(found), files])


COLOURS = {
    TEACHER: "#6b7280",
    HARD: "#d97706",
    EAGER: "#dc2626",
    DENSE: "#2563eb",
    LINEAR: "#059669",
    CACHED: "#7c3aed",
}


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
        axes[0].plot(
            steps,
            nats,
            color=COLOURS[name],
            label=name,
            marker=".",
            linewidth=3.0 if name == DENSE else 1.4,
        )
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
