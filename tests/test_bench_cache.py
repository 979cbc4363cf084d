"""The benchmark of the teacher cache, at toy size."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench import cache

TOY = ["--vocab", "500", "--k", "4", "--length", "8", "--samples", "9", "--seconds", "0"]


def test_table_json_and_limit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "cache.json"
    folder = ["--folder", str(tmp_path), "--json", str(path)]
    assert cache.main([*TOY, *folder, "--limit", "0"]) == 0
    row = json.loads(path.read_text())
    assert row["tokens_per_batch"] == 32
    assert row["ratio"] == pytest.approx(row["read_tokens_per_s"] / row["consumed_tokens_per_s"])
    assert f"{row['read_tokens_per_s']:.0f}" in capsys.readouterr().out
    assert cache.main([*TOY, *folder, "--limit", "1e9"]) == 1
    assert list(tmp_path.iterdir()) == [path]


def test_too_few_samples(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cache.main(["--samples", "3"])
    assert "expected at least 4" in capsys.readouterr().err
