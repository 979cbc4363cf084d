"""The kernels' own test binary (tests/kernels): built, run, and its record of aarch64 kept true."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("pybind11")  # setup.py, from which the flags are read, needs it

from kernels import binary

# so that a run of CI and one by hand are about different cases; printed where one fails
SECONDS = "20"


def _build(name: str) -> Path:
    missing = binary.VARIANTS[name].missing()
    if missing is not None:
        pytest.skip(f"{missing} is not on this machine")
    return binary.build(name)


def _passes(name: str, *words: str) -> str:
    _build(name)
    done = binary.run(name, *words)
    assert done.returncode == 0, done.stdout
    return done.stdout


def _lacks_sanitizers() -> bool:
    """Whether the compiler cannot build an empty program with them."""
    command = [binary.HOST, *binary.SANITIZE, "-x", "c++", "-", "-o", "/dev/null"]
    return subprocess.run(command, input=b"int main() {}", capture_output=True).returncode != 0


def test_fixed_cases() -> None:
    assert " 0 failures" in _passes("native", "check")


def test_random_cases_between_guard_pages(seed: int) -> None:
    assert " 0 failures" in _passes("native", "fuzz", SECONDS, str(seed))
