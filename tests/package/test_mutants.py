"""The list of faults of `make mutants`: each of them can still be seeded, and there are enough."""

from __future__ import annotations

from mutants import faults


def test_every_fault_applies_once() -> None:
    assert not faults.problems()


def test_there_are_enough_of_every_kind() -> None:
    found = faults.every()
    assert len(found) >= faults.LEAST
    for area in faults.AREAS:
        assert sum(fault.area == area for fault in found) >= 8
