"""Under `make ptx`: which cases run on which architecture, and which of them have passed before."""

from __future__ import annotations

import json
import os
import shutil
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
from pairwise import cover

VARIABLE = "FASTKD_TEST_PTX_DONE"  # a folder, where record.py keeps what has passed
ARCHITECTURES = ("sm_80", "sm_90", "sm_100")
FEW = 8  # a test of so many cases runs all of them everywhere


def shares(rows: list[list[str]]) -> list[set[int]]:
    """The rows that each architecture runs: every pair of values. One at least runs each row."""
    if len(rows) <= FEW:
        return [set(range(len(rows))) for _ in ARCHITECTURES]
    parts: list[set[int]] = []
    for arch in ARCHITECTURES:
        parts.append(set(cover(rows, arch, set().union(*parts))))
    for i in set(range(len(rows))).difference(*parts):
        min(parts, key=len).add(i)
    return parts


class Passed:
    """A plugin of the process that reports: adds to a file the id of every case that passes."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.called: set[str] = set()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.passed and report.when == "call":
            self.called.add(report.nodeid)
        elif report.passed and report.when == "teardown" and report.nodeid in self.called:
            with self.path.open("a") as file:
                file.write(report.nodeid + "\n")


def pytest_configure(config: pytest.Config) -> None:
    if VARIABLE in os.environ and not hasattr(config, "workerinput"):
        passed = _folder() / "passed"
        passed.touch()
        # a worker that begins later, for one that has died, collects the same cases
        shutil.copyfile(passed, _folder() / "before")
        config.pluginmanager.register(Passed(passed))


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if VARIABLE not in os.environ:
        return
    tests = defaultdict(list)
    for item in items:
        tests[item.nodeid.partition("[")[0]].append(item)
    number, wanted = ARCHITECTURES.index(os.environ["FASTKD_TEST_PTX"]), set()
    for cases in tests.values():
        rows = [[_name(value) for value in _parameters(case)] for case in cases]
        wanted |= {cases[i].nodeid for i in shares(rows)[number]}
    if getattr(config, "workerinput", {}).get("workerid", "gw0") == "gw0":
        found = {"of": len(items), "wanted": sorted(wanted)}
        (_folder() / "wanted.json").write_text(json.dumps(found))
    wanted -= set((_folder() / "before").read_text().splitlines())
    config.hook.pytest_deselected(items=[item for item in items if item.nodeid not in wanted])
    items[:] = [item for item in items if item.nodeid in wanted]


def _parameters(item: Any) -> list[Any]:
    return list(item.callspec.params.values()) if hasattr(item, "callspec") else []


def _name(value: Any) -> str:
    """The same in every process: of a function, not where it lies."""
    return str(getattr(value, "__name__", getattr(value, "name", value)))


def _folder() -> Path:
    folder = Path(os.environ[VARIABLE]) / os.environ["FASTKD_TEST_PTX"]
    folder.mkdir(parents=True, exist_ok=True)
    return folder
