"""python -m bench.gpu: everything that needs a GPU, in ten minutes, with nothing downloaded.

Builds, tests and measures in steps. A step that fails or runs out of time hides none of the others;
the exit status is 1 where one that must pass did not. `--dry-run` prints the steps. What a step
prints goes to RESULTS/gpu-STEP.md or .txt and .log, its numbers to RESULTS/gpu-STEP.json, the
outcome of all to RESULTS/gpu.json.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bench.gpu_steps import FITTING, ROOT, Step, steps, target

MINUTES = 10.0


@dataclass
class Outcome:
    """status: "ok", "failed", "out of time" or "skipped"; note says why."""

    name: str
    command: str
    status: str
    seconds: float = 0.0
    must: bool = False
    note: str = ""


def run(step: Step, results: Path, left: float) -> Outcome:
    """Runs a step, at most for `left` seconds; what it prints goes to its files."""
    if step.skip:
        return Outcome(step.name, step.line, "skipped", note=step.skip)
    limit = min(left, step.limit if step.limit is not None else left)
    outcome = Outcome(step.name, step.line, "ok", must=step.must)
    if limit < 1:
        outcome.status, outcome.note = "out of time", "the run's time was spent before it"
        return outcome
    began = time.monotonic()
    out, log = results / f"gpu-{step.name}.{step.out}", results / f"gpu-{step.name}.log"
    try:
        with out.open("w") as stdout, log.open("w") as stderr:
            process = subprocess.Popen(
                step.argv,
                cwd=ROOT,
                env={**os.environ, **step.env},
                stdout=stdout,
                stderr=stderr,
                start_new_session=True,
            )
            try:
                code = process.wait(limit)
                if code:
                    outcome.status, outcome.note = "failed", f"exit status {code}, see {log.name}"
            except subprocess.TimeoutExpired:
                outcome.status, outcome.note = "out of time", f"stopped after {limit:.0f} s"
            finally:
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)  # its own session: the step's processes
                    process.wait()
    except OSError as error:
        outcome.status, outcome.note = "failed", str(error)
    outcome.seconds = round(time.monotonic() - began, 1)
    return outcome


def document(outcomes: Sequence[Outcome], results: Path) -> dict[str, Any]:
    """The outcome of all steps and what they measured, machine first."""
    runs: dict[str, Any] = {}
    for outcome in outcomes:
        path = results / f"gpu-{outcome.name}.json"
        if outcome.status == "skipped" or not path.exists():
            continue
        try:
            runs[outcome.name] = json.loads(path.read_text())
        except ValueError:  # stopped while it was written
            outcome.note = f"{outcome.note}; {path.name} is cut off"
    machine = next((run["machine"] for run in runs.values() if "machine" in run), None)
    return {"machine": machine, "steps": [asdict(outcome) for outcome in outcomes], "runs": runs}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; 1 where a step that must pass did not."""
    p = argparse.ArgumentParser(prog="python -m bench.gpu", description=__doc__)
    p.add_argument("--results", type=Path, default=ROOT / "bench" / "results", metavar="FOLDER")
    p.add_argument(
        "--shapes",
        default=FITTING,
        help="ROWSxVOCAB,... or '' for all: the whole grid of cases, dtypes and providers on them, "
        "without a limit of time (default: fit, what fits ten minutes)",
    )
    p.add_argument("--linear", default="gpu", metavar="SHAPES", help="shapes of the linear losses")
    p.add_argument("--minutes", type=float, default=MINUTES, help="for all steps, by default 10")
    p.add_argument("--only", default="", metavar="STEP,...", help="these steps alone")
    p.add_argument("--dry-run", action="store_true", help="print the steps, and stop")
    a = p.parse_args(argv)
    a.results = a.results.resolve()  # the steps run in the checkout's root
    todo = steps(a.results, a.shapes, target(), a.linear)
    wanted = [name for name in a.only.split(",") if name]
    for name in wanted:
        if name not in {step.name for step in todo}:
            p.error(f"--only: got {name!r}, expected of {', '.join(step.name for step in todo)}")
    todo = [step for step in todo if not wanted or step.name in wanted]
    if a.dry_run:
        for step in todo:
            limit = f"{step.limit:g} s" if step.limit else "no limit"
            about = f"skipped: {step.skip}" if step.skip else limit
            print(f"# {step.name} ({about}{', must pass' if step.must else ''})\n{step.line}")
        return 0
    a.results.mkdir(parents=True, exist_ok=True)
    for step in todo:
        (a.results / f"gpu-{step.name}.json").unlink(missing_ok=True)
    return _run(todo, a.results, 60 * a.minutes if a.shapes == FITTING else float("inf"))


def _run(todo: Sequence[Step], results: Path, seconds: float) -> int:
    end = time.monotonic() + seconds
    outcomes: list[Outcome] = []
    for step in todo:
        print(f"{step.name}: {step.line}", flush=True)
        outcomes.append(run(step, results, end - time.monotonic()))
        done = outcomes[-1]
        note = f": {done.note}" if done.note else ""
        print(f"{done.name}: {done.status}, {done.seconds:.0f} s{note}", flush=True)
        # after each step: what is known is kept if the run is not
        (results / "gpu.json").write_text(json.dumps(document(outcomes, results), indent=1) + "\n")
    bad = [outcome for outcome in outcomes if outcome.status in ("failed", "out of time")]
    for outcome in bad:
        print(f"{outcome.name} {outcome.status.upper()}: {outcome.note}")
    return int(any(outcome.must for outcome in bad))


if __name__ == "__main__":
    sys.exit(main())
