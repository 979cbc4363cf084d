"""python -m bench.gpu: everything that needs a GPU, in 13 minutes, with nothing downloaded.

Builds, tests and measures in steps, what decides first. A step that fails or runs out of time hides
none of the others; the exit status is 1 where one that must pass did not. `--dry-run` prints the
steps. What a step prints goes to RESULTS/gpu-STEP.md or .txt and .log, its numbers to
RESULTS/gpu-STEP.json, the outcome of all to RESULTS/gpu.json, as soon as each is known.

A run that was stopped goes on where it was when called again with the same sources: steps that
ended are not repeated, whether they failed or not. `--again` begins anew.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bench.gpu_steps import FITTING, ROOT, Step, steps, target

MINUTES = 13.0
LAST = 10.0  # seconds of them that are left for what comes after the last step
NEVER = "the run's time was spent before it"


@dataclass
class Outcome:
    """status: "ok", "failed", "out of time", "interrupted" or "skipped"; note says why.

    A step that is out of time has taken all that it may; one that is interrupted only what was left
    of the run, and is repeated when the run goes on.
    """

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
        outcome.status, outcome.note = "interrupted", NEVER
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
                whole = step.limit is not None and limit >= step.limit
                outcome.status = "out of time" if whole else "interrupted"
                outcome.note = f"stopped after {limit:.0f} s"
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


def sources() -> str:
    """A hash of what the steps run: the outcome of other sources is none of these."""
    digest = hashlib.sha256()
    for folder in ("fastkd", "csrc", "bench", "tests"):
        for path in sorted((ROOT / folder).rglob("*")):
            if path.suffix in (".py", ".cpp", ".h"):
                digest.update(str(path.relative_to(ROOT)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def ended(results: Path, todo: Sequence[Step]) -> dict[str, Outcome]:
    """The steps that a run before has brought to an end, with these commands and sources."""
    try:
        known = json.loads((results / "gpu.json").read_text())
        found = [Outcome(**step) for step in known["steps"] if known["sources"] == sources()]
    except (OSError, ValueError, KeyError, TypeError):  # none, or cut off, or of another version
        return {}
    lines = {step.name: step.line for step in todo}
    over = ("ok", "failed", "out of time")
    return {o.name: o for o in found if o.status in over and lines.get(o.name) == o.command}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; 1 where a step that must pass did not."""
    began = time.monotonic()
    p = argparse.ArgumentParser(prog="python -m bench.gpu", description=__doc__)
    p.add_argument("--results", type=Path, default=ROOT / "bench" / "results", metavar="FOLDER")
    p.add_argument(
        "--shapes",
        default=FITTING,
        help="ROWSxVOCAB,... or '' for all: the whole grid of cases, dtypes and providers on them, "
        "without a limit of time (default: fit, what fits 13 minutes)",
    )
    p.add_argument("--linear", default="gpu", metavar="SHAPES", help="shapes of the linear losses")
    p.add_argument("--minutes", type=float, default=MINUTES, help="for all steps, by default 13")
    p.add_argument("--only", default="", metavar="STEP,...", help="these steps alone, once more")
    p.add_argument("--again", action="store_true", help="repeat what a run before has ended")
    p.add_argument("--dry-run", action="store_true", help="print the steps, and stop")
    a = p.parse_args(argv)
    a.results = a.results.resolve()  # the steps run in the checkout's root
    todo = steps(a.results, a.shapes, target(), a.linear)
    wanted = [name for name in a.only.split(",") if name]
    for name in wanted:
        if name not in {step.name for step in todo}:
            p.error(f"--only: got {name!r}, expected of {', '.join(step.name for step in todo)}")
    before = {} if a.again else ended(a.results, todo)
    before = {name: outcome for name, outcome in before.items() if name not in wanted}
    todo = [step for step in todo if not wanted or step.name in wanted or step.name in before]
    if a.dry_run:
        for step in todo:
            limit = f"{step.limit:g} s" if step.limit else "no limit"
            about = f"skipped: {step.skip}" if step.skip else limit
            about += ", must pass" if step.must else ""
            about += f", {before[step.name].status} before" if step.name in before else ""
            print(f"# {step.name} ({about})\n{step.line}")
        return 0
    a.results.mkdir(parents=True, exist_ok=True)
    for step in todo:
        if step.name not in before:
            (a.results / f"gpu-{step.name}.json").unlink(missing_ok=True)
    seconds = 60 * a.minutes - LAST if a.shapes == FITTING else float("inf")
    # stopped from outside, it stops the step that runs, which is in a session of its own
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    return _run(todo, a.results, seconds - (time.monotonic() - began), before)


def _run(
    todo: Sequence[Step], results: Path, seconds: float, before: Mapping[str, Outcome] | None = None
) -> int:
    end = time.monotonic() + seconds
    before, own = before or {}, sources()
    outcomes: list[Outcome] = []

    def keep() -> None:
        """What is known is kept if the run is not, with what was known before."""
        later = [before[s.name] for s in todo[len(outcomes) :] if s.name in before]
        whole = {**document([*outcomes, *later], results), "sources": own}
        part = results / "gpu.json.part"
        part.write_text(json.dumps(whole, indent=1) + "\n")
        part.replace(results / "gpu.json")

    for step in todo:
        if step.name in before:
            outcomes.append(before[step.name])
            print(f"{step.name}: {before[step.name].status} before", flush=True)
            continue
        print(f"{step.name}: {step.line}", flush=True)
        outcomes.append(run(step, results, end - time.monotonic()))
        done = outcomes[-1]
        note = f": {done.note}" if done.note else ""
        print(f"{done.name}: {done.status}, {done.seconds:.0f} s{note}", flush=True)
        keep()
    keep()
    bad = [outcome for outcome in outcomes if outcome.status not in ("ok", "skipped")]
    for outcome in bad:
        print(f"{outcome.name} {outcome.status.upper()}: {outcome.note}")
    if any(outcome.status == "interrupted" for outcome in bad):
        print("the same command goes on with what was interrupted")
    return int(any(outcome.must for outcome in bad))


if __name__ == "__main__":
    sys.exit(main())
