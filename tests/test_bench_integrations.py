"""The benchmark of the integrations, on its smallest case."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
pytest.importorskip("transformers", reason="transformers is not installed")
pytest.importorskip("accelerate", reason="accelerate is not installed")

from bench import integrations


def test_table_and_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "integrations.json"
    arguments = ["--cases", "tiny", "--seconds", "0", "--json", str(path)]
    assert integrations.main(arguments) == 0
    (row,) = json.loads(path.read_text())["cases"]
    assert row["case"] == "tiny" and row["pairs"] == 3
    assert f"{row['overhead']:.1%}" in capsys.readouterr().out
    assert 0 < row["peak_mib"]["fastkd"] and 0 < row["peak_mib"]["eager"]


def test_overhead_above_the_limit_fails(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(integrations, "CASES", [integrations.CASES[-1]._replace(counts=True)])
    assert integrations.main(["--seconds", "0", "--limit", "-1"]) == 1
    assert "tiny: " in capsys.readouterr().out


def test_losses_that_differ_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(integrations, "T", 3.0)
    real = integrations.eager_loss
    monkeypatch.setattr(integrations, "eager_loss", lambda *given: 1.1 * real(*given))
    with pytest.raises(SystemExit, match="tiny: the losses differ"):
        integrations.main(["--cases", "tiny", "--seconds", "0"])
