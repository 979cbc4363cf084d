"""Compiles every Triton kernel ahead of time, with no GPU, and reads what came out.

`python -m bench.aot` prints a line per kernel, divergence, dtype and target, and fails (exit
status 1) where a kernel spills registers, still calls a function, reads or writes an aligned row by
less than 16 bytes at a time, or costs more than its budget. Counts are of the machine code inside
the loops that read rows, per column: one number per tile loop; "sum" is of an ordinary row's
(special-function operations/instructions), and "share" is the most of the floor's speed that they
leave on the target's GPU. A vocabulary that no vector width divides is shown, and not judged.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bench.aot.budget import judge, total
from bench.aot.build import has_xpu
from bench.aot.cases import DTYPES, TARGETS, Case, cases
from bench.aot.read import Report, compile_one

SHOWN = (
    *("kernel", "divergence", "labels", "dtype", "target", "vocab", "registers", "spills"),
    *("shared", "bytes", "calls", "special", "instructions", "sum", "share"),
)
SIZES = (9, 15, 6, 5, 6, 6, 9, 6, 6, 5, 5, 14, 15, 10, 5)


def judged(case: Case) -> Report:
    report = compile_one(case)
    judge(report)
    return report


def run(todo: list[Case], workers: int) -> Iterator[Report]:
    if workers == 1:
        yield from map(judged, todo)
        return
    with ProcessPoolExecutor(workers) as pool:
        yield from pool.map(judged, todo)


def row(values: Iterable[Any]) -> str:
    texts = ("/".join(f"{x:g}" for x in v) if isinstance(v, (list, tuple)) else v for v in values)
    shown = ("-" if text is None else str(text) for text in texts)
    return " ".join(f"{text:<{size}}" for text, size in zip(shown, SIZES, strict=True))


def cells(report: Report) -> list[Any]:
    labels = "smooth" if report.smooth else "hard" if report.hard else "-"
    own = {"labels": labels, "sum": total(report)}
    return [own[name] if name in own else getattr(report, name) for name in SHOWN]


def main() -> int:
    if os.environ.get("TRITON_INTERPRET") == "1":
        print("bench.aot: TRITON_INTERPRET=1 is set, under which nothing compiles; unset it")
        return 2
    from fastkd.divergence import divergences

    parser = argparse.ArgumentParser(prog="python -m bench.aot", description=__doc__)
    parser.add_argument("--json", metavar="FILE", help="write the table there too")
    parser.add_argument("--targets", default=",".join(TARGETS))
    parser.add_argument("--divergences", default=",".join(divergences))
    parser.add_argument("--dtypes", default=",".join(DTYPES), help="of bf16, fp16, fp32, fp64")
    parser.add_argument("--quick", action="store_true", help="each of everything once")
    parser.add_argument("--workers", type=int, default=min(os.cpu_count() or 1, 8))
    given = parser.parse_args()
    lists = (given.targets.split(","), given.divergences.split(","), given.dtypes.split(","))
    if "xpu" in lists[0] and not has_xpu():
        print("bench.aot: the target xpu needs the package triton-xpu in the place of triton")
        return 2
    todo = cases(given.quick, *lists)
    started, reports = time.time(), []
    print(row(SHOWN))
    for report in run(todo, given.workers):
        reports.append(report)
        print(row(cells(report)), *report.problems, flush=True)
        print(
            f"{len(reports)}/{len(todo)} {time.time() - started:.0f} s", end="\r", file=sys.stderr
        )
    bad = [report for report in reports if report.problems]
    print(f"{len(reports)} compiled in {time.time() - started:.0f} s, {len(bad)} with problems")
    if given.json:
        Path(given.json).write_text(json.dumps([asdict(r) for r in reports], indent=1) + "\n")
    return 1 if bad else 0


if __name__ == "__main__":
    raise SystemExit(main())
