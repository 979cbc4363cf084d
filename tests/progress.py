"""One line now and then that says where a run is, in place of a dot for every test."""

from __future__ import annotations

import time
from typing import Any

import pytest


class Progress:
    """A plugin of the process that reports: the controller of xdist, or pytest itself."""

    def __init__(self, every: float) -> None:
        self.every, self.begun = every, time.monotonic()
        self.said, self.total, self.done, self.failed = self.begun, 0, 0, 0

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        self.total = self.total or len(session.items)

    @pytest.hookimpl(optionalhook=True)
    def pytest_xdist_node_collection_finished(self, node: Any, ids: list[str]) -> None:
        self.total = len(ids)  # every worker collects them all

    @pytest.hookimpl(tryfirst=True)
    def pytest_report_teststatus(self, report: Any) -> tuple[str, str, str] | None:
        passed = report.when == "call" and report.passed and not hasattr(report, "wasxfail")
        return ("passed", "", "") if passed else None

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.failed += report.failed
        self.done += report.when == "teardown"
        now = time.monotonic()
        if now - self.said >= self.every:
            self.said = now
            minutes, seconds = divmod(int(now - self.begun), 60)
            failed = f", {self.failed} failed" if self.failed else ""
            where = report.nodeid.partition("[")[0]
            print(
                f"{minutes}:{seconds:02} {self.done} of {self.total} tests{failed}, at {where}",
                flush=True,
            )
