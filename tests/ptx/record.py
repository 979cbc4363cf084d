"""`make ptx`: every case on every architecture; writes record.json, which says which have passed.

python tests/ptx/record.py [ARCH ...] [--only EXPRESSION]
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import json
import os
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
RECORD = Path(__file__).with_name("record.json")
ARCHITECTURES = ("sm_80", "sm_90", "sm_100")


def sources() -> str:
    """A hash of what the record is about: the kernels, and what has executed them."""
    digest = hashlib.sha256()
    for folder in (ROOT / "fastkd" / "backends" / "gpu", Path(__file__).parent):
        for path in sorted(folder.glob("*.py")):
            digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def run(arch: str, only: str) -> str:
    """pytest's last line."""
    command = [sys.executable, "-m", "pytest", "-n", "auto", "--maxprocesses", "8", "--tb=short"]
    command += ["tests/ptx/ptx_cases.py", *(["-k", only] if only else [])]
    env = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    env |= {"FASTKD_TEST_PTX": arch, "FASTKD_TEST_ALL": "1", "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, text=True) as process:
        last = ""
        assert process.stdout is not None
        for line in process.stdout:
            print(line, end="", flush=True)
            last = line.strip() or last
    if process.returncode:
        raise SystemExit(f"{arch}: {last}")
    return last


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("arch", nargs="*", default=list(ARCHITECTURES))
    parser.add_argument("--only", default="", help="cases, as pytest -k")
    given = parser.parse_args()
    commit = ["git", "rev-parse", "--short", "HEAD"]
    record: dict[str, Any] = {
        "passed": datetime.date.today().isoformat(),
        "commit": subprocess.run(commit, cwd=ROOT, capture_output=True, text=True).stdout.strip(),
        "tools": [f"{name} {metadata.version(name)}" for name in ("triton", "torch", "numpy")],
        "cases": given.only or "all",
        "reports": {},
        "sources": sources(),
    }
    if RECORD.exists():  # of the same: what has passed is kept
        last = json.loads(RECORD.read_text())
        same = all(last[key] == record[key] for key in ("tools", "cases", "sources"))
        record["reports"] = last["reports"] if same else {}
    for arch in given.arch:
        record["reports"][arch] = re.sub(r"[=\s]+", " ", run(arch, given.only)).strip()
        if record["sources"] != sources():
            raise SystemExit("the sources have changed meanwhile: no record")
        RECORD.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
