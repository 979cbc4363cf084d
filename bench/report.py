"""Results as a Markdown table, as JSON, and the machine they were measured on."""

from __future__ import annotations

import platform
import re
import subprocess
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

import fastkd
from bench.cases import TRAINING_STREAMS
from bench.measure import MIN_ROUNDS, MOST_AT_ONCE
from bench.result import COPY, Result
from bench.timing import Summary, cores

Group = Sequence[Result]

# Logits below this stay in a core's caches and the call's own cost is what is seen: a bandwidth
# would be a number without a meaning.
SMALL_BYTES = 2**20

# Share of the cores that others may use before the table says that it is not to be trusted.
BUSY = 0.1

LEGEND = f"""\
Each time is the median of interleaved runs, 20-80 % the percentiles of forward+backward;
"forward" is the loss without a gradient. On the CPU a run of small logits is the mean of up to
{MOST_AT_ONCE} calls made one after the other. GB/s counts what no way of computing can avoid,
{len(TRAINING_STREAMS)} streams of logits ({", ".join(TRAINING_STREAMS)}),
over the time of forward+backward; "of copy" is its share of the bandwidth of `dst.copy_(src)` of
the student's logits in the same rounds (read and write counted). "peak extra" is the peak memory
above the inputs. Every provider's loss and gradient were checked against float64 on the same input
before it was timed."""


# ---- the machine


def machine(device: torch.device) -> dict[str, Any]:
    """What the numbers depend on, JSON-ready."""
    info = fastkd.info()
    return {
        "cpu": _cpu_model(),
        "cores": len(cores()),
        "threads": torch.get_num_threads(),
        "huge_pages": _huge_pages(),
        "device": str(device),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "fastkd": fastkd.__version__,
        "commit": _commit(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "driver": None if device.type == "cpu" else _driver(),
        "triton": info.get("triton"),
        "info": info,
    }


def machine_line(facts: dict[str, Any]) -> str:
    """The same in one line."""
    info = facts["info"]
    parts = [f"{facts['cpu']}, {facts['cores']} cores, {facts['threads']} threads"]
    if facts["device"] != "cpu" and info.get("gpu"):
        parts.insert(0, f"{info['gpu']['name']}")
    built = info.get("cpu")
    kernels = f"{built['isa']}" if built else "C++ extension not built"
    commit = f", commit {facts['commit']}" if facts["commit"] else ""
    parts.append(f"fastkd {facts['fastkd']} ({kernels}{commit})")
    parts.append(f"torch {facts['torch']}, Python {facts['python']}")
    return " | ".join([*parts, facts["date"]])


def _driver() -> str | None:
    """The NVIDIA kernel driver's version; None where it does not say."""
    try:
        text = Path("/proc/driver/nvidia/version").read_text()
    except OSError:
        return None
    found = re.search(r"\b\d{3}\.\d+(?:\.\d+)?\b", text)
    return found[0] if found else None


def _huge_pages() -> str | None:
    """Linux's mode; the cost of fresh memory, a new gradient's too, depends on it."""
    try:
        modes = Path("/sys/kernel/mm/transparent_hugepage/enabled").read_text()
    except OSError:
        return None
    return modes.partition("[")[2].partition("]")[0] or None


def _cpu_model() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            for line in file:
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _commit() -> str | None:
    """The checkout's commit, "+" if its files differ from it; None outside of a checkout."""

    def git(*arguments: str) -> str | None:
        command = ["git", "-C", str(Path(__file__).parent), *arguments]
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10)
        except (OSError, subprocess.SubprocessError):
            return None
        return done.stdout.strip()

    commit = git("rev-parse", "--short=10", "HEAD")
    return commit and commit + ("+" if git("status", "--porcelain", "-uno") else "")


# ---- Markdown


def markdown(groups: Sequence[Group], facts: dict[str, Any]) -> str:
    """One table for results of the same case and dtype; a group is one input's."""
    first = groups[0][0]
    with_forward = any(result.forward for group in groups for result in group)
    rows = [row for group in groups for row in _rows(group, with_forward)]
    lines = [f"### {first.case}, {first.dtype}", "", f"`{first.call}`  ", machine_line(facts), ""]
    return "\n".join(lines + table(rows) + _notes(groups, facts["cores"]) + [""])


def _rows(group: Group, with_forward: bool) -> list[dict[str, str]]:
    by_name = {result.provider: result for result in group}
    rows = []
    for result in group:
        if result.status == "skipped":
            continue
        row = {"shape": result.shape.label, "provider": result.provider}
        if with_forward:
            row["forward ms"] = _ms(result.forward)
        row["fwd+bwd ms"] = _ms(result.training)
        row["20-80 %"] = _range(result.training)
        if result.status != "ok":
            row["fwd+bwd ms"] = result.status.upper()
        for name in ("eager", "compile"):
            if name in by_name:
                row[f"vs {name}"] = _times(speedup(result, by_name[name]))
        row["peak extra"] = _megabytes(result.peak_bytes)
        row["x logits"] = _multiple(result)
        if result.logits_bytes >= SMALL_BYTES:
            row["GB/s"] = _number(result.gb_s)
            share = result.copy_share
            row["of copy"] = "-" if share is None else f"{100 * share:.0f} %"
        rows.append(row)
    return rows


