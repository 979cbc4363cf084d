"""The benchmark of the trainer, on its smallest case."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import trainer
from fastkd import distill


def test_table_and_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "trainer.json"
    threads = torch.get_num_threads()
    assert trainer.main(["--cases", "tiny", "--seconds", "0", "--json", str(path)]) == 0
    torch.set_num_threads(threads)
    (row,) = json.loads(path.read_text())["cases"]
    assert row["case"] == "tiny" and not row["counts"] and row["pairs"] == 10
    assert f"{row['overhead']:.1%}" in capsys.readouterr().out


def test_overhead_above_the_limit_fails(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(trainer, "CASES", [trainer.CASES[-1]._replace(counts=True)])
    assert trainer.main(["--seconds", "0", "--limit", "-1"]) == 1
    assert "tiny: " in capsys.readouterr().out


def test_loops_that_differ_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    real = distill.train

    def other(*operands: Any, **options: Any) -> Any:
        return real(*operands, **options | {"clip_norm": 1e-3})

    monkeypatch.setattr(trainer.distill, "train", other)
    with pytest.raises(SystemExit, match="tiny: the losses differ"):
        trainer.main(["--cases", "tiny", "--seconds", "0"])


def test_unknown_case(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        trainer.main(["--cases", "huge"])
    assert "--cases: got ['huge']" in capsys.readouterr().err
