"""`make ptx`: the cases on every architecture; writes record.json, which says what has passed.

python tests/ptx/record.py [ARCH ...] [--only EXPRESSION] [--minutes N]

A call goes on where the last one was interrupted or ran out of its minutes: of the same sources and
tools, a case that has passed is not run again.
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import json
import os
import resource
import shutil
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
RECORD = Path(__file__).with_name("record.json")
ARCHITECTURES = ("sm_80", "sm_90", "sm_100")
NO_TESTS = 5  # pytest's exit status: here, all have passed before


def sources() -> str:
    """A hash of what the record is about: the kernels, and what has executed them."""
    digest = hashlib.sha256()
    for folder in (ROOT / "fastkd" / "backends" / "gpu", Path(__file__).parent):
        for path in sorted(folder.glob("*.py")):
            digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def run(arch: str, only: str, ends: float, folder: Path) -> None:
    cases = sorted(str(path) for path in Path(__file__).parent.glob("*_cases.py"))
    command = [sys.executable, "-m", "pytest", "-n", "auto", "--maxprocesses", "8", "--tb=short"]
    command += ["--dist", "worksteal", *cases, *(["-k", only] if only else [])]
    env = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    env |= {"FASTKD_TEST_PTX": arch, "FASTKD_TEST_ALL": "1", "OMP_NUM_THREADS": "1"}
    env |= {"FASTKD_TEST_PTX_DONE": str(folder)}
    env |= {"FASTKD_TEST_SECONDS": str(ends - time.monotonic())}
    status = subprocess.run(command, cwd=ROOT, env=env).returncode
    if status not in (0, NO_TESTS):
        raise SystemExit(f"{arch}: pytest has ended with {status}; what has passed is kept")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("arch", nargs="*", default=list(ARCHITECTURES))
    parser.add_argument("--only", default="", help="cases, as pytest -k")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="then no case begins")
    given = parser.parse_args()
    ends, of_tests = time.monotonic() + 60 * given.minutes, sources()
    tools = [f"{name} {metadata.version(name)}" for name in ("triton", "torch", "numpy")]
    key = hashlib.sha256("\n".join((of_tests, *tools)).encode()).hexdigest()[:16]
    folder = ROOT / "build" / "ptx" / key
    try:
        for arch in given.arch:
            if time.monotonic() < ends:
                run(arch, given.only, ends, folder)
    finally:
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        print(f"{(used.ru_utime + used.ru_stime) / 60:.0f} CPU minutes")
        if of_tests != sources():
            shutil.rmtree(folder, ignore_errors=True)
            raise SystemExit("the sources have changed meanwhile: nothing is kept")
    write(folder, {"tools": tools, "sources": of_tests})


def write(folder: Path, record: dict[str, object]) -> None:
    """record.json, once all cases have passed on all architectures."""
    ran, left, of = {}, 0, 0
    for arch in ARCHITECTURES:
        if not (folder / arch / "wanted.json").exists():
            print(f"{arch}: has not run yet")
            left += 1
            continue
        found = json.loads((folder / arch / "wanted.json").read_text())
        passed = set((folder / arch / "passed").read_text().splitlines())
        ran[arch], of = len(passed.intersection(found["wanted"])), found["of"]
        left += len(found["wanted"]) - ran[arch]
        print(f"{arch}: {ran[arch]} of {len(found['wanted'])} cases have passed")
    if left:
        raise SystemExit("not all have passed: no record yet, the next call goes on")
    commit = ["git", "rev-parse", "--short", "HEAD"]
    record = {
        "passed": datetime.date.today().isoformat(),
        "commit": subprocess.run(commit, cwd=ROOT, capture_output=True, text=True).stdout.strip(),
        "cases": of,  # each on one architecture at least
        "ran": ran,
        **record,
    }
    RECORD.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