def table(rows: list[dict[str, str]], left: Sequence[str] = ("shape", "provider")) -> list[str]:
    """The lines of a Markdown table with all columns that occur; those in `left` hold words."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    width = {name: max(len(name), *(len(row.get(name, "-")) for row in rows)) for name in names}

    def line(cells: dict[str, str]) -> str:
        texts = []
        for name in names:
            text = cells.get(name, "-")
            texts.append(text.ljust(width[name]) if name in left else text.rjust(width[name]))
        return "| " + " | ".join(texts) + " |"

    rule = "|".join(
        "-" * (width[name] + 2) if name in left else "-" * (width[name] + 1) + ":" for name in names
    )
    return [line(dict(zip(names, names, strict=True))), f"|{rule}|", *map(line, rows)]


def _notes(groups: Sequence[Group], available: int) -> list[str]:
    bad = [result for group in groups for result in group if result.status != "ok"]
    # a reason that does not depend on the shape is said once
    texts = dict.fromkeys(_complaint(result) for result in bad)
    for timed in (group[-1] for group in groups):
        others = timed.others_cores
        if others is not None and others > BUSY * available:
            # plain torch's threads wait for each other by spinning and suffer most
            text = (
                f"UNRELIABLE at {timed.shape.label}: others used {others:.1f} of the {available} "
                "cores meanwhile; no comparison of these times is fair"
            )
            texts[text] = None
    return ["", *(f"- {text}" for text in texts)] if texts else []


def _complaint(result: Result) -> str:
    where = "" if result.status == "skipped" else f" at {result.shape.label}"
    return f"{result.provider} {result.status.upper()}{where}: {result.note}"


def speedup(result: Result, base: Result) -> float | None:
    """How many times faster forward+backward is than the base's; None if there is no saying.

    Too few rounds (`--toy` runs one, cold) say nothing about speed.
    """
    if result.training is None or base.training is None or result.provider == COPY:
        return None
    if min(result.training.runs, base.training.runs) < MIN_ROUNDS:
        return None
    return base.training.median / result.training.median


def _ms(summary: Summary | None) -> str:
    return "-" if summary is None else _digits(summary.median)


def _range(summary: Summary | None) -> str:
    return "-" if summary is None else f"{_digits(summary.p20)} - {_digits(summary.p80)}"


def _digits(value: float) -> str:
    """Four digits that say something, from microseconds to seconds."""
    decimals = 4 if value < 1 else 3 if value < 10 else 2 if value < 100 else 1
    return f"{value:.{decimals}f}"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}" if value < 10 else f"{value:.1f}"


def _times(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}x" if value < 10 else f"{value:.1f}x"


def _megabytes(count: int | None) -> str:
    if count is None:
        return "-"
    return f"{count / 1e6:.1f} MB" if count >= 1e5 else f"{count / 1e3:.1f} kB"


def _multiple(result: Result) -> str:
    if result.peak_bytes is None or not result.logits_bytes:
        return "-"
    return f"{result.peak_bytes / result.logits_bytes:.2f}"


# ---- JSON


def as_json(groups: Sequence[Group], facts: dict[str, Any], settings: dict[str, Any]) -> Any:
    """Everything measured, JSON-ready: machine, settings, one record per provider and input."""
    return {
        "machine": facts,
        "settings": settings,
        "results": [_record(result) for group in groups for result in group],
    }


def _record(result: Result) -> dict[str, Any]:
    return {
        "case": result.case,
        "call": result.call,
        "rows": result.shape.rows,
        "vocab": result.shape.vocab,
        "dtype": result.dtype,
        "provider": result.provider,
        "status": result.status,
        "note": result.note,
        "forward_ms": result.forward and result.forward._asdict(),
        "forward_backward_ms": result.training and result.training._asdict(),
        "peak_extra_bytes": result.peak_bytes,
        "logits_bytes": result.logits_bytes,
        "floor_bytes": {"forward": result.forward_floor, "training": result.training_floor},
        "gb_s": result.gb_s,
        "copy_gb_s": result.copy_gb_s,
        "copy_share": result.copy_share,
        "others_cores": result.others_cores,
        "error": _finite(result.errors),
        "allowed_error": _finite(result.bound),
    }


def _finite(pair: Any) -> dict[str, float | str] | None:
    """Errors by name; JSON has no NaN and no infinity, so these become words."""
    if pair is None:
        return None
    as_text = {name: str(value) for name, value in pair._asdict().items()}
    return {
        name: text if text in ("nan", "inf", "-inf") else float(text)
        for name, text in as_text.items()
    }
