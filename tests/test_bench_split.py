"""The benchmark of a vocabulary split over processes, at toy size."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import fastkd
from bench import split

TOY = ["--rows", "5", "--vocab", "300", "--repeats", "2"]


def test_every_divergence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    figures, table = tmp_path / "split.json", tmp_path / "split.md"
    assert split.main([*TOY, "--json", str(figures), "--markdown", str(table)]) == 0
    document = json.loads(figures.read_text())
    assert [row["divergence"] for row in document["rows"]] == list(fastkd.divergences)
    assert document["sizes"]["vocab"] == 300 and document["machine"]["threads"] == 1
    for row in document["rows"]:
        assert row["ratio"] == pytest.approx(2 * row["ms"]["split"] / row["ms"]["unsplit"])
        assert all(row["least_ms"][way] <= row["ms"][way] for way in split.WAYS)
        rated = fastkd.divergences[row["divergence"]].expectation is None
        assert row["bytes_per_row"] == (64 if rated else 56)
        assert row["collectives"] == (3 if rated else 2)  # one of them the sizes of the call
    assert capsys.readouterr().out == table.read_text()


def test_wrong_is_not_measured(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    times = {way: [0.002, 0.004, 0.003] for way in split.WAYS}
    found: dict[str, Any] = {"seconds": times, "error": 0.0, "bytes": split.CALL + 320, "calls": 2}
    monkeypatch.setattr(split, "run", lambda sizes: [split._row("kl", [found, found], sizes)])
    assert split.main(TOY) == 0
    assert "| kl | 3.0 | 3.0 | 3.0 | 2.00 | 2.00 | 64 | 2 |" in capsys.readouterr().out
    assert split.main([*TOY, "--limit", "1.9"]) == 1
    found["bytes"] += 5
    assert split.main(TOY) == 1
    found["bytes"] -= 5
    found["error"] = float("nan")
    capsys.readouterr()
    assert split.main(TOY) == 1
    said = capsys.readouterr()
    assert "WRONG" in said.err and "| kl |" not in said.out
