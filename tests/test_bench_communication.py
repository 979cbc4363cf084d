"""The benchmark of what a split vocabulary moves: what is counted is what the formula says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench import communication


def test_counted_is_what_the_formula_says(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "communication.json"
    assert communication.main(["--json", str(path)]) == 0
    found = json.loads(path.read_text())
    assert "WRONG" not in capsys.readouterr().out
    for row in found["handed"].values():
        assert row["counted"] == [row["formula"]]
    one, two, *_, last = found["received_per_row"]
    assert one["logits"] == 0 and not any(one["split"].values())
    assert two["split"]["dense, labels"] <= communication.LIMIT
    assert last["ranks"] == 64 and last["logits"] > 50 * last["split"]["dense, labels"]


def test_more_than_the_limit_fails(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    as_said = {name: communication.handed(loss) for name, loss in communication.LOSSES.items()}
    monkeypatch.setattr(communication, "count", lambda world, vocab: [as_said] * world)
    assert communication.main([]) == 0
    assert communication.main(["--limit", "30"]) == 1
    as_said["dense"] += 1
    assert communication.main([]) == 1
    assert "dense   56: WRONG" in capsys.readouterr().out
