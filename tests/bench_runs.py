"""What the tests of the benchmark share: its tables and results read back, a spoilt provider."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

# bench is no part of the installed package; last, so that an installed fastkd stays the one tested
sys.path.append(str(Path(__file__).parents[1]))
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from bench.families.loss_cases import CASES, Case
from bench.families.loss_providers import PROVIDERS, Call, Provider
from bench.harness.timing import TimingPlan

CPU = torch.device("cpu")
KL = CASES["kl_div"]
ONCE = TimingPlan(1.0, (1, 1), 0)


def silent(text: str) -> None:
    """Says nothing."""


def tables(text: str) -> list[list[list[str]]]:
    """The Markdown tables in a text, as cells; rows of unequal length are no table."""
    found: list[list[list[str]]] = []
    inside = False
    for line in text.splitlines():
        if line.startswith("|"):
            cells = [cell.strip() for cell in line.strip("|").split("|")]
            found += [] if inside else [[]]
            found[-1].append(cells)
        inside = line.startswith("|")
    assert all(len({len(row) for row in table}) == 1 for table in found)
    return found


def results_in(file: Path) -> list[dict[str, Any]]:
    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is not JSON")

    document = json.loads(file.read_text(), parse_constant=refuse)
    for name in ("cpu", "cores", "threads", "torch", "python", "fastkd", "commit", "date"):
        assert name in document["machine"]
    return document["results"]


def spoil(monkeypatch: pytest.MonkeyPatch, name: str, how: Callable[[Call], Call]) -> None:
    """Replaces a provider by one whose call has gone through `how`."""
    right = PROVIDERS[name]

    def build(case: Case, device: torch.device) -> Call:
        return how(right.build(case, device))

    wrong = Provider(name, right.about, build, right.ours, right.inplace)
    monkeypatch.setitem(PROVIDERS, name, wrong)
