"""Record a finished demonstration: `python -m bench.demo demo`.

The folder's result and plot go to bench/results, its table and notes to the end of the README of
fastkd/demo. `make record-demo` runs the demonstration over three seeds first.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from pathlib import Path
from typing import Any

from fastkd.demo import report

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench" / "results"
PAGE = ROOT / "fastkd" / "demo" / "README.md"
HEADING = "## A run at the default size\n"
COLUMNS = "model, steps, nats/token, perplexity, agreement, loss alone, whole step, peak of a step"


def section(found: dict[str, Any], day: str) -> str:
    """What the README says of a result, in Markdown."""
    machine, sizes = found["machine"], found["preset"]
    seconds = found["stages"]
    further = [value for name, value in seconds.items() if name.startswith("seed ")]
    first = sum(seconds.values()) - sum(further)
    student = sizes["student"]
    rows = [COLUMNS.split(", "), ["---", *["---:"] * 7], *report.cells(found)[1:]]
    words = [
        f"{machine['device']} ({machine['isa']}), {machine['cores']} cores, {machine['threads']} "
        f"threads; torch {machine['torch']}, Python {machine['python']}; {day}.",
        f"float32, {student['batch'] * sizes['context']} tokens a student's step, "
        f"V = {sizes['vocab']}, T = 1, medians of {sizes['repeats']}.",
        f"The first seed took {first // 60:.0f} min {first % 60:.0f} s"
        + (f", each further seed {sum(further) / len(further):.0f} s" if further else "")
        + " (`bench/results/demo.json`):",
    ]
    table = "\n".join("| " + " | ".join(row) + " |" for row in rows)
    notes = "\n".join(f"- {line}" for line in report.notes(found).splitlines())
    plot = "![curves and bars](../../bench/results/demo.png)"
    return "\n".join([HEADING, *words, "", table, "", notes, "", plot, ""])


def record(folder: Path, results: Path = RESULTS, page: Path = PAGE) -> None:
    """Copy the result and the plot of `folder`, and renew the page's last section."""
    file = folder / "result.json"
    found = json.loads(file.read_text(encoding="utf-8"))
    if not found["default"]:
        raise ValueError(f"folder: got {str(folder)!r}, a run of other sizes or of another text")
    day = time.strftime("%Y-%m-%d", time.gmtime(file.stat().st_mtime))
    text = page.read_text(encoding="utf-8").partition(HEADING)[0]
    page.write_text(text + section(found, day), encoding="utf-8")
    shutil.copyfile(file, results / "demo.json")
    shutil.copyfile(folder / "demo.png", results / "demo.png")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path, help="of a finished run, for example demo")
    try:
        record(parser.parse_args().folder)
    except (ValueError, OSError) as error:
        sys.exit(f"{parser.prog}: {error}")
