"""The kernels' own test binary (tests/kernels): built, run, and its record of aarch64 kept true."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys

import pytest

if sys.platform == "win32":
    pytest.skip("guard pages by mmap: not on Windows", allow_module_level=True)
pytest.importorskip("pybind11", reason="setup.py, where the kernels' flags stand, imports it")

from kernels import binary
from pairwise import ALL

# the first of the random cases, as in test_properties.py: another one for every run
SEED = int(os.environ.get("FASTKD_TEST_SEED") or random.SystemRandom().randrange(2**32))


def fuzz(seconds: int) -> tuple[str, ...]:
    """`make sanitize SECONDS=3600` is the long one."""
    return "fuzz", str(3 * seconds if ALL else seconds), str(SEED * 1_000_000)


# the fixed cases; one of five where each is checked on every access
FIXED = ("check",) if ALL else ("check", "5")


def require_tools(variant: str) -> None:
    missing = binary.VARIANTS[variant].missing()
    if missing is not None:
        pytest.skip(f"{missing} is not on this machine")


def assert_passes(variant: str, *words: str) -> None:
    require_tools(variant)
    done = binary.run(variant, *words)
    assert done.returncode == 0, f"{binary.build(variant)} {' '.join(words)}\n{done.stdout}"
    assert " 0 failures" in done.stdout


def best() -> str:
    """The variant with sanitizers, where this compiler builds with them."""
    require_tools("guarded")
    command = [binary.HOST, *binary.SANITIZE, "-x", "c++", "-", "-o", os.devnull]
    built = subprocess.run(command, input="int main() {}", capture_output=True, text=True)
    return "sanitize-one" if built.returncode == 0 else "guarded"


@pytest.mark.parametrize("words", [FIXED, fuzz(3)], ids=["fixed", "random"])
def test_between_guard_pages(words: tuple[str, ...]) -> None:
    assert_passes(best(), *words)


def test_aarch64() -> None:
    """Its record speaks of these kernels; if not, they are run where the tools are there."""
    facts = json.loads(binary.RECORD.read_text()) if binary.RECORD.exists() else {}
    if facts.get("csrc") == binary.digest(binary.ROOT / "csrc"):
        assert all(" 0 failures" in report for report in facts["reports"].values())
        return
    missing = binary.VARIANTS["aarch64"].missing()
    assert missing is None, (
        f"the kernels in csrc/ have changed since they last passed on aarch64 "
        f"({facts.get('passed', 'never')}, {binary.RECORD.name}), and {missing} is not here to run "
        "them: run `make aarch64` where qemu-aarch64 and aarch64-linux-gnu-g++ are"
    )
    assert_passes("aarch64", "check")
    assert_passes("aarch64", *fuzz(5))


def test_a_wrong_kernel_is_caught() -> None:
    """The binary's exit status is what all of the above stands on."""
    assert binary.run(best(), "no such word").returncode == 2
