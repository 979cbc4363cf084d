"""Every Triton kernel compiles without a GPU, for every target, and as tightly as it should."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import fastkd

triton = pytest.importorskip("triton")
KERNELS = {"fused", "sparse", "stats", "loss", "grad", "total", "multiply"}
TARGETS = {"sm_80", "sm_90", "sm_100", "gfx942"}


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, object]]:
    """`python -m bench.aot --quick`, in a process without the interpreter."""
    out = tmp_path_factory.mktemp("aot") / "table.json"
    env = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "bench.aot", "--quick", "--json", str(out)],
        cwd=Path(__file__).parent.parent,
        env=env,
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads(out.read_text())
    assert isinstance(rows, list)
    return rows


def test_everything_is_compiled(table: list[dict[str, object]]) -> None:
    assert {row["kernel"] for row in table} == KERNELS
    assert {row["target"] for row in table} == TARGETS
    assert {row["dtype"] for row in table} == {"bf16", "fp32"}
    for kernel in ("fused", "sparse", "loss", "grad"):
        compiled = {row["divergence"] for row in table if row["kernel"] == kernel}
        assert compiled == set(fastkd.divergences), kernel


def test_nothing_spills_calls_or_reads_narrowly(table: list[dict[str, object]]) -> None:
    for row in table:
        assert row["problems"] == [], row
        assert row["spills"] == 0 and row["calls"] == 0, row
        assert row["bytes"] == 16 and row["registers"], row
