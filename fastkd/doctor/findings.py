"""What may be wrong with a distillation: the names, the texts and the lines to write."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import NamedTuple

from fastkd.scan.rules import FAULTS


class Finding(NamedTuple):
    """One fault: its name, where it is, what was seen, and what to write."""

    name: str
    file: str
    line: int
    message: str
    evidence: str
    fix: str


def finding(name: str, file: str, line: int, evidence: str, fix: str = "") -> Finding:
    message, usual = FAULTS[name]
    return Finding(name, file, line, message, evidence, usual if len(fix) < 12 else fix)


NAMES = "in the lines to write, names such as student, logits and T stand for your own"
NONE = "no optimizer step was seen after a distillation loss, so little was judged"


class Findings(list[Finding]):
    """Findings; `table()` and `str` show them."""

    def table(self) -> str:
        """One paragraph a finding."""
        if not self:
            return "no findings"
        return "\n".join([*(text(x) for x in self), NAMES])

    __str__ = table

    __repr__ = table


def text(one: Finding) -> str:
    where = f"{os.path.relpath(one.file)}:{one.line}" if one.file else "(no line)"
    lines = [f"{where}: {one.name}: {one.message}", f"    seen   {one.evidence}"]
    return "\n".join([*lines, f"    write  {one.fix}"])


def report(found: Sequence[Finding], steps: int) -> str:
    """What a run of the doctor prints."""
    count = f"{len(found)} finding{'s' if len(found) != 1 else ''}"
    end = f"{count} in {steps} step{'s' if steps != 1 else ''} of distillation"
    told = [*(text(x) for x in found), *([NAMES] if found else []), end]
    return "\n".join(told if steps else [*told, NONE])
